"""Runs jobs on this machine, detached: they outlive the daemon, and are found again from their directories alone.

Promises: a job directory appears whole or not at all; run.sh starts at most once per directory; no process is ever
signalled that is not proven to be the job's (boot id and start time, or the job's nonce in its environment); nothing
outside `<work area>/WORK<n>` is written or removed, and never through a symbolic link.

Fails with TransientError where waiting may help (no space, work area not mounted), else with FatalError.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from stagecal.adapters import job_directory as layout
from stagecal.adapters.job_files import JobFiles, boot_id, claim, exists, read, uptime_s, write
from stagecal.adapters.remote_shell import plain
from stagecal.ports import FatalError, JobHandle, JobState, JobStatus, NodeLoad, TransientError


@dataclass(frozen=True)
class LocalNodes:
    """The Nodes port for the one machine that we run on, under the name `node_name` with these labels.

    `wrapper` is the text of the job wrapper. The seconds say how often it looks at the lease, how long it lets a
    job end by itself after TERM, and how long a launched job may show no process before it is looked at closer.
    """

    work_area: Path
    node_name: str
    labels: tuple[str, ...]
    wrapper: bytes
    look_interval_s: float = 30.0
    grace_s: int = 10
    patience_s: float = 10.0

    def loads(self) -> Sequence[NodeLoad]:
        """Return the load average of the last minute per core of this machine. Never raises."""
        try:
            return (NodeLoad(self.node_name, os.getloadavg()[0] / (os.cpu_count() or 1), self.labels),)
        except OSError as error:
            return (NodeLoad(self.node_name, None, self.labels, f"the load cannot be read: {error}"),)

    @property
    def _files(self) -> JobFiles:
        return JobFiles(self.work_area, self.wrapper)

    def prepare(self, job: JobHandle, files: Mapping[str, bytes]) -> None:
        """Make the job directory durably, by one rename; the directory of the same job is left as it is.

        Raises FatalError if something else stands under its name, or a file has a name that cannot be.
        """
        self._check(job)
        self._files.prepare(job, files)

    def launch(self, job: JobHandle, lease_until: datetime) -> None:
        """Start the wrapper, which starts run.sh if nobody claimed the job before. Does not wait for it.

        Raises FatalError if the job was not prepared.
        """
        self._check(job)
        with self._files.trouble(job, "launch"), self._files.opened(job) as directory:
            if directory is None:
                raise FatalError(f"{self.directory(job)} is not there: prepare the job before it is launched")
            if exists(layout.LOCK, directory):
                return
            write(layout.LEASE, layout.lease_text(lease_until), directory)
            write(layout.LAUNCHED, layout.launched_text(layout.LaunchMark(uptime_s(), boot_id())), directory)
            inherited = {name: os.environ[name] for name in layout.INHERITED_VARIABLES if name in os.environ}
            started = subprocess.run(
                layout.launch_arguments(self.look_interval_s, self.grace_s),
                cwd=self.directory(job),
                env={layout.NONCE_VARIABLE: job.nonce, "PATH": os.defpath, **inherited},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                check=False,
            )
            if started.returncode:
                raise TransientError(f"{job.work}: the shell could not start its wrapper (too many processes?)")

    def poll(self, job: JobHandle) -> JobStatus:
        """Return what the job's files and processes say. A launch that came to nothing is closed for ever by it."""
        self._check(job)
        with self._files.trouble(job, "poll"), self._files.opened(job) as directory:
            if directory is None:
                survivors = len(_carriers(job.nonce))
                seen = layout.Sighting(boot_id(), uptime_s(), exists=False, survivors=survivors)
            else:
                seen = _look(job, directory)
                if not seen.locked and layout.is_overdue(seen, patience_s=self.patience_s):
                    claim("unstarted", directory)
                    seen = _look(job, directory)
        return layout.status_of(seen, patience_s=self.patience_s)

    def renew_lease(self, job: JobHandle, until: datetime) -> None:
        """Replace the lease by one rename. Raises FatalError if there is no job directory."""
        self._check(job)
        self._files.renew_lease(job, until)

    def output(self, job: JobHandle) -> str:
        """Return the last mebibyte of the job's terminal output, '' if there is none yet."""
        self._check(job)
        return self._files.output(job)

    def directory(self, job: JobHandle) -> Path:
        """Return the job directory's path. Raises FatalError if the handle cannot be one of ours."""
        self._check(job)
        return self._files.path(job)

    def fetch(self, job: JobHandle, tell: Callable[[int, int], None]) -> Path:
        """Return the job directory: everything is here already."""
        return self.directory(job)

    def cancel(self, job: JobHandle) -> None:
        """Let the wrapper end the job, or, where it is dead, kill what is left of the job; return at once.

        A job that was never launched is closed: its lock is claimed (in a directory of its own if it was not even
        prepared). Calling this again helps against what escaped the first time.
        """
        self._check(job)
        with self._files.trouble(job, "cancel"):
            with self._files.opened(job) as directory:
                prepared = directory is not None
            if not prepared:
                self.prepare(job, {})
            with self._files.opened(job) as directory:
                if directory is None:
                    raise TransientError(f"{self.directory(job)} was removed while the job was being cancelled")
                seen = _look(job, directory)
                if seen.exit_code is not None:
                    return
                write(layout.CANCEL, "", directory)
                if claim("cancelled", directory):
                    return
                if seen.wrapper_alive and seen.wrapper:
                    _signal_wrapper(seen.wrapper)
                elif seen.wrapper or layout.is_overdue(seen, patience_s=self.patience_s):
                    for pid in _carriers(job.nonce):
                        _kill_carrier(pid, job.nonce)

    def clean(self, job: JobHandle) -> None:
        """Remove the job directory: out of sight by one rename, then entry by entry; what is gone is fine.

        Raises FatalError if the job is alive, or if what stands under the name is not its directory.
        """
        if self.poll(job).state is JobState.RUNNING:
            raise FatalError(f"{self.directory(job)} is of a living job: cancel it, and clean when it is proven dead")
        self._files.remove(job)

    def _check(self, job: JobHandle) -> None:
        layout.check_handle(job)
        if job.node != self.node_name:
            raise FatalError(f"{job.work} is a job of {job.node}, but only {self.node_name} is known here")


