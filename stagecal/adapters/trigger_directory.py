"""The trigger directory on disk: listed and read through one directory handle, written so that readers see whole files.

Nobody who can write the directory is trusted: entries are opened without following links and without waiting for
the other end of a pipe. A listing is complete or it is a TransientError; a trigger appears by one hard link, and
what is refused moves to `rejected/` with its reason written first. Nothing outside the directory is ever touched.
"""

from __future__ import annotations

import errno
import hashlib
import os
import pwd
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path

from stagecal.domain.identifiers import Malformed, is_control
from stagecal.domain.trigger import MAXIMUM_BYTES, parse_trigger_name, trigger_name
from stagecal.ports import DirectoryIdentity, FatalError, Listing, TransientError, TriggerEntry, UsageError

REJECTED = "rejected"
_PREFIX = "trigger"
_RESERVED_SUFFIX = ".reserved"
_REASON_SUFFIX = ".reason.txt"
_SECONDS_TRIED = 60
_RESERVATION_LIFE = timedelta(hours=1)
_FILE_MODE = 0o664  # The group, which is all of the regional-centre staff, may withdraw a trigger.
_DIRECTORY_MODE = 0o775
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_WRITE = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_NEEDS_A_PERSON = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ELOOP)
_UNREADABLE = {
    errno.EACCES: "it cannot be read: permission denied",
    errno.EPERM: "it cannot be read: permission denied",
    # It was exchanged since it was asked what it is.
    errno.ELOOP: "it is a symbolic link, not a file",
    errno.ENXIO: "it is a socket or a device, not a file",
}
_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class TriggerDirectory:
    """The Triggers port over a directory that several people and machines share.

    `owners` names the users (login names or numbers) whose files count as requests; empty means anyone's.
    `link` is how a hard link is made: file systems without them answer EPERM or ENOTSUP, and a rename serves then.
    """

    def __init__(self, directory: Path, owners: tuple[str, ...] = (), *, link: Callable[..., None] = os.link) -> None:
        self._directory = directory
        self._owners = owners
        self._owner_ids: frozenset[int] | None = None
        self._link = link
        self._strangers: tuple[str, ...] = ()

    # --- reading ---------------------------------------------------------------------------------------------------

    def look(self) -> Listing:
        """List and read everything that is meant for us: names that begin with "trigger" in any case.

        A file that vanishes meanwhile is left out; one that is seen to change while it is read has the content b""
        (look again). Raises TransientError if the directory cannot be listed completely or was replaced meanwhile,
        FatalError if a configured owner is no user of this machine.
        """
        owner_ids = self._resolved_owners()
        with (
            self._opened() as directory,
            _errors(f"the trigger directory {self._directory} cannot be read", always=True),
        ):
            names = sorted(os.listdir(directory))
            entries = [_entry(directory, name, owner_ids) for name in names if _is_meant_for_us(name)]
            identity = _identity(os.fstat(directory))
            if _identity(os.stat(self._directory)) != identity:
                raise TransientError(f"the trigger directory {self._directory} was replaced while it was read")
        self._strangers = tuple(name for name in names if _is_stranger(name))
        return Listing(identity, tuple(entry for entry in entries if entry is not None))

    def strangers(self) -> tuple[str, ...]:
        """Return the names that the last look passed over: neither triggers, nor hidden, nor `rejected`."""
        return self._strangers

    def _resolved_owners(self) -> frozenset[int]:
        if self._owner_ids is None:
            self._owner_ids = frozenset(map(_user_id, self._owners))
        return self._owner_ids

    @contextmanager
    def _opened(self) -> Iterator[int]:
        with _errors(f"the trigger directory {self._directory} cannot be opened", always=True):
            directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield directory
        finally:
            os.close(directory)

    # --- placing ---------------------------------------------------------------------------------------------------

    def reserve(self, mous: str, at: datetime) -> str:
        """Reserve the name for the first free second at or after `at` and return it.

        The reservation is a hidden file made exclusively, so of two askers each gets a name of its own. Raises
        TransientError if no name is free within a minute or the file cannot be made, FatalError if it may not be.
        """
        with self._opened() as directory, _errors(f"no trigger can be placed in {self._directory}"):
            for second in range(_SECONDS_TRIED):
                name = trigger_name(mous, at + timedelta(seconds=second))
                reserved = False
                try:
                    # Ctrl-C waits for the moment at which we know whether the file is ours to remove.
                    with _uninterrupted():
                        reserved = _made_exclusively(_reserved(name), directory)
                    # Asked only now: whoever held the reservation before us may have published. Network file systems
                    # remember for half a minute that a name was missing, so a listing is asked, not the name.
                    if reserved and name not in os.listdir(directory):
                        return name
                except BaseException:
                    if reserved:
                        os.unlink(_reserved(name), dir_fd=directory)
                    raise
                if reserved:
                    os.unlink(_reserved(name), dir_fd=directory)
        raise TransientError(
            f"{_SECONDS_TRIED} triggers for this MOUS stand in {self._directory} within a minute: try again later"
        )

    def write_reserved(self, name: str, content: bytes) -> None:
        """Write the reserved file durably, readable and writable by the group.

        Raises TransientError if it cannot be written now, FatalError if the reservation is gone.
        """
        _check_trigger_name(name)
        with self._opened() as directory, _errors(f"the trigger {name} cannot be written in {self._directory}"):
            try:
                file = os.open(_reserved(name), _WRITE | os.O_TRUNC, dir_fd=directory)
            except FileNotFoundError:
                raise _reservation_gone(name) from None
            _write_durably(file, content, _FILE_MODE)

    def publish(self, name: str) -> None:
        """Make the reserved file appear under its name, whole, at once, durably.

        Raises TransientError if the name is taken meanwhile or the directory fails, FatalError if the reservation is
        gone.
        """
        _check_trigger_name(name)
        with self._opened() as directory, _errors(f"the trigger {name} cannot be published in {self._directory}"):
            try:
                self._link(_reserved(name), name, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=False)
            except FileNotFoundError:
                raise _reservation_gone(name) from None
            except FileExistsError:
                # A network file system repeats a request whose answer was lost: the name may be our own link.
                if not _same_file(directory, name, _reserved(name)):
                    raise TransientError(f"the name {name} is taken meanwhile: reserve another one") from None
            except OSError as error:
                if error.errno not in _NO_HARD_LINKS:
                    raise
                _publish_by_rename(directory, name)
            # The trigger is visible from here on: what is left of the reservation must not look like a failure.
            with suppress(OSError):
                os.unlink(_reserved(name), dir_fd=directory)
            _sync_directory(directory)

    def abandon(self, name: str) -> None:
        """Remove the reservation; one that is gone already is fine. Raises TransientError or FatalError."""
        _check_trigger_name(name)
        what = f"the reservation of {name} cannot be removed"
        with self._opened() as directory, _errors(what), suppress(FileNotFoundError):
            os.unlink(_reserved(name), dir_fd=directory)

    def discard_stale_reservations(self, now: datetime) -> tuple[str, ...]:
        """Remove reservations that were left behind more than an hour before `now`; return their file names.

        Those that may not be removed stay without a word: they are invisible and hold one second of one MOUS.
        """
        discarded = []
        with self._opened() as directory, _errors(f"the trigger directory {self._directory} cannot be read"):
            for reserved in sorted(os.listdir(directory)):
                if not _is_reservation(reserved):
                    continue
                with suppress(OSError):
                    found = os.stat(reserved, dir_fd=directory, follow_symlinks=False)
                    if now.timestamp() - found.st_mtime > _RESERVATION_LIFE.total_seconds():
                        os.unlink(reserved, dir_fd=directory)
                        discarded.append(reserved)
        return tuple(discarded)

    # --- taking away -----------------------------------------------------------------------------------------------

    def remove(self, name: str, content_sha256: str) -> bool:
        """Remove the trigger if it still has this content, durably; return whether it is gone afterwards.

        Raises TransientError if the directory fails (a directory that is away is no removed trigger), FatalError if
        the trigger may not be removed.
        """
        _check_plain_name(name)
        with self._opened() as directory, _errors(f"the trigger {name} cannot be removed from {self._directory}"):
            entry = _entry(directory, name, frozenset())
            if entry is not None:
                if entry.problem or hashlib.sha256(entry.content).hexdigest() != content_sha256:
                    return False
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=directory)
            _sync_directory(directory)
            return True

    def quarantine(self, name: str, reason: str) -> str:
        """Move an entry of any kind, itself and not what it points to, into `rejected/`; return its name there.

        The reason stands durably beside it before it moves; done again after a crash it gives the same name. Raises
        TransientError if the entry is gone or the directory fails, FatalError if the entry may not be moved.
        """
        _check_plain_name(name)
        with self._opened() as directory, _errors(f"{name!r} cannot be moved to {self._directory / REJECTED}"):
            rejected = _opened_rejected(directory)
            try:
                is_there = name in os.listdir(directory)
                target = _claimed_target(
                    rejected, name, (reason.strip() + "\n").encode(errors="backslashreplace"), is_there
                )
                if target is None:
                    raise TransientError(f"{name!r} is gone from {self._directory}: look again")
                if is_there:
                    _move(directory, name, rejected, target)
                return target
            finally:
                os.close(rejected)


