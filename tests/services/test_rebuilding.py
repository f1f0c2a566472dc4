"""A lost ledger is made anew from sidecars, receipts, job directories and triggers; nothing is done twice by that."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from stagecal import wiring
from stagecal.domain.records import Step
from stagecal.domain.requests import Origin, Outcome, Request, State, request_id
from stagecal.ports import FatalError, JobHandle, JobState, MailReply
from stagecal.services.rebuilding import Rebuilt, rebuild
from stagecal.services.sweeping import extend, know_root, plan, sweep
from tests.services.effects import end_jobs, settle, verified, wish, with_mailer
from tests.sites import MAIN, MAIN_PROJECT, RELEASED, RELEASED_PROJECT, SiteForTests, make_test_site


@pytest.fixture
def site(tmp_path: Path) -> Iterator[SiteForTests]:
    made = make_test_site(tmp_path)
    yield made
    end_jobs(made)


def lose(site: SiteForTests, *, sidecars: bool = False) -> None:
    """Lose the database, and the sidecars beside it too."""
    site.site.ledger.close()
    for path in site.config.state.directory.glob("stagecal.db*"):
        path.unlink()
    if sidecars:
        shutil.rmtree(site.config.state.directory / "staged")


def rebuilt(site: SiteForTests) -> tuple[SiteForTests, Rebuilt]:
    """Make the ledger anew as `stagecal rebuild` does."""
    again = replace(wiring.site(site.config, anew=True), clock=site.clock)
    found = rebuild(again, again.ledger, site.config.cluster.work_area, site.clock.now())
    know_root(again)
    return SiteForTests(site.directory, site.config, site.clock, again), found


def test_a_ledger_that_is_gone_is_never_started_empty_in_silence(site: SiteForTests) -> None:
    lose(site)
    with pytest.raises(FatalError, match="rebuild"):
        site.restart()


def test_from_sidecars_everything_about_retention_comes_back(site: SiteForTests) -> None:
    site.place()
    settle(site)
    extend(site.site, site.only().token, 5, site.clock.now())
    before = site.site.ledger.staging(site.only().token)
    lose(site)
    again, found = rebuilt(site)
    assert found.remarks == [] and found.stagings == [before.token]
    assert again.site.ledger.staging(before.token) == before
    settle(again)
    assert (again.only().state, again.only().outcome) == (State.CLOSED, Outcome.DELIVERED)
    assert len(again.mails()) == 1 and again.calibrations() == 1
    assert sweep(again.site, plan(again.site, before.expires), before.expires).deleted == [before.token]


def test_what_was_rebuilt_is_linked_again(site: SiteForTests) -> None:
    site.place()
    settle(site)
    lose(site)
    again, _ = rebuilt(site)
    again.clock.advance(hours=1)
    again.place(ticket="2")
    settle(again)
    assert again.calibrations() == 1 and len(again.published()) == 2 and len(again.mails()) == 2


def test_from_receipts_alone_nobody_loses_a_day(site: SiteForTests) -> None:
    site.place()
    settle(site)
    token = site.only().token
    before = site.site.ledger.staging(token)
    lose(site, sidecars=True)
    site.clock.advance(days=3)
    again, found = rebuilt(site)
    assert found.stagings == [token] and found.remarks == []
    staging = again.site.ledger.staging(token)
    assert staging.expires == again.clock.now() + timedelta(days=28) > before.expires
    assert again.only().state is State.CLOSED and again.only().user == ""
    settle(again)
    assert len(again.mails()) == 1
    again.place(ticket="2")
    settle(again)
    assert again.calibrations() == 1 and len(again.published()) == 2


@pytest.mark.parametrize("sidecars", [False, True], ids=["sidecars kept", "sidecars lost too"])
def test_a_request_that_was_published_but_not_mailed_is_mailed_once_under_its_message_id(
    site: SiteForTests, sidecars: bool
) -> None:
    slow, mailer = with_mailer(site)
    mailer.answer("pi@example.org", MailReply.TRANSIENT)
    slow.place()
    slow.run()
    request = slow.only()
    assert request.state is State.STAGED
    (unsent,) = slow.site.ledger.unsent_mails()
    lose(slow, sidecars=sidecars)
    again, _ = rebuilt(slow)
    assert [one.id for one in again.requests()] == [request.id]
    settle(again)
    assert (again.only().state, again.only().outcome) == (State.CLOSED, Outcome.DELIVERED)
    assert again.calibrations() == 1 and again.triggers() == []
    to_user = [text for text in again.mails() if "X-Envelope-To: pi@example.org" in text]
    assert len(to_user) == 1 and unsent.message_id in to_user[0]


def test_waiting_triggers_come_back_under_the_same_id(site: SiteForTests) -> None:
    site.site.ledger.set_setting("held", "today")
    site.place()
    site.place(RELEASED, RELEASED_PROJECT)
    site.rounds().run()
    before = {request.id for request in site.requests()}
    lose(site)
    again, found = rebuilt(site)
    assert set(found.requests) == before == {request.id for request in again.requests()}
    settle(again)
    assert {request.outcome for request in again.requests()} == {Outcome.DELIVERED} and again.calibrations() == 2


def test_a_running_job_is_adopted_and_not_started_twice(site: SiteForTests) -> None:
    site.behave(sleep="1")
    site.place()
    site.run(lambda: bool(site.requests()) and site.only().state is State.STAGING)
    before = site.only()
    lose(site)
    again, found = rebuilt(site)
    assert found.jobs == [before.work]
    request = again.only()
    assert (request.id, request.state, request.holds_slot) == (before.id, State.STAGING, True)
    assert (request.node, request.work, request.nonce) == (before.node, before.work, before.nonce)
    settle(again)
    assert again.only().outcome is Outcome.DELIVERED and again.calibrations() == 1
    assert again.job_directories() == [] and verified(again.published()[0]) and len(again.mails()) == 1


def test_an_adopted_job_counts_against_the_slots(site: SiteForTests) -> None:
    site.behave(sleep="1")
    site.place()
    site.place(RELEASED, RELEASED_PROJECT)
    site.run(lambda: [one.state for one in site.requests()] == [State.STAGING] * 2)
    site.place("uid://A001/X133d/X3cf3", "2018.1.01406.S")
    site.rounds().run()
    lose(site)
    again, found = rebuilt(site)
    assert len(found.jobs) == 2
    again.rounds().run()
    assert sorted(one.state for one in again.requests()) == [State.ACCEPTED, State.STAGING, State.STAGING]
    settle(again)
    assert {one.outcome for one in again.requests()} == {Outcome.DELIVERED} and again.calibrations() == 3


def test_a_job_that_ended_meanwhile_is_collected(site: SiteForTests) -> None:
    site.behave(sleep="0.2")
    site.place()
    site.run(lambda: bool(site.requests()) and site.only().state is State.STAGING)
    job = site.only()
    end = time.monotonic() + 20
    while site.site.nodes.poll(JobHandle(job.node, job.work, job.nonce)).state is JobState.RUNNING:
        assert time.monotonic() < end
        time.sleep(0.02)
    lose(site)
    again, _ = rebuilt(site)
    settle(again)
    assert again.only().outcome is Outcome.DELIVERED and again.calibrations() == 1


def typed(site: SiteForTests, origin: Origin, **changes: str) -> str:
    """Put a request into the queue as `stagecalms` and `stagecal restore` do; return its id."""
    now = site.clock.now()
    request = Request(
        id=request_id(origin, site.site.new_secret()),
        sequence=0,
        origin=origin,
        mous=MAIN,
        project=MAIN_PROJECT,
        ticket="17",
        user="",
        calfields=(),
        contact="",
        trigger_name="",
        trigger_text="",
        trigger_sha256="",
        received_at=now,
        state=State.RECEIVED,
        since=now,
        **{"email": "", **changes},
    )
    assert site.site.ledger.add(request, Step("receive", decided="RECEIVED")) is not None
    return request.id


@pytest.mark.parametrize("origin", [Origin.OPERATOR, Origin.RESTORE])
def test_a_job_that_an_operator_started_comes_back_with_its_request(site: SiteForTests, origin: Origin) -> None:
    site.behave(sleep="1")
    number = typed(site, origin)
    site.run(lambda: site.only().state is State.STAGING)
    job = site.only()
    lose(site)
    again, found = rebuilt(site)
    assert found.jobs == [job.work]
    request = again.only()
    assert (request.id, request.origin, request.state, request.holds_slot) == (number, origin, State.STAGING, True)
    assert (request.ticket, request.project, request.mous) == ("17", MAIN_PROJECT, MAIN)
    settle(again)
    assert (again.only().state, again.only().outcome) == (State.CLOSED, Outcome.DELIVERED)
    assert again.calibrations() == 1


def test_a_finished_restore_is_named_and_not_mailed_again(site: SiteForTests) -> None:
    typed(site, Origin.RESTORE, email="me@example.org")
    settle(site)
    assert len(site.mails()) == 1
    lose(site)
    again, found = rebuilt(site)
    assert again.requests() == []
    assert any("a restore that has ended" in remark for remark in found.remarks)
    settle(again)
    assert len(again.mails()) == 1
    assert len(again.job_directories()) == 1


def test_a_job_that_nobody_asks_for_is_ended_and_no_third_one_is_started(site: SiteForTests) -> None:
    site.behave(sleep="60")
    name = site.place()
    site.run(lambda: site.only().state is State.STAGING)
    job = site.only()
    (site.config.triggers.directory / name).unlink()
    lose(site)
    again, found = rebuilt(site)
    assert again.requests() == []
    assert any("told to end" in remark for remark in found.remarks)
    assert any("stagecal release" in remark for remark in found.remarks)
    assert again.site.ledger.setting("held")
    handle = JobHandle(job.node, job.work, job.nonce)
    # A wrapper that has just begun finds the order at its next look, half a minute later.
    end = time.monotonic() + 60
    while again.site.nodes.poll(handle).state is JobState.RUNNING:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_job_goes_to_another_request_for_the_same(site: SiteForTests) -> None:
    site.behave(sleep="1")
    first = site.place()
    site.run(lambda: site.only().state is State.STAGING)
    job = site.only()
    site.clock.advance(seconds=5)
    site.place()
    (site.config.triggers.directory / first).unlink()
    lose(site)
    again, found = rebuilt(site)
    assert found.jobs == [job.work]
    settle(again)
    assert [one.outcome for one in again.requests()] == [Outcome.DELIVERED]
    assert again.calibrations() == 1


def test_a_job_of_a_node_that_is_gone_stops_nothing_but_new_jobs(site: SiteForTests) -> None:
    site.behave(sleep="60")
    site.place()
    site.place(RELEASED, RELEASED_PROJECT)
    site.run(lambda: [one.state for one in site.requests()] == [State.STAGING] * 2)
    stranger, known = site.requests()
    path = site.site.nodes.directory(JobHandle(stranger.node, stranger.work, stranger.nonce)) / "request.json"
    record = path.read_text()
    path.write_text(record.replace(f'"{stranger.node}"', '"elsewhere"'))
    lose(site)
    again, found = rebuilt(site)
    path.write_text(record)
    assert set(found.jobs) == {stranger.work, known.work}, "what cannot be looked at keeps its slot"
    assert sum(one.holds_slot for one in again.requests()) == 2


def test_while_jobs_may_run_where_nobody_can_look_no_other_one_is_started(site: SiteForTests) -> None:
    lose(site)
    nowhere = site.directory / "nowhere"
    cluster = replace(
        site.config.cluster,
        runner="ssh",
        shared_work_area=False,
        known_hosts=nowhere,
        ssh_key=nowhere,
        fetch_area=nowhere,
    )
    site.config = replace(site.config, cluster=cluster)
    again, found = rebuilt(site)
    assert any("job directories lie on the nodes only" in remark for remark in found.remarks)
    assert again.site.ledger.setting("held")


def test_a_failed_request_is_not_repeated_by_itself(site: SiteForTests) -> None:
    site.behave(exit="3")
    site.place()
    settle(site)
    lose(site)
    again, _ = rebuilt(site)
    settle(again)
    assert again.only().state is State.HELD and again.calibrations() == 1
    again.behave(exit="")
    wish(again, "retry")
    settle(again)
    assert again.only().outcome is Outcome.DELIVERED and again.job_directories() == []


def test_what_was_withdrawn_or_deleted_stays_so(site: SiteForTests) -> None:
    site.place()
    settle(site)
    token = site.only().token
    now = site.clock.time = site.site.ledger.staging(token).expires
    sweep(site.site, plan(site.site, now), now)
    lose(site)
    again, found = rebuilt(site)
    assert found.stagings == [] and again.site.ledger.stagings() == []


def test_rebuilding_twice_changes_nothing(site: SiteForTests) -> None:
    site.place()
    settle(site)
    site.site.ledger.set_setting("held", "today")
    site.place(RELEASED, RELEASED_PROJECT)
    site.rounds().run()
    lose(site)
    again, _ = rebuilt(site)
    requests, stagings = again.requests(), again.site.ledger.stagings()
    third, _ = rebuilt(again)
    assert third.requests() == requests and third.site.ledger.stagings() == stagings


def test_foreign_directories_are_named_and_left_alone(site: SiteForTests) -> None:
    root, work = site.config.staging.root, site.config.cluster.work_area
    (root / ("e" * 32)).mkdir()
    (work / "WORK99").mkdir()
    lose(site)
    again, found = rebuilt(site)
    assert len(found.remarks) == 2 and "WORK99" in "".join(found.remarks) and "e" * 32 not in "".join(found.remarks)
    assert (root / ("e" * 32)).is_dir() and (work / "WORK99").is_dir() and again.requests() == []


def test_an_incomplete_published_directory_can_expire_but_is_never_linked(site: SiteForTests) -> None:
    site.place()
    settle(site)
    (directory,) = site.published()
    next(directory.glob("*.tar")).unlink()
    lose(site)
    again, found = rebuilt(site)
    assert len(found.remarks) == 1
    again.clock.advance(hours=1)
    again.place(ticket="2")
    settle(again)
    assert again.calibrations() == 2
    expires = again.site.ledger.staging(directory.name).expires
    assert directory.name in sweep(again.site, plan(again.site, expires), expires).deleted


def test_a_damaged_sidecar_is_told(site: SiteForTests) -> None:
    site.place()
    settle(site)
    (sidecar,) = (site.config.state.directory / "staged").glob("*.json")
    sidecar.write_text(sidecar.read_text()[:50])
    lose(site)
    with pytest.raises(FatalError, match="cannot be read"):
        rebuilt(site)
