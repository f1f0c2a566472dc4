"""One round with the Oracle database, in a process of its own: a job as JSON on stdin, the answers as JSON on stdout.

Every failure of the driver, the network or the password file becomes an answer too, told apart into transient and
fatal; the password is in no message. The process ends itself soon after its deadline if nobody is left to kill it.
"""

from __future__ import annotations

import json
import re
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from stagecal.ports import FatalError, TransientError, UsageError

_CODE = re.compile(r"\b(?:DPY|DPI|ORA)-\d+")
_COMPARISON = re.compile(r"\(Similar to [^)]*\)")
_NOISE = re.compile(r"\s*\(CONNECTION_ID=[^)]*\)|\s*\bHelp: \S+|\s*\bSee https?://\S+( for help)?")

_SET_THICK = "the driver alone cannot talk to this database: set thick = true in [archive]"

FATAL: Mapping[str, str] = {
    "DPY-3001": _SET_THICK,
    "DPY-3010": _SET_THICK,
    "DPY-3015": _SET_THICK,
    "DPI-1047": "Oracle's client libraries are not found: install them, or set thick = false in [archive]",
    "DPI-1072": "Oracle's client libraries are too old: install newer ones, or set thick = false in [archive]",
    "ORA-01017": "wrong user or password: correct [archive] user, or the content of password_file",
    "ORA-28000": "the account is locked: ask the database's administrators",
    "ORA-28001": "the password has expired: set a new one, and write it into password_file",
    "ORA-01045": "the account may not log in: ask the database's administrators for CREATE SESSION",
    "ORA-00942": "a table is missing or may not be read: ask for the right to read it, or correct the query",
    "ORA-00904": "a column is missing: correct the query",
    "ORA-01031": "a right is missing: ask the database's administrators",
    "ORA-01036": "a query has other binds than :mous_uid: correct it",
    "DPY-4008": "a query has other binds than :mous_uid: correct it",
    "DPY-4000": "the name is unknown in tnsnames.ora: correct [archive] dsn",
    "DPY-4026": "there is no tnsnames.ora: correct [archive] dsn, or set TNS_ADMIN",
    "DPY-4027": "the dsn is neither host:port/service nor a name that tnsnames.ora knows: correct [archive] dsn",
    "ORA-12154": "the name is unknown in tnsnames.ora: correct [archive] dsn",
    "DPY-4017": "the dsn cannot be understood: correct [archive] dsn",
    "DPY-4018": "the dsn cannot be understood: correct [archive] dsn",
    "DPY-4021": "the dsn names an unknown protocol: correct [archive] dsn",
    "DPY-6002": "the server's certificate is not the one that the dsn asks for: correct [archive] dsn",
    "DPY-6006": "the server's certificate names another host: correct [archive] dsn",
    "CERTIFICATE_VERIFY_FAILED": "the server's certificate is not trusted: install its authority's certificate",
}
"""Codes that waiting does not mend, with what to do. A code in neither table is fatal too: a person looks at it."""

TRANSIENT: Mapping[str, str] = {
    "DPY-6001": "if it stays so, correct the service name in [archive] dsn",
    "DPY-6003": "if it stays so, correct the SID in [archive] dsn",
    "ORA-12514": "if it stays so, correct the service name in [archive] dsn",
    "ORA-12505": "if it stays so, correct the SID in [archive] dsn",
} | dict.fromkeys(
    (
        # The listener or the network: refused, closed, reset, timed out.
        *("DPY-6000", "DPY-6005", "DPY-4011", "DPY-4024", "DPY-4005", "DPY-4033", "DPY-1001", "DPI-1067", "DPI-1080"),
        *("ORA-12170", "ORA-12516", "ORA-12518", "ORA-12519", "ORA-12520", "ORA-12528", "ORA-12535", "ORA-12537"),
        *("ORA-12541", "ORA-12543", "ORA-12545", "ORA-12547", "ORA-12560", "ORA-12571", "ORA-12637", "ORA-25408"),
        # The database is starting, stopping, full of sessions, or ended ours.
        *("ORA-01033", "ORA-01034", "ORA-01089", "ORA-01090", "ORA-01092", "ORA-01109", "ORA-00018", "ORA-00020"),
        *("ORA-00028", "ORA-01012", "ORA-01013", "ORA-02391", "ORA-02396", "ORA-03113", "ORA-03114", "ORA-03135"),
        *("ORA-03136", "ORA-03156", "ORA-04031"),
        # The snapshot is gone, or a materialized view was being refreshed.
        *("ORA-01555", "ORA-08103", "ORA-12008"),
    ),
    "try again, and if it stays so look at the database and its listener",
)
"""Codes after which the same round may succeed later, with what to do if it does not."""


