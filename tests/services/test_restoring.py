"""What stops a restore before a job is made, on a whole site with its archive and its store of plain files, no CASA.

Each of these would otherwise go wrong in silence, or with a message that helps nobody. What may pass is tried again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stagecal import wiring
from stagecal.config import load_config
from stagecal.domain.identifiers import sanitized
from stagecal.domain.records import Step
from stagecal.domain.requests import Origin, Outcome, Request, State, request_id
from stagecal.domain.restore.chosen import ChosenRestore
from stagecal.measurement_set import check_measurement_set
from stagecal.ports import FatalError, TransientError
from stagecal.services.judging import step_received
from stagecal.services.restoring import chosen_restore, planned, planned_from_products
from tests.clusters import cluster_site, node_table, running
from tests.domain.restore.examples import MOUS, PASSED, SCRIPT_WITH_OTHER_CALLS, SEMIPASS, status_xml
from tests.ngas_server import ngas_server, unused_address
from tests.services.effects import Arena, Crash, Effects, end_jobs, existing, settle
from tests.sites import CALIBRATORS, CALIBRATORS_PROJECT, MAIN_PROJECT, SiteForTests, make_test_site
from tests.ssh_nodes import SshServer

MEMBER = f"member.{sanitized(MOUS)}"
MANIFEST = f"{MEMBER}.calimage.pipeline_manifest.xml"
SCRIPT = f"{MEMBER}.hifa_calimage.casa_piperestorescript.py"
PPR = "PPR_uid___A001_X12a3_X80f.xml"
CALFIELDS = ("J0440+1437", "J0510+1800")
Sites = Callable[..., SiteForTests]


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Sites]:
    """A function (engine, more configuration) that makes a site whose engine plans by the archive's products.

    Its CASA worker only knows its version: no job of these tests gets far.
    """
    sites: list[SiteForTests] = []

    def make(engine: str = "casatasks", more: str = "", *, store: str = "") -> SiteForTests:
        site = make_test_site(tmp_path)
        worker = tmp_path / "worker"
        worker.write_text("#!/bin/sh\necho 6.7.0.31\n", encoding="utf-8")
        worker.chmod(0o755)
        path = site.directory / "stagecal.toml"
        ours = f'engine = "{engine}"\nraw_fetch = ["store/fetch_raw.sh"]\ncasa_worker = "{worker}"\n'
        text = re.sub(r'engine = "command"\ncommand = .*\n', lambda _: ours, path.read_text(encoding="utf-8"))
        if store:
            text = text.replace('products_fetch = ["store/fetch_product.sh"]', store)
        path.write_text(text + more, encoding="utf-8")
        config = load_config(path, environ={})
        opened = replace(wiring.site(config), clock=site.clock)
        sites.append(SiteForTests(site.directory, config, site.clock, opened))
        return sites[-1]

    yield make
    for one in sites:
        end_jobs(one)


@pytest.fixture(autouse=True)
def _no_other_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STAGECAL_CASA_WORKER", raising=False)


def product(site: SiteForTests, name: str) -> Path:
    """The file of this name in the store of the main example."""
    return site.directory / "store" / "products" / sanitized(MOUS) / name


def add_file(site: SiteForTests, name: str, text: str = "", file_class: str = "script") -> None:
    """Let the archive have one file more."""
    product(site, name).write_text(text, encoding="utf-8")
    site.archive("INSERT INTO ASA_PRODUCT_FILES VALUES (?, ?, ?)", MOUS, name, file_class)


def add_ppr(site: SiteForTests, *values: str) -> None:
    """Let the archive have the PPR of the calibration, with these values of SESSION_1, SESSION_2 and so on."""
    intents = "".join(
        f"<Intents><Keyword>SESSION_{number}</Keyword><Value>{value}</Value></Intents>"
        for number, value in enumerate(values, start=1)
    )
    add_file(site, PPR, f"<SciPipeRequest>{intents}</SciPipeRequest>")


def set_xml(site: SiteForTests, sessions: list[list[str]]) -> None:
    site.archive("UPDATE OBS_UNIT_SET_STATUS SET XML = ? WHERE STATUS_ENTITY_ID = ?", status_xml(sessions), MOUS)


def restore(site: SiteForTests, **changes: Any) -> Request:
    """Put a restore into the ledger, as `stagecal restore` does."""
    values: dict[str, Any] = {
        "id": request_id("restore", site.site.new_secret()),
        "sequence": 0,
        "origin": Origin.RESTORE,
        "mous": MOUS,
        "project": MAIN_PROJECT,
        "email": "me@example.org",
        "calfields": (),
        "received_at": site.clock.now(),
        "state": State.RECEIVED,
        "since": site.clock.now(),
        **dict.fromkeys(("ticket", "user", "contact", "trigger_name", "trigger_text", "trigger_sha256"), ""),
        **changes,
    }
    added = site.site.ledger.add(Request(**values), Step("receive", decided="RECEIVED"))
    assert added is not None
    return added


def judged(site: SiteForTests, **changes: Any) -> Request:
    """Return a restore that was judged, with its EBs frozen."""
    return replace(step_received(site.site, restore(site), site.clock.now()), **changes)


def choice(site: SiteForTests, **changes: Any) -> ChosenRestore:
    found = chosen_restore(site.site, judged(site, **changes))
    assert found is not None
    return found


def stopped(site: SiteForTests, reason: str) -> str:
    """Let a restore run into its stop; return the mail that says why, to the maintainer and to who asked."""
    restore(site)
    settle(site)
    request = site.only()
    assert request.state is State.HELD and re.search(reason, request.reason), request.reason
    assert not request.holds_slot and site.job_directories() == [], "nothing was started"
    (mail,) = site.mails()
    assert "X-Envelope-To: maintainer@example.org, me@example.org\n" in mail
    told = [step.step.seen for step in site.site.ledger.steps(request.id)]
    assert any(re.search(reason, seen) for seen in told), told
    return mail


# --- sessions -----------------------------------------------------------------------------------------------------


def test_sessions_that_disagree_stop_with_a_table_of_who_says_what(made: Sites) -> None:
    site = made()
    set_xml(site, [[PASSED], [SEMIPASS]])
    mail = stopped(site, f"{PASSED} is in session_2 in the manifest, in session_1 in OUSStatus")
    rows = [line.split() for line in site.only().reason.splitlines()[1:]]
    assert rows == [
        ["EB", "OUSStatus", "manifest", "restore", "script", "QA0"],
        [SEMIPASS, "session_2", "-", "-", "SemiPass"],
        [PASSED, "session_1", "session_2", "session_2", "Pass"],
    ]
    assert all(line in mail for line in site.only().reason.splitlines()[1:]), "the mail has the table"


def test_the_archived_ppr_has_a_say_about_sessions(made: Sites) -> None:
    site = made()
    add_ppr(site, PASSED, SEMIPASS)
    stopped(site, f"{PASSED} is in session_2 in the manifest, in session_1 in archived PPR")


def test_an_archived_ppr_that_agrees_changes_nothing(made: Sites) -> None:
    site = made()
    add_ppr(site, SEMIPASS, PASSED)
    plan = choice(site).plan
    assert [session.execution_blocks for session in plan.layout.sessions] == [(), (PASSED,)]


def test_an_eb_that_passed_and_is_not_in_the_manifest_stops(made: Sites) -> None:
    site = made()
    site.archive("UPDATE AQUA_EXECBLOCK SET QA0STATUS = 'Pass' WHERE EXECBLOCKUID = ?", SEMIPASS)
    stopped(site, f"{SEMIPASS} has QA0 Pass, but the manifest does not list it")


def test_an_eb_of_the_manifest_that_did_not_pass_stops(made: Sites) -> None:
    site = made()
    site.archive("UPDATE AQUA_EXECBLOCK SET QA0STATUS = 'Pass' WHERE EXECBLOCKUID = ?", SEMIPASS)
    site.archive("UPDATE AQUA_EXECBLOCK SET QA0STATUS = 'SemiPass' WHERE EXECBLOCKUID = ?", PASSED)
    stopped(site, f"the manifest lists {PASSED}, but its QA0 is SemiPass")


def test_ebs_that_were_judged_and_are_not_those_of_the_manifest_stop(made: Sites) -> None:
    site = made()
    request = judged(site, execution_blocks=(PASSED, SEMIPASS))
    with pytest.raises(FatalError, match=f"the request expects {SEMIPASS}, {PASSED}, the manifest has {PASSED}: "):
        chosen_restore(site.site, request)


# --- what the archive has -----------------------------------------------------------------------------------------


def test_ebs_of_two_scheduling_blocks_stop_for_a_person(made: Sites) -> None:
    site = made()
    second = "uid://A001/X12a3/X900"
    site.archive("INSERT INTO BMMV_SCHEDBLOCK VALUES (?, ?, 'uid://A001/X12a3/X901', 'second')", second, MOUS)
    site.archive("INSERT INTO AQUA_EXECBLOCK VALUES (?, ?, ?, 'Pass', '', '', '')", PASSED, second, MAIN_PROJECT)
    stopped(site, "belong to 2 scheduling blocks, a person decides")


def test_a_scheduling_block_without_the_ebs_is_passed_over(made: Sites) -> None:
    site = made()
    site.archive(
        "INSERT INTO BMMV_SCHEDBLOCK VALUES ('uid://A001/X12a3/X900', ?, 'uid://A001/X12a3/X901', 'unused')", MOUS
    )
    assert choice(site).plan.sched_block.uid == "uid://A001/X12a3/X804"


def test_without_a_manifest_there_is_no_restore(made: Sites) -> None:
    site = made()
    site.archive("DELETE FROM ASA_PRODUCT_FILES WHERE NGAS_FILE_ID = ?", MANIFEST)
    stopped(site, f"{MOUS} cannot be restored: the archive has no pipeline manifest")


def test_of_two_manifests_none_is_taken(made: Sites) -> None:
    site = made()
    add_file(site, f"{MEMBER}.hifa_cal.pipeline_manifest.xml", product(site, MANIFEST).read_text(encoding="utf-8"))
    stopped(site, "several files that could be the pipeline manifest, a person has to choose")


def test_a_manifest_of_another_mous_stops(made: Sites) -> None:
    site = made()
    path = product(site, MANIFEST)
    text = path.read_text(encoding="utf-8").replace(f'<ous name="{sanitized(MOUS)}"', '<ous name="uid___A001_X1_X1"')
    path.write_text(text, encoding="utf-8")
    stopped(site, "the manifest is of uid://A001/X1/X1, not of")


def test_a_file_that_the_manifest_names_and_the_archive_lacks_is_named(made: Sites) -> None:
    site = made()
    name = f"{sanitized(PASSED)}.ms.flagversions.tgz"
    site.archive("DELETE FROM ASA_PRODUCT_FILES WHERE NGAS_FILE_ID = ?", name)
    stopped(site, f"the archive does not have what the manifest names: {name} \\(finalflags of {PASSED}\\)")


def test_what_was_calibrated_by_hand_is_not_restored(made: Sites) -> None:
    site = made()
    add_file(site, f"{MEMBER}.scriptForCalibration.py")
    stopped(site, "calibrated by hand .*: run the scriptForPI")


def test_a_control_file_that_is_no_text_stops(made: Sites) -> None:
    site = made()
    product(site, MANIFEST).write_bytes(b"\x1f\x8b\x08\x00\xff\xfe")
    stopped(site, f"{MANIFEST} is no text in UTF-8 \\(byte 1\\)")


@pytest.mark.parametrize("size", [20 * 1024**2, 100 * 1024**2])
def test_a_control_file_of_many_megabytes_stops(made: Sites, size: int) -> None:
    site = made()
    with product(site, SCRIPT).open("r+b") as stream:
        stream.truncate(size)
    stopped(site, f"{SCRIPT} .*{size}.* bytes")


def test_what_the_archive_lists_and_its_store_does_not_have_stops(made: Sites, tmp_path: Path) -> None:
    with ngas_server(tmp_path / "site" / "store" / "products" / sanitized(MOUS)) as ngas:
        site = made(store=f'ngas = "{ngas.address}"')
        product(site, f"{MEMBER}.hifa_calimage.casa_pipescript.py").unlink()
        stopped(site, "archived products cannot be fetched: .*casa_pipescript.py")


# --- what may pass ------------------------------------------------------------------------------------------------


def test_an_archive_that_is_down_while_a_restore_is_planned_is_asked_again(made: Sites) -> None:
    site = made()
    site.site.ledger.set_setting("held", "1")
    restore(site)
    rounds = site.rounds()
    rounds.run()
    assert site.only().state is State.ACCEPTED
    archive = site.directory / "archive.db"
    archive.rename(site.directory / "away.db")
    site.site.ledger.set_setting("held", "")
    rounds.run()
    request = site.only()
    assert request.state is State.ACCEPTED and request.not_before is not None and "archive" in request.reason
    assert site.mails() == []
    (site.directory / "away.db").rename(archive)
    site.clock.time = request.not_before
    site.run(lambda: site.only().state is State.STAGING)


def test_a_store_that_is_down_is_asked_again(made: Sites) -> None:
    site = made(store=f'ngas = "{unused_address()}"')
    restore(site)
    site.rounds().run()
    request = site.only()
    assert request.state is State.ACCEPTED and request.not_before is not None
    assert request.reason.startswith("archived products cannot be fetched: ")
    assert site.mails() == [] and not request.holds_slot


def test_nobody_knows_where_products_are(made: Sites) -> None:
    with pytest.raises(FatalError, match=r"set \[restore\] ngas, or products_fetch"):
        choice(made(store="# there is none"))


# --- engines ------------------------------------------------------------------------------------------------------

CASA = '\n[[restore.casa]]\nversion = "{version}"\nhome = "/opt/casa-{version}"\nlabel = "el7"\n'


def with_fixsyscaltimes(site: SiteForTests) -> SiteForTests:
    product(site, SCRIPT).write_text(SCRIPT_WITH_OTHER_CALLS, encoding="utf-8")
    return site


@pytest.mark.parametrize("engine", ["casatasks", "auto"])
def test_a_restore_script_that_does_more_needs_the_engine_script(made: Sites, engine: str) -> None:
    site = with_fixsyscaltimes(made(engine))
    stopped(
        site, "the archive's restore script also calls hifa_importdata, fixsyscaltimes, which only the engine script"
    )


def test_auto_takes_the_engine_script_where_it_is_configured(made: Sites) -> None:
    found = choice(with_fixsyscaltimes(made("auto", CASA.format(version="5.1.1-5"))))
    assert found.engine.engine == "script" and "fixsyscaltimes" in found.engine.reason
    assert found.casa is not None and found.casa.home == "/opt/casa-5.1.1-5"


def test_auto_takes_casatasks_where_no_casa_is_configured_and_says_why(made: Sites) -> None:
    found = choice(made("auto"))
    assert found.engine.engine == "casatasks" and found.casa is None
    assert "not pipeline: it is not configured here" in found.engine.reason
    assert "calibrated by CASA 5.1.1-5" in found.engine.reason


@pytest.mark.parametrize("engine", ["pipeline", "script", "auto"])
def test_a_casa_that_is_known_to_be_wrong_is_never_used(made: Sites, engine: str) -> None:
    site = made(engine, CASA.format(version="6.1.1-10"))
    if engine == "auto":
        found = choice(site)
        assert found.engine.engine == "casatasks" and "into session_1 without a word" in found.engine.reason
    else:
        stopped(site, "CASA 6.1.1-10 .* puts EBs whose UIDs end in a or e into session_1 without a word")


def test_a_pipeline_that_is_known_to_be_wrong_is_never_used(made: Sites) -> None:
    site = made("pipeline", CASA.format(version="6.1.1-15-pipeline-2020.1.0.36"))
    stopped(site, "pipeline 2020.1.0.36 puts EBs")


def test_a_casa_older_than_the_calibration_is_not_used(made: Sites) -> None:
    stopped(made("pipeline", CASA.format(version="4.7.2")), "CASA 4.7.2 does not restore what CASA 5.1.1-5 calibrated")


@pytest.mark.parametrize("engine", ["pipeline", "script", "command"])
def test_an_engine_that_is_asked_for_and_not_there_stops(made: Sites, engine: str) -> None:
    site = made()
    restore(site, engine=engine)
    settle(site)
    request = site.only()
    said = (
        "command None is not there" if engine == "command" else f"the engine {engine} is not configured here: there are"
    )
    assert request.state is State.HELD and said in request.reason
    assert site.job_directories() == []


def test_an_engine_that_is_asked_for_and_would_leave_something_out_stops(made: Sites) -> None:
    site = with_fixsyscaltimes(made("auto", CASA.format(version="5.1.1-5")))
    with pytest.raises(FatalError, match=r"the engine casatasks cannot restore this MOUS: .*fixsyscaltimes"):
        choice(site, engine="casatasks")


@pytest.mark.parametrize("engine", ["casatasks", "auto"])
def test_casatasks_older_than_the_calibration_are_not_used(made: Sites, engine: str) -> None:
    site = made(engine)
    path = product(site, MANIFEST)
    text = path.read_text(encoding="utf-8")
    assert '<casaversion name="5.1.1-5"/>' in text
    path.write_text(text.replace("5.1.1-5", "6.7.0-32"), encoding="utf-8")
    stopped(site, "casatasks 6.7.0.31 are older than CASA 6.7.0-32, which calibrated it")


def test_casatasks_that_do_not_say_their_version_are_not_held_to_it(made: Sites, tmp_path: Path) -> None:
    site = made()
    (tmp_path / "worker").write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    assert site.site.engines.available() == {"casatasks": ""}


# --- a CASA that is asked for -------------------------------------------------------------------------------------


def test_who_names_a_casa_gets_it_although_the_site_uses_casatasks(made: Sites) -> None:
    found = choice(made(), casa_home="/home/casa/casa-release-5.4.0-68")
    assert found.engine.engine == "pipeline" and found.casa is not None
    assert (found.casa.home, found.casa.version, found.casa.label) == (
        "/home/casa/casa-release-5.4.0-68", "casa-release-5.4.0-68", ""
    )  # fmt: skip


def test_a_casa_that_the_site_knows_brings_its_label(made: Sites) -> None:
    found = choice(made(more=CASA.format(version="5.1.1-5")), casa_home="/opt/casa-5.1.1-5")
    assert found.casa is not None and (found.casa.version, found.casa.label) == ("5.1.1-5", "el7")


def test_a_casa_without_a_version_in_its_name_is_taken_as_it_is(made: Sites) -> None:
    found = choice(made(), casa_home="/opt/casa/current")
    assert found.casa is not None and found.casa.version == ""


@pytest.mark.parametrize(
    ("home", "reason"),
    [
        ("/opt/casa-6.1.1-10-pipeline-2020.1.0.36", "into session_1 without a word"),
        ("/opt/casa-release-4.7.2-el6", "is older than CASA 5.1.1-5, which calibrated"),
    ],
)
def test_a_casa_that_is_asked_for_and_must_not_restore_this_stops(made: Sites, home: str, reason: str) -> None:
    with pytest.raises(FatalError, match=reason):
        choice(made(), casa_home=home)


def test_casatasks_is_no_way_out_for_who_names_a_casa(made: Sites) -> None:
    with pytest.raises(FatalError, match="the engine casatasks is not configured here"):
        choice(made(), casa_home="/opt/casa/current", engine="casatasks")


# --- what a plan is made from, and what becomes of it --------------------------------------------------------------


def test_the_products_alone_give_the_plan_of_the_archive_but_for_what_only_its_database_knows(made: Sites) -> None:
    site = made()
    whole, name, script = planned(site.site.archive, site.site.products, MOUS)
    for file in whole.files:
        product(site, file.name).touch()
    alone, same_name, same_script = planned_from_products(product(site, MANIFEST).parent, MOUS)
    assert (name, script) == (same_name, same_script)
    assert alone.sched_block.status_uid == whole.sched_block.status_uid
    assert replace(alone, sched_block=whole.sched_block, files=whole.files, layout=whole.layout) == whole
    assert [one.execution_blocks for one in alone.layout.sessions if one.execution_blocks] == [(PASSED,)]


def test_a_calibrator_request_goes_through_the_planner_and_its_names_reach_the_job_as_they_are(made: Sites) -> None:
    site = made()
    site.place(CALIBRATORS, CALIBRATORS_PROJECT, calfields=CALFIELDS, email="franco@gmail.com")
    site.run(lambda: site.only().state is State.STAGING)
    (directory,) = site.job_directories()
    job = json.loads((directory / "job.json").read_text(encoding="utf-8"))
    assert job["calfields"] == list(CALFIELDS) and job["engine"] == "casatasks"
    assert list(job["calibration"]) == ["uid://A002/Xf531c1/X2b4d"]
    assert job["calibration"]["uid://A002/Xf531c1/X2b4d"]["session"] == "session_1"


def test_a_restore_is_refused_by_the_archive_as_a_staging_is_and_who_asked_is_told(made: Sites) -> None:
    site = made()
    site.set_state(MOUS, "QA3InProgress")
    restore(site)
    settle(site)
    assert site.only().outcome is Outcome.REFUSED
    (mail,) = site.mails()
    assert "To: me@example.org\n" in mail and "MOUS IN QA3" in mail and "stagecal restore" in mail


def test_a_full_staging_disk_keeps_no_restore_waiting(made: Sites) -> None:
    site = made()
    staging = replace(site.config.staging, reserve_gb=1_000_000)
    full = SiteForTests(
        site.directory,
        replace(site.config, staging=staging),
        site.clock,
        replace(site.site, config=replace(site.config, staging=staging)),
    )
    restore(full)
    full.run(lambda: full.only().state is State.STAGING)


def test_trouble_is_told_by_its_kind(made: Sites) -> None:
    site = made()
    (site.directory / "archive.db").unlink()
    with pytest.raises(TransientError):
        planned(site.site.archive, site.site.products, MOUS)


# --- what a job left ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steered", "reason"),
    [
        ({"without": PASSED}, f"the job left no {sanitized(PASSED)}.ms.split.cal"),
        ({"report": '{"not_calibrators": [{"field": "HL_Tau", "reason": "a target"}]}'}, "HL_Tau: a target"),
        ({"report": "[]"}, "report.json is no object"),
    ],
)
def test_a_job_that_ended_well_and_left_something_out_has_failed(
    tmp_path: Path, steered: dict[str, str], reason: str
) -> None:
    site = make_test_site(tmp_path)
    site.behave(**steered)
    restore(site)
    settle(site)
    request = site.only()
    assert request.state is State.HELD and reason in request.reason and not request.holds_slot
    assert len(site.job_directories()) == 1, "everything stays where it is for who looks"


def test_only_the_sites_own_command_may_leave_no_report(made: Sites) -> None:
    site = made()
    # The worker of these tests says its version and ends well, whatever it is told to do.
    (site.directory / "store" / "fetch_raw.sh").write_text("#!/bin/sh\n", encoding="utf-8")
    restore(site)
    settle(site)
    request = site.only()
    assert request.state is State.HELD and "the engine casatasks left no report.json" in request.reason


REPORT = {
    "engine": "casatasks",
    "engine_reason": "not pipeline: it is not configured here (calibrated by CASA 5.1.1-5)",
    "calibrated_by": {"casa": "5.1.1-5", "pipeline": "40896"},
    "restored_by": {"casa": "6.7.0.31", "home": "/opt/casa"},
    "commands": ["applycal(vis='uid___A002_Xcf92df_X3453.ms')", "mstransform(vis='/home/me/a.ms')"],
    "execution_blocks": {PASSED: {"session": "session_2", "ms": f"{sanitized(PASSED)}.ms.split.cal"}},
    "started": "2026-11-21T09:00:00Z",
    "ended": "2026-11-21T09:10:00Z",
}


def test_a_restore_leaves_a_receipt_beside_its_products_that_names_nobody_and_no_place(tmp_path: Path) -> None:
    site = make_test_site(tmp_path)
    site.behave(report=json.dumps(REPORT))
    restore(site, contact="A Contact")
    settle(site)
    (directory,) = site.job_directories()
    text = (directory / "receipt.json").read_text(encoding="utf-8")
    assert not any(said in text for said in ("me@example.org", "A Contact", str(tmp_path), "/opt", "/home"))
    receipt = json.loads(text)
    assert receipt["made_by"] == {
        "engine": "casatasks",
        "engine_reason": REPORT["engine_reason"],
        "calibrated_by": {"casa": "5.1.1-5", "pipeline": "40896"},
        "restored_by": {"casa": "6.7.0.31"},
        "commands": ["applycal(vis='uid___A002_Xcf92df_X3453.ms')"],
        "sessions": {PASSED: "session_2"},
        "started": "2026-11-21T09:00:00Z",
        "ended": "2026-11-21T09:10:00Z",
    }
    name = f"{sanitized(PASSED)}.ms.split.cal"
    found = sum(path.stat().st_size for path in (directory / "products" / name).rglob("*") if path.is_file())
    assert receipt["files"] == [{"name": name, "execution_block": PASSED, "size": found}]
    assert (receipt["mous"], receipt["execution_blocks"]) == (MOUS, [PASSED])
    assert (receipt["request"], receipt["schema"]) == (site.only().id, 1)


def test_a_restore_and_a_staging_of_the_same_mous_know_nothing_of_each_other(tmp_path: Path) -> None:
    site = make_test_site(tmp_path)
    site.place()
    restore(site)
    restore(site, email="you@example.org")
    settle(site)
    assert [one.outcome for one in site.requests()] == [Outcome.DELIVERED] * 3
    assert site.calibrations() == 3 and len(site.published()) == 1
    assert len(site.job_directories()) == 2, "those of the restores stay"


def test_from_a_node_that_shares_nothing_with_us_the_products_come_here_and_the_mail_says_where(tmp_path: Path) -> None:
    server = SshServer(tmp_path / "node", "far")
    shared_nothing = ("shared_work_area = false", 'fetch_area = "fetched"')
    with running([server]):
        site = cluster_site(tmp_path, [server], [node_table(server)], *shared_nothing)
        restore(site)
        settle(site)
        request = site.only()
        assert request.outcome is Outcome.DELIVERED, request.reason
        here = site.directory / "fetched" / request.work / "products" / f"{sanitized(PASSED)}.ms.split.cal"
        report = check_measurement_set(here)
        assert report.healthy and report.sealed
        (mail,) = site.mails()
        assert f"\n{here}\n" in mail


# --- whoever dies is started again --------------------------------------------------------------------------------


def what_is_left(site: SiteForTests) -> dict[str, object]:
    """What must be the same at the end, however often the process died on the way."""
    (directory,) = site.job_directories()
    request = site.only()
    return {
        "end": (request.state, request.outcome, request.holds_slot, f"{directory.name}" == request.work),
        "products": sorted(path.name for path in (directory / "products").iterdir()),
        "calibrations": site.calibrations(),
        "mails": len(set(site.mails())),
        "published": site.published(),
    }


def test_a_restore_ends_the_same_whenever_the_service_dies_and_is_started_again(tmp_path: Path) -> None:
    arena = Arena(tmp_path)
    effects = Effects()
    site = arena.fresh()
    restore(site)
    settle(replace_ports(site, effects))
    undisturbed = what_is_left(site)
    assert undisturbed["products"] == [f"{sanitized(PASSED)}.ms.split.cal"] and undisturbed["mails"] == 1
    assert len(effects.names) > 10
    for number in range(1, len(effects.names) + 1):
        site = arena.fresh()
        restore(site)
        # The job's pace decides how often it is looked at: towards the end there may be fewer effects.
        with suppress(Crash):
            settle(replace_ports(site, Effects(crash_at=number)))
        again = existing(site.directory)
        settle(again)
        assert what_is_left(again) == undisturbed, f"after effect {number}, {effects.names[number - 1]}"


def replace_ports(site: SiteForTests, effects: Effects) -> SiteForTests:
    return SiteForTests(site.directory, site.config, site.clock, effects.wrap(site.site))
