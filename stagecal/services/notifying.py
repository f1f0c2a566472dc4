"""Mails: rendered once, kept in the outbox as bytes, sent until each recipient is accepted or refused for good.

A mail with a link leaves only after the request was judged on that very day. Trouble with a copy never keeps the
user's mail back.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime, timedelta

from stagecal.domain.identifiers import sanitized
from stagecal.domain.mails import message_id, quoted
from stagecal.domain.records import MailKind, NewMail, OutboxMail, Recipient, RecipientState, Step
from stagecal.domain.requests import Origin, Outcome, Request, State, retry_delay
from stagecal.domain.terminal import restoring
from stagecal.domain.trigger import subject as request_subject
from stagecal.domain.verdicts import Verdict, advice
from stagecal.ports import FatalError, MailReply, RecipientResult, TransientError
from stagecal.services.alarms import alarm_mail, new_mail
from stagecal.services.context import Site
from stagecal.services.dispatching import cleaned, handle_of, release_slot
from stagecal.services.judging import judge_request
from stagecal.services.publishing import page_values

log = logging.getLogger(__name__)

_MAIL_LINES = 4
LIFETIME = timedelta(days=5)
"""How long a mail is tried (RFC 5321 §4.5.4.1: at least four to five days)."""


# --- what the mails say --------------------------------------------------------------------------------------------


def request_message_id(site_domain: str, trigger_name: str) -> str:
    """Return the Message-ID of the request mail that belongs to a trigger of this name."""
    return message_id(MailKind.REQUEST, trigger_name, site_domain)


def _identity(request: Request) -> str:
    return f"{request.id}/{request.round}"


def mail_id_of(site: Site, request: Request, kind: MailKind) -> str:
    """Return the Message-ID of the request's mail of this kind in its present round."""
    return message_id(kind, _identity(request), site.config.mail.message_id_domain)


def _threading(site: Site, request: Request) -> str:
    return request_message_id(site.config.mail.message_id_domain, request.trigger_name) if request.trigger_name else ""


def delivered_mail(site: Site, request: Request, now: datetime) -> NewMail:
    """Return the mail with the link: to the user, to everybody else in the envelope only."""
    settings = site.config.mail
    files, absent = site.ledger.staged_files(request.token)
    until = now + timedelta(days=site.config.staging.retention_days)
    body = site.templates.render(
        "mails/delivered.txt",
        **page_values(site, request, files, absent, until),
        signature=settings.signature,
    )
    return new_mail(
        site,
        MailKind.DELIVERED,
        _identity(request),
        subject=f"Re: {request_subject(request.mous)}, helpdesk ticket {request.ticket}",
        body=body,
        to=[request.email],
        bcc=[request.contact, settings.aog, settings.maintainer],
        reply_to=settings.reply_to or "",
        now=now,
    )


def restored_mail(site: Site, request: Request, now: datetime) -> NewMail:
    """Return the mail that a restore is complete, with where its measurement sets lie."""
    body = site.templates.render(
        "mails/restored.txt",
        mous=request.mous,
        project=request.project,
        lines=_lines_of_this_round(site, request),
    )
    return new_mail(
        site,
        MailKind.RESTORED,
        _identity(request),
        subject=f"Restored: calibrated data of MOUS {sanitized(request.mous)}",
        body=body,
        to=[request.email],
        now=now,
    )


def _lines_of_this_round(site: Site, request: Request) -> list[str]:
    """Return what the terminal shows since the restore was begun; what failed before a retry is no news."""
    lines = [line for _, line in site.ledger.terminal(request.id)]
    (first,) = restoring(request.mous)
    begun = max((number for number, line in enumerate(lines) if line == first), default=0)
    return lines[begun:]


