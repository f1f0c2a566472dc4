"""One round of work over everything that is open, and what is left to wait for.

The daemon, `stagecalms` and the tests all work in such rounds. A round looks at the trigger directory, takes every
step that can be taken, and sends the mails that nobody waits for. Long steps run beside each other in threads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial

from stagecal.domain.requests import Request, State
from stagecal.domain.turns import Turns
from stagecal.ports import FatalError, TransientError
from stagecal.services.alarms import alarm_mail
from stagecal.services.context import Site
from stagecal.services.dispatching import turns_of
from stagecal.services.life import advance, is_due
from stagecal.services.notifying import deliver_due
from stagecal.services.receiving import Receiver

log = logging.getLogger(__name__)

IDLE_TICK = timedelta(seconds=1)
SOON = timedelta(seconds=60)
_MAILS = "mails"


@dataclass(frozen=True)
class RoundResult:
    """What a round did: whether anything moved, and when the next one is needed at the latest (None: on an event)."""

    moved: bool
    next_at: datetime | None


@dataclass
class Rounds:
    """The worker of a process. Without an executor every step is taken in the caller's thread.

    Mails have an executor of their own (`post`), so that steps of hours never keep them waiting.

    `wake` is called when a step that ran in a thread is over. `waiting` remembers in which situation each accepted
    request was looked at last.
    """

    site: Site
    receiver: Receiver | None = None
    executor: Executor | None = None
    post: Executor | None = None
    wake: Callable[[], None] = lambda: None
    in_flight: dict[str, Future[bool]] = field(default_factory=dict)
    next_mail_at: datetime | None = None
    look_again_at: datetime | None = None
    waiting: dict[str, tuple[datetime, str, datetime | None]] = field(default_factory=dict)

    def run(self) -> RoundResult:
        """Do one round."""
        now = self.site.clock.now()
        moved, next_at = self._look(now)
        requests = self.site.ledger.open_requests()
        now_turns = turns_of(self.site, now)
        for request in requests:
            if is_due(request, now) and self._has_cause(request, now_turns):
                moved |= self._do(request.id, partial(advance, self.site, request.id))
        # A mail server may keep us waiting for minutes: nobody else waits with us.
        moved |= self._do(_MAILS, self._send)
        self.in_flight = {key: future for key, future in self.in_flight.items() if not future.done()}
        # While mails are on their way their time is past, and nothing is to be done about them.
        times = [next_at, None if _MAILS in self.in_flight else self.next_mail_at]
        for request in self.site.ledger.open_requests():
            if _rests(request) or request.id in self.in_flight:
                continue
            # What has no time of its own waits for its turn, which another process may give it.
            times.append(request.not_before or now + IDLE_TICK)
        return RoundResult(moved, min((time for time in times if time is not None), default=None))

    def _has_cause(self, request: Request, now_turns: Turns) -> bool:
        """Return whether there is anything to do for a request: one that waits its turn costs nothing meanwhile."""
        if request.state is not State.ACCEPTED or request.wish:
            self.waiting.pop(request.id, None)
            return True
        situation = (request.since, now_turns.makers.get(request.id, ""), request.not_before)
        changed = self.waiting.get(request.id) != situation
        self.waiting[request.id] = situation
        return changed or now_turns.may_start(request.id)

    def _look(self, now: datetime) -> tuple[bool, datetime | None]:
        if self.receiver is None:
            return False, None
        if self.look_again_at is not None and now < self.look_again_at:
            return False, self.look_again_at
        try:
            new, again = self.receiver.look(now)
        except (TransientError, FatalError) as trouble:
            # Said once per scan interval, however often something else wakes the loop.
            self.look_again_at = now + timedelta(seconds=self.site.config.triggers.scan_interval_s)
            log.error("the trigger directory cannot be looked at: %s", trouble)
            alarm = alarm_mail(self.site, "the trigger directory cannot be read", str(trouble), now)
            self.site.ledger.enqueue("", [alarm], now)
            return False, self.look_again_at
        self.look_again_at = None
        if self.receiver.watched_for():
            again = min(filter(None, (again, now + IDLE_TICK)))
        return bool(new), again

    def _do(self, name: str, work: Callable[[], bool]) -> bool:
        """Do some work here, or in a thread unless the same is being done already; return whether it moved."""
        if self.executor is None:
            return work()
        running = self.in_flight.get(name)
        if running is None or running.done():
            executor = self.post if name == _MAILS and self.post is not None else self.executor
            self.in_flight[name] = executor.submit(work)
            self.in_flight[name].add_done_callback(partial(self._done, name))
        return False

    def _done(self, name: str, future: Future[bool]) -> None:
        error = future.exception()
        if error is not None:
            log.error("a step of %s ended by %s: %s", name, type(error).__name__, error)
        # The loop has counted on this step: it looks again when the step is over, whatever came of it.
        if name != _MAILS:
            self.wake()

    def _send(self) -> bool:
        now = self.site.clock.now()
        try:
            self.next_mail_at = deliver_due(self.site, now)
        except (TransientError, FatalError) as trouble:
            log.warning("mails have to wait: %s", trouble)
            self.next_mail_at = now + timedelta(minutes=1)
        return False

    def _busy(self) -> bool:
        return any(not future.done() for future in self.in_flight.values())

    def is_idle(self) -> bool:
        """Return whether no request can move any more by itself, HELD ones aside."""
        held = bool(self.site.ledger.setting("held"))
        return (
            not self._busy()
            and self.look_again_at is None
            and all(
                _rests(request) or (held and request.id in self.waiting and not request.wish)
                for request in self.site.ledger.open_requests()
            )
            and not (self.receiver is not None and self.receiver.unfinished)
            and not self.site.ledger.unsent_mails()
        )

    def waits_long(self, now: datetime) -> bool:
        """Return whether everything that is still open waits for a time more than a minute away."""
        if self._busy():
            return False
        times = [request.not_before for request in self.site.ledger.open_requests() if not _rests(request)]
        times += [mail.next_attempt for mail in self.site.ledger.unsent_mails()]
        if self.receiver is not None and self.receiver.unfinished:
            times += [min(self.receiver.unfinished.values()) + self._incomplete_after]
        return bool(times) and all(time is not None and time - now > SOON for time in times)

    @property
    def _incomplete_after(self) -> timedelta:
        return timedelta(seconds=self.site.config.triggers.incomplete_after_s)


def _rests(request: Request) -> bool:
    return request.state is State.CLOSED or (request.state is State.HELD and not request.wish)
