"""Which node gets the next job: the least loaded one that answers, has the label, and is not above its limits.

Jobs of ours that are there already count before the load, because a load average rises only a minute after a job began.
Pure rules; they never fail. A node that answers nonsense (a negative load, not a number) counts as silent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


class NodeView(Protocol):
    """What the choice needs to know of a node: one look at it. `load_per_core` is None if it did not answer."""

    @property
    def name(self) -> str: ...
    @property
    def load_per_core(self) -> float | None: ...
    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def trouble(self) -> str: ...


@dataclass(frozen=True)
class Wanted:
    """What a job needs of its node, and what is known of the nodes beside their loads.

    `label` that the node must have ('' = any node will do), the highest load per core at which a node still gets work,
    the names of nodes that must not be used, how many jobs of ours are on each node, and how many may be at most (a
    node without a number has no limit of its own).
    """

    label: str
    max_load_per_core: float
    avoid: frozenset[str] = frozenset()
    jobs: Mapping[str, int] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class NodeOpinion:
    """What speaks for or against one node; at most one node of a look is `chosen`."""

    name: str
    chosen: bool
    reason: str


def choose_node(loads: Sequence[NodeView], wanted: Wanted) -> str | None:
    """Return the name of the node that gets the job, or None if none may have it now.

    Given one look at each node: of those that are fit the one with the fewest jobs of ours, then the lowest load per
    core, then the first name.
    """
    fit = [node for node in loads if not _objection(node, wanted)]
    return min(fit, key=lambda node: _rank(node, wanted)).name if fit else None


def explain_choice(loads: Sequence[NodeView], wanted: Wanted) -> tuple[NodeOpinion, ...]:
    """Return for each node, in the given order, whether `choose_node` takes it, and why or why not."""
    chosen = choose_node(loads, wanted)
    opinions = []
    for node in loads:
        objection = _objection(node, wanted)
        seen = f"load per core {node.load_per_core:.2f}" if node.load_per_core is not None else ""
        if wanted.jobs.get(node.name):
            seen += f", {wanted.jobs[node.name]} of our jobs"
        if not objection and node.name == chosen:
            reason = f"chosen: {seen}"
        else:
            reason = objection or f"fit, but {chosen} comes first ({seen})"
        opinions.append(NodeOpinion(node.name, chosen=not objection and node.name == chosen, reason=reason))
    return tuple(opinions)


def _objection(node: NodeView, wanted: Wanted) -> str:
    """Return why this node cannot have the job ('' = it can), what waiting does not mend first."""
    if wanted.label and wanted.label not in node.labels:
        return f"has no label {wanted.label}"
    if node.name in wanted.avoid:
        return "must not be used again for this request"
    if node.load_per_core is None:
        return f"gets no job: {node.trouble}" if node.trouble else "does not answer"
    if not math.isfinite(node.load_per_core) or node.load_per_core < 0:
        return f"reports an impossible load ({node.load_per_core})"
    limit = wanted.limits.get(node.name)
    if limit is not None and wanted.jobs.get(node.name, 0) >= limit:
        return f"has {wanted.jobs.get(node.name, 0)} of our jobs, and may have {limit}"
    if node.load_per_core > wanted.max_load_per_core:
        return f"is busy: load per core {node.load_per_core:.2f} is above {wanted.max_load_per_core:.2f}"
    return ""


def _rank(node: NodeView, wanted: Wanted) -> tuple[int, float, str]:
    load = math.inf if node.load_per_core is None else node.load_per_core
    return (wanted.jobs.get(node.name, 0), load, node.name)
