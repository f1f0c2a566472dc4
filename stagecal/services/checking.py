"""What `stagecal doctor` looks at: each check is independent of the others and never raises."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from stagecal.config import Config
from stagecal.ports import FatalError, JobHandle, JobState, Nodes, TransientError, UsageError

_CURE = "mount the file system with locks (Lustre: -o flock, NFS: not nolock or local_lock)"
# Tries to lock a file as a whole (flock, as we do) and another one by bytes (lockf, as casacore does).
_SECOND_PROCESS = """
import errno, fcntl, sys
for lock, path in ((fcntl.flock, sys.argv[1]), (fcntl.lockf, sys.argv[2])):
    try:
        with open(path, "r+b") as stream:
            lock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        print("taken")
    except OSError as error:
        refused = error.errno in (errno.EAGAIN, errno.EACCES)
        print("refused" if refused else errno.errorcode.get(error.errno, "failed"))
"""
# The job that doctor sends to a node. `flock -n FILE PROGRAM...` runs the program under the lock, and is exit code 1 if
# somebody else has it; where there is no flock(1), Python does the same. It holds `of-node` until the job is ended.
_PROBE = """#!/bin/sh
cd "$(dirname "$0")" || exit 1
code='
import fcntl, os, sys
stream = open(sys.argv[1], "r+b")
try:
    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
except EnvironmentError:
    sys.exit(1 if sys.exc_info()[1].errno in (11, 13) else 65)
sys.exit(os.spawnvp(os.P_WAIT, sys.argv[2], sys.argv[2:]))
'
set --
if command -v flock >/dev/null 2>&1; then
    set -- flock -n
else
    for python in python3 python python2; do
        if "$python" -c 'import fcntl' 2>/dev/null; then set -- "$python" -c "$code"; break; fi
    done
