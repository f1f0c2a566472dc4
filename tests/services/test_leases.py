"""What is done while a node is silent: nothing, until the lease of its job is over; then the job cannot live."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stagecal.domain.requests import Outcome, Request, State
from stagecal.ports import FatalError, JobHandle, JobState, JobStatus, Nodes, TransientError
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
    site.clock.time = request.leased_until
    site.clock.advance(minutes=11)
    site.run()
    ended = site.only()
    assert (ended.state, ended.outcome, ended.holds_slot) == (State.CLOSED, Outcome.WITHDRAWN, False)
    assert any("left behind" in step.step.seen for step in site.site.ledger.steps(request.id))


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
