"""The trigger file: every form that is in use is read, and nothing else becomes a request."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagecal.domain.identifiers import Malformed, is_control
from stagecal.domain.trigger import (
    MAXIMUM_BYTES,
    Incomplete,
    Trigger,
    decoded,
    is_terminated,
    parse,
    parse_trigger_name,
    render,
    subject,
    trigger_name,
)

EXAMPLE = Trigger(
    contact="evkampe@eso.org",
    copy="dpetry@eso.org",
    mous="uid://A001/X1296/X675",
    project="2017.1.00727.S",
    calfields=("J0510+1800", "J0321+1234"),
    user="Judit Szulagyi",
    email="judits@phys.ethz.ch",
    ticket="16140",
)
FULL = Trigger(**{**vars(EXAMPLE), "calfields": ()})

TEXT = """\
EU ARC contact evkampe@eso.org
CC email dpetry@eso.org
ALMA: REQUEST FOR CALIBRATED DATA MOUS uid___A001_X1296_X675

Dear AOG,
please create the calibrated MS for
MOUS uid___A001_X1296_X675
project 2017.1.00727.S
calfield J0510+1800,J0321+1234
for user Judit Szulagyi
email judits@phys.ethz.ch
helpdesk ticket 16140
"""

# The example of the ESO procedure of 2022, as its page shows it.
PRINTED = (
    "EU ARC contact evkampe@eso.org CC email dpetry@eso.org ALMA: REQUEST FOR CALIBRATED DATA MOUS "
    "uid___A001_X1296_X675 Dear AOG, please create the calibrated MS for MOUS uid___A001_X1296_X675 project "
    "2017.1.00727.S calfield J0510+1800,J0321+1234 for user Judit Szulagyi email judits@phys.ethz.ch "
    "helpdesk ticket 16140"
)
# The form of that page, with its placeholders still in it.
PLACEHOLDERS = (
    "EU ARC contact <EU ARC person email> CC email dpetry@eso.org ALMA: REQUEST FOR CALIBRATED DATA MOUS "
    "uid___A001_X133d_X1244 Dear AOG, please create the calibrated MS for MOUS uid___A001_X133d_X1244 project "
    "<project code> calfield <calibrator field names separated by comma, no spaces permitted> for user <official "
    "user name from helpdesk profile> email <official user email from profile in helpdesk> helpdesk ticket "
    "<helpdesk ticket number>"
)

AWKWARD_NAMES = [
    "Süß",
    "李",
    "O'Brien",
    '"Doe, J."',
    "Ann email x@y.org helpdesk ticket 3",
    "for user Bob email",
    "MOUS project calfield for user email",
    "calfield J1 for user Bob",
    "Ann email calfield helpdesk ticket calfield Bob",
    "علی\u200cرضا",
    "Dear AOG, please create the calibrated MS for MOUS uid___A001_X1_X2",
]

words = st.sampled_from(["email", "x@y.org", "helpdesk", "ticket", "3", "for", "user", "calfield", "project", "MOUS"])
letters = st.text(st.characters(codec="utf-8").filter(lambda c: not is_control(c) and not c.isspace()), min_size=1)
names = st.lists(words | letters, min_size=1, max_size=12).map(lambda parts: " ".join(parts)[:200].strip())
names = names.filter(lambda name: name.strip("\u200c\u200d ") and name == " ".join(name.split()))
hexadecimal = st.text("0123456789abcdef", min_size=1, max_size=6)
addresses = st.from_regex(r"[a-z][a-z0-9]{0,8}(\.[a-z0-9]{1,5})?@[a-z]{2,8}\.(org|de|edu)", fullmatch=True)
triggers = st.builds(
    Trigger,
    contact=addresses,
    copy=addresses,
    mous=st.builds("uid://A00{}/X{}/X{}".format, st.sampled_from("12"), hexadecimal, hexadecimal),
    project=st.from_regex(r"20[12][0-9]\.[1A]\.[0-9]{5}\.(S|SV|T)", fullmatch=True),
    calfields=st.lists(st.from_regex(r"[A-Za-z0-9+\-._]{1,12}", fullmatch=True), max_size=3, unique=True).map(tuple),
    user=names,
    email=addresses,
    ticket=st.from_regex(r"[0-9]{1,12}", fullmatch=True),
)


def one_line(text: str) -> str:
    return " ".join(text.split()) + "\n"


def test_a_trigger_is_written_for_old_and_new_readers():
    assert render(EXAMPLE) == TEXT
    assert subject(EXAMPLE.mous) == "ALMA: REQUEST FOR CALIBRATED DATA MOUS uid___A001_X1296_X675"


def test_without_calfields_there_is_no_calfield_line():
    assert "calfield" not in render(FULL)
    assert parse(render(FULL)) == FULL


@settings(deadline=None)
@given(triggers)
def test_what_was_rendered_is_parsed_to_the_same_request(trigger):
    assert parse(decoded(render(trigger).encode())) == trigger


@settings(deadline=None)
@given(triggers)
def test_on_one_line_it_is_the_same_request(trigger):
    assert parse(one_line(render(trigger))) == trigger


@pytest.mark.parametrize("name", AWKWARD_NAMES)
@pytest.mark.parametrize("trigger", [EXAMPLE, FULL], ids=["calfields", "full"])
def test_names_that_look_like_items_stay_names(name, trigger):
    wanted = Trigger(**{**vars(trigger), "user": name})
    assert parse(render(wanted)) == wanted
    assert parse(one_line(render(wanted))) == wanted


FOREIGN = {
    "CRLF": TEXT.replace("\n", "\r\n"),
    "trailing blanks": TEXT.replace("\n", "  \t\n"),
    "no blank line": TEXT.replace("\n\n", "\n"),
    "more blank lines": TEXT.replace("\n", "\n\n"),
    "MOUS on the line before": TEXT.replace("MS for\nMOUS", "MS for MOUS"),
    "the whole sentence on one line": TEXT.replace("AOG,\nplease", "AOG, please").replace(
        "MS for\nMOUS", "MS for MOUS"
    ),
    "indented": TEXT.replace("\n", "\n  "),
    "no CC line": TEXT.replace("CC email dpetry@eso.org\n", ""),
    "as printed, on one line": PRINTED + "\n",
    "as printed, without line end": PRINTED,
    "one line with CRLF": PRINTED + "\r\n",
    "one line with more blanks": PRINTED.replace(" ", "  ") + " \n",
    "with a byte order mark": "\ufeff" + TEXT,
}


@pytest.mark.parametrize("form", FOREIGN)
def test_foreign_forms_are_read(form):
    found = parse(decoded(FOREIGN[form].encode()))
    assert found == Trigger(**{**vars(EXAMPLE), "copy": "" if form == "no CC line" else EXAMPLE.copy})


def test_the_printed_form_with_its_placeholders_is_no_request():
    with pytest.raises(Malformed):
        parse(PLACEHOLDERS + "\n")


ONE_LINE_NAMES = {
    f"one line: {name}": one_line(render(Trigger(**{**vars(FULL), "user": name}))) for name in AWKWARD_NAMES
}
NAMES = {name: render(Trigger(**{**vars(EXAMPLE), "user": name})) for name in AWKWARD_NAMES}


@pytest.mark.parametrize(
    "text", [*(FOREIGN | NAMES | ONE_LINE_NAMES).values()], ids=[*FOREIGN, *NAMES, *ONE_LINE_NAMES]
)
def test_no_prefix_is_a_request(text):
    content = text.encode()
    whole = parse(decoded(content))
    for length in range(len(content)):
        try:
            beginning = decoded(content[:length])
            found = parse(beginning)
        except Incomplete:
            continue
        assert found == whole or not is_terminated(beginning)
        if "\n" in content.decode().strip():
            # With a line for each item, only digits of the ticket can be missing where the last line has no end.
            assert Trigger(**{**vars(found), "ticket": whole.ticket}) == whole


@settings(max_examples=30, deadline=None)
@given(triggers, st.sampled_from([render, lambda t: one_line(render(t)), lambda t: render(t).replace("\n", "\r\n")]))
def test_no_terminated_prefix_of_any_request_is_another_request(trigger, written):
    content = written(trigger).encode()
    for length in range(len(content)):
        try:
            beginning = decoded(content[:length])
            parse(beginning)
        except (Incomplete, Malformed) as error:
            assert isinstance(error, Incomplete), f"a torn file must wait, not be rejected: {error}"
        else:
            assert not is_terminated(beginning)


@pytest.mark.parametrize("line", ["calfield\n", "calfield \n", "calfield\t\n"])
def test_an_empty_calfield_line_is_never_a_request_for_everything(line):
    with pytest.raises(Malformed, match="calfield"):
        parse(TEXT.replace("calfield J0510+1800,J0321+1234\n", line))
    with pytest.raises(Malformed, match="calfield"):
        parse(one_line(TEXT.replace("calfield J0510+1800,J0321+1234\n", line)))


@pytest.mark.parametrize(
    "line",
    ["calfield J1, J2", "calfield ,", "calfields J1", "calfieldJ1", "Calfield J1", "calfield: J1", "CALFIELD J1"],
)
def test_a_misspelt_calfield_line_is_never_a_request_for_everything(line):
    text = TEXT.replace("calfield J0510+1800,J0321+1234", line)
    for form in (text, one_line(text)):
        with pytest.raises(Malformed):
            parse(form)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("EU ARC contact evkampe@eso.org\n", ""),
        ("evkampe@eso.org", "evkampe"),
        ("\nMOUS uid___A001_X1296_X675", "\nMOUS uid___A001_X1296_X676"),
        ("\nMOUS uid___A001_X1296_X675", ""),
        ("\nMOUS uid", "\nMOUS ../../uid"),
        ("project 2017.1.00727.S\n", ""),
        ("project 2017.1.00727.S", "project 2017.1.00727.S\nproject 2017.1.00727.S"),
        ("for user Judit Szulagyi\n", ""),
        ("for user Judit Szulagyi", "for user"),
        ("email judits@phys.ethz.ch\n", ""),
        ("judits@phys.ethz.ch", "judits@phys.ethz.ch, other@phys.ethz.ch"),
        ("helpdesk ticket 16140", "helpdesk ticket 16140 urgent"),
        ("helpdesk ticket 16140", "helpdesk ticket #16140"),
        ("helpdesk ticket 16140\n", "helpdesk ticket 16140\nBcc: me@evil.org\n"),
        ("MS for\n", "MS for me\n"),
        ("Dear AOG,", "Dear AOG, hello"),
        ("Dear AOG,", "Hello"),
        ("Judit", "Ju\0dit"),
        ("Judit", "Ju\x1b[2Jdit"),
        ("Judit", "Ju\rdit"),
        ("Judit ", "\u202etidu\u202c "),
        ("Judit", "Judit\u200f"),
        ("Judit", "Ju\x85dit"),
        ("Judit", "Ju\u2028dit"),
        ("dpetry@eso.org", "dpetry@eso.org\u202e"),
        ("dpetry@eso.org", "dpetry@eso.org\udcff"),
        ("Judit", "J" * 200),
    ],
)
def test_what_cannot_be_a_request_is_malformed(old, new):
    assert old in TEXT
    with pytest.raises(Malformed) as caught:
        parse(TEXT.replace(old, new, 1))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", ["", "\n", " \r\n", "E", "EU ARC contact a@b.org\n", "helpdesk", "\r"])
def test_a_beginning_is_incomplete(text):
    with pytest.raises(Incomplete):
        parse(text)


def test_carriage_returns_alone_do_not_end_lines():
    with pytest.raises(Malformed):
        parse(TEXT.replace("\n", "\r"))


@pytest.mark.parametrize(
    "content", [TEXT.encode("utf-16"), b"\xff\xfe", "für\n".encode("latin-1"), b"\xc0\xae", b"\xed\xa0\x80"]
)
def test_bytes_that_are_not_utf8_are_malformed(content):
    with pytest.raises(Malformed, match="not UTF-8"):
        decoded(content)


def test_bytes_that_end_within_a_character_are_incomplete():
    with pytest.raises(Incomplete):
        decoded("for user Sü".encode()[:-1])


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_hostile_bytes_are_refused_and_nothing_else_happens(content):
    try:
        parse(decoded(content))
    except (Incomplete, Malformed) as error:
        assert str(error).isprintable()
    else:
        pytest.fail("random bytes became a request")


HEAD = one_line(TEXT).partition("calfield")[0]


@pytest.mark.parametrize(
    "text",
    [
        HEAD + "calfield" + " for user x" * 5800,
        HEAD + "for user" + " email a" * 8000,
        HEAD + "calfield x" + " for user email a helpdesk ticket" * 1950,
        " " * MAXIMUM_BYTES,
        "EU ARC contact " + "a" * 65000,
        "for user \n" * 6500,
        "(" * MAXIMUM_BYTES,
    ],
)
def test_a_hostile_file_of_64_kib_is_judged_at_once(text):
    assert len(text) <= MAXIMUM_BYTES
    before = time.process_time()
    with pytest.raises((Incomplete, Malformed)):
        parse(text + "\n")
    assert time.process_time() - before < 0.5


def test_the_name_of_a_trigger_is_its_mous_and_second_in_utc():
    at = datetime(2019, 9, 2, 16, 0, 27, 900000, tzinfo=timezone(timedelta(hours=2)))
    name = "trigger-uid___A001_X1296_X675-2019-09-02T14-00-27.txt"
    assert trigger_name("uid://A001/X1296/X675", at) == name
    assert parse_trigger_name(name) == ("uid://A001/X1296/X675", datetime(2019, 9, 2, 14, 0, 27, tzinfo=UTC))


@settings(deadline=None)
@given(triggers, st.integers(0, 4_000_000_000).map(lambda seconds: datetime.fromtimestamp(seconds, UTC)))
def test_a_trigger_name_is_read_back(trigger, at):
    assert parse_trigger_name(trigger_name(trigger.mous, at)) == (trigger.mous, at)


@pytest.mark.parametrize(
    "name",
    [
        "trigger-uid___A001_X1296_X675-2019-02-30T14-00-27.txt",
        "trigger-uid___A001_X1296_X675-2019-13-01T14-00-27.txt",
        "trigger-uid___A001_X1296_X675-2019-09-02T24-00-00.txt",
        "trigger-uid___A001_X1296_X675-2019-09-02T14-00-60.txt",
        "trigger-uid___A001_X1296_X675-0000-01-01T00-00-00.txt",
        "trigger-uid___A001_X1296_X675-2019-09-02T14-00-27.txt\n",
        "trigger-uid___A001_X1296_X675-2019-09-02T14-00-27.TXT",
        "trigger-uid___A001_X1296_X675-2019-09-02T14-00-27.txt~",
        "Trigger-uid___A001_X1296_X675-2019-09-02T14-00-27.txt",
        "trigger-uid___A001_X1296_X675-2019-09-02T14:00:27.txt",
        "trigger-uid___A001_X1296_X675-٢٠١٩-09-02T14-00-27.txt",
        "trigger-uid://A001/X1296/X675-2019-09-02T14-00-27.txt",
        "../trigger-uid___A001_X1296_X675-2019-09-02T14-00-27.txt",
        "trigger-uid___A001_X" + "1" * 200 + "_X675-2019-09-02T14-00-27.txt",
        "trigger-\udcff.txt",
        "",
    ],
)
def test_what_is_no_name_of_a_trigger_is_malformed(name):
    with pytest.raises(Malformed) as caught:
        parse_trigger_name(name)
    assert str(caught.value).isprintable()
