"""How the tests make job directories, raw-data scripts and a store, the way that the service does."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from stagecal.adapters.templates import JinjaTemplates
from stagecal.embedded import ArchivedUnit

TEMPLATES = Path(__file__).parents[2] / "templates"
MOUS = "uid://A001/X12a3/X80e"
# Sessions with gaps: the EB of the first one was not calibrated, in the third nothing was observed.
SEMI_PASS, FIRST = "uid://A002/Xce574d/Xa33e", "uid://A002/Xcf92df/X3453"
SECOND, THIRD = "uid://A002/Xd33a12/X15be", "uid://A002/Xd33a12/X1a0f"
SESSION_OF = {FIRST: "session_2", SECOND: "session_4", THIRD: "session_4"}


def sanitized(uid: str) -> str:
    return uid.replace(":", "_").replace("/", "_")


def caltables_of(uid: str) -> str:
    return f"member.{sanitized(MOUS)}.{SESSION_OF[uid]}.caltables.tgz"


def unit_of_tests() -> ArchivedUnit:
    """The MOUS of the tests' store."""
    stem = f"member.{sanitized(MOUS)}"
    texts = ["casa_piperestorescript.py", "casa_pipescript.py", "pipeline_manifest.xml", "auxproducts.tgz"]
    files = [f"{stem}.hifa_calimage.{text}" for text in texts] + [f"{stem}.scriptForPI.py"]
    for session in ("session_2", "session_4"):
        files += [f"{stem}.{session}.caltables.tgz", f"{stem}.{session}.auxcaltables.tgz"]
    for uid in SESSION_OF:
        files += [f"{sanitized(uid)}.ms.{kind}" for kind in ("calapply.txt", "flagversions.tgz")]
    return ArchivedUnit(
        mous=MOUS,
        sessions=(
            ("session_1", ((SEMI_PASS, False),)),
            ("session_2", ((FIRST, True),)),
            ("session_3", ()),
            ("session_4", ((SECOND, True), (THIRD, True))),
        ),
        files=tuple(files),
        facts={
            "project": "2017.1.01347.S",
            "project_uid": "uid://A001/X1221/Xdf8",
            "part_id": "X659301709",
            "project_status_uid": "uid://A001/X1221/Xdfc",
            "science_uid": "uid://A001/X12a3/X80c",
            "group_uid": "uid://A001/X12a3/X80d",
            "sched_block_status_uid": "uid://A001/X12a3/X80f",
        },
    )


def render(template: str, **values: object) -> str:
    """Render a job script the way that the service does."""
    return JinjaTemplates(TEMPLATES).render(template, **values)


def make_job(
    directory: Path,
    casa_python: Path,
    store: Path,
    blocks: Sequence[str] = (FIRST, SECOND, THIRD),
    calfields: Sequence[str] = (),
    fetch: Path | None = None,
    area: str = ".",
    **changes: object,
) -> Path:
    """Make a job directory as the daemon does; return its run.sh.

    `fetch` fetches the raw data instead of the store's script, `area` is where the restore works below the job
    directory, and `changes` are other values of job.json.
    """
    directory.mkdir()
    calibration = {
        uid: {
            "session": SESSION_OF[uid],
            "caltables": caltables_of(uid),
            "finalflags": f"{sanitized(uid)}.ms.flagversions.tgz",
            "applycmds": f"{sanitized(uid)}.ms.calapply.txt",
        }
        for uid in blocks
    }
    names = sorted({name for one in calibration.values() for kind, name in one.items() if kind != "session"})
    job: dict[str, object] = {
        "request": "00c0ffee",
        "mous": MOUS,
        "project": "2017.1.01347.S",
        "execution_blocks": list(blocks),
        "calfields": list(calfields),
        "calibration": calibration,
        "ocorr_mode": "ca",
        "auxiliary": [name for name in names if not name.endswith("flagversions.tgz")],
        "engine": "casatasks",
        "locks": {"directory": None, "timeout_s": 60},
        **changes,
    }
    (directory / "job.json").write_text(json.dumps(job))
    fetch_product = [str(store / "fetch_product.sh")]
    plan = {
        "fetch_command": fetch_product,
        "files": [{"file_id": name, "name": name, "into": "products"} for name in names],
    }
    (directory / "fetch.json").write_text(json.dumps(plan))
    shutil.copy(TEMPLATES / "job" / "fetch_products.py", directory)
    for name in ("calibrate.py", "casasiteconfig.py"):
        shutil.copy(TEMPLATES / "casa" / name, directory)
    script = directory / "run.sh"
    values = {
        "area": area, "execution_blocks": blocks, "raw_fetch": [str(fetch or store / "fetch_raw.sh")], "raw_size": [],
        "disk_factor": 2, "python": [str(casa_python)],
    }  # fmt: skip
    script.write_text(render("job/run_casatasks.sh", **values))
    script.chmod(0o755)
    return script


def fetch_from(store: Path, directory: Path, then: str) -> Path:
    """Make a raw-data script that fetches from the store, and then spoils the data by the shell text `then`.

    In it $eb is the name of the EB, and the archived files lie in $products.
    """
    directory.mkdir(parents=True, exist_ok=True)
    script = directory / "fetch"
    script.write_text(
        "#!/bin/sh\nset -eu\n"
        f'{shlex.quote(str(store / "fetch_raw.sh"))} "$1"\n'
        "eb=$(printf '%s' \"$1\" | tr ':/' '__')\n"
        "products=$PWD/../products\n"
        f"{then}\n"
    )
    script.chmod(0o755)
    return script
