"""The lock of a measurement set: one holder at a time, whoever dies, however long it takes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stagecal.measurement_set import MeasurementSetError
from stagecal.measurement_set.lock import (
    Holder,
    LockHeldHere,
    LockState,
    LockTimeout,
    lock_path,
    lock_states,
    ms_lock,
)

CHECKOUT = Path(__file__).resolve().parents[2]
PATIENCE_S = 20

# Holds the lock of its first argument, says so, and sleeps.
HOLD = """
import sys, time
from pathlib import Path
from stagecal.measurement_set.lock import ms_lock
with ms_lock(Path(sys.argv[1]), command="a long task"):
    print("holding", flush=True)
    time.sleep(60)
"""

# Appends, so many times, the number after the last one in a journal. Two of these at once write one number twice.
COUNT = """
import os, random, sys, time
from pathlib import Path
from stagecal.measurement_set.lock import ms_lock
path, journal, times = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
for _ in range(times):
    with ms_lock(path, timeout_s=30):
        with open(journal, "rb") as file:
            last = len(file.read().split())
        time.sleep(random.uniform(0, 0.004))
        descriptor = os.open(journal, os.O_WRONLY | os.O_APPEND)
        os.write(descriptor, b"%d\\n" % (last + 1))
        os.close(descriptor)
