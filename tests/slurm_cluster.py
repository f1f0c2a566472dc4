"""A real Slurm of this machine for tests: munged, slurmctld and a slurmd for each of its nodes, on loopback.

The fixture `slurm_cluster` is one cluster for a whole test process. It needs no root; its daemons are children of the
process, are stopped by their numbers, and die with it. Where Slurm is not installed, what needs it is skipped.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from stagecal.adapters.remote_shell import Answer, LocalShell, Shell

# Debian keeps daemons out of the path of ordinary users.
PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "sacct", "scancel", "sinfo", "scontrol", "setpriv")
# Which features each node has. Many cores are pretended, so that no test waits for another one's jobs.
NODES: Mapping[str, tuple[str, ...]] = {
    "node1": ("rhel8", "casa", "fast"),
    "node2": ("rhel8", "casa"),
    "node3": ("rhel5",),
}
CORES = 32

_CONFIGURATION = """\
ClusterName=stagecal
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={top}/munge/socket
CredType=cred/munge
StateSaveLocation={top}/state
SlurmdSpoolDir={top}/spool.%n
SlurmctldPidFile={top}/slurmctld.pid
SlurmdPidFile={top}/slurmd.%n.pid
SlurmctldLogFile={top}/slurmctld.log
SlurmdLogFile={top}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
MinJobAge=60
KillWait=2
InactiveLimit=0
SlurmdTimeout=5
SlurmctldTimeout=15
MessageTimeout=3
JobCompType=jobcomp/filetxt
JobCompLoc={top}/completed.txt
AccountingStorageType=accounting_storage/none
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


class SlurmCluster:
    """A running cluster. Its programs find it by the environment variable SLURM_CONF."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.configuration = top / "slurm.conf"
        self.environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(self.configuration)}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start all daemons and wait until every node is idle."""
        (self.top / "munge").mkdir(mode=0o755)
        (self.top / "state").mkdir()
        key = self.top / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        host = socket.gethostname().partition(".")[0]
        controller_port, *ports = _free_ports(1 + len(NODES))
        lines = []
        for (name, features), port in zip(NODES.items(), ports, strict=True):
            (self.top / f"spool.{name}").mkdir()
            lines.append(
                f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CORES} RealMemory=1000 "
                f"Feature={','.join(features)} State=UNKNOWN"
            )
        # The account's name, or its number where it has none.
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=False).stdout.strip()
        self.configuration.write_text(
            _CONFIGURATION.format(
                top=self.top,
                host=host,
                user=user or os.geteuid(),
                controller_port=controller_port,
                nodes="\n".join(lines),
            )
        )
        self._start_munge()
        self.start_controller()
        for name in NODES:
            self.start_node(name)
        self.wait_until_idle()

    def _start_munge(self) -> None:
        munge = self.top / "munge"
        self._start(
            "munged",
            *("munged", "--foreground", "--force", f"--key-file={munge / 'key'}", f"--socket={munge / 'socket'}"),
            *(f"--pid-file={munge / 'pid'}", f"--log-file={munge / 'log'}", f"--seed-file={munge / 'seed'}"),
        )
        _wait_for((munge / "socket").exists, "munged")

    def start_controller(self) -> None:
        """Start slurmctld; it goes on with the jobs that it knew."""
        self._start("slurmctld", "slurmctld", "-D", "-f", str(self.configuration))

    def start_node(self, name: str) -> None:
        """Start the slurmd of a node."""
        self._start(name, "slurmd", "-D", "-N", name, "-f", str(self.configuration))

    def process(self, name: str) -> int:
        """Return the number of the process of a daemon, by the name of its node or `slurmctld`."""
        return self._daemons[name].pid

    def stop(self, name: str, number: signal.Signals = signal.SIGTERM) -> None:
        """End one daemon, by the name of its node or `slurmctld`, and wait for its end."""
        daemon = self._daemons.pop(name)
        daemon.send_signal(number)
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def shell(self, way: Shell | None = None) -> ClusterShell:
        """Return the shell of a submit host: this machine, or the one that `way` leads to."""
        return ClusterShell(self.configuration, way)

    def stop_all(self) -> None:
        """End the jobs that still live, and then all daemons."""
        if "slurmctld" in self._daemons:
            self.run("scancel", "--signal=KILL", "--full", f"--user={os.geteuid()}")
            self.run("scancel", f"--user={os.geteuid()}")
        for name in reversed(list(self._daemons)):
            self.stop(name)

    def run(self, *command: str) -> str:
        """Run one of Slurm's programs; return its output, whatever becomes of it."""
        done = subprocess.run(
            command, env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        return done.stdout

    def wait_until_idle(self) -> None:
        """Wait until every node takes jobs."""

        def is_idle() -> bool:
            states = self.run("sinfo", "--noheader", "--Node", "--format=%T").split()
            return len(states) == len(NODES) and set(states) <= {"idle", "mixed", "allocated"}

        _wait_for(is_idle, f"the nodes of Slurm (see {self.top})")

    def _start(self, name: str, *command: str) -> None:
        # A test process that is killed takes its daemons with it.
        self._daemons[name] = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )


class ClusterShell:
    """A shell of a machine on which the cluster's programs are installed: this one, or one behind another shell."""

    def __init__(self, configuration: Path, shell: Shell | None = None) -> None:
        self._shell = shell or LocalShell()
        self._settings = f"export SLURM_CONF={shlex.quote(str(configuration))} PATH={shlex.quote(PATH)}\n"

    def run(self, script: str, *arguments: str, stdin: bytes = b"", timeout_s: float | None = None) -> Answer:
        """Run the script; see Shell."""
        return self._shell.run(self._settings + script, *arguments, stdin=stdin, timeout_s=timeout_s)

    def ask(self, script: str, *arguments: str, timeout_s: float | None = None) -> bytes:
        """Ask the kept script; see Shell."""
        return self._shell.ask(self._settings + script, *arguments, timeout_s=timeout_s)

    def close(self) -> None:
        """Let go of connections; see Shell."""
        self._shell.close()


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _wait_for(condition: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for: {what}"
        time.sleep(0.02)


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[SlurmCluster]:
    """A cluster of this test process; tests that stop one of its daemons start it again."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
    if missing:
        pytest.skip(f"needs the program {', '.join(missing)}")
    # The names of Unix sockets may not be long: the temporary directories of tests are too deep.
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:
        top = Path(name)
        top.chmod(0o755)
        cluster = SlurmCluster(top)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop_all()
