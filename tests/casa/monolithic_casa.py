"""A stand-in for a monolithic CASA with the ALMA pipeline, which no package index has.

`make_casa_home` makes its directory. As a program (`monolithic_casa.py HOME ARGUMENT...`) it is what bin/casa runs, by
the Python of the CASA worker: it takes what job scripts give to the real one, ends with exit code 99 where the real one
could not work with it, and does by CASA's tasks what the pipeline would do. It reads PPR and manifest by itself, with
the habits of the real reader. The file HOME/misbehaviour makes it fail as real ones do (see `MISBEHAVIOURS`).
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import sys
import types
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

MISBEHAVIOURS = {
    "errorexit": "gives up: leaves an errorexit file, and exits 0",
    "severe": "its log ends with something SEVERE",
    "traceback": "its log ends with a Traceback",
    "forgets": "leaves no measurement set of the last EB",
    "raw": "applies nothing: the corrected data are the raw ones",
    "never-corrected": "applies nothing: there are no corrected data",
    "no-flags": "does not restore the final flags, and applies",
    "dies": "ends with exit code 3",
    "does-nothing": "exits 0 without a trace",
    "silent-finish": "exits 0 without running finish_restore.py",
}
WRONG = 99
LOG = "casa-20261121-090000.log"
# A restored measurement set, for the tests of what is done with one (HOME/restored/<EB>.ms).
READY = "restored"


def make_casa_home(home: Path, worker: Path, *, python2_names: bool = False) -> Path:
    """Make the directory of the stand-in; with `python2_names` its modules are called as those of CASA 5."""
    recipes = home / "pipeline" / "pipeline" / "recipes"
    recipes.mkdir(parents=True)
    (home / "pipeline" / "pipeline" / "runpipeline.py").write_text("# the stand-in never reads it\n")
    (home / "bin").mkdir()
    exec_worker = f"#!/bin/sh\nexec '{worker}' -E -s"
    (home / "bin" / "casa").write_text(f"{exec_worker} '{Path(__file__).resolve()}' '{home}' \"$@\"\n")
    (home / "bin" / "python3").write_text(f'{exec_worker} "$@"\n')
    for name in ("casa", "python3"):
        (home / "bin" / name).chmod(0o755)
    if python2_names:
        (home / "casa5").touch()
    return home


# --- what it is given -------------------------------------------------------------------------------------------------


def wrong(text: str) -> None:
    """End as nothing real does: the job script is wrong."""
    sys.stderr.write(f"stand-in casa: {text}\n")
    sys.stderr.flush()
    os._exit(WRONG)


def main(home: Path, arguments: list[str]) -> None:
    mode = (home / "misbehaviour").read_text() if (home / "misbehaviour").exists() else ""
    if os.read(0, 1):
        wrong("standard input is not empty: CASA would take it for commands")
    if arguments[:2] != ["--nologger", "--nogui"]:
        wrong(f"started as {arguments}: without --nologger --nogui it waits for a display")
    if arguments[2:3] == ["--pipeline"]:
        runs = arguments[3:]
        if runs[:1] != ["-c"] or len(runs) < 2:
            wrong(f"started as {arguments}")
        look_around(home)
        do_the_pipeline(home, runs[1:], mode)
    elif arguments[2:3] == ["--logfile"] and arguments[4:5] == ["-c"] and len(arguments) == 6:
        if mode != "silent-finish":
            run_finish(home, Path(arguments[3]), Path(arguments[5]))
    else:
        wrong(f"started as {arguments}")


def look_around(home: Path) -> None:
    """What both ways of a restore need: the environment, one manifest, the products, a clean working directory."""
    here = Path.cwd()
    root, logs, scripts = (os.environ.get(f"SCIPIPE_{name}DIR", "") for name in ("ROOT", "LOG", "SCRIPT"))
    if not all(os.path.isdir(path) and os.path.isabs(path) for path in (root, logs, scripts)):
        wrong(f"SCIPIPE_ROOTDIR={root} SCIPIPE_LOGDIR={logs} SCIPIPE_SCRIPTDIR={scripts}: not all are directories")
    if Path(scripts) != home / "pipeline" / "pipeline" / "recipes":
        wrong(f"SCIPIPE_SCRIPTDIR is {scripts}, not of this CASA")
    if here.name != "working" or not here.is_relative_to(root):
        wrong(f"started in {here}, not in a working/ below {root}")
    # A name that is not the physical one would be another directory for the pipeline.
    if os.path.realpath(here) != str(here):
        wrong(f"{here} goes over a link")
    manifests = list(Path("../rawdata").glob("*pipeline_manifest.xml"))
    if len(manifests) != 1:
        wrong(f"rawdata/ has {len(manifests)} manifests")
    if list(Path("../products").glob("*pipeline_manifest.xml")) != [Path("../products") / manifests[0].name]:
        wrong("products/ has other manifests, which hifa_restoredata copies to rawdata/")
    left = [name for name in os.listdir() if not name.startswith("PPR_")]
    if left:
        wrong(f"working/ is not clean: {left}")


# --- the pipeline -----------------------------------------------------------------------------------------------------


class PipelineError(Exception):
    """What the real pipeline writes into an errorexit file."""


def do_the_pipeline(home: Path, words: list[str], mode: str) -> None:
    if mode == "dies":
        os._exit(3)
    if mode == "does-nothing":
        return
    Path(LOG).write_text("2026-11-21 09:00:00\tINFO\t::casa\tCASA of the stand-in\n")
    try:
        if mode == "errorexit":
            raise PipelineError("KeyError: 'uid___A002_Xcf92df_X3453'")
        if Path(words[0]) == home / "pipeline" / "pipeline" / "runpipeline.py":
            if len(words) != 2:
                wrong(f"runpipeline.py with {words[1:]}: the PPR is the one argument right after it")
            run_ppr(home, Path(words[1]), mode)
        else:
            if len(words) != 1:
                wrong(f"a script with {words[1:]}")
            run_script(home, Path(words[0]), mode)
    except PipelineError as error:
        Path("errorexit-20261121.txt").write_text(f"{error}\n")
    with open(LOG, "a") as log:
        if mode == "severe":
            log.write("2026-11-21 09:00:01\tSEVERE\tflagmanager::::casa\tversion Pipeline_Final not found\n")
        if mode == "traceback":
            log.write("Traceback (most recent call last):\n  KeyError: 'x'\n")


def run_ppr(home: Path, path: Path, mode: str) -> None:
    try:
        root = ElementTree.fromstring(path.read_bytes())
    except (OSError, ElementTree.ParseError) as error:
        raise PipelineError(str(error)) from error
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    for name in ("ProposalCode", "Observatory", "Telescope", "ObsUnitSetTitle", "ObsUnitSetType"):
        if not root.findtext(f".//{name}"):
            raise PipelineError(f"no {name}")
    requests, blocks = root.findall(".//ProcessingRequest"), root.findall(".//SchedBlockIdentifier")
    if len(requests) != 1 or len(blocks) != 1 or root.find(".//ProcessingIntents") is None:
        raise PipelineError("more or less than one request")
    relative_path = blocks[0].findtext("RelativePath") or ""
    working = os.path.join(os.environ["SCIPIPE_ROOTDIR"], relative_path, "working")
    if not relative_path or str(Path.cwd()) != working:
        wrong(f"the PPR says {working}, CASA was started in {Path.cwd()}")
    asdms = [(one.findtext("AsdmDiskName") or "", one.findtext("AsdmRef/ExecBlockId") or "")
             for one in blocks[0].findall("AsdmIdentifier")]  # fmt: skip
    sessions = sessions_as_read({one.findtext("Keyword") or "": one.findtext("Value") for one in root.iter("Intents")})
    for command in root.iter("ProcessingCommand"):
        if command.find("ParameterSet") is None:
            # The real one stops here, without a word.
            return
        if command.findtext("Command") == "hifa_restoredata":
            restore([name for name, _ in asdms], [sessions.get(uid, "session_1") for _, uid in asdms], home, mode)


def sessions_as_read(intents: dict[str, str | None]) -> dict[str, str]:
    """Return the session of each EB by the real reader's rules; what is not found there lands in session_1."""
    found: dict[str, str] = {}
    number = 1
    while f"SESSION_{number}" in intents:
        for uid in (intents[f"SESSION_{number}"] or "").split(" | "):
            found[uid] = f"session_{number}"
        number += 1
    return found


