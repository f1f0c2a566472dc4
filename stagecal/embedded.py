"""The embedded site: a whole installation in one directory, with examples in its archive and real raw data.

Everything in it works as at an observatory: only the archive is SQLite, mail goes into a maildir, jobs run on this
machine. The raw data are made by CASA, when the site is made or at their first use.
"""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
from collections import deque
from pathlib import Path
from typing import TextIO

from stagecal.ports import FatalError
from stagecal.resources import resource

# The MOUSs whose data can be delivered have raw data in the store.
_DELIVERED_EBS = (
    "SELECT DISTINCT EXECBLOCKUID FROM AQUA_EXECBLOCK ebs "
    "JOIN SHIFTLOG_ENTRIES shifts ON ebs.EXECBLOCKUID = shifts.SE_EB_UID "
    "JOIN BMMV_SCHEDBLOCK sbs ON shifts.SE_SB_ID = sbs.ARCHIVE_UID "
    "JOIN OBS_UNIT_SET_STATUS ous ON ous.STATUS_ENTITY_ID = sbs.MOUS_STATUS_UID "
    "WHERE ous.DOMAIN_ENTITY_STATE = 'Delivered' AND ebs.QA0STATUS IN ('Pass', 'SemiPass') ORDER BY 1"
)

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
        store = directory / "store"
        for source in (
            resource("templates", "store", "fetch_raw.sh"),
            resource("templates", "store", "make"),
            resource("templates", "casa", "make_example_data.py"),
            resource("templates", "casa", "casasiteconfig.py"),
        ):
            shutil.copyfile(source, store / source.name)
        for program in ("fetch_raw.sh", "make"):
            (store / program).chmod(0o755)
        known = [uid.replace(":", "_").replace("/", "_") for uid in execution_blocks(directory / "archive.db")]
        (store / "execution_blocks").write_text("".join(f"{name}\n" for name in known), encoding="utf-8")
        config = directory / "stagecal.toml"
        shutil.copyfile(resource("etc", "embedded.toml"), config)
    except OSError as error:
        raise FatalError(f"the site cannot be made: {error.filename}: {error.strerror}") from error
    return config


def execution_blocks(archive: Path) -> list[str]:
    """Return the EBs of which the embedded site has raw data."""
    database = sqlite3.connect(archive)
    try:
        return [row[0] for row in database.execute(_DELIVERED_EBS)]
    finally:
        database.close()


def make_data(config: Path, *, progress: TextIO) -> None:
    """Make the CASA worker environment (once per user) and the raw data of the store.

    Raises TransientError or FatalError with what is missing.
    """
    import os

    from stagecal.casa_worker import casa_environment, ensure_casa_worker

    python = ensure_casa_worker(progress=progress)
    store = config.parent / "store"
    names = (store / "execution_blocks").read_text(encoding="utf-8").split()
    print("Making raw data with CASA ...", file=progress, flush=True)
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
        raise FatalError(f"the raw data could not be made (exit code {process.returncode}): {' / '.join(said)}")
