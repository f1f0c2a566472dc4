"""Which tables there are at a path: a measurement set, a single table, a tree of them, or a tar file that holds some.

Tables are found by their files, also where half of them are gone. What is inside a table is its own: it is not looked
through. Links to directories are not followed in a tree. What cannot be read is told, and the rest is still found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stagecal.measurement_set.description import parse_description
from stagecal.measurement_set.errors import CannotVerify, Damaged, MeasurementSetError, NotAMeasurementSet, one_line
from stagecal.measurement_set.files import Directory, Files, read_file
from stagecal.measurement_set.tar import open_tar

MEASUREMENT_SET_ONLY = ("DATA_DESCRIPTION", "POLARIZATION")
"""Subtables that measurement sets have and calibration tables have not."""


@dataclass(frozen=True)
class Found:
    """A table of its own. It may only be read until the next one is asked for: its tar file is closed then."""

    files: Files
    is_measurement_set: bool
    in_tar: Path | None = None


@dataclass(frozen=True)
class NotRead:
    """A place that could not be looked through; `verifiable` is False if it may be sound all the same."""

    place: str
    problem: str
    verifiable: bool


def find_tables(path: Path) -> Iterator[Found | NotRead]:
    """Give every table at `path`, in the order of the names: itself, or those in the tree or the tar file.

    Raises NotAMeasurementSet if there is nothing at `path`, or a file that is no tar file.
    """
    if path.is_dir():
        yield from _in_tree(path)
    elif not path.exists():
        raise NotAMeasurementSet(f"{path} does not exist; give the path of a measurement set, a tree or a tar file")
    else:
        yield from _in_tar(path)


def is_measurement_set(files: Files) -> bool:
    """Whether a table says of itself that it is a measurement set, or looks like one as far as it is there."""
    try:
        if read_file(files, "table.info")[:200].startswith(b"Type = Measurement Set"):
            return True
        subtables = parse_description(read_file(files, "table.dat")).subtables
    except (OSError, MeasurementSetError):
        subtables = {}
    return any(name in subtables for name in MEASUREMENT_SET_ONLY) or bool(
        set(MEASUREMENT_SET_ONLY) & files.entries()[1]
    )


def _is_table(names: frozenset[str], directories: frozenset[str]) -> bool:
    return any(name.startswith("table.") for name in names) or directories.issuperset(MEASUREMENT_SET_ONLY)


def _in_tree(path: Path) -> Iterator[Found | NotRead]:
    directory = Directory(path)
    try:
        names, directories = directory.entries()
    except OSError as error:
        yield NotRead(one_line(str(path)), f"cannot be read: {error.strerror}; ask who owns it", verifiable=False)
        return
    if _is_table(names, directories):
        yield Found(directory, is_measurement_set(directory))
        return
    for name in sorted(names | directories):
        below = path / name
        if name in directories and not below.is_symlink():
            yield from _in_tree(below)
        elif name in names and name.endswith(".tar"):
            yield from _in_tar(below, quietly=True)


def _in_tar(path: Path, *, quietly: bool = False) -> Iterator[Found | NotRead]:
    """Give the tables in a tar file; with `quietly`, one that has nothing to do with tables gives nothing."""
    try:
        with open_tar(path) as tar:
            found = 0
            for files in _in_directory(tar.root):
                found += 1
                yield Found(files, is_measurement_set(files), path)
            if not found and (tar.problems or not quietly):
                for problem in tar.problems or ("holds no table; give the tar file of a measurement set",):
                    yield NotRead(one_line(str(path)), problem, verifiable=True)
    except Damaged as error:
        if not path.name.endswith(".tar"):
            raise NotAMeasurementSet(f"{path} is neither a directory nor a tar file") from None
        yield NotRead(one_line(str(path)), _without(path, error), verifiable=True)
    except CannotVerify as error:
        yield NotRead(one_line(str(path)), _without(path, error), verifiable=False)
    except OSError as error:
        yield NotRead(one_line(str(path)), f"cannot be read: {error.strerror}; ask who owns it", verifiable=False)


def _without(path: Path, error: MeasurementSetError) -> str:
    return str(error).removeprefix(one_line(f"{path} "))


def _in_directory(files: Files) -> Iterator[Files]:
    names, directories = files.entries()
    if _is_table(names, directories):
        yield files
        return
    for name in sorted(directories):
        yield from _in_directory(files.below(name))
