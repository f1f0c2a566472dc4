"""Brings the results of a job from a node to this machine: resumable, watched, and compared end to end.

The bytes go through the ssh program, by rsync where the node has it, else as tar files; never through Python's SSH.
What came before a broken attempt is used. A copy is complete only when every file has the size and SHA-256 that the
node told. Fails with TransientError if the line breaks or stands still, or the disk here has no room; with FatalError
if a link or another odd entry is among the results, a file comes differently twice, or a job directory is in the way.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shlex
import shutil
import stat
import subprocess
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from stagecal.adapters import job_directory as layout
from stagecal.adapters.remote_shell import HOST_ALIAS, WORDS_LIMIT, Envelope, has_ended, kill_group, plain
from stagecal.ports import FatalError, TransientError

_NONCE = "nonce"
# A job directory has the job's nonce too, but nothing in it is ever taken for a copy.
_OF_A_JOB_DIRECTORY = frozenset({layout.WRAPPER, "run.sh"})
_PARTIAL = ".stagecal-part"
_DIGEST = re.compile(rb"\\?([0-9a-f]{64}) [ *]")
# So much is hashed on the node in one go: the connection is not held for long, and a broken one costs little.
_BATCH_BYTES = 4 * 1024**3
_BATCH_FILES = 2000
# What any disk reads and hashes in a second.
_SLOWEST_HASH = 20e6
_TELL_EVERY_S = 1.0
_LOOK_EVERY_S = 0.1
_NO_LOCKS = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK})


@dataclass(frozen=True)
class Source:
    """Where results lie. `call(verb, stdin, timeout_s)` does a verb of node.sh for the job and returns its output;
    `send` is the script that writes the files named on its input as a tar file.
    """

    name: str
    directory: Path
    call: Callable[[str, bytes, float | None], bytes]
    send: Envelope
    ssh_command: tuple[str, ...]


@dataclass(frozen=True)
class Listing:
    """What the node tells of the results: directories, files with their sizes, the version of its rsync ('': none)."""

    directories: frozenset[str]
    sizes: Mapping[str, int]
    rsync: str


def fetch(
    source: Source,
    copy: Path,
    nonce: str,
    tell: Callable[[int, int], None],
    *,
    stall_s: float,
    reserve_bytes: int = 0,
) -> None:
    """Make `copy` hold exactly the results, each file compared. `tell` hears (bytes here, bytes in all) once a second,
    while the node or this machine reads them for their digests only now and then.

    `nonce` says whose copy it is: another job's is never touched (FatalError). Nothing is brought if less than
    `reserve_bytes` would stay free (TransientError). A transfer in which nothing moves for `stall_s` seconds is broken
    off.
    """
    listing = read_listing(source.call("list", b"", None), source.name)
    try:
        with _claimed(copy, nonce) as claim:
            _refuse_links(copy)
            _remove_others(copy, listing)
            for name in sorted(listing.directories):
                (copy / name).mkdir(mode=0o750, exist_ok=True)
            progress = _Progress(copy, listing.sizes, tell)
            _make_sure_of_room(source, copy, progress, reserve_bytes)
            digests = dict(_digests(source, listing.sizes, progress))
            _bring(_Transfer(source, copy, progress, stall_s, claim), listing, digests)
            progress.tell()
    except OSError as error:
        raise TransientError(f"the results of {source.name} cannot be written to {copy}: {error.strerror}") from error


def _make_sure_of_room(source: Source, copy: Path, progress: _Progress, reserve_bytes: int) -> None:
    """Raise TransientError if what has still to come would leave less free space here than the reserve."""
    missing = progress.total - progress.count()
    disk = os.statvfs(copy)
    free = disk.f_bavail * disk.f_frsize
    if missing and missing + reserve_bytes > free:
        raise TransientError(
            f"{source.name}: {missing / 1e9:.1f} GB have still to come, but {copy.parent} has {free / 1e9:.1f} GB "
            f"free, of which {reserve_bytes / 1e9:.1f} GB are never used up ([staging] reserve_gb): delete or enlarge"
        )


def _bring(transfer: _Transfer, listing: Listing, digests: Mapping[str, str]) -> None:
    """Bring what is missing, and again what came wrong."""
    source = transfer.source
    missing = _not_whole(transfer, listing.sizes, listing.sizes, digests)
    for _ in range(2):
        if missing:
            if listing.rsync and shutil.which("rsync"):
                _by_rsync(transfer, missing, listing.rsync)
            else:
                _by_tar(transfer, missing)
            missing = _not_whole(transfer, missing, listing.sizes, digests)
    if missing:
        raise FatalError(
            f"{source.name}: {missing[0]!r} and {len(missing) - 1} more file(s) came differently twice: "
            "look at the disks and the line between"
        )


def remove_copy(copy: Path, nonce: str) -> None:
    """Remove what was fetched for the job with this nonce; another job's copy and what is gone are left alone."""
    try:
        if _owner(copy) in (nonce, None):
            shutil.rmtree(copy)
    except FileNotFoundError:
        return
    except OSError as error:
        raise TransientError(f"{copy} cannot be removed: {error.strerror}") from error


