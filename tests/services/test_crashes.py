"""Whoever dies at any moment is started again and ends where he would have ended: one job, one mail, nothing lost.

Each scenario runs once undisturbed, and then once for every effect, dying before and after it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from stagecal.domain.requests import Outcome, State
from stagecal.ports import MailReply
from stagecal.services.scrubbing import REST_S, Scrubber
from stagecal.services.sweeping import plan, sweep
from tests.services.effects import (
    Arena,
    Crash,
    Effects,
    end_jobs,
    end_state,
    existing,
    message_ids,
    run_until,
    settle,
    wish,
    with_mailer,
    with_ports,
)
from tests.sites import CALIBRATORS, CALIBRATORS_PROJECT, MAIN, RELEASED, START, SiteForTests

MEMORY = Path("/dev/shm")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is room: hundreds of sites wait for the disk thousands of times."""
    if not _has_room(MEMORY):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=MEMORY, prefix="stagecal-", ignore_cleanup_errors=True) as directory:
        yield Path(directory)


def _has_room(directory: Path) -> bool:
    try:
        found = os.statvfs(directory)
    except OSError:
        return False
    may_be_used = os.access(directory, os.W_OK) and not found.f_flag & os.ST_NOEXEC
    return may_be_used and found.f_bavail * found.f_frsize > 2**30


Act = Callable[[SiteForTests], None]


@dataclass(frozen=True)
class Scenario:
    """`before` happens undisturbed; each of `acts` is done again from its beginning if we die in it.

    With `only_after` we die after each effect only, which leaves the same on disk as dying before the next one.
    """

    name: str
    acts: Sequence[Act]
    before: Act = lambda site: None
    calibrations: int = 1
    states: tuple[State, ...] = (State.CLOSED,)
    only_after: bool = False


def _deliver(site: SiteForTests) -> None:
    site.place()
    settle(site)


def _withdraw(site: SiteForTests) -> None:
    first = site.requests()[0]
    if first.state not in (State.WITHDRAWING, State.CLOSED):
        wish(site, "withdraw", first)


def _retry(site: SiteForTests) -> None:
    if site.only().state is State.HELD and not site.only().wish:
        wish(site, "retry")


def _sweep(site: SiteForTests) -> None:
    now = site.clock.now()
    sweep(site.site, plan(site.site, now), now)


def _scrub(site: SiteForTests) -> None:
    records: Any = site.site.ledger
    scrubber = Scrubber(site.site, records)
    try:
        while scrubber.step() < REST_S:
            pass
    finally:
        scrubber.close()


def _overwrite(site: SiteForTests, byte: bytes) -> None:
    """Change the last byte of the first request's file, as a disk does it: nothing else changes."""
    (tar,) = (site.config.staging.root / site.requests()[0].token).glob("*.tar")
    before = tar.stat()
    tar.chmod(0o644)
    with tar.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(byte)
    tar.chmod(0o444)
    os.utime(tar, ns=(before.st_atime_ns, before.st_mtime_ns))


def _deliver_and_rot(site: SiteForTests) -> None:
    """Two directories share a file that rots, and a third one holds a healthy file."""
    _deliver_and_place(site)
    settle(site)
    _place_calfields(site, "J0510+1800")
    settle(site)
    _overwrite(site, b"?")


def _repair(site: SiteForTests) -> None:
    """Give the file its content back, so that everything published can be verified at the end."""
    assert "rotten" in site.requests()[0].reason and "rotten" in site.requests()[1].reason
    _overwrite(site, b"\0")


def _deliver_and_place(site: SiteForTests) -> None:
    _deliver(site)
    site.clock.time = START + timedelta(hours=1)
    _place_second(site)


def _place_second(site: SiteForTests) -> None:
    site.place(ticket="2", email="delegee@example.org")


def _place_refused(site: SiteForTests) -> None:
    site.set_state(MAIN, "QA3InProgress/Delivered")
    site.place()


def _remove_triggers(site: SiteForTests) -> None:
    for name in site.triggers():
        (site.config.triggers.directory / name).unlink()


def _notice_the_removal(site: SiteForTests) -> None:
    rounds = site.rounds()
    for _ in range(4):
        rounds.run()
        site.clock.advance(seconds=2)


def _place_failing(site: SiteForTests) -> None:
    site.behave(exit="3")
    site.place()


def _place_long(site: SiteForTests) -> None:
    site.behave(sleep="60")
    site.place()


def _place_calfields(site: SiteForTests, *fields: str) -> None:
    site.place(CALIBRATORS, CALIBRATORS_PROJECT, calfields=fields, email="franco@gmail.com")


def _place_two(site: SiteForTests) -> None:
    site.place()
    _place_second(site)


def _fail_and_mend(site: SiteForTests) -> None:
    _place_failing(site)
    settle(site)
    site.behave(exit="")


def _expire(site: SiteForTests) -> None:
    _deliver(site)
    site.clock.advance(days=29)


