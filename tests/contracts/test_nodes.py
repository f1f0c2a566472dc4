"""What every way to run jobs on nodes promises: each sentence of the port `Nodes`, with real processes.

A further adapter joins by a bench of its own in BENCHES. A bench's nodes must be processes of this machine, because
the tests look at and kill them by their numbers. The work area's name is one that careless quoting would break.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

import pytest

from stagecal.adapters.nodes_local import LocalNodes
from stagecal.adapters.nodes_slurm import SlurmNodes
from stagecal.adapters.nodes_ssh import SshNodes
from stagecal.ports import FatalError, JobHandle, JobState, JobStatus, Nodes, TransientError
from tests import ssh_nodes

if TYPE_CHECKING:
    from tests.slurm_cluster import SlurmCluster

pytest_plugins = ["tests.slurm_cluster"]

CHECKOUT = Path(__file__).resolve().parents[2]
WRAPPER = CHECKOUT / "templates" / "job" / "wrapper.sh"
NODE_PROGRAM = CHECKOUT / "templates" / "job" / "node.sh"
AREA_NAME = "work area 'of' $HOME; exit"
FOREIGN_BOOT = "00000000-0000-4000-8000-000000000000"


class Bench(Protocol):
    """One adapter under test, with jobs that look at their lease five times a second."""

    node: str
    area: Path
    nodes: Nodes

    def restarted(self, *, patience_s: float = 10.0) -> Nodes:
        """Return the adapter as a daemon makes it that was started anew."""
        ...

    def program(self, job: JobHandle) -> str:
        """Return the text of a Python program that makes the adapter and launches the job for an hour."""
        ...


class LocalBench:
    node = "here"

    def __init__(self, area: Path) -> None:
        self.area = area
        self.nodes: Nodes = self.restarted()

    def restarted(self, *, patience_s: float = 10.0) -> Nodes:
        return LocalNodes(self.area, self.node, ("casa", "fast"), WRAPPER.read_bytes(), 0.2, 1, patience_s)

    def program(self, job: JobHandle) -> str:
        return (
            "import datetime, pathlib\n"
            "from stagecal.adapters.nodes_local import LocalNodes\n"
            "from stagecal.ports import JobHandle\n"
            f"wrapper = pathlib.Path({str(WRAPPER)!r}).read_bytes()\n"
            f"nodes = LocalNodes(pathlib.Path({str(self.area)!r}), {self.node!r}, (), wrapper, 0.2, 1)\n"
            "until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)\n"
            f"nodes.launch(JobHandle{(job.node, job.work, job.nonce)!r}, until)\n"
        )


class SlurmBench:
    """Jobs of a real Slurm, whose nodes are daemons of this machine."""

    node = "here"
    cluster: ClassVar[SlurmCluster]

    def __init__(self, area: Path) -> None:
        self.area = area
        self.nodes: Nodes = self.restarted()

    def restarted(self, *, patience_s: float = 10.0) -> Nodes:
        return SlurmNodes(
            self.area,
            {self.node: ("casa", "fast")},
            self.cluster.shell(),
            WRAPPER.read_bytes(),
            look_interval_s=0.2,
            grace_s=1,
            patience_s=patience_s,
            settle_s=0,
        )

    def program(self, job: JobHandle) -> str:
        return (
            "import datetime, pathlib\n"
            "from stagecal.adapters.nodes_slurm import SlurmNodes\n"
            "from stagecal.ports import JobHandle\n"
            "from tests.slurm_cluster import ClusterShell\n"
            f"wrapper = pathlib.Path({str(WRAPPER)!r}).read_bytes()\n"
            f"shell = ClusterShell(pathlib.Path({str(self.cluster.configuration)!r}))\n"
            f"nodes = SlurmNodes(pathlib.Path({str(self.area)!r}), {{{self.node!r}: ()}}, shell, wrapper,\n"
            "                   look_interval_s=0.2, grace_s=1)\n"
            "until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)\n"
            f"nodes.launch(JobHandle{(job.node, job.work, job.nonce)!r}, until)\n"
        )


class SshBench:
    """Nodes behind real SSH servers on loopback, by one of the two transports."""

    node = "far"

    def __init__(self, area: Path, kind: str) -> None:
        self.area = area
        self._kind = kind
        self._server = ssh_nodes.shared_server(kind)
        self._made: list[SshNodes] = []
        self.nodes: Nodes = self.restarted()

    def restarted(self, *, patience_s: float = 10.0) -> Nodes:
        self._made.append(
            SshNodes(
                self.area,
                {self.node: ssh_nodes.machine(self._kind, self._server, "casa", "fast")},
                WRAPPER.read_bytes(),
                NODE_PROGRAM.read_text(),
                timeout_s=20,
                look_interval_s=0.2,
                grace_s=1,
                patience_s=patience_s,
            )
        )
        return self._made[-1]

    def program(self, job: JobHandle) -> str:
        return (
            "import datetime\n"
            "from pathlib import PosixPath\n"
            "from stagecal.adapters.nodes_ssh import Machine, SshNodes\n"
            "from stagecal.adapters.remote_shell import SshTarget\n"
            "from stagecal.ports import JobHandle\n"
            "from tests.ssh_nodes import make_shell\n"
            f"machine = Machine(make_shell({self._kind!r}, {self._server.target()!r}))\n"
            f"wrapper = PosixPath({str(WRAPPER)!r}).read_bytes()\n"
            f"program = PosixPath({str(NODE_PROGRAM)!r}).read_text()\n"
            f"nodes = SshNodes({self.area!r}, {{{self.node!r}: machine}}, wrapper, program,\n"
            "                 timeout_s=20, look_interval_s=0.2, grace_s=1)\n"
            "until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)\n"
            f"nodes.launch(JobHandle{(job.node, job.work, job.nonce)!r}, until)\n"
        )

    def close(self) -> None:
        for nodes in self._made:
            nodes.close()


BENCHES: Mapping[str, Callable[[Path], Bench]] = {
    "local": LocalBench,
    "paramiko": lambda area: SshBench(area, "paramiko"),
    "openssh": lambda area: SshBench(area, "openssh"),
    "legacy": lambda area: SshBench(area, "legacy"),
    "slurm": SlurmBench,
}


@pytest.fixture(scope="session", autouse=True)
def ssh_servers() -> Iterator[None]:
    yield
    ssh_nodes.stop_shared_servers()


def soon(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


def carriers(nonce: str) -> list[int]:
    """Return the living processes that have the nonce in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if f"STAGECAL_NONCE={nonce}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def until(condition: Callable[[], bool], what: str, seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for: {what}"
        time.sleep(0.01)


