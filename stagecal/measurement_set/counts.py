"""The row counts of a table set to a number: which bytes of which of its files change, and how they are written.

What would change is found without writing. A `table.dat` is replaced atomically and durably (a new file, synchronized,
renamed over the old one, with its mode and, where allowed, its owner; its modification time is then that of the
change). A `table.lock` is written in place, for locks of other processes belong to that very file. Never written is
a file elsewhere to which one of them is a symbolic link (OSError).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from stagecal.measurement_set.errors import CannotVerify, InUse
from stagecal.measurement_set.files import Directory
from stagecal.measurement_set.tables import LOCK_REQUESTS, Table


@dataclass(frozen=True)
class Change:
    """What a file holds, and what it has to hold."""

    path: Path
    old: bytes
    new: bytes

    @property
    def differences(self) -> dict[int, tuple[bytes, bytes]]:
        """The bytes that change, by their place: the old one and the new one (none where the file ends earlier)."""
        longest = max(len(self.old), len(self.new))
        pairs = ((place, self.old[place : place + 1], self.new[place : place + 1]) for place in range(longest))
        return {place: (old, new) for place, old, new in pairs if old != new}


def directory_of(table: Table) -> Path:
    """Return the directory of a table on disk. Raises CannotVerify if it lies in a tar file."""
    if not isinstance(table.files, Directory):
        raise CannotVerify(f"{table.files.place} lies in a tar file: unpack it, and pack it again afterwards")
    return table.files.path


def changes_to(table: Table, rows: int) -> tuple[Change, ...]:
    """Return what has to change so that the table's files say `rows`, with or without its lock file.

    Raises OSError if a file cannot be read, OverflowError if there is no room for so large a number.
    """
    if table.description is None:
        return ()
    directory = directory_of(table)
    changes = [_change_of_description(table, directory / "table.dat", rows), *_changes_of_lock(table, directory, rows)]
    return tuple(change for change in changes if change.old != change.new)


def _change_of_description(table: Table, path: Path, rows: int) -> Change:
    old = path.read_bytes()
    new = bytearray(old)
    if table.description:
        for count in (table.description.header, table.description.column_set):
            if count:
                new[count.offset : count.offset + count.width] = count.encoded(rows)
    return Change(path, old, bytes(new))


def _changes_of_lock(table: Table, directory: Path, rows: int) -> list[Change]:
    path, count = directory / "table.lock", table.lock.count
    if table.lock.damage:
        # An unreadable record keeps casacore from opening the table; without a record it believes table.dat.
        with _open_lock(path) as file:
            old = file.read()
        return [Change(path, old, old[:LOCK_REQUESTS])]
    if count is None or count.rows == rows:
        return []
    with _open_lock(path) as file:
        old = file.read()
    return [Change(path, old, old[: count.offset] + count.encoded(rows) + old[count.offset + count.width :])]


def require_unused(table: Table) -> None:
    """Raise InUse if another process of this host has the table open: casacore then holds byte 1 of table.lock."""
    lock = directory_of(table) / "table.lock"
    with contextlib.suppress(FileNotFoundError), _open_lock(lock) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 3, 0)
        except BlockingIOError:
            raise InUse(f"{lock.parent} is open in another process; close it there, then try again") from None
        except OSError:
            return  # This file system has no locks, so that nobody can say that it is in use.


def write(change: Change) -> None:
    """Make the file hold what it has to. Raises OSError; the file is then as it was."""
    if change.path.name == "table.lock":
        with _open_lock(change.path) as file:
            os.pwrite(file.fileno(), change.new, 0)
            file.truncate(len(change.new))
            os.fsync(file.fileno())
    else:
        replace(change.path, change.new)


def replace(path: Path, content: bytes) -> None:
    """Replace a file atomically and durably, keeping its mode and, where allowed, its owner."""
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
    synchronize(path.parent)


def synchronize(directory: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open_lock(lock: Path) -> BinaryIO:
    return os.fdopen(os.open(lock, os.O_RDWR | os.O_NOFOLLOW), "r+b")
