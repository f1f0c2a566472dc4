"""What is done while a node is silent: nothing, until the lease of its job is over; then the job cannot live."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stagecal.domain.requests import Outcome, Request, State
from stagecal.ports import FatalError, JobHandle, JobState, JobStatus, Nodes, TransientError
from stagecal.services.dispatching import clean_what_was_left, node_overview
from tests.sites import SiteForTests, make_test_site


class Failing:
    """The site's nodes, as seen over a line that can be cut, or to a machine that shows another host key."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes
        self.trouble: Exception | None = None

    def poll(self, job: JobHandle) -> JobStatus:
        if isinstance(self.trouble, TransientError):
            return JobStatus(JobState.UNREACHABLE, detail=str(self.trouble))
        if self.trouble is not None:
            raise self.trouble
        return self.nodes.poll(job)

    def loads(self) -> Any:
        return self.nodes.loads()

    def __getattr__(self, name: str) -> Any:
        if self.trouble is not None and name != "directory":
            raise self.trouble
        return getattr(self.nodes, name)


class Unclean:
    """Nodes of which job directories cannot be removed."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes

    def clean(self, job: JobHandle) -> None:
        raise TransientError(f"{job.work}: no route to host")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.nodes, name)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[SiteForTests]:
    made = make_test_site(tmp_path)
    made.site = replace(made.site, nodes=Failing(made.site.nodes))
    made.__post_init__()
    yield made
    nodes(made).trouble = None
    for request in made.site.ledger.open_requests():
        if request.work:
            made.site.nodes.cancel(JobHandle(request.node, request.work, request.nonce))


def nodes(site: SiteForTests) -> Failing:
    found = site.site.nodes
    assert isinstance(found, Failing)
    return found


def staging(site: SiteForTests) -> Request:
    """A request whose job runs, looked at since."""
    site.behave(sleep="60")
    site.place()
    site.run(lambda: site.only().state is State.STAGING)
    site.run(lambda: site.only().reason == "" and site.only().leased_until is not None)
    return site.only()


def look(site: SiteForTests) -> Request:
    """Let a minute pass, and do the rounds that are due then."""
    site.clock.advance(minutes=1)
    site.rounds().run()
    return site.only()


def patiently(site: SiteForTests, condition: Callable[[], bool]) -> None:
    """Do rounds, a quarter of an hour apart, until the condition holds."""
    for _ in range(40):
        site.clock.advance(minutes=15)
        for _ in range(5):
            site.rounds().run()
        if condition():
            return
    raise AssertionError(site.requests())


def test_the_lease_is_on_record_before_the_node_has_it(site: SiteForTests) -> None:
    request = staging(site)
    assert request.leased_until is not None
    given = int((site.site.nodes.directory(JobHandle(request.node, request.work, request.nonce)) / "lease").read_text())
    assert given <= request.leased_until.timestamp()


def test_a_silent_node_keeps_its_slot_until_the_lease_of_its_job_is_over(site: SiteForTests) -> None:
    request = staging(site)
    assert request.leased_until is not None
    nodes(site).trouble = TransientError("no route to host")
    waiting = look(site)
    assert (waiting.state, waiting.holds_slot, waiting.reason) == (State.STAGING, True, "no route to host")
    site.clock.time = request.leased_until
    waiting = look(site)
    assert (waiting.state, waiting.holds_slot) == (State.STAGING, True), "the wrapper needs a moment to end everything"
    site.clock.advance(minutes=10)
    lost = look(site)
    assert lost.lost_on == (request.node,)
    assert lost.work != request.work
    assert any("has not answered since" in step.step.seen for step in site.site.ledger.steps(request.id))


def test_a_node_that_answers_again_in_time_goes_on_with_its_job(site: SiteForTests) -> None:
    request = staging(site)
    nodes(site).trouble = TransientError("no route to host")
    look(site)
    nodes(site).trouble = None
    again = look(site)
    assert (again.state, again.work, again.reason, again.lost_on) == (State.STAGING, request.work, "", ())
    assert again.leased_until is not None
    assert request.leased_until is not None
    assert again.leased_until > request.leased_until


def test_a_node_with_another_host_key_keeps_the_slot_and_is_told_once_a_day(site: SiteForTests) -> None:
    staging(site)
    nodes(site).trouble = FatalError("node1: ALARM, another host key")
    for _ in range(3):
        waiting = look(site)
    assert (waiting.state, waiting.holds_slot) == (State.STAGING, True)
    alarms = [mail for mail in site.mails() if "a job cannot be looked at" in mail]
    assert len(alarms) == 1
    assert "node1: ALARM, another host key" in alarms[0]


def test_what_is_withdrawn_while_its_node_is_silent_ends_when_the_lease_is_over(site: SiteForTests) -> None:
    request = staging(site)
    assert request.leased_until is not None
    nodes(site).trouble = TransientError("no route to host")
    site.site.ledger.set_wish(request.id, "withdraw", site.clock.now())
    waiting = look(site)
    assert (waiting.state, waiting.holds_slot) == (State.WITHDRAWING, True)
    patiently(site, lambda: site.only().state is State.CLOSED)
    ended = site.only()
    assert (ended.state, ended.outcome, ended.holds_slot) == (State.CLOSED, Outcome.WITHDRAWN, False)
    assert any("left behind" in step.step.seen for step in site.site.ledger.steps(request.id))


def test_what_a_silent_node_kept_is_removed_when_it_answers_again(site: SiteForTests) -> None:
    request = staging(site)
    job = JobHandle(request.node, request.work, request.nonce)
    assert request.leased_until is not None
    nodes(site).trouble = TransientError("no route to host")
    site.site.ledger.set_wish(request.id, "withdraw", site.clock.now())
    site.clock.time = request.leased_until
    patiently(site, lambda: site.only().state is State.CLOSED)
    (left,) = site.site.ledger.left_behind()
    assert (left.node, left.work, left.nonce) == (job.node, job.work, job.nonce)
    (overview,) = node_overview(site.site, "")
    assert overview["left_behind"] == [job.work]
    clean_what_was_left(site.site)
    assert len(site.site.ledger.left_behind()) == 1, "it is silent still"
    nodes(site).trouble = None
    # By its own clock, which is years behind, the job lives.
    site.site.nodes.cancel(job)
    end = time.monotonic() + 20
    while site.site.ledger.left_behind():
        assert time.monotonic() < end
        clean_what_was_left(site.site)
        time.sleep(0.05)
    assert not site.site.nodes.directory(job).exists()


def test_a_job_that_never_ends_is_ended_and_its_request_fails(site: SiteForTests) -> None:
    staging(site)
    site.clock.advance(hours=site.config.cluster.job_h + 1)
    site.run(lambda: site.only().state is State.HELD)
    held = site.only()
    assert not held.holds_slot
    assert "still ran after 168 hours" in held.reason


def test_a_failure_is_told_before_a_silent_node_gives_its_slot_back(site: SiteForTests) -> None:
    staging(site)
    nodes(site).trouble = TransientError("no route to host")
    site.site.ledger.commit(site.only(), now=site.clock.now(), to=State.FAILED, reason="it was decided so")
    site.run(lambda: len(site.mails()) == 1)
    waiting = site.only()
    assert (waiting.state, waiting.holds_slot) == (State.FAILED, True)
    assert waiting.leased_until is not None
    site.clock.time = waiting.leased_until
    site.clock.advance(minutes=11)
    site.run()
    assert (site.only().state, site.only().holds_slot, len(site.mails())) == (State.HELD, False, 1)


def test_a_slot_of_which_nothing_was_sent_is_free_though_the_node_is_silent(site: SiteForTests) -> None:
    nodes(site).trouble = TransientError("no route to host")
    site.place()
    site.run(lambda: site.only().state is State.DISPATCHING)
    site.site.ledger.commit(
        site.only(), now=site.clock.now(), to=State.FAILED, reason="its files cannot be made", leased_until=None
    )
    site.run()
    assert (site.only().state, site.only().holds_slot) == (State.HELD, False)


def test_results_are_not_lost_because_they_waited_longer_than_a_lease(site: SiteForTests) -> None:
    site.place()
    site.run(lambda: site.only().state is State.STAGING)
    request = site.only()
    job = JobHandle(request.node, request.work, request.nonce)
    end = time.monotonic() + 20
    while site.site.nodes.poll(job).state is JobState.RUNNING:
        assert time.monotonic() < end
        time.sleep(0.02)
    full = replace(site.config.staging, reserve_gb=10**6)
    site.site = replace(site.site, config=replace(site.config, staging=full))
    site.__post_init__()
    site.run(lambda: "the staging disk has" in site.only().reason)
    for _ in range(8):
        site.clock.advance(minutes=50)
        site.rounds().run()
    nodes(site).trouble = TransientError("no route to host")
    look(site)
    nodes(site).trouble = None
    site.site = replace(site.site, config=site.config)
    site.__post_init__()
    patiently(site, lambda: site.only().state is State.CLOSED)
    assert (site.only().outcome, site.only().lost_on) == (Outcome.DELIVERED, ())
    assert site.calibrations() == 1


def test_a_retry_needs_no_answer_of_the_node_that_failed(site: SiteForTests) -> None:
    site.behave(exit="3")
    site.place()
    site.run(lambda: site.only().state is State.HELD)
    failed = site.only()
    site.behave(exit="")
    real = nodes(site).nodes
    nodes(site).nodes = Unclean(real)
    site.site.ledger.set_wish(failed.id, "retry", site.clock.now())
    site.run()
    assert (site.only().outcome, site.only().lost_on) == (Outcome.DELIVERED, ())
    assert failed.work in [left.work for left in site.site.ledger.left_behind()]


def test_hours_without_a_fit_node_are_told_once_a_day(site: SiteForTests) -> None:
    cluster = replace(site.config.cluster, max_load_per_core=1e-9)
    site.site = replace(site.site, config=replace(site.config, cluster=cluster))
    site.__post_init__()
    site.place()
    site.run(lambda: bool(site.requests()) and "no node is fit" in site.only().reason)
    for _ in range(6):
        site.clock.advance(hours=1)
        site.rounds().run()
    alarms = [mail for mail in site.mails() if "no node is fit for hours" in mail]
    assert len(alarms) == 1
    assert "is busy" in alarms[0]


def test_a_launch_that_cannot_be_tried_is_given_up_with_its_lease(site: SiteForTests) -> None:
    nodes(site).trouble = TransientError("no route to host")
    site.place()
    site.run(lambda: site.only().state is State.DISPATCHING and site.only().leased_until is not None)
    first = site.only()
    assert first.leased_until is not None
    site.clock.advance(hours=1)
    site.run(lambda: site.only().attempts > first.attempts)
    assert site.only().leased_until == first.leased_until, "a lease that the node may not have is not made longer"
    site.clock.time = first.leased_until
    site.clock.advance(minutes=11)
    site.run(lambda: site.only().work != first.work)
    assert site.only().lost_on == (first.node,)
