"""Packs a directory into one tar file in one pass, with its digest, and proves that a tar file is whole.

What is packed is packed exactly: a link, a device, or a file that changes meanwhile is a FatalError, and what was
written so far is then for the caller to throw away. Trouble with the disk is told by `disk_error`.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from stagecal.ports import FatalError, TransientError

PIECE = 4 * 1024 * 1024
"""How many bytes are read at once: measurement sets are few large files."""

DEEPEST = 64
"""How many directories may lie within each other; a measurement set has three."""

_PASSING_TROUBLE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.ETIMEDOUT, errno.ESTALE})
_END = 2 * tarfile.BLOCKSIZE

Member = tuple[str, int]
"""A member's name (that of a directory ends with a slash) and its size in bytes."""


@dataclass(frozen=True)
class PackedTar:
    """What was written: size in bytes, SHA-256 (hex), and the members in their order."""

    size: int
    sha256: str
    members: tuple[Member, ...]


def disk_error(what: str, error: OSError) -> TransientError | FatalError:
    """Given what could not be done and the system's error, return the error to raise.

    TransientError if somebody makes room or a server comes back (no space, quota, timeout, stale handle), else
    FatalError. The names in the system's error are left out: they may hold a token.
    """
    kind = TransientError if error.errno in _PASSING_TROUBLE else FatalError
    return kind(f"{what}: {os.strerror(error.errno) if error.errno else 'the system does not say why'}")


def pack_directory(source: Path, output: BinaryIO) -> PackedTar:
    """Write a tar file (pax format) of the directory `source` with members below its own name; return what it is.

    The same tree gives the same bytes: members are sorted, belong to user and group 0 without names, and keep their
    modification time to the nanosecond. Everybody may read what is extracted. `table.lock` files are members like
    others: casacore keeps row counts in them.

    Raises FatalError for anything but directories and plain files with printable names, and if the tree changes while
    it is read; FatalError or TransientError (see `disk_error`) if it cannot be read. What `output.write` raises
    passes through.
    """
    _refuse_name(source.name, str(source))
    sink = _Sink(output)
    with _reading(source.name):
        top = os.open(source, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _pack_tree(top, source.name, sink, memoryview(bytearray(PIECE)), 0)
    finally:
        os.close(top)
    sink.write(bytes(_END))
    sink.write(bytes(-sink.size % tarfile.RECORDSIZE))
    return PackedTar(sink.size, sink.digest.hexdigest(), tuple(sink.members))


def verify_members(tar: BinaryIO, expected: Sequence[Member]) -> None:
    """Read the headers of a tar file, passing over the data; raise FatalError unless its members are the expected ones.

    Needed because a tar file that ends early between two members satisfies GNU tar and Python alike.
    """
    tar.seek(0)
    try:
        with tarfile.open(fileobj=tar, mode="r:") as archive:
            found = [(member.name + "/" * member.isdir(), member.size) for member in archive]
            tar.seek(archive.offset)  # Where the last member's data end.
    except tarfile.TarError as error:
        raise FatalError(f"the tar file cannot be read back: {error}") from error
    end = tar.read(_END)
    if found != list(expected):
        raise FatalError(f"the tar file has {len(found)} members, not the {len(expected)} that were packed, or others")
    if end != bytes(_END):
        raise FatalError("the tar file ends early: the mark of its end is missing")


def copy_whole(
    source: int, status: os.stat_result, write: Callable[[memoryview], object], buffer: memoryview, shown: str
) -> None:
    """Hand the bytes of the open file `source` to `write`, in pieces of the buffer's size at most.

    `status` is what fstat said of it before. Raises FatalError if the file is not the same size and age at its end;
    errors of reading as `disk_error` tells them.
    """
    left = status.st_size
    while left:
        with _reading(shown):
            count = os.readv(source, [buffer[: min(left, len(buffer))]])
        if not count:
            raise FatalError(f"{shown} shrank while it was read")
        write(buffer[:count])
        left -= count
    with _reading(shown):
        now = os.fstat(source)
        grown = os.read(source, 1)
    if grown or (now.st_size, now.st_mtime_ns) != (status.st_size, status.st_mtime_ns):
        raise FatalError(f"{shown} changed while it was read")


class _Sink:
    """Counts and digests what passes on its way to the output."""

    def __init__(self, output: BinaryIO) -> None:
        self.size = 0
        self.digest = hashlib.sha256()
        self.members: list[Member] = []
        self._output = output

    def write(self, piece: bytes | memoryview) -> None:
        self._output.write(piece)
        self.digest.update(piece)
        self.size += len(piece)

    def begin_member(self, name: str, status: os.stat_result) -> None:
        header = tarfile.TarInfo(name)
        seconds, nanoseconds = divmod(status.st_mtime_ns, 10**9)
        header.mtime = seconds
        if nanoseconds:
            header.pax_headers = {"mtime": f"{seconds}.{nanoseconds:09d}"}
        if stat.S_ISDIR(status.st_mode):
            header.type, header.mode = tarfile.DIRTYPE, 0o755
        else:
            header.size, header.mode = status.st_size, status.st_mode & 0o777 | 0o644
        self.members.append((name + "/" * header.isdir(), header.size))
        self.write(header.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict"))


def _pack_tree(directory: int, name: str, sink: _Sink, buffer: memoryview, depth: int) -> None:
    """Write the open directory and all below it."""
    if depth > DEEPEST:
        raise FatalError(f"{name[:80]}… lies more than {DEEPEST} directories deep: this is no measurement set")
    before = os.fstat(directory)
    sink.begin_member(name, before)
    with _reading(name):
        entries = sorted(os.listdir(directory))
    for entry in entries:
        _refuse_name(entry, name)
        member = f"{name}/{entry}"
        with _opened_member(entry, directory, member) as source:
            status = os.fstat(source)
            if stat.S_ISDIR(status.st_mode):
                _pack_tree(source, member, sink, buffer, depth + 1)
            else:
                sink.begin_member(member, status)
                copy_whole(source, status, sink.write, buffer, member)
                sink.write(bytes(-status.st_size % tarfile.BLOCKSIZE))
    if os.fstat(directory).st_mtime_ns != before.st_mtime_ns:
        raise FatalError(f"{name} got or lost members while it was packed")


@contextmanager
def _opened_member(entry: str, directory: int, member: str) -> Iterator[int]:
    with _reading(member):
        # Looked at before it is opened: opening a device may already act on it.
        kind = os.stat(entry, dir_fd=directory, follow_symlinks=False).st_mode
        if not (stat.S_ISDIR(kind) or stat.S_ISREG(kind)):
            raise FatalError(f"{member} is neither a directory nor a plain file: links and devices are not packed")
        source = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    try:
        if stat.S_IFMT(os.fstat(source).st_mode) != stat.S_IFMT(kind):
            raise FatalError(f"{member} was replaced while it was packed")
        yield source
    finally:
        os.close(source)


@contextmanager
def _reading(shown: str) -> Iterator[None]:
    """Tell errors of reading as what they are, so that they are not taken for errors of the output."""
    try:
        yield
    except OSError as error:
        raise disk_error(f"cannot read {shown}", error) from error


def _refuse_name(name: str, where: str) -> None:
    if name in ("", "..") or not name.isprintable():
        raise FatalError(f"{name!a} in {where!a} is no name for a member of a tar file")
