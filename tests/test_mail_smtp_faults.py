"""What is known of a mail after each way in which an SMTP session can fail, shown on real sockets."""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult, LoginPassword

from stagecal.adapters.mail_smtp import SmtpMailer
from stagecal.ports import MailReply

ACCEPTED, TRANSIENT, REFUSED, UNKNOWN = MailReply.ACCEPTED, MailReply.TRANSIENT, MailReply.REFUSED, MailReply.UNKNOWN
SENDER = "bounces@arc.example.org"
MESSAGE = b"Subject: Data\r\n\r\nDear user,\r\n.\r\n"

# What a script does at a verb instead of the usual reply.
DROP = b"(close the connection)"
HANG = b"(say nothing)"
LATE = b"250 late"
USUAL = {"EHLO": b"250 mail", "DATA": b"354 go on", "DOT": b"250 queued as ABC123", "QUIT": b"221 bye"}


@dataclass
class ScriptedServer:
    """Answers each verb (GREETING, EHLO, MAIL, RCPT, DATA, DOT, QUIT) as scripted, else as a good server does."""

    script: dict[str, bytes]
    commands: list[str] = field(default_factory=list)
    messages: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.finished = threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection, connection.makefile("rb") as lines, contextlib.suppress(OSError):
                self._converse(connection, lines)

    def _converse(self, connection: socket.socket, lines: Any) -> None:
        if not self._reply(connection, "GREETING", b"220 mail"):
            return
        while line := lines.readline():
            command = line.decode("latin-1").strip()
            verb = command[:4].upper()
            command = verb + command[4:]
            self.commands.append(command)
            reply = self.script.get(command) or self.script.get(verb) or USUAL.get(verb, b"250 ok")
            if not self._say(connection, reply):
                return
            if verb == "DATA" and reply.startswith(b"354"):
                message = b""
                while not message.endswith(b"\r\n.\r\n"):
                    part = lines.readline()
                    if not part:
                        return
                    message += part
                self.messages.append(message)
                if not self._reply(connection, "DOT", USUAL["DOT"]):
                    return

    def _reply(self, connection: socket.socket, verb: str, usual: bytes) -> bool:
        return self._say(connection, self.script.get(verb, usual))

    def _say(self, connection: socket.socket, reply: bytes) -> bool:
        if reply == HANG:
            self.finished.wait(10)
            return False
        if reply == DROP:
            return False
        if reply == LATE:
            self.finished.wait(0.6)
        connection.sendall(reply + b"\r\n")
        return True

    def close(self) -> None:
        self.finished.set()
        # Closing alone does not wake a thread that waits in accept().
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(5)


@pytest.fixture
def server() -> Iterator[Callable[[dict[str, bytes]], ScriptedServer]]:
    started: list[ScriptedServer] = []

    def start(script: dict[str, bytes]) -> ScriptedServer:
        started.append(ScriptedServer(script))
        return started[-1]

    yield start
    for each in started:
        each.close()


Start = Callable[[dict[str, bytes]], ScriptedServer]


def a_mailer(port: int, **changes: Any) -> SmtpMailer:
    settings = {"host": "127.0.0.1", "timeout_s": 0.5, "final_timeout_s": 0.5, "local_hostname": "localhost"}
    return SmtpMailer(port=port, **settings | changes)


def replies(mailer: SmtpMailer, recipients: Sequence[str] = ("a@x.org", "b@x.org")) -> list[MailReply]:
    results = mailer.send(SENDER, recipients, MESSAGE)
    assert list(results) == list(recipients)
    assert all(result.text and result.text.isprintable() for result in results.values())
    return [result.reply for result in results.values()]


@pytest.mark.parametrize(
    "script",
    [
        {"GREETING": b"421 busy"},
        {"GREETING": b"554 no service for you"},
        {"GREETING": b"SSH-2.0-OpenSSH_9.2"},
        {"GREETING": DROP},
        {"GREETING": HANG},
        {"EHLO": DROP},
        {"EHLO": HANG},
        {"EHLO": b"502 no", "HELO": b"502 no"},
        {"MAIL": DROP},
        {"MAIL": HANG},
        {"MAIL": b"451 later"},
        {"MAIL": b"530 5.7.0 must issue a STARTTLS command first"},
        {"MAIL": b"\x1b[2J\xff garbage"},
        {"RCPT": b"450 greylisted"},
        {"RCPT": b"451 later"},
        {"RCPT": b"421 shutting down"},
        {"RCPT": DROP},
        {"RCPT": b"x" * 10000},
        {"DATA": DROP},
        {"DATA": HANG},
        {"DATA": b"451 disk"},
        {"DATA": b"250 what?"},
        {"DOT": b"451 disk"},
        {"DOT": b"421 shutting down"},
    ],
    ids=str,
)
def test_trouble_that_delivered_nothing_is_transient(server: Start, script: dict[str, bytes]) -> None:
    assert replies(a_mailer(server(script).port)) == [TRANSIENT, TRANSIENT]


