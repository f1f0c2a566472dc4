"""Which archived file is what, by its name; and the same file under names with and without `member.`.

Of several candidates none is taken: the pipeline takes the first it finds, and would take a wrong one without a word.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from stagecal.domain.restore.errors import RestoreError
from stagecal.domain.restore.facts import ArchivedFile

_PREFIX = "member."
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]{0,250}")
# The archive's own mark of manual calibration: scriptForCalibration, scriptForFluxCalibration, ...
_MANUAL = re.compile(r"scriptFor.*Cal")
_MANIFEST = "pipeline_manifest.xml"
_RESTORE_SCRIPT = "casa_piperestorescript.py"
_PIPESCRIPT = "casa_pipescript.py"
# What the pipelines of all cycles have put into auxproducts.tgz, as shell patterns of the names at its top.
AUXPRODUCTS = (
    "flux.csv",
    "antennapos.csv",
    "*.antennapos.json",
    "jyperk.csv",
    "jyperk_query.csv",
    "cont.dat",
    "*.flag*template.txt",
    "*.selfcal.json",
    "sc_workdir_*",
    "*findroi_products.tar",
    "*aquareport.xml",
    "*.timetracker.json",
    "*pipeline_stats*.json",
)


def plain_name(name: str, what: str) -> str:
    """Return a file name if it is plain (no directory, nothing that a shell or a tar file could turn into one).

    Raises RestoreError otherwise; `what` says in the message where the name stands.
    """
    if not _PLAIN_NAME.fullmatch(name) or ".." in name:
        raise RestoreError(f"{what}: {name[:100]!r} is not a plain file name")
    return name


def resolve_name(name: str, present: Collection[str]) -> str | None:
    """Return under which of the names that are present a file lies, or None.

    Names in a manifest and names in the archive may or may not begin with `member.`: the exact name counts first,
    then the one with, then the one without this prefix.
    """
    for candidate in (name, _PREFIX + name, name.removeprefix(_PREFIX)):
        if candidate in present:
            return candidate
    return None


def manifest_of(files: Iterable[ArchivedFile]) -> str:
    """Return the name of the one pipeline manifest by which a calibration is restored.

    There may be others of imaging runs: as in the pipeline, those of calibration runs (`cal` in their names) go
    before. Raises RestoreError for none or several.
    """
    names = _ending(files, _MANIFEST)
    if len(names) > 1:
        names = [name for name in names if "cal" in name.removesuffix(_MANIFEST)] or names
    return _the_one(names, "pipeline manifest")


def restore_script_of(files: Iterable[ArchivedFile]) -> str:
    """Return the name of the archived restore script. Raises RestoreError for none or several."""
    return _the_one(_of_calibration(_ending(files, _RESTORE_SCRIPT)), "casa_piperestorescript.py")


def pipescript_of(files: Iterable[ArchivedFile]) -> str | None:
    """Return the name of the archived script of the calibration, or None. Raises RestoreError for several."""
    names = _of_calibration(_ending(files, _PIPESCRIPT))
    return _the_one(names, "casa_pipescript.py") if names else None


def archived_ppr_of(files: Iterable[ArchivedFile]) -> str | None:
    """Return the name of the archived PPR, or None. Raises RestoreError for several."""
    names = sorted({file.name for file in files if "PPR_" in file.name and file.name.endswith(".xml")})
    return _the_one(names, "PPR") if names else None


def other_manifests(files: Iterable[ArchivedFile], manifest: str) -> frozenset[str]:
    """Return the names of the manifests that must not lie beside the one that counts."""
    return frozenset(_ending(files, _MANIFEST)) - {manifest}


def is_manual_calibration(name: str) -> bool:
    """Return whether a file of this name says that the MOUS was calibrated by hand."""
    return _MANUAL.search(name) is not None


def _ending(files: Iterable[ArchivedFile], ending: str) -> list[str]:
    return sorted({file.name for file in files if file.name.endswith(ending)})


def _of_calibration(names: list[str]) -> list[str]:
    return [name for name in names if "cal" in name] or names if len(names) > 1 else names


def _the_one(names: list[str], what: str) -> str:
    if not names:
        raise RestoreError(f"the archive has no {what} of this MOUS: it cannot be restored")
    if len(names) > 1:
        raise RestoreError(f"the archive has several files that could be the {what}, a person has to choose: {names}")
    return names[0]