class Jobs:
    """The jobs of one test."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.nodes = bench.nodes
        self.handles: list[JobHandle] = []

    def handle(self) -> JobHandle:
        job = JobHandle(self.bench.node, f"WORK{len(self.handles) + 1}", secrets.token_hex(8))
        self.handles.append(job)
        return job

    def prepared(self, script: str, **files: bytes) -> JobHandle:
        job = self.handle()
        self.nodes.prepare(job, {"run.sh": f"#!/bin/sh\n{script}\n".encode(), **files})
        return job

    def launched(self, script: str, lease_s: float = 3600) -> JobHandle:
        job = self.prepared(script)
        self.nodes.launch(job, soon(lease_s))
        return job

    def file(self, job: JobHandle, name: str) -> Path:
        return self.nodes.directory(job) / name

    def wait_for(self, job: JobHandle, name: str) -> str:
        path = self.file(job, name)
        until(lambda: path.exists() and path.stat().st_size > 0, f"{job.work}/{name}")
        return path.read_text()

    def ended(self, job: JobHandle, nodes: Nodes | None = None) -> JobStatus:
        """Wait until the job no longer runs; an end is proven, so nothing of it may live then."""
        seen: list[JobStatus] = []

        def is_over() -> bool:
            seen.append((nodes or self.nodes).poll(job))
            return seen[-1].state is not JobState.RUNNING

        until(is_over, f"the end of {job.work}")
        # The wrapper tells the end as its last act, and may take a moment to leave.
        until(lambda: not carriers(job.nonce), "the last process of an ended job", 2)
        return seen[-1]

    def wrapper(self, job: JobHandle) -> int:
        return int(self.wait_for(job, "pid").split()[0])


def zombies() -> set[str]:
    """Return the children of ours that are dead and not waited for; those of other tests may be among them."""
    found = set()
    for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "Z":
                found.add(pid)
        except OSError:
            continue
    return found


@pytest.fixture(params=BENCHES.keys())
def jobs(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Jobs]:
    area = tmp_path / AREA_NAME
    area.mkdir()
    if request.param == "slurm":
        SlurmBench.cluster = request.getfixturevalue("slurm_cluster")
    before = zombies()
    bench = BENCHES[request.param](area)
    jobs = Jobs(bench)
    yield jobs
    for job in jobs.handles:
        for pid in carriers(job.nonce):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
    if isinstance(bench, SshBench):
        bench.close()
    until(lambda: not zombies() - before, "the end of what became a zombie of ours", 5)


LIVE = "echo started > started; while [ ! -e go ]; do sleep 0.05; done; echo done"


# --- loads ---------------------------------------------------------------------------------------------------------


def test_loads_are_one_look_at_each_configured_node(jobs: Jobs) -> None:
    (look,) = jobs.nodes.loads()
    assert (look.name, look.labels, look.trouble) == (jobs.bench.node, ("casa", "fast"), "")
    assert look.load_per_core is not None
    assert 0 <= look.load_per_core < 1000


# --- prepare -------------------------------------------------------------------------------------------------------


def test_a_job_directory_holds_the_files_that_were_given(jobs: Jobs) -> None:
    job = jobs.handle()
    jobs.nodes.prepare(
        job, {"run.sh": b"true\n", "tools/worker.py": b"\x00\xff", "tools/more.sh": b"", "a-b_c.d": b"x"}
    )
    directory = jobs.nodes.directory(job)
    assert directory == jobs.bench.area / job.work
    assert (directory / "tools" / "worker.py").read_bytes() == b"\x00\xff"
    assert (directory / "a-b_c.d").read_bytes() == b"x"
    assert [oct((directory / name).stat().st_mode)[-3:] for name in ("", "tools", "run.sh", "tools/more.sh")] == [
        "750",
        "750",
        "755",
        "755",
    ]
    assert [entry.name for entry in jobs.bench.area.iterdir()] == [job.work]


def test_preparing_again_changes_nothing(jobs: Jobs) -> None:
    job = jobs.prepared("true")
    before = {path: path.stat() for path in jobs.nodes.directory(job).iterdir()}
    jobs.nodes.prepare(job, {"run.sh": b"other", "more": b"more"})
    assert {path: path.stat() for path in jobs.nodes.directory(job).iterdir()} == before


def test_preparing_again_while_the_job_runs_changes_nothing(jobs: Jobs) -> None:
    job = jobs.launched(LIVE)
    jobs.wait_for(job, "started")
    jobs.nodes.prepare(job, {"run.sh": b"exit 9\n"})
    jobs.file(job, "go").touch()
    assert jobs.ended(job) == JobStatus(JobState.EXITED, 0)


def test_a_directory_of_another_job_is_never_taken_over(jobs: Jobs) -> None:
    job = jobs.prepared("true")
    other = JobHandle(job.node, job.work, secrets.token_hex(8))
    for act in (
        lambda: jobs.nodes.prepare(other, {"run.sh": b""}),
        lambda: jobs.nodes.launch(other, soon(60)),
        lambda: jobs.nodes.poll(other),
        lambda: jobs.nodes.cancel(other),
        lambda: jobs.nodes.clean(other),
    ):
        with pytest.raises(FatalError, match="not of this job"):
            act()
    assert jobs.nodes.poll(job).state is JobState.NOT_STARTED


@pytest.mark.parametrize("name", ["../out", "/out", "a/b/c", "a/../b", "", ".", "..", ".new", "pid", "lock/x", "a\nb"])
def test_a_file_cannot_be_called_what_leads_out_or_is_ours(jobs: Jobs, name: str) -> None:
    job = jobs.handle()
    with pytest.raises(FatalError, match="cannot be called"):
        jobs.nodes.prepare(job, {"run.sh": b"", name: b""})
    assert list(jobs.bench.area.iterdir()) == []


@pytest.mark.parametrize("work", ["..", "WORK", "WORK1/..", "WORK1\n", "../WORK1", "work1", "", "WORK1x", "WORK٣"])
def test_no_verb_touches_a_directory_that_is_no_job_directory(jobs: Jobs, work: str) -> None:
    job = JobHandle(jobs.bench.node, work, secrets.token_hex(8))
    nodes = jobs.nodes
    for act in (
        lambda: nodes.prepare(job, {}),
        lambda: nodes.launch(job, soon(60)),
        lambda: nodes.poll(job),
        lambda: nodes.renew_lease(job, soon(60)),
        lambda: nodes.output(job),
        lambda: nodes.directory(job),
        lambda: nodes.cancel(job),
        lambda: nodes.clean(job),
    ):
        with pytest.raises(FatalError, match="no name of a job directory"):
            act()
    assert list(jobs.bench.area.iterdir()) == []


def test_a_job_of_an_unknown_node_is_a_fatal_error(jobs: Jobs) -> None:
    with pytest.raises(FatalError, match="elsewhere"):
        jobs.nodes.poll(JobHandle("elsewhere", "WORK1", secrets.token_hex(8)))


def test_a_work_area_that_is_not_mounted_is_transient(jobs: Jobs) -> None:
    job = jobs.prepared("true")
    jobs.bench.area.rename(jobs.bench.area.with_name("unmounted"))
    for act in (lambda: jobs.nodes.poll(job), lambda: jobs.nodes.launch(job, soon(60)), lambda: jobs.nodes.clean(job)):
        with pytest.raises(TransientError, match="work area"):
            act()


# --- launch, exit status, output -----------------------------------------------------------------------------------


def test_a_job_that_was_not_launched_is_provably_not_started(jobs: Jobs) -> None:
    assert jobs.nodes.poll(jobs.handle()).state is JobState.NOT_STARTED
    assert jobs.nodes.poll(jobs.prepared("true")).state is JobState.NOT_STARTED


def test_a_job_that_was_not_prepared_cannot_be_launched(jobs: Jobs) -> None:
    with pytest.raises(FatalError, match="prepare"):
        jobs.nodes.launch(jobs.handle(), soon(60))


@pytest.mark.parametrize("code", [0, 7, 255])
def test_the_exit_status_of_run_sh_is_told(jobs: Jobs, code: int) -> None:
    assert jobs.ended(jobs.launched(f"exit {code}")) == JobStatus(JobState.EXITED, code)


def test_a_launched_job_runs_from_the_first_poll_on(jobs: Jobs) -> None:
    job = jobs.launched(LIVE)
    assert jobs.nodes.poll(job).state is JobState.RUNNING
    jobs.wait_for(job, "started")
    assert jobs.nodes.poll(job) == JobStatus(JobState.RUNNING)
    jobs.file(job, "go").touch()
    assert jobs.ended(job) == JobStatus(JobState.EXITED, 0)
    assert jobs.nodes.output(job) == "done\n"


def test_a_job_launched_many_times_at_once_runs_once(jobs: Jobs) -> None:
    job = jobs.prepared("echo once >> count; " + LIVE)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: jobs.nodes.launch(job, soon(3600)), range(16)))
    jobs.wait_for(job, "started")
    jobs.bench.restarted().launch(job, soon(3600))
    jobs.file(job, "go").touch()
    assert jobs.ended(job).exit_code == 0
    jobs.nodes.launch(job, soon(3600))
    assert jobs.nodes.poll(job) == JobStatus(JobState.EXITED, 0)
    assert jobs.file(job, "count").read_text() == "once\n"


def test_twenty_jobs_launched_in_parallel_each_tell_their_own_end(jobs: Jobs) -> None:
    prepared = [jobs.prepared(f"pwd; exit {code}") for code in range(20)]
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(lambda job: jobs.nodes.launch(job, soon(3600)), prepared))
    assert [jobs.ended(job).exit_code for job in prepared] == list(range(20))
    assert [jobs.nodes.output(job) for job in prepared] == [f"{jobs.nodes.directory(job)}\n" for job in prepared]


def test_a_job_runs_in_its_directory_detached_with_its_nonce_and_none_of_our_secrets(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/notify")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "/run/credentials")
    job = jobs.launched('pwd; echo "$STAGECAL_NONCE"; cat; env > env; cut -d" " -f6 /proc/$$/stat > session')
    assert jobs.ended(job).exit_code == 0
    assert jobs.nodes.output(job).splitlines() == [str(jobs.bench.area / job.work), job.nonce]
    assert int(jobs.file(job, "session").read_text()) != os.getsid(0)
    environment = jobs.file(job, "env").read_text()
    assert "PATH=" in environment
    assert "NOTIFY_SOCKET" not in environment
    assert "CREDENTIALS" not in environment


def test_a_job_survives_the_death_of_the_process_that_launched_it(jobs: Jobs) -> None:
    job = jobs.prepared(LIVE)
    program = jobs.bench.program(job) + "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n"
    launcher = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(CHECKOUT)}, check=False
    )
    assert launcher.returncode == -signal.SIGKILL
    nodes = jobs.bench.restarted()
    jobs.wait_for(job, "started")
    assert nodes.poll(job) == JobStatus(JobState.RUNNING)
    jobs.file(job, "go").touch()
    assert jobs.ended(job, nodes) == JobStatus(JobState.EXITED, 0)
    assert nodes.output(job) == "done\n"


def test_output_is_empty_before_the_job_starts(jobs: Jobs) -> None:
    assert jobs.nodes.output(jobs.handle()) == ""
    assert jobs.nodes.output(jobs.prepared("true")) == ""


def test_five_megabytes_on_stderr_harm_nobody_and_the_last_mebibyte_is_told(jobs: Jobs) -> None:
    job = jobs.launched("echo begin; head -c 5000000 /dev/zero | tr '\\0' x >&2; echo end")
    assert jobs.ended(job).exit_code == 0
    output = jobs.nodes.output(job)
    assert len(output) == 1024 * 1024
    assert output.endswith("xxxend\n")


def test_undecodable_output_is_replaced(jobs: Jobs) -> None:
    job = jobs.launched("printf 'a\\377b\\303\\274'")
    assert jobs.ended(job).exit_code == 0
    assert jobs.nodes.output(job) == "a\N{REPLACEMENT CHARACTER}bü"


def test_what_a_job_leaves_running_is_ended_before_its_end_is_told(jobs: Jobs) -> None:
    job = jobs.launched("setsid sleep 300 & sleep 300 & exit 3")
    assert jobs.ended(job) == JobStatus(JobState.EXITED, 3)


def test_results_on_a_shared_work_area_are_read_where_they_are(jobs: Jobs) -> None:
    job = jobs.launched("mkdir products; echo x > products/file")
    assert jobs.ended(job).exit_code == 0
    assert jobs.nodes.fetch(job, lambda done, total: None) == jobs.nodes.directory(job)


# --- deaths --------------------------------------------------------------------------------------------------------


def test_a_killed_payload_has_exited_with_its_signal(jobs: Jobs) -> None:
    job = jobs.launched("echo $$ > payload; exec sleep 300")
    os.kill(int(jobs.wait_for(job, "payload")), signal.SIGKILL)
    assert jobs.ended(job) == JobStatus(JobState.EXITED, 137)


def test_a_job_whose_wrapper_was_killed_is_lost_once_its_processes_are_gone(jobs: Jobs) -> None:
    job = jobs.launched(LIVE)
    jobs.wait_for(job, "started")
    os.kill(jobs.wrapper(job), signal.SIGKILL)
    status = jobs.ended(job)
    assert (status.state, status.exit_code) == (JobState.LOST, None)


def test_a_job_without_wrapper_and_watcher_runs_until_cancel_has_killed_it(jobs: Jobs) -> None:
    job = jobs.launched(LIVE)
    jobs.wait_for(job, "started")
    os.killpg(jobs.wrapper(job), signal.SIGKILL)
    until(lambda: "without its wrapper" in jobs.nodes.poll(job).detail, "the wrapper's death to be seen")
    assert jobs.nodes.poll(job).state is JobState.RUNNING
    jobs.nodes.cancel(job)
    assert jobs.ended(job).state is JobState.LOST


def test_a_wrapper_told_to_end_by_its_node_ends_the_job_as_lost(jobs: Jobs) -> None:
    job = jobs.launched(LIVE)
    jobs.wait_for(job, "started")
    os.kill(jobs.wrapper(job), signal.SIGTERM)
    assert jobs.ended(job) == JobStatus(JobState.LOST, detail="its node told it to end (exit status 143)")


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """A process that is none of ours."""
    with subprocess.Popen(["sleep", "300"]) as process:
        yield process
        assert process.poll() is None, "a foreign process was killed"
        process.kill()


def identity(pid: int) -> tuple[int, str]:
    """Return the start time of a process and the boot id, read independently of the adapters."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat.rpartition(") ")[2].split()[19]), Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@pytest.mark.parametrize("forgery", ["the pid was given to another process", "the node was started anew"])
