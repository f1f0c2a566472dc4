"""What the services need of the world, as protocols, and the three kinds of error that it answers with.

An adapter implements one of these protocols; one contract suite per protocol (tests/contracts) holds for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from stagecal.domain.archive_facts import MousFacts
from stagecal.domain.records import LeftBehind, NewMail, OutboxMail, ProductFile, Recipient, RecordedStep, Step
from stagecal.domain.requests import Request, State
from stagecal.domain.restore.chosen import ChosenRestore
from stagecal.domain.restore.facts import RestoreFacts
from stagecal.domain.retention import Staging


class UsageError(Exception):
    """The caller asked for something that cannot be; the message says what to change."""


class TransientError(Exception):
    """The surroundings failed for now; the same step may be tried again later."""


class FatalError(Exception):
    """Something is wrong that waiting does not mend: a person has to look."""


class Clock(Protocol):
    """The time, so that tests can choose it."""

    def now(self) -> datetime:
        """Return the present time, timezone-aware, in UTC."""
        ...


class Archive(Protocol):
    """The archive's database, read only."""

    def facts(self, mous: str) -> MousFacts | None:
        """Given a MOUS UID (uid://...), return what the archive knows, or None if it knows no such MOUS.

        Raises TransientError if the archive cannot be asked now, FatalError if it answers what cannot be
        (wrong credentials, a missing table, two projects for one MOUS, a date that is none).
        """
        ...

    def restore_facts(self, mous: str) -> RestoreFacts | None:
        """Given a MOUS UID, return what the planning of its restore needs, or None; raises as `facts`."""
        ...

    def mous_of(self, execution_block: str) -> Sequence[str]:
        """Given the UID of an execution block, return the MOUSs it belongs to (usually one); raises as `facts`."""
        ...

    def delivered_since(self, since: datetime) -> Sequence[str]:
        """Return the delivered MOUSs that changed at or after this time, the oldest first; raises as `facts`."""
        ...


# --- cluster nodes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NodeLoad:
    """One look at a node. `load_per_core` is None if it did not answer in time or must not have jobs; `trouble` then
    says why.

    `alarm` says that the trouble is one of security, which a person has to hear of: another host key than the pinned.
    `clock_off_s` is by how many seconds its clock is ahead of this machine's (less than 0: behind), to a second or
    two; None where that is not asked.
    """

    name: str
    load_per_core: float | None
    labels: tuple[str, ...] = ()
    trouble: str = ""
    alarm: bool = False
    clock_off_s: float | None = None


class JobState(StrEnum):
    """What is known of a job. Only EXITED is an end that the job reported itself; LOST is proven, UNREACHABLE open."""

    NOT_STARTED = "not started"
    RUNNING = "running"
    EXITED = "exited"
    LOST = "lost"
    UNREACHABLE = "unreachable"


@dataclass(frozen=True)
class JobStatus:
    """The answer to a poll. `exit_code` is set for EXITED only; `detail` is for people."""

    state: JobState
    exit_code: int | None = None
    detail: str = ""


@dataclass(frozen=True)
class JobHandle:
    """How a job is found again: its node, its directory (WORK<n>) below the work area, its nonce."""

    node: str
    work: str
    nonce: str


class Nodes(Protocol):
    """The cluster's nodes: where jobs run, detached from us.

    A job directory is `<work_area>/<work>`. It holds the files given to `prepare`, of which `run.sh` is started;
    `output` collects the job's whole terminal output. Every call may raise TransientError (the node cannot be
    reached; the outcome of a launch is then unknown) or FatalError.
    """

    def loads(self) -> Sequence[NodeLoad]:
        """Return one look at each configured node; never waits long for a silent one."""
        ...

    def prepare(self, job: JobHandle, files: Mapping[str, bytes]) -> None:
        """Make the job directory with these files (names may contain one `/`). Doing it again changes nothing."""
        ...

    def launch(self, job: JobHandle, lease_until: datetime) -> None:
        """Start `run.sh` detached, at most once per job directory however often this is called."""
        ...

    def poll(self, job: JobHandle) -> JobStatus:
        """Return what is known of the job now."""
        ...

    def renew_lease(self, job: JobHandle, until: datetime) -> None:
        """Let the job live until this time; it ends itself when its lease has run out."""
        ...

    def output(self, job: JobHandle) -> str:
        """Return the job's terminal output so far (its last mebibyte, if it is longer), undecodable bytes replaced."""
        ...

    def directory(self, job: JobHandle) -> Path:
        """Return the job directory's path on its node; on this machine too, where the work area is shared."""
        ...

    def fetch(self, job: JobHandle, tell: Callable[[int, int], None]) -> Path:
        """Bring the results of a job that ended (products/, auxiliary/, report.json) to where this machine reads them.

        Returns that directory: the job directory itself where the work area is shared. `tell` hears now and then how
        many bytes of how many are here. What was fetched before a broken attempt is used; sizes and digests are
        compared end to end.
        """
        ...

    def cancel(self, job: JobHandle) -> None:
        """End the job with all its processes. Returns at once; `poll` tells when it is proven dead.

        A job that was never launched can no longer be launched afterwards; `poll` then answers LOST.
        """
        ...

    def clean(self, job: JobHandle) -> None:
        """Remove the job directory of a job that is not alive, and what was fetched of it. What is gone is fine."""
        ...


