"""Sites whose nodes are real SSH servers, and a count of their jobs that believes only the processes on the nodes.

Every node has a load of its own where the tests run as root: its sshd lives in a mount namespace in which
/proc/loadavg is a file of ours. A job's processes carry its nonce, and as HOME the directory of the node that they
are on; this is what `Census` counts.
"""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.services.effects import existing
from tests.sites import RELEASED, RELEASED_PROJECT, SiteForTests, make_test_site
from tests.ssh_nodes import SshServer, signal_all, sshd_program

CHECKOUT = Path(__file__).resolve().parents[1]

_OWN_FILES = """#!/bin/sh
exec unshare --mount sh -c '{mounts} && exec "$@"' sh {sshd} "$@"
"""


@dataclass
class LoadedServer(SshServer):
    """An sshd whose node has the load that a test gives it, and at some places directories of its own. Needs root.

    `mounts` are these places and the directories that the node finds there.
    """

    mounts: Mapping[Path, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._load = self.directory / "loadavg"
        self._load.touch()
        self.give_load(0.0)
        files = {Path("/proc/loadavg"): self._load, **self.mounts}
        mounts = " && ".join(f"mount --bind {source} {place}" for place, source in files.items())
        program = self.directory / "start"
        program.write_text(_OWN_FILES.format(mounts=mounts, sshd=sshd_program()))
        program.chmod(0o755)
        self._program = str(program)

    def give_load(self, per_core: float) -> None:
        """Let the node show this load per core from now on; whoever reads never finds half a line."""
        cores = Path("/proc/cpuinfo").read_text().count("\nprocessor") + 1
        with self._load.open("r+b") as file:
            file.write(b"%10.2f 0.00 0.00 1/100 1000\n" % (per_core * cores))


@contextmanager
def running(servers: Sequence[SshServer]) -> Iterator[None]:
    """Start all servers, and end them at the end."""
    try:
        with ThreadPoolExecutor(4) as executor:
            list(executor.map(lambda server: server.start(), servers))
        yield
    finally:
        for server in servers:
            server.stop()


def node_table(server: SshServer, labels: Sequence[str] = (), transport: str = "paramiko", **values: int) -> str:
    """Return the `[[cluster.nodes]]` of a server."""
    lines = [f'name = "{server.name}"', f'host = "{server.host}"', f"port = {server.port}", f"labels = {[*labels]}"]
    lines += [f'transport = "{transport}"', *(f"{name} = {value}" for name, value in values.items())]
    return "\n".join(["[[cluster.nodes]]", *lines, ""])


def cluster_site(directory: Path, servers: Sequence[SshServer], tables: Iterable[str], *lines: str) -> SiteForTests:
    """Return a site with these nodes; `lines` are added to its `[cluster]` section.

    All servers have to take the same key. The site is what a daemon that starts would find.
    """
    made = make_test_site(directory)
    made.site.ledger.close()
    known_hosts = directory / "known_hosts"
    known_hosts.write_text("".join(server.known_hosts.read_text() for server in servers))
    settings = {
        "runner": '"ssh"',
        "work_area": '"work"',
        "max_load_per_core": "1000",
        "poll_interval_s": "0.1",
        "ssh_key": f'"{servers[0].key}"',
        "known_hosts": f'"{known_hosts}"',
    }
    settings |= {name: value for name, _, value in (line.partition(" = ") for line in lines)}
    section = "\n".join(["[cluster]", *(f"{name} = {value}" for name, value in settings.items()), "", *tables, ""])
    text = made.config.path.read_text(encoding="utf-8")
    text, replaced = re.subn(r"(?ms)^\[cluster\]\n.*?(?=^\[)", lambda _: section, text)
    assert replaced == 1
    made.config.path.write_text(text, encoding="utf-8")
    return existing(made.directory)


def add_observations(archive: Path, number: int) -> list[str]:
    """Put so many more delivered, public MOUSs with one EB each into an embedded archive; return their UIDs."""
    copied = {
        "OBS_UNIT_SET_STATUS": "STATUS_ENTITY_ID",
        "BMMV_SCHEDBLOCK": "MOUS_STATUS_UID",
        "ASA_PRODUCT_FILES": "ASA_OUS_ID",
    }
    block, sched_block = "uid://A002/Xcd8029/X5e1a", "uid://A001/X1296/X66b"
    copied |= {"AQUA_EXECBLOCK": "EXECBLOCKUID", "SHIFTLOG_ENTRIES": "SE_EB_UID", "ASA_DELIVERY_ASDM_OUS": "ASDM_UID"}
    made = []
    database = sqlite3.connect(archive)
    with database:
        for index in range(number):
            mous = f"uid://A001/X7001/X{index:x}"
            changes = {
                RELEASED: mous,
                block: f"uid://A002/X7002/X{index:x}",
                sched_block: f"uid://A001/X7003/X{index:x}",
            }
            for table, column in copied.items():
                key = RELEASED if RELEASED in _values(database, table, column) else block
                for row in database.execute(f"SELECT * FROM {table} WHERE {column} = ?", [key]).fetchall():
                    values = [changes.get(value, value) for value in row]
                    database.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(values))})", values)
            made.append(mous)
    database.close()
    return made