def run_script(home: Path, path: Path, mode: str) -> None:
    """Run the archive's restore script with the names that CASA would have for it."""
    called: list[str] = []
    helpers = types.ModuleType("recipes.almahelpers")
    helpers.fixsyscaltimes = lambda vis, **_: called.append("fixsyscaltimes")  # type: ignore[attr-defined]
    sys.modules["recipes"], sys.modules["recipes.almahelpers"] = types.ModuleType("recipes"), helpers

    def restoredata(vis: list[str], session: list[str], ocorr_mode: str = "ca", **_: object) -> None:
        if called[:1] != ["h_init"]:
            raise PipelineError("no context: h_init was not called")
        restore([os.path.basename(name) for name in vis], session, home, mode)
        called.append("hifa_restoredata")

    def importdata(vis: list[str], **_: object) -> None:
        tasks, casa = calibrating()
        for name in vis:
            tasks.import_raw(casa, block_of(os.path.basename(name), {}), "ca")
        called.append("hifa_importdata")

    names = {
        "__name__": "__main__",
        "h_init": lambda *_, **__: called.append("h_init"),
        "h_save": lambda *_, **__: called.append("h_save"),
        "hifa_importdata": importdata,
        "hifa_restoredata": restoredata,
    }
    try:
        exec(compile(path.read_text(), str(path), "exec"), names)
    except PipelineError:
        raise
    except Exception as error:
        raise PipelineError(f"{type(error).__name__}: {error}") from error
    Path("called.txt").write_text("\n".join(called))


