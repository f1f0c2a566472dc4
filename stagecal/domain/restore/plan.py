"""From what is known of a MOUS to what a restore does: sessions that all sources agree on, and the files of each EB.

The manifest is the authority; the OUSStatus document, the archive's restore script, its PPR and QA0 have to agree
with it. Every doubt raises RestoreError (DisagreementError about sessions): right, or not at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from stagecal.domain.archive_facts import QA0_PASS, ExecutionBlock
from stagecal.domain.restore.errors import DisagreementError, RestoreError
from stagecal.domain.restore.facts import ArchivedFile, RestoreFacts, SchedBlock
from stagecal.domain.restore.manifest import Manifest, ManifestExecutionBlock, ManifestSession
from stagecal.domain.restore.pipescript import PipescriptFacts
from stagecal.domain.restore.product_names import manifest_of, other_manifests, resolve_name
from stagecal.domain.restore.restore_script import RestoreScript
from stagecal.domain.restore.sessions import Session

_XML, _MANIFEST, _SCRIPT, _PPR, _QA0 = "OUSStatus", "manifest", "restore script", "archived PPR", "QA0"
# The archive's classes of files that a restore takes over.
_FETCHED_CLASSES = {"calibration", "script"}


@dataclass(frozen=True)
class SessionLayout:
    """The sessions 1 to N without a gap, each with the EBs to process; a session without any is kept, and empty."""

    sessions: tuple[Session, ...]

    @property
    def execution_blocks(self) -> tuple[str, ...]:
        """The EBs to process, by session."""
        return tuple(uid for session in self.sessions for uid in session.execution_blocks)

    def session_of(self, execution_block: str) -> int:
        """Return the number of the session of an EB. Raises KeyError for one that is not processed."""
        return _numbers(self.sessions)[execution_block]


@dataclass(frozen=True)
class PlannedFile:
    """An archived file that a step reads: under the `name` of the manifest, fetched under its name in the archive."""

    name: str
    archived: str


@dataclass(frozen=True)
class PlannedExecutionBlock:
    """An EB with what restores it. `aux_caltables` are of the imaging and not needed; None if not archived.

    `renorm` are the parameters of a renormalisation that has to be repeated, None if there is none.
    """

    uid: str
    session: int
    caltables: PlannedFile
    aux_caltables: PlannedFile | None
    finalflags: PlannedFile
    applycmds: PlannedFile
    renorm: Mapping[str, str] | None


@dataclass(frozen=True)
class RestorePlan:
    """Everything that an engine has to know to restore a MOUS.

    `task` is the pipeline's task (hifa_restoredata). Versions are those of the calibration, '' if the manifest does
    not say them. `files` are to be fetched, all of them; `links` name those that the manifest calls otherwise.
    """

    mous: str
    project: str
    project_uid: str
    part_id: str
    project_status_uid: str
    sous_uid: str
    gous_uid: str
    sched_block: SchedBlock
    task: str
    layout: SessionLayout
    execution_blocks: tuple[PlannedExecutionBlock, ...]
    manifest: str
    auxproducts: PlannedFile | None
    casa_version: str
    pipeline_version: str
    files: tuple[ArchivedFile, ...]

    @property
    def links(self) -> tuple[PlannedFile, ...]:
        """The files whose name in the manifest is not the archive's, each once."""
        files = [self.auxproducts] if self.auxproducts else []
        for block in self.execution_blocks:
            files += [block.caltables, block.finalflags, block.applycmds]
            files += [block.aux_caltables] if block.aux_caltables else []
        return tuple(dict.fromkeys(file for file in files if file.name != file.archived))

    @property
    def needs_renorm(self) -> bool:
        """Whether a renormalisation has to be repeated for any EB."""
        return any(block.renorm is not None for block in self.execution_blocks)


# --- who says what ----------------------------------------------------------------------------------------------------


def cross_check(
    manifest: Manifest,
    *,
    status: tuple[Session, ...] | None,
    script: RestoreScript | None,
    ppr: tuple[Session, ...] | None,
    execution_blocks: Iterable[ExecutionBlock],
) -> SessionLayout:
    """Given what each source says of the sessions, return the manifest's if all agree with it.

    `status` is from the OUSStatus document, `ppr` from the archived PPR; None is a source that is not there. Without
    any `execution_blocks` (no database) QA0 is not known and not compared. EBs that did not pass QA0 may stand in the
    OUSStatus document and in the archived PPR only. Raises DisagreementError with a table of who says what.
    """
    said: dict[str, dict[str, int]] = {_MANIFEST: _numbers(manifest.layout)}
    if status is not None:
        said = {_XML: _numbers(status), **said}
    if script is not None:
        # A call without sessions puts all EBs into one; it says nothing that could be compared but the EBs.
        layout = script.layout
        said[_SCRIPT] = _numbers(layout) if layout else dict.fromkeys(script.execution_blocks, 0)
    if ppr is not None:
        said[_PPR] = _numbers(ppr)
    qa0 = _qa0(execution_blocks)
    uids = sorted({uid for sessions in said.values() for uid in sessions} | set(qa0))
    reasons = [reason for uid in uids if (reason := _disagreement(uid, said, qa0))]
    if reasons:
        table = "\n".join(_table(uids, said, qa0))
        raise DisagreementError(
            "the sources disagree about the sessions of this MOUS; it is not restored until a person has decided: "
            + "; ".join(reasons)
            + f"\n{table}",
            tuple(reasons),
        )
    processed = {session.number: session.execution_blocks for session in manifest.layout}
    highest = max([*processed, *(session.number for session in status or ())])
    return SessionLayout(tuple(Session(number, processed.get(number, ())) for number in range(1, highest + 1)))


