"""The staging area on a file system: what stands under a token is complete, durable, and never written again.

    <root>/<token>/             published, for the web server: directories 0755, files 0444 (0555 if executable)
    <root>/.incoming/<token>/   being made; its parent is 0700, so that nobody else sees it
    <root>/.expired/<token>/    withdrawn, waiting for its removal; its parent is 0700 too
    <root>/.stagecal-root       the identity of this root

A directory moves between the three places by one rename. Everything is reached from the root through directory
handles that refuse symbolic links and other file systems, so that no name in the root leads outside it.

Errors: TransientError if there is no space, no quota, or a server does not answer; FatalError for anything else that
the disk or a strange entry in the root brings. A token is a secret: messages show its first six digits.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from stagecal.adapters.tarball import DEEPEST, PIECE, copy_whole, disk_error, pack_directory, verify_members
from stagecal.ports import FatalError, SourceVanishedError, StagedFile, TransientError

_TOKEN = re.compile(r"[0-9a-f]{32}")
_NAME = re.compile(r"[A-Za-z0-9_+][A-Za-z0-9_+.,=@:~-]{0,254}")
_INCOMING = ".incoming"
_EXPIRED = ".expired"
_MARKER = ".stagecal-root"
_KEEP = ".donotremove"

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

_NO_LINK_HERE = frozenset({errno.EXDEV, errno.EMLINK, errno.EPERM, errno.EOPNOTSUPP})
_WRITABLE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH
_SMALL = 16 * 1024 * 1024


class FileStagingArea:
    """A StagingArea below one directory, which has to exist and must not itself be a symbolic link.

    `site` is written into the marker of a new root, for people who find it.
    """

    def __init__(self, root: Path, *, site: str = "") -> None:
        self._path = root
        self._site = site

    # --- making a directory ---------------------------------------------------------------------------------

    def free_bytes(self) -> int:
        """Return the free space of the staging file system for us, in bytes."""
        with _in_words("cannot ask for the free space"), self._root() as root:
            space = os.fstatvfs(root)
            return space.f_bavail * space.f_frsize

    def begin(self, token: str) -> None:
        """Make an empty invisible directory for this token; what a broken attempt left is removed.

        Raises FatalError if the token is in use or was withdrawn, TransientError if this is not the known root.
        """
        _refuse_token(token)
        self.identity()
        with _in_words(f"cannot begin {_short(token)}"), self._root() as root:
            if token in os.listdir(root) or token in _hidden_tokens(root, _EXPIRED):
                raise FatalError(f"{_short(token)} was used before: a token belongs to one directory for ever")
            with _parent(root, _INCOMING, make=True) as incoming:
                _remove(incoming, token)
                # A file server may report an error although it made the directory: what stands there counts.
                with suppress(FileExistsError):
                    os.mkdir(token, 0o755, dir_fd=incoming)
                with _opened(incoming, token) as directory:
                    if os.listdir(directory):
                        raise FatalError(f"{_short(token)} is being made by somebody else")
                    os.fchmod(directory, 0o755)
                _sync(incoming)

    def pack(self, token: str, name: str, source: Path) -> StagedFile:
        """Write a tar file of the directory `source` (members below its own name), durably.

        Read back to its last header before it counts. Raises FatalError if `source` holds anything but directories
        and plain files, or changes meanwhile; nothing is left then.
        """

        def fill(output: BinaryIO) -> str:
            packed = pack_directory(source, output)
            verify_members(output, packed.members)
            return packed.sha256

        return self._make(token, name, fill)

    def copy(self, token: str, name: str, source: Path) -> StagedFile:
        """Copy one plain file durably. Raises FatalError if it is no plain file or changes meanwhile."""
        try:
            # Not through a link: a job's output must not choose which file of ours is published.
            opened = os.open(source, _FILE)
        except OSError as error:
            raise disk_error(f"cannot read {source.name!a}", error) from error
        try:
            if not stat.S_ISREG(os.fstat(opened).st_mode):
                raise FatalError(f"cannot copy {source.name!a}: it is no plain file")
            return self._make(token, name, lambda output: _copy(opened, output, ascii(source.name)))
        finally:
            os.close(opened)

    def write(self, token: str, name: str, content: bytes, *, executable: bool = False) -> StagedFile:
        """Write a small file durably."""

        def fill(output: BinaryIO) -> str:
            output.write(content)
            return hashlib.sha256(content).hexdigest()

        return self._make(token, name, fill, 0o555 if executable else 0o444)

    def link(self, token: str, file: StagedFile, source_token: str) -> StagedFile:
        """Hard-link the recorded file of another published token; raises SourceVanishedError if it is not that file.

        It is that file if device, inode, size and modification time are as recorded and nobody made it writable.
        Where the file system grants no link it is copied, and the copy's digest must be the recorded one.
        """
        _refuse_token(token)
        _refuse_token(source_token)
        _refuse_name(file.name)
        place = f"{_short(source_token)}/{file.name}"
        with (
            _in_words(f"cannot link {place} into {_short(token)}"),
            self._root() as root,
            _recorded_file(root, source_token, file, place) as (theirs, source),
        ):
            with self._being_made(root, token) as ours:
                if _link(theirs, ours, file, source, place):
                    _sync(ours)
                    return file
            return self._make(token, file.name, lambda output: _copy_recorded(source, output, file, place))

    def publish(self, token: str) -> None:
        """Let the complete directory appear under its token by one rename, durably. Already published is fine.

        Raises FatalError if there is nothing to publish, if it stands in both places, or if a file in it was not
        finished.
        """
        _refuse_token(token)
        with _in_words(f"cannot publish {_short(token)}"), self._root() as root:
            with _parent(root, _INCOMING, make=True) as incoming:
                try:
                    with _opened(incoming, token) as directory:
                        if _stands(root, token):
                            raise FatalError(f"{_short(token)} is published and being made at once: nothing was moved")
                        _refuse_unfinished(directory, token)
                        os.fchmod(directory, 0o755)
                        _sync(directory)
                        _move(directory, token, incoming, root)
                except FileNotFoundError:
                    if not _stands(root, token):
                        raise FatalError(f"cannot publish {_short(token)}: nothing was begun under it") from None
                _sync(incoming)
            _sync(root)

    def discard(self, token: str) -> None:
        """Remove what an attempt left in the invisible directory of this token."""
        _refuse_token(token)
        with (
            _in_words(f"cannot discard {_INCOMING}/{_short(token)}"),
            suppress(FileNotFoundError),
            self._root() as root,
            _parent(root, _INCOMING) as incoming,
        ):
            _remove(incoming, token)
            _sync(incoming)

    def draft(self, token: str, name: str) -> Path:
        """Return the path of a file of the invisible directory of this token, to be read only."""
        _refuse_token(token)
        return self._path / _INCOMING / token / name

    # --- looking --------------------------------------------------------------------------------------------

    def is_published(self, token: str) -> bool:
        """Return whether the directory stands under its token. Raises FatalError if something else does."""
        _refuse_token(token)
        with _in_words(f"cannot look at {_short(token)}"), self._root() as root:
            return _stands(root, token)

    def read(self, token: str, name: str) -> bytes:
        """Return a small file of a published directory. Raises FileNotFoundError."""
        _refuse_token(token)
        _refuse_name(name)
        place = f"{_short(token)}/{name}"
        with _in_words(f"cannot read {place}"), self._root() as root:
            try:
                with _opened(root, token) as directory:
                    content = _read_small(directory, name)
            except FileNotFoundError:
                content = None
        if content is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), place)
        return content

    def files(self, token: str) -> Mapping[str, tuple[int, int, int, int]]:
        """Return name -> (device, inode, size, modified_ns) of the regular files of a published directory.

        A directory that is gone has none.
        """
        _refuse_token(token)
        found = {}
        with (
            _in_words(f"cannot list {_short(token)}"),
            self._root() as root,
            suppress(FileNotFoundError),
            _opened(root, token) as directory,
        ):
            for name in sorted(os.listdir(directory)):
                with suppress(FileNotFoundError):
                    status = os.lstat(name, dir_fd=directory)
                    if stat.S_ISREG(status.st_mode):
                        found[name] = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        return found

    def tokens(self) -> Sequence[str]:
        """Return the names in the root that look like tokens and are real directories on the root's file system."""
        with _in_words("cannot list the staging root"), self._root() as root:
            return _tokens(root)

    def incoming_tokens(self) -> Sequence[str]:
        """Return the tokens of invisible directories: those being made, and orphans of broken attempts."""
        with _in_words(f"cannot list {_INCOMING}"), self._root() as root:
            return _hidden_tokens(root, _INCOMING)

    def retired_tokens(self) -> Sequence[str]:
        """Return the tokens of withdrawn directories that still wait for `purge`."""
        with _in_words(f"cannot list {_EXPIRED}"), self._root() as root:
            return _hidden_tokens(root, _EXPIRED)

    def is_kept(self, token: str) -> bool:
        """Return whether somebody put a `.donotremove` into the directory (anything of this name counts)."""
        _refuse_token(token)
        with (
            _in_words(f"cannot look into {_short(token)}"),
            self._root() as root,
            suppress(FileNotFoundError),
            _opened(root, token) as directory,
        ):
            # A listing: a network file system may remember for half a minute that a single name was missing.
            return _KEEP in os.listdir(directory)
        return False

    def identity(self) -> str:
        """Return the identity of the root (a marker file made at first use). Raises TransientError if it has none
        although directories stand in it, or cannot be read: most likely the file system is not mounted."""
        try:
            with _in_words(f"cannot read {_MARKER}"), self._root() as root:
                return _marker(root) or self._make_marker(root)
        except FatalError as error:
            raise TransientError(f"the staging root {self._path} has no identity: {error}") from None

    # --- the end of a directory -----------------------------------------------------------------------------

    def withdraw(self, token: str) -> None:
        """Move a published or invisible directory out of the served root's reach by one rename; gone is fine."""
        _refuse_token(token)
        with (
            _in_words(f"cannot withdraw {_short(token)}"),
            self._root() as root,
            _parent(root, _EXPIRED, make=True) as expired,
        ):
            with suppress(FileNotFoundError), _opened(root, token) as directory:
                _move(directory, token, root, expired)
                _sync(root)
                _sync(expired)
                return
            with (
                suppress(FileNotFoundError),
                _parent(root, _INCOMING) as incoming,
                _opened(incoming, token) as directory,
            ):
                _move(directory, token, incoming, expired)
                _sync(incoming)
            _sync(root)
            _sync(expired)

    def purge(self, token: str) -> int:
        """Remove a withdrawn directory by directory handle, never through a link; return the bytes freed.

        If a `.donotremove` is in it, it is put back under its token and -1 is returned. Freed is the allocated space
        of files whose last link this was; 0 if there is nothing (any more) to remove.
        """
        _refuse_token(token)
        with (
            _in_words(f"cannot purge {_EXPIRED}/{_short(token)}"),
            self._root() as root,
            suppress(FileNotFoundError),
            _parent(root, _EXPIRED) as expired,
        ):
            with _opened(expired, token) as directory:
                # From here on nobody but us can put a file into it: what the listing says stays true.
                os.fchmod(directory, 0o700)
                if _KEEP in os.listdir(directory):
                    os.fchmod(directory, 0o755)
                    if _stands(root, token):
                        raise FatalError(f"{_short(token)} is to be kept, but stands under its token again already")
                    _move(directory, token, expired, root)
                    _sync(root)
                    _sync(expired)
                    return -1
            freed = _remove(expired, token)
            _sync(expired)
            return freed
        return 0

    # --- inside ---------------------------------------------------------------------------------------------

    @contextmanager
    def _root(self) -> Iterator[int]:
        try:
            root = os.open(self._path, _DIRECTORY)
        except FileNotFoundError:
            raise TransientError(f"the staging root {self._path} is not there: is its file system mounted?") from None
        except NotADirectoryError:
            raise FatalError(f"the staging root {self._path} is a link or a file: configure the real path") from None
        try:
            yield root
        finally:
            os.close(root)

    @contextmanager
    def _being_made(self, root: int, token: str) -> Iterator[int]:
        try:
            with _parent(root, _INCOMING) as incoming, _opened(incoming, token) as directory:
                found = os.dup(directory)
        except FileNotFoundError:
            raise FatalError(f"{_short(token)} was not begun, or was discarded meanwhile") from None
        try:
            yield found
        finally:
            os.close(found)

    def _make(self, token: str, name: str, fill: Callable[[BinaryIO], str], mode: int = 0o444) -> StagedFile:
        """Write one new file by `fill`, which returns its SHA-256. It is whole and durable, or it is not there.

        While it is written its mode is 0600; the final mode says that it is complete, which `publish` looks at.
        """
        _refuse_token(token)
        _refuse_name(name)
        with (
            _in_words(f"cannot write {_short(token)}/{name}"),
            self._root() as root,
            self._being_made(root, token) as directory,
        ):
            opened = os.open(name, _NEW, 0o600, dir_fd=directory)
            try:
                with open(opened, "w+b", buffering=1024 * 1024) as output:
                    digest = fill(output)
                    output.flush()
                    os.fchmod(opened, mode)
                    os.fsync(opened)
                    status = os.fstat(opened)
                _sync(directory)
            except BaseException:
                # After a failed fsync nothing is known of the data: the file goes, and is never synced again.
                with suppress(OSError):
                    os.unlink(name, dir_fd=directory)
                raise
        return StagedFile(name, status.st_size, digest, status.st_dev, status.st_ino, status.st_mtime_ns)

    def _make_marker(self, root: int) -> str:
        if _tokens(root) or _hidden_tokens(root, _INCOMING) or _hidden_tokens(root, _EXPIRED):
            raise TransientError(
                f"the staging root {self._path} has no {_MARKER} although directories stand in it: "
                f"is it the right one? If so, write 32 hexadecimal digits into {_MARKER}"
            )
        identity = secrets.token_hex(16)
        text = f"{identity}\nThe staging root of stagecal{self._site and f' at {self._site}'}: keep this file.\n"
        draft = f"{_MARKER}.{identity}"
        opened = os.open(draft, _NEW, 0o444, dir_fd=root)
        try:
            with open(opened, "wb") as output:
                output.write(text.encode())
                output.flush()
                os.fsync(opened)
            # By link: whoever comes second finds the first one's marker, and never half of one.
            with suppress(FileExistsError):
                os.link(draft, _MARKER, src_dir_fd=root, dst_dir_fd=root, follow_symlinks=False)
        finally:
            os.unlink(draft, dir_fd=root)
        _sync(root)
        return _marker(root) or ""


