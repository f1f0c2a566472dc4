"""The adapter of the engines without any CASA: what a job directory holds, and what stops before there is one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from stagecal.adapters.engines import SiteEngines
from stagecal.adapters.templates import JinjaTemplates
from stagecal.config import CasaConfig, Locks, Restore
from stagecal.domain.casa_versions import CasaChoice
from stagecal.domain.requests import Origin, Request, State
from stagecal.domain.restore.chosen import ChosenRestore
from stagecal.domain.restore.engines import EngineChoice
from stagecal.domain.restore.manifest import read_manifest
from stagecal.domain.restore.plan import RestorePlan, plan_restore
from stagecal.domain.restore.restore_script import read_restore_script
from stagecal.domain.restore.sessions import sessions_of
from stagecal.ports import EngineJob, FatalError
from tests.domain.restore.examples import MOUS, PASSED, SCRIPT, SEMIPASS, facts_of, manifest_xml, status_xml

TEMPLATES = Path(__file__).parents[1] / "templates"
NOW = datetime(2026, 11, 21, 9, 0, 5, 250_000, tzinfo=UTC)
MEMBER = "member.uid___A001_X12a3_X80e"
PPR = "PPR_uid___A001_X12a3_X80f.xml"
COMMON = {"run.sh", "job.json", "metadata.json", "fetch.json", "fetch_products.py", "calibrate.py", "casasiteconfig.py"}
CASA = CasaChoice("5.1.1-5", "/opt/casa-5.1.1", "el7")

Site = Callable[..., SiteEngines]


def plan(prefix: str = "", sessions: Mapping[int, list[str]] | None = None) -> RestorePlan:
    """Return the plan of the example MOUS, whose manifest names its files with or without `member.`."""
    found = sessions or {2: [PASSED]}
    return plan_restore(
        facts_of(found, {SEMIPASS: "SemiPass"}),
        read_manifest(manifest_xml(found, prefix=prefix)),
        read_restore_script(SCRIPT),
        status=sessions_of(status_xml([[SEMIPASS], [PASSED]]), mous=MOUS),
    )


def chosen(engine: str, *, the_plan: RestorePlan | None = None, casa: CasaChoice | None = CASA) -> ChosenRestore:
    name = f"{MEMBER}.hifa_calimage.casa_piperestorescript.py"
    choice = EngineChoice(engine, "for a reason")
    used = None if engine == "casatasks" else casa
    return ChosenRestore(the_plan or plan(), name, read_restore_script(SCRIPT), choice, used)


def request(*calfields: str) -> Request:
    return Request(
        id="00c0ffee", sequence=1, origin=Origin.TRIGGER, mous=MOUS, project="2017.1.01347.S", ticket="1", user="",
        email="", calfields=calfields, contact="", trigger_name="", trigger_text="", trigger_sha256="",
        received_at=NOW, state=State.ACCEPTED, since=NOW, execution_blocks=(PASSED,), work="WORK7",
    )  # fmt: skip


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A function that makes the engines of a site, with other settings and other templates before ours."""

    def make(**settings: Any) -> SiteEngines:
        values: dict[str, Any] = {
            "raw_fetch": ("/usr/bin/fetch it",), "ngas": "ngas:7777", "casa_worker": Path(sys.executable), **settings
        }  # fmt: skip
        (tmp_path / "templates").mkdir(exist_ok=True)
        templates = JinjaTemplates(tmp_path / "templates", TEMPLATES)
        return SiteEngines(Restore(**values), Locks(), templates, TEMPLATES, tmp_path / "work")

    return make


@pytest.fixture(autouse=True)
def no_other_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STAGECAL_CASA_WORKER", raising=False)


def text(job: EngineJob, name: str) -> str:
    return job.files[name].decode()


def loaded(job: EngineJob, name: str) -> Any:
    return json.loads(job.files[name])


