"""The engines of this site: which files a job directory gets, and what identifies the calibration that they make.

`pipeline` and `script` run a monolithic CASA of the site, `casatasks` the modular CASA in a worker environment of its
own, `command` the site's own program. A missing part is a FatalError that says how to get it.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stagecal.config import Locks, Restore
from stagecal.domain.casa_versions import CasaChoice, casa_for
from stagecal.domain.identifiers import sanitized
from stagecal.domain.requests import Request
from stagecal.domain.restore.chosen import ChosenRestore
from stagecal.domain.restore.engines import AUTO, CASATASKS, COMMAND, PIPELINE, SCRIPT
from stagecal.domain.restore.plan import PlannedExecutionBlock, RestorePlan
from stagecal.domain.restore.ppr import ppr_faults, ppr_values
from stagecal.domain.restore.product_names import AUXPRODUCTS
from stagecal.ports import EngineJob, FatalError, Templates

_VERSION = "import importlib.metadata as m; print(m.version('casatasks'))"
# Programs that may be a Python on a node without one of ours; an old CASA brings Python 2.7.
_PYTHONS = ("python3", "python", "python2")
_SCRIPTS = ("calibrate.py", "casasiteconfig.py")
_MOST_MEMBERS, _MOST_BYTES = 10_000, 20 * 1024**3


@dataclass
class SiteEngines:
    """The Engines port by the `[restore]` section; `templates_directory` holds the scripts that run inside CASA.

    `work_area` is the directory of the job directories on the nodes; `is_far` says that those are other machines.
    """

    restore: Restore
    locks: Locks
    templates: Templates
    templates_directory: Path
    work_area: Path
    is_far: bool = False
    _versions: dict[Path, str] = field(default_factory=dict)

    def identity(self, project: str) -> str:
        casa = self._casa(project)
        if self.restore.chosen_engine == COMMAND:
            command = self._command()
            digest = hashlib.sha256(command.read_bytes()).hexdigest()
            return f"command {digest}" + (f" CASA {casa.version}" if casa else "")
        engine = self.restore.chosen_engine
        parts = [engine, *sorted({f"CASA {one.version}" for one in self.restore.casa})]
        # What "auto" may choose for some MOUS belongs to it, too.
        if engine == CASATASKS or (engine == AUTO and (not self.restore.casa or CASATASKS in self.available())):
            parts.append(f"casatasks {self._version()}")
        scripts = b"".join(self._script("casa", name) for name in ("calibrate.py", "finish_restore.py"))
        return f"{' '.join(parts)} {hashlib.sha256(scripts).hexdigest()[:16]}"

    def available(self) -> Mapping[str, str]:
        found = {COMMAND: ""} if self.restore.command else {}
        if not self.restore.raw_fetch:
            return found
        if self.restore.casa:
            found |= {PIPELINE: "", SCRIPT: ""}
        from stagecal.casa_worker import find_casa_worker

        if self.is_far and self.restore.casa_worker is None:
            # The environment in our cache directory is on this machine only.
            return found
        return found | ({CASATASKS: self._known_version()} if find_casa_worker(self.restore.casa_worker) else {})

    def job(self, request: Request, restore: ChosenRestore | None) -> EngineJob:
        if restore is None:
            return self._command_job(request)
        if not self.restore.raw_fetch:
            raise FatalError("[restore] raw_fetch is not set: a restore needs a command for raw data")
        if not self.restore.ngas and not self.restore.products_fetch:
            raise FatalError("[restore] has neither ngas nor products_fetch: a restore needs the archived products")
        plan, engine, casa = restore.plan, restore.engine.engine, restore.casa
        area = self._area(request, plan)
        ppr_name = f"PPR_{sanitized(plan.sched_block.status_uid or plan.mous)}.xml"
        scripts = [*_SCRIPTS] if engine == CASATASKS else [*_SCRIPTS, "finish_restore.py"]
        files = {
            **{name: self._script("casa", name) for name in scripts},
            "fetch_products.py": self._script("job", "fetch_products.py"),
            "fetch.json": _json(self._fetch_plan(plan)),
            "job.json": _json(self._description(request, restore, area)),
            "metadata.json": _json(self._metadata(request, restore, area)),
        }
        if engine == PIPELINE:
            files[ppr_name] = self._ppr(request, restore, area)
        files["run.sh"] = self.templates.render(
            f"job/run_{engine}.sh",
            area=area,
            execution_blocks=list(request.execution_blocks),
            raw_fetch=list(self.restore.raw_fetch),
            raw_size=list(self.restore.raw_size or ()),
            disk_factor=self.restore.disk_factor,
            python=[str(self._worker())] if engine == CASATASKS else _pythons_of(casa),
            casa_home=casa.home if casa else "",
            xvfb=self.restore.xvfb,
            ppr_name=ppr_name,
            restore_script=_names_on_disk(plan).get(restore.script_name, restore.script_name),
        ).encode()
        return EngineJob(
            engine, restore.engine.reason, casa.label if casa else "", casa is not None and casa.is_old, files
        )

    # --- what a job is told -------------------------------------------------------------------------------------

    def _area(self, request: Request, plan: RestorePlan) -> str:
        """Return where the restore works below its job directory: `.`, or the directories of the observatories."""
        if self.restore.layout == "flat":
            return "."
        if not plan.sous_uid or not plan.gous_uid:
            raise FatalError(f"the archive does not tell SOUS and GOUS of {plan.mous}: set [restore] layout = 'flat'")
        made = f"{plan.project}_{request.received_at:%Y_%m_%dT%H_%M_%S}.{request.received_at.microsecond // 1000:03d}"
        units = [("SOUS", plan.sous_uid), ("GOUS", plan.gous_uid), ("MOUS", plan.mous)]
        return "/".join([made, *(f"{level}_{sanitized(uid)}" for level, uid in units)])

    def _fetch_plan(self, plan: RestorePlan) -> Mapping[str, Any]:
        named = _names_on_disk(plan)
        files = [{"file_id": file.name, "name": named[file.name], "into": "products"} for file in plan.files]
        aux = plan.auxproducts
        return {
            "ngas": self.restore.ngas,
            "fetch_command": None if self.restore.ngas else list(self.restore.products_fetch or ()),
            "files": [{**file, "size": None, "checksum": None} for file in files],
            "expand": [
                {
                    "archive": f"products/{aux.name}",
                    "into": "products",
                    "most_members": _MOST_MEMBERS,
                    "most_bytes": _MOST_BYTES,
                    "allowed": list(AUXPRODUCTS),
                }
            ]
            if aux
            else [],
            "copies": [{"from": f"products/{plan.manifest}", "to": f"rawdata/{plan.manifest}"}],
            "one_manifest_in": "rawdata",
            "need_bytes": None,
        }

    def _description(self, request: Request, restore: ChosenRestore, area: str) -> Mapping[str, Any]:
        plan = restore.plan
        return {
            **self._common(request, restore.engine.engine),
            "area": area,
            "calibration": {block.uid: _calibration(block) for block in plan.execution_blocks},
            "ocorr_mode": str(restore.script.parameters.get("ocorr_mode", "ca")),
            "engine_reason": restore.engine.reason,
            "calibrated_by": _calibrated_by(plan),
            "auxiliary": [name for archived, name in _names_on_disk(plan).items() if archived != plan.manifest],
        }

    def _common(self, request: Request, engine: str) -> dict[str, Any]:
        return {
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

    def _metadata(self, request: Request, restore: ChosenRestore, area: str) -> Mapping[str, Any]:
        """Return metadata.json: what the directory is, for people and programs who find it."""
        plan = restore.plan
        return {
            "request": request.id,
            "mous": plan.mous,
            "project": plan.project,
            "sessions": {
                f"session_{session.number}": list(session.execution_blocks) for session in plan.layout.sessions
            },
            "engine": restore.engine.engine,
            "engine_reason": restore.engine.reason,
            "calibrated_by": _calibrated_by(plan),
            "restored_by": {"casa": restore.casa.version, "home": restore.casa.home} if restore.casa else {},
            "directories": {
                name: name if area == "." else f"{area}/{name}" for name in ("rawdata", "products", "working")
            },
            "products": [file.name for file in plan.files],
        }

    def _ppr(self, request: Request, restore: ChosenRestore, area: str) -> bytes:
        # The pipeline takes <root>/<relative path>/working: the job directory's name makes the path never empty.
        relative_path = request.work if area == "." else f"{request.work}/{area}"
        values = ppr_values(
            restore.plan,
            root_directory=str(self.work_area),
            relative_path=relative_path,
            now=request.received_at,
        )
        text = self.templates.render("ppr.xml", ppr=values)
        pipeline_version = restore.casa.version.partition("pipeline-")[2] if restore.casa else ""
        faults = ppr_faults(text, restore.plan, relative_path=relative_path, pipeline_version=pipeline_version)
        if faults:
            raise FatalError(f"the PPR would not do what it should, CASA is not started: {'; '.join(faults)}")
        return text.encode()

    # --- the site's own command ---------------------------------------------------------------------------------

    def _command_job(self, request: Request) -> EngineJob:
        casa = self._casa(request.project)
        home = request.casa_home or (casa.home if casa else "")
        job = self._common(request, COMMAND)
        run = self.templates.render(
            "job/run_command.sh",
            **job,
            raw_fetch=list(self.restore.raw_fetch or ()),
            command=str(self._command()),
            casa_home=home,
        )
        return EngineJob(
            COMMAND,
            "the site's own command",
            casa.label if casa else "",
            casa is not None and casa.is_old,
            {"run.sh": run.encode(), "job.json": _json(job)},
        )

    def _casa(self, project: str) -> CasaChoice | None:
        return casa_for(project, [CasaChoice(one.version, str(one.home), one.label) for one in self.restore.casa])

    def _command(self) -> Path:
        command = self.restore.command
        if command is None or not command.is_file():
            raise FatalError(f"[restore] command {command} is not there: name the site's calibration program")
        return command

    # --- the modular CASA ---------------------------------------------------------------------------------------

    def _worker(self) -> Path:
        from stagecal.casa_worker import find_casa_worker

        python = find_casa_worker(self.restore.casa_worker)
        if python is None:
            raise FatalError("there is no CASA worker environment yet: make it by `stagecal init` or `stagecal watch`")
        return python

    def _known_version(self) -> str:
        """Return the version of the worker's casatasks, '' if it does not say it: its job will say why."""
        try:
            return self._version()
        except FatalError:
            return ""

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

    def _script(self, directory: str, name: str) -> bytes:
        return (self.templates_directory / directory / name).read_bytes()


def _names_on_disk(plan: RestorePlan) -> Mapping[str, str]:
    """Return for each archived file the name that it gets: what reads it looks for the manifest's."""
    links = {link.archived: link.name for link in plan.links}
    return {file.name: links.get(file.name, file.name) for file in plan.files}


def _calibrated_by(plan: RestorePlan) -> Mapping[str, str]:
    return {"casa": plan.casa_version, "pipeline": plan.pipeline_version}


def _calibration(block: PlannedExecutionBlock) -> Mapping[str, str]:
    return {
        "session": f"session_{block.session}",
        "caltables": block.caltables.name,
        "finalflags": block.finalflags.name,
        "applycmds": block.applycmds.name,
    }


def _pythons_of(casa: CasaChoice | None) -> list[str]:
    own = [os.path.join(casa.home, "bin", name) for name in ("python3", "python")] if casa else []
    return [*own, *_PYTHONS]


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1).encode() + b"\n"
