"""Repairs are proved or refused: by the table's own files, or by a parent that is shown to be the same table."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stagecal.measurement_set import (
    CannotVerify,
    Verdict,
    carry_out,
    check_measurement_set,
    find_splits,
    plan_repair,
    read_table,
    seal_measurement_set,
)

from .damages import cut, patch, rename_manager, set_header_rows, set_lock_rows
from .examples import example, lose_locks, unpack, unpacked

__all__ = ["example", "unpacked"]

LOST = ("DATA_DESCRIPTION", "POLARIZATION", "PROCESSOR", "STATE")


@pytest.fixture
def parent(example: Path) -> Path:
    """What a healthy parent is like: the same tables, with the right counts in every table.dat."""
    path = Path(shutil.copytree(example, example.parent / "working" / "X.ms"))
    seal_measurement_set(path)
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_what_lost_its_lock_files_is_repaired_from_its_own_files(example: Path) -> None:
    expected = {table.name: table.rows for table in check_measurement_set(example).tables}
    lose_locks(example)
    plan = plan_repair(example)
    assert {repair.name for repair in plan.repairs} >= set(LOST)
    assert plan.before.verdict is Verdict.WRONG_ROWS and plan.refusals == ()
    report = carry_out(plan)
    assert report.healthy and report.sealed
    assert {table.name: table.reported_rows for table in report.tables} == expected


def test_the_bytes_that_change_are_the_two_counts(example: Path) -> None:
    lose_locks(example)
    [repair] = [repair for repair in plan_repair(example).repairs if repair.name == "STATE"]
    [change] = repair.changes
    rows = read_table(example / "STATE").true_rows
    assert rows is not None and 0 < rows < 256
    places = sorted(change.differences)
    assert places[0] == 24 and len(places) == 2
    assert set(change.differences.values()) == {(b"\0", bytes([rows]))}


def test_the_old_file_is_kept_with_its_times(example: Path) -> None:
    lose_locks(example)
    path = example / "STATE" / "table.dat"
    os.utime(path, (1e9, 1e9))
    before = path.read_bytes()
    carry_out(plan_repair(example))
    kept = path.with_name("table.dat.bck")
    assert kept.read_bytes() == before and kept.stat().st_mtime == 1e9
    assert path.stat().st_mtime > time.time() - 60, "the change is visible in the time of the file"


def test_an_older_copy_is_never_overwritten(example: Path) -> None:
    lose_locks(example)
    older = example / "STATE" / "table.dat.bck"
    older.write_text("precious")
    carry_out(plan_repair(example))
    assert older.read_text() == "precious"
    assert (example / "STATE" / "table.dat.bck1").exists()


def test_planning_changes_nothing(example: Path) -> None:
    lose_locks(example)
    before = contents(example)
    plan_repair(example)
    assert contents(example) == before


def test_what_is_healthy_is_left_alone(example: Path) -> None:
    before = contents(example)
    plan = plan_repair(example)
    assert plan.repairs == plan.refusals == ()
    assert carry_out(plan).healthy
    assert contents(example) == before


def test_a_wrong_count_in_the_lock_file_is_set_too(example: Path) -> None:
    set_lock_rows(example / "STATE", 99)
    plan = plan_repair(example)
    assert [change.path.name for change in plan.repairs[0].changes] == ["table.dat", "table.lock"]
    assert carry_out(plan).healthy


def test_what_no_count_can_mend_is_refused_and_the_rest_is_repaired(example: Path, parent: Path) -> None:
    lose_locks(example)
    cut(example / "STATE" / "table.f0")
    before = (example / "STATE" / "table.dat").read_bytes()
    plan = plan_repair(example, parent)
    [refusal] = plan.refusals
    assert refusal.name == "STATE"
    assert "table.f0 has" in refusal.reason and f"split it again from {parent}" in refusal.reason
    report = carry_out(plan)
    assert not report.healthy
    assert {line.split(":")[0] for line in report.problems} == {"STATE"}
    assert (example / "STATE" / "table.dat").read_bytes() == before


def test_the_parent_is_asked_and_its_answer_told(example: Path, parent: Path) -> None:
    lose_locks(example)
    said = {repair.name: repair.parent for repair in plan_repair(example, parent).repairs}
    assert said["STATE"] == "the parent says the same"


def test_a_parent_that_numbers_its_rows_otherwise_is_not_believed(example: Path, parent: Path) -> None:
    """Copying its table.dat, as was done in 2019, would have destroyed the table."""
    for name in ("table.dat", "table.lock"):
        (parent / "STATE" / name).write_bytes((example / "STATE" / name).read_bytes())
    shutil.rmtree(parent / "PROCESSOR")
    shutil.copytree(example / "STATE", parent / "PROCESSOR")
    lose_locks(example)
    plan = plan_repair(example, parent)
    said = {repair.name: repair.parent for repair in plan.repairs}
    assert said["STATE"] == "the parent's own table.dat is not to be trusted"
    assert said["PROCESSOR"].startswith("the parent's table is another one")
    assert all(repair.proof == "its own storage managers" for repair in plan.repairs)
    assert carry_out(plan).healthy


def test_another_number_of_rows_is_another_table(example: Path, parent: Path, tmp_path: Path) -> None:
    calibrators = unpack("calibrators", tmp_path / "other")
    lose_locks(example)
    for name in ("table.dat", "table.f0", "table.lock"):
        shutil.copy(calibrators / "HISTORY" / name, parent / "HISTORY" / name)
    set_header_rows(example / "FIELD", 9)
    plan = plan_repair(example, parent)
    assert {repair.name: repair.rows for repair in plan.repairs}["FIELD"] == 3


def test_where_the_own_files_cannot_tell_the_same_table_of_a_parent_does(example: Path, parent: Path) -> None:
    """A storage manager that is not known here: equal descriptions and data to the byte prove the count."""
    for path in (example, parent):
        rename_manager(path / "POLARIZATION")
    rows = read_table(parent / "POLARIZATION").reported_rows
    (example / "POLARIZATION" / "table.lock").unlink()
    assert read_table(example / "POLARIZATION").reported_rows == 0
    assert [refusal.name for refusal in plan_repair(example).refusals] == ["POLARIZATION"]
    plan = plan_repair(example, parent)
    [repair] = plan.repairs
    assert repair.rows == rows and repair.proof == f"the same table in {parent}"
    assert not carry_out(plan).verifiable
    assert read_table(example / "POLARIZATION").reported_rows == rows


@pytest.mark.parametrize("difference", ["data", "description", "stale"])
def test_a_parent_that_is_not_shown_to_be_the_same_is_refused(difference: str, example: Path, parent: Path) -> None:
    for path in (example, parent):
        rename_manager(path / "POLARIZATION")
    (example / "POLARIZATION" / "table.lock").unlink()
    if difference == "data":
        patch(parent / "POLARIZATION" / "table.f0", 700, b"\xff")
    elif difference == "description":
        patch(parent / "POLARIZATION" / "table.dat", 300, b"Q")
    else:
        set_header_rows(parent / "POLARIZATION", 0)
    before = contents(example)
    plan = plan_repair(example, parent)
    assert plan.repairs == ()
    assert "the parent's" in plan.refusals[0].reason
    carry_out(plan)
    assert contents(example) == before


def test_splits_are_found_with_their_parents(example: Path, parent: Path) -> None:
    lonely = example.parent / "deeper" / "Y.ms.split.cal"
    shutil.copytree(example, lonely)
    shutil.copytree(example, example.parent / "deeper" / "Z.ms")
    assert dict(find_splits(example.parent)) == {example: parent, lonely: None}


def test_a_file_that_changes_after_the_plan_is_not_replaced(example: Path) -> None:
    lose_locks(example)
    plan = plan_repair(example)
    set_header_rows(example / "STATE", 7)
    before = contents(example)
    with pytest.raises(CannotVerify, match="changed by somebody else"):
        carry_out(plan)
    assert contents(example) == before


def test_what_was_repaired_is_opened_with_casa(casa_python: str, example: Path) -> None:
    lose_locks(example)
    done = subprocess.run(
        [sys.executable, "-c", "from stagecal.cli.main import main; main()", "ms", "repair", str(example)],
        env={**os.environ, "STAGECAL_CASA_WORKER": casa_python, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last == f"{example}: opened with CASA, which sees the same rows in all 14 tables"
