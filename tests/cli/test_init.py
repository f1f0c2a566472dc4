"""`stagecal init`: a whole site in a directory, and never over somebody's files."""

from __future__ import annotations

import sqlite3
import subprocess
from pathlib import Path

import pytest

from stagecal.config import load_config
from tests.cli.conftest import Ended, environment, everything_below, words_for

PARTS = {"stagecal.toml", "archive.db", "triggers", "mail", "work", "preview", "state", "store"}
MOUS = {
    "uid://A001/X12a3/X80e",
    "uid://A001/X1296/X675",
    "uid://A001/X133d/X3cf3",
    "uid://A001/X159a/X6b",
    "uid://A001/X14d7/X160",
    "uid://A001/X1284/X265f",
    "uid://A001/X1284/X266",
}


def run(directory: Path, program: str, *arguments: str, config: Path | None = None) -> Ended:
    process = subprocess.run(
        words_for(program, *arguments),
        env=environment(config or directory / "none.toml"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=directory,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in process.stderr
    return Ended(process.returncode, process.stdout, process.stderr)


def test_the_site_is_complete_and_says_how_to_go_on(tmp_path: Path) -> None:
    ended = run(tmp_path, "stagecal", "init", "--no-data", "site")
    assert (ended.code, ended.err) == (0, "")
    site = tmp_path / "site"
    assert {path.name for path in site.iterdir()} >= PARTS
    assert f"export STAGECAL_CONFIG={site / 'stagecal.toml'}" in ended.out and "stagecal watch" in ended.out
    with sqlite3.connect(site / "archive.db") as database:
        known = {row[0] for row in database.execute("SELECT MOUS_STATUS_UID FROM BMMV_SCHEDBLOCK")}
    assert known >= MOUS
    config = load_config(site / "stagecal.toml", environ={})
    assert config.staging.url == "http://localhost:8000/preview" and config.restore.chosen_engine == "casatasks"
    assert config.staging.root == site / "preview" and config.state.directory == site / "state"
    assert (site / "state").stat().st_mode & 0o077 == 0


def test_the_site_can_be_moved_because_its_paths_are_relative(tmp_path: Path) -> None:
    run(tmp_path, "stagecal", "init", "--no-data", "site")
    assert str(tmp_path) not in (tmp_path / "site" / "stagecal.toml").read_text()
    (tmp_path / "site").rename(tmp_path / "moved")
    assert load_config(tmp_path / "moved" / "stagecal.toml", environ={}).staging.root == tmp_path / "moved" / "preview"


def test_two_sites_live_side_by_side(tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert run(tmp_path, "stagecal", "init", "--no-data", name).code == 0
    words = ("2017.1.01347.S", "Pi Person", "pi@example.org", "12345", "uid://A001/X12a3/X80e")
    ended = run(
        tmp_path, "trigger-calms", *words, "--contact", "c@example.org", config=tmp_path / "one" / "stagecal.toml"
    )
    assert ended.code == 0
    assert len(list((tmp_path / "one" / "triggers").iterdir())) == 1
    assert list((tmp_path / "two" / "triggers").iterdir()) == []


@pytest.mark.parametrize("what", ["a file in it", "hidden file in it", "a file itself", "a site"])
def test_what_is_there_is_never_overwritten(tmp_path: Path, what: str) -> None:
    target = tmp_path / "site"
    if what == "a file itself":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / (".mine" if what.startswith("hidden") else "mine")).write_text("mine")
    if what == "a site":
        (target / "mine").unlink()
        assert run(tmp_path, "stagecal", "init", "--no-data", "site").code == 0
    before = everything_below(tmp_path)
    ended = run(tmp_path, "stagecal", "init", "--no-data", "site")
    assert ended.code == 3 and "name another directory" in ended.err and len(ended.err.splitlines()) == 1
    assert everything_below(tmp_path) == before


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    assert run(tmp_path, "stagecal", "init", "--no-data", "site").code == 0


def test_an_empty_name_is_none(tmp_path: Path) -> None:
    ended = run(tmp_path, "stagecal", "init", "--no-data", "")
    assert ended.code == 2 and len(ended.err.splitlines()) == 1 and list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_made_it_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ended = run(tmp_path, "stagecal", "init", "--no-data", "file/site")
    assert ended.code in (3, 5) and len(ended.err.splitlines()) == 1