# --- names ----------------------------------------------------------------------------------------------------


def _short(token: str) -> str:
    return f"{token[:6]}…"


def _refuse_token(token: str) -> None:
    if not _TOKEN.fullmatch(token):
        raise FatalError(f"{token[:6]!a}… is not a token: 32 digits of 0-9a-f are")


def _refuse_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise FatalError(f"{name[:80]!a} is not a name for a staged file: letters, digits and _+.,=@:~- are")


@contextmanager
def _in_words(what: str) -> Iterator[None]:
    """Turn errors of the system into ours. The cause is cut off, because it holds the whole token."""
    try:
        yield
    except OSError as error:
        raise disk_error(what, error) from None


# --- directories by handle --------------------------------------------------------------------------------------


@contextmanager
def _opened(parent: int, name: str) -> Iterator[int]:
    """Open a directory in the parent. Raises FileNotFoundError, FatalError if it is none or is mounted there."""
    shown = _short(name) if _TOKEN.fullmatch(name) else ascii(name)
    try:
        directory = os.open(name, _DIRECTORY, dir_fd=parent)
    except NotADirectoryError:
        raise FatalError(f"{shown} is a link or a file where a directory should be: nothing was touched") from None
    try:
        if os.fstat(directory).st_dev != os.fstat(parent).st_dev:
            raise FatalError(f"{shown} lies on another file system: nothing was touched")
        yield directory
    finally:
        os.close(directory)


