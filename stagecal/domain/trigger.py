"""The trigger file: one request for calibrated data, as regional-centre staff place it in the watched directory.

`render` and `parse` are inverse to each other. `parse` also reads what older scripts and hands produce: CRLF line
ends, trailing blanks, no blank line, two items on one line, the whole text on one line. A text whose last item is
missing raises Incomplete (look again later); one that can never become a request raises Malformed.
"""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass
from datetime import UTC, datetime

from stagecal.domain.identifiers import (
    Malformed,
    is_control,
    parse_address,
    parse_calfields,
    parse_person,
    parse_project,
    parse_ticket,
    parse_uid,
    sanitized,
)

SUBJECT_PREFIX = "ALMA: REQUEST FOR CALIBRATED DATA MOUS "
MAXIMUM_BYTES = 64 * 1024

_NAME = re.compile(
    r"trigger-(uid___A00[0-9a-f]_X[0-9a-f]+_X[0-9a-f]+)-"
    r"([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}-[0-9]{2}-[0-9]{2})\.txt"
)
_NAME_TIME = "%Y-%m-%dT%H-%M-%S"

# The items of a trigger in their order. In the one-line form every item ends where the next one begins, and the
# user's name (the only item with free text) takes as much as it can.
_LINE_STARTS = (
    "EU ARC contact ",
    "CC email ",
    "ALMA: REQUEST FOR CALIBRATED DATA MOUS ",
    "Dear AOG,",
    "please create the calibrated MS for",
    "MOUS ",
    "project ",
    "calfield ",
    "for user ",
    "email ",
    "helpdesk ticket ",
)
# Lines that only lead over to the next one: anything more on them was meant to say something.
_WITHOUT_VALUE = ("Dear AOG,", "please create the calibrated MS for")
_ONE_LINE = re.compile(
    r"EU ARC contact (?P<contact>\S+) "
    r"(?:CC email (?P<copy>\S+) )?"
    r"(?:ALMA: REQUEST FOR CALIBRATED DATA MOUS (?P<subject_mous>\S+) )?"
    r"Dear AOG, ?please create the calibrated MS for "
    r"MOUS (?P<mous>\S+) "
    r"project (?P<project>\S+) "
    r"(?:(?P<calfield_line>calfield)(?: (?P<calfields>\S+))?(?= for user ) )?"
    r"for user (?P<user>.+) "
    r"email (?P<email>\S+) "
    r"helpdesk ticket (?P<ticket>\S+)",
)


class Incomplete(Exception):
    """The text is the beginning of a trigger; its last item has not arrived."""


@dataclass(frozen=True)
class Trigger:
    """A request as it was asked: nothing in it is trusted until the archive and the data were asked.

    `copy` is what stands in the CC line; it never becomes a recipient. `calfields` is empty for a full request.
    """

    contact: str
    copy: str
    mous: str
    project: str
    calfields: tuple[str, ...]
    user: str
    email: str
    ticket: str


def trigger_name(mous: str, at: datetime) -> str:
    """Return the file name of a trigger for this MOUS placed at this time (UTC, whole seconds)."""
    return f"trigger-{sanitized(mous)}-{at.astimezone(UTC).strftime(_NAME_TIME)}.txt"


def parse_trigger_name(name: str) -> tuple[str, datetime]:
    """Given a file name, return the MOUS UID and the time in it. Raises Malformed if it is no trigger's name."""
    match = _NAME.fullmatch(name)
    if match:
        try:
            return parse_uid(match[1]), datetime.strptime(match[2], _NAME_TIME).replace(tzinfo=UTC)
        except ValueError:
            pass
    raise Malformed(f"the file name {name!r} is not of the form trigger-<MOUS UID>-YYYY-MM-DDThh-mm-ss.txt")


def subject(mous: str) -> str:
    """Return the subject line of the request mail."""
    return SUBJECT_PREFIX + sanitized(mous)


def render(trigger: Trigger) -> str:
    """Return the text of the trigger file, which is the body of the request mail too."""
    lines = [
        f"EU ARC contact {trigger.contact}",
        f"CC email {trigger.copy}",
        subject(trigger.mous),
        "",
        "Dear AOG,",
        "please create the calibrated MS for",
        f"MOUS {sanitized(trigger.mous)}",
        f"project {trigger.project}",
    ]
    if trigger.calfields:
        lines.append(f"calfield {','.join(trigger.calfields)}")
    lines += [f"for user {trigger.user}", f"email {trigger.email}", f"helpdesk ticket {trigger.ticket}"]
    return "\n".join(lines) + "\n"


def is_terminated(text: str) -> bool:
    """Return whether the last line has its end.

    Without it a ticket number may still grow (1614 is a prefix of 16140), so the reader looks again before it
    believes the file.
    """
    return text.endswith("\n")


