"""`stagecal ms lock` as people run it: real processes that hold, wait, and are ended."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stagecal.embedded import make_site
from stagecal.measurement_set.lock import LockTimeout, lock_path, ms_lock

CHECKOUT = Path(__file__).resolve().parents[2]
PATIENCE_S = 20


@pytest.fixture
def ms(tmp_path: Path) -> Path:
    path = tmp_path / "data" / "X.ms"
    path.mkdir(parents=True)
    (path / "table.dat").touch()
    return path


@pytest.fixture
def lock() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """A function that starts `stagecal ms lock` with these words; what is left of it is killed at the end."""
    processes = []
    kept = {name: value for name, value in os.environ.items() if name != "STAGECAL_CONFIG"}

    def starting(*words: object, **changes: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", "from stagecal.cli.main import main; main()", "ms", "lock", *map(str, words)],
            env={**kept, "PYTHONPATH": str(CHECKOUT), **changes},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        return process

    yield starting
    for process in processes:
        # The whole session: the command of a holder that is killed goes on.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=PATIENCE_S)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=PATIENCE_S)
    assert "Traceback" not in err
    return process.returncode, out, err


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def is_locked(path: Path) -> bool:
    try:
        with ms_lock(path, timeout_s=0):
            return False
    except LockTimeout:
        return True


# Says its number, and sleeps.
SLEEP = ("sh", "-c", "echo $$; exec sleep 60")


def test_the_command_runs_under_the_lock_and_its_exit_code_is_ours(ms: Path, lock: Callable[..., object]) -> None:
    look = (
        "import sys\nfrom pathlib import Path\nfrom stagecal.measurement_set.lock import lock_states\n"
        f"print(lock_states(Path({str(ms)!r}))[0].held)\nsys.exit(7)"
    )
    assert ended(lock(ms, "--", sys.executable, "-c", look)) == (7, "True\n", "")
    assert not is_locked(ms)


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["true"], 0),
        (["no-such-program"], 127),
        (["/"], 126),
        (["sh", "-c", "kill -KILL $$"], 128 + signal.SIGKILL),
        (["sh", "-c", "exit 5"], 5),
    ],
)
def test_exit_codes_are_those_that_shells_give(
    ms: Path, lock: Callable[..., subprocess.Popen[str]], command: list[str], code: int
) -> None:
    assert ended(lock(ms, "--", *command))[0] == code


def test_the_words_of_the_command_are_not_ours(ms: Path, lock: Callable[..., subprocess.Popen[str]]) -> None:
    words = ["--list", "--timeout", "x", "--", "-h", "a b", ""]
    code, out, _ = ended(lock("--timeout", "9", ms, "--", "printf", "%s\\n", *words))
    assert (code, out.splitlines()) == (0, words)


@pytest.mark.parametrize(
    "words",
    [
        ["X.ms"],
        ["X.ms", "--"],
        ["--", "true"],
        ["X.ms", "Y.ms", "--", "true"],
        ["--list", "X.ms", "--", "true"],
        ["--timeout", "soon", "X.ms", "--", "true"],
        ["--timeout", "-1", "X.ms", "--", "true"],
    ],
)
def test_wrong_arguments_are_said_in_a_line(
    words: list[str], lock: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    code, out, err = ended(lock(*words))
    assert (code, out, err.count("\n")) == (2, "", 1)


def test_who_comes_too_late_is_told_who_holds_it(ms: Path, lock: Callable[..., subprocess.Popen[str]]) -> None:
    holder = lock(ms, "--", *SLEEP)
    said(holder)
    code, out, err = ended(lock(ms, "--timeout", "0.2", "--", "echo", "never"))
    assert (code, out) == (5, "")
    waiting, over = err.splitlines()
    assert waiting.startswith("stagecal ms lock: waiting: ")
    assert f"{ms} is in use (waited 0.2 s); its lock is held by pid {holder.pid} on " in over
    assert over.endswith(": sh -c 'echo $$; exec sleep 60'")
    assert is_locked(ms), "the holder goes on"


def test_who_waits_runs_when_the_holder_has_ended(ms: Path, lock: Callable[..., subprocess.Popen[str]]) -> None:
    holder = lock(ms, "--", *SLEEP)
    child = int(said(holder))
    waiter = lock(ms, "--", "echo", "at last")
    assert waiter.stderr is not None
    assert "waiting" in waiter.stderr.readline()
    os.kill(child, signal.SIGTERM)
    assert ended(waiter)[:2] == (0, "at last\n")
    assert ended(holder)[0] == 128 + signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_reaches_the_command_which_decides(
    ms: Path, lock: Callable[..., subprocess.Popen[str]], number: signal.Signals
) -> None:
    name = number.name.removeprefix("SIG")
    script = f"trap 'echo got it; exit 9' {name}; echo ready; while :; do sleep 0.05; done"
    process = lock(ms, "--", "sh", "-c", script)
    assert said(process) == "ready"
    process.send_signal(number)
    assert ended(process)[:2] == (9, "got it\n")
    assert not is_locked(ms)


def test_a_command_goes_on_under_the_lock_when_we_are_killed(
    ms: Path, lock: Callable[..., subprocess.Popen[str]]
) -> None:
    holder = lock(ms, "--", *SLEEP)
    child = int(said(holder))
    try:
        holder.kill()
        holder.wait()
        assert is_locked(ms)
    finally:
        os.kill(child, signal.SIGKILL)
    end = time.monotonic() + PATIENCE_S
    while is_locked(ms):
        assert time.monotonic() < end


def test_what_a_command_leaves_running_does_not_keep_the_lock(
    ms: Path, lock: Callable[..., subprocess.Popen[str]]
) -> None:
    process = lock(ms, "--", "sh", "-c", "sleep 60 >/dev/null 2>&1 & echo $!")
    left = int(ended(process)[1])
    try:
        assert not is_locked(ms)
        os.kill(left, 0)
    finally:
        os.kill(left, signal.SIGKILL)


def test_holders_are_listed_and_the_dead_are_free(
    ms: Path, tmp_path: Path, lock: Callable[..., subprocess.Popen[str]]
) -> None:
    other = ms.with_name("Y.ms")
    shutil.copytree(ms, other)
    dead, living = lock(ms, "--", *SLEEP), lock(other, "--", *SLEEP)
    child = int(said(dead))
    said(living)
    end = time.monotonic() + PATIENCE_S
    # Both that hold it: the command alone would keep it.
    dead.kill()
    os.kill(child, signal.SIGKILL)
    dead.wait()
    while is_locked(ms):
        assert time.monotonic() < end
    ms.with_name("X.ms.lock").write_text('{"host": "h", "pid": 1, "command": "c", "since": "s"}')
    code, out, err = ended(lock("--list", tmp_path))
    assert (code, err) == (0, "")
    free, held = out.splitlines()
    assert free == f"free  {ms}.lock"
    assert held.startswith(f"held  {other}.lock  by pid {living.pid} on {os.uname().nodename} since 2")
    assert ended(lock("--list", ms, other))[1] == out


def test_listing_what_is_not_there_is_said(tmp_path: Path, lock: Callable[..., subprocess.Popen[str]]) -> None:
    code, out, err = ended(lock("--list", tmp_path / "no.ms"))
    assert (code, out) == (2, "")
    assert "there is no such measurement set" in err


def test_a_measurement_set_that_is_not_there_yet_is_locked_and_said(
    tmp_path: Path, lock: Callable[..., subprocess.Popen[str]]
) -> None:
    code, out, err = ended(lock(tmp_path / "new.ms", "--", "echo", "made"))
    assert (code, out) == (0, "made\n")
    assert "is not there (yet)" in err


@pytest.mark.parametrize("how", ["option", "environment", "configuration"])
def test_the_directory_of_locks_comes_from_the_option_or_the_configuration(
    ms: Path, tmp_path: Path, lock: Callable[..., subprocess.Popen[str]], how: str
) -> None:
    config = make_site(tmp_path / "site")
    locks = tmp_path / "site" / "locks"
    locks.mkdir()
    config.write_text(config.read_text() + '\n[locks]\ndirectory = "locks"\ntimeout_s = 0.2\n')
    changes = {"STAGECAL_CONFIG": str(config)} if how == "environment" else {}
    words = {"option": ["--directory", locks], "configuration": ["--config", config]}.get(how, [])
    assert ended(lock(*words, ms, "--", "true", **changes))[0] == 0
    assert [path.name for path in locks.iterdir()] == [lock_path(ms, locks).name]
    assert not lock_path(ms).exists()
    if how != "option":
        with ms_lock(ms, directory=locks):
            assert ended(lock(*words, ms, "--", "true", **changes))[0] == 5


def test_a_configuration_that_cannot_be_read_is_not_passed_over(
    ms: Path, tmp_path: Path, lock: Callable[..., subprocess.Popen[str]]
) -> None:
    # Its locks may lie elsewhere: another lock than that of everybody else would exclude nobody.
    code, _, err = ended(lock(ms, "--", "true", STAGECAL_CONFIG=str(tmp_path / "no.toml")))
    assert code == 2
    assert "no.toml" in err


def test_where_no_lock_file_can_be_made_nothing_is_run(
    tmp_path: Path, lock: Callable[..., subprocess.Popen[str]]
) -> None:
    code, out, err = ended(lock(tmp_path / "no" / "X.ms", "--", "echo", "ran"))
    assert (code, out) == (5, "")
    assert "cannot be used as lock file" in err
