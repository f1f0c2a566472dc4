"""Mail by SMTP: one connection and one transaction for all recipients of a message.

`SmtpMailer.send` never raises. Until the final dot has been sent nothing can have been delivered, and trouble is
TRANSIENT, or REFUSED where the server says so for good. Once it has been sent, only the server knows: without its
answer the outcome is UNKNOWN. This module is imported only where mail is sent.
"""

from __future__ import annotations

import contextlib
import smtplib
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stagecal.domain.mails import is_address, message_fault
from stagecal.ports import MailReply, RecipientResult, UsageError

# 5xx answers that concern our own login or encryption and say nothing about the message (RFC 3207, RFC 4954).
_OUR_OWN_ACCESS = (524, 525, 530, 534, 535, 538)
_SHUTTING_DOWN = 421
_START_DATA = 354
_TEXT_LIMIT = 500
_QUIT_TIMEOUT_S = 5.0


class _SessionError(Exception):
    """The session cannot get as far as a message; the text says what the operator can do."""


@dataclass(frozen=True)
class SmtpMailer:
    """Sends through the site's mail server.

    `timeout_s` bounds each wait before the final dot. `final_timeout_s` bounds the wait for the answer to it:
    RFC 5321 (section 4.5.3.2.6) asks for ten minutes, because giving up earlier makes second copies. The server's
    certificate is always verified, against `ca_file` where that is given, else against the system's authorities.
    """

    host: str
    port: int
    starttls: bool = False
    user: str | None = None
    password_file: Path | None = None
    password_group: str | None = None
    timeout_s: float = 60.0
    final_timeout_s: float = 600.0
    local_hostname: str | None = None
    ca_file: Path | None = None

    def send(self, sender: str, recipients: Sequence[str], message: bytes) -> Mapping[str, RecipientResult]:
        """Send the message (complete, CRLF line ends) to these envelope recipients; return a result for each."""
        wanted = tuple(dict.fromkeys(recipients))
        fault = message_fault(message)
        settled = {
            recipient: RecipientResult(MailReply.REFUSED, fault or "not an address that SMTP can carry")
            for recipient in wanted
            if fault or not is_address(recipient)
        }
        open_recipients = [recipient for recipient in wanted if recipient not in settled]
        outcome = RecipientResult(MailReply.TRANSIENT)
        if open_recipients:
            outcome = self._session(sender, open_recipients, message, settled)
        return {recipient: settled.get(recipient, outcome) for recipient in wanted}

    def _session(
        self, sender: str, recipients: Sequence[str], message: bytes, settled: dict[str, RecipientResult]
    ) -> RecipientResult:
        """Return the outcome for all recipients that this call does not put into `settled`."""
        if sender and not is_address(sender):
            return RecipientResult(
                MailReply.TRANSIENT, f"the envelope sender {sender[:80]!r} is no address: mend it in the configuration"
            )
        # Every wait and every parser of the server's words ends here: the port promises a result, and before the
        # final dot each of these failures means the same.
        try:
            connection = self._connect()
        except _SessionError as error:
            return RecipientResult(MailReply.TRANSIENT, str(error))
        except Exception as error:
            return self._trouble(error)
        try:
            return self._transaction(connection, sender, recipients, message, settled)
        except Exception as error:
            return self._trouble(error)
        finally:
            connection.close()

    def _connect(self) -> smtplib.SMTP:
        """Return a connection that has greeted, is encrypted and logged in as configured."""
        password = self._password()
        connection = smtplib.SMTP(self.host, self.port, local_hostname=self.local_hostname, timeout=self.timeout_s)
        try:
            if self.starttls:
                self._encrypt(connection)
            connection.ehlo_or_helo_if_needed()
            if self.user:
                self._log_in(connection, self.user, password)
        except BaseException:
            connection.close()
            raise
        return connection

    def _password(self) -> str:
        if not self.user or self.password_file is None:
            return ""
        from stagecal.config import read_secret

        try:
            return read_secret(self.password_file, group=self.password_group)
        except UsageError as error:
            raise _SessionError(str(error)) from error

    def _encrypt(self, connection: smtplib.SMTP) -> None:
        try:
            connection.starttls(context=ssl.create_default_context(cafile=self.ca_file))
        except smtplib.SMTPNotSupportedError:
            raise _SessionError(
                f"the mail server {self._place} does not offer STARTTLS: "
                "ask its administrators, or set starttls = false in [mail] for a server on this machine"
            ) from None
        except ssl.SSLCertVerificationError as error:
            raise _SessionError(
                f"the certificate of the mail server {self._place} is not trusted ({error.verify_message}): "
                "check [mail] host, or let the system trust the authority that signed it"
            ) from error

    def _log_in(self, connection: smtplib.SMTP, user: str, password: str) -> None:
        remedy = "check user and password_file in [mail]"
        try:
            connection.login(user, password)
        except smtplib.SMTPNotSupportedError:
            raise _SessionError(f"the mail server {self._place} offers no login: {remedy}") from None
        except smtplib.SMTPAuthenticationError as error:
            raise _SessionError(
                f"the mail server {self._place} refused the login of {user} "
                f"({_words(error.smtp_code, error.smtp_error)}): {remedy}"
            ) from None
        except ValueError:
            # Such an error quotes what could not be encoded, and that is the password.
            raise _SessionError(f"user or password for {self._place} cannot be sent as ASCII: {remedy}") from None

    def _transaction(
        self,
        connection: smtplib.SMTP,
        sender: str,
        recipients: Sequence[str],
        message: bytes,
        settled: dict[str, RecipientResult],
    ) -> RecipientResult:
        """Send one message; trouble raised from here happened before the final dot had been sent completely."""
        options = []
        if connection.has_extn("size"):
            options.append(f"SIZE={len(message)}")
        if not message.isascii() and connection.has_extn("8bitmime"):
            options.append("BODY=8BITMIME")
        answer = _answer(*connection.mail(sender, options))
        if answer.reply is not MailReply.ACCEPTED:
            return answer
        for recipient in recipients:
            code, reply = connection.rcpt(recipient)
            answer = _answer(code, reply)
            if code == _SHUTTING_DOWN:
                return answer
            if answer.reply is not MailReply.ACCEPTED:
                settled[recipient] = answer
        if all(recipient in settled for recipient in recipients):
            _quit(connection, self.timeout_s)
            return answer
        code, reply = connection.docmd("DATA")
        if code != _START_DATA:
            answer = _answer(code, reply)
            return RecipientResult(MailReply.TRANSIENT, answer.text) if answer.reply is MailReply.ACCEPTED else answer
        # A failure of this one call means that at least the end of the message never left this machine.
        connection.send((b"\r\n" + message).replace(b"\r\n.", b"\r\n..")[2:] + b".\r\n")
        outcome = self._reply_to_final_dot(connection)
        _quit(connection, self.timeout_s)
        return outcome

    def _reply_to_final_dot(self, connection: smtplib.SMTP) -> RecipientResult:
        try:
            if connection.sock is not None:
                connection.sock.settimeout(self.final_timeout_s)
            code, reply = connection.getreply()
        except Exception as error:
            text = f"no answer after the message was sent, it may have been delivered ({_one_line(str(error))})"
            return RecipientResult(MailReply.UNKNOWN, text)
        answer = _answer(code, reply)
        if code // 100 in (2, 4, 5):
            return answer
        return RecipientResult(MailReply.UNKNOWN, f"not understood after the message was sent: {answer.text}")

    def _trouble(self, error: Exception) -> RecipientResult:
        """Return what an error before the final dot means."""
        text = str(error) or type(error).__name__
        if isinstance(error, smtplib.SMTPResponseException):
            text = _words(error.smtp_code, error.smtp_error)
        return RecipientResult(MailReply.TRANSIENT, _one_line(f"mail server {self._place}: {text}"))

    @property
    def _place(self) -> str:
        return f"{self.host}:{self.port}"


def _answer(code: int, reply: bytes) -> RecipientResult:
    """Return what a reply before or at the end of a message means for the recipients that it concerns."""
    text = _words(code, reply)
    if code // 100 == 2:
        return RecipientResult(MailReply.ACCEPTED, text)
    if code // 100 == 5 and code not in _OUR_OWN_ACCESS:
        return RecipientResult(MailReply.REFUSED, text)
    return RecipientResult(MailReply.TRANSIENT, text)


def _quit(connection: smtplib.SMTP, timeout_s: float) -> None:
    """Say goodbye; the outcome is known already, so that nothing can go wrong any more."""
    with contextlib.suppress(Exception):
        if connection.sock is not None:
            connection.sock.settimeout(min(timeout_s, _QUIT_TIMEOUT_S))
        connection.quit()


def _words(code: int, reply: bytes | str) -> str:
    """Return a server's reply as one printable line."""
    text = reply.decode("utf-8", "replace") if isinstance(reply, bytes) else reply
    return _one_line(f"{code} {text}" if code >= 0 else text)


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return "".join(character if character.isprintable() else "?" for character in line)[:_TEXT_LIMIT]
