"""Placing a request: what regional-centre staff do for a helpdesk ticket, checked before anything is written.

Order: reserve and write the trigger invisibly, mail it, let it appear. A failure in between leaves nothing behind but a
clear message; a trigger never appears without its mail having been tried first.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime

from stagecal.config import Config
from stagecal.domain.archive_facts import MousFacts
from stagecal.domain.identifiers import is_cycle_0, sanitized
from stagecal.domain.mails import Mail, compose
from stagecal.domain.trigger import Trigger, render, subject, trigger_name
from stagecal.domain.verdicts import CYCLE_0_TEXT, NO_QA0_PASS_TEXT, advice, judge
from stagecal.ports import Archive, Clock, FatalError, Mailer, MailReply, TransientError, Triggers
from stagecal.services.notifying import request_message_id

DONE, REFUSED, NOT_CONFIRMED, SURROUNDINGS = 0, 3, 4, 5


@dataclass(frozen=True)
class Desk:
    """What is needed to place a request."""

    config: Config
    clock: Clock
    archive: Archive
    triggers: Triggers
    mailer: Mailer


@dataclass(frozen=True)
class Placement:
    """What became of one request. `exit_code` as design'ed for every command: 0 placed, 3 refused, 4 not confirmed,
    5 the surroundings failed. `mail` is what became of each recipient of the request mail. A dry run fills `trigger`,
    `path`, `headers` (of the mail) and `text` with what would be written and sent now.
    """

    mous: str
    exit_code: int
    status: str
    message: str
    trigger: str = ""
    path: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    text: str = ""
    message_id: str = ""
    verdict_now: str = ""
    advice: str = ""
    mail: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def place(desk: Desk, trigger: Trigger, *, confirm: Callable[[str], bool], dry_run: bool) -> Placement:
    """Check and place one request, or say why not. `confirm` is asked where an active request exists already.

    A dry run asks the same questions and touches nothing; it ends with the same exit code. Raises KeyboardInterrupt,
    with what is known of the request, if it is interrupted.
    """
    if is_cycle_0(trigger.project):
        return _refused(trigger, f"ERROR: {trigger.project} is a Cycle 0 project. {CYCLE_0_TEXT} Do not contact AOG.")
    try:
        facts = desk.archive.facts(trigger.mous)
        fault = _fault(trigger, facts)
        if fault:
            return _refused(trigger, fault)
        active = active_triggers(desk.triggers, trigger.mous)
    except (TransientError, FatalError) as trouble:
        return _surroundings(trigger, f"nothing was placed: {trouble}")
    warnings = tuple(f"there is an active request for this MOUS already: {name}" for name in active)
    now = desk.clock.now()
    confirmed = not active or confirm(f"WARNING: {warnings[0]}. Place another one?")
    placement = Placement(
        mous=trigger.mous,
        exit_code=DONE if confirmed else NOT_CONFIRMED,
        status="would be placed" if confirmed else "not confirmed",
        message="dry run: nothing was written or sent"
        if confirmed
        else f"nothing was placed: {warnings[0]} (use --yes to place another one all the same)",
        warnings=warnings,
    )
    if dry_run:
        return _shown(desk, trigger, facts, now, placement)
    return _write_mail_publish(desk, trigger, now, warnings) if confirmed else placement


def _shown(desk: Desk, trigger: Trigger, facts: MousFacts | None, now: datetime, placement: Placement) -> Placement:
    """Return the placement with what would be written and sent, and what the daemon would say to it today."""
    verdict = judge(facts, project=trigger.project, email=trigger.email, calfields=trigger.calfields, now=now)
    name = trigger_name(trigger.mous, now)
    mail = request_mail(desk.config, trigger, name)
    return replace(
        placement,
        trigger=name,
        path=str(desk.config.triggers.directory / name),
        headers={"To": ", ".join(mail.to), "Cc": ", ".join(mail.cc), "Subject": mail.subject},
        text=mail.body,
        message_id=mail.message_id,
        verdict_now=verdict.value if verdict else "yes",
        advice=advice(verdict) if verdict else "",
    )


def _fault(trigger: Trigger, facts: MousFacts | None) -> str:
    if facts is None:
        return f"ERROR: the archive knows no MOUS {trigger.mous}. Please double-check the MOUS UID."
    if facts.project != trigger.project:
        return (
            f"ERROR: MOUS {trigger.mous} belongs to project {facts.project}, not to {trigger.project}. "
            "Please double-check both with the user."
        )
    return "" if facts.passed else NO_QA0_PASS_TEXT


def active_triggers(triggers: Triggers, mous: str) -> list[str]:
    """Return the names of the triggers that wait for this MOUS now. Raises TransientError."""
    start = f"trigger-{sanitized(mous)}-"
    return [entry.name for entry in triggers.look().entries if entry.name.startswith(start)]


def _write_mail_publish(desk: Desk, trigger: Trigger, now: datetime, warnings: tuple[str, ...]) -> Placement:
    text = render(trigger)
    name = ""
    sending = mailed = published = False
    results: dict[str, str] = {}
    try:
        name = desk.triggers.reserve(trigger.mous, now)
        desk.triggers.write_reserved(name, text.encode())
        mail = request_mail(desk.config, trigger, name)
        sending = True
        answers = desk.mailer.send(desk.config.mail.envelope_sender or mail.sender, mail.recipients, compose(mail, now))
        results = {
            address: result.reply + (f" ({result.text})" if result.reply is not MailReply.ACCEPTED else "")
            for address, result in answers.items()
        }
        left = {address for address, result in answers.items() if result.reply in _LEFT}
        mailed = bool(left)
        aog = desk.config.mail.aog
        if aog not in left:
            told = f"; the mail went to {', '.join(sorted(left))} only: tell them" if left else ""
            return _surroundings(
                trigger, f"nothing was placed: AOG's mail was not accepted: {results[aog]}{told}", results
            )
        try:
            desk.triggers.publish(name)
        except TransientError as trouble:
            if not _has_appeared(desk, name):
                raise
            warnings += (f"the trigger stands in its place, but its disk may forget it: {trouble}",)
        published = True
        unsure = [address for address, result in answers.items() if result.reply is MailReply.UNKNOWN]
        missed = [address for address in answers if address not in left]
        warnings += tuple(
            f"the mail server did not confirm the mail to {address}: it may or may not have gone" for address in unsure
        ) + tuple(f"the mail to {address} was not accepted: {results[address]}" for address in missed)
        return Placement(
            mous=trigger.mous,
            exit_code=DONE,
            status="placed",
            message=f"placed {name}",
            trigger=name,
            path=str(desk.config.triggers.directory / name),
            text=text,
            message_id=mail.message_id,
            mail=results,
            warnings=warnings,
        )
    except (TransientError, FatalError) as trouble:
        told = "; the mail went out already: tell AOG that no trigger stands behind it" if mailed else ""
        return _surroundings(trigger, f"nothing was placed: {trouble}{told}", results)
    except KeyboardInterrupt:
        published = published or _has_appeared(desk, name)
        if published:
            raise KeyboardInterrupt(f"interrupted, but placed: {name}") from None
        told = "; its mail may have gone out already: tell AOG that no trigger stands behind it" if sending else ""
        raise KeyboardInterrupt(f"interrupted: nothing was placed for {trigger.mous}{told}") from None
    finally:
        if name and not published:
            # What cannot be removed now is invisible, and the daemon removes it later.
            with suppress(TransientError, FatalError):
                desk.triggers.abandon(name)


def _has_appeared(desk: Desk, name: str) -> bool:
    with suppress(TransientError, FatalError):
        return any(entry.name == name for entry in desk.triggers.look().entries)
    return False


_LEFT = frozenset({MailReply.ACCEPTED, MailReply.UNKNOWN})


def request_mail(config: Config, trigger: Trigger, name: str) -> Mail:
    """Return the request mail: the trigger's text to AOG, with copies to the contact and the maintainer."""
    return Mail(
        kind="request",
        subject=subject(trigger.mous),
        sender=config.mail.sender,
        to=(config.mail.aog,),
        cc=(trigger.contact, config.mail.maintainer),
        reply_to=trigger.contact,
        auto_submitted="auto-generated",
        message_id=request_message_id(config.mail.message_id_domain, name),
        body=render(trigger),
    )


def _refused(trigger: Trigger, message: str) -> Placement:
    return Placement(mous=trigger.mous, exit_code=REFUSED, status="refused", message=message)


def _surroundings(trigger: Trigger, message: str, mail: dict[str, str] | None = None) -> Placement:
    return Placement(mous=trigger.mous, exit_code=SURROUNDINGS, status="failed", message=message, mail=mail or {})
