"""Each damage gets the verdict that it deserves, and no healthy measurement set is called broken."""

import contextlib
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from stagecal.measurement_set import (
    MeasurementSetError,
    NotAMeasurementSet,
    Verdict,
    check_measurement_set,
    read_fields,
)

from .conftest import Casa
from .damages import DAMAGES, Damage, zero

Copy = Callable[[Path], Path]


@pytest.fixture
def source(made: Path, products: Path) -> Callable[[str], Path]:
    return lambda name: made / name if (made / name).exists() else products / name


def test_what_casa_makes_is_healthy(made: Path, products: Path) -> None:
    for path in (made / "fresh.ms", made / "stale.ms", products / "transformed.ms", products / "split.ms"):
        report = check_measurement_set(path)
        assert report.problems == (), path
        assert report.healthy and report.verifiable
    assert check_measurement_set(made / "fresh.ms").sealed
    assert not check_measurement_set(made / "stale.ms").sealed
    assert check_measurement_set(made / "fresh.ms").rows == 1848


@pytest.mark.parametrize("damage", DAMAGES, ids=str)
def test_damage_gets_its_verdict(damage: Damage, source: Callable[[str], Path], copy_of: Copy) -> None:
    path = copy_of(source(damage.source))
    damage.apply(path)
    report = check_measurement_set(path)
    found = {table.name: table for table in report.tables}[damage.table]
    assert found.verdict is damage.verdict
    healthy = damage.verdict in (Verdict.OK, Verdict.DEPENDS_ON_LOCK)
    assert report.healthy is healthy
    assert report.verifiable is (damage.verdict is not Verdict.CANNOT_BE_VERIFIED)
    assert all(line.startswith(f"{damage.table}: ") and "\n" not in line for line in report.problems)
    assert bool(report.problems) is not healthy


def test_casacore_reports_the_rows_that_the_check_says_it_would(
    casa: Casa, source: Callable[[str], Path], tmp_path: Path
) -> None:
    copies = {}
    for number, damage in enumerate(DAMAGES):
        path = Path(shutil.copytree(source(damage.source), tmp_path / f"{number}.ms"))
        damage.apply(path)
        copies[str(path)] = (damage, check_measurement_set(path))
    for path, seen in casa.look(*map(Path, copies)).items():
        damage, report = copies[path]
        table = {table.name: table for table in report.tables}[damage.table]
        rows = seen.get("rows", {}).get(damage.table, seen.get("error"))
        if isinstance(rows, int):
            assert table.reported_rows in (rows, None), damage
            assert table.verdict is not Verdict.WRONG_ROWS or rows != table.rows, damage
        else:  # casacore cannot open it
            assert not report.healthy, damage


def test_a_measurement_set_without_rows_is_a_problem(made: Path) -> None:
    report = check_measurement_set(made / "empty.ms")
    assert report.rows == 0
    assert not report.healthy
    assert [line for line in report.problems if line.startswith("MAIN: has no rows")]


def test_ids_without_their_row_are_a_problem(products: Path, copy_of: Copy) -> None:
    """As after copying a subtable from a measurement set that numbers otherwise."""
    path = copy_of(products / "transformed.ms")
    shutil.rmtree(path / "DATA_DESCRIPTION")
    shutil.copytree(products / "split.ms" / "DATA_DESCRIPTION", path / "DATA_DESCRIPTION")
    report = check_measurement_set(path)
    assert all(table.verdict in (Verdict.OK, Verdict.DEPENDS_ON_LOCK) for table in report.tables)
    [problem] = report.problems
    assert problem.startswith("MAIN: DATA_DESC_ID goes from 1 to 3, but DATA_DESCRIPTION has 1 rows")


def test_every_reference_is_checked(casa: Casa, made: Path, copy_of: Copy) -> None:
    path = copy_of(made / "fresh.ms")
    for column, value in [("FIELD_ID", 3), ("STATE_ID", 8), ("ANTENNA2", 7), ("PROCESSOR_ID", -2)]:
        casa.run("casacore_side.py", "set", path, column, 5, value)
    casa.run("casacore_side.py", "set", path / "DATA_DESCRIPTION", "SPECTRAL_WINDOW_ID", 0, 6)
    found = {line.split()[1] for line in check_measurement_set(path).problems}
    assert found == {"FIELD_ID", "STATE_ID", "ANTENNA2", "PROCESSOR_ID", "SPECTRAL_WINDOW_ID"}


def test_an_empty_state_table_is_no_false_alarm(casa: Casa, made: Path, copy_of: Copy) -> None:
    """Some observatories write STATE_ID 0 and no STATE at all."""
    path = copy_of(made / "fresh.ms")
    casa.run("casacore_side.py", "clear", path / "STATE", "--sync")
    report = check_measurement_set(path)
    assert report.problems == ()
    assert {table.name: table.rows for table in report.tables}["STATE"] == 0


def test_a_table_that_casacore_emptied_has_wrong_rows(casa: Casa, made: Path, copy_of: Copy) -> None:
    """casacore takes a count of 0 in table.lock for no count, and believes the old one in table.dat."""
    path = copy_of(made / "fresh.ms")
    casa.run("casacore_side.py", "clear", path / "STATE")
    [problem] = check_measurement_set(path).problems
    assert problem.startswith("STATE: casacore would see 8 rows where 0 are stored")
    assert casa.look(path)[str(path)]["rows"]["STATE"] == 8


