"""Planning a restore: what the archive's database and the archived products say, brought together or stopped.

The rules are in stagecal/domain/restore; here they get what they judge by. A RestoreError of theirs is a FatalError of
the service: a person looks. Nothing is fetched but the small files that a plan is made from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from stagecal.domain.casa_versions import CasaChoice, casa_faults, casa_for, casa_for_version, is_older, release_key
from stagecal.domain.requests import Request
from stagecal.domain.restore.chosen import ChosenRestore
from stagecal.domain.restore.engines import AUTO, CASATASKS, COMMAND, PIPELINE, SCRIPT, EngineChoice, choose_engine
from stagecal.domain.restore.errors import RestoreError
from stagecal.domain.restore.facts import ArchivedFile, RestoreFacts
from stagecal.domain.restore.manifest import read_manifest
from stagecal.domain.restore.pipescript import read_pipescript
from stagecal.domain.restore.plan import RestorePlan, plan_restore
from stagecal.domain.restore.ppr import read_ppr_sessions
from stagecal.domain.restore.product_names import archived_ppr_of, manifest_of, pipescript_of, restore_script_of
from stagecal.domain.restore.restorable import restorable
from stagecal.domain.restore.restore_script import RestoreScript, read_restore_script
from stagecal.domain.restore.sessions import sessions_of
from stagecal.ports import Archive, FatalError, ProductFiles
from stagecal.services.context import Site

# A manifest, a script or a PPR has some hundred kilobytes at most.
_LARGEST_TEXT = 16 * 1024 * 1024


def chosen_restore(site: Site, request: Request) -> ChosenRestore | None:
    """Return how the products of a request are to be restored, None for the site's own command.

    Raises FatalError if the MOUS cannot be restored, or if the sources disagree; TransientError of archive and store.
    """
    wanted = request.engine or site.config.restore.chosen_engine
    if request.casa_home and not request.engine and wanted != COMMAND:
        # Whoever names a CASA wants it used, whatever the site uses otherwise.
        wanted = AUTO
    if wanted == COMMAND:
        return None
    try:
        plan, script_name, script = planned(site.archive, site.products, request.mous)
        expected, found = set(request.execution_blocks), set(plan.layout.execution_blocks)
        if expected and expected != found:
            raise RestoreError(
                f"the request expects {', '.join(sorted(expected))}, the manifest has {', '.join(sorted(found))}: look "
                "at both; a retry judges anew"
            )
        return _with_engine(site, request, plan, script_name, script, wanted)
    except RestoreError as error:
        raise FatalError(str(error)) from error


def planned(archive: Archive, products: ProductFiles, mous: str) -> tuple[RestorePlan, str, RestoreScript]:
    """Return the plan of a MOUS's restore, and name and content of the archived restore script.

    Raises RestoreError, and TransientError and FatalError of archive and store.
    """
    facts = archive.restore_facts(mous)
    if facts is None:
        raise RestoreError(f"the archive has no MOUS {mous}")
    verdict = restorable(facts)
    if not verdict.possible:
        raise RestoreError(f"{mous} cannot be restored: {verdict.reason}")
    return _plan(facts, products.read(_control_files(facts)))


def planned_from_products(directory: Path, mous: str = "") -> tuple[RestorePlan, str, RestoreScript]:
    """Return the plan that a directory of archived products gives by itself, without a database.

    Raises RestoreError if a file that is needed is missing or cannot be read, or does not belong to the MOUS.
    """
    try:
        names = sorted(path.name for path in directory.iterdir() if path.is_file())
        files = tuple(ArchivedFile(name, _class_by_name(name)) for name in names)
        facts = RestoreFacts(mous, "", "", "", "", "", "", (), (), files, "")
        texts = {name: (directory / name).read_bytes() for name in _control_files(facts)}
    except OSError as error:
        raise RestoreError(f"{error.filename}: {error.strerror}") from error
    return _plan(facts, texts)


def _class_by_name(name: str) -> str:
    if name.endswith((".py", ".xml", ".log")):
        return "script"
    return "calibration" if name.endswith((".tgz", ".txt", ".csv")) else "other"


def _control_files(facts: RestoreFacts) -> list[str]:
    optional = (pipescript_of(facts.files), archived_ppr_of(facts.files))
    return [manifest_of(facts.files), restore_script_of(facts.files), *(name for name in optional if name)]


def _plan(facts: RestoreFacts, contents: Mapping[str, bytes]) -> tuple[RestorePlan, str, RestoreScript]:
    texts = {name: _decoded(name, content) for name, content in contents.items()}
    script_name = restore_script_of(facts.files)
    script = read_restore_script(texts[script_name])
    pipescript, ppr = pipescript_of(facts.files), archived_ppr_of(facts.files)
    plan = plan_restore(
        facts,
        read_manifest(texts[manifest_of(facts.files)]),
        script,
        status=sessions_of(facts.status_xml, mous=facts.mous) if facts.status_xml else None,
        pipescript=read_pipescript(texts[pipescript]) if pipescript else None,
        ppr=read_ppr_sessions(texts[ppr]) if ppr else None,
    )
    return plan, script_name, script


def _decoded(name: str, content: bytes) -> str:
    if len(content) > _LARGEST_TEXT:
        raise RestoreError(
            f"{name} has {len(content)} bytes, too many for what it should be: look at the archived file"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RestoreError(f"{name} is no text in UTF-8 (byte {error.start}): look at the archived file") from error


def _with_engine(
    site: Site, request: Request, plan: RestorePlan, script_name: str, script: RestoreScript, wanted: str
) -> ChosenRestore | None:
    configured = [CasaChoice(one.version, str(one.home), one.label) for one in site.config.restore.casa]
    casa = casa_of(request, plan, configured)
    here = {} if request.casa_home else site.engines.available()
    available = {PIPELINE, SCRIPT} if request.casa_home else set(here) - (set() if casa else {PIPELINE, SCRIPT})
    unfit = "" if casa else _unfit(plan, configured)
    try:
        choice = choose_engine(
            plan,
            script,
            wanted=wanted,
            available=available,
            casa_version=casa.version if casa else "",
            pipeline_version=casa.version.partition("pipeline-")[2] if casa else "",
            casatasks_version=here.get(CASATASKS, ""),
        )
    except RestoreError as error:
        raise RestoreError(f"{error}{unfit}") from error
    if choice.engine == COMMAND:
        return None
    reason = choice.reason + unfit + (f" (calibrated by CASA {plan.casa_version})" if plan.casa_version else "")
    used = casa if choice.engine in (PIPELINE, SCRIPT) else None
    return ChosenRestore(plan, script_name, script, EngineChoice(choice.engine, reason), used)


def casa_of(request: Request, plan: RestorePlan, configured: Sequence[CasaChoice]) -> CasaChoice | None:
    """Return the CASA for the engines pipeline and script: the one that was asked for, else the fitting one.

    One that the configuration does not know is taken as it is; its version is the one that its directory is named
    after, if it is. Raises RestoreError if it is older than the CASA that calibrated the MOUS.
    """
    if not request.casa_home:
        # If nobody says which CASA it was: the one of the project's cycle.
        return (
            casa_for_version(plan.casa_version, configured) if plan.casa_version else casa_for(plan.project, configured)
        )
    name = Path(request.casa_home).name
    unknown = CasaChoice(name if release_key(name) else "", request.casa_home, "")
    casa = next((one for one in configured if one.home.rstrip("/") == request.casa_home), unknown)
    # What is wrong with a version that is known to be bad is told later, and better.
    if is_older(casa.version, than=plan.casa_version) and not casa_faults(casa.version):
        raise RestoreError(
            f"the CASA in {casa.home} ({casa.version}) is older than CASA {plan.casa_version}, which calibrated "
            f"{plan.mous}: name the same or a newer one"
        )
    return casa


def _unfit(plan: RestorePlan, configured: Sequence[CasaChoice]) -> str:
    """Return why none of the site's CASAs restores what was calibrated, to stand behind another sentence."""
    reasons = [
        "; ".join(casa_faults(one.version))
        or f"CASA {one.version} does not restore what CASA {plan.casa_version} calibrated"
        for one in configured
    ]
    return f" ({'; '.join(reasons)})" if reasons else ""