def _wait_for_the_mail_until_tomorrow(site: SiteForTests) -> None:
    slow, mailer = with_mailer(site)
    mailer.answer("pi@example.org", MailReply.TRANSIENT)
    slow.place()
    slow.run()
    assert slow.only().state is State.STAGED
    site.clock.advance(days=1)
    site.set_state(MAIN, "QA3InProgress")


def _refuse_the_user(site: SiteForTests) -> None:
    strict, mailer = with_mailer(site)
    mailer.answer("pi@example.org", MailReply.REFUSED)
    strict.place()
    settle(strict)
    assert strict.only().state is State.HELD


def _place_malformed(site: SiteForTests) -> None:
    name = site.place()
    path = site.config.triggers.directory / name
    path.write_text(path.read_text().replace("MOUS uid", "MOUS dip"))


def _slow_down(site: SiteForTests) -> None:
    site.behave(sleep="0.2")
    _place_two(site)


SCENARIOS = [
    Scenario("full delivery", [settle], before=lambda site: site.place() and None),
    Scenario("reuse", [settle], before=_deliver_and_place),
    Scenario("refused", [settle], before=_place_refused, calibrations=0),
    Scenario("failed", [settle], before=_place_failing, states=(State.HELD,)),
    Scenario("retried", [_retry, settle], before=_fail_and_mend, calibrations=2, only_after=True),
    Scenario(
        "withdrawn while running",
        [lambda site: run_until(site, State.STAGING), _withdraw, settle],
        before=_place_long,
        calibrations=0,
    ),
    Scenario(
        "withdrawn by removing the trigger",
        [lambda site: run_until(site, State.HELD), _remove_triggers, _notice_the_removal, settle],
        before=_place_failing,
        only_after=True,
    ),
    Scenario("withdrawn when failed", [_withdraw, settle], before=_fail_and_mend),
    Scenario("calfields", [settle], before=lambda site: _place_calfields(site, "J0510+1800"), only_after=True),
    Scenario("calfield refused", [settle], before=lambda site: _place_calfields(site, "HL_Tau")),
    Scenario("two for one product", [settle], before=_place_two, only_after=True),
    Scenario(
        "the maker is withdrawn",
        [lambda site: run_until(site, State.STAGING), _withdraw, settle],
        before=_slow_down,
        only_after=True,
    ),
    Scenario("no longer entitled the next day", [settle], before=_wait_for_the_mail_until_tomorrow, only_after=True),
    Scenario("mailed again", [_retry, settle], before=_refuse_the_user, only_after=True),
    Scenario("malformed", [settle], before=_place_malformed, calibrations=0, states=()),
    Scenario("expired", [_sweep], before=_expire),
    Scenario("rotten", [_scrub, settle, _repair], before=_deliver_and_rot, calibrations=2),
]


def _played(arena: Arena, scenario: Scenario, *deaths: Effects) -> SiteForTests:
    """Return the site after the scenario, with a death and a new start wherever the effects say so, in turn."""
    site = arena.fresh()
    scenario.before(site)
    first, *later = deaths
    acting = with_ports(site, **vars(first.wrap(site.site)))
    acts = list(scenario.acts)
    try:
        while acts:
            try:
                acts[0](acting)
                acts.pop(0)
            except Crash:
                acting.site.ledger.close()
                acting = site.restart()
                if later:
                    acting = with_ports(acting, **vars(later.pop(0).wrap(acting.site)))
        return acting
    except BaseException:
        end_jobs(acting)
        raise


def _crash_points(names: Sequence[str], *, only_after: bool) -> list[tuple[int, bool]]:
    moments = (False,) if only_after else (True, False)
    return [(number, before) for number in range(1, len(names) + 1) for before in moments]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name.replace(" ", "-"))
def test_dying_at_any_effect_changes_nothing_but_perhaps_one_mail_twice(place: Path, scenario: Scenario) -> None:
    arena = Arena(place)
    undisturbed = Effects()
    site = _played(arena, scenario, undisturbed)
    expected = end_state(site)
    assert {one.state for one in site.requests()} == set(scenario.states)
    assert site.calibrations() == scenario.calibrations
    assert max(message_ids(site).values(), default=1) == 1
    site.site.ledger.close()
    doubtful = set()
    faults = []
    for number, before in _crash_points(undisturbed.names, only_after=scenario.only_after):
        effects = Effects(number, before)
        where = f"{'before' if before else 'after'} {number}: {undisturbed.names[number - 1]}"
        try:
            site = _played(arena, scenario, effects)
        except Exception as error:
            faults.append(f"{where}: {error}")
            continue
        found = end_state(site)
        site.site.ledger.close()
        faults += [f"{where}: {key}: {found[key]} != {value}" for key, value in expected.items() if found[key] != value]
        twice = [count - 1 for count in message_ids(site).values() if count > 1]
        if twice:
            doubtful.add(where)
            between = undisturbed.names[number - 1] == ("ledger.update_recipients" if before else "mailer.send")
            if twice != [1] or not between:
                faults.append(f"{where}: {twice} mails too many")
    assert not faults, "\n".join(faults)
    # Only between the server's answer and its record can nobody know: that is before one effect and after another.
    assert len(doubtful) == (1 if scenario.only_after else 2) * undisturbed.names.count("mailer.send")


