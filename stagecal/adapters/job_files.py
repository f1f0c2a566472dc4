"""The files of job directories on a file system that this machine sees: the same for every adapter that has one.

Promises: a job directory appears whole or not at all, and durably; small files in it appear whole; nothing outside
`<work area>/WORK<n>` is written or removed, and never through a symbolic link.

Fails with TransientError where waiting may help (no space, work area not mounted), else with FatalError.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from stagecal.adapters import job_directory as layout
from stagecal.ports import FatalError, JobHandle, TransientError

_WAITING_MAY_HELP = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.EAGAIN,
        errno.ENOMEM,
        errno.EMFILE,
        errno.ENFILE,
        errno.EINTR,
        errno.ENOTEMPTY,
    }
)
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True)
class JobFiles:
    """The job directories below a work area. `wrapper` is the text of the job wrapper that each of them gets."""

    work_area: Path
    wrapper: bytes

    def path(self, job: JobHandle) -> Path:
        """Return where the job directory is, or will be. The handle must have been checked."""
        return self.work_area / job.work

    def prepare(self, job: JobHandle, files: Mapping[str, bytes]) -> None:
        """Make the job directory durably, by one rename; the directory of the same job is left as it is.

        Raises FatalError if something else stands under its name, or a file has a name that cannot be.
        """
        layout.check_file_names(job, files)
        with self.trouble(job, "prepare"), self._opened_area() as area:
            if self._stands(job, area):
                return
            attempt = f".{job.work}.{job.nonce}.new"
            remove_tree(attempt, area)
            contents = {**files, layout.WRAPPER: self.wrapper, layout.NONCE: f"{job.nonce}\n".encode()}
            write_tree(attempt, area, contents)
            os.rename(attempt, job.work, src_dir_fd=area, dst_dir_fd=area)
            os.fsync(area)

    def renew_lease(self, job: JobHandle, until: datetime) -> None:
        """Replace the lease by one rename. Raises FatalError if there is no job directory."""
        with self.trouble(job, "renew the lease of"), self.opened(job) as directory:
            if directory is None:
                raise FatalError(f"{self.path(job)} is gone: the job cannot be kept alive, cancel it")
            write(layout.LEASE, layout.lease_text(until), directory)

    def output(self, job: JobHandle) -> str:
        """Return the last mebibyte of the job's terminal output, '' if there is none yet."""
        with self.trouble(job, "read the output of"), self.opened(job) as directory:
            if directory is None:
                return ""
            try:
                descriptor = os.open(layout.OUTPUT, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
            except FileNotFoundError:
                return ""
            with open(descriptor, "rb") as file:
                file.seek(max(0, os.fstat(descriptor).st_size - layout.OUTPUT_LIMIT))
                return layout.decode_output(file.read(layout.OUTPUT_LIMIT))

    def remove(self, job: JobHandle) -> None:
        """Remove the directory of a job that is not alive: out of sight by one rename, then entry by entry.

        What is gone is fine. Raises FatalError if what stands under the name is not its directory.
        """
        with self.trouble(job, "clean"), self._opened_area() as area:
            doomed = f".{job.work}.{job.nonce}.removed"
            remove_tree(doomed, area)
            if self._stands(job, area):
                os.rename(job.work, doomed, src_dir_fd=area, dst_dir_fd=area)
                remove_tree(doomed, area)

    @contextmanager
    def opened(self, job: JobHandle) -> Iterator[int | None]:
        """Give a descriptor of the job's own directory, None if it is not there."""
        with self._opened_area() as area:
            directory = os.open(job.work, _DIRECTORY, dir_fd=area) if self._stands(job, area) else None
        try:
            yield directory
        finally:
            if directory is not None:
                os.close(directory)

    @contextmanager
    def trouble(self, job: JobHandle, doing: str) -> Iterator[None]:
        """Turn an OSError into TransientError or FatalError; `doing` is what was tried."""
        try:
            yield
        except OSError as error:
            kind = TransientError if error.errno in _WAITING_MAY_HELP else FatalError
            raise kind(f"cannot {doing} {job.work} in {self.work_area}: {error.strerror or error}") from error

    def _stands(self, job: JobHandle, area: int) -> bool:
        """Return whether the job's own directory is there. Raises FatalError if something else has its name."""
        try:
            directory = os.open(job.work, _DIRECTORY, dir_fd=area)
        except FileNotFoundError:
            return False
        except NotADirectoryError:
            raise FatalError(f"{self.path(job)} is not a directory: move it away") from None
        try:
            if (read(layout.NONCE, directory) or "").strip() != job.nonce:
                raise FatalError(f"{self.path(job)} is not of this job ({job.nonce}): move it away")
        finally:
            os.close(directory)
        return True

    @contextmanager
    def _opened_area(self) -> Iterator[int]:
        try:
            area = os.open(self.work_area, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise TransientError(f"the work area {self.work_area} is not there: is it mounted?") from None
        try:
            yield area
        finally:
            os.close(area)


def exists(name: str, directory: int) -> bool:
    """Return whether the directory has an entry of this name."""
    try:
        os.lstat(name, dir_fd=directory)
    except FileNotFoundError:
        return False
    return True


def read(name: str, directory: int) -> str | None:
    """Return the text of a small file, None if it is not there."""
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        return None
    with open(descriptor, "rb") as file:
        return file.read(4096).decode("ascii", errors="replace")


def write(name: str, text: str, directory: int, *, durable: bool = False) -> None:
    """Let a small file appear whole. It need not outlive a crash of this machine where its job does not either."""
    temporary = f".{name}.{os.getpid()}.{time.monotonic_ns()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with open(os.open(temporary, flags, 0o640, dir_fd=directory), "w", encoding="ascii") as file:
        file.write(text)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    if durable:
        os.fsync(directory)


def write_once(name: str, text: str, directory: int) -> bool:
    """Let a small file appear whole and durably, unless there is one of this name: return False then."""
    temporary = f"{name}.{os.getpid()}.{time.monotonic_ns()}"
    write(temporary, text, directory, durable=True)
    try:
        os.link(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    except FileExistsError:
        return False
    finally:
        os.unlink(temporary, dir_fd=directory)
        os.fsync(directory)
    return True


def claim(reason: str, directory: int) -> bool:
    """Make the lock, so that the job never starts; return False if somebody else has it already."""
    try:
        os.mkdir(layout.LOCK, 0o750, dir_fd=directory)
    except FileExistsError:
        return False
    write(layout.ENDED, f"{reason}\n", directory)
    return True


def write_tree(name: str, area: int, contents: Mapping[str, bytes]) -> None:
    """Make a directory with these files, durably; `sub/file` makes the directory `sub`."""
    os.mkdir(name, 0o750, dir_fd=area)
    top = os.open(name, _DIRECTORY, dir_fd=area)
    descriptors = [top]
    try:
        os.fchmod(top, 0o750)
        for subdirectory in sorted({path.partition("/")[0] for path in contents if "/" in path}):
            os.mkdir(subdirectory, 0o750, dir_fd=top)
            descriptors.append(os.open(subdirectory, _DIRECTORY, dir_fd=top))
            os.fchmod(descriptors[-1], 0o750)
        for path, content in contents.items():
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(path, flags, 0o640, dir_fd=top), "wb", closefd=True) as file:
                file.write(content)
                file.flush()
                os.fchmod(file.fileno(), 0o755 if path.endswith(".sh") else 0o640)
                os.fsync(file.fileno())
        for descriptor in descriptors:
            os.fsync(descriptor)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def remove_tree(name: str, area: int, *, tries: int = 5) -> None:
    """Remove a directory with all that is in it by handles, never through a link; not there is fine.

    Directories that a job left without the right to write are opened up: they are ours.
    """
    try:
        directory = os.open(name, _DIRECTORY, dir_fd=area)
    except FileNotFoundError:
        return
    try:
        if os.fstat(directory).st_mode & stat.S_IRWXU != stat.S_IRWXU:
            os.fchmod(directory, stat.S_IRWXU)
        with os.scandir(directory) as scan:
            entries = list(scan)
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                remove_tree(entry.name, directory)
            else:
                os.unlink(entry.name, dir_fd=directory)
    finally:
        os.close(directory)
    try:
        os.rmdir(name, dir_fd=area)
    except OSError as error:
        # The last file of a wrapper on its way out may have come in between.
        if error.errno != errno.ENOTEMPTY or tries <= 1:
            raise
        time.sleep(0.05)
        remove_tree(name, area, tries=tries - 1)


def uptime_s() -> float:
    """Return for how long this machine has been up, in seconds, its sleep included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def boot_id() -> str:
    """Return which life of this machine it is."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()
