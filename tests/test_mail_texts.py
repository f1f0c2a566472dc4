"""What the mails say: every mail of the service as a golden file, and the rules that its words keep.

The goldens are the complete messages, with LF instead of CRLF, below a line per envelope recipient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from email import message_from_bytes, policy
from email.message import EmailMessage
from typing import Any

import pytest

from stagecal.adapters import job_directory
from stagecal.domain import terminal
from stagecal.domain.mails import compose, message_fault
from stagecal.domain.products import tar_name
from stagecal.domain.records import MailKind, NewMail, OutboxMail, ProductFile, Recipient, RecipientState, Step
from stagecal.domain.requests import Origin, Request, State
from stagecal.domain.retention import Staging
from stagecal.domain.trigger import Trigger, render, trigger_name
from stagecal.domain.verdicts import Verdict, advice
from stagecal.ports import JobHandle
from stagecal.services.alarms import alarm_mail
from stagecal.services.context import Site
from stagecal.services.notifying import (
    delivered_mail,
    failed_mail,
    malformed_mail,
    refusal_mail,
    request_message_id,
    undeliverable_mail,
)
from stagecal.services.requesting import request_mail

MOUS = "uid://A001/X12a3/X80e"
BLOCKS = ("uid://A002/Xce574d/Xa33e", "uid://A002/Xcf92df/X3453")
TOKEN = "0123456789abcdef0123456789abcdef"
URL = f"https://data.example.org/preview/{TOKEN}"

Compare = Callable[[str, str], None]


def request_of(time: datetime, *calfields: str, user: str = "Ada Example") -> Request:
    """Return a request as the daemon makes it of a trigger."""
    trigger = Trigger(
        "contact@example.org", "copy@example.org", MOUS, "2017.1.01347.S", calfields, user, "pi@example.org", "16140"
    )
    return Request(
        id="5f0c1a2b3c4d5e6f",
        sequence=1,
        origin=Origin.TRIGGER,
        mous=MOUS,
        project=trigger.project,
        ticket=trigger.ticket,
        user=trigger.user,
        email=trigger.email,
        calfields=calfields,
        contact=trigger.contact,
        trigger_name=trigger_name(MOUS, time),
        trigger_text=render(trigger),
        trigger_sha256="0" * 64,
        received_at=time,
        state=State.RECEIVED,
        since=time,
    )


def staged(site: Site, request: Request, time: datetime, blocks: tuple[str, ...], *others: str) -> Request:
    """Record that products of these EBs, and other files, stand published for the request."""
    files = [
        ProductFile(tar_name(block), block, 5_764_321_280 + number, "1" * 64, 1, number, 1)
        for number, block in enumerate(blocks)
    ]
    files += [ProductFile(name, "", 43_210, "2" * 64, 1, 100 + number, 1) for number, name in enumerate(others)]
    added = site.ledger.add(request, Step("receive"))
    assert added is not None
    accepted = site.ledger.commit(added, now=time, to=State.ACCEPTED, execution_blocks=BLOCKS, token=TOKEN)
    return site.ledger.commit(
        accepted,
        now=time,
        to=State.STAGED,
        staging=Staging(TOKEN, request.id, "", time, None, 28),
        files=files,
        absent=[block for block in BLOCKS if block not in blocks],
    )


def parsed(mail: NewMail) -> EmailMessage:
    message: Any = message_from_bytes(mail.message, policy=policy.default)
    assert isinstance(message, EmailMessage)
    return message


def body_of(mail: NewMail) -> str:
    return str(parsed(mail).get_content()).replace("\r\n", "\n")


def as_golden(mail: NewMail) -> str:
    assert message_fault(mail.message) == ""
    envelope = "".join(f"Envelope-To: {address}\n" for address in (*mail.primary, *mail.copies))
    return envelope + mail.message.decode().replace("\r\n", "\n")


# --- request -------------------------------------------------------------------------------------------------------


def test_the_request_mail(text_site: Site, golden: Compare, example_time: datetime) -> None:
    trigger = Trigger(
        "contact@example.org",
        "maintainer@example.org",
        MOUS,
        "2017.1.01347.S",
        ("J0510+1800", "J0440+1437"),
        "Jürgen O'Brien, 李",
        "pi@example.org",
        "16140",
    )
    mail = request_mail(text_site.config, trigger, trigger_name(MOUS, example_time))
    message = compose(mail, example_time)
    assert message_fault(message) == ""
    envelope = "".join(f"Envelope-To: {address}\n" for address in mail.recipients)
    golden("mails/request.eml", envelope + message.decode().replace("\r\n", "\n"))


# --- delivered -----------------------------------------------------------------------------------------------------


def test_the_mail_with_the_link_of_a_full_request(text_site: Site, golden: Compare, example_time: datetime) -> None:
    request = staged(text_site, request_of(example_time), example_time, BLOCKS, "PPR_uid___A001_X12a3_X80f.xml")
    golden("mails/delivered_full.eml", as_golden(delivered_mail(text_site, request, example_time)))


def test_the_mail_with_the_link_of_a_calibrator_request(
    text_site: Site, golden: Compare, example_time: datetime
) -> None:
    request = request_of(example_time, "J0510+1800", "J0440+1437")
    mail = delivered_mail(text_site, staged(text_site, request, example_time, BLOCKS), example_time)
    golden("mails/delivered_calibrators.eml", as_golden(mail))


def test_the_mail_with_the_link_names_execution_blocks_without_the_fields(
    text_site: Site, golden: Compare, example_time: datetime
) -> None:
    request = staged(text_site, request_of(example_time, "J0510+1800"), example_time, BLOCKS[:1])
    mail = delivered_mail(text_site, request, example_time)
    golden("mails/delivered_absent.eml", as_golden(mail))
    assert "uid___A002_Xcf92df_X3453\n" in body_of(mail)
    assert "uid___A002_Xcf92df_X3453.ms" not in body_of(mail)


def test_the_mail_with_the_link_begins_with_the_words_of_the_procedure(text_site: Site, example_time: datetime) -> None:
    request = staged(text_site, request_of(example_time), example_time, BLOCKS)
    lines = body_of(delivered_mail(text_site, request, example_time)).splitlines()
    assert lines[:5] == [
        "Your calibrated data is ready for download from",
        URL,
        "It will be deleted 28 days from now.",
        "Kind regards,",
        "The ESO ALMA Team",
    ]


def test_the_mail_with_the_link_shows_nobody_who_else_gets_it(text_site: Site, example_time: datetime) -> None:
    request = staged(text_site, request_of(example_time), example_time, BLOCKS)
    mail = delivered_mail(text_site, request, example_time)
    assert mail.primary == ("pi@example.org",)
    assert mail.copies == ("contact@example.org", "aog@example.org", "maintainer@example.org")
    message = parsed(mail)
    assert (message["To"], message["Cc"], message["Bcc"]) == ("pi@example.org", None, None)
    for other in mail.copies:
        assert other.encode() not in mail.message


def test_a_date_in_the_mail_is_a_promise_and_never_too_late(text_site: Site, example_time: datetime) -> None:
    request = staged(text_site, request_of(example_time), example_time, BLOCKS)
    mail = delivered_mail(text_site, request, example_time)
    record = text_site.ledger.staging(TOKEN)
    assert record is not None
    accepted = replace(record, notified_at=example_time + timedelta(seconds=1))
    assert "available at least until 2026-01-30 03:04 UTC" in body_of(mail)
    assert accepted.expires >= example_time + timedelta(days=28)


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verdict", list(Verdict))
def test_a_refusal(text_site: Site, golden: Compare, verdict: Verdict, example_time: datetime) -> None:
    calfields = ("J0440+1437",) if verdict is Verdict.NOT_A_CALIBRATOR_FIELD else ()
    detail = "J0440+1437 is observed as science target (OBSERVE_TARGET) in uid___A002_Xcf92df_X3453.ms.split.cal"
    request = replace(request_of(example_time, *calfields), reason=detail if calfields else "", verdict=verdict)
    mail = refusal_mail(text_site, request, verdict, example_time)
    golden(f"mails/refusal_{verdict.name.lower()}.eml", as_golden(mail))

    body = body_of(mail)
    assert body.splitlines()[0] == verdict.value
    assert advice(verdict) in body
    quoted = "".join(f"> {line}\n" if line else ">\n" for line in request.trigger_text.splitlines())
    assert body.endswith("\n\n" + quoted)


def test_a_refusal_answers_the_request_mail(text_site: Site, example_time: datetime) -> None:
    request = request_of(example_time)
    message = parsed(refusal_mail(text_site, request, Verdict.NOT_ENTITLED, example_time))
    assert message["In-Reply-To"] == request_message_id("data.example.org", request.trigger_name)
    assert message["Subject"] == "Re: ALMA: REQUEST FOR CALIBRATED DATA MOUS uid___A001_X12a3_X80e"
    assert message["Auto-Submitted"] == "auto-replied"


def test_not_entitled_says_what_the_contact_tells_the_user(text_site: Site, example_time: datetime) -> None:
    body = body_of(refusal_mail(text_site, request_of(example_time), Verdict.NOT_ENTITLED, example_time))
    assert (
        "You presently do not have access permission for the requested data. "
        "Please wait until the data becomes public." in body
    )


def test_a_name_cannot_pose_as_template_or_as_a_line_of_ours(text_site: Site, example_time: datetime) -> None:
    request = request_of(example_time, user="{{ url }} {% raw %}")
    body = body_of(refusal_mail(text_site, request, Verdict.NOT_ENTITLED, example_time))
    assert "> for user {{ url }} {% raw %}\n" in body
    forged = replace(request, trigger_text="EU ARC contact a@example.org\u2028NOT A QUOTE\x0bNEITHER")
    body = body_of(refusal_mail(text_site, forged, Verdict.NOT_ENTITLED, example_time))
    assert body.endswith("> EU ARC contact a@example.org\n> NOT A QUOTE\n> NEITHER\n")


# --- what people have to look at -----------------------------------------------------------------------------------


def failed_request(site: Site, time: datetime) -> Request:
    request = replace(
        request_of(time, "J0510+1800"),
        reason="the job ended with exit code 3",
        node="node-1",
        work="WORK23486",
        nonce="c0ffee00",
    )
    assert site.ledger.add(request, Step("receive"))
    site.ledger.commit(
        site.ledger.get(request.id),
        now=time,
        terminal=[
            *terminal.start(URL, request.calfields),
            *terminal.dispatched("node-1", "arcproc@node-1", "/work/WORK23486", old_casa=False),
            *terminal.failed(f"/var/www/preview/{TOKEN}", MOUS, "/work/WORK23486"),
        ],
    )
    return request


def test_a_failure_with_the_whole_output(text_site: Site, golden: Compare, example_time: datetime) -> None:
    request = failed_request(text_site, example_time)
    job = JobHandle(request.node, request.work, request.nonce)
    text_site.nodes.prepare(job, {"run.sh": b"exit 3\n"})
    (text_site.nodes.directory(job) / job_directory.OUTPUT).write_text("CASA 6.7\n\x1b[31mNo space “left”\n")
    mail = failed_mail(text_site, request, example_time)
    body = body_of(mail)
    for line in (
        "the job ended with exit code 3",
        "stagecalms 2017.1.01347.S uid://A001/X12a3/X80e 16140 X J0510+1800",
        "*** Based on your selection, only data for field J0510+1800 will be staged. ***",
        "The working directory /work/WORK23486 on the EU ARC cluster was not removed.",
        "stagecal why 5f0c1a2b3c4d5e6f",
        "stagecal retry 5f0c1a2b3c4d5e6f",
        "No space “left”",
    ):
        assert line in body
    assert mail.primary == ("maintainer@example.org",)
    (text_site.nodes.directory(job) / job_directory.OUTPUT).write_bytes(b"CASA 6.7\nNo space left on device\n")
    golden("mails/failed.eml", as_golden(failed_mail(text_site, request, example_time)))


def test_a_failure_before_there_was_a_job(text_site: Site, golden: Compare, example_time: datetime) -> None:
    request = replace(request_of(example_time), reason="the engine is not there: set [restore] command")
    assert text_site.ledger.add(request, Step("receive"))
    golden("mails/failed_without_job.eml", as_golden(failed_mail(text_site, request, example_time)))


def test_a_malformed_trigger(text_site: Site, golden: Compare, example_time: datetime) -> None:
    name = trigger_name(MOUS, example_time)
    reason = "the calfield line is empty: name the fields, or leave the line out for all data"
    text = render(
        Trigger("contact@example.org", "c@example.org", MOUS, "2017.1.01347.S", (), "A", "pi@example.org", "1")
    ).replace("for user", "calfield\nfor user")
    mail = malformed_mail(text_site, name, "0" * 64, reason, text, "contact@example.org", example_time)
    golden("mails/malformed.eml", as_golden(mail))
    assert (mail.primary, mail.copies[0]) == (("aog@example.org",), "contact@example.org")


def test_a_malformed_trigger_without_readable_text(text_site: Site, golden: Compare, example_time: datetime) -> None:
    name = "trigger-\x1b[2J\udc80\nStagecal says: all is well.txt"
    mail = malformed_mail(text_site, name, "0" * 64, "it is a symbolic link", "", "", example_time)
    golden("mails/malformed_unreadable.eml", as_golden(mail))
    body = body_of(mail)
    assert "\nStagecal says" not in body and "\x1b" not in body


def test_the_contact_learns_that_the_user_was_not_reached_and_gets_no_link(
    text_site: Site, golden: Compare, example_time: datetime
) -> None:
    request = staged(text_site, request_of(example_time), example_time, BLOCKS)
    refused = Recipient(request.email, True, RecipientState.REFUSED, 1, None, "550 5.1.1 no such user here")
    sent = OutboxMail(1, request.id, MailKind.DELIVERED, "<1@data.example.org>", "", b"", example_time, (refused,))
    mail = undeliverable_mail(text_site, request, sent, example_time)
    golden("mails/undeliverable.eml", as_golden(mail))
    assert mail.primary == ("contact@example.org",)
    assert TOKEN not in body_of(mail)
    assert "550 5.1.1 no such user here" in body_of(mail)


def test_an_alarm(text_site: Site, golden: Compare, example_time: datetime) -> None:
    mail = alarm_mail(text_site, "the staging disk is full", "12.3 GB free, 20.0 GB are the reserve", example_time)
    golden("mails/alarm.eml", as_golden(mail))