@pytest.mark.parametrize(
    "script",
    [{"MAIL": b"550 sender"}, {"RCPT": b"551 moved"}, {"RCPT": b"550 no"}, {"DATA": b"554 no"}, {"DOT": b"554 spam"}],
    ids=str,
)
def test_refusals_for_good_are_refused(server: Start, script: dict[str, bytes]) -> None:
    assert replies(a_mailer(server(script).port)) == [REFUSED, REFUSED]


@pytest.mark.parametrize(
    "at_the_dot", [DROP, HANG, b"\xff\xfe what", b"354 go on", b"y" * 10000], ids=lambda b: str(b[:12])
)
def test_no_clear_answer_after_the_final_dot_is_unknown(server: Start, at_the_dot: bytes) -> None:
    listening = server({"DOT": at_the_dot})
    assert replies(a_mailer(listening.port)) == [UNKNOWN, UNKNOWN]
    assert len(listening.messages) == 1


def test_the_answer_to_the_final_dot_has_its_own_longer_time(server: Start) -> None:
    assert replies(a_mailer(server({"DOT": LATE}).port, timeout_s=0.3, final_timeout_s=5)) == [ACCEPTED, ACCEPTED]
    assert replies(a_mailer(server({"MAIL": LATE}).port, timeout_s=0.3, final_timeout_s=5)) == [TRANSIENT, TRANSIENT]


def test_the_time_for_the_final_answer_is_ten_minutes_by_default() -> None:
    assert SmtpMailer("127.0.0.1", 25).final_timeout_s >= 600


@pytest.mark.parametrize("at_quit", [DROP, HANG, b"500 what?", b"421 bye"], ids=str)
def test_trouble_at_quit_changes_nothing(server: Start, at_quit: bytes) -> None:
    started = time.monotonic()
    assert replies(a_mailer(server({"QUIT": at_quit}).port)) == [ACCEPTED, ACCEPTED]
    assert replies(a_mailer(server({"QUIT": at_quit, "RCPT": b"550 no"}).port)) == [REFUSED, REFUSED]
    assert time.monotonic() - started < 8, "a silent server may not hold the sender up"


def test_each_recipient_has_its_own_answer(server: Start) -> None:
    listening = server(
        {"RCPT TO:<gone@x.org>": b"550 5.1.1 no such user", "RCPT TO:<grey@x.org>": b"450 4.2.0 greylisted"}
    )
    results = a_mailer(listening.port).send(SENDER, ["a@x.org", "gone@x.org", "grey@x.org", "b@x.org"], MESSAGE)
    assert [(result.reply, result.text) for result in results.values()] == [
        (ACCEPTED, "250 queued as ABC123"),
        (REFUSED, "550 5.1.1 no such user"),
        (TRANSIENT, "450 4.2.0 greylisted"),
        (ACCEPTED, "250 queued as ABC123"),
    ]
    assert len(listening.messages) == 1


@pytest.mark.parametrize(("at_the_dot", "expected"), [(DROP, UNKNOWN), (b"451 disk", TRANSIENT), (b"554 no", REFUSED)])
def test_a_recipient_refused_before_keeps_its_answer_whatever_follows(
    server: Start, at_the_dot: bytes, expected: MailReply
) -> None:
    listening = server({"RCPT TO:<gone@x.org>": b"550 no", "RCPT TO:<grey@x.org>": b"450 later", "DOT": at_the_dot})
    assert replies(a_mailer(listening.port), ["gone@x.org", "a@x.org", "grey@x.org"]) == [REFUSED, expected, TRANSIENT]


def test_a_server_that_leaves_among_the_recipients_has_delivered_to_none(server: Start) -> None:
    for leaving in (DROP, b"421 shutting down"):
        listening = server({"RCPT TO:<gone@x.org>": b"550 no", "RCPT TO:<c@x.org>": leaving})
        assert replies(a_mailer(listening.port), ["a@x.org", "gone@x.org", "c@x.org", "d@x.org"]) == [
            TRANSIENT,
            REFUSED,
            TRANSIENT,
            TRANSIENT,
        ]
        assert not listening.messages


