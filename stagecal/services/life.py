"""The life of a request: one step per state, repeated until the request rests, ends, or is in somebody else's hands.

Every step saves before its next effect and can be repeated after a crash at any point. Trouble that may pass only moves
`not_before`; what a person must look at ends in FAILED; a programming error is treated as such trouble, never ignored.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta

from stagecal.domain.records import MailKind, RecipientState, Step
from stagecal.domain.requests import WITHDRAWABLE, Origin, Outcome, Request, State, retry_delay
from stagecal.ports import FatalError, JobState, StaleRequestError, TransientError
from stagecal.services.alarms import alarm_mail
from stagecal.services.context import STAGED_DATA_LOCK, Site
from stagecal.services.dispatching import (
    cleaned,
    ended_by_us,
    fail,
    status_now,
    step_accepted,
    step_dispatching,
    step_staging,
)
from stagecal.services.judging import step_received
from stagecal.services.notifying import mail_id_of, step_failed, step_refused, step_staged
from stagecal.services.publishing import stands_as_recorded

log = logging.getLogger(__name__)

_CAN_FAIL = frozenset({State.RECEIVED, State.ACCEPTED, State.DISPATCHING, State.STAGING, State.STAGED, State.REFUSED})
# A poll is no attempt; everything else is counted before it is tried.
_NOT_COUNTED = frozenset({State.ACCEPTED, State.STAGING, State.HELD})
# After so many attempts in vain, some four hours, somebody is told (and once a day from then on).
LASTING_ATTEMPTS = 7


def is_due(request: Request, now: datetime) -> bool:
    """Return whether a step of the request can be taken now."""
    if request.state is State.CLOSED:
        return False
    if request.state is State.HELD and not request.wish:
        return False
    return request.not_before is None or request.not_before <= now


def advance(site: Site, request_id: str) -> bool:
    """Take the steps of a request that can be taken now; return whether anything moved.

    Returns False at once if somebody else is at it.
    """
    moved = False
    with site.locks.try_lock(f"request-{request_id}") as free:
        if not free:
            return False
        while True:
            request = site.ledger.get(request_id)
            now = site.clock.now()
            if not is_due(request, now):
                return moved
            after = _step(site, request, now)
            if after is None or (after.state, after.work, after.holds_slot, after.wish) == (
                request.state,
                request.work,
                request.holds_slot,
                request.wish,
            ):
                return moved
            if after.state is not request.state:
                log.info("request %s: %s -> %s", after.id, request.state, after.state)
            moved = True


def _step(site: Site, request: Request, now: datetime) -> Request | None:
    """Take one step; return the request as it is then, or None if it must rest."""
    try:
        if request.wish:
            return _fulfil(site, request, now)
        if request.state not in _NOT_COUNTED:
            request = site.ledger.commit(request, now=now, attempts=request.attempts + 1)
        return STEPS[request.state](site, request, now)
    except StaleRequestError:
        return None
    except TransientError as trouble:
        # A step may have taken hours: the rest begins now.
        _rest(site, request, str(trouble), site.clock.now())
        return None
    except FatalError as error:
        return _give_up(site, request, str(error), site.clock.now())
    except Exception as error:  # a programming error must not kill the daemon, nor pass in silence
        log.exception("request %s: step %s", request.id, request.state)
        return _give_up(site, request, f"unexpected {type(error).__name__}: {error}", now)


def _rest(site: Site, request: Request, reason: str, now: datetime) -> None:
    """Let the request rest after trouble that may pass; trouble that lasts for hours is told."""
    current = site.ledger.get(request.id)
    attempts = max(current.attempts, request.attempts, 1) + (current.state in _NOT_COUNTED)
    not_before = now + retry_delay(attempts)
    if current.holds_slot:
        # A job's lease must be renewed before it runs out, whatever trouble there was.
        not_before = min(not_before, now + timedelta(hours=site.config.cluster.lease_h) / 4)
    log.warning("request %s rests until %s: %s", request.id, not_before.isoformat(timespec="seconds"), reason)
    step = Step(f"{current.state}".lower(), seen=reason, decided=f"try again at {not_before:%Y-%m-%dT%H:%M:%SZ}")
    mails = []
    if attempts >= LASTING_ATTEMPTS:
        text = f"request {request.id} ({current.state}) has been in trouble for {attempts} attempts: {reason}"
        mails.append(alarm_mail(site, "a request is in lasting trouble", text, now, about=request.id))
    with suppress(StaleRequestError):
        site.ledger.commit(
            current, now=now, step=step, mails=mails, not_before=not_before, attempts=attempts, reason=reason
        )


def _give_up(site: Site, request: Request, reason: str, now: datetime) -> Request | None:
    """Let the request fail, or, where it owes only an end, tell a person and rest. Never raises."""
    current = site.ledger.get(request.id)
    try:
        if current.state in _CAN_FAIL:
            log.error("request %s failed: %s", request.id, reason)
            return fail(site, current, reason, now)
        log.error("request %s (%s): %s", request.id, current.state, reason)
        text = f"request {request.id} ({current.state}) cannot go on: {reason}"
        site.ledger.enqueue(request.id, [alarm_mail(site, "a request cannot go on", text, now, about=request.id)], now)
        if current.wish:
            site.ledger.commit(current, now=now, wish="", step=Step("operator", current.wish, reason, "not possible"))
            return None
    except (StaleRequestError, TransientError, FatalError) as error:
        log.error("request %s: %s", request.id, error)
    _rest(site, request, reason, now)
    return None


# --- what operators want -------------------------------------------------------------------------------------------


def _fulfil(site: Site, request: Request, now: datetime) -> Request:
    if request.wish == "withdraw" and request.state in WITHDRAWABLE:
        return site.ledger.commit(
            request, now=now, to=State.WITHDRAWING, wish="", step=Step("withdraw", decided="WITHDRAWING")
        )
    if request.wish == "retry" and request.state is State.HELD:
        return _retry(site, request, now)
    return site.ledger.commit(request, now=now, wish="", step=Step("operator", seen=request.wish, decided="too late"))


def _retry(site: Site, request: Request, now: datetime) -> Request:
    """Start a HELD request again: only its mail if its data are published and as recorded, else from the beginning."""
    if request.verdict is not None or (request.token and stands_as_recorded(site, request.token)):
        _try_mail_again(site, request, now)
        return site.ledger.commit(
            request,
            now=now,
            to=State.REFUSED if request.verdict is not None else State.STAGED,
            wish="",
            reason="",
            step=Step("retry", decided="send the mail again"),
        )
    if request.work:
        request = cleaned(site, request, now)
    withdraw_data(site, request, now)
    return site.ledger.commit(
        request,
        now=now,
        to=State.RECEIVED,
        wish="",
        round=request.round + 1,
        reason="",
        token="",
        recipe="",
        node="",
        work="",
        nonce="",
        leased_until=None,
        lost_on=(),
        waits_for="",
        failed_with="",
        step=Step("retry", decided="from the beginning"),
    )


def _try_mail_again(site: Site, request: Request, now: datetime) -> None:
    """Let the mail that was refused be tried again: the same bytes, under the same Message-ID."""
    kind = MailKind.REFUSAL if request.verdict is not None else MailKind.DELIVERED
    mail = site.ledger.mail(mail_id_of(site, request, kind))
    if mail is not None:
        again = [
            replace(one, state=RecipientState.PENDING, not_before=None, attempts=0, tried_since=now)
            for one in mail.primary
            if one.state is not RecipientState.ACCEPTED
        ]
        site.ledger.update_recipients(mail.id, again)


def withdraw_data(site: Site, request: Request, now: datetime) -> None:
    """Take what stands under the request's token out of reach, published or not; the token is never used again."""
    if not request.token:
        return
    with site.locks.lock(STAGED_DATA_LOCK):
        staging = site.ledger.staging(request.token)
        site.staging.discard(request.token)
        site.staging.withdraw(request.token)
        if staging is not None and staging.withdrawn_at is None:
            site.ledger.update_staging(replace(staging, withdrawn_at=now), now)


