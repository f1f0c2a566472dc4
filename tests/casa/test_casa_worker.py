"""The CASA worker environment: which one is taken, and how one is made (here of a tiny package instead of CASA)."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from stagecal.casa_worker import casa_environment, ensure_casa_worker, find_casa_worker, requirements_file
from stagecal.ports import FatalError, TransientError, UsageError


@pytest.fixture
def requirements(tmp_path: Path) -> Path:
    """Requirements of one tiny wheel on this disk, so that making the environment needs no network."""
    wheel = tmp_path / "tinycasa-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tinycasa.py", "answer = 42\n")
        archive.writestr("tinycasa-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinycasa\nVersion: 1.0\n")
        archive.writestr(
            "tinycasa-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tinycasa-1.0.dist-info/RECORD", "tinycasa.py,,\n")
    path = tmp_path / "requirements.txt"
    path.write_text(f"{wheel}\n")
    return path


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("STAGECAL", "PIP_"))}
    return kept | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PIP_NO_INDEX": "1"}


def test_a_named_worker_goes_before_the_configured_and_that_before_the_users_own(tmp_path: Path) -> None:
    environ = {"XDG_CACHE_HOME": str(tmp_path)}
    programs = [tmp_path / name for name in ("named", "configured")]
    for path in programs:
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
    named, configured = programs
    assert find_casa_worker(configured, environ | {"STAGECAL_CASA_WORKER": str(named)}) == named
    assert find_casa_worker(configured, environ) == configured
    assert find_casa_worker(None, environ) is None


def test_a_named_worker_that_is_no_program_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\$STAGECAL_CASA_WORKER names .* which is no program"):
        find_casa_worker(None, {"STAGECAL_CASA_WORKER": str(tmp_path / "nothing")})


def test_two_processes_make_one_worker_once(tmp_path: Path, requirements: Path, environ: dict[str, str]) -> None:
    text = (
        "import sys; from pathlib import Path; from stagecal.casa_worker import ensure_casa_worker\n"
        "print(ensure_casa_worker(requirements=Path(sys.argv[1]), progress=sys.stderr, imports=['tinycasa']))"
    )
    environ = environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", text, requirements],
            env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    ends = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    paths = {Path(output.strip()) for output, _ in ends}
    assert len(paths) == 1
    told = "".join(errors for _, errors in ends)
    assert told.count("making the CASA worker environment") - told.count("another process is making") == 1
    assert told.count("tinycasa 1.0") == 1
    (python,) = paths
    assert python == find_casa_worker(None, environ, requirements=requirements)
    assert subprocess.check_output([python, "-c", "import tinycasa; print(tinycasa.answer)"], text=True) == "42\n"
    assert not list((tmp_path / "cache" / "stagecal").glob(".*part*"))


def test_other_packages_make_another_worker_and_comments_do_not(
    tmp_path: Path, requirements: Path, environ: dict[str, str]
) -> None:
    def place() -> Path:
        with pytest.raises(TransientError, match=r"needs .* GiB"):
            ensure_casa_worker(
                requirements=requirements, progress=(shown := io.StringIO()), environ=environ, needed_bytes=1 << 62
            )
        assert shown.getvalue() == ""
        return max(
            (tmp_path / "cache" / "stagecal").glob(".casa-worker-*.lock"), key=lambda path: path.stat().st_ctime_ns
        )

    plain = place()
    requirements.write_text(f"# why\n\n{requirements.read_text()}")
    assert place() == plain
    requirements.write_text(f"{requirements.read_text()}six\n")
    assert place() != plain


def test_packages_that_no_index_has_need_a_person(tmp_path: Path, environ: dict[str, str]) -> None:
    missing = tmp_path / "missing.txt"
    missing.write_text("stagecal-no-such-package==1.0\n")
    environ = environ | {"PIP_CONFIG_FILE": os.devnull}
    with pytest.raises(FatalError, match=r"see .*\.log: ERROR: .*stagecal-no-such-package"):
        ensure_casa_worker(requirements=missing, progress=io.StringIO(), environ=environ, imports=["six"])
    assert find_casa_worker(None, environ, requirements=missing) is None
    names = sorted(path.suffix for path in (tmp_path / "cache" / "stagecal").iterdir())
    assert names == [".lock", ".log"], "nothing but the lock and the log stays"


def test_a_network_that_is_away_is_told_from_a_missing_package(tmp_path: Path, environ: dict[str, str]) -> None:
    missing = tmp_path / "missing.txt"
    missing.write_text("stagecal-no-such-package==1.0\n")
    del environ["PIP_NO_INDEX"]
    environ |= {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0"}
    with pytest.raises(TransientError, match="check the network"):
        ensure_casa_worker(requirements=missing, progress=io.StringIO(), environ=environ, imports=["six"])


def test_a_worker_that_cannot_import_casa_is_not_kept(requirements: Path, environ: dict[str, str]) -> None:
    with pytest.raises(
        FatalError, match=r"cannot import CASA, see .*: ModuleNotFoundError: No module named 'casatasks'"
    ):
        ensure_casa_worker(requirements=requirements, progress=io.StringIO(), environ=environ)
    assert find_casa_worker(None, environ, requirements=requirements) is None


def test_a_cache_directory_that_is_none_is_trouble_of_the_surroundings(
    tmp_path: Path, requirements: Path, environ: dict[str, str]
) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(TransientError, match="cannot be made in"):
        ensure_casa_worker(requirements=requirements, progress=io.StringIO(), environ=environ)


def test_the_display_of_a_terminal_is_one_line_and_an_orphaned_worker_is_made_anew(
    requirements: Path, environ: dict[str, str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def ensure(progress: io.StringIO) -> Path:
        return ensure_casa_worker(requirements=requirements, progress=progress, environ=environ, imports=["tinycasa"])

    python = ensure(terminal := Terminal())
    lines = terminal.getvalue().split("\n")
    assert lines[0].startswith("making the CASA worker environment")
    assert "\r\x1b[K" in lines[1]
    assert lines[1].endswith("the CASA worker environment is ready")
    # A Python of the system that was upgraded away leaves a dangling link.
    for link in python.parent.glob("python*"):
        link.unlink()
    assert find_casa_worker(None, environ, requirements=requirements) is None
    assert ensure(plain := io.StringIO()) == python
    assert any(line.endswith(" s  tinycasa 1.0") for line in plain.getvalue().splitlines())
    assert ensure(silent := io.StringIO()) == python
    assert silent.getvalue() == "", "one that is complete is taken without a word"


def test_casa_runs_under_our_site_configuration_whatever_home_says(casa_python: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / ".casa").mkdir(parents=True)
    environ = casa_environment(casa_python, {**os.environ, "HOME": str(home), "PYTHONPATH": "/nonexistent"})
    assert "PYTHONPATH" not in environ
    assert Path(environ["CASASITECONFIG"]).is_absolute()
    text = "import casatools; print('imported')"
    done = subprocess.run(
        [casa_python, "-c", text], env=environ, cwd=home, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "imported", "")
    assert [path.name for path in home.rglob("*")] == [".casa"], "no log, no history, no data were written"


def test_every_package_of_the_worker_has_a_fixed_version() -> None:
    lines = [line.partition("#")[0].strip() for line in requirements_file().read_text().splitlines()]
    assert all("==" in line.partition(";")[0] for line in lines if line)
    assert {"casatools", "casatasks", "python-casacore"} <= {line.partition("==")[0] for line in lines}
