"""The engine "casatasks" with real CASA and real data: what its job leaves behind, and what it refuses."""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from casa_jobs import FIRST, SECOND, TEMPLATES, fetch_from, make_job, sanitized

Run = Callable[..., subprocess.CompletedProcess[str]]
CALFIELDS = ("J0510+1800", "J0440+1437")

# Prints per field name: mean amplitude (Jy) and mean phase (degrees) over baselines of averaged unflagged data.
LOOK = """
import json, sys
import numpy as np
import casacore.tables as tables
options = dict(ack=False, lockoptions="autonoread")
main = tables.table(sys.argv[1], **options)
names = tables.table(sys.argv[1] + "/FIELD", **options).getcol("NAME")
found = {}
for row in sorted(set(main.getcol("FIELD_ID"))):
    part = main.query("FIELD_ID==%d" % row)
    data = np.ma.array(part.getcol("DATA"), mask=part.getcol("FLAG"))
    mean = {}
    for window in sorted(set(part.getcol("DATA_DESC_ID"))):
        for one in sorted(set(part.getcol("ANTENNA1"))):
            chosen = (part.getcol("DATA_DESC_ID") == window) & (part.getcol("ANTENNA1") == one)
            for other in sorted(set(part.getcol("ANTENNA2")[chosen])):
                baseline = chosen & (part.getcol("ANTENNA2") == other)
                mean[window, one, other] = complex(data[baseline].mean())
    values = np.array(list(mean.values()))
    found[names[row]] = dict(amplitude=float(abs(values).mean()), phase=float(np.degrees(abs(np.angle(values)).max())),
                             windows=sorted({int(key[0]) for key in mean}), rows=part.nrows())
print(json.dumps(found))
"""


def report_of(job: Path) -> Any:
    return json.loads((job / "report.json").read_text())


def products_of(job: Path) -> list[str]:
    return sorted(path.name for path in (job / "products").iterdir())


