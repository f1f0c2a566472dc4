"""Serialized access to a measurement set, across processes and across the nodes that share its file system.

Promises: at most one holder of a measurement set's lock; a dead holder never blocks, because the kernel frees its lock;
a living one is never robbed however long it works; a lock file is never removed, because whoever waits for a removed
file and whoever makes it anew would both get "the" lock. Fails with LockTimeout (it names the holder), LocksDoNotLock
(the file system takes locks without effect, or not at all), LockHeldHere, or MeasurementSetError (no lock file can be
made there).

The lock is an flock on `<measurement set>.lock` beside the measurement set, or on a file in a directory of the site.
It serializes those who use it, and does not touch casacore's own locks in `table.lock`, which deadlock where two
tasks write to one measurement set.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import stat
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from stagecal.measurement_set.errors import MeasurementSetError, one_line

TIMEOUT_S = 3600.0
SUFFIX = ".lock"

_LONGEST_PAUSE_S = 0.1
_NO_LOCKS = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK})
_IN_DIRECTORY = re.compile(r"(?s)(.*)-[0-9a-f]{16}\.lock")
_RECORD_LIMIT = 16384
_COMMAND_LIMIT = 500
# Exit code 0: a second process gets the lock that we hold. 3: it is refused, as it has to be. Else: nobody knows.
_SECOND_PROCESS = """
import fcntl, sys
try:
    stream = open(sys.argv[1], "r+b")
except OSError:
    stream = open(sys.argv[1], "rb")
try:
    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit(3)
