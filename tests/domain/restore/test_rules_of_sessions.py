"""Sessions are numbered by their place in the OUSStatus document, and by nothing else."""

from __future__ import annotations

import pytest

from stagecal.domain.restore.errors import RestoreError
from stagecal.domain.restore.sessions import Session, session_number, sessions_of
from tests.domain.restore.examples import MOUS, PASSED, SEMIPASS, status_xml

EXAMPLE = status_xml([[SEMIPASS], [PASSED]])


def test_the_example_has_its_passed_eb_in_the_second_session() -> None:
    assert sessions_of(EXAMPLE, mous=MOUS) == (Session(1, (SEMIPASS,)), Session(2, (PASSED,)))


def test_a_session_without_any_eb_is_counted() -> None:
    assert sessions_of(status_xml([[], [PASSED], []])) == (Session(1, ()), Session(2, (PASSED,)), Session(3, ()))


def test_a_session_may_have_several_ebs() -> None:
    assert sessions_of(status_xml([[SEMIPASS, PASSED]])) == (Session(1, (SEMIPASS, PASSED)),)


def test_end_times_decide_nothing() -> None:
    # In the text of the example the sessions end in the reverse order, and the last has no end at all.
    assert [session.number for session in sessions_of(EXAMPLE) if PASSED in session.execution_blocks] == [2]
    assert "EndTime" in EXAMPLE


def test_several_references_and_several_identifiers_are_not_mixed_up() -> None:
    text = EXAMPLE.replace(
        f"<val:ExecBlockId>{PASSED}</val:ExecBlockId>", f"<val:ExecBlockId>{PASSED}</val:ExecBlockId>" * 2
    )
    with pytest.raises(RestoreError, match="2 ExecBlockId where one is due"):
        sessions_of(text)


def test_prefixes_of_namespaces_mean_nothing() -> None:
    for text in (EXAMPLE.replace("ouss:", "x:"), EXAMPLE.replace("ouss:", "").replace("val:", "")):
        assert sessions_of(text, mous=MOUS) == sessions_of(EXAMPLE)


@pytest.mark.parametrize(
    "text",
    [
        EXAMPLE.replace("\n", "\r\n"),
        "\ufeff" + EXAMPLE,
        "\n  " + EXAMPLE,
        EXAMPLE.replace("UTF-8", "ISO-8859-1"),
        EXAMPLE.replace(">uid:", ">\n  uid:").replace("</val:", "\n</val:"),
        EXAMPLE.replace("uid://A002/Xcf92df/X3453", "uid___A002_Xcf92df_X3453"),
        EXAMPLE.replace('<?xml version="1.0" encoding="UTF-8"?>\n', ""),
    ],
    ids=["CRLF", "BOM", "blanks before", "another encoding", "blanks in it", "sanitized UID", "no declaration"],
)
def test_the_forms_of_real_documents_are_read_alike(text: str) -> None:
    assert sessions_of(text, mous=MOUS) == sessions_of(EXAMPLE)


def test_a_document_of_another_mous_is_refused() -> None:
    with pytest.raises(RestoreError, match="is of uid://A001/X12a3/X80e, not of uid://A001/X1/X2"):
        sessions_of(EXAMPLE, mous="uid://A001/X1/X2")


def test_a_document_that_names_no_mous_is_refused_where_one_is_expected() -> None:
    with pytest.raises(RestoreError, match="names 0 entities"):
        sessions_of(EXAMPLE.replace("OUSStatusEntity", "Other"), mous=MOUS)


def test_an_eb_in_two_sessions_is_refused() -> None:
    with pytest.raises(RestoreError, match=f"{PASSED} in session 1 and in session 3"):
        sessions_of(status_xml([[PASSED], [], [PASSED]]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no OUSStatus document"),
        (" \n", "no OUSStatus document"),
        ("ORA-00942", "no XML"),
        (EXAMPLE[:-30], "no XML"),
        ("<SchedBlockStatus/>", "is a SchedBlockStatus"),
        (EXAMPLE.replace(PASSED, "uid://A002/Xcf92df"), "is not a UID"),
        (EXAMPLE.replace(PASSED, ""), "is not a UID"),
        (EXAMPLE.replace("<ouss:OUSStatus", "<!DOCTYPE a><ouss:OUSStatus", 1), "document type"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><OUSStatus>&b;</OUSStatus>', "document type"),
        ("<OUSStatus>&unknown;</OUSStatus>", "no XML"),
        ("<a>" * 5000, "nested deeper"),
        ("<a>\udcff</a>", "no UTF-8"),
    ],
)
def test_what_is_no_such_document_is_refused(text: str, message: str) -> None:
    with pytest.raises(RestoreError, match=message):
        sessions_of(text)


def test_an_entity_never_reads_a_file() -> None:
    text = '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/hostname">]><OUSStatus>&b;</OUSStatus>'
    with pytest.raises(RestoreError, match="document type"):
        sessions_of(text)


@pytest.mark.parametrize("name", ["default", "session_0", "session_01", "Session_1", "session_", "session_1 ", ""])
def test_only_numbered_sessions_can_be_restored(name: str) -> None:
    with pytest.raises(RestoreError, match="names a session"):
        session_number(name, "the test")
