"""The engine "casatasks" with real CASA and real data: what its job leaves behind, and what it refuses."""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from casa_jobs import (
    FIRST,
    MOUS,
    SECOND,
    SEMI_PASS,
    SESSION_OF,
    TEMPLATES,
    THIRD,
    caltables_of,
    fetch_from,
    make_job,
    sanitized,
    unit_of_tests,
)  # fmt: skip

from stagecal.domain.restore.manifest import read_manifest
from stagecal.domain.restore.pipescript import read_pipescript
from stagecal.domain.restore.restore_script import read_restore_script
from stagecal.embedded import archived_units, make_site, make_store
from stagecal.measurement_set import Verdict, check_measurement_set

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


# Compares two measurement sets bit by bit, row by row; with a third argument, the rows of that FIELD id of the second.
COMPARE = """
import json, sys
import casacore.tables as tables
options = dict(ack=False, lockoptions="autonoread")
one, other = (tables.table(path, **options) for path in sys.argv[1:3])
if len(sys.argv) > 3:
    other = other.query("FIELD_ID==" + sys.argv[3])
order = "DATA_DESC_ID, TIME, ANTENNA1, ANTENNA2"
one, other = one.sort(order), other.sort(order)
found = {"rows": [one.nrows(), other.nrows()], "columns": {}}
for number in sorted(set(other.getcol("DATA_DESC_ID"))):
    parts = [table.query("DATA_DESC_ID==%d" % number) for table in (one, other)]
    for column in "TIME ANTENNA1 ANTENNA2 FIELD_ID STATE_ID UVW DATA WEIGHT SIGMA FLAG FLAG_ROW".split():
        first, second = (part.getcol(column) for part in parts)
        same = first.dtype == second.dtype and first.shape == second.shape and first.tobytes() == second.tobytes()
        found["columns"][column] = found["columns"].get(column, True) and same
flags = one.getcol("FLAG")
found["flagged"], found["weights"] = float(flags.mean()), len(set(one.getcol("WEIGHT").ravel().tolist()))
print(json.dumps(found))
"""


def report_of(job: Path) -> Any:
    return json.loads((job / "report.json").read_text())


def products_of(job: Path) -> list[str]:
    return sorted(path.name for path in (job / "products").iterdir() if path.name.endswith(".split.cal"))


def product_of(uid: str) -> str:
    return f"{sanitized(uid)}.ms.split.cal"


