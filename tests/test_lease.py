"""Who may watch: one daemon for a trigger directory and a state directory, over processes and machines."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from stagecal.adapters.lease import AlreadyRunningError, Lease, LeaseLostError, Process, Record, claim, this_process
from stagecal.ports import FatalError, TransientError

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
LATER = datetime(2026, 3, 1, 12, 0, 30, tzinfo=UTC)

# A daemon that claims at the first line that it reads, says how it went, and gives the lease back at the second.
DAEMON = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from stagecal.adapters.lease import AlreadyRunningError, claim
sys.stdin.readline()
try:
    lease = claim(Path(sys.argv[1]), Path(sys.argv[2]), now=datetime.now(UTC))
except AlreadyRunningError as error:
    print("refused", error, flush=True)
else:
    print("claimed", lease.fencing, flush=True)
    sys.stdin.readline()
    lease.release()
"""


@pytest.fixture
def triggers(tmp_path: Path) -> Path:
    path = tmp_path / "triggers"
    path.mkdir()
    return path


def state(tmp_path: Path, name: str = "state") -> Path:
    path = tmp_path / name
    path.mkdir(exist_ok=True)
    return path


def no_sleep(_seconds: float) -> None:
    pytest.fail("nobody needs to be watched here")


@pytest.fixture
def start(triggers: Path):
    """Start daemons; each waits for a line before it claims and for another one before it ends."""
    daemons: list[subprocess.Popen[str]] = []

    def started(state_directory: Path) -> subprocess.Popen[str]:
        daemon = subprocess.Popen(
            [sys.executable, "-c", DAEMON, str(triggers), str(state_directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        )
        daemons.append(daemon)
        return daemon

    yield started
    for daemon in daemons:
        daemon.kill()
        daemon.communicate(timeout=20)


def go(daemon: subprocess.Popen[str]) -> None:
    assert daemon.stdin is not None
    daemon.stdin.write("\n")
    daemon.stdin.flush()


def answer(daemon: subprocess.Popen[str]) -> str:
    assert daemon.stdout is not None
    return daemon.stdout.readline().strip()


def lease_file(triggers: Path) -> Path:
    return triggers / ".stagecal-lease"


def foreign(beats: int = 5, **changes: object) -> bytes:
    process = Process(host="othernode", boot="other-boot", pid_namespace="pid:[1]", pid=4711, started="99")
    record = Record(process, "another-site", "another-nonce", 7, beats, NOW.isoformat())
    return json.dumps(asdict(replace(record, **changes))).encode()


# --- one machine ---------------------------------------------------------------------------------------------------


def test_a_claim_of_free_directories_succeeds_at_once(triggers, tmp_path):
    lease = claim(triggers, state(tmp_path), now=NOW, sleep=no_sleep)
    assert (lease.fencing, lease.predecessor) == (1, "")
    record = json.loads(lease_file(triggers).read_bytes())
    assert record["process"]["pid"] == os.getpid()
    assert os.listdir(triggers) == [".stagecal-lease"]
    lease.release()


def test_a_second_daemon_on_the_same_state_is_told_who_runs(start, tmp_path):
    daemon = start(state(tmp_path))
    go(daemon)
    assert answer(daemon) == "claimed 1"
    other_triggers = tmp_path / "other-triggers"
    other_triggers.mkdir()
    with pytest.raises(AlreadyRunningError) as caught:
        claim(other_triggers, state(tmp_path), now=NOW, sleep=no_sleep)
    assert f"pid {daemon.pid} on {this_process().host}" in str(caught.value)
    assert os.listdir(other_triggers) == []


def test_a_second_daemon_on_the_same_triggers_is_told_who_runs(start, triggers, tmp_path):
    daemon = start(state(tmp_path))
    go(daemon)
    assert answer(daemon) == "claimed 1"
    with pytest.raises(AlreadyRunningError) as caught:
        claim(triggers, state(tmp_path, "other-state"), now=NOW, sleep=no_sleep)
    assert f"pid {daemon.pid} on {this_process().host}" in str(caught.value)
    # A refused claim holds nothing: its state directory is free for another one.
    free = tmp_path / "free"
    free.mkdir()
    claim(free, state(tmp_path, "other-state"), now=NOW, sleep=no_sleep).release()


@pytest.mark.parametrize("states", [["one", "one"], ["one", "two"]], ids=["same state", "two states"])
def test_of_two_daemons_at_once_exactly_one_wins(start, triggers, tmp_path, states):
    for attempt in range(3):
        daemons = [start(state(tmp_path, name)) for name in states]
        for daemon in daemons:
            go(daemon)
        answers = sorted(map(answer, daemons))
        assert answers[0] == f"claimed {attempt + 1}"
        assert answers[1].startswith("refused")
        assert os.listdir(triggers) == [".stagecal-lease"]
        for daemon in daemons:
            daemon.communicate("\n", timeout=20)


def test_the_lease_of_a_killed_daemon_is_taken_over_at_once(start, triggers, tmp_path):
    daemon = start(state(tmp_path))
    go(daemon)
    assert answer(daemon) == "claimed 1"
    daemon.send_signal(signal.SIGKILL)
    daemon.wait(20)
    with claim(triggers, state(tmp_path, "other-state"), now=NOW, sleep=no_sleep) as lease:
        assert lease.fencing == 2
        assert f"pid {daemon.pid}" in lease.predecessor


def test_a_zombie_counts_as_dead(start, triggers, tmp_path):
    daemon = start(state(tmp_path))
    go(daemon)
    assert answer(daemon) == "claimed 1"
    daemon.kill()
    os.waitid(os.P_PID, daemon.pid, os.WEXITED | os.WNOWAIT)
    with claim(triggers, state(tmp_path), now=NOW, sleep=no_sleep) as lease:
        assert lease.fencing == 2


def test_a_process_number_given_to_another_process_counts_as_dead(triggers, tmp_path):
    lease_file(triggers).write_bytes(foreign(process=replace(this_process(), pid=1, started="1234567890123")))
    with claim(triggers, state(tmp_path), now=NOW, sleep=no_sleep) as lease:
        assert lease.fencing == 8


@pytest.mark.parametrize("pid", [0, -1, 1 << 70])
def test_a_number_that_no_process_has_counts_as_dead(triggers, tmp_path, pid):
    lease_file(triggers).write_bytes(foreign(process=replace(this_process(), pid=pid)))
    claim(triggers, state(tmp_path), now=NOW, sleep=no_sleep).release()


def test_a_released_lease_is_claimed_at_once_with_a_higher_number(triggers, tmp_path):
    for number in (1, 2, 3):
        with claim(triggers, state(tmp_path, f"state-{number}"), now=NOW, sleep=no_sleep) as lease:
            assert (lease.fencing, lease.predecessor) == (number, "")
        lease.release()


def test_the_lock_file_stays_and_the_site_keeps_its_identity(triggers, tmp_path):
    directory = state(tmp_path)
    claim(triggers, directory, now=NOW).release()
    before = ((directory / "watch.lock").stat().st_ino, (directory / "site-id").read_text())
    claim(triggers, directory, now=NOW).release()
    assert ((directory / "watch.lock").stat().st_ino, (directory / "site-id").read_text()) == before


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_state_directory_without_flock_is_refused(triggers, tmp_path, code):
    def flock(_file: int, _operation: int) -> None:
        raise OSError(code, os.strerror(code))

    with pytest.raises(FatalError, match=r"no working flock.*local disk"):
        claim(triggers, state(tmp_path), now=NOW, flock=flock)
    assert os.listdir(triggers) == []


def test_an_error_while_locking_is_no_lock(triggers, tmp_path):
    def flock(_file: int, _operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(FatalError, match="cannot be locked"):
        claim(triggers, state(tmp_path), now=NOW, flock=flock)


def test_missing_directories_are_said_by_name(triggers, tmp_path):
    with pytest.raises(FatalError, match=r"missing.*watch\.lock"):
        claim(triggers, tmp_path / "missing", now=NOW)
    with pytest.raises(TransientError, match="missing"):
        claim(tmp_path / "missing", state(tmp_path), now=NOW)
    claim(triggers, state(tmp_path), now=NOW).release()


# --- several machines ----------------------------------------------------------------------------------------------


class Watching:
    """Stands for the time that passes; may do something at one of the looks."""

    def __init__(self, act: Callable[[], object] | None = None, at_look: int = 3) -> None:
        self.looks, self.seconds = 0, 0.0
        self._act, self._at_look = act, at_look

    def __call__(self, seconds: float) -> None:
        self.looks += 1
        self.seconds += seconds
        if self._act and self.looks == self._at_look:
            self._act()


@pytest.mark.parametrize(
    "process",
    [
        Process("othernode", "other-boot", "pid:[1]", 4711, "99"),
        replace(this_process(), boot="an earlier or another boot"),
        replace(this_process(), pid_namespace="pid:[1]"),  # A container on the same machine.
        replace(this_process(), host="other-container"),
    ],
    ids=["machine", "boot", "pid namespace", "host name"],
)
def test_a_lease_of_elsewhere_is_taken_over_only_when_its_heartbeat_stands_still(triggers, tmp_path, process):
    lease_file(triggers).write_bytes(foreign(process=process))
    watching = Watching()
    with claim(triggers, state(tmp_path), now=NOW, stale_s=40, sleep=watching) as lease:
        assert watching.seconds == pytest.approx(40)
        assert lease.fencing == 8
        assert f"pid {process.pid} on {process.host}" in lease.predecessor


def test_a_lease_of_elsewhere_that_beats_is_left_alone(triggers, tmp_path):
    lease_file(triggers).write_bytes(foreign())
    watching = Watching(lambda: lease_file(triggers).write_bytes(foreign(beats=6)))
    with pytest.raises(AlreadyRunningError, match="pid 4711 on othernode"):
        claim(triggers, state(tmp_path), now=NOW, sleep=watching)
    assert watching.looks == 3
    assert lease_file(triggers).read_bytes() == foreign(beats=6)


def test_a_lease_that_is_released_while_it_is_watched_is_claimed(triggers, tmp_path):
    lease_file(triggers).write_bytes(foreign())
    watching = Watching(lambda: lease_file(triggers).write_bytes(foreign(released=True)))
    claim(triggers, state(tmp_path), now=NOW, sleep=watching).release()
    assert watching.looks == 3


def test_a_lease_that_somebody_else_takes_over_first_is_theirs(triggers, tmp_path):
    lease_file(triggers).write_bytes(foreign())
    watching = Watching(lambda: lease_file(triggers).write_bytes(foreign(nonce="third", fencing=8)), at_look=18)
    with pytest.raises(AlreadyRunningError):
        claim(triggers, state(tmp_path), now=NOW, sleep=watching)
    assert json.loads(lease_file(triggers).read_bytes())["nonce"] == "third"


def test_two_who_find_the_same_stale_lease_do_not_both_get_it(triggers, tmp_path):
    """The second one finishes while the first one still watches: the first one sees a living lease."""
    lease_file(triggers).write_bytes(foreign())
    second: list[Lease] = []

    def act() -> None:
        second.append(claim(triggers, state(tmp_path, "two"), now=NOW, sleep=Watching()))

    with pytest.raises(AlreadyRunningError):
        claim(triggers, state(tmp_path, "one"), now=NOW, sleep=Watching(act, at_look=18))
    second[0].beat(LATER)
    second[0].release()


def test_a_claim_that_died_half_way_blocks_nobody(triggers, tmp_path):
    (triggers / ".stagecal-lease.1").write_bytes(b"")
    (triggers / ".stagecal-lease.2").write_bytes(foreign(process=replace(this_process(), pid=-1)))
    (triggers / ".stagecal-lease.3").write_bytes(foreign())
    with claim(triggers, state(tmp_path), now=NOW, sleep=Watching()) as lease:
        assert lease.fencing == 4
    assert os.listdir(triggers) == [".stagecal-lease"]


@pytest.mark.parametrize(
    "content",
    [b"x", b"{}", b"[]", b"\xff", b'{"process": 3}', b"[" * 100_000, foreign(fencing="7"), foreign(fencing=10**100)],
)
def test_a_file_that_is_no_lease_is_watched_and_then_replaced(triggers, tmp_path, content):
    lease_file(triggers).write_bytes(content)
    watching = Watching()
    with claim(triggers, state(tmp_path), now=NOW, stale_s=90, sleep=watching) as lease:
        assert watching.seconds == pytest.approx(90)
        lease.beat(LATER)


@pytest.mark.timeout(20)
def test_what_is_not_a_file_is_never_followed_or_waited_for(triggers, tmp_path):
    lease_file(triggers).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FatalError, match="no file"):
        claim(triggers, state(tmp_path), now=NOW, sleep=no_sleep)
    lease_file(triggers).unlink()
    os.mkfifo(lease_file(triggers))
    with pytest.raises(FatalError, match="no file"):
        claim(triggers, state(tmp_path), now=NOW, sleep=no_sleep)
    assert not (tmp_path / "elsewhere").exists()


# --- holding it ----------------------------------------------------------------------------------------------------


@pytest.fixture
def lease(triggers: Path, tmp_path: Path):
    with claim(triggers, state(tmp_path), now=NOW, sleep=no_sleep) as lease:
        yield lease


def test_a_heartbeat_changes_what_others_see(lease, triggers):
    before = json.loads(lease_file(triggers).read_bytes())
    lease.beat(LATER)
    after = json.loads(lease_file(triggers).read_bytes())
    assert (before["beats"], after["beats"]) == (0, 1)
    assert after["beat_at"] == LATER.isoformat()
    lease.check()


def test_one_who_was_fenced_out_stops_and_does_not_touch_the_new_lease(lease, triggers, tmp_path):
    new = tmp_path / "new"
    new.write_bytes(foreign())
    new.rename(lease_file(triggers))
    for act in (lease.check, lambda: lease.beat(LATER)):
        with pytest.raises(LeaseLostError, match="pid 4711 on othernode"):
            act()
    lease.release()
    assert lease_file(triggers).read_bytes() == foreign()


def test_a_deleted_lease_is_claimed_anew(lease, triggers):
    lease_file(triggers).unlink()
    with pytest.raises(TransientError):
        lease.check()
    lease.beat(LATER)
    lease.check()
    assert lease.fencing == 2


def test_a_deleted_lease_that_another_one_claimed_is_lost(lease, triggers):
    lease_file(triggers).write_bytes(foreign())
    with pytest.raises(LeaseLostError):
        lease.beat(LATER)


def test_a_directory_that_is_away_is_trouble_and_one_that_returns_is_still_ours(lease, triggers):
    triggers.rename(triggers.with_name("away"))
    for act in (lease.check, lambda: lease.beat(LATER)):
        with pytest.raises(TransientError):
            act()
    triggers.mkdir()  # An empty mount point, or a directory that was made again.
    lease.beat(LATER)
    lease.check()
    (triggers / ".stagecal-lease").unlink()
    triggers.rmdir()
    triggers.with_name("away").rename(triggers)
    lease.check()
    lease.beat(LATER)


def test_a_released_lease_frees_the_state_directory(triggers, tmp_path):
    first = claim(triggers, state(tmp_path), now=NOW, sleep=no_sleep)
    with pytest.raises(AlreadyRunningError):
        claim(triggers, state(tmp_path), now=NOW, sleep=no_sleep)
    first.release()
    first.release()
    claim(triggers, state(tmp_path), now=NOW, sleep=no_sleep).release()
