"""Who may watch a trigger directory with a state directory: at most one process on one machine, provably.

On this machine an flock in the state directory decides. Between machines a lease file in the trigger directory
does: its holder rewrites a heartbeat, each holder has a higher fencing number than the one before, and a number can be
claimed once only (a file made exclusively). Heartbeats are written into the very file that the holder made, so one who
was fenced out while it slept can never write over its successor's lease.

A second daemon gets AlreadyRunningError; a holder that was fenced out gets LeaseLostError and must stop before its next
side effect. Clocks of other machines are not trusted: only whether a heartbeat changes while we watch it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import socket
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Self

from stagecal.ports import FatalError, TransientError

LEASE_NAME = ".stagecal-lease"
LOCK_NAME = "watch.lock"
SITE_NAME = "site-id"
_PROBES, _PROBE_S = 10, 0.02
DEFAULT_STALE_S = 90.0
_RECORD_BYTES = 2048  # One write of a fixed size: a reader never sees a short record with an old tail.
_LOOKS_WHILE_WATCHING = 18
_HIGHEST_FENCING = 1 << 53  # A forged lease with a longer number would make names that no file can have.
_ROUNDS = 20
_LOOKS_AT_HALF_WRITTEN = 10
_HALF_WRITTEN_S = 0.05
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class AlreadyRunningError(FatalError):
    """Another daemon watches this trigger directory or uses this state directory; the message says where."""


class LeaseLostError(FatalError):
    """Another daemon holds the lease now: stop before the next side effect."""


@dataclass(frozen=True)
class Process:
    """Which process it is, also after its number was given to another one or the machine was started anew."""

    host: str
    boot: str
    pid_namespace: str
    pid: int
    started: str

    def is_of_this_machine(self) -> bool:
        """Return whether its number means something here: the same host, boot and pid namespace."""
        here = this_process()
        return (self.host, self.boot, self.pid_namespace) == (here.host, here.boot, here.pid_namespace)


@dataclass(frozen=True)
class Record:
    """What the lease file says. `nonce` is new for each claim, `site` stays with a state directory."""

    process: Process
    site: str
    nonce: str
    fencing: int
    beats: int
    beat_at: str
    released: bool = False


def this_process() -> Process:
    """Return the identity of this process."""
    return Process(
        host=socket.gethostname(),
        boot=_text_of("/proc/sys/kernel/random/boot_id"),
        pid_namespace=_link_of("/proc/self/ns/pid"),
        pid=os.getpid(),
        started=_state_and_start(os.getpid())[1],
    )


def claim(
    trigger_directory: Path,
    state_directory: Path,
    *,
    now: datetime,
    stale_s: float = DEFAULT_STALE_S,
    sleep: Callable[[float], None] = time.sleep,
    flock: Callable[[int, int], None] = fcntl.flock,
) -> Lease:
    """Claim both directories for this process and return the lease.

    A lease of this machine whose process is dead is taken over at once; one of another machine (or container, or of
    an earlier boot) is watched for `stale_s` seconds with `sleep` in between, and taken over only if its heartbeat
    stands still. Raises AlreadyRunningError if another daemon lives, FatalError if the state directory cannot be
    locked, TransientError if the trigger directory cannot be used now.
    """
    lock = _locked(state_directory, flock)
    try:
        site = _site(state_directory)
        mine = Record(this_process(), site, secrets.token_hex(16), 1, 0, now.isoformat())
        record, predecessor = _install(trigger_directory, mine, stale_s, sleep)
    except OSError as error:
        os.close(lock)
        raise TransientError(f"the lease in {trigger_directory} cannot be made: {error.strerror or error}") from error
    except BaseException:
        os.close(lock)
        raise
    return Lease(trigger_directory, lock, record, predecessor, stale_s)


class Lease:
    """The right to watch. `predecessor` says, for the log, whose lease it was before ("" if nobody's).

    The flock is inherited by forked children (not by programs that they start): a forked worker must not outlive
    the daemon.
    """

    def __init__(
        self, trigger_directory: Path, lock: int, record: Record, predecessor: str, stale_s: float = DEFAULT_STALE_S
    ) -> None:
        self._directory = trigger_directory
        self._lock = lock
        self._record = record
        self._stale_s = stale_s
        self.predecessor = predecessor

    @property
    def fencing(self) -> int:
        """The number of this claim; every later claim has a higher one."""
        return self._record.fencing

    def beat(self, now: datetime) -> None:
        """Show that this daemon lives.

        A lease that somebody deleted, or a trigger directory that was replaced by an empty one, is claimed anew.
        Raises LeaseLostError if somebody else's lease stands there, TransientError if the directory is not to be
        reached now (beat again: others take over when no heartbeat arrives for `stale_s`).
        """
        record = replace(self._record, beats=self._record.beats + 1, beat_at=now.isoformat())
        try:
            file = self._opened_own(os.O_RDWR)
            if file is None:
                # The nonce stays: should the lost file come back with its directory, it is still ours.
                record = replace(record, fencing=record.fencing + 1)
                self._record, _ = _install(self._directory, record, self._stale_s, _no_waiting)
                return
            try:
                # If the file was replaced since it was opened, this goes to nobody's file and does no harm.
                os.pwrite(file, _rendered(record), 0)
                os.fsync(file)
            finally:
                os.close(file)
        except OSError as error:
            raise TransientError(
                f"the lease in {self._directory} cannot be renewed: {error.strerror or error}"
            ) from error
        except AlreadyRunningError as error:
            raise LeaseLostError(str(error)) from error
        self._record = record
        self.check()

    def check(self) -> None:
        """Raise LeaseLostError if this lease no longer stands, TransientError if that cannot be seen now."""
        try:
            file = self._opened_own(os.O_RDONLY)
        except OSError as error:
            raise TransientError(f"the lease in {self._directory} cannot be read: {error.strerror or error}") from error
        if file is None:
            raise TransientError(f"the lease in {self._directory} is gone: it is claimed anew at the next heartbeat")
        os.close(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the right back; doing it twice is fine. The file stays, so that fencing numbers only grow."""
        if self._lock < 0:
            return
        with suppress(OSError, LeaseLostError):
            file = self._opened_own(os.O_RDWR)
            if file is not None:
                try:
                    os.pwrite(file, _rendered(replace(self._record, released=True)), 0)
                    os.fsync(file)
                finally:
                    os.close(file)
        # The lock file itself stays: another process may have opened it already and wait to lock that very inode.
        os.close(self._lock)
        self._lock = -1

    def _opened_own(self, mode: int) -> int | None:
        """Return the lease file, opened; None if there is none. Raises LeaseLostError if it is not ours."""
        try:
            file = os.open(self._directory / LEASE_NAME, mode | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            os.stat(self._directory)
            return None
        record = _parsed(os.pread(file, _RECORD_BYTES, 0))
        if record is not None and record.nonce == self._record.nonce:
            return file
        os.close(file)
        holder = "somebody" if record is None else _described(record)
        raise LeaseLostError(f"the trigger directory {self._directory} is watched by {holder} now: this daemon stops")


# --- on this machine -----------------------------------------------------------------------------------------------


def _take(file: int, flock: Callable[[int, int], None]) -> None:
    """Take the lock; a command that looks at this moment whether a daemon runs must not keep one from starting."""
    for _ in range(_PROBES):
        try:
            flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_PROBE_S)
        else:
            return
    flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _locked(state_directory: Path, flock: Callable[[int, int], None]) -> int:
    path = state_directory / LOCK_NAME
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise FatalError(f"{path} cannot be opened: {error.strerror}") from error
    try:
        _take(file, flock)
        me = this_process()
        os.ftruncate(file, 0)
        os.pwrite(file, f"pid {me.pid} on {me.host}\n".encode(), 0)
    except BlockingIOError:
        holder = os.pread(file, 300, 0).decode(errors="replace").strip() or "another process"
        os.close(file)
        raise AlreadyRunningError(f"the state directory {state_directory} is in use by {holder}") from None
    except OSError as error:
        os.close(file)
        if error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL):
            raise FatalError(
                f"the file system of {state_directory} has no working flock ({error.strerror}): "
                "put [state] directory on a local disk"
            ) from error
        raise FatalError(f"{path} cannot be locked: {error.strerror}") from error
    return file


