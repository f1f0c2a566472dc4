"""Reads what is staged again, slowly, and compares it with what was recorded: rot is found before somebody links it.

The file whose reading was begun longest ago is read first, at a bounded pace, without a lock, and past the page cache.
A file that is found rotten twice is marked for good: it is never linked again, every request that holds it gets a
note, and the operators one mail. Nothing is deleted or changed. A server that does not answer, or a root that is not
there, raises TransientError, another root FatalError; nothing is marked then.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import stat
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Protocol, TypeVar

from stagecal.domain.identifiers import masked_token
from stagecal.domain.records import NewMail, ProductFile, Step
from stagecal.domain.requests import Request
from stagecal.domain.retention import Staging
from stagecal.domain.sizes import readable_size
from stagecal.ports import TransientError
from stagecal.services.alarms import alarm_mail
from stagecal.services.context import Site
from stagecal.services.sweeping import know_root

log = logging.getLogger(__name__)

_T = TypeVar("_T")

EVERY = timedelta(days=7)
"""How long a verification counts."""
GATHER = timedelta(hours=1)
"""How long rot that is found after a mail waits for the next one: a dying disk must not send a thousand mails."""
REST_S = 60.0
"""How long to rest when nothing is due, or after trouble."""
_PIECE = 4 * 1024 * 1024
# A slice takes about so long at the wanted pace: the end of the daemon is not waited for longer than for one.
_SLICE_S = 0.25
_SMALLEST_PIECE = 64 * 1024
_MOST_IN_A_MAIL = 50

_PASSING = frozenset(
    {
        *(errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH),
        *(errno.EINTR, errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENODEV),
    }
)
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Verifications(Protocol):
    """What the ledger knows of files and their content; every method is one durable transaction.

    A file is one however many tokens link it. What is rotten is rotten in every directory (token '') or in one.
    """

    def next_to_verify(self, before: datetime) -> tuple[str, ProductFile] | None:
        """Return token and record of the file whose reading was begun longest ago, of those not verified since."""
        ...

    def record_begun(self, file: ProductFile, now: datetime) -> None:
        """Record that the reading of a file begins."""
        ...

    def record_verified(self, file: ProductFile, now: datetime) -> None:
        """Record that a file is what was recorded."""
        ...

    def record_rotten(self, file: ProductFile, token: str, problem: str, step: Step, now: datetime) -> bool:
        """Record that a file is rotten, with a step in each request that holds it; False if it is known."""
        ...

    def holders(self, file: ProductFile, token: str = "") -> Sequence[tuple[Staging, ProductFile, Request | None]]:
        """Return each directory within reach that links the file, its entry and its request."""
        ...

    def untold_rotten(self) -> Sequence[tuple[ProductFile, str, str, datetime]]:
        """Return what was not told yet: file, token, problem, and when it was found."""
        ...

    def last_told(self) -> datetime | None:
        """Return when operators were told last."""
        ...

    def tell_rotten(self, found: Sequence[tuple[ProductFile, str]], mail: NewMail, now: datetime) -> None:
        """Put the mail that tells of these into the outbox."""
        ...


@dataclass
class _Reading:
    """A file that is being read, and how far we are."""

    token: str
    file: ProductFile
    descriptor: int
    again: bool = False
    position: int = 0
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)


class _RottenError(Exception):
    """What was found is not what was recorded; `here` says that only this directory's entry is concerned."""

    def __init__(self, problem: str, *, here: bool = False) -> None:
        super().__init__(problem)
        self.here = here


