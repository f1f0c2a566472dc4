"""`stagecal ms` as people use it: on any measurement set, without a site, in words that say what to do."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from stagecal.cli.main import main
from tests.measurement_set.damages import cut, rename_manager, zero
from tests.measurement_set.examples import example, lose_locks, pack, unpacked

__all__ = ["example", "unpacked"]

CHECKOUT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Said:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Said]


@pytest.fixture
def ms(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `stagecal ms` with the words given; there is no CASA and no configuration."""
    for name in ("STAGECAL_CASA_WORKER", "STAGECAL_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/nonexistent")

    def run(*words: object) -> Said:
        with pytest.raises(SystemExit) as end:
            main(["ms", *map(str, words)])
        captured = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return Said(end.value.code, captured.out, captured.err)

    return run


def largest(path: Path) -> Path:
    return max(path.glob("table.f*_TSM*"), key=lambda file: file.stat().st_size)


# --- check -----------------------------------------------------------------------------------------------------------


def test_a_healthy_one_that_depends_on_its_lock_files_is_healthy(ms: Run, example: Path) -> None:
    said = ms("check", example)
    assert said.code == 0
    first, second = said.out.splitlines()
    assert first == f"{example}: depends on its lock file, 1848 rows in 14 tables"
    assert "DATA_DESCRIPTION" in second and "stagecal ms seal" in second


def test_lost_lock_files_are_said_with_the_remedy(ms: Run, example: Path) -> None:
    lose_locks(example)
    said = ms("check", example)
    assert said.code == 1
    lines = said.out.splitlines()
    assert lines[0].startswith(f"{example}: wrong rows")
    assert any(line.startswith("  STATE: casacore would see 0 rows where") and "seal it" in line for line in lines)


def test_what_cannot_be_verified_has_a_code_of_its_own(ms: Run, example: Path) -> None:
    rename_manager(example / "POLARIZATION")
    assert ms("check", example).code == 3
    cut(example / "STATE" / "table.f0")
    assert ms("check", example).code == 1, "unless something is known to be wrong"


def test_a_measurement_set_that_contradicts_itself_is_broken_though_a_table_cannot_be_verified(
    ms: Run, example: Path
) -> None:
    rename_manager(example / "STATE")
    shutil.rmtree(example / "FIELD")
    shutil.copytree(example / "HISTORY", example / "FIELD")
    said = ms("check", example)
    assert said.code == 1 and "FIELD: NAME is missing" in said.out


def test_a_tree_with_a_tar_file_is_checked_and_the_worst_counts(ms: Run, example: Path) -> None:
    pack(example, example.with_name("packed.tar"))
    shutil.copytree(example, example.with_name("bad.ms"))
    lose_locks(example.with_name("bad.ms"))
    said = ms("check", "--json", example.parent)
    assert said.code == 1
    assert {Path(entry["path"]).name: (entry["verdict"], entry["exit_code"]) for entry in said.json} == {
        "X.ms.split.cal": ("depends on its lock file", 0),
        "bad.ms": ("wrong rows", 1),
        "packed.tar:X.ms.split.cal": ("depends on its lock file", 0),
    }
    assert {table["name"] for table in said.json[0]["tables"]} >= {"MAIN", "STATE", "FIELD"}
    assert said.json[0]["tables"][0] == {
        "name": "MAIN",
        "verdict": "ok",
        "rows": 1848,
        "reported_rows": 1848,
        "problems": [],
    }


def test_one_path_that_is_not_there_does_not_hide_the_others(ms: Run, example: Path, tmp_path: Path) -> None:
    said = ms("check", tmp_path / "nothing", example)
    assert said.code == 2
    assert "does not exist" in said.err and f"{example}: depends" in said.out
    cut(example / "table.dat")
    assert ms("check", tmp_path / "nothing", example).code == 1


