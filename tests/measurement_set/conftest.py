"""Real measurement sets, made once per session by real casacore in the CASA worker's python."""

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
SITE_CONFIGURATION = """\
import importlib.util, os
_data = os.path.join(os.path.dirname(importlib.util.find_spec("casacore").origin), "data")
measurespath = _data
datapath = [_data]
measures_auto_update = data_auto_update = False
logfile = "/dev/null"
nologger = nogui = agg = True
casaconfig_verbose = 0
cachedir = {cache!r}
"""


def find_worker() -> str | None:
    named = os.environ.get("STAGECAL_CASA_WORKER")
    if named:
        return named
    try:
        from stagecal.casa_worker import find_casa_worker
    except ImportError:
        return None
    found = find_casa_worker()
    return str(found) if found else None


# Measurement sets that are public but not ours to keep here are looked at where somebody has them.
collect_ignore = [] if os.environ.get("STAGECAL_PUBLIC_MS") else ["test_public.py"]


@pytest.fixture(scope="session")
def casa_python() -> str:
    """The python of an environment with casacore and CASA."""
    worker = find_worker()
    if worker is None:
        complaint = "needs the CASA worker (name its python in STAGECAL_CASA_WORKER)"
        if os.environ.get("CI") == "true":
            pytest.fail(complaint)
        pytest.skip(complaint)
    return worker


class Casa:
    """Runs scripts of this directory in the CASA worker; their last line of output is JSON."""

    def __init__(self, python: str, directory: Path) -> None:
        self.python = python
        self.directory = directory
        configuration = directory / "casasiteconfig.py"
        configuration.write_text(SITE_CONFIGURATION.format(cache=str(directory)))
        # Where tests are run from must not be importable there.
        self.environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        self.environment["CASASITECONFIG"] = str(configuration)

    def command(self, script: str, *arguments: object) -> list[str]:
        return [self.python, str(HERE / script), *map(str, arguments)]

    def run(self, script: str, *arguments: object) -> Any:
        done = subprocess.run(
            self.command(script, *arguments),
            cwd=self.directory,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{script} {arguments}: {done.stderr[-2000:]}"
        lines = done.stdout.splitlines()
        return json.loads(lines[-1]) if lines else None

    def look(self, *paths: Path) -> dict[str, Any]:
        answer: dict[str, Any] = self.run("casacore_side.py", "look", *paths)
        return answer


def once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """Return the directory `name` that `make` filled, once for all processes of a parallel run."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    directory = base / name
    with (base / f"{name}.once").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not directory.exists():
            directory.mkdir()
            try:
                make(directory)
            except BaseException:
                shutil.rmtree(directory)
                raise
    return directory


@pytest.fixture(scope="session")
def casa(casa_python: str, tmp_path_factory: pytest.TempPathFactory) -> Casa:
    return Casa(casa_python, tmp_path_factory.mktemp("casa"))


@pytest.fixture(scope="session")
def made(casa: Casa, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fresh.ms (every table.dat up to date), stale.ms (none is), empty.ms (no data), as casacore makes them."""

    def make(directory: Path) -> None:
        casa.run("make_ms.py", directory / "fresh.ms")
        casa.run("make_ms.py", directory / "stale.ms", "--stale-dat")
        casa.run("make_ms.py", directory / "empty.ms", "--empty")

    return once(tmp_path_factory, "made", make)


@pytest.fixture(scope="session")
def products(casa: Casa, made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """transformed.ms (one field, ids kept), split.ms (reindexed), gains.cal, bandpass.cal, as CASA makes them."""

    def make(directory: Path) -> None:
        source = directory / "source.ms"
        shutil.copytree(made / "fresh.ms", source)
        casa.run("casacore_side.py", "products", directory, source)

    return once(tmp_path_factory, "products", make)


@pytest.fixture(scope="session")
def random_tables(casa: Casa, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Random tables, and what casacore reads from each."""

    def make(directory: Path) -> None:
        answer = casa.run("casacore_side.py", "random", directory, 120)
        (directory / "answer.json").write_text(json.dumps(answer))

    directory = once(tmp_path_factory, "random", make)
    answer: dict[str, Any] = json.loads((directory / "answer.json").read_text())
    return answer


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """Gives a copy that a test may damage."""

    def copy(path: Path) -> Path:
        return Path(shutil.copytree(path, tmp_path / path.name))

    return copy