@pytest.fixture(scope="module")
def full_job(run_job: Run, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished job for all data of both EBs."""
    job = tmp_path_factory.mktemp("full") / "WORK1"
    done = run_job(job, store / "fetch_raw.sh")
    assert done.returncode == 0, done.stderr
    return job


@pytest.fixture(scope="module")
def calfield_job(run_job: Run, store: Path, tmp_path_factory: pytest.TempPathFactory, casa_python: Path) -> Path:
    """A finished job for the phase calibrator, which the second EB does not have."""
    base = tmp_path_factory.mktemp("calfields")
    rename = (
        "import sys, casacore.tables as t; f = t.table(sys.argv[1] + '/FIELD', readonly=False, ack=False); "
        "f.putcell('NAME', 1, 'J0440+1438')"
    )
    then = f'case $1 in {SECOND}) {shlex.quote(str(casa_python))} -c {shlex.quote(rename)} "$eb/$eb.ms" ;; esac'
    done = run_job(base / "WORK1", fetch_from(store, base, then), calfields=["J0440+1437"])
    assert done.returncode == 0, done.stderr
    return base / "WORK1"


REFUSED = (
    "HL_Tau",
    "*",
    "J*",
    "/J05.*/",
    "0~2",
    "0",
    ">0",
    "",
    "!HL_Tau",
    "j0510+1800",
    "J0510+1800 ",
    "J0510+1800,HL_Tau",
)


@pytest.fixture(scope="module")
def refused_job(run_job: Run, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished job that asks for a real calibrator, the science target and all kinds of patterns."""
    job = tmp_path_factory.mktemp("refused") / "WORK1"
    done = run_job(job, store / "fetch_raw.sh", blocks=[FIRST], calfields=["J0510+1800", *REFUSED])
    assert done.returncode == 0, done.stderr
    return job


@pytest.mark.parametrize("uid", [FIRST, SECOND])
def test_a_full_request_gives_all_fields_of_every_eb_really_calibrated(
    full_job: Path, in_worker: Callable[..., Any], uid: str
) -> None:
    name = f"{sanitized(uid)}.ms.split.cal"
    assert report_of(full_job)["execution_blocks"][uid]["ms"] == name
    raw = in_worker(LOOK, full_job / "rawdata" / sanitized(uid) / f"{sanitized(uid)}.ms")
    calibrated = in_worker(LOOK, full_job / "products" / name)
    assert raw["J0510+1800"]["phase"] > 90
    for field, flux in {"J0510+1800": 2.5, "J0440+1437": 0.4, "HL_Tau": 0.1}.items():
        assert calibrated[field]["rows"] == raw[field]["rows"]
        assert calibrated[field]["windows"] == [17, 19]
        assert calibrated[field]["amplitude"] == pytest.approx(flux, rel=0.1)
        assert calibrated[field]["phase"] < (2 if flux > 1 else 10 if field.startswith("J") else 45)


def test_the_subtables_of_raw_data_record_their_true_row_counts_as_importasdm_does(
    store: Path, in_worker: Callable[..., Any]
) -> None:
    ms = store / sanitized(FIRST) / f"{sanitized(FIRST)}.ms"
    count = (
        "import json, sys, casacore.tables as t; "
        "print(json.dumps({p: t.table(p, ack=False, lockoptions='autonoread').nrows() for p in sys.argv[1:]}))"
    )
    tables = [str(path.parent) for path in ms.glob("**/table.dat")]
    counts = in_worker(count, *tables)
    assert len(tables) > 10
    assert {path: int.from_bytes((Path(path) / "table.dat").read_bytes()[21:25], "big") for path in tables} == counts


def test_an_eb_that_the_store_has_is_kept(store: Path, casa_python: Path) -> None:
    before = (store / sanitized(FIRST)).stat()
    done = subprocess.run(
        [casa_python, store / "make_example_data.py", store, FIRST],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == f"{sanitized(FIRST)} is there already\n"
    after = (store / sanitized(FIRST)).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert not list(store.glob(".uid*"))


def test_example_data_differ_between_ebs(store: Path, in_worker: Callable[..., Any]) -> None:
    first, second = (in_worker(LOOK, store / sanitized(uid) / f"{sanitized(uid)}.ms") for uid in (FIRST, SECOND))
    assert first["HL_Tau"]["amplitude"] != second["HL_Tau"]["amplitude"]


def test_a_full_request_leaves_the_report_and_what_explains_its_calibration(full_job: Path) -> None:
    report = report_of(full_job)
    assert report["engine"] == "casatasks"
    assert re.fullmatch(r"\d+(\.\d+)+", report["casa_version"])
    assert report["not_calibrators"] == []
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", report["started"])
    assert report["started"] <= report["ended"]
    assert report["execution_blocks"][FIRST] == {
        "ms": f"{sanitized(FIRST)}.ms.split.cal",
        "fields": ["HL_Tau", "J0440+1437", "J0510+1800"],
        "without_calfields": False,
    }
    assert sorted(path.name for path in (full_job / "auxiliary").iterdir()) == sorted(
        ["casa_commands.log"]
        + [f"{sanitized(uid)}{end}" for uid in (FIRST, SECOND) for end in (".caltables.tgz", ".ms.calapply.txt")]
    )
    assert (full_job / "auxiliary" / "casa_commands.log").read_text().splitlines() == report["commands"]
    assert len(report["commands"]) == 2
    assert all(command.startswith("mstransform(vis='../rawdata/uid___A002_") for command in report["commands"])


def test_the_report_names_no_path_of_the_host(full_job: Path) -> None:
    text = (full_job / "report.json").read_text()
    assert str(full_job) not in text
    assert not re.search(r"['\" ]/", text)


def test_a_calfield_request_gives_these_fields_only_and_no_auxiliary_files(
    calfield_job: Path, in_worker: Callable[..., Any]
) -> None:
    assert products_of(calfield_job) == [f"{sanitized(FIRST)}.ms.split.cal"]
    calibrated = in_worker(LOOK, calfield_job / "products" / f"{sanitized(FIRST)}.ms.split.cal")
    assert list(calibrated) == ["J0440+1437"]
    assert calibrated["J0440+1437"]["phase"] < 10
    assert list((calfield_job / "auxiliary").iterdir()) == []


def test_fields_reach_casa_as_ids_only(calfield_job: Path) -> None:
    (command,) = report_of(calfield_job)["commands"]
    assert "field='1'" in command


def test_an_eb_without_the_field_yields_no_product_and_is_named(calfield_job: Path) -> None:
    assert report_of(calfield_job)["execution_blocks"][SECOND] == {"ms": None, "fields": [], "without_calfields": True}


@pytest.mark.parametrize("field", REFUSED)
def test_a_science_target_or_a_pattern_is_no_calibrator(refused_job: Path, field: str) -> None:
    reasons = {entry["field"]: entry["reason"] for entry in report_of(refused_job)["not_calibrators"]}
    if field == "HL_Tau":
        assert reasons[field] == f"it is observed as science target (OBSERVE_TARGET) in {sanitized(FIRST)}"
    else:
        assert reasons[field] == "no execution block has a field of exactly this name"


def test_one_field_that_is_no_calibrator_stops_the_whole_request(refused_job: Path) -> None:
    assert products_of(refused_job) == []
    report = report_of(refused_job)
    assert report["commands"] == []
    assert "J0510+1800" not in {entry["field"] for entry in report["not_calibrators"]}


def test_a_field_that_is_a_target_in_one_eb_only_is_no_calibrator(
    run_job: Run, store: Path, tmp_path: Path, casa_python: Path
) -> None:
    # In the second EB the target bears the phase calibrator's name, beside the calibrator itself.
    rename = (
        "import sys, casacore.tables as t; f = t.table(sys.argv[1] + '/FIELD', readonly=False, ack=False); "
        "f.putcell('NAME', 2, 'J0440+1437'); f.addrows(1); f.putcell('NAME', 3, 'J0510+1800')"
    )
    then = f'case $1 in {SECOND}) {shlex.quote(str(casa_python))} -c {shlex.quote(rename)} "$eb/$eb.ms" ;; esac'
    done = run_job(tmp_path / "WORK1", fetch_from(store, tmp_path, then), calfields=CALFIELDS)
    assert done.returncode == 0, done.stderr
    reasons = {entry["field"]: entry["reason"] for entry in report_of(tmp_path / "WORK1")["not_calibrators"]}
    assert reasons == {
        "J0440+1437": f"it is observed as science target (OBSERVE_TARGET) in {sanitized(SECOND)}",
        "J0510+1800": f"it is not observed for calibration (CALIBRATE_*) in {sanitized(SECOND)}",
    }
    assert products_of(tmp_path / "WORK1") == []


def failed(done: subprocess.CompletedProcess[str], job: Path, message: str) -> None:
    assert done.returncode == 1
    assert message in done.stderr
    assert not (job / "report.json").exists()
    assert products_of(job) == []


def test_missing_calibration_tables_fail_the_job(run_job: Run, store: Path, tmp_path: Path) -> None:
    fetch = fetch_from(store, tmp_path, f'case $1 in {SECOND}) rm "$eb/products/$eb.caltables.tgz" ;; esac')
    done = run_job(tmp_path / "WORK1", fetch)
    failed(done, tmp_path / "WORK1", f"products/{sanitized(SECOND)}.caltables.tgz is missing")


def test_a_failure_of_the_last_eb_leaves_no_product_of_the_first(run_job: Run, store: Path, tmp_path: Path) -> None:
    other = "sed -i s/gain.tbl/other.tbl/"
    fetch = fetch_from(store, tmp_path, f'case $1 in {SECOND}) {other} "$eb/products/$eb.ms.calapply.txt" ;; esac')
    done = run_job(tmp_path / "WORK1", fetch)
    failed(done, tmp_path / "WORK1", f"the calibration table '{sanitized(SECOND)}.ms.other.tbl' is not in")


def test_calibration_that_changes_nothing_fails_the_job(
    run_job: Run, store: Path, tmp_path: Path, casa_python: Path
) -> None:
    unity = (
        "import sys, casacore.tables as t\n"
        "for name in sys.argv[1:]:\n"
        "    c = t.table(name, readonly=False, ack=False)\n"
        "    c.putcol('CPARAM', c.getcol('CPARAM') * 0 + 1)\n"
    )
    then = (
        'cd "$eb/products"; tar xzf "$eb.caltables.tgz"; '
        f'{shlex.quote(str(casa_python))} -c {shlex.quote(unity)} "$eb.ms.bandpass.tbl" "$eb.ms.gain.tbl"; '
        'tar czf "$eb.caltables.tgz" "$eb.ms.bandpass.tbl" "$eb.ms.gain.tbl"'
    )
    done = run_job(tmp_path / "WORK1", fetch_from(store, tmp_path, then), blocks=[FIRST], calfields=["J0510+1800"])
    failed(done, tmp_path / "WORK1", "were not calibrated")


@pytest.mark.parametrize("kind", ["link", "hard link", "parent", "absolute", "device"])
def test_calibration_tables_expand_below_the_working_directory_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    hostile = tmp_path / "hostile.tgz"
    member = tarfile.TarInfo({"parent": "a/../../escaped", "absolute": str(tmp_path / "escaped")}.get(kind, "escaped"))
    member.type = {"link": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "device": tarfile.CHRTYPE}.get(
        kind, tarfile.REGTYPE
    )
    member.linkname = str(tmp_path) if "link" in kind else ""
    with tarfile.open(hostile, "w:gz") as archive:
        archive.addfile(member)
    (tmp_path / "working").mkdir()
    monkeypatch.chdir(tmp_path / "working")
    with pytest.raises(Exception, match="is refused"):
        runpy.run_path(str(TEMPLATES / "casa" / "calibrate.py"))["expand"](str(hostile))
    assert not list(tmp_path.rglob("escaped"))


def test_calibration_tables_that_were_cut_off_are_not_expanded(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{sanitized(FIRST)}.caltables.tgz"
    whole = (store / sanitized(FIRST) / "products" / name).read_bytes()
    (tmp_path / name).write_bytes(whole[:-9])
    (tmp_path / "working").mkdir()
    monkeypatch.chdir(tmp_path / "working")
    with pytest.raises(EOFError):
        runpy.run_path(str(TEMPLATES / "casa" / "calibrate.py"))["expand"](str(tmp_path / name))
    assert list((tmp_path / "working").iterdir()) == []


def test_a_job_directory_is_used_once(full_job: Path) -> None:
    before = (full_job / "report.json").read_text()
    done = subprocess.run([full_job / "run.sh"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert (full_job / "report.json").read_text() == before


def test_a_job_killed_in_the_middle_leaves_no_product(store: Path, tmp_path: Path, casa_python: Path) -> None:
    script = make_job(tmp_path / "WORK1", casa_python, store / "fetch_raw.sh", blocks=[FIRST])
    process = subprocess.Popen([script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    begun = tmp_path / "WORK1" / "working" / f"{sanitized(FIRST)}.ms.split.cal"
    try:
        end = time.monotonic() + 60
        while not begun.exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        assert begun.exists(), "the job had begun to split"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert products_of(tmp_path / "WORK1") == []
    assert not (tmp_path / "WORK1" / "report.json").exists()


def test_calibrate_can_be_read_by_the_python_of_old_casa() -> None:
    source = (TEMPLATES / "casa" / "calibrate.py").read_text()
    source.encode("ascii")
    for python in ("python2.7", "python2"):
        try:
            done = subprocess.run(
                [python, "-c", "import sys; compile(sys.stdin.read(), 'calibrate.py', 'exec')"],
                input=source, capture_output=True, text=True, timeout=60, check=False,
            )  # fmt: skip
        except FileNotFoundError:
            continue
        if done.returncode == 0:
            break
        assert "SyntaxError" not in done.stderr, done.stderr
    # What Python 3 would let pass, also where there is no Python 2.
    later = (ast.JoinedStr, ast.AnnAssign, ast.NamedExpr, ast.AsyncFunctionDef, ast.Nonlocal, ast.YieldFrom)
    tree = ast.parse(source)
    for node in ast.walk(tree):
        assert not isinstance(node, later), f"line {getattr(node, 'lineno', '?')}"
        if isinstance(node, ast.FunctionDef):
            assert node.returns is None
            assert not any(argument.annotation for argument in node.args.args)
            assert not node.args.kwonlyargs
        if isinstance(node, ast.Raise):
            assert node.cause is None
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert "pathlib" not in imported
    assert imported - {"casatasks", "casatools"} <= sys.stdlib_module_names
