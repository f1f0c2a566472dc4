"""Locks between threads and processes of this machine: flock on files in the state directory (local disk).

A lock file is never removed: removing one that is held would let a second holder in. A dead holder's lock is free.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stagecal.ports import FatalError, TransientError

_NAME = re.compile(r"[a-z0-9-]{1,64}")


class FileLocks:
    """The Locks port on a directory."""

    def __init__(self, directory: Path, *, timeout_s: float = 600) -> None:
        self._directory = directory
        self._timeout_s = timeout_s

    @contextmanager
    def try_lock(self, name: str) -> Iterator[bool]:
        descriptor = self._open(name)
        try:
            yield self._locked(descriptor)
        finally:
            os.close(descriptor)

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        descriptor = self._open(name)
        try:
            end = time.monotonic() + self._timeout_s
            while not self._locked(descriptor):
                if time.monotonic() > end:
                    raise TransientError(f"the lock {name} was not free within {self._timeout_s:g} s")
                time.sleep(0.02)
            yield
        finally:
            os.close(descriptor)

    def _open(self, name: str) -> int:
        if not _NAME.fullmatch(name):
            raise FatalError(f"{name!r} is no name of a lock")
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            return os.open(self._directory / f"{name}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise TransientError(f"the lock {name} in {self._directory} cannot be used: {error.strerror}") from error

    def _locked(self, descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise FatalError(
                    f"{self._directory} does not support locks ({error.strerror}): "
                    "put [state] directory on a local disk"
                ) from error
            raise TransientError(f"a lock in {self._directory} failed: {error.strerror}") from error
        return True
