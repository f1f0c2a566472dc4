"""The contract of the Archive port, over every adapter that can have an archive of its own here.

An Oracle server cannot be installed with the tests: its adapter shares queries and assembly with the one below, and
tests/test_archive_oracle_failures.py drives it through every failure that needs no server.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

import stagecal
from stagecal.adapters.archive_embedded import create_embedded_archive
from stagecal.adapters.archive_queries import (
    COLUMNS,
    JUDGEMENT,
    RESTORE,
    ROW_LIMIT,
    Rows,
    delivered_from_rows,
    facts_from_rows,
    load_queries,
    restore_facts_from_rows,
)
from stagecal.adapters.archive_sqlite import SqliteArchive
from stagecal.domain.archive_facts import EntitledPerson, ExecutionBlock
from stagecal.domain.verdicts import Verdict, judge
from stagecal.ports import Archive, FatalError, TransientError, UsageError

ETC = Path(stagecal.__file__).parents[1] / "etc"
QUERIES = load_queries(ETC / "queries")
SCRIPT = (ETC / "archive.sql").read_text(encoding="utf-8")
NOW = datetime(2024, 5, 1, 12, tzinfo=UTC)
FAR = datetime(2099, 1, 1, tzinfo=UTC)

MAIN = "uid://A001/X12a3/X80e"
PI, DELEGEE, STRANGER = "PI@Example.ORG", "Delegee@example.org", "stranger@example.org"
FRANCO = "franco@gmail.com"
CALFIELDS = ("J0510+1800", "J0440+1437")


def sqlite_archive(path: Path) -> SqliteArchive:
    return SqliteArchive(path, QUERIES, timeout_s=10)


ADAPTERS: dict[str, Callable[[Path], Archive]] = {"sqlite": sqlite_archive}


@pytest.fixture(params=ADAPTERS.values(), ids=ADAPTERS.keys())
def adapter(request: pytest.FixtureRequest) -> Callable[[Path], Archive]:
    return request.param  # type: ignore[no-any-return]  # pytest does not type its parameters.


@pytest.fixture
def archive(adapter: Callable[[Path], Archive], tmp_path: Path) -> Archive:
    create_embedded_archive(tmp_path / "archive.db", SCRIPT)
    return adapter(tmp_path / "archive.db")


@pytest.fixture
def archive_after(adapter: Callable[[Path], Archive], tmp_path: Path) -> Callable[..., Archive]:
    """Return a function that makes the embedded archive, changes it by SQL, and returns the adapter on it."""

    def make(*statements: str) -> Archive:
        path = tmp_path / "archive.db"
        create_embedded_archive(path, SCRIPT)
        with sqlite3.connect(path) as connection:
            for statement in statements:
                connection.execute(statement)
        connection.close()
        return adapter(path)

    return make


# --- the embedded examples -----------------------------------------------------------------------------------------

PI_PERSON = EntitledPerson("pi@example.org", "PI")


@pytest.mark.parametrize(
    ("mous", "project", "state", "release", "entitled", "blocks", "products"),
    [
        (
            MAIN,
            "2017.1.01347.S",
            "Delivered",
            FAR,
            (PI_PERSON, EntitledPerson("delegee@example.org", "delegee")),
            {"A002/Xce574d/Xa33e": "SemiPass", "A002/Xcf92df/X3453": "Pass"},
            10,
        ),
        (
            "uid://A001/X1296/X675",
            "2017.1.00727.S",
            "Delivered",
            datetime(2019, 6, 27, 11, 2, 45, tzinfo=UTC),
            (EntitledPerson("judits@phys.ethz.ch", "PI"),),
            {"A002/Xcd8029/X5e1a": "Pass"},
            10,
        ),
        (
            "uid://A001/X133d/X3cf3",
            "2018.1.01406.S",
            "Delivered",
            FAR,
            (PI_PERSON,),
            {"A002/Xd33a12/X15be": "Pass"},
            10,
        ),
        (
            "uid://A001/X159a/X6b",
            "2021.1.01582.S",
            "Delivered",
            FAR,
            (PI_PERSON,),
            {"A002/Xf531c1/X2b4d": "Pass"},
            10,
        ),
        (
            "uid://A001/X14d7/X160",
            "2019.1.00337.S",
            "QA3InProgress",
            None,
            (PI_PERSON,),
            {"A002/Xe1d2cb/X4f77": "Pass"},
            10,
        ),
        (
            "uid://A001/X1284/X265f",
            "2017.1.00370.S",
            "ReadyForProcessing",
            None,
            (PI_PERSON,),
            {
                "A002/Xc7111c/X3979": "Pass",
                "A002/Xc7111c/X409e": "Pass",
                "A002/Xc7111c/X86a7": "Pass",
                "A002/Xc72427/X2dfe": "Pass",
            },
            0,
        ),
        (
            "uid://A001/X1284/X266",
            "2017.1.00370.S",
            "Delivered",
            None,
            (PI_PERSON,),
            {"A002/Xc6c0d7/X7e2b": "Fail"},
            0,
        ),
    ],
)
def test_facts_of_every_example(
    archive: Archive,
    mous: str,
    project: str,
    state: str,
    release: datetime | None,
    entitled: tuple[EntitledPerson, ...],
    blocks: dict[str, str],
    products: int,
) -> None:
    facts = archive.facts(mous)
    assert facts is not None
    assert (facts.mous, facts.project, facts.state, facts.release) == (mous, project, state, release)
    assert facts.entitled == entitled
    assert facts.execution_blocks == tuple(ExecutionBlock(f"uid://{uid}", qa0) for uid, qa0 in blocks.items())
    assert len(facts.products) == products


QA3, NOT_DELIVERED, NO_PASS, NOT_ENTITLED, INVALID = (
    Verdict.MOUS_IN_QA3,
    Verdict.MOUS_NOT_DELIVERED,
    Verdict.NO_QA0_PASS_DATA,
    Verdict.NOT_ENTITLED,
    Verdict.INVALID_MOUS_UID,
)


@pytest.mark.parametrize(
    ("mous", "project", "pi", "delegee", "stranger", "calibrators"),
    [
        (MAIN, "2017.1.01347.S", None, None, NOT_ENTITLED, None),
        ("uid://A001/X1296/X675", "2017.1.00727.S", None, None, None, None),
        ("uid://A001/X133d/X3cf3", "2018.1.01406.S", None, NOT_ENTITLED, NOT_ENTITLED, None),
        ("uid://A001/X159a/X6b", "2021.1.01582.S", None, NOT_ENTITLED, NOT_ENTITLED, None),
        ("uid://A001/X14d7/X160", "2019.1.00337.S", QA3, NOT_ENTITLED, NOT_ENTITLED, QA3),
        ("uid://A001/X1284/X265f", "2017.1.00370.S", NOT_DELIVERED, NOT_ENTITLED, NOT_ENTITLED, NOT_DELIVERED),
        ("uid://A001/X1284/X266", "2017.1.00370.S", NO_PASS, NOT_ENTITLED, NOT_ENTITLED, NO_PASS),
        (MAIN, "2017.1.00370.S", INVALID, INVALID, INVALID, INVALID),
        ("uid://A001/X12a3/X80f", "2017.1.01347.S", INVALID, INVALID, INVALID, INVALID),
    ],
)
def test_verdict_of_every_example_for_every_kind_of_person(
    archive: Archive,
    mous: str,
    project: str,
    pi: Verdict | None,
    delegee: Verdict | None,
    stranger: Verdict | None,
    calibrators: Verdict | None,
) -> None:
    facts = archive.facts(mous)

    def verdict(email: str, calfields: tuple[str, ...] = ()) -> Verdict | None:
        return judge(facts, project=project, email=email, calfields=calfields, now=NOW)

    assert [verdict(PI), verdict(DELEGEE), verdict(STRANGER)] == [pi, delegee, stranger]
    assert verdict(FRANCO, CALFIELDS) == calibrators


def test_unknown_mous_is_none(archive: Archive) -> None:
    assert archive.facts("uid://A001/Xffff/Xffff") is None


def test_products_are_the_calibration_and_script_files_only(archive: Archive) -> None:
    facts = archive.facts(MAIN)
    assert facts is not None
    assert facts.products == (
        "member.uid___A001_X12a3_X80e.calimage.pipeline_manifest.xml",
        "member.uid___A001_X12a3_X80e.hifa_calimage.auxproducts.tgz",
        "member.uid___A001_X12a3_X80e.hifa_calimage.casa_piperestorescript.py",
        "member.uid___A001_X12a3_X80e.hifa_calimage.casa_pipescript.py",
        "member.uid___A001_X12a3_X80e.scriptForPI.py",
        "member.uid___A001_X12a3_X80e.session_2.auxcaltables.tgz",
        "member.uid___A001_X12a3_X80e.session_2.caltables.tgz",
        "uid___A002_Xcf92df_X3453.ms.calapply.txt",
        "uid___A002_Xcf92df_X3453.ms.flagversions.tgz",
        "uid___A002_Xcf92df_X3453_target.ms.auxcalapply.txt",
    )


def test_a_uid_is_bound_and_never_becomes_sql(archive: Archive) -> None:
    assert archive.facts("uid://A001/X12a3/X80e' OR '1'='1") is None


# --- what is odd is an error, never a refusal ----------------------------------------------------------------------


def test_repeated_equal_rows_change_nothing(archive_after: Callable[..., Archive]) -> None:
    tables = ("OBS_UNIT_SET_STATUS", "ASA_PROJECT", "ACCOUNT", "SHIFTLOG_ENTRIES", "AQUA_EXECBLOCK", "BMMV_SCHEDBLOCK")
    facts = archive_after(*(f"INSERT INTO {table} SELECT * FROM {table}" for table in tables)).facts(MAIN)
    assert facts is not None
    assert len(facts.execution_blocks) == 2
    assert len(facts.entitled) == 2
    assert facts.passed == ("uid://A002/Xcf92df/X3453",)


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO ASA_PROJECT VALUES ('uid://A001/X1221/Xdf8', '2017.1.99999.S')",
        f"INSERT INTO OBS_UNIT_SET_STATUS (STATUS_ENTITY_ID, DOMAIN_ENTITY_STATE, OBS_PROJECT_ID) "
        f"VALUES ('{MAIN}', 'Delivered', 'uid://A001/X1220/X2b7')",
        f"INSERT INTO OBS_UNIT_SET_STATUS (STATUS_ENTITY_ID, DOMAIN_ENTITY_STATE, OBS_PROJECT_ID) "
        f"VALUES ('{MAIN}', 'QA3InProgress', 'uid://A001/X1221/Xdf8')",
    ],
    ids=["two codes of one project", "two projects", "two states"],
)
def test_two_different_rows_for_one_mous_are_fatal(archive_after: Callable[..., Archive], statement: str) -> None:
    with pytest.raises(FatalError, match=f"query mous gives 2 different rows for {MAIN}"):
        archive_after(statement).facts(MAIN)


def test_two_qa0_results_for_one_execution_block_are_fatal(archive_after: Callable[..., Archive]) -> None:
    statement = "INSERT INTO AQUA_EXECBLOCK (EXECBLOCKUID, QA0STATUS) VALUES ('uid://A002/Xce574d/Xa33e', 'Pass')"
    with pytest.raises(FatalError, match=r"uid://A002/Xce574d/Xa33e .* the QA0 results Pass and SemiPass"):
        archive_after(statement).facts(MAIN)


ODD_PLACES = [
    ("OBS_UNIT_SET_STATUS", "DOMAIN_ENTITY_STATE", "mous", "DOMAIN_ENTITY_STATE"),
    ("ASA_PROJECT", "PROJECT_CODE", "mous", "PROJECT_CODE"),
    ("ACCOUNT", "EMAIL", "entitled", "EMAIL"),
    ("ASA_DELIVERY_STATUS", "RELEASE_DATE", "release", "RELEASE_DATE"),
    ("AQUA_EXECBLOCK", "QA0STATUS", "execution_blocks", "QA0STATUS"),
    ("ASA_PRODUCT_FILES", "NGAS_FILE_ID", "products", "NGAS_FILE_ID"),
]


@pytest.mark.parametrize(("table", "column", "query", "named"), ODD_PLACES)
@pytest.mark.parametrize(
    ("value", "seen"),
    [("NULL", "NULL"), ("x'50617373'", "type bytes"), ("''", "''"), ("'a' || char(10) || 'b'", r"'a\\nb'")],
    ids=["null", "blob", "empty", "two lines"],
)
def test_odd_value_is_fatal_and_names_query_and_column(
    archive_after: Callable[..., Archive], table: str, column: str, query: str, named: str, value: str, seen: str
) -> None:
    archive = archive_after(f"UPDATE {table} SET {column} = {value}")
    with pytest.raises(FatalError, match=f"query {query} gives .*{seen}.* in column {named}"):
        archive.facts(MAIN)


@pytest.mark.parametrize(
    ("statement", "query", "column"),
    [
        ("DELETE FROM ASA_PROJECT", "mous", "PROJECT_CODE"),
        ("DELETE FROM BMMV_OBSPROPOSAL", "entitled", "EMAIL"),
        ("DELETE FROM ACCOUNT WHERE ACCOUNT_ID = 'pi'", "entitled", "EMAIL"),
        ("DELETE FROM ACCOUNT WHERE ACCOUNT_ID = 'delegee'", "entitled", "EMAIL"),
    ],
)
def test_incomplete_archive_refuses_nobody(
    archive_after: Callable[..., Archive], statement: str, query: str, column: str
) -> None:
    with pytest.raises(FatalError, match=f"query {query} gives NULL in column {column}"):
        archive_after(statement).facts(MAIN)


@pytest.mark.parametrize(
    "uid", ["uid://A002/../../tmp", "uid___A002_Xcf92df_X3453", "Xcf92df", "uid://A002/X1/X2 ; rm"]
)
def test_execution_block_that_is_no_uid_is_fatal(archive_after: Callable[..., Archive], uid: str) -> None:
    archive = archive_after(
        f"UPDATE AQUA_EXECBLOCK SET EXECBLOCKUID = '{uid}' WHERE EXECBLOCKUID = 'uid://A002/Xcf92df/X3453'",
        f"UPDATE SHIFTLOG_ENTRIES SET SE_EB_UID = '{uid}' WHERE SE_EB_UID = 'uid://A002/Xcf92df/X3453'",
    )
    with pytest.raises(FatalError, match=r"query execution_blocks gives .* in column EXECBLOCKUID"):
        archive.facts(MAIN)


def test_more_rows_than_a_mous_can_have_are_fatal(archive_after: Callable[..., Archive]) -> None:
    archive = archive_after(
        "INSERT INTO ASA_PRODUCT_FILES WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n "
        f"WHERE i <= {ROW_LIMIT}) SELECT '{MAIN}', 'file' || i, 'script' FROM n"
    )
    with pytest.raises(FatalError, match=f"query products returns more than {ROW_LIMIT} rows"):
        archive.facts(MAIN)


# --- the release date ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2020-02-03", datetime(2020, 2, 3, tzinfo=UTC)),
        ("2020-02-03 04:05:06.789", datetime(2020, 2, 3, 4, 5, 6, 789000, tzinfo=UTC)),
        ("2020-02-03T04:05:06Z", datetime(2020, 2, 3, 4, 5, 6, tzinfo=UTC)),
        ("2020-02-03T04:05:06-03:00", datetime(2020, 2, 3, 7, 5, 6, tzinfo=UTC)),
    ],
)
def test_release_date_as_text_is_utc_unless_it_says_otherwise(
    archive_after: Callable[..., Archive], text: str, expected: datetime
) -> None:
    facts = archive_after(f"UPDATE ASA_DELIVERY_STATUS SET RELEASE_DATE = '{text}'").facts(MAIN)
    assert facts is not None
    assert facts.release == expected
    assert facts.release is not None
    assert facts.release.utcoffset() == timedelta(0)


@pytest.mark.parametrize("text", ["soon", "2020-02-30", "27-JUN-19", "9999-12-31T23:59:59-10:00"])
def test_release_date_that_is_none_is_fatal(archive_after: Callable[..., Archive], text: str) -> None:
    with pytest.raises(FatalError, match=r"query release gives .* in column RELEASE_DATE"):
        archive_after(f"UPDATE ASA_DELIVERY_STATUS SET RELEASE_DATE = '{text}'").facts(MAIN)


def test_of_several_release_dates_the_latest_counts(archive_after: Callable[..., Archive]) -> None:
    facts = archive_after(
        "INSERT INTO ASA_DELIVERY_STATUS VALUES ('earlier', '2018-01-01', 'Y')",
        "INSERT INTO ASA_DELIVERY_ASDM_OUS VALUES ('uid://A002/Xce574d/Xa33e', 'earlier')",
    ).facts(MAIN)
    assert facts is not None
    assert facts.release == FAR
    assert judge(facts, project=facts.project, email=STRANGER, calfields=(), now=NOW) == Verdict.NOT_ENTITLED


# --- the pure assembly, for what a database may answer but SQLite cannot -------------------------------------------


def answers(**changed: Rows) -> dict[str, Rows]:
    """Return answers as an Oracle database gives them (upper-case names, naive dates), with changes."""
    return {
        "mous": Rows(("PROJECT_CODE", "DOMAIN_ENTITY_STATE"), (("2017.1.01347.S", "Delivered"),)),
        "entitled": Rows(("ROLE", "EMAIL"), (("PI     ", "pi@example.org"),)),
        "release": Rows(("RELEASE_DATE",), ((datetime(2018, 7, 10, 9, 8, 7),),)),  # noqa: DTZ001 - as the driver does
        "execution_blocks": Rows(("EXECBLOCKUID", "QA0STATUS"), (("uid://A002/Xcf92df/X3453", "Pass"),)),
        "products": Rows(("NGAS_FILE_ID",), (("b",), ("a",))),
        **changed,
    }


def test_oracle_answers_become_the_same_facts() -> None:
    facts = facts_from_rows(MAIN, answers())
    assert facts is not None
    assert facts.release == datetime(2018, 7, 10, 9, 8, 7, tzinfo=UTC)
    assert facts.entitled == (PI_PERSON,)
    assert facts.products == ("a", "b")


def test_aware_datetime_is_converted() -> None:
    there = timezone(timedelta(hours=2))
    facts = facts_from_rows(
        MAIN, answers(release=Rows(("R", "RELEASE_DATE"), ((1, datetime(2020, 1, 1, tzinfo=there)),)))
    )
    assert facts is not None
    assert facts.release == datetime(2019, 12, 31, 22, tzinfo=UTC)


def test_version_of_a_product_is_part_of_its_identity() -> None:
    first = facts_from_rows(MAIN, answers(products=Rows(("NGAS_FILE_ID", "VERSION"), (("a", 1), ("b", "r2")))))
    assert first is not None
    assert first.products == ("a 1", "b r2")
    with pytest.raises(FatalError, match="query products gives NULL in column VERSION"):
        facts_from_rows(MAIN, answers(products=Rows(("NGAS_FILE_ID", "VERSION"), (("a", None),))))


@pytest.mark.parametrize("query", JUDGEMENT)
def test_missing_column_is_fatal_even_without_rows(query: str) -> None:
    with pytest.raises(FatalError, match=f"query {query} must return one column"):
        facts_from_rows(MAIN, answers(**{query: Rows(("OTHER",), ())}))


@pytest.mark.parametrize("value", [20180710, 1.5, True, b"2018-07-10"])
def test_release_date_of_a_wrong_type_is_fatal(value: object) -> None:
    with pytest.raises(FatalError, match=r"query release gives a value of type .* in column RELEASE_DATE"):
        facts_from_rows(MAIN, answers(release=Rows(("RELEASE_DATE",), ((value,),))))


# --- what a restore needs ------------------------------------------------------------------------------------------


def test_restore_facts_hold_all_that_a_ppr_needs(archive: Archive) -> None:
    facts = archive.restore_facts(MAIN)
    assert facts is not None
    assert (facts.project, facts.project_uid, facts.part_id) == (
        "2017.1.01347.S",
        "uid://A001/X1221/Xdf8",
        "X659301709",
    )
    assert facts.project_status_uid == "uid://A001/X1221/Xdfc"
    assert (facts.sous_uid, facts.gous_uid) == ("uid://A001/X12a3/X80c", "uid://A001/X12a3/X80d")
    assert facts.execution_blocks == (
        ExecutionBlock("uid://A002/Xce574d/Xa33e", "SemiPass"),
        ExecutionBlock("uid://A002/Xcf92df/X3453", "Pass"),
    )
    [sched_block] = facts.sched_blocks
    assert (sched_block.uid, sched_block.status_uid) == ("uid://A001/X12a3/X804", "uid://A001/X12a3/X80f")
    assert sched_block.state == "FullyObserved"
    assert sched_block.execution_blocks == ("uid://A002/Xce574d/Xa33e", "uid://A002/Xcf92df/X3453")
    assert facts.status_xml.startswith("<?xml")
    assert facts.status_xml.count("ExecBlockId>uid") == 2
    classes = {file.file_class for file in facts.files}
    assert {"calibration", "script", "science"} <= classes


def test_a_mous_that_the_archive_does_not_know_has_no_restore_facts(archive: Archive) -> None:
    assert archive.restore_facts("uid://A001/X0/X0") is None


def test_a_mous_without_document_units_or_sched_blocks_still_has_restore_facts(archive: Archive) -> None:
    facts = archive.restore_facts("uid://A002/X2a5c2f/X1")
    assert facts is not None
    assert (facts.sous_uid, facts.gous_uid, facts.status_xml, facts.sched_blocks) == ("", "", "", ())


def test_several_sched_blocks_keep_their_execution_blocks_apart(archive_after: Callable[..., Archive]) -> None:
    archive = archive_after(
        "INSERT INTO BMMV_SCHEDBLOCK VALUES ('uid://A001/X12a3/X999', 'uid://A001/X12a3/X80e', NULL, 'other')"
    )
    facts = archive.restore_facts(MAIN)
    assert facts is not None
    assert [(block.uid, block.status_uid, len(block.execution_blocks)) for block in facts.sched_blocks] == [
        ("uid://A001/X12a3/X804", "uid://A001/X12a3/X80f", 2),
        ("uid://A001/X12a3/X999", "", 0),
    ]


def test_two_documents_for_one_mous_are_fatal(archive_after: Callable[..., Archive]) -> None:
    archive = archive_after(
        "INSERT INTO OBS_UNIT_SET_STATUS SELECT STATUS_ENTITY_ID, DOMAIN_ENTITY_ID, DOMAIN_ENTITY_STATE, "
        "PARENT_OBS_UNIT_SET_STATUS_ID, OBS_PROJECT_STATUS_ID, OBS_PROJECT_ID, 'other' FROM OBS_UNIT_SET_STATUS "
        f"WHERE STATUS_ENTITY_ID = '{MAIN}'"
    )
    with pytest.raises(FatalError, match="query status_document gives 2 documents"):
        archive.restore_facts(MAIN)


@pytest.mark.parametrize("query", RESTORE)
def test_missing_column_of_a_restore_query_is_fatal(query: str) -> None:
    rows = {name: Rows(COLUMNS[name], ()) for name in RESTORE} | {query: Rows(("OTHER",), ())}
    with pytest.raises(FatalError, match=f"query {query} must return one column"):
        restore_facts_from_rows(MAIN, rows)


def test_the_mous_of_an_execution_block_is_found(archive: Archive) -> None:
    assert archive.mous_of("uid://A002/Xce574d/Xa33e") == (MAIN,)
    assert archive.mous_of("uid://A002/X0/X0") == ()


def test_delivered_since_tells_the_oldest_first_and_nothing_older(archive: Archive) -> None:
    assert archive.delivered_since(datetime(2018, 7, 1, tzinfo=UTC)) == (
        MAIN,
        "uid://A001/X133d/X3cf3",
        "uid://A001/X159a/X6b",
    )
    assert archive.delivered_since(datetime(2030, 1, 1, tzinfo=UTC)) == ()


def test_a_site_may_tell_the_time_of_delivery_by_a_column() -> None:
    time = datetime(2020, 1, 1, tzinfo=UTC)
    rows = Rows(("STATUS_ENTITY_ID", "UPDATED"), (("uid://A001/X1/X2", time), ("uid://A001/X1/X1", "2019-12-31")))
    assert delivered_from_rows({"delivered": rows}, time) == ("uid://A001/X1/X2",)


# --- the surroundings of the SQLite adapter ------------------------------------------------------------------------


@pytest.fixture
def database(tmp_path: Path) -> Path:
    create_embedded_archive(tmp_path / "archive.db", SCRIPT)
    return tmp_path / "archive.db"


def test_sqlite_missing_file_is_transient_and_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(TransientError, match="No such file"):
        sqlite_archive(tmp_path / "none.db").facts(MAIN)
    assert list(tmp_path.iterdir()) == []


def test_sqlite_locked_file_is_transient_and_works_afterwards(database: Path) -> None:
    archive = SqliteArchive(database, QUERIES, timeout_s=0.05)
    writer = sqlite3.connect(database, isolation_level=None)
    writer.execute("BEGIN EXCLUSIVE")
    with pytest.raises(TransientError, match="locked"):
        archive.facts(MAIN)
    writer.execute("ROLLBACK")
    writer.close()
    assert archive.facts(MAIN) is not None


def test_sqlite_endless_query_is_transient(database: Path) -> None:
    endless = (
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
        "SELECT max(i) AS PROJECT_CODE, :mous_uid AS DOMAIN_ENTITY_STATE FROM n"
    )
    with pytest.raises(TransientError, match=r"did not answer in 0.1 s"):
        SqliteArchive(database, {**QUERIES, "mous": endless}, timeout_s=0.1).facts(MAIN)


def test_sqlite_file_that_is_no_database_is_fatal(tmp_path: Path) -> None:
    (tmp_path / "archive.db").write_bytes(b"This is no database. " * 500)
    with pytest.raises(FatalError, match="damaged"):
        sqlite_archive(tmp_path / "archive.db").facts(MAIN)


def test_sqlite_damaged_or_cut_file_is_fatal(database: Path) -> None:
    whole = database.read_bytes()
    database.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
    with pytest.raises(FatalError, match="damaged"):
        sqlite_archive(database).facts(MAIN)
    database.write_bytes(whole[:4096])
    with pytest.raises(FatalError, match="damaged"):
        sqlite_archive(database).facts(MAIN)


def test_sqlite_empty_file_and_missing_table_are_fatal_and_name_the_query(database: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.db").touch()
    with pytest.raises(FatalError, match=r"query mous .*no such table"):
        sqlite_archive(tmp_path / "empty.db").facts(MAIN)
    with sqlite3.connect(database) as connection:
        connection.execute("DROP TABLE STAGECAL_DELEGEE")
    connection.close()
    with pytest.raises(FatalError, match=r"query entitled .*no such table"):
        sqlite_archive(database).facts(MAIN)


def test_sqlite_forbidden_file_is_fatal(database: Path) -> None:
    database.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(FatalError, match="may not be read by this user"):
            sqlite_archive(database).facts(MAIN)
    finally:
        os.seteuid(user)


def test_sqlite_looking_changes_nothing_on_disk(database: Path) -> None:
    before = (database.read_bytes(), database.stat().st_mtime_ns, sorted(database.parent.iterdir()))
    sqlite_archive(database).facts(MAIN)
    assert (database.read_bytes(), database.stat().st_mtime_ns, sorted(database.parent.iterdir())) == before


def test_sqlite_query_of_a_site_cannot_write(database: Path) -> None:
    before = database.read_bytes()
    with pytest.raises((FatalError, TransientError)):
        SqliteArchive(database, {**QUERIES, "mous": "DELETE FROM ALMA.ACCOUNT WHERE :mous_uid = :mous_uid"}, 1).facts(
            MAIN
        )
    assert database.read_bytes() == before


def test_sqlite_each_look_sees_the_present_content(database: Path) -> None:
    archive = sqlite_archive(database)
    assert archive.facts(MAIN) is not None
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE OBS_UNIT_SET_STATUS SET DOMAIN_ENTITY_STATE = 'QA3InProgress/UserInitiated'")
    connection.close()
    facts = archive.facts(MAIN)
    assert facts is not None
    assert judge(facts, project=facts.project, email=PI, calfields=(), now=NOW) == Verdict.MOUS_IN_QA3


def test_sqlite_path_with_characters_of_a_uri(tmp_path: Path) -> None:
    directory = tmp_path / "a b?mode=rw#%41"
    directory.mkdir()
    create_embedded_archive(directory / "archive.db", SCRIPT)
    assert sqlite_archive(directory / "archive.db").facts(MAIN) is not None


# --- making the embedded archive -----------------------------------------------------------------------------------


def test_embedded_archive_never_replaces_a_file(tmp_path: Path) -> None:
    place = tmp_path / "archive.db"
    place.write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        create_embedded_archive(place, SCRIPT)
    assert place.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [place]


def test_embedded_archive_is_made_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(FatalError, match="script"):
        create_embedded_archive(tmp_path / "archive.db", SCRIPT + "CREATE TABLE;")
    assert list(tmp_path.iterdir()) == []


def test_embedded_archive_in_a_missing_directory_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        create_embedded_archive(tmp_path / "none" / "archive.db", SCRIPT)


def test_embedded_archive_script_needs_no_help(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "by-hand.db")
    started = time.perf_counter()
    connection.executescript(SCRIPT)
    elapsed = time.perf_counter() - started
    connection.close()
    assert sqlite_archive(tmp_path / "by-hand.db").facts(MAIN) is not None
    # One transaction, not one for each statement: a disk that syncs slowly would show the difference.
    assert elapsed < 2
