"""Fixtures of the tests that run CASA: its worker, a store of real data with their first calibration, and jobs."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from casa_jobs import FIRST, MOUS, SESSION_OF, make_job, sanitized, unit_of_tests

from stagecal.casa_worker import casa_environment, find_casa_worker
from stagecal.embedded import make_store


@pytest.fixture(scope="session")
def casa_python() -> Path:
    """The Python of the CASA worker environment."""
    python = find_casa_worker()
    if python is None:
        message = "no CASA worker environment: `make demo` makes one, or set STAGECAL_CASA_WORKER to its Python"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return python


@pytest.fixture(scope="session")
def in_worker(casa_python: Path) -> Callable[..., Any]:
    """A function that runs a Python text in the worker with arguments, and returns the JSON that it prints last."""

    def run(text: str, *arguments: object) -> Any:
        done = subprocess.run(
            [casa_python, "-s", "-c", text, *map(str, arguments)],
            env=casa_environment(casa_python),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


# What a job should make of it: the first calibration, split. And an imported measurement set, never calibrated.
EXPECTED = """
import os, sys
ebs, sys.argv = sys.argv[1:], sys.argv[:1]
import casatasks
os.mkdir("expected")
os.mkdir("imported")
for eb in ebs:
    casatasks.mstransform(vis="calibrated/%s.ms" % eb, outputvis="expected/%s.ms.split.cal" % eb, spw="0,1",
                          datacolumn="corrected", keepflags=True, reindex=False)
casatasks.importasdm(asdm="raw/" + ebs[0], vis="imported/%s.ms" % ebs[0], lazy=False, bdfflags=False)
"""


@pytest.fixture(scope="session")
def store(casa_python: Path, made_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """A store with one MOUS, made by CASA; beside it `calibrated`, `expected` and `imported` measurement sets."""

    def make(directory: Path) -> None:
        make_store(directory, [unit_of_tests()])
        program = [casa_python, "-E", "-s", directory / "make_example_data.py", "--keep-calibrated"]
        subprocess.run([*program, directory, MOUS], timeout=120, check=True)
        ebs = [sanitized(uid) for uid in (FIRST, *(uid for uid in SESSION_OF if uid != FIRST))]
        environment = casa_environment(casa_python)
        words = [casa_python, "-s", "-c", EXPECTED, *ebs]
        subprocess.run(words, env=environment, cwd=directory, timeout=120, check=True, capture_output=True)

    return made_once("casa-store", make)


@pytest.fixture(scope="session")
def run_job(casa_python: Path, store: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function that makes a job directory, runs the job to its end and returns how it ended."""

    def run(directory: Path, **choices: Any) -> subprocess.CompletedProcess[str]:
        script = make_job(directory, casa_python, store, **choices)
        # A different current directory and a home that does not exist: the job must depend on neither.
        environment = {**os.environ, "HOME": str(directory.parent / "no-home")}
        return subprocess.run(
            [script], cwd="/", env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    return run
