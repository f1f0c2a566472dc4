"""The PPR (pipeline processing request) of a restore: its values, how archived ones read, and what is wrong with one.

The pipeline's own reader passes over most mistakes without a word, and then restores nothing, or with the tables of
another session. `ppr_faults` finds those before CASA starts; it reads the text alone and trusts nothing that wrote it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime

from stagecal.domain.casa_versions import pipeline_key
from stagecal.domain.identifiers import Malformed, parse_uid, sanitized
from stagecal.domain.restore.errors import RestoreError
from stagecal.domain.restore.markup import Element, parse_markup
from stagecal.domain.restore.plan import RestorePlan, SessionLayout
from stagecal.domain.restore.sessions import Session, check_one_session_each, readable_uid

_BAR = " | "
_KEYWORD = re.compile(r"SESSION_([1-9][0-9]{0,3})")
_SUMMARY = ("ProposalCode", "Observatory", "Telescope")
_STRUCTURE = ("ObsUnitSetTitle", "ObsUnitSetType")
_REFERENCES = ("ObsUnitSetRef", "ProjectStatusRef", "OUSStatusRef")
# The reader turns such texts into numbers, truth values, lists: a directory of that name is then not found.
_CAST = re.compile(r"(?i)[+-]?[0-9_.]+(e[+-]?[0-9]+)?|[+-]?(inf|infinity|nan)|true|false|[\[({].*")
_RELATIVE_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*(?:/[A-Za-z0-9_][A-Za-z0-9_.+-]*)*")
_DECLARED_ENCODING = re.compile(r"<\?xml[^>]*?encoding=[\"']([^\"']*)")
# Builds from June 2020 to before this one lose EBs whose UIDs end in one of these letters.
_LOST_ENDINGS = ("a", "e")
_ENDINGS_READ_RIGHT = (2020, 1, 0, 40)


@dataclass(frozen=True)
class PprFacts:
    """What the template of a PPR says.

    `sessions` are keyword and value of each session (SESSION_1, `uid://... | uid://...` or empty), `execution_blocks`
    UID and directory name of each ASDM. `relative_path` leads from the root directory to the directory of
    rawdata/, products/ and working/.
    """

    project: str
    project_uid: str
    part_id: str
    project_status_uid: str
    mous: str
    sched_block_uid: str
    sched_block_status_uid: str
    root_directory: str
    relative_path: str
    task: str
    procedure_title: str
    processing_site: str
    operator: str
    creation_time: str
    sessions: tuple[tuple[str, str], ...]
    execution_blocks: tuple[tuple[str, str], ...]


def sessions_for_ppr(layout: SessionLayout) -> tuple[tuple[str, str], ...]:
    """Return keyword and value of each session, 1 to N without a gap, in the one form that is always read right."""
    return tuple((f"SESSION_{session.number}", _BAR.join(session.execution_blocks)) for session in layout.sessions)


def ppr_values(
    plan: RestorePlan,
    *,
    root_directory: str,
    relative_path: str,
    now: datetime,
    processing_site: str = "Undefined",
    operator: str = "stagecal",
) -> PprFacts:
    """Given a plan and where its directories lie, return what the PPR of the restore says."""
    return PprFacts(
        project=plan.project,
        project_uid=plan.project_uid,
        part_id=plan.part_id,
        project_status_uid=plan.project_status_uid,
        mous=plan.mous,
        sched_block_uid=plan.sched_block.uid,
        sched_block_status_uid=plan.sched_block.status_uid,
        root_directory=root_directory,
        relative_path=relative_path,
        task=plan.task,
        procedure_title="stagecal_restore",
        processing_site=processing_site,
        operator=operator,
        creation_time=now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.000"),
        sessions=sessions_for_ppr(plan.layout),
        execution_blocks=tuple((block.uid, sanitized(block.uid)) for block in plan.execution_blocks),
    )


def read_ppr_sessions(text: str) -> tuple[Session, ...]:
    """Given an archived PPR, return its sessions as they were meant, by number.

    Bars without spaces and white space in values are read as their author meant them; whether the pipeline did so is
    shown by the manifest. Raises RestoreError for what has no clear meaning.
    """
    what = "the archived PPR"
    root = parse_markup(text, what)
    if root.name != "SciPipeRequest":
        raise RestoreError(f"{what} is a {root.name}, not a SciPipeRequest: look at the file")
    sessions: dict[int, tuple[str, ...]] = {}
    for intent in root.below("Intents"):
        keyword = _stripped(intent.first("Keyword"))
        match = _KEYWORD.fullmatch(keyword)
        if not match:
            continue
        number = int(match.group(1))
        if number in sessions:
            raise RestoreError(f"{what} has {keyword} twice: look at the file")
        parts = (part.strip() for part in _stripped(intent.first("Value")).split("|"))
        sessions[number] = tuple(readable_uid(part, f"{keyword} of {what}") for part in parts if part)
    found = tuple(Session(number, sessions[number]) for number in sorted(sessions))
    check_one_session_each(found, what)
    return found


def _stripped(element: Element | None) -> str:
    return element.text.strip() if element else ""


# --- what the pipeline would not complain about -----------------------------------------------------------------------


def ppr_faults(text: str, plan: RestorePlan, *, relative_path: str, pipeline_version: str = "") -> tuple[str, ...]:
    """Given a PPR and the plan that it should carry out, return everything that is wrong with it, one sentence each.

    `relative_path` is where the directories of the restore lie below the root directory; `pipeline_version` is that
    of the pipeline that will read the PPR, '' if unknown. Nothing means that the PPR does what the plan says.
    """
    try:
        root = parse_markup(text, "the PPR", strict=True)
    except RestoreError as error:
        return (str(error),)
    if root.name != "SciPipeRequest":
        return (f"the PPR is a {root.name}, not a SciPipeRequest",)
    faults: list[str] = []
    declared = _DECLARED_ENCODING.match(text)
    if declared and declared.group(1).casefold() != "utf-8":
        faults.append(f"the PPR declares the encoding {declared.group(1)}: it is written as UTF-8")
    _check_project(root, plan, faults)
    request = _only(root, ("ProcessingRequests", "ProcessingRequest"), faults)
    if request is not None:
        _check_commands(request, plan.task, faults)
        listed = _data_set(request, relative_path, faults)
        sessions = _sessions(request, len(plan.layout.sessions), faults)
        _check_against_plan(plan, listed, sessions, faults)
        _check_endings(listed, pipeline_version, faults)
    return tuple(faults)


def _only(parent: Element, path: tuple[str, ...], faults: list[str]) -> Element | None:
    """Return the element at this path if there is exactly one at each step, else say so and return None."""
    element = parent
    for name in path:
        found = element.named(name)
        if len(found) != 1:
            faults.append(f"{element.name} has {len(found)} {name} where exactly one is due")
            return None
        element = found[0]
    return element


def _text(parent: Element, path: tuple[str, ...], faults: list[str]) -> str:
    """Return the text at this path as the pipeline reads it; say what is wrong with it and return '' otherwise."""
    element = _only(parent, path, faults)
    if element is None:
        return ""
    where = f"line {element.line}: {element.name}"
    if element.children or not element.plain:
        faults.append(f"{where} has more than text in it (elements, comments, CDATA): the pipeline reads none of it")
        return ""
    if not element.text.strip():
        faults.append(f"{where} is empty: the pipeline refuses the whole request")
        return ""
    if element.text != element.text.strip():
        faults.append(f"{where} has white space around {element.text.strip()!r}: the pipeline takes it as part of it")
    if _CAST.fullmatch(element.text):
        faults.append(f"{where} is {element.text!r}: the pipeline reads a number, a truth value or a list, not a text")
    return element.text.strip()


def _check_project(root: Element, plan: RestorePlan, faults: list[str]) -> None:
    summary = _only(root, ("ProjectSummary",), faults)
    if summary is not None:
        project, *_ = [_text(summary, (name,), faults) for name in _SUMMARY]
        if project and project != plan.project:
            faults.append(f"ProposalCode is {project}, not {plan.project}")
    structure = _only(root, ("ProjectStructure",), faults)
    if structure is not None:
        for name in _STRUCTURE:
            _text(structure, (name,), faults)
        _, _, status = [_only(structure, (name,), faults) for name in _REFERENCES]
        if status is not None and status.attributes.get("entityId", "") != plan.mous:
            faults.append(f"OUSStatusRef names {status.attributes.get('entityId') or 'nothing'}, not {plan.mous}")


def _check_commands(request: Element, task: str, faults: list[str]) -> None:
    procedure = _only(request, ("ProcessingProcedure",), faults)
    if procedure is None:
        return
    _text(procedure, ("ProcedureTitle",), faults)
    commands = procedure.named("ProcessingCommand")
    names = []
    for command in commands:
        name = _text(command, ("Command",), faults)
        names.append(name)
        if len(command.named("ParameterSet")) != 1:
            faults.append(
                f"line {command.line}: the command {name or '?'} has {len(command.named('ParameterSet'))} ParameterSet "
                "where one is due: the pipeline runs neither it nor what follows, and does not complain"
            )
    if names.count(task) != 1:
        faults.append(f"{task} is commanded {names.count(task)} times where once is due: {', '.join(names) or 'none'}")


def _data_set(request: Element, relative_path: str, faults: list[str]) -> list[str]:
    """Return the UIDs of the EBs in the DataSet."""
    block = _only(request, ("DataSet", "SchedBlockSet", "SchedBlockIdentifier"), faults)
    if block is None:
        return []
    path = _text(block, ("RelativePath",), faults)
    if path and (not _RELATIVE_PATH.fullmatch(path) or path != relative_path):
        faults.append(f"RelativePath is {path!r}, not {relative_path!r}: the pipeline would work in another directory")
    listed = []
    for identifier in block.named("AsdmIdentifier"):
        uid = _text(identifier, ("AsdmRef", "ExecBlockId"), faults)
        name = _text(identifier, ("AsdmDiskName",), faults)
        if not uid or not name:
            continue
        if not _is_uid(uid):
            faults.append(f"line {identifier.line}: ExecBlockId {uid!r} is no UID of the form uid://A002/X1/X2")
        elif name != sanitized(uid):
            faults.append(f"the AsdmDiskName of {uid} is {name}, not {sanitized(uid)}")
        if uid in listed:
            faults.append(f"the DataSet lists {uid} twice")
        listed.append(uid)
    if not listed:
        faults.append("the DataSet lists no execution block (AsdmIdentifier)")
    return listed


def _sessions(request: Element, count: int, faults: list[str]) -> dict[str, int]:
    """Return the session of each EB as it is meant; say where the pipeline would not read it so.

    `count` is the number of sessions that there have to be.
    """
    intents = _only(request, ("ProcessingIntents",), faults)
    values: dict[int, str] = {}
    for intent in intents.named("Intents") if intents else []:
        keyword = _text(intent, ("Keyword",), faults)
        match = _KEYWORD.fullmatch(keyword)
        if match is None:
            if "SESSION" in keyword.upper():
                faults.append(f"line {intent.line}: {keyword!r} is no keyword of a session: they are SESSION_1, ...")
            continue
        number = int(match.group(1))
        if number in values:
            faults.append(f"{keyword} stands twice: the pipeline takes the last one")
        values[number] = _session_value(intent, keyword, faults)
    missing = sorted(set(range(1, max([count, *values]) + 1)) - set(values))
    if missing:
        faults.append(
            f"SESSION_{missing[0]} is missing: the pipeline stops counting there, and puts the EBs of all "
            "later sessions into session_1"
        )
    sessions: dict[str, int] = {}
    for number, value in sorted(values.items()):
        # Whatever is wrong with the form is said already: here it is read as it was meant.
        for uid in (part.strip() for part in value.split("|") if part.strip()):
            if uid in sessions:
                faults.append(f"{uid} stands in SESSION_{sessions[uid]} and in SESSION_{number}")
            sessions.setdefault(uid, number)
    return sessions


def _session_value(intent: Element, keyword: str, faults: list[str]) -> str:
    found = intent.named("Value")
    if len(found) != 1:
        faults.append(f"{keyword} has {len(found)} Value where exactly one is due")
        return ""
    value = found[0]
    if value.children or not value.plain:
        faults.append(f"{keyword} has more than text in its Value (elements, comments, CDATA): it is read as empty")
        return ""
    text = value.text
    if not text:
        return ""
    lost = "its EBs land in session_1 without a word"
    parts = [part.strip() for part in text.split("|")]
    if "\n" in text or "\r" in text:
        faults.append(f"{keyword} has a line break inside its Value: {lost}")
    elif text != text.strip():
        faults.append(f"{keyword} has white space at an end of its Value: {lost}")
    elif text != _BAR.join(parts):
        faults.append(f"{keyword} has a bar without exactly one space on each side: {lost}")
    for part in parts:
        if not _is_uid(part):
            faults.append(f"{keyword} lists {part!r}, which is no UID of the form uid://A002/X1/X2")
    return text


def _check_against_plan(plan: RestorePlan, listed: list[str], sessions: dict[str, int], faults: list[str]) -> None:
    planned = {block.uid: block.session for block in plan.execution_blocks}
    for uid in listed:
        if uid not in planned:
            faults.append(f"the DataSet lists {uid}, which the manifest does not: the restore would die in the middle")
        if uid not in sessions:
            faults.append(f"{uid} of the DataSet stands in no session: it lands in session_1 without a word")
    for uid, number in sessions.items():
        if uid not in listed:
            faults.append(f"SESSION_{number} has {uid}, which the DataSet does not list: it would not be restored")
        if planned.get(uid, number) != number:
            faults.append(f"{uid} stands in SESSION_{number}, the plan says session_{planned[uid]}")
    faults += [f"the DataSet does not list {uid}: it would not be restored" for uid in planned if uid not in listed]


def _check_endings(listed: list[str], pipeline_version: str, faults: list[str]) -> None:
    version = pipeline_key(pipeline_version)
    if version[:3] == _ENDINGS_READ_RIGHT[:3] and version < _ENDINGS_READ_RIGHT:
        faults += [
            f"pipeline {pipeline_version} puts {uid} into session_1, as it ends in {uid[-1]}: use a newer one"
            for uid in listed
            if uid.endswith(_LOST_ENDINGS)
        ]


def _is_uid(text: str) -> bool:
    try:
        return parse_uid(text) == text
    except Malformed:
        return False
