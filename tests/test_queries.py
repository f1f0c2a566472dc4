"""The queries as files: each explains itself, is one SELECT that SQLite and Oracle both take, and can be replaced."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path
from xml.etree import ElementTree

import pytest

import stagecal
from stagecal.adapters.archive_queries import COLUMNS, bind_of, load_queries
from stagecal.ports import UsageError

ETC = Path(stagecal.__file__).parents[1] / "etc"
QUERY_FILES = sorted((ETC / "queries").iterdir())

# What one of the two databases does not know, or understands differently.
FORBIDDEN = (
    r"DUAL|ROWNUM|SYSDATE|SYSTIMESTAMP|CURRENT_DATE|CURRENT_TIMESTAMP|NVL|DECODE|LISTAGG|XMLTYPE|EXTRACTVALUE|MINUS|"
    r"LIMIT|FETCH|TO_DATE|TO_CHAR|DATE\s*'|DATETIME|STRFTIME|IFNULL|GROUP_CONCAT|LIKE|GLOB|INSERT|UPDATE|DELETE|MERGE"
)
VALUES = {"mous_uid": "uid://A001/X12a3/X80e", "eb_uid": "uid://A002/Xcf92df/X3453", "since": "2018-01-01T00:00:00"}

# Oracle refuses these as names of binds.
RESERVED = {"uid", "date", "user", "number", "level", "mode", "size", "start"}


def code(path: Path) -> str:
    """Return the SQL of a file without its comment lines and literals."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("--")]
    return re.sub(r"'[^']*'", "''", "\n".join(lines)).strip()


@pytest.fixture
def archive() -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:")
    connection.execute("ATTACH ':memory:' AS ALMA")
    script = (ETC / "archive.sql").read_text(encoding="utf-8")
    connection.executescript(script.replace("CREATE TABLE ", "CREATE TABLE ALMA."))
    return connection


def test_every_query_has_a_file_and_every_file_is_a_query() -> None:
    assert [path.name for path in QUERY_FILES] == sorted(f"{name}.sql" for name in COLUMNS)


@pytest.mark.parametrize("path", QUERY_FILES, ids=lambda path: path.name)
def test_query_says_what_it_answers_takes_and_returns(path: Path) -> None:
    comment = path.read_text(encoding="utf-8").partition("\nSELECT")[0]
    assert all(line.startswith("--") for line in comment.splitlines())
    for word in ("Answers:", f"Bind:    :{bind_of(path.stem)}", "Columns:", "Rows:"):
        assert word in comment
    for column in COLUMNS[path.stem]:
        assert column.upper() in comment


@pytest.mark.parametrize("path", QUERY_FILES, ids=lambda path: path.name)
def test_query_uses_only_what_both_databases_know(path: Path) -> None:
    sql = code(path)
    assert not re.search(rf"\b(?:{FORBIDDEN})\b", sql, re.IGNORECASE)
    assert not re.search(r";|\|\||\(\+\)|\?|\"|`|\[|= ''|!= ''|<> ''", sql)
    assert not re.search(r"\bAS\s+\w+\s+ON\b", sql, re.IGNORECASE), "Oracle knows no AS before a table's alias"
    assert re.findall(r":(\w+)", sql)
    assert not set(re.findall(r":(\w+)", sql)) & RESERVED


@pytest.mark.parametrize("path", QUERY_FILES, ids=lambda path: path.name)
def test_query_names_its_tables_in_the_schema_of_the_archive(path: Path) -> None:
    tables = re.findall(r"\b(?:FROM|JOIN)\s+(\S+)", code(path))
    assert tables
    assert all(table.startswith("ALMA.") for table in tables)


@pytest.mark.parametrize("path", QUERY_FILES, ids=lambda path: path.name)
def test_query_runs_with_its_one_bind_and_returns_the_promised_columns(path: Path, archive: sqlite3.Connection) -> None:
    bind = {bind_of(path.stem): VALUES[bind_of(path.stem)]}
    cursor = archive.execute(path.read_text(encoding="utf-8"), bind)
    assert tuple(column[0].lower() for column in cursor.description) == COLUMNS[path.stem]
    assert cursor.fetchall()
    with pytest.raises(sqlite3.ProgrammingError):
        archive.execute(path.read_text(encoding="utf-8"), {})


def test_loaded_queries_answer_as_their_files_do(archive: sqlite3.Connection) -> None:
    queries = load_queries(ETC / "queries")
    assert set(queries) == set(COLUMNS)
    for name, query in queries.items():
        assert "--" not in query
        bind = {bind_of(name): VALUES[bind_of(name)]}
        text = (ETC / "queries" / f"{name}.sql").read_text(encoding="utf-8")
        assert archive.execute(query, bind).fetchall() == archive.execute(text, bind).fetchall()


# --- a site's own queries ------------------------------------------------------------------------------------------

OWN = "-- ours; it's :short\nSELECT 'PI' AS ROLE, 'a:b;--c' AS EMAIL FROM ALMA.X /* ; :y */ WHERE U = :mous_uid\n"


def test_site_overrides_one_file_and_keeps_the_others(tmp_path: Path) -> None:
    (tmp_path / "entitled.sql").write_text(OWN)
    for note in ("README.md", ".gitignore", "entitled.sql~"):
        (tmp_path / note).write_text("anything")
    ours, theirs = load_queries(ETC / "queries"), load_queries(ETC / "queries", tmp_path)
    assert {name for name in ours if ours[name] != theirs[name]} == {"entitled"}
    assert " ".join(theirs["entitled"].split()) == (
        "SELECT 'PI' AS ROLE, 'a:b;--c' AS EMAIL FROM ALMA.X WHERE U = :mous_uid"
    )