# --- what a job directory holds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "more"),
    [("pipeline", {"finish_restore.py", PPR}), ("script", {"finish_restore.py"}), ("casatasks", set())],
)
def test_a_job_directory_holds_what_its_engine_needs_and_nothing_else(site: Site, engine: str, more: set[str]) -> None:
    job = site().job(request(), chosen(engine))
    assert set(job.files) == COMMON | more
    assert (job.engine, job.reason) == (engine, "for a reason")
    assert loaded(job, "job.json")["engine"] == loaded(job, "metadata.json")["engine"] == engine
    checked = subprocess.run(["sh", "-n"], input=job.files["run.sh"], capture_output=True, timeout=30, check=False)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize(
    ("casa", "label", "is_old"),
    [
        (CASA, "el7", False),
        (CasaChoice("4.7.2", "/opt/casa-4.7.2", "el6"), "el6", True),
        (CasaChoice("6.5.4-9", "/opt/casa-6.5.4", ""), "", False),
    ],
)
@pytest.mark.parametrize("engine", ["pipeline", "script"])
def test_the_node_is_one_that_can_run_the_casa(
    site: Site, engine: str, casa: CasaChoice, label: str, is_old: bool
) -> None:
    job = site().job(request(), chosen(engine, casa=casa))
    assert (job.label, job.is_old) == (label, is_old)
    assert f"casa_home={casa.home}\n" in text(job, "run.sh")
    assert loaded(job, "metadata.json")["restored_by"] == {"casa": casa.version, "home": casa.home}


def test_the_modular_casa_runs_on_any_node(site: Site) -> None:
    job = site().job(request(), chosen("casatasks"))
    assert (job.label, job.is_old) == ("", False)
    assert "casa_home" not in text(job, "run.sh")


def test_the_ppr_is_read_in_the_directory_of_the_job(site: Site) -> None:
    job = site().job(request(), chosen("pipeline"))
    root = ElementTree.fromstring(job.files[PPR])
    assert root.findtext(".//{*}RelativePath") == "WORK7"
    assert f'casa --pipeline -c "$runpipeline" {PPR} ' in text(job, "run.sh")


def test_the_production_layout_is_that_of_the_observatories(site: Site) -> None:
    job = site(layout="production").job(request(), chosen("pipeline"))
    area = (
        "2017.1.01347.S_2026_11_21T09_00_05.250/SOUS_uid___A001_X12a3_X80c/GOUS_uid___A001_X12a3_X80d/"
        "MOUS_uid___A001_X12a3_X80e"
    )
    assert ElementTree.fromstring(job.files[PPR]).findtext(".//{*}RelativePath") == f"WORK7/{area}"
    assert loaded(job, "job.json")["area"] == area
    assert loaded(job, "metadata.json")["directories"] == {
        name: f"{area}/{name}" for name in ("rawdata", "products", "working")
    }


@pytest.mark.parametrize("unknown", ["sous_uid", "gous_uid"])
def test_the_production_layout_needs_sous_and_gous(site: Site, unknown: str) -> None:
    without: Any = {unknown: ""}
    incomplete = chosen("pipeline", the_plan=replace(plan(), **without))
    with pytest.raises(FatalError, match=r"does not tell SOUS and GOUS of .*layout = 'flat'"):
        site(layout="production").job(request(), incomplete)
    assert site(layout="flat").job(request(), incomplete).files


@pytest.mark.parametrize(("xvfb", "times"), [(True, 1), (False, 0)])
@pytest.mark.parametrize("engine", ["pipeline", "script"])
def test_a_display_is_made_where_it_is_configured(site: Site, engine: str, xvfb: bool, times: int) -> None:
    assert text(site(xvfb=xvfb).job(request(), chosen(engine)), "run.sh").count("xvfb-run -a ") == times