# --- processes -----------------------------------------------------------------------------------------------------


def _look(job: JobHandle, directory: int) -> layout.Sighting:
    """Return what a job's files and processes show.

    The order makes it true though everything moves: a wrapper makes the lock after `launched`, `pid` before `ended`,
    and `exit` last of all, so whatever is read here implies that what it follows from is read as well.
    """
    locked = exists(layout.LOCK, directory)
    launched = layout.read_launched(read(layout.LAUNCHED, directory))
    ended = layout.read_ended(read(layout.ENDED, directory))
    exit_code = layout.read_exit(read(layout.EXIT, directory))
    wrapper = layout.read_pid(read(layout.PID, directory), job.nonce)
    alive = False
    survivors = 0
    if exit_code is None:
        alive = wrapper is not None and _is_alive(wrapper)
        if not alive and (locked or launched):
            survivors = len(_carriers(job.nonce))
        exit_code = layout.read_exit(read(layout.EXIT, directory))
    if exit_code is not None:
        ended = layout.read_ended(read(layout.ENDED, directory))
    return layout.Sighting(
        boot_id=boot_id(),
        uptime_s=uptime_s(),
        locked=locked,
        launched=launched,
        wrapper=wrapper,
        wrapper_alive=alive,
        exit_code=exit_code,
        ended=plain(ended),
        survivors=survivors,
    )


def _is_alive(process: layout.ProcessIdentity) -> bool:
    """Return whether exactly this process lives: same boot, same start time, no zombie."""
    if process.boot_id != boot_id():
        return False
    try:
        with open(f"/proc/{process.pid}/stat", encoding="utf-8", errors="replace") as file:
            return layout.read_start_time(file.read()) == process.start_time
    except (FileNotFoundError, ProcessLookupError):
        return False


def _carries(pid: int, nonce: str) -> bool:
    """Return whether a living process has the nonce in its environment. What we may not read is not ours."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return f"{layout.NONCE_VARIABLE}={nonce}".encode() in file.read().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False


def _carriers(nonce: str) -> list[int]:
    """Return the processes of this machine, other than this one, that carry the nonce."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    return [pid for pid in pids if pid != os.getpid() and _carries(pid, nonce)]


@contextmanager
def _held(pid: int) -> Iterator[int | None]:
    """Give a handle of a process whose number cannot pass to another one meanwhile; None if there is none."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        yield None
        return
    try:
        yield handle
    finally:
        os.close(handle)


def _signal_wrapper(process: layout.ProcessIdentity) -> None:
    """Tell the wrapper to end its job; a stopped one is woken up."""
    with _held(process.pid) as handle, suppress(ProcessLookupError):
        if handle is not None and _is_alive(process):
            signal.pidfd_send_signal(handle, signal.SIGTERM)
            signal.pidfd_send_signal(handle, signal.SIGCONT)


def _kill_carrier(pid: int, nonce: str) -> None:
    with _held(pid) as handle, suppress(ProcessLookupError):
        if handle is not None and _carries(pid, nonce):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
