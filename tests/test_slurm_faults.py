"""What a real Slurm and its failures may do to a job: never a second submission, never LOST while it may live."""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from stagecal.adapters.nodes_slurm import SlurmNodes
from stagecal.adapters.remote_shell import Answer, LocalShell, Shell
from stagecal.ports import FatalError, JobHandle, JobState, JobStatus, TransientError
from tests import ssh_nodes

if TYPE_CHECKING:
    from tests.slurm_cluster import SlurmCluster

pytest_plugins = ["tests.slurm_cluster"]

WRAPPER = Path(__file__).resolve().parents[1] / "templates" / "job" / "wrapper.sh"
KINDS = {"modern": ("rhel8",), "old": ("rhel5",), "one": ("fast",), "typo": ("rhel88",), "both": ("rhel8", "rhel5")}
LIVE = "echo once >> count; echo $$ > started; while [ ! -e go ]; do sleep 0.05; done; echo done"


class DiedError(BaseException):
    """The daemon dies here: nothing of ours handles it."""


class BreakingShell:
    """Runs what it is told to, but at one of Slurm's programs something happens before or after."""

    def __init__(
        self, shell: Shell, program: str, before: BaseException | None = None, after: BaseException | None = None
    ) -> None:
        self.shell, self.program, self.before, self.after = shell, program, before, after
        self.seen: list[tuple[str, tuple[str, ...], bytes]] = []

    def run(self, script: str, *arguments: str, stdin: bytes = b"", timeout_s: float | None = None) -> Answer:
        if f"{self.program} " not in script:
            return self.shell.run(script, *arguments, stdin=stdin, timeout_s=timeout_s)
        self.seen.append((script, arguments, stdin))
        if self.before:
            raise self.before
        answer = self.shell.run(script, *arguments, stdin=stdin, timeout_s=timeout_s)
        if self.after:
            raise self.after
        return answer

    def ask(self, script: str, *arguments: str, timeout_s: float | None = None) -> bytes:
        return self.shell.ask(script, *arguments, timeout_s=timeout_s)

    def close(self) -> None:
        self.shell.close()


class ForgettingShell(BreakingShell):
    """Shows Slurm as it is when slurmctld has forgotten every job: after MinJobAge only sacct knows what ended."""

    def run(self, script: str, *arguments: str, stdin: bytes = b"", timeout_s: float | None = None) -> Answer:
        answer = super().run(script, *arguments, stdin=stdin, timeout_s=timeout_s)
        return Answer(answer.code, b"", answer.errors) if f"{self.program} " in script else answer


