"""The wheel, installed into a fresh environment and used far from the checkout: it works alone."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

RESOURCES = ("templates", "etc", "systemd")
PROGRAMS = ("trigger-calms", "stagecalms", "stagecal")
# Renders without any value: a template may then miss one, but must be a template, with filters that exist.
PARSE_ALL = """
import json, jinja2
from stagecal.adapters.templates import JinjaTemplates
from stagecal.ports import FatalError
from stagecal.resources import resource
templates = JinjaTemplates(resource("templates"))
# pip compiles each .py file that it installs.
names = [name for name in templates.names() if "__pycache__" not in name]
faults = {}
for name in names:
    try:
        templates.render(name)
    except FatalError as error:
        if not isinstance(error.__cause__, jinja2.UndefinedError):
            faults[name] = str(error)
print(json.dumps({"names": names, "faults": faults}))
"""

pytestmark = pytest.mark.timeout(600)


def files_below(directory: Path) -> set[str]:
    return {
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="session")
def wheel(checkout: Path, made_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """The wheel of this checkout."""

    def build(directory: Path) -> None:
        # The build system is in the test environment; another environment fetches its own.
        isolation = ["--no-isolation"] if importlib.util.find_spec("hatchling") else []
        done = subprocess.run(
            [sys.executable, "-m", "build", "--wheel", *isolation, "--outdir", directory, checkout],
            cwd=directory,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    (path,) = made_once("wheel", build).iterdir()
    return path


@pytest.fixture(scope="session")
def installed(wheel: Path, made_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """An environment that holds the wheel and its dependencies, and nothing else."""

    def install(directory: Path) -> None:
        # Programs begin with the path of their interpreter: the environment is made where it stays.
        environment = directory.with_name("an environment")
        subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", environment], timeout=120, check=True)
        done = subprocess.run(
            [sys.executable, "-m", "pip", "--python", environment, "install", "--quiet", wheel],
            cwd=directory,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    return made_once("installed", install).with_name("an environment")


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(installed: Path, tmp_path: Path) -> Run:
    """A function that runs a program of the environment in an empty directory."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def do(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [installed / "bin" / program, *map(str, arguments)],
            cwd=elsewhere,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=500,  # `init` may have to make the CASA worker environment first.
            check=False,
        )

    return do


def test_the_wheel_holds_each_template_query_and_unit_of_the_checkout(checkout: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for resource in RESOURCES:
        expected = {f"stagecal/_resources/{resource}/{name}" for name in files_below(checkout / resource)}
        assert expected
        assert {name for name in names if name.startswith(f"stagecal/_resources/{resource}/")} == expected


def test_the_wheel_holds_the_package_and_nothing_else(checkout: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if "/_resources/" not in name and ".dist-info/" not in name}
    assert names == {f"stagecal/{name}" for name in files_below(checkout / "stagecal")}


def test_the_programs_of_the_package_are_the_promised_ones(checkout: Path) -> None:
    with (checkout / "pyproject.toml").open("rb") as file:
        assert set(tomllib.load(file)["project"]["scripts"]) == set(PROGRAMS)


def test_what_runs_is_the_installed_package(run: Run, checkout: Path) -> None:
    done = run("python", "-c", "import stagecal; print(stagecal.__file__)")
    assert "site-packages" in done.stdout
    assert not done.stdout.startswith(str(checkout) + os.sep)


def test_the_dependencies_are_declared_completely(run: Run) -> None:
    code = (
        "import importlib, json, pkgutil, stagecal\n"
        "faults = {}\n"
        "for module in pkgutil.walk_packages(stagecal.__path__, 'stagecal.'):\n"
        "    try:\n"
        "        importlib.import_module(module.name)\n"
        "    except Exception as error:\n"
        "        faults[module.name] = repr(error)\n"
        "print(json.dumps(faults))\n"
    )
    done = run("python", "-c", code)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {}


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_is_given_outside_the_checkout(run: Run, program: str) -> None:
    done = run(program, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage" in done.stdout.lower()


def test_init_makes_a_complete_site(run: Run, tmp_path: Path) -> None:
    site = tmp_path / "a site"
    done = run("stagecal", "init", site)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (site / "stagecal.toml").is_file()
    assert (site / "archive.db").is_file()
    for directory in ("triggers", "mail", "work", "preview", "state"):
        assert (site / directory).is_dir(), directory


def test_each_template_of_the_wheel_is_one(run: Run, checkout: Path) -> None:
    done = run("python", "-c", PARSE_ALL)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["faults"] == {}
    assert set(answer["names"]) == files_below(checkout / "templates")


def test_each_query_of_the_wheel_is_found(run: Run, checkout: Path) -> None:
    code = (
        "import json\n"
        "from stagecal.adapters.archive_queries import load_queries\n"
        "from stagecal.resources import resource\n"
        "load_queries(resource('etc', 'queries'), None)\n"
        "print(json.dumps(sorted(path.name for path in resource('etc', 'queries').iterdir())))\n"
    )
    done = run("python", "-c", code)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == sorted(path.name for path in (checkout / "etc" / "queries").iterdir())