def _numbers(sessions: Iterable[Session]) -> dict[str, int]:
    return {uid: session.number for session in sessions for uid in session.execution_blocks}


def _qa0(execution_blocks: Iterable[ExecutionBlock]) -> dict[str, str]:
    states: dict[str, set[str]] = {}
    for block in execution_blocks:
        states.setdefault(block.uid, set()).add(block.qa0 or "unknown")
    return {uid: " and ".join(sorted(values)) for uid, values in states.items()}


def _disagreement(uid: str, said: Mapping[str, Mapping[str, int]], qa0: Mapping[str, str]) -> str:
    """Return what is wrong about one EB, '' if nothing is."""
    state = qa0.get(uid, "not known")
    number = said[_MANIFEST].get(uid)
    if number is None:
        sources = " and ".join(source for source in said if uid in said[source])
        if state == QA0_PASS:
            return f"{uid} has QA0 {QA0_PASS}, but the manifest does not list it"
        if uid in said.get(_SCRIPT, {}):
            return f"the restore script has {uid}, but the manifest does not list it"
        if " and " in state:
            return f"the archive gives {uid} two QA0: {state}"
        if qa0 and uid not in qa0:
            return f"the QA0 of {uid} is not known, which stands in {sources}, not in the manifest"
        if not qa0 and uid in said.get(_PPR, {}):
            return f"{uid} stands in {sources}, not in the manifest"
        return ""
    if qa0 and state != QA0_PASS:
        return f"the manifest lists {uid}, but its QA0 is {state}"
    for source, sessions in said.items():
        other = sessions.get(uid)
        if other is None:
            return f"the manifest lists {uid} in session_{number}, {source} does not list it"
        if other not in (number, 0):
            return f"{uid} is in session_{number} in the manifest, in session_{other} in {source}"
    return ""


def _table(uids: list[str], said: Mapping[str, Mapping[str, int]], qa0: Mapping[str, str]) -> list[str]:
    """Return the lines of a table: a row for each EB, a column for each source."""
    rows = [["EB", *said, _QA0]]
    for uid in uids:
        cells = [
            "-" if (number := sessions.get(uid)) is None else f"session_{number}" if number else "listed"
            for sessions in said.values()
        ]
        rows.append([uid, *cells, qa0.get(uid, "-")])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


# --- the plan ---------------------------------------------------------------------------------------------------------


def completed(facts: RestoreFacts, pipescript: PipescriptFacts | None) -> RestoreFacts:
    """Return the facts with what only the archived calibration script knows (without a database it knows most).

    Raises RestoreError where both say something and not the same.
    """
    if pipescript is None:
        return facts
    found: dict[str, Any] = {}
    for name in ("mous", "project", "project_uid", "part_id", "project_status_uid", "sous_uid", "gous_uid"):
        known, said = getattr(facts, name), getattr(pipescript, name)
        if known and said and known != said:
            raise RestoreError(f"the archive says {name} = {known}, casa_pipescript.py says {said}: look at both")
        found[name] = known or said
    blocks = facts.sched_blocks
    status = pipescript.sched_block_status_uid
    if not blocks and status:
        blocks = (SchedBlock("", status, "", ()),)
    return replace(facts, sched_blocks=blocks, **found)