@contextmanager
def _parent(root: int, place: str, *, make: bool = False) -> Iterator[int]:
    """Open one of the two invisible parents, closed to everybody else. Raises FileNotFoundError."""
    if make:
        with suppress(FileExistsError):
            os.mkdir(place, 0o700, dir_fd=root)
            _sync(root)
    with _opened(root, place) as parent:
        if stat.S_IMODE(os.fstat(parent).st_mode) != 0o700:
            os.fchmod(parent, 0o700)
        yield parent


def _stands(parent: int, token: str) -> bool:
    try:
        with _opened(parent, token):
            return True
    except FileNotFoundError:
        return False


def _tokens(parent: int) -> Sequence[str]:
    device = os.fstat(parent).st_dev
    found = []
    for name in sorted(os.listdir(parent)):
        if _TOKEN.fullmatch(name):
            with suppress(FileNotFoundError):
                status = os.lstat(name, dir_fd=parent)
                if stat.S_ISDIR(status.st_mode) and status.st_dev == device:
                    found.append(name)
    return found


def _hidden_tokens(root: int, place: str) -> Sequence[str]:
    with suppress(FileNotFoundError), _parent(root, place) as parent:
        return _tokens(parent)
    return ()


def _move(directory: int, token: str, source: int, target: int) -> None:
    """Rename the open directory from one parent to the other.

    A file server may report an error although it did it: then the directory itself stands at its new place.
    """
    try:
        os.rename(token, token, src_dir_fd=source, dst_dir_fd=target)
    except OSError:
        if not _is(os.fstat(directory), target, token):
            raise


