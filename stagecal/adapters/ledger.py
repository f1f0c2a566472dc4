"""The ledger on local disk: one SQLite file (WAL, synchronous FULL) and one small sidecar file per staged directory.

Every public method is one transaction. The sidecars (`staged/<token>.json`) repeat what decides about deletion, so that
it survives the loss of the database. Trouble with the disk or a lock is a TransientError, damage a FatalError. A
database of a former version is brought up to date when it is opened, in one transaction.
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from stagecal.domain.identifiers import masked_token
from stagecal.domain.records import (
    LeftBehind,
    MailKind,
    NewMail,
    OutboxMail,
    ProductFile,
    Recipient,
    RecipientState,
    RecordedStep,
    Step,
)
from stagecal.domain.requests import TRANSITIONS, Origin, Outcome, Request, State
from stagecal.domain.retention import Staging
from stagecal.domain.verdicts import Verdict
from stagecal.ports import FatalError, StaleRequestError, TransientError

SCHEMA_VERSION = 2

# A file of the staging area is known by device, inode, time and digest: all tokens that link it share its verification.
# In `rotten` an empty token means the file itself, wherever it is linked, another one the entry in its directory alone.
_VERIFICATION = """
CREATE TABLE verifications (
    device INTEGER NOT NULL, inode INTEGER NOT NULL, modified_ns INTEGER NOT NULL, sha256 TEXT NOT NULL,
    begun_at TEXT NOT NULL, verified_at TEXT, PRIMARY KEY (device, inode, modified_ns, sha256)
);
CREATE TABLE rotten (
    device INTEGER NOT NULL, inode INTEGER NOT NULL, modified_ns INTEGER NOT NULL, sha256 TEXT NOT NULL,
    token TEXT NOT NULL, problem TEXT NOT NULL, found_at TEXT NOT NULL, told_at TEXT,
    PRIMARY KEY (device, inode, modified_ns, sha256, token)
);
CREATE INDEX files_by_inode ON files (inode);
"""

_SCHEMA = """
CREATE TABLE requests (
    id TEXT PRIMARY KEY, sequence INTEGER NOT NULL UNIQUE, origin TEXT NOT NULL,
    mous TEXT NOT NULL, project TEXT NOT NULL, ticket TEXT NOT NULL, user TEXT NOT NULL, email TEXT NOT NULL,
    calfields TEXT NOT NULL, contact TEXT NOT NULL,
    trigger_name TEXT NOT NULL, trigger_text TEXT NOT NULL, trigger_sha256 TEXT NOT NULL,
    received_at TEXT NOT NULL, state TEXT NOT NULL, since TEXT NOT NULL, round INTEGER NOT NULL,
    outcome TEXT, verdict TEXT, reason TEXT NOT NULL, not_before TEXT, attempts INTEGER NOT NULL, judged_on TEXT,
    execution_blocks TEXT NOT NULL, calibration TEXT NOT NULL, recipe TEXT NOT NULL, token TEXT NOT NULL,
    node TEXT NOT NULL, work TEXT NOT NULL, nonce TEXT NOT NULL, holds_slot INTEGER NOT NULL, lost_on TEXT NOT NULL,
    seen_in TEXT NOT NULL, missing_since TEXT, wish TEXT NOT NULL, waits_for TEXT NOT NULL,
    failed_with TEXT NOT NULL
);
CREATE INDEX open_requests ON requests (sequence) WHERE state <> 'CLOSED';
CREATE INDEX requests_by_trigger ON requests (trigger_name);
CREATE TABLE steps (
    number INTEGER PRIMARY KEY, request TEXT NOT NULL, time TEXT NOT NULL,
    step TEXT NOT NULL, asked TEXT NOT NULL, seen TEXT NOT NULL, decided TEXT NOT NULL
);
CREATE INDEX steps_by_request ON steps (request);
CREATE TABLE terminal (number INTEGER PRIMARY KEY, request TEXT NOT NULL, line TEXT NOT NULL);
CREATE INDEX terminal_by_request ON terminal (request);
CREATE TABLE mails (
    id INTEGER PRIMARY KEY, request TEXT NOT NULL, kind TEXT NOT NULL, message_id TEXT NOT NULL UNIQUE,
    sender TEXT NOT NULL, message BLOB NOT NULL, created_at TEXT NOT NULL
);
CREATE TABLE recipients (
    mail INTEGER NOT NULL REFERENCES mails, address TEXT NOT NULL, is_primary INTEGER NOT NULL, state TEXT NOT NULL,
    attempts INTEGER NOT NULL, not_before TEXT, text TEXT NOT NULL, tried_since TEXT,
    unconfirmed INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (mail, address)
);
CREATE INDEX pending_recipients ON recipients (mail) WHERE state = 'pending';
CREATE TABLE stagings (
    token TEXT PRIMARY KEY, request TEXT NOT NULL, recipe TEXT NOT NULL, published_at TEXT NOT NULL,
    notified_at TEXT, retention_days INTEGER NOT NULL, extension_days INTEGER NOT NULL,
    withdrawn_at TEXT, purged_at TEXT, absent TEXT NOT NULL
);
CREATE INDEX stagings_by_recipe ON stagings (recipe);
CREATE TABLE files (
    token TEXT NOT NULL, name TEXT NOT NULL, execution_block TEXT NOT NULL, size INTEGER NOT NULL,
    sha256 TEXT NOT NULL, device INTEGER NOT NULL, inode INTEGER NOT NULL, modified_ns INTEGER NOT NULL,
    PRIMARY KEY (token, name)
);
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""

