"""What `stagecal doctor` looks at: each check is independent of the others and never raises."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from stagecal.config import Config
from stagecal.ports import FatalError, TransientError, UsageError

_LOCK_HOLDER = "import fcntl,sys; fcntl.flock(open(sys.argv[1], 'rb'), fcntl.LOCK_EX | fcntl.LOCK_NB)"


@dataclass(frozen=True)
class Finding:
    """The outcome of one check: a fault says what is wrong and what to do."""

    name: str
    fault: bool
    text: str


def directory_findings(config: Config) -> Iterator[Finding]:
    """Check that each directory is there, can be written, and that a lock in it really excludes."""
    for name, directory in (
        ("triggers", config.triggers.directory),
        ("work area", config.cluster.work_area),
        ("staging root", config.staging.root),
        ("state", config.state.directory),
    ):
        yield Finding(name, *_written(directory))
    for name, directory in (("locks in work", config.cluster.work_area), ("locks in state", config.state.directory)):
        if directory.is_dir():
            yield Finding(name, *_locks_exclude(directory))
    if config.staging.root.is_dir():
        free = os.statvfs(config.staging.root)
        gigabytes = free.f_bavail * free.f_frsize / 1e9
        enough = gigabytes >= config.staging.reserve_gb
        yield Finding(
            "free space",
            not enough,
            f"{gigabytes:.1f} GB free for staging"
            + ("" if enough else f", less than reserve_gb = {config.staging.reserve_gb:g}: delete or enlarge"),
        )


def _written(directory: Path) -> tuple[bool, str]:
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".doctor-") as stream:
            os.fsync(stream.fileno())
    except OSError as error:
        return True, f"{directory}: {error.strerror}: make it, or give the service's user the right to write there"
    return False, str(directory)


def _locks_exclude(directory: Path) -> tuple[bool, str]:
    """Hold a lock here and let another process try to take it."""
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".doctor-") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            word = errno.errorcode.get(error.errno or 0, "?")
            return True, f"{directory}: flock fails ({word}): mount the file system with locks (Lustre: -o flock)"
        other = subprocess.run(
            [sys.executable, "-c", _LOCK_HOLDER, stream.name], capture_output=True, timeout=60, check=False
        )
    if other.returncode == 0:
        return True, f"{directory}: a lock does not exclude another process: mount the file system with locks"
    return False, f"{directory}: a lock excludes another process"


def answer_of(name: str, question: Callable[[], str]) -> Finding:
    """Ask something of a port; its errors are faults."""
    try:
        return Finding(name, False, question())
    except (TransientError, FatalError, UsageError, OSError) as error:
        return Finding(name, True, " ".join(str(error).split()))
