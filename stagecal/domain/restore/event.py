"""The event that asks for a restore, as NRAO's archive tools send it (AlmaOusRestoreWorkflow): JSON in, a request out.

What is not such an event raises Malformed, with one line that says what is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stagecal.domain.identifiers import Malformed, is_control, parse_address, parse_project, parse_uid

_WORKFLOW = "AlmaOusRestoreWorkflow"
_COMMAND = "StartWorkflow"
# What a field must say where it is given; everything else would be another service's work.
_EXPECTED = {"workflowName": _WORKFLOW, "telescope": "ALMA", "deliveryFormat": "CMS"}
_LIMIT = 1_000_000


@dataclass(frozen=True)
class RestoreEvent:
    """A request for a restore. Only the MOUS is always there; other texts may be ''.

    `execution_blocks` are those that the sender knows of (one of them is usual): no authority for what is restored.
    `correlation_id` names the request in the sender's system.
    """

    mous: str
    project: str = ""
    casa_home: str = ""
    email: str = ""
    execution_blocks: tuple[str, ...] = ()
    processing_site: str = ""
    correlation_id: str = ""


def read_event(text: str) -> RestoreEvent:
    """Given the text of an event, return what it asks for.

    It may be the whole object, its members without the outer braces, or only the metadata; unknown fields are
    ignored. Raises Malformed if it is no JSON, asks for another work, or has fields that cannot be what they should.
    """
    event = _parsed(text)
    metadata = event.get("metadata", event)
    if not isinstance(metadata, dict):
        raise Malformed('the event\'s metadata is no object: write it as {"ousStatusId": "uid://...", ...}')
    kind = _text(event, "type")
    if kind and kind.rpartition(".")[2] != _COMMAND:
        raise Malformed(f"the event's type is {kind[:80]!r}: only {_COMMAND} is done here")
    for name, expected in _EXPECTED.items():
        value = _text(metadata, name)
        if value and value != expected:
            raise Malformed(f"the event's {name} is {value[:80]!r}: only {expected} is done here")
    mous = _text(metadata, "ousStatusId")
    if not mous:
        raise Malformed("the event has no ousStatusId: it must name the MOUS to restore")
    casa_home = _text(metadata, "casaHome")
    if casa_home and not casa_home.startswith("/"):
        raise Malformed(f"the event's casaHome is {casa_home[:80]!r}: write the absolute path of a CASA")
    project = _text(metadata, "projectCodeOrDataType")
    email = _text(metadata, "email")
    return RestoreEvent(
        mous=parse_uid(mous),
        # A data type has no digits; what has some is meant as a project code.
        project=parse_project(project) if any(character.isdigit() for character in project) else "",
        casa_home=casa_home.rstrip("/") or casa_home,
        email=parse_address(email) if email else "",
        execution_blocks=_execution_blocks(metadata.get("fileSetIds")),
        processing_site=_text(metadata, "processingSite"),
        correlation_id=_text(metadata, "cliCorrId"),
    )


def _parsed(text: str) -> Mapping[str, Any]:
    bare = text.lstrip("\ufeff").strip().rstrip(",")
    if len(bare) > _LIMIT:
        raise Malformed("the event is longer than a million characters: it is no event")
    if bare.startswith('"'):
        bare = f"{{{bare}}}"
    try:
        event = json.loads(bare, object_pairs_hook=_object)
    except RecursionError as error:
        raise Malformed("the event is nested too deeply: it is no event") from error
    except json.JSONDecodeError as error:
        raise Malformed(f"the event is no JSON: {error}") from error
    if not isinstance(event, dict):
        raise Malformed('the event is no JSON object: write it as {"metadata": {...}}')
    return event


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise Malformed(f"the event says {name[:80]!r} twice")
    return dict(pairs)


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Malformed(f"the event's {name} is no text")
    if any(map(is_control, value)) or len(value) > 1000:
        raise Malformed(f"the event's {name} has control characters, or more than 1000 characters")
    return value.strip()


def _execution_blocks(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    uids = [value] if isinstance(value, str) else value
    if not isinstance(uids, list) or not all(isinstance(uid, str) for uid in uids):
        raise Malformed("the event's fileSetIds is no list of UIDs")
    return tuple(dict.fromkeys(parse_uid(uid) for uid in uids))
