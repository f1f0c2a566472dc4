"""Make a measurement set independent of its lock files, by writing the true row counts where they belong.

Each table.dat gets the count of the storage managers in both of its places, a table.lock that says another one too.
Every single step is atomic and leaves the measurement set at least as healthy as it was; what it is afterwards is read
again from disk. Nothing is changed unless every table has an agreed truth.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stagecal.measurement_set.check import CheckReport, check_measurement_set, check_table, read_measurement_set
from stagecal.measurement_set.counts import changes_to, require_unused, write
from stagecal.measurement_set.errors import CannotVerify, Damaged
from stagecal.measurement_set.tables import Table


@dataclass(frozen=True)
class SealReport:
    """What was sealed: the tables whose files were changed (none the second time), and the check made afterwards."""

    path: Path
    changed: tuple[str, ...]
    check: CheckReport

    @property
    def sealed(self) -> bool:
        """Whether the result is healthy and no table depends on its lock file."""
        return self.check.sealed


def seal_measurement_set(path: Path) -> SealReport:
    """Make the measurement set at `path` independent of its lock files and return what was changed.

    Idempotent. To be done last, when no process has the measurement set open.
    Raises NotAMeasurementSet if `path` is no directory, Damaged or CannotVerify if a table has no agreed number of
    rows, InUse if a process of this host has a table open; in each case nothing was changed. An OSError tells that
    a file could not be written; what was replaced until then is whole, and sealing again goes on with the rest.
    """
    changed = _seal(path)
    return SealReport(path, changed, check_measurement_set(path))


def seal_table(path: Path) -> SealReport:
    """Do the same for a table and its subtables that need not be a measurement set."""
    changed = _seal(path)
    return SealReport(path, changed, check_table(path))


def _seal(path: Path) -> tuple[str, ...]:
    tables = read_measurement_set(path)
    for name, table in tables.items():
        _require_truth(path, name, table)
    for table in tables.values():
        require_unused(table)
    return tuple(name for name, table in tables.items() if _seal_one(table))


def _require_truth(path: Path, name: str, table: Table) -> None:
    if table.damage:
        raise Damaged(f"{path}: {name}: {'; '.join(table.damage)}; nothing was changed, make it again")
    if table.unknown or table.true_rows is None:
        raise CannotVerify(f"{path}: {name}: {'; '.join(table.problems)}; nothing was changed")


def _seal_one(table: Table) -> bool:
    if table.description is None or table.true_rows is None or table.description.column_set is None:
        return False
    changes = changes_to(table, table.true_rows)
    for change in changes:
        write(change)
    return bool(changes)
