"""The sessions of a MOUS: their numbers, and which execution blocks were observed in which.

Sessions are numbered from 1 in the order of the OUSStatus document, also those whose EBs failed QA0 and those without
any EB. What cannot be read unambiguously raises RestoreError.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from stagecal.domain.identifiers import Malformed, parse_uid
from stagecal.domain.restore.errors import RestoreError
from stagecal.domain.restore.markup import Element, parse_markup

_SESSION_NAME = re.compile(r"session_([1-9][0-9]{0,3})")


@dataclass(frozen=True)
class Session:
    """One session: its number, and its EBs in the order of the document."""

    number: int
    execution_blocks: tuple[str, ...]


def sessions_of(status_xml: str, *, mous: str = "") -> tuple[Session, ...]:
    """Given the OUSStatus document of a MOUS, return its sessions in document order, numbered from 1.

    The end time of a session may be missing and decides nothing. If `mous` is given, the document must be of that
    MOUS. Raises RestoreError for another document, an EB in two sessions, or an EB without a readable UID.
    """
    if not status_xml.strip():
        raise RestoreError("the archive has no OUSStatus document of this MOUS: its sessions are not known")
    root = parse_markup(status_xml, "the OUSStatus document")
    if root.name != "OUSStatus":
        raise RestoreError(f"the OUSStatus document is a {root.name}: check the query that reads it")
    if mous:
        _check_mous(root, mous)
    sessions = tuple(
        Session(number, _execution_blocks(element, number))
        for number, element in enumerate(root.below("Session"), start=1)
    )
    check_one_session_each(sessions, "the OUSStatus document")
    return sessions


def _check_mous(root: Element, mous: str) -> None:
    entities = [element.attributes.get("entityId", "").strip() for element in root.named("OUSStatusEntity")]
    if len(entities) != 1:
        raise RestoreError(f"the OUSStatus document names {len(entities)} entities where one is due: look at it")
    if entities[0] != mous:
        raise RestoreError(f"the OUSStatus document is of {entities[0] or 'nothing'}, not of {mous}: check the query")


def _execution_blocks(session: Element, number: int) -> tuple[str, ...]:
    uids = []
    for reference in session.below("ExecBlockRef"):
        identifiers = [element.text.strip() for element in reference.below("ExecBlockId")]
        if len(identifiers) != 1:
            raise RestoreError(
                f"line {reference.line} of the OUSStatus document: an ExecBlockRef of session {number} "
                f"has {len(identifiers)} ExecBlockId where one is due"
            )
        uids.append(readable_uid(identifiers[0], f"session {number} of the OUSStatus document"))
    return tuple(dict.fromkeys(uids))


def check_one_session_each(sessions: tuple[Session, ...], what: str) -> None:
    """Raise RestoreError if an EB stands in two of these sessions."""
    seen: dict[str, int] = {}
    for session in sessions:
        for uid in session.execution_blocks:
            if uid in seen:
                raise RestoreError(f"{what} lists {uid} in session {seen[uid]} and in session {session.number}")
            seen[uid] = session.number


def session_number(name: str, what: str) -> int:
    """Given a name as session_2, return its number. Raises RestoreError for any other name."""
    match = _SESSION_NAME.fullmatch(name)
    if not match:
        raise RestoreError(f"{what} names a session {name!r}: only session_1, session_2, ... can be restored by us")
    return int(match.group(1))


def readable_uid(text: str, what: str) -> str:
    """Given a UID in either form, return it as uid://A002/X1/X2. Raises RestoreError if it is none."""
    try:
        return parse_uid(text)
    except Malformed as error:
        raise RestoreError(f"{what}: {error}") from error