def _is(status: os.stat_result, parent: int, name: str) -> bool:
    with suppress(OSError):
        there = os.lstat(name, dir_fd=parent)
        return (there.st_dev, there.st_ino) == (status.st_dev, status.st_ino)
    return False


def _sync(directory: int) -> None:
    try:
        os.fsync(directory)
    except OSError as error:
        # Some network file systems know no fsync of a directory; they write through.
        if error.errno != errno.EINVAL:
            raise


def _remove(parent: int, token: str) -> int:
    """Remove a token's directory with all in it; gone is fine. Return the bytes freed (see `_empty`)."""
    freed = 0
    with suppress(FileNotFoundError):
        with _opened(parent, token) as directory:
            freed = _empty(directory)
        os.rmdir(token, dir_fd=parent)
    return freed


def _empty(directory: int, depth: int = 0) -> int:
    """Remove all that is in the open directory, never what a link or a mount leads to.

    Return the allocated bytes of the inodes that lost their last link here.
    """
    if depth > DEEPEST:
        raise FatalError(f"more than {DEEPEST} directories deep: that was not made here, and is not removed")
    freed = 0
    for name in os.listdir(directory):
        with suppress(FileNotFoundError):
            status = os.lstat(name, dir_fd=directory)
            if stat.S_ISDIR(status.st_mode):
                with _opened(directory, name) as inner:
                    if _mount(inner) != _mount(directory):
                        raise FatalError(f"something is mounted on {name!a}: it is not removed")
                    freed += _empty(inner, depth + 1)
                os.rmdir(name, dir_fd=directory)
            else:
                os.unlink(name, dir_fd=directory)
                if status.st_nlink == 1:
                    freed += status.st_blocks * 512
    return freed


