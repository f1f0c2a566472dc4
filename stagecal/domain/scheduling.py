"""Which node gets the next job: the least loaded one that answers, has the label, and is not above the limit.

Pure rules; they never fail. A node that answers nonsense (a negative load, not a number) counts as silent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
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
class NodeOpinion:
    """What speaks for or against one node; at most one node of a look is `chosen`."""

    name: str
    chosen: bool
    reason: str


def choose_node(
    loads: Sequence[NodeView], *, label: str, max_load_per_core: float, avoid: frozenset[str]
) -> str | None:
    """Return the name of the node that gets the job, or None if none may have it now.

    Given one look at each node, the label that the job needs ('' = any node will do), the highest load per core at
    which a node still gets work, and the names of nodes that must not be used. The lowest load per core wins, of
    equals the first name (design §1: the nodes with the lowest load).
    """
    fit = [node for node in loads if not _objection(node, label, max_load_per_core, avoid)]
    return min(fit, key=_rank).name if fit else None


def explain_choice(
    loads: Sequence[NodeView], *, label: str, max_load_per_core: float, avoid: frozenset[str]
) -> tuple[NodeOpinion, ...]:
    """Return for each node, in the given order, whether `choose_node` takes it, and why or why not."""
    chosen = choose_node(loads, label=label, max_load_per_core=max_load_per_core, avoid=avoid)
    opinions = []
    for node in loads:
        objection = _objection(node, label, max_load_per_core, avoid)
        if not objection and node.name == chosen:
            reason = f"chosen: lowest load per core ({node.load_per_core:.2f})"
        else:
            reason = objection or f"fit, but {chosen} comes first (load per core {node.load_per_core:.2f})"
        opinions.append(NodeOpinion(node.name, chosen=not objection and node.name == chosen, reason=reason))
    return tuple(opinions)


def _objection(node: NodeView, label: str, max_load_per_core: float, avoid: frozenset[str]) -> str:
    """Return why this node cannot have the job ('' = it can), what waiting does not mend first."""
    if label and label not in node.labels:
        return f"has no label {label}"
    if node.name in avoid:
        return "must not be used again for this request"
    if node.load_per_core is None:
        return f"does not answer: {node.trouble}" if node.trouble else "does not answer"
    if not math.isfinite(node.load_per_core) or node.load_per_core < 0:
        return f"reports an impossible load ({node.load_per_core})"
    if node.load_per_core > max_load_per_core:
        return f"is busy: load per core {node.load_per_core:.2f} is above {max_load_per_core:.2f}"
    return ""


def _rank(node: NodeView) -> tuple[float, str]:
    return (math.inf if node.load_per_core is None else node.load_per_core, node.name)
