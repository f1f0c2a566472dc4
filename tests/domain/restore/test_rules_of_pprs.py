"""A PPR of ours is read as it was meant; each mistake that the pipeline passes over is found before CASA starts."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecal.adapters.templates import JinjaTemplates
from stagecal.domain.restore.plan import RestorePlan
from stagecal.domain.restore.ppr import PprFacts, ppr_faults, ppr_values, read_ppr_sessions
from stagecal.domain.restore.sessions import Session
from stagecal.resources import resource
from tests.domain.restore.examples import PASSED, SEMIPASS, example_plan, plan_of
from tests.domain.restore.test_rules_of_plans import UIDS, layouts

PATH = (
    "2017.1.01347.S_2026_01_02T03_04_05.000/SOUS_uid___A001_X12a3_X80c/GOUS_uid___A001_X12a3_X80d/"
    "MOUS_uid___A001_X12a3_X80e"
)
NOW = datetime.fromisoformat("2026-01-02T03:04:05+00:00")


@cache
def templates() -> JinjaTemplates:
    return JinjaTemplates(resource("templates"))


def values(plan: RestorePlan, root: str = "/cluster/area") -> PprFacts:
    return ppr_values(plan, root_directory=root, relative_path=PATH, now=NOW)


def written(plan: RestorePlan) -> str:
    return templates().render("ppr.xml", ppr=values(plan))


def faults(text: str, plan: RestorePlan, pipeline_version: str = "") -> tuple[str, ...]:
    return ppr_faults(text, plan, relative_path=PATH, pipeline_version=pipeline_version)


@cache
def two_sessions() -> RestorePlan:
    """Sessions 1 and 3 with EBs, 2 and 4 empty; the third has two: what is misread would land in the first."""
    ebs = ("uid://A002/X1/Xa", "uid://A002/X1/X2", "uid://A002/X1/X3")
    return plan_of((Session(1, ebs[2:]), Session(2, ()), Session(3, ebs[:2]), Session(4, ())), {})


@cache
def good() -> str:
    return written(two_sessions())


def test_the_ppr_of_the_example_keeps_its_first_session_empty(
    golden: Callable[[str, str], None], example_time: datetime
) -> None:
    plan = example_plan()
    ppr = ppr_values(
        plan, root_directory="/cluster/work/WORK1", relative_path=PATH, now=example_time, processing_site="NAASC"
    )
    text = templates().render("ppr.xml", ppr=ppr)
    golden("ppr/uid___A001_X12a3_X80e.xml", text)
    assert faults(text, plan) == ()
    assert SEMIPASS not in text
    assert read_ppr_sessions(text) == (Session(1, ()), Session(2, (PASSED,)))


def test_a_ppr_with_gaps_and_several_ebs_is_right() -> None:
    assert faults(good(), two_sessions()) == ()
    assert "<Value>uid://A002/X1/Xa | uid://A002/X1/X2</Value>" in good()
    assert good().count("<Value/>") == 2


def test_what_the_template_is_given_is_escaped() -> None:
    text = templates().render("ppr.xml", ppr=values(two_sessions(), root='/data/a&b<c>"d"'))
    assert "/data/a&amp;b&lt;c&gt;" in text
    assert faults(text, two_sessions()) == ()


@given(layouts())
def test_any_layout_is_written_found_right_and_read_back(drawn: tuple[tuple[Session, ...], dict[str, str]]) -> None:
    layout, others = drawn
    plan = plan_of(layout, others)
    text = written(plan)
    assert faults(text, plan) == ()
    assert read_ppr_sessions(text) == layout


VALUE = "<Value>uid://A002/X1/Xa | uid://A002/X1/X2</Value>"
ASDM = re.compile(r"(?s)\s*<AsdmIdentifier>(?:(?!</AsdmIdentifier>).)*X1_X3</AsdmDiskName>\s*</AsdmIdentifier>")


def intent(keyword: str) -> re.Pattern[str]:
    """Return a pattern of the whole intent with this keyword."""
    return re.compile(rf"(?s)\s*<Intents>\s*<Keyword>{keyword}</Keyword>.*?</Intents>")


def edited(old: str | re.Pattern[str], new: str) -> str:
    """Return the good PPR with one passage replaced, which must be there."""
    text = re.sub(old, lambda _: new, good(), count=1) if isinstance(old, re.Pattern) else good().replace(old, new, 1)
    assert text != good()
    return text


def twice(name: str) -> str:
    """Return the good PPR with this element, and all in it, twice."""
    match = re.search(rf"(?s)<{name}>.*?</{name}>", good())
    assert match
    return good().replace(match.group(), match.group() * 2, 1)


SILENT = [
    # What the reader needs, and without which it gives up or does nothing.
    *(
        (edited(re.compile(rf"<{name}>[^<]*</{name}>"), ""), f"0 {name} where exactly one")
        for name in (
            *("ProposalCode", "Observatory", "Telescope", "ObsUnitSetTitle", "ObsUnitSetType"),
            *("ProcedureTitle", "Command", "RelativePath", "AsdmDiskName", "ExecBlockId", "Keyword"),
        )
    ),
    *(
        (edited(re.compile(rf"<{name}>[^<]*</{name}>"), f"<{name}></{name}>"), f"{name} is empty")
        for name in (
            *("ProposalCode", "Observatory", "Telescope", "ObsUnitSetTitle", "ObsUnitSetType"),
            *("ProcedureTitle", "Command", "RelativePath", "AsdmDiskName", "ExecBlockId"),
        )
    ),
    *(
        (edited(re.compile(rf"(?s)<{name}>.*</{name}>"), ""), f"0 {name} where exactly one")
        for name in (
            *("ProjectSummary", "ProjectStructure", "ProcessingRequests", "ProcessingRequest", "ProcessingIntents"),
            *("ProcessingProcedure", "DataSet", "SchedBlockSet", "SchedBlockIdentifier"),
        )
    ),
    *(
        (edited(re.compile(rf"(?s)<{name} .*?/>"), ""), f"0 {name} where exactly one")
        for name in (*("ObsUnitSetRef", "ProjectStatusRef", "OUSStatusRef"),)
    ),
    *(
        (twice(name), f"2 {name} where exactly one")
        for name in (
            *("ProcessingRequest", "SchedBlockIdentifier", "SchedBlockSet", "DataSet", "RelativePath", "ProposalCode"),
        )
    ),
    (edited("<ParameterSet/>", ""), "has 0 ParameterSet where one is due: the pipeline runs neither it nor"),
    (edited("<ParameterSet/>", "<ParameterSet/><ParameterSet/>"), "has 2 ParameterSet"),
    (
        edited(
            "<ProcessingCommand>", "<ProcessingCommand><Command>hif_x</Command></ProcessingCommand><ProcessingCommand>"
        ),
        "the command hif_x has 0 ParameterSet",
    ),
    (edited("hifa_restoredata", "hifa_importdata"), "hifa_restoredata is commanded 0 times"),
    (edited(">hifa_restoredata<", ">\n hifa_restoredata<"), "Command has white space around 'hifa_restoredata'"),
    (twice("ProcessingCommand"), "hifa_restoredata is commanded 2 times"),
    (edited(re.compile(r"(?s)<AsdmIdentifier>.*</AsdmIdentifier>"), ""), "lists no execution block"),
    # The directory.
    (edited(PATH, "another/directory"), "the pipeline would work in another directory"),
    (edited(PATH, "/" + PATH), "the pipeline would work in another directory"),
    (edited(PATH, PATH + "/../.."), "the pipeline would work in another directory"),
    (edited(PATH, PATH + "\n"), "RelativePath has white space"),
    (edited(PATH, "2017.1"), "the pipeline reads a number"),
    (edited(PATH, "1e5"), "the pipeline reads a number"),
    (edited(PATH, "True"), "the pipeline reads a number, a truth value"),
    # Sessions that end in session_1.
    (edited(intent("SESSION_2"), ""), "SESSION_2 is missing: the pipeline stops counting there"),
    (edited(intent("SESSION_1"), ""), "SESSION_1 is missing"),
    (edited(intent("SESSION_4"), ""), "SESSION_4 is missing"),
    (edited("SESSION_2<", "session_2<"), "'session_2' is no keyword of a session"),
    (edited("SESSION_2<", "SESSION_02<"), "'SESSION_02' is no keyword of a session"),
    (edited("SESSION_2<", "SESSION_2 <"), "Keyword has white space around 'SESSION_2'"),
    (edited("SESSION_2<", "SESSION_1<"), "SESSION_1 stands twice"),
    (edited(VALUE, VALUE.replace(" | ", "|")), "SESSION_3 has a bar without exactly one space"),
    (edited(VALUE, VALUE.replace(" | ", "| ")), "SESSION_3 has a bar without exactly one space"),
    (edited(VALUE, VALUE.replace(" | ", " |  ")), "SESSION_3 has a bar without exactly one space"),
    (edited(VALUE, VALUE.replace(" | ", "\t|\t")), "SESSION_3 has a bar without exactly one space"),
    (edited(VALUE, VALUE.replace(" | ", "\u00a0|\u00a0")), "SESSION_3 has a bar without exactly one space"),
    (edited(VALUE, VALUE.replace(" | ", " ")), "which is no UID"),
    (edited(VALUE, VALUE.replace(" | ", ", ")), "which is no UID"),
    (edited(VALUE, VALUE.replace(" | ", " |\n")), "SESSION_3 has a line break inside its Value"),
    (edited(VALUE, VALUE.replace("</", "\n</")), "SESSION_3 has a line break inside its Value"),
    (edited(VALUE, VALUE.replace("<Value>", "<Value>\r\n")), "SESSION_3 has a line break inside its Value"),
    (edited(VALUE, VALUE.replace("</", " </")), "SESSION_3 has white space at an end of its Value"),
    (edited("<Value/>", "<Value> </Value>"), "SESSION_2 has white space at an end of its Value"),
    (edited("<Value/>", "<Value>Undefined</Value>"), "SESSION_2 lists 'Undefined'"),
    (edited("<Value/>", ""), "SESSION_2 has 0 Value"),
    (edited("<Value/>", "<Value/><Value/>"), "SESSION_2 has 2 Value"),
    (edited(VALUE, VALUE.replace("<Value>", "<Value><!-- x -->")), "SESSION_3 has more than text in its Value"),
    (edited(VALUE, VALUE.replace("<Value>", "<Value><b/>")), "SESSION_3 has more than text in its Value"),
    (
        edited(VALUE, VALUE.replace("<Value>", "<Value><![CDATA[").replace("</Value>", "]]></Value>")),
        "SESSION_3 has more than text in its Value",
    ),
    (edited(VALUE, VALUE.replace(" | ", " |  | ")), "SESSION_3 lists ''"),
    (edited(VALUE, VALUE.replace("uid://A002/X1/X2", "uid___A002_X1_X2")), "which is no UID of the form"),
    (edited("<Value/>", "<Value>uid://A002/X1/Xa</Value>"), "stands in SESSION_2 and in SESSION_3"),
    (edited("<Value/>", "<Value>uid://A002/X1/X9</Value>"), "SESSION_2 has uid://A002/X1/X9, which the DataSet"),
    (edited(VALUE, VALUE.replace(" | uid://A002/X1/X2", "")), "uid://A002/X1/X2 of the DataSet stands in no session"),
    (
        edited(VALUE, VALUE.replace(" | uid://A002/X1/X2", "")).replace(
            "<Value/>", "<Value>uid://A002/X1/X2</Value>", 1
        ),
        "uid://A002/X1/X2 stands in SESSION_2, the plan says session_3",
    ),
    # EBs.
    (edited(ASDM, ""), "the DataSet does not list uid://A002/X1/X3"),
    (edited("X1_X3</AsdmDiskName>", "X1_X2</AsdmDiskName>"), "the AsdmDiskName of uid://A002/X1/X3 is"),
    (edited("X1_X3</AsdmDiskName>", "X1_X3.ms</AsdmDiskName>"), "the AsdmDiskName of uid://A002/X1/X3 is"),
    (edited("X1/X3</ExecBlockId>", "X1/X3 </ExecBlockId>"), "ExecBlockId has white space"),
    (edited("uid://A002/X1/X3</ExecBlockId>", "uid___A002_X1_X3</ExecBlockId>"), "is no UID of the form"),
    (
        good().replace("X1/X3</E", "X1/X2</E").replace("X1_X3</A", "X1_X2</A"),
        "the DataSet lists uid://A002/X1/X2 twice",
    ),
    (
        good().replace("X1/X3<", "X1/X9<").replace("X1_X3<", "X1_X9<"),
        "the DataSet lists uid://A002/X1/X9, which the manifest does not",
    ),
    # Another project or MOUS.
    (edited(">2017.1.01347.S<", ">2017.1.01348.S<"), "ProposalCode is 2017.1.01348.S, not 2017.1.01347.S"),
    (edited('"uid://A001/X12a3/X80e"', '"uid://A001/X12a3/X80f"'), "OUSStatusRef names uid://A001/X12a3/X80f"),
    # The document.
    (edited("<SciPipeRequest ", "<!DOCTYPE a>\n<SciPipeRequest "), "document type"),
    (good()[:-40], "no XML"),
    (good().replace("SciPipeRequest", "SciPipeResult"), "not a SciPipeRequest"),
    ("", "no XML"),
    (edited("UTF-8", "UTF-16"), "declares the encoding UTF-16"),
    ("\n" + good(), "no XML: XML or text declaration not at start"),
    (edited("<OUSStatusRef ", "<ous:OUSStatusRef "), "no XML: unbound prefix"),
]


@pytest.mark.parametrize(("text", "message"), SILENT, ids=[message for _, message in SILENT])
def test_each_mistake_that_the_pipeline_passes_over_is_found(text: str, message: str) -> None:
    found = faults(text, two_sessions())
    assert any(message in fault for fault in found), found
    assert all("\n" not in fault for fault in found)


def test_the_semipass_eb_in_the_data_set_is_found() -> None:
    # A PPR that was published as an example lists it: the restore dies when the manifest knows nothing of it.
    plan = example_plan()
    semipass = written(plan).replace(PASSED, SEMIPASS).replace("Xcf92df_X3453", "Xce574d_Xa33e")
    assert any(f"the DataSet lists {SEMIPASS}, which the manifest does not" in one for one in faults(semipass, plan))


@pytest.mark.parametrize(
    ("version", "refused"),
    [("2020.1.0.36", True), ("2020.1.0.40", False), ("40896", False), ("2021.2.0.128", False), ("", False)],
)
def test_ebs_that_end_in_a_or_e_are_refused_on_the_builds_that_lose_them(version: str, refused: bool) -> None:
    found = faults(good(), two_sessions(), version)
    assert [fault for fault in found if "as it ends in a" in fault] == (list(found) if refused else [])
    assert len(found) == int(refused)


@given(layouts(), st.data())
def test_any_single_change_of_the_sessions_or_ebs_is_found(
    drawn: tuple[tuple[Session, ...], dict[str, str]], data: st.DataObject
) -> None:
    layout, others = drawn
    plan = plan_of(layout, others)
    text = written(plan)
    places = re.finditer(r"uid://A002/X\w+/X\w+|uid___A002_X\w+| \| |SESSION_\d+|(?<=<Value)/>", text)
    start, end = data.draw(st.sampled_from([match.span() for match in places]))
    old = text[start:end]
    other = UIDS.filter(lambda uid: uid != old)
    if old == "/>":
        new = data.draw(st.builds(">{}</Value>".format, other | st.sampled_from([" ", "|", "\n", "Undefined"])))
    else:
        spoiled = [old + " ", " " + old, old + "\n", old + old, old + "0", old[:-1]]
        new = data.draw(other | st.sampled_from(["", " ", "|", " |", "\n", *spoiled]))
    assert faults(text[:start] + new + text[end:], plan), (old, new)
