"""Serving a request from what is staged already, by hard links: no node, no slot, a moment's work.

Products are the same only if their recipes are equal (domain/products.py). Each file is checked against what was
recorded when it was made; one that vanished or changed ends the attempt, and nothing of it stays behind.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from stagecal.domain import terminal
from stagecal.domain.identifiers import masked_token
from stagecal.domain.records import ProductFile, Step
from stagecal.domain.requests import Request, State
from stagecal.domain.retention import Staging
from stagecal.ports import SourceVanishedError, StagedFile
from stagecal.services.context import STAGED_DATA_LOCK, Site
from stagecal.services.publishing import publish, published_lines


def serve_from_staged(site: Site, request: Request, now: datetime) -> Request | None:
    """Give the request what another directory holds already; None if no directory holds it all."""
    for source in site.ledger.stagings():
        if source.recipe != request.recipe or source.withdrawn_at is not None or source.token == request.token:
            continue
        files, absent = site.ledger.staged_files(source.token)
        # Linking and sweeping exclude each other: a source cannot be taken away under our hands.
        with site.locks.lock(STAGED_DATA_LOCK):
            report = _report_of(site, source)
            linked = _link(site, request, source, files) if report is not None else None
        if report is None or linked is None:
            site.staging.discard(request.token)
            seen = f"{masked_token(source.token)} is not as recorded"
            site.ledger.note(request.id, Step("reuse", "does a staged directory hold it?", seen, "no"), now)
            continue
        by_block = {file.execution_block for file in files if file.execution_block}
        lines = [
            *terminal.checking(request.execution_blocks),
            *(
                terminal.found(str(site.config.staging.root), source.token, block)
                for block in request.execution_blocks
                if block in by_block
            ),
        ]
        staging = publish(site, request, linked, absent, report, now)
        return site.ledger.commit(
            request,
            now=now,
            to=State.STAGED,
            step=Step("reuse", "does a staged directory hold it?", masked_token(source.token), "linked"),
            terminal=[*lines, *published_lines(site, request, now)],
            staging=staging,
            files=linked,
            absent=absent,
        )
    return None


def _link(
    site: Site, request: Request, source: Staging, files: Sequence[ProductFile]
) -> tuple[ProductFile, ...] | None:
    if not site.staging.is_published(source.token):
        return None
    site.staging.begin(request.token)
    linked = []
    for file in files:
        recorded = StagedFile(file.name, file.size, file.sha256, file.device, file.inode, file.modified_ns)
        try:
            made = site.staging.link(request.token, recorded, source.token)
        except SourceVanishedError:
            return None
        linked.append(replace(file, device=made.device, inode=made.inode, modified_ns=made.modified_ns))
    return tuple(linked)


def _report_of(site: Site, source: Staging) -> dict[str, object] | None:
    """Return how the products were made, as the source's receipt says it; None if the source has gone."""
    try:
        return dict(json.loads(site.staging.read(source.token, "receipt.json"))["made_by"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
