"""The commands as people run them: real processes, with a terminal or without one, on a site of their own."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import pytest

from stagecal.cli import main as stagecal
from stagecal.cli import trigger_calms
from stagecal.ports import JobHandle, TransientError
from tests.sites import SiteForTests, make_test_site

CHECKOUT = Path(__file__).resolve().parents[2]
MODULES = {"trigger-calms": "trigger_calms", "stagecalms": "stagecalms", "stagecal": "main"}
PATIENCE_S = 30


@dataclass(frozen=True)
class Ended:
    """A command that has ended: its exit code and what it said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What was printed for programs; nothing else may be there."""
        return json.loads(self.out)


def words_for(program: str, *arguments: str) -> list[str]:
    """The command line that starts the program of the checkout."""
    return [sys.executable, "-c", f"from stagecal.cli.{MODULES[program]} import main; main()", *arguments]


def environment(config: Path, **changes: str) -> dict[str, str]:
    """The environment of such a process."""
    kept = {name: value for name, value in os.environ.items() if name not in ("NOTIFY_SOCKET", "WATCHDOG_USEC")}
    return {**kept, "PYTHONPATH": str(CHECKOUT), "STAGECAL_CONFIG": str(config), "PYTHONUTF8": "1", **changes}


def wait_until(holds: Callable[[], object], what: str = "it", seconds: float = PATIENCE_S) -> None:
    """Wait for a real process to get there, for a bounded time."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"{what} did not happen within {seconds} s"
        time.sleep(0.01)


@dataclass
class Commands:
    """Runs commands on a site, and ends those that are left."""

    site: SiteForTests
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def config(self) -> Path:
        return self.site.directory / "stagecal.toml"

    def start(self, program: str, *arguments: str, **changes: str) -> subprocess.Popen[str]:
        """Start a command without a terminal; `changes` are environment variables."""
        process = subprocess.Popen(
            words_for(program, *arguments),
            env=environment(self.config, **changes),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="surrogateescape",
            cwd=self.site.directory,
        )
        self.processes.append(process)
        return process

    def run(self, program: str, *arguments: str, **changes: str) -> Ended:
        """Run a command without a terminal to its end."""
        return self.end(self.start(program, *arguments, **changes))

    def end(self, process: subprocess.Popen[str], number: int = 0) -> Ended:
        """Wait for the end of a command, after sending it a signal if one is named."""
        if number:
            process.send_signal(number)
        out, err = process.communicate(timeout=PATIENCE_S)
        assert "Traceback" not in (err or "") + (out or "")
        return Ended(process.returncode, out or "", err or "")

    def typed(self, answer: str, program: str, *arguments: str) -> Ended:
        """Run a command at a terminal and answer its question."""
        ours, theirs = pty.openpty()
        try:
            process = subprocess.Popen(
                words_for(program, *arguments),
                env=environment(self.config),
                stdin=theirs,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            self.processes.append(process)
            assert process.stderr is not None
            asked = ""
            while not asked.endswith("[y/N] "):
                assert select.select([process.stderr], [], [], PATIENCE_S)[0], "it asked nothing"
                part = os.read(process.stderr.fileno(), 4096).decode()
                assert part, f"it ended without a question: {asked}"
                asked += part
            os.write(ours, f"{answer}\n".encode())
            ended = self.end(process)
        finally:
            os.close(ours)
            os.close(theirs)
        return Ended(ended.code, ended.out, asked + ended.err)

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired, ValueError):
                process.communicate(timeout=5)
        for request in self.site.site.ledger.open_requests():
            if request.holds_slot:
                with contextlib.suppress(TransientError):
                    self.site.site.nodes.cancel(JobHandle(request.node, request.work, request.nonce))


@pytest.fixture
def site(tmp_path: Path) -> SiteForTests:
    """A site whose clock stands at the present time, as the commands see it."""
    return at_present(make_test_site(tmp_path))


def at_present(site: SiteForTests) -> SiteForTests:
    """The same site with its clock at the present time."""
    site.clock.time = datetime.now(UTC)
    return site


@pytest.fixture
def commands(site: SiteForTests) -> Iterator[Commands]:
    made = Commands(site)
    yield made
    made.close()


@pytest.fixture
def commands_on(tmp_path: Path) -> Iterator[Callable[[str], Commands]]:
    """A function that makes a site with an addition to its configuration and returns its commands."""
    made: list[Commands] = []

    def make(addition: str) -> Commands:
        made.append(Commands(at_present(make_test_site(tmp_path, config=addition))))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def call(
    site: SiteForTests, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Ended]:
    """A function that runs `trigger-calms` or `stagecal` in this process: quick, without a terminal."""
    monkeypatch.setenv("STAGECAL_CONFIG", str(site.directory / "stagecal.toml"))
    mains: Mapping[str, Callable[[list[str]], NoReturn]] = {
        "trigger-calms": trigger_calms.main,
        "stagecal": stagecal.main,
    }

    def calling(program: str, *arguments: str) -> Ended:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            mains[program](list(arguments))
        said = capsys.readouterr()
        assert "Traceback" not in said.err + said.out
        assert isinstance(ended.value.code, int)
        return Ended(ended.value.code, said.out, said.err)

    return calling


def everything_below(directory: Path) -> dict[str, tuple[int, int, int, bytes]]:
    """Each entry below a directory with its inode, size, modification time and content."""
    found = {}
    for path in sorted(directory.rglob("*")):
        look = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(directory))] = (look.st_ino, look.st_size, look.st_mtime_ns, content)
    return found
