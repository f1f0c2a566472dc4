"""Fixtures of the tests that run CASA: its worker, a store of real data, and finished jobs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from casa_jobs import FIRST, SECOND, TEMPLATES, make_job, sanitized

from stagecal.casa_worker import casa_environment, find_casa_worker


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


@pytest.fixture(scope="session")
def store(casa_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the raw data of two EBs, made by CASA at first use through the store's own scripts."""
    directory = tmp_path_factory.mktemp("store")
    for source in ("store/fetch_raw.sh", "store/make", "casa/make_example_data.py", "casa/casasiteconfig.py"):
        shutil.copy(TEMPLATES / source, directory)
    (directory / "execution_blocks").write_text(f"{sanitized(FIRST)}\n{sanitized(SECOND)}\n")
    fetched = tmp_path_factory.mktemp("fetched")
    environment = {**os.environ, "STAGECAL_CASA_WORKER": str(casa_python)}
    for uid in (FIRST, SECOND):
        subprocess.run([directory / "fetch_raw.sh", uid], cwd=fetched, env=environment, timeout=120, check=True)
    return directory


@pytest.fixture(scope="session")
def run_job(casa_python: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function that makes a job directory, runs the job to its end and returns how it ended."""

    def run(directory: Path, fetch: Path, **choices: Any) -> subprocess.CompletedProcess[str]:
        script = make_job(directory, casa_python, fetch, **choices)
        # A different current directory and a home that does not exist: the job must depend on neither.
        environment = {**os.environ, "HOME": str(directory.parent / "no-home")}
        return subprocess.run(
            [script], cwd="/", env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    return run