def test_a_foreign_process_with_the_jobs_number_is_neither_the_job_nor_ever_signalled(
    jobs: Jobs, bystander: subprocess.Popen[bytes], forgery: str
) -> None:
    job = jobs.launched("exit 0")
    assert jobs.ended(job).exit_code == 0
    start_time, boot = identity(bystander.pid)
    if "pid" in forgery:
        start_time -= 1
    else:
        boot = FOREIGN_BOOT
    jobs.file(job, "exit").unlink()
    jobs.file(job, "pid").write_text(f"{bystander.pid} {start_time} {boot} {job.nonce}\n")
    assert jobs.ended(job).state is JobState.LOST
    jobs.nodes.cancel(job)
    jobs.nodes.cancel(job)
    assert bystander.poll() is None
    assert jobs.nodes.poll(job).state is JobState.LOST


def test_an_exit_file_that_a_crash_left_empty_is_no_end(jobs: Jobs) -> None:
    job = jobs.launched("exit 0")
    assert jobs.ended(job).exit_code == 0
    jobs.file(job, "exit").write_text("")
    assert jobs.ended(job).state is JobState.LOST


@pytest.mark.parametrize("name", ["pid", "exit", "launched"])
def test_a_damaged_file_is_for_a_person_to_look_at(jobs: Jobs, name: str) -> None:
    job = jobs.launched("exit 0")
    assert jobs.ended(job).exit_code == 0
    jobs.file(job, name).write_text("what?\n")
    with pytest.raises(FatalError, match="damaged"):
        jobs.nodes.poll(job)


