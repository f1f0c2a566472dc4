"""From ACCEPTED to a running job and to its end: turn, slot, node, launch, poll.

Never more than `max_jobs` jobs hold a slot; a slot is free only when its job is proven dead. What is unknown about a
job stays unknown: nothing is started elsewhere until the node has answered.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from stagecal.domain import terminal
from stagecal.domain.identifiers import sanitized
from stagecal.domain.records import LeftBehind, Step
from stagecal.domain.requests import Origin, Request, State
from stagecal.domain.scheduling import Wanted, choose_node, explain_choice
from stagecal.domain.turns import Turns, turns
from stagecal.domain.verdicts import Verdict
from stagecal.ports import EngineJob, FatalError, JobHandle, JobState, JobStatus, StaleRequestError, TransientError
from stagecal.services.alarms import alarm_mail
from stagecal.services.collecting import ProductError, WithdrawnMeanwhileError, collect, collect_restored
from stagecal.services.context import Site
from stagecal.services.judging import refusal_lines
from stagecal.services.publishing import published_already, published_lines
from stagecal.services.restoring import chosen_restore
from stagecal.services.reuse import serve_from_staged

log = logging.getLogger(__name__)

MAXIMUM_LOSSES = 3
REST = timedelta(seconds=30)
_NONE = "none: wait"
_LONG_WITHOUT_A_NODE = timedelta(hours=4)
# After its lease a job's wrapper looks once more, ends everything, and clocks may differ: then nothing of it lives.
LEASE_GRACE = timedelta(minutes=10)


def handle_of(request: Request) -> JobHandle:
    """Return how the request's job is found."""
    return JobHandle(request.node, request.work, request.nonce)


def turns_of(site: Site, now: datetime) -> Turns:
    """Return whose turn it is by the ledger as it is now."""
    return turns(
        site.ledger.open_requests(),
        max_jobs=site.config.cluster.max_jobs,
        held=bool(site.ledger.setting("held")),
        now=now,
    )


def step_accepted(site: Site, request: Request, now: datetime) -> Request:
    """ACCEPTED: serve it from what is staged, or wait for who makes it, or start a job when it is its turn."""
    if request.origin is Origin.RESTORE:
        return _dispatch(site, request, now) if turns_of(site, now).may_start(request.id) else request
    already = published_already(site, request)
    if already is not None:
        staging, files, absent = already
        return site.ledger.commit(
            request,
            now=now,
            to=State.STAGED,
            step=Step("reuse", "is it published?", "yes, before an interruption", "recorded"),
            staging=staging,
            files=files,
            absent=absent,
            terminal=published_lines(site, request, staging.published_at),
        )
    staged = serve_from_staged(site, request, now)
    if staged is not None:
        return staged
    if request.waits_for:
        ended = _as_its_maker(site, request, now)
        if ended is not None:
            return ended
    now_turns = turns_of(site, now)
    maker = now_turns.makers.get(request.id, "")
    if maker != request.waits_for:
        step = Step(
            "dispatch", "is it being made?", f"by {maker}" if maker else "no longer", "wait" if maker else "go on"
        )
        request = site.ledger.commit(request, now=now, waits_for=maker, step=step)
    if maker or not now_turns.may_start(request.id):
        return request
    return _dispatch(site, request, now)


def _as_its_maker(site: Site, request: Request, now: datetime) -> Request | None:
    """Let the request end as the one that made its products, if that failed or was refused by the data."""
    maker = site.ledger.get(request.waits_for)
    if maker.verdict is Verdict.NOT_A_CALIBRATOR_FIELD and maker.recipe == request.recipe:
        return site.ledger.commit(
            request,
            now=now,
            to=State.REFUSED,
            step=Step("judge", "are the fields calibrators?", f"no, as for {maker.id}", maker.verdict),
            verdict=maker.verdict,
            reason=maker.reason,
            terminal=refusal_lines(request, maker.verdict, maker.reason),
        )
    if maker.verdict is None and maker.state in (State.FAILED, State.HELD):
        return site.ledger.commit(
            request,
            now=now,
            to=State.FAILED,
            step=Step("dispatch", "is it being made?", f"by {maker.id}, which failed", "failed with it"),
            failed_with=maker.id,
            reason=f"failed with {maker.id}: {maker.reason}",
            terminal=failure_lines(site, request),
        )
    return None