def test_dying_again_while_the_first_death_is_mended_changes_nothing_either(place: Path) -> None:
    arena = Arena(place)
    scenario = SCENARIOS[0]
    undisturbed = Effects()
    site = _played(arena, scenario, undisturbed)
    expected = end_state(site)
    site.site.ledger.close()
    for number in range(2, len(undisturbed.names), 3):
        site = _played(arena, scenario, Effects(number), Effects(1 + number % 4), Effects(2))
        assert end_state(site) == expected, number
        assert sum(message_ids(site).values()) <= 2
        site.site.ledger.close()


# --- real deaths ---------------------------------------------------------------------------------------------------


def _place_several(site: SiteForTests) -> None:
    """Two requests for one product, one for calibrators, and one that is refused."""
    site.behave(sleep="0.3")
    _place_two(site)
    _place_calfields(site, "J0510+1800")
    site.place(RELEASED, "2017.1.01347.S", ticket="4")


def _assert_everything_ended_well(site: SiteForTests, deaths: int) -> None:
    found = end_state(site)
    assert [one.outcome for one in site.requests()].count(Outcome.DELIVERED) == 3, site.requests()
    assert [one.outcome for one in site.requests()].count(Outcome.REFUSED) == 1
    assert site.calibrations() == 2, "one job for each product"
    assert len(site.published()) == 3 and len({identity for identity, _ in message_ids(site)}) == 4
    assert sum(message_ids(site).values()) <= 4 + deaths
    for empty in ("triggers", "published without record", "being made", "withdrawn without record"):
        assert found[empty] == [], empty
    assert found["jobs"] == found["in the work area"] == found["unsent"] == 0


def test_a_daemon_that_is_killed_again_and_again_loses_nothing_and_does_nothing_twice(
    tmp_path: Path, checkout: Path
) -> None:
    site = Arena(tmp_path).fresh()
    _place_several(site)
    site.site.ledger.close()
    program = [sys.executable, "-c", "from stagecal.cli.main import main; main()", "watch", "--config"]
    delays = (0.5, 0.7, 0.8, 0.9, 0.75, 1.2)
    for delay in delays:
        daemon = subprocess.Popen(
            [*program, str(site.config.path)],
            env={**os.environ, "PYTHONPATH": str(checkout)},
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        with suppress(subprocess.TimeoutExpired):
            daemon.wait(delay)
        daemon.send_signal(signal.SIGKILL)
        daemon.wait()
    again = existing(site.directory)
    # Mails that were on their way wait for a few minutes.
    again.clock.time = datetime.now(UTC) + timedelta(minutes=10)
    try:
        settle(again)
    finally:
        end_jobs(again)
    _assert_everything_ended_well(again, len(delays))


CALLS = "fsync,fdatasync,pwrite64,rename,renameat,renameat2,link,linkat,unlink,unlinkat,rmdir,mkdir,mkdirat,ftruncate"
DRIVER = """
import pathlib, sys
from tests.services.effects import existing, settle
settle(existing(pathlib.Path(sys.argv[1])))
"""
POINTS = 20


def _traced(site: SiteForTests, checkout: Path, log: Path, *options: str) -> int:
    """Let a process of its own do everything, under strace; return its exit code.

    It has one thread, and its jobs are not traced: so the calls have the same numbers in every run.
    """
    return subprocess.run(
        ["strace", "-o", str(log), *options, sys.executable, "-c", DRIVER, str(site.directory)],
        env={**os.environ, "PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=checkout,
        capture_output=True,
        timeout=120,
        check=False,
    ).returncode


@pytest.mark.requires_program("strace")
@pytest.mark.parametrize("part", [0, 1])
def test_a_process_that_is_killed_at_a_system_call_loses_nothing(place: Path, checkout: Path, part: int) -> None:
    arena = Arena(place)
    log = place / "calls"
    site = arena.fresh()
    _place_several(site)
    site.site.ledger.close()
    assert _traced(site, checkout, log, "-e", f"trace={CALLS}") == 0
    seen: Counter[str] = Counter()
    calls = []
    for line in log.read_text().splitlines():
        if "(" in line:
            call = line.partition("(")[0]
            seen[call] += 1
            # The database writes a page far more often than anything else happens.
            if call != "pwrite64" or seen[call] % 8 == 0:
                calls.append((call, seen[call]))
    points = [calls[len(calls) * (index + 1) // (POINTS + 1)] for index in range(POINTS)][part::2]
    killed = 0
    for call, number in points:
        site = arena.fresh()
        _place_several(site)
        site.site.ledger.close()
        # Each system call is counted by itself.
        _traced(site, checkout, log, "-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={number}")
        killed += "killed by SIGKILL" in log.read_text()
        again = existing(site.directory)
        again.clock.time = START + timedelta(hours=1)
        try:
            settle(again)
        finally:
            end_jobs(again)
        _assert_everything_ended_well(again, 1)
        again.site.ledger.close()
    assert killed >= len(points) - 2, "how often a job is looked at is left to chance"
