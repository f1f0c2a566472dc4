"""What there is at a path: measurement sets, single tables, trees, also where half of them are gone."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from stagecal.measurement_set import Found, NotAMeasurementSet, check_table, find_tables

from .examples import example, pack, unpacked

__all__ = ["example", "unpacked"]


def found_in(path: Path) -> dict[str, bool | None]:
    """The places that were found, and whether each is a measurement set (None: not read)."""
    return {
        (found.files.place if isinstance(found, Found) else found.place).removeprefix(f"{path}/"): (
            found.is_measurement_set if isinstance(found, Found) else None
        )
        for found in find_tables(path)
    }


def test_a_tree_is_walked_and_tables_are_not(example: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "notes.txt").write_text("x")
    shutil.copytree(example, tree / "a" / "X.ms")
    shutil.copytree(example / "FIELD", tree / "a" / "b" / "alone.tbl")
    pack(example, tree / "b.tar")
    (tree / "c.tar").write_bytes(b"no tar")
    pack(tree / "a" / "b", tree / "d.tar")
    pack(tree / "notes.txt", tree / "e.tar")
    (tree / "link.ms").symlink_to(example)
    assert found_in(tree) == {
        "a/X.ms": True,
        "a/b/alone.tbl": False,
        f"b.tar:{example.name}": True,
        "c.tar": None,
        "d.tar:b/alone.tbl": False,
    }
    assert "link.ms" not in found_in(tree), "a link in a tree may lead in circles"
    assert list(found_in(tree / "link.ms").values()) == [True], "one that is named is followed"


@pytest.mark.parametrize("lost", ["table.dat", "table.info", "DATA_DESCRIPTION", "table.f0", "all"])
def test_a_measurement_set_is_one_whatever_it_lost(lost: str, example: Path) -> None:
    for path in list(example.iterdir()):
        if path.name == lost or (lost == "all" and path.is_file()):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert list(found_in(example.parent).values()) == [True]


def test_nothing_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotAMeasurementSet, match="does not exist"):
        list(find_tables(tmp_path / "nothing"))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(NotAMeasurementSet, match="neither a directory nor a tar file"):
        list(find_tables(tmp_path / "notes.txt"))
    assert list(find_tables(tmp_path)) == []


def test_a_directory_that_cannot_be_read_is_told(example: Path) -> None:
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        place.chmod(0o755)
        shutil.copytree(example, place / example.name)
        (place / "hidden").mkdir(mode=0)
        # Nothing is forbidden to root, so that root looks as somebody else.
        is_root = os.geteuid() == 0
        try:
            if is_root:
                os.seteuid(65534)
            assert found_in(place) == {"X.ms.split.cal": True, "hidden": None}
        finally:
            if is_root:
                os.seteuid(0)
            (place / "hidden").chmod(0o755)


def test_a_single_table_is_checked_without_the_rules_of_measurement_sets(example: Path) -> None:
    assert check_table(example / "FIELD").problems == ()
    (example / "STATE" / "table.lock").unlink()
    [problem] = check_table(example / "STATE").problems
    assert problem.startswith("MAIN: casacore would see 0 rows")