# --- which names ---------------------------------------------------------------------------------------------------


def _is_meant_for_us(name: str) -> bool:
    return name.casefold().startswith(_PREFIX)


def _is_stranger(name: str) -> bool:
    return not (_is_meant_for_us(name) or name.startswith(".") or name == REJECTED)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C and a polite end back for a moment; they take effect at the end of it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _made_exclusively(name: str, directory: int) -> bool:
    """Make an empty file; return whether it is ours, because nobody had made it before."""
    try:
        file = os.open(name, _WRITE | os.O_CREAT | os.O_EXCL, _FILE_MODE, dir_fd=directory)
    except FileExistsError:
        return False
    os.close(file)
    return True


def _reserved(name: str) -> str:
    return f".{name}{_RESERVED_SUFFIX}"


def _is_reservation(name: str) -> bool:
    try:
        parse_trigger_name(name.removeprefix(".").removesuffix(_RESERVED_SUFFIX))
    except Malformed:
        return False
    return name.startswith(".") and name.endswith(_RESERVED_SUFFIX)


def _check_trigger_name(name: str) -> None:
    try:
        parse_trigger_name(name)
    except Malformed as error:
        raise UsageError(str(error)) from error


def _check_plain_name(name: str) -> None:
    if not _is_meant_for_us(name) or "/" in name or "\0" in name:
        raise UsageError(f"{name!r} is no name of an entry of the trigger directory")


