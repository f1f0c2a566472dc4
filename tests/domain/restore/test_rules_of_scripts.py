"""The archive's scripts are read, in Python 2 and 3, and never run."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecal.domain.restore.errors import RestoreError
from stagecal.domain.restore.pipescript import PipescriptFacts, read_pipescript
from stagecal.domain.restore.restore_script import read_restore_script
from stagecal.domain.restore.sessions import Session
from tests.domain.restore.examples import PASSED, PIPESCRIPT, SCRIPT, SCRIPT_WITH_OTHER_CALLS, restore_script


def test_a_plain_script_restores_its_ebs_and_does_nothing_else() -> None:
    script = read_restore_script(SCRIPT)
    assert script.task == "hifa_restoredata"
    assert script.vis == ("uid___A002_Xcf92df_X3453",)
    assert script.execution_blocks == (PASSED,)
    assert script.session == ("session_2",)
    assert script.layout == (Session(2, (PASSED,)),)
    assert script.parameters == {"ocorr_mode": "ca"}


def test_the_import_of_fixsyscaltimes_is_no_call_of_it() -> None:
    assert "fixsyscaltimes" in SCRIPT
    assert read_restore_script(SCRIPT).other_calls == ()


def test_calls_beyond_the_usual_ones_are_found_in_their_order() -> None:
    assert read_restore_script(SCRIPT_WITH_OTHER_CALLS).other_calls == ("hifa_importdata", "fixsyscaltimes")


def test_a_commented_call_does_not_count() -> None:
    script = SCRIPT.replace("h_init()\n", "h_init()\n#fixsyscaltimes(vis = 'x.ms')\n")
    assert read_restore_script(script).other_calls == ()


def test_several_ebs_of_one_session_and_gaps_are_read() -> None:
    sessions = {1: ["uid://A002/Xc86fe5/X6ab1"], 9: ["uid://A002/Xca0a7b/X3cab", "uid://A002/Xca0a7b/X4806"]}
    assert read_restore_script(restore_script(sessions)).layout == tuple(
        Session(number, tuple(uids)) for number, uids in sessions.items()
    )


def test_a_single_dish_script_sets_the_state_of_its_context_and_nothing_more() -> None:
    script = read_restore_script(
        "context = h_init()\ncontext.set_state('ProjectSummary', 'proposal_code', '2017.1.01355.L')\ntry:\n"
        "    hsd_restoredata(vis=['uid___A002_X1_X2'], session=['session_1'], ocorr_mode='ao', hm_rasterscan='time')\n"
        "finally:\n    h_save()\n"
    )
    assert (script.task, script.other_calls) == ("hsd_restoredata", ())
    assert script.parameters == {"ocorr_mode": "ao", "hm_rasterscan": "time"}


PYTHON_2 = "print 'restoring', 3\ntry:\n    pass\nexcept Exception, error:\n    print error\n"


@pytest.mark.parametrize(
    "text",
    [
        SCRIPT.replace("\n", "\r\n"),
        SCRIPT.replace("\n", "\r"),
        "\ufeff" + SCRIPT,
        "# -*- coding: latin-1 -*-\n# Zürich\n" + SCRIPT,
        PYTHON_2 + SCRIPT,
        SCRIPT.replace("h_init()\n", "h_init()\nprint 'begin'\n"),
        SCRIPT.replace("h_init()\n", "h_init()\nprint('begin')\n"),
        "exec 'pass'\n" + SCRIPT,
        SCRIPT.replace("try:", "try :\n  if x <> 1: pass"),
        SCRIPT.replace("vis=['uid___A002_Xcf92df_X3453'], ", "vis = [ u'uid___A002_Xcf92df_X3453' ] , "),
        SCRIPT.replace("vis=['uid", "vis=['../rawdata/uid"),
        SCRIPT.replace("vis=[", "[").replace("session=[", "["),
        SCRIPT.replace("vis=['uid___A002_Xcf92df_X3453'", "\n      vis=['uid___A002_Xcf92df_X3453'"),
    ],
    ids=[
        *("CRLF", "CR", "BOM", "encoding", "Python 2", "print statement", "print function", "exec statement"),
        *("no Python at all", "unicode literals", "path", "positional", "two lines"),
    ],
)
def test_the_forms_of_real_scripts_are_read_alike(text: str) -> None:
    script = read_restore_script(text)
    assert script.layout == (Session(2, (PASSED,)),)
    assert script.parameters == {"ocorr_mode": "ca"}
    assert script.other_calls == ()


def test_other_calls_are_found_where_the_script_is_no_python_we_know() -> None:
    text = SCRIPT_WITH_OTHER_CALLS.replace("h_init()\ntry:", "exec 'pass'\nh_init()\ntry:")
    script = read_restore_script(text)
    assert script.other_calls == ("hifa_importdata", "fixsyscaltimes")
    assert script.execution_blocks == (PASSED,)


def test_parameters_beyond_ebs_and_sessions_are_kept() -> None:
    script = read_restore_script(SCRIPT.replace("ocorr_mode='ca'", "bdfflags=False, asis=tables, ocorr_mode='ao'"))
    assert script.parameters == {"bdfflags": False, "asis": "tables", "ocorr_mode": "ao"}


def test_a_script_may_leave_the_sessions_to_the_pipeline() -> None:
    script = read_restore_script(SCRIPT.replace("session=['session_2'], ", ""))
    assert (script.session, script.layout) == ((), None)


CALL = "hifa_restoredata (vis=['uid___A002_Xcf92df_X3453'], session=['session_2'], ocorr_mode='ca')"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "0 times"),
        ("h_init()\nh_save()\n", "0 times"),
        ("#" + CALL, "0 times"),
        (f"{CALL}\n{CALL}\n", "2 times"),
        ("\0" + CALL[:20], "0 times"),
        (CALL.replace("'session_2'", "'session_2', 'session_3'"), "1 execution blocks and 2 sessions"),
        (CALL.replace("session_2", "default"), "names a session 'default'"),
        (CALL.replace("['uid___A002_Xcf92df_X3453']", "vislist"), "vis is not a list of names"),
        (CALL.replace("['uid___A002_Xcf92df_X3453']", "[]"), "names no execution block"),
        (CALL.replace("vis=['uid___A002_Xcf92df_X3453'], ", ""), "vis is not a list of names"),
        (CALL.replace("'uid___A002_Xcf92df_X3453'", "'x'"), "is not a UID"),
        (
            CALL.replace("'uid___A002_Xcf92df_X3453'", "'uid___A002_X1_X2', 'uid___A002_X1_X2.ms'").replace(
                "'session_2'", "'session_1', 'session_2'"
            ),
            "names an execution block twice",
        ),
    ],
)
def test_a_script_without_one_clear_call_is_refused(text: str, message: str) -> None:
    with pytest.raises(RestoreError, match=message):
        read_restore_script(text)


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    for reader in (read_restore_script, read_pipescript):
        try:
            reader(text)
        except RestoreError as error:
            assert "\n" not in str(error)


# --- the calibration script -------------------------------------------------------------------------------------------


def test_a_calibration_script_gives_what_a_ppr_needs_without_a_database() -> None:
    assert read_pipescript(PIPESCRIPT) == PipescriptFacts(
        project="2017.1.01347.S",
        project_uid="uid://A001/X1221/Xdf8",
        part_id="X659301709",
        project_status_uid="uid://A001/X1221/Xdfc",
        mous="uid://A001/X12a3/X80e",
        recipe="hifa_calimage",
        ppr_file="PPR_uid___A001_X12a3_X80f.xml",
        sous_uid="uid://A001/X12a3/X80c",
        gous_uid="uid://A001/X12a3/X80d",
        sched_block_status_uid="uid://A001/X12a3/X80f",
    )


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + PIPESCRIPT,
        PIPESCRIPT.replace("\n", "\r\n"),
        PIPESCRIPT.replace(", '", ", u'"),
        PIPESCRIPT.replace("'", '"'),
        "#context.set_state('ProjectStructure', 'ous_part_id', 'X1')\n" + PIPESCRIPT,
        "print 'no Python 3'\n" + PIPESCRIPT,
    ],
    ids=["BOM", "CRLF", "unicode literals", "other quotes", "a comment says something else", "Python 2"],
)
def test_the_forms_of_real_calibration_scripts_are_read_alike(text: str) -> None:
    assert read_pipescript(text) == read_pipescript(PIPESCRIPT)


def test_a_script_run_by_hand_says_nothing_that_counts() -> None:
    text = "context = h_init()\ncontext.set_state('ProjectSummary', 'proposal_code', 'unknown')\n"
    assert read_pipescript(text + "context.set_state('ProjectStructure', 'ppr_file', '')\n") == PipescriptFacts()


def test_a_calibration_script_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(RestoreError, match="says proposal_code"):
        read_pipescript(PIPESCRIPT + "context.set_state('ProjectSummary', 'proposal_code', '2018.1.00001.S')\n")
    with pytest.raises(RestoreError, match="lay in the directory of"):
        read_pipescript(PIPESCRIPT.replace("MOUS_uid___A001_X12a3_X80e", "MOUS_uid___A001_X12a3_X80f"))
    with pytest.raises(RestoreError, match="is not a UID"):
        read_pipescript(PIPESCRIPT.replace("uid://A001/X1221/Xdf8", "uid://A001/"))