def _dispatch(site: Site, request: Request, now: datetime) -> Request:
    # What is restored stays in its job directory.
    free = site.staging.free_bytes() if request.origin is not Origin.RESTORE else math.inf
    if free < site.config.staging.reserve_gb * 1e9:
        raise TransientError(
            f"the staging disk has {free / 1e9:.1f} GB free, less than the reserve of "
            f"{site.config.staging.reserve_gb:g} GB: delete staged data or make the disk larger"
        )
    nonce = site.new_secret()
    work = f"WORK{int(nonce[:7], 16)}"
    label = _engine_job(site, replace(request, work=work)).label
    no_node = f"no node with the label {label} is fit" if label else "no node is fit"
    first = _waits_before(site, request, no_node, now)
    if first is not None:
        return site.ledger.commit(request, now=now, not_before=first.not_before, reason=f"{no_node}, as for {first.id}")
    looks = site.nodes.loads()
    for look in looks:
        if look.alarm:
            alarm = alarm_mail(site, "a node shows another host key", look.trouble, now, about=look.name)
            site.ledger.enqueue("", [alarm], now)
    avoid = frozenset(request.lost_on)
    # A site with a single fitting node has no other one to go to after its reboot.
    if {look.name for look in looks if not label or label in look.labels} <= avoid:
        avoid = frozenset()
    wanted = wanted_now(site, label, avoid)
    node = choose_node(looks, wanted)
    opinions = explain_choice(looks, wanted)
    seen = "; ".join(f"{opinion.name} {opinion.reason}" for opinion in opinions)
    if node is None:
        if not request.reason.startswith(no_node):
            site.ledger.note(request.id, Step("dispatch", "which node has low load?", seen, _NONE), now)
        elif now - _waits_since(site, request) > _LONG_WITHOUT_A_NODE:
            alarm = alarm_mail(site, "no node is fit for hours", f"{no_node}: {seen}", now, about=label)
            site.ledger.enqueue("", [alarm], now)
        return site.ledger.commit(request, now=now, not_before=now + REST, reason=f"{no_node}: {seen}")
    job = JobHandle(node, work, nonce)
    claimed = site.ledger.claim_slot(
        request,
        max_jobs=site.config.cluster.max_jobs,
        max_on_node=wanted.limits.get(node),
        now=now,
        step=Step("dispatch", "which node has low load?", seen, f"{node}, {job.work}"),
        node=job.node,
        work=job.work,
        nonce=job.nonce,
        leased_until=None,
        reason="",
    )
    return claimed or request


def _waits_since(site: Site, request: Request) -> datetime:
    """Return since when the request waits for a node that is fit."""
    times = [step.time for step in site.ledger.steps(request.id) if step.step.decided == _NONE]
    return times[-1] if times else request.since


def _waits_before(site: Site, request: Request, no_node: str, now: datetime) -> Request | None:
    """Return who came before this request and rests because no node is fit, and could use whatever this one can.

    It is asked again at the same time and before this request, so that a node which gets fit goes to who came first.
    """
    waiting = {
        other.id: replace(other, not_before=None)
        for other in site.ledger.open_requests()
        if other.state is State.ACCEPTED
        and other.not_before is not None
        and other.not_before > now
        and other.reason.startswith(no_node)
        and set(other.lost_on) <= set(request.lost_on)
    }
    if not waiting:
        return None
    everybody = [waiting.get(other.id, other) for other in site.ledger.open_requests()]
    queue = turns(everybody, max_jobs=site.config.cluster.max_jobs, held=False, now=now).queue
    before = queue[: queue.index(request.id)] if request.id in queue else ()
    first = next((request_id for request_id in before if request_id in waiting), None)
    return site.ledger.get(first) if first else None


def _engine_job(site: Site, request: Request) -> EngineJob:
    return site.engines.job(request, chosen_restore(site, request))