# --- mail ----------------------------------------------------------------------------------------------------------


class MailReply(StrEnum):
    """What became of one recipient in one attempt. UNKNOWN: the line broke after the message was sent."""

    ACCEPTED = "accepted"
    TRANSIENT = "transient"
    REFUSED = "refused"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class RecipientResult:
    """The outcome for one recipient and the server's words."""

    reply: MailReply
    text: str = ""


class Mailer(Protocol):
    """Hands one message to the site's mail system."""

    def send(self, sender: str, recipients: Sequence[str], message: bytes) -> Mapping[str, RecipientResult]:
        """Send the message (complete, CRLF line ends) to these envelope recipients; return a result for each.

        Trouble of any kind is a result, never an exception.
        """
        ...


# --- triggers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DirectoryIdentity:
    """Which directory it is that was looked at: a remount or a replacement gives another one."""

    device: int
    inode: int


@dataclass(frozen=True)
class TriggerEntry:
    """One entry of the trigger directory as it was read through a file descriptor.

    `problem` is empty for a plain file that may be read (then `content` is its bytes), else why it must be
    quarantined: a symbolic link, no regular file, larger than 64 KiB, an owner who may not ask.
    """

    name: str
    content: bytes = b""
    problem: str = ""


@dataclass(frozen=True)
class Listing:
    """A complete look at the trigger directory: everything in it that is meant for us, sorted by name."""

    directory: DirectoryIdentity
    entries: tuple[TriggerEntry, ...] = field(default=())


class Triggers(Protocol):
    """The watched directory. Listing it is the truth; events only say when to look."""

    def look(self) -> Listing:
        """List and read. Raises TransientError if the directory cannot be listed completely."""
        ...

    def reserve(self, mous: str, at: datetime) -> str:
        """Reserve the name of a new trigger (the next free second at or after `at`), invisible to readers."""
        ...

    def write_reserved(self, name: str, content: bytes) -> None:
        """Write the reserved file's content durably; it stays invisible."""
        ...

    def publish(self, name: str) -> None:
        """Make the reserved file appear under its name, whole, at once."""
        ...

    def abandon(self, name: str) -> None:
        """Give a reservation up: nothing stays behind."""
        ...

    def remove(self, name: str, content_sha256: str) -> bool:
        """Remove the trigger if it still has this content, durably; return whether it is gone afterwards.

        True also if it was gone already; False (nothing removed) if another content stands under the name.
        """
        ...

    def quarantine(self, name: str, reason: str) -> str:
        """Move an entry to `rejected/` with a file that says why; return its name there."""
        ...


# --- the staging area ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StagedFile:
    """One file of a staging directory: name, size in bytes, SHA-256 (hex), and which inode it is."""

    name: str
    size: int
    sha256: str
    device: int
    inode: int
    modified_ns: int


class SourceVanishedError(Exception):
    """A file that was to be linked is gone or no longer the one that was recorded."""