@dataclass
class Scrubber:
    """Verifies staged files one after the other, a slice with each call of `step`.

    An interrupted file is begun anew after the others: a digest half made cannot be kept. `monotonic` and `read` (as
    os.pread) are the system's unless a test says otherwise; `wake` is called when a mail waits.
    """

    site: Site
    records: Verifications
    monotonic: Callable[[], float] = time.monotonic
    read: Callable[[int, int, int], bytes] = os.pread
    wake: Callable[[], None] = lambda: None
    _reading: _Reading | None = None
    _ready_at: float = 0.0

    @property
    def pace(self) -> float:
        """How many bytes per second are read at most."""
        return self.site.config.staging.scrub_mb_s * 1e6

    def step(self) -> float:
        """Do one slice of work; return for how many seconds to rest before the next.

        Raises TransientError and FatalError; the file at hand is then left for later.
        """
        try:
            if self._reading is None and not self._begin():
                return REST_S
            try:
                self._read_on()
            except _RottenError as found:
                self._judge(found)
        except BaseException:
            self.close()
            raise
        return max(0.0, self._ready_at - self.monotonic())

    def close(self) -> None:
        """Let go of the file at hand."""
        if self._reading is not None:
            os.close(self._reading.descriptor)
            self._reading = None

    def _rest(self) -> None:
        """Leave the file at hand for later, and do not come back to it at once."""
        self.close()
        self._ready_at = self.monotonic() + REST_S

    # --- one file ----------------------------------------------------------------------------------------------

    def _begin(self) -> bool:
        now = self.site.clock.now()
        know_root(self.site)
        self._tell(now)
        due = self.records.next_to_verify(now - EVERY)
        if due is None:
            return False
        token, file = due
        self.records.record_begun(file, now)
        self._open(token, file)
        return True

    def _open(self, token: str, file: ProductFile, *, again: bool = False) -> None:
        self.close()
        try:
            self._reading = _Reading(token, file, self._opened(token, file), again)
        except _RottenError as found:
            self._mark(token, file, found)

    def _opened(self, token: str, file: ProductFile) -> int:
        """Open the file by directory handles, never through a link. Raises _RottenError if it is another one."""
        root = _asked(lambda: os.open(self.site.config.staging.root, _DIRECTORY), here=True)
        try:
            directory = _asked(lambda: os.open(token, _DIRECTORY, dir_fd=root), here=True)
        finally:
            os.close(root)
        try:
            descriptor = _asked(lambda: _without_trace(file.name, directory), here=True)
        finally:
            os.close(directory)
        found = os.fstat(descriptor)
        # Device numbers change when a file system is mounted anew: they say nothing of the content.
        if not stat.S_ISREG(found.st_mode) or found.st_ino != file.inode:
            os.close(descriptor)
            raise _RottenError("another file stands under its name", here=True)
        if found.st_size != file.size:
            os.close(descriptor)
            raise _RottenError(f"it has {found.st_size} bytes where {file.size} were recorded")
        return descriptor

    def _read_on(self) -> None:
        reading = self._reading
        if reading is None:
            return
        if os.fstat(reading.descriptor).st_nlink == 0:
            # Swept meanwhile: its space comes back when we let go.
            self._rest()
            return
        length = min(_PIECE, max(_SMALLEST_PIECE, int(self.pace * _SLICE_S)), reading.file.size - reading.position)
        # What lies in memory proves nothing of the disk, and what we read needs no place there.
        _forget(reading.descriptor, reading.position, length)
        piece = _asked(lambda: self.read(reading.descriptor, length, reading.position)) if length else b""
        _forget(reading.descriptor, reading.position, length)
        self._ready_at = max(self._ready_at, self.monotonic()) + len(piece) / self.pace
        reading.digest.update(piece)
        reading.position += len(piece)
        if length and not piece:
            raise _RottenError(f"it ends after {reading.position} of {reading.file.size} bytes")
        if reading.position < reading.file.size:
            return
        if reading.digest.hexdigest() != reading.file.sha256:
            raise _RottenError("its content has another SHA-256 than was recorded")
        self.records.record_verified(reading.file, self.site.clock.now())
        self.close()

    def _judge(self, found: _RottenError) -> None:
        """Believe in rot only after a second look: memory and cables fail too."""
        reading = self._reading
        if reading is None:
            return
        if not reading.again:
            log.warning("%s: %s; reading it again", _place(reading.token, reading.file), found)
            self._open(reading.token, reading.file, again=True)
            return
        self.close()
        self._mark(reading.token, reading.file, found)

    # --- what is rotten ----------------------------------------------------------------------------------------

    def _mark(self, token: str, file: ProductFile, found: _RottenError) -> None:
        """Record a rotten file, unless its directory is on its way out or the whole root is not there."""
        know_root(self.site)
        if found.here and self._goes(token, file):
            self._rest()
            return
        now = self.site.clock.now()
        log.error("%s is rotten: %s", _place(token, file), found)
        step = Step(
            "scrub",
            "are the staged data as recorded?",
            f"the staged {file.name} is rotten: {found}",
            "never linked again, made anew for the next request",
        )
        self.records.record_rotten(file, token if found.here else "", str(found), step, now)
        self._tell(now)

    def _goes(self, token: str, file: ProductFile) -> bool:
        """Return whether a directory was, or is just being, taken out of reach, or stands there again.

        The order counts: a directory is moved away first or recorded first, and removed only after both.
        """
        if token in self.site.staging.retired_tokens():
            return True
        staging = self.site.ledger.staging(token)
        if staging is None or staging.withdrawn_at is not None or staging.expires <= self.site.clock.now():
            return True
        try:
            os.close(self._opened(token, file))
        except _RottenError:
            return False
        return True

    def _tell(self, now: datetime) -> None:
        """Tell the operators of all that is rotten and not told yet, one mail an hour at most."""
        untold = self.records.untold_rotten()
        last = self.records.last_told()
        if not untold or (last is not None and now - last < GATHER):
            return
        parts = [
            _described(file, problem, found_at, self.records.holders(file, token))
            for file, token, problem, found_at in untold[:_MOST_IN_A_MAIL]
        ]
        if len(untold) > _MOST_IN_A_MAIL:
            parts.append(f"And {len(untold) - _MOST_IN_A_MAIL} files more: the log names them all.")
        parts.append(_WHAT_TO_DO)
        first = untold[0][0]
        about = f"{first.device}:{first.inode}:{first.sha256[:16]}:{now:%H:%M:%S}"
        mail = alarm_mail(self.site, "staged data are rotten", "\n\n".join(parts), now, about=about)
        self.records.tell_rotten([(file, token) for file, token, _, _ in untold], mail, now)
        self.wake()