def refusal_mail(site: Site, request: Request, verdict: Verdict, now: datetime) -> NewMail:
    """Return the reply that refuses: the verdict above the quoted request."""
    settings = site.config.mail
    body = site.templates.render(
        "mails/refusal.txt",
        verdict=verdict.value,
        advice=advice(verdict),
        detail=request.reason if verdict is Verdict.NOT_A_CALIBRATOR_FIELD else "",
        quoted=quoted(request.trigger_text or request.command_line),
    )
    is_restore = request.origin is Origin.RESTORE
    return new_mail(
        site,
        MailKind.REFUSAL,
        _identity(request),
        subject=f"Re: {request_subject(request.mous)}",
        body=body,
        to=[request.email if is_restore else request.contact],
        cc=[] if is_restore else [settings.aog, settings.maintainer],
        in_reply_to=_threading(site, request),
        is_reply=True,
        now=now,
    )


def failed_mail(site: Site, request: Request, now: datetime) -> NewMail:
    """Return the mail to the maintainer: the command line and the whole terminal output."""
    values = {
        "id": request.id,
        "mous": sanitized(request.mous),
        "reason": request.reason,
        "command_line": request.command_line,
        "terminal": "\n".join(line for _, line in site.ledger.terminal(request.id)),
        "output": _job_output(site, request),
        "node": request.node,
        "restore": request.origin is Origin.RESTORE,
    }
    try:
        body = site.templates.render("mails/failed.txt", **values)
    except FatalError as error:
        # The one mail that tells of trouble must leave even if the trouble is the templates.
        body = "\n\n".join([str(error), *(f"{name}: {value}" for name, value in values.items())])
    return new_mail(
        site,
        MailKind.FAILED,
        _identity(request),
        subject=f"FAILED: calibrated data of MOUS {sanitized(request.mous)}"
        + (f", helpdesk ticket {request.ticket}" if request.ticket else ""),
        body=body,
        to=[site.config.mail.maintainer],
        cc=[request.email] if request.origin is Origin.RESTORE and request.email else [],
        now=now,
    )


def _job_output(site: Site, request: Request) -> str:
    if not request.work:
        return ""
    try:
        return site.nodes.output(handle_of(request))
    except (TransientError, FatalError) as trouble:
        return f"(the job's output cannot be read: {trouble})"


def undeliverable_mail(site: Site, request: Request, mail: OutboxMail, now: datetime) -> NewMail:
    """Return the mail that tells the contact that the user's address is refused."""
    refused = next((one for one in mail.primary if one.state is not RecipientState.ACCEPTED), mail.primary[0])
    body = site.templates.render(
        "mails/undeliverable.txt",
        id=request.id,
        email=request.email,
        reply=refused.text,
        quoted=quoted(request.trigger_text),
    )
    settings = site.config.mail
    return new_mail(
        site,
        MailKind.UNDELIVERABLE,
        f"{_identity(request)}/{request.since:%Y-%m-%dT%H:%M:%S}",
        subject=f"Re: {request_subject(request.mous)}",
        body=body,
        to=[request.contact],
        cc=[settings.aog, settings.maintainer],
        in_reply_to=_threading(site, request),
        is_reply=True,
        now=now,
    )


def malformed_mail(site: Site, name: str, digest: str, reason: str, text: str, contact: str, now: datetime) -> NewMail:
    """Return the mail about a trigger that can never become a request: to AOG, and to the contact if he is known."""
    body = site.templates.render("mails/malformed.txt", name=name, reason=reason, quoted=quoted(text))
    settings = site.config.mail
    shown = "".join(character if character.isprintable() else "?" for character in name)[:120]
    return new_mail(
        site,
        MailKind.MALFORMED,
        f"{name}/{digest}",
        subject=f"MALFORMED REQUEST: {shown}",
        body=body,
        to=[settings.aog],
        cc=[contact] if contact else [],
        bcc=[settings.maintainer],
        in_reply_to=request_message_id(settings.message_id_domain, name),
        is_reply=True,
        now=now,
    )


# --- sending -------------------------------------------------------------------------------------------------------