def _printable(name: str) -> str:
    """Return the name as it can be stored, logged and mailed: bytes that are no text and controls become `_`."""
    return "".join("_" if is_control(character) else character for character in name)


def _reservation_gone(name: str) -> FatalError:
    return FatalError(f"the reservation of {name} is gone: place the request again")


# --- reading one entry ---------------------------------------------------------------------------------------------


def _entry(directory: int, name: str, owner_ids: frozenset[int]) -> TriggerEntry | None:
    """Return the entry as it is now, None if it is gone. OSError only where the directory itself is in trouble."""
    try:
        # Asked before opening: opening a device or a pipe may already do something to it.
        problem = _problem(os.stat(name, dir_fd=directory, follow_symlinks=False), owner_ids)
    except FileNotFoundError:
        return None
    if not problem and _printable(name) != name:
        problem = "its name has characters that no name of a trigger has"
    return TriggerEntry(name, problem=problem) if problem else _read(directory, name, owner_ids)


def _problem(found: os.stat_result, owner_ids: frozenset[int]) -> str:
    kind = stat.S_IFMT(found.st_mode)
    if kind != stat.S_IFREG:
        return f"it is {_KINDS.get(kind, 'something else')}, not a file"
    if found.st_size > MAXIMUM_BYTES:
        return f"it is larger than {MAXIMUM_BYTES // 1024} KiB"
    if owner_ids and found.st_uid not in owner_ids:
        return f"its owner, {_user_name(found.st_uid)}, is not among those who may place requests"
    return ""


def _read(directory: int, name: str, owner_ids: frozenset[int]) -> TriggerEntry | None:
    try:
        file = os.open(name, _READ, dir_fd=directory)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno not in _UNREADABLE:
            raise
        return TriggerEntry(name, problem=_UNREADABLE[error.errno])
    try:
        before = os.fstat(file)
        problem = _problem(before, owner_ids)
        if problem:
            return TriggerEntry(name, problem=problem)
        content = bytearray()
        while len(content) <= MAXIMUM_BYTES and (part := os.read(file, MAXIMUM_BYTES + 1 - len(content))):
            content += part
        after = os.fstat(file)
    finally:
        os.close(file)
    if after.st_nlink == 0:
        return None
    problem = _problem(after, owner_ids)
    if problem:
        return TriggerEntry(name, problem=problem)
    # Half of an old and half of a new content must not be taken for a request.
    if after.st_size != len(content) or after.st_mtime_ns != before.st_mtime_ns:
        return TriggerEntry(name)
    return TriggerEntry(name, bytes(content))


