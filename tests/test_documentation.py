"""The documents say what the program does: commands, options, states, verdicts, exit codes, files and links exist."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest

from stagecal.cli import common
from stagecal.cli import main as stagecal_main
from stagecal.cli.stagecalms import main as stagecalms
from stagecal.cli.trigger_calms import main as trigger_calms
from stagecal.domain.requests import TRANSITIONS, Outcome, State
from stagecal.domain.verdicts import CYCLE_0_TEXT, NO_QA0_PASS_TEXT, Verdict, advice
from stagecal.embedded import make_site

TOP = Path(__file__).resolve().parents[1]
DOCUMENTS = [TOP / "README.md", TOP / "CHANGES.md", *sorted((TOP / "docs").glob("*.md"))]
PROGRAMS = tuple(tomllib.loads((TOP / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"])
NAMES = [str(path.relative_to(TOP)) for path in DOCUMENTS]
# Written so that this file does not contain them.
FORBIDDEN = (r"(?<!\w)/wor[k]/(?!WORK)", r"/tm[p]/", r"\.\./share[d]", r"(?i)\bsee[d]s?\b")

_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
_SPAN = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")


def text_of(name: str) -> str:
    return (TOP / name).read_text(encoding="utf-8")


def in_one_line(text: str) -> str:
    """Return a text without line breaks and marks of code, as a person reads it."""
    return " ".join(text.replace("`", "").split())


def without_code_blocks(text: str) -> str:
    return re.sub(r"(?ms)^```.*?^```$", "", text)


def code(text: str) -> Iterator[str]:
    """Yield each line of a code block and each code span."""
    fenced = False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line.strip()
    yield from _SPAN.findall(without_code_blocks(text))


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each command of ours in a document, from the program's name on."""
    for line in code(text):
        if not any(program in line for program in PROGRAMS):
            continue
        try:
            # What stands after a lone -- is somebody else's command.
            words = shlex.split(line.partition(" -- ")[0], comments=True)
        except ValueError:
            continue
        if words[:1] == ["$"]:
            words = words[1:]
        if words[:1] == ["sudo"]:
            words = words[3:]
        if words and words[0].rpartition("/")[2] in PROGRAMS:
            yield [words[0].rpartition("/")[2], *words[1:]]


@cache
def help_of(program: str, command: str = "") -> str:
    """Return what a command says about itself."""
    main = {"stagecal": stagecal_main.main, "stagecalms": stagecalms, "trigger-calms": trigger_calms}[program]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    assert ended.value.code == 0
    return said.getvalue()


EVERY_COMMAND = [
    *((program, "") for program in PROGRAMS),
    *(("stagecal", command) for command in stagecal_main.COMMANDS),
]


