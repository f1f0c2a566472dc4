"""The archive's own calibration script (casa_pipescript.py): what it says of the project, so that a PPR can be written
without the archive's database.

It is read and never run. What it does not say is ''; what it says twice differently raises RestoreError.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

from stagecal.domain.identifiers import Malformed, parse_uid
from stagecal.domain.restore.errors import RestoreError

_WHAT = "casa_pipescript.py"
# As the pipeline writes them: context.set_state('ProjectStructure', 'ous_part_id', 'X659301709'), one a line.
_SET_STATE = re.compile(
    r"""(?mx) ^[ \t]* context\.set_state \s*\( \s*
    [uU]?['"]Project(?:Summary|Structure)['"] \s*,\s* [uU]?['"](\w+)['"] \s*,\s*
    [uU]? ( '(?:[^'\\\n]|\\.)*' | "(?:[^"\\\n]|\\.)*" ) \s*\)"""
)
_UNKNOWN = {"", "unknown", "undefined", "none"}
_LEVEL = re.compile(r"(SOUS|GOUS|MOUS)_(uid___\w+)")
_PPR_NAME = re.compile(r"PPR_(uid___\w+)\.xml")


@dataclass(frozen=True)
class PipescriptFacts:
    """What a calibration script knows of the project and of the PPR by which it was made; '' where it says nothing."""

    project: str = ""
    project_uid: str = ""
    part_id: str = ""
    project_status_uid: str = ""
    mous: str = ""
    recipe: str = ""
    ppr_file: str = ""
    sous_uid: str = ""
    gous_uid: str = ""
    sched_block_status_uid: str = ""


def read_pipescript(text: str) -> PipescriptFacts:
    """Given the text of a calibration script, return what it says. Raises RestoreError for contradictions."""
    said: dict[str, str] = {}
    for name, literal in _SET_STATE.findall(text.lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n")):
        value = str(ast.literal_eval(literal)).strip()
        if value.casefold() in _UNKNOWN:
            continue
        if said.setdefault(name, value) != value:
            raise RestoreError(f"{_WHAT} says {name} = {said[name]} and {value}: look at the script")
    path = said.get("ppr_file", "").split("/")
    levels = {match.group(1): _uid(match.group(2)) for part in path if (match := _LEVEL.fullmatch(part))}
    ppr_name = _PPR_NAME.fullmatch(path[-1])
    mous = _uid(said.get("ousstatus_entity_id", ""))
    if mous and levels.get("MOUS", mous) != mous:
        raise RestoreError(f"{_WHAT} is of {mous}, but its PPR lay in the directory of {levels['MOUS']}")
    return PipescriptFacts(
        project=said.get("proposal_code", ""),
        project_uid=_uid(said.get("ous_entity_id", "")),
        part_id=said.get("ous_part_id", ""),
        project_status_uid=_uid(said.get("ps_entity_id", "")),
        mous=mous or levels.get("MOUS", ""),
        recipe=said.get("recipe_name", ""),
        ppr_file=path[-1],
        sous_uid=levels.get("SOUS", ""),
        gous_uid=levels.get("GOUS", ""),
        sched_block_status_uid=_uid(ppr_name.group(1)) if ppr_name else "",
    )


def _uid(text: str) -> str:
    if not text:
        return ""
    try:
        return parse_uid(text)
    except Malformed as error:
        raise RestoreError(f"{_WHAT}: {error}") from error
