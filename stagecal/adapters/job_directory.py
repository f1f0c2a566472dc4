"""The layout of a job directory and what its files say of the job: shared by everything that runs jobs on nodes.

Nothing here reads, writes, or asks the time: an adapter looks (into a directory here or on a far node), this module
tells what the look means. A handle or a file that cannot be is a FatalError.

A job directory `<work area>/WORK<n>` is made whole by one rename and holds, beside the files of the job:

    nonce       whose directory it is
    wrapper.sh  started in it; starts run.sh and tells its end (see its own first lines for lock, pid, exit, ended)
    lease       until when the job may live
    launched    when the wrapper was about to be started: uptime of the node in seconds, its boot id
    cancel      the job has to end, or never to start
    output      everything that the job wrote on its terminal

`lock` decides: a job whose lock nobody has made may be started by a wrapper that is still on its way; a job whose lock
was made by somebody else than a wrapper can never be started.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from stagecal.ports import FatalError, JobHandle, JobState, JobStatus

NONCE = "nonce"
WRAPPER = "wrapper.sh"
LEASE = "lease"
LAUNCHED = "launched"
LOCK = "lock"
PID = "pid"
EXIT = "exit"
ENDED = "ended"
CANCEL = "cancel"
OUTPUT = "output"
RESERVED = frozenset({NONCE, WRAPPER, LEASE, LAUNCHED, LOCK, PID, EXIT, ENDED, CANCEL, OUTPUT})

NONCE_VARIABLE = "STAGECAL_NONCE"
OUTPUT_LIMIT = 1024 * 1024

# What a job inherits of its starter's environment. A daemon's own variables (the service manager's sockets and
# credentials among them) are no business of a job, and a job on a far node would not have them either.
INHERITED_VARIABLES = ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "TZ", "TMPDIR")

# Run by `sh -c` in the job directory; the arguments go to the wrapper. It returns at once and leaves no child behind:
# in the background of a shell without job control setsid becomes the wrapper itself, the leader of a new session.
LAUNCH_COMMAND = f'setsid sh ./{WRAPPER} "$@" </dev/null >>{OUTPUT} 2>&1 &'

REASONS = {
    "lease": "its lease ran out",
    "cancelled": "it was cancelled",
    "signal": "its node told it to end",
    "wrapper": "its wrapper was killed",
    "unstarted": "it never started",
}

_WORK = re.compile(r"WORK[0-9]{1,18}", re.ASCII)
_NONCE = re.compile(r"[0-9A-Za-z_-]{8,128}", re.ASCII)
_FILE_NAME = re.compile(r"(?:[0-9A-Za-z_+][0-9A-Za-z_.+-]*/)?[0-9A-Za-z_+][0-9A-Za-z_.+-]*", re.ASCII)
_PID = re.compile(r"([0-9]{1,10}) ([0-9]{1,20}) ([0-9a-f-]{36}) (\S+)\n?", re.ASCII)
_LAUNCHED = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,9})?) ([0-9a-f-]{36})\n?", re.ASCII)
_EXIT = re.compile(r"([0-9]{1,3})\n?", re.ASCII)


@dataclass(frozen=True)
class ProcessIdentity:
    """Which process it is: its number alone is given away again. `start_time` is in clock ticks after boot."""

    pid: int
    start_time: int
    boot_id: str
    nonce: str


@dataclass(frozen=True)
class LaunchMark:
    """When a wrapper was about to be started: the node's uptime in seconds, and in which of its lives."""

    uptime_s: float
    boot_id: str


@dataclass(frozen=True)
class Sighting:
    """What one look at a job has seen: its files, and the processes of its node.

    `exit_code` must be read again after the processes were looked at. `survivors` counts the living processes that
    carry the job's nonce; it may be left at 0 where `exit_code` or `wrapper_alive` speak already.
    """

    boot_id: str
    uptime_s: float
    exists: bool = True
    locked: bool = False
    launched: LaunchMark | None = None
    wrapper: ProcessIdentity | None = None
    wrapper_alive: bool = False
    exit_code: int | None = None
    ended: str = ""
    survivors: int = 0


