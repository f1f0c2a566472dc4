"""A plan is made when all sources agree and every file is there; whatever is in doubt stops, with who says what."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecal.domain.archive_facts import ExecutionBlock
from stagecal.domain.restore.errors import DisagreementError, RestoreError
from stagecal.domain.restore.facts import ArchivedFile, SchedBlock
from stagecal.domain.restore.manifest import read_manifest
from stagecal.domain.restore.pipescript import read_pipescript
from stagecal.domain.restore.plan import RestorePlan, SessionLayout, completed, cross_check, plan_restore
from stagecal.domain.restore.ppr import read_ppr_sessions
from stagecal.domain.restore.restore_script import read_restore_script
from stagecal.domain.restore.sessions import Session, sessions_of
from tests.domain.restore.examples import (
    MOUS,
    PASSED,
    PIPESCRIPT,
    SB,
    SCRIPT,
    SEMIPASS,
    example_plan,
    facts_of,
    manifest_xml,
    plan_of,
    restore_script,
    status_xml,
)

OTHER = "uid://A002/Xcf92df/X4000"
FACTS = facts_of({2: [PASSED]}, {SEMIPASS: "SemiPass"})
BLOCKS = FACTS.execution_blocks


def checked(**changes: Any) -> SessionLayout:
    """Cross-check the example, of which a test changes one source."""
    sources: dict[str, Any] = {
        "manifest": manifest_xml({2: [PASSED]}),
        "status": (Session(1, (SEMIPASS,)), Session(2, (PASSED,))),
        "script": SCRIPT,
        "ppr": None,
        "execution_blocks": BLOCKS,
        **changes,
    }
    manifest = read_manifest(sources.pop("manifest"))
    script = read_restore_script(sources.pop("script"))
    return cross_check(manifest, script=script, **sources)


def test_sources_that_agree_give_all_sessions_without_a_gap() -> None:
    layout = checked()
    assert layout.sessions == (Session(1, ()), Session(2, (PASSED,)))
    assert layout.session_of(PASSED) == 2
    assert layout.execution_blocks == (PASSED,)


def test_sessions_after_the_last_calibrated_one_are_kept() -> None:
    layout = checked(status=(Session(1, (SEMIPASS,)), Session(2, (PASSED,)), Session(3, ())))
    assert [session.number for session in layout.sessions] == [1, 2, 3]


def test_without_a_database_the_products_check_each_other() -> None:
    layout = checked(status=None, execution_blocks=(), ppr=(Session(1, ()), Session(2, (PASSED,))))
    assert layout.sessions == (Session(1, ()), Session(2, (PASSED,)))


def test_an_archived_ppr_may_name_ebs_that_did_not_pass() -> None:
    assert checked(ppr=(Session(1, (SEMIPASS,)), Session(2, (PASSED,)))).session_of(PASSED) == 2


def test_the_table_shows_who_says_what() -> None:
    with pytest.raises(DisagreementError) as stopped:
        checked(status=(Session(1, (SEMIPASS, PASSED)),), ppr=(Session(2, (PASSED,)),))
    assert str(stopped.value).splitlines()[1:] == [
        "EB                        OUSStatus  manifest   restore script  archived PPR  QA0",
        "uid://A002/Xce574d/Xa33e  session_1  -          -               -             SemiPass",
        "uid://A002/Xcf92df/X3453  session_1  session_2  session_2       session_2     Pass",
    ]
    assert stopped.value.reasons == (f"{PASSED} is in session_2 in the manifest, in session_1 in OUSStatus",)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"status": (Session(1, (SEMIPASS,)), Session(3, (PASSED,)))}, "in session_3 in OUSStatus"),
        ({"status": (Session(1, (SEMIPASS,)),)}, "OUSStatus does not list it"),
        ({"status": ()}, "OUSStatus does not list it"),
        ({"script": SCRIPT.replace("session_2", "session_1")}, "in session_1 in restore script"),
        ({"script": SCRIPT.replace("Xcf92df_X3453", "Xcf92df_X4000")}, f"the restore script has {OTHER}"),
        ({"ppr": (Session(1, (PASSED,)),)}, "in session_1 in archived PPR"),
        ({"ppr": ()}, "archived PPR does not list it"),
        ({"execution_blocks": (*BLOCKS, ExecutionBlock(OTHER, "Pass"))}, f"{OTHER} has QA0 Pass, but the manifest"),
        ({"execution_blocks": (ExecutionBlock(PASSED, "SemiPass"),)}, "its QA0 is SemiPass"),
        ({"execution_blocks": (ExecutionBlock(PASSED, ""),)}, "its QA0 is unknown"),
        ({"execution_blocks": (ExecutionBlock(SEMIPASS, "SemiPass"),)}, "its QA0 is not known"),
        ({"execution_blocks": (*BLOCKS, ExecutionBlock(PASSED, "Fail"))}, "its QA0 is Fail and Pass"),
        ({"execution_blocks": (*BLOCKS, ExecutionBlock(SEMIPASS, "Pass"))}, "two QA0: Pass and SemiPass"),
        ({"execution_blocks": (ExecutionBlock(PASSED, "Pass"),)}, f"the QA0 of {SEMIPASS} is not known"),
        ({"ppr": (Session(1, (OTHER,)), Session(2, (PASSED,)))}, f"the QA0 of {OTHER} is not known"),
        ({"ppr": (Session(1, (OTHER,)), Session(2, (PASSED,))), "execution_blocks": ()}, f"{OTHER} stands in"),
        ({"manifest": manifest_xml({1: [PASSED]})}, "is in session_1 in the manifest, in session_2 in OUSStatus"),
        ({"manifest": manifest_xml({1: [SEMIPASS], 2: [PASSED]})}, f"the manifest lists {SEMIPASS}, but its QA0"),
    ],
)
def test_any_disagreement_stops_the_restore(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(DisagreementError, match=r"until a person has decided") as stopped:
        checked(**changes)
    assert any(reason in said for said in stopped.value.reasons), stopped.value.reasons


def test_a_script_without_sessions_still_has_to_name_the_ebs() -> None:
    silent = SCRIPT.replace("session=['session_2'], ", "")
    assert checked(script=silent).session_of(PASSED) == 2
    with pytest.raises(DisagreementError, match="the restore script has"):
        checked(script=silent.replace("X3453", "X4000"))


# --- the plan ---------------------------------------------------------------------------------------------------------


def planned(**changes: Any) -> RestorePlan:
    """Plan the example, of which a test changes facts or texts."""
    manifest = changes.pop("manifest", manifest_xml({2: [PASSED]}))
    script = changes.pop("script", SCRIPT)
    status = changes.pop("status", (Session(1, (SEMIPASS,)), Session(2, (PASSED,))))
    pipescript = changes.pop("pipescript", PIPESCRIPT)
    return plan_restore(
        dataclasses.replace(FACTS, **changes),
        read_manifest(manifest),
        read_restore_script(script),
        status=status,
        pipescript=read_pipescript(pipescript) if pipescript else None,
    )


def test_the_example_is_planned_from_end_to_end() -> None:
    plan = example_plan()
    assert (plan.mous, plan.project, plan.task) == (MOUS, "2017.1.01347.S", "hifa_restoredata")
    assert plan.sched_block == dataclasses.replace(SB, execution_blocks=(PASSED, SEMIPASS))
    assert (plan.casa_version, plan.pipeline_version) == ("5.1.1-5", "40896")
    (block,) = plan.execution_blocks
    assert (block.uid, block.session, block.renorm) == (PASSED, 2, None)
    assert block.caltables.name == "uid___A001_X12a3_X80e.session_2.caltables.tgz"
    assert block.caltables.archived == "member.uid___A001_X12a3_X80e.session_2.caltables.tgz"
    assert block.aux_caltables is not None
    assert block.finalflags.name == block.finalflags.archived == "uid___A002_Xcf92df_X3453.ms.flagversions.tgz"
    assert block.applycmds.name == "uid___A002_Xcf92df_X3453.ms.calapply.txt"
    assert plan.manifest == "member.uid___A001_X12a3_X80e.calimage.pipeline_manifest.xml"
    assert plan.auxproducts is not None
    assert plan.auxproducts.archived == "member.uid___A001_X12a3_X80e.hifa_calimage.auxproducts.tgz"


def test_all_products_but_the_images_are_fetched() -> None:
    names = [file.name for file in example_plan().files]
    assert names == sorted(file.name for file in FACTS.files if file.file_class != "science")


def test_what_the_manifest_calls_otherwise_is_linked_under_its_name() -> None:
    assert {(file.name, file.archived) for file in example_plan().links} == {
        (f"uid___A001_X12a3_X80e.{name}", f"member.uid___A001_X12a3_X80e.{name}")
        for name in ("session_2.caltables.tgz", "session_2.auxcaltables.tgz", "hifa_calimage.auxproducts.tgz")
    }
    assert planned(manifest=manifest_xml({2: [PASSED]}, prefix="member.")).links == ()


def test_all_missing_files_are_told_at_once() -> None:
    manifest = manifest_xml({2: [PASSED]}).replace("X3453.ms.flagversions.tgz", "X3453.ms.flags.tgz")
    manifest = manifest.replace("uid___A002_Xcf92df_X3453.ms.calapply.txt", "Undefined")
    with pytest.raises(RestoreError) as stopped:
        planned(manifest=manifest, files=tuple(file for file in FACTS.files if ".caltables" not in file.name))
    assert str(stopped.value) == (
        "the archive does not have what the manifest names: "
        "uid___A001_X12a3_X80e.session_2.caltables.tgz (caltables of session_2), "
        "uid___A002_Xcf92df_X3453.ms.flags.tgz (finalflags of uid://A002/Xcf92df/X3453), "
        "applycmds of uid://A002/Xcf92df/X3453 (the manifest names none)"
    )


def test_tables_of_the_imaging_may_be_missing_but_auxiliary_products_may_not() -> None:
    plan = planned(files=tuple(file for file in FACTS.files if "auxcaltables" not in file.name))
    assert plan.execution_blocks[0].aux_caltables is None
    with pytest.raises(RestoreError, match="auxproducts of the MOUS"):
        planned(files=tuple(file for file in FACTS.files if "auxproducts" not in file.name))


def test_one_file_for_two_ebs_stops() -> None:
    sessions = {1: [PASSED], 2: [OTHER]}
    manifest = manifest_xml(sessions).replace("X4000.ms.calapply.txt", "X3453.ms.calapply.txt")
    with pytest.raises(RestoreError, match="names one file for several purposes"):
        plan_restore(
            facts_of(sessions, {}), read_manifest(manifest), read_restore_script(restore_script(sessions)), status=None
        )


def test_a_leftover_manifest_is_not_fetched() -> None:
    leftover = ArchivedFile("member.uid___A001_X12a3_X80e.hifa_image.pipeline_manifest.xml", "script")
    assert leftover not in planned(files=(*FACTS.files, leftover)).files


def test_of_a_file_the_latest_version_is_fetched() -> None:
    name = "uid___A002_Xcf92df_X3453.ms.calapply.txt"
    versions = tuple(ArchivedFile(name, "calibration", version) for version in ("9", "10", "2"))
    plan = planned(files=(*(file for file in FACTS.files if file.name != name), *versions))
    assert [file.version for file in plan.files if file.name == name] == ["10"]


def test_the_manifest_of_another_mous_stops() -> None:
    text = manifest_xml({2: [PASSED]}).replace('<ous name="uid___A001_X12a3_X80e">', '<ous name="uid___A001_X1_X2">')
    with pytest.raises(RestoreError, match="the manifest is of uid://A001/X1/X2"):
        planned(manifest=text)


def test_of_several_scheduling_blocks_the_one_with_the_ebs_is_chosen() -> None:
    unused = SchedBlock("uid://A001/X12a3/X900", "uid://A001/X12a3/X901", "Deleted", (OTHER,))
    assert planned(sched_blocks=(unused, SB)).sched_block == SB


def test_ebs_of_two_scheduling_blocks_stop_for_a_person() -> None:
    second = SchedBlock("uid://A001/X12a3/X900", "uid://A001/X12a3/X901", "Ready", (PASSED,))
    with pytest.raises(RestoreError, match=r"belong to 2 scheduling blocks.*X804.*X900 \(Ready\)"):
        planned(sched_blocks=(SB, second))


def test_ebs_of_no_scheduling_block_stop() -> None:
    with pytest.raises(RestoreError, match="no scheduling block of this MOUS has its EBs"):
        planned(sched_blocks=(dataclasses.replace(SB, execution_blocks=(SEMIPASS,)),))
    with pytest.raises(RestoreError, match="none is known"):
        planned(sched_blocks=(), pipescript="")


def test_the_calibration_script_fills_in_what_the_archive_does_not_say() -> None:
    blank = dataclasses.replace(FACTS, project_uid="", part_id="", project_status_uid="", sous_uid="", sched_blocks=())
    whole = completed(blank, read_pipescript(PIPESCRIPT))
    assert whole == dataclasses.replace(FACTS, sched_blocks=(SchedBlock("", "uid://A001/X12a3/X80f", "", ()),))
    assert completed(blank, None) is blank


def test_the_calibration_script_of_another_project_stops() -> None:
    with pytest.raises(RestoreError, match=r"project = 2017\.1\.01347\.S, casa_pipescript\.py says 2017\.1\.00001\.S"):
        planned(pipescript=PIPESCRIPT.replace("2017.1.01347.S'", "2017.1.00001.S'"))


# --- any layout of sessions -------------------------------------------------------------------------------------------

UIDS = st.builds("uid://A002/X{:x}/X{:x}".format, st.integers(1, 2**24), st.integers(1, 2**16))


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[Session, ...], dict[str, str]]:
    """Draw sessions of passed EBs with gaps, and the QA0 of the EBs that did not pass."""
    uids = draw(st.lists(UIDS, min_size=1, max_size=8, unique=True))
    count = draw(st.integers(1, 6))
    where = [draw(st.integers(1, count)) for _ in uids]
    failed = draw(st.sets(st.sampled_from(uids), max_size=len(uids) - 1))
    layout = tuple(
        Session(number, tuple(uid for uid, at in zip(uids, where, strict=True) if at == number and uid not in failed))
        for number in range(1, count + 1)
    )
    return layout, dict.fromkeys(sorted(failed), "SemiPass")


@given(layouts())
def test_sources_that_say_the_same_are_planned_as_they_say(drawn: tuple[tuple[Session, ...], dict[str, str]]) -> None:
    layout, others = drawn
    plan = plan_of(layout, others)
    assert plan.layout.sessions == layout
    assert [(block.uid, block.session) for block in plan.execution_blocks] == [
        (uid, session.number) for session in layout for uid in session.execution_blocks
    ]


@given(layouts(), st.data())
def test_one_source_that_moves_or_loses_an_eb_always_stops(
    drawn: tuple[tuple[Session, ...], dict[str, str]], data: st.DataObject
) -> None:
    layout, others = drawn
    sessions = {session.number: list(session.execution_blocks) for session in layout if session.execution_blocks}
    number = data.draw(st.sampled_from(sorted(sessions)))
    uid = data.draw(st.sampled_from(sessions[number]))
    wrong = {at: [one for one in uids if one != uid] for at, uids in sessions.items()}
    target = data.draw(st.integers(1, len(layout) + 1).filter(lambda at: at != number))
    if data.draw(st.booleans()):
        wrong.setdefault(target, []).append(uid)
    wrong = {at: uids for at, uids in wrong.items() if uids}
    said = dict.fromkeys(("status", "manifest", "script", "ppr"), sessions)
    said[data.draw(st.sampled_from(sorted(said)))] = wrong
    if not said["manifest"] or not said["script"]:
        return
    with pytest.raises(DisagreementError) as stopped:
        cross_check(
            read_manifest(manifest_xml(said["manifest"])),
            status=sessions_of(status_xml([said["status"].get(at, []) for at in range(1, len(layout) + 2)])),
            script=read_restore_script(restore_script(said["script"])),
            ppr=tuple(Session(at, tuple(uids)) for at, uids in sorted(said["ppr"].items())),
            execution_blocks=facts_of(sessions, others).execution_blocks,
        )
    assert any(uid in reason for reason in stopped.value.reasons)


def test_the_archived_ppr_of_the_example_is_read_for_the_comparison() -> None:
    text = (
        "<SciPipeRequest><ProcessingIntents><Intents><Keyword>PROCESS</Keyword><Value>true</Value></Intents>"
        f"<Intents><Keyword>SESSION_1</Keyword><Value>{SEMIPASS}</Value></Intents>"
        f"<Intents><Keyword>SESSION_2</Keyword><Value>\n {PASSED}|{OTHER}\n</Value></Intents>"
        "<Intents><Keyword>SESSION_4</Keyword><Value/></Intents></ProcessingIntents></SciPipeRequest>"
    )
    assert read_ppr_sessions(text) == (Session(1, (SEMIPASS,)), Session(2, (PASSED, OTHER)), Session(4, ()))
    for wrong, message in [
        (text.replace("SESSION_4", "SESSION_2"), "has SESSION_2 twice"),
        (text.replace(OTHER, SEMIPASS), "in session 1 and in session 2"),
        (text.replace("SciPipeRequest", "html"), "not a SciPipeRequest"),
        (text.replace(OTHER, "x"), "is not a UID"),
    ]:
        with pytest.raises(RestoreError, match=message):
            read_ppr_sessions(wrong)