def _mount(opened: int) -> str:
    """Return which mount an open directory was reached through: a bind mount shows the same device number.

    Empty where the kernel does not say.
    """
    with suppress(OSError), open(f"/proc/self/fdinfo/{opened}", encoding="ascii") as lines:
        return next((line for line in lines if line.startswith("mnt_id:")), "")
    return ""


# --- files by handle --------------------------------------------------------------------------------------------


def _refuse_unfinished(directory: int, token: str) -> None:
    for name in os.listdir(directory):
        mode = os.lstat(name, dir_fd=directory).st_mode
        if not (stat.S_ISREG(mode) and _NAME.fullmatch(name) and not mode & _WRITABLE):
            raise FatalError(f"cannot publish {_short(token)}: {name[:80]!a} in it is unfinished or not ours")


@contextmanager
def _recorded_file(root: int, token: str, file: StagedFile, place: str) -> Iterator[tuple[int, int]]:
    """Open a published directory and the file in it; raise SourceVanishedError unless it is the recorded one."""
    try:
        with _opened(root, token) as opened:
            source = os.open(file.name, _FILE, dir_fd=opened)
            directory = os.dup(opened)
    except FileNotFoundError:
        raise SourceVanishedError(f"{place} is gone") from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise SourceVanishedError(f"{place} is no plain file any more") from None
        raise
    try:
        status = os.fstat(source)
        found = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if not stat.S_ISREG(status.st_mode) or found != (file.device, file.inode, file.size, file.modified_ns):
            raise SourceVanishedError(f"{place} is not the file that was recorded")
        if status.st_mode & _WRITABLE:
            raise SourceVanishedError(f"{place} was made writable: nobody knows whether it is what was recorded")
        yield directory, source
    finally:
        os.close(directory)
        os.close(source)