def step_dispatching(site: Site, request: Request, now: datetime) -> Request:
    """DISPATCHING: bring the job to its node and start it, at most once; look there again after any doubt."""
    job = handle_of(request)
    if lease_is_over(request, now):
        return _lost(site, request, f"{job.node} could not be reached before the lease of the job was over", now)
    made = _engine_job(site, request)
    # On record before the node can have it, and never longer there than here.
    until = request.leased_until or lease_until(site, now)
    request = site.ledger.commit(request, now=now, leased_until=until)
    try:
        site.nodes.prepare(job, {**made.files, "request.json": _record_of(request)})
        site.nodes.launch(job, until)
    except TransientError as trouble:
        # The answer may have been lost, not the job: only the job directory tells, and no other node is tried before.
        state = status_now(site, request, now).state
        if state not in (JobState.RUNNING, JobState.EXITED):
            if state is JobState.UNREACHABLE or request.attempts < MAXIMUM_LOSSES:
                raise
            site.nodes.cancel(job)
            if status_now(site, request, now).state in (JobState.RUNNING, JobState.UNREACHABLE):
                raise
            return _lost(site, request, f"{job.node} cannot start it ({trouble})", now)
    return site.ledger.commit(
        request,
        now=now,
        to=State.STAGING,
        step=Step(
            "launch",
            f"is {job.work} started on {job.node}?",
            f"yes, with the engine {made.engine}: {made.reason}",
            "wait for its end",
        ),
        terminal=_started_lines(site, request, made, job),
    )


def _started_lines(site: Site, request: Request, made: EngineJob, job: JobHandle) -> list[str]:
    directory = str(site.nodes.directory(job))
    if request.origin is Origin.RESTORE:
        return terminal.restore_runs(request.id, directory)
    return [
        *terminal.dispatched(job.node, account_on(site, job.node), directory, old_casa=made.is_old),
        *terminal.checking(request.execution_blocks),
        *terminal.not_found(request.execution_blocks[0]),
        terminal.SUBMITTED,
    ]


def _record_of(request: Request) -> bytes:
    """Return what a job directory says of its request, so that a lost ledger can be made anew.

    The token is not in it: it is a secret of the user's, and job directories are read by others. Who asked by a trigger
    is not in it either: the trigger says so.
    """
    names = ["node", "work", "nonce", "origin", "mous", "project", "calfields", "execution_blocks"]
    names += ["calibration", "recipe", "lost_on"]
    if request.origin is not Origin.TRIGGER:
        names += ["ticket", "email", "engine", "casa_home"]
    record = {"request": request.id, **{name: getattr(request, name) for name in names}}
    return json.dumps(record, indent=1).encode() + b"\n"


def step_staging(site: Site, request: Request, now: datetime) -> Request:
    """STAGING: look after the job; collect its products when it ended well."""
    job = handle_of(request)
    status = status_now(site, request, now)
    if status.state is JobState.RUNNING:
        longest = site.config.cluster.job_h
        if now - request.since > timedelta(hours=longest):
            reason = f"the job on {job.node} still ran after {longest:g} hours ([cluster] job_h): it was ended"
            return fail(site, request, reason, now)
        until = lease_until(site, now)
        request = site.ledger.commit(
            request,
            now=now,
            not_before=now + poll_interval(site, request, now),
            attempts=0,
            reason="",
            leased_until=until,
        )
        site.nodes.renew_lease(job, until)
        return request
    if status.state is JobState.UNREACHABLE:
        rest = site.config.cluster.poll_interval_s
        if not request.reason:
            site.ledger.note(request.id, Step("poll", "does the job live?", status.detail, "unknown: wait"), now)
        return site.ledger.commit(request, now=now, not_before=now + timedelta(seconds=rest), reason=status.detail)
    if status.state is not JobState.EXITED:
        return _lost(site, request, status.detail or f"the job is {status.state}", now)
    if status.exit_code != 0:
        reason = f"the job on {job.node} ended with exit code {status.exit_code}"
        return fail(site, request, reason, now, job_is_dead=True)
    # The job is dead and its results are complete: a node that is silent for a while must not make it lost.
    request = site.ledger.commit(request, now=now, leased_until=lease_until(site, now))
    try:
        return collect_restored(site, request, now) if request.origin is Origin.RESTORE else collect(site, request, now)
    except TransientError:
        with suppress(StaleRequestError):
            later = site.clock.now()
            site.ledger.commit(request, now=later, leased_until=lease_until(site, later))
        raise
    except ProductError as error:
        return fail(site, request, str(error), now, job_is_dead=True)
    except WithdrawnMeanwhileError:
        return site.ledger.get(request.id)


