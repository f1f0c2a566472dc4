"""Every witness of the row count of one casacore table, and the verdict on them.

Four places keep the count: the header of table.dat and its column set (both possibly stale since the table was
made), the "sync" record of table.lock (the one casacore believes, if it is there and not 0), and each storage
manager's own files (the truth). Reading never blocks and takes no lock.

A process that has the same table open through casacore must not read it here: POSIX drops a process's locks on
a file when it closes any descriptor of that file, and table.lock is opened and closed.
"""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from stagecal.measurement_set.aipsio import Cursor
from stagecal.measurement_set.description import Count, Description, parse_description, promised_length
from stagecal.measurement_set.errors import CannotVerify, Damaged, one_line
from stagecal.measurement_set.files import Directory, Files, read_file
from stagecal.measurement_set.managers import is_known, stored_rows

LOCK_REQUESTS = 260  # table.lock begins with a list of lock requests; then the length of the sync record.

UNREADABLE = "cannot be read"


class Verdict(StrEnum):
    """What is to be thought of one table."""

    OK = "ok"
    DEPENDS_ON_LOCK = "depends on its lock file"
    WRONG_ROWS = "wrong rows"
    BROKEN = "broken"
    CANNOT_BE_VERIFIED = "cannot be verified"


@dataclass(frozen=True)
class Lock:
    """The count in table.lock: None if the file is absent or empty; `damage` if casacore could not read it."""

    count: Count | None = None
    damage: str | None = None


@dataclass(frozen=True)
class Table:
    """One table as its files describe it. `stored` has the count of each storage manager that keeps one."""

    files: Files
    description: Description | None
    lock: Lock
    stored: dict[int, int]
    damage: tuple[str, ...]
    unknown: tuple[str, ...]

    @property
    def reported_rows(self) -> int | None:
        """The number of rows that casacore (3.1 and later) would report; None if it could not open the table."""
        if self.description is None or self.lock.damage:
            return None
        in_lock = self.lock.count.rows if self.lock.count else 0
        return in_lock or self.description.header.rows

    @property
    def true_rows(self) -> int | None:
        """The number of rows that the storage managers hold; None if they disagree or cannot be read."""
        if self.description is None or self.damage:
            return None
        if not self.description.managers:
            # A table without storage, or one that refers to others: table.dat is written as a whole.
            return self.description.header.rows
        counts = set(self.stored.values())
        return counts.pop() if len(counts) == 1 else None

    @property
    def verdict(self) -> Verdict:
        """What is to be said of the table, the worst first."""
        if self.damage or self.lock.damage:
            return Verdict.BROKEN
        if self.unknown or self.description is None or self.true_rows is None:
            return Verdict.CANNOT_BE_VERIFIED
        if self.reported_rows != self.true_rows:
            return Verdict.WRONG_ROWS
        return Verdict.OK if self.description.header.rows == self.true_rows else Verdict.DEPENDS_ON_LOCK

    @property
    def problems(self) -> tuple[str, ...]:
        """One line each: what is wrong and what to do; empty if the verdict is ok or depends on its lock file."""
        lines = [f"{line}; make it again from its source" for line in self.damage]
        if self.lock.damage:
            remedy = "make it readable" if self.lock.damage.startswith(UNREADABLE) else "seal it"
            lines.append(f"table.lock {self.lock.damage}: casacore cannot open the table; {remedy}")
        lines += self.unknown
        if not lines and self.true_rows is None:
            lines.append("no storage manager keeps a row count: nothing to compare with")
        if self.verdict is Verdict.WRONG_ROWS:
            lines.append(
                f"casacore would see {self.reported_rows} rows where {self.true_rows} are stored,"
                " for the count in table.lock is missing, 0 or wrong; seal it, nothing is lost"
            )
        return tuple(map(one_line, lines))


def read_table(place: Path | Files) -> Table:
    """Return every witness of the row count of the table at `place`: a directory, on disk or in a tar file.

    Raises NotAMeasurementSet if it is no directory. Whatever is wrong inside it is told by the result.
    """
    files = Directory(place) if isinstance(place, Path) else place
    lock = _read_lock(files)
    try:
        data = read_file(files, "table.dat")
        description = parse_description(data)
        if len(data) != promised_length(data):
            raise Damaged(f"has {len(data)} bytes where its header promises {promised_length(data)}")
    except FileNotFoundError:
        return Table(files, None, lock, {}, ("table.dat is missing",), ())
    except OSError as error:
        return Table(files, None, lock, {}, (), (f"table.dat cannot be read: {error.strerror}; ask who owns it",))
    except Damaged as error:
        return Table(files, None, lock, {}, (f"table.dat {error}",), ())
    except CannotVerify as error:
        return Table(files, None, lock, {}, (), (f"table.dat {error}",))
    stored, damage, unknown = _read_managers(files, description)
    doubts = tuple(f"table.dat {line}" for line in description.doubts)
    return Table(files, description, lock, stored, damage, unknown + doubts)


def _read_managers(files: Files, description: Description) -> tuple[dict[int, int], tuple[str, ...], tuple[str, ...]]:
    stored: dict[int, int] = {}
    damage: list[str] = []
    unknown: list[str] = []
    for manager in description.managers:
        if not is_known(manager.kind):
            names = ", ".join(column.name for column in description.columns_of(manager.number))
            unknown.append(f"{names} is stored by {manager.kind}, which is not read here; split it first")
            continue
        try:
            rows = stored_rows(files, manager, description)
        except Damaged as error:
            damage.append(str(error))
        except CannotVerify as error:
            unknown.append(str(error))
        else:
            if rows is not None:
                stored[manager.number] = rows
    if len(set(stored.values())) > 1:
        counts = ", ".join(f"table.f{number} {rows}" for number, rows in stored.items())
        damage.append(f"the storage managers disagree on the number of rows ({counts})")
    return stored, tuple(damage), tuple(unknown)


def _read_lock(files: Files) -> Lock:
    try:
        with files.open("table.lock") as file:
            start = file.read(0, LOCK_REQUESTS + 4)
            length = int.from_bytes(start[LOCK_REQUESTS:], "big")
            if len(start) < LOCK_REQUESTS + 4 or length == 0:
                return Lock()
            record = file.read(LOCK_REQUESTS + 4, min(length, 1 << 20))
    except FileNotFoundError:
        return Lock()
    except OSError as error:
        return Lock(damage=f"{UNREADABLE} ({error.strerror})")
    except CannotVerify as error:
        return Lock(damage=str(error))
    if len(record) < length:
        return Lock(damage=f"ends inside its record ({len(record)} of {length} bytes)")
    cursor = Cursor(record)
    try:
        with cursor.object("sync") as version:
            if not 1 <= version <= 2:
                raise Damaged(f"has a record of version {version}")
            offset, wide = cursor.position, version > 1
            rows = cursor.count(wide=wide)
            columns = cursor.int32()
            cursor.uint32()  # how often it was changed
            if columns >= 0:
                cursor.uint32()
                cursor.block()
    except Damaged as error:
        return Lock(damage=str(error))
    return Lock(Count(rows, LOCK_REQUESTS + 4 + offset, 8 if wide else 4))
