"""The archive's questions, as SQL files, and what their answers mean: the part that all archive adapters share.

`load_queries` raises UsageError for a file that a site cannot have meant. The functions that read answers are pure, and
answer None only if the archive plainly knows no such thing; whatever is odd in an answer is a FatalError, because only
a successful query may refuse a person.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from stagecal.domain.archive_facts import EntitledPerson, ExecutionBlock, MousFacts
from stagecal.domain.identifiers import Malformed, parse_uid
from stagecal.domain.restore.facts import ArchivedFile, RestoreFacts, SchedBlock
from stagecal.ports import FatalError, UsageError

BIND = "mous_uid"
"""The only bind of a query about a MOUS: its UID, as uid://A001/X12a3/X80e."""

OTHER_BINDS: Mapping[str, str] = {"mous_of": "eb_uid", "delivered": "since"}
"""The only bind of the queries that are not about one MOUS."""

ROW_LIMIT = 10_000
"""More rows than this for one MOUS are a query that forgot its bind, not an answer."""

LIST_LIMIT = 1_000_000
"""More rows than this are no list of MOUSs."""

JUDGEMENT = ("mous", "entitled", "release", "execution_blocks", "products")
"""What is asked to judge a request: all in one snapshot."""

RESTORE = ("unit", "execution_blocks", "sched_blocks", "files", "status_document")
"""What is asked to plan a restore: all in one snapshot."""

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "mous": ("project_code", "domain_entity_state"),
    "entitled": ("role", "email"),
    "release": ("release_date",),
    "execution_blocks": ("execblockuid", "qa0status"),
    "products": ("ngas_file_id",),
    "unit": ("project_code", "project_uid", "part_id", "project_status_uid", "gous_uid", "sous_uid"),
    "status_document": ("xml",),
    "sched_blocks": ("schedblock_uid", "status_uid", "state", "execblockuid"),
    "files": ("ngas_file_id", "file_class"),
    "mous_of": ("mous_status_uid",),
    "delivered": ("status_entity_id", "updated"),
}
"""Each query, and the columns that its answer must have (in any case); `products` may add `version`."""

_COMMENT_OR_LITERAL = re.compile(
    r"""(?P<kept>'(?:[^']|'')*'|"[^"]*")|--[^\n]*|/\*.*?\*/""",
    re.DOTALL,
)
_LITERAL = re.compile(r"""'(?:[^']|'')*'|"[^"]*\"""")
_NAMED_BIND = re.compile(r":(\w+)")
_TIME_OF_UPDATE = re.compile(r"<(?:\w+:)?TimeOfUpdate>([^<]*)</")


@dataclass(frozen=True)
class Rows:
    """The answer of one query: column names as the database wrote them, and for each row its values."""

    columns: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]


# --- the questions -------------------------------------------------------------------------------------------------


def load_queries(default_directory: Path, override: Path | None = None) -> Mapping[str, str]:
    """Given the directory of our queries and that of a site's own ones, return name -> SQL without comments.

    A site overrides single files. Raises UsageError if a file cannot be read, is not one of our queries (a misspelt
    name would silently change nothing), or is not one SELECT whose only bind is the one it is asked with.
    """
    paths = {name: default_directory / f"{name}.sql" for name in COLUMNS}
    if override is not None:
        paths |= {path.stem: path for path in _own_queries(override)}
    return {name: _statement(path) for name, path in paths.items()}


def _own_queries(directory: Path) -> Iterable[Path]:
    try:
        found = sorted(path for path in directory.iterdir() if not _is_no_query(path.name))
    except OSError as error:
        raise UsageError(
            f"the directory {directory} of [archive] queries cannot be read ({error.strerror}): correct it"
        ) from error
    for path in found:
        if path.suffix != ".sql" or path.stem not in COLUMNS:
            raise UsageError(
                f"{path} is none of the queries: rename it to one of {', '.join(f'{name}.sql' for name in COLUMNS)}, "
                "or move it out"
            )
    return found


def _is_no_query(name: str) -> bool:
    """Return whether the file is a note or what an editor or a version control system left there."""
    return name.startswith((".", "README")) or name.endswith("~")


def _statement(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"the query {path} cannot be read ({reason}): put it back, or correct it") from error
    statement = _COMMENT_OR_LITERAL.sub(lambda match: match["kept"] or " ", text).strip()
    code = _LITERAL.sub("''", statement)
    if not re.match(r"(SELECT|WITH)\b", code, re.IGNORECASE):
        raise UsageError(f"the query {path} is not a SELECT: it must read, and nothing else")
    if ";" in code:
        raise UsageError(f"the query {path} has a semicolon, which Oracle refuses: remove it")
    bind = bind_of(path.stem)
    if set(_NAMED_BIND.findall(code)) != {bind} or "?" in code:
        # A query that forgets its bind would answer for every MOUS at once, and might entitle everybody.
        raise UsageError(f"the query {path} must use the bind :{bind}, and no other")
    return statement


