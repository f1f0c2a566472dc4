"""Which CASA a project's calibration belongs to: by the cycle of its code, when no manifest says it better.

The table follows the CASA and pipeline releases that ALMA used per cycle (ALMA pipeline documentation).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_CASA_OF_YEAR = {
    2012: "4.2.2",
    2013: "4.2.2",
    2015: "4.5.3",
    2016: "4.7.2",
    2017: "5.1.1",
    2018: "5.4.0",
    2019: "5.6.1",
    2021: "6.2.1",
    2022: "6.4.1",
    2023: "6.5.4",
    2024: "6.6.1",
}
_RELEASE = re.compile(r"[0-9]+(?:[.-][0-9]+)*")
_PIPELINE = re.compile(r"20[0-9]{2}(?:\.[0-9]+)+")
# Before this build a PPR's sessions were read wrongly for some EBs (see casa_faults).
_SESSIONS_READ_RIGHT = "2020.1.0.40"
_SESSIONS_READ_RIGHT_CASA = "6.1.1-15"
# Before this one hifa_restoredata did not repeat the renormalisation that a manifest asks for.
_RENORM_REPEATED = "2021.2.0.128"
_RENORM_REPEATED_CASA = "6.2.1-7"


@dataclass(frozen=True)
class CasaChoice:
    """A CASA of the site: its version, where it lies on the nodes, and the label of the nodes that can run it."""

    version: str
    home: str
    label: str

    @property
    def is_old(self) -> bool:
        """Whether it is one of the builds for RHEL5 (CASA before 5)."""
        return version_key(self.version) < (5,)


def version_key(version: str) -> tuple[int, ...]:
    """Return a version such as 5.1.1-5 as numbers that compare in its order."""
    return tuple(int(part) for part in version.replace("-", ".").split(".") if part.isdigit())


def casa_for(project: str, configured: Iterable[CasaChoice]) -> CasaChoice | None:
    """Given a project code and the site's CASAs, return the one to use, or None if the site configures none.

    The version of the project's cycle is wanted; among the configured ones the closest that is not older is taken,
    else the newest.
    """
    choices = sorted(configured, key=lambda choice: version_key(choice.version))
    if not choices:
        return None
    wanted = version_key(_CASA_OF_YEAR.get(int(project[:4]), "999"))
    for choice in choices:
        if version_key(choice.version)[: len(wanted)] >= wanted:
            return choice
    return choices[-1]


def casa_for_version(wanted: str, configured: Iterable[CasaChoice], *, exact: bool = False) -> CasaChoice | None:
    """Given the version that calibrated a MOUS, return the site's CASA to restore it with, or None if it has none.

    The same version or the closest newer one, never one that `casa_faults` refuses; with `exact` (manual
    calibration) only the same. A version written without its build number stands for each build of it.
    """
    key = release_key(wanted)
    if not key:
        return None
    fitting = [
        choice
        for choice in configured
        if not casa_faults(choice.version)
        and (_same_or_newer(choice.version, key) if not exact else _alike(release_key(choice.version), key))
    ]
    return min(fitting, key=lambda choice: release_key(choice.version), default=None)


def casa_faults(version: str, pipeline_version: str = "", *, renorm: bool = False) -> tuple[str, ...]:
    """Return why this CASA with this pipeline must not restore data, as sentences; nothing if it may.

    The pipeline's version may be unknown (''). `renorm` says that the manifest asks for a renormalisation. An empty
    CASA version is unknown and refused by nothing.
    """
    faults = []
    pipeline = pipeline_key(pipeline_version)
    release = release_key(version)
    first_right = release_key(_SESSIONS_READ_RIGHT_CASA)
    if (pipeline[:3] == (2020, 1, 0) and pipeline < pipeline_key(_SESSIONS_READ_RIGHT)) or (
        len(release) > 3 and release[:2] == (6, 1) and release < first_right
    ):
        faults.append(
            f"CASA {version or '6.1'} with pipeline {pipeline_version or 'before ' + _SESSIONS_READ_RIGHT} puts EBs "
            f"whose UIDs end in a or e into session_1 without a word: use CASA {_SESSIONS_READ_RIGHT_CASA} or newer"
        )
    too_old = pipeline < pipeline_key(_RENORM_REPEATED) if pipeline else False
    if renorm and (too_old or (release and not _same_or_newer(version, release_key(_RENORM_REPEATED_CASA)))):
        faults.append(
            f"CASA {version or '?'} with pipeline {pipeline_version or '?'} skips the renormalisation of the manifest "
            f"without a word: use CASA {_RENORM_REPEATED_CASA} or newer"
        )
    return tuple(faults)


def is_older(version: str, than: str) -> bool:
    """Return whether a CASA is older than another one; never if one of the versions is unknown.

    A version written without its build number stands for each build of it.
    """
    key = release_key(than)
    return bool(key and release_key(version)) and not _same_or_newer(version, key)


def release_key(version: str) -> tuple[int, ...]:
    """Return the first version number in a text (`6.1.1-15-pipeline-2020.1.0.40`) as numbers; () for none."""
    match = _RELEASE.search(version)
    return version_key(match.group()) if match else ()


def pipeline_key(version: str) -> tuple[int, ...]:
    """Return a pipeline version as numbers that compare in its order: revisions (r42866) before 2020.1.0.40.

    A text without any number gives ().
    """
    match = _PIPELINE.search(version)
    if match:
        return version_key(match.group())
    revision = re.search(r"[0-9]+", version)
    return (0, int(revision.group())) if revision else ()


def _alike(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    common = min(len(one), len(other))
    return common > 0 and one[:common] == other[:common]


def _same_or_newer(version: str, than: tuple[int, ...]) -> bool:
    release = release_key(version)
    return release > than or _alike(release, than)
