"""The job scripts with the userland of the RHEL5 age: what they call besides is found here, and not on a site's node.

CASA, the raw data and the archived products are stand-ins; what is tried are the scripts that the service makes.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stagecal.adapters.engines import SiteEngines
from stagecal.adapters.templates import JinjaTemplates
from stagecal.config import Locks, Restore
from stagecal.domain.casa_versions import CasaChoice
from tests.domain.restore.examples import PASSED
from tests.test_engines import MEMBER, TEMPLATES, chosen, plan, request

# What scripts may use there: POSIX tools with the options of that time. No flock, realpath, stat, timeout, mktemp, env.
OLD_USERLAND = (
    *(
        "cat",
        "chmod",
        "cp",
        "cut",
        "date",
        "df",
        "dirname",
        "du",
        "grep",
        "gzip",
        "ln",
        "mkdir",
        "mv",
        "rm",
        "sed",
        "sh",
    ),
    *("sleep", "tr", "uname"),
)
EB = "uid___A002_Xcf92df_X3453"
FETCH_RAW = f"""#!/bin/sh
mkdir -p {EB}/ASDMBinary
cat >{EB}/ASDM.xml <<'END'
<ASDM><Table><Name> Main </Name><NumberRows> 1 </NumberRows></Table></ASDM>
END
cat >{EB}/Main.xml <<'END'
<MainTable><row><dataUID><EntityRef entityId="uid://A002/X1/X2"/></dataUID></row></MainTable>
END
cat >{EB}/ASDMBinary/uid___A002_X1_X2 <<'END'
Content-Type: multipart/mixed; boundary="b"

--b--
END
"""
# An archive of each kind, so that gzip -t and the expansion have something to do.
FETCH_PRODUCT = f"""#!{sys.executable}
import sys, tarfile
name = sys.argv[1]
if name.endswith(".tgz"):
    tarfile.open(name, "w:gz").close()
else:
    open(name, "w").close()
"""
# It has a Python, as CASA has, and ends every step as well as it can.
CASA = """#!/bin/sh
echo "casa $*" >>"$STAGECAL_JOB/calls"
case "$*" in *finish_restore.py*) echo '{}' >"$STAGECAL_JOB/report.json" ;; esac
"""
WORKER = f"""#!/bin/sh
case "$*" in *calibrate.py*) echo '{{}}' >report.json ;; *) exec {sys.executable} "$@" ;; esac
"""


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path


def userland(directory: Path, shell: str) -> Path:
    directory.mkdir()
    for name in OLD_USERLAND:
        found = shutil.which(shell if name == "sh" else name)
        assert found, name
        (directory / name).symlink_to(found)
    return directory


def run_job(
    tmp_path: Path, engine: str, shell: str = "sh", **settings: Any
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Run a job of an engine where nothing but the old userland is found; return its directory and how it ended."""
    home = tmp_path / "casa-4.7.2"
    program(home / "bin" / "casa", CASA)
    program(home / "bin" / "python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    program(home / "pipeline" / "pipeline" / "runpipeline.py", "")
    values: dict[str, Any] = {
        "raw_fetch": (str(program(tmp_path / "fetch_raw", FETCH_RAW)),),
        "products_fetch": (str(program(tmp_path / "fetch_product", FETCH_PRODUCT)),),
        "command": program(tmp_path / "command", '#!/bin/sh\necho "$@" >../calls\n'),
        "casa_worker": program(tmp_path / "worker", WORKER),
        **settings,
    }
    templates = JinjaTemplates(TEMPLATES)
    engines = SiteEngines(Restore(**values), Locks(), templates, TEMPLATES, tmp_path)
    casa = CasaChoice("4.7.2", str(home), "el5")
    restore = None if engine == "command" else chosen(engine, the_plan=replace(plan("member.")), casa=casa)
    job = tmp_path / "WORK7"
    job.mkdir()
    for name, content in engines.job(request(), restore).files.items():
        (job / name).write_bytes(content)
    path = userland(tmp_path / "bin", shell)
    words = [str(path / "sh"), str(job / "run.sh")]
    done = subprocess.run(
        words, cwd="/", env={"PATH": str(path)}, capture_output=True, text=True, timeout=60, check=False
    )
    return job, done


@pytest.mark.parametrize("engine", ["pipeline", "script", "casatasks"])
@pytest.mark.parametrize("layout", ["flat", "production"])
def test_a_job_that_restores_needs_nothing_that_old_nodes_lack(tmp_path: Path, engine: str, layout: str) -> None:
    size = program(tmp_path / "size", "#!/bin/sh\necho 2048\n")
    settings: dict[str, Any] = {"layout": layout, "raw_size": (str(size),) if layout == "flat" else None}
    job, done = run_job(tmp_path, engine, **settings)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert (job / "report.json").is_file() and (job / "reserved").is_file()
    assert (job / "products" / f"{MEMBER}.session_2.caltables.tgz").is_file()
    assert (job / "rawdata" / f"{MEMBER}.calimage.pipeline_manifest.xml").is_file()
    if engine != "casatasks":
        first, last = (job / "calls").read_text(encoding="utf-8").splitlines()
        assert first.startswith("casa --nologger --nogui --pipeline -c ") and "finish_restore.py" in last


@pytest.mark.parametrize("engine", ["pipeline", "script"])
def test_an_incomplete_asdm_is_told_there_too(tmp_path: Path, engine: str) -> None:
    cut = program(tmp_path / "cut", FETCH_RAW + f": >{EB}/ASDMBinary/uid___A002_X1_X2\n")
    job, done = run_job(tmp_path, engine, raw_fetch=(str(cut),))
    assert done.returncode == 1
    assert "ASDMBinary/uid___A002_X1_X2 has 0 bytes and is cut" in done.stderr.splitlines()[-1]
    assert not (job / "calls").exists() and not (job / "report.json").exists()


def test_a_disk_that_is_too_small_is_told_there_too(tmp_path: Path) -> None:
    size = program(tmp_path / "size", "#!/bin/sh\necho 999999999999999\n")
    job, done = run_job(tmp_path, "pipeline", raw_size=(str(size),))
    assert done.returncode == 1
    assert "make room, and start it again" in done.stderr.splitlines()[-1]
    assert not (job / "calls").exists()


@pytest.mark.parametrize("engine", ["pipeline", "command"])
def test_the_shell_may_be_bash_as_it_is_there(tmp_path: Path, engine: str) -> None:
    if shutil.which("bash") is None:
        pytest.skip("needs the program bash")
    job, done = run_job(tmp_path, engine, "bash")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert (job / "calls").is_file()


def test_the_sites_command_is_called_there_too(tmp_path: Path) -> None:
    job, done = run_job(tmp_path, "command")
    assert (done.returncode, done.stderr) == (0, "")
    assert (job / "calls").read_text(encoding="utf-8").split()[-1] == PASSED