@pytest.mark.parametrize("name", ["entitlement.sql", "entitled.SQL", "entitled.sql.txt", "Entitled.sql"])
def test_unknown_file_in_a_sites_directory_is_a_usage_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(OWN)
    with pytest.raises(UsageError, match=re.escape(name)):
        load_queries(ETC / "queries", tmp_path)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "not a SELECT"),
        ("-- SELECT :mous_uid", "not a SELECT"),
        ("DELETE FROM ALMA.ACCOUNT WHERE EMAIL = :mous_uid", "not a SELECT"),
        ("SELECT 'PI' AS ROLE, EMAIL FROM ALMA.ACCOUNT", "must use the bind :mous_uid"),
        ("SELECT 'PI' AS ROLE, ':mous_uid' AS EMAIL FROM ALMA.ACCOUNT -- :mous_uid", "must use the bind :mous_uid"),
        ("SELECT ROLE, EMAIL FROM ALMA.X WHERE A = :mous_uid AND B = :email", "must use the bind :mous_uid"),
        ("SELECT ROLE, EMAIL FROM ALMA.X WHERE A = ? AND B = :mous_uid", "must use the bind :mous_uid"),
        ("SELECT ROLE, EMAIL FROM ALMA.X WHERE A = :mous_uid;\n", "semicolon"),
    ],
)
def test_query_that_both_databases_cannot_take_is_a_usage_error(tmp_path: Path, text: str, fault: str) -> None:
    (tmp_path / "entitled.sql").write_text(text)
    with pytest.raises(UsageError, match=fault):
        load_queries(ETC / "queries", tmp_path)


def test_query_that_cannot_be_read_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        load_queries(ETC / "queries", tmp_path / "none")
    with pytest.raises(UsageError, match="cannot be read"):
        load_queries(tmp_path)
    (tmp_path / "entitled.sql").write_bytes(b"SELECT '\xff' FROM ALMA.X WHERE A = :mous_uid")
    with pytest.raises(UsageError, match="not UTF-8"):
        load_queries(ETC / "queries", tmp_path)


# --- the embedded schema -------------------------------------------------------------------------------------------


def test_every_embedded_table_has_a_comment() -> None:
    lines = (ETC / "archive.sql").read_text(encoding="utf-8").splitlines()
    places = [number for number, line in enumerate(lines) if line.startswith("CREATE TABLE")]
    assert len(places) == 14
    assert all(lines[number - 1].startswith("-- ") for number in places)


def test_embedded_status_documents_agree_with_the_tables(archive: sqlite3.Connection) -> None:
    documents = archive.execute(
        "SELECT STATUS_ENTITY_ID, DOMAIN_ENTITY_ID, DOMAIN_ENTITY_STATE, PARENT_OBS_UNIT_SET_STATUS_ID, "
        "OBS_PROJECT_STATUS_ID, OBS_PROJECT_ID, XML FROM ALMA.OBS_UNIT_SET_STATUS WHERE XML IS NOT NULL"
    ).fetchall()
    assert len(documents) == 7
    for mous, part, state, group, project_status, project, xml in documents:
        found: dict[str, list[ElementTree.Element]] = {}
        for element in ElementTree.fromstring(xml.encode()).iter():
            found.setdefault(element.tag.rpartition("}")[2], []).append(element)
        assert found["Status"][0].get("State") == state
        assert found["OUSStatusEntity"][0].get("entityId") == mous
        assert found["ContainingObsUnitSetRef"][0].get("entityId") == group
        assert found["ProjectStatusRef"][0].get("entityId") == project_status
        assert (found["ObsUnitSetRef"][0].get("entityId"), found["ObsUnitSetRef"][0].get("partId")) == (project, part)
        blocks = archive.execute(
            "SELECT e.EXECBLOCKUID FROM ALMA.AQUA_EXECBLOCK e JOIN ALMA.BMMV_SCHEDBLOCK s "
            "ON s.ARCHIVE_UID = e.SCHEDBLOCKUID WHERE s.MOUS_STATUS_UID = ? ORDER BY e.SESSIONID",
            (mous,),
        ).fetchall()
        assert [element.text for element in found["ExecBlockId"]] == [uid for (uid,) in blocks]
        assert len(found["Session"]) == len(blocks)


def test_embedded_identifiers_are_distinct(archive: sqlite3.Connection) -> None:
    columns = (
        ("STATUS_ENTITY_ID", "OBS_UNIT_SET_STATUS"),
        ("ARCHIVE_UID", "BMMV_SCHEDBLOCK"),
        ("STATUS_ENTITY_ID", "SCHED_BLOCK_STATUS"),
        ("EXECBLOCKUID", "AQUA_EXECBLOCK"),
        ("PROJECT_UID", "ASA_PROJECT"),
    )
    found = [row[0] for column, table in columns for row in archive.execute(f"SELECT {column} FROM ALMA.{table}")]
    found += [row[0] for row in archive.execute("SELECT DISTINCT OBS_PROJECT_STATUS_ID FROM ALMA.OBS_UNIT_SET_STATUS")]
    assert sorted(found) == sorted(set(found))
    assert len(found) == 22 + 7 + 7 + 11 + 7 + 7