def status_now(site: Site, request: Request, now: datetime) -> JobStatus:
    """Return what is known of the request's job; what cannot be known is UNREACHABLE until the lease is over.

    A job whose lease is over was ended by its wrapper on the node: then it is LOST, whether the node answers or not. A
    node that answers what cannot be (another host key, damaged files) is for a person; its job keeps its slot.
    """
    try:
        status = site.nodes.poll(handle_of(request))
    except FatalError as trouble:
        status = JobStatus(JobState.UNREACHABLE, detail=str(trouble))
        _alarm(site, request, str(trouble), now)
    if status.state is JobState.UNREACHABLE and request.leased_until is None:
        # The lease is on record before anything of the job is sent.
        return JobStatus(JobState.NOT_STARTED, detail=f"nothing of it was sent to {request.node}")
    if status.state is JobState.UNREACHABLE and lease_is_over(request, now):
        detail = f"{request.node} has not answered since before the lease was over, with which the job ended itself"
        return JobStatus(JobState.LOST, detail=f"{detail} ({status.detail})")
    return status


def lease_is_over(request: Request, now: datetime) -> bool:
    """Return whether the request's job cannot live any more, because nobody has renewed its lease."""
    return request.leased_until is not None and now >= request.leased_until + LEASE_GRACE


def _alarm(site: Site, request: Request, trouble: str, now: datetime) -> None:
    text = f"the job {request.work} of request {request.id} on {request.node} cannot be looked at: {trouble}"
    mail = alarm_mail(site, "a job cannot be looked at", text, now, about=request.id)
    site.ledger.enqueue(request.id, [mail], now)


def _lost(site: Site, request: Request, detail: str, now: datetime) -> Request:
    lost_on = (*request.lost_on, request.node)
    if len(lost_on) >= MAXIMUM_LOSSES:
        reason = f"the job was lost on {', '.join(lost_on)} ({detail})"
        return fail(site, request, reason, now, job_is_dead=True)
    request = cleaned(site, request, now)
    return site.ledger.commit(
        request,
        now=now,
        to=State.ACCEPTED,
        step=Step("poll", "does the job live?", f"lost on {request.node}: {detail}", "start it again"),
        holds_slot=False,
        lost_on=lost_on,
        node="",
        work="",
        nonce="",
        leased_until=None,
    )


def cleaned(site: Site, request: Request, now: datetime, *, tries: int = 0) -> Request:
    """Remove the job directory of a job that is dead; return the request without it.

    What cannot be removed now (the node is silent or gone) keeps nobody waiting: it is tried again now and then. For
    the first `tries` attempts of a step the TransientError is raised, for most troubles pass in a moment.
    """
    job = handle_of(request)
    try:
        site.nodes.clean(job)
        seen = "removed"
    except (TransientError, FatalError) as trouble:
        if isinstance(trouble, TransientError) and request.attempts < tries:
            raise
        seen = f"left behind for now: {trouble}"
        site.ledger.leave_behind(LeftBehind(job.node, job.work, job.nonce, now))
    return site.ledger.commit(request, now=now, step=Step("clean", f"{job.work} on {job.node}", seen), work="")


def clean_what_was_left(site: Site) -> None:
    """Try again to remove the job directories that could not be removed; one of a node that is gone is given up."""
    known = {node.name for node in site.config.cluster.nodes}
    for left in site.ledger.left_behind():
        if left.node not in known:
            log.warning("%s on %s is left for ever: the node is no longer configured", left.work, left.node)
            site.ledger.forget_left(left)
            continue
        with suppress(TransientError, FatalError):
            site.nodes.clean(JobHandle(left.node, left.work, left.nonce))
            site.ledger.forget_left(left)


