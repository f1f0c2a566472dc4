"""The engines "pipeline" and "script", with a stand-in for the CASA that they need: what is calibrated, what stops.

The stand-in (monolithic_casa.py) is told nothing by the tests but what the job scripts give it. The job directories are
those that the service makes, of a plan that is made from the archived texts of the store.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from casa_jobs import FIRST, MOUS, SECOND, SESSION_OF, TEMPLATES, THIRD, sanitized, unit_of_tests
from monolithic_casa import MISBEHAVIOURS, READY, WRONG, make_casa_home
from test_calibrate import COMPARE, identical, product_of, products_of, report_of

from stagecal.adapters.engines import SiteEngines
from stagecal.adapters.templates import JinjaTemplates
from stagecal.config import Locks, Restore
from stagecal.domain.casa_versions import CasaChoice
from stagecal.domain.requests import Origin, Request, State
from stagecal.domain.restore.chosen import ChosenRestore
from stagecal.domain.restore.engines import EngineChoice
from stagecal.embedded import make_store
from stagecal.services.restoring import planned_from_products

NOW = datetime(2026, 11, 21, 9, 0, tzinfo=UTC)
STEM = f"member.{sanitized(MOUS)}"
CALFIELDS = ("J0510+1800", "J0440+1437")


def request_of(work: str, blocks: tuple[str, ...], calfields: tuple[str, ...] = ()) -> Request:
    return Request(
        id="00c0ffee", sequence=1, origin=Origin.TRIGGER, mous=MOUS, project="2017.1.01347.S", ticket="1", user="",
        email="", calfields=calfields, contact="", trigger_name="", trigger_text="", trigger_sha256="",
        received_at=NOW, state=State.ACCEPTED, since=NOW, execution_blocks=blocks, work=work,
    )  # fmt: skip


def make_job(
    directory: Path,
    engine: str,
    store: Path,
    casa_home: Path,
    calfields: tuple[str, ...] = (),
    **settings: Any,
) -> Path:
    """Make a job directory as the service does for the MOUS of the store; return its run.sh."""
    plan, script_name, script = planned_from_products(store / "products" / sanitized(MOUS))
    casa = CasaChoice("5.1.1-5", str(casa_home), "")
    values: dict[str, Any] = {
        "raw_fetch": (str(store / "fetch_raw.sh"),), "products_fetch": (str(store / "fetch_product.sh"),),
        "disk_factor": 2, **settings,
    }  # fmt: skip
    engines = SiteEngines(
        Restore(**values), Locks(timeout_s=60.0), JinjaTemplates(TEMPLATES), TEMPLATES, directory.parent
    )
    request = request_of(directory.name, plan.layout.execution_blocks, calfields)
    job = engines.job(request, ChosenRestore(plan, script_name, script, EngineChoice(engine, "asked for"), casa))
    assert job.engine == engine
    directory.mkdir()
    for name, content in job.files.items():
        (directory / name).write_bytes(content)
    (directory / "run.sh").chmod(0o755)
    return directory / "run.sh"


def run(script: Path, path: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HOME": str(script.parent.parent / "no-home")}
    environment["PATH"] = f"{path}:{environment['PATH']}" if path else environment["PATH"]
    return subprocess.run([script], cwd="/", env=environment, capture_output=True, text=True, timeout=120, check=False)


def failed(done: subprocess.CompletedProcess[str], job: Path) -> str:
    """Check that a job failed and left no product and no report; return its last message."""
    assert done.returncode not in (0, WRONG), done.stderr
    assert not (job / "report.json").exists()
    assert not (job / "products").exists() or products_of(job) == []
    return done.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="session")
def home(casa_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CASA that restores."""
    return make_casa_home(tmp_path_factory.mktemp("opt") / "casa 5.1.1", casa_python)