def test_words_of_the_configuration_never_become_shell_text(site: Site, tmp_path: Path) -> None:
    hostile = f"/opt/$(touch {tmp_path}/pwned)'`touch {tmp_path}/pwned`\""
    for engine in ("pipeline", "script"):
        job = site(raw_fetch=(hostile,), raw_size=(hostile,)).job(
            request(), chosen(engine, casa=CasaChoice("5.1.1", hostile, ""))
        )
        place = tmp_path / engine
        place.mkdir()
        (place / "run.sh").write_bytes(job.files["run.sh"])
        done = subprocess.run(["sh", place / "run.sh"], capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 1
        assert f"there is no {hostile}/bin/casa on this node" in done.stderr
    assert not (tmp_path / "pwned").exists()


def test_what_a_calibration_is_made_from_is_told_by_the_names_of_the_manifest(site: Site) -> None:
    job = loaded(site().job(request("J0510+1800"), chosen("script")), "job.json")
    assert job["calibration"] == {
        PASSED: {
            "session": "session_2",
            "caltables": "uid___A001_X12a3_X80e.session_2.caltables.tgz",
            "finalflags": "uid___A002_Xcf92df_X3453.ms.flagversions.tgz",
            "applycmds": "uid___A002_Xcf92df_X3453.ms.calapply.txt",
        }
    }
    assert job["calfields"] == ["J0510+1800"]
    assert job["execution_blocks"] == [PASSED]


# --- what is fetched --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prefix", "name"), [("", "uid___A001_X12a3_X80e"), ("member.", MEMBER)])
def test_files_get_the_names_of_the_manifest_whatever_the_archive_calls_them(
    site: Site, prefix: str, name: str
) -> None:
    job = site().job(request(), chosen("pipeline", the_plan=plan(prefix)))
    names = {file["file_id"]: file["name"] for file in loaded(job, "fetch.json")["files"]}
    assert names[f"{MEMBER}.session_2.caltables.tgz"] == f"{name}.session_2.caltables.tgz"
    assert loaded(job, "fetch.json")["expand"][0]["archive"] == f"products/{name}.hifa_calimage.auxproducts.tgz"
    # The restore script is run under the name that it has on disk.
    assert f"{MEMBER}.hifa_calimage.casa_piperestorescript.py" in text(
        site().job(request(), chosen("script", the_plan=plan(prefix))), "run.sh"
    )


def test_the_fetch_plan_is_one_that_the_fetching_program_reads(site: Site, tmp_path: Path) -> None:
    job = site().job(request(), chosen("pipeline"))
    for name in ("fetch.json", "fetch_products.py"):
        (tmp_path / name).write_bytes(job.files[name])
    look = (
        "import fetch_products as f; p = f.read_plan('fetch.json'); "
        "print(len(p.files), p.servers, p.command, p.expansions, p.copies, p.one_manifest_in)"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", look], cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr
    manifest = f"{MEMBER}.calimage.pipeline_manifest.xml"
    assert done.stdout.startswith(f"{len(plan().files)} [")
    assert f"('products/{manifest}', 'rawdata/{manifest}')" in done.stdout
    assert done.stdout.endswith("rawdata\n")


@pytest.mark.parametrize(
    ("name", "is_expanded"),
    [
        ("flux.csv", True),
        ("antennapos.csv", True),
        ("uid___A002_X1_X2.antennapos.json", True),
        ("cont.dat", True),
        ("jyperk.csv", True),
        ("uid___A002_X1_X2.flagtemplate.txt", True),
        ("uid___A002_X1_X2.flagtsystemplate.txt", True),
        ("uid___A002_X1_X2.flagtargetstemplate.txt", True),
        ("uid___A001_X1_X2.s36_0.selfcal.json", True),
        ("sc_workdir_HL_Tau_B6", True),
        ("pipeline_stats_uid___A001_X1_X2.json", True),
        (f"{MEMBER}.hifa_calimage.pipeline_manifest.xml", False),
        ("uid___A002_X1_X2.ms.calapply.txt", False),
        (f"{MEMBER}.session_1.caltables.tgz", False),
        ("casa_piperestorescript.py", False),
    ],
)
def test_of_the_auxiliary_products_only_known_kinds_are_expanded(site: Site, name: str, is_expanded: bool) -> None:
    (expansion,) = loaded(site().job(request(), chosen("casatasks")), "fetch.json")["expand"]
    assert any(fnmatchcase(name, pattern) for pattern in expansion["allowed"]) is is_expanded


def test_a_report_can_say_who_calibrated_and_why_this_engine_restores(site: Site) -> None:
    job = loaded(site().job(request(), chosen("casatasks")), "job.json")
    assert job["engine_reason"] == "for a reason"
    assert job["calibrated_by"] == {"casa": plan().casa_version, "pipeline": plan().pipeline_version}


def test_the_casatasks_that_are_there_tell_their_version(site: Site, tmp_path: Path) -> None:
    there = site(casa=(OLD,), casa_worker=worker(tmp_path, "6.7.0.31")).available()
    assert there == {"pipeline": "", "script": "", "casatasks": "6.7.0.31"}


def test_images_and_other_manifests_are_not_fetched(site: Site) -> None:
    fetched = loaded(site().job(request(), chosen("pipeline")), "fetch.json")["files"]
    assert {file["into"] for file in fetched} == {"products"}
    assert [file["file_id"] for file in fetched if file["file_id"].endswith("manifest.xml")] == [
        f"{MEMBER}.calimage.pipeline_manifest.xml"
    ]
    assert not [file for file in fetched if file["file_id"].endswith(".fits")]


def test_products_come_from_ngas_or_by_the_sites_program(site: Site) -> None:
    both = loaded(site(products_fetch=("/bin/get",)).job(request(), chosen("script")), "fetch.json")
    assert (both["ngas"], both["fetch_command"]) == ("ngas:7777", None)
    program = loaded(site(ngas=None, products_fetch=("/bin/get", "-x")).job(request(), chosen("script")), "fetch.json")
    assert (program["ngas"], program["fetch_command"]) == (None, ["/bin/get", "-x"])


# --- what stops -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"raw_fetch": None}, "raw_fetch is not set"),
        ({"ngas": None}, "neither ngas nor products_fetch"),
    ],
)
@pytest.mark.parametrize("engine", ["pipeline", "script", "casatasks"])
def test_a_site_that_cannot_fetch_gets_no_job(site: Site, engine: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FatalError, match=message):
        site(**settings).job(request(), chosen(engine))


