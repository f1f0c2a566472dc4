"""What the ledger keeps beside requests: steps, mails and their recipients, the files of a staging directory."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum


@dataclass(frozen=True)
class Step:
    """One decision on record: which step, what was asked, what was seen, what was decided."""

    step: str
    asked: str = ""
    seen: str = ""
    decided: str = ""


@dataclass(frozen=True)
class RecordedStep:
    """A step with the time at which it was recorded."""

    time: datetime
    step: Step


@dataclass(frozen=True)
class LeftBehind:
    """The directory of a dead job that could not be removed, and since when."""

    node: str
    work: str
    nonce: str
    since: datetime


class MailKind(StrEnum):
    """Which mails there are."""

    REQUEST = "request"
    REFUSAL = "refusal"
    DELIVERED = "delivered"
    RESTORED = "restored"
    FAILED = "failed"
    MALFORMED = "malformed"
    UNDELIVERABLE = "undeliverable"
    ALARM = "alarm"


class RecipientState(StrEnum):
    """What became of one recipient. DROPPED: given up by us, with the reason in the text."""

    PENDING = "pending"
    ACCEPTED = "accepted"
    REFUSED = "refused"
    DROPPED = "dropped"


@dataclass(frozen=True)
class NewMail:
    """A complete message for the outbox. `primary` are the recipients whose acceptance the request waits for."""

    kind: MailKind
    message_id: str
    sender: str
    primary: tuple[str, ...]
    copies: tuple[str, ...]
    message: bytes


@dataclass(frozen=True)
class Recipient:
    """One recipient of a mail in the outbox.

    `tried_since` is when the attempts began; `unconfirmed` that the line once broke after the whole mail was sent.
    """

    address: str
    primary: bool
    state: RecipientState
    attempts: int
    not_before: datetime | None
    text: str
    tried_since: datetime | None = None
    unconfirmed: bool = False


@dataclass(frozen=True)
class OutboxMail:
    """A message in the outbox: rendered once, sent as these bytes however often."""

    id: int
    request: str
    kind: MailKind
    message_id: str
    sender: str
    message: bytes
    created_at: datetime
    recipients: tuple[Recipient, ...]

    @property
    def primary(self) -> tuple[Recipient, ...]:
        """The recipients that matter to the request."""
        return tuple(recipient for recipient in self.recipients if recipient.primary)

    @property
    def accepted(self) -> bool:
        """Whether every primary recipient was accepted by a mail server."""
        return all(recipient.state is RecipientState.ACCEPTED for recipient in self.primary)

    @property
    def refused(self) -> bool:
        """Whether a primary recipient was refused for good or given up."""
        return any(recipient.state in (RecipientState.REFUSED, RecipientState.DROPPED) for recipient in self.primary)

    def pending(self, now: datetime) -> tuple[Recipient, ...]:
        """The recipients to whom it can be sent now."""
        return tuple(
            recipient
            for recipient in self.recipients
            if recipient.state is RecipientState.PENDING
            and (recipient.not_before is None or recipient.not_before <= now)
        )

    @property
    def next_attempt(self) -> datetime | None:
        """When the next pending recipient is due; None if none is pending or one is due at once."""
        times = [recipient.not_before for recipient in self.recipients if recipient.state is RecipientState.PENDING]
        return min((time for time in times if time is not None), default=None) if None not in times else None


@dataclass(frozen=True)
class ProductFile:
    """One file of a staging directory that may be linked again: a product (`execution_block`), or auxiliary ('')."""

    name: str
    execution_block: str
    size: int
    sha256: str
    device: int
    inode: int
    modified_ns: int