def bind_of(query: str) -> str:
    """Return the name of a query's only bind."""
    return OTHER_BINDS.get(query, BIND)


def limit_of(query: str) -> int:
    """Return how many rows an answer may have at most."""
    return LIST_LIMIT if query == "delivered" else ROW_LIMIT


# --- the archive ---------------------------------------------------------------------------------------------------


class QueriedArchive:
    """The Archive port over whatever can answer our queries: an adapter adds how its database is asked."""

    def ask(self, names: Sequence[str], value: str) -> Mapping[str, Rows]:
        """Return the answers to these queries, all in one snapshot and with this value for their bind."""
        raise NotImplementedError

    def facts(self, mous: str) -> MousFacts | None:
        """Given a MOUS UID, return its facts or None, as the Archive port promises."""
        return facts_from_rows(mous, self.ask(JUDGEMENT, mous))

    def restore_facts(self, mous: str) -> RestoreFacts | None:
        """Given a MOUS UID, return what its restore needs or None, as the Archive port promises."""
        return restore_facts_from_rows(mous, self.ask(RESTORE, mous))

    def mous_of(self, execution_block: str) -> Sequence[str]:
        """Given the UID of an EB, return its MOUSs, as the Archive port promises."""
        return mous_of_from_rows(self.ask(("mous_of",), execution_block))

    def delivered_since(self, since: datetime) -> Sequence[str]:
        """Given a time, return the MOUSs delivered since then, as the Archive port promises."""
        return delivered_from_rows(self.ask(("delivered",), f"{since:%Y-%m-%dT%H:%M:%S}"), since)


# --- the answers ---------------------------------------------------------------------------------------------------


def facts_from_rows(mous: str, rows_by_query: Mapping[str, Rows]) -> MousFacts | None:
    """Given the answers to all queries for this MOUS, return its facts, or None if there is no such MOUS.

    Raises FatalError, naming query and column, for NULLs, values of a wrong type, missing columns, contradictions
    (two projects or states for one MOUS, two QA0 results for one EB), and dates that are none.
    """
    records = {name: _records(name, rows_by_query[name]) for name in JUDGEMENT}
    if not records["mous"]:
        return None
    found = sorted(_pairs("mous", records["mous"]))
    if len(found) > 1:
        told = ", ".join(f"{project} {state}" for project, state in found[:3])
        raise FatalError(
            f"the archive query mous gives {len(found)} different rows for {mous} ({told}): "
            "correct the archive or the query"
        )
    [(project, state)] = found
    return MousFacts(
        mous=mous,
        project=project,
        state=state,
        release=max((_time("release", row, "release_date") for row in records["release"]), default=None),
        entitled=tuple(
            EntitledPerson(email=email, role=role) for role, email in sorted(_pairs("entitled", records["entitled"]))
        ),
        execution_blocks=_execution_blocks(mous, records["execution_blocks"]),
        products=tuple(sorted({_product(row) for row in records["products"]})),
    )


def restore_facts_from_rows(mous: str, rows_by_query: Mapping[str, Rows]) -> RestoreFacts | None:
    """Given the answers to the queries of RESTORE, return what a restore needs, or None if there is no such MOUS.

    Raises FatalError as `facts_from_rows` does. What may be unknown (the units above, the document) is '' then.
    """
    records = {name: _records(name, rows_by_query[name]) for name in RESTORE}
    units = sorted(
        {tuple(_text_or_empty("unit", row, column) for column in COLUMNS["unit"]) for row in records["unit"]}
    )
    if not units:
        return None
    if len(units) > 1:
        raise FatalError(f"the archive query unit gives {len(units)} different rows for {mous}: correct it")
    [(project, project_uid, part_id, project_status_uid, gous_uid, sous_uid)] = units
    if not project:
        raise _odd("unit", "project_code", "NULL")
    documents = {row["xml"] for row in records["status_document"]} - {None}
    if len(documents) > 1:
        raise FatalError(f"the archive query status_document gives {len(documents)} documents for {mous}: correct it")
    document = documents.pop() if documents else ""
    if not isinstance(document, str):
        raise _odd("status_document", "xml", f"a value of type {type(document).__name__} instead of text")
    files = {
        ArchivedFile(_text("files", row, "ngas_file_id"), _text("files", row, "file_class")) for row in records["files"]
    }
    return RestoreFacts(
        mous=mous,
        project=project,
        project_uid=project_uid,
        part_id=part_id,
        project_status_uid=project_status_uid,
        sous_uid=sous_uid,
        gous_uid=gous_uid,
        execution_blocks=_execution_blocks(mous, records["execution_blocks"]),
        sched_blocks=_sched_blocks(records["sched_blocks"]),
        files=tuple(sorted(files, key=lambda file: (file.name, file.file_class))),
        status_xml=document,
    )