class StagingArea(Protocol):
    """The root that the web server shows: one directory per token, made invisibly and published by one rename.

    OSError of the disk is raised as TransientError (no space, quota) or FatalError.
    """

    def free_bytes(self) -> int:
        """Return the free space of the staging file system for us, in bytes."""
        ...

    def begin(self, token: str) -> None:
        """Make an empty invisible directory for this token; what a broken attempt left is removed."""
        ...

    def pack(self, token: str, name: str, source: Path) -> StagedFile:
        """Write a tar file of the directory `source` (members below its own name), durably."""
        ...

    def copy(self, token: str, name: str, source: Path) -> StagedFile:
        """Copy one plain file durably."""
        ...

    def link(self, token: str, file: StagedFile, source_token: str) -> StagedFile:
        """Hard-link the recorded file of another published token; raises SourceVanishedError if it is not that file."""
        ...

    def write(self, token: str, name: str, content: bytes, *, executable: bool = False) -> StagedFile:
        """Write a small file durably."""
        ...

    def draft(self, token: str, name: str) -> Path:
        """Return the path of a file in the invisible directory of this token, for looking into it before it appears."""
        ...

    def publish(self, token: str) -> None:
        """Let the complete directory appear under its token by one rename, durably. Already published is fine."""
        ...

    def is_published(self, token: str) -> bool:
        """Return whether the directory stands under its token."""
        ...

    def read(self, token: str, name: str) -> bytes:
        """Return a small file of a published directory. Raises FileNotFoundError."""
        ...

    def files(self, token: str) -> Mapping[str, tuple[int, int, int, int]]:
        """Return name -> (device, inode, size, modified_ns) of the regular files of a published directory."""
        ...

    def tokens(self) -> Iterable[str]:
        """Return the names in the root that look like tokens and are real directories on the root's file system."""
        ...

    def is_kept(self, token: str) -> bool:
        """Return whether somebody put a `.donotremove` into the directory."""
        ...

    def withdraw(self, token: str) -> None:
        """Move a published or invisible directory out of the served root's reach by one rename; gone is fine."""
        ...

    def purge(self, token: str) -> int:
        """Remove a withdrawn directory by directory handle, never through a link; return the bytes freed.

        If a `.donotremove` is in it, it is put back under its token and -1 is returned.
        """
        ...

    def discard(self, token: str) -> None:
        """Remove what an attempt left in the invisible directory of this token."""
        ...

    def incoming_tokens(self) -> Iterable[str]:
        """Return the tokens whose invisible directories are there."""
        ...

    def retired_tokens(self) -> Iterable[str]:
        """Return the tokens whose withdrawn directories are not purged yet."""
        ...

    def identity(self) -> str:
        """Return the identity of the root (a marker file made at first use). Raises TransientError if it has none
        although directories stand in it, or cannot be read."""
        ...


class Locks(Protocol):
    """Exclusion between threads, daemon and commands on this machine; a dead holder never blocks."""

    def try_lock(self, name: str) -> AbstractContextManager[bool]:
        """Return a context whose value says whether the lock was free; it is held within the context."""
        ...

    def lock(self, name: str) -> AbstractContextManager[None]:
        """Return a context that waits for the lock and holds it. Raises TransientError after the time-out."""
        ...


@dataclass(frozen=True)
class EngineJob:
    """A job of an engine: the label that its node must have ('' for any), and the files of its job directory.

    `is_old` says that it runs an old build of CASA (for RHEL5); `reason` why it is this engine.
    """

    engine: str
    reason: str
    label: str
    is_old: bool
    files: Mapping[str, bytes]


class Engines(Protocol):
    """How calibrated MSs are made at this site."""

    def identity(self, project: str) -> str:
        """Return name and version of what would make the products of this project, for the calibration id."""
        ...

    def available(self) -> Mapping[str, str]:
        """Return the engines that this site has the parts for, each with the version of the CASA that it always uses.

        The version is '' if it is unknown, or another one for each project.
        """
        ...

    def job(self, request: Request, restore: ChosenRestore | None) -> EngineJob:
        """Return the job of a request; `restore` is None for the site's own command, which plans for itself.

        `request.work` names the job directory. Raises FatalError if a part of the engine is not there.
        """
        ...


class ProductFiles(Protocol):
    """Where the archive keeps product files."""

    def read(self, names: Sequence[str]) -> Mapping[str, bytes]:
        """Return the content of some small files. Raises TransientError, or FatalError for a file that is not there."""
        ...


class Templates(Protocol):
    """The texts of mails, pages and job scripts; a site may replace each of them."""

    def render(self, name: str, /, **values: Any) -> str:
        """Given the template's name (`mails/delivered.txt`), return its text. A missing value is a FatalError."""
        ...


# --- the ledger ----------------------------------------------------------------------------------------------------


class StaleRequestError(Exception):
    """The request is no longer in the state from which the change started: somebody else moved it."""