"""


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """A function that starts a Python text with arguments; what is left of it is killed at the end."""
    processes = []

    def starting(text: str, *arguments: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", text, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield starting
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def ms(tmp_path: Path) -> Path:
    """What looks like a measurement set to those who lock it."""
    path = tmp_path / "data" / "X.ms"
    path.mkdir(parents=True)
    (path / "table.dat").touch()
    (path / "table.lock").write_bytes(bytes(260))
    return path


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def is_locked(path: Path) -> bool:
    try:
        with ms_lock(path, timeout_s=0):
            return False
    except LockTimeout:
        return True


def test_the_lock_file_stands_beside_the_measurement_set_and_stays(ms: Path) -> None:
    with ms_lock(ms):
        assert ms.with_name("X.ms.lock").is_file()
    assert ms.with_name("X.ms.lock").read_bytes() == b""
    assert sorted(path.name for path in ms.iterdir()) == ["table.dat", "table.lock"]


def test_what_does_not_exist_yet_can_be_locked(tmp_path: Path) -> None:
    with ms_lock(tmp_path / "new.ms"):
        assert not (tmp_path / "new.ms").exists()


@pytest.mark.parametrize("directory", [None, "locks"])
def test_each_way_to_write_a_path_gives_the_same_lock(
    ms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, directory: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "locks").mkdir()
    (tmp_path / "linked.ms").symlink_to(ms)
    (tmp_path / "elsewhere").symlink_to(ms.parent)
    (tmp_path / "other-locks").symlink_to("locks")
    ways = ["data/X.ms", "./data/../data/X.ms/", f"{ms}/", "linked.ms", "elsewhere/X.ms"]
    found = {lock_path(Path(way), Path(directory) if directory else None) for way in ways}
    if directory:
        found.add(lock_path(ms, tmp_path / "other-locks"))
    assert len(found) == 1
    with ms_lock(ms, directory=Path(directory) if directory else None):
        assert found.pop().is_file()


def test_a_directory_of_locks_tells_equal_names_apart_and_takes_any_name(tmp_path: Path) -> None:
    locks = tmp_path / "locks"
    locks.mkdir()
    names = ["a/X.ms", "b/X.ms", "Ü" * 120, "-rf", "new\nline", ".."]
    found = [lock_path(tmp_path / name, locks) for name in names]
    assert len(set(found)) == len(names)
    for path in found:
        assert path.parent == locks
        path.touch()


@pytest.mark.parametrize("name", ["/", "x" * 251])
def test_a_path_without_a_possible_lock_file_is_refused(name: str) -> None:
    with pytest.raises(MeasurementSetError):
        lock_path(Path("/") / name)


def test_a_missing_directory_is_said_at_once(tmp_path: Path) -> None:
    with (
        pytest.raises(MeasurementSetError, match="cannot be used as lock file: No such file"),
        ms_lock(tmp_path / "no" / "X.ms"),
    ):
        pass


def test_a_link_in_place_of_the_lock_file_is_not_followed(ms: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    ms.with_name("X.ms.lock").symlink_to(victim)
    with pytest.raises(MeasurementSetError, match="cannot be used as lock file"), ms_lock(ms):
        pass
    assert victim.read_text() == "precious"


def test_taking_it_twice_in_one_thread_is_an_error_and_no_deadlock(ms: Path, tmp_path: Path) -> None:
    with ms_lock(ms):
        for directory in (None, tmp_path):
            with pytest.raises(LockHeldHere, match="locked by this thread already"), ms_lock(ms, directory=directory):
                pass
        assert lock_states(ms)[0].held
    with ms_lock(ms):
        pass


def test_an_error_within_frees_the_lock(ms: Path) -> None:
    with pytest.raises(ZeroDivisionError), ms_lock(ms):
        _ = 1 / 0
    assert not lock_states(ms)[0].held
    assert not is_locked(ms)


def test_threads_exclude_each_other(ms: Path) -> None:
    counter = 0

    def count() -> None:
        nonlocal counter
        for _ in range(10):
            with ms_lock(ms, timeout_s=PATIENCE_S):
                before = counter
                time.sleep(0.0005)
                counter = before + 1

    threads = [threading.Thread(target=count) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert counter == 60


def test_the_time_out_names_the_holder(ms: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    holder = start(HOLD, ms)
    assert said(holder) == "holding"
    begun = time.monotonic()
    with pytest.raises(LockTimeout) as timeout, ms_lock(ms, timeout_s=0.2):
        pass
    assert 0.2 <= time.monotonic() - begun < 5
    words = f"{ms} is in use (waited 0.2 s); its lock is held by pid {holder.pid} on {os.uname().nodename} since "
    assert str(timeout.value).startswith(words)
    assert str(timeout.value).endswith(": a long task")


def test_who_waits_gets_the_lock_when_it_is_freed(ms: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    holder = start(HOLD.replace("time.sleep(60)", "time.sleep(0.3)"), ms)
    assert said(holder) == "holding"
    with ms_lock(ms, timeout_s=PATIENCE_S):
        assert holder.wait(PATIENCE_S) == 0


def test_a_dead_holder_never_blocks_and_is_shown_as_free(ms: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    holder = start(HOLD, ms)
    assert said(holder) == "holding"
    holder.kill()
    holder.wait()
    assert "a long task" in ms.with_name("X.ms.lock").read_text(), "it left its record behind"
    assert lock_states(ms) == [LockState(ms.with_name("X.ms.lock"), held=False, holder=None)]
    with ms_lock(ms, timeout_s=0):
        (state,) = lock_states(ms)
        assert state.holder is not None
        assert state.holder.pid == os.getpid()


def test_a_living_holder_is_not_robbed_however_old_its_lock_file_is(
    ms: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    holder = start(HOLD, ms)
    assert said(holder) == "holding"
    os.utime(ms.with_name("X.ms.lock"), (1, 1))
    with pytest.raises(LockTimeout), ms_lock(ms, timeout_s=0.3):
        pass
    assert ms.with_name("X.ms.lock").stat().st_mtime == 1


def test_a_removed_lock_file_does_not_let_a_second_holder_in(
    ms: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    holder = start(HOLD, ms)
    assert said(holder) == "holding"
    ms.with_name("X.ms.lock").unlink()
    with pytest.raises(LockTimeout), ms_lock(ms, timeout_s=0.3):
        pass
    holder.kill()
    holder.wait()
    with ms_lock(ms, timeout_s=0):
        pass


def test_holders_are_listed(ms: Path, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    free = ms.with_name("Y.ms")
    shutil.copytree(ms, free)
    (tmp_path / "data" / "other.lock").write_text("not ours")
    with ms_lock(free):
        pass
    holder = start(HOLD, ms)
    assert said(holder) == "holding"
    held, other = lock_states(tmp_path)
    assert (held.path.name, held.held) == ("X.ms.lock", True)
    assert held.holder == Holder(
        os.uname().nodename, holder.pid, "a long task", held.holder.since if held.holder else ""
    )
    assert other == LockState(ms.with_name("Y.ms.lock"), held=False)
    assert lock_states(ms) == [held]
    assert lock_states(held.path) == [held]


def test_locks_of_a_directory_of_locks_are_listed(ms: Path, tmp_path: Path) -> None:
    locks = tmp_path / "locks"
    locks.mkdir()
    with ms_lock(ms, directory=locks, command="work"):
        (state,) = lock_states(locks)
        assert state.held
        assert [state] == lock_states(ms, locks)
    assert [one.held for one in lock_states(locks)] == [False]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[1]", b'{"pid": "x"}', b"[" * 100_000, b'"' + b"x" * 50_000])
def test_a_record_that_says_nothing_is_no_holder(ms: Path, content: bytes) -> None:
    with ms_lock(ms):
        ms.with_name("X.ms.lock").write_bytes(content)
        assert lock_states(ms) == [LockState(ms.with_name("X.ms.lock"), held=True, holder=None)]
        with (ms.parent / "X.ms.lock").open("rb") as file:
            assert file.read() == content, "looking changes nothing"


@pytest.mark.parametrize("how", ["os.fork", "subprocess"])
def test_a_child_does_not_keep_the_lock_of_a_killed_holder(
    ms: Path, start: Callable[..., subprocess.Popen[str]], how: str
) -> None:
    begin = {
        "os.fork": "child = os.fork()\n    if child == 0:\n        time.sleep(30); os._exit(0)",
        "subprocess": "child = subprocess.Popen(['sleep', '30']).pid",
    }[how]
    holder = start(
        "import os, subprocess, sys, time\nfrom pathlib import Path\n"
        "from stagecal.measurement_set.lock import ms_lock\n"
        f"with ms_lock(Path(sys.argv[1])):\n    {begin}\n    print(child, flush=True)\n    time.sleep(30)\n",
        ms,
    )
    child = int(said(holder))
    try:
        assert is_locked(ms)
        holder.kill()
        holder.wait()
        with ms_lock(ms, timeout_s=5):
            os.kill(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.requires_root("becomes another user")
def test_the_lock_file_of_another_user_can_be_locked(
    start: Callable[..., subprocess.Popen[str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = Path("/tmp", f"stagecal-lock-{os.getpid()}")
    (directory / "X.ms").mkdir(parents=True)
    try:
        with ms_lock(directory / "X.ms"):
            pass
        (directory / "X.ms.lock").chmod(0o644)
        other = start("import os, subprocess\nfrom stagecal.measurement_set.lock import *\nos.seteuid(65534)\n" + HOLD,
                      directory / "X.ms")  # fmt: skip
        assert said(other) == "holding"
        assert is_locked(directory / "X.ms")
    finally:
        shutil.rmtree(directory)


def test_twenty_processes_and_kills_at_random_leave_never_two_holders_and_nobody_waiting(
    ms: Path, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    journal = tmp_path / "journal"
    journal.touch()
    chance = random.Random(20)
    times = 15
    workers = [start(COUNT, ms, journal, times) for _ in range(20)]
    begun = time.monotonic()
    while journal.stat().st_size == 0:
        assert time.monotonic() < begun + PATIENCE_S
        time.sleep(0.01)
    killed = chance.sample(workers, 8)
    for worker in killed:
        time.sleep(chance.uniform(0, 0.1))
        worker.kill()
        worker.wait()
    codes = [worker.wait(timeout=60) for worker in workers if worker not in killed]
    assert codes == [0] * 12
    numbers = [int(line) for line in journal.read_text().splitlines()]
    assert numbers == list(range(1, len(numbers) + 1))
    done_before_the_kill = sum(worker.returncode == 0 for worker in killed)
    assert len(numbers) >= times * (12 + done_before_the_kill)
    assert any(worker.returncode == -signal.SIGKILL for worker in killed)
    assert not is_locked(ms)


# --- two tasks on one measurement set --------------------------------------------------------------------------------

APPLYCAL = """
import sys
sys.path.insert(0, sys.argv[3])
path, table, serialized = sys.argv[1], sys.argv[2], sys.argv[4] == "serialized"
sys.argv = sys.argv[:1]
import contextlib
from pathlib import Path
import casatasks
from stagecal.measurement_set.lock import ms_lock
print("ready", flush=True)
sys.stdin.readline()
with ms_lock(Path(path), timeout_s=60) if serialized else contextlib.nullcontext():
    casatasks.applycal(path, gaintable=[table])