def headings(path: Path) -> set[str]:
    """Return the anchors of a document, as web sites make them of its headings."""
    found = re.findall(r"(?m)^#+ (.+)$", without_code_blocks(path.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in found}


# --- everything that there is, is documented --------------------------------------------------------------------------


@pytest.mark.parametrize(("program", "command"), EVERY_COMMAND)
def test_every_command_is_explained_to_operators(program: str, command: str) -> None:
    assert f"`{program} {command}".rstrip() in text_of("docs/operators.md")


def test_trigger_calms_is_explained_to_staff() -> None:
    assert "$ trigger-calms" in text_of("docs/arc-staff.md")


@pytest.mark.parametrize(("program", "command"), EVERY_COMMAND)
def test_every_option_is_documented(program: str, command: str) -> None:
    options = set(_OPTION.findall(help_of(program, command))) - {"--help"}
    documents = text_of("docs/operators.md") + (text_of("docs/arc-staff.md") if program == "trigger-calms" else "")
    assert not options - set(_OPTION.findall(documents))


@pytest.mark.parametrize("state", State)
def test_every_state_is_explained(state: State) -> None:
    assert re.search(rf"(?m)^\| `{state}` \|", text_of("docs/operators.md"))
    assert f"`{state}`" in text_of("docs/architecture.md")


@pytest.mark.parametrize("outcome", Outcome)
def test_every_outcome_is_explained(outcome: Outcome) -> None:
    assert f"`{outcome}`" in text_of("docs/operators.md")


def test_the_table_of_states_shows_ways_that_exist() -> None:
    origins: list[str] = []
    shown = set()
    for line in text_of("docs/architecture.md").partition("## Life of a request")[2].splitlines():
        if not line.startswith("| "):
            continue
        first, following = line.split("|")[1:3]
        # An empty first cell goes on with the row above; "any before ..." is no list of states.
        if first.strip():
            origins = [] if first.strip().startswith("any") else re.findall(r"`([A-Z]+)`", first)
        shown |= {(origin, target) for origin in origins for target in re.findall(r"`([A-Z]+)`", following)}
    assert len(shown) >= 15
    assert {way for way in shown if State(way[1]) not in TRANSITIONS[State(way[0])]} == set()


@pytest.mark.parametrize("verdict", Verdict)
def test_every_verdict_is_told_in_its_own_words(verdict: Verdict) -> None:
    text = text_of("docs/arc-staff.md")
    assert f"`{verdict}`" in text
    assert in_one_line(advice(verdict)) in in_one_line(text)


@pytest.mark.parametrize("words", [NO_QA0_PASS_TEXT, CYCLE_0_TEXT])
def test_what_staff_read_at_once_is_told_in_its_own_words(words: str) -> None:
    assert in_one_line(words) in in_one_line(text_of("docs/arc-staff.md"))


def test_every_exit_code_is_explained() -> None:
    codes = {value for name, value in vars(common).items() if name.isupper() and type(value) is int}
    assert len(codes) >= 8
    shown = {int(code) for code in re.findall(r"(?m)^\| (\d+) \|", text_of("docs/operators.md"))}
    assert shown == codes


def test_every_alarm_is_named() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in sorted((TOP / "stagecal/services").rglob("*.py")))
    alarms = set(re.findall(r'(?:alarm_mail\(\s*(?:self\.)?site,\s*|\bwhat = )"([^"]+)"', sources))
    assert len(alarms) >= 4
    assert {alarm for alarm in alarms if f"`{alarm}`" not in text_of("docs/operators.md")} == set()


def files_that_people_meet() -> list[str]:
    names = [str(path.relative_to(TOP / "templates")) for path in sorted((TOP / "templates").rglob("*"))]
    names = [name for name in names if (TOP / "templates" / name).is_file() and "__pycache__" not in name]
    names += [path.name for path in sorted((TOP / "etc" / "queries").iterdir())]
    names += [path.name for path in sorted((TOP / "systemd").iterdir())]
    names += [
        str(path.relative_to(TOP))
        for path in sorted((TOP / "etc").rglob("*"))
        if path.is_file() and "queries" not in path.parts
    ]
    return names


@pytest.mark.parametrize("name", files_that_people_meet())
def test_every_template_query_unit_and_example_is_named(name: str) -> None:
    assert any(name in path.read_text(encoding="utf-8") for path in DOCUMENTS)


# --- everything that is documented, exists ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_commands_in_documents_exist_with_their_options(name: str) -> None:
    faults = []
    for words in commands(text_of(name)):
        program, rest = words[0], words[1:]
        command = ""
        if program == "stagecal" and rest and not rest[0].startswith("-"):
            command = rest[0]
            if not re.fullmatch(r"[a-z]+", command):
                continue
            if command not in stagecal_main.COMMANDS:
                faults.append(f"stagecal {command}")
                continue
            # `stagecal ms check` has a help of its own.
            if len(rest) > 1 and re.search(rf"(?m)^    {re.escape(rest[1])} ", help_of(program, command)):
                command += f" {rest[1]}"
        known = _OPTION.findall(help_of(program, command))
        options = [option for word in rest for option in _OPTION.findall(word) if word.startswith("--")]
        faults += [f"{program} {command} {option}" for option in options if option not in known]
    assert not faults


