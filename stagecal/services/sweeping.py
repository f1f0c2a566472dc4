"""Deletes staged data whose time is over: first the whole plan, then each directory by itself.

A directory is first moved out of the web server's reach by a rename, looked at once more, and then removed by its
handle. In doubt (clock, root, too many at once) nothing is deleted and somebody is told.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from stagecal.domain.requests import Outcome
from stagecal.domain.retention import Staging, SweepPlan, plan_sweep
from stagecal.ports import FatalError, TransientError
from stagecal.services.context import STAGED_DATA_LOCK, Site

_ROOT = "staging-root"
CLOCK_TOLERANCE = timedelta(minutes=5)
"""How much earlier than the newest record the clock may be: the daemon records while a sweep looks."""


@dataclass
class SweepResult:
    """What a sweep did: tokens deleted, bytes freed (per inode), tokens put back, and troubles by token."""

    deleted: list[str] = field(default_factory=list)
    freed: int = 0
    kept: list[str] = field(default_factory=list)
    troubles: dict[str, str] = field(default_factory=dict)


def know_root(site: Site) -> None:
    """Remember the staging root at its first use. Raises FatalError if it is not the one that is known."""
    identity = site.staging.identity()
    known = site.ledger.setting(_ROOT)
    if not known:
        site.ledger.set_setting(_ROOT, identity)
    elif known != identity:
        raise FatalError(
            f"{site.config.staging.root} is not the staging root that this service knows: is the right disk mounted?"
        )


def plan(site: Site, now: datetime) -> SweepPlan:
    """Return what a sweep would do now."""
    newest = site.ledger.newest_time()
    stagings = site.ledger.stagings()
    present = list(site.staging.tokens())
    owed = {request.token for request in site.ledger.open_requests() if request.token}
    try:
        root_is_known = site.staging.identity() == site.ledger.setting(_ROOT)
    except (TransientError, FatalError):
        root_is_known = False
    return plan_sweep(
        stagings,
        present=present,
        kept=[token for token in present if site.staging.is_kept(token)],
        owed=owed,
        now=now,
        newest_known=newest - CLOCK_TOLERANCE if newest else None,
        root_is_known=root_is_known,
    )


def sweep(
    site: Site, sweep_plan: SweepPlan, now: datetime, told: Callable[[str], None] = lambda line: None
) -> SweepResult:
    """Carry a plan out; also finish what an interrupted sweep or withdrawal left out of reach.

    A directory that makes trouble does not stop the others. What is done is recorded with the real time, also where
    `now` is another one for a test.
    """
    result = SweepResult()
    for staging in sweep_plan.delete:
        try:
            with site.locks.lock(STAGED_DATA_LOCK):
                if not _still_expired(site, staging, now):
                    result.kept.append(staging.token)
                    continue
                recorded = site.clock.now()
                site.ledger.update_staging(replace(staging, withdrawn_at=recorded), recorded)
                site.staging.withdraw(staging.token)
        except (TransientError, FatalError) as trouble:
            result.troubles[staging.token] = str(trouble)
    present = set(site.staging.tokens())
    for staging in site.ledger.stagings():
        if staging.withdrawn_at is not None or (staging.token not in present and staging.expires <= now):
            _purge(site, staging, result)
    try:
        _clear_leftovers(site, result)
    except (TransientError, FatalError) as trouble:
        result.troubles["leftovers"] = str(trouble)
    for token in result.deleted:
        told(token)
    return result


def _still_expired(site: Site, planned: Staging, now: datetime) -> bool:
    """Look again under the lock: somebody may have extended it, kept it, or owe it again."""
    current = site.ledger.staging(planned.token)
    owed = {request.token for request in site.ledger.open_requests()}
    return (
        current is not None
        and current.withdrawn_at is None
        and current.expires <= now
        and current.token not in owed
        and not site.staging.is_kept(current.token)
    )


def _purge(site: Site, staging: Staging, result: SweepResult) -> None:
    now = site.clock.now()
    try:
        site.staging.withdraw(staging.token)
        freed = site.staging.purge(staging.token)
        if freed < 0 and _was_refused(site, staging):
            # A `.donotremove` keeps data for their user; data that nobody may have stay out of reach.
            site.staging.withdraw(staging.token)
            result.kept.append(staging.token)
            return
        if freed < 0:
            site.ledger.update_staging(replace(staging, withdrawn_at=None), now)
            result.kept.append(staging.token)
            return
        site.ledger.update_staging(replace(staging, purged_at=now), now)
        result.deleted.append(staging.token)
        result.freed += freed
    except (TransientError, FatalError) as trouble:
        result.troubles[staging.token] = str(trouble)


def _was_refused(site: Site, staging: Staging) -> bool:
    try:
        return site.ledger.get(staging.request).outcome is not Outcome.DELIVERED
    except KeyError:
        return False


def _clear_leftovers(site: Site, result: SweepResult) -> None:
    """Remove what broken attempts and withdrawn requests left out of the web server's reach."""
    used = {request.token for request in site.ledger.open_requests() if request.token}
    known = {staging.token for staging in site.ledger.stagings()}
    for token in site.staging.incoming_tokens():
        if token not in used:
            site.staging.discard(token)
    for token in site.staging.retired_tokens():
        if token not in used and token not in known:
            result.freed += max(0, site.staging.purge(token))


def extend(site: Site, token: str, days: int, now: datetime) -> Staging:
    """Keep a published directory so many days longer. Raises FatalError if it is not there any more."""
    with site.locks.lock(STAGED_DATA_LOCK):
        staging = site.ledger.staging(token)
        if staging is None or staging.withdrawn_at is not None:
            raise FatalError("this directory is not published (any more): the data must be requested again")
        longer = replace(staging, extension_days=staging.extension_days + days)
        site.ledger.update_staging(longer, now)
        return longer
