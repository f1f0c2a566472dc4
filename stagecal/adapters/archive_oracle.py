"""The archive port over an Oracle database, asked by a worker process that is killed at the deadline.

A listener that accepts and then stays silent blocks the driver's connect() for ever, and with it every later one in
the same process; so no connection is ever made in ours. A round that ends without an answer raises TransientError if
trying again may help, FatalError if a person has to look.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import stagecal
from stagecal.adapters.archive_queries import QueriedArchive, Rows, bind_of, limit_of
from stagecal.ports import FatalError, TransientError

_WORKER = "stagecal.adapters.oracle_worker"


@dataclass(frozen=True)
class OracleSettings:
    """Where the database is and who asks. The password stays in its file until the worker reads it.

    `timeout_s` (seconds) is the deadline for a whole round: start of the worker, connection, all queries.
    `password_group` may read the password file beside its owner. `thick` loads Oracle's client libraries, for
    databases that the driver alone cannot talk to.
    """

    dsn: str
    user: str
    password_file: Path
    password_group: str | None
    thick: bool
    timeout_s: float


@dataclass(frozen=True)
class OracleArchive(QueriedArchive):
    """An archive in the Oracle database of `settings`, asked with `queries`."""

    settings: OracleSettings
    queries: Mapping[str, str]

    def ask(self, names: Sequence[str], value: str) -> Mapping[str, Rows]:
        """Return the answers to these queries, all with this value for their one bind."""
        settings = self.settings
        job = {
            "dsn": settings.dsn,
            "user": settings.user,
            "password_file": str(settings.password_file),
            "password_group": settings.password_group,
            "thick": settings.thick,
            "timeout_s": settings.timeout_s,
            "queries": {name: self.queries[name] for name in names},
            "binds": {bind_of(name): value for name in names},
            "row_limit": max(limit_of(name) for name in names),
        }
        return self._reply(_run_worker(json.dumps(job), settings.timeout_s))

    def _reply(self, ended: subprocess.CompletedProcess[bytes] | None) -> Mapping[str, Rows]:
        place = f"the archive {self.settings.dsn}"
        if ended is None:
            raise TransientError(
                f"{place} gave no answer in {self.settings.timeout_s:g} s: try again, and if it stays so "
                "look at the database and its listener, or raise [archive] timeout_s"
            )
        try:
            reply = json.loads(ended.stdout)
            if "error" in reply:
                kind = TransientError if reply["error"]["transient"] else FatalError
                message = str(reply["error"]["message"])
            else:
                return {
                    name: Rows(
                        tuple(answer["columns"]),
                        tuple(decoded_row(row) for row in answer["rows"]),
                    )
                    for name, answer in reply["answers"].items()
                }
        except (ValueError, KeyError, TypeError, AttributeError):
            if ended.returncode < 0:
                name = signal.Signals(-ended.returncode).name
                raise TransientError(f"the process that asks {place} was ended by {name}: try again") from None
            last = ended.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            raise FatalError(
                f"the process that asks {place} ended with code {ended.returncode} and no answer ({last[:300]}): "
                "check the installation of the oracledb package"
            ) from None
        raise kind(message)


def _run_worker(job: str, timeout_s: float) -> subprocess.CompletedProcess[bytes] | None:
    """Run the worker on the job; return how it ended, or None if it had to be killed at the deadline."""
    # -P, and absolute paths only, keep the current directory, which may be anybody's, out of the worker's module
    # path; the worker finds this very package, also in a checkout that was never installed.
    package_root = str(Path(stagecal.__file__).resolve().parents[1])
    inherited = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(entry)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([package_root, *inherited])}
    command = [sys.executable, "-P", "-m", _WORKER]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        raise TransientError(f"the process that asks the archive cannot be started ({error.strerror})") from error
    with process:
        try:
            output, errors = process.communicate(job.encode(), timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            # Also after an interrupt, and with whatever the client libraries started in the worker's session.
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def decoded_row(row: Sequence[Any]) -> tuple[object, ...]:
    """Return a row as the database gave it to the worker; a datetime, which JSON does not know, comes tagged."""
    return tuple(datetime.fromisoformat(value["datetime"]) if isinstance(value, dict) else value for value in row)
