"""How long the service takes for many requests on many nodes, with a real daemon and real sshd processes.

    python benchmarks/cluster_scale.py [--requests 200] [--nodes 30] [--max-jobs 8] [--seconds 0.2]

Each request is for a MOUS of its own, and each job takes so many seconds. Everything runs on this machine, so the
numbers tell what the service costs, not what nodes can do. Tells too the most jobs that were alive at once, counted by
their processes, and how long one look at all nodes takes over kept connections (the aim: at most 100 ms for 30).
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))

from stagecal import wiring  # noqa: E402 - the checkout need not be installed
from stagecal.domain.requests import Outcome, State  # noqa: E402
from tests.clusters import (  # noqa: E402
    Census,
    Daemon,
    add_observations,
    cluster_site,
    end_everyone,
    node_table,
    place_for,
    running,
    wait_for,
)
from tests.ssh_nodes import SshServer  # noqa: E402

USERS = 8
PATIENCE_S = 3600


def main() -> None:
    """Deliver everything once, and print seconds."""
    parser = argparse.ArgumentParser(description="How long the service takes for many requests on many nodes.")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--nodes", type=int, default=30)
    parser.add_argument("--max-jobs", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=0.2)
    arguments = parser.parse_args()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None, prefix="stagecal-") as temporary:
        place = Path(temporary)
        names = [f"node{number:02}" for number in range(1, arguments.nodes + 1)]
        servers = [SshServer(place / name, name, f"127.0.5.{number}") for number, name in enumerate(names, 1)]
        with running(servers):
            try:
                measure(place, servers, arguments)
            finally:
                end_everyone(servers)


def measure(place: Path, servers: list[SshServer], arguments: argparse.Namespace) -> None:
    """Place the requests, let a daemon deliver them, and print what it took."""
    tables = [node_table(server, max_jobs=2) for server in servers]
    site = cluster_site(place, servers, tables, f"max_jobs = {arguments.max_jobs}")
    site.behave(sleep=str(arguments.seconds), use="J0510+1800")
    for number, mous in enumerate(add_observations(site.directory / "archive.db", arguments.requests)):
        place_for(site, mous, f"user{number % USERS}")

    def reached(state: State) -> bool:
        return Counter(request.state for request in site.requests())[state] == arguments.requests

    site.site.ledger.set_setting("held", "until all are judged")
    with Census(servers, arguments.max_jobs) as census, Daemon(site) as daemon:
        begin = time.monotonic()
        wait_for(lambda: reached(State.ACCEPTED), "the judgement", PATIENCE_S, every_s=0.1)
        judged = time.monotonic()
        site.site.ledger.set_setting("held", "")
        wait_for(lambda: reached(State.CLOSED), "the last delivery", PATIENCE_S, every_s=0.5)
        delivered = time.monotonic()
        daemon.end()
    if census.violations or {request.outcome for request in site.requests()} != {Outcome.DELIVERED}:
        sys.exit(f"something went wrong: {census.violations or site.requests()}")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{arguments.requests} requests of {USERS} users, {len(servers)} nodes, {arguments.max_jobs} jobs at once")
    print(f"  all judged          {judged - begin:8.1f} s after the start of the daemon")
    print(
        f"  all delivered       {delivered - judged:8.1f} s later, {arguments.requests / (delivered - judged):.1f} /s"
    )
    print(f"  CPU of the daemon   {used.ru_utime + used.ru_stime:8.1f} s")
    print(f"  most jobs alive     {census.most:8}")
    nodes = wiring.ssh_nodes(site.config)
    rounds = []
    for _ in range(51):
        begin = time.perf_counter()
        looks = nodes.loads()
        rounds.append((time.perf_counter() - begin) * 1000)
        if any(look.load_per_core is None for look in looks):
            sys.exit(f"a node is silent: {looks}")
    nodes.close()
    print(f"  a look at all nodes {statistics.median(rounds[1:]):8.1f} ms (median of 50 over kept connections)")


if __name__ == "__main__":
    main()
