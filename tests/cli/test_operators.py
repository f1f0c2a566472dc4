"""What operators type: status, why, retry, withdraw, hold, release, extend, rebuild; and what they mistype."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from stagecal.cli import main as stagecal
from stagecal.cli import stagecalms, trigger_calms
from stagecal.domain.records import Step
from stagecal.domain.requests import Outcome, State
from tests.cli.conftest import Commands, Ended, everything_below
from tests.sites import SiteForTests

Call = Callable[..., Ended]

KEYS = [
    *("id", "state", "outcome", "uws_phase", "mous", "project", "ticket", "user", "email", "calfields", "position"),
    *("node", "job", "since", "url", "expires"),
]
TOKEN = "0123456789abcdef0123456789abcdef"


def one_line(ended: Ended, code: int) -> str:
    """The one line of an error."""
    assert (ended.code, ended.out) == (code, "")
    (line,) = ended.err.splitlines()
    assert line.startswith("stagecal ")
    return line


def held(site: SiteForTests) -> str:
    """The id of a request that failed."""
    site.behave(exit="3")
    site.place()
    site.run()
    site.behave(exit="")
    assert site.only().state is State.HELD
    return site.only().id


def waiting(site: SiteForTests) -> str:
    """The id of a request that waits for its turn."""
    site.site.ledger.set_setting("held", "2026-01-02T03:04:05+00:00")
    site.place()
    site.run(lambda: site.only().state is State.ACCEPTED)
    return site.only().id


def delivered(site: SiteForTests) -> str:
    """The id of a request that was delivered."""
    site.place()
    site.run()
    assert site.only().outcome is Outcome.DELIVERED
    return site.only().id


# --- status and why ------------------------------------------------------------------------------------------------


def test_status_shows_a_table(site: SiteForTests, call: Call) -> None:
    assert call("stagecal", "status").out == "There are no requests.\n"
    request = waiting(site)
    ended = call("stagecal", "status")
    assert (ended.code, ended.err) == (0, "")
    held_line, head, row = ended.out.splitlines()
    assert held_line.startswith("No new jobs are started since ")
    assert head.split()[:3] == ["ID", "STATE", "OUTCOME"]
    assert row.split()[:4] == [request, "ACCEPTED", "#1", "uid://A001/X12a3/X80e"]


def test_status_json_is_a_list_of_objects_with_the_promised_keys(site: SiteForTests, call: Call) -> None:
    assert call("stagecal", "status", "--json").json == []
    request = delivered(site)
    (record,) = call("stagecal", "status", "--json").json
    assert set(KEYS) <= set(record)
    assert record["id"] == request and record["state"] == "CLOSED" and record["outcome"] == "delivered"
    assert record["uws_phase"] == "COMPLETED" and record["calfields"] == [] and record["position"] is None
    assert record["user"] == "Pi Person" and record["email"] == "pi@example.org" and record["ticket"] == "12345"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", record["since"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", record["expires"])


def test_links_are_masked_unless_they_are_asked_for(site: SiteForTests, call: Call) -> None:
    request = delivered(site)
    token = site.published()[0].name
    for words in (("status",), ("status", "--json"), ("status", request), ("why", request), ("why", request, "--json")):
        ended = call("stagecal", *words)
        assert ended.code == 0 and token not in ended.out
    (record,) = call("stagecal", "status", "--json").json
    assert record["url"] == f"http://localhost:8000/preview/{token[:6]}…"
    (record,) = call("stagecal", "status", "--json", "--show-urls").json
    assert record["url"] == f"http://localhost:8000/preview/{token}"
    assert token in call("stagecal", "why", request, "--show-urls").out


def test_a_waiting_request_has_a_position_and_a_running_one_a_node_and_a_job(site: SiteForTests, call: Call) -> None:
    site.behave(sleep="60")
    site.place()
    site.run(lambda: site.only().state is State.STAGING)
    try:
        (record,) = call("stagecal", "status", "--json").json
        assert record["uws_phase"] == "EXECUTING" and record["node"] == "localhost" and record["position"] is None
        assert record["job"] == site.job_directories()[0].name
        assert record["url"] is None
    finally:
        assert call("stagecal", "withdraw", record["id"]).code == 0
        site.run()


def test_an_expired_request_is_archived_and_has_no_link(site: SiteForTests, call: Call) -> None:
    delivered(site)
    later = (site.clock.now() + timedelta(days=40)).isoformat()
    assert call("stagecal", "expire", "--now", later).code == 0
    (record,) = call("stagecal", "status", "--json").json
    assert record["uws_phase"] == "ARCHIVED" and record["url"] is None and record["expires"] is None


def test_why_tells_the_whole_story(site: SiteForTests, call: Call) -> None:
    request = held(site)
    ended = call("stagecal", "why", request[:5])
    assert (ended.code, ended.err) == (0, "")
    for words in (f"request {request}: HELD", "ended with exit code 3", "state Delivered", "Failed.", "Pi Person"):
        assert words in ended.out
    record = call("stagecal", "why", request, "--json").json
    assert set(KEYS) <= set(record)
    assert all({"time", "step", "asked", "seen", "decided"} == set(step) for step in record["steps"])
    assert [step["time"] for step in record["steps"]] == sorted(step["time"] for step in record["steps"])
    judged = next(step for step in record["steps"] if step["step"] == "judge")
    assert "may pi@example.org have uid://A001/X12a3/X80e" in judged["asked"] and judged["decided"] == "yes"


@pytest.mark.parametrize("command", ["status", "why", "retry", "withdraw"])
def test_an_unknown_or_ambiguous_id_is_exit_4(site: SiteForTests, call: Call, command: str) -> None:
    assert "no request 'abc'" in one_line(call("stagecal", command, "abc"), 4)
    site.place()
    site.receiver.look(site.clock.now())
    known = site.only()
    ids = ["abc1000000000000", "abc2000000000000"]
    for number, one in enumerate(ids):
        changed = replace(known, id=one, trigger_name=f"other-{number}", sequence=0)
        site.site.ledger.add(changed, Step("receive"))
    assert all(one in one_line(call("stagecal", command, "ABC"), 4) for one in ids)
    assert one_line(call("stagecal", command, ""), 4) if command != "status" else True
    assert one_line(call("stagecal", command, "%"), 4)
    assert call("stagecal", "status", "abc1").code == 0


# --- acts ----------------------------------------------------------------------------------------------------------


def test_retry_starts_a_held_request_again(site: SiteForTests, call: Call) -> None:
    request = held(site)
    ended = call("stagecal", "retry", request)
    assert ended.code == 0 and ended.out == f"request {request}: retry noted (HELD)\n"
    site.run()
    assert site.only().outcome is Outcome.DELIVERED and site.triggers() == []


def test_retry_needs_a_held_request(site: SiteForTests, call: Call) -> None:
    assert "is CLOSED" in one_line(call("stagecal", "retry", delivered(site)), 3)


def test_withdraw_takes_a_request_back_and_its_trigger(site: SiteForTests, call: Call) -> None:
    request = waiting(site)
    assert call("stagecal", "withdraw", request).code == 0
    assert site.only().outcome is Outcome.WITHDRAWN and site.triggers() == []
    assert "is CLOSED" in one_line(call("stagecal", "withdraw", request), 3)


def test_withdraw_of_a_delivered_request_is_refused_and_its_data_stay(site: SiteForTests, call: Call) -> None:
    assert "needs one that is open" in one_line(call("stagecal", "withdraw", delivered(site)), 3)
    assert len(site.published()) == 1


def test_hold_and_release_are_for_all_dispatching(site: SiteForTests, call: Call) -> None:
    assert call("stagecal", "hold").code == 0
    site.place()
    site.run(lambda: site.only().state is State.ACCEPTED)
    for _ in range(3):
        site.rounds().run()
    assert site.job_directories() == []
    assert call("stagecal", "release").code == 0
    site.run()
    assert site.only().outcome is Outcome.DELIVERED


@pytest.mark.parametrize("form", ["{url}/{token}", "{url}/{token}/", "{token}"])
def test_extend_by_link_or_token(site: SiteForTests, call: Call, form: str) -> None:
    delivered(site)
    token = site.published()[0].name
    staging = site.site.ledger.staging(token)
    assert staging is not None
    ended = call("stagecal", "extend", form.format(url=site.config.staging.url, token=token), "14")
    until = (staging.expires + timedelta(days=14)).strftime("%Y-%m-%dT%H:%M:%SZ")
    assert (ended.code, ended.out) == (0, f"the data stay at least until {until}\n")
    (record,) = call("stagecal", "status", "--json").json
    assert record["expires"] == until


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ((TOKEN, "14"), 4),
        (("x", "14"), 2),
        (("", "14"), 2),
        ((f"{TOKEN}0", "14"), 2),
        ((TOKEN.upper(), "14"), 2),
        ((TOKEN, "0"), 2),
        ((TOKEN, "-3"), 2),
        ((TOKEN, "soon"), 2),
        ((TOKEN, "99999999999999999999"), 2),
    ],
)
def test_extend_refuses_what_is_no_link_and_no_number(call: Call, words: tuple[str, ...], code: int) -> None:
    assert TOKEN not in one_line(call("stagecal", "extend", *words), code)


def test_what_is_deleted_cannot_be_extended(site: SiteForTests, call: Call) -> None:
    delivered(site)
    token = site.published()[0].name
    call("stagecal", "expire", "--now", (site.clock.now() + timedelta(days=40)).isoformat())
    assert "requested again" in one_line(call("stagecal", "extend", token, "14"), 3)


def test_rebuild_makes_a_lost_ledger_anew(site: SiteForTests, call: Call) -> None:
    delivered(site)
    token = site.published()[0].name
    for path in site.config.state.directory.glob("stagecal.db*"):
        path.unlink()
    ended = call("stagecal", "rebuild")
    assert ended.code == 0 and "1 staged directories" in ended.out
    assert call("stagecal", "extend", token, "1").code == 0


def test_rebuild_is_refused_while_the_daemon_runs(commands: Commands) -> None:
    process = commands.start("stagecal", "watch")
    assert process.stderr is not None
    while "watching" not in process.stderr.readline():
        assert process.poll() is None
    assert "stop it first" in one_line(commands.run("stagecal", "rebuild"), 75)
    assert commands.end(process, signal.SIGTERM).code == 0


@pytest.mark.requires_root("gives the state directory to another user")
@pytest.mark.parametrize(
    "words",
    [
        ("retry", "abc"),
        ("withdraw", "abc"),
        ("hold",),
        ("release",),
        ("extend", TOKEN, "1"),
        ("rebuild",),
        ("expire",),
        ("watch",),
    ],
    ids=lambda words: words[0],
)
def test_acts_are_for_the_service_s_own_user(site: SiteForTests, call: Call, words: tuple[str, ...]) -> None:
    os.chown(site.config.state.directory, 12345, -1)
    before = everything_below(site.directory)
    assert "service's user" in one_line(call("stagecal", *words), 3)
    assert everything_below(site.directory) == before


# --- typed wrongly -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "hint"),
    [(("stauts",), "did you mean 'status'?"), (("frobnicate",), "stagecal --help"), (("\x1b[2J",), "stagecal --help")],
)
def test_an_unknown_command_gets_a_hint(call: Call, words: tuple[str, ...], hint: str) -> None:
    ended = call("stagecal", *words)
    assert ended.code == 2 and hint in ended.err and len(ended.err.splitlines()) == 1 and "\x1b" not in ended.err


@pytest.mark.parametrize("command", stagecal.COMMANDS)
def test_every_command_s_help_shows_an_example(call: Call, command: str) -> None:
    ended = call("stagecal", command, "--help")
    assert (ended.code, ended.err) == (0, "")
    assert re.search(rf"^example:\n  stagecal {command}\b", ended.out, re.MULTILINE)
    assert command in call("stagecal", "--help").out


@pytest.mark.parametrize("program", ["trigger-calms", "stagecalms", "stagecal"])
def test_every_program_s_help_shows_an_example(commands: Commands, program: str) -> None:
    ended = commands.run(program, "--help")
    assert (ended.code, ended.err) == (0, "") and re.search(rf"^example:\n  {program} ", ended.out, re.MULTILINE)


@pytest.mark.parametrize("command", stagecal.COMMANDS)
@pytest.mark.parametrize("garbage", [("--no\x1bsuch\noption",), ("a", "b", "c", "d"), ("--config",)], ids=range(3))
def test_a_wrong_command_line_is_one_line(call: Call, command: str, garbage: tuple[str, ...]) -> None:
    ended = call("stagecal", command, *garbage)
    assert ended.code == 2 and ended.out == ""
    (line,) = ended.err.splitlines()
    assert f"stagecal {command} --help" in line and "\x1b" not in line


BAD_FILES = {
    "empty": b"",
    "no TOML": b"[mail\n",
    "binary": bytes(range(256)),
    "Latin-1": '[mail]\nsignature = "Süß"\n'.encode("latin-1"),
    "unknown key": b"[mial]\nhost = 1\n[staging]\nroots = 3\n",
    "wrong values": b'[cluster]\nmax_jobs = "two"\n[staging]\nroot = 7\nretention_days = -1\n[[cluster.nodes]]\n',
    "tables for values": b"[mail.host]\n[triggers.directory]\n[[staging]]\n",
    "deep": b"a = " + b"[" * 100_000,
    "deep tables": b"[" + b".".join([b"a"] * 20_000) + b"]\n",
    "huge number": b"[staging]\nretention_days = " + b"9" * 10_000 + b"\n",
    "infinite": b"[staging]\nretention_days = inf\n[cluster]\nlease_h = nan\nmax_jobs = 1e400\n",
    "NUL in a path": b'[staging]\nroot = "\\u0000"\n[state]\ndirectory = "a\\u0000b"\n',
    "date": b"staging = 1979-05-27T07:32:00Z\n",
}
WITH_CONFIGURATION = [
    ("stagecal", "status"),
    ("stagecal", "why", "a"),
    ("stagecal", "retry", "a"),
    ("stagecal", "withdraw", "a"),
    ("stagecal", "hold"),
    ("stagecal", "release"),
    ("stagecal", "extend", TOKEN, "3"),
    ("stagecal", "rebuild"),
    ("stagecal", "expire"),
    ("stagecal", "watch", "--until-idle"),
    ("trigger-calms", "2017.1.01347.S", "Pi", "pi@example.org", "1", "uid://A001/X12a3/X80e"),
    ("stagecalms", "2017.1.01347.S", "uid://A001/X12a3/X80e", "1"),
]
WITH_LEDGER = [words for words in WITH_CONFIGURATION if words[0] != "trigger-calms"]
MAINS = {"stagecal": stagecal.main, "trigger-calms": trigger_calms.main, "stagecalms": stagecalms.main}


def command_of(words: tuple[str, ...]) -> str:
    """The command in a command line."""
    return words[1] if words[0] == "stagecal" else words[0]


@pytest.mark.parametrize("words", WITH_CONFIGURATION, ids=command_of)
def test_a_bad_configuration_is_said_in_lines_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    paths = [tmp_path / "missing.toml", tmp_path]
    for name, content in BAD_FILES.items():
        (tmp_path / name).mkdir()
        paths.append(tmp_path / name / "stagecal.toml")
        paths[-1].write_bytes(content)
    for path in paths:
        with pytest.raises(SystemExit) as ended:
            MAINS[words[0]]([*words[1:], "--config", str(path)])
        said = capsys.readouterr()
        assert ended.value.code == 2, (path, said.err)
        program = " ".join(words[:2]) if words[0] == "stagecal" else words[0]
        assert said.out == "" and said.err, path
        assert all(line.startswith(f"{program}: ") for line in said.err.splitlines()), (path, said.err)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(BAD_FILES), "nothing was made"


@pytest.mark.parametrize("words", WITH_LEDGER, ids=command_of)
def test_a_damaged_ledger_is_said_in_one_line(
    site: SiteForTests, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    (site.config.state.directory / "stagecal.db").write_bytes(b"no database " * 1000)
    for path in site.config.state.directory.glob("stagecal.db-*"):
        path.unlink()
    with pytest.raises(SystemExit) as ended:
        MAINS[words[0]]([*words[1:], "--config", str(site.directory / "stagecal.toml")])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 5 and "stagecal.db is damaged" in line and "stagecal rebuild" in line


@pytest.mark.parametrize("lost", ["archive.db", "triggers", "work", "preview", "mail", "state"])
def test_what_is_missing_never_gives_a_traceback(commands: Commands, lost: str) -> None:
    (commands.site.directory / lost).rename(commands.site.directory / "lost")
    for words in (("status",), ("expire", "--dry-run"), ("expire",), ("watch", "--until-idle")):
        ended = commands.run("stagecal", *words)
        assert ended.code in (0, 2, 3, 5), (words, ended)
        if ended.code:
            assert f"stagecal {words[0]}: " in ended.err


def test_output_into_a_closed_pipe_is_no_error(commands: Commands) -> None:
    process = commands.start("stagecal", "--help")
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    ended = commands.end(process)
    assert (ended.code, ended.err) == (0, "")