def test_no_message_is_sent_when_nobody_may_receive_it(server: Start) -> None:
    listening = server({"RCPT": b"550 no"})
    replies(a_mailer(listening.port))
    assert "DATA" not in listening.commands


def test_dots_are_stuffed_on_the_wire(server: Start) -> None:
    listening = server({})
    assert replies(a_mailer(listening.port)) == [ACCEPTED, ACCEPTED]
    assert listening.messages == [b"Subject: Data\r\n\r\nDear user,\r\n..\r\n.\r\n"]


@pytest.mark.parametrize(
    ("offer", "message", "expected"),
    [
        (b"250 mail", "ü", "MAIL FROM:<bounces@arc.example.org>"),
        (b"250-mail\r\n250 8BITMIME", "ü", "MAIL FROM:<bounces@arc.example.org> BODY=8BITMIME"),
        (b"250-mail\r\n250 8BITMIME", "u", "MAIL FROM:<bounces@arc.example.org>"),
        (b"250-mail\r\n250-SMTPUTF8\r\n250 SIZE 1000", "u", "MAIL FROM:<bounces@arc.example.org> SIZE=17"),
    ],
)
def test_the_server_is_told_of_eight_bits_and_size_if_it_asks(
    server: Start, offer: bytes, message: str, expected: str
) -> None:
    listening = server({"EHLO": offer})
    a_mailer(listening.port).send(SENDER, ["a@x.org"], f"Subject: x\r\n\r\n{message}\r\n".encode())
    assert listening.commands[1] == expected


def test_the_empty_envelope_sender_is_possible(server: Start) -> None:
    listening = server({})
    results = a_mailer(listening.port).send("", ["a@x.org"], MESSAGE)
    assert results["a@x.org"].reply is ACCEPTED
    assert "MAIL FROM:<>" in listening.commands


def test_a_large_message_to_a_server_that_stops_reading_is_transient(server: Start) -> None:
    stopped = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def converse() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                connection.sendall(b"220 mail\r\n")
                for reply in (b"250 mail", b"250 ok", b"250 ok", b"354 go on"):
                    connection.recv(1000)
                    connection.sendall(reply + b"\r\n")
                stopped.wait(10)

        thread = threading.Thread(target=converse, daemon=True)
        thread.start()
        large = b"Subject: x\r\n\r\n" + (b"x" * 78 + b"\r\n") * 200_000
        result = a_mailer(listener.getsockname()[1]).send(SENDER, ["a@x.org"], large)["a@x.org"]
        stopped.set()
        thread.join(5)
    assert result.reply is TRANSIENT


def test_a_port_where_nobody_listens_is_transient() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    result = a_mailer(port).send(SENDER, ["a@x.org"], MESSAGE)["a@x.org"]
    assert result.reply is TRANSIENT
    assert f"127.0.0.1:{port}" in result.text and "refused" in result.text


@pytest.mark.parametrize("host", ["mail.invalid", "mail host", "x" * 300, "ü" * 70])
def test_a_host_that_has_no_address_is_transient(host: str) -> None:
    results = SmtpMailer(host, 25, timeout_s=0.5).send(SENDER, ["a@x.org"], MESSAGE)
    assert results["a@x.org"].reply is TRANSIENT
    assert results["a@x.org"].text


# --- encryption and login ----------------------------------------------------------------------------------------


class LoopbackController(Controller):
    def _trigger_server(self) -> None:
        # aiosmtpd 1.4.6 probes port 0 itself where the system has chosen one.
        self.port = self.server.sockets[0].getsockname()[1]
        super()._trigger_server()


class Inbox:
    def __init__(self) -> None:
        self.messages: list[bytes] = []

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        self.messages.append(envelope.content)
        return "250 queued"


def authenticate(server: Any, session: Any, envelope: Any, mechanism: str, login: Any) -> AuthResult:
    right = isinstance(login, LoginPassword) and (login.login, login.password) == (b"stagecal", b"correct horse")
    return AuthResult(success=right, handled=False)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("tls")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-days", "2", "-subj", "/CN=mail", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", "key.pem", "-out", "certificate.pem"),
        ],
        cwd=directory,
        check=True,
        capture_output=True,
        timeout=60,
    )
    return directory / "certificate.pem", directory / "key.pem"


@pytest.fixture
def secure(certificate: tuple[Path, Path]) -> Iterator[tuple[LoopbackController, Inbox]]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    inbox = Inbox()
    controller = LoopbackController(
        inbox,
        hostname="127.0.0.1",
        port=0,
        tls_context=context,
        require_starttls=True,
        authenticator=authenticate,
        auth_required=True,
    )
    controller.start()
    yield controller, inbox
    controller.stop()


