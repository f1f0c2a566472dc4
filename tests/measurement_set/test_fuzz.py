"""Damaged bytes of table.dat and table.lock: what casacore trips over is seen (a sample of the whole benchmark)."""

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

from stagecal.measurement_set import check_measurement_set

from .examples import example, unpacked

__all__ = ["example", "unpacked"]

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "fuzz_measurement_set.py"


@pytest.fixture(scope="module")
def fuzzing() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_measurement_set", BENCHMARK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_what_casacore_trips_over_is_seen(
    casa_python: str, fuzzing: ModuleType, unpacked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAGECAL_CASA_WORKER", casa_python)
    dice, cases = random.Random(11), list(fuzzing.cases(unpacked))
    outcomes = []
    for table in (".", "FIELD"):
        outcomes += fuzzing.examine(unpacked, dice.sample([case for case in cases if case.table == table], 40))
    assert fuzzing.missed(outcomes) == []
    tripped = [one for one in outcomes if one.casacore in fuzzing.TRIPS]
    assert len(tripped) > 20, "most bytes of a table.dat matter"


def test_every_damage_of_a_byte_gives_a_report(fuzzing: ModuleType, unpacked: Path) -> None:
    """Without casacore, and for more of them: no damage makes the check itself fail, take long, or ask for memory."""
    contents = {
        f"X.ms/{file.relative_to(unpacked)}": file.read_bytes() for file in unpacked.rglob("*") if file.is_file()
    }
    unhealthy = 0
    for case in random.Random(5).sample(list(fuzzing.cases(unpacked)), 250):
        path = f"X.ms/{case.file}" if case.table == "." else f"X.ms/{case.table}/{case.file}"
        kept = contents[path]
        contents[path] = kept[: case.offset] + bytes([case.value]) + kept[case.offset + 1 :]
        report = check_measurement_set(fuzzing.Memory(contents, "X.ms"))
        contents[path] = kept
        assert all(line.isprintable() for line in report.problems), case
        unhealthy += not report.healthy
    assert 120 < unhealthy < 250
    assert check_measurement_set(fuzzing.Memory(contents, "X.ms")).healthy


def test_a_vector_of_three_units_has_three_elements(fuzzing: ModuleType, unpacked: Path) -> None:
    """The one byte that was missed when every one was inverted: in the fixed shape of UVW."""
    contents = {
        f"X.ms/{file.relative_to(unpacked)}": file.read_bytes() for file in unpacked.rglob("*") if file.is_file()
    }
    kept = contents["X.ms/table.dat"]
    shape = b"IPosition" + (1).to_bytes(4, "big") + (1).to_bytes(4, "big")
    # The last one is what counts: in the column set.
    last = kept.rindex(shape + (3).to_bytes(4, "big")) + len(shape) + 3
    contents["X.ms/table.dat"] = kept[:last] + bytes([4]) + kept[last + 1 :]
    report = check_measurement_set(fuzzing.Memory(contents, "X.ms"))
    assert not report.healthy
    assert any("UVW has the shape [4]" in problem for problem in report.problems)