_WHAT_TO_DO = """\
None of these files is linked again; the next request for the same data makes them anew. The directories named above
are still served: nothing was deleted or changed.

1. Look at the disk first (the kernel's log, its self-test): what else lies there?
2. Tell the contacts. Who has fetched the file earlier finds out by its SHA256SUMS whether his copy is good.
3. Place a fresh request for each user who still needs the data. When he has the new link, the old directory can be
   removed by hand; otherwise it goes at its time."""


def _described(
    file: ProductFile,
    problem: str,
    found_at: datetime,
    holders: Sequence[tuple[Staging, ProductFile, Request | None]],
) -> str:
    lines = [f"{file.name} ({readable_size(file.size)}): {problem} (found {_iso(found_at)}). Held by:"]
    for staging, _, request in holders:
        who = (
            f"request {request.id}, ticket {request.ticket}, for {request.user} {request.email}".rstrip()
            + (f", contact {request.contact}" if request.contact else "")
            if request is not None
            else f"request {staging.request or 'unknown'}"
        )
        lines.append(f"- {who}: directory {masked_token(staging.token)}, until {_iso(staging.expires)}")
    return "\n".join(lines if holders else [*lines, "- nobody any more"])


def _iso(moment: datetime) -> str:
    return f"{moment:%Y-%m-%dT%H:%M:%SZ}"


def _place(token: str, file: ProductFile) -> str:
    return f"{masked_token(token)}/{file.name}"


# --- asking the system ------------------------------------------------------------------------------


def _asked(call: Callable[[], _T], *, here: bool = False) -> _T:
    """Return what the system answers. Raises _RottenError or, for what may pass, TransientError."""
    try:
        return call()
    except (FileNotFoundError, NotADirectoryError):
        raise _RottenError("it is gone", here=True) from None
    except OSError as error:
        why = os.strerror(error.errno or 0)
        if error.errno in _PASSING:
            raise TransientError(f"staged data cannot be verified now: {why}") from None
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise _RottenError("another file stands under its name", here=True) from None
        raise _RottenError(f"it cannot be read: {why}", here=here) from None


def _without_trace(name: str, directory: int) -> int:
    """Open a file so that its reading is not recorded as its use, where that is granted."""
    try:
        return os.open(name, _FILE | os.O_NOATIME, dir_fd=directory)
    except PermissionError:
        return os.open(name, _FILE, dir_fd=directory)


def _forget(descriptor: int, position: int, length: int) -> None:
    with suppress(OSError):
        os.posix_fadvise(descriptor, position, length, os.POSIX_FADV_DONTNEED)