@pytest.fixture(scope="session")
def small(store: Path, made_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """The store with the first EB alone, and its restored measurement set."""

    def make(directory: Path) -> None:
        whole = unit_of_tests()
        others = ("session_4", sanitized(SECOND), sanitized(THIRD))
        files = tuple(name for name in whole.files if not any(other in name for other in others))
        make_store(directory, [replace(whole, sessions=whole.sessions[:2], files=files)])
        products = directory / "products" / sanitized(MOUS)
        for name in files:
            if not (products / name).exists():
                shutil.copy(store / "products" / sanitized(MOUS) / name, products)
        shutil.copytree(store / "raw" / sanitized(FIRST), directory / "raw" / sanitized(FIRST))
        name = f"{sanitized(FIRST)}.ms"
        shutil.copytree(store / "calibrated" / name, directory / READY / name)

    return made_once("small-store", make)


@pytest.fixture
def quick(casa_python: Path, small: Path, tmp_path: Path) -> Path:
    """A CASA that has the restored measurement set ready, so that it need not calibrate."""
    home = make_casa_home(tmp_path / "casa", casa_python)
    (home / READY).symlink_to(small / READY)
    return home


def xvfb_run(tmp_path: Path) -> str:
    """Make a stand-in of xvfb-run; return its directory."""
    program = tmp_path / "bin" / "xvfb-run"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >>"{tmp_path}/displays"\n[ "$1" = -a ] || exit 9\nshift\nexec "$@"\n')
    program.chmod(0o755)
    return str(program.parent)


# --- what is restored -------------------------------------------------------------------------------------------------


def test_the_pipeline_restores_all_ebs_bit_by_bit(
    tmp_path: Path, store: Path, home: Path, in_worker: Callable[..., Any]
) -> None:
    job = tmp_path / "WORK1"
    done = run(make_job(job, "pipeline", store, home))
    assert done.returncode == 0, done.stderr
    assert products_of(job) == sorted(product_of(uid) for uid in SESSION_OF)
    for uid in SESSION_OF:
        assert identical(in_worker(COMPARE, job / "products" / product_of(uid), store / "expected" / product_of(uid)))
    report = report_of(job)
    assert report["engine"] == "pipeline"
    assert report["commands"][0] == "casa --nologger --nogui --pipeline -c runpipeline.py PPR_uid___A001_X12a3_X80f.xml"
    assert len(report["commands"]) == 4
    assert not any("/" in command for command in report["commands"])
    assert {uid: report["execution_blocks"][uid]["session"] for uid in SESSION_OF} == SESSION_OF
    entry = report["execution_blocks"][FIRST]
    assert set(CALFIELDS) < set(entry["fields"])
    assert (entry["raw"], entry["ms"], entry["flag_version"], entry["left_out"]) == (
        "asdm", product_of(FIRST), "Pipeline_Final", [],
    )  # fmt: skip
    assert report["started"] <= report["ended"]
    kept = json.loads((job / "job.json").read_text())["auxiliary"]
    assert sorted(path.name for path in (job / "auxiliary").iterdir()) == sorted([*kept, "casa_commands.log"])
    assert json.loads((job / "metadata.json").read_text())["sessions"] == {
        "session_1": [], "session_2": [FIRST], "session_3": [], "session_4": [SECOND, THIRD],
    }  # fmt: skip


def test_the_script_engine_makes_the_other_calls_of_the_archives_script_and_restores_bit_by_bit(
    tmp_path: Path, small: Path, home: Path, in_worker: Callable[..., Any], store: Path
) -> None:
    mine = tmp_path / "store"
    shutil.copytree(small, mine)
    name = sanitized(FIRST)
    (mine / "products" / sanitized(MOUS) / f"{STEM}.hifa_calimage.casa_piperestorescript.py").write_text(
        "from recipes.almahelpers import fixsyscaltimes # SACM/JAO - Fixes\nh_init()\ntry:\n"
        f"    hifa_importdata (dbservice=False, vis=['../rawdata/{name}'], session=['session_2'])\n"
        f"    fixsyscaltimes(vis='{name}.ms')\n"
        f"    hifa_restoredata (vis=['{name}'], session=['session_2'], ocorr_mode='ca')\nfinally:\n    h_save()\n"
    )
    job = tmp_path / "WORK1"
    done = run(make_job(job, "script", mine, home))
    assert done.returncode == 0, done.stderr
    assert (job / "working" / "called.txt").read_text().split() == [
        "h_init", "hifa_importdata", "fixsyscaltimes", "hifa_restoredata", "h_save",
    ]  # fmt: skip
    assert identical(in_worker(COMPARE, job / "products" / product_of(FIRST), store / "expected" / product_of(FIRST)))


@pytest.mark.parametrize("engine", ["pipeline", "script"])
def test_both_engines_take_the_observatories_directories_and_a_display(
    tmp_path: Path, small: Path, quick: Path, engine: str
) -> None:
    job = tmp_path / "WORK1"
    done = run(make_job(job, engine, small, quick, layout="production", xvfb=True), xvfb_run(tmp_path))
    assert done.returncode == 0, done.stderr
    unit = "SOUS_uid___A001_X12a3_X80c/GOUS_uid___A001_X12a3_X80d/MOUS_uid___A001_X12a3_X80e"
    area = job / "2017.1.01347.S_2026_11_21T09_00_00.000" / unit
    assert (area / "products" / product_of(FIRST)).is_dir()
    assert (area / "working" / f"{sanitized(FIRST)}.ms").is_dir()
    assert products_of(job) == [product_of(FIRST)]
    report = report_of(job)
    assert report["engine"] == engine
    assert report["commands"][0].startswith("casa --nologger --nogui --pipeline -c ")
    assert len((tmp_path / "displays").read_text().splitlines()) == 2


def test_a_calibrator_request_gets_no_target_data(
    tmp_path: Path, small: Path, quick: Path, in_worker: Callable[..., Any]
) -> None:
    job = tmp_path / "WORK1"
    done = run(make_job(job, "pipeline", small, quick, calfields=CALFIELDS))
    assert done.returncode == 0, done.stderr
    look = (
        "import json, sys, casacore.tables as t; m = t.table(sys.argv[1], ack=False); "
        "n = t.table(sys.argv[1] + '/FIELD', ack=False).getcol('NAME'); "
        "print(json.dumps(sorted({n[i] for i in m.getcol('FIELD_ID')})))"
    )
    assert in_worker(look, job / "products" / product_of(FIRST)) == sorted(CALFIELDS)
    assert report_of(job)["execution_blocks"][FIRST]["fields"] == sorted(CALFIELDS)
    assert list((job / "auxiliary").iterdir()) == []


def test_a_field_that_is_no_calibrator_is_reported_and_nothing_is_split(
    tmp_path: Path, small: Path, quick: Path
) -> None:
    job = tmp_path / "WORK1"
    done = run(make_job(job, "pipeline", small, quick, calfields=("no such field",)))
    assert done.returncode == 0, done.stderr
    assert products_of(job) == []
    assert [one["field"] for one in report_of(job)["not_calibrators"]] == ["no such field"]


def test_the_casa_of_python_2_is_asked_by_the_names_of_its_modules(
    tmp_path: Path, small: Path, casa_python: Path
) -> None:
    home = make_casa_home(tmp_path / "casa", casa_python, python2_names=True)
    (home / READY).symlink_to(small / READY)
    job = tmp_path / "WORK1"
    done = run(make_job(job, "pipeline", small, home))
    assert done.returncode == 0, done.stderr
    assert products_of(job) == [product_of(FIRST)]
    assert report_of(job)["restored_by"] == {"casa": "5.1.1"}


# --- what stops -------------------------------------------------------------------------------------------------------

SAYS = {
    "errorexit": "the pipeline gave up: errorexit-20261121.txt says: KeyError: 'uid___A002_Xcf92df_X3453'",
    "severe": "ends with trouble: 2026-11-21 09:00:01 SEVERE flagmanager::::casa version Pipeline_Final not found",
    "traceback": "ends with trouble: Traceback (most recent call last):",
    "forgets": f"CASA left no {sanitized(FIRST)}.ms: an execution block is missing",
    "raw": "were not calibrated",
    "never-corrected": "was not calibrated: there is no CORRECTED_DATA",
    "no-flags": "the flags of Pipeline_Final were not restored",
    "dies": "CASA ended with exit code 3",
    "does-nothing": "CASA left no log in working/: it did not run there",
    "silent-finish": "CASA ended without a word",
}


@pytest.mark.parametrize("mode", MISBEHAVIOURS)
def test_a_casa_that_fails_and_does_not_say_so_leaves_no_product(
    tmp_path: Path, small: Path, quick: Path, mode: str
) -> None:
    (quick / "misbehaviour").write_text(mode)
    job = tmp_path / "WORK1"
    done = run(make_job(job, "pipeline", small, quick))
    assert SAYS[mode] in failed(done, job)


def test_a_failing_archived_script_leaves_no_product(tmp_path: Path, small: Path, quick: Path) -> None:
    mine = tmp_path / "store"
    shutil.copytree(small, mine)
    script = mine / "products" / sanitized(MOUS) / f"{STEM}.hifa_calimage.casa_piperestorescript.py"
    script.write_text(script.read_text().replace("h_init()", "h_save()"))
    job = tmp_path / "WORK1"
    run_script = make_job(job, "script", mine, quick)
    assert "no context: h_init was not called" in failed(run(run_script), job)


def test_an_eb_in_a_wrong_session_ends_the_restore(tmp_path: Path, small: Path, quick: Path) -> None:
    """The stand-in has the real reader's habits: without them, no test of what the PPR says would mean much."""
    job = tmp_path / "WORK1"
    script = make_job(job, "pipeline", small, quick)
    ppr = next(job.glob("PPR_*.xml"))
    text = ppr.read_text()
    ppr.write_text(text.replace("<Keyword>SESSION_1<", "<Keyword>SESSION_0<"))
    assert ppr.read_text() != text
    assert f"KeyError: '{sanitized(FIRST)}.ms' in session_1" in failed(run(script), job)


def test_a_ppr_without_a_parameter_set_runs_nothing_and_that_is_seen(tmp_path: Path, small: Path, quick: Path) -> None:
    job = tmp_path / "WORK1"
    script = make_job(job, "pipeline", small, quick)
    ppr = next(job.glob("PPR_*.xml"))
    ppr.write_text(ppr.read_text().replace("<ParameterSet/>", ""))
    assert "an execution block is missing" in failed(run(script), job)


# --- before CASA is started -------------------------------------------------------------------------------------------


def nothing_fetched(job: Path) -> bool:
    return not (job / "fetched.json").exists() and not any(job.glob("rawdata/*"))


@pytest.mark.parametrize("engine", ["pipeline", "script"])
def test_a_casa_that_is_not_on_the_node_is_told_before_anything_is_fetched(
    tmp_path: Path, small: Path, engine: str
) -> None:
    job = tmp_path / "WORK1"
    message = failed(run(make_job(job, engine, small, tmp_path / "$(touch pwned) casa")), job)
    assert message == f"run.sh: failed: there is no {tmp_path}/$(touch pwned) casa/bin/casa on this node"
    assert nothing_fetched(job)
    assert not list(tmp_path.rglob("pwned"))


def test_a_casa_without_the_pipeline_is_told_before_anything_is_fetched(
    tmp_path: Path, small: Path, quick: Path
) -> None:
    (quick / "pipeline" / "pipeline" / "runpipeline.py").unlink()
    job = tmp_path / "WORK1"
    assert "has no pipeline (runpipeline.py)" in failed(run(make_job(job, "pipeline", small, quick)), job)
    assert nothing_fetched(job)


def test_a_node_without_xvfb_is_told_before_anything_is_fetched(tmp_path: Path, small: Path, quick: Path) -> None:
    job = tmp_path / "WORK1"
    script = make_job(job, "pipeline", small, quick, xvfb=True)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("sh", "dirname"):
        (programs / name).symlink_to(str(shutil.which(name)))
    done = subprocess.run(
        [script], cwd="/", env={"PATH": str(programs)}, capture_output=True, text=True, timeout=60, check=False
    )
    assert "there is no xvfb-run on this node" in failed(done, job)
    assert nothing_fetched(job)


def spoiling(store: Path, directory: Path, then: str) -> tuple[str, ...]:
    """Return a raw_fetch that fetches from the store and then does something."""
    script = directory / "fetch"
    script.write_text(f'#!/bin/sh\nset -e\n"{store}/fetch_raw.sh" "$1"\n{then}\n')
    script.chmod(0o755)
    return (str(script),)


@pytest.mark.parametrize(
    ("then", "message"),
    [
        ("cp ../products/*manifest.xml ../products/a.pipeline_manifest.xml", "products/ has 2 manifests"),
        ("rm */ASDM.xml", "raw_fetch left no ASDM of uid://A002/Xcf92df/X3453"),
        ("rm */ASDMBinary/*_X18", "there is no ASDMBinary/uid___A002_Xcf92df_X18, which Main.xml refers to"),
        ("truncate -s -1000 */ASDMBinary/*_X18", "X18 has 350710 bytes and is cut"),
        ("for t in ../products/*.session_2.caltables.tgz; do truncate -s -9 $t; done", "caltables.tgz is damaged"),
    ],
)
def test_what_the_pipeline_would_pass_over_is_told_before_casa_is_started(
    tmp_path: Path, small: Path, quick: Path, then: str, message: str
) -> None:
    job = tmp_path / "WORK1"
    script = make_job(job, "pipeline", small, quick, raw_fetch=spoiling(small, tmp_path, then))
    assert message in failed(run(script), job)
    assert list((job / "working").iterdir()) == []


def test_a_second_manifest_among_the_auxiliary_products_stays_in_its_archive(
    tmp_path: Path, small: Path, quick: Path
) -> None:
    mine = tmp_path / "store"
    shutil.copytree(small, mine)
    content = b"<piperesults/>"
    member = tarfile.TarInfo("a.pipeline_manifest.xml")
    member.size = len(content)
    products = mine / "products" / sanitized(MOUS)
    with tarfile.open(products / f"{STEM}.hifa_calimage.auxproducts.tgz", "w:gz") as archive:
        archive.addfile(member, io.BytesIO(content))
    job = tmp_path / "WORK1"
    done = run(make_job(job, "pipeline", mine, quick))
    assert done.returncode == 0, done.stderr
    assert "of a kind that is not expanded, left in it: a.pipeline_manifest.xml" in done.stdout
    assert [path.name for path in (job / "products").glob("*manifest.xml")] == [
        f"{STEM}.hifa_calimage.pipeline_manifest.xml"
    ]


# --- space ------------------------------------------------------------------------------------------------------------


def free_kilobytes(directory: Path) -> int:
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize // 1024


@pytest.fixture
def dead(small: Path, quick: Path) -> Callable[..., tuple[subprocess.CompletedProcess[str], Path]]:
    """A function that runs a job with a CASA that ends at once, after everything was fetched."""
    (quick / "misbehaviour").write_text("dies")

    def work(job: Path, **settings: Any) -> tuple[subprocess.CompletedProcess[str], Path]:
        return run(make_job(job, "pipeline", small, quick, **settings)), job

    return work


Dead = Callable[..., tuple[subprocess.CompletedProcess[str], Path]]
REACHED_CASA = "CASA ended with exit code 3"


def printing(directory: Path, text: str) -> tuple[str, ...]:
    script = directory / "size"
    script.write_text(f"#!/bin/sh\n[ \"$1\" = {FIRST} ] || exit 1\nprintf '%b' '{text}'\n")
    script.chmod(0o755)
    return (str(script),)


def test_the_known_size_times_the_factor_is_promised_before_anything_is_fetched(tmp_path: Path, dead: Dead) -> None:
    done, job = dead(tmp_path / "WORK1", raw_size=printing(tmp_path, "1024000\\n"), disk_factor=14)
    assert REACHED_CASA in failed(done, job)
    assert (job / "reserved").read_text() == f"{1001 * 14}\n"


def test_a_disk_that_is_too_small_stops_before_anything_is_fetched(tmp_path: Path, dead: Dead) -> None:
    size = free_kilobytes(tmp_path) * 1024
    done, job = dead(tmp_path / "WORK1", raw_size=printing(tmp_path, str(size)))
    assert "make room, and start it again" in failed(done, job)
    assert nothing_fetched(job)
    # It promises nothing to a job that does not run.
    assert not (job / "reserved").exists()


@pytest.mark.parametrize("text", ["", "many", "0123", "12\\n34", "9999999999999999999999", "$(touch pwned)"])
def test_a_size_that_is_none_stops_the_job(tmp_path: Path, dead: Dead, text: str) -> None:
    done, job = dead(tmp_path / "WORK1", raw_size=printing(tmp_path, text))
    assert f"the size of the raw data of {FIRST} is unknown" in failed(done, job)
    assert nothing_fetched(job)


def test_without_a_known_size_the_same_is_promised_as_soon_as_the_data_are_there(tmp_path: Path, dead: Dead) -> None:
    done, job = dead(tmp_path / "WORK1", disk_factor=5)
    assert REACHED_CASA in failed(done, job)
    raw = int(subprocess.run(["du", "-sk", job / "rawdata"], capture_output=True, check=True).stdout.split()[0])
    assert (job / "reserved").read_text() == f"{raw * 5}\n"


def promise(job: Path, kilobytes: int) -> None:
    job.mkdir()
    (job / "reserved").write_text(f"{kilobytes}\n")


def test_what_another_job_was_promised_counts_as_used(tmp_path: Path, dead: Dead) -> None:
    promise(tmp_path / "WORK7", free_kilobytes(tmp_path))
    done, job = dead(tmp_path / "WORK1")
    assert "make room, and start it again" in failed(done, job)


def test_the_promise_of_a_job_that_ended_counts_no_longer(tmp_path: Path, dead: Dead) -> None:
    promise(tmp_path / "WORK7", free_kilobytes(tmp_path))
    (tmp_path / "WORK7" / "exit").write_text("0\n")
    done, job = dead(tmp_path / "WORK1")
    assert REACHED_CASA in failed(done, job)


def test_what_another_job_has_used_of_its_promise_counts_once(tmp_path: Path, dead: Dead) -> None:
    promise(tmp_path / "WORK7", 20_000)
    (tmp_path / "WORK7" / "data").write_bytes(os.urandom(20_480_000))
    enough = str((free_kilobytes(tmp_path) - 200_000) // 2 * 1024)
    done, job = dead(tmp_path / "WORK1", raw_size=printing(tmp_path, enough))
    # Not used up yet, the promise would take 20 MB more: far less than what the machine's other programs may use.
    assert REACHED_CASA in failed(done, job)


def test_of_two_jobs_that_start_together_one_gets_the_space_that_is_for_one(
    tmp_path: Path, small: Path, quick: Path
) -> None:
    (quick / "misbehaviour").write_text("dies")
    size = printing(tmp_path, str(free_kilobytes(tmp_path) * 6 // 10 * 1024 // 2))
    scripts = [make_job(tmp_path / work, "pipeline", small, quick, raw_size=size) for work in ("WORK1", "WORK2")]
    jobs = [subprocess.Popen([script], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            for script in scripts]  # fmt: skip
    said = [job.communicate(timeout=60)[1] for job in jobs]
    assert sorted(REACHED_CASA in one for one in said) == [False, True], said
    assert sum("make room, and start it again" in one for one in said) == 1


# --- the Python that fetches ------------------------------------------------------------------------------------------


def test_the_first_program_that_is_a_python_of_2_7_or_later_is_taken(tmp_path: Path, dead: Dead, quick: Path) -> None:
    python = quick / "bin" / "python3"
    real = python.read_text()
    python.write_text("#!/bin/sh\nexit 1\n")
    (quick / "bin" / "python").write_text(real.replace("exec", f"touch '{tmp_path}/used'; exec", 1))
    (quick / "bin" / "python").chmod(0o755)
    done, job = dead(tmp_path / "WORK1")
    assert REACHED_CASA in failed(done, job)
    assert (tmp_path / "used").exists()


def test_without_any_python_the_job_says_what_it_tried(tmp_path: Path, small: Path, quick: Path) -> None:
    script = make_job(tmp_path / "WORK1", "pipeline", small, quick)
    (quick / "bin" / "python3").unlink()
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("sh", "dirname", "mkdir"):
        (programs / name).symlink_to(str(shutil.which(name)))
    done = subprocess.run(
        [script], cwd="/", env={"PATH": str(programs)}, capture_output=True, text=True, timeout=60, check=False
    )
    message = failed(done, tmp_path / "WORK1")
    assert "none of these programs is a Python" in message
    assert f"{quick}/bin/python3, {quick}/bin/python, python3, python, python2" in message