def fail(site: Site, request: Request, reason: str, now: datetime, *, job_is_dead: bool = False) -> Request:
    """Move a request to FAILED; everything that helps to find out why stays where it is."""
    return site.ledger.commit(
        request,
        now=now,
        to=State.FAILED,
        step=Step("fail", seen=reason, decided="FAILED"),
        reason=reason,
        holds_slot=request.holds_slot and not job_is_dead,
        terminal=failure_lines(site, request),
    )


def release_slot(site: Site, request: Request, now: datetime) -> Request:
    """End the job and give its slot back once it is proven dead."""
    status = ended_by_us(site, request, now)
    if status.state in (JobState.RUNNING, JobState.UNREACHABLE):
        return site.ledger.commit(request, now=now, not_before=now + timedelta(seconds=1))
    return site.ledger.commit(
        request, now=now, step=Step("cancel", "does the job live?", status.state, "slot free"), holds_slot=False
    )


def ended_by_us(site: Site, request: Request, now: datetime) -> JobStatus:
    """Tell the request's job to end, and return what is known of it then; a silent node is asked again later."""
    trouble = ""
    try:
        site.nodes.cancel(handle_of(request))
    except (TransientError, FatalError) as error:
        trouble = str(error)
    status = status_now(site, request, now)
    return replace(status, detail=status.detail or trouble)


def failure_lines(site: Site, request: Request) -> list[str]:
    """Return the terminal's last lines of a staging that failed."""
    work = request.work
    if work:
        with suppress(FatalError, TransientError):
            work = str(site.nodes.directory(handle_of(request)))
    if request.origin is Origin.RESTORE:
        return [f"Failed. Please investigate {work} on {request.node}" if work else "Failed. No job was started."]
    return terminal.failed(f"{site.config.staging.root}/{request.token or sanitized(request.mous)}", request.mous, work)


def wanted_now(site: Site, label: str, avoid: frozenset[str]) -> Wanted:
    """Return what a job with this label needs of a node, with the jobs of ours that are on the nodes now."""
    cluster = site.config.cluster
    return Wanted(
        label=label,
        max_load_per_core=cluster.max_load_per_core,
        avoid=avoid,
        jobs=Counter(request.node for request in site.ledger.open_requests() if request.holds_slot),
        limits={node.name: node.max_jobs for node in cluster.nodes if node.max_jobs is not None},
    )


def node_overview(site: Site, label: str) -> list[dict[str, Any]]:
    """Return for each node what one look says, our jobs there, and whether a job with this label would go there."""
    looks = site.nodes.loads()
    opinions = explain_choice(looks, wanted_now(site, label, frozenset()))
    jobs = [request for request in site.ledger.open_requests() if request.holds_slot]
    return [
        {
            "name": look.name,
            "reachable": look.load_per_core is not None,
            "load_per_core": look.load_per_core,
            "labels": list(look.labels),
            "left_behind": [left.work for left in site.ledger.left_behind() if left.node == look.name],
            "jobs": [
                {"job": job.work, "request": job.id, "mous": job.mous, "state": job.state.value}
                for job in jobs
                if job.node == look.name
            ],
            "chosen": opinion.chosen,
            "why": opinion.reason,
        }
        for look, opinion in zip(looks, opinions, strict=True)
    ]


def account_on(site: Site, node: str) -> str:
    """Return as whom we work on a node: user@host."""
    import getpass

    config = next((one for one in site.config.cluster.nodes if one.name == node), None)
    user = (config and config.user) or getpass.getuser()
    return f"{user}@{(config and config.host) or node}"


def lease_until(site: Site, now: datetime) -> datetime:
    """Return until when a job may live without hearing from us again."""
    return now + timedelta(hours=site.config.cluster.lease_h)


def poll_interval(site: Site, request: Request, now: datetime) -> timedelta:
    """Return when to look at a running job again: soon after its start, at the configured pace later."""
    elapsed = max((now - request.since).total_seconds(), 0.0)
    return timedelta(seconds=min(site.config.cluster.poll_interval_s, max(0.1, elapsed / 10)))
