"""A sealed measurement set opens without any lock file; one without an agreed truth is left alone."""

import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from stagecal.measurement_set import (
    CannotVerify,
    Damaged,
    InUse,
    NotAMeasurementSet,
    Verdict,
    check_measurement_set,
    seal_measurement_set,
)

from .conftest import Casa
from .damages import DAMAGES, Damage, cut, patch, rename_manager, set_column_set_rows

Copy = Callable[[Path], Path]


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def remove_locks(path: Path) -> None:
    for lock in [path / "table.lock", *path.glob("*/table.lock")]:
        lock.unlink(missing_ok=True)


@pytest.mark.parametrize("name", ["stale.ms", "transformed.ms", "split.ms"])
def test_a_sealed_measurement_set_opens_without_any_lock_file(
    casa: Casa, made: Path, products: Path, copy_of: Copy, name: str
) -> None:
    path = copy_of(made / name if name == "stale.ms" else products / name)
    before = casa.look(path)[str(path)]
    report = seal_measurement_set(path)
    assert report.sealed and report.changed
    remove_locks(path)
    for directory in [path, *path.iterdir()]:
        if directory.is_dir():
            directory.chmod(0o555)
    assert casa.look(path)[str(path)] == before
    assert check_measurement_set(path).sealed


def test_without_sealing_the_same_loss_hides_rows(casa: Casa, products: Path, copy_of: Copy) -> None:
    path = copy_of(products / "transformed.ms")
    remove_locks(path)
    assert casa.look(path)[str(path)]["rows"]["DATA_DESCRIPTION"] == 0
    assert not check_measurement_set(path).healthy


def test_sealing_afterwards_brings_the_rows_back(casa: Casa, products: Path, copy_of: Copy) -> None:
    path = copy_of(products / "transformed.ms")
    expected = casa.look(path)[str(path)]
    remove_locks(path)
    assert seal_measurement_set(path).sealed
    assert casa.look(path)[str(path)] == expected


def test_sealing_changes_two_counts_of_each_table_and_nothing_else(products: Path, copy_of: Copy) -> None:
    path = copy_of(products / "transformed.ms")
    (path / "STATE" / "table.dat").chmod(0o640)
    before = contents(path)
    report = seal_measurement_set(path)
    after = contents(path)
    changed = {name for name in before if before[name] != after[name]}
    assert after.keys() == before.keys(), "no file is left over"
    assert {Path(name).name for name in changed} == {"table.dat"}
    assert {Path(name).parent.name or "MAIN" for name in changed} == set(report.changed)
    for name in changed:
        differences = sum(old != new for old, new in zip(before[name], after[name], strict=True))
        assert 1 <= differences <= 8, name
    assert stat.S_IMODE((path / "STATE" / "table.dat").stat().st_mode) == 0o640


def test_sealing_again_touches_nothing(products: Path, copy_of: Copy) -> None:
    path = copy_of(products / "transformed.ms")
    seal_measurement_set(path)
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    assert seal_measurement_set(path).changed == ()
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before


def test_both_counts_are_set(products: Path, copy_of: Copy) -> None:
    path = copy_of(products / "transformed.ms")
    set_column_set_rows(path / "FIELD", 30)
    assert "FIELD" in seal_measurement_set(path).changed


@pytest.mark.parametrize(
    "damage",
    [d for d in DAMAGES if d.verdict is Verdict.WRONG_ROWS or ("lock" in d.name and d.verdict is Verdict.BROKEN)],
    ids=str,
)
def test_whatever_happened_to_a_lock_file_is_mended(
    casa: Casa, made: Path, products: Path, copy_of: Copy, damage: Damage
) -> None:
    source = made / damage.source if (made / damage.source).exists() else products / damage.source
    path = copy_of(source)
    damage.apply(path)
    report = seal_measurement_set(path)
    assert report.sealed
    assert damage.table in report.changed
    rows = {table.name: table.reported_rows for table in report.check.tables}
    assert rows == {table.name: table.rows for table in check_measurement_set(source).tables}


def test_casacore_opens_what_was_mended(casa: Casa, products: Path, copy_of: Copy) -> None:
    path = copy_of(products / "transformed.ms")
    expected = casa.look(path)[str(path)]
    for damage in DAMAGES:
        if (
            damage.table in ("STATE", "DATA_DESCRIPTION")
            and damage.name.startswith("lock ")
            and (damage.name.endswith(("too many", "another record")))
        ):
            damage.apply(path)
    assert casa.look(path)[str(path)] != expected
    seal_measurement_set(path)
    assert casa.look(path)[str(path)] == expected


@pytest.mark.parametrize(
    ("act", "error"),
    [
        (lambda path: cut(path / "STATE" / "table.f0"), Damaged),
        (lambda path: rename_manager(path / "STATE"), CannotVerify),
    ],
    ids=["damaged", "unknown storage"],
)
def test_without_an_agreed_truth_nothing_is_changed(
    products: Path, copy_of: Copy, act: Callable[[Path], None], error: type[Exception]
) -> None:
    path = copy_of(products / "transformed.ms")
    act(path)
    before = contents(path)
    with pytest.raises(error, match=r"STATE.*nothing was changed"):
        seal_measurement_set(path)
    assert contents(path) == before


def test_a_table_outside_is_never_written(products: Path, copy_of: Copy, tmp_path: Path) -> None:
    path = copy_of(products / "transformed.ms")
    outside = tmp_path / "elsewhere"
    (path / "STATE").rename(outside)
    (path / "STATE").symlink_to(outside)
    before = contents(outside)
    with pytest.raises(CannotVerify, match="STATE"):
        seal_measurement_set(path)
    assert contents(outside) == before


def test_a_lock_file_that_leads_outside_is_never_written(products: Path, copy_of: Copy, tmp_path: Path) -> None:
    path = copy_of(products / "transformed.ms")
    outside = tmp_path / "elsewhere"
    (path / "STATE" / "table.lock").rename(outside)
    (path / "STATE" / "table.lock").symlink_to(outside)
    patch(outside, 264 + 20, b"\0\0\0\x63")
    before = outside.read_bytes(), contents(path)
    with pytest.raises(OSError, match=r"table\.lock"):
        seal_measurement_set(path)
    assert (outside.read_bytes(), contents(path)) == before


def test_a_measurement_set_that_is_open_elsewhere_is_left_alone(casa: Casa, products: Path, copy_of: Copy) -> None:
    path = copy_of(products / "transformed.ms")
    holder = subprocess.Popen(
        casa.command("casacore_side.py", "hold", path / "STATE"),
        env=casa.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "holding\n"
        before = contents(path)
        with pytest.raises(InUse, match="STATE is open in another process"):
            seal_measurement_set(path)
        assert contents(path) == before
        holder.communicate(timeout=20)
        assert seal_measurement_set(path).sealed
    finally:
        if holder.poll() is None:
            os.kill(holder.pid, 9)
        holder.wait(timeout=20)


def test_what_is_no_directory_is_not_sealed(tmp_path: Path) -> None:
    with pytest.raises(NotAMeasurementSet):
        seal_measurement_set(tmp_path / "nothing.ms")
