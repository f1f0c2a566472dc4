"""`stagecalms`: the terminal output that operators know, and the queue behind it.

What must vary is named in the golden transcripts: <TOKEN>, <WORK>, <SITE>, <ACCOUNT>, <RATE>, <DATE>, <BYTES>.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sqlite3
import subprocess
from collections.abc import Callable

import pytest

from stagecal.domain.requests import Outcome, State
from tests.cli.conftest import Commands, wait_until
from tests.sites import CALIBRATORS, CALIBRATORS_PROJECT, MAIN, MAIN_PROJECT, RELEASED, RELEASED_PROJECT, SiteForTests

Golden = Callable[[str, str], None]
MAIN_WORDS = (MAIN_PROJECT, MAIN, "18704")
OTHERS = [
    (MAIN_PROJECT, MAIN, "18704"),
    (RELEASED_PROJECT, RELEASED, "1"),
    ("2018.1.01406.S", "uid://A001/X133d/X3cf3", "2"),
]
RHEL5 = """
[[restore.casa]]
version = "4.7.2"
home = "/opt/casa-4.7.2"
label = "rhel5"
[[restore.casa]]
version = "5.1.1"
home = "/opt/casa-5.1.1"
[[cluster.nodes]]
name = "arcp5"
labels = ["rhel5"]
"""


def normalised(site: SiteForTests, text: str) -> str:
    """The output without what must vary between two runs."""
    for pattern, name in (
        (re.escape(str(site.directory)), "<SITE>"),
        (r"\b[0-9a-f]{32}\b", "<TOKEN>"),
        (r"\b[0-9a-f]{6}…", "<MASKED>"),
        (r"\bWORK\d+\b", "<WORK>"),
        (r"Working as \S+@\S+", "Working as <ACCOUNT>"),
        (r"received \d+ bytes [\d.]+ bytes/sec", "received <BYTES> bytes <RATE> bytes/sec"),
        (r"total size is \d+", "total size is <BYTES>"),
        (r"[A-Z][a-z]{2} [A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d UTC \d{4}", "<DATE>"),
    ):
        text = re.sub(pattern, name, text)
    return text


def wait_for_job(site: SiteForTests) -> None:
    wait_until(lambda: any(one.state is State.STAGING for one in site.requests()), "the job's start")


def daemon(commands: Commands) -> subprocess.Popen[str]:
    process = commands.start("stagecal", "watch")
    assert process.stderr is not None
    while "watching" not in process.stderr.readline():
        assert process.poll() is None
    return process


# --- the words -----------------------------------------------------------------------------------------------------


def test_transcript_of_a_staging_that_makes_everything_anew(commands: Commands, golden: Golden) -> None:
    ended = commands.run("stagecalms", *MAIN_WORDS)
    assert (ended.code, ended.err) == (0, "")
    golden("transcripts/regenerated.txt", normalised(commands.site, ended.out))
    (directory,) = commands.site.published()
    assert f"completed at http://localhost:8000/preview/{directory.name}\n" in ended.out
    assert commands.site.job_directories() == [] and commands.site.mails() == []


def test_transcript_of_a_staging_by_hard_links_masks_the_other_token(commands: Commands, golden: Golden) -> None:
    first = commands.run("stagecalms", *MAIN_WORDS)
    token = commands.site.published()[0].name
    ended = commands.run("stagecalms", *MAIN_WORDS)
    assert (ended.code, ended.err) == (0, "")
    golden("transcripts/linked.txt", normalised(commands.site, ended.out))
    assert token in first.out and token not in ended.out
    assert commands.site.calibrations() == 1 and len(commands.site.published()) == 2


def test_transcript_of_a_calibrator_request(commands: Commands, golden: Golden) -> None:
    words = (CALIBRATORS_PROJECT, CALIBRATORS, "12345", "X", "J0510+1800,J0440+1437")
    ended = commands.run("stagecalms", *words)
    assert (ended.code, ended.err) == (0, "")
    golden("transcripts/calfields.txt", normalised(commands.site, ended.out))


def test_transcript_of_an_old_project_names_the_rhel5_build(
    commands_on: Callable[[str], Commands], golden: Golden
) -> None:
    commands = commands_on(RHEL5)
    commands.site.archive(
        "UPDATE ASA_PROJECT SET PROJECT_CODE = ? WHERE PROJECT_CODE = ?", "2016.1.00727.S", RELEASED_PROJECT
    )
    ended = commands.run("stagecalms", "2016.1.00727.S", RELEASED, "16140")
    assert (ended.code, ended.err) == (0, "")
    golden("transcripts/rhel5.txt", normalised(commands.site, ended.out))


def test_a_new_project_of_such_a_site_says_nothing_of_rhel5(commands_on: Callable[[str], Commands]) -> None:
    ended = commands_on(RHEL5).run("stagecalms", *MAIN_WORDS)
    assert ended.code == 0 and "RHEL5" not in ended.out


def test_transcript_of_a_failed_staging(commands: Commands, golden: Golden) -> None:
    commands.site.behave(exit="3")
    ended = commands.run("stagecalms", *MAIN_WORDS)
    assert ended.code == 1
    golden("transcripts/failed.txt", normalised(commands.site, ended.out))
    request = commands.site.only()
    assert request.state is State.HELD
    assert request.id in ended.err and "exit code 3" in ended.err and len(ended.err.splitlines()) == 1
    (mail,) = commands.site.mails()
    assert "stagecalms 2017.1.01347.S uid://A001/X12a3/X80e 18704" in mail
    assert all(line in mail for line in ended.out.splitlines())
    assert len(commands.site.job_directories()) == 1 and commands.site.published() == []


def test_the_same_command_starts_a_failed_staging_again_and_shows_the_new_attempt(commands: Commands) -> None:
    commands.site.behave(exit="3")
    commands.run("stagecalms", *MAIN_WORDS)
    commands.site.behave(exit="")
    ended = commands.run("stagecalms", *MAIN_WORDS)
    assert ended.code == 0
    assert ended.out.startswith("The staging directory will be accessible at ") and "Failed." not in ended.out
    assert len(commands.site.requests()) == 1


def test_transcript_of_a_refused_staging(commands: Commands, golden: Golden) -> None:
    ended = commands.run("stagecalms", "2019.1.00337.S", "uid://A001/X14d7/X160", "18704")
    assert ended.code == 3
    golden("transcripts/refused.txt", normalised(commands.site, ended.out))
    assert commands.site.mails() == [] and commands.site.published() == []


# --- the checks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "verdict"),
    [
        (("2017.1.00370.S", "uid://A001/X1284/X265f", "1"), "MOUS NOT DELIVERED"),
        (("2017.1.00370.S", "uid://A001/X1284/X266", "1"), "NO QA0_PASS DATA"),
        ((RELEASED_PROJECT, MAIN, "1"), "INVALID MOUS UID"),
        ((MAIN_PROJECT, "uid://A001/X12a3/X80f", "1"), "INVALID MOUS UID"),
        ((*MAIN_WORDS, "--user", "eve@example.org"), "NOT ENTITLED"),
        ((CALIBRATORS_PROJECT, CALIBRATORS, "1", "X", "HL_Tau"), "NOT A CALIBRATOR FIELD"),
    ],
)
def test_every_check_is_made_and_a_refusal_is_exit_3(commands: Commands, words: tuple[str, ...], verdict: str) -> None:
    ended = commands.run("stagecalms", *words)
    assert ended.code == 3 and verdict in ended.out.splitlines()
    assert commands.site.published() == []
    assert commands.site.only().outcome is Outcome.REFUSED


def test_entitlement_is_checked_only_for_a_named_user(commands: Commands) -> None:
    assert commands.run("stagecalms", *MAIN_WORDS, "--user", "delegee@example.org").code == 0
    assert commands.run("stagecalms", *MAIN_WORDS).code == 0


@pytest.mark.parametrize(
    "words",
    [
        MAIN_WORDS[:2],
        (MAIN_PROJECT, MAIN, "x"),
        ("2017", MAIN, "1"),
        (MAIN_PROJECT, "X80e", "1"),
        (*MAIN_WORDS, "X"),
        (*MAIN_WORDS, "X", ""),
        (*MAIN_WORDS, "Y", "J0510+1800"),
        (*MAIN_WORDS, "J0510+1800"),
        (*MAIN_WORDS, "--user", ""),
        (*MAIN_WORDS, "--user", "eve"),
    ],
)
def test_a_bad_argument_is_one_line_and_exit_2(commands: Commands, words: tuple[str, ...]) -> None:
    ended = commands.run("stagecalms", *words)
    assert ended.code == 2 and ended.out == "" and len(ended.err.splitlines()) == 1
    assert commands.site.requests() == []


@pytest.mark.requires_root("gives the state directory to another user")
def test_only_the_service_s_own_user_may_stage_by_hand(commands: Commands) -> None:
    os.chown(commands.site.config.state.directory, 12345, -1)
    ended = commands.run("stagecalms", *MAIN_WORDS)
    assert ended.code == 3 and "service's user" in ended.err and len(ended.err.splitlines()) == 1
    assert commands.site.requests() == []


def test_who_typed_it_is_on_record(commands: Commands) -> None:
    commands.run("stagecalms", *MAIN_WORDS, LOGNAME="operator7")
    steps = commands.run("stagecal", "why", commands.site.only().id, "--json").json["steps"]
    assert "operator7" in steps[0]["seen"] and "stagecalms 2017.1.01347.S" in steps[0]["seen"]


# --- the queue -----------------------------------------------------------------------------------------------------


def test_it_stands_in_the_queue_and_says_where_on_standard_error(commands: Commands) -> None:
    site = commands.site
    site.behave(sleep="60")
    first, second = (commands.start("stagecalms", *words) for words in OTHERS[:2])
    wait_until(lambda: sum(one.holds_slot for one in site.requests()) == 2, "two jobs")
    third = commands.start("stagecalms", *OTHERS[2])
    assert third.stderr is not None
    assert third.stderr.readline() == "Position 1 of 1 in the queue: waiting for a slot ...\n"
    assert sum(one.holds_slot for one in site.requests()) == 2 and len(site.job_directories()) == 2
    ended = commands.end(third, signal.SIGINT)
    assert ended.code == 130 and "withdrawn" in ended.err
    assert site.requests()[2].outcome is Outcome.WITHDRAWN
    for process in (first, second):
        assert commands.end(process, signal.SIGINT).code == 130


def test_ctrl_c_before_dispatch_withdraws(commands: Commands) -> None:
    assert commands.run("stagecal", "hold").code == 0
    process = commands.start("stagecalms", *MAIN_WORDS)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("No new jobs are started")
    ended = commands.end(process, signal.SIGINT)
    assert ended.code == 130 and "withdrawn" in ended.err
    request = commands.site.only()
    assert (request.state, request.outcome) == (State.CLOSED, Outcome.WITHDRAWN)
    assert commands.site.job_directories() == [] and commands.site.published() == []


def test_after_a_withdrawal_the_same_command_is_a_new_request(commands: Commands) -> None:
    commands.run("stagecal", "hold")
    process = commands.start("stagecalms", *MAIN_WORDS)
    assert process.stderr is not None and process.stderr.readline()
    commands.end(process, signal.SIGINT)
    commands.run("stagecal", "release")
    assert commands.run("stagecalms", *MAIN_WORDS).code == 0
    assert len(commands.site.requests()) == 2


@pytest.mark.parametrize("watched", [False, True], ids=["alone", "with a daemon"])
def test_ctrl_c_after_dispatch_only_detaches_and_the_same_command_goes_on(commands: Commands, watched: bool) -> None:
    site = commands.site
    site.behave(sleep="2")
    process = daemon(commands) if watched else None
    first = commands.start("stagecalms", *MAIN_WORDS)
    assert first.stdout is not None
    where = first.stdout.readline()
    wait_for_job(site)
    ended = commands.end(first, signal.SIGINT)
    assert ended.code == 130 and "detached" in ended.err
    assert site.only().state is State.STAGING
    again = commands.run("stagecalms", *MAIN_WORDS)
    assert again.code == 0 and "completed at" in again.out
    assert where.startswith("The staging directory will be accessible at ") and again.out.startswith(where)
    assert site.calibrations() == 1 and len(site.requests()) == 1
    if process is not None:
        assert commands.end(process, signal.SIGTERM).code == 0


def test_with_a_daemon_the_words_are_the_same(commands: Commands, golden: Golden) -> None:
    process = daemon(commands)
    ended = commands.run("stagecalms", *MAIN_WORDS)
    assert ended.code == 0
    golden("transcripts/regenerated.txt", normalised(commands.site, ended.out))
    assert commands.end(process, signal.SIGTERM).code == 0


def test_ctrl_c_does_not_wait_for_a_silent_mail_server(commands: Commands) -> None:
    site = commands.site
    site.behave(exit="3")
    config = commands.config.read_text()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        smtp = f'transport = "smtp"\nhost = "127.0.0.1"\nport = {silent.getsockname()[1]}\nstarttls = false\n'
        commands.config.write_text(config.replace('transport = "maildir"\nmaildir = "mail"\n', smtp))
        process = commands.start("stagecalms", *MAIN_WORDS)
        silent.settimeout(20)
        with silent.accept()[0]:
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=15) == 130
        assert commands.end(process).code == 130
    assert site.only().state is State.FAILED


def test_two_operators_who_type_the_same_share_one_calibration(commands: Commands) -> None:
    commands.site.behave(sleep="1")
    first = commands.start("stagecalms", *MAIN_WORDS)
    wait_for_job(commands.site)
    second = commands.start("stagecalms", MAIN_PROJECT, MAIN, "18705")
    ended = [commands.end(process) for process in (first, second)]
    assert [one.code for one in ended] == [0, 0]
    assert "is making the same products: waiting for it" in ended[1].err
    assert "Found pre-existing" in ended[1].out
    assert commands.site.calibrations() == 1 and len(commands.site.published()) == 2


def test_a_ledger_that_breaks_meanwhile_ends_it_with_a_line(commands: Commands) -> None:
    site = commands.site
    site.behave(sleep="60")
    process = commands.start("stagecalms", *MAIN_WORDS)
    wait_for_job(site)
    request = site.only()
    with sqlite3.connect(site.config.state.directory / "stagecal.db") as database:
        database.execute("ALTER TABLE requests RENAME TO requests_lost")
    ended = commands.end(process)
    with sqlite3.connect(site.config.state.directory / "stagecal.db") as database:
        database.execute("ALTER TABLE requests_lost RENAME TO requests")
    assert ended.code == 5 and len(ended.err.splitlines()) == 1
    assert site.only().id == request.id