@pytest.fixture(scope="module")
def full_job(run_job: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished job for all data of the three EBs, in the directories of the observatories."""
    job = tmp_path_factory.mktemp("full") / "WORK1"
    done = run_job(job, area=f"2017.1.01347.S_now/MOUS_{sanitized(MOUS)}")
    assert done.returncode == 0, done.stderr
    return job


@pytest.fixture(scope="module")
def calfield_job(run_job: Run, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished job for the phase calibrator, which the second EB does not have."""
    base = tmp_path_factory.mktemp("calfields")
    then = f'case $1 in {SECOND}) sed -i s/J0440+1437/J0440+1438/ "$eb"/*.xml ;; esac'
    fetch = fetch_from(store, base, then)
    done = run_job(base / "WORK1", fetch=fetch, blocks=[FIRST, SECOND], calfields=["J0440+1437"])
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
def refused_job(run_job: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished job that asks for a real calibrator, the science target and all kinds of patterns."""
    job = tmp_path_factory.mktemp("refused") / "WORK1"
    done = run_job(job, blocks=[FIRST], calfields=["J0510+1800", *REFUSED])
    assert done.returncode == 0, done.stderr
    return job


# --- what is restored -----------------------------------------------------------------------------------------------


def identical(found: Mapping[str, Any]) -> bool:
    """Whether two measurement sets were found to be the same, and to be worth a comparison."""
    assert found["rows"][0] > 0
    # The flags of the channel edges and of an antenna; the weights that the calibration made.
    assert 0.09 < found["flagged"] < 0.2
    assert found["weights"] > 100
    return found["rows"][0] == found["rows"][1] and all(found["columns"].values())


@pytest.mark.parametrize("uid", SESSION_OF)
def test_restored_data_weights_and_flags_are_those_of_the_first_calibration_bit_by_bit(
    full_job: Path, store: Path, in_worker: Callable[..., Any], uid: str
) -> None:
    found = in_worker(COMPARE, full_job / "products" / product_of(uid), store / "expected" / product_of(uid))
    assert identical(found), found
    assert set(found["columns"]) >= {"DATA", "WEIGHT", "SIGMA", "FLAG", "FLAG_ROW"}


@pytest.mark.parametrize("uid", SESSION_OF)
def test_restored_data_are_really_calibrated(full_job: Path, in_worker: Callable[..., Any], uid: str) -> None:
    calibrated = in_worker(LOOK, full_job / "products" / product_of(uid))
    for field, flux in {"J0510+1800": 2.5, "J0440+1437": 0.4, "HL_Tau": 0.1}.items():
        assert calibrated[field]["windows"] == [0, 1]
        assert calibrated[field]["amplitude"] == pytest.approx(flux, rel=0.1)
        assert calibrated[field]["phase"] < (2 if flux > 1 else 10 if field.startswith("J") else 45)


def test_raw_data_are_not_calibrated_and_differ_between_ebs(store: Path, in_worker: Callable[..., Any]) -> None:
    raw = in_worker(LOOK, store / "imported" / f"{sanitized(FIRST)}.ms")
    assert raw["J0510+1800"]["phase"] > 90
    first, second = (in_worker(LOOK, store / "expected" / product_of(uid)) for uid in (FIRST, SECOND))
    assert first["HL_Tau"]["amplitude"] != second["HL_Tau"]["amplitude"]


def test_an_eb_that_did_not_pass_has_raw_data_and_no_product(full_job: Path, store: Path) -> None:
    assert (store / "raw" / sanitized(SEMI_PASS) / "ASDM.xml").is_file()
    assert products_of(full_job) == sorted(product_of(uid) for uid in SESSION_OF)
    assert SEMI_PASS not in report_of(full_job)["execution_blocks"]


def test_a_raw_measurement_set_is_taken_as_well_as_an_asdm(
    run_job: Run, store: Path, tmp_path: Path, in_worker: Callable[..., Any]
) -> None:
    raw = shlex.quote(str(store / "imported" / f"{sanitized(FIRST)}.ms"))
    fetch = fetch_from(store, tmp_path, f'rm -r "$eb"; mkdir "$eb"; ln -s {raw} "$eb/$eb.ms"')
    done = run_job(tmp_path / "WORK1", fetch=fetch, blocks=[FIRST])
    assert done.returncode == 0, done.stderr
    expected = store / "expected" / product_of(FIRST)
    assert identical(in_worker(COMPARE, tmp_path / "WORK1" / "products" / product_of(FIRST), expected))
    assert report_of(tmp_path / "WORK1")["execution_blocks"][FIRST]["raw"] == "ms"
    assert not any("importasdm" in command for command in report_of(tmp_path / "WORK1")["commands"])


def test_a_restored_measurement_set_is_healthy(full_job: Path) -> None:
    assert check_measurement_set(full_job / "products" / product_of(FIRST)).verdict in (
        Verdict.OK,
        Verdict.DEPENDS_ON_LOCK,
    )


def test_a_full_request_leaves_the_report_and_what_explains_its_calibration(full_job: Path) -> None:
    report = report_of(full_job)
    assert report["engine"] == "casatasks"
    assert re.fullmatch(r"\d+(\.\d+)+", report["restored_by"]["casa"])
    assert report["not_calibrators"] == []
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", report["started"])
    assert report["started"] <= report["ended"]
    entry = report["execution_blocks"][SECOND]
    assert 5e6 < entry.pop("raw_bytes") < 10e6
    assert 5e6 < entry.pop("ms_bytes") < 20e6
    assert entry == {
        "ms": product_of(SECOND),
        "session": "session_4",
        "raw": "asdm",
        "flag_version": "Pipeline_Final",
        "fields": ["HL_Tau", "J0440+1437", "J0510+1800"],
        "left_out": [],
        "without_calfields": False,
    }
    assert {path.name for path in (full_job / "auxiliary").iterdir()} == {
        "casa_commands.log",
        *(caltables_of(uid) for uid in SESSION_OF),
        *(f"{sanitized(uid)}.ms.calapply.txt" for uid in SESSION_OF),
    }
    assert (full_job / "auxiliary" / "casa_commands.log").read_text().splitlines() == report["commands"]
    tasks = [command.split("(")[0] for command in report["commands"]]
    assert tasks == ["importasdm"] * 3 + ["flagmanager", "applycal", "applycal", "applycal", "mstransform"] * 3


def test_the_report_names_no_path_of_the_host(full_job: Path) -> None:
    text = (full_job / "report.json").read_text()
    assert str(full_job) not in text
    assert not re.search(r"['\" ]/", text)


def test_nothing_of_the_size_of_the_data_is_left_beside_the_products(full_job: Path) -> None:
    assert not list((full_job / "working").glob("*.ms"))


# --- calibrators ----------------------------------------------------------------------------------------------------


def test_a_calfield_request_gives_these_fields_only_and_no_auxiliary_files(
    calfield_job: Path, store: Path, in_worker: Callable[..., Any]
) -> None:
    assert products_of(calfield_job) == [product_of(FIRST)]
    product = calfield_job / "products" / product_of(FIRST)
    assert list(in_worker(LOOK, product)) == ["J0440+1437"]
    assert identical(in_worker(COMPARE, product, store / "expected" / product_of(FIRST), 1))
    assert list((calfield_job / "auxiliary").iterdir()) == []


def test_fields_reach_casa_as_ids_only_and_only_those_asked_for(calfield_job: Path) -> None:
    calls = [command for command in report_of(calfield_job)["commands"] if "field=" in command]
    assert len(calls) == 2
    assert all("field='1'" in command for command in calls)


def test_an_eb_without_the_field_yields_no_product_and_is_named(calfield_job: Path) -> None:
    entry = report_of(calfield_job)["execution_blocks"][SECOND]
    assert (entry["ms"], entry["fields"], entry["without_calfields"]) == (None, [], True)


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
    assert (report["commands"], report["execution_blocks"]) == ([], {})
    assert "J0510+1800" not in {entry["field"] for entry in report["not_calibrators"]}


def test_a_field_that_is_a_target_in_one_eb_only_is_no_calibrator(run_job: Run, store: Path, tmp_path: Path) -> None:
    # In the second EB the target bears the phase calibrator's name, beside the calibrator itself.
    then = f'case $1 in {SECOND}) sed -i s/HL_Tau/J0440+1437/ "$eb/Field.xml" ;; esac'
    fetch = fetch_from(store, tmp_path, then)
    done = run_job(tmp_path / "WORK1", fetch=fetch, blocks=[FIRST, SECOND], calfields=CALFIELDS)
    assert done.returncode == 0, done.stderr
    reasons = {entry["field"]: entry["reason"] for entry in report_of(tmp_path / "WORK1")["not_calibrators"]}
    assert reasons == {
        "J0440+1437": f"it is observed as science target (OBSERVE_TARGET) in {sanitized(SECOND)}",
    }
    assert products_of(tmp_path / "WORK1") == []


# --- what ends a job ------------------------------------------------------------------------------------------------


def failed(done: subprocess.CompletedProcess[str], job: Path, message: str) -> None:
    assert done.returncode == 1
    assert message in done.stderr
    assert not (job / "report.json").exists()
    assert products_of(job) == []


@pytest.mark.parametrize(
    "name", [caltables_of(SECOND), *(f"{sanitized(SECOND)}.ms.{end}" for end in ("calapply.txt", "flagversions.tgz"))]
)
def test_a_missing_product_fails_the_job_before_casa_starts(
    run_job: Run, store: Path, tmp_path: Path, name: str
) -> None:
    fetch = fetch_from(store, tmp_path, f'rm -f "$products/{name}"')
    done = run_job(tmp_path / "WORK1", fetch=fetch, blocks=[FIRST, SECOND])
    failed(done, tmp_path / "WORK1", f"products/{name} is missing")
    assert "Importing" not in done.stdout


INCOMPLETE = {
    "a BDF is missing": ("rm ASDMBinary/*_X18", "there is no ASDMBinary/uid___A002_Xcf92df_X18, which Main.xml"),
    "a BDF is empty": (": > ASDMBinary/uid___A002_Xcf92df_X18", "X18 has 0 bytes and is cut"),
    "a BDF is cut": ("truncate -s -1000 ASDMBinary/uid___A002_Xcf92df_X18", "X18 has 350710 bytes and is cut"),
    "a BDF lost its last bytes": ("truncate -s -4 ASDMBinary/*_X18", "the mark of its end is missing"),
    "all BDFs are missing": ("rm -r ASDMBinary", "there is no ASDMBinary/uid___A002_Xcf92df_X15, which Main.xml"),
    "Main is cut": ("truncate -s -100 Main.xml", "Main.xml is empty or cut"),
    "Main is cut between its rows": (
        "head -n 20 Main.xml >m; echo '</MainTable>' >>m; mv m Main.xml", "rows, and ASDM.xml says 22"
    ),
    "Main is damaged": ("sed -i s/dataUID/dataUIE/ Main.xml", "Main.xml cannot be read: mismatched tag"),
    "Main refers to a path": ("sed -i s,uid://A002/Xcf92df/X18,../../Main.xml, Main.xml", "which is no UID"),
    "a table is missing": ("rm Antenna.xml", "there is neither Antenna.xml nor Antenna.bin"),
    "a table is empty": (": > SpectralWindow.xml", "SpectralWindow.xml is empty or cut"),
    "a table is cut": ("truncate -s -200 Field.xml", "Field.xml is empty or cut"),
    "a binary table is missing": ("rm SysCal.bin", "there is no SysCal.bin"),
    "a binary table is cut": ("truncate -s -1000 SysCal.bin", "SysCal.bin has"),
    "the index is cut": ("truncate -s -1000 ASDM.xml", "ASDM.xml cannot be read"),
    "the index is empty": (": > ASDM.xml", "ASDM.xml cannot be read"),
    "the index names no data": ("sed -i 's/<NumberRows> 22 /<NumberRows> 0 /g' ASDM.xml", "names no rows of Main"),
}  # fmt: skip
CHECK_RAW_DATA = "import sys, calibrate; sys.exit(calibrate.check_raw_data())"


def looked_at(job: Path) -> subprocess.CompletedProcess[str]:
    """Look at the raw data of a job as its run.sh does, with a Python that has no CASA."""
    words = [sys.executable, "-B", "-c", CHECK_RAW_DATA]
    return subprocess.run(words, cwd=job, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture(scope="module")
def raw_job(casa_python: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job directory with the raw data of one EB, before anything is done."""
    job = tmp_path_factory.mktemp("raw") / "WORK1"
    make_job(job, casa_python, store, blocks=[FIRST])
    (job / "working").mkdir()
    return job


@pytest.mark.parametrize("case", INCOMPLETE)
def test_an_incomplete_asdm_is_told_by_what_it_lacks(raw_job: Path, store: Path, case: str) -> None:
    raw = raw_job / "rawdata" / sanitized(FIRST)
    shutil.rmtree(raw, ignore_errors=True)
    shutil.copytree(store / "raw" / sanitized(FIRST), raw)
    assert looked_at(raw_job).returncode == 0
    spoil, message = INCOMPLETE[case]
    subprocess.run(["sh", "-c", spoil], cwd=raw, timeout=30, check=True)
    done = looked_at(raw_job)
    assert done.returncode == 1
    assert f"calibrate.py: failed: {sanitized(FIRST)}: " in done.stderr and message in done.stderr
    assert "Traceback" not in done.stderr


def test_casa_does_not_start_with_an_incomplete_asdm(run_job: Run, store: Path, tmp_path: Path) -> None:
    fetch = fetch_from(store, tmp_path, 'rm "$eb/ASDMBinary/uid___A002_Xd33a12_X18" || :')
    done = run_job(tmp_path / "WORK1", fetch=fetch, blocks=[FIRST, SECOND])
    failed(done, tmp_path / "WORK1", "there is no ASDMBinary/uid___A002_Xd33a12_X18, which Main.xml refers to")
    assert "CASA 6" not in done.stdout and "Importing" not in done.stdout


def test_a_failure_of_the_last_eb_leaves_no_product_of_the_first(run_job: Run, store: Path, tmp_path: Path) -> None:
    then = f'case $1 in {SECOND}) sed -i s/gcal.tbl/other.tbl/g "$products/$eb.ms.calapply.txt" ;; esac'
    done = run_job(tmp_path / "WORK1", fetch=fetch_from(store, tmp_path, then), blocks=[FIRST, SECOND])
    failed(done, tmp_path / "WORK1", "solintinf.other.tbl' is not in " + caltables_of(SECOND))
    assert (tmp_path / "WORK1" / "working" / product_of(FIRST)).is_dir()


def test_flags_without_the_final_version_fail_the_job(run_job: Run, store: Path, tmp_path: Path) -> None:
    then = (
        'cd "$products"; tar xzf "$eb.ms.flagversions.tgz"; rm -r "$eb.ms.flagversions/flags.Pipeline_Final"; '
        'tar czf "$eb.ms.flagversions.tgz" "$eb.ms.flagversions"'
    )
    done = run_job(tmp_path / "WORK1", fetch=fetch_from(store, tmp_path, then), blocks=[FIRST])
    failed(done, tmp_path / "WORK1", f"{sanitized(FIRST)}.ms.flagversions.tgz: has no flag version Pipeline_Final")


def test_raw_data_that_are_not_those_of_the_first_calibration_fail_the_job(
    run_job: Run, store: Path, tmp_path: Path
) -> None:
    # One row of the ASDM is lost, and its index does not know it either.
    lose = (
        "import re, sys; path = sys.argv[1] + '/Main.xml'; text = open(path).read(); "
        "open(path, 'w').write(re.sub('<row>(?:(?!</row>).)*</row>', '', text, count=1, flags=re.S)); "
        "path = sys.argv[1] + '/ASDM.xml'; text = open(path).read(); "
        "open(path, 'w').write(re.sub('(<Name> Main </Name> <NumberRows>) 22 ', r'\\1 21 ', text))"
    )
    fetch = fetch_from(store, tmp_path, f'{shlex.quote(sys.executable)} -c {shlex.quote(lose)} "$eb"')
    done = run_job(tmp_path / "WORK1", fetch=fetch, blocks=[FIRST])
    failed(done, tmp_path / "WORK1", "they are not what was calibrated")


def test_calibration_that_changes_nothing_fails_the_job(
    run_job: Run, store: Path, tmp_path: Path, casa_python: Path
) -> None:
    unity = (
        "import sys, casacore.tables as t\n"
        "for name in sys.argv[1:]:\n"
        "    c = t.table(name, readonly=False, ack=False)\n"
        "    c.putcol('CPARAM', c.getcol('CPARAM') * 0 + 1)\n"
    )
    name = caltables_of(FIRST)
    then = (
        f'cd "$products"; tar xzf {name}; {shlex.quote(str(casa_python))} -c {shlex.quote(unity)} *.tbl; '
        f"tar czf {name} *.tbl"
    )
    done = run_job(
        tmp_path / "WORK1", fetch=fetch_from(store, tmp_path, then), blocks=[FIRST], calfields=["J0510+1800"]
    )
    failed(done, tmp_path / "WORK1", "were not calibrated")


# Stands in front of CASA: the second call of applycal gets as far as the first window, then everything is killed.
KILLED = """
import os, signal, sys
here = sys.path.pop(0)
del sys.modules["casatasks"]
import casatasks
sys.path.insert(0, here)
calls, real = [], casatasks.applycal
def applycal(**arguments):
    calls.append(arguments)
    if len(calls) == 2:
        arguments["spw"] = "0"
    real(**arguments)
    if len(calls) == 2:
        os.killpg(os.getpgrp(), signal.SIGKILL)
casatasks.applycal = applycal
"""


def test_a_job_killed_in_the_middle_of_applycal_is_never_taken_up_and_a_new_one_gives_identical_data(
    run_job: Run, store: Path, tmp_path: Path, casa_python: Path, in_worker: Callable[..., Any]
) -> None:
    script = make_job(tmp_path / "WORK1", casa_python, store, blocks=[THIRD])
    shim = tmp_path / "WORK1" / "casatasks.py"
    shim.write_text(KILLED)
    process = subprocess.Popen([script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    assert process.wait(60) == -9
    working = tmp_path / "WORK1" / "working" / f"{sanitized(THIRD)}.ms"
    # It looks fine to anybody: it opens, and has a column of corrected data.
    columns = "import json, sys, casacore.tables as t; print(json.dumps(t.table(sys.argv[1], ack=False).colnames()))"
    assert "CORRECTED_DATA" in in_worker(columns, working)
    assert products_of(tmp_path / "WORK1") == []
    assert not (tmp_path / "WORK1" / "report.json").exists()

    shim.unlink()
    again = subprocess.run([script], capture_output=True, text=True, timeout=60, check=False)
    assert again.returncode != 0
    words = [casa_python, tmp_path / "WORK1" / "calibrate.py"]
    failed(
        subprocess.run(words, capture_output=True, text=True, timeout=60, check=False),
        tmp_path / "WORK1",
        "what an earlier run left is never used, start a new job",
    )

    done = run_job(tmp_path / "WORK2", blocks=[THIRD])
    assert done.returncode == 0, done.stderr
    expected = store / "expected" / product_of(THIRD)
    assert identical(in_worker(COMPARE, tmp_path / "WORK2" / "products" / product_of(THIRD), expected))


def test_a_job_directory_is_used_once(full_job: Path) -> None:
    before = (full_job / "report.json").read_text()
    done = subprocess.run([full_job / "run.sh"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert (full_job / "report.json").read_text() == before


# Stands in front of CASA: each task tells who holds the locks of the measurement sets, and applycal calls it SEVERE.
LOOKED_AT = """
import sys
here = sys.path.pop(0)
del sys.modules["casatasks"]
import casatasks
sys.path.insert(0, here)
sys.path.append({checkout!r})
from pathlib import Path
from stagecal.measurement_set.lock import lock_states
def looked_at(name):
    real = getattr(casatasks, name)
    def task(**arguments):
        paths = [arguments[one] for one in ("vis", "outputvis") if one in arguments]
        print(name, *[lock_states(Path(path))[0].held for path in paths])
        real(**arguments)
        if name == "mstransform":
            casatasks.casalog.post("a window has no solutions", "SEVERE")
    setattr(casatasks, name, task)
for name in ("importasdm", "flagmanager", "applycal", "mstransform"):
    looked_at(name)
"""


def test_every_task_works_under_locks_and_what_it_calls_severe_fails_the_job(
    run_job: Run, store: Path, tmp_path: Path, casa_python: Path
) -> None:
    script = make_job(tmp_path / "WORK1", casa_python, store, blocks=[FIRST], calfields=["J0510+1800"])
    checkout = str(Path(__file__).parents[2])
    (tmp_path / "WORK1" / "casatasks.py").write_text(LOOKED_AT.format(checkout=checkout))
    done = subprocess.run([script], capture_output=True, text=True, timeout=60, check=False)
    failed(done, tmp_path / "WORK1", "mstransform said: ")
    assert "a window has no solutions" in done.stderr
    for line in ("importasdm True", "flagmanager True", "applycal True", "mstransform True True"):
        assert line in done.stdout.splitlines()


# --- the archived calls of applycal ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine() -> Any:
    """What calibrate.py consists of, without CASA."""
    return SimpleNamespace(**runpy.run_path(str(TEMPLATES / "casa" / "calibrate.py")))


LINE = (
    f"applycal(vis='/opt/far/away/{sanitized(FIRST)}.ms', field='J0440+1437', intent='PHASE', spw='0,1', "
    "antenna='0~9', gaintable=['/opt/far/away/b.tbl', 'g.tbl'], gainfield=['', 'nearest'], spwmap=[[], [0, 0]], "
    "interp=['linear,linear', 'nearest'], calwt=[True, False])"
)


@pytest.fixture
def block(engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An EB whose session has the tables b.tbl and g.tbl; the current directory is a job's working/."""
    for name in ("working/session_2/b.tbl", "working/session_2/g.tbl", "products"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("b.tbl", "g.tbl"):
        (tmp_path / "working" / "session_2" / name / "table.dat").touch()
    monkeypatch.chdir(tmp_path / "working")
    names = {"session": "session_2", "caltables": "c.tgz", "finalflags": "f.tgz", "applycmds": "calapply.txt"}
    return engine.Block(FIRST, names)


class Observed:
    """What the engine knows of an observation: three fields with one intent each, two windows of ten antennas."""

    names = ("J0510+1800", "J0440+1437", "HL_Tau")
    antenna_count, window_count = 10, 2
    modes = (
        {"CALIBRATE_BANDPASS#ON_SOURCE"},
        {"CALIBRATE_PHASE#ON_SOURCE"},
        {"OBSERVE_TARGET#ON_SOURCE"},
        {"CALIBRATE_POINTING#ON_SOURCE"},
    )
    intents = modes[:3]
    all_intents = frozenset().union(*modes[:3])
    cells = frozenset((number, window, number) for number in range(3) for window in range(2))
    data = ({0, 1},) * 3
    windows = (0, 1)

    def rows(self, name: str) -> list[int]:
        return [row for row, other in enumerate(self.names) if other == name]


def commands_of(engine: Any, block: Any, text: str) -> Any:
    Path("../products/calapply.txt").write_text(text)
    return engine.read_apply_commands(block)


def test_a_line_of_the_pipeline_becomes_the_same_call_by_ids(engine: Any, block: Any) -> None:
    (command,) = commands_of(engine, block, f"# Apply file for {sanitized(FIRST)}.ms\n{LINE}")
    arguments = dict(engine.Application(command, block, Observed()).arguments(block, [0, 1, 2]))
    assert arguments == {
        "vis": f"{sanitized(FIRST)}.ms",
        "field": "1",
        "intent": "CALIBRATE_PHASE#ON_SOURCE",
        "spw": "0,1",
        "antenna": "*&*",
        "gaintable": ["session_2/b.tbl", "session_2/g.tbl"],
        "gainfield": ["", "nearest"],
        "spwmap": [[], [0, 0]],
        "interp": ["linear,linear", "nearest"],
        "calwt": [True, False],
        "parang": False,
        "applymode": "calflagstrict",
        "flagbackup": False,
    }


def test_tables_of_the_polarisation_calibration_are_applied_with_the_parallactic_angle(engine: Any, block: Any) -> None:
    Path("session_2/b.tbl").rename("session_2/x.hifa_polcal.tbl")
    (command,) = commands_of(engine, block, LINE.replace("b.tbl", "x.hifa_polcal.tbl"))
    assert dict(engine.Application(command, block, Observed()).settings)["parang"] is True


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("applycal(", "os.system(", "only applycal"),
        ("applycal(", "__import__('os').system(", "only applycal"),
        ("'0,1'", "__import__('os').system('touch pwned')", "only applycal"),
        ("'0,1'", "'%s' % 1", "only applycal"),
        ("spw=", "**", "only applycal"),
        ("vis=", "", "only applycal"),
        ("applycal(", "applycal((", "only applycal"),
        ("calwt=", "callib=", "unknown or given twice"),
        ("spw=", "msselect=", "unknown or given twice"),
        (sanitized(FIRST), sanitized(SECOND), f"not for {sanitized(FIRST)}.ms"),
        ("vis='/opt/far/away/", "vis='/opt/far/away/../", None),
    ],
)
def test_only_literal_calls_of_applycal_for_this_eb_are_read(
    engine: Any, block: Any, before: str, after: str, message: str | None
) -> None:
    text = LINE.replace(before, after, 1)
    assert text != LINE
    if message is None:
        assert commands_of(engine, block, text)
        return
    with pytest.raises(engine.JobError, match=re.escape(message)):
        commands_of(engine, block, text)
    assert not Path("pwned").exists()


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("'J0440+1437'", "'J*'", "selects by something else"),
        ("'J0440+1437'", "'/J.*/'", "selects by something else"),
        ("'J0440+1437'", "'>0'", "selects by something else"),
        ("'J0440+1437'", "'!HL_Tau'", "selects by something else"),
        ("'J0440+1437'", "'7'", "selects by something else"),
        ("'J0440+1437'", "['J0440+1437']", "should be a text"),
        ("'PHASE'", "'P*E'", "is unknown"),
        ("'0,1'", "'0:1~3'", "selects by something else"),
        ("'0,1'", "'2'", "selects by something else"),
        ("'0~9'", "'0~4'", "some antennas only"),
        ("'g.tbl'", "'other.tbl'", "is not in c.tgz"),
        ("'g.tbl'", "'session_2/..'", "is not in c.tgz"),
        ("'nearest'],", "'nearest', ''],", "3 values for 2 tables"),
        ("'nearest'],", "'J*'],", "selects by something else"),
        ("[0, 0]", "['0']", "should be lists of ids"),
        ("[True, False]", "'yes'", "should be True or False"),
        ("'linear,linear'", "'linear;rm'", "interp"),
        ("calwt=", "applymode='trial', calwt=", "calibrates nothing"),
    ],
)
def test_what_a_line_selects_are_ids_names_and_tables_that_exist(
    engine: Any, block: Any, before: str, after: str, message: str
) -> None:
    text = LINE.replace(before, after, 1)
    assert text != LINE
    (command,) = commands_of(engine, block, text)
    with pytest.raises(engine.JobError, match=re.escape(message)):
        engine.Application(command, block, Observed())


def coverage(engine: Any, block: Any, *lines: str, observed: Any = None) -> Any:
    observed = observed or Observed()
    applications = [engine.Application(one, block, observed) for one in commands_of(engine, block, "\n".join(lines))]
    return engine.check_coverage(applications, observed, [0, 1, 2])


BANDPASS, TARGET = (
    LINE.replace("J0440+1437", name).replace("PHASE", word)
    for name, word in (("J0510+1800", "AMPLITUDE,BANDPASS"), ("HL_Tau", "TARGET"))
)


def test_every_field_that_is_delivered_has_to_be_calibrated_in_all_windows(engine: Any, block: Any) -> None:
    assert coverage(engine, block, BANDPASS, LINE, TARGET) == [0, 1, 2]
    with pytest.raises(engine.JobError, match=r"no calibration of field 2 \(HL_Tau\) in the spectral windows 0,1"):
        coverage(engine, block, BANDPASS, LINE)
    with pytest.raises(engine.JobError, match=r"no calibration of field 2 \(HL_Tau\) in the spectral windows 1"):
        coverage(engine, block, BANDPASS, LINE, TARGET.replace("'0,1'", "'0'"))


@pytest.mark.parametrize(
    ("words", "intents"),
    [
        ("PHASE,WVR,POINTING", "CALIBRATE_PHASE#ON_SOURCE"),
        ("*PHASE*", "CALIBRATE_PHASE#ON_SOURCE"),
        ("", "CALIBRATE_BANDPASS#ON_SOURCE,CALIBRATE_PHASE#ON_SOURCE,OBSERVE_TARGET#ON_SOURCE"),
    ],
)
def test_only_intents_that_a_restore_calibrates_are_selected(engine: Any, block: Any, words: str, intents: str) -> None:
    (command,) = commands_of(engine, block, LINE.replace("PHASE", words))
    application = engine.Application(command, block, Observed())
    assert dict(application.arguments(block, [1]))["intent"] == intents
    assert application.cells == {(1, 0, 1), (1, 1, 1)}


def test_a_line_for_intents_that_were_not_observed_calibrates_nothing(engine: Any, block: Any) -> None:
    (command,) = commands_of(engine, block, LINE.replace("PHASE", "CHECK"))
    application = engine.Application(command, block, Observed())
    assert application.cells == set()
    assert application.observed([0, 1, 2]) == set()


def test_a_field_that_was_observed_for_pointing_only_is_left_out(engine: Any, block: Any) -> None:
    observed = Observed()
    observed.modes = (*observed.modes[:2], observed.modes[3])
    observed.intents = observed.modes
    assert coverage(engine, block, BANDPASS, LINE, observed=observed) == [0, 1]


def test_two_lines_that_calibrate_the_same_data_differently_are_refused(engine: Any, block: Any) -> None:
    assert coverage(engine, block, BANDPASS, LINE, LINE, TARGET) == [0, 1, 2]
    with pytest.raises(engine.JobError, match="it calibrates other than a line before"):
        coverage(engine, block, BANDPASS, LINE, LINE.replace("[True, False]", "True"), TARGET)


def test_a_file_without_a_call_is_refused(engine: Any, block: Any) -> None:
    with pytest.raises(engine.JobError, match="has no call of applycal"):
        commands_of(engine, block, "# Apply file\n\n")


@pytest.mark.parametrize("name", ["../c.tgz", "/c.tgz", "", None, "-c.tgz", "c tgz"])
def test_names_of_products_in_a_job_are_plain(engine: Any, name: object) -> None:
    names = {"session": "session_2", "caltables": name, "finalflags": "f.tgz", "applycmds": "a.txt"}
    with pytest.raises(engine.JobError, match="should be a plain name"):
        engine.Block(FIRST, names)


# --- archived tables ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["link", "hard link", "parent", "absolute", "device", "of another EB"])
def test_archived_tables_expand_into_their_directory_only(engine: Any, tmp_path: Path, kind: str) -> None:
    hostile = tmp_path / "hostile.tgz"
    names = {"parent": "a/../../escaped", "absolute": str(tmp_path / "escaped"), "of another EB": "other.ms/escaped"}
    member = tarfile.TarInfo(names.get(kind, "escaped"))
    member.type = {"link": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "device": tarfile.CHRTYPE}.get(
        kind, tarfile.REGTYPE
    )
    member.linkname = str(tmp_path) if "link" in kind else ""
    with tarfile.open(hostile, "w:gz") as archive:
        archive.addfile(member)
    with pytest.raises(engine.JobError, match="is refused"):
        engine.expand(str(hostile), str(tmp_path / "working"), only="x.ms.flagversions")
    if kind != "of another EB":
        with pytest.raises(engine.JobError, match="is refused"):
            engine.expand(str(hostile), str(tmp_path / "working"))
    assert not list(tmp_path.rglob("escaped"))


def test_archived_tables_that_were_cut_off_are_not_expanded(engine: Any, store: Path, tmp_path: Path) -> None:
    whole = (store / "products" / sanitized(MOUS) / caltables_of(FIRST)).read_bytes()
    (tmp_path / "cut.tgz").write_bytes(whole[:-9])
    with pytest.raises(EOFError):
        engine.expand(str(tmp_path / "cut.tgz"), str(tmp_path / "working"))
    assert not (tmp_path / "working").exists()


# --- the store ------------------------------------------------------------------------------------------------------


def fetched(program: Path, name: str, directory: Path, worker: object) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], **({"STAGECAL_CASA_WORKER": str(worker)} if worker else {})}
    directory.mkdir(exist_ok=True)
    return subprocess.run(
        [program, name], cwd=directory, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_the_texts_of_the_archive_are_there_without_casa_and_agree(tmp_path: Path) -> None:
    make_store(tmp_path / "store", [unit_of_tests()])
    stem = f"member.{sanitized(MOUS)}.hifa_calimage."
    names = ("pipeline_manifest.xml", "casa_piperestorescript.py", "casa_pipescript.py")
    for name in names:
        done = fetched(tmp_path / "store" / "fetch_product.sh", stem + name, tmp_path / "here", None)
        assert done.returncode == 0, done.stderr
    manifest, script, pipescript = ((tmp_path / "here" / (stem + name)).read_text() for name in names)
    sessions = {session.number: session.execution_blocks for session in read_manifest(manifest).layout}
    assert sessions == {2: (FIRST,), 4: (SECOND, THIRD)}
    layout = read_restore_script(script).layout
    assert layout is not None and {session.number: session.execution_blocks for session in layout} == sessions
    assert read_restore_script(script).other_calls == ()
    facts = read_pipescript(pipescript)
    assert (facts.mous, facts.project, facts.gous_uid) == (MOUS, "2017.1.01347.S", "uid://A001/X12a3/X80d")
    # The names in the oldest manifests are not those of the files.
    (first, _) = read_manifest(manifest).sessions
    assert first.caltables == caltables_of(FIRST).removeprefix("member.")


def test_the_embedded_store_has_or_can_make_every_file_that_its_archive_lists(tmp_path: Path) -> None:
    make_site(tmp_path / "site")
    units = archived_units(tmp_path / "site" / "archive.db")
    assert {unit.mous for unit in units} >= {"uid://A001/X12a3/X80e", "uid://A001/X159a/X6b"}
    index = (tmp_path / "site" / "store" / "index").read_text().splitlines()
    for unit in units:
        name = sanitized(unit.mous)
        texts = {path.name for path in (tmp_path / "site" / "store" / "products" / name).iterdir()}
        made = set(json.loads((tmp_path / "site" / "store" / "mous" / f"{name}.json").read_text())["files"])
        assert texts | made == set(unit.files) and not texts & made
        assert {f"{file} {name}" for file in unit.files} <= set(index)
        (manifest,) = (tmp_path / "site" / "store" / "products" / name).glob("*pipeline_manifest.xml")
        passed = [tuple(uid for uid, calibrated in blocks if calibrated) for _, blocks in unit.sessions]
        expected = {number: blocks for number, blocks in enumerate(passed, 1) if blocks}
        assert {one.number: one.execution_blocks for one in read_manifest(manifest.read_text()).layout} == expected


def test_a_mous_is_made_once_at_its_first_use_by_whoever_comes_first(tmp_path: Path, casa_python: Path) -> None:
    unit = unit_of_tests()
    # One EB makes it quick.
    files = [
        name
        for name in unit.files
        if "session_4" not in name and not name.startswith((sanitized(SECOND), sanitized(THIRD)))
    ]
    store = tmp_path / "store"
    make_store(store, [type(unit)(unit.mous, unit.sessions[1:2], tuple(files), unit.facts)])
    asked = {"fetch_product.sh": f"{sanitized(FIRST)}.ms.calapply.txt", "fetch_raw.sh": FIRST}
    ended: dict[str, subprocess.CompletedProcess[str]] = {}

    def fetch(program: str) -> None:
        ended[program] = fetched(store / program, asked[program], tmp_path / program[:-3], casa_python)

    threads = [threading.Thread(target=fetch, args=[program]) for program in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [done.returncode for done in ended.values()] == [0, 0], ended
    told = "".join(done.stderr for done in ended.values())
    assert told.count(f"{sanitized(MOUS)} made in") == 1
    assert (tmp_path / "fetch_raw" / sanitized(FIRST) / "ASDM.xml").is_file()
    assert "applycal(" in (tmp_path / "fetch_product" / asked["fetch_product.sh"]).read_text()
    assert {path.name for path in (store / "products" / sanitized(MOUS)).iterdir()} == set(files)
    assert not list(store.glob(".uid*"))


def test_a_file_that_the_store_has_is_kept_when_what_lacks_is_made(
    store: Path, tmp_path: Path, casa_python: Path
) -> None:
    copy = tmp_path / "store"
    for name in ("mous", "products", "raw"):
        shutil.copytree(store / name, copy / name)
    for name in ("make_example_data.py", "casasiteconfig.py"):
        shutil.copy(store / name, copy)
    kept = copy / "products" / sanitized(MOUS) / caltables_of(FIRST)
    before = kept.stat()
    words = [casa_python, copy / "make_example_data.py", copy, MOUS]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == f"{sanitized(MOUS)} is there already\n"
    after = kept.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert not list(copy.glob(".uid*"))


def test_the_example_is_packed_as_the_archive_packs(store: Path) -> None:
    products = store / "products" / sanitized(MOUS)
    with tarfile.open(products / caltables_of(SECOND)) as archive:
        tables = {name.split("/")[0] for name in archive.getnames()}
    assert len(tables) == 4
    assert {name.split(".ms.")[0] for name in tables} == {sanitized(SECOND), sanitized(THIRD)}
    with tarfile.open(products / f"{sanitized(FIRST)}.ms.flagversions.tgz") as archive:
        listed = archive.extractfile(f"{sanitized(FIRST)}.ms.flagversions/FLAG_VERSION_LIST")
        assert listed is not None
        assert [line.split(" : ")[0] for line in listed.read().decode().splitlines()] == [
            "Pipeline_Final", "after_deterministic_flagging",
        ]  # fmt: skip
    lines = (products / f"{sanitized(FIRST)}.ms.calapply.txt").read_text().splitlines()
    assert lines[0] == f"# Apply file for {sanitized(FIRST)}.ms"
    assert [line.split("(")[0] for line in lines[1:]] == ["applycal"] * 3


@pytest.mark.parametrize("name", ["calibrate.py", "finish_restore.py"])
def test_scripts_for_casa_can_be_read_by_the_python_of_old_casa(name: str) -> None:
    source = (TEMPLATES / "casa" / name).read_text()
    source.encode("ascii")
    for python in ("python2.7", "python2"):
        try:
            done = subprocess.run(
                [python, "-c", f"import sys; compile(sys.stdin.read(), '{name}', 'exec')"],
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
    of_casa = {"casatasks", "casatools", "numpy", "casac", "casadef", "taskinit", "tasks", "calibrate"}
    assert imported - of_casa <= sys.stdlib_module_names