class Ledger(Protocol):
    """What the service knows and owes, on local disk. Every method is one transaction, durable when it returns.

    Raises TransientError if the database is locked for too long, FatalError if it is damaged or of another version.
    """

    def add(self, request: Request, step: Step) -> Request | None:
        """Record a new request at the end of the queue (its `sequence` is given here); None if the id is known."""
        ...

    def get(self, request_id: str) -> Request:
        """Return a request by its full id. Raises KeyError."""
        ...

    def find(self, prefix: str) -> Sequence[Request]:
        """Return the requests whose id begins so."""
        ...

    def open_requests(self) -> Sequence[Request]:
        """Return the requests that are not CLOSED, in the order of the queue."""
        ...

    def requests(self, limit: int | None = None) -> Sequence[Request]:
        """Return all requests in the order of the queue, or the last `limit` of them."""
        ...

    def count_named(self, trigger_name: str) -> int:
        """Return how many CLOSED requests came from a trigger of this name."""
        ...

    def commit(
        self,
        request: Request,
        *,
        now: datetime,
        step: Step | None = None,
        to: State | None = None,
        terminal: Sequence[str] = (),
        mails: Sequence[NewMail] = (),
        staging: Staging | None = None,
        files: Sequence[ProductFile] = (),
        absent: Sequence[str] = (),
        **changes: Any,
    ) -> Request:
        """Change a request, all or nothing, and return it as it is now.

        `step` is added to its history, `terminal` to its terminal output, `mails` to the outbox (one whose Message-ID
        is known already is left as it is), `staging` with `files` and the EBs `absent` from it to the staged data.
        Raises StaleRequestError if its state is not the one of the given `request`.
        """
        ...

    def claim_slot(
        self,
        request: Request,
        *,
        max_jobs: int,
        max_on_node: int | None = None,
        now: datetime,
        step: Step,
        **changes: Any,
    ) -> Request | None:
        """Move the request to DISPATCHING with a slot, unless so many requests hold one already: then None.

        `max_on_node` limits in the same way how many of them are on the node of `changes`.
        """
        ...

    def hand_over_job(self, request: Request, heir: Request, now: datetime) -> None:
        """Give the job of a request that is withdrawn to the heir, who goes on with it in STAGING."""
        ...

    def leave_behind(self, left: LeftBehind) -> None:
        """Note a job directory that could not be removed."""
        ...

    def left_behind(self) -> Sequence[LeftBehind]:
        """Return the job directories that could not be removed, the oldest first."""
        ...

    def forget_left(self, left: LeftBehind) -> None:
        """Forget a job directory that is gone, or given up."""
        ...

    def set_wish(self, request_id: str, wish: str, now: datetime) -> None:
        """Note what an operator wants done with the request at its next step."""
        ...

    def steps(self, request_id: str) -> Sequence[RecordedStep]:
        """Return the history of a request."""
        ...

    def note(self, request_id: str, step: Step, now: datetime) -> None:
        """Add a step to the history of a request (or of none: '') without changing it."""
        ...

    def terminal(self, request_id: str, after: int = 0) -> Sequence[tuple[int, str]]:
        """Return the lines of a request's terminal output with their numbers, those above `after`."""
        ...

    def enqueue(self, request_id: str, mails: Sequence[NewMail], now: datetime) -> None:
        """Put mails into the outbox; one whose Message-ID is known already is left as it is."""
        ...

    def mail(self, message_id: str) -> OutboxMail | None:
        """Return a mail of the outbox."""
        ...

    def unsent_mails(self) -> Sequence[OutboxMail]:
        """Return the mails with pending recipients, the oldest first."""
        ...

    def update_recipients(self, mail_id: int, recipients: Sequence[Recipient]) -> None:
        """Record what became of these recipients of a mail."""
        ...

    def stagings(self) -> Sequence[Staging]:
        """Return all staged directories on record that were not purged, by their expiry."""
        ...

    def staging(self, token: str) -> Staging | None:
        """Return one staged directory on record."""
        ...

    def staged_files(self, token: str) -> tuple[Sequence[ProductFile], Sequence[str]]:
        """Return the files of a staged directory that may be linked again, and the EBs absent from it."""
        ...

    def update_staging(self, staging: Staging, now: datetime) -> None:
        """Record a change of a staged directory."""
        ...

    def newest_time(self) -> datetime | None:
        """Return the newest time that any record bears."""
        ...

    def setting(self, name: str) -> str:
        """Return a setting of the service (`held`, `root`), '' if it was never set."""
        ...

    def set_setting(self, name: str, value: str) -> None:
        """Keep a setting of the service."""
        ...