def test_a_launch_that_broke_before_the_wrapper_came_is_lost_for_ever(jobs: Jobs) -> None:
    job = jobs.launched("echo ran > ran")
    assert jobs.ended(job).exit_code == 0
    for name in ("exit", "pid", "ran"):
        jobs.file(job, name).unlink()
    jobs.file(job, "lock").rmdir()
    assert jobs.bench.restarted(patience_s=3600).poll(job).state is JobState.RUNNING
    nodes = jobs.bench.restarted(patience_s=0)
    assert nodes.poll(job).state is JobState.LOST
    nodes.launch(job, soon(60))
    assert nodes.poll(job).state is JobState.LOST
    assert not jobs.file(job, "ran").exists()


# --- lease ---------------------------------------------------------------------------------------------------------


def test_a_job_whose_lease_runs_out_ends_itself_with_all_its_processes(jobs: Jobs) -> None:
    job = jobs.launched("setsid sleep 300 & " + LIVE)
    jobs.wait_for(job, "started")
    jobs.nodes.renew_lease(job, soon(1))
    status = jobs.ended(job)
    assert status.state is JobState.LOST
    assert "its lease ran out" in status.detail


def test_a_job_lives_no_longer_than_the_lease_of_its_launch(jobs: Jobs) -> None:
    status = jobs.ended(jobs.launched(LIVE, lease_s=1))
    assert status.state is JobState.LOST
    assert "its lease ran out" in status.detail