def deliver(site: Site, mail: OutboxMail, now: datetime) -> OutboxMail:
    """Try the recipients that are due; return the mail as the outbox has it then.

    A mail server may keep a sender waiting for minutes, so only so many mails are on their way at a time.
    """
    with ExitStack() as held:
        if not held.enter_context(site.locks.try_lock(f"mail-{mail.id}")):
            return mail
        lines = (held.enter_context(site.locks.try_lock(f"mail-line-{number}")) for number in range(_MAIL_LINES))
        if not any(lines):
            return mail
        return _attempt(site, site.ledger.mail(mail.message_id) or mail, now)


def _attempt(site: Site, mail: OutboxMail, now: datetime) -> OutboxMail:
    due = mail.pending(now)
    if not due:
        return mail
    # Counted before the attempt, so that a mail which kills us is not tried at once again.
    counted = [replace(one, attempts=one.attempts + 1, not_before=now + retry_delay(one.attempts + 1)) for one in due]
    site.ledger.update_recipients(mail.id, counted)
    results = site.mailer.send(mail.sender, [one.address for one in due], mail.message)
    outcome = [_after(one, results[one.address], mail, now) for one in counted]
    site.ledger.update_recipients(mail.id, outcome)
    seen = "; ".join(f"{one.address} {_word(one)}" for one in outcome)
    site.ledger.note(mail.request, Step(f"mail {mail.kind}", "is it accepted?", seen, mail.message_id), now)
    return site.ledger.mail(mail.message_id) or mail


def _after(one: Recipient, result: RecipientResult, mail: OutboxMail, now: datetime) -> Recipient:
    """Return what an attempt means for a recipient."""
    if result.reply is MailReply.ACCEPTED:
        return replace(one, state=RecipientState.ACCEPTED, not_before=None, text=result.text)
    if result.reply is MailReply.REFUSED:
        return replace(one, state=RecipientState.REFUSED, not_before=None, text=result.text)
    if result.reply is MailReply.UNKNOWN and one.unconfirmed:
        # It was sent whole twice under one Message-ID: more copies would help nobody.
        text = f"taken as accepted after two attempts without an answer: {result.text}"
        return replace(one, state=RecipientState.ACCEPTED, not_before=None, text=text)
    if now - (one.tried_since or mail.created_at) > LIFETIME:
        text = f"given up after {LIFETIME.days} days: {result.text}"
        return replace(one, state=RecipientState.DROPPED, not_before=None, text=text)
    unconfirmed = one.unconfirmed or result.reply is MailReply.UNKNOWN
    return replace(one, text=result.text, unconfirmed=unconfirmed)


def _word(recipient: Recipient) -> str:
    if recipient.state is RecipientState.PENDING:
        return f"not yet ({recipient.text})"
    return f"{recipient.state}" + (f" ({recipient.text})" if recipient.state is not RecipientState.ACCEPTED else "")


def deliver_due(site: Site, now: datetime) -> datetime | None:
    """Send what is due of mails that no request waits for; return when the next such mail is due."""
    upcoming = []
    for mail in site.ledger.unsent_mails():
        request = site.ledger.get(mail.request) if mail.request else None
        waits = request is not None and request.state in (State.STAGED, State.REFUSED, State.FAILED)
        if waits and mail.kind in _AWAITED and not mail.accepted:
            continue
        try:
            if mail.kind is MailKind.DELIVERED and request is not None and not _may_leave(site, request, mail, now):
                continue
        except (TransientError, FatalError) as trouble:
            log.warning("copies of the mail of request %s have to wait: %s", mail.request, trouble)
            upcoming.append(now + timedelta(minutes=5))
            continue
        sent = deliver(site, mail, now)
        if any(one.state is RecipientState.PENDING for one in sent.recipients):
            upcoming.append(sent.next_attempt or now + timedelta(minutes=1))
    return min(upcoming, default=None)


_AWAITED = frozenset({MailKind.DELIVERED, MailKind.RESTORED, MailKind.REFUSAL, MailKind.FAILED})
"""The kinds that a step of their request sends itself."""