# --- what the node tells -------------------------------------------------------------------------------------------


def read_listing(output: bytes, name: str) -> Listing:
    """Return what the verb `list` told. Raises FatalError if something in it is neither file nor directory."""
    first, _, rest = output.partition(b"\n")
    directories, sizes = set(), {}
    for entry in rest.split(b"\0"):
        if not entry:
            continue
        kind, size, path = (os.fsdecode(part) for part in entry.split(b" ", 2))
        parts = path.split("/")
        if kind not in "fd" or not all(parts) or {".", ".."} & set(parts):
            raise FatalError(f"{name}: {path!r} is neither a file nor a directory: results hold no links")
        if kind == "d":
            directories.add(path)
        else:
            sizes[path] = int(size)
    return Listing(frozenset(directories), sizes, os.fsdecode(first).removeprefix("rsync").strip())


def _digests(source: Source, sizes: Mapping[str, int], progress: _Progress) -> Iterator[tuple[str, str]]:
    for batch in _batches(sizes):
        progress.tell_if_due()
        names = b"".join(os.fsencode(name) + b"\0" for name in batch)
        patience = 60 + sum(sizes[name] for name in batch) / _SLOWEST_HASH
        lines = source.call("digest", names, patience).splitlines()
        found = [match[1].decode() for line in lines if (match := _DIGEST.match(line))]
        if len(found) != len(batch) or len(lines) != len(batch):
            raise FatalError(f"{source.name}: {len(batch)} files have {len(lines)} digests: look at their names")
        yield from zip(batch, found, strict=True)


