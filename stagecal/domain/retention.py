"""How long staged data stay, and which of them a sweep removes: pure rules, planned first and carried out elsewhere.

The clock starts when the mail with the link was accepted (or, without one, when the data were published); never at a
file's date. Deleted is what has expired, nothing earlier; in doubt nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

# More than this many directories and more than half of all at once is no ordinary day: a person looks first.
GUARD_COUNT = 20


@dataclass(frozen=True)
class Staging:
    """One published directory: whose it is, since when, and for how long it was promised."""

    token: str
    request: str
    recipe: str
    published_at: datetime
    notified_at: datetime | None
    retention_days: int
    extension_days: int = 0
    withdrawn_at: datetime | None = None
    purged_at: datetime | None = None

    @property
    def expires(self) -> datetime:
        """When the directory may be deleted."""
        start = max(self.published_at, self.notified_at or self.published_at)
        return start + timedelta(days=self.retention_days + self.extension_days)


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep will do. `refusal` says why it must not (empty: it may). `unknown` are directories not ours."""

    delete: tuple[Staging, ...]
    keep: Mapping[str, str]
    unknown: tuple[str, ...]
    refusal: str = ""


def plan_sweep(
    stagings: Iterable[Staging],
    *,
    present: Iterable[str],
    kept: Iterable[str],
    owed: Iterable[str],
    now: datetime,
    newest_known: datetime | None,
    root_is_known: bool,
) -> SweepPlan:
    """Given what is recorded and what is there, return the plan.

    `present` are the tokens in the root, `kept` those with a `.donotremove`, `owed` those that an open request still
    owes to somebody. `newest_known` is the newest time on record: an earlier clock is wrong. A root that is not the
    known one (another disk, a missing mount) is left alone.
    """
    there, held, owed_tokens = set(present), set(kept), set(owed)
    delete, keep, known = [], {}, set()
    live = 0
    for staging in sorted(stagings, key=lambda one: (one.expires, one.token)):
        known.add(staging.token)
        if staging.withdrawn_at is not None or staging.token not in there:
            continue
        live += 1
        if now < staging.expires:
            keep[staging.token] = f"until {staging.expires:%Y-%m-%dT%H:%M:%SZ}"
        elif staging.token in owed_tokens:
            keep[staging.token] = "an open request still owes it"
        elif staging.token in held:
            keep[staging.token] = ".donotremove"
        else:
            delete.append(staging)
    refusal = ""
    if newest_known is not None and now < newest_known:
        refusal = (
            f"the clock says {now:%Y-%m-%dT%H:%M:%SZ}, but something was recorded at "
            f"{newest_known:%Y-%m-%dT%H:%M:%SZ}: set the clock right"
        )
    elif not root_is_known:
        refusal = "the staging root is not the one that this service knows: is the right disk mounted?"
    elif len(delete) > GUARD_COUNT and 2 * len(delete) > live:
        refusal = (
            f"{len(delete)} of {live} directories would go at once: "
            "look at the plan (--dry-run), then use --force if it is right"
        )
    return SweepPlan(tuple(delete), keep, tuple(sorted(there - known)), refusal)