def test_a_calibration_table_is_no_measurement_set(products: Path) -> None:
    report = check_measurement_set(products / "gains.cal")
    assert not report.healthy
    assert "this is no measurement set" in report.problems[0]


def test_a_reference_to_another_measurement_set_cannot_be_verified(casa: Casa, made: Path, tmp_path: Path) -> None:
    casa.run("casacore_side.py", "refer", made / "fresh.ms", tmp_path / "reference.ms")
    report = check_measurement_set(tmp_path / "reference.ms")
    assert report.tables[0].verdict is Verdict.CANNOT_BE_VERIFIED
    assert not report.healthy and not report.verifiable
    with pytest.raises(MeasurementSetError):
        read_fields(tmp_path / "reference.ms")


def test_a_subtable_outside_is_not_followed(made: Path, copy_of: Copy, tmp_path: Path) -> None:
    path = copy_of(made / "fresh.ms")
    (path / "STATE").rename(tmp_path / "STATE")
    (path / "STATE").symlink_to(tmp_path / "STATE")
    report = check_measurement_set(path)
    assert {table.name: table.verdict for table in report.tables}["STATE"] is Verdict.CANNOT_BE_VERIFIED
    assert not report.healthy


@pytest.mark.parametrize("kind", ["nothing", "file"])
def test_what_is_no_directory_is_no_measurement_set(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.ms"
    if kind == "file":
        path.write_text("x")
    with pytest.raises(NotAMeasurementSet, match="no directory"):
        check_measurement_set(path)


def test_a_renamed_measurement_set_is_as_healthy_as_before(
    products: Path, copy_of: Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_of(products / "transformed.ms").rename(tmp_path / "moved.ms")
    monkeypatch.chdir(tmp_path)
    assert check_measurement_set(Path("moved.ms")).healthy
    monkeypatch.chdir("moved.ms")
    assert check_measurement_set(Path()).healthy


def test_data_overwritten_in_place_are_not_seen(made: Path, copy_of: Copy) -> None:
    """The limit of this check, said in the documentation: only a checksum sees it."""
    path = copy_of(made / "fresh.ms")
    zero(max(path.glob("table.f*_TSM*"), key=lambda file: file.stat().st_size))
    assert check_measurement_set(path).healthy


def test_checking_changes_nothing(products: Path) -> None:
    def state() -> dict[Path, tuple[int, int]]:
        return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in (products / "transformed.ms").rglob("*")}

    before = state()
    check_measurement_set(products / "transformed.ms")
    read_fields(products / "transformed.ms")
    assert state() == before


def test_no_damaged_byte_makes_the_check_fail_otherwise(products: Path, copy_of: Copy) -> None:
    """Whatever the files hold, there is a report, and fields are read or refused with our own errors."""
    path = copy_of(products / "split.ms")
    files = [
        file
        for file in sorted(path.rglob("table.*"))
        if "_TSM" not in file.name and not file.name.endswith((".info", "i"))
    ]
    dice = random.Random(7)
    unhealthy = 0
    for _ in range(120):
        file = dice.choice(files)
        content = file.read_bytes()
        damaged = bytearray(content)
        for _ in range(dice.choice([1, 1, 8])):
            if damaged:
                damaged[dice.randrange(min(len(damaged), 6000))] = dice.choice([0, 1, 0x7F, 0xFF])
        file.write_bytes(damaged[: dice.choice([len(damaged), len(damaged), dice.randrange(len(damaged) + 1)])])
        report = check_measurement_set(path)
        unhealthy += not report.healthy
        assert all(line.isprintable() for line in report.problems)
        with contextlib.suppress(MeasurementSetError):
            read_fields(path)
        file.write_bytes(content)
    assert unhealthy > 30
    assert check_measurement_set(path).healthy


@pytest.mark.parametrize(
    ("table", "old", "new", "says"),
    [
        (".", b"\0\0\0\x05FIELD\0", b"\0\0\0\x05FJELD\0", "names no subtable FIELD"),
        (".", b"\0\0\0\x01@\0\0\0", b"\0\0\0\x01@@\0\0", "measurement set of version "),
        ("FIELD", b"\0\0\0\x04NAME", b"\0\0\0\x04NAMF", "FIELD: NAME is missing"),
        ("SPECTRAL_WINDOW", b"\0\0\0\x02Hz", b"\0\0\0\x02Hx", "CHAN_FREQ is not in Hz"),
        ("FIELD", b"\0\0\0\x09direction", b"\0\0\0\x09dorection", "is not known as a measure of direction"),
        ("STATE", b"ScalarColumnDesc<Bool", b"ScalarColumnDesc<Bolo", "describes FLAG_ROW as"),
        ("STATE", b"ScalarColumnDesc<Bool    ", b"ScalarColumnDesc<Int     ", "of data type 0 and of class"),
    ],
)
def test_what_casa_would_not_take_is_a_problem(
    table: str, old: bytes, new: bytes, says: str, made: Path, copy_of: Copy
) -> None:
    path = copy_of(made / "fresh.ms")
    content = (path / table / "table.dat").read_bytes()
    assert old in content
    (path / table / "table.dat").write_bytes(content.replace(old, new, 1))
    report = check_measurement_set(path)
    assert not report.healthy
    assert any(says in line for line in report.problems), report.problems