def _site(state_directory: Path) -> str:
    """Return the random identity of the state directory, made at first use. Called under the lock."""
    path = state_directory / SITE_NAME
    with suppress(FileNotFoundError):
        site = path.read_text().strip()
        if site:
            return site
    site = secrets.token_hex(16)
    new = path.with_suffix(".new")
    with new.open("w") as file:
        file.write(site + "\n")
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    return site


def _is_alive(process: Process) -> bool:
    if process.pid <= 0:
        return False
    state, started = _state_and_start(process.pid)
    if started:
        return started == process.started and state not in ("Z", "X")
    # Where /proc hides the processes of others, the kernel still tells whether there is one.
    try:
        os.kill(process.pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return bool(_state_and_start(process.pid)[1])


def _state_and_start(pid: int) -> tuple[str, str]:
    """Return a process's state letter and its start time in clock ticks since boot; empty if it cannot be seen."""
    fields = _text_of(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return (fields[0], fields[19]) if len(fields) >= 20 else ("", "")


def _text_of(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""


def _link_of(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


# --- between machines ----------------------------------------------------------------------------------------------


def _install(directory: Path, mine: Record, stale_s: float, sleep: Callable[[float], None]) -> tuple[Record, str]:
    """Put our lease into the directory under the lowest number that is free from `mine.fencing` on.

    Return it and who held the directory before. Raises AlreadyRunningError or OSError.
    """
    number = mine.fencing
    for _ in range(_ROUNDS):
        found = _content(directory / LEASE_NAME)
        _refuse_if_alive(directory / LEASE_NAME, found, mine, stale_s, sleep)
        former = _parsed(found)
        number = max(number, former.fencing + 1 if former else 1)
        record = replace(mine, fencing=number)
        claimed = directory / f"{LEASE_NAME}.{number}"
        try:
            _create(claimed, record)
        except FileExistsError:
            # Somebody claims the same number right now, or died while doing so; then the next number is free.
            _refuse_if_alive(claimed, _settled_content(claimed, sleep), mine, stale_s, sleep)
            number += 1
            continue
        # Judged again now that the number is ours: whoever had it before us may have finished meanwhile.
        if _claim_of(_content(directory / LEASE_NAME)) != _claim_of(found):
            os.unlink(claimed)
            continue
        os.rename(claimed, directory / LEASE_NAME)
        _sync(directory)
        if _claim_of(_content(directory / LEASE_NAME)) == record.nonce:
            _discard_old_claims(directory, number)
            return record, "" if former is None or former.released else _described(former)
    raise AlreadyRunningError(f"several daemons claim the trigger directory {directory} at once: this one gives up")


def _settled_content(claimed: Path, sleep: Callable[[float], None]) -> bytes:
    """Return a claim's content; one that was only just made gets a moment to be written."""
    for _ in range(_LOOKS_AT_HALF_WRITTEN):
        content = _content(claimed)
        if content or not os.path.lexists(claimed):
            return content
        sleep(_HALF_WRITTEN_S)
    return b""


def _refuse_if_alive(path: Path, found: bytes, mine: Record, stale_s: float, sleep: Callable[[float], None]) -> None:
    """Raise AlreadyRunningError unless what was found is empty, released, or its holder is dead or silent."""
    record = _parsed(found)
    if not found or (record and record.released):
        return
    if record and record.process.is_of_this_machine():
        # A former lease of this very process and state directory: its flock, which we hold now, was given back.
        if (record.process, record.site) == (mine.process, mine.site) or not _is_alive(record.process):
            return
    else:
        for _ in range(_LOOKS_WHILE_WATCHING):
            sleep(stale_s / _LOOKS_WHILE_WATCHING)
            seen = _content(path)
            if seen != found:
                record = _parsed(seen) or record
                break
        else:
            return
        if not seen or (record and record.released):
            return
    holder = "another daemon" if record is None else _described(record)
    raise AlreadyRunningError(f"the trigger directory {path.parent} is watched by {holder}")


def _no_waiting(_seconds: float) -> None:
    """A daemon that has lost its lease file does not wait to see whether another one lives: it takes it as alive."""
    raise AlreadyRunningError("another daemon has claimed the trigger directory meanwhile")


def _create(path: Path, record: Record) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        os.write(file, _rendered(record))
        os.fsync(file)
    except OSError:
        os.unlink(path)
        raise
    finally:
        os.close(file)


def _content(path: Path) -> bytes:
    """Return the file's content, b"" if there is none. Raises FatalError if it is no file."""
    try:
        file = os.open(path, _READ)
    except FileNotFoundError:
        return b""
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise FatalError(f"{path} is no file: remove it") from error
        raise
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise FatalError(f"{path} is no file: remove it")
        return os.pread(file, _RECORD_BYTES, 0)
    finally:
        os.close(file)


def _discard_old_claims(directory: Path, number: int) -> None:
    for name in os.listdir(directory):
        claimed = name.removeprefix(LEASE_NAME + ".")
        if claimed != name and claimed.isascii() and claimed.isdigit() and int(claimed) < number:
            with suppress(OSError):
                os.unlink(directory / name)


def _sync(directory: Path) -> None:
    file = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    except OSError as error:
        # Some network file systems cannot sync a directory and say so.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(file)


def _rendered(record: Record) -> bytes:
    return (json.dumps(asdict(record)).encode() + b"\n").ljust(_RECORD_BYTES)


def _parsed(content: bytes) -> Record | None:
    """Return what the lease says; None for anything that is not a lease, which is then judged by its change alone."""
    try:
        values = json.loads(content)
        process = Process(**values.pop("process"))
        record = Record(process=process, **values)
        types_fit = isinstance(record.fencing, int) and isinstance(process.pid, int) and isinstance(record.nonce, str)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return record if types_fit and 0 < record.fencing < _HIGHEST_FENCING else None


def _claim_of(content: bytes) -> str | bytes:
    """Return what tells one claim from another, whatever its heartbeat."""
    record = _parsed(content)
    return content if record is None else record.nonce


def _described(record: Record) -> str:
    text = f"pid {record.process.pid} on {record.process.host} (last heartbeat {record.beat_at})"
    return "".join(character if character.isprintable() else "?" for character in text[:300])
