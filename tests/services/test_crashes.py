"""Whoever dies at any moment is started again and ends where he would have ended: one job, one mail, nothing lost.

Each scenario runs once undisturbed, and then once for every effect, dying before and after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest

from stagecal.domain.requests import State
from stagecal.ports import MailReply
from stagecal.services.sweeping import plan, sweep
from tests.services.effects import (
    Arena,
    Crash,
    Effects,
    end_jobs,
    end_state,
    message_ids,
    run_until,
    settle,
    wish,
    with_mailer,
    with_ports,
)
from tests.sites import CALIBRATORS, CALIBRATORS_PROJECT, MAIN, START, SiteForTests

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
]


def _played(arena: Arena, scenario: Scenario, effects: Effects) -> SiteForTests:
    """Return the site after the scenario, with one death and one new start where the effects say so."""
    site = arena.fresh()
    scenario.before(site)
    acting = with_ports(site, **vars(effects.wrap(site.site)))
    acts = list(scenario.acts)
    try:
        while acts:
            try:
                acts[0](acting)
                acts.pop(0)
            except Crash:
                acting.site.ledger.close()
                acting = site.restart()
        return acting
    except BaseException:
        end_jobs(acting)
        raise


def _crash_points(names: Sequence[str], *, only_after: bool) -> list[tuple[int, bool]]:
    moments = (False,) if only_after else (True, False)
    return [(number, before) for number in range(1, len(names) + 1) for before in moments]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name.replace(" ", "-"))
def test_dying_at_any_effect_changes_nothing_but_perhaps_one_mail_twice(tmp_path: Path, scenario: Scenario) -> None:
    arena = Arena(tmp_path)
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
