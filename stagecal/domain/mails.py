"""Mails as values: who gets what, under which Message-ID, and the exact bytes that leave.

`compose` is deterministic, so that a mail sent again is the same mail. What could forge a header field or an envelope
raises ValueError with one line that says where. The email package is only imported by the functions that need it.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from datetime import datetime

# Plain addresses as they travel without SMTPUTF8: no quoted local parts, no domain literals, no other script.
_ADDRESS = re.compile(r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]+@[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?")
_ADDRESS_LIMIT = 254
_MESSAGE_ID = re.compile(r"<[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]+@[A-Za-z0-9.-]+>")
_MESSAGE_ID_LIMIT = 900

# RFC 5322, section 2.1.1: a line has at most 998 characters without its CRLF.
_LINE_LIMIT = 998
_FOLDED_LINE = 78
# A longer word can neither be folded nor stay on one line; it is written as encoded words instead.
_WORD_LIMIT = 200
_ATOMS = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~ -]+")

AUTO_GENERATED = "auto-generated"
AUTO_REPLIED = "auto-replied"


@dataclass(frozen=True, kw_only=True)
class Mail:
    """One mail of the service. Every address is `name@institute.org` or `Any Name <name@institute.org>`.

    `auto_submitted` is AUTO_REPLIED for a direct answer to a mail, else AUTO_GENERATED (RFC 3834). `in_reply_to` is
    the Message-ID of the mail that this one answers, or empty. Recipients in `bcc` are in the envelope only.
    """

    kind: str
    subject: str
    sender: str
    to: tuple[str, ...]
    cc: tuple[str, ...] = ()
    bcc: tuple[str, ...] = ()
    reply_to: str = ""
    in_reply_to: str = ""
    auto_submitted: str
    message_id: str
    body: str

    @property
    def recipients(self) -> tuple[str, ...]:
        """The bare addresses of the envelope: To, Cc and Bcc in this order, each once, however it is capitalised."""
        once: dict[str, str] = {}
        for mailbox in (*self.to, *self.cc, *self.bcc):
            address = split_mailbox(mailbox)[1]
            once.setdefault(address.casefold(), address)
        return tuple(once.values())


def message_id(kind: str, identity: str, domain: str) -> str:
    """Return the Message-ID of the one mail of this kind for this identity (a trigger's name, a request's id).

    The same arguments give the same Message-ID, so that a mail sent twice is recognised as one. Raises ValueError if
    the kind or the domain cannot stand in a Message-ID.
    """
    from hashlib import sha256

    digest = sha256(f"{kind}\n{identity}".encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return _checked_message_id("Message-ID", f"<{kind}.{digest}@{domain}>")


def is_address(text: str) -> bool:
    """Return whether the text is one plain address that every mail system can carry in an envelope."""
    return len(text) <= _ADDRESS_LIMIT and _ADDRESS.fullmatch(text) is not None


def split_mailbox(text: str) -> tuple[str, str]:
    """Given `name@institute.org` or `Any Name <name@institute.org>`, return the name (or "") and the address."""
    if text.endswith(">") and "<" in text:
        name, _, address = text[:-1].rpartition("<")
        return name.strip(), address
    return "", text


def message_fault(message: bytes) -> str:
    """Return why these bytes cannot travel as one message, or "".

    A bare CR or LF is where mail systems disagree about the end of a message, so none may leave.
    """
    lines = message.split(b"\r\n")
    if lines[-1]:
        return "the message does not end with a line end"
    if any(b"\r" in line or b"\n" in line for line in lines):
        return "a line of the message ends with something else than CR LF"
    if b"\0" in message:
        return "the message contains a NUL byte"
    if any(len(line) > _LINE_LIMIT for line in lines):
        return f"a line of the message is longer than {_LINE_LIMIT} bytes"
    return ""


def quoted(text: str) -> str:
    """Return the text with every line quoted by `> ` (`>` for an empty one), without a final line end.

    Everything that some reader shows as a new line counts as one: no part of a quoted text looks unquoted.
    """
    return "\n".join(f"> {line}" if line else ">" for line in text.splitlines())


def compose(mail: Mail, date: datetime) -> bytes:
    """Given a mail and its date (timezone-aware), return the complete message with CRLF line ends.

    The body is text/plain in UTF-8, readable as it is (7bit or 8bit) unless a line is longer than 998 bytes or it has
    control characters; only then it is quoted-printable, where lines of up to 76 characters stay whole. Its line ends
    are unified, and what has no UTF-8 form becomes `?`. Bcc recipients do not appear. Raises ValueError for a control
    character in a header value, a malformed address or Message-ID, no recipient in To, a naive date, or another
    `auto_submitted` than the two that there are.
    """
    from email.message import Message
    from email.policy import compat32
    from email.utils import format_datetime

    if date.tzinfo is None:
        raise ValueError("Date: the date of a mail needs a time zone")
    if mail.auto_submitted not in (AUTO_GENERATED, AUTO_REPLIED):
        raise ValueError(f"Auto-Submitted: {mail.auto_submitted!r} is neither {AUTO_GENERATED} nor {AUTO_REPLIED}")
    if not mail.to:
        raise ValueError("To: a mail needs at least one recipient")
    for mailbox in mail.bcc:
        _mailbox("Bcc", mailbox)

    fields = {
        "From": _mailbox("From", mail.sender),
        "To": _mailboxes("To", mail.to),
        "Cc": _mailboxes("Cc", mail.cc),
        "Reply-To": mail.reply_to and _mailbox("Reply-To", mail.reply_to),
        "Subject": _text("Subject", mail.subject),
        "Date": format_datetime(date),
        "Message-ID": _checked_message_id("Message-ID", mail.message_id),
        "In-Reply-To": mail.in_reply_to and _checked_message_id("In-Reply-To", mail.in_reply_to),
        "References": mail.in_reply_to,
        "Auto-Submitted": mail.auto_submitted,
        "X-Auto-Response-Suppress": "All",
        "Content-Language": "en",
    }
    encoding, body = _encoded_body(mail.body)
    fields |= {
        "MIME-Version": "1.0",
        "Content-Type": 'text/plain; charset="utf-8"',
        "Content-Transfer-Encoding": encoding,
    }
    # The older policy writes what it is given. The newer ones turn a long Message-ID in References into encoded
    # words, which no mail reader recognises, and their folding changes with the version of Python.
    headers = Message(policy=compat32.clone(linesep="\r\n", max_line_length=0))
    for name, value in fields.items():
        if value or name == "Subject":
            headers[name] = _folded(name, value)
    return headers.as_bytes() + body


def _folded(name: str, value: str) -> str:
    """Return the value with line breaks at blanks, so that lines have at most 78 characters where words allow it.

    The first word always follows the name of the field: a first line without any is legal, but not read by all.
    """
    lines = [f"{name}:"]
    for word in value.split(" "):
        if lines[-1] == f"{name}:" or len(lines[-1]) + 1 + len(word) <= _FOLDED_LINE:
            lines[-1] += f" {word}"
        else:
            lines.append(f" {word}")
    return "\r\n".join(lines).removeprefix(f"{name}: ")


def _encoded_body(text: str) -> tuple[str, bytes]:
    """Return the transfer encoding and the body in it, with CRLF line ends."""
    from binascii import b2a_qp

    # A bare CR redraws a terminal's line; in the text of a captured terminal it ends one.
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if text and not text.endswith("\n"):
        text += "\n"
    body = text.encode("utf-8", "replace").replace(b"\n", b"\r\n")
    lines = body.split(b"\r\n")
    if any(len(line) > _LINE_LIMIT or re.search(rb"[\x00-\x08\x0b-\x1f\x7f]", line) for line in lines):
        return "quoted-printable", b2a_qp(body, quotetabs=False, istext=True)
    return "7bit" if body.isascii() else "8bit", body


def _checked(header: str, value: str) -> str:
    """Return the value. Raises ValueError if it could end the header field or disturb a display."""
    for character in value:
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
            raise ValueError(f"{header}: the control character U+{ord(character):04X} cannot stand in {value[:80]!r}")
    return value


def _checked_message_id(header: str, value: str) -> str:
    if len(value) > _MESSAGE_ID_LIMIT or not _MESSAGE_ID.fullmatch(value):
        raise ValueError(f"{header}: {value[:80]!r} is not a Message-ID: it is written as <name@host>")
    return value


def _mailboxes(header: str, mailboxes: tuple[str, ...]) -> str:
    return ", ".join(_mailbox(header, mailbox) for mailbox in mailboxes)


def _mailbox(header: str, mailbox: str) -> str:
    """Return name and address as they stand in a header field. Raises ValueError if they cannot."""
    name, address = split_mailbox(_checked(header, mailbox))
    if not is_address(address):
        raise ValueError(f"{header}: {mailbox[:80]!r} is not an e-mail address: write it as name@institute.org")
    if not name:
        return address
    if not _is_plain(name):
        return f"{_encoded_words(name)} <{address}>"
    if _ATOMS.fullmatch(name):
        return f"{name} <{address}>"
    escaped = name.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}" <{address}>'


def _text(header: str, text: str) -> str:
    """Return free text as it stands in a header field. Raises ValueError if it cannot."""
    return text if _is_plain(_checked(header, text)) else _encoded_words(text)


def _is_plain(text: str) -> bool:
    """Return whether the text survives in a header field as it is, wherever that is folded at a blank."""
    return (
        text.isascii()
        and "=?" not in text
        and " ".join(text.split()) == text
        and all(len(word) <= _WORD_LIMIT for word in text.split())
    )


def _encoded_words(text: str) -> str:
    """Return the text as encoded words (RFC 2047) of at most 75 characters, separated by blanks."""
    from email.header import Header

    return Header(text, "utf-8", maxlinelen=75).encode(linesep="")
