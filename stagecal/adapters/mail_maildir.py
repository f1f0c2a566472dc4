"""Mail into a directory: one file per message, for sites without a mail server, for trying out, and for tests.

A message appears in `new/` whole and durable or not at all. `MaildirMailer.send` never raises: trouble with the disk
is TRANSIENT for all recipients. A message that is sent again makes a second file with the same Message-ID.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stagecal.domain.mails import is_address, message_fault
from stagecal.ports import MailReply, RecipientResult

_COUNTER = itertools.count(1)


@dataclass(frozen=True)
class MaildirMailer:
    """Writes each message into `directory`/new, below X-Envelope-To and X-Envelope-From as its first lines.

    The directories are made at the first message, readable by their owner only: mails hold links to data.
    """

    directory: Path

    def send(self, sender: str, recipients: Sequence[str], message: bytes) -> Mapping[str, RecipientResult]:
        """Write the message (complete, CRLF line ends) for these envelope recipients; return a result for each."""
        wanted = tuple(dict.fromkeys(recipients))
        fault = message_fault(message)
        results = {
            recipient: RecipientResult(MailReply.REFUSED, fault or "not an address that SMTP can carry")
            for recipient in wanted
            if fault or not is_address(recipient)
        }
        accepted = [recipient for recipient in wanted if recipient not in results]
        if accepted:
            outcome = self._write(sender, accepted, message)
            results.update(dict.fromkeys(accepted, outcome))
        return {recipient: results[recipient] for recipient in wanted}

    def _write(self, sender: str, recipients: Sequence[str], message: bytes) -> RecipientResult:
        if sender and not is_address(sender):
            return RecipientResult(
                MailReply.TRANSIENT, f"the envelope sender {sender[:80]!r} is no address: mend it in the configuration"
            )
        envelope = f"X-Envelope-To: {', '.join(recipients)}\r\nX-Envelope-From: {sender}\r\n"
        name = _new_name(message)
        try:
            self._make_directories()
            self._deliver(name, envelope.encode("ascii") + message)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            return RecipientResult(MailReply.TRANSIENT, f"the mail cannot be written to {self.directory}: {reason}")
        return RecipientResult(MailReply.ACCEPTED, f"written to {self.directory}/new/{name}")

    def _make_directories(self) -> None:
        made = []
        for path in (*reversed(self.directory.parents), self.directory):
            if not path.is_dir():
                path.mkdir(mode=0o700, exist_ok=True)
                made.append(path)
        for part in ("tmp", "new", "cur"):
            path = self.directory / part
            if not path.is_dir():
                path.mkdir(mode=0o700, exist_ok=True)
                made.append(path)
        for parent in dict.fromkeys(path.parent for path in made):
            _sync_directory(parent)

    def _deliver(self, name: str, content: bytes) -> None:
        temporary, final = self.directory / "tmp" / name, self.directory / "new" / name
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(temporary, flags, 0o600), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(final)
            _sync_directory(final.parent)
        except BaseException:
            for path in (temporary, final):
                with contextlib.suppress(OSError):
                    path.unlink()
            raise


def _new_name(message: bytes) -> str:
    """Return a file name that sorts by time, that nobody else uses, and whose last part is the same for a resend."""
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    digest = hashlib.sha256(message).hexdigest()[:16]
    return f"{seconds:010}.M{nanoseconds // 1000:06}P{os.getpid():07}Q{next(_COUNTER):06}.{digest}"


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