def test_a_job_whose_lease_is_renewed_lives_on(jobs: Jobs) -> None:
    job = jobs.launched("sleep 2.5; exit 4", lease_s=1)
    jobs.nodes.renew_lease(job, soon(3600))
    assert jobs.ended(job) == JobStatus(JobState.EXITED, 4)


def test_the_lease_of_a_job_that_is_gone_cannot_be_renewed(jobs: Jobs) -> None:
    with pytest.raises(FatalError, match="gone"):
        jobs.nodes.renew_lease(jobs.handle(), soon(60))


# --- cancel --------------------------------------------------------------------------------------------------------


def test_a_job_cancelled_before_its_launch_can_no_longer_be_launched(jobs: Jobs) -> None:
    job = jobs.prepared("echo ran > ran")
    jobs.nodes.cancel(job)
    assert jobs.nodes.poll(job) == JobStatus(JobState.LOST, detail="it was cancelled")
    jobs.nodes.launch(job, soon(60))
    assert jobs.ended(job).state is JobState.LOST
    assert not jobs.file(job, "ran").exists()


def test_a_job_cancelled_before_it_was_prepared_can_no_longer_be_launched(jobs: Jobs) -> None:
    job = jobs.handle()
    jobs.nodes.cancel(job)
    jobs.nodes.prepare(job, {"run.sh": b"echo ran > ran\n"})
    jobs.nodes.launch(job, soon(60))
    assert jobs.nodes.poll(job).state is JobState.LOST
    jobs.nodes.clean(job)
    assert list(jobs.bench.area.iterdir()) == []