def _values(database: sqlite3.Connection, table: str, column: str) -> set[str]:
    return {row[0] for row in database.execute(f"SELECT DISTINCT {column} FROM {table}")}


def place_for(site: SiteForTests, mous: str, user: str) -> str:
    """Place a trigger for a MOUS of `add_observations`; each comes a second after the one before."""
    site.clock.advance(seconds=1)
    return site.place(mous, RELEASED_PROJECT, email=f"{user}@example.org", user=user, ticket="1")


# --- who is alive ----------------------------------------------------------------------------------------------------


def living_jobs(homes: Mapping[str, str]) -> dict[str, str]:
    """Return nonce -> node of all jobs that have a living process on one of these nodes (HOME -> name)."""
    return {nonce: node for _, nonce, node in _carriers(homes)}


def _carriers(homes: Mapping[str, str]) -> Iterator[tuple[int, str, str]]:
    """Give number, nonce and node of each process that belongs to a job on these nodes."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            environment = Path("/proc", pid, "environ").read_bytes()
        except OSError:
            continue
        if b"STAGECAL_NONCE=" in environment:
            values = dict(entry.partition("=")[::2] for entry in environment.decode(errors="replace").split("\0"))
            node = homes.get(values.get("HOME", ""))
            if node is not None:
                yield int(pid), values["STAGECAL_NONCE"], node


@dataclass
class Census:
    """Counts, all the time, how many jobs are alive in all and on each node, and remembers when there were too many.

    Processes come and go while one looks. Therefore too many counts only if these very jobs are found alive again by a
    second look, which began after the first had ended: in between all of them were alive at once.
    """

    servers: Sequence[SshServer]
    max_jobs: int
    limits: Mapping[str, int] = field(default_factory=dict)
    interval_s: float = 0.05
    violations: list[str] = field(default_factory=list)
    first_seen: dict[str, str] = field(default_factory=dict)
    most: int = 0
    most_on: Counter[str] = field(default_factory=Counter)
    looks: int = 0

    def __post_init__(self) -> None:
        self._homes = {str(server.directory / "home"): server.name for server in self.servers}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="census", daemon=True)

    def __enter__(self) -> Census:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def alive(self) -> dict[str, str]:
        """Return nonce -> node of the jobs that are alive now."""
        return living_jobs(self._homes)

    def look(self) -> None:
        """Count once."""
        jobs = self.alive()
        if self._too_many(jobs):
            again = self.alive()
            jobs = {nonce: node for nonce, node in jobs.items() if nonce in again}
            if too_many := self._too_many(jobs):
                self.violations.append(too_many)
        self.looks += 1
        for nonce, node in jobs.items():
            self.first_seen.setdefault(nonce, node)
        self.most = max(self.most, len(jobs))
        for node, count in Counter(jobs.values()).items():
            self.most_on[node] = max(self.most_on[node], count)

    def _too_many(self, jobs: Mapping[str, str]) -> str:
        counts = Counter(jobs.values())
        if len(jobs) > self.max_jobs:
            return f"{len(jobs)} jobs alive, {self.max_jobs} are allowed: {dict(counts)}"
        over = [f"{count} jobs on {node}" for node, count in counts.items() if count > self.limits.get(node, count)]
        return ", ".join(over)

    def _run(self) -> None:
        while not self._ended.wait(self.interval_s):
            self.look()


def wait_for(holds: Callable[[], object], what: str, seconds: float = 30, every_s: float = 0.02) -> None:
    """Wait for real processes to get there, for a bounded time."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"{what} did not happen within {seconds} s"
        time.sleep(every_s)


@dataclass
class Daemon:
    """`stagecal watch` as real processes, one after the other; what they log goes to a file beside the site."""

    site: SiteForTests
    starts: int = 0
    _process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        return self.site.directory / "watch.log"

    def start(self) -> subprocess.Popen[bytes]:
        """Start one; what was started before may still run."""
        self.starts += 1
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", "from stagecal.cli.main import main; main()", "watch"],
                env={**os.environ, "PYTHONPATH": str(CHECKOUT), "STAGECAL_CONFIG": str(self.site.config.path)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        return self._process

    def kill(self) -> None:
        """Kill the one that was started last, as a crash of the machine would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def end(self) -> int:
        """Let it end in order; return its exit code."""
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(30)

    def __enter__(self) -> Daemon:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def end_everyone(servers: Sequence[SshServer]) -> None:
    """Kill every process of a job on these nodes, so that a failed test leaves nothing behind."""
    homes = {str(server.directory / "home"): server.name for server in servers}
    end = time.monotonic() + 10
    while (pids := [pid for pid, _, _ in _carriers(homes)]) and time.monotonic() < end:
        signal_all(pids, signal.SIGKILL)
