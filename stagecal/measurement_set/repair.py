"""Repairs of row counts that are proved, and refusals that say why: what would be done, and the doing of it.

The number of rows comes from the table's own storage managers. A parent is only asked where these cannot tell, and only
believed if its table is shown to be the same one: the two `table.dat` differ in nothing but the counts, and the stored
data are the same to the byte. Nothing of a parent is ever copied, for one that numbers its rows otherwise, or has other
columns, would destroy the table. Each `table.dat` is kept as `table.dat.bck`, with its times, before it is replaced.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stagecal.measurement_set.check import (
    CheckReport,
    check_measurement_set,
    check_table,
    read_measurement_set,
)
from stagecal.measurement_set.counts import Change, changes_to, require_unused, synchronize, write
from stagecal.measurement_set.digests import digest
from stagecal.measurement_set.errors import CannotVerify, one_line
from stagecal.measurement_set.files import Directory, read_file
from stagecal.measurement_set.finding import Found, find_tables, is_measurement_set
from stagecal.measurement_set.tables import Table, Verdict

SPLIT = ".split.cal"
PARENTS = "working"


@dataclass(frozen=True)
class TableRepair:
    """One table that can be repaired: its rows, who proves them, and the bytes that change.

    `parent` says what was found of the table of the same name in the parent; nothing if there is none to ask.
    """

    name: str
    rows: int
    proof: str
    changes: tuple[Change, ...]
    parent: str = ""


@dataclass(frozen=True)
class Refusal:
    """One table that is not repaired, why, and what to do."""

    name: str
    reason: str


@dataclass(frozen=True)
class RepairPlan:
    """What would be done to the measurement set at `path`, and how it is now."""

    path: Path
    parent: Path | None
    before: CheckReport
    repairs: tuple[TableRepair, ...]
    refusals: tuple[Refusal, ...]
    tables: tuple[Table, ...] = ()


def plan_repair(path: Path, parent: Path | None = None) -> RepairPlan:
    """Return what can be repaired in the measurement set (or single table) at `path`, and what cannot, and why.

    Writes nothing. Raises NotAMeasurementSet if `path` or `parent` is no directory, OSError if a file that would have
    to change cannot be opened for writing.
    """
    tables = read_measurement_set(path)
    parents = read_measurement_set(parent) if parent is not None else {}
    repairs: list[TableRepair] = []
    refusals: list[Refusal] = []
    for name, table in tables.items():
        if table.verdict in (Verdict.OK, Verdict.DEPENDS_ON_LOCK):
            continue
        try:
            repairs.append(_repair_of(one_line(name), table, parents.get(name), parent))
        except _Refused as refused:
            refusals.append(Refusal(one_line(name), one_line(str(refused))))
    concerned = tuple(tables[repair.name] for repair in repairs)
    return RepairPlan(path, parent, _check(path), tuple(repairs), tuple(refusals), concerned)


def carry_out(plan: RepairPlan) -> CheckReport:
    """Do what was planned, and return what the measurement set is afterwards, read again from disk.

    Raises InUse if a process of this host has one of the tables open, CannotVerify if a file has changed since the
    plan was made; in both cases nothing was changed. An OSError tells that a file could not be written; what was
    replaced until then is whole.
    """
    for table in plan.tables:
        require_unused(table)
    changes = [change for repair in plan.repairs for change in repair.changes]
    for change in changes:
        if change.path.read_bytes() != change.old:
            raise CannotVerify(f"{change.path} has just been changed by somebody else; nothing was changed, try again")
    for change in changes:
        _keep(change)
        write(change)
    return _check(plan.path)


def find_splits(tree: Path) -> Iterator[tuple[Path, Path | None]]:
    """Give each `*.split.cal` in a tree, and its parent: `working/<name>` beside it, None where there is none.

    Parents are not given themselves. Raises NotAMeasurementSet if `tree` is no directory.
    """
    for found in find_tables(tree):
        if not isinstance(found, Found) or not isinstance(found.files, Directory):
            continue
        path = found.files.path
        if path.name.endswith(SPLIT):
            parent = path.parent / PARENTS / path.name.removesuffix(SPLIT)
            yield path, parent if parent.is_dir() else None


class _Refused(Exception):
    pass


def _repair_of(name: str, table: Table, of_parent: Table | None, parent: Path | None) -> TableRepair:
    again = f"split it again from {parent}" if parent else "make it again from its source"
    if table.damage:
        raise _Refused(f"{'; '.join(table.damage)}; no count can mend that: {again}")
    if table.description is None or table.description.column_set is None:
        raise _Refused(f"{'; '.join(table.problems)}; {again}")
    own = None if table.unknown else table.true_rows
    said, rows = "", own
    if of_parent is not None:
        said, of_parents = _word_of_parent(table, of_parent, own)
        rows = own if own is not None else of_parents
    if rows is None:
        reason = said or "a parent that still has the same table could tell: name it with --parent"
        raise _Refused(f"{'; '.join(table.problems)}; {reason}")
    try:
        changes = changes_to(table, rows)
    except OverflowError:
        raise _Refused(f"{rows} rows have no room in table.dat; {again}") from None
    proof = "its own storage managers" if own is not None else f"the same table in {parent}"
    return TableRepair(name, rows, proof, changes, said)


def _word_of_parent(table: Table, parent: Table, own: int | None) -> tuple[str, int | None]:
    """Return what the parent's table says of this one, in words, and its count if it is the same table."""
    ours, theirs = table.description, parent.description
    if ours is None or theirs is None or theirs.column_set is None or ours.column_set is None:
        return "the parent's table cannot be read", None
    old, new = read_file(table.files, "table.dat"), read_file(parent.files, "table.dat")
    if len(old) != len(new):
        return f"the parent's table is another one ({len(new)} bytes of description, not {len(old)})", None
    counts = {
        place
        for count in (theirs.header, theirs.column_set)
        for place in range(count.offset, count.offset + count.width)
    }
    others = [place for place in range(len(old)) if old[place] != new[place] and place not in counts]
    if others:
        return f"the parent's table is another one ({len(others)} bytes differ beside the counts)", None
    rows = parent.true_rows if not parent.unknown else parent.reported_rows
    if parent.damage or rows is None or rows != theirs.header.rows:
        return "the parent's own table.dat is not to be trusted", None
    if own is not None:
        if rows != own:
            return f"the parent's table has {rows} rows, so it is another one: a copy of it would destroy this", None
        return "the parent says the same", rows
    if not _same_data(table, parent):
        return "the parent's data are not the same to the byte, so its count proves nothing", None
    return "the parent's data are the same to the byte", rows


def _same_data(table: Table, parent: Table) -> bool:
    ours, theirs = (
        sorted(name for name in files.entries()[0] if name.startswith("table.f"))
        for files in (table.files, parent.files)
    )
    return ours == theirs and all(digest(table.files, name) == digest(parent.files, name) for name in ours)


def _check(path: Path) -> CheckReport:
    files = Directory(path)
    return check_measurement_set(files) if is_measurement_set(files) else check_table(files)


def _keep(change: Change) -> None:
    """Copy what a file holds beside it, with its times, and never over an older copy that holds something else."""
    for number in range(1000):
        backup = change.path.with_name(f"{change.path.name}.bck{number or ''}")
        try:
            with backup.open("xb"):
                pass
        except FileExistsError:
            if not backup.is_symlink() and backup.read_bytes() == change.old:
                return
            continue
        shutil.copy2(change.path, backup)
        with backup.open("rb") as file:
            os.fsync(file.fileno())
        synchronize(backup.parent)
        return
    raise CannotVerify(f"{change.path} has a thousand backups already; remove some")
