"""A request and the states of its life: which change is possible, and what each state means to the outside.

Each state names a fact that is on disk and what is owed to somebody. The tables here are the whole state machine;
the ledger refuses every change that is not in TRANSITIONS.
"""

from __future__ import annotations

import hashlib
import shlex
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from enum import StrEnum
from typing import Any

from stagecal.domain.verdicts import Verdict


class State(StrEnum):
    """Where a request stands."""

    RECEIVED = "RECEIVED"
    ACCEPTED = "ACCEPTED"
    DISPATCHING = "DISPATCHING"
    STAGING = "STAGING"
    STAGED = "STAGED"
    REFUSED = "REFUSED"
    FAILED = "FAILED"
    HELD = "HELD"
    NOTIFIED = "NOTIFIED"
    WITHDRAWING = "WITHDRAWING"
    CLOSED = "CLOSED"


TRANSITIONS: dict[State, frozenset[State]] = {
    State.RECEIVED: frozenset({State.ACCEPTED, State.REFUSED, State.FAILED, State.WITHDRAWING}),
    State.ACCEPTED: frozenset(
        {State.STAGED, State.DISPATCHING, State.STAGING, State.REFUSED, State.FAILED, State.WITHDRAWING}
    ),
    State.DISPATCHING: frozenset({State.STAGING, State.ACCEPTED, State.FAILED, State.WITHDRAWING}),
    State.STAGING: frozenset({State.STAGED, State.ACCEPTED, State.FAILED, State.REFUSED, State.WITHDRAWING}),
    State.STAGED: frozenset({State.NOTIFIED, State.REFUSED, State.FAILED, State.HELD, State.WITHDRAWING}),
    State.REFUSED: frozenset({State.NOTIFIED, State.FAILED, State.HELD, State.WITHDRAWING}),
    State.FAILED: frozenset({State.HELD, State.WITHDRAWING}),
    State.HELD: frozenset({State.RECEIVED, State.STAGED, State.REFUSED, State.WITHDRAWING}),
    State.NOTIFIED: frozenset({State.CLOSED}),
    State.WITHDRAWING: frozenset({State.CLOSED}),
    State.CLOSED: frozenset(),
}

WITHDRAWABLE = frozenset(state for state, following in TRANSITIONS.items() if State.WITHDRAWING in following)


class Origin(StrEnum):
    """How a request came: by a trigger file, or typed by an operator who stages (stagecalms) or restores (restore)."""

    TRIGGER = "trigger"
    OPERATOR = "operator"
    RESTORE = "restore"


class Outcome(StrEnum):
    """How a request ended."""

    DELIVERED = "delivered"
    REFUSED = "refused"
    WITHDRAWN = "withdrawn"


@dataclass(frozen=True)
class Request:
    """One request as the ledger knows it.

    `sequence` orders the queue. `round` counts how often an operator started it anew. `recipe` identifies the products
    it needs (see domain/products.py), `token` the directory under which it gets them. A job is identified by `node`,
    `work` and `nonce`; `holds_slot` says that it may still be alive, `leased_until` until when it may live without
    hearing from us. `lost_on` are the nodes that lost its job. `seen_in` is the trigger directory (device:inode) in
    which the trigger was seen last. `wish` is what an operator wants done at the next step. `waits_for` is the request
    that makes what this one needs, `failed_with` the one whose failure it shares. `engine` and `casa_home` are what
    `stagecal restore` was told ('': by the site's configuration).
    """

    id: str
    sequence: int
    origin: Origin
    mous: str
    project: str
    ticket: str
    user: str
    email: str
    calfields: tuple[str, ...]
    contact: str
    trigger_name: str
    trigger_text: str
    trigger_sha256: str
    received_at: datetime
    state: State
    since: datetime
    round: int = 0
    outcome: Outcome | None = None
    verdict: Verdict | None = None
    reason: str = ""
    not_before: datetime | None = None
    attempts: int = 0
    judged_on: date | None = None
    execution_blocks: tuple[str, ...] = ()
    calibration: str = ""
    recipe: str = ""
    token: str = ""
    node: str = ""
    work: str = ""
    nonce: str = ""
    holds_slot: bool = False
    lost_on: tuple[str, ...] = ()
    seen_in: str = ""
    missing_since: datetime | None = None
    wish: str = ""
    waits_for: str = ""
    failed_with: str = ""
    engine: str = ""
    casa_home: str = ""
    leased_until: datetime | None = None

    @property
    def command_line(self) -> str:
        """The command by which an operator would do this by hand."""
        if self.origin is Origin.RESTORE:
            options = [("-C", self.casa_home), ("-E", self.email), ("--engine", self.engine)]
            given = [word for option, value in options if value for word in (option, value)]
            return shlex.join(["stagecal", "restore", *given, self.mous])
        words = ["stagecalms", self.project, self.mous, self.ticket]
        if self.calfields:
            words += ["X", ",".join(self.calfields)]
        return shlex.join(words)


def typed_request(request_id: str, origin: Origin, *, mous: str, project: str, at: datetime, **more: Any) -> Request:
    """Return a new request that no trigger file asked for; `more` are other fields that are known of it."""
    nothing: dict[str, Any] = dict.fromkeys(
        ("ticket", "user", "email", "contact", "trigger_name", "trigger_text", "trigger_sha256"), ""
    )
    known = {"sequence": 0, "calfields": (), "received_at": at, "state": State.RECEIVED, "since": at}
    return Request(id=request_id, origin=origin, mous=mous, project=project, **{**nothing, **known, **more})


def request_id(*identity: str) -> str:
    """Return the id of the request with this identity (trigger name, content, number of the same before it)."""
    return hashlib.sha256("\n".join(identity).encode()).hexdigest()[:16]


def uws_phase(request: Request, *, expired: bool) -> str:
    """Return the phase in the words of the IVOA Universal Worker Service 1.1."""
    if request.outcome is Outcome.WITHDRAWN or request.state is State.WITHDRAWING:
        return "ABORTED"
    if request.outcome is Outcome.REFUSED or request.verdict is not None:
        return "ERROR"
    if request.state is State.CLOSED:
        return "ARCHIVED" if expired else "COMPLETED"
    return {
        State.RECEIVED: "PENDING",
        State.ACCEPTED: "QUEUED",
        State.DISPATCHING: "EXECUTING",
        State.STAGING: "EXECUTING",
        State.STAGED: "COMPLETED",
        State.NOTIFIED: "COMPLETED",
        State.FAILED: "ERROR",
        State.HELD: "HELD",
    }[request.state]


def retry_delay(attempts: int) -> timedelta:
    """Return how long to wait after so many attempts in vain: 5 minutes first, doubling up to 67 (as Postfix does)."""
    return timedelta(seconds=min(300 * 2 ** max(0, attempts - 1), 4000))
