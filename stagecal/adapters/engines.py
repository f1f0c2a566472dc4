"""The engines of this site: which files a job directory gets, and what identifies the calibration that they make.

`casatasks` runs the modular CASA in a worker environment of its own, `command` the site's own program. A missing part
is a FatalError that says how to get it.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from stagecal.config import Locks, Restore
from stagecal.domain.casa_versions import CasaChoice, casa_for
from stagecal.domain.requests import Request
from stagecal.ports import FatalError, Templates

_VERSION = "import importlib.metadata as m; print(m.version('casatasks'))"


@dataclass
class SiteEngines:
    """The Engines port by the `[restore]` section; `templates_directory` holds the scripts that run inside CASA."""

    restore: Restore
    locks: Locks
    templates: Templates
    templates_directory: Path
    _versions: dict[Path, str] = field(default_factory=dict)

    def identity(self, project: str) -> str:
        casa = self._casa(project)
        if self.restore.chosen_engine == "command":
            command = self._command()
            digest = hashlib.sha256(command.read_bytes()).hexdigest()
            return f"command {digest}" + (f" CASA {casa.version}" if casa else "")
        return f"casatasks {self._version()} {hashlib.sha256(self._script('calibrate.py')).hexdigest()[:16]}"

    def label(self, project: str) -> str:
        casa = self._casa(project)
        return casa.label if casa else ""

    def is_old(self, project: str) -> bool:
        casa = self._casa(project)
        return casa is not None and casa.is_old

    def job_files(self, request: Request) -> Mapping[str, bytes]:
        casa = self._casa(request.project)
        engine = self.restore.chosen_engine
        job = {
            "request": request.id,
            "mous": request.mous,
            "project": request.project,
            "execution_blocks": list(request.execution_blocks),
            "calfields": list(request.calfields),
            "engine": engine,
            "locks": {
                "directory": str(self.locks.directory) if self.locks.directory else None,
                "timeout_s": self.locks.timeout_s,
            },
        }
        values = {
            **job,
            "raw_fetch": list(self.restore.raw_fetch or ()),
            "worker_python": str(self._worker()) if engine == "casatasks" else "",
            "command": str(self._command()) if engine == "command" else "",
            "casa_home": str(casa.home) if casa else "",
        }
        files = {"run.sh": self.templates.render(f"job/run_{engine}.sh", **values).encode()}
        if engine == "casatasks":
            if not self.restore.raw_fetch:
                raise FatalError("[restore] raw_fetch is not set: the engine casatasks needs a command for raw data")
            files |= {name: self._script(name) for name in ("calibrate.py", "casasiteconfig.py")}
        return {**files, "job.json": json.dumps(job, indent=1).encode() + b"\n"}

    def _casa(self, project: str) -> CasaChoice | None:
        return casa_for(project, [CasaChoice(one.version, str(one.home), one.label) for one in self.restore.casa])

    def _command(self) -> Path:
        command = self.restore.command
        if command is None or not command.is_file():
            raise FatalError(f"[restore] command {command} is not there: name the site's calibration program")
        return command

    def _worker(self) -> Path:
        from stagecal.casa_worker import find_casa_worker

        python = find_casa_worker(self.restore.casa_worker)
        if python is None:
            raise FatalError("there is no CASA worker environment yet: make it by `stagecal init` or `stagecal watch`")
        return python

    def _version(self) -> str:
        python = self._worker()
        if python not in self._versions:
            try:
                answer = subprocess.run(
                    [python, "-E", "-s", "-c", _VERSION], capture_output=True, text=True, timeout=60, check=True
                )
            except (OSError, subprocess.SubprocessError) as error:
                raise FatalError(f"the CASA worker {python} does not answer: {error}") from error
            self._versions[python] = answer.stdout.strip()
        return self._versions[python]

    def _script(self, name: str) -> bytes:
        return (self.templates_directory / "casa" / name).read_bytes()