def step_withdrawing(site: Site, request: Request, now: datetime) -> Request:
    """WITHDRAWING: end what was begun for the request; its slot stays taken until its job is proven dead."""
    if request.holds_slot:
        alive = status_now(site, request, now).state in (JobState.RUNNING, JobState.EXITED)
        heir = _heir(site, request) if alive else None
        if heir is not None:
            with site.locks.try_lock(f"request-{heir.id}") as free:
                if not free:
                    return site.ledger.commit(request, now=now, not_before=now + timedelta(seconds=1))
                site.ledger.hand_over_job(request, heir, now)
            return site.ledger.get(request.id)
        status = ended_by_us(site, request, now)
        if status.state in (JobState.RUNNING, JobState.UNREACHABLE):
            return site.ledger.commit(request, now=now, not_before=now + timedelta(seconds=1))
        return site.ledger.commit(
            request, now=now, holds_slot=False, step=Step("cancel", "does the job live?", status.state, "slot free")
        )
    is_restored = request.origin is Origin.RESTORE and status_now(site, request, now).state is JobState.EXITED
    if request.work and not is_restored:
        request = cleaned(site, request, now, tries=3)
    withdraw_data(site, request, now)
    return _close(site, request, now, Outcome.WITHDRAWN)


def _heir(site: Site, request: Request) -> Request | None:
    """Return the request that waits for the products of a job that is withdrawn."""
    waiting = [
        other
        for other in site.ledger.open_requests()
        if other.id != request.id
        and other.recipe == request.recipe
        and other.state is State.ACCEPTED
        and not other.wish
    ]
    return min(waiting, key=lambda other: other.sequence, default=None)


def step_notified(site: Site, request: Request, now: datetime) -> Request:
    """NOTIFIED: nobody is owed anything any more; the trigger goes last."""
    return _close(site, request, now, request.outcome or Outcome.DELIVERED)


def _close(site: Site, request: Request, now: datetime, outcome: Outcome) -> Request:
    seen = "there was none"
    if request.trigger_name:
        gone = site.triggers.remove(request.trigger_name, request.trigger_sha256)
        seen = "gone" if gone else "its content changed meanwhile: left in place, it counts as a new request"
    return site.ledger.commit(
        request,
        now=now,
        to=State.CLOSED,
        outcome=outcome,
        wish="",
        step=Step("close", "is the trigger gone?", seen, outcome),
    )


STEPS: dict[State, Callable[[Site, Request, datetime], Request]] = {
    State.RECEIVED: step_received,
    State.ACCEPTED: step_accepted,
    State.DISPATCHING: step_dispatching,
    State.STAGING: step_staging,
    State.STAGED: step_staged,
    State.REFUSED: step_refused,
    State.FAILED: step_failed,
    State.NOTIFIED: step_notified,
    State.WITHDRAWING: step_withdrawing,
}