def test_commands_are_found_in_documents() -> None:
    found = [words for name in NAMES for words in commands(text_of(name))]
    assert ["stagecal", "retry", "8a83"] in found
    assert any(words[:2] == ["trigger-calms", "--dry-run"] for words in found)
    assert len(found) > 60


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    path = TOP / name
    faults = []
    for target in _LINK.findall(without_code_blocks(text_of(name))):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        if not there.exists() or not there.is_relative_to(TOP):
            faults.append(target)
        elif anchor and anchor not in headings(there):
            faults.append(f"{target} (there is no such heading)")
    assert not faults


def test_every_document_is_reached_from_the_readme() -> None:
    linked = set(_LINK.findall(text_of("README.md")))
    assert {name for name in NAMES if name != "README.md"} <= linked


@pytest.mark.parametrize("name", NAMES)
def test_documents_stand_alone(name: str) -> None:
    assert [found for pattern in FORBIDDEN for found in re.findall(pattern, text_of(name))] == []


# --- examples run -----------------------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """An embedded site, without data; returns its configuration file."""
    return make_site(tmp_path)


def example(name: str, start: str) -> tuple[list[str], str]:
    """Return the words of an example command of a document, and what the document says that it prints."""
    lines = [line[4:] for line in re.split(rf"(?m)^(?=    \$ {re.escape(start)})", text_of(name))[1].splitlines()]
    printed = []
    for line in lines[1:]:
        if not line:
            break
        printed.append(line.rstrip())
    return shlex.split(lines[0])[1:], "\n".join(printed)


def run(capsys: pytest.CaptureFixture[str], words: Sequence[str], config: Path) -> tuple[object, str]:
    with pytest.raises(SystemExit) as ended:
        trigger_calms([*words[1:], "--contact", "contact@example.org", "--config", str(config)])
    said = capsys.readouterr()
    return ended.value.code, said.out + said.err


def as_printed_here(text: str, directory: Path) -> str:
    """Return a text of the document with this site's directory; times differ from run to run."""
    return _without_time("\n".join(line.rstrip() for line in text.replace("/srv/site", str(directory)).splitlines()))


def _without_time(text: str) -> str:
    return re.sub(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d", "TIME", text)


@pytest.mark.parametrize("start", ["trigger-calms 2017.1.01347.S", "trigger-calms --dry-run"])
def test_examples_for_staff_print_what_the_document_shows(
    start: str, site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, printed = example("docs/arc-staff.md", start)
    code, said = run(capsys, words, site)
    assert code == 0
    assert as_printed_here(said, site.parent) == as_printed_here(printed, site.parent)


def test_the_example_with_several_mouss_places_one_of_them(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, _ = example("docs/arc-staff.md", "trigger-calms 2017.1.00370.S")
    code, said = run(capsys, words, site)
    assert code == common.FORBIDDEN
    assert "uid://A001/X1284/X265f: placed" in said
    assert NO_QA0_PASS_TEXT in said


def test_the_example_with_calibrator_fields_is_placed(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, _ = example("docs/arc-staff.md", "trigger-calms 2021.1.01582.S")
    assert run(capsys, words, site)[0] == 0


@pytest.mark.parametrize(
    ("project", "mous"),
    [
        ("2011.0.00010.S", "uid://A002/X2a5c2f/X1"),
        ("2017.1.00370.S", "uid://A001/X1284/X266"),
        ("2017.1.00727.S", "uid://A001/Xffff/Xffff"),
        ("2017.1.00727.S", "uid://A001/X12a3/X80e"),
    ],
)
def test_refusals_at_once_stand_in_the_document_as_they_are_printed(
    project: str, mous: str, site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = run(capsys, ["trigger-calms", project, "A User", "user@example.org", "1", mous], site)
    assert code == common.FORBIDDEN
    assert in_one_line(said.removeprefix(f"{mous}: ")) in in_one_line(text_of("docs/arc-staff.md"))


def test_an_active_duplicate_is_answered_as_the_document_says(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, _ = example("docs/arc-staff.md", "trigger-calms 2017.1.01347.S")
    run(capsys, words, site)
    code, said = run(capsys, words, site)
    assert code == common.NOT_CONFIRMED
    start = "nothing was placed: there is an active request for this MOUS already: trigger-"
    assert start in said
    assert start in text_of("docs/arc-staff.md")