def _may_leave(site: Site, request: Request, mail: OutboxMail, now: datetime) -> bool:
    """Return whether the pending copies of a mail with a link may leave now; if they never may again, drop them.

    Copies follow the user's mail: it was accepted (or refused for good, and the request waits for an operator), the
    data are published, and the request was judged today.
    """
    if not mail.pending(now):
        return True
    staging = site.ledger.staging(request.token) if request.token else None
    current = mail.message_id == mail_id_of(site, request, MailKind.DELIVERED)
    if staging is None or staging.withdrawn_at is not None or not current or request.verdict is not None:
        return drop_pending(site, mail, request.verdict or "its data are no longer published")
    if not site.ledger.staged_files(request.token)[0]:
        return drop_pending(site, mail, "its data are rotten or not on record")
    if request.state is State.WITHDRAWING or request.outcome is Outcome.WITHDRAWN:
        return drop_pending(site, mail, "the request was withdrawn")
    if request.judged_on != now.date():
        judgement = judge_request(site, request, now)
        if judgement.verdict is not None:
            return drop_pending(site, mail, judgement.verdict)
        site.ledger.commit(request, now=now, step=judgement.step, judged_on=now.date())
    return True


def drop_pending(site: Site, mail: OutboxMail, why: str) -> bool:
    """Give the pending recipients of a mail up; returns False."""
    dropped = [
        replace(one, state=RecipientState.DROPPED, not_before=None, text=f"not sent: {why}")
        for one in mail.recipients
        if one.state is RecipientState.PENDING
    ]
    site.ledger.update_recipients(mail.id, dropped)
    return False


def _enqueued(site: Site, request: Request, mail: NewMail, now: datetime) -> OutboxMail:
    site.ledger.enqueue(request.id, [mail], now)
    found = site.ledger.mail(mail.message_id)
    assert found is not None, "a mail that was enqueued is in the outbox"  # noqa: S101 - for the type checker
    return found


# --- the states that owe a mail ------------------------------------------------------------------------------------


def step_staged(site: Site, request: Request, now: datetime) -> Request:
    """STAGED: the data are there; the user gets the link, if he may still have it today."""
    if request.origin is Origin.RESTORE:
        return _restored(site, request, now)
    if request.work:
        return cleaned(site, request, now)
    if not site.staging.is_published(request.token):
        return site.ledger.commit(
            request,
            now=now,
            to=State.FAILED,
            step=Step("notify", "is the directory there?", "no", "FAILED"),
            reason="the published directory is gone",
        )
    if not site.ledger.staged_files(request.token)[0]:
        return site.ledger.commit(
            request,
            now=now,
            to=State.FAILED,
            step=Step("notify", "can the staged data be trusted?", "no", "FAILED"),
            reason="its staged data are rotten or not on record (`stagecal why` says more); `retry` makes them anew",
        )
    if request.origin is Origin.OPERATOR:
        return _notified(site, request, now)
    if request.judged_on != now.date():
        judgement = judge_request(site, request, now)
        if judgement.verdict is not None:
            return site.ledger.commit(
                request, now=now, to=State.REFUSED, step=judgement.step, verdict=judgement.verdict, judged_on=now.date()
            )
        request = site.ledger.commit(request, now=now, step=judgement.step, judged_on=now.date())
    mail = deliver(site, _enqueued(site, request, delivered_mail(site, request, now), now), now)
    if mail.accepted:
        return _notified(site, request, now)
    if mail.refused:
        return site.ledger.commit(
            request,
            now=now,
            to=State.HELD,
            step=Step("notify", "does the user's address accept it?", "refused for good", "HELD"),
            reason=f"the address {request.email} is refused: {mail.primary[0].text}",
            mails=[undeliverable_mail(site, request, mail, now)],
        )
    return site.ledger.commit(request, now=now, not_before=mail.next_attempt, reason=mail.primary[0].text)


