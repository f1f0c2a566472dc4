"""What the pipeline would take wrongly from a manifest without a word is refused; everything else is read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecal.domain.restore.errors import RestoreError
from stagecal.domain.restore.facts import ArchivedFile
from stagecal.domain.restore.manifest import read_manifest
from stagecal.domain.restore.product_names import (
    archived_ppr_of,
    is_manual_calibration,
    manifest_of,
    other_manifests,
    pipescript_of,
    plain_name,
    resolve_name,
    restore_script_of,
)
from stagecal.domain.restore.sessions import Session
from tests.domain.restore.examples import MOUS, PASSED, SEMIPASS, archived_files, manifest_xml

EXAMPLE = manifest_xml({2: [PASSED]})


def test_the_example_says_which_files_restore_which_eb() -> None:
    manifest = read_manifest(EXAMPLE)
    assert manifest.mous == MOUS
    assert (manifest.casa_version, manifest.pipeline_version) == ("5.1.1-5", "40896")
    assert manifest.procedure_name == "hifa_calimage"
    assert manifest.layout == (Session(2, (PASSED,)),)
    (session,) = manifest.sessions
    (block,) = session.execution_blocks
    assert session.caltables == "uid___A001_X12a3_X80e.session_2.caltables.tgz"
    assert session.aux_caltables == "uid___A001_X12a3_X80e.session_2.auxcaltables.tgz"
    assert block.finalflags == "uid___A002_Xcf92df_X3453.ms.flagversions.tgz"
    assert block.applycmds == "uid___A002_Xcf92df_X3453.ms.calapply.txt"
    assert block.renorm is None
    assert manifest.auxproducts == "uid___A001_X12a3_X80e.hifa_calimage.auxproducts.tgz"


def test_undefined_is_no_name() -> None:
    assert read_manifest(EXAMPLE).piperequest is None
    text = EXAMPLE.replace("uid___A002_Xcf92df_X3453.ms.calapply.txt", "Undefined")
    assert read_manifest(text).sessions[0].execution_blocks[0].applycmds is None


def test_attributes_that_vary_from_cycle_to_cycle_are_ignored() -> None:
    text = EXAMPLE.replace("<caltables ", '<caltables level="member" package="N/A" ous_name="N/A" session="session_9" ')
    assert read_manifest(text) == read_manifest(EXAMPLE)


@pytest.mark.parametrize("text", ["\ufeff" + EXAMPLE, EXAMPLE.replace("\n", "\r\n"), "\n" + EXAMPLE])
def test_the_forms_of_real_manifests_are_read_alike(text: str) -> None:
    assert read_manifest(text) == read_manifest(EXAMPLE)


def test_several_ebs_and_gaps_between_sessions_are_kept() -> None:
    manifest = read_manifest(manifest_xml({2: [PASSED, SEMIPASS], 13: ["uid://A002/X1/X2"]}))
    assert manifest.layout == (Session(2, (PASSED, SEMIPASS)), Session(13, ("uid://A002/X1/X2",)))


def test_data_sets_of_the_imaging_are_no_ebs() -> None:
    aux = '<aux_asdm name="uid___A002_Xcf92df_X3453_target.ms"><applycmds name="x.auxcalapply.txt"/></aux_asdm>'
    derived = '<asdm name="uid___A002_Xcf92df_X3453_targets_line.ms"/>'
    text = EXAMPLE.replace("      <aux_caltables", aux + derived + "      <aux_caltables")
    assert read_manifest(text) == read_manifest(EXAMPLE)


def test_a_renormalisation_keeps_its_parameters() -> None:
    (session,) = read_manifest(manifest_xml({2: [PASSED]}, renorm=True)).sessions
    assert session.execution_blocks[0].renorm == {"apply": "True", "threshold": "1.02", "spw": "17,19"}


def test_a_manifest_of_a_run_by_hand_names_no_mous() -> None:
    assert read_manifest(EXAMPLE.replace('<ous name="uid___A001_X12a3_X80e">', '<ous name="unknown">')).mous == ""


def second(text: str, element: str) -> str:
    """Return the text with its first element of this name twice."""
    start = text.index(f"<{element} ")
    end = text.index("/>", start) + 2
    return text[:end] + text[start:end] + text[end:]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<html/>", "is a html, not piperesults"),
        ("", "no XML"),
        (EXAMPLE.replace("  </ous>", '  </ous><ous name="b"/>'), "2 ous where exactly one"),
        (EXAMPLE.replace("  <ous ", "  <x/><ous ", 1), "nothing before it"),
        (EXAMPLE.replace("<ous ", "<mous ").replace("</ous>", "</mous>"), "0 ous"),
        (second(EXAMPLE, "caltables"), "a second caltables in one session"),
        (second(EXAMPLE, "finalflags"), "a second finalflags in one asdm"),
        (second(EXAMPLE, "applycmds"), "a second applycmds in one asdm"),
        (second(EXAMPLE, "casaversion"), "a second casaversion in one ous"),
        (EXAMPLE.replace("session_2", "default"), "names a session 'default'"),
        (EXAMPLE.replace("Xcf92df_X3453.ms", "Xcf92df_X3453"), "looks only for names as <EB>.ms"),
        (EXAMPLE.replace("uid___A002_Xcf92df_X3453.ms", "my.ms"), "is not a UID"),
        (EXAMPLE.replace("<asdm ", "<x ").replace("</asdm>", "</x>"), "lists no execution block"),
        (manifest_xml({2: [PASSED], 3: [PASSED]}), f"lists {PASSED} in session 2 and in session 3"),
        (manifest_xml({2: [PASSED, PASSED]}), "lists an execution block twice"),
        (manifest_xml({2: [PASSED], 3: []}).replace("session_3", "session_2"), "session 2 twice"),
        ("<!DOCTYPE piperesults><piperesults/>", "document type"),
    ],
)
def test_what_the_pipeline_would_take_wrongly_is_refused(text: str, message: str) -> None:
    with pytest.raises(RestoreError, match=message):
        read_manifest(text)


@pytest.mark.parametrize("name", ["../x.tgz", "/etc/passwd", "a/b", "..", "", "-rf", "a b", "x..tgz", "a\nb", ".x"])
def test_a_name_that_leaves_its_directory_is_refused(name: str) -> None:
    text = EXAMPLE.replace("uid___A002_Xcf92df_X3453.ms.calapply.txt", name.replace("\n", "&#10;"))
    with pytest.raises(RestoreError, match="is not a plain file name"):
        read_manifest(text)


@given(st.text(max_size=20))
def test_a_plain_name_never_leads_anywhere(name: str) -> None:
    try:
        assert plain_name(name, "a test") == name
    except RestoreError:
        return
    assert name and not set("/\\\0\n ") & set(name) and ".." not in name and name[0] not in "-."


@pytest.mark.parametrize(
    ("name", "present", "found"),
    [
        ("a.tgz", {"a.tgz", "member.a.tgz"}, "a.tgz"),
        ("a.tgz", {"member.a.tgz"}, "member.a.tgz"),
        ("member.a.tgz", {"a.tgz"}, "a.tgz"),
        ("member.a.tgz", {"a.tgz", "member.a.tgz"}, "member.a.tgz"),
        ("a.tgz", {"b.tgz", "a.tgz.1"}, None),
        ("a.tgz", set(), None),
    ],
)
def test_names_are_found_with_and_without_member(name: str, present: set[str], found: str | None) -> None:
    assert resolve_name(name, present) == found


FILES = archived_files({2: [PASSED]})
MEMBER = "member.uid___A001_X12a3_X80e"


def test_the_example_has_one_file_of_each_kind() -> None:
    assert manifest_of(FILES) == f"{MEMBER}.calimage.pipeline_manifest.xml"
    assert restore_script_of(FILES) == f"{MEMBER}.hifa_calimage.casa_piperestorescript.py"
    assert pipescript_of(FILES) == f"{MEMBER}.hifa_calimage.casa_pipescript.py"
    assert archived_ppr_of(FILES) is None


def test_the_manifest_of_an_imaging_run_is_passed_over_and_not_fetched() -> None:
    imaging = f"{MEMBER}.hifa_image.pipeline_manifest.xml"
    files = (*FILES, ArchivedFile(imaging, "script"))
    assert manifest_of(files) == f"{MEMBER}.calimage.pipeline_manifest.xml"
    assert other_manifests(files, manifest_of(files)) == {imaging}


def test_two_manifests_of_calibrations_are_for_a_person() -> None:
    files = (*FILES, ArchivedFile(f"{MEMBER}.hifa_cal.pipeline_manifest.xml", "script"))
    with pytest.raises(RestoreError, match="a person has to choose"):
        manifest_of(files)


@pytest.mark.parametrize(
    ("name", "manual"),
    [
        ("uid___A002_X1_X2.ms.scriptForCalibration.py", True),
        ("uid___A001_X1_X2.scriptForFluxCalibration.py", True),
        ("member.uid___A001_X1_X2.scriptForSDCalibration.py", True),
        ("member.uid___A001_X1_X2.scriptForPI.py", False),
        ("member.uid___A001_X1_X2.hifa_calimage.scriptForPI.py", False),
        ("member.uid___A001_X1_X2.scriptForImaging.py", False),
        ("member.uid___A001_X1_X2.hifa_calimage.casa_pipescript.py", False),
    ],
)
def test_a_script_for_calibration_marks_manual_calibration(name: str, manual: bool) -> None:
    assert is_manual_calibration(name) is manual
