"""The wrapper by itself, under every shell that is here, with nothing on its PATH but a twenty years old userland;
and what its files mean to the adapters that read them."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from stagecal.adapters import job_directory as layout
from stagecal.ports import FatalError, JobHandle, JobState, JobStatus

WRAPPER = Path(__file__).resolve().parents[1] / "templates" / "job" / "wrapper.sh"
USERLAND = ("sh", "date", "grep", "mkdir", "mv", "setsid", "sleep")
SHELLS = {
    name: (path, *options)
    for name, options in {"dash": (), "bash": ("--posix",), "ksh": (), "mksh": (), "busybox": ("sh",)}.items()
    if (path := shutil.which(name))
}
NONCE = "0123456789abcdef"
BOOT = "11111111-2222-4333-8444-555555555555"


def until(condition: Callable[[], bool], what: str, seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for: {what}"
        time.sleep(0.01)


@dataclass
class Directory:
    """A job directory, and the wrappers that a test started in it."""

    path: Path
    shell: tuple[str, ...]
    search_path: Path
    nonce: str = field(default_factory=lambda: secrets.token_hex(8))
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def job(self, script: str, *, lease: object = 4_000_000_000, executable: bool = True) -> None:
        (self.path / "run.sh").write_text(script)
        (self.path / "run.sh").chmod(0o755 if executable else 0o644)
        if lease is not None:
            self.lease(lease)

    def lease(self, content: object) -> None:
        (self.path / "lease.test").write_text(f"{content}\n")
        (self.path / "lease.test").rename(self.path / "lease")

    def start(self) -> subprocess.Popen[bytes]:
        with (self.path / "output").open("ab") as output:
            process = subprocess.Popen(
                [*self.shell, "./wrapper.sh", "0.1", "1"],
                cwd=self.path,
                env={"STAGECAL_NONCE": self.nonce, "PATH": str(self.search_path)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def read(self, name: str) -> str | None:
        path = self.path / name
        return path.read_text().strip() if path.exists() else None

    def carriers(self) -> list[int]:
        """Return the living processes that have the nonce in their environment."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                try:
                    environment = (entry / "environ").read_bytes()
                except OSError:
                    continue
                if f"STAGECAL_NONCE={self.nonce}".encode() in environment.split(b"\0"):
                    found.append(int(entry.name))
        return found

    def appears(self, name: str) -> None:
        until((self.path / name).exists, name)


@pytest.fixture(params=SHELLS.keys())
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Directory]:
    search_path = tmp_path / "bin"
    search_path.mkdir()
    for tool in USERLAND:
        found = shutil.which(tool)
        assert found, f"{tool} is missing on this machine"
        (search_path / tool).symlink_to(found)
    path = tmp_path / 'WORK 1 "$(exit)" *'
    path.mkdir()
    shutil.copy(WRAPPER, path / "wrapper.sh")
    directory = Directory(path, SHELLS[request.param], search_path)
    yield directory
    for pid in directory.carriers():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for process in directory.started:
        process.wait()
    until(lambda: not directory.carriers(), "the last process of the job")


LIVE = "#!/bin/sh\n: > live\nwhile [ ! -e go ]; do sleep 0.05; done\nexit 6\n"


def test_it_tells_who_it_is_and_how_the_job_ended(directory: Directory) -> None:
    directory.job(LIVE)
    wrapper = directory.start()
    directory.appears("live")
    start_time = Path(f"/proc/{wrapper.pid}/stat").read_text().rpartition(") ")[2].split()[19]
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert directory.read("pid") == f"{wrapper.pid} {start_time} {boot} {directory.nonce}"
    assert directory.read("exit") is None
    (directory.path / "go").touch()
    assert wrapper.wait(10) == 0
    assert (directory.read("exit"), directory.read("ended"), directory.read("output")) == ("6", None, "")


def test_a_second_wrapper_starts_nothing(directory: Directory) -> None:
    directory.job("echo once >> count\n" + LIVE)
    directory.start()
    directory.appears("live")
    assert directory.start().wait(10) == 0
    (directory.path / "go").touch()
    directory.appears("exit")
    assert directory.start().wait(10) == 0
    assert (directory.read("count"), directory.read("exit")) == ("once", "6")


def test_whoever_has_the_lock_keeps_the_job_from_starting(directory: Directory) -> None:
    directory.job("echo ran > ran\n")
    (directory.path / "lock").mkdir()
    assert directory.start().wait(10) == 0
    assert (directory.read("ran"), directory.read("pid"), directory.read("exit")) == (None, None, None)


@pytest.mark.parametrize("first_line", ["", "#!/bin/sh\n"])
@pytest.mark.parametrize("executable", [True, False])
def test_run_sh_needs_neither_first_line_nor_the_right_to_be_executed(
    directory: Directory, first_line: str, executable: bool
) -> None:
    directory.job(f"{first_line}exit 9\n", executable=executable)
    directory.start().wait(10)
    assert directory.read("exit") == "9"


