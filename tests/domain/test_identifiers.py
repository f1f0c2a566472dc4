"""Identifiers as people type them: one canonical form, or a refusal in one printable line."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagecal.domain.identifiers import (
    Malformed,
    contact_is_known,
    is_cycle_0,
    parse_address,
    parse_calfields,
    parse_person,
    parse_project,
    parse_ticket,
    parse_uid,
    sanitized,
)

PARSERS = [parse_uid, parse_project, parse_calfields, parse_ticket, parse_person, parse_address]


@pytest.mark.parametrize("text", ["uid://A001/X12a3/X80e", "uid___A001_X12a3_X80e"])
def test_both_forms_of_a_uid_are_one_uid(text):
    assert parse_uid(text) == "uid://A001/X12a3/X80e"
    assert sanitized(parse_uid(text)) == "uid___A001_X12a3_X80e"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "uid://A001/X12a3",
        "uid://A001/X12a3/X80e/X1",
        "uid://A001/X12a3/X80e\n",
        " uid://A001/X12a3/X80e",
        "uid://A001/../X80e",
        "uid://A001_X12a3_X80e",
        "uid___A001/X12a3/X80e",
        "uid://A001/X12a3/X80e;id",
        "uid://A001/X" + "1" * 100 + "/X1",
        "uid://A001/X１２/X80e",
        "2017.1.01347.S",
    ],
)
def test_what_is_no_uid_is_refused(text):
    with pytest.raises(Malformed):
        parse_uid(text)


@pytest.mark.parametrize("text", ["2017.1.01347.S", "2011.0.00010.SV", "2013.A.00011.S", "2021.1.01582.S"])
def test_project_codes_are_taken_as_they_are(text):
    assert parse_project(text) == text


@pytest.mark.parametrize(
    "text", ["", "2017.1.1347.S", "2017.1.01347", "2017.1.01347.s", "2017.1.01347.S ", "2017.1.٠١٣٤٧.S", "%", "../x"]
)
def test_what_is_no_project_code_is_refused(text):
    with pytest.raises(Malformed):
        parse_project(text)


def test_only_projects_of_2011_are_of_cycle_0():
    assert is_cycle_0("2011.0.00010.SV")
    assert not is_cycle_0("2012.1.00001.S")
    assert not is_cycle_0("2013.1.02011.S")


def test_calfields_keep_order_and_case_and_lose_repetitions():
    assert parse_calfields("J0510+1800,HL_Tau,3c273,J0510+1800,j0510+1800") == (
        "J0510+1800",
        "HL_Tau",
        "3c273",
        "j0510+1800",
    )


@pytest.mark.parametrize(
    "text", ["", ",", "J1,", ",J1", "J1,,J2", "J1, J2", "J1 J2", "*", "J1;J2", "0~3", "J1\n", "Jü"]
)
def test_what_is_no_list_of_calfields_is_refused(text):
    with pytest.raises(Malformed):
        parse_calfields(text)


@pytest.mark.parametrize("text", ["", "-1", "1.5", "#16140", "16140 ", "１６１４０", "²", "1" * 13, "0x1"])
def test_what_is_no_ticket_is_refused(text):
    with pytest.raises(Malformed):
        parse_ticket(text)


@pytest.mark.parametrize(
    "name",
    [
        "Süß",
        "李",
        "O'Brien",
        '"Doe, J."',
        "علی\u200cرضا",  # A Persian name is misspelt without its zero-width non-joiner.
        "ශ්\u200dරී",
        "Иван Иванов",
        "{{ 7*7 }} %s $(id)",
    ],
)
def test_names_are_taken_in_any_script(name):
    assert parse_person(name) == name


def test_blanks_of_a_name_become_single_spaces():
    assert parse_person("  Judit\u00a0 \u3000Szulagyi ") == "Judit Szulagyi"


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        "\u200d",
        " \u200c ",
        "a\nb",
        "a\rb",
        "a\tb",
        "a\0b",
        "a\x1b[2Jb",
        "a\x85b",
        "a\u2028b",
        "a\u202eb",
        "a\u200fb",
        "a\udcffb",
        "a\ue000b",
        "\ufeffa",
        "x" * 201,
    ],
)
def test_names_that_could_forge_lines_or_displays_are_refused(name):
    with pytest.raises(Malformed):
        parse_person(name)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("judits@phys.ethz.ch", "judits@phys.ethz.ch"),
        ("O'Brien+alma@Example.ORG", "O'Brien+alma@example.org"),
        ("judit@büro.de", "judit@xn--bro-hoa.de"),
    ],
)
def test_addresses_are_returned_as_on_the_wire(text, address):
    assert parse_address(text) == address
    assert parse_address(address) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "a@b",
        "@b.org",
        "a@",
        "a b@c.org",
        " a@b.org",
        "a@b.org ",
        "a@b.org,c@d.org",
        "a@b.org\nBcc: c@d.org",
        "Bob <a@b.org>",
        "a@[127.0.0.1]",
        "-f@b.org",
        "jüdit@b.org",
        "a..b@c.org",
        "a@b.org\0",
        '"a b"@c.org',
        "a@b.org\u200b",
        "a" * 250 + "@b.org",
        "a@localhost",
    ],
)
def test_what_is_not_one_plain_address_is_refused(text):
    with pytest.raises(Malformed):
        parse_address(text)


@settings(deadline=None)
@given(st.text(max_size=120), st.sampled_from(PARSERS))
def test_a_refusal_is_one_printable_line(text, parse):
    try:
        parse(text)
    except Malformed as error:
        assert str(error).isprintable()
        assert len(str(error)) < 400


@settings(deadline=None)
@given(st.text(max_size=60))
def test_an_accepted_name_stays_as_it_is(text):
    try:
        name = parse_person(text)
    except Malformed:
        return
    assert parse_person(name) == name
    assert "\n" not in name and "\r" not in name and name == name.strip()


def test_a_contact_is_known_by_domain_or_by_address_in_any_case():
    assert contact_is_known("Evkampe@ESO.org", ["eso.org"], [])
    assert contact_is_known("someone@elsewhere.org", [], ["Someone@Elsewhere.org"])
    assert not contact_is_known("evkampe@eso.org.evil.org", ["eso.org"], [])
    assert not contact_is_known("evkampe@sub.eso.org", ["eso.org"], [])
    assert not contact_is_known("evkampe@eso.org", [], [])