@pytest.mark.parametrize("kind", ["empty directory", "text"])
def test_a_path_without_tables_is_a_bad_argument(kind: str, ms: Run, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.mkdir() if kind == "empty directory" else path.write_text("x")
    said = ms("check", path)
    assert said.code == 2 and said.out == ""
    assert len(said.err.splitlines()) == 1


def test_a_cut_tar_file_is_broken(ms: Run, example: Path) -> None:
    tar = pack(example, example.with_name("X.tar"))
    content = tar.read_bytes()
    tar.write_bytes(content[: len(content) // 2])
    said = ms("check", tar)
    assert said.code == 1 and "is cut" in said.out


def test_zeroed_data_are_seen_by_the_deep_check_alone(ms: Run, example: Path) -> None:
    assert ms("check", "--deep", example).code == 3, "there is no record yet"
    said = ms("check", "--record", example)
    assert said.code == 0 and f"{example}.sha256" in said.out
    assert ms("check", "--deep", example).code == 0
    zero(largest(example))
    assert ms("check", example).code == 0
    said = ms("check", "--deep", example)
    assert said.code == 1
    assert f"  {largest(example).name}: has another content than was recorded" in said.out
    assert ms("check", "--record", example).code == 1, "a damage is not recorded as the truth"


def test_what_is_not_healthy_is_not_recorded(ms: Run, example: Path) -> None:
    lose_locks(example)
    said = ms("check", "--record", example)
    assert said.code == 1 and "not recorded" in said.out
    assert not example.with_name(f"{example.name}.sha256").exists()


def test_a_tar_file_is_checked_deeply_once_with_the_sums_beside_it(ms: Run, example: Path) -> None:
    tar = pack(example, example.with_name("X.tar"))
    done = subprocess.run(["sha256sum", "X.tar"], cwd=tar.parent, capture_output=True, text=True, check=True)
    tar.with_name("SHA256SUMS").write_text(done.stdout)
    said = ms("check", "--deep", "--json", tar)
    assert said.code == 0 and said.json[0]["deep"]["files"] == 1
    with tar.open("r+b") as file:
        file.seek(200_000)
        file.write(b"\1\2\3")
    assert ms("check", "--deep", tar).code == 1


# --- seal ------------------------------------------------------------------------------------------------------------


def test_a_sealed_one_needs_no_lock_file(ms: Run, example: Path) -> None:
    said = ms("seal", example)
    assert said.code == 0
    assert said.out.startswith(f"{example}: sealed, all 14 tables open without their lock files (changed ")
    lose_locks(example)
    assert ms("check", example).out.startswith(f"{example}: ok, ")
    assert "nothing was changed" in ms("seal", example).out


def test_a_tree_is_sealed_whatever_becomes_of_one_in_it(ms: Run, example: Path) -> None:
    bad = example.with_name("A.ms")
    shutil.copytree(example, bad)
    cut(bad / "STATE" / "table.f0")
    said = ms("seal", example.parent)
    assert said.code == 1
    assert "nothing was changed" in said.err and f"{example}: sealed" in said.out


def test_a_single_table_is_sealed(ms: Run, example: Path) -> None:
    (example / "STATE" / "table.lock").unlink()
    assert ms("seal", example / "STATE").code == 0
    assert ms("check", example / "STATE").out.startswith(f"{example / 'STATE'}: ok")


def test_a_tar_file_is_not_sealed(ms: Run, example: Path) -> None:
    tar = pack(example, example.with_name("X.tar"))
    before = tar.read_bytes()
    said = ms("seal", tar)
    assert said.code == 2 and "unpack it" in said.err
    assert tar.read_bytes() == before


# --- repair ----------------------------------------------------------------------------------------------------------


def test_a_repair_is_reported_byte_by_byte(ms: Run, example: Path) -> None:
    (example / "STATE" / "table.lock").unlink()
    said = ms("repair", example)
    assert said.code == 0
    lines = said.out.splitlines()
    assert lines[0] == str(example)
    assert lines[1].startswith("FIXING: Diff for STATE is {24: ('\\x00', '\\x0")
    assert lines[1].count(": (") == 2 and lines[1].endswith("')}")
    assert lines[2].endswith("rows by its own storage managers")
    assert lines[3].startswith(f"{example}: healthy")
    assert ms("check", example).code == 0


def test_a_dry_run_says_the_same_and_writes_nothing(ms: Run, example: Path) -> None:
    (example / "STATE" / "table.lock").unlink()
    before = {path: path.stat().st_mtime_ns for path in example.rglob("*")}
    said = ms("repair", "--dry-run", example)
    assert "FIXING: Diff for STATE is " in said.out and "dry run" in said.out
    assert {path: path.stat().st_mtime_ns for path in example.rglob("*")} == before
    assert ms("check", example).code == 1


def test_a_tree_is_walked_for_splits_with_their_parents(ms: Run, example: Path) -> None:
    parent = example.parent / "working" / "X.ms"
    shutil.copytree(example, parent)
    lose_locks(example)
    said = ms("repair", example.parent)
    assert said.code == 0
    assert said.out.splitlines()[0] == f"{example} (parent {parent})"
    assert "FIXING: Diff for DATA_DESCRIPTION is " in said.out


def test_what_is_cut_is_refused_with_what_to_do(ms: Run, example: Path) -> None:
    cut(example / "STATE" / "table.f0")
    said = ms("repair", "--parent", example, example)
    assert said.code == 1
    assert "REFUSED: STATE: table.f0 has" in said.out and "split it again from" in said.out


def test_nothing_to_repair_is_said(ms: Run, example: Path) -> None:
    said = ms("repair", example)
    assert said.code == 0 and "nothing to repair" in said.out


def test_a_tree_has_no_single_parent(ms: Run, example: Path) -> None:
    assert ms("repair", "--parent", example, example.parent).code == 2
    assert ms("repair", example.parent / "nothing").code == 2
    shutil.rmtree(example)
    assert ms("repair", example.parent).code == 2


# --- fields ----------------------------------------------------------------------------------------------------------


def test_fields_are_listed_with_rows_and_intents_packed_or_not(ms: Run, example: Path) -> None:
    said = ms("fields", "--json", example)
    assert said.code == 0
    [listed] = said.json
    assert [(field["id"], field["name"], field["rows"]) for field in listed["fields"]] == [
        (0, "J0510+1800", 504),
        (1, "J0440+1437", 504),
        (2, "HL_Tau", 840),
    ]
    assert listed["fields"][2]["intents"] == ["OBSERVE_TARGET"]
    packed = ms("fields", "--json", pack(example, example.with_name("X.tar")))
    assert packed.json[0]["fields"] == listed["fields"]
    assert packed.json[0]["path"].endswith("X.tar:X.ms.split.cal")
    text = ms("fields", example).out.splitlines()
    assert text[0] == str(example) and text[4].split() == ["2", "HL_Tau", "840", "OBSERVE_TARGET"]


def test_fields_of_what_is_damaged_are_not_guessed(ms: Run, example: Path) -> None:
    cut(example / "STATE" / "table.f0")
    said = ms("fields", example)
    assert said.code == 1 and said.out == ""
    assert ms("fields", example / "FIELD").code == 2


# --- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subcommand", ["check", "seal", "repair", "fields"])
def test_each_explains_itself_with_an_example(subcommand: str, ms: Run) -> None:
    said = ms(subcommand, "--help")
    assert said.code == 0
    assert f"example:\n  stagecal ms {subcommand} " in said.out and "exit codes: 0 " in said.out


def test_the_configuration_is_taken_and_not_used(ms: Run, example: Path) -> None:
    assert ms("--config", "/nonexistent", "check", example).code == 0
    assert ms("check", "--config", "/nonexistent", example).code == 0


def test_it_works_alone_and_at_once(example: Path, tmp_path: Path) -> None:
    """From anywhere, with an empty environment, and without loading anything that is not needed."""
    code = (
        f"import sys; sys.path.insert(0, {str(CHECKOUT)!r})\n"
        "from stagecal.cli.main import main\n"
        "try:\n    main(['ms', 'check', sys.argv[1]])\n"
        "finally:\n    print([name for name in ('sqlite3', 'jinja2', 'stagecal.config') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(example)],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
