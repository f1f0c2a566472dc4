"""Serving a request from what is staged already, by hard links: no node, no slot, a moment's work.

Products are the same only if their recipes are equal (domain/products.py). Each file is checked against what was
recorded when it was made, and each measurement set is looked at inside its tar file; one that vanished, changed, or is
known to be rotten ends the attempt, and nothing of it stays behind.
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
from stagecal.services.alarms import alarm_mail
from stagecal.services.collecting import ProductError, verify_packed
from stagecal.services.context import STAGED_DATA_LOCK, Site
from stagecal.services.publishing import publish, published_lines


def serve_from_staged(site: Site, request: Request, now: datetime) -> Request | None:
    """Give the request what another directory holds already; None if no directory holds it all."""
    for source in site.ledger.stagings():
        if source.recipe != request.recipe or source.withdrawn_at is not None or source.token == request.token:
            continue
        files, absent = site.ledger.staged_files(source.token)
        if not files:
            # Rot was found in it, or its files are not on record: the ledger gives nothing away.
            _note(site, request, source, "cannot be trusted", now)
            continue
        # Linking and sweeping exclude each other: a source cannot be taken away under our hands.
        with site.locks.lock(STAGED_DATA_LOCK):
            report = _report_of(site, source)
            linked = _link(site, request, source, files) if report is not None else None
        if report is None or linked is None:
            site.staging.discard(request.token)
            _note(site, request, source, "is not as recorded", now)
            continue
        try:
            # What is looked at is what we hold ourselves now: nobody can take it away meanwhile.
            verify_packed(site, request, [file.name for file in files if file.execution_block])
        except ProductError as error:
            site.staging.discard(request.token)
            _note(site, request, source, f"is broken: {error}", now)
            _alarm(site, source, str(error), now)
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


def _note(site: Site, request: Request, source: Staging, what: str, now: datetime) -> None:
    seen = f"{masked_token(source.token)} {what}"
    site.ledger.note(request.id, Step("reuse", "does a staged directory hold it?", seen, "no"), now)


def _alarm(site: Site, source: Staging, problem: str, now: datetime) -> None:
    """Tell the operators of staged data that were healthy when they were published, once a day."""
    text = (
        f"{problem}. It stands as it was recorded in directory {masked_token(source.token)} of request "
        f"{source.request}, and is served until {source.expires:%Y-%m-%dT%H:%M:%SZ}. It was not linked again; the "
        "data are made anew."
    )
    mail = alarm_mail(site, "staged data are broken", text, now, about=source.token[:6])
    site.ledger.enqueue(source.request, [mail], now)


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
