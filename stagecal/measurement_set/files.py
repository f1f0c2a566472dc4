"""A directory of files, on disk or inside a tar file: what everything here reads tables from.

Only reads, only the bytes that are asked for, and never more than a file has. Raises FileNotFoundError for what is not
there, another OSError for what cannot be read, CannotVerify for what is there but lies outside.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from stagecal.measurement_set.errors import CannotVerify, NotAMeasurementSet


class Content(Protocol):
    """The bytes of one open file."""

    @property
    def size(self) -> int:
        """Its length in bytes."""

    def read(self, start: int, length: int) -> bytes:
        """Return `length` bytes from `start` on, fewer where the file ends."""


class Files(Protocol):
    """A directory of files with directories below it."""

    @property
    def place(self) -> str:
        """Where it is, for people."""

    @property
    def name(self) -> str:
        """Its own name."""

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong with that in which the files lie, such as a tar file that is cut."""

    def open(self, name: str) -> AbstractContextManager[Content]:
        """Open one of its files."""

    def below(self, relative: str) -> Files:
        """Return the directory below it, or the one that a name as casacore writes it leads to."""

    def entries(self) -> tuple[frozenset[str], frozenset[str]]:
        """Return the names of its files and those of its directories."""

    def everything(self) -> Iterator[str]:
        """Give the path of each file in it and below it, sorted."""


def read_file(files: Files, name: str) -> bytes:
    """Return a whole file: only for those that are small by their nature."""
    with files.open(name) as content:
        return content.read(0, content.size)


def exists(files: Files, name: str) -> bool:
    """Whether there is such a file."""
    return name in files.entries()[0]


class Directory:
    """A directory on disk."""

    problems: tuple[str, ...] = ()

    def __init__(self, path: Path, top: Path | None = None) -> None:
        """Given its path and that of the table to which it belongs. Raises NotAMeasurementSet if it is none."""
        if not path.is_dir():
            raise NotAMeasurementSet(f"{path} is no directory, so no table; give the path of a measurement set")
        self.path = path
        self._top = path if top is None else top

    @property
    def place(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.name or self.path.resolve().name

    @contextmanager
    def open(self, name: str) -> Iterator[Content]:
        """Open one of its files."""
        with (self.path / name).open("rb") as file:
            yield _OpenFile(file.fileno(), 0, os.fstat(file.fileno()).st_size)

    def below(self, relative: str) -> Directory:
        """Return a directory below. Raises CannotVerify if the name, or a link, leads out of the whole table."""
        place = self.path / relative
        if "\0" in relative:
            raise FileNotFoundError(relative)
        if not place.resolve().is_relative_to(self._top.resolve()):
            raise CannotVerify(f"lies outside at {place}, so a copy would lack it; put it inside with split")
        try:
            if not stat.S_ISDIR(place.stat().st_mode):
                raise FileNotFoundError(str(place))
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(str(place)) from None
        except OSError as error:
            raise CannotVerify(f"cannot be read: {error.strerror}; ask who owns it") from None
        return Directory(place, self._top)

    def entries(self) -> tuple[frozenset[str], frozenset[str]]:
        """Return the names of its files and those of its directories; a link to a directory counts as one."""
        files: list[str] = []
        directories: list[str] = []
        with os.scandir(self.path) as entries:
            for entry in entries:
                (directories if entry.is_dir() else files).append(entry.name)
        return frozenset(files), frozenset(directories)

    def everything(self) -> Iterator[str]:
        """Give the path of each file in it and below it, sorted; links are not followed."""
        for directory, below, files in os.walk(self.path, onerror=_raise):
            below.sort()
            for name in sorted(files):
                yield os.path.relpath(os.path.join(directory, name), self.path)


class _OpenFile:
    """A stretch of an open file: the file itself, or a member of a tar file."""

    def __init__(self, descriptor: int, start: int, size: int) -> None:
        self._descriptor = descriptor
        self._start = start
        self.size = size

    def read(self, start: int, length: int) -> bytes:
        length = min(length, self.size - start)
        return os.pread(self._descriptor, length, self._start + start) if length > 0 else b""


def stretch(descriptor: int, start: int, size: int) -> Content:
    """Return `size` bytes of an open file, from `start` on, as the content of a file of its own."""
    return _OpenFile(descriptor, start, size)


def _raise(error: OSError) -> None:
    raise error
