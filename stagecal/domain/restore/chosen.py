"""A restore as it will be done: the plan, the engine that does it, and the CASA that it needs."""

from __future__ import annotations

from dataclasses import dataclass

from stagecal.domain.casa_versions import CasaChoice
from stagecal.domain.restore.engines import EngineChoice
from stagecal.domain.restore.plan import RestorePlan
from stagecal.domain.restore.restore_script import RestoreScript


@dataclass(frozen=True)
class ChosenRestore:
    """What is known before a job is made.

    `script_name` is the archived restore script, `script` what it does. `casa` is the CASA for the engines pipeline and
    script, None for the others.
    """

    plan: RestorePlan
    script_name: str
    script: RestoreScript
    engine: EngineChoice
    casa: CasaChoice | None