def test_cancel_ends_all_processes_of_a_job_wherever_they_went(jobs: Jobs) -> None:
    stubborn = "trap '' TERM; touch stubborn; while :; do sleep 0.1; done"
    job = jobs.launched(f'setsid sleep 300 & setsid sh -c "setsid sh -c \\"{stubborn}\\" &" & ' + LIVE)
    jobs.wait_for(job, "started")
    until(jobs.file(job, "stubborn").exists, "the process that ignores TERM")
    asked = time.monotonic()
    jobs.nodes.cancel(job)
    assert time.monotonic() - asked < 1, "cancel returns at once"
    status = jobs.ended(job)
    assert status.state is JobState.LOST
    assert "it was cancelled" in status.detail


def test_cancel_right_after_the_launch_ends_the_job_or_keeps_it_from_starting(jobs: Jobs) -> None:
    launched = [jobs.launched(LIVE) for _ in range(5)]
    for job in launched:
        jobs.nodes.cancel(job)
    assert {jobs.ended(job).state for job in launched} == {JobState.LOST}


def test_cancel_reaches_a_stopped_job(jobs: Jobs) -> None:
    job = jobs.launched(LIVE)
    jobs.wait_for(job, "started")
    for pid in carriers(job.nonce):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    assert jobs.nodes.poll(job).state is JobState.RUNNING
    jobs.nodes.cancel(job)
    assert jobs.ended(job).state is JobState.LOST