def diagnosis(text: str) -> tuple[bool, str]:
    """Given the driver's whole message, return whether trying again may help, and what a person can do.

    A message may carry several codes (DPY-6005 wraps the cause of a failed connection): a fatal one decides.
    """
    codes = _CODE.findall(_COMPARISON.sub("", text))
    if "CERTIFICATE_VERIFY_FAILED" in text:
        codes.append("CERTIFICATE_VERIFY_FAILED")
    for code in codes:
        if code in FATAL:
            return False, FATAL[code]
    # The last code is the innermost cause.
    for code in reversed(codes):
        if code in TRANSIENT:
            return True, TRANSIENT[code]
    return False, "ask the database's administrators"


def answer(job: Mapping[str, Any]) -> dict[str, Any]:
    """Given a job, ask the database and return {"answers": ...}, or {"error": {"transient", "message"}}."""
    try:
        return {"answers": _ask(job)}
    except TransientError as error:
        return {"error": {"transient": True, "message": str(error)}}
    except FatalError as error:
        return {"error": {"transient": False, "message": str(error)}}


def _ask(job: Mapping[str, Any]) -> dict[str, Any]:
    from pathlib import Path

    import oracledb

    from stagecal.config import read_secret

    try:
        password = read_secret(Path(job["password_file"]), group=job["password_group"])
    except UsageError as error:
        raise FatalError(str(error)) from None
    place = f"the archive {job['dsn']}"
    query = ""
    try:
        if job["thick"]:
            oracledb.init_oracle_client()
        else:
            oracledb.enable_thin_mode()  # type: ignore[no-untyped-call]  # The driver annotates it incompletely.
        oracledb.defaults.fetch_lobs = False
        with oracledb.connect(
            user=job["user"], password=password, dsn=job["dsn"], tcp_connect_timeout=job["timeout_s"]
        ) as connection:
            connection.call_timeout = max(1, int(job["timeout_s"] * 1000))
            with connection.cursor() as cursor:
                # One snapshot for all queries, in which nothing can be written.
                cursor.execute("SET TRANSACTION READ ONLY")
                answers = {}
                for query, text in job["queries"].items():
                    cursor.execute(text, job["binds"])
                    columns = [column[0] for column in cursor.description]
                    rows = cursor.fetchmany(job["row_limit"] + 1)
                    answers[query] = {"columns": columns, "rows": [encoded_row(query, columns, row) for row in rows]}
            return answers
    except oracledb.Error as error:
        transient, advice = diagnosis(str(error))
        reason = _one_line(str(error), password)
        raise (TransientError if transient else FatalError)(
            f"{place} failed{f' in the query {query}' if query else ''} ({reason}): {advice}"
        ) from None
    except socket.gaierror as error:
        raise TransientError(
            f"the host of {place} is not found ({error.strerror}): look at the name service, or correct [archive] dsn"
        ) from None
    except OSError as error:
        raise TransientError(
            f"{place} cannot be reached ({_one_line(str(error), password)}): try again, and if it stays so look at "
            "the network"
        ) from None


def _one_line(text: str, password: str) -> str:
    """Return the driver's message on one line, without its connection id, addresses of help pages, or the password."""
    line = " ".join(_NOISE.sub("", text).split())
    return line.replace(password, "***") if password in line else line


def encoded_row(query: str, columns: Sequence[str], row: Sequence[Any]) -> list[object]:
    """Return a row as JSON can carry it. Raises FatalError for a value that is no text, number, date, or NULL."""
    values: list[object] = []
    for column, value in zip(columns, row, strict=True):
        if isinstance(value, datetime):
            values.append({"datetime": value.isoformat()})
        elif value is None or isinstance(value, str | int | float):
            values.append(value)
        else:
            raise FatalError(
                f"the archive query {query} gives a value of type {type(value).__name__} in column {column}: "
                "correct the query"
            )
    return values


def main() -> int:
    """Read a job from stdin, write its answer to stdout; return 0 if there is an answer of any kind."""
    job = json.load(sys.stdin)
    # The one who asked kills us at the deadline; if it died before, nobody else would.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    signal.setitimer(signal.ITIMER_REAL, job["timeout_s"] + 1)
    json.dump(answer(job), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
