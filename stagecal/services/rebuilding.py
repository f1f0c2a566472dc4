"""Makes a lost ledger anew from what stands elsewhere: sidecars, published receipts, job directories, triggers.

Every one of them carries the request's id. Nothing is started, mailed or deleted by it; the daemon goes on afterwards.
A job for which nobody waits any more is told to end, and while it may live no other one is started.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from stagecal.domain.records import ProductFile, Step
from stagecal.domain.requests import Origin, Outcome, Request, State, typed_request
from stagecal.domain.retention import Staging
from stagecal.ports import FatalError, JobHandle, JobState, JobStatus, TransientError
from stagecal.services.context import Site
from stagecal.services.dispatching import lease_until
from stagecal.services.receiving import Receiver

_WORK = re.compile(r"WORK[0-9]+")


@dataclass
class Rebuilt:
    """What was found again, and what a person should look at."""

    requests: list[str] = field(default_factory=list)
    stagings: list[str] = field(default_factory=list)
    jobs: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def rebuild(site: Site, ledger: Any, work_area: Path, now: datetime) -> Rebuilt:
    """Restore every record that can be restored; records that are there stay as they are.

    `ledger` is the site's ledger, which offers `sidecars` and `restore` for this purpose alone.
    """
    result = Rebuilt()
    for staging, request in ledger.sidecars():
        if staging.purged_at is None:
            _restore_staging(site, ledger, staging, request, result)
    for token in site.staging.tokens():
        if site.ledger.staging(token) is None:
            _restore_from_receipt(site, ledger, token, now, result)
    _restore_triggers(site, ledger, now, result)
    _restore_jobs(site, ledger, work_area, now, result)
    return result


def _files_of(site: Site, token: str) -> tuple[dict[str, Any], list[ProductFile]] | None:
    try:
        receipt = json.loads(site.staging.read(token, "receipt.json"))
        present = site.staging.files(token)
        files = [
            ProductFile(
                name=entry["name"],
                execution_block=entry["execution_block"] or "",
                size=entry["size"],
                sha256=entry["sha256"],
                device=present[entry["name"]][0],
                inode=present[entry["name"]][1],
                modified_ns=present[entry["name"]][3],
            )
            for entry in receipt["files"]
            if entry["name"] in present and present[entry["name"]][2] == entry["size"]
        ]
    except (FileNotFoundError, ValueError, KeyError):
        return None
    if len(files) != len(receipt["files"]):
        return None
    return receipt, files


def _restore_staging(site: Site, ledger: Any, staging: Staging, request: Request | None, result: Rebuilt) -> None:
    found = _files_of(site, staging.token) if site.staging.is_published(staging.token) else None
    files, absent = (found[1], found[0]["execution_blocks_without_calfields"]) if found else ([], [])
    if found is None and staging.withdrawn_at is None:
        result.remarks.append(f"{staging.token[:6]}…: recorded, but not (completely) published")
    # Without its files on record a directory can expire, but nothing is ever linked from it.
    ledger.restore(request, staging if files or staging.withdrawn_at else replace(staging, recipe=""), files, absent)
    result.stagings.append(staging.token)
    if request is not None:
        result.requests.append(request.id)


def _restore_from_receipt(site: Site, ledger: Any, token: str, now: datetime, result: Rebuilt) -> None:
    found = _files_of(site, token)
    if found is None:
        result.remarks.append(f"{token[:6]}…: no directory of ours, or incomplete: left alone")
        return
    receipt, files = found
    published = datetime.fromisoformat(receipt["published"])
    until = datetime.fromisoformat(receipt["available_at_least_until"])
    # When the mail was accepted is not in the receipt: count from now, so that nobody loses a day.
    staging = Staging(
        token=token,
        request=receipt["request"],
        recipe=receipt["recipe"],
        published_at=published,
        notified_at=now,
        retention_days=max(1, (until - published) // timedelta(days=1)),
    )
    request = typed_request(
        receipt["request"],
        Origin.OPERATOR,
        mous=receipt["mous"],
        project=receipt["project"],
        at=published,
        ticket=receipt["helpdesk_ticket"],
        calfields=tuple(receipt["calfields"]),
        state=State.CLOSED,
        since=now,
        outcome=Outcome.DELIVERED,
        execution_blocks=tuple(receipt["execution_blocks"]),
        calibration=receipt["calibration"],
        recipe=receipt["recipe"],
        token=token,
    )
    waiting = _trigger_of(site, receipt["request"], now)
    if waiting is not None:
        # Its trigger still stands: the mail may not have gone. It has one Message-ID, however often it goes.
        request = replace(
            waiting,
            state=State.STAGED,
            since=now,
            execution_blocks=request.execution_blocks,
            calibration=request.calibration,
            recipe=request.recipe,
            token=token,
        )
        staging = replace(staging, notified_at=None)
    ledger.restore(request, staging, files, receipt["execution_blocks_without_calfields"])
    result.stagings.append(token)
    result.requests.append(request.id)


def _trigger_of(site: Site, request_id: str, now: datetime) -> Request | None:
    return next((one for one in Receiver(site).requests_waiting(now) if one.id == request_id), None)


def _restore_triggers(site: Site, ledger: Any, now: datetime, result: Rebuilt) -> None:
    for request in Receiver(site).requests_waiting(now):
        if not site.ledger.find(request.id):
            ledger.restore(request, None, (), ())
            result.requests.append(request.id)


def _restore_jobs(site: Site, ledger: Any, work_area: Path, now: datetime, result: Rebuilt) -> None:
    """Give open requests their jobs back, so that none is started twice; end those that nobody asks for any more."""
    cluster = site.config.cluster
    if cluster.runner == "ssh" and not cluster.shared_work_area:
        _hold(site, now, "job directories lie on the nodes only, where jobs may still run", result)
    for directory in sorted(work_area.glob("WORK*")):
        if not _WORK.fullmatch(directory.name):
            continue
        try:
            record = json.loads((directory / "request.json").read_text(encoding="utf-8"))
            job = JobHandle(record["node"], directory.name, record["nonce"])
            found = _found_in(record)
        except (OSError, ValueError, KeyError, TypeError):
            result.remarks.append(f"{directory}: no job directory of ours, or incomplete: left alone")
            continue
        try:
            status = site.nodes.poll(job)
        except (TransientError, FatalError) as trouble:
            status = JobStatus(JobState.UNREACHABLE, detail=str(trouble))
        if status.state in (JobState.NOT_STARTED, JobState.LOST):
            result.remarks.append(f"{directory}: its job is {status.state}: look and remove it")
            continue
        if found["origin"] is Origin.RESTORE and status.state is JobState.EXITED:
            result.remarks.append(f"{directory}: a restore that has ended: its results are in products/")
            continue
        request = _who_waits_for(site, ledger, record, found, now)
        if request is not None:
            _adopt(site, request, found, job, now)
            result.jobs.append(directory.name)
        elif status.state is JobState.EXITED:
            result.remarks.append(f"{directory}: its job ended and its request is not open: look and remove it")
        else:
            _end(site, job, directory, now, result)


def _found_in(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a job directory says of its request. Raises KeyError, ValueError or TypeError if it says it not."""
    # A job of the first version says neither who asked nor for which fields.
    record = {"origin": "trigger", "project": "", "calfields": ["?"], **record}
    found: dict[str, Any] = {name: str(record[name]) for name in ("calibration", "recipe", "mous", "project")}
    found |= {name: tuple(map(str, record[name])) for name in ("execution_blocks", "lost_on", "calfields")}
    return {**found, "origin": Origin(record["origin"])}