def test_a_job_without_run_sh_fails(directory: Directory) -> None:
    directory.lease(4_000_000_000)
    directory.start().wait(10)
    assert directory.read("exit") not in {None, "0"}


@pytest.mark.parametrize("lease", [None, "", "soon", 0, 1_000_000_000])
def test_without_a_lease_that_is_valid_now_the_job_is_ended(directory: Directory, lease: object) -> None:
    directory.job(LIVE, lease=lease)
    directory.start().wait(10)
    assert (directory.read("ended"), directory.read("exit")) == ("lease", "143")


def test_a_lease_that_cannot_be_read_counts_as_the_one_before(directory: Directory) -> None:
    directory.job("#!/bin/sh\n: > live\nsleep 0.6\nexit 6\n")
    wrapper = directory.start()
    directory.appears("live")
    directory.lease("")
    wrapper.wait(10)
    assert (directory.read("ended"), directory.read("exit")) == (None, "6")


def test_cancel_is_found_without_any_signal(directory: Directory) -> None:
    directory.job(LIVE)
    wrapper = directory.start()
    directory.appears("live")
    (directory.path / "cancel").touch()
    wrapper.wait(10)
    assert (directory.read("ended"), directory.read("exit")) == ("cancelled", "143")


def test_cancelled_before_the_start_nothing_runs(directory: Directory) -> None:
    directory.job("echo ran > ran\n")
    (directory.path / "cancel").touch()
    directory.start().wait(10)
    assert (directory.read("ended"), directory.read("ran")) == ("cancelled", None)


def test_a_signal_ends_the_job_within_the_grace_even_if_it_ignores_it(directory: Directory) -> None:
    directory.job("#!/bin/sh\ntrap '' TERM\n" + LIVE)
    wrapper = directory.start()
    directory.appears("live")
    wrapper.terminate()
    wrapper.wait(10)
    assert (directory.read("ended"), directory.read("exit")) == ("signal", "137")
    assert directory.carriers() == []


def test_a_job_that_ends_itself_well_when_asked_tells_its_own_status(directory: Directory) -> None:
    directory.job("#!/bin/sh\ntrap 'exit 12' TERM\n" + LIVE)
    wrapper = directory.start()
    directory.appears("live")
    wrapper.terminate()
    wrapper.wait(10)
    assert (directory.read("ended"), directory.read("exit")) == ("signal", "12")


def test_a_hangup_means_nothing(directory: Directory) -> None:
    directory.job(LIVE)
    wrapper = directory.start()
    directory.appears("live")
    os.killpg(wrapper.pid, signal.SIGHUP)
    (directory.path / "go").touch()
    wrapper.wait(10)
    assert directory.read("exit") == "6"


def test_the_watcher_ends_the_job_of_a_killed_wrapper(directory: Directory) -> None:
    directory.job(LIVE)
    wrapper = directory.start()
    directory.appears("live")
    wrapper.kill()
    until(lambda: directory.carriers() in ([], [wrapper.pid]), "the end of the job")
    assert (directory.read("ended"), directory.read("exit")) == ("wrapper", None)


def test_an_end_that_cannot_be_written_is_tried_again(directory: Directory) -> None:
    directory.job(LIVE)
    obstacle = directory.path / "exit.wrapper"
    obstacle.mkdir()
    wrapper = directory.start()
    directory.appears("live")
    (directory.path / "go").touch()
    until(lambda: len(directory.carriers()) <= 2, "the end of run.sh")
    assert wrapper.poll() is None
    obstacle.rmdir()
    wrapper.wait(10)
    assert directory.read("exit") == "6"


def test_only_the_processes_of_the_same_nonce_are_ended(directory: Directory) -> None:
    directory.job("exit 0\n")
    with subprocess.Popen(["sleep", "300"], env={**os.environ, "STAGECAL_NONCE": directory.nonce + "0"}) as other:
        directory.start().wait(10)
        assert directory.read("exit") == "0"
        assert other.poll() is None
        other.kill()


# --- what the files mean -------------------------------------------------------------------------------------------

LOOK = layout.Sighting(boot_id=BOOT, uptime_s=1000.0)
WHO = layout.ProcessIdentity(42, 7, BOOT, NONCE)
OTHER_BOOT = BOOT.replace("1", "9")
FRESH = layout.LaunchMark(995.0, BOOT)
STALE = layout.LaunchMark(990.0, BOOT)
BEFORE = layout.LaunchMark(999.0, OTHER_BOOT)