# What `stagecal restore` was told: an engine, and the home of a CASA. Until when a job may live.
_RESTORES = """
ALTER TABLE requests ADD COLUMN engine TEXT NOT NULL DEFAULT '';
ALTER TABLE requests ADD COLUMN casa_home TEXT NOT NULL DEFAULT '';
ALTER TABLE requests ADD COLUMN leased_until TEXT;
CREATE TABLE left_behind (
    node TEXT NOT NULL, work TEXT NOT NULL, nonce TEXT NOT NULL, since TEXT NOT NULL, PRIMARY KEY (node, work, nonce)
);
"""

_MIGRATIONS = {0: _SCHEMA, 1: _VERIFICATION + _RESTORES}
"""What makes the next version of each version; an empty file has version 0."""

_KEY = "device, inode, modified_ns, sha256"


def _same_file(one: str, other: str) -> str:
    """Return the condition that two tables speak of the same file."""
    return " AND ".join(f"{one}.{name} = {other}.{name}" for name in _KEY.split(", "))


_IS_ROTTEN = (
    f"EXISTS (SELECT 1 FROM rotten WHERE {_same_file('rotten', 'files')} "  # noqa: S608 - our own text
    "AND rotten.token IN ('', files.token))"
)

_REQUEST_FIELDS = tuple(field.name for field in fields(Request))
_STAGING_FIELDS = tuple(field.name for field in fields(Staging))
_FILE_FIELDS = tuple(field.name for field in fields(ProductFile))
_TUPLES = frozenset({"calfields", "execution_blocks", "lost_on"})
_TIMES = frozenset(
    {
        "received_at",
        "since",
        "not_before",
        "missing_since",
        "leased_until",
        "published_at",
        "notified_at",
        "withdrawn_at",
        "purged_at",
    }
)
_ENUMS: Mapping[str, Any] = {"origin": Origin, "state": State, "outcome": Outcome, "verdict": Verdict}


def _to_column(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="microseconds")
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, tuple):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, bool):
        return int(value)
    return None if value is None else (str(value) if isinstance(value, str) else value)


def _from_column(name: str, value: Any) -> Any:
    if value is None:
        return None
    if name in _TIMES:
        return datetime.fromisoformat(value)
    if name == "judged_on":
        return date.fromisoformat(value)
    if name in _TUPLES:
        return tuple(json.loads(value))
    if name in _ENUMS:
        return _ENUMS[name](value)
    if name == "holds_slot":
        return bool(value)
    return value


def _request(row: sqlite3.Row) -> Request:
    return Request(**{name: _from_column(name, row[name]) for name in _REQUEST_FIELDS})


def _staging(row: sqlite3.Row) -> Staging:
    return Staging(**{name: _from_column(name, row[name]) for name in _STAGING_FIELDS})


def _product_file(row: sqlite3.Row) -> ProductFile:
    return ProductFile(**{name: row[name] for name in _FILE_FIELDS})


def _key(file: ProductFile) -> tuple[int, int, int, str]:
    return file.device, file.inode, file.modified_ns, file.sha256