def plan_restore(
    facts: RestoreFacts,
    manifest: Manifest,
    script: RestoreScript,
    *,
    status: tuple[Session, ...] | None,
    pipescript: PipescriptFacts | None = None,
    ppr: tuple[Session, ...] | None = None,
) -> RestorePlan:
    """Given everything that is known of a MOUS, return how it is restored.

    `status` are the sessions of the OUSStatus document, `ppr` those of the archived PPR; None where there is none.
    Raises DisagreementError if the sources disagree about sessions, RestoreError if the manifest is of another MOUS,
    if files that it names are not archived (all are listed), or if the EBs belong to more than one SB.
    """
    facts = completed(facts, pipescript)
    if manifest.mous and manifest.mous != facts.mous:
        raise RestoreError(f"the manifest is of {manifest.mous}, not of {facts.mous}: look at the archived file")
    layout = cross_check(manifest, status=status, script=script, ppr=ppr, execution_blocks=facts.execution_blocks)
    present = {file.name for file in facts.files}
    blocks, auxproducts = _planned_files(manifest, present)
    chosen = manifest_of(facts.files)
    # The pipeline copies each manifest of products/ to rawdata/, and takes the first: only one may be fetched.
    unwanted = other_manifests(facts.files, chosen)
    named = {file.archived for block in blocks for file in (block.caltables, block.finalflags, block.applycmds)}
    if auxproducts:
        named.add(auxproducts.archived)
    return RestorePlan(
        mous=facts.mous,
        project=facts.project,
        project_uid=facts.project_uid,
        part_id=facts.part_id,
        project_status_uid=facts.project_status_uid,
        sous_uid=facts.sous_uid,
        gous_uid=facts.gous_uid,
        sched_block=_sched_block(facts, layout),
        task=script.task,
        layout=layout,
        execution_blocks=blocks,
        manifest=chosen,
        auxproducts=auxproducts,
        casa_version=manifest.casa_version,
        pipeline_version=manifest.pipeline_version,
        files=_latest(
            file
            for file in facts.files
            if (file.file_class.casefold() in _FETCHED_CLASSES or file.name in {*named, chosen})
            and file.name not in unwanted
        ),
    )


def _planned_files(
    manifest: Manifest, present: set[str]
) -> tuple[tuple[PlannedExecutionBlock, ...], PlannedFile | None]:
    """Return what restores each EB, and the auxiliary products; raise RestoreError with all that is missing."""
    missing: list[str] = []

    def planned(name: str | None, what: str, owner: str) -> PlannedFile:
        archived = resolve_name(name, present) if name else None
        if archived is None:
            missing.append(f"{name} ({what} of {owner})" if name else f"{what} of {owner} (the manifest names none)")
        return PlannedFile(name or "", archived or "")

    def block_of(session: ManifestSession, block: ManifestExecutionBlock) -> PlannedExecutionBlock:
        aux = resolve_name(session.aux_caltables, present) if session.aux_caltables else None
        return PlannedExecutionBlock(
            uid=block.uid,
            session=session.number,
            caltables=planned(session.caltables, "caltables", f"session_{session.number}"),
            aux_caltables=PlannedFile(session.aux_caltables, aux) if session.aux_caltables and aux else None,
            finalflags=planned(block.finalflags, "finalflags", block.uid),
            applycmds=planned(block.applycmds, "applycmds", block.uid),
            renorm=block.renorm,
        )

    sessions = sorted(manifest.sessions, key=lambda session: session.number)
    blocks = tuple(block_of(session, block) for session in sessions for block in session.execution_blocks)
    auxproducts = planned(manifest.auxproducts, "auxproducts", "the MOUS") if manifest.auxproducts else None
    if missing:
        raise RestoreError(f"the archive does not have what the manifest names: {', '.join(dict.fromkeys(missing))}")
    _check_not_shared(blocks)
    return blocks, auxproducts


def _check_not_shared(blocks: tuple[PlannedExecutionBlock, ...]) -> None:
    """Raise RestoreError if two EBs would get the same flags or commands, or two sessions the same tables."""
    owned = [(block.uid, file.archived) for block in blocks for file in (block.finalflags, block.applycmds)]
    owned += sorted({(f"session_{block.session}", block.caltables.archived) for block in blocks})
    times = Counter(name for _, name in owned)
    shared = sorted(f"{name} ({owner})" for owner, name in owned if times[name] > 1)
    if shared:
        raise RestoreError(f"the manifest names one file for several purposes: {', '.join(shared)}")


def _sched_block(facts: RestoreFacts, layout: SessionLayout) -> SchedBlock:
    """Return the one SB that the EBs belong to."""
    wanted = set(layout.execution_blocks)
    if len(facts.sched_blocks) == 1 and not facts.sched_blocks[0].uid:
        # Only its status is known, from the archived calibration script.
        return facts.sched_blocks[0]
    owners = [block for block in facts.sched_blocks if wanted & set(block.execution_blocks)]
    if len(owners) > 1:
        said = "; ".join(f"{owner.uid} ({owner.state}): {', '.join(owner.execution_blocks)}" for owner in owners)
        raise RestoreError(f"the EBs of this MOUS belong to {len(owners)} scheduling blocks, a person decides: {said}")
    if not owners:
        known = ", ".join(block.uid for block in facts.sched_blocks) or "none is known"
        raise RestoreError(f"no scheduling block of this MOUS has its EBs ({known}): check the query")
    strangers = sorted(wanted - set(owners[0].execution_blocks))
    if strangers:
        raise RestoreError(f"{', '.join(strangers)} belong to no known scheduling block: check the query")
    return owners[0]


def _latest(files: Iterable[ArchivedFile]) -> tuple[ArchivedFile, ...]:
    """Return each file once, sorted by name, in its latest version."""
    latest: dict[str, ArchivedFile] = {}
    for file in sorted(files, key=lambda file: (file.name, len(file.version), file.version)):
        latest[file.name] = file
    return tuple(latest.values())
