"""How the tests make job directories and raw-data scripts, the way that the service does."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from stagecal.adapters.templates import JinjaTemplates

TEMPLATES = Path(__file__).parents[2] / "templates"
FIRST, SECOND = "uid://A002/Xcf92df/X3453", "uid://A002/Xd33a12/X15be"


def sanitized(uid: str) -> str:
    return uid.replace(":", "_").replace("/", "_")


def render(template: str, **values: object) -> str:
    """Render a job script the way that the service does."""
    return JinjaTemplates(TEMPLATES).render(template, **values)


def make_job(
    directory: Path,
    casa_python: Path,
    fetch: Path,
    blocks: Sequence[str] = (FIRST, SECOND),
    calfields: Sequence[str] = (),
) -> Path:
    """Make a job directory as the daemon does; return its run.sh."""
    directory.mkdir()
    job = {
        "request": "00c0ffee",
        "mous": "uid://A001/X12a3/X80e",
        "project": "2017.1.01347.S",
        "execution_blocks": list(blocks),
        "calfields": list(calfields),
        "raw_fetch": [str(fetch)],
        "engine": "casatasks",
        "worker_python": str(casa_python),
        "command": None,
    }
    (directory / "job.json").write_text(json.dumps(job))
    for name in ("calibrate.py", "casasiteconfig.py"):
        shutil.copy(TEMPLATES / "casa" / name, directory)
    script = directory / "run.sh"
    script.write_text(render("job/run_casatasks.sh", **job))
    script.chmod(0o755)
    return script


def fetch_from(store: Path, directory: Path, then: str) -> Path:
    """Make a raw-data script that fetches from the store, and then spoils the data by the shell text `then`."""
    directory.mkdir(parents=True, exist_ok=True)
    script = directory / "fetch"
    script.write_text(
        "#!/bin/sh\nset -eu\n"
        f'{shlex.quote(str(store / "fetch_raw.sh"))} "$1"\n'
        "eb=$(printf '%s' \"$1\" | tr ':/' '__')\n"
        f"{then}\n"
    )
    script.chmod(0o755)
    return script
