"""Which engine restores a MOUS: the one that repeats everything that the archive's own restore script does.

An engine that would leave something out is refused with the reason, also when somebody asks for it by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from stagecal.domain.casa_versions import casa_faults, is_older
from stagecal.domain.restore.errors import RestoreError
from stagecal.domain.restore.plan import RestorePlan
from stagecal.domain.restore.restore_script import RestoreScript

AUTO, PIPELINE, SCRIPT, CASATASKS, COMMAND = "auto", "pipeline", "script", "casatasks", "command"
ENGINES = (PIPELINE, SCRIPT, CASATASKS, COMMAND)
# What the tasks do when nothing is said; a PPR with an empty ParameterSet says nothing.
_DEFAULTS: Mapping[str, tuple[object, ...]] = {
    "bdfflags": (True,),
    "lazy": (False,),
    "copytoraw": (True,),
    "products_dir": (None, "../products"),
    "rawdata_dir": (None, "../rawdata"),
    "output_dir": (None, ".", "./"),
}
_DEFAULTS_OF_TASK: Mapping[str, Mapping[str, tuple[object, ...]]] = {
    "hifa_restoredata": {"ocorr_mode": ("ca",)},
    "h_restoredata": {"ocorr_mode": ("ca",)},
    "hsd_restoredata": {"ocorr_mode": ("ao",), "hm_rasterscan": ("time",)},
}
_INTERFEROMETRIC = {"hifa_restoredata", "h_restoredata"}
# A PPR gives this task its EBs and sessions; other tasks of the name do not take sessions.
_TASKS_OF_A_PPR = {"hifa_restoredata", "h_restoredata", "hsd_restoredata"}


@dataclass(frozen=True)
class EngineChoice:
    """The engine, and why it is this one: for the receipt and for the person who asks."""

    engine: str
    reason: str


def choose_engine(
    plan: RestorePlan,
    script: RestoreScript,
    *,
    wanted: str = AUTO,
    available: Collection[str],
    casa_version: str = "",
    pipeline_version: str = "",
    casatasks_version: str = "",
) -> EngineChoice:
    """Given a plan and the archive's restore script, return the engine to use.

    `wanted` is `auto` or the name of an engine, `available` what this site can run. The versions are those of the CASA
    that would run (pipeline and script) and of the modular one (casatasks), '' if unknown. Raises RestoreError if
    nothing here reproduces the archive's own restore, or if the wanted engine does not.
    """

    def fault_of_this(engine: str) -> str:
        return fault_of(
            engine,
            plan,
            script,
            casa_version=casa_version,
            pipeline_version=pipeline_version,
            casatasks_version=casatasks_version,
        )

    if wanted != AUTO:
        if wanted not in available:
            raise RestoreError(f"the engine {wanted} is not configured here: there are {_listed(available)}")
        fault = fault_of_this(wanted)
        if fault:
            raise RestoreError(f"the engine {wanted} cannot restore this MOUS: {fault}")
        return EngineChoice(wanted, "it was asked for")
    faults: dict[str, str] = {}
    for engine in ENGINES:
        fault = fault_of_this(engine)
        if not fault and engine not in available:
            fault = "it is not configured here"
        if not fault:
            passed_over = "; ".join(f"not {other}: {why}" for other, why in faults.items())
            return EngineChoice(engine, passed_over or "a CASA with pipeline is configured")
        faults[engine] = fault
    said = "; ".join(f"{engine}: {fault}" for engine, fault in faults.items())
    raise RestoreError(f"no engine of this site can restore this MOUS: {said}")


def fault_of(
    engine: str,
    plan: RestorePlan,
    script: RestoreScript,
    *,
    casa_version: str = "",
    pipeline_version: str = "",
    casatasks_version: str = "",
) -> str:
    """Return why this engine would not reproduce the archive's own restore, '' if it would."""
    if engine == COMMAND:
        # What the site's own command does is the site's affair.
        return ""
    if engine == SCRIPT:
        return _casa_fault(plan, casa_version, pipeline_version)
    left_out = left_out_by_a_ppr(script)
    if left_out:
        return f"{left_out}, which only the engine {SCRIPT} repeats"
    if engine == PIPELINE:
        if plan.task not in _TASKS_OF_A_PPR:
            return f"a PPR cannot give {plan.task} its sessions"
        return _casa_fault(plan, casa_version, pipeline_version)
    if plan.task not in _INTERFEROMETRIC:
        return f"{plan.task} is single-dish calibration, which needs the pipeline"
    if plan.needs_renorm:
        return "the manifest asks for hifa_renorm, which needs the pipeline"
    if is_older(casatasks_version, than=plan.casa_version):
        return f"casatasks {casatasks_version} are older than CASA {plan.casa_version}, which calibrated it"
    return ""


def left_out_by_a_ppr(script: RestoreScript) -> str:
    """Return what a restore script does beyond the plain call of its task, '' for nothing."""
    if script.other_calls:
        return f"the archive's restore script also calls {', '.join(script.other_calls)}"
    defaults = {**_DEFAULTS, **_DEFAULTS_OF_TASK.get(script.task, {})}
    # 1 == True in Python; a script's bdfflags=1 means the same.
    unusual = [f"{name}={value!r}" for name, value in script.parameters.items() if value not in defaults.get(name, ())]
    return f"the archive's restore script calls {script.task} with {', '.join(unusual)}" if unusual else ""


def _casa_fault(plan: RestorePlan, casa_version: str, pipeline_version: str) -> str:
    return "; ".join(casa_faults(casa_version, pipeline_version, renorm=plan.needs_renorm))


def _listed(engines: Collection[str]) -> str:
    return ", ".join(engine for engine in ENGINES if engine in engines) or "none"