def _restored(site: Site, request: Request, now: datetime) -> Request:
    """Tell who asked for a restore that it is complete; an address that is refused changes nothing about the data."""
    seen = "nobody to tell"
    if request.email:
        mail = deliver(site, _enqueued(site, request, restored_mail(site, request, now), now), now)
        if not (mail.accepted or mail.refused):
            return site.ledger.commit(request, now=now, not_before=mail.next_attempt, reason=mail.primary[0].text)
        seen = "yes" if mail.accepted else f"refused for good: {mail.primary[0].text}"
    return site.ledger.commit(
        request,
        now=now,
        to=State.NOTIFIED,
        step=Step("notify", "is the mail accepted?", seen, "delivered"),
        outcome=Outcome.DELIVERED,
        reason="",
    )


def _notified(site: Site, request: Request, now: datetime) -> Request:
    staging = site.ledger.staging(request.token)
    return site.ledger.commit(
        request,
        now=now,
        to=State.NOTIFIED,
        step=Step(
            "notify",
            "is the mail accepted?",
            "yes" if request.origin is Origin.TRIGGER else "nobody to tell",
            "delivered",
        ),
        outcome=Outcome.DELIVERED,
        reason="",
        staging=replace(staging, notified_at=now) if staging else None,
    )


def step_refused(site: Site, request: Request, now: datetime) -> Request:
    """REFUSED: nothing stays published; the contact gets the reply."""
    request = _job_given_up(site, request, now)
    if request.holds_slot:
        return request
    staging = site.ledger.staging(request.token) if request.token else None
    if staging is not None and staging.withdrawn_at is None:
        site.staging.withdraw(request.token)
        site.ledger.update_staging(replace(staging, withdrawn_at=now), now)
    verdict = request.verdict or Verdict.INVALID_MOUS_UID
    if request.origin is Origin.OPERATOR or (request.origin is Origin.RESTORE and not request.email):
        return _refusal_told(site, request, now)
    mail = deliver(site, _enqueued(site, request, refusal_mail(site, request, verdict, now), now), now)
    if mail.accepted or (mail.refused and request.origin is Origin.RESTORE):
        return _refusal_told(site, request, now)
    if mail.refused:
        return site.ledger.commit(
            request,
            now=now,
            to=State.HELD,
            step=Step("notify", "does the contact's address accept it?", "refused for good", "HELD"),
            reason=f"the address {request.contact} is refused: {mail.primary[0].text}",
            mails=[alarm_mail(site, "a refusal cannot be delivered", f"request {request.id}", now, about=request.id)],
        )
    return site.ledger.commit(request, now=now, not_before=mail.next_attempt, reason=mail.primary[0].text)


def _refusal_told(site: Site, request: Request, now: datetime) -> Request:
    return site.ledger.commit(
        request,
        now=now,
        to=State.NOTIFIED,
        step=Step("notify", "is the reply accepted?", "yes", "refused"),
        outcome=Outcome.REFUSED,
    )


def step_failed(site: Site, request: Request, now: datetime) -> Request:
    """FAILED: the maintainer gets one mail with everything; its slot is given back; then a person looks."""
    if request.failed_with:
        seen = f"told for {request.failed_with}"
    else:
        # First of all, for a node that is silent may keep the slot for hours.
        mail = deliver(site, _enqueued(site, request, failed_mail(site, request, now), now), now)
        if not (mail.accepted or mail.refused):
            return site.ledger.commit(request, now=now, not_before=mail.next_attempt)
        seen = "yes" if mail.accepted else f"refused for good: {mail.primary[0].text}"
    if request.holds_slot:
        return release_slot(site, request, now)
    return site.ledger.commit(
        request, now=now, to=State.HELD, step=Step("notify", "is the maintainer told?", seen, "HELD")
    )


def _job_given_up(site: Site, request: Request, now: datetime) -> Request:
    """Remove what the job of a refused request left."""
    if request.holds_slot:
        return release_slot(site, request, now)
    return cleaned(site, request, now) if request.work else request
