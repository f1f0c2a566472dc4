"""The ledger on local disk: one SQLite file (WAL, synchronous FULL) and one small sidecar file per staged directory.

Every public method is one transaction. The sidecars (`staged/<token>.json`) repeat what decides about deletion, so that
it survives the loss of the database. Trouble with the disk or a lock is a TransientError, damage a FatalError.
"""

from __future__ import annotations

import json
import os
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

SCHEMA_VERSION = 1

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

_REQUEST_FIELDS = tuple(field.name for field in fields(Request))
_STAGING_FIELDS = tuple(field.name for field in fields(Staging))
_TUPLES = frozenset({"calfields", "execution_blocks", "lost_on"})
_TIMES = frozenset(
    {"received_at", "since", "not_before", "missing_since", "published_at", "notified_at", "withdrawn_at", "purged_at"}
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
            if version != 0:
                raise FatalError(
                    f"{self._path} has schema version {version}, this program knows {SCHEMA_VERSION}: "
                    "use the program version that wrote it"
                )
            if self._sidecars.is_dir() and not anew:
                raise FatalError(f"the ledger {self._path} is empty: find it, or make it anew by `stagecal rebuild`")
            for statement in _SCHEMA.split(";"):
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
        self, request: Request, *, max_jobs: int, now: datetime, step: Step, **changes: Any
    ) -> Request | None:
        with self._transaction() as database:
            held = database.execute("SELECT count(*) FROM requests WHERE holds_slot = 1").fetchone()[0]
            if held >= max_jobs:
                return None
            changed = self._change(request, State.DISPATCHING, now, {**changes, "holds_slot": True})
            self._add_step(request.id, step, now)
            return changed

    def hand_over_job(self, request: Request, heir: Request, now: datetime) -> None:
        job = {name: getattr(request, name) for name in ("node", "work", "nonce", "holds_slot")}
        with self._transaction():
            self._change(request, None, now, {"node": "", "work": "", "nonce": "", "holds_slot": False})
            self._change(heir, State.STAGING, now, {**job, "not_before": None, "attempts": 0})
            self._add_step(request.id, Step("withdraw", "who goes on with the job?", heir.id, "handed over"), now)
            self._add_step(heir.id, Step("dispatch", "is it being made?", f"by {request.id}", "took its job over"), now)

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
        rows = self._rows("SELECT * FROM files WHERE token = ? ORDER BY name", token)
        absent = self._rows("SELECT absent FROM stagings WHERE token = ?", token)
        return (
            [
                ProductFile(
                    row["name"],
                    row["execution_block"],
                    row["size"],
                    row["sha256"],
                    row["device"],
                    row["inode"],
                    row["modified_ns"],
                )
                for row in rows
            ],
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
        try:
            request: Request | None = self.get(staging.request)
        except KeyError:
            request = None
        self._write_sidecar(staging, request)

    def _write_sidecar(self, staging: Staging, request: Request | None) -> None:
        """Repeat what decides about deletion in a file of its own, replaced atomically."""
        with self._lock, self._errors():
            path = self._sidecars / f"{staging.token}.json"
            content = {
                "staging": {name: _to_column(value) for name, value in asdict(staging).items()},
                "request": None
                if request is None
                else {name: _to_column(getattr(request, name)) for name in _REQUEST_FIELDS},
            }
            if staging.purged_at is not None:
                path.unlink(missing_ok=True)
                return
            temporary = path.with_suffix(".part")
            descriptor = os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
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

    def mend_sidecars(self) -> None:
        """Make the sidecars say what the ledger says: a crash may have come between the two."""
        known = {staging.token: staging for staging in self.stagings()}
        for path in sorted(self._sidecars.glob("*.json")):
            staging = self.staging(path.stem)
            if staging is not None and staging.purged_at is not None:
                path.unlink(missing_ok=True)
            elif staging is not None:
                with suppress(FatalError):
                    if self._sidecar(path)[0] == staging:
                        del known[path.stem]
        for staging in known.values():
            found = self._rows("SELECT * FROM requests WHERE id = ?", staging.request)
            self._write_sidecar(staging, _request(found[0]) if found else None)

    def sidecars(self) -> Iterator[tuple[Staging, Request | None]]:
        """Return what the sidecar files say: for `rebuild`. A damaged one raises FatalError."""
        for path in sorted(self._sidecars.glob("*.json")):
            yield self._sidecar(path)

    def _sidecar(self, path: Path) -> tuple[Staging, Request | None]:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            staging = Staging(**{name: _from_column(name, content["staging"][name]) for name in _STAGING_FIELDS})
            row = content["request"]
            request = row and Request(**{name: _from_column(name, row[name]) for name in _REQUEST_FIELDS})
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