fi
if [ $# = 0 ]; then echo untried; exit 0; fi
"$@" alone true
echo "alone $?"
"$@" alone "$@" alone true
echo "second $?"
"$@" of-doctor true
echo "ours $?"
"$@" of-node sh -c 'echo holding; n=0; while [ "$n" -lt 60 ]; do sleep 1; n=$((n + 1)); done'
echo "held $?"
"""
_PROBE_PATIENCE_S = 30.0
_PROBE_LEASE = timedelta(minutes=10)


@dataclass(frozen=True)
class Finding:
    """The outcome of one check: a fault says what is wrong and what to do."""

    name: str
    fault: bool
    text: str


def directory_findings(config: Config) -> Iterator[Finding]:
    """Check that each directory is there, can be written, and that a lock in it really excludes."""
    fetch_area = config.cluster.fetch_area
    for name, directory in (
        ("triggers", config.triggers.directory),
        ("work area", config.cluster.work_area),
        ("fetch area", fetch_area),
        ("staging root", config.staging.root),
        ("state", config.state.directory),
    ):
        if directory is not None:
            yield Finding(name, *_written(directory))
    for name, locked in (
        ("locks in triggers", config.triggers.directory),
        ("locks in work", config.cluster.work_area),
        ("locks in fetched", fetch_area),
        ("locks in staging", config.staging.root),
        ("locks in state", config.state.directory),
        ("locks of MSs", config.locks.directory),
    ):
        if locked is not None and (locked.is_dir() or name == "locks of MSs"):
            yield Finding(name, *_locks_exclude(locked))
    for what, filled in (("staging", config.staging.root), ("what is fetched", fetch_area)):
        if filled is not None and filled.is_dir():
            yield Finding("free space", *_has_room(filled, what, config.staging.reserve_gb))


def _has_room(directory: Path, what: str, reserve_gb: float) -> tuple[bool, str]:
    disk = os.statvfs(directory)
    gigabytes = disk.f_bavail * disk.f_frsize / 1e9
    said = f"{gigabytes:.1f} GB free for {what}"
    if gigabytes >= reserve_gb:
        return False, said
    return True, f"{said}, less than reserve_gb = {reserve_gb:g}: delete or enlarge"


def _written(directory: Path) -> tuple[bool, str]:
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".doctor-") as stream:
            os.fsync(stream.fileno())
    except OSError as error:
        return True, f"{directory}: {error.strerror}: make it, or give the service's user the right to write there"
    return False, str(directory)


def _locks_exclude(directory: Path) -> tuple[bool, str]:
    """Hold locks here, of both kinds, and let another process try to take them, before and after they are freed."""
    try:
        with (
            tempfile.NamedTemporaryFile(dir=directory, prefix=".doctor-") as whole,
            tempfile.NamedTemporaryFile(dir=directory, prefix=".doctor-") as in_bytes,
        ):
            for name, lock, stream in (("flock", fcntl.flock, whole), ("fcntl", fcntl.lockf, in_bytes)):
                try:
                    lock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    word = errno.errorcode.get(error.errno or 0, "?")
                    return True, f"{directory}: {name} fails ({word}): {_CURE}"
            while_held = _another_process(whole.name, in_bytes.name)
            fcntl.flock(whole, fcntl.LOCK_UN)
            fcntl.lockf(in_bytes, fcntl.LOCK_UN)
            when_free = _another_process(whole.name, in_bytes.name)
    except (OSError, subprocess.SubprocessError) as error:
        return True, f"{directory}: locks cannot be tried: {error}"
    for name, refused, taken in zip(("flock", "fcntl"), while_held, when_free, strict=True):
        if refused == "taken":
            return True, f"{directory}: two processes get the same lock ({name}): {_CURE}"
        if (refused, taken) != ("refused", "taken"):
            return True, f"{directory}: {name} in another process: {refused} when held, {taken} when free: {_CURE}"
    return False, f"{directory}: a lock excludes another process"


def _another_process(*paths: str) -> list[str]:
    """Return what becomes of another process that tries these locks: taken, refused, or the name of an error."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _SECOND_PROCESS, *paths],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    words = done.stdout.split()
    return words if len(words) == len(paths) else ["failed"] * len(paths)


def node_lock_findings(config: Config, nodes: Nodes, now: datetime) -> Iterator[Finding]:
    """Check on each node that answers, by a small job in its work area, that locks exclude: two processes of the node,
    and, where the work area is shared, a process there and this one here, in both directions.

    A node that runs on this machine shares its kernel: such a pair proves nothing about two machines.
    """
    for look in nodes.loads():
        if look.load_per_core is None:
            continue
        nonce = secrets.token_hex(16)
        job = JobHandle(look.name, f"WORK{int(nonce[:7], 16)}", nonce)
        try:
            verdict = _probe_node(nodes, job, shared=config.cluster.shared_work_area, lease_until=now + _PROBE_LEASE)
        except (TransientError, FatalError, OSError) as error:
            verdict = True, " ".join(f"locks could not be tried: {error}".split())
        yield Finding(f"locks on {look.name}", *verdict)


def _probe_node(nodes: Nodes, job: JobHandle, *, shared: bool, lease_until: datetime) -> tuple[bool, str]:
    files = {"run.sh": _PROBE.encode(), "alone": b"", "of-node": b"", "of-doctor": b""}
    if not shared:
        # Then nobody here holds it, and nobody here can look.
        del files["of-doctor"]
    nodes.prepare(job, files)
    try:
        if not shared:
            return judge_node_locks(_probe_output(nodes, job, lease_until), None)
        directory = nodes.directory(job)
        with (directory / "of-doctor").open("r+b") as ours, (directory / "of-node").open("r+b") as theirs:
            fcntl.flock(ours, fcntl.LOCK_EX | fcntl.LOCK_NB)
            output = _probe_output(nodes, job, lease_until)
            try:
                fcntl.flock(theirs, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return judge_node_locks(output, "refused")
            return judge_node_locks(output, "taken")
    finally:
        _end(nodes, job)


def _probe_output(nodes: Nodes, job: JobHandle, lease_until: datetime) -> str:
    """Start the job; return what it says once it holds its lock, or has ended."""
    nodes.launch(job, lease_until)
    end = time.monotonic() + _PROBE_PATIENCE_S
    while time.monotonic() < end:
        state = nodes.poll(job).state
        output = nodes.output(job)
        if "holding" in output or state in (JobState.EXITED, JobState.LOST):
            return output
        time.sleep(0.1)
    raise TransientError(f"{job.work} on {job.node} said nothing within {_PROBE_PATIENCE_S:g} s")


def _end(nodes: Nodes, job: JobHandle) -> None:
    end = time.monotonic() + _PROBE_PATIENCE_S
    nodes.cancel(job)
    while nodes.poll(job).state in (JobState.RUNNING, JobState.UNREACHABLE) and time.monotonic() < end:
        time.sleep(0.1)
    nodes.clean(job)


def judge_node_locks(output: str, theirs: str | None) -> tuple[bool, str]:
    """Given what the job on a node said, and whether we got the lock that it held ("taken", "refused", None if we
    could not try), return whether that is a fault, and why."""
    codes = {word: int(code) for word, code in re.findall(r"^(alone|second|ours) (\d+)$", output, re.MULTILINE)}
    if "untried" in output:
        return False, "nobody could try: the node has neither flock(1) nor a Python"
    if codes.get("alone") != 0:
        return True, f"flock fails in its work area (exit code {codes.get('alone', 'unknown')}): {_CURE}"
    if codes.get("second") != 1:
        return True, f"two of its processes get the same lock in its work area: {_CURE}"
    if theirs is None:
        return False, "a lock excludes another process of the node (the work area is not shared)"
    if codes.get("ours") != 1:
        return True, f"it gets a lock that this machine holds in the shared work area: {_CURE}"
    if "holding" not in output or theirs != "refused":
        return True, f"this machine gets a lock that it holds in the shared work area: {_CURE}"
    return False, "a lock excludes another process of the node, and excludes both ways between it and this machine"


def answer_of(name: str, question: Callable[[], str]) -> Finding:
    """Ask something of a port; its errors are faults."""
    try:
        return Finding(name, False, question())
    except (TransientError, FatalError, UsageError, OSError) as error:
        return Finding(name, True, " ".join(str(error).split()))