"""


def two_applycal(casa: Any, products: Path, directory: Path, how: str) -> tuple[list[int], float]:
    """Let two processes calibrate one measurement set at the same time; return their exit codes and the seconds."""
    ms = Path(shutil.copytree(products / "source.ms", directory / "X.ms"))
    command = [casa.python, "-c", APPLYCAL, ms, products / "gains.cal", CHECKOUT, how]
    processes = [
        subprocess.Popen(
            [str(word) for word in command],
            cwd=directory,
            env=casa.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        assert [said(process) for process in processes] == ["ready", "ready"]
        begun = time.monotonic()
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        codes = [process.wait(timeout=200) for process in processes]
        return codes, time.monotonic() - begun
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_two_applycal_on_one_measurement_set_both_succeed_in_seconds(casa: Any, products: Path, tmp_path: Path) -> None:
    codes, seconds = two_applycal(casa, products, tmp_path, "serialized")
    assert codes == [0, 0]
    assert seconds < 30


if os.environ.get("STAGECAL_SHOW_DEADLOCK"):
    # Takes a minute and depends on chance, so that it runs on demand only.
    def test_two_applycal_without_the_lock_show_why_it_is_needed(casa: Any, products: Path, tmp_path: Path) -> None:
        codes, seconds = two_applycal(casa, products, tmp_path, "at once")
        print(f"\ntwo applycal at once: exit codes {codes}, {seconds:.0f} s")