def test_without_a_worker_there_is_no_job_of_the_modular_casa(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    engines = site(casa_worker=None)
    with pytest.raises(FatalError, match="there is no CASA worker environment yet"):
        engines.job(request(), chosen("casatasks"))
    assert engines.job(request(), chosen("pipeline")).files


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<ParameterSet/>", "", "ParameterSet"),
        ("<Value>{{ value }}</Value>", "<Value> {{ value }}</Value>", "SESSION_2"),
        ("{% for keyword, value in ppr.sessions %}", "{% for keyword, value in ppr.sessions[1:] %}", "SESSION_"),
        ("<RelativePath>{{ ppr.relative_path }}", "<RelativePath>elsewhere", "RelativePath"),
    ],
)
def test_a_sites_own_ppr_that_would_go_wrong_silently_gets_no_job(
    site: Site, tmp_path: Path, old: str, new: str, message: str
) -> None:
    engines = site()
    template = (TEMPLATES / "ppr.xml").read_text()
    assert old in template
    (tmp_path / "templates" / "ppr.xml").write_text(template.replace(old, new))
    with pytest.raises(FatalError, match=rf"CASA is not started: .*{message}"):
        engines.job(request(), chosen("pipeline"))
    # The other engines need none.
    assert engines.job(request(), chosen("script")).files


