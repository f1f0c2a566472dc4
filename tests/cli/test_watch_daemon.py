"""`stagecal watch` as a real process: start, end, signals, a second one, and a trigger directory that goes away."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stagecal import wiring
from stagecal.domain.requests import Outcome, State
from stagecal.ports import JobHandle, JobState
from tests.cli.conftest import Commands, wait_until
from tests.sites import MAIN, MAIN_PROJECT, RELEASED, RELEASED_PROJECT, SiteForTests, make_test_site


def watching(commands: Commands, *words: str, **changes: str) -> subprocess.Popen[str]:
    """A daemon that has looked at the directory for the first time."""
    process = commands.start("stagecal", "watch", *words, **changes)
    assert process.stderr is not None
    said = ""
    while "watching" not in said:
        line = process.stderr.readline()
        assert line, f"it ended: {said}"
        said += line
    return process


def all_closed(site: SiteForTests, number: int = 1) -> Callable[[], bool]:
    return lambda: [one.state for one in site.requests()] == [State.CLOSED] * number


# --- until idle ----------------------------------------------------------------------------------------------------


def test_until_idle_ends_with_0_when_everything_is_done(commands: Commands) -> None:
    commands.site.place()
    commands.site.place(RELEASED, RELEASED_PROJECT, email="eve@example.org")
    commands.site.place(email="eve@example.org", ticket="2")
    ended = commands.run("stagecal", "watch", "--until-idle")
    assert ended.code == 0
    outcomes = [one.outcome for one in commands.site.requests()]
    assert outcomes.count(Outcome.DELIVERED) == 2 and outcomes.count(Outcome.REFUSED) == 1
    assert commands.site.triggers() == [] and len(commands.site.mails()) == 3


def test_until_idle_leaves_held_requests_aside(commands: Commands) -> None:
    commands.site.behave(exit="1")
    commands.site.place()
    assert commands.run("stagecal", "watch", "--until-idle").code == 0
    assert commands.site.only().state is State.HELD
    assert len(commands.site.triggers()) == 1


def test_until_idle_ends_with_3_when_some_only_wait_for_a_later_time(commands: Commands) -> None:
    (commands.site.directory / "archive.db").rename(commands.site.directory / "away.db")
    commands.site.place()
    assert commands.run("stagecal", "watch", "--until-idle").code == 3
    assert commands.site.only().state is State.RECEIVED and len(commands.site.triggers()) == 1


def test_until_idle_without_requests_ends_at_once(commands: Commands) -> None:
    assert commands.run("stagecal", "watch", "--until-idle").code == 0


# --- one only ------------------------------------------------------------------------------------------------------


def test_a_second_daemon_on_the_same_state_is_exit_75(commands: Commands) -> None:
    first = watching(commands)
    ended = commands.run("stagecal", "watch", "--until-idle")
    assert ended.code == 75 and str(first.pid) in ended.err.splitlines()[-1]
    assert commands.end(first, signal.SIGTERM).code == 0


def test_a_second_daemon_on_the_same_trigger_directory_is_exit_75(commands: Commands, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Commands(make_test_site(tmp_path / "other"))
    text = other.config.read_text()
    ours = commands.site.config.triggers.directory
    other.config.write_text(text.replace('directory = "triggers"', f'directory = "{ours}"'))
    first = watching(commands)
    try:
        ended = other.run("stagecal", "watch", "--until-idle")
        assert ended.code == 75 and str(ours) in ended.err.splitlines()[-1]
    finally:
        other.close()
    assert commands.end(first, signal.SIGTERM).code == 0


def test_after_a_killed_daemon_the_next_one_starts_at_once(commands: Commands) -> None:
    watching(commands).kill()
    started = time.monotonic()
    assert commands.run("stagecal", "watch", "--until-idle").code == 0
    assert time.monotonic() - started < 20


# --- the service manager -------------------------------------------------------------------------------------------


@contextmanager
def service_manager(path: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(path)
        listener.settimeout(20)
        yield listener


@pytest.mark.parametrize("kind", ["a path", "an abstract name"])
def test_ready_watchdog_and_stopping_reach_the_service_manager(commands: Commands, tmp_path: Path, kind: str) -> None:
    name = str(tmp_path / "n") if kind == "a path" else f"@stagecal-test-{os.getpid()}"
    with service_manager(name.replace("@", "\0")) as listener:
        process = commands.start("stagecal", "watch", NOTIFY_SOCKET=name, WATCHDOG_USEC="200000")
        said = ""
        while said.count("WATCHDOG=1") < 3:
            said += listener.recv(4096).decode() + "\n"
        assert "READY=1" in said.split("WATCHDOG=1")[0]
        assert "STATUS=0 open requests" in said
        process.send_signal(signal.SIGTERM)
        while "STOPPING=1" not in said:
            said += listener.recv(4096).decode() + "\n"
        assert commands.end(process).code == 0


# --- signals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["TERM", "KILL"])
def test_the_daemon_ends_soon_its_job_lives_and_the_next_one_finishes_it(commands: Commands, number: int) -> None:
    site = commands.site
    site.behave(sleep="3")
    site.place()
    process = watching(commands)
    wait_until(lambda: [one.state for one in site.requests()] == [State.STAGING], "the job's start")
    told = time.monotonic()
    process.send_signal(number)
    process.wait(timeout=20)
    assert time.monotonic() - told < 10
    assert process.returncode == (0 if number != signal.SIGKILL else -signal.SIGKILL)
    request = site.only()
    job = JobHandle(request.node, request.work, request.nonce)
    assert site.site.nodes.poll(job).state is JobState.RUNNING
    assert commands.run("stagecal", "watch", "--until-idle").code == 0
    assert site.only().outcome is Outcome.DELIVERED
    assert site.calibrations() == 1 and len(site.mails()) == 1 and site.triggers() == []


def test_a_hangup_does_not_end_it(commands: Commands) -> None:
    process = watching(commands)
    process.send_signal(signal.SIGHUP)
    commands.site.place()
    wait_until(all_closed(commands.site), "the delivery")
    assert commands.end(process, signal.SIGTERM).code == 0


# --- the scrub -----------------------------------------------------------------------------------------------------


def test_the_daemon_verifies_what_is_staged_beside_its_work_and_tells_of_rot(commands: Commands) -> None:
    site = commands.site
    site.place()
    assert commands.run("stagecal", "watch", "--until-idle").code == 0
    request = site.only()
    (tar,) = (site.config.staging.root / request.token).glob("*.tar")
    before = tar.stat()
    tar.chmod(0o644)
    with tar.open("r+b") as file:
        file.write(b"?")
    tar.chmod(0o444)
    os.utime(tar, ns=(before.st_atime_ns, before.st_mtime_ns))
    process = watching(commands)
    wait_until(lambda: any("staged data are rotten" in mail for mail in site.mails()), "the alarm", seconds=15)
    assert "is rotten" in commands.run("stagecal", "why", request.id).out
    assert "is rotten" in commands.run("stagecal", "status", request.id).out
    told = time.monotonic()
    assert commands.end(process, signal.SIGTERM).code == 0
    assert time.monotonic() - told < 3, "nobody waits for the scrub"


def test_a_pace_of_0_switches_the_scrub_off(commands: Commands) -> None:
    commands.config.write_text(commands.config.read_text().replace("[staging]", "[staging]\nscrub_mb_s = 0"))
    commands.site.place()
    process = watching(commands)
    wait_until(all_closed(commands.site), "the delivery")
    assert commands.end(process, signal.SIGTERM).code == 0
    ledger = wiring.ledger(commands.site.config)
    assert ledger.oldest_verification() == (1, None)
    ledger.close()


# --- the trigger directory -----------------------------------------------------------------------------------------


def test_a_trigger_by_trigger_calms_is_seen_at_once_and_delivered(commands: Commands) -> None:
    process = watching(commands)
    words = (MAIN_PROJECT, "Pi Person", "pi@example.org", "12345", MAIN, "--contact", "c@example.org")
    assert commands.run("trigger-calms", *words).code == 0
    wait_until(all_closed(commands.site), "the delivery", seconds=15)
    assert len(commands.site.published()) == 1
    assert commands.end(process, signal.SIGTERM).code == 0


@pytest.mark.parametrize("how", ["empty", "with its old content"])
def test_the_daemon_survives_a_trigger_directory_that_is_made_anew(
    commands_on: Callable[[str], Commands], how: str
) -> None:
    commands = commands_on("")
    text = commands.config.read_text()
    commands.config.write_text(text.replace("[triggers]", "[triggers]\nscan_interval_s = 1"))
    site = commands.site
    process = watching(commands)
    directory = site.config.triggers.directory
    away = directory.with_name("away")
    site.behave(sleep="4")
    site.place()
    wait_until(lambda: [one.state for one in site.requests()] == [State.STAGING], "the job's start")
    directory.rename(away)
    time_to_notice = time.monotonic() + 2
    wait_until(lambda: time.monotonic() > time_to_notice, "a look")
    assert [one.state for one in site.requests()] == [State.STAGING], "a directory that is away removes no request"
    if how == "empty":
        directory.mkdir()
    else:
        away.rename(directory)
    site.place(RELEASED, RELEASED_PROJECT, email="eve@example.org")
    wait_until(all_closed(site, 2), "both deliveries")
    assert [one.outcome for one in site.requests()] == [Outcome.DELIVERED] * 2
    assert process.poll() is None
    assert commands.end(process, signal.SIGTERM).code == 0


def test_a_trigger_that_is_removed_by_hand_withdraws_its_request(commands: Commands) -> None:
    site = commands.site
    commands.run("stagecal", "hold")
    process = watching(commands)
    name = site.place()
    wait_until(lambda: [one.state for one in site.requests()] == [State.ACCEPTED], "the judgement")
    (site.config.triggers.directory / name).unlink()
    wait_until(all_closed(site), "the withdrawal")
    assert site.only().outcome is Outcome.WITHDRAWN
    assert commands.end(process, signal.SIGTERM).code == 0