MEANINGS = {
    "no directory": (replace(LOOK, exists=False), JobState.NOT_STARTED, ""),
    "no directory, but processes": (replace(LOOK, exists=False, survivors=1), JobState.RUNNING, "1 process"),
    "prepared": (LOOK, JobState.NOT_STARTED, ""),
    "about to start": (replace(LOOK, launched=FRESH), JobState.RUNNING, "starting"),
    "claimed by the wrapper": (replace(LOOK, launched=FRESH, locked=True), JobState.RUNNING, "starting"),
    "late, not yet claimed": (replace(LOOK, launched=STALE), JobState.RUNNING, "starting"),
    "late, its processes live": (replace(LOOK, launched=STALE, locked=True, survivors=2), JobState.RUNNING, "2 proc"),
    "late and nothing lives": (replace(LOOK, launched=STALE, locked=True), JobState.LOST, "wrapper died"),
    "launched before the reboot": (replace(LOOK, launched=BEFORE, locked=True), JobState.LOST, "wrapper died"),
    "claimed, never launched": (replace(LOOK, locked=True), JobState.LOST, "never started"),
    "cancelled before the launch": (replace(LOOK, locked=True, ended="cancelled"), JobState.LOST, "cancelled"),
    "runs": (replace(LOOK, locked=True, launched=STALE, wrapper=WHO, wrapper_alive=True), JobState.RUNNING, ""),
    "is being ended": (
        replace(LOOK, wrapper=WHO, wrapper_alive=True, ended="lease"),
        JobState.RUNNING,
        "being ended: its lease ran out",
    ),
    "wrapper dead, processes alive": (
        replace(LOOK, wrapper=WHO, survivors=3),
        JobState.RUNNING,
        "without its wrapper, 3 process",
    ),
    "all dead": (replace(LOOK, wrapper=WHO), JobState.LOST, "process 42 is gone"),
    "node rebooted": (replace(LOOK, wrapper=replace(WHO, boot_id=OTHER_BOOT)), JobState.LOST, "started anew"),
    "ended by its lease": (replace(LOOK, wrapper=WHO, exit_code=143, ended="lease"), JobState.LOST, "lease ran out"),
    "ended, reason unknown": (replace(LOOK, wrapper=WHO, exit_code=1, ended="odd"), JobState.LOST, "odd"),
}


@pytest.mark.parametrize(("seen", "state", "detail"), MEANINGS.values(), ids=MEANINGS.keys())
def test_what_a_look_means(seen: layout.Sighting, state: JobState, detail: str) -> None:
    status = layout.status_of(seen, patience_s=10)
    assert status.state is state
    assert detail in status.detail
    assert status.exit_code is None


def test_only_an_end_that_the_job_told_itself_is_exited() -> None:
    seen = replace(LOOK, locked=True, wrapper=WHO, exit_code=3)
    assert layout.status_of(seen, patience_s=10) == JobStatus(JobState.EXITED, 3)


@pytest.mark.parametrize(
    ("text", "start_time"),
    [
        ("42 (sh) S 1 42 42 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 777 9 9\n", 777),
        ("42 (a) Z (b c) R 1 42 42 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 778 9 9\n", 778),
        ("42 (sh) Z 1 42 42 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 777 9 9\n", None),
        ("42 (sh) X 1 42 42 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 777 9 9\n", None),
    ],
)
def test_the_start_time_follows_any_name_and_a_zombie_is_dead(text: str, start_time: int | None) -> None:
    assert layout.read_start_time(text) == start_time


def test_what_we_write_we_read() -> None:
    mark = layout.LaunchMark(123.45, BOOT)
    assert layout.read_launched(layout.launched_text(mark)) == mark
    assert layout.read_launched(None) is None
    assert layout.read_pid(f"42 7 {BOOT} {NONCE}\n", NONCE) == WHO
    assert layout.read_pid(None, NONCE) is None
    assert layout.read_pid("", NONCE) is None
    assert (layout.read_exit("137\n"), layout.read_exit(""), layout.read_exit(None)) == (137, None, None)


def test_a_lease_is_never_shorter_than_asked_for() -> None:
    assert layout.lease_text(datetime(2022, 3, 1, 12, 0, 0, 1, tzinfo=UTC)) == "1646136001\n"
    assert layout.lease_text(datetime(2022, 3, 1, 12, tzinfo=UTC)) == "1646136000\n"


@pytest.mark.parametrize(
    "read",
    [
        lambda: layout.read_pid("42 7\n", NONCE),
        lambda: layout.read_pid(f"42 7 {BOOT} {NONCE}x\n", NONCE),
        lambda: layout.read_exit("-1\n"),
        lambda: layout.read_launched("now\n"),
        lambda: layout.check_handle(JobHandle("a", "WORK1", "short")),
        lambda: layout.check_handle(JobHandle("a", "WORK1", "x;rm -rf $HOME")),
        lambda: layout.check_handle(JobHandle("a", "WORK-1", NONCE)),
    ],
)
def test_nonsense_is_a_fatal_error(read: Callable[[], object]) -> None:
    with pytest.raises(FatalError):
        read()
