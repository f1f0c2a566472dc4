"""`stagecal restorable`, `mous-of` and `ppr`: what is known of a restore before anybody asks for one."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from stagecal import wiring
from stagecal.config import load_config
from stagecal.domain.identifiers import sanitized
from stagecal.domain.requests import Origin, Request, State
from stagecal.domain.restore.ppr import ppr_faults
from stagecal.services.restoring import chosen_restore, planned_from_products
from tests.cli.conftest import Ended, environment, words_for
from tests.domain.restore.examples import MOUS, PASSED, SEMIPASS, status_xml
from tests.sites import CALIBRATORS, MAIN, MAIN_PROJECT, RELEASED, SiteForTests

Call = Callable[..., Ended]
CYCLE_0, WITHOUT_PASS = "uid://A002/X2a5c2f/X1", "uid://A001/X1284/X266"
MEMBER = f"member.{sanitized(MAIN)}"


def one_line(ended: Ended, code: int) -> str:
    """The one line of an error."""
    assert (ended.code, ended.out) == (code, "")
    (line,) = ended.err.splitlines()
    assert line.startswith("stagecal ")
    return line


# --- restorable ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uid", [MAIN, sanitized(MAIN)])
def test_yes_in_one_line_for_either_form_of_the_uid(call: Call, uid: str) -> None:
    ended = call("stagecal", "restorable", uid)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out == f"{MAIN}  yes: calibrated by the pipeline, with 1 execution block(s) of QA0 Pass\n"


@pytest.mark.parametrize(
    ("mous", "reason"), [(CYCLE_0, "no: Cycle 0 project: "), (WITHOUT_PASS, "no: no execution block has QA0 Pass")]
)
def test_no_says_why_and_is_exit_3(call: Call, mous: str, reason: str) -> None:
    ended = call("stagecal", "restorable", mous)
    assert ended.code == 3 and ended.out.startswith(f"{mous}  {reason}")


@pytest.mark.parametrize(
    ("sql", "reason"),
    [
        ("DELETE FROM ASA_PRODUCT_FILES", "no: not calibrated: the archive has no product"),
        (
            "UPDATE ASA_PRODUCT_FILES SET NGAS_FILE_ID = 'member.x.scriptForCalibration.py' "
            "WHERE NGAS_FILE_ID LIKE '%scriptForPI.py'",
            "no: calibrated by hand (member.x.scriptForCalibration.py): ",
        ),
        ("DELETE FROM ASA_PRODUCT_FILES WHERE FILE_CLASS = 'calibration'", "no: its calibration products are not"),
        ("DELETE FROM ASA_PRODUCT_FILES WHERE FILE_CLASS = 'science'", "no: not calibrated completely"),
        ("DELETE FROM ASA_PRODUCT_FILES WHERE NGAS_FILE_ID LIKE '%manifest.xml'", "no: the archive has no pipeline"),
    ],
)
def test_each_reason_against_a_restore_is_told(call: Call, site: SiteForTests, sql: str, reason: str) -> None:
    site.archive(sql)
    ended = call("stagecal", "restorable", MAIN)
    assert ended.code == 3 and f"  {reason}" in ended.out


def test_a_mous_that_the_archive_does_not_know_is_exit_4(call: Call) -> None:
    ended = call("stagecal", "restorable", MAIN, "uid://A001/Xffff/Xffff")
    assert ended.code == 4
    assert ended.out.splitlines()[1] == "uid://A001/Xffff/Xffff  no: the archive has no such MOUS"


def test_of_several_one_that_cannot_be_restored_decides(call: Call) -> None:
    ended = call("stagecal", "restorable", MAIN, CYCLE_0, RELEASED)
    assert ended.code == 3
    assert [line.split()[:2] for line in ended.out.splitlines()] == [
        [MAIN, "yes:"], [CYCLE_0, "no:"], [RELEASED, "yes:"]
    ]  # fmt: skip


def test_for_programs_there_is_an_object_for_each(call: Call) -> None:
    ended = call("stagecal", "restorable", "--json", MAIN, CYCLE_0)
    assert ended.code == 3
    first, second = ended.json
    assert first == {
        "mous": MAIN,
        "known": True,
        "restorable": True,
        "reason": "calibrated by the pipeline, with 1 execution block(s) of QA0 Pass",
        "project": MAIN_PROJECT,
    }
    assert (second["restorable"], second["project"]) == (False, "2011.0.00010.S")


def test_since_lists_what_was_delivered_since_and_can_be_restored_the_oldest_first(call: Call) -> None:
    ended = call("stagecal", "restorable", "--since", "2018-07-01")
    assert ended.code == 0
    assert [line.split()[0] for line in ended.out.splitlines()] == [MAIN, "uid://A001/X133d/X3cf3", CALIBRATORS]
    later = call("stagecal", "restorable", "--since", "2018-07-10T11:00:47Z", "--json")
    assert [one["mous"] for one in later.json] == ["uid://A001/X133d/X3cf3", CALIBRATORS]


def test_since_leaves_out_what_cannot_be_restored(call: Call, site: SiteForTests) -> None:
    site.archive("DELETE FROM ASA_PRODUCT_FILES WHERE ASA_OUS_ID = ?", MAIN)
    ended = call("stagecal", "restorable", "--since", "2018-07-01")
    assert ended.code == 0 and MAIN not in ended.out and CALIBRATORS in ended.out


def test_nothing_since_then_is_no_error(call: Call) -> None:
    ended = call("stagecal", "restorable", "--since", "2031-01-01")
    assert (ended.code, ended.out, ended.err) == (0, "", "")
    assert call("stagecal", "restorable", "--since", "2031-01-01", "--json").json == []


@pytest.mark.parametrize("date", ["yesterday", "01.11.2026", "2026-13-01", ""])
def test_a_date_that_is_none_is_exit_2(call: Call, date: str) -> None:
    assert "is no date: write it as 2026-11-01" in one_line(call("stagecal", "restorable", "--since", date), 2)


@pytest.mark.parametrize("words", [(), (MAIN, "--since", "2026-11-01")])
def test_either_mouss_or_a_date(call: Call, words: tuple[str, ...]) -> None:
    assert "name one or more MOUSs, or a date" in one_line(call("stagecal", "restorable", *words), 2)


@pytest.mark.parametrize("command", ["restorable", "mous-of", "ppr"])
def test_a_uid_that_is_none_is_exit_2_and_an_archive_that_is_away_exit_5(
    call: Call, site: SiteForTests, command: str
) -> None:
    one_line(call("stagecal", command, "uid://A001/X12a3"), 2)
    (site.directory / "archive.db").unlink()
    one_line(call("stagecal", command, MAIN), 5)


# --- mous-of ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uid", [PASSED, sanitized(PASSED), SEMIPASS])
def test_the_mous_of_an_eb_in_either_form(call: Call, uid: str) -> None:
    ended = call("stagecal", "mous-of", uid)
    assert (ended.code, ended.out, ended.err) == (0, f"{MAIN}\n", "")


def test_an_eb_that_the_archive_does_not_know_is_exit_4(call: Call) -> None:
    line = one_line(call("stagecal", "mous-of", "uid://A002/Xffff/Xffff"), 4)
    assert "the archive has no execution block uid://A002/Xffff/Xffff" in line


def test_an_eb_of_two_mouss_is_exit_4_with_both(call: Call, site: SiteForTests) -> None:
    site.archive(
        "INSERT INTO BMMV_SCHEDBLOCK SELECT ARCHIVE_UID, ?, SB_STATUS_UID, SB_NAME FROM BMMV_SCHEDBLOCK "
        "WHERE MOUS_STATUS_UID = ?",
        RELEASED,
        MAIN,
    )
    line = one_line(call("stagecal", "mous-of", PASSED), 4)
    assert f"belongs to several MOUSs: {RELEASED}, {MAIN}" in line


# --- ppr ----------------------------------------------------------------------------------------------------------


def products_of(site: SiteForTests, directory: Path) -> Path:
    """The archived products of the main example in a directory, those that CASA makes empty."""
    shutil.copytree(site.directory / "store" / "products" / sanitized(MAIN), directory)
    for name in (
        f"{MEMBER}.session_2.caltables.tgz",
        f"{MEMBER}.hifa_calimage.auxproducts.tgz",
        f"{sanitized(PASSED)}.ms.calapply.txt",
        f"{sanitized(PASSED)}.ms.flagversions.tgz",
    ):
        (directory / name).touch()
    return directory


def without_what_varies(text: str) -> str:
    return re.sub(r"<(RelativePath|RootDirectory|CreationTime)>[^<]*<", r"<\1><", text)


def test_the_ppr_of_a_mous_is_the_one_that_the_engine_would_write_but_for_path_and_time(
    call: Call, site: SiteForTests
) -> None:
    ended = call("stagecal", "ppr", MAIN)
    assert (ended.code, ended.err) == (0, "")
    config = site.directory / "stagecal.toml"
    changed = re.sub(r'engine = "command"\n', 'engine = "pipeline"\nraw_fetch = ["true"]\n', config.read_text())
    config.write_text(changed + '[[restore.casa]]\nversion = "5.1.1-5"\nhome = "/opt/casa"\n')
    opened = wiring.site(load_config(config, environ={}))
    request = Request(
        id="0" * 16, sequence=1, origin=Origin.RESTORE, mous=MAIN, project=MAIN_PROJECT, ticket="", user="", email="",
        calfields=(), contact="", trigger_name="", trigger_text="", trigger_sha256="", received_at=site.clock.now(),
        state=State.ACCEPTED, since=site.clock.now(), execution_blocks=(PASSED,), work="WORK7",
    )  # fmt: skip
    files = opened.engines.job(request, chosen_restore(opened, request)).files
    written = files["PPR_uid___A001_X12a3_X80f.xml"].decode()
    assert "<RelativePath>WORK7</RelativePath>" in written
    assert f"<RelativePath>{sanitized(MAIN)}</RelativePath>" in ended.out
    assert f"<RootDirectory>{site.directory}/work</RootDirectory>" in ended.out
    assert without_what_varies(ended.out) == without_what_varies(written)


def test_the_session_of_the_eb_that_did_not_pass_is_kept_and_empty(call: Call) -> None:
    text = call("stagecal", "ppr", MAIN).out
    assert re.search(r"<Keyword>SESSION_1</Keyword>\s*<Value/>", text)
    assert re.search(rf"<Keyword>SESSION_2</Keyword>\s*<Value>{PASSED}</Value>", text)
    assert SEMIPASS not in text


def test_a_directory_of_products_is_enough_without_site_and_configuration(site: SiteForTests, tmp_path: Path) -> None:
    directory = products_of(site, tmp_path / "products")
    nowhere = environment(tmp_path / "no-such.toml")
    done = subprocess.run(
        words_for("stagecal", "ppr", "--products", "products", "--root", "/spool", "--path", "a/b", sanitized(MAIN)),
        env=nowhere, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    plan, _, _ = planned_from_products(directory, MOUS)
    assert ppr_faults(done.stdout, plan, relative_path="a/b") == ()
    assert "<RootDirectory>/spool</RootDirectory>" in done.stdout


def test_products_of_another_mous_are_exit_3(call: Call, site: SiteForTests, tmp_path: Path) -> None:
    directory = products_of(site, tmp_path / "products")
    line = one_line(call("stagecal", "ppr", "--products", str(directory), RELEASED), 3)
    assert RELEASED in line and MAIN in line


@pytest.mark.parametrize("missing", [f"{MEMBER}.session_2.caltables.tgz", f"{MEMBER}.calimage.pipeline_manifest.xml"])
def test_products_that_are_not_all_there_are_exit_3(
    call: Call, site: SiteForTests, tmp_path: Path, missing: str
) -> None:
    directory = products_of(site, tmp_path / "products")
    (directory / missing).unlink()
    assert one_line(call("stagecal", "ppr", "--products", str(directory), MAIN), 3)


def test_a_directory_that_is_not_there_is_exit_3_and_named(call: Call, tmp_path: Path) -> None:
    assert str(tmp_path / "none") in one_line(call("stagecal", "ppr", "--products", str(tmp_path / "none"), MAIN), 3)


def test_sources_that_disagree_are_exit_3_with_their_table(call: Call, site: SiteForTests) -> None:
    xml = status_xml([[PASSED], [SEMIPASS]])
    site.archive("UPDATE OBS_UNIT_SET_STATUS SET XML = ? WHERE STATUS_ENTITY_ID = ?", xml, MAIN)
    ended = call("stagecal", "ppr", MAIN)
    assert (ended.code, ended.out) == (3, "")
    assert any(line.split()[2:6] == ["EB", "OUSStatus", "manifest", "restore"] for line in ended.err.splitlines())


@pytest.mark.parametrize("path", ["/absolute", "../up", "a b", "a&b", "a\nb"])
def test_a_path_that_the_pipeline_would_not_find_is_exit_3(call: Call, path: str) -> None:
    ended = call("stagecal", "ppr", "--path", path, MAIN)
    assert (ended.code, ended.out) == (3, ""), ended


def test_a_mous_that_cannot_be_restored_has_no_ppr(call: Call) -> None:
    assert "Cycle 0 project" in one_line(call("stagecal", "ppr", CYCLE_0), 3)
    assert "the archive has no MOUS" in one_line(call("stagecal", "ppr", "uid://A001/Xffff/Xffff"), 3)
