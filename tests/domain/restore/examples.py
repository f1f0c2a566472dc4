"""A MOUS of two sessions as the archive keeps it, and builders for others: texts as real files have them.

Its first EB is SemiPass, so the products name only session_2; the second has passed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stagecal.domain.archive_facts import ExecutionBlock
from stagecal.domain.identifiers import sanitized
from stagecal.domain.restore.facts import ArchivedFile, RestoreFacts, SchedBlock
from stagecal.domain.restore.manifest import read_manifest
from stagecal.domain.restore.plan import RestorePlan, plan_restore
from stagecal.domain.restore.restore_script import read_restore_script
from stagecal.domain.restore.sessions import Session, sessions_of

MOUS = "uid://A001/X12a3/X80e"
SEMIPASS = "uid://A002/Xce574d/Xa33e"
PASSED = "uid://A002/Xcf92df/X3453"
SB = SchedBlock("uid://A001/X12a3/X804", "uid://A001/X12a3/X80f", "FullyObserved", (SEMIPASS, PASSED))

SCRIPT = """\
from recipes.almahelpers import fixsyscaltimes # SACM/JAO - Fixes
__rethrow_casa_exceptions = True
h_init()
try:
    hifa_restoredata (vis=['uid___A002_Xcf92df_X3453'], session=['session_2'], ocorr_mode='ca')
finally:
    h_save()
"""

SCRIPT_WITH_OTHER_CALLS = """\
from recipes.almahelpers import fixsyscaltimes # SACM/JAO - Fixes
__rethrow_casa_exceptions = True
h_init()
try:
    hifa_importdata (dbservice=False, bdfflags=False, vis=['../rawdata/uid___A002_Xcf92df_X3453'],
                     session=['session_2'], ocorr_mode='ca')
    fixsyscaltimes(vis = 'uid___A002_Xcf92df_X3453.ms')# SACM/JAO - Fixes
    h_save() # SACM/JAO - Finish weblog after fixes
    h_init() # SACM/JAO - Restart weblog after fixes
    hifa_restoredata (vis=['uid___A002_Xcf92df_X3453'], session=['session_2'], ocorr_mode='ca')
finally:
    h_save()
"""

PIPESCRIPT = """\
from recipes.almahelpers import fixsyscaltimes # SACM/JAO - Fixes
__rethrow_casa_exceptions = True
context = h_init()
context.set_state('ProjectSummary', 'proposal_code', '2017.1.01347.S')
context.set_state('ProjectSummary', 'piname', 'unknown')
context.set_state('ProjectStructure', 'ous_part_id', 'X659301709')
context.set_state('ProjectStructure', 'ous_title', 'Undefined')
context.set_state('ProjectStructure', 'ppr_file', '/opt/mnt/spool/2017.1.01347.S_2018_07_10T13_10_00.360/\
SOUS_uid___A001_X12a3_X80c/GOUS_uid___A001_X12a3_X80d/MOUS_uid___A001_X12a3_X80e/working/PPR_uid___A001_X12a3_X80f.xml')
context.set_state('ProjectStructure', 'ps_entity_id', 'uid://A001/X1221/Xdfc')
context.set_state('ProjectStructure', 'recipe_name', 'hifa_calimage')
context.set_state('ProjectStructure', 'ous_entity_id', 'uid://A001/X1221/Xdf8')
context.set_state('ProjectStructure', 'ousstatus_entity_id', 'uid://A001/X12a3/X80e')
try:
    hifa_importdata(vis=['uid___A002_Xcf92df_X3453'], session=['session_2'])
finally:
    h_save()
