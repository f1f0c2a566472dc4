"""The archive port over an SQLite file that has the archive's tables, as the embedded site has it.

Read only, a fresh connection for each look, all queries in one snapshot. A file that is missing, locked or too slow
raises TransientError; one that may not be read, is damaged or lacks a table raises FatalError.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stagecal.adapters.archive_queries import QueriedArchive, Rows, bind_of, limit_of
from stagecal.ports import FatalError, TransientError

if TYPE_CHECKING:
    import sqlite3

_STEPS_BETWEEN_LOOKS_AT_THE_CLOCK = 100_000


@dataclass(frozen=True)
class SqliteArchive(QueriedArchive):
    """An archive in the SQLite file `path`; `timeout_s` bounds the wait for a lock, and each query, in seconds."""

    path: Path
    queries: Mapping[str, str]
    timeout_s: float

    def ask(self, names: Sequence[str], value: str) -> Mapping[str, Rows]:
        """Return the answers to these queries, all with this value for their bind."""
        import sqlite3

        self._refuse_unreadable_file()
        name = ""
        try:
            connection = sqlite3.connect(":memory:", timeout=self.timeout_s, isolation_level=None, uri=True)
            try:
                self._attach(connection)
                answers = {}
                for name in names:
                    cursor = connection.execute(self.queries[name], {bind_of(name): value})
                    columns = tuple(column[0] for column in cursor.description)
                    answers[name] = Rows(columns, tuple(cursor.fetchmany(limit_of(name) + 1)))
            finally:
                connection.close()
        except sqlite3.Error as error:
            raise self._translated(error, name) from error
        return answers

    def _attach(self, connection: sqlite3.Connection) -> None:
        """Let ALMA.X name the tables of the file, read only, in one snapshot for all queries."""
        deadline = time.monotonic() + self.timeout_s
        connection.set_progress_handler(lambda: time.monotonic() > deadline, _STEPS_BETWEEN_LOOKS_AT_THE_CLOCK)
        connection.execute("ATTACH DATABASE ? AS ALMA", (f"{self.path.absolute().as_uri()}?mode=ro",))
        connection.execute("PRAGMA query_only = ON")
        connection.execute("BEGIN")

    def _refuse_unreadable_file(self) -> None:
        # SQLite tells a missing file and a forbidden one by the same words.
        try:
            os.close(os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        except PermissionError as error:
            raise FatalError(f"the archive {self.path} may not be read by this user: change its permissions") from error
        except OSError as error:
            raise TransientError(
                f"the archive {self.path} cannot be opened ({error.strerror}): put it back, or correct [archive] path"
            ) from error

    def _translated(self, error: sqlite3.Error, query: str) -> FatalError | TransientError:
        import sqlite3

        # Errors of the binding itself (a wrong bind, a bad value) carry no code.
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        reason = " ".join(str(error).split())
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return FatalError(f"the archive {self.path} is damaged ({reason}): restore it, or make it anew")
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_INTERRUPT):
            return TransientError(
                f"the archive {self.path} did not answer in {self.timeout_s:g} s ({reason}): try later"
            )
        if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_NOMEM):
            return TransientError(f"the archive {self.path} cannot be read now ({reason}): look at its disk")
        place = f"query {query} on the archive {self.path}" if query else f"archive {self.path}"
        return FatalError(f"the {place} failed ({reason}): correct the query or the archive")