def test_cancel_after_the_end_changes_nothing(jobs: Jobs) -> None:
    job = jobs.launched("exit 5")
    assert jobs.ended(job).exit_code == 5
    jobs.nodes.cancel(job)
    assert jobs.nodes.poll(job) == JobStatus(JobState.EXITED, 5)


# --- clean ---------------------------------------------------------------------------------------------------------


def test_a_living_job_is_not_cleaned_away(jobs: Jobs) -> None:
    job = jobs.launched(LIVE)
    with pytest.raises(FatalError, match="living job"):
        jobs.nodes.clean(job)
    jobs.file(job, "go").touch()
    assert jobs.ended(job).exit_code == 0


def test_clean_removes_an_ended_job_and_what_is_gone_is_fine(jobs: Jobs) -> None:
    job = jobs.launched("mkdir -p products/deep; echo x > products/deep/file; chmod 0500 products/deep")
    assert jobs.ended(job).exit_code == 0
    jobs.nodes.clean(job)
    assert list(jobs.bench.area.iterdir()) == []
    jobs.nodes.clean(job)
    jobs.nodes.clean(jobs.handle())


def test_a_wrapper_that_comes_too_late_keeps_no_closed_job_alive(jobs: Jobs) -> None:
    job = jobs.prepared("true")
    jobs.nodes.cancel(job)
    late = subprocess.Popen(["sleep", "300"], env={**os.environ, "STAGECAL_NONCE": job.nonce})
    try:
        until(lambda: late.pid in carriers(job.nonce), "the late process")
        assert jobs.nodes.poll(job) == JobStatus(JobState.LOST, detail="it was cancelled")
        jobs.nodes.clean(job)
        assert not jobs.nodes.directory(job).exists()
    finally:
        late.kill()
        late.wait()


