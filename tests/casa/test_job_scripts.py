"""The scripts of jobs and of the store: what they call with which words, and that no word becomes shell text."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from casa_jobs import FIRST, MOUS, SECOND, TEMPLATES, render, sanitized

RECORD = """#!/bin/sh
{ pwd; printf '%s\\n' "${STAGECAL_CASA_HOME-none}"; for word in "$@"; do printf '%s\\n' "$word"; done; } > "$RECORD"
"""


def program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def run_command_job(tmp_path: Path, command: Path, **values: object) -> list[str]:
    job = tmp_path / "WORK1"
    job.mkdir()
    defaults: dict[str, object] = {
        "project": "2017.1.01347.S", "mous": "uid://A001/X12a3/X80e", "execution_blocks": [FIRST, SECOND],
        "calfields": [], "raw_fetch": [], "casa_home": None,
    }  # fmt: skip
    script = program(job / "run.sh", render("job/run_command.sh", command=command, **(defaults | values)))
    record = tmp_path / "record"
    environment = {"PATH": "/usr/bin:/bin", "RECORD": str(record)}
    subprocess.run([script], cwd="/", env=environment, timeout=30, check=True)
    return record.read_text().splitlines()


def test_the_sites_command_gets_project_mous_output_and_ebs_in_the_working_directory(tmp_path: Path) -> None:
    command = program(tmp_path / "calibrate it", RECORD)
    assert run_command_job(tmp_path, command) == [
        str(tmp_path / "WORK1/working"), "none",
        "2017.1.01347.S", "uid://A001/X12a3/X80e", str(tmp_path / "WORK1/products"), FIRST, SECOND,
    ]  # fmt: skip


def test_the_sites_command_gets_calfields_and_the_casa_of_the_project(tmp_path: Path) -> None:
    command = program(tmp_path / "command", RECORD)
    record = run_command_job(
        tmp_path, command, calfields=["J0510+1800", "J0440+1437"], casa_home="/opt/casa 5.1", execution_blocks=[FIRST]
    )
    assert record[1] == "/opt/casa 5.1"
    assert record[5:] == ["--calfields", "J0510+1800,J0440+1437", FIRST]


def test_no_value_becomes_shell_text(tmp_path: Path) -> None:
    command = program(tmp_path / "command", RECORD)
    hostile = ["$(touch pwned)", "`touch pwned`", "'; touch pwned; '", "a\ttouch pwned", "-rf", "*", "$HOME"]
    record = run_command_job(tmp_path, command, execution_blocks=hostile, project=hostile[0], calfields=[hostile[2]])
    assert record[2] == hostile[0]
    assert record[5:] == ["--calfields", hostile[2], *hostile]
    assert not list(tmp_path.rglob("pwned"))


def test_raw_data_are_fetched_once_per_eb_inside_rawdata(tmp_path: Path) -> None:
    fetch = program(tmp_path / "fetch", '#!/bin/sh\npwd >> "$RECORD.fetch"; echo "$@" >> "$RECORD.fetch"\n')
    command = program(tmp_path / "command", RECORD)
    run_command_job(tmp_path, command, raw_fetch=[str(fetch), "--level", "a b"])
    where = str(tmp_path / "WORK1/rawdata")
    assert (tmp_path / "record.fetch").read_text().splitlines() == [
        where, f"--level a b {FIRST}", where, f"--level a b {SECOND}",
    ]  # fmt: skip


def test_the_job_ends_with_the_failed_fetch(tmp_path: Path) -> None:
    fetch = program(tmp_path / "fetch", "#!/bin/sh\nexit 7\n")
    command = program(tmp_path / "command", RECORD)
    with pytest.raises(subprocess.CalledProcessError) as failure:
        run_command_job(tmp_path, command, raw_fetch=[str(fetch)])
    assert failure.value.returncode == 7
    assert not (tmp_path / "record").exists()


def test_the_exit_code_of_the_sites_command_is_the_jobs(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as failure:
        run_command_job(tmp_path, program(tmp_path / "command", "#!/bin/sh\nexit 3\n"))
    assert failure.value.returncode == 3


PRODUCT, MISSING = f"{sanitized(FIRST)}.ms.calapply.txt", f"{sanitized(SECOND)}.ms.calapply.txt"


@pytest.fixture
def plain_store(tmp_path: Path) -> Path:
    """A store with one EB and one archived file, made of plain files."""
    store = tmp_path / "store"
    (store / "raw" / sanitized(FIRST) / "ASDMBinary").mkdir(parents=True)
    (store / "raw" / sanitized(FIRST) / "ASDMBinary" / "a").write_text("data")
    (store / "products" / sanitized(MOUS)).mkdir(parents=True)
    (store / "products" / sanitized(MOUS) / PRODUCT).write_text("applycal()")
    for name in ("fetch_raw.sh", "fetch_product.sh"):
        shutil.copy(TEMPLATES / "store" / name, store)
    return store


def fetch(store: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    here = store.parent / "here"
    here.mkdir(exist_ok=True)
    return subprocess.run(
        [store / program, *arguments], cwd=here, capture_output=True, text=True, timeout=30, check=False
    )


@pytest.mark.parametrize("uid", [FIRST, sanitized(FIRST)])
def test_the_store_gives_an_eb_by_either_form_of_its_uid(plain_store: Path, uid: str) -> None:
    assert fetch(plain_store, "fetch_raw.sh", uid).returncode == 0
    here = plain_store.parent / "here"
    assert [path.name for path in here.iterdir()] == [sanitized(FIRST)]
    assert (here / sanitized(FIRST) / "ASDMBinary" / "a").read_text() == "data"


def test_the_store_gives_an_archived_file_by_its_name(plain_store: Path) -> None:
    assert fetch(plain_store, "fetch_product.sh", PRODUCT).returncode == 0
    here = plain_store.parent / "here"
    assert [path.name for path in here.iterdir()] == [PRODUCT]
    assert (here / PRODUCT).read_text() == "applycal()"


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        *(
            ("fetch_raw.sh", words)
            for words in ((SECOND,), (), ("..",), ("uid://A002/X1/X1/../..",), (FIRST, FIRST), ("-r",))
        ),
        *(
            ("fetch_product.sh", words)
            for words in ((MISSING,), (), ("..",), ("",), (f"../{PRODUCT}",), (PRODUCT, PRODUCT), ("-r",), ("*.txt",))
        ),
    ],
)
def test_the_store_refuses_what_it_does_not_have(plain_store: Path, script: str, arguments: tuple[str, ...]) -> None:
    done = fetch(plain_store, script, *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(f"{script}: ")
    assert list((plain_store.parent / "here").iterdir()) == []


@pytest.mark.parametrize("script", ["fetch_raw.sh", "fetch_product.sh"])
def test_the_store_never_writes_over_what_is_there(plain_store: Path, script: str) -> None:
    name = {"fetch_raw.sh": sanitized(FIRST), "fetch_product.sh": PRODUCT}[script]
    assert fetch(plain_store, script, name).returncode == 0
    again = fetch(plain_store, script, name)
    assert again.returncode == 1
    assert f"{name} is already in the current directory" in again.stderr


def test_the_store_makes_what_it_lacks_at_first_use_only(plain_store: Path) -> None:
    makes = f'mkdir -p "raw/$1"; touch "products/{sanitized(MOUS)}/$1"'
    program(plain_store / "make", f'#!/bin/sh\ncd "$(dirname "$0")"; echo "$1" >> made; {makes}\n')
    assert fetch(plain_store, "fetch_raw.sh", FIRST).returncode == 0
    assert fetch(plain_store, "fetch_product.sh", PRODUCT).returncode == 0
    assert not (plain_store / "made").exists()
    assert fetch(plain_store, "fetch_raw.sh", SECOND).returncode == 0
    assert fetch(plain_store, "fetch_product.sh", MISSING).returncode == 0
    assert (plain_store / "made").read_text().splitlines() == [sanitized(SECOND), MISSING]


@pytest.mark.parametrize("name", [SECOND, MISSING])
def test_the_example_store_makes_nothing_that_it_does_not_list(plain_store: Path, name: str) -> None:
    shutil.copy(TEMPLATES / "store" / "make", plain_store)
    (plain_store / "index").write_text(f"{sanitized(FIRST)} {sanitized(MOUS)}\n{PRODUCT} {sanitized(MOUS)}\n")
    done = fetch(plain_store, "fetch_raw.sh" if name == SECOND else "fetch_product.sh", name)
    assert done.returncode == 1
    assert f"the store does not know {sanitized(name)}" in done.stderr


def test_the_example_store_makes_the_mous_to_which_a_name_belongs(plain_store: Path, tmp_path: Path) -> None:
    shutil.copy(TEMPLATES / "store" / "make", plain_store)
    (plain_store / "index").write_text(f"{PRODUCT} uid___A001_X1_X1\n{MISSING} {sanitized(MOUS)}\n")
    worker = program(tmp_path / "worker", '#!/bin/sh\necho "$@" >"$RECORD"\n')
    environment = {"PATH": "/usr/bin:/bin", "RECORD": str(tmp_path / "record"), "STAGECAL_CASA_WORKER": str(worker)}
    subprocess.run([plain_store / "make", MISSING], env=environment, timeout=30, check=True)
    words = (tmp_path / "record").read_text().split()
    assert words == ["-E", "-s", f"{plain_store}/make_example_data.py", str(plain_store), sanitized(MOUS)]


def test_the_scripts_are_plain_posix_shell() -> None:
    values = {
        "python": ["/p"], "raw_fetch": ["f"], "execution_blocks": [FIRST], "command": "/c", "project": "p",
        "mous": "m", "calfields": ["c"], "casa_home": "/h", "area": ".", "raw_size": [], "disk_factor": 14,
    }  # fmt: skip
    scripts = [render(f"job/{name}", **values) for name in ("run_casatasks.sh", "run_command.sh")]
    scripts += [(TEMPLATES / "store" / name).read_text() for name in ("fetch_raw.sh", "fetch_product.sh", "make")]
    for script in scripts:
        assert script.startswith("#!/bin/sh\n")
        assert "[[" not in script
        checked = subprocess.run(["/bin/sh", "-n"], input=script, text=True, capture_output=True, check=False)
        assert json.dumps(checked.stderr) == '""'
