"""Digests of every file, recorded beside a measurement set and compared later: what shows that data were overwritten.

The record `<name>.sha256` lies beside the measurement set, never in it, and can also be checked by `sha256sum -c`. A
tar file has one line, in its own record or in a `SHA256SUMS` beside it. `table.lock` is left out: programs that wait
for each other write into it, and the count that it holds is checked anyhow. Memory is bounded whatever the size.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stagecal.measurement_set.errors import CannotVerify, Damaged, MeasurementSetError, one_line
from stagecal.measurement_set.files import Directory, Files

PIECE = 1 << 20
LEFT_OUT = "table.lock"
SUMS = "SHA256SUMS"
AGAIN = "what it held is lost: make it again, unless it was changed on purpose (then remove the record and --record)"

Digest = tuple[int, str]
"""The size of a file in bytes, and its SHA-256 in hexadecimal digits."""


@dataclass(frozen=True)
class Comparison:
    """What was compared with a record, and every file that is not as it was recorded, one line each.

    `unrecorded` names what nothing can be said of: files that are in no record, or that there is no record at all.
    """

    record: Path | None
    compared: int
    problems: tuple[str, ...]
    unrecorded: tuple[str, ...]


def record_of(path: Path) -> Path:
    """Return where the digests of the measurement set, table or tar file at `path` are recorded."""
    absolute = Path(os.path.abspath(path))
    return absolute.with_name(f"{absolute.name}.sha256")


def record(path: Path) -> Path:
    """Write the record of the directory or tar file at `path`, and return where it is.

    Raises Damaged if there is a record already with which it does not agree, CannotVerify if a file changes
    meanwhile, OSError.
    """
    place = record_of(path)
    if place.exists():
        comparison = compare(path)
        if comparison.problems or comparison.unrecorded:
            first = (comparison.problems + comparison.unrecorded)[0]
            raise Damaged(f"{path} is not as it was recorded ({first}); remove {place} if that was on purpose")
        return place
    name = Path(os.path.abspath(path)).name
    lines = [f"# SHA-256 and size of each file of {one_line(name)}, for stagecal ms check --deep, and sha256sum -c"]
    for relative, (size, sha256) in _digests(path):
        lines += [f"# {size} bytes", _line(sha256, f"{name}/{relative}" if relative else name)]
    temporary = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        with temporary.open("x", encoding="utf-8", errors="surrogateescape") as file:
            file.write("\n".join([*lines, ""]))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, place)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return place


def compare(path: Path) -> Comparison:
    """Read everything of the directory or tar file at `path` and compare it with what was recorded.

    Raises OSError if a record cannot be read, Damaged if it is none.
    """
    if path.is_dir():
        return _compare_directory(path)
    sums = path.with_name(SUMS)
    for place in (sums, record_of(path)):
        expected = _read_record(place).get(path.name) if place.exists() else None
        if expected:
            return _compare_tar(path, place, expected)
    return _without_record(path, f"nor is it in a {SUMS} beside it")


def digest(files: Files, name: str) -> Digest:
    """Return the size and the SHA-256 of a file."""
    sha256, size = hashlib.sha256(), 0
    with files.open(name) as content:
        while piece := content.read(size, PIECE):
            sha256.update(piece)
            size += len(piece)
    return size, sha256.hexdigest()


def _digests(path: Path) -> Iterator[tuple[str, Digest]]:
    """Give the digest of each file, under its name in the directory; of a tar file, under the empty name."""
    if not path.is_dir():
        yield "", _steady_digest(path)
        return
    for relative in Directory(path).everything():
        if relative.rpartition("/")[2] != LEFT_OUT:
            yield relative, _steady_digest(path / relative)


def _steady_digest(path: Path) -> Digest:
    """Return the digest of a file that nobody writes meanwhile."""
    before = path.stat()
    found = digest(Directory(path.parent), path.name)
    after = path.stat()
    if (before.st_mtime_ns, before.st_size, found[0]) != (after.st_mtime_ns, after.st_size, after.st_size):
        raise CannotVerify(f"{path} was written while it was read; try again when it is at rest")
    return found


def _compare_directory(path: Path) -> Comparison:
    place = record_of(path)
    if not place.exists():
        return _without_record(path, "record it when it is known to be good, with --record")
    top = f"{Path(os.path.abspath(path)).name}/"
    expected = {name.removeprefix(top): value for name, value in _read_record(place).items() if name.startswith(top)}
    problems: list[str] = []
    unrecorded: list[str] = []
    files = Directory(path)
    present = [name for name in files.everything() if name.rpartition("/")[2] != LEFT_OUT]
    for name in present:
        if name not in expected:
            if name.rpartition("/")[2].startswith("table.") and ".bck" not in name:
                unrecorded.append(f"{one_line(name)}: is in no record, it was made later")
        else:
            problems += _difference(name, expected[name], files)
    problems += [f"{one_line(name)}: is missing; {AGAIN}" for name in sorted(set(expected) - set(present))]
    return Comparison(place, len(present), tuple(problems), tuple(unrecorded))


def _compare_tar(path: Path, place: Path, expected: tuple[int | None, str]) -> Comparison:
    problems = _difference(path.name, expected, Directory(path.parent))
    return Comparison(place, 1, tuple(problems), ())


def _difference(name: str, expected: tuple[int | None, str], files: Files) -> list[str]:
    size, sha256 = expected
    try:
        with files.open(name) as content:
            length = content.size
        if size is not None and length != size:
            return [f"{one_line(name)}: has {length} bytes where {size} were recorded; {AGAIN}"]
        if digest(files, name)[1] != sha256:
            return [f"{one_line(name)}: has another content than was recorded; {AGAIN}"]
    except OSError as error:
        return [f"{one_line(name)}: cannot be read to its end: {error.strerror}; look at the disk"]
    except MeasurementSetError as error:
        return [f"{one_line(name)}: {error}"]
    return []


def _without_record(path: Path, advice: str) -> Comparison:
    line = f"there is no record of its digests ({one_line(record_of(path).name)}), {advice}"
    return Comparison(None, 0, (), (line,))


def _line(sha256: str, name: str) -> str:
    """Return a line as sha256sum writes it; it marks names with a backslash or a line feed by a backslash."""
    if "\\" in name or "\n" in name:
        escaped = name.replace("\\", "\\\\").replace("\n", "\\n")
        return f"\\{sha256}  {escaped}"
    return f"{sha256}  {name}"


def _read_record(place: Path) -> dict[str, tuple[int | None, str]]:
    """Return the size, where it is told, and the digest of each name in a record or a SHA256SUMS."""
    found: dict[str, tuple[int | None, str]] = {}
    size = None
    with place.open(encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        for line in file:
            if line.startswith("#"):
                told = re.fullmatch(r"# (\d+) bytes\n?", line)
                size = int(told[1]) if told else size
                continue
            entry = re.fullmatch(r"(\\?)([0-9a-f]{64}) [ *](.+)\n?", line, re.DOTALL)
            if entry is None:
                raise Damaged(f"{place} has a line that is no digest; remove it or get it again")
            name = entry[3].removesuffix("\n")
            if entry[1]:
                name = re.sub(r"\\(.)", lambda match: "\n" if match[1] == "n" else match[1], name)
            found[name] = size, entry[2]
            size = None
    return found
