"""The judgement of a request against the archive, with what was asked and seen put on record.

Only an answer of the archive refuses a person: trouble with the archive is raised as it is and tried again later.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from stagecal.domain.archive_facts import MousFacts
from stagecal.domain.identifiers import sanitized
from stagecal.domain.products import calibration_id, own_recipe, product_keys, recipe_id
from stagecal.domain.records import Step
from stagecal.domain.requests import Origin, Request, State
from stagecal.domain.terminal import restoring, start
from stagecal.domain.verdicts import Verdict, advice, is_entitled, judge
from stagecal.services.context import Site


@dataclass(frozen=True)
class Judgement:
    """What the archive said and what follows from it."""

    verdict: Verdict | None
    facts: MousFacts | None
    step: Step


def judge_request(site: Site, request: Request, now: datetime) -> Judgement:
    """Ask the archive about a request, now. Raises TransientError or FatalError of the archive."""
    facts = site.archive.facts(request.mous)
    # Who restores for himself is an operator; the address of a restore is only told when it is done.
    email = "" if request.origin is Origin.RESTORE else request.email
    verdict = judge(facts, project=request.project, email=email, calfields=request.calfields, now=now)
    asked = f"may {email} have {request.mous} of {request.project}"
    if not email:
        asked = f"can {request.mous} of {request.project} be made (entitlement is the operator's duty)"
    elif request.calfields:
        asked = f"can calibrator fields of {request.mous} of {request.project} be staged (no entitlement needed)"
    return Judgement(verdict, facts, Step("judge", f"{asked}?", _seen(facts, request, now), verdict or "yes"))


def _seen(facts: MousFacts | None, request: Request, now: datetime) -> str:
    if facts is None:
        return "the archive has no such MOUS"
    blocks = ", ".join(f"{sanitized(block.uid)} {block.qa0}" for block in facts.execution_blocks) or "none"
    seen = [f"project {facts.project}", f"state {facts.state}", f"EBs: {blocks}"]
    if request.email and request.origin is not Origin.RESTORE and not request.calfields:
        release = f"{facts.release:%Y-%m-%d}" if facts.release else "unknown"
        entitled = "entitled" if is_entitled(facts, request.email, now) else "neither PI nor delegee"
        seen.append(f"release {release}, {entitled}")
    return "; ".join(seen)


def step_received(site: Site, request: Request, now: datetime) -> Request:
    """RECEIVED: judge the request; freeze what is expected of it, or refuse it."""
    judgement = judge_request(site, request, now)
    ledger = site.ledger
    if judgement.verdict is not None or judgement.facts is None:
        verdict = judgement.verdict or Verdict.INVALID_MOUS_UID
        return ledger.commit(
            request,
            now=now,
            to=State.REFUSED,
            step=judgement.step,
            verdict=verdict,
            judged_on=now.date(),
            terminal=refusal_lines(request, verdict),
        )
    blocks = judgement.facts.passed
    engine = site.engines.identity(request.project)
    calibration = calibration_id(request.mous, blocks, judgement.facts.products, engine)
    if request.origin is Origin.RESTORE:
        token, recipe, lines = "", own_recipe(request.id), restoring(request.mous)
    else:
        token = site.new_secret()
        recipe = recipe_id(product_keys(blocks, request.calfields, calibration))
        lines = start(site.url(token), request.calfields)
    return ledger.commit(
        request,
        now=now,
        to=State.ACCEPTED,
        step=judgement.step,
        verdict=None,
        reason="",
        judged_on=now.date(),
        execution_blocks=blocks,
        calibration=calibration,
        recipe=recipe,
        token=token,
        terminal=lines,
    )


def refusal_lines(request: Request, verdict: Verdict, detail: str = "") -> list[str]:
    """Return what an operator who staged by hand reads about a refusal."""
    if request.origin is Origin.TRIGGER:
        return []
    return [verdict.value, *([detail] if detail else []), advice(verdict)]
