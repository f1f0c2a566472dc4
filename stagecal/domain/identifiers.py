"""Identifiers that people type: parsed into one canonical form, or refused with a sentence that says why.

Every function here is pure. What is refused raises Malformed, whose text is one line for the person who typed it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

_UID = re.compile(r"uid://A00[0-9a-f]/X[0-9a-f]+/X[0-9a-f]+")
_SANITIZED_UID = re.compile(r"uid___(A00[0-9a-f])_(X[0-9a-f]+)_(X[0-9a-f]+)")
_PROJECT = re.compile(r"(20[0-9]{2})\.[0-9A-Z]\.[0-9]{5}\.[A-Z]{1,5}")
_CALFIELD = re.compile(r"[A-Za-z0-9+\-._]{1,64}")
_TICKET = re.compile(r"[0-9]{1,12}")
_ADDRESS_LIMIT = 254
_NAME_LIMIT = 200
# Persian, Malayalam or Sinhala names are misspelt without the zero-width (non-)joiner.
_JOINERS = "\u200c\u200d"


class Malformed(ValueError):
    """An identifier or a text that cannot be what it should be; the message says what to write instead."""


def _shown(text: str) -> str:
    """Return the text as it may be shown in a message: printable, quoted, not too long."""
    shortened = text if len(text) <= 80 else text[:77] + "..."
    return repr(shortened)


def is_control(character: str) -> bool:
    """Return whether the character could forge lines, header fields or a display: controls, line separators, marks of
    the writing direction, surrogates (undecodable bytes), private use. Joiners within a word are none."""
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") and character not in _JOINERS


def parse_uid(text: str) -> str:
    """Given a UID in either form (uid://A001/X1/X2 or uid___A001_X1_X2), return it as uid://A001/X1/X2.

    Raises Malformed if it is neither.
    """
    if len(text) <= 100:
        if _UID.fullmatch(text):
            return text
        match = _SANITIZED_UID.fullmatch(text)
        if match:
            return "uid://" + "/".join(match.groups())
    raise Malformed(f"{_shown(text)} is not a UID: write it as uid://A001/X12a3/X80e or uid___A001_X12a3_X80e")


def sanitized(uid: str) -> str:
    """Return the UID as it is written in file names: uid://A001/X1/X2 becomes uid___A001_X1_X2."""
    return uid.replace(":", "_").replace("/", "_")


def parse_project(text: str) -> str:
    """Given a project code such as 2017.1.01347.S, return it. Raises Malformed if it is none."""
    if not _PROJECT.fullmatch(text):
        raise Malformed(f"{_shown(text)} is not a project code: write it as 2017.1.01347.S")
    return text


def is_cycle_0(project: str) -> bool:
    """Return whether the project is of Cycle 0, whose calibrated data lie in the archive themselves."""
    return project.startswith("2011.")


def parse_calfields(text: str) -> tuple[str, ...]:
    """Given calibrator field names separated by commas, return them in their order without repetition.

    Raises Malformed for an empty list, spaces, or characters that no field name has. Names are case-sensitive.
    """
    names = text.split(",")
    for name in names:
        if not _CALFIELD.fullmatch(name):
            raise Malformed(
                f"{_shown(text)} is not a list of calibrator fields: "
                "write exact names separated by commas without spaces, as J0510+1800,J0440+1437"
            )
    return tuple(dict.fromkeys(names))


def parse_ticket(text: str) -> str:
    """Given a helpdesk ticket number, return its digits. Raises Malformed if it is none."""
    if not (text.isascii() and _TICKET.fullmatch(text)):
        raise Malformed(f"{_shown(text)} is not a helpdesk ticket number: write its digits, as 16140")
    return text


def parse_person(text: str) -> str:
    """Given a person's name in any script, return it with single spaces.

    Raises Malformed for an empty name, one longer than 200 characters, or one with control characters (they could
    forge lines of a trigger file, header fields of a mail, or a terminal's display).
    """
    if any(map(is_control, text)):
        raise Malformed(f"the name {_shown(text)} has control characters: type it again without them")
    name = " ".join(text.split())
    if not name.strip(_JOINERS + " "):
        raise Malformed("the user's name is empty: write the official name of the helpdesk profile")
    if len(name) > _NAME_LIMIT:
        raise Malformed(f"the name {_shown(name)} is longer than {_NAME_LIMIT} characters")
    return name


def parse_address(text: str) -> str:
    """Given an e-mail address, return it as it is written on the wire (an international domain in its ASCII form).

    Only the syntax is checked: a name server's silence must not refuse a person. Raises Malformed for anything that
    is not one plain address with a domain of at least two labels.
    """
    from email_validator import EmailNotValidError, validate_email

    if len(text) > _ADDRESS_LIMIT or not text.isprintable():
        raise Malformed(f"{_shown(text)} is not an e-mail address")
    try:
        checked = validate_email(
            text, check_deliverability=False, allow_smtputf8=False, globally_deliverable=False, strict=True
        )
    except EmailNotValidError as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise Malformed(f"{_shown(text)} is not an e-mail address: {reason}") from error
    address = checked.ascii_email or checked.normalized
    if "." not in address.rpartition("@")[2] or address.startswith("-"):
        raise Malformed(f"{_shown(text)} is not an e-mail address: write it as name@institute.org")
    return address


def masked_token(token: str) -> str:
    """Return a token as it may be shown to people whom its directory does not concern."""
    return f"{token[:6]}…"


def contact_is_known(address: str, domains: Iterable[str], contacts: Iterable[str]) -> bool:
    """Return whether the address belongs to regional-centre staff: one of the contacts, or in one of the domains."""
    folded = address.casefold()
    return folded in {contact.casefold() for contact in contacts} or folded.rpartition("@")[2] in {
        domain.casefold() for domain in domains
    }