"""


def status_xml(sessions: Sequence[Sequence[str]], mous: str = MOUS) -> str:
    """Return an OUSStatus document with these EBs in its sessions; the last session has no end."""
    parts = []
    for number, uids in enumerate(sessions, start=1):
        references = "".join(
            f"<ouss:ExecBlockRef>\n<val:ExecBlockId>{uid}</val:ExecBlockId>\n</ouss:ExecBlockRef>\n" for uid in uids
        )
        # Not in the order of the document on purpose: times decide nothing.
        end = "" if number == len(sessions) else f"<ouss:EndTime>20{30 - number}-06-06 13:07:22.036</ouss:EndTime>\n"
        parts.append(
            f'<ouss:Session entityPartId="X{number:08}" almatype="APDM::Session">\n'
            f"<ouss:StartTime>2018-06-06 12:41:10.826</ouss:StartTime>\n{end}{references}"
            '<ouss:SBStatusRef entityId="uid://A001/X12a3/X80f" entityTypeName="SBStatus"/>\n</ouss:Session>\n'
        )
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        '<ouss:OUSStatus xmlns:val="Alma/ValueTypes" xmlns:ouss="Alma/Scheduling/OUSStatus" '
        'xmlns:ps="Alma/Scheduling/ProjectStatus" schemaVersion="13" almatype="APDM::OUSStatus">\n'
        '<ps:Status State="Delivered"/>\n'
        f'<ouss:OUSStatusEntity entityId="{mous}" entityTypeName="OUSStatus" schemaVersion="13"/>\n'
        f"{''.join(parts)}</ouss:OUSStatus>\n"
    )


def manifest_xml(
    sessions: Mapping[int, Sequence[str]],
    *,
    mous: str = MOUS,
    prefix: str = "",
    renorm: bool = False,
    casa: str = "5.1.1-5",
    pipeline: str = "40896",
) -> str:
    """Return a pipeline manifest with these EBs, as the pipeline writes one."""
    name = prefix + sanitized(mous)
    parts = []
    for number, uids in sessions.items():
        blocks = "".join(
            f'      <asdm datatype="asdm" format="sdm" name="{sanitized(uid)}.ms">\n'
            f'        <finalflags asdm="{sanitized(uid)}.ms" datatype="ms.flagversions" format="tgz" '
            f'name="{sanitized(uid)}.ms.flagversions.tgz"/>\n'
            f'        <applycmds name="{sanitized(uid)}.ms.calapply.txt"/>\n'
            + ('        <hifa_renorm apply="True" threshold="1.02" spw="17,19"/>\n' if renorm else "")
            + "      </asdm>\n"
            for uid in uids
        )
        parts.append(
            f'    <session name="session_{number}">\n'
            f'      <caltables datatype="caltables" name="{name}.session_{number}.caltables.tgz"/>\n{blocks}'
            f'      <aux_caltables name="{name}.session_{number}.auxcaltables.tgz"/>\n    </session>\n'
        )
    return (
        f'<?xml version="1.0" ?>\n<piperesults name="{sanitized(mous)}">\n  <ous name="{sanitized(mous)}">\n'
        f'    <casaversion name="{casa}"/>\n    <pipeline_version name="{pipeline}"/>\n'
        '    <procedure_name name="hifa_calimage"/>\n    <piperequest name="Undefined"/>\n'
        f"{''.join(parts)}"
        f'    <restorescript name="{name}.hifa_calimage.casa_piperestorescript.py"/>\n'
        f'    <aux_products_file name="{name}.hifa_calimage.auxproducts.tgz"/>\n'
        '    <image imtype="target" name="any/where/image.fits"/>\n  </ous>\n</piperesults>\n'
    )


def archived_files(sessions: Mapping[int, Sequence[str]], mous: str = MOUS) -> tuple[ArchivedFile, ...]:
    """Return the archived products of a MOUS with these EBs."""
    member = f"member.{sanitized(mous)}"
    files = [
        ArchivedFile(f"{member}.calimage.pipeline_manifest.xml", "script"),
        ArchivedFile(f"{member}.hifa_calimage.auxproducts.tgz", "calibration"),
        ArchivedFile(f"{member}.hifa_calimage.casa_piperestorescript.py", "script"),
        ArchivedFile(f"{member}.hifa_calimage.casa_pipescript.py", "script"),
        ArchivedFile(f"{member}.scriptForPI.py", "script"),
        ArchivedFile(f"{member}.HL_Tau_sci.spw17.mfs.I.pbcor.fits", "science"),
    ]
    for number, uids in sessions.items():
        files.append(ArchivedFile(f"{member}.session_{number}.caltables.tgz", "calibration"))
        files.append(ArchivedFile(f"{member}.session_{number}.auxcaltables.tgz", "calibration"))
        for uid in uids:
            files.append(ArchivedFile(f"{sanitized(uid)}.ms.calapply.txt", "calibration"))
            files.append(ArchivedFile(f"{sanitized(uid)}.ms.flagversions.tgz", "calibration"))
    return tuple(files)


def facts_of(sessions: Mapping[int, Sequence[str]], others: Mapping[str, str]) -> RestoreFacts:
    """Return the archive's facts about the MOUS with these EBs of QA0 Pass, and others with their QA0."""
    passed = [uid for uids in sessions.values() for uid in uids]
    blocks = [ExecutionBlock(uid, "Pass") for uid in passed]
    blocks += [ExecutionBlock(uid, qa0) for uid, qa0 in others.items()]
    return RestoreFacts(
        mous=MOUS,
        project="2017.1.01347.S",
        project_uid="uid://A001/X1221/Xdf8",
        part_id="X659301709",
        project_status_uid="uid://A001/X1221/Xdfc",
        sous_uid="uid://A001/X12a3/X80c",
        gous_uid="uid://A001/X12a3/X80d",
        execution_blocks=tuple(blocks),
        sched_blocks=(SchedBlock(SB.uid, SB.status_uid, SB.state, (*passed, *others)),),
        files=archived_files(sessions),
        status_xml="",
    )


def restore_script(sessions: Mapping[int, Sequence[str]]) -> str:
    """Return a restore script of these EBs as the pipeline writes it."""
    vis = [sanitized(uid) for uids in sessions.values() for uid in uids]
    names = [f"session_{number}" for number, uids in sessions.items() for _ in uids]
    return (
        f"h_init()\ntry:\n    hifa_restoredata (vis={vis}, session={names}, ocorr_mode='ca')\nfinally:\n    h_save()\n"
    )


def example_plan(*, renorm: bool = False) -> RestorePlan:
    """Return the plan of the example MOUS."""
    sessions = {2: [PASSED]}
    return plan_restore(
        facts_of(sessions, {SEMIPASS: "SemiPass"}),
        read_manifest(manifest_xml(sessions, renorm=renorm)),
        read_restore_script(SCRIPT),
        status=sessions_of(status_xml([[SEMIPASS], [PASSED]]), mous=MOUS),
    )


def plan_of(layout: Sequence[Session], others: Mapping[str, str]) -> RestorePlan:
    """Return the plan of a MOUS with this layout, whose sources all agree."""
    sessions = {session.number: session.execution_blocks for session in layout if session.execution_blocks}
    return plan_restore(
        facts_of(sessions, others),
        read_manifest(manifest_xml(sessions, prefix="member.")),
        read_restore_script(restore_script(sessions)),
        status=tuple(layout),
    )
