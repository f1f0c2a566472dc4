"""The pipeline manifest of a MOUS: which files restore which execution block of which session.

It is the authority of a restore. Elements and their `name` count; other attributes vary from cycle to cycle and are
not read. What the pipeline would take wrongly without a word (two `ous`, a session twice, an EB twice, names that
leave their directory) raises RestoreError.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from stagecal.domain.identifiers import Malformed, parse_uid
from stagecal.domain.restore.errors import RestoreError
from stagecal.domain.restore.markup import Element, parse_markup
from stagecal.domain.restore.product_names import plain_name
from stagecal.domain.restore.sessions import Session, check_one_session_each, readable_uid, session_number

_WHAT = "the pipeline manifest"
_UNDEFINED = "Undefined"
# Data sets that imaging made from an EB; nothing of them is needed to restore it.
_DERIVED = re.compile(r"_(targets?|imaging)(_line|_cont)?\.ms$")


@dataclass(frozen=True)
class ManifestExecutionBlock:
    """What the manifest says of one EB; a name that it does not give is None.

    `renorm` are the parameters of a renormalisation that has to be repeated, None if there was none.
    """

    uid: str
    finalflags: str | None
    applycmds: str | None
    renorm: Mapping[str, str] | None = None


@dataclass(frozen=True)
class ManifestSession:
    """What the manifest says of one session."""

    number: int
    caltables: str | None
    aux_caltables: str | None
    execution_blocks: tuple[ManifestExecutionBlock, ...]


@dataclass(frozen=True)
class Manifest:
    """A pipeline manifest. `mous` is '' if it names none; versions are as written, '' if missing."""

    mous: str
    casa_version: str
    pipeline_version: str
    procedure_name: str
    sessions: tuple[ManifestSession, ...]
    piperequest: str | None = None
    restorescript: str | None = None
    pipescript: str | None = None
    auxproducts: str | None = None
    weblog: str | None = None

    @property
    def layout(self) -> tuple[Session, ...]:
        """The sessions with the EBs that were calibrated, in the manifest's order."""
        return tuple(
            Session(session.number, tuple(block.uid for block in session.execution_blocks)) for session in self.sessions
        )


def read_manifest(text: str) -> Manifest:
    """Given the text of a pipeline manifest, return what it says. Raises RestoreError for what cannot be trusted."""
    root = parse_markup(text, _WHAT)
    if root.name != "piperesults":
        raise RestoreError(f"{_WHAT} is a {root.name}, not piperesults: look at the file")
    units = root.named("ous")
    if len(units) != 1 or root.children[0] is not units[0]:
        raise RestoreError(f"{_WHAT} has {len(units)} ous where exactly one, and nothing before it, is due")
    unit = units[0]
    manifest = Manifest(
        mous=_mous(unit.attributes.get("name", "")),
        casa_version=_value(unit, "casaversion"),
        pipeline_version=_value(unit, "pipeline_version"),
        procedure_name=_value(unit, "procedure_name"),
        sessions=tuple(_session(element) for element in unit.named("session")),
        piperequest=_file(unit, "piperequest"),
        restorescript=_file(unit, "restorescript"),
        pipescript=_file(unit, "pipescript"),
        auxproducts=_file(unit, "aux_products_file"),
        weblog=_file(unit, "weblog"),
    )
    numbers = [session.number for session in manifest.sessions]
    repeated = sorted({number for number in numbers if numbers.count(number) > 1})
    if repeated:
        raise RestoreError(f"{_WHAT} has session {repeated[0]} twice: the pipeline would take the last without a word")
    check_one_session_each(manifest.layout, _WHAT)
    if not any(session.execution_blocks for session in manifest.sessions):
        raise RestoreError(f"{_WHAT} lists no execution block: there is nothing to restore")
    return manifest


def _mous(name: str) -> str:
    try:
        return parse_uid(name)
    except Malformed:
        # Runs by hand write `unknown` and the like.
        return ""


def _session(element: Element) -> ManifestSession:
    number = session_number(element.attributes.get("name", ""), _WHAT)
    blocks = [_block(asdm) for asdm in element.named("asdm") if not _DERIVED.search(asdm.attributes.get("name", ""))]
    uids = [block.uid for block in blocks]
    if len(set(uids)) < len(uids):
        raise RestoreError(f"{_WHAT} lists an execution block twice in session {number}: {', '.join(uids)}")
    return ManifestSession(number, _file(element, "caltables"), _file(element, "aux_caltables"), tuple(blocks))


def _block(element: Element) -> ManifestExecutionBlock:
    name = element.attributes.get("name", "")
    if not name.endswith(".ms"):
        raise RestoreError(f"{_WHAT} lists the EB {name!r}: the pipeline looks only for names as <EB>.ms")
    renorm = _only(element, "hifa_renorm")
    return ManifestExecutionBlock(
        uid=readable_uid(name.removesuffix(".ms"), _WHAT),
        finalflags=_file(element, "finalflags"),
        applycmds=_file(element, "applycmds"),
        renorm=dict(renorm.attributes) if renorm else None,
    )


def _only(element: Element, name: str) -> Element | None:
    """Return the only child of this name, None for none; the pipeline would take the last of several."""
    found = element.named(name)
    if len(found) > 1:
        raise RestoreError(f"line {found[1].line} of {_WHAT}: a second {name} in one {element.name}")
    return found[0] if found else None


def _value(element: Element, name: str) -> str:
    found = _only(element, name)
    return found.attributes.get("name", "").strip() if found else ""


def _file(element: Element, name: str) -> str | None:
    found = _only(element, name)
    if found is None or found.attributes.get("name", _UNDEFINED) == _UNDEFINED:
        return None
    return plain_name(found.attributes["name"], f"line {found.line} of {_WHAT}")
