"""Recorded digests: what nothing else sees, data overwritten in place, is seen by comparing every byte."""

import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from stagecal.measurement_set import (
    Damaged,
    check_measurement_set,
    compare,
    record,
    record_of,
    seal_measurement_set,
)

from .damages import cut, zero
from .examples import example, pack, unpacked

__all__ = ["example", "unpacked"]


def largest(path: Path) -> Path:
    return max((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def test_the_record_lies_beside_and_agrees_with_sha256sum(example: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in example.rglob("*")}
    place = record(example)
    assert place == example.with_name("X.ms.split.cal.sha256")
    assert {file: file.stat().st_mtime_ns for file in example.rglob("*")} == before, "nothing is put inside"
    done = subprocess.run(["sha256sum", "--check", "--quiet", place.name], cwd=place.parent, check=False)
    assert done.returncode == 0
    assert compare(example).problems == compare(example).unrecorded == ()
    recorded = place.read_text()
    assert "X.ms.split.cal/STATE/table.f0\n" in recorded and "table.lock\n" not in recorded


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (zero, "has another content than was recorded"),
        (cut, "were recorded"),
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x01"), "has another content"),
    ],
    ids=["zeroed", "cut", "removed", "one byte"],
)
def test_damaged_data_are_seen(example: Path, damage: Callable[[Path], object], says: str) -> None:
    record(example)
    path = largest(example)
    damage(path)
    comparison = compare(example)
    [problem] = comparison.problems
    assert problem.startswith(f"{path.relative_to(example)}: ") and says in problem


def test_zeroed_data_are_seen_by_nothing_else(example: Path) -> None:
    record(example)
    zero(largest(example))
    assert check_measurement_set(example).healthy
    assert compare(example).problems


def test_a_lock_file_that_somebody_wrote_to_is_no_damage(example: Path) -> None:
    seal_measurement_set(example)
    record(example)
    (example / "table.lock").write_bytes(bytes(260))
    (example / "STATE" / "table.lock").unlink()
    assert compare(example).problems == ()
    assert check_measurement_set(example).healthy


def test_what_was_made_later_cannot_be_verified(example: Path) -> None:
    record(example)
    (example / "STATE" / "table.f9").write_text("x")
    (example / "STATE" / "table.dat.bck").write_text("x")
    comparison = compare(example)
    assert comparison.problems == ()
    assert comparison.unrecorded == ("STATE/table.f9: is in no record, it was made later",)


def test_without_a_record_nothing_is_known(example: Path) -> None:
    comparison = compare(example)
    assert comparison.problems == ()
    assert "no record" in comparison.unrecorded[0]


def test_a_record_is_not_written_anew_over_a_damage(example: Path) -> None:
    place = record(example)
    before = place.read_bytes()
    assert record(example) == place
    zero(largest(example))
    with pytest.raises(Damaged, match="not as it was recorded"):
        record(example)
    assert place.read_bytes() == before
    assert [path.name for path in example.parent.iterdir() if path.name.startswith(".")] == []


def test_names_with_any_letter_are_recorded_as_sha256sum_does(example: Path) -> None:
    path = example.with_name("a\\b\nc.ms")
    example.rename(path)
    place = record(path)
    done = subprocess.run(["sha256sum", "--check", "--quiet", place.name], cwd=place.parent, check=False)
    assert done.returncode == 0
    assert compare(path).problems == compare(path).unrecorded == ()


@pytest.mark.parametrize("where", ["SHA256SUMS", "record"])
def test_a_tar_file_is_compared_with_the_digest_beside_it(where: str, example: Path) -> None:
    tar = pack(example, example.with_name("X.tar"))
    assert compare(tar).unrecorded
    if where == "record":
        assert record(tar) == record_of(tar) == tar.with_name("X.tar.sha256")
    else:
        digest = hashlib.sha256(tar.read_bytes()).hexdigest()
        tar.with_name("SHA256SUMS").write_text(f"{'0' * 64}  README.txt\n{digest}  X.tar\n")
    assert compare(tar).problems == compare(tar).unrecorded == ()
    content = bytearray(tar.read_bytes())
    content[len(content) // 2] ^= 1
    tar.write_bytes(content)
    [problem] = compare(tar).problems
    assert problem.startswith("X.tar: has another content")


def test_a_record_that_is_none_is_refused(example: Path) -> None:
    record_of(example).write_text("hello\n")
    with pytest.raises(Damaged, match="no digest"):
        compare(example)
