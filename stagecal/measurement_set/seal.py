"""Make a measurement set independent of its lock files, by writing the true row counts where they belong.

Each table.dat gets the count of the storage managers in both of its places; it is replaced atomically (a new file,
synchronized, renamed over the old one, with its mode). A count in table.lock that differs is set as well, in place,
because locks of other processes belong to that very file. Nothing is changed unless every table has an agreed truth.
"""

import contextlib
import fcntl
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from stagecal.measurement_set.check import CheckReport, check_measurement_set, read_measurement_set
from stagecal.measurement_set.errors import CannotVerify, Damaged, InUse
from stagecal.measurement_set.tables import LOCK_REQUESTS, Table


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
    tables = read_measurement_set(path)
    for name, table in tables.items():
        _require_truth(path, name, table)
    for table in tables.values():
        _require_unused(table.path / "table.lock")
    changed = tuple(name for name, table in tables.items() if _seal_table(table))
    return SealReport(path, changed, check_measurement_set(path))


def _require_truth(path: Path, name: str, table: Table) -> None:
    if table.damage:
        raise Damaged(f"{path}: {name}: {'; '.join(table.damage)}; nothing was changed, make it again")
    if table.unknown or table.true_rows is None:
        raise CannotVerify(f"{path}: {name}: {'; '.join(table.problems)}; nothing was changed")


def _require_unused(lock: Path) -> None:
    """Raise InUse if another process of this host has the table open: casacore then holds byte 1 of table.lock."""
    with contextlib.suppress(FileNotFoundError), _open_lock(lock) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 3, 0)
        except BlockingIOError:
            raise InUse(f"{lock.parent} is open in another process; close it there, then seal again") from None
        except OSError:
            return  # This file system has no locks, so that nobody can say that it is in use.


def _open_lock(lock: Path) -> BinaryIO:
    """Open table.lock for writing, but never a file elsewhere to which it is a symbolic link (OSError)."""
    return os.fdopen(os.open(lock, os.O_RDWR | os.O_NOFOLLOW), "r+b")


def _seal_table(table: Table) -> bool:
    description, rows = table.description, table.true_rows
    if description is None or rows is None or description.column_set is None:
        return False
    dat = table.path / "table.dat"
    old = dat.read_bytes()
    new = bytearray(old)
    for count in (description.header, description.column_set):
        new[count.offset : count.offset + count.width] = count.encoded(rows)
    if bytes(new) != old:
        _replace(dat, bytes(new))
    return _seal_lock(table, rows) or bytes(new) != old


def _seal_lock(table: Table, rows: int) -> bool:
    lock = table.path / "table.lock"
    if table.lock.damage:
        # An unreadable record keeps casacore from opening the table; without a record it believes table.dat.
        with _open_lock(lock) as file:
            file.truncate(LOCK_REQUESTS)
            os.fsync(file.fileno())
        return True
    count = table.lock.count
    if count is None or count.rows == rows:
        return False
    with _open_lock(lock) as file:
        os.pwrite(file.fileno(), count.encoded(rows), count.offset)
        os.fsync(file.fileno())
    return True


def _replace(path: Path, content: bytes) -> None:
    """Replace `path` atomically and durably, keeping its mode and, where allowed, its owner."""
    status = path.stat()
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            with contextlib.suppress(PermissionError):
                os.fchown(file.fileno(), status.st_uid, status.st_gid)
            os.fchmod(file.fileno(), status.st_mode & 0o7777)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