def test_a_pipeline_that_loses_the_session_of_an_eb_gets_no_job(site: Site) -> None:
    lost = "uid://A002/Xcf92df/X345a"
    sessions = {2: [lost]}
    the_plan = plan_restore(
        facts_of(sessions, {}), read_manifest(manifest_xml(sessions)),
        read_restore_script(SCRIPT.replace("X3453", "X345a")), status=None,
    )  # fmt: skip
    for version, starts in (("6.1.1-10-pipeline-2020.1.0.36", False), ("6.1.1-15-pipeline-2020.1.0.40", True)):
        restore = chosen("pipeline", the_plan=the_plan, casa=CasaChoice(version, "/opt/casa", ""))
        if starts:
            assert site().job(request(), restore).files
        else:
            with pytest.raises(FatalError, match="as it ends in a"):
                site().job(request(), restore)


# --- what identifies a calibration ------------------------------------------------------------------------------------

OLD, NEW = (CasaConfig(version=version, home=Path("/opt") / version) for version in ("5.1.1-5", "6.5.4-9"))


def test_the_identity_is_that_of_engine_versions_and_scripts(site: Site, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"engine": "pipeline", "casa": (OLD, NEW)}
    identity = site(**settings).identity("2017.1.01347.S")
    assert identity == site(**settings).identity("2017.1.01347.S")
    for other in ({"engine": "script"}, {"casa": (OLD,)}, {"casa": (OLD, replace(NEW, version="6.5.4-10"))}):
        assert site(**{**settings, **other}).identity("2017.1.01347.S") != identity, other
    copied = tmp_path / "other"
    (copied / "casa").mkdir(parents=True)
    for changed in ("calibrate.py", "finish_restore.py"):
        for name in ("calibrate.py", "finish_restore.py"):
            content = (TEMPLATES / "casa" / name).read_bytes()
            (copied / "casa" / name).write_bytes(content + b"\n" if name == changed else content)
        engines = site(**settings)
        engines.templates_directory = copied
        assert engines.identity("2017.1.01347.S") != identity, changed


@pytest.mark.parametrize(
    "other",
    [
        {"casa": (NEW, OLD)},
        {"casa": (replace(OLD, home=Path("/soft/casa"), label="el7"), NEW)},
        {"layout": "production"},
        {"xvfb": True},
        {"disk_factor": 3},
        {"raw_fetch": ("/bin/other",)},
        {"raw_size": ("/bin/size",)},
        {"ngas": "other:7777"},
        {"casa_worker": None},
    ],
    ids=str,
)
def test_what_changes_no_data_changes_no_identity(site: Site, other: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"engine": "pipeline", "casa": (OLD, NEW)}
    assert site(**{**settings, **other}).identity("2017.1.01347.S") == site(**settings).identity("2017.1.01347.S")


def worker(directory: Path, version: str) -> Path:
    """Make a program that answers as the worker's Python does when it is asked for the version of casatasks."""
    program = directory / f"python-{version}"
    program.write_text(f"#!/bin/sh\necho {version}\n")
    program.chmod(0o755)
    return program


@pytest.mark.parametrize(("engine", "casa"), [("casatasks", ()), ("auto", ()), ("auto", (OLD,))])
def test_the_modular_casa_is_in_the_identity_where_it_may_be_chosen(
    site: Site, tmp_path: Path, engine: str, casa: tuple[CasaConfig, ...]
) -> None:
    identities = [
        site(engine=engine, casa=casa, casa_worker=worker(tmp_path, version)).identity("2017.1.01347.S")
        for version in ("6.7.0.31", "6.7.1.2")
    ]
    assert "casatasks 6.7.0.31" in identities[0]
    assert identities[0].replace("6.7.0.31", "6.7.1.2") == identities[1]


def test_a_site_without_the_modular_casa_has_an_identity_all_the_same(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "casatasks" not in site(engine="auto", casa=(OLD,), casa_worker=None).identity("2017.1.01347.S")
