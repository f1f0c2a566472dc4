"""What every Mailer promises, shown on a maildir and on a real SMTP server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller

from stagecal.adapters.mail_maildir import MaildirMailer
from stagecal.adapters.mail_smtp import SmtpMailer
from stagecal.domain.mails import Mail, compose, message_id
from stagecal.ports import Mailer, MailReply

SENDER = "bounces@arc.example.org"
MESSAGE = b"Subject: Data\r\nMessage-ID: <delivered.1@arc.example.org>\r\n\r\nDear user,\r\n"


@dataclass(frozen=True)
class Delivered:
    sender: str
    recipients: tuple[str, ...]
    message: bytes


@dataclass(frozen=True)
class Site:
    """A mailer, and a look at what has arrived through it."""

    mailer: Mailer
    delivered: Callable[[], list[Delivered]]


class LoopbackController(Controller):
    def _trigger_server(self) -> None:
        # aiosmtpd 1.4.6 probes port 0 itself where the system has chosen one.
        self.port = self.server.sockets[0].getsockname()[1]
        super()._trigger_server()


class Inbox:
    def __init__(self) -> None:
        self.messages: list[Delivered] = []

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        self.messages.append(Delivered(envelope.mail_from, tuple(envelope.rcpt_tos), envelope.content))
        return "250 queued as 1"


def maildir_site(tmp_path: Path) -> Iterator[Site]:
    directory = tmp_path / "deep" / "mail"

    def delivered() -> list[Delivered]:
        found = []
        for path in sorted((directory / "new").iterdir()):
            to, sender, message = path.read_bytes().split(b"\r\n", 2)
            assert to.startswith(b"X-Envelope-To: ") and sender.startswith(b"X-Envelope-From: ")
            recipients = tuple(to.decode().removeprefix("X-Envelope-To: ").split(", "))
            found.append(Delivered(sender.decode().removeprefix("X-Envelope-From: "), recipients, message))
        return found

    yield Site(MaildirMailer(directory), delivered)


def smtp_site(tmp_path: Path) -> Iterator[Site]:
    inbox = Inbox()
    controller = LoopbackController(inbox, hostname="127.0.0.1", port=0)
    controller.start()
    try:
        mailer = SmtpMailer("127.0.0.1", controller.port, timeout_s=5, final_timeout_s=5, local_hostname="localhost")
        yield Site(mailer, lambda: inbox.messages)
    finally:
        controller.stop()


# A site may be added here, such as a private Postfix: anything that yields a Site.
SITES = {"maildir": maildir_site, "smtp": smtp_site}


@pytest.fixture(params=SITES)
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    yield from SITES[request.param](tmp_path)


def a_composed(body: str, name: str = "Süß", bcc: tuple[str, ...] = ()) -> bytes:
    mail = Mail(
        kind="delivered",
        subject=f"Data for {name}",
        sender="ALMA <alma@arc.example.org>",
        to=(f"{name} <user@example.org>",),
        bcc=bcc,
        auto_submitted="auto-generated",
        message_id=message_id("delivered", "1", "arc.example.org"),
        body=body,
    )
    return compose(mail, datetime(2024, 2, 29, tzinfo=UTC))


def test_every_recipient_is_accepted_and_the_envelope_arrives(site: Site) -> None:
    recipients = ("user@example.org", "o'brien@example.org", "-f@example.org")
    results = site.mailer.send(SENDER, recipients, MESSAGE)
    assert {recipient: result.reply for recipient, result in results.items()} == dict.fromkeys(
        recipients, MailReply.ACCEPTED
    )
    assert all(result.text for result in results.values())
    assert site.delivered() == [Delivered(SENDER, recipients, MESSAGE)]


@pytest.mark.parametrize("name", ["Süß", "李", "O'Brien", "Doe, J.", "x" * 200, "🔭" * 50])
def test_composed_mail_for_any_name_arrives_byte_for_byte(site: Site, name: str) -> None:
    message = a_composed(f"Dear {name},\n\nyour data\n", name)
    site.mailer.send(SENDER, ["user@example.org"], message)
    assert [delivered.message for delivered in site.delivered()] == [message]


@pytest.mark.parametrize(
    "body",
    [".\n", ".\n.\n..\n...x\n", "x\n.\nRCPT TO:<evil@example.org>\n.\n", "\n\n", "", "From x\n", "y" * 998 + "\n"],
)
def test_lines_that_mean_something_to_mail_systems_arrive_as_they_are(site: Site, body: str) -> None:
    message = a_composed(body)
    site.mailer.send(SENDER, ["user@example.org"], message)
    assert [delivered.message for delivered in site.delivered()] == [message]


def test_a_message_that_begins_with_a_dot_arrives(site: Site) -> None:
    message = b".Subject: x\r\n\r\n.\r\n"
    site.mailer.send(SENDER, ["user@example.org"], message)
    assert [delivered.message for delivered in site.delivered()] == [message]


def test_one_mebibyte_of_terminal_output_arrives(site: Site) -> None:
    message = a_composed("2024-02-29 12:00:00\tINFO\tcasa\tsplit.\n" * 28000)
    assert len(message) > 2**20
    site.mailer.send(SENDER, ["user@example.org"], message)
    assert [delivered.message for delivered in site.delivered()] == [message]


def test_bcc_recipients_are_in_the_envelope_only(site: Site) -> None:
    message = a_composed("x\n", bcc=("aog@example.org",))
    site.mailer.send(SENDER, ["user@example.org", "aog@example.org"], message)
    (delivered,) = site.delivered()
    assert "aog@example.org" in delivered.recipients
    assert b"aog@" not in delivered.message


def test_no_recipient_gives_no_result_and_no_mail(site: Site) -> None:
    site.mailer.send(SENDER, ["user@example.org"], MESSAGE)
    assert site.mailer.send(SENDER, [], MESSAGE) == {}
    assert len(site.delivered()) == 1


def test_a_recipient_given_twice_gets_one_mail(site: Site) -> None:
    results = site.mailer.send(SENDER, ["user@example.org", "user@example.org"], MESSAGE)
    assert list(results) == ["user@example.org"]
    assert site.delivered() == [Delivered(SENDER, ("user@example.org",), MESSAGE)]


@pytest.mark.parametrize(
    "evil",
    [
        "a@example.org>\r\nRCPT TO:<evil@example.org",
        "a@example.org\nX-Evil: yes",
        "a@example.org, evil@example.org",
        "a@example.org> NOTIFY=NEVER",
        "jüdit@example.org",
        "a\0@example.org",
        "",
    ],
)
def test_what_is_no_address_is_refused_and_keeps_nobody_elses_mail_back(site: Site, evil: str) -> None:
    results = site.mailer.send(SENDER, [evil, "user@example.org"], MESSAGE)
    assert results[evil].reply is MailReply.REFUSED
    assert results["user@example.org"].reply is MailReply.ACCEPTED
    assert site.delivered() == [Delivered(SENDER, ("user@example.org",), MESSAGE)]


@pytest.mark.parametrize("evil", ["a@example.org\r\nX-Evil: yes", "a@example.org> SIZE=1", "nobody"])
def test_a_sender_that_is_no_address_waits_for_the_operator(site: Site, evil: str) -> None:
    site.mailer.send(SENDER, ["user@example.org"], MESSAGE)
    results = site.mailer.send(evil, ["user@example.org"], MESSAGE)
    assert results["user@example.org"].reply is MailReply.TRANSIENT
    assert "sender" in results["user@example.org"].text
    assert len(site.delivered()) == 1


@pytest.mark.parametrize(
    "message",
    [
        b"Subject: x\r\n\r\n.\n.\r\nMAIL FROM:<evil@example.org>\r\n",
        b"Subject: x\r\n\r\nx\n.\r\n",
        b"Subject: x\r\n\r\nx",
    ],
)
def test_a_message_that_could_be_read_as_two_is_refused(site: Site, message: bytes) -> None:
    site.mailer.send(SENDER, ["user@example.org"], MESSAGE)
    assert site.mailer.send(SENDER, ["user@example.org"], message)["user@example.org"].reply is MailReply.REFUSED
    assert len(site.delivered()) == 1


def test_a_resend_is_a_second_copy_with_the_same_bytes(site: Site) -> None:
    for _ in range(2):
        site.mailer.send(SENDER, ["user@example.org"], MESSAGE)
    assert [delivered.message for delivered in site.delivered()] == [MESSAGE, MESSAGE]


# --- what only the maildir promises ----------------------------------------------------------------------------


def test_maildir_is_complete_and_private_and_tmp_is_left_empty(tmp_path: Path) -> None:
    MaildirMailer(tmp_path / "mail").send(SENDER, ["user@example.org"], MESSAGE)
    assert sorted(path.name for path in (tmp_path / "mail").iterdir()) == ["cur", "new", "tmp"]
    assert not list((tmp_path / "mail" / "tmp").iterdir())
    (file,) = (tmp_path / "mail" / "new").iterdir()
    assert file.stat().st_mode & 0o077 == 0
    assert (tmp_path / "mail").stat().st_mode & 0o077 == 0


def test_maildir_names_sort_in_the_order_of_sending_and_end_alike_for_a_resend(tmp_path: Path) -> None:
    mailer = MaildirMailer(tmp_path)
    texts = [mailer.send(SENDER, ["user@example.org"], MESSAGE)["user@example.org"].text for _ in range(20)]
    names = [text.rpartition("/")[2] for text in texts]
    assert sorted(names) == names == sorted(path.name for path in (tmp_path / "new").iterdir())
    assert len({name.rpartition(".")[2] for name in names}) == 1


@pytest.mark.parametrize("obstacle", ["mail", "mail/new", "mail/tmp"])
def test_maildir_that_cannot_be_written_is_transient_and_nothing_stays(tmp_path: Path, obstacle: str) -> None:
    path = tmp_path / obstacle
    path.parent.mkdir(exist_ok=True)
    path.write_text("a file stands where the directory should be")
    results = MaildirMailer(tmp_path / "mail").send(SENDER, ["a@example.org", "b@example.org"], MESSAGE)
    assert {result.reply for result in results.values()} == {MailReply.TRANSIENT}
    assert str(tmp_path / "mail") in results["a@example.org"].text
    assert not [path for path in tmp_path.rglob("*P*Q*") if path.is_file()]


def test_full_disk_is_transient_and_nothing_stays(tmp_path: Path) -> None:
    import resource
    import signal

    mailer = MaildirMailer(tmp_path)
    mailer.send(SENDER, ["user@example.org"], MESSAGE)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        large = MESSAGE + b"x" * 78 + b"\r\n" + (b"y" * 78 + b"\r\n") * 1000
        result = mailer.send(SENDER, ["user@example.org"], large)["user@example.org"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert result.reply is MailReply.TRANSIENT
    assert len(list((tmp_path / "new").iterdir())) == 1
    assert not list((tmp_path / "tmp").iterdir())
