"""Whether a measurement set is whole: every table has the rows that casacore would report, every file the length
that its header promises, and every id of the main table its row in a subtable.

Reads headers, indices and id columns only, without CASA. What a check of this kind cannot see is a data file
whose content was overwritten in place: only a checksum sees that.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stagecal.measurement_set.columns import integer_range
from stagecal.measurement_set.errors import CannotVerify, Damaged, MeasurementSetError, one_line
from stagecal.measurement_set.files import Directory, Files
from stagecal.measurement_set.standard import faults
from stagecal.measurement_set.tables import Lock, Table, Verdict, read_table

MAIN = "MAIN"
NEVER_EMPTY = ("ANTENNA", "DATA_DESCRIPTION", "FIELD", "OBSERVATION", "POLARIZATION", "SPECTRAL_WINDOW")
REQUIRED = (*NEVER_EMPTY, "FEED", "FLAG_CMD", "HISTORY", "POINTING", "PROCESSOR", "STATE")
VERSION = 2.0
# Column of ids, table that has it, table whose rows they name, smallest id that is allowed.
REFERENCES = (
    ("DATA_DESC_ID", MAIN, "DATA_DESCRIPTION", 0),
    ("FIELD_ID", MAIN, "FIELD", 0),
    ("ANTENNA1", MAIN, "ANTENNA", 0),
    ("ANTENNA2", MAIN, "ANTENNA", 0),
    ("OBSERVATION_ID", MAIN, "OBSERVATION", 0),
    ("STATE_ID", MAIN, "STATE", -1),
    ("PROCESSOR_ID", MAIN, "PROCESSOR", -1),
    ("SPECTRAL_WINDOW_ID", "DATA_DESCRIPTION", "SPECTRAL_WINDOW", -1),
    ("POLARIZATION_ID", "DATA_DESCRIPTION", "POLARIZATION", -1),
)
# Some observatories leave these empty and write the id 0 all the same; CASA lives with it.
MAY_BE_EMPTY = ("STATE", "PROCESSOR")
WORST_FIRST = (
    Verdict.BROKEN,
    Verdict.WRONG_ROWS,
    Verdict.CANNOT_BE_VERIFIED,
    Verdict.DEPENDS_ON_LOCK,
    Verdict.OK,
)


@dataclass(frozen=True)
class TableReport:
    """One table: the rows that casacore would report, the rows that are stored (each None if unknown)."""

    name: str
    reported_rows: int | None
    rows: int | None
    verdict: Verdict
    problems: tuple[str, ...]


@dataclass(frozen=True)
class CheckReport:
    """A measurement set: where it lies, its tables (MAIN first) and every problem, one line each."""

    place: str
    tables: tuple[TableReport, ...]
    problems: tuple[str, ...]

    @property
    def rows(self) -> int | None:
        """The number of rows that the main table holds, None if that cannot be told."""
        return self.tables[0].rows

    @property
    def healthy(self) -> bool:
        """Whether it can be used as it lies there, lock files included."""
        return not self.problems

    @property
    def verifiable(self) -> bool:
        """Whether every table is stored in a way that can be checked."""
        return all(table.verdict is not Verdict.CANNOT_BE_VERIFIED for table in self.tables)

    @property
    def verdict(self) -> Verdict:
        """What is to be thought of the whole, the worst first."""
        if len(self.problems) > sum(len(table.problems) for table in self.tables):
            return Verdict.BROKEN  # Its tables contradict each other, or are too few.
        return min((table.verdict for table in self.tables), key=WORST_FIRST.index)

    @property
    def sealed(self) -> bool:
        """Whether it is healthy and stays so without any of its lock files."""
        return self.healthy and all(table.verdict is Verdict.OK for table in self.tables)


def check_measurement_set(place: Path | Files) -> CheckReport:
    """Return what is wrong with the measurement set at `place`, if anything.

    Raises NotAMeasurementSet if `place` is no directory; everything else is told by the report.
    Nothing is written. The process must not have the measurement set open through casacore (see tables).
    """
    return _check(place, (_missing_tables, _other_columns, _empty_tables, _loose_references))


def check_table(place: Path | Files) -> CheckReport:
    """Return what is wrong with the table at `place` and its subtables, which need not be a measurement set.

    Raises NotAMeasurementSet if `place` is no directory.
    """
    return _check(place, ())


def _check(place: Path | Files, rules: tuple[Callable[[dict[str, Table]], list[str]], ...]) -> CheckReport:
    files = Directory(place) if isinstance(place, Path) else place
    tables = read_measurement_set(files)
    reports = tuple(_report(name, table) for name, table in tables.items())
    problems = [f"{report.name}: {line}" for report in reports for line in report.problems]
    problems += files.problems
    for rule in rules:
        problems += rule(tables)
    return CheckReport(one_line(files.place), reports, tuple(problems))


def read_measurement_set(place: Path | Files) -> dict[str, Table]:
    """Return the main table under "MAIN" and each subtable that its keywords name, in their order.

    Raises NotAMeasurementSet if `place` is no directory. A table that lies elsewhere is not followed.
    """
    main = read_table(place)
    tables = {MAIN: main}
    if main.description is None:
        return tables
    for name, stored in main.description.subtables.items():
        tables[name] = _read_subtable(main.files, stored)
    return tables


def _read_subtable(files: Files, stored: str) -> Table:
    """Read a subtable under the name that the keyword has: "././NAME" is inside the table, "./NAME" beside it."""
    relative = stored
    while relative.startswith("./"):
        relative = relative[2:]
    if len(stored) - len(relative) == 2:
        relative = f"../{relative}"
    try:
        return read_table(files.below(relative))
    except CannotVerify as error:
        return Table(files, None, Lock(), {}, (), (str(error),))
    except FileNotFoundError:
        return Table(files, None, Lock(), {}, ("its directory is missing",), ())


def _report(name: str, table: Table) -> TableReport:
    verdict, problems = table.verdict, table.problems
    kind = table.description.kind if table.description else "PlainTable"
    if kind != "PlainTable" and (name == MAIN or name in REQUIRED):
        verdict = Verdict.CANNOT_BE_VERIFIED
        problems = (*problems, f"is a {kind}, whose rows lie in other tables; make a copy of its own with split")
    lines = tuple(map(one_line, problems))
    return TableReport(one_line(name), table.reported_rows, table.true_rows, verdict, lines)


def _missing_tables(tables: dict[str, Table]) -> list[str]:
    description = tables[MAIN].description
    if description is None or description.kind != "PlainTable":
        return []
    missing = [name for name in REQUIRED if name not in tables]
    if missing:
        return [f"MAIN: names no subtable {', '.join(missing)}: this is no measurement set"]
    version = description.keywords.get("MS_VERSION")
    if version != VERSION:
        return [f"MAIN: says that it is a measurement set of version {version}, CASA reads version {VERSION}"]
    return []


def _other_columns(tables: dict[str, Table]) -> list[str]:
    return [
        f"{name}: {fault}, so that CASA does not take it for a measurement set; make it again from its source"
        for name, table in tables.items()
        if table.description is not None and table.description.kind == "PlainTable"
        for fault in faults(name, table.description)
    ]


def _empty_tables(tables: dict[str, Table]) -> list[str]:
    empty = [
        name for name in (MAIN, *NEVER_EMPTY) if name in tables and _plain(tables[name]) and not _rows(tables[name])
    ]
    return [f"{name}: has no rows, so there are no data to use; make it again from its source" for name in empty]


def _loose_references(tables: dict[str, Table]) -> list[str]:
    problems = []
    for column, name, target, smallest in REFERENCES:
        if not (name in tables and target in tables and _plain(tables[name]) and _plain(tables[target])):
            continue
        rows = _rows(tables[target])
        if rows == 0 and (target in MAY_BE_EMPTY or target in NEVER_EMPTY):
            continue
        try:
            found = integer_range(tables[name], column)
        except CannotVerify:
            continue
        except (Damaged, OSError) as error:
            problems.append(f"{name}: {column} cannot be read: {error}; make it again from its source")
            continue
        if found and not (smallest <= found[0] and found[1] < rows):
            problems.append(
                f"{name}: {column} goes from {found[0]} to {found[1]}, but {target} has {rows} rows;"
                " make it again from its source"
            )
    return problems


def _plain(table: Table) -> bool:
    """Whether the number of rows is beyond doubt."""
    return (
        table.description is not None
        and table.description.kind == "PlainTable"
        and table.true_rows is not None
        and not table.damage
    )


def _rows(table: Table) -> int:
    rows = table.true_rows
    if rows is None:
        raise MeasurementSetError(f"{table.files.place}: the number of rows is not known")
    return rows