class SqliteLedger:
    """The Ledger port on one SQLite file below `directory`, shared by daemon and commands on this machine."""

    def __init__(self, directory: Path, *, timeout_s: float = 20, anew: bool = False) -> None:
        """Open the ledger, or make an empty one at the first start.

        A database that is missing although staged data are on record beside it was lost: that is a FatalError unless it
        is to be made `anew`, because an empty ledger would do everything once more.
        """
        self._directory = directory
        self._path = directory / "stagecal.db"
        self._sidecars = directory / "staged"
        self._lock = threading.RLock()
        with self._errors():
            new = not self._path.exists()
            if new and not anew and self._sidecars.is_dir():
                raise FatalError(f"the ledger {self._path} is gone: find it, or make it anew by `stagecal rebuild`")
            directory.mkdir(parents=True, exist_ok=True)
            if new:
                os.close(os.open(self._path, os.O_CREAT | os.O_WRONLY, 0o600))
            self._database = sqlite3.connect(
                self._path, timeout=timeout_s, isolation_level=None, check_same_thread=False
            )
            self._database.row_factory = sqlite3.Row
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = FULL")
            self._migrate(anew=anew)
            # Last of all: where this directory is, there was a whole database.
            self._sidecars.mkdir(mode=0o700, exist_ok=True)

    def close(self) -> None:
        """Close the database; the object is of no use afterwards."""
        with self._lock:
            self._database.close()

    # --- transactions ----------------------------------------------------------------------------------------------

    def _migrate(self, *, anew: bool) -> None:
        if self._database.execute("PRAGMA user_version").fetchone()[0] == SCHEMA_VERSION:
            return
        with self._transaction():
            version = self._database.execute("PRAGMA user_version").fetchone()[0]
            if version == SCHEMA_VERSION:
                return
            if version not in _MIGRATIONS:
                raise FatalError(
                    f"{self._path} has schema version {version}, this program knows {SCHEMA_VERSION}: "
                    "use the program version that wrote it"
                )
            if version == 0 and self._sidecars.is_dir() and not anew:
                raise FatalError(f"the ledger {self._path} is empty: find it, or make it anew by `stagecal rebuild`")
            for former in range(version, SCHEMA_VERSION):
                for statement in _MIGRATIONS[former].split(";"):
                    if statement.strip():
                        self._database.execute(statement)
            self._database.execute(f"PRAGMA user_version = {SCHEMA_VERSION:d}")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise TransientError(f"the ledger {self._path} cannot be used now: {error}") from error
        except sqlite3.DatabaseError as error:
            raise FatalError(
                f"the ledger {self._path} is damaged ({error}): move it and its -wal and -shm files away, "
                "then run `stagecal rebuild`"
            ) from error
        except OSError as error:
            raise TransientError(f"the state directory {self._directory} cannot be used: {error.strerror}") from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._errors():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")

    def _rows(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        with self._lock, self._errors():
            return self._database.execute(sql, values).fetchall()

    # --- requests --------------------------------------------------------------------------------------------------

    def add(self, request: Request, step: Step) -> Request | None:
        with self._transaction() as database:
            if database.execute("SELECT 1 FROM requests WHERE id = ?", (request.id,)).fetchone():
                return None
            last = database.execute("SELECT coalesce(max(sequence), 0) FROM requests").fetchone()[0]
            added = replace(request, sequence=last + 1)
            database.execute(
                f"INSERT INTO requests ({', '.join(_REQUEST_FIELDS)}) "  # noqa: S608 - names of our own dataclass
                f"VALUES ({', '.join('?' * len(_REQUEST_FIELDS))})",
                [_to_column(getattr(added, name)) for name in _REQUEST_FIELDS],
            )
            self._add_step(request.id, step, request.received_at)
            return added

    def get(self, request_id: str) -> Request:
        rows = self._rows("SELECT * FROM requests WHERE id = ?", request_id)
        if not rows:
            raise KeyError(request_id)
        return _request(rows[0])

    def find(self, prefix: str) -> Sequence[Request]:
        rows = self._rows("SELECT * FROM requests WHERE substr(id, 1, ?) = ? ORDER BY sequence", len(prefix), prefix)
        return [_request(row) for row in rows]

    def open_requests(self) -> Sequence[Request]:
        return [_request(row) for row in self._rows("SELECT * FROM requests WHERE state <> 'CLOSED' ORDER BY sequence")]

    def requests(self, limit: int | None = None) -> Sequence[Request]:
        rows = self._rows("SELECT * FROM requests ORDER BY sequence DESC LIMIT ?", -1 if limit is None else limit)
        return [_request(row) for row in reversed(rows)]

    def count_named(self, trigger_name: str) -> int:
        rows = self._rows("SELECT count(*) FROM requests WHERE trigger_name = ? AND state = 'CLOSED'", trigger_name)
        return int(rows[0][0])

    def commit(
        self,
        request: Request,
        *,
        now: datetime,
        step: Step | None = None,
        to: State | None = None,
        terminal: Sequence[str] = (),
        mails: Sequence[NewMail] = (),
        staging: Staging | None = None,
        files: Sequence[ProductFile] = (),
        absent: Sequence[str] = (),
        **changes: Any,
    ) -> Request:
        with self._transaction():
            changed = self._change(request, to, now, changes)
            if step is not None:
                self._add_step(request.id, step, now)
            self._add_lines(request.id, terminal)
            self._add_mails(request.id, mails, now)
            if staging is not None:
                self._add_staging(staging, files, absent)
        if staging is not None:
            self._write_sidecar(staging, changed)
        return changed

    def claim_slot(
        self,
        request: Request,
        *,
        max_jobs: int,
        max_on_node: int | None = None,
        now: datetime,
        step: Step,
        **changes: Any,
    ) -> Request | None:
        with self._transaction() as database:
            holding = [row[0] for row in database.execute("SELECT node FROM requests WHERE holds_slot = 1")]
            if len(holding) >= max_jobs:
                return None
            if max_on_node is not None and holding.count(changes["node"]) >= max_on_node:
                return None
            changed = self._change(request, State.DISPATCHING, now, {**changes, "holds_slot": True})
            self._add_step(request.id, step, now)
            return changed

    def hand_over_job(self, request: Request, heir: Request, now: datetime) -> None:
        job = {name: getattr(request, name) for name in ("node", "work", "nonce", "holds_slot", "leased_until")}
        with self._transaction():
            self._change(
                request, None, now, {"node": "", "work": "", "nonce": "", "holds_slot": False, "leased_until": None}
            )
            self._change(heir, State.STAGING, now, {**job, "not_before": None, "attempts": 0})
            self._add_step(request.id, Step("withdraw", "who goes on with the job?", heir.id, "handed over"), now)
            self._add_step(heir.id, Step("dispatch", "is it being made?", f"by {request.id}", "took its job over"), now)

    def leave_behind(self, left: LeftBehind) -> None:
        with self._transaction() as database:
            database.execute(
                "INSERT OR IGNORE INTO left_behind VALUES (?, ?, ?, ?)",
                (left.node, left.work, left.nonce, left.since.isoformat()),
            )

    def left_behind(self) -> Sequence[LeftBehind]:
        rows = self._rows("SELECT * FROM left_behind ORDER BY since, work")
        return [
            LeftBehind(row["node"], row["work"], row["nonce"], datetime.fromisoformat(row["since"])) for row in rows
        ]

    def forget_left(self, left: LeftBehind) -> None:
        with self._transaction() as database:
            database.execute(
                "DELETE FROM left_behind WHERE node = ? AND work = ? AND nonce = ?", (left.node, left.work, left.nonce)
            )

    def set_wish(self, request_id: str, wish: str, now: datetime) -> None:
        with self._transaction() as database:
            database.execute("UPDATE requests SET wish = ?, not_before = NULL WHERE id = ?", (wish, request_id))
            self._add_step(request_id, Step("operator", decided=wish), now)

    def _change(self, request: Request, to: State | None, now: datetime, changes: Mapping[str, Any]) -> Request:
        """Apply changes within the open transaction; the request must still be in the state it was read in."""
        values = dict(changes)
        if to is not None and to is not request.state:
            if to not in TRANSITIONS[request.state]:
                raise FatalError(f"request {request.id}: there is no way from {request.state} to {to}")
            # A new state starts with a clean slate, unless the caller says otherwise.
            values = {"not_before": None, "attempts": 0, **values, "state": to, "since": now}
        changed = replace(request, **values)
        if not values:
            return changed
        assignments = ", ".join(f"{name} = ?" for name in values)
        cursor = self._database.execute(
            f"UPDATE requests SET {assignments} WHERE id = ? AND state = ?",  # noqa: S608 - names of our dataclass
            [*(_to_column(value) for value in values.values()), request.id, request.state.value],
        )
        if cursor.rowcount != 1:
            raise StaleRequestError(f"request {request.id} is no longer {request.state}")
        return changed

    # --- history and terminal output -------------------------------------------------------------------------------

    def _add_step(self, request_id: str, step: Step, now: datetime) -> None:
        self._database.execute(
            "INSERT INTO steps (request, time, step, asked, seen, decided) VALUES (?, ?, ?, ?, ?, ?)",
            (request_id, _to_column(now), step.step, step.asked, step.seen, step.decided),
        )

    def _add_lines(self, request_id: str, lines: Sequence[str]) -> None:
        self._database.executemany(
            "INSERT INTO terminal (request, line) VALUES (?, ?)", [(request_id, line) for line in lines]
        )

    def steps(self, request_id: str) -> Sequence[RecordedStep]:
        rows = self._rows("SELECT * FROM steps WHERE request = ? ORDER BY number", request_id)
        return [
            RecordedStep(
                datetime.fromisoformat(row["time"]), Step(row["step"], row["asked"], row["seen"], row["decided"])
            )
            for row in rows
        ]

    def note(self, request_id: str, step: Step, now: datetime) -> None:
        with self._transaction():
            self._add_step(request_id, step, now)

    def terminal(self, request_id: str, after: int = 0) -> Sequence[tuple[int, str]]:
        rows = self._rows(
            "SELECT number, line FROM terminal WHERE request = ? AND number > ? ORDER BY number", request_id, after
        )
        return [(row["number"], row["line"]) for row in rows]

    # --- mails -----------------------------------------------------------------------------------------------------

    def enqueue(self, request_id: str, mails: Sequence[NewMail], now: datetime) -> None:
        with self._transaction():
            self._add_mails(request_id, mails, now)

    def _add_mails(self, request_id: str, mails: Sequence[NewMail], now: datetime) -> None:
        for mail in mails:
            cursor = self._database.execute(
                "INSERT OR IGNORE INTO mails (request, kind, message_id, sender, message, created_at) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (request_id, mail.kind.value, mail.message_id, mail.sender, mail.message, _to_column(now)),
            )
            if cursor.rowcount:
                self._database.executemany(
                    "INSERT OR IGNORE INTO recipients (mail, address, is_primary, state, attempts, text) "
                    "VALUES (?, ?, ?, 'pending', 0, '')",
                    [(cursor.lastrowid, address, 1) for address in mail.primary]
                    + [(cursor.lastrowid, address, 0) for address in mail.copies],
                )

    def _mails(self, where: str, *values: Any) -> list[OutboxMail]:
        mails = []
        for row in self._rows(f"SELECT * FROM mails WHERE {where} ORDER BY id", *values):  # noqa: S608 - our own text
            recipients = self._rows("SELECT * FROM recipients WHERE mail = ? ORDER BY rowid", row["id"])
            mails.append(
                OutboxMail(
                    id=row["id"],
                    request=row["request"],
                    kind=MailKind(row["kind"]),
                    message_id=row["message_id"],
                    sender=row["sender"],
                    message=row["message"],
                    created_at=datetime.fromisoformat(row["created_at"]),
                    recipients=tuple(
                        Recipient(
                            address=one["address"],
                            primary=bool(one["is_primary"]),
                            state=RecipientState(one["state"]),
                            attempts=one["attempts"],
                            not_before=_from_column("not_before", one["not_before"]),
                            text=one["text"],
                            tried_since=_from_column("not_before", one["tried_since"]),
                            unconfirmed=bool(one["unconfirmed"]),
                        )
                        for one in recipients
                    ),
                )
            )
        return mails

    def mail(self, message_id: str) -> OutboxMail | None:
        return next(iter(self._mails("message_id = ?", message_id)), None)

    def unsent_mails(self) -> Sequence[OutboxMail]:
        return self._mails("id IN (SELECT mail FROM recipients WHERE state = 'pending')")

    def update_recipients(self, mail_id: int, recipients: Sequence[Recipient]) -> None:
        with self._transaction() as database:
            database.executemany(
                "UPDATE recipients SET state = ?, attempts = ?, not_before = ?, text = ?, tried_since = ?, "
                "unconfirmed = ? WHERE mail = ? AND address = ?",
                [
                    (
                        one.state.value,
                        one.attempts,
                        _to_column(one.not_before),
                        one.text,
                        _to_column(one.tried_since),
                        int(one.unconfirmed),
                        mail_id,
                        one.address,
                    )
                    for one in recipients
                ],
            )

    # --- staged data -----------------------------------------------------------------------------------------------

    def _add_staging(self, staging: Staging, files: Sequence[ProductFile], absent: Sequence[str]) -> None:
        self._database.execute(
            "INSERT INTO stagings (token, request, recipe, published_at, notified_at, retention_days, "
            "extension_days, withdrawn_at, purged_at, absent) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) "
            "ON CONFLICT (token) DO UPDATE SET notified_at = excluded.notified_at, "
            "extension_days = excluded.extension_days, withdrawn_at = excluded.withdrawn_at, "
            "purged_at = excluded.purged_at",
            (
                *(_to_column(getattr(staging, name)) for name in _STAGING_FIELDS),
                json.dumps(sorted(absent)),
            ),
        )
        self._database.executemany(
            "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (
                    staging.token,
                    one.name,
                    one.execution_block,
                    one.size,
                    one.sha256,
                    one.device,
                    one.inode,
                    one.modified_ns,
                )
                for one in files
            ],
        )

    def stagings(self) -> Sequence[Staging]:
        rows = self._rows("SELECT * FROM stagings WHERE purged_at IS NULL")
        return sorted((_staging(row) for row in rows), key=lambda staging: (staging.expires, staging.token))

    def staging(self, token: str) -> Staging | None:
        rows = self._rows("SELECT * FROM stagings WHERE token = ?", token)
        return _staging(rows[0]) if rows else None

    def staged_files(self, token: str) -> tuple[Sequence[ProductFile], Sequence[str]]:
        """Return the files of a staged directory that may be linked again, and the EBs absent from it.

        If one file of it is rotten there are none: the products of a request are linked together or not at all.
        """
        rows = self._rows(
            f"SELECT files.*, {_IS_ROTTEN} AS is_rotten FROM files WHERE token = ? ORDER BY name",  # noqa: S608 - our text
            token,
        )
        absent = self._rows("SELECT absent FROM stagings WHERE token = ?", token)
        return (
            [] if any(row["is_rotten"] for row in rows) else [_product_file(row) for row in rows],
            json.loads(absent[0]["absent"]) if absent else [],
        )

    def update_staging(self, staging: Staging, now: datetime) -> None:
        with self._transaction():
            self._add_staging(staging, (), ())
            self._add_step(
                staging.request,
                Step("retention", seen=f"directory {masked_token(staging.token)}", decided=_standing(staging)),
                now,
            )
            if staging.purged_at is not None:
                self._forget_unlinked()
        self._write_sidecar(staging, self._request_of(staging))

    # --- verification ----------------------------------------------------------------------------------------------

    def next_to_verify(self, before: datetime) -> tuple[str, ProductFile] | None:
        """Return token and record of the file whose reading was begun longest ago, or never; None if none is due.

        Due is what was not verified since `before`. A file that several tokens link is one; what is rotten or out of
        reach is left out.
        """
        rows = self._rows(
            f"SELECT files.* FROM files JOIN stagings USING (token) "  # noqa: S608 - our own text
            f"LEFT JOIN verifications ON {_same_file('verifications', 'files')} "
            "WHERE withdrawn_at IS NULL AND purged_at IS NULL "
            f"AND (verified_at IS NULL OR verified_at < ?) AND NOT {_IS_ROTTEN} "
            "ORDER BY coalesce(begun_at, ''), published_at, token, name LIMIT 1",
            _to_column(before),
        )
        return (rows[0]["token"], _product_file(rows[0])) if rows else None

    def record_begun(self, file: ProductFile, now: datetime) -> None:
        """Record that the reading of a file begins: if it is interrupted, the others come first."""
        with self._transaction() as database:
            database.execute(
                f"INSERT INTO verifications ({_KEY}, begun_at) VALUES (?, ?, ?, ?, ?) "  # noqa: S608 - our own text
                "ON CONFLICT DO UPDATE SET begun_at = excluded.begun_at",
                (*_key(file), _to_column(now)),
            )

    def record_verified(self, file: ProductFile, now: datetime) -> None:
        """Record that a file is what was recorded, for every token that links it."""
        with self._transaction() as database:
            database.execute(
                f"INSERT INTO verifications ({_KEY}, begun_at, verified_at) "  # noqa: S608 - our own text
                "VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET verified_at = excluded.verified_at",
                (*_key(file), _to_column(now), _to_column(now)),
            )

    def oldest_verification(self) -> tuple[int, datetime | None]:
        """Return how many files within reach were never verified, and when the one verified longest ago was."""
        rows = self._rows(
            f"SELECT count(*) - count(verified_at), min(verified_at) FROM "  # noqa: S608 - our own text
            f"(SELECT DISTINCT {', '.join(f'files.{name}' for name in _KEY.split(', '))}, verified_at FROM files "
            f"JOIN stagings USING (token) LEFT JOIN verifications ON {_same_file('verifications', 'files')} "
            f"WHERE withdrawn_at IS NULL AND purged_at IS NULL AND NOT {_IS_ROTTEN})"
        )
        return int(rows[0][0]), datetime.fromisoformat(rows[0][1]) if rows[0][1] else None

    def record_rotten(self, file: ProductFile, token: str, problem: str, step: Step, now: datetime) -> bool:
        """Record for good that a file is rotten, and note `step` in every request that holds it; False if it is known.

        With a token only the entry in its directory is rotten, without one every link to the file.
        """
        with self._transaction() as database:
            cursor = database.execute(
                f"INSERT OR IGNORE INTO rotten ({_KEY}, token, problem, found_at) "  # noqa: S608 - our own text
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (*_key(file), token, problem, _to_column(now)),
            )
            if not cursor.rowcount:
                return False
            stagings = [staging for staging, _, _ in self.holders(file, token)]
            for staging in stagings:
                self._add_step(staging.request, step, now)
                database.execute("UPDATE requests SET reason = ? WHERE id = ?", (step.seen, staging.request))
        for staging in stagings:
            self._write_sidecar(staging, self._request_of(staging))
        return True

    def holders(self, file: ProductFile, token: str = "") -> Sequence[tuple[Staging, ProductFile, Request | None]]:
        """Return each directory within reach that links the file (only this token's, if one is given), by its expiry:
        its record, its entry, and its request if that is on record."""
        rows = self._rows(
            f"SELECT * FROM files JOIN stagings USING (token) WHERE ({_KEY}) = (?, ?, ?, ?) "  # noqa: S608 - our text
            "AND ? IN ('', token) AND withdrawn_at IS NULL AND purged_at IS NULL",
            *_key(file),
            token,
        )
        found = [(_staging(row), _product_file(row)) for row in rows]
        found.sort(key=lambda one: (one[0].expires, one[0].token))
        return [(staging, entry, self._request_of(staging)) for staging, entry in found]

    def untold_rotten(self) -> Sequence[tuple[ProductFile, str, str, datetime]]:
        """Return what is rotten and was not told to anybody: file, token ('' for every link), problem, time; the
        oldest first."""
        rows = self._rows(
            f"SELECT files.*, rotten.token AS entry, problem, found_at FROM rotten "  # noqa: S608 - our own text
            f"JOIN files ON {_same_file('rotten', 'files')} AND rotten.token IN ('', files.token) "
            f"WHERE told_at IS NULL GROUP BY {', '.join(f'rotten.{name}' for name in _KEY.split(', '))}, rotten.token "
            "ORDER BY found_at, name"
        )
        return [
            (_product_file(row), row["entry"], row["problem"], datetime.fromisoformat(row["found_at"])) for row in rows
        ]

    def last_told(self) -> datetime | None:
        """Return when operators were told last of something rotten."""
        rows = self._rows("SELECT max(told_at) FROM rotten")
        return datetime.fromisoformat(rows[0][0]) if rows[0][0] else None

    def tell_rotten(self, found: Sequence[tuple[ProductFile, str]], mail: NewMail, now: datetime) -> None:
        """Put the mail that tells of these files (and tokens, as recorded) into the outbox: they are told then."""
        with self._transaction() as database:
            self._add_mails("", [mail], now)
            database.executemany(
                f"UPDATE rotten SET told_at = ? WHERE ({_KEY}, token) = (?, ?, ?, ?, ?)",  # noqa: S608 - our own text
                [(_to_column(now), *_key(file), token) for file, token in found],
            )

    def _forget_unlinked(self) -> None:
        """Forget the verifications of files whose last link is gone, within the open transaction."""
        linked = (
            f"SELECT 1 FROM files JOIN stagings USING (token) "  # noqa: S608 - our own text
            f"WHERE {_same_file('files', '{0}')} AND purged_at IS NULL"
        )
        for table in ("verifications", "rotten"):
            self._database.execute(
                f"DELETE FROM {table} WHERE NOT EXISTS ({linked.format(table)})"  # noqa: S608 - our own text
            )

    def _is_rotten(self, token: str) -> bool:
        rows = self._rows(
            f"SELECT 1 FROM files WHERE token = ? AND {_IS_ROTTEN} LIMIT 1",  # noqa: S608 - our own text
            token,
        )
        return bool(rows)

    def _request_of(self, staging: Staging) -> Request | None:
        rows = self._rows("SELECT * FROM requests WHERE id = ?", staging.request)
        return _request(rows[0]) if rows else None

    # --- sidecars --------------------------------------------------------------------------------------------------

    def _write_sidecar(self, staging: Staging, request: Request | None) -> None:
        """Repeat what decides about deletion in a file of its own, replaced atomically."""
        with self._lock, self._errors():
            path = self._sidecars / f"{staging.token}.json"
            content = {
                "staging": {name: _to_column(value) for name, value in asdict(self._to_sidecar(staging)).items()},
                "request": None
                if request is None
                else {name: _to_column(getattr(request, name)) for name in _REQUEST_FIELDS},
            }
            if staging.purged_at is not None:
                for left in (path, *self._sidecars.glob(f"{staging.token}.*.part")):
                    left.unlink(missing_ok=True)
                return
            # Daemon, scrub and commands may write the same one at the same time: each has its own draft.
            temporary = path.with_suffix(f".{secrets.token_hex(4)}.part")
            descriptor = os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                json.dump(content, stream, ensure_ascii=False, indent=1)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
            directory = os.open(self._sidecars, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)

    def _to_sidecar(self, staging: Staging) -> Staging:
        """Return what a rebuilt ledger has to know: what holds rot has no recipe, so that nothing is linked from it."""
        return replace(staging, recipe="") if self._is_rotten(staging.token) else staging

    def mend_sidecars(self) -> None:
        """Make the sidecars say what the ledger says: a crash may have come between the two."""
        known = {staging.token: staging for staging in self.stagings()}
        for path in sorted(self._sidecars.glob("*.json")):
            staging = self.staging(path.stem)
            if staging is not None and staging.purged_at is not None:
                path.unlink(missing_ok=True)
            elif staging is not None:
                with suppress(FatalError):
                    if self._sidecar(path)[0] == self._to_sidecar(staging):
                        del known[path.stem]
        for staging in known.values():
            self._write_sidecar(staging, self._request_of(staging))

    def sidecars(self) -> Iterator[tuple[Staging, Request | None]]:
        """Return what the sidecar files say: for `rebuild`. A damaged one raises FatalError."""
        for path in sorted(self._sidecars.glob("*.json")):
            yield self._sidecar(path)

    def _sidecar(self, path: Path) -> tuple[Staging, Request | None]:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            staging = Staging(**{name: _from_column(name, content["staging"][name]) for name in _STAGING_FIELDS})
            row = content["request"]
            # One of a former version lacks the newer fields, which all have defaults.
            request = row and Request(
                **{name: _from_column(name, row[name]) for name in _REQUEST_FIELDS if name in row}
            )
        except (ValueError, KeyError, TypeError) as error:
            raise FatalError(f"the sidecar {path} cannot be read ({error}): move it away and look at it") from error
        return staging, request

    # --- the rest --------------------------------------------------------------------------------------------------

    def restore(
        self, request: Request | None, staging: Staging | None, files: Sequence[ProductFile], absent: Sequence[str]
    ) -> None:
        """Put a record back as it was found elsewhere: for `rebuild`; known records stay as they are."""
        with self._transaction() as database:
            if request is not None:
                last = database.execute("SELECT coalesce(max(sequence), 0) FROM requests").fetchone()[0]
                numbered = replace(request, sequence=last + 1)
                database.execute(
                    f"INSERT OR IGNORE INTO requests ({', '.join(_REQUEST_FIELDS)}) "  # noqa: S608 - our dataclass
                    f"VALUES ({', '.join('?' * len(_REQUEST_FIELDS))})",
                    [_to_column(getattr(numbered, name)) for name in _REQUEST_FIELDS],
                )
            if (
                staging is not None
                and not database.execute("SELECT 1 FROM stagings WHERE token = ?", (staging.token,)).fetchone()
            ):
                self._add_staging(staging, files, absent)
        if staging is not None:
            self._write_sidecar(staging, request)

    def newest_time(self) -> datetime | None:
        rows = self._rows("SELECT max(time) FROM steps")
        return datetime.fromisoformat(rows[0][0]) if rows[0][0] else None

    def setting(self, name: str) -> str:
        rows = self._rows("SELECT value FROM settings WHERE name = ?", name)
        return str(rows[0]["value"]) if rows else ""

    def set_setting(self, name: str, value: str) -> None:
        with self._transaction() as database:
            database.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, value))


def _standing(staging: Staging) -> str:
    if staging.purged_at is not None:
        return "deleted"
    if staging.withdrawn_at is not None:
        return "taken out of reach"
    return f"kept until {staging.expires:%Y-%m-%dT%H:%M:%SZ}"