def _who_waits_for(
    site: Site, ledger: Any, record: Mapping[str, Any], found: Mapping[str, Any], now: datetime
) -> Request | None:
    """Return the request that a job works for: its own, one that wants the same, or one that an operator typed."""
    waiting = [
        one for one in site.ledger.open_requests() if one.state in (State.RECEIVED, State.ACCEPTED) and not one.work
    ]
    same = [one for one in waiting if one.id == record["request"]]
    if found["origin"] is Origin.TRIGGER:
        # Its own trigger may be gone, and the job have passed to another request for the same.
        same += [one for one in waiting if (one.mous, one.calfields) == (found["mous"], found["calfields"])]
    elif not site.ledger.find(str(record["request"])):
        said = {name: str(record.get(name, "")) for name in ("ticket", "email", "engine", "casa_home")}
        typed = typed_request(
            str(record["request"]),
            found["origin"],
            mous=found["mous"],
            project=found["project"],
            at=now,
            calfields=found["calfields"],
            **said,
        )
        ledger.restore(typed, None, (), ())
        same += site.ledger.find(typed.id)
    return same[0] if same else None


def _end(site: Site, job: JobHandle, directory: Path, now: datetime, result: Rebuilt) -> None:
    """Tell a job to end for which nobody waits; while it may live no other is started."""
    try:
        site.nodes.cancel(job)
        result.remarks.append(f"{directory}: nobody asks for it any more: its job was told to end")
    except (TransientError, FatalError) as trouble:
        result.remarks.append(f"{directory}: nobody asks for it any more, and it cannot be told to end: {trouble}")
    _hold(site, now, f"the job in {directory} on {job.node} may still live", result)


def _hold(site: Site, now: datetime, why: str, result: Rebuilt) -> None:
    site.ledger.set_setting("held", now.isoformat(timespec="seconds"))
    lease = site.config.cluster.lease_h
    result.remarks.append(f"{why}: no job is started until `stagecal release` (jobs end themselves after {lease:g} h)")


def _adopt(site: Site, request: Request, found: Mapping[str, Any], handle: JobHandle, now: datetime) -> None:
    """Give a request that waits the job that was found running for it; it is judged again before its mail."""
    names = ("calibration", "recipe", "execution_blocks", "lost_on")
    accepted = site.ledger.commit(
        request,
        now=now,
        to=State.ACCEPTED,
        token="" if request.origin is Origin.RESTORE else site.new_secret(),
        judged_on=None,
        **{name: found[name] for name in names},
    )
    site.ledger.commit(
        accepted,
        now=now,
        to=State.STAGING,
        step=Step("rebuild", "has it a job?", f"{handle.work} on {handle.node}", "adopted"),
        node=handle.node,
        work=handle.work,
        nonce=handle.nonce,
        holds_slot=True,
        leased_until=lease_until(site, now),
    )