@pytest.fixture
def password_file(tmp_path: Path) -> Path:
    path = tmp_path / "smtp.password"
    path.touch(mode=0o600)
    path.write_text("correct horse\n")
    return path


@pytest.fixture
def secure_mailer(
    secure: tuple[LoopbackController, Inbox], certificate: tuple[Path, Path], password_file: Path
) -> Callable[..., SmtpMailer]:
    def make(**changes: Any) -> SmtpMailer:
        settings = {"starttls": True, "user": "stagecal", "password_file": password_file, "ca_file": certificate[0]}
        return a_mailer(secure[0].port, timeout_s=5, final_timeout_s=5, **settings | changes)

    return make


def only_result(mailer: SmtpMailer) -> tuple[MailReply, str]:
    result = mailer.send(SENDER, ["a@x.org"], MESSAGE)["a@x.org"]
    assert result.text.isprintable()
    assert "horse" not in result.text
    return result.reply, result.text


def test_mail_leaves_encrypted_and_logged_in(
    secure_mailer: Callable[..., SmtpMailer], secure: tuple[LoopbackController, Inbox]
) -> None:
    assert only_result(secure_mailer()) == (ACCEPTED, "250 queued")
    assert secure[1].messages == [MESSAGE]


@pytest.mark.parametrize("password", ["wrong", "wröng"])
def test_wrong_credentials_keep_the_mail_for_the_operator(
    secure_mailer: Callable[..., SmtpMailer], password_file: Path, password: str
) -> None:
    password_file.write_text(password)
    reply, text = only_result(secure_mailer())
    assert reply is TRANSIENT
    assert "password_file" in text and password not in text


def test_a_missing_login_keeps_the_mail_for_the_operator(secure_mailer: Callable[..., SmtpMailer]) -> None:
    reply, text = only_result(secure_mailer(user=None))
    assert reply is TRANSIENT
    assert "Authentication required" in text


def test_missing_encryption_keeps_the_mail_for_the_operator(secure_mailer: Callable[..., SmtpMailer]) -> None:
    reply, text = only_result(secure_mailer(starttls=False, user=None))
    assert reply is TRANSIENT
    assert "STARTTLS" in text


def test_an_untrusted_certificate_keeps_the_mail_for_the_operator(secure_mailer: Callable[..., SmtpMailer]) -> None:
    reply, text = only_result(secure_mailer(ca_file=None))
    assert reply is TRANSIENT
    assert "certificate" in text


def test_a_certificate_of_another_host_keeps_the_mail_for_the_operator(
    secure: tuple[LoopbackController, Inbox], certificate: tuple[Path, Path]
) -> None:
    mailer = a_mailer(secure[0].port, timeout_s=5, starttls=True, ca_file=certificate[0], host="localhost")
    reply, text = only_result(mailer)
    assert reply is TRANSIENT
    assert "certificate" in text


@pytest.mark.parametrize("mode", [0o644, 0o660])
def test_a_password_that_others_can_read_or_change_is_not_used(
    secure_mailer: Callable[..., SmtpMailer], password_file: Path, mode: int
) -> None:
    password_file.chmod(mode)
    reply, text = only_result(secure_mailer())
    assert reply is TRANSIENT
    assert str(password_file) in text


def test_a_password_file_that_is_gone_is_named(secure_mailer: Callable[..., SmtpMailer], tmp_path: Path) -> None:
    reply, text = only_result(secure_mailer(password_file=tmp_path / "none"))
    assert reply is TRANSIENT
    assert str(tmp_path / "none") in text


def test_a_server_without_encryption_or_login_is_named_as_such(server: Start, password_file: Path) -> None:
    port = server({}).port
    assert "does not offer STARTTLS" in only_result(a_mailer(port, starttls=True))[1]
    reply, text = only_result(a_mailer(port, user="stagecal", password_file=password_file))
    assert reply is TRANSIENT
    assert "offers no login" in text


@pytest.mark.parametrize("answer", [DROP, HANG, b"454 not now", b"220 go on"], ids=str)
def test_encryption_that_does_not_come_about_is_transient(server: Start, answer: bytes) -> None:
    listening = server({"EHLO": b"250-mail\r\n250 STARTTLS", "STAR": answer})
    assert only_result(a_mailer(listening.port, starttls=True))[0] is TRANSIENT
    assert not listening.messages