def _link(theirs: int, ours: int, file: StagedFile, source: int, place: str) -> bool:
    """Link the open, checked file; return False if the file system grants no link."""
    status = os.fstat(source)
    try:
        os.link(file.name, file.name, src_dir_fd=theirs, dst_dir_fd=ours, follow_symlinks=False)
    except OSError as error:
        # The server may report an error although it linked.
        if _is(status, ours, file.name):
            return True
        if error.errno in _NO_LINK_HERE:
            return False
        if error.errno == errno.ENOENT:
            raise SourceVanishedError(f"{place} is gone") from None
        raise
    # Between the look and the link another file may have got the name.
    if not _is(status, ours, file.name):
        os.unlink(file.name, dir_fd=ours)
        raise SourceVanishedError(f"{place} was replaced while it was linked")
    return True


def _copy(source: int, output: BinaryIO, shown: str) -> str:
    """Copy the open file; return its SHA-256."""
    digest = hashlib.sha256()

    def pass_on(piece: memoryview) -> None:
        output.write(piece)
        digest.update(piece)

    status = os.fstat(source)
    size = max(1, min(PIECE, status.st_size))
    copy_whole(source, status, pass_on, memoryview(bytearray(size)), shown)
    return digest.hexdigest()


def _copy_recorded(source: int, output: BinaryIO, file: StagedFile, place: str) -> str:
    digest = _copy(source, output, place)
    if digest != file.sha256:
        raise SourceVanishedError(f"{place} has another content than was recorded")
    return digest


def _read_small(directory: int, name: str) -> bytes:
    with open(os.open(name, _FILE, dir_fd=directory), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > _SMALL:
            raise FatalError(f"{name} is no small plain file ({status.st_size} bytes)")
        return file.read(_SMALL)


def _marker(root: int) -> str | None:
    """Return the identity in the marker, None if there is no marker."""
    try:
        text = _read_small(root, _MARKER).decode("ascii", "replace")
    except FileNotFoundError:
        return None
    identity = text.partition("\n")[0].strip()
    if not _TOKEN.fullmatch(identity):
        raise FatalError(f"{_MARKER} does not begin with 32 hexadecimal digits")
    return identity