def _batches(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for name in sizes:
        batch.append(name)
        size += sizes[name]
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_FILES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# --- what is here --------------------------------------------------------------------------------------------------


def _owner(copy: Path) -> str | None:
    """Return whose copy it is, None if that was never written. Raises FileNotFoundError if there is no copy."""
    if copy.is_symlink():
        raise FatalError(f"{copy} is a link: move it away")
    entries = os.listdir(copy)
    if not _OF_A_JOB_DIRECTORY.isdisjoint(entries):
        raise FatalError(f"{copy} is a job directory: [cluster] fetch_area must be no work area, name another")
    if _NONCE not in entries:
        if entries:
            raise FatalError(f"{copy} is not of a job: move it away")
        return None
    return (copy / _NONCE).read_text(encoding="ascii", errors="replace").strip() or None


@contextmanager
def _claimed(copy: Path, nonce: str) -> Iterator[int]:
    """Make the directory of the copy, and write whose it is, before anything else is in it; hold a lock meanwhile.

    The descriptor that is given holds the lock. The programs that write get it too: those of a daemon that was killed
    still hold the lock until they have ended. Where there are no locks, the comparison of the digests has to do.
    """
    copy.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
    with suppress(FileExistsError):
        copy.mkdir(mode=0o750)
    owner = _owner(copy)
    if owner is None:
        (copy / _NONCE).write_text(f"{nonce}\n", encoding="ascii")
    elif owner != nonce:
        raise FatalError(f"{copy} is a copy of another job ({owner}): move it away")
    with (copy / _NONCE).open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TransientError(f"{copy} is still being written by an earlier transfer") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield file.fileno()


def _refuse_links(copy: Path) -> None:
    """Refuse a copy that holds a link: nothing may be written through one."""
    for top, directories, files in os.walk(copy):
        for name in (*directories, *files):
            mode = os.lstat(os.path.join(top, name)).st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise FatalError(f"{os.path.join(top, name)} is neither a file nor a directory: remove it")


def _remove_others(copy: Path, listing: Listing) -> None:
    """Remove what the node does not have (any more)."""
    for top, directories, files in os.walk(copy, topdown=False):
        for name in files:
            inside = os.path.relpath(os.path.join(top, name), copy)
            if inside not in listing.sizes and inside != _NONCE:
                os.unlink(copy / inside)
        for name in directories:
            inside = os.path.relpath(os.path.join(top, name), copy)
            if inside not in listing.directories:
                os.rmdir(copy / inside)


def _not_whole(
    transfer: _Transfer, names: Iterable[str], sizes: Mapping[str, int], digests: Mapping[str, str]
) -> list[str]:
    found = []
    for name in names:
        transfer.progress.tell_if_due()
        if not _is_whole(transfer.copy, name, sizes[name], digests[name]):
            found.append(name)
    return found


def _is_whole(copy: Path, name: str, size: int, digest: str) -> bool:
    """Return whether the file is here as it should be. What can be no beginning of it is removed."""
    path = copy / name
    try:
        here = path.stat().st_size
    except FileNotFoundError:
        return False
    if here < size:
        return False
    if here == size:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == digest:
                return True
    path.unlink()
    return False


class _Progress:
    """How many bytes are here, told once a second."""

    def __init__(self, copy: Path, sizes: Mapping[str, int], tell: Callable[[int, int], None]) -> None:
        self._copy = copy
        self._sizes = sizes
        self.total = sum(sizes.values())
        self._tell = tell
        self._told_at = 0.0

    def count(self) -> int:
        """Return the bytes that are here, those of files on their way included."""
        done = 0
        for name, size in self._sizes.items():
            for candidate in (name, name + _PARTIAL):
                with suppress(OSError):
                    done += min(size, os.lstat(self._copy / candidate).st_size)
                    break
        return done

    def tell(self) -> int:
        """Count and tell."""
        done = self.count()
        self._told_at = time.monotonic()
        self._tell(done, self.total)
        return done

    def tell_if_due(self) -> None:
        """Count and tell, unless that was done within the last second."""
        if self.is_due():
            self.tell()

    def is_due(self) -> bool:
        """Return whether the last telling is a second ago."""
        return time.monotonic() - self._told_at >= _TELL_EVERY_S


@dataclass(frozen=True)
class _Transfer:
    """From where to where, who hears of it, how long it may stand still, and the descriptor that holds the lock."""

    source: Source
    copy: Path
    progress: _Progress
    stall_s: float
    claim: int

    def start(
        self, command: Sequence[str], stdin: IO[bytes], stdout: int, errors: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        """Start a program that brings bytes; it holds the lock too."""
        try:
            return subprocess.Popen(
                command, stdin=stdin, stdout=stdout, stderr=errors, pass_fds=(self.claim,), start_new_session=True
            )
        except OSError as error:
            raise FatalError(f"{self.source.name}: {command[0]} cannot be started: {error.strerror}") from error

    def watch(self, is_done: Callable[[], bool]) -> None:
        """Wait for the end. Raises TransientError if nothing arrives for `stall_s` seconds."""
        moved_at = time.monotonic()
        before = -1
        while not is_done():
            if self.progress.is_due():
                done = self.progress.tell()
                if done != before:
                    before, moved_at = done, time.monotonic()
                elif time.monotonic() - moved_at >= self.stall_s:
                    raise TransientError(
                        f"{self.source.name}: nothing arrived for {self.stall_s:g} s, the transfer was broken off"
                    )
            time.sleep(_LOOK_EVERY_S)


# --- rsync ---------------------------------------------------------------------------------------------------------


def rsync_command(source: Source, copy: Path, version: str, stall_s: float) -> Sequence[str]:
    """Return the command that brings the files named on standard input, each with a NUL.

    A file grows under its own name, so that even a killed rsync leaves a beginning to go on from. Versions before 3
    cannot verify what they append to: they compare block by block.
    """
    resume = "--inplace" if version.startswith(("0.", "1.", "2.")) else "--append-verify"
    # The directory travels as a quoted word for any login shell; rsync itself sees only "." and the names.
    there = shlex.join(("/bin/sh", "-c", 'cd -- "$0" && exec rsync "$@"', str(source.directory)))
    return (
        *("rsync", "-t", "--partial", resume, "--from0", "--files-from=-", "--chmod=u+rw"),
        *(f"--timeout={max(1, round(stall_s))}", f"--rsync-path={there}"),
        *("-e", shlex.join(source.ssh_command), f"{HOST_ALIAS}:./", f"{copy}/"),
    )


def _by_rsync(transfer: _Transfer, names: Sequence[str], version: str) -> None:
    source = transfer.source
    command = rsync_command(source, transfer.copy, version, transfer.stall_s)
    with tempfile.TemporaryFile() as wanted, tempfile.TemporaryFile() as errors:
        wanted.write(b"".join(os.fsencode(name) + b"\0" for name in names))
        wanted.seek(0)
        process = transfer.start(command, wanted, subprocess.DEVNULL, errors)
        try:
            transfer.watch(lambda: has_ended(process))
        finally:
            kill_group(process)
        if process.returncode:
            raise TransientError(f"{source.name}: rsync ended with {process.returncode}: {_last_words(errors)}")


def _last_words(errors: IO[bytes]) -> str:
    errors.seek(max(0, errors.seek(0, os.SEEK_END) - 2000))
    return plain(" ".join(errors.read().decode("utf-8", errors="replace").split())[-WORDS_LIMIT:]) or "it said nothing"


# --- tar -----------------------------------------------------------------------------------------------------------


def _by_tar(transfer: _Transfer, names: Sequence[str]) -> None:
    """Bring the files as one tar file; each appears under its name when it is whole, so a broken one begins anew."""
    source, copy = transfer.source, transfer.copy
    command = (*source.ssh_command, HOST_ALIAS, source.send.command)
    with tempfile.TemporaryFile() as errors, tempfile.TemporaryFile() as script:
        script.write(source.send.program + b"".join(os.fsencode(name) + b"\0" for name in names))
        script.seek(0)
        process = transfer.start(command, script, subprocess.PIPE, errors)
        unpacking = _Unpacking(source, process, copy, set(names))
        try:
            transfer.watch(unpacking.done.is_set)
        finally:
            kill_group(process)
            unpacking.done.wait()
            if process.stdout:
                process.stdout.close()
        if unpacking.trouble:
            raise unpacking.trouble
        left = [name for name in names if not (copy / name).exists()]
        if left:
            raise TransientError(
                f"{source.name}: the transfer broke, {len(left)} file(s) did not come: {_last_words(errors)}"
            )


class _Unpacking:
    """Takes the tar file from the ssh program in a thread of its own, so that a silent line can be noticed."""

    def __init__(self, source: Source, process: subprocess.Popen[bytes], copy: Path, wanted: set[str]) -> None:
        self.trouble: Exception | None = None
        self.done = threading.Event()
        self._source = source
        self._process = process
        self._copy = copy
        self._wanted = wanted
        threading.Thread(target=self._run, name="results", daemon=True).start()

    def _run(self) -> None:
        try:
            stream = self._process.stdout
            assert stream is not None  # noqa: S101 - it is a pipe, for the type checker
            while (line := stream.readline(65536)) and line != self._source.send.begin:
                continue
            with suppress(tarfile.ReadError), tarfile.open(fileobj=stream, mode="r|", bufsize=1 << 20) as tar:
                for entry in tar:
                    self._take(tar, entry)
            while stream.read(65536):
                continue
        except (OSError, tarfile.TarError) as error:
            self.trouble = TransientError(f"{self._source.name}: the transfer broke: {plain(str(error))}")
        except FatalError as error:
            self.trouble = error
        finally:
            self.done.set()

    def _take(self, tar: tarfile.TarFile, entry: tarfile.TarInfo) -> None:
        name = entry.name
        if name not in self._wanted or not (entry.isreg() or entry.islnk()):
            raise FatalError(f"{self._source.name}: {name!r} came, which was not asked for: look at the node")
        partial = self._copy / (name + _PARTIAL)
        if entry.islnk():
            # A second name of a file that came before.
            if entry.linkname not in self._wanted:
                raise FatalError(f"{self._source.name}: {name!r} links to {entry.linkname!r}: look at the node")
            shutil.copyfile(self._copy / entry.linkname, partial)
        else:
            content = tar.extractfile(entry)
            assert content is not None  # noqa: S101 - a regular file has a content
            with partial.open("wb") as file:
                shutil.copyfileobj(content, file, 1 << 20)
        partial.replace(self._copy / name)