def soon(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


def until(condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for: {what}"
        time.sleep(0.02)


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


def send(number: signal.Signals, pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


class Table:
    """A cluster, a work area, and the jobs of one test."""

    def __init__(self, cluster: SlurmCluster, area: Path) -> None:
        self.cluster = cluster
        self.area = area
        self.handles: list[JobHandle] = []

    def nodes(self, shell: Shell | None = None, **changes: Any) -> SlurmNodes:
        values: dict[str, Any] = {
            **{"look_interval_s": 0.2, "grace_s": 1, "patience_s": 30.0, "settle_s": 0.0, "timeout_s": 2.0},
            **changes,
        }
        return SlurmNodes(self.area, KINDS, shell or self.cluster.shell(), WRAPPER.read_bytes(), **values)

    def prepared(self, script: str = LIVE, kind: str = "modern") -> JobHandle:
        job = JobHandle(kind, f"WORK{len(self.handles) + 1}", secrets.token_hex(8))
        self.handles.append(job)
        self.nodes().prepare(job, {"run.sh": f"#!/bin/sh\n{script}\n".encode()})
        return job

    def started(self, nodes: SlurmNodes, kind: str = "modern") -> JobHandle:
        job = self.prepared(kind=kind)
        nodes.launch(job, soon(3600))
        self.wait_for(job, "started")
        return job

    def wait_for(self, job: JobHandle, name: str) -> str:
        path = self.area / job.work / name
        until(lambda: path.exists() and path.stat().st_size > 0, f"{job.work}/{name}")
        return path.read_text()

    def finish(self, job: JobHandle, nodes: SlurmNodes) -> None:
        """Let a living job end by itself, and prove that it ran once."""
        self.wait_for(job, "started")
        (self.area / job.work / "go").touch()
        assert self.ended(job, nodes) == JobStatus(JobState.EXITED, 0)
        assert (self.area / job.work / "count").read_text() == "once\n"

    def ended(self, job: JobHandle, nodes: SlurmNodes) -> JobStatus:
        """Wait until it is known what became of the job; nothing of it may live then."""
        seen: list[JobStatus] = []

        def is_known() -> bool:
            seen.append(nodes.poll(job))
            return seen[-1].state not in (JobState.RUNNING, JobState.UNREACHABLE)

        until(is_known, f"the end of {job.work}")
        until(lambda: not carriers(job.nonce), "the last process of an ended job", 2)
        return seen[-1]

    def submissions(self, job: JobHandle) -> list[str]:
        """Return the states of all jobs of Slurm that were submitted for this one."""
        lines = self.cluster.run("squeue", "--noheader", "--states=all", "--format=%j %T").splitlines()
        return [line.split()[1] for line in lines if line.split()[0] == f"stagecal-{job.nonce}"]

    def number(self, job: JobHandle) -> str:
        return (self.area / job.work / "slurm_job").read_text().strip()


@pytest.fixture
def table(slurm_cluster: SlurmCluster, tmp_path: Path) -> Iterator[Table]:
    table = Table(slurm_cluster, tmp_path)
    yield table
    for job in table.handles:
        send(signal.SIGKILL, carriers(job.nonce))
        slurm_cluster.run("scancel", f"--name=stagecal-{job.nonce}")


# --- the daemon dies at the submission -----------------------------------------------------------------------------


def test_a_job_whose_submission_was_not_recorded_is_found_again_and_not_submitted_twice(table: Table) -> None:
    job = table.prepared()
    with pytest.raises(DiedError):
        table.nodes(BreakingShell(table.cluster.shell(), "sbatch", after=DiedError())).launch(job, soon(3600))
    assert not (table.area / job.work / "slurm_job").exists()
    nodes = table.nodes()
    nodes.launch(job, soon(3600))
    nodes.launch(job, soon(3600))
    assert len(table.submissions(job)) == 1
    assert table.number(job).isdecimal()
    table.finish(job, nodes)


def test_a_poll_alone_adopts_a_job_whose_submission_was_not_recorded(table: Table) -> None:
    job = table.prepared()
    with pytest.raises(DiedError):
        table.nodes(BreakingShell(table.cluster.shell(), "sbatch", after=DiedError())).launch(job, soon(3600))
    nodes = table.nodes()
    assert nodes.poll(job).state is JobState.RUNNING
    assert table.number(job).isdecimal()
    table.finish(job, nodes)


def test_a_job_that_ended_before_its_submission_was_recorded_is_not_submitted_again(table: Table) -> None:
    job = table.prepared("echo once >> count")
    with pytest.raises(DiedError):
        table.nodes(BreakingShell(table.cluster.shell(), "sbatch", after=DiedError())).launch(job, soon(3600))
    table.wait_for(job, "exit")
    nodes = table.nodes()
    nodes.launch(job, soon(3600))
    assert nodes.poll(job) == JobStatus(JobState.EXITED, 0)
    assert len(table.submissions(job)) == 1


def test_a_job_that_slurmctld_has_forgotten_is_found_by_the_record_of_its_end(table: Table) -> None:
    job = table.prepared("echo once >> count")
    with pytest.raises(DiedError):
        table.nodes(BreakingShell(table.cluster.shell(), "sbatch", after=DiedError())).launch(job, soon(3600))
    table.wait_for(job, "exit")
    until(lambda: table.submissions(job) == ["COMPLETED"], "Slurm to record the end")
    # Without its exit status it is lost, not unknown for ever.
    (table.area / job.work / "exit").unlink()
    nodes = table.nodes(ForgettingShell(table.cluster.shell(), "squeue"))
    nodes.launch(job, soon(3600))
    assert nodes.poll(job) == JobStatus(JobState.LOST, detail="Slurm has ended it: COMPLETED")
    assert table.number(job).isdecimal()
    assert nodes.poll(job).state is JobState.LOST


def test_a_lost_answer_of_sbatch_leaves_one_job(table: Table) -> None:
    job = table.prepared()
    lost = TransientError("the connection was lost")
    nodes = table.nodes(BreakingShell(table.cluster.shell(), "sbatch", after=lost))
    with pytest.raises(TransientError, match="lost"):
        nodes.launch(job, soon(3600))
    nodes.launch(job, soon(3600))
    assert len(table.submissions(job)) == 1
    table.finish(job, nodes)


def test_a_daemon_that_died_just_before_sbatch_leaves_a_job_that_is_closed_for_ever(table: Table) -> None:
    job = table.prepared()
    with pytest.raises(DiedError):
        table.nodes(BreakingShell(table.cluster.shell(), "sbatch", before=DiedError())).launch(job, soon(3600))
    nodes = table.nodes()
    with pytest.raises(TransientError, match="does not know it"):
        nodes.launch(job, soon(3600))
    status = nodes.poll(job)
    assert (status.state, "not shown itself" in status.detail) == (JobState.RUNNING, True)
    impatient = table.nodes(patience_s=0)
    status = impatient.poll(job)
    assert (status.state, "it never started" in status.detail) == (JobState.LOST, True)
    impatient.launch(job, soon(3600))
    assert table.submissions(job) == []


def test_a_submission_that_arrives_after_its_job_was_closed_does_nothing(table: Table) -> None:
    """An sbatch of a killed daemon may live on and reach Slurm late."""
    job = table.prepared()
    shell = BreakingShell(table.cluster.shell(), "sbatch", before=DiedError())
    with pytest.raises(DiedError):
        table.nodes(shell).launch(job, soon(3600))
    nodes = table.nodes(patience_s=0)
    assert nodes.poll(job).state is JobState.LOST
    ((script, arguments, stdin),) = shell.seen
    assert table.cluster.shell().run(script, *arguments, stdin=stdin).code == 0
    until(lambda: "PENDING" not in table.submissions(job) and "RUNNING" not in table.submissions(job), "the late job")
    assert nodes.poll(job).state is JobState.LOST
    assert not (table.area / job.work / "count").exists()


# --- Slurm refuses -------------------------------------------------------------------------------------------------


def test_a_label_that_slurm_does_not_know_is_told_clearly(table: Table) -> None:
    job = table.prepared(kind="typo")
    nodes = table.nodes()
    with pytest.raises(FatalError, match=r"Slurm refuses WORK1: Invalid feature specification .*labels of typo"):
        nodes.launch(job, soon(3600))
    assert nodes.poll(job) == JobStatus(JobState.NOT_STARTED)
    assert table.submissions(job) == []
    looks = {look.name: look for look in nodes.loads()}
    assert (looks["typo"].load_per_core, looks["typo"].labels) == (None, ("rhel88",))
    assert looks["typo"].trouble == "no node of Slurm has the feature rhel88: correct the labels of typo"
    assert looks["both"].trouble == "no node of Slurm has all the features rhel8&rhel5"
    assert looks["modern"].load_per_core is not None


@pytest.mark.parametrize("options", [("--partition=nowhere",), ("--no-such-option",)])
def test_a_job_that_sbatch_refuses_was_provably_not_started(table: Table, options: tuple[str, ...]) -> None:
    job = table.prepared()
    nodes = table.nodes(options=options)
    with pytest.raises(FatalError, match=r"Slurm refuses WORK1: .*sbatch_options"):
        nodes.launch(job, soon(3600))
    assert nodes.poll(job).state is JobState.NOT_STARTED
    nodes = table.nodes(options=("--partition=all", "--time=10"))
    nodes.launch(job, soon(3600))
    table.finish(job, nodes)


def test_no_load_is_too_high_for_slurm_which_keeps_a_queue(table: Table) -> None:
    looks = {look.name: look.load_per_core for look in table.nodes(load_limit=0.0).loads()}
    assert looks == {"modern": 0.0, "old": 0.0, "one": 0.0, "typo": None, "both": None}


@pytest.mark.parametrize("kind", ["paramiko", "openssh"])
def test_slurm_is_used_through_a_submit_host_over_ssh(table: Table, kind: str) -> None:
    way = ssh_nodes.make_shell(kind, ssh_nodes.shared_server(kind).target())
    try:
        nodes = table.nodes(table.cluster.shell(way), timeout_s=10.0)
        assert [look.load_per_core is None for look in nodes.loads()] == [False, False, False, True, True]
        job, other = table.started(nodes), table.started(nodes)
        nodes.cancel(other)
        status = table.ended(other, nodes)
        assert (status.state, "it was cancelled" in status.detail) == (JobState.LOST, True)
        table.finish(job, nodes)
        assert nodes.output(job) == "done\n"
    finally:
        way.close()


def test_doctor_finds_slurms_programs_its_records_and_each_kind_of_node(table: Table) -> None:
    found = {finding.name: finding for finding in table.nodes().check()}
    assert [name for name, finding in found.items() if not finding.ok] == ["typo", "both"]
    assert "slurm" in found["programs"].text
    assert "file of completed jobs" in found["records"].text
    assert "rhel88" in found["typo"].text


def test_doctor_says_where_slurms_programs_are_missing(table: Table, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    shell = LocalShell({"PATH": str(tmp_path / "bin")}, "login1")
    (finding,) = table.nodes(shell).check()
    assert (finding.name, finding.ok) == ("programs", False)
    assert "missing: sbatch squeue sinfo scancel" in finding.text


def test_doctor_says_that_a_submit_host_cannot_be_reached(table: Table) -> None:
    target = replace(ssh_nodes.shared_server("paramiko").target(), port=1)
    (finding,) = table.nodes(ssh_nodes.make_shell("paramiko", target)).check()
    assert (finding.ok, "cannot reach" in finding.text) == (False, True)


# --- waiting -------------------------------------------------------------------------------------------------------


def test_a_job_that_waits_in_slurm_runs_for_us_and_can_be_cancelled(table: Table) -> None:
    table.cluster.run("scontrol", "update", "NodeName=node3", "State=DRAIN", "Reason=test")
    try:
        nodes = table.nodes()
        (look,) = [look for look in nodes.loads() if look.name == "old"]
        assert look.load_per_core is None
        assert look.trouble == "no fitting node of Slurm is up (node3 drained)"
        job = table.prepared(kind="old")
        nodes.launch(job, soon(3600))
        status = nodes.poll(job)
        assert (status.state, status.detail[:18]) == (JobState.RUNNING, "waiting in Slurm (")
        nodes.cancel(job)
        assert nodes.poll(job) == JobStatus(JobState.LOST, detail="it was cancelled")
        assert table.submissions(job) == ["CANCELLED"]
    finally:
        table.cluster.run("scontrol", "update", "NodeName=node3", "State=RESUME")
    assert not (table.area / job.work / "count").exists()


def test_a_lease_that_ran_out_while_the_job_waited_ends_it_when_it_starts(table: Table) -> None:
    nodes = table.nodes()
    job = table.prepared("echo begun; sleep 300")
    nodes.launch(job, soon(-1))
    status = table.ended(job, nodes)
    assert (status.state, "its lease ran out" in status.detail) == (JobState.LOST, True)


# --- an operator uses Slurm ----------------------------------------------------------------------------------------


def test_a_job_that_an_operator_cancelled_is_lost(table: Table) -> None:
    nodes = table.nodes()
    job = table.started(nodes)
    table.cluster.run("scancel", table.number(job))
    assert table.ended(job, nodes).state is JobState.LOST
    assert "CANCELLED AT" in nodes.output(job), "Slurm's own words are part of the terminal output"


def test_a_waiting_job_that_an_operator_cancelled_is_lost_at_once(table: Table) -> None:
    table.cluster.run("scontrol", "update", "NodeName=node3", "State=DRAIN", "Reason=test")
    try:
        nodes = table.nodes()
        job = table.prepared(kind="old")
        nodes.launch(job, soon(3600))
        table.cluster.run("scancel", table.number(job))
        assert nodes.poll(job) == JobStatus(JobState.LOST, detail="it never started (Slurm has ended it: CANCELLED)")
    finally:
        table.cluster.run("scontrol", "update", "NodeName=node3", "State=RESUME")


def test_a_job_all_of_which_was_killed_is_lost_with_its_state_in_slurm(table: Table) -> None:
    nodes = table.nodes()
    job = table.started(nodes)
    send(signal.SIGKILL, carriers(job.nonce))
    assert table.ended(job, nodes) == JobStatus(JobState.LOST, detail="Slurm has ended it: FAILED")
    # What was written on a node may take its time to be seen here.
    assert table.nodes(settle_s=3600).poll(job) == JobStatus(
        JobState.RUNNING, detail="Slurm has ended it: FAILED, its exit status is not here yet"
    )


# --- slurmctld fails -----------------------------------------------------------------------------------------------


def test_while_slurmctld_is_down_nothing_is_lost_and_nothing_is_started(table: Table) -> None:
    nodes = table.nodes(timeout_s=0.5)
    job, quick = table.started(nodes), table.started(nodes)
    other = table.prepared()
    table.cluster.stop("slurmctld")
    try:
        asked = time.monotonic()
        restarted = table.nodes(timeout_s=0.5)
        assert [restarted.poll(job).state for _ in range(50)] == [JobState.UNREACHABLE] * 50
        assert all(look.load_per_core is None and "Slurm does not answer" in look.trouble for look in restarted.loads())
        assert time.monotonic() - asked < 3, "one silence serves many polls"
        # What the job itself tells needs no Slurm.
        (table.area / quick.work / "go").touch()
        assert table.ended(quick, nodes) == JobStatus(JobState.EXITED, 0)
        nodes.cancel(quick)
        with pytest.raises(TransientError, match="may be of a living job"):
            restarted.clean(job)
        with pytest.raises(TransientError, match="Slurm does not answer"):
            restarted.launch(other, soon(3600))
        assert restarted.poll(other) == JobStatus(JobState.NOT_STARTED)
    finally:
        table.cluster.start_controller()
    until(lambda: restarted.poll(job) == JobStatus(JobState.RUNNING), "slurmctld to be back")
    table.cluster.wait_until_idle()
    table.finish(job, nodes)
    restarted.launch(other, soon(3600))
    table.finish(other, restarted)


def test_a_silent_slurmctld_is_not_waited_for_and_a_lease_that_is_over_proves_the_end(table: Table) -> None:
    nodes = table.nodes(timeout_s=0.5, clock_slack_s=0.0)
    job = table.started(nodes)
    controller = table.cluster.process("slurmctld")
    os.kill(controller, signal.SIGSTOP)
    try:
        until(lambda: nodes.poll(job).state is JobState.UNREACHABLE, "the silence to be noticed")
        send(signal.SIGKILL, carriers(job.nonce))
        assert nodes.poll(job).state is JobState.UNREACHABLE
        nodes.renew_lease(job, soon(0))
        assert nodes.poll(job).state is JobState.UNREACHABLE
        nodes.renew_lease(job, soon(-5))
        status = nodes.poll(job)
        assert (status.state, "its lease ran out" in status.detail) == (JobState.LOST, True)
    finally:
        os.kill(controller, signal.SIGCONT)
    table.cluster.wait_until_idle()


def test_a_job_of_which_slurm_has_no_record_is_unknown_until_its_lease_is_over(table: Table) -> None:
    nodes = table.nodes(patience_s=0, clock_slack_s=0.0)
    job = table.started(nodes)
    os.killpg(int((table.area / job.work / "pid").read_text().split()[0]), signal.SIGSTOP)
    number = table.number(job)
    (table.area / job.work / "slurm_job").write_text("999999\n")
    status = nodes.poll(job)
    assert (status.state, "no record of job 999999" in status.detail) == (JobState.UNREACHABLE, True)
    nodes.renew_lease(job, soon(-5))
    assert nodes.poll(job).state is JobState.LOST
    table.cluster.run("scancel", "--signal=KILL", "--full", number)


# --- slurmd fails --------------------------------------------------------------------------------------------------


def test_a_job_whose_slurmd_was_killed_is_not_lost_while_it_lives_and_never_runs_twice(table: Table) -> None:
    nodes = table.nodes()
    job = table.started(nodes, kind="one")
    table.cluster.stop("node1", signal.SIGKILL)
    try:
        assert nodes.poll(job).state is JobState.RUNNING
        # A frozen node cannot end the job, whatever it is told.
        frozen = carriers(job.nonce)
        send(signal.SIGSTOP, frozen)
        table.cluster.run("scontrol", "update", "NodeName=node1", "State=DOWN", "Reason=test")
        until(lambda: nodes.poll(job).state is JobState.UNREACHABLE, "Slurm to give the node up")
        assert "NODE_FAIL" in nodes.poll(job).detail
        assert table.nodes().poll(job).state is JobState.UNREACHABLE
        nodes.launch(job, soon(3600))
        assert table.submissions(job) == ["NODE_FAIL"]
        send(signal.SIGCONT, frozen)
        status = table.ended(job, nodes)
        assert (status.state, "NODE_FAIL" in status.detail) == (JobState.LOST, True)
        assert (table.area / job.work / "count").read_text() == "once\n"
    finally:
        table.cluster.start_node("node1")
        table.cluster.run("scontrol", "update", "NodeName=node1", "State=RESUME")
        table.cluster.wait_until_idle()


def test_a_job_goes_on_while_its_slurmd_is_started_anew(table: Table) -> None:
    nodes = table.nodes()
    job = table.started(nodes, kind="one")
    table.cluster.stop("node1", signal.SIGKILL)
    table.cluster.start_node("node1")
    table.cluster.wait_until_idle()
    assert nodes.poll(job) == JobStatus(JobState.RUNNING)
    table.finish(job, nodes)