def status_of(seen: Sighting, *, patience_s: float) -> JobStatus:
    """Return what a look means. `patience_s` is how long a launched wrapper may need to show itself.

    An end that was put to the job from outside (lease, cancellation, a node going down) is LOST, not EXITED: the job
    did not report it itself, and its status says nothing about the data.
    """
    reason = REASONS.get(seen.ended, seen.ended)
    if seen.exit_code is not None:
        if seen.ended:
            return JobStatus(JobState.LOST, detail=f"{reason} (exit status {seen.exit_code})")
        return JobStatus(JobState.EXITED, seen.exit_code)
    if seen.wrapper_alive:
        return JobStatus(JobState.RUNNING, detail=f"is being ended: {reason}" if reason else "")
    if seen.locked and seen.ended and not seen.wrapper:
        # The end was ruled before a wrapper told its process: what still carries the nonce is a wrapper that comes
        # too late, finds the lock taken, and leaves.
        return JobStatus(JobState.LOST, detail=reason)
    if seen.survivors:
        doing = "without its wrapper" if seen.wrapper else "starting"
        return JobStatus(JobState.RUNNING, detail=f"{doing}, {seen.survivors} process(es) alive")
    if seen.wrapper:
        if reason:
            return JobStatus(JobState.LOST, detail=reason)
        if seen.wrapper.boot_id != seen.boot_id:
            return JobStatus(JobState.LOST, detail="its node was started anew")
        return JobStatus(JobState.LOST, detail=f"process {seen.wrapper.pid} is gone and left no exit status")
    if not seen.exists:
        return JobStatus(JobState.NOT_STARTED, detail="there is no job directory")
    if seen.locked and seen.launched is None:
        return JobStatus(JobState.LOST, detail=REASONS["unstarted"])
    if seen.launched is None:
        return JobStatus(JobState.NOT_STARTED)
    if seen.locked and is_overdue(seen, patience_s=patience_s):
        return JobStatus(JobState.LOST, detail="its wrapper died before it could tell its process")
    return JobStatus(JobState.RUNNING, detail="starting, its wrapper has not shown itself yet")


def is_overdue(seen: Sighting, *, patience_s: float) -> bool:
    """Return whether a launched wrapper should have shown itself by now and did not.

    If the lock is free then, whoever makes it proves that the job never starts.
    """
    if seen.launched is None or seen.wrapper or seen.survivors or seen.exit_code is not None:
        return False
    return seen.launched.boot_id != seen.boot_id or seen.uptime_s - seen.launched.uptime_s >= patience_s


def check_handle(job: JobHandle) -> None:
    """Raise FatalError unless the directory's name and the nonce are of the form that we give."""
    if not _WORK.fullmatch(job.work):
        raise FatalError(f"{job.work!r} is no name of a job directory (WORK and digits): nothing was touched")
    if not _NONCE.fullmatch(job.nonce):
        raise FatalError(f"{job.work}: {job.nonce!r} is no nonce (8 to 128 letters, digits, - or _)")


def check_file_names(job: JobHandle, files: Mapping[str, bytes]) -> None:
    """Raise FatalError if a file of a job would be hidden, lie outside the directory, or take a name of ours."""
    for name in files:
        if not _FILE_NAME.fullmatch(name) or name.partition("/")[0] in RESERVED:
            raise FatalError(f"{job.work}: a job file cannot be called {name!r}")


def launch_arguments(interval_s: float, grace_s: int) -> tuple[str, ...]:
    """Return the command that starts the wrapper in the current directory, detached.

    Given the seconds between two looks at the lease and the whole seconds between TERM and KILL.
    """
    return ("/bin/sh", "-c", LAUNCH_COMMAND, "launch", f"{interval_s:g}", str(grace_s))


def lease_text(until: datetime) -> str:
    """Return the content of `lease`: whole seconds since 1970, never earlier than asked for."""
    return f"{math.ceil(until.timestamp())}\n"


def launched_text(mark: LaunchMark) -> str:
    """Return the content of `launched`."""
    return f"{mark.uptime_s:.2f} {mark.boot_id}\n"


def read_launched(text: str | None) -> LaunchMark | None:
    """Return what `launched` says (None: there is none). Raises FatalError if it is something else."""
    if text is None:
        return None
    match = _LAUNCHED.fullmatch(text)
    if not match:
        raise FatalError(f"the file {LAUNCHED} says {text[:80]!r}: it was damaged, look at the job by hand")
    return LaunchMark(float(match[1]), match[2])


def read_pid(text: str | None, nonce: str) -> ProcessIdentity | None:
    """Return which process the wrapper is (None: it has not told). Raises FatalError if that is nonsense.

    A file of the length 0 is what a crash of the node leaves of one: it tells nothing.
    """
    if not text:
        return None
    match = _PID.fullmatch(text)
    if not match:
        raise FatalError(f"the file {PID} says {text[:80]!r}: it was damaged, look at the job by hand")
    if match[4] != nonce:
        raise FatalError(f"the file {PID} is of another job ({match[4][:40]}): look at the job by hand")
    return ProcessIdentity(int(match[1]), int(match[2]), match[3], match[4])


def read_exit(text: str | None) -> int | None:
    """Return the exit status that the wrapper told, or None if there is none (an empty file tells none either)."""
    if not text:
        return None
    match = _EXIT.fullmatch(text)
    if not match:
        raise FatalError(f"the file {EXIT} says {text[:80]!r}: it was damaged, look at the job by hand")
    return int(match[1])


def read_ended(text: str | None) -> str:
    """Return why the job was ended from outside, '' if it was not."""
    return (text or "").strip()


def read_start_time(stat: str) -> int | None:
    """Return the start time (clock ticks after boot) from the text of /proc/PID/stat; None for a zombie: it is dead."""
    state, *numbers = stat.rpartition(") ")[2].split()
    return None if state in {"Z", "X", "x"} else int(numbers[18])


def decode_output(tail: bytes) -> str:
    """Return the end of a terminal output for people: at most a mebibyte of it, undecodable bytes replaced."""
    return tail[-OUTPUT_LIMIT:].decode("utf-8", errors="replace")