def test_clean_never_follows_a_link(jobs: Jobs, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "data").write_text("data")
    job = jobs.prepared("true")
    jobs.file(job, "products").symlink_to(precious)
    jobs.nodes.clean(job)
    linked = jobs.handle()
    (jobs.bench.area / linked.work).symlink_to(precious)
    with pytest.raises(FatalError):
        jobs.nodes.clean(linked)
    assert (precious / "data").read_text() == "data"


def test_a_directory_that_is_not_ours_is_not_cleaned_away(jobs: Jobs) -> None:
    job = jobs.handle()
    directory = jobs.bench.area / job.work
    directory.mkdir()
    (directory / "data").write_text("data")
    with pytest.raises(FatalError, match="not of this job"):
        jobs.nodes.clean(job)
    with pytest.raises(FatalError, match="not of this job"):
        jobs.nodes.prepare(job, {})
    assert (directory / "data").read_text() == "data"


# --- what a crash in the middle left -------------------------------------------------------------------------------


def test_what_a_broken_attempt_to_prepare_or_clean_left_is_made_good(tmp_path: Path) -> None:
    """The hidden names are the local adapter's own."""
    jobs = Jobs(LocalBench(tmp_path))
    job = jobs.handle()
    for leftover in (f".{job.work}.{job.nonce}.new", f".{job.work}.{job.nonce}.removed"):
        (tmp_path / leftover / "sub").mkdir(parents=True)
        (tmp_path / leftover / "sub" / "half").write_text("ha")
    assert jobs.nodes.poll(job).state is JobState.NOT_STARTED
    jobs.nodes.prepare(job, {"run.sh": b"true"})
    assert not jobs.file(job, "sub").exists()
    jobs.nodes.clean(job)
    assert list(tmp_path.iterdir()) == []
