"""Small real measurement sets that need no CASA to be had: unpacked copies of those in tests/data/measurement_sets."""

import shutil
import tarfile
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "data" / "measurement_sets"


def unpack(name: str, directory: Path) -> Path:
    """Return the example `name` ("full", "calibrators", ...), unpacked into a new directory."""
    directory.mkdir()
    with tarfile.open(EXAMPLES / f"{name}.tar.xz") as tar:
        tar.extractall(directory, filter="data")
    [path] = directory.iterdir()
    return path


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The measurement set of all fields as CASA's mstransform leaves it; not to be changed."""
    return unpack("full", tmp_path_factory.mktemp("example") / "full")


@pytest.fixture
def example(unpacked: Path, tmp_path: Path) -> Path:
    """A copy named X.ms.split.cal, to be changed at will."""
    return Path(shutil.copytree(unpacked, tmp_path / "X.ms.split.cal"))


def pack(path: Path, tar_path: Path) -> Path:
    """Return a tar file of the directory `path`."""
    with tarfile.open(tar_path, "w") as tar:
        tar.add(path, path.name)
    return tar_path


def lose_locks(path: Path) -> None:
    """Do what a copy does that leaves out *.lock."""
    for lock in path.rglob("table.lock"):
        lock.unlink()