def _sched_blocks(records: Iterable[Mapping[str, object]]) -> tuple[SchedBlock, ...]:
    found: dict[tuple[str, str, str], set[str]] = {}
    for row in records:
        key = (
            _text("sched_blocks", row, "schedblock_uid"),
            _text_or_empty("sched_blocks", row, "status_uid"),
            _text_or_empty("sched_blocks", row, "state"),
        )
        blocks = found.setdefault(key, set())
        if row["execblockuid"] is not None:
            blocks.add(_text("sched_blocks", row, "execblockuid"))
    return tuple(SchedBlock(*key, tuple(sorted(blocks))) for key, blocks in sorted(found.items()))


def mous_of_from_rows(rows_by_query: Mapping[str, Rows]) -> tuple[str, ...]:
    """Return the MOUSs that an execution block belongs to: usually one, none if the archive does not know it."""
    rows = _records("mous_of", rows_by_query["mous_of"])
    return tuple(sorted({_text("mous_of", row, "mous_status_uid") for row in rows}))


def delivered_from_rows(rows_by_query: Mapping[str, Rows], since: datetime) -> tuple[str, ...]:
    """Return the MOUSs that are delivered and were changed at or after `since`, sorted by that time.

    One whose time the archive does not tell is not among them.
    """
    found = []
    for row in _records("delivered", rows_by_query["delivered"]):
        updated = row["updated"]
        if isinstance(updated, str) and updated.lstrip().startswith("<"):
            match = _TIME_OF_UPDATE.search(updated)
            if not match:
                continue
            updated = match[1].strip()
        time = _time("delivered", {"updated": updated}, "updated")
        if time >= since:
            found.append((time, _text("delivered", row, "status_entity_id")))
    return tuple(mous for _, mous in sorted(found))


def _execution_blocks(mous: str, records: Iterable[Mapping[str, object]]) -> tuple[ExecutionBlock, ...]:
    found: dict[str, str] = {}
    for uid, qa0 in sorted(_pairs("execution_blocks", records)):
        # The UID becomes part of file names and of a job's arguments: nothing but a UID may pass.
        try:
            known = parse_uid(uid) == uid
        except Malformed:
            known = False
        if not known:
            raise _odd("execution_blocks", "execblockuid", f"{uid[:80]!r} instead of the UID of an execution block")
        if found.setdefault(uid, qa0) != qa0:
            raise FatalError(
                f"the archive query execution_blocks gives {uid} of {mous} the QA0 results {found[uid]} and {qa0}: "
                "correct the archive or the query"
            )
    return tuple(ExecutionBlock(uid=uid, qa0=qa0) for uid, qa0 in found.items())


def _pairs(query: str, records: Iterable[Mapping[str, object]]) -> set[tuple[str, str]]:
    """Return the different rows of a query with two columns of text."""
    first, second = COLUMNS[query]
    return {(_text(query, row, first), _text(query, row, second)) for row in records}


def _product(row: Mapping[str, object]) -> str:
    name = _text("products", row, "ngas_file_id")
    if "version" not in row:
        return name
    version = row["version"]
    if isinstance(version, int) and not isinstance(version, bool):
        return f"{name} {version}"
    return f"{name} {_text('products', row, 'version')}"


def _records(query: str, answer: Rows) -> list[Mapping[str, object]]:
    """Return the rows by lower-cased column name. Without the promised columns even no rows are no answer."""
    columns = [column.lower() for column in answer.columns]
    for column in COLUMNS[query]:
        if columns.count(column) != 1:
            raise FatalError(
                f"the archive query {query} must return one column {column.upper()}, "
                f"but it returns {', '.join(answer.columns) or 'none'}: correct the query"
            )
    if len(answer.rows) > limit_of(query):
        raise FatalError(f"the archive query {query} returns more than {limit_of(query)} rows for one MOUS: correct it")
    return [dict(zip(columns, row, strict=True)) for row in answer.rows]


def _odd(query: str, column: str, seen: str) -> FatalError:
    return FatalError(
        f"the archive query {query} gives {seen} in column {column.upper()}: correct the archive or the query"
    )


def _text(query: str, row: Mapping[str, object], column: str) -> str:
    value = row[column]
    if value is None:
        raise _odd(query, column, "NULL")
    if not isinstance(value, str):
        raise _odd(query, column, f"a value of type {type(value).__name__} instead of text")
    text = value.strip(" ")  # Oracle pads columns of type CHAR.
    if not text or not text.isprintable():
        raise _odd(query, column, f"{value[:80]!r} instead of one line of text")
    return text


def _text_or_empty(query: str, row: Mapping[str, object], column: str) -> str:
    return "" if row[column] is None else _text(query, row, column)


def _time(query: str, row: Mapping[str, object], column: str) -> datetime:
    value = row[column]
    try:
        time = value if isinstance(value, datetime) else datetime.fromisoformat(_text(query, row, column))
        return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except (ValueError, OverflowError):
        raise _odd(query, column, f"{str(value)[:80]!r} instead of a date") from None
