"""Whose turn it is: which waiting request may start a job now, and who makes what another one waits for.

One queue. Every user's requests are served in the order in which they came; between users, the one with fewer jobs
alive and fewer requests ahead comes first, so that somebody who asks for twenty MOUSs keeps nobody with one waiting.
Among equals it is first come first served. A request that rests after trouble of its own keeps nobody else waiting;
requests that need the same products wait for the one that makes them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from stagecal.domain.requests import Request, State

_MAKING = frozenset({State.DISPATCHING, State.STAGING})


@dataclass(frozen=True)
class Turns:
    """The queue as it is now.

    `makers` says for each accepted request that must wait for another one's products, whose; `queue` are the others
    in their order; `free_slots` is how many jobs may be started (0 while dispatching is held).
    """

    makers: Mapping[str, str]
    queue: tuple[str, ...]
    free_slots: int

    def may_start(self, request_id: str) -> bool:
        """Return whether this request may start a job now."""
        return request_id in self.queue[: self.free_slots]

    def place(self, request_id: str) -> int | None:
        """Return the place of a request in the queue, from 1; None if it does not wait for a slot."""
        return self.queue.index(request_id) + 1 if request_id in self.queue else None


def turns(requests: Iterable[Request], *, max_jobs: int, held: bool, now: datetime) -> Turns:
    """Given all open requests, return whose turn it is."""
    everybody = sorted(requests, key=lambda request: request.sequence)
    making: dict[str, str] = {}
    first: dict[str, str] = {}
    for request in everybody:
        if request.state in _MAKING or (request.state is State.WITHDRAWING and request.holds_slot):
            making.setdefault(request.recipe, request.id)
        elif request.state is State.ACCEPTED and not request.wish:
            first.setdefault(request.recipe, request.id)
    makers, queue = {}, []
    for request in everybody:
        if request.state is not State.ACCEPTED or request.wish:
            continue
        maker = making.get(request.recipe) or first[request.recipe]
        if maker != request.id:
            makers[request.id] = maker
        elif request.not_before is None or request.not_before <= now:
            queue.append(request)
    alive = [request for request in everybody if request.holds_slot]
    return Turns(makers, _fair_order(queue, alive), 0 if held else max(0, max_jobs - len(alive)))


def _fair_order(queue: Iterable[Request], alive: Iterable[Request]) -> tuple[str, ...]:
    """Return the ids of the queue (given as they came) by how much each user already has before the request."""
    before = Counter(_user(request) for request in alive)
    ranked = []
    for request in queue:
        ranked.append((before[_user(request)], request.sequence, request.id))
        before[_user(request)] += 1
    return tuple(request_id for _, _, request_id in sorted(ranked))


def _user(request: Request) -> str:
    """Return for whom a request is; all that operators stage by hand, without naming a user, counts as one user's."""
    return request.email.casefold()
