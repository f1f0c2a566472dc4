"""The embedded site: a whole installation in one directory, with examples in its archive and real raw data.

Everything in it works as at an observatory: only the archive is SQLite, mail goes into a maildir, jobs run on this
machine. The store holds of each calibrated MOUS what the archive would: texts as the pipeline writes them from the
start, raw data and calibration products made by CASA, when the site is made or at their first use.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from stagecal.domain.identifiers import sanitized
from stagecal.ports import FatalError
from stagecal.resources import resource

# The store has data of the MOUSs of which the archive lists products.
_UNITS = (
    "SELECT ous.STATUS_ENTITY_ID AS mous, ous.DOMAIN_ENTITY_ID AS part_id, ous.OBS_PROJECT_ID AS project_uid, "
    "ous.OBS_PROJECT_STATUS_ID AS project_status_uid, ous.XML AS status_xml, projects.PROJECT_CODE AS project, "
    "sbs.SB_STATUS_UID AS sched_block_status_uid, ous.PARENT_OBS_UNIT_SET_STATUS_ID AS group_uid, "
    "groups.PARENT_OBS_UNIT_SET_STATUS_ID AS science_uid "
    "FROM OBS_UNIT_SET_STATUS ous JOIN ASA_PROJECT projects ON projects.PROJECT_UID = ous.OBS_PROJECT_ID "
    "JOIN OBS_UNIT_SET_STATUS groups ON groups.STATUS_ENTITY_ID = ous.PARENT_OBS_UNIT_SET_STATUS_ID "
    "JOIN BMMV_SCHEDBLOCK sbs ON sbs.MOUS_STATUS_UID = ous.STATUS_ENTITY_ID "
    "WHERE ous.STATUS_ENTITY_ID IN (SELECT ASA_OUS_ID FROM ASA_PRODUCT_FILES) ORDER BY 1"
)
_FILES = "SELECT NGAS_FILE_ID FROM ASA_PRODUCT_FILES WHERE ASA_OUS_ID = ? ORDER BY 1"
_PASSED = "SELECT EXECBLOCKUID FROM AQUA_EXECBLOCK WHERE QA0STATUS = 'Pass'"
# The archived files that are texts: their ends, and our templates.
_TEXTS = {
    "pipeline_manifest.xml": "store/pipeline_manifest.xml",
    "casa_piperestorescript.py": "store/casa_piperestorescript.txt",
    "casa_pipescript.py": "store/casa_pipescript.txt",
    "scriptForPI.py": "store/scriptForPI.txt",
}
# CASA and pipeline by the year of a project (cycles 5 to 8 of ALMA).
_VERSIONS = {
    "2017": ("5.1.1-5", "40896"),
    "2018": ("5.4.0-70", "42254"),
    "2019": ("5.6.1-8", "42866"),
    "2021": ("6.2.1-7", "2021.2.0.128"),
}

_NO_LISTING = "<!doctype html><html lang=en><title>stagecal</title><p>Staged data have links of their own.</html>\n"


def make_site(directory: Path) -> Path:
    """Make the site without its raw data; return its configuration file. Raises FatalError if it cannot be made."""
    from stagecal.adapters.archive_embedded import create_embedded_archive

    try:
        for name in ("triggers", "mail", "work", "preview", "state", "store"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        (directory / "state").chmod(0o700)
        # What a web server may show: the staged data and nothing else, and no list of whose there are.
        (directory / "www").mkdir()
        (directory / "www" / "preview").symlink_to(Path("..", "preview"))
        (directory / "preview" / "index.html").write_text(_NO_LISTING, encoding="utf-8")
        create_embedded_archive(directory / "archive.db", resource("etc", "archive.sql").read_text(encoding="utf-8"))
        make_store(directory / "store", archived_units(directory / "archive.db"))
        config = directory / "stagecal.toml"
        shutil.copyfile(resource("etc", "embedded.toml"), config)
    except OSError as error:
        raise FatalError(f"the site cannot be made: {error.filename}: {error.strerror}") from error
    return config


@dataclass(frozen=True)
class ArchivedUnit:
    """A MOUS of which the store has data: its sessions, each with its EBs and whether they were calibrated, the names
    of its archived files, and what their texts say beside this."""

    mous: str
    sessions: tuple[tuple[str, tuple[tuple[str, bool], ...]], ...]
    files: tuple[str, ...]
    facts: Mapping[str, str]


def archived_units(archive: Path) -> list[ArchivedUnit]:
    """Return the MOUSs of which the archive's database lists products."""
    from stagecal.domain.restore.sessions import sessions_of

    database = sqlite3.connect(archive)
    database.row_factory = sqlite3.Row
    try:
        passed = {row[0] for row in database.execute(_PASSED)}
        return [
            ArchivedUnit(
                mous=row["mous"],
                sessions=tuple(
                    (f"session_{session.number}", tuple((uid, uid in passed) for uid in session.execution_blocks))
                    for session in sessions_of(row["status_xml"], mous=row["mous"])
                ),
                files=tuple(found[0] for found in database.execute(_FILES, [row["mous"]])),
                facts={name: text for name, text in dict(row).items() if name not in ("mous", "status_xml")},
            )
            for row in database.execute(_UNITS)
        ]
    finally:
        database.close()