"""


class LockTimeout(MeasurementSetError):
    """The measurement set is still in use; the message names who holds its lock."""


class LocksDoNotLock(MeasurementSetError):
    """The file system of the lock file has no locks, or hands one lock to two processes."""


class LockHeldHere(MeasurementSetError):
    """This thread holds the lock already, and would wait for itself for ever."""


@dataclass(frozen=True)
class Holder:
    """Who said that they hold a lock: host, process, what it does, and since when (UTC, ISO 8601)."""

    host: str
    pid: int
    command: str
    since: str

    def __str__(self) -> str:
        return one_line(f"pid {self.pid} on {self.host} since {self.since}: {self.command}")


@dataclass(frozen=True)
class LockState:
    """What is seen of a lock file: whether somebody holds it now, and who said so.

    A holder that died left its record behind: then `held` is False, and `holder` None. `holder` is also None while
    somebody holds the lock who wrote no record, such as flock(1).
    """

    path: Path
    held: bool
    holder: Holder | None = None


@contextlib.contextmanager
def ms_lock(
    path: Path,
    *,
    timeout_s: float = TIMEOUT_S,
    directory: Path | None = None,
    command: str | None = None,
    inherited: bool = False,
) -> Iterator[None]:
    """Hold the lock of the measurement set at `path` (which need not exist yet) within the context.

    Waits up to `timeout_s` seconds; 0 tries once. The lock file lies beside the measurement set, or in `directory`;
    all who share a measurement set must agree on that. `command` tells others what the holder does (the command line
    of this process, if it is None). Child processes do not keep the lock, unless `inherited`: then those that get all
    inheritable descriptors keep it until they end, even if this process is killed.

    Raises LockTimeout, LocksDoNotLock, LockHeldHere, or MeasurementSetError if the lock file cannot be made.
    """
    lock = lock_path(path, directory)
    measurement_set = os.path.realpath(path)
    if _threads.get(measurement_set) == threading.get_ident():
        raise LockHeldHere(f"{measurement_set} is locked by this thread already: lock it once, around all of the work")
    held = _wait(lock, measurement_set, timeout_s)
    try:
        held.record(command if command is not None else _own_command())
        if inherited:
            held.make_inheritable()
        yield
    finally:
        held.release()


def lock_path(path: Path, directory: Path | None = None) -> Path:
    """Return the lock file of the measurement set at `path`: the same for each way to write its path.

    Beside it `<name>.lock`; in `directory` `<name>-<16 hex digits>.lock`, the digits from SHA-256 of its real path.
    Raises MeasurementSetError if the path has no name or one too long for a lock file.
    """
    real = os.path.realpath(path)
    above, name = os.path.split(real)
    if not name:
        raise MeasurementSetError(f"{path} is no measurement set: it cannot be locked")
    if directory is not None:
        digits = hashlib.sha256(os.fsencode(real)).hexdigest()[:16]
        # Far below the 255 bytes that a name may have, also in a script that counts bytes and not letters.
        return Path(os.path.realpath(directory), f"{os.fsdecode(os.fsencode(name)[:100])}-{digits}{SUFFIX}")
    if len(os.fsencode(name)) > 255 - len(SUFFIX):
        raise MeasurementSetError(f"{real}: the name is too long for a lock file beside it: name a directory of locks")
    return Path(above, name + SUFFIX)


def lock_states(path: Path, directory: Path | None = None) -> list[LockState]:
    """Return the state of the lock of a measurement set or of a lock file; or of all lock files below a directory.

    Lock files inside of measurement sets (`table.lock`) are casacore's, and are left alone. Raises MeasurementSetError
    if nothing of that name can be looked at.
    """
    if path.is_dir() and not (path / "table.dat").exists():
        own = lock_path(path, directory)
        return [_state(found) for found in sorted({*_lock_files(path), *([own] if own.exists() else [])})]
    if path.suffix == SUFFIX and path.is_file():
        return [_state(path)]
    lock = lock_path(path, directory)
    if not lock.exists() and not path.exists():
        raise MeasurementSetError(f"{path}: there is no such measurement set, lock file or directory")
    return [_state(lock)]


# --- waiting ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Held:
    """What is open while the lock is held: the lock file and, for want of trust in others, the measurement set."""

    measurement_set: str
    descriptors: tuple[int, ...]
    process: int

    def record(self, command: str) -> None:
        """Write into the lock file who holds it. If that cannot be written, the lock holds all the same."""
        holder = Holder(os.uname().nodename, os.getpid(), command[:_COMMAND_LIMIT], _now())
        text = json.dumps(asdict(holder)) + "\n"
        with contextlib.suppress(OSError):
            os.ftruncate(self.descriptors[0], 0)
            os.pwrite(self.descriptors[0], text.encode(), 0)

    def make_inheritable(self) -> None:
        for descriptor in self.descriptors:
            os.set_inheritable(descriptor, True)
            _close_in_children.discard(descriptor)

    def release(self) -> None:
        """Clear the record and free the lock, also for children that still have it open."""
        if os.getpid() != self.process:
            return
        with contextlib.suppress(OSError):
            os.ftruncate(self.descriptors[0], 0)
        _close(self.descriptors)
        _threads.pop(self.measurement_set, None)


# Which thread of this process holds or tries to take the lock of a measurement set; and what a forked child closes, so
# that it keeps no lock.
_threads: dict[str, int] = {}
_close_in_children: set[int] = set()
# File systems (st_dev) on which a second process was refused.
_proven: set[int] = set()


def _forget_in_child() -> None:
    for descriptor in _close_in_children:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _close_in_children.clear()
    _threads.clear()


os.register_at_fork(after_in_child=_forget_in_child)


def _wait(lock: Path, measurement_set: str, timeout_s: float) -> _Held:
    """Try until we hold the lock. Asking again and again can be ended at any time, in any thread; waiting cannot."""
    start = time.monotonic()
    pause = 0.001
    while (held := _try(lock, measurement_set)) is None:
        left = start + timeout_s - time.monotonic()
        if left <= 0:
            holder = _read_holder(lock)
            who = str(holder) if holder else "somebody who left no name"
            waited = f"waited {timeout_s:g} s" if timeout_s > 0 else "not waited"
            raise LockTimeout(f"{measurement_set} is in use ({waited}); its lock is held by {who}")
        time.sleep(min(pause, left))
        pause = min(2 * pause, _LONGEST_PAUSE_S)
    return held


def _try(lock: Path, measurement_set: str) -> _Held | None:
    """Take the lock if it is free; return None if it is not.

    Threads exclude each other by name: on some file systems (NFS) flock knows processes only.
    """
    if _threads.setdefault(measurement_set, threading.get_ident()) != threading.get_ident():
        return None
    descriptors: list[int] = []
    taken = False
    try:
        _keep(descriptors, _open(lock))
        taken = (
            _flock(descriptors[0], lock) and _is_still(lock, descriptors[0]) and _guard(measurement_set, descriptors)
        )
        if taken:
            _prove(lock, descriptors[0])
    except BaseException:
        taken = False
        raise
    finally:
        if not taken:
            _close(descriptors)
            _threads.pop(measurement_set, None)
    return _Held(measurement_set, tuple(descriptors), os.getpid()) if taken else None


def _keep(descriptors: list[int], descriptor: int) -> None:
    descriptors.append(descriptor)
    _close_in_children.add(descriptor)


def _close(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        _close_in_children.discard(descriptor)
        with contextlib.suppress(OSError):
            # Closing alone would not free it while a child has it open.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        with contextlib.suppress(OSError):
            os.close(descriptor)


def _open(lock: Path) -> int:
    """Open the lock file, made if it is not there; never one elsewhere to which a symbolic link leads."""
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        try:
            descriptor = os.open(lock, os.O_RDWR | flags)
        except FileNotFoundError:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | flags, 0o666)
            with contextlib.suppress(OSError):
                # Whoever may write beside it may use it, whatever our umask is.
                os.fchmod(descriptor, os.stat(lock.parent).st_mode & 0o666)
        except OSError as error:
            # The lock file of another user that we may only read can be locked all the same, on most file systems.
            if error.errno not in (errno.EACCES, errno.EROFS):
                raise
            descriptor = os.open(lock, os.O_RDONLY | flags)
    except OSError as error:
        raise MeasurementSetError(
            f"{lock} cannot be used as lock file: {error.strerror}: look at it, or name another directory of locks"
        ) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise MeasurementSetError(f"{lock} cannot be used as lock file: it is no plain file: look what it is")
    return descriptor


def _flock(descriptor: int, lock: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, "?")
        if error.errno in _NO_LOCKS:
            raise LocksDoNotLock(
                f"{lock.parent}: flock fails ({name}): mount the file system with locks (Lustre: -o flock), "
                "or name a directory of locks elsewhere"
            ) from None
        raise MeasurementSetError(f"{lock} cannot be locked: {error.strerror} ({name})") from error
    return True


def _is_still(lock: Path, descriptor: int) -> bool:
    """Return whether the file that we locked is the one that others will find under its name."""
    try:
        named = os.stat(lock, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(named, os.fstat(descriptor))


def _guard(measurement_set: str, descriptors: list[int]) -> bool:
    """Lock the directory of the measurement set too, where that works.

    If somebody removes the lock file while it is held (a clean-up of "stale locks"), the next one makes a new file and
    gets its lock; here it meets the living holder again.
    """
    try:
        _keep(descriptors, os.open(measurement_set, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except OSError:
        return True
    try:
        fcntl.flock(descriptors[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # NFS locks no directories. The lock file is what counts.
    return True


def _prove(lock: Path, descriptor: int) -> None:
    """Raise LocksDoNotLock if another process can take the lock that we hold; asked once for each file system."""
    device = os.fstat(descriptor).st_dev
    if device in _proven or not sys.executable:
        return
    import subprocess

    try:
        second = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _SECOND_PROCESS, lock],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return
    if second.returncode == 0:
        raise LocksDoNotLock(
            f"{lock.parent}: two processes get the same lock: mount the file system with locks (Lustre: -o flock, "
            "NFS: not nolock or local_lock), or name a directory of locks elsewhere"
        )
    if second.returncode == 3:
        _proven.add(device)


# --- who holds it ----------------------------------------------------------------------------------------------------


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _own_command() -> str:
    import shlex

    return shlex.join(sys.argv) if sys.argv and sys.argv[0] else "python"


def _state(lock: Path) -> LockState:
    """Ask the kernel whether the lock is free, by having it shared for a moment; read the holder if it is not."""
    try:
        descriptor = os.open(lock, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return LockState(lock, held=False)
    except OSError as error:
        raise MeasurementSetError(f"{lock} cannot be read: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return LockState(lock, held=True, holder=_read_holder(lock))
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, "?")
        raise LocksDoNotLock(f"{lock.parent}: flock fails ({name}): nobody can say who holds a lock there") from None
    finally:
        os.close(descriptor)
    return LockState(lock, held=False)


def _read_holder(lock: Path) -> Holder | None:
    """Return who says that they hold the lock. Whatever else stands there says nothing."""
    try:
        with open(os.open(lock, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            said = json.loads(file.read(_RECORD_LIMIT))
        return Holder(str(said["host"]), int(said["pid"]), str(said["command"]), str(said["since"]))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _lock_files(directory: Path) -> Iterator[Path]:
    """Yield the lock files of measurement sets below a directory: beside one, or named as in a directory of locks."""
    for above, directories, files in os.walk(directory):
        if "table.dat" in files:
            directories.clear()
            continue
        for name in files:
            path = Path(above, name)
            if not name.endswith(SUFFIX) or path.is_symlink():
                continue
            beside = (path.with_suffix("") / "table.dat").exists()
            if beside or _IN_DIRECTORY.fullmatch(name) or _read_holder(path):
                yield path