def decoded(content: bytes) -> str:
    """Given the bytes of a trigger file, return its text; a byte order mark at its beginning is dropped.

    Raises Incomplete if the bytes end within a character (the rest is still to come), Malformed if they are not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        text = decoder.decode(content)
    except UnicodeDecodeError as error:
        raise Malformed(f"byte {error.start} of the file is not UTF-8: place the request again") from error
    if decoder.getstate()[0]:
        raise Incomplete("the last character is still being written")
    return text.removeprefix("\ufeff")


def parse(text: str) -> Trigger:
    """Given the text of a trigger file, return the request.

    Raises Incomplete if the text may be the beginning of a trigger, Malformed if it can never be one.
    """
    # The last character may be the first half of a CRLF; any other CR that stands alone is refused below.
    text = text.replace("\r\n", "\n").removesuffix("\r")
    _refuse_control_characters(text)
    lines = [" ".join(line.split()) for line in text.split("\n")]
    lines = [line for line in lines if line]
    if not lines:
        raise Incomplete("the file is empty")
    # A name may contain words such as "email"; where every item has a line of its own they cannot mislead.
    if any(line.startswith("for user ") for line in lines):
        return _trigger(_items_by_line(_joined_items(lines)))
    try:
        return _trigger(_items_of_one_line(" ".join(lines)))
    except Malformed as error:
        # What looks like the last items may be words of a name that goes on.
        if is_terminated(text):
            raise
        raise Incomplete(f"{error}; unless more of the line is to come") from error


def _refuse_control_characters(text: str) -> None:
    for character in text:
        if character not in "\n\t" and is_control(character):
            raise Malformed(f"the file has the control character {character!r}: place the request again")


def _joined_items(lines: list[str]) -> list[str]:
    """Return lines with one item each, also where an older script wrote two on one line."""
    prefix = "please create the calibrated MS for "
    joined = []
    for line in lines:
        if line.startswith("Dear AOG, please "):
            joined.append("Dear AOG,")
        item = line.removeprefix("Dear AOG, ")
        if item.startswith(prefix):
            joined += [prefix.rstrip(), item.removeprefix(prefix)]
        else:
            joined.append(item)
    return joined


def _items_by_line(lines: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    position = 0
    for number, line in enumerate(lines):
        start = next((s for s in _LINE_STARTS[position:] if line.startswith(s) or line == s.rstrip()), None)
        if start is None or (start in _WITHOUT_VALUE and line != start):
            if number == len(lines) - 1 and any(s.startswith(line) for s in _LINE_STARTS[position:]):
                raise Incomplete("the last line is still being written")
            raise Malformed(f"the line {line[:80]!r} does not belong into a trigger, or not at this place")
        position = _LINE_STARTS.index(start) + 1
        found[start.strip()] = line.removeprefix(start.rstrip()).strip()
    keys = {
        "EU ARC contact": "contact",
        "CC email": "copy",
        "ALMA: REQUEST FOR CALIBRATED DATA MOUS": "subject_mous",
        "MOUS": "mous",
        "project": "project",
        "calfield": "calfields",
        "for user": "user",
        "email": "email",
        "helpdesk ticket": "ticket",
    }
    items = {keys[start]: value for start, value in found.items() if start in keys}
    if not items.get("ticket"):
        raise Incomplete("the helpdesk ticket, the last item, is not there yet")
    for name, word in (
        ("contact", "EU ARC contact"),
        ("mous", "MOUS"),
        ("project", "project"),
        ("email", "email"),
    ):
        if not items.get(name):
            raise Malformed(f"the item {word!r} is missing")
    if "calfields" in items and not items["calfields"]:
        raise Malformed("the calfield line is empty: name the fields, or leave the line out for all data")
    return items


def _items_of_one_line(line: str) -> dict[str, str]:
    match = _ONE_LINE.fullmatch(line)
    if match is None:
        if re.search(r" helpdesk ticket \S+", line):
            raise Malformed("the text is not a request: an item is missing or not at its place")
        raise Incomplete("the helpdesk ticket, the last item, is not there yet")
    items = {name: value for name, value in match.groupdict().items() if value is not None}
    if items.pop("calfield_line", None) and not items.get("calfields"):
        raise Malformed("the calfield item is empty: name the fields, or leave the item out for all data")
    return items


def _trigger(items: dict[str, str]) -> Trigger:
    mous = parse_uid(items["mous"])
    if "subject_mous" in items and parse_uid(items["subject_mous"]) != mous:
        raise Malformed(f"the subject names the MOUS {items['subject_mous'][:80]}, the text {items['mous'][:80]}")
    return Trigger(
        contact=parse_address(items["contact"]),
        copy=items.get("copy", ""),
        mous=mous,
        project=parse_project(items["project"]),
        calfields=parse_calfields(items["calfields"]) if "calfields" in items else (),
        user=parse_person(items["user"]),
        email=parse_address(items["email"]),
        ticket=parse_ticket(items["ticket"]),
    )
