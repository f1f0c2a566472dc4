"""Tables inside a tar file, read where they lie: nothing is unpacked, and only headers are read to find them.

A tar file that was cut between two members, or lost its end, passes for a whole one with GNU tar and with Python:
here it has a problem. A compressed one cannot be read by seeking: CannotVerify.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from stagecal.measurement_set.errors import CannotVerify, Damaged
from stagecal.measurement_set.files import Content, Files, stretch

BLOCK = tarfile.BLOCKSIZE
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


class Tar:
    """An open tar file. `problems` says what is wrong with it as a whole."""

    def __init__(self, path: Path, descriptor: int) -> None:
        """Given its path and a descriptor of it, list its members. Raises Damaged if it is no tar file."""
        self.path = path
        self.descriptor = descriptor
        self.problems: tuple[str, ...] = ()
        self._members: dict[str, tuple[int, int]] = {}
        self._unreadable: dict[str, str] = {}
        self._files: dict[str, set[str]] = {"": set()}
        self._directories: dict[str, set[str]] = {"": set()}
        self._size = os.fstat(descriptor).st_size
        self._list()

    @property
    def root(self) -> Files:
        """All that is in the tar file."""
        return _InTar(self, "")

    def _list(self) -> None:
        with open(self.descriptor, "rb", closefd=False) as file:
            if file.read(6).startswith(COMPRESSED):
                raise CannotVerify(
                    f"{self.path} is compressed, so that nothing in it can be looked up; unpack it first"
                )
            file.seek(0)
            end = 0
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    while True:
                        # Not by iterating: that would keep an object for each member.
                        file.seek(end)
                        self._add(tarfile.TarInfo.fromtarfile(tar))
                        end = tar.offset
            except tarfile.TarError:
                if end == 0 and file.seek(0) == 0 and file.read(2 * BLOCK) != bytes(2 * BLOCK):
                    raise Damaged(f"{self.path} is no tar file; get it again") from None
            if os.pread(self.descriptor, 2 * BLOCK, end) != bytes(2 * BLOCK):
                line = f"the tar file is cut or damaged at byte {end} of {self._size}, nothing after that was found"
                self.problems = (f"{line}; get it again",)

    def _add(self, member: tarfile.TarInfo) -> None:
        parts = PurePosixPath(member.name).parts
        name = "/".join(parts)
        if ".." in parts or name.startswith("/"):
            return  # No table of ours: it would be unpacked somewhere else.
        if member.isdir():
            self._add_directory(name)
            return
        self._unreadable.pop(name, None)
        if member.islnk() and member.linkname in self._members:
            self._members[name] = self._members[member.linkname]
        elif member.isreg() and not member.issparse():
            self._members[name] = member.offset_data, member.size
        else:
            self._unreadable[name] = "is no plain file of the tar file; unpack it first"
        directory, _, own = name.rpartition("/")
        self._add_directory(directory)
        self._files[directory].add(own)

    def _add_directory(self, name: str) -> None:
        if name in self._files:
            return
        self._files[name] = set()
        self._directories[name] = set()
        above, _, own = name.rpartition("/")
        self._add_directory(above)
        self._directories[above].add(own)

    def content(self, name: str) -> Content:
        """Return the bytes of a member. Raises FileNotFoundError if there is none of this name."""
        if name in self._unreadable:
            raise CannotVerify(f"{PurePosixPath(name).name} {self._unreadable[name]}")
        if name not in self._members:
            raise FileNotFoundError(2, "No such member", name)
        start, size = self._members[name]
        return stretch(self.descriptor, start, max(0, min(size, self._size - start)))

    def has_directory(self, name: str) -> bool:
        """Whether there is such a directory, by itself or by something in it."""
        return name in self._files

    def names_in(self, name: str) -> tuple[frozenset[str], frozenset[str]]:
        """Return the names of the files in a directory and those of its directories."""
        return frozenset(self._files[name]), frozenset(self._directories[name])


@contextmanager
def open_tar(path: Path) -> Iterator[Tar]:
    """Open a tar file. Raises Damaged if it is none, CannotVerify if it is compressed, OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield Tar(path, descriptor)
    finally:
        os.close(descriptor)


class _InTar:
    """A directory in a tar file."""

    def __init__(self, tar: Tar, name: str, top: str | None = None) -> None:
        self._tar = tar
        self._name = name
        self._top = name if top is None else top

    @property
    def place(self) -> str:
        return f"{self._tar.path}:{self._name}"

    @property
    def name(self) -> str:
        return PurePosixPath(self._name).name

    @property
    def problems(self) -> tuple[str, ...]:
        return self._tar.problems

    def _inside(self, relative: str) -> str:
        return "/".join(PurePosixPath(self._name, relative).parts)

    @contextmanager
    def open(self, name: str) -> Iterator[Content]:
        """Open one of its files."""
        yield self._tar.content(self._inside(name))

    def below(self, relative: str) -> Files:
        """Return a directory below. Raises CannotVerify if the name leads out of the whole table."""
        place = os.path.normpath(self._inside(relative))
        if self._top and not f"{place}/".startswith(f"{self._top}/"):
            raise CannotVerify(f"lies outside at {place}, so the tar file may lack it; put it inside with split")
        if not self._tar.has_directory(place):
            raise FileNotFoundError(place)
        return _InTar(self._tar, place, self._top or None)

    def entries(self) -> tuple[frozenset[str], frozenset[str]]:
        """Return the names of its files and those of its directories."""
        return self._tar.names_in(self._name)

    def everything(self) -> Iterator[str]:
        """Give the path of each file in it and below it, sorted."""
        files, directories = self.entries()
        yield from sorted(files)
        for directory in sorted(directories):
            for name in _InTar(self._tar, self._inside(directory)).everything():
                yield f"{directory}/{name}"
