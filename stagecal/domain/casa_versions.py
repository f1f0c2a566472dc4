"""Which CASA a project's calibration belongs to: by the cycle of its code, when no manifest says it better.

The table follows the CASA and pipeline releases that ALMA used per cycle (ALMA pipeline documentation).
"""

from __future__ import annotations

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
