"""The whole service on real SSH nodes: many requests, nodes with loads of their own, and everything that breaks.

How many jobs are alive is counted by the processes on the nodes, never by what the service believes.
"""

from __future__ import annotations

import math
import os
import random
import re
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from email import message_from_string
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from stagecal import wiring
from stagecal.adapters.nodes_ssh import SshNodes
from stagecal.domain.requests import Outcome, Request, State
from stagecal.ports import Nodes
from tests.clusters import (
    CHECKOUT,
    Census,
    Daemon,
    LoadedServer,
    add_observations,
    cluster_site,
    end_everyone,
    node_table,
    place_for,
    running,
    wait_for,
)
from tests.services.effects import Crash, message_ids, run_until, settle, verified, wish, with_ports
from tests.sites import FakeClock, SiteForTests
from tests.ssh_nodes import SshServer, machine, make_key


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory in memory where there is one: hundreds of deliveries wait for the disk thousands of times."""
    memory = Path("/dev/shm")
    where = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where, prefix="stagecal-", ignore_cleanup_errors=True) as directory:
        yield Path(directory)


@pytest.fixture
def cleanup() -> Iterator[ExitStack]:
    """What is to be done at the end, the last first."""
    with ExitStack() as stack:
        yield stack


# --- the census can fail -------------------------------------------------------------------------------------------


def pretended_job(server: SshServer, nonce: str, stack: ExitStack) -> None:
    """A process that looks like one of a job on this node."""
    process = subprocess.Popen(
        ["sleep", "60"], env={"PATH": os.environ["PATH"], "HOME": f"{server.directory}/home", "STAGECAL_NONCE": nonce}
    )
    stack.callback(process.wait)
    stack.callback(process.kill)


def test_the_census_finds_a_job_too_many_and_counts_no_job_twice(tmp_path: Path, cleanup: ExitStack) -> None:
    one, two, foreign = (SshServer(tmp_path / name, name) for name in ("one", "two", "foreign"))
    census = Census([one, two], max_jobs=2, limits={"one": 1})
    pretended_job(one, "a", cleanup)
    pretended_job(one, "a", cleanup)
    pretended_job(two, "b", cleanup)
    pretended_job(foreign, "c", cleanup)
    # A new process has the environment of the one that made it until its program is loaded.
    wait_for(lambda: len(census.alive()) == 2, "the start of the processes")
    census.look()
    assert census.violations == [] and census.most == 2
    assert census.first_seen == {"a": "one", "b": "two"}
    with ExitStack() as third:
        pretended_job(one, "d", third)
        wait_for(lambda: len(census.alive()) == 3, "the start of the third")
        census.look()
        assert len(census.violations) == 1 and census.violations[0].startswith("3 jobs alive, 2 are allowed")
    with ExitStack() as second:
        lenient = Census([one, two], max_jobs=3, limits={"one": 1})
        pretended_job(one, "d", second)
        wait_for(lambda: len(lenient.alive()) == 3, "the start of the second on its node")
        lenient.look()
        assert lenient.violations == ["2 jobs on one"]


# --- many requests, many nodes -------------------------------------------------------------------------------------

NODES = 30
MAX_JOBS = 6
HOG, HOG_REQUESTS = "hog", 25
OTHERS = [f"user{number}" for number in range(7)]
EACH = 5
REQUESTS = 200
LATE = ("late", "later", "latest")
BUSY = 5.0


@dataclass(frozen=True)
class Claim:
    """A slot that a request got: who got it, on which node; the nodes were not looked at for it before this time."""

    request: Request
    node: str
    at: datetime


def claims(site: SiteForTests) -> list[Claim]:
    """Return all claims in the order in which it was their turn."""
    found = [
        Claim(request, record.step.decided.partition(",")[0], record.time)
        for request in site.requests()
        for record in site.site.ledger.steps(request.id)
        if "low load" in record.step.asked and "WORK" in record.step.decided
    ]
    return sorted(found, key=lambda claim: claim.at)


def states(site: SiteForTests) -> Counter[State]:
    return Counter(request.state for request in site.requests())


@pytest.mark.requires_root("each node has a load of its own, in a mount namespace")
def test_two_hundred_requests_on_thirty_nodes_are_served_in_turn_and_no_node_gets_too_much(
    place: Path, cleanup: ExitStack
) -> None:
    """Five nodes have little load at first, and each of them room for one or two jobs; then it is the other way round.

    One user asks for 25 MOUSs, seven ask for five each, and then three for those that were asked for already.
    """
    servers = [
        LoadedServer(place / f"n{number:02}", f"n{number:02}", f"127.0.2.{number + 1}") for number in range(NODES)
    ]
    limits = {server.name: 1 + number % 2 for number, server in enumerate(servers)}
    first, later = servers[:5], servers[5:]
    for server in later:
        server.give_load(BUSY)
    cleanup.callback(end_everyone, servers)
    cleanup.enter_context(running(servers))
    tables = [node_table(server, max_jobs=limits[server.name]) for server in servers]
    site = cluster_site(place, servers, tables, f"max_jobs = {MAX_JOBS}", "max_load_per_core = 0.9")
    site.behave(sleep="3", use="J0510+1800")
    asked = [HOG] * HOG_REQUESTS + [user for user in OTHERS for _ in range(EACH)]
    units = add_observations(site.directory / "archive.db", len(asked))
    for mous, user in zip(units, asked, strict=True):
        place_for(site, mous, user)
    for user, mous in list(product(LATE, units))[: REQUESTS - len(units)]:
        place_for(site, mous, user)
    ledger = site.site.ledger
    ledger.set_setting("held", "so that all wait when the first one starts")
    census = cleanup.enter_context(Census(servers, MAX_JOBS, limits))
    daemon = cleanup.enter_context(Daemon(site))
    wait_for(lambda: states(site) == {State.ACCEPTED: REQUESTS}, "the judgement of all")
    ledger.set_setting("held", "")
    # The first jobs last until all slots are taken.
    wait_for(lambda: census.most == MAX_JOBS, "all slots to be taken")
    site.behave(sleep="0.2")
    wait_for(lambda: states(site)[State.CLOSED] >= 80, "the first half", seconds=60)
    with_first_load = set(census.first_seen.values())
    for server in later:
        server.give_load(0.1)
    for server in first:
        server.give_load(BUSY)
    turned = datetime.now(UTC)
    wait_for(lambda: states(site)[State.CLOSED] == REQUESTS, "the last request's end", seconds=90)
    assert daemon.end() == 0

    assert census.violations == []
    assert census.looks > 100, "the nodes were looked at all the time"
    assert {request.outcome for request in site.requests()} == {Outcome.DELIVERED}
    assert site.calibrations() == len(units) == len(census.first_seen), "one job for each MOUS"
    assert len(message_ids(site)) == REQUESTS and set(message_ids(site).values()) == {1}

    begun = claims(site)
    assert len(begun) == len(units)
    after = Counter(claim.node for claim in begun if claim.at >= turned)
    assert with_first_load <= {server.name for server in first}, "no job on a node with too much load"
    assert set(after) <= {server.name for server in later}, "no job on a node that has got too much load"
    assert sum(after.values()) > 10
    assert census.most_on["n00"] == 1 and census.most_on["n01"] == 2, "the limits were reached"

    for user in {HOG, *OTHERS}:
        order = [claim.request.sequence for claim in begun if claim.request.user == user]
        # As many as there are slots may have their turn at the same moment.
        places = {sequence: index for index, sequence in enumerate(sorted(order))}
        assert all(abs(places[sequence] - index) < MAX_JOBS for index, sequence in enumerate(order)), (user, order)
    last_of_others = max(index for index, claim in enumerate(begun) if claim.request.user != HOG)
    fair_share = len([claim for claim in begun[:last_of_others] if claim.request.user == HOG])
    # He may have all slots before the others have come, and as many turns at the same moment as there are slots.
    assert fair_share <= EACH + 2 * MAX_JOBS, "who asks for 25 keeps nobody with five waiting"

    nodes = wiring.ssh_nodes(site.config)
    try:
        rounds = [seconds_of_a_round(nodes) for _ in range(16)][1:]
    finally:
        nodes.close()
    # Some 20 ms on a machine with nothing else to do; the aim is 100.
    assert statistics.median(rounds) < 0.3, rounds


def seconds_of_a_round(nodes: SshNodes) -> float:
    begin = time.monotonic()
    assert all(look.load_per_core is not None for look in nodes.loads())
    return time.monotonic() - begin


@pytest.mark.requires_root("the node has a load of its own, in a mount namespace")
def test_a_node_that_gets_fit_again_goes_to_who_waited_first(tmp_path: Path, cleanup: ExitStack) -> None:
    node = LoadedServer(tmp_path / "node", "node", "127.0.3.1")
    node.give_load(BUSY)
    cleanup.callback(end_everyone, [node])
    cleanup.enter_context(running([node]))
    site = cluster_site(tmp_path, [node], [node_table(node)], "max_load_per_core = 0.9", "max_jobs = 1")
    site.behave(use="J0510+1800")
    units = add_observations(site.directory / "archive.db", 4)
    rounds = site.rounds()
    for mous in units[:3]:
        place_for(site, mous, "user")
        rounds.run()
        rounds.run()
        site.clock.advance(seconds=9)
    assert all(request.reason.startswith("no node is fit") for request in site.requests())
    node.give_load(0.0)
    place_for(site, units[3], "user")
    settle(site)
    assert {request.outcome for request in site.requests()} == {Outcome.DELIVERED}
    assert [claim.request.mous for claim in claims(site)] == units, "in the order in which they came"
    closed(site)


# --- dying at each step of the dispatch ----------------------------------------------------------------------------


@dataclass
class Deadly:
    """Nodes with which the process dies before or after the first call of one verb."""

    nodes: Nodes
    verb: str
    before: bool
    calls: int = 0

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.nodes, name)
        if name != self.verb:
            return function

        def call(*arguments: Any, **keywords: Any) -> Any:
            self.calls += 1
            if self.before:
                raise Crash(f"before {name}")
            function(*arguments, **keywords)
            raise Crash(f"after {name}")

        return call


def played(site: SiteForTests, verb: str, before: bool, act: Callable[[SiteForTests], None]) -> SiteForTests:
    """Do what a test does, die once at this verb on the way, and do it again with the site as it is on disk then."""
    deadly = Deadly(site.site.nodes, verb, before)
    with suppress(Crash):
        act(with_ports(site, nodes=deadly))
    assert deadly.calls == 1, f"{verb} was not called"
    closed(site)
    again = site.restart()
    act(again)
    return again


def closed(site: SiteForTests) -> None:
    """Let go of what the process held that died."""
    nodes: Any = site.site.nodes
    nodes.close()
    site.site.ledger.close()


@pytest.fixture
def two_nodes(tmp_path: Path, cleanup: ExitStack) -> list[SshServer]:
    """Two nodes that run."""
    servers = [SshServer(tmp_path / name, name, f"127.0.3.{number}") for number, name in enumerate(("one", "two"), 1)]
    cleanup.callback(end_everyone, servers)
    cleanup.enter_context(running(servers))
    return servers


def site_on(directory: Path, servers: Sequence[SshServer], *lines: str) -> SiteForTests:
    """A site on these nodes with a few MOUSs, of which each calibration takes a moment."""
    site = cluster_site(directory, servers, [node_table(server) for server in servers], *lines)
    site.behave(sleep="0.3", use="J0510+1800")
    return site


MOMENTS = [True, False]
DELIVERY = ["loads", "prepare", "launch", "poll", "renew_lease", "fetch", "clean"]


def test_dying_at_any_call_to_a_node_leads_to_one_job_and_one_mail(
    tmp_path: Path, two_nodes: list[SshServer], cleanup: ExitStack
) -> None:
    site = site_on(tmp_path, two_nodes)
    site.behave(sleep="0.1")
    units = add_observations(site.directory / "archive.db", len(MOMENTS) * len(DELIVERY))
    census = cleanup.enter_context(Census(two_nodes, max_jobs=1))
    for number, (verb, before) in enumerate(product(DELIVERY, MOMENTS), 1):
        name = place_for(site, units[number - 1], "user")
        site = played(site, verb, before, settle)
        where = f"{'before' if before else 'after'} {verb}"
        (request,) = [one for one in site.requests() if one.trigger_name == name]
        assert (request.state, request.outcome) == (State.CLOSED, Outcome.DELIVERED), where
        assert site.calibrations() == number, f"one job, {where}"
        assert site.job_directories() == [] and census.alive() == {}, where
    assert census.violations == []
    assert len(site.published()) == len(units) == len(message_ids(site))
    assert set(message_ids(site).values()) == {1}
    closed(site)


@pytest.mark.parametrize("verb", ["cancel", "poll", "clean"])
@pytest.mark.parametrize("before", MOMENTS, ids=["before", "after"])
def test_dying_while_a_job_is_withdrawn_leaves_no_job_alive(
    tmp_path: Path, two_nodes: list[SshServer], verb: str, before: bool
) -> None:
    site = site_on(tmp_path, two_nodes)
    site.behave(sleep="60")
    site.place()
    run_until(site, State.STAGING)
    wish(site, "withdraw")
    site = played(site, verb, before, settle)
    assert site.only().outcome is Outcome.WITHDRAWN and not site.only().holds_slot
    assert Census(two_nodes, max_jobs=1).alive() == {} and site.job_directories() == []
    assert site.calibrations() == 0 and site.mails() == []
    closed(site)


# --- nodes that are away -------------------------------------------------------------------------------------------


def impatient(site: SiteForTests, servers: Sequence[SshServer]) -> SiteForTests:
    """The same site; jobs look at their lease five times a second, and a silent node is asked again at once."""
    closed_later: Any = site.site.nodes
    closed_later.close()
    nodes = SshNodes(
        site.config.cluster.work_area,
        {server.name: machine("paramiko", server) for server in servers},
        (CHECKOUT / "templates" / "job" / "wrapper.sh").read_bytes(),
        (CHECKOUT / "templates" / "job" / "node.sh").read_text(),
        timeout_s=0.7,
        look_interval_s=0.2,
        grace_s=1,
        rest_s=0.1,
    )
    return with_ports(site, nodes=nodes)


def rounds_until(site: SiteForTests, holds: Callable[[], object], what: str, **step: float) -> None:
    """Do rounds until something holds; between two rounds the clock moves on by a step (a second)."""
    rounds = site.rounds()

    def go_on() -> object:
        rounds.run()
        site.clock.advance(**(step or {"seconds": 1}))
        return holds()

    wait_for(go_on, what)


def request_on(site: SiteForTests, node: str) -> Request:
    (request,) = [one for one in site.requests() if one.node == node and one.state is not State.CLOSED]
    return request


def test_a_node_that_freezes_keeps_its_job_while_the_other_goes_on(
    tmp_path: Path, two_nodes: list[SshServer], cleanup: ExitStack
) -> None:
    site = impatient(site_on(tmp_path, two_nodes), two_nodes)
    site.behave(sleep="2")
    units = add_observations(site.directory / "archive.db", 3)
    for mous in units:
        place_for(site, mous, "user")
    census = cleanup.enter_context(Census(two_nodes, max_jobs=2))
    rounds_until(site, lambda: states(site)[State.STAGING] == 2, "two jobs")
    frozen = two_nodes[0]
    waiting = request_on(site, "one").id
    frozen.freeze()
    cleanup.callback(frozen.thaw)
    rounds_until(site, lambda: states(site)[State.CLOSED] == 2, "the delivery of what the other node makes")
    request = site.site.ledger.get(waiting)
    assert request.state is State.STAGING and request.holds_slot, "nobody knows whether its job lives"
    assert "one" in request.reason
    assert {one.node for one in site.requests() if one.id != waiting} == {"two"}
    frozen.thaw()
    rounds_until(site, lambda: states(site)[State.CLOSED] == 3, "the delivery of what had to wait")
    assert {one.outcome for one in site.requests()} == {Outcome.DELIVERED}
    assert site.calibrations() == 3 and census.violations == []
    assert len(message_ids(site)) == 3 and set(message_ids(site).values()) == {1}


def test_a_job_on_a_silent_node_ends_itself_with_its_lease_and_is_made_on_another_node(
    tmp_path: Path, two_nodes: list[SshServer], cleanup: ExitStack
) -> None:
    site = impatient(site_on(tmp_path, two_nodes, "lease_h = 0.0014"), two_nodes)
    site.clock.time = datetime.now(UTC)
    site.behave(sleep="60")
    site.place()
    census = cleanup.enter_context(Census(two_nodes, max_jobs=1))
    rounds_until(site, lambda: states(site)[State.STAGING], "the job", seconds=0)
    silent = next(server for server in two_nodes if server.name == site.only().node)
    silent.freeze()
    cleanup.callback(silent.thaw)
    assert census.alive()
    wait_for(lambda: not census.alive(), "the job's end by itself", seconds=20)
    site.behave(sleep="0.1")
    for _ in range(3):
        site.rounds().run()
        site.clock.advance(seconds=1)
    assert site.only().holds_slot and site.only().node == silent.name, "the lease is over, but not its grace"
    site.clock.advance(hours=1)
    # From here on leases have to last: the clock is ahead of the nodes'.
    rounds_until(site, lambda: states(site)[State.CLOSED], "the delivery by the other node")
    assert site.only().outcome is Outcome.DELIVERED and site.only().lost_on == (silent.name,)
    assert site.calibrations() == 1 and census.violations == [] and len(site.mails()) == 1


# --- real deaths ---------------------------------------------------------------------------------------------------

DEATHS = 6


def awake(site: SiteForTests) -> None:
    """Let everything that rests go on at once, as if its time had come."""
    with sqlite3.connect(site.config.state.directory / "stagecal.db", timeout=20) as database:
        database.execute("UPDATE requests SET not_before = NULL WHERE state <> 'CLOSED'")
        database.execute("UPDATE recipients SET not_before = NULL WHERE state = 'pending'")
    database.close()


def passed(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Let a process work for so long."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


@pytest.mark.parametrize("seed", [2])
def test_daemons_and_servers_that_die_at_any_moment_never_start_a_third_job(
    tmp_path: Path, two_nodes: list[SshServer], cleanup: ExitStack, seed: int
) -> None:
    """A daemon is killed again and again; the server of a node too, which refuses connections for a while then."""
    chance = random.Random(seed)
    site = site_on(tmp_path, two_nodes, "timeout_s = 2")
    site.behave(sleep="1")
    units = add_observations(site.directory / "archive.db", 6)
    for mous in units:
        place_for(site, mous, "user")
    census = cleanup.enter_context(Census(two_nodes, max_jobs=2))
    daemon = Daemon(site)
    cleanup.callback(daemon.kill)
    for number in range(DEATHS):
        process = daemon.start()
        passed(process, chance.uniform(0.6, 1.4))
        victim = chance.choice(two_nodes)
        victim.stop()
        passed(process, chance.uniform(0.1, 0.5))
        if number % 2:
            victim.start()
            passed(process, chance.uniform(0.1, 0.5))
        daemon.kill()
        if not number % 2:
            victim.start()
        awake(site)
    begun = daemon.log.read_text().count("watching")
    daemon.start()
    wait_for(lambda: daemon.log.read_text().count("watching") > begun, "the last daemon")
    second = Daemon(site)
    cleanup.callback(second.kill)
    assert second.start().wait(20) == 75, "two daemons on one state"

    def all_done() -> bool:
        awake(site)
        return states(site)[State.CLOSED] == len(units)

    wait_for(all_done, "the end of all", seconds=40, every_s=0.3)
    assert daemon.end() == 0
    assert census.violations == [] and census.most == 2
    assert {one.outcome for one in site.requests()} == {Outcome.DELIVERED}
    assert site.calibrations() == len(units) == len(census.first_seen), "each job was started exactly once"
    assert census.alive() == {}
    # A node that is away when its job is cleaned up keeps no mail back.
    said = [record.step for one in site.requests() for record in site.site.ledger.steps(one.id)]
    left = {step.asked.split()[0] for step in said if step.step == "clean" and "left behind" in step.seen}
    assert {path.name for path in site.job_directories()} <= left
    found = message_ids(site)
    assert len(found) == len(units)
    # Only who dies between the mail server's answer and its record cannot know, and sends the same mail again.
    assert sum(found.values()) <= len(units) + DEATHS


# --- another host key ----------------------------------------------------------------------------------------------


def changed_key(server: SshServer) -> None:
    """Start a server with another host key than the pinned one."""
    server.stop()
    (server.directory / "host_key").unlink()
    make_key(server.directory / "host_key", "ed25519")
    server.start()


def alarms(site: SiteForTests, what: str) -> list[str]:
    """Return the texts of the alarms of a kind, each once, however many people get it."""
    mails = [message_from_string(text) for text in site.mails()]
    found = {mail["Message-ID"]: str(mail.get_payload()) for mail in mails if mail["Subject"] == f"stagecal: {what}"}
    return list(found.values())


def test_another_host_key_is_an_alarm_once_a_day_and_keeps_the_node_from_jobs(
    tmp_path: Path, two_nodes: list[SshServer]
) -> None:
    site = site_on(tmp_path, two_nodes)
    site.behave(sleep="0.05")
    units = add_observations(site.directory / "archive.db", 3)
    changed_key(two_nodes[0])
    for mous in units[:2]:
        place_for(site, mous, "user")
    settle(site)
    assert [one.outcome for one in site.requests()] == [Outcome.DELIVERED] * 2
    assert len(Path(two_nodes[0].directory, "log").read_text().split("Accepted publickey")) == 1, "nothing was sent"
    (alarm,) = alarms(site, "a node shows another host key")
    assert "one: ALARM" in alarm and "two" not in alarm.partition("another host key")[0]
    site.clock.advance(days=1)
    place_for(site, units[2], "user")
    settle(site)
    assert len(alarms(site, "a node shows another host key")) == 2, "and once more on the next day"
    closed(site)


def test_another_host_key_of_a_node_with_a_job_is_told_and_the_job_waits(
    tmp_path: Path, two_nodes: list[SshServer], cleanup: ExitStack
) -> None:
    site = site_on(tmp_path, two_nodes)
    site.behave(sleep="0.5")
    site.place()
    census = cleanup.enter_context(Census(two_nodes, max_jobs=1))
    run_until(site, State.STAGING)
    node = next(server for server in two_nodes if server.name == site.only().node)
    changed_key(node)
    rounds_until(site, lambda: site.only().reason, "the trouble")
    rounds_until(site, lambda: alarms(site, "a job cannot be looked at"), "the alarm")
    assert site.only().state is State.STAGING and site.only().holds_slot
    node.pin()
    (tmp_path / "known_hosts").write_text("".join(server.known_hosts.read_text() for server in two_nodes))
    settle(site)
    assert site.only().outcome is Outcome.DELIVERED
    assert site.calibrations() == 1 and census.violations == []
    closed(site)


# --- without a shared work area ------------------------------------------------------------------------------------


class Link(threading.Thread):
    """A slow line to a node: what comes from there comes at so many bytes a second."""

    def __init__(self, server: SshServer, bytes_s: float) -> None:
        super().__init__(daemon=True)
        self._behind = (server.host, server.port)
        self._bytes_s = bytes_s
        self._listener = socket.create_server((server.host, 0))
        self.port: int = self._listener.getsockname()[1]
        self.start()

    def run(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._behind)
                threading.Thread(target=self._pump, args=(near, far, math.inf), daemon=True).start()
                threading.Thread(target=self._pump, args=(far, near, self._bytes_s), daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _pump(self, source: socket.socket, sink: socket.socket, bytes_s: float) -> None:
        with suppress(OSError):
            while piece := source.recv(16384):
                sink.sendall(piece)
                # The pause is the line: nobody waits for it.
                time.sleep(len(piece) / bytes_s)
        for line in (source, sink):
            with suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)


class SwiftClock(FakeClock):
    """A clock of which half a minute passes between two looks, so that everything is told that is due now and then."""

    def now(self) -> datetime:
        self.time += timedelta(seconds=30)
        return self.time


@pytest.mark.requires_root("the node has a work area of its own, in a mount namespace")
@pytest.mark.requires_program("rsync")
@pytest.mark.parametrize("way", ["rsync", "tar"])
def test_products_of_a_node_that_shares_nothing_are_brought_here_and_status_tells_how_far(
    tmp_path: Path, cleanup: ExitStack, way: str
) -> None:
    for name in ("of-the-node", "of-nobody"):
        (tmp_path / name).mkdir()
    area, here = tmp_path / "of-nobody", tmp_path / "fetched"
    here.mkdir()
    server = LoadedServer(tmp_path / "far", "far", "127.0.3.3", mounts={area: tmp_path / "of-the-node"})
    if way == "tar":
        server.environment = f"PATH={programs_but(tmp_path / 'programs', 'rsync')}"
    cleanup.callback(end_everyone, [server])
    cleanup.enter_context(running([server]))
    link = Link(server, bytes_s=1.5e6)
    cleanup.callback(link.close)
    server.port = link.port
    server.pin()
    lines = ("shared_work_area = false", f'fetch_area = "{here}"', f'work_area = "{area}"')
    site = cluster_site(tmp_path, [server], [node_table(server)], *lines)
    site.behave(use="full")
    swift = SwiftClock(datetime.now(UTC))
    site = SiteForTests(site.directory, site.config, swift, replace(site.site, clock=swift))
    site.place()
    told = threading.Thread(target=settle, args=(site,), daemon=True)
    told.start()
    words = (sys.executable, "-c", "from stagecal.cli.main import main; main()", "status", site_request(site))
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "STAGECAL_CONFIG": str(site.config.path)}

    def status() -> str:
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout

    wait_for(lambda: re.search(r"[0-9.]+ \w+ of [0-9.]+ \w+ received from far", status()), "progress in status")
    told.join(60)
    assert site.only().outcome is Outcome.DELIVERED, site.only()
    (published,) = site.published()
    assert any(name.endswith(".tar") for name in verified(published))
    assert any("received from far" in line for _, line in site.site.ledger.terminal(site.only().id))
    assert list(area.iterdir()) == list(here.iterdir()) == list((tmp_path / "of-the-node").iterdir()) == []
    assert site.calibrations() == 1 and len(site.mails()) == 1


def site_request(site: SiteForTests) -> str:
    """Return the id of the only request as soon as there is one."""
    wait_for(site.requests, "the receipt of the request")
    return site.only().id


def programs_but(directory: Path, *names: str) -> Path:
    """Make a directory with the programs of this machine, without these."""
    directory.mkdir()
    for place in ("/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin"):
        for program in sorted(Path(place).iterdir()) if Path(place).is_dir() else ():
            if program.name not in names and not (directory / program.name).is_symlink():
                (directory / program.name).symlink_to(program)
    return directory
