"""What operators see of requests: one record per request, as `status` and `why` print it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from stagecal.domain.identifiers import masked_token
from stagecal.domain.requests import Outcome, Request, uws_phase
from stagecal.domain.turns import Turns
from stagecal.services.context import Site
from stagecal.services.dispatching import turns_of


def overview(site: Site, requests: Sequence[Request], *, show_urls: bool, now: datetime) -> list[dict[str, Any]]:
    """Return a record for each request. URLs are masked unless they are asked for: a link is a secret."""
    queue = turns_of(site, now)
    return [_record(site, request, queue, show_urls=show_urls) for request in requests]


def _record(site: Site, request: Request, queue: Turns, *, show_urls: bool) -> dict[str, Any]:
    staging = site.ledger.staging(request.token) if request.token else None
    there = staging is not None and staging.withdrawn_at is None
    gone = request.outcome is Outcome.DELIVERED and not there
    token = request.token if show_urls else masked_token(request.token)
    return {
        "id": request.id,
        "state": request.state.value,
        "outcome": request.outcome.value if request.outcome else None,
        "verdict": request.verdict.value if request.verdict else None,
        "uws_phase": uws_phase(request, expired=gone),
        "mous": request.mous,
        "project": request.project,
        "ticket": request.ticket,
        "user": request.user or None,
        "email": request.email or None,
        "calfields": list(request.calfields),
        "origin": request.origin.value,
        "position": queue.place(request.id),
        "node": request.node or None,
        "job": request.work or None,
        "reason": request.reason or None,
        "received": _iso(request.received_at),
        "since": _iso(request.since),
        "not_before": _iso(request.not_before) if request.not_before else None,
        "url": site.url(token) if there else None,
        "expires": _iso(staging.expires) if there and staging else None,
    }


def _iso(time: datetime) -> str:
    return time.isoformat(timespec="seconds").replace("+00:00", "Z")