def _user_id(owner: str) -> int:
    if owner.isascii() and owner.isdigit():
        return int(owner)
    try:
        return pwd.getpwnam(owner).pw_uid
    except KeyError:
        raise FatalError(f"the owner {owner!r} of [triggers] owners is no user of this machine") from None


def _user_name(user_id: int) -> str:
    try:
        return pwd.getpwuid(user_id).pw_name
    except KeyError:
        return str(user_id)


# --- writing -------------------------------------------------------------------------------------------------------


def _write_durably(file: int, content: bytes, mode: int) -> None:
    """Write the content to the open file, sync and close it."""
    try:
        with suppress(PermissionError):
            os.fchmod(file, mode)  # The umask of a login shell would keep the group out.
        view = memoryview(content)
        while view:
            view = view[os.write(file, view) :]
        os.fsync(file)
    finally:
        os.close(file)


def _sync_directory(directory: int) -> None:
    try:
        os.fsync(directory)
    except OSError as error:
        # Some network file systems cannot sync a directory and say so.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def _same_file(directory: int, one: str, other: str) -> bool:
    found = [os.stat(name, dir_fd=directory, follow_symlinks=False) for name in (one, other)]
    return _identity(found[0]) == _identity(found[1])


def _publish_by_rename(directory: int, name: str) -> None:
    # Others who place triggers the same way are kept out by the reservation, so looking first is enough.
    if name in os.listdir(directory):
        raise TransientError(f"the name {name} is taken meanwhile: reserve another one")
    os.rename(_reserved(name), name, src_dir_fd=directory, dst_dir_fd=directory)


def _opened_rejected(directory: int) -> int:
    with suppress(FileExistsError):
        os.mkdir(REJECTED, _DIRECTORY_MODE, dir_fd=directory)
        _sync_directory(directory)
    rejected = os.open(REJECTED, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    with suppress(PermissionError):
        os.fchmod(rejected, _DIRECTORY_MODE)
    return rejected


def _move(directory: int, name: str, rejected: int, target: str) -> None:
    try:
        os.rename(name, target, src_dir_fd=directory, dst_dir_fd=rejected)
    except FileNotFoundError:
        # A network file system that lost its first answer says so after a rename that worked.
        if target not in os.listdir(rejected):
            os.unlink(target + _REASON_SUFFIX, dir_fd=rejected)
            raise
    _sync_directory(rejected)
    _sync_directory(directory)


def _claimed_target(rejected: int, name: str, reason: bytes, is_there: bool) -> str | None:
    """Write the reason beside a free name and return that name.

    If the entry is not there any more, return the name under which it was moved before, or None.
    """
    base = _printable(name).encode()[:200].decode(errors="ignore")
    taken = set(os.listdir(rejected))
    number = 0
    while True:
        target = f"{base}-{number}" if number else base
        number += 1
        reason_file = target + _REASON_SUFFIX
        reason_is_ours = reason_file in taken and _has_content(rejected, reason_file, reason)
        if not is_there:
            if target in taken and reason_is_ours:
                return target
            if target not in taken and reason_file not in taken:
                return None
            continue
        if target in taken or (reason_file in taken and not reason_is_ours):
            continue
        if not reason_is_ours:
            file = os.open(reason_file, _WRITE | os.O_CREAT | os.O_EXCL, _FILE_MODE, dir_fd=rejected)
            _write_durably(file, reason, _FILE_MODE)
            _sync_directory(rejected)
        return target


def _has_content(directory: int, name: str, content: bytes) -> bool:
    entry = _entry(directory, name, frozenset())
    return entry is not None and not entry.problem and entry.content == content


# --- small things --------------------------------------------------------------------------------------------------


def _identity(found: os.stat_result) -> DirectoryIdentity:
    return DirectoryIdentity(found.st_dev, found.st_ino)


@contextmanager
def _errors(what: str, *, always: bool = False) -> Iterator[None]:
    """Turn an OSError into the port's errors; with `always`, each of them is worth another try."""
    try:
        yield
    except OSError as error:
        message = f"{what}: {error.strerror or error}"
        if error.errno in _NEEDS_A_PERSON and not always:
            raise FatalError(message) from error
        raise TransientError(message) from error
