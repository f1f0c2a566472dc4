"""Fields, their rows and their intents are those that casacore reads; what is not sure is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from stagecal.measurement_set import (
    CannotVerify,
    Damaged,
    FieldUse,
    NotAMeasurementSet,
    parse_intents,
    read_fields,
)

from .conftest import Casa
from .damages import cut, rename_manager

Copy = Callable[[Path], Path]


def test_fields_are_those_that_casacore_reads(casa: Casa, made: Path, products: Path) -> None:
    paths = [made / "fresh.ms", made / "stale.ms", products / "transformed.ms", products / "split.ms"]
    for path, seen in casa.look(*paths).items():
        native = [[f.id, f.name, f.rows, sorted(f.intents)] for f in read_fields(Path(path))]
        assert native == seen["fields"], path


def test_a_split_that_keeps_its_ids_has_unused_fields(products: Path) -> None:
    phase = FieldUse(1, "J0440+1437", 504, frozenset({"CALIBRATE_PHASE", "CALIBRATE_WVR"}))
    bandpass, target = FieldUse(0, "J0510+1800", 0, frozenset()), FieldUse(2, "HL_Tau", 0, frozenset())
    assert read_fields(products / "transformed.ms") == (bandpass, phase, target)


def test_long_and_unusual_names_are_read_exactly(casa: Casa, made: Path, copy_of: Copy) -> None:
    path = copy_of(made / "fresh.ms")
    names = ["J" * 8, "a name of a field that does not fit into eight bytes" * 60, "Süß, 李 #1"]
    for row, name in enumerate(names):
        casa.run("casacore_side.py", "set", path / "FIELD", "NAME", row, name)
    assert [field.name for field in read_fields(path)] == names
    assert [row[1] for row in casa.look(path)[str(path)]["fields"]] == names


def test_one_row_observed_as_target_makes_its_intent_known(casa: Casa, made: Path, copy_of: Copy) -> None:
    path = copy_of(made / "fresh.ms")
    casa.run("casacore_side.py", "set", path, "STATE_ID", 100, 2)
    phase = read_fields(path)[0]
    assert "OBSERVE_TARGET" in phase.intents
    assert phase.rows == 504


def test_rows_without_a_state_are_counted(casa: Casa, made: Path, copy_of: Copy) -> None:
    path = copy_of(made / "fresh.ms")
    for row in (3, 4, 200):
        casa.run("casacore_side.py", "set", path, "STATE_ID", row, -1)
    assert [field.rows_without_intent for field in read_fields(path)] == [3, 0, 0]


def test_without_states_there_are_no_intents(casa: Casa, made: Path, copy_of: Copy) -> None:
    path = copy_of(made / "fresh.ms")
    casa.run("casacore_side.py", "clear", path / "STATE", "--sync")
    for field in read_fields(path):
        assert (field.intents, field.rows_without_intent) == (frozenset(), field.rows)


def test_fields_are_read_although_the_lock_files_are_lost(made: Path, copy_of: Copy) -> None:
    path = copy_of(made / "stale.ms")
    for lock in path.rglob("table.lock"):
        lock.unlink()
    assert read_fields(path) == read_fields(made / "stale.ms")


@pytest.mark.parametrize("column", ["FIELD_ID", "STATE_ID"])
def test_an_id_without_its_row_is_refused(casa: Casa, made: Path, copy_of: Copy, column: str) -> None:
    path = copy_of(made / "fresh.ms")
    casa.run("casacore_side.py", "set", path, column, 9, 77)
    with pytest.raises(Damaged, match=f"{column} 77"):
        read_fields(path)


def test_storage_that_is_not_known_is_refused(made: Path, copy_of: Copy) -> None:
    path = copy_of(made / "fresh.ms")
    rename_manager(path / "FIELD")
    with pytest.raises(CannotVerify, match="FIELD"):
        read_fields(path)


@pytest.mark.parametrize("name", ["FIELD/table.f0", "STATE/table.f0", "table.f1", "table.dat"])
def test_a_damaged_file_is_refused(made: Path, copy_of: Copy, name: str) -> None:
    path = copy_of(made / "fresh.ms")
    cut(path / name)
    with pytest.raises(Damaged):
        read_fields(path)


def test_a_missing_field_table_is_refused(made: Path, copy_of: Copy) -> None:
    path = copy_of(made / "fresh.ms")
    shutil.rmtree(path / "FIELD")
    with pytest.raises(Damaged, match="FIELD"):
        read_fields(path)
    with pytest.raises(NotAMeasurementSet):
        read_fields(path / "STATE")


@pytest.mark.parametrize(
    ("mode", "intents"),
    [
        ("CALIBRATE_PHASE#ON_SOURCE,CALIBRATE_WVR#ON_SOURCE", {"CALIBRATE_PHASE", "CALIBRATE_WVR"}),
        ("OBSERVE_TARGET#ON_SOURCE", {"OBSERVE_TARGET"}),
        ("OBSERVE_TARGET.UNSPECIFIED", {"OBSERVE_TARGET.UNSPECIFIED"}),
        (" CALIBRATE_FLUX , CALIBRATE_FLUX#X", {"CALIBRATE_FLUX"}),
        ("", set()),
        (",#ON_SOURCE", set()),
    ],
)
def test_intents_are_the_parts_before_the_hash(mode: str, intents: set[str]) -> None:
    assert parse_intents(mode) == intents