def restore(names: list[str], sessions: list[str], home: Path, mode: str) -> None:
    """Do what hifa_restoredata does."""
    manifest = ElementTree.parse(min(Path("../rawdata").glob("*pipeline_manifest.xml"))).getroot()
    listed = {
        (block.get("name"), session.get("name")): (session, block)
        for session in manifest.iter("session") for block in session.iter("asdm")
    }  # fmt: skip
    for name in names:
        if not os.path.isfile(f"../rawdata/{name}/ASDM.xml"):
            wrong(f"rawdata/ has no ASDM {name}")
    casa = None
    for name, session in zip(names, sessions, strict=True):
        if mode == "forgets" and name == names[-1]:
            continue
        if (f"{name}.ms", session) not in listed:
            raise PipelineError(f"KeyError: '{name}.ms' in {session}")
        files = {"session": session}
        for element in (*listed[f"{name}.ms", session][0], *listed[f"{name}.ms", session][1]):
            if element.tag in ("caltables", "finalflags", "applycmds"):
                files[element.tag] = element.get("name", "")
                if not os.path.isfile(f"../products/{files[element.tag]}"):
                    raise PipelineError(f"products/ has no {files[element.tag]}")
        if (home / READY).is_dir():
            shutil.copytree(home / READY / f"{name}.ms", f"{name}.ms")
        else:
            casa = casa or calibrating()
            calibrate(casa, name, files)
        if mode in ("raw", "no-flags", "never-corrected"):
            spoil(f"{name}.ms", mode)


def calibrating() -> tuple[Any, Any]:
    """Return the job's calibrate.py, which knows the tasks, and its CASA."""
    import calibrate as tasks

    tasks.CASA_LOG = LOG
    return tasks, tasks.Casa()


def block_of(name: str, files: dict[str, str]) -> Any:
    import calibrate as tasks

    uid = re.sub(r"uid___(A00.)_(X[0-9a-f]+)_(X[0-9a-f]+)", r"uid://\1/\2/\3", name)
    return tasks.Block(uid, {**dict.fromkeys(("session", "caltables", "finalflags", "applycmds"), "unknown"), **files})


def calibrate(casa: tuple[Any, Any], name: str, files: dict[str, str]) -> None:
    tasks, session = casa
    block = block_of(name, files)
    if not os.path.isdir(block.ms):
        # The real one, too, takes what is there already.
        tasks.import_raw(session, block, "ca")
    observation = tasks.Observation(session.tools, block)
    if not os.path.isdir(block.session):
        tasks.expand(tasks.archived(block.caltables), block.session)
    applications = [tasks.Application(one, block, observation) for one in tasks.read_apply_commands(block)]
    tasks.restore_flags(session, block)
    rows = tasks.selected_rows(block, observation, [])
    for application in applications:
        session.do("applycal", application.arguments(block, rows))


def spoil(measurement_set: str, mode: str) -> None:
    """Make of a restored measurement set what a pipeline leaves that went on after a failure."""
    from casacore import tables

    table = tables.table(measurement_set, readonly=False, ack=False)
    if mode == "never-corrected":
        table.removecols(["CORRECTED_DATA"])
    elif mode == "raw":
        table.putcol("CORRECTED_DATA", table.getcol("DATA"))
    else:
        table.putcol("FLAG", table.getcol("FLAG") & False)
        table.putcol("FLAG_ROW", table.getcol("FLAG_ROW") & False)
    table.close()


# --- casa -c finish_restore.py ----------------------------------------------------------------------------------------


def run_finish(home: Path, log: Path, script: Path) -> None:
    """Run a script as CASA 6 does, or as CASA 5: in names of CASA's own, which do not say where the script lies."""
    if not log.parent.is_dir():
        wrong(f"--logfile {log}: no such directory")
    sys.argv = ["casa", "--noconfig"]
    os.environ["CASASITECONFIG"] = os.path.join(os.environ["STAGECAL_JOB"], "casasiteconfig.py")
    names: dict[str, object] = {"__name__": "__main__", "__file__": str(script)}
    if (home / "casa5").exists():
        offer_names_of_casa5()
        names = {"__name__": "casa_shell", "__file__": "/opt/casa/lib/python2.7/casapy.py", "casa": {"dirs": {}}}
    tree = ast.parse(script.read_text())
    try:
        exec(compile(tree, str(script), "exec"), names)
    except Exception as error:
        # The real one shows it, and goes on.
        sys.stderr.write(f"stand-in casa: {type(error).__name__}: {error}\n")


def offer_names_of_casa5() -> None:
    import casatasks
    import casatools

    made = {name: types.ModuleType(name) for name in ("tasks", "taskinit", "casac", "casadef")}
    made["tasks"].__dict__["mstransform"] = casatasks.mstransform
    made["taskinit"].__dict__["casalog"] = casatasks.casalog
    made["casac"].__dict__["casac"] = types.SimpleNamespace(table=casatools.table)
    made["casadef"].__dict__["casa_version"] = "5.1.1"
    # A name that is None here cannot be imported.
    sys.modules.update({**made, "casatasks": None, "casatools": None})  # type: ignore[dict-item]


if __name__ == "__main__":
    sys.path.insert(0, os.environ.get("STAGECAL_JOB", ""))
    main(Path(sys.argv[1]), sys.argv[2:])