def make_store(store: Path, units: list[ArchivedUnit]) -> None:
    """Make the store of these MOUSs, without what CASA makes: its programs, its index, and the archived texts."""
    from stagecal.adapters.templates import JinjaTemplates

    templates = JinjaTemplates(resource("templates"))
    for name in ("mous", "products", "raw"):
        (store / name).mkdir(parents=True)
    for source in (
        resource("templates", "store", "fetch_raw.sh"),
        resource("templates", "store", "fetch_product.sh"),
        resource("templates", "store", "make"),
        resource("templates", "casa", "make_example_data.py"),
        resource("templates", "casa", "casasiteconfig.py"),
    ):
        shutil.copyfile(source, store / source.name)
    for program in ("fetch_raw.sh", "fetch_product.sh", "make"):
        (store / program).chmod(0o755)
    index = []
    for unit in units:
        name = sanitized(unit.mous)
        blocks = [uid for _, session in unit.sessions for uid, _ in session]
        index += [f"{known} {name}\n" for known in (*map(sanitized, blocks), *unit.files)]
        (store / "mous" / f"{name}.json").write_text(json.dumps(_to_be_made(unit), indent=1) + "\n", encoding="utf-8")
        (store / "products" / name).mkdir()
        values = _said_in_texts(unit)
        for file, template in _texts_of(unit):
            (store / "products" / name / file).write_text(templates.render(template, **values), encoding="utf-8")
    (store / "index").write_text("".join(index), encoding="utf-8")


def _texts_of(unit: ArchivedUnit) -> Iterator[tuple[str, str]]:
    for file in unit.files:
        for end, template in _TEXTS.items():
            if file.endswith(end):
                yield file, template


def _to_be_made(unit: ArchivedUnit) -> dict[str, Any]:
    """Return what make_example_data.py has to know of a MOUS."""
    texts = {file for file, _ in _texts_of(unit)}
    return {
        "mous": unit.mous,
        "project_uid": unit.facts["project_uid"],
        "sessions": [
            {"name": name, "execution_blocks": [{"uid": uid, "calibrated": passed} for uid, passed in blocks]}
            for name, blocks in unit.sessions
        ],
        "files": [file for file in unit.files if file not in texts],
    }


def _said_in_texts(unit: ArchivedUnit) -> dict[str, Any]:
    """Return the values of the templates. Only calibrated EBs, and sessions that have some, are named, as by the
    pipeline; its names of files lack the `member.` of the archive's in the oldest manifests."""
    facts, name = unit.facts, sanitized(unit.mous)
    year = facts["project"][:4]
    casa_version, pipeline_version = _VERSIONS[year]
    stem = name if year == "2017" else f"member.{name}"
    calibrated = [
        (session, [sanitized(uid) for uid, passed in blocks if passed])
        for session, blocks in unit.sessions
        if any(passed for _, passed in blocks)
    ]
    return {
        "mous": unit.mous,
        "unit": name,
        "stem": stem,
        "casa_version": casa_version,
        "pipeline_version": pipeline_version,
        "sessions": [
            {
                "name": session,
                "caltables": f"{stem}.{session}.caltables.tgz",
                "aux_caltables": f"{stem}.{session}.auxcaltables.tgz",
                "execution_blocks": blocks,
            }
            for session, blocks in calibrated
        ],
        "vis": repr([block for _, blocks in calibrated for block in blocks]),
        "session": repr([session for session, blocks in calibrated for _ in blocks]),
        "project": facts["project"],
        "project_uid": facts["project_uid"],
        "part_id": facts["part_id"],
        "project_status_uid": facts["project_status_uid"],
        "science_unit": sanitized(facts["science_uid"]),
        "group_unit": sanitized(facts["group_uid"]),
        "sched_block_status": sanitized(facts["sched_block_status_uid"]),
    }


def make_data(config: Path, *, progress: TextIO) -> None:
    """Make the CASA worker environment (once per user), and the data of all MOUSs in the store.

    Raises TransientError or FatalError with what is missing.
    """
    import os

    from stagecal.casa_worker import casa_environment, ensure_casa_worker

    python = ensure_casa_worker(progress=progress)
    store = config.parent / "store"
    names = sorted(path.stem for path in (store / "mous").glob("*.json"))
    print("Making raw data and their first calibration with CASA ...", file=progress, flush=True)
    with subprocess.Popen(
        [python, "-E", "-s", store / "make_example_data.py", store, *names],
        env=casa_environment(python, os.environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        said: deque[str] = deque(maxlen=5)
        for line in process.stdout or ():
            said.append(line.strip())
            # CASA says more than a newcomer needs to know.
            if line.startswith("uid___"):
                print(f"  {line.rstrip()}", file=progress, flush=True)
    if process.returncode != 0:
        raise FatalError(f"the data could not be made (exit code {process.returncode}): {' / '.join(said)}")
