"""Runs jobs through a site's Slurm, in job directories on a work area that this machine and the compute nodes share.

Promises: sbatch is started at most once per job directory, whoever dies meanwhile; a job is called LOST only when the
lock in its directory proves that it never starts, when Slurm has ended it on a node that answers, or when its lease
has run out; what Slurm does not know, or does not tell, stays unknown (UNREACHABLE).

Slurm's programs run through a `Shell`, here or on a submit host. Fails with TransientError where waiting may help
(slurmctld is silent, the work area is not mounted), else with FatalError (Slurm refuses the job).
"""

from __future__ import annotations

import math
import os
import re
import shlex
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from stagecal.adapters import job_directory as layout
from stagecal.adapters.job_files import JobFiles, boot_id, claim, exists, read, uptime_s, write, write_once
from stagecal.adapters.remote_shell import Answer, Finding, Shell, plain, printable
from stagecal.ports import FatalError, JobHandle, JobState, JobStatus, NodeLoad, TransientError

# Beside the layout of every job directory: the number of the job in Slurm, and whether its wrapper died before it.
SLURM_JOB = "slurm_job"
ORPHANED = "orphaned"

_SUBMIT_TIMEOUT_S = 30.0
_CACHE_S = 1.0
# sacct looks no further back than today unless it is told to; a submission in doubt is never that old.
_SEARCHED_BACK = timedelta(days=14)

# Terminal states of Slurm; what is not among them may still run, or run one day.
_ENDED = frozenset(
    {
        *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL"),
        *("OUT_OF_MEMORY", "PREEMPTED", "RECONFIG_FAIL", "REVOKED", "TIMEOUT"),
    }
)
# The batch script came to its end by itself: it was started, whatever is seen of it here.
_ENDED_BY_ITSELF = frozenset({"COMPLETED", "FAILED", "OUT_OF_MEMORY"})
# What a shell tells of a program that KILL or TERM has ended.
_KILLED = (137, 143)
_WAITING = frozenset({"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD"})
# States of a node in which it takes jobs, now or when others have ended; Slurm keeps the queue.
_USABLE = frozenset(
    {
        *("idle", "mixed", "allocated", "completing", "planned", "reserved"),
        *("powered_down", "powering_up", "power_up", "powering_down"),
    }
)

_NUMBER = re.compile(rb"([0-9]{1,12})(?:;\S*)?", re.ASCII)
_REFUSED = re.compile(r"Batch job submission failed: (.*)")
# After these words of sbatch the job may have reached slurmctld or may reach it still.
_IN_DOUBT = re.compile(
    r"timed out|send failure|receive failure|shutdown failure|zero bytes|unexpected m", re.IGNORECASE
)
_WAITING_MAY_HELP = re.compile(
    r"connect failure|temporarily|try again|job submit limit|queue size limit|already in progress", re.IGNORECASE
)

# Everything is said by the environment that a job on a node would have anyway, and nothing of ours goes along.
_KEPT = " ".join(f'${{{name}+"{name}=${name}"}}' for name in (*layout.INHERITED_VARIABLES, "SLURM_CONF"))
_SUBMIT = f'exec env -i {_KEPT} sbatch "$@"'
_QUEUE = 'exec squeue --noheader --states=all --user="$(id -u)" --format="%i|%T|%r|%N|%j"'
_ACCOUNTED = """\
format=JobID,State,NodeList,JobName
sacct --noheader --parsable2 --allocations --format=$format "$@" 2>/dev/null ||
    sacct --completion --noheader --parsable2 --format=$format "$@" 2>/dev/null || :
"""
_NODES = 'exec sinfo --noheader --Node --format="%N|%T|%O|%c|%b" "$@"'
_CANCEL = 'exec scancel "$@"'
_PROGRAMS = """\
missing=
for program in sbatch squeue sinfo scancel; do
    command -v "$program" >/dev/null || missing="$missing $program"
done
[ -z "$missing" ] || { echo "missing:$missing" >&2; exit 1; }
exec sinfo --version
"""
# Says which of them knows of jobs that slurmctld has forgotten.
_RECORDS = """\
sacct --noheader --parsable2 --allocations --format=JobID >/dev/null 2>&1 && exec echo accounting
sacct --completion --noheader --parsable2 --format=JobID >/dev/null 2>&1 && exec echo completed
echo none
"""
_RECORDED = {
    "accounting": "sacct tells how jobs ended",
    "completed": "no accounting, but the file of completed jobs tells how jobs ended",
}

# TERM comes from scancel. Slurm gives the job's place away when this script ends: it stays while anything of the job
# lives, and ends what a killed wrapper left behind when that may live no longer.
_BATCH_SCRIPT = """\
#!/bin/sh
cd {directory} || exit 1
read -r nonce < nonce && [ "$nonce" = {nonce} ] || exit 1
wrapper=
stopped=
stop() {{
    stopped=yes
    [ -z "$wrapper" ] || kill -s TERM "$wrapper"
    [ -z "$wrapper" ] || kill -s CONT "$wrapper"
}}
trap stop TERM
STAGECAL_NONCE=$nonce setsid sh ./wrapper.sh {interval:g} {grace} </dev/null &
wrapper=$!
wait "$wrapper"
while kill -s 0 "$wrapper" 2>/dev/null; do wait "$wrapper"; done
wrapper=
if [ ! -e exit ]; then
    [ ! -e pid ] || : > {orphaned}
    while left=$(trap '' TERM; grep -lzxF "STAGECAL_NONCE=$nonce" /proc/[0-9]*/environ 2>/dev/null); [ -n "$left" ]; do
        {{ read -r lease < lease; }} 2>/dev/null || lease=0
        if [ -n "$stopped" ] || [ -e cancel ] || [ -e ended ] || [ "$(date +%s)" -ge "$lease" ]; then
            for path in $left; do
                path=${{path#/proc/}}
                kill -s KILL "${{path%/environ}}" 2>/dev/null
            done
        fi
        sleep {interval:g} &
        wait $!
    done
    exit 1
fi
read -r code < exit
exit "$code"
"""


@dataclass(frozen=True)
class SlurmJob:
    """What Slurm says of one of its jobs: its number and name, its state in Slurm's words and why, and its node."""

    number: int
    name: str
    state: str
    reason: str = ""
    node: str = ""

    @property
    def has_ended(self) -> bool:
        """Whether Slurm will do nothing with it any more."""
        return self.state in _ENDED


@dataclass(frozen=True)
class _Node:
    name: str
    state: str
    load_per_core: float
    features: frozenset[str]

    @property
    def is_usable(self) -> bool:
        return self.state.strip("~#!%$@^-+") in _USABLE


@dataclass(frozen=True)
class _Files:
    """What a look into a job directory has seen."""

    seen: layout.Sighting
    number: int | None = None
    orphaned: bool = False
    lease_until: float | None = None

    @property
    def is_settled(self) -> bool:
        """Whether the files alone tell what became of the job: its end, or that it cannot have begun."""
        closed = self.seen.locked and bool(self.seen.ended) and self.seen.wrapper is None
        return self.seen.exit_code is not None or self.seen.launched is None or closed


class SlurmNodes:
    """The Nodes port for the nodes of a Slurm cluster.

    Each of `nodes` (name: labels) stands for a kind of node: its labels are features that a node must have. `wrapper`
    is the text of the job wrapper, `options` goes to sbatch as it is (partition, account ...). Slurm keeps a queue of
    its own, so no kind of node is too busy: `load_limit` is the highest load per core that is told.

    The seconds say how often a wrapper looks at its lease, how long it lets a job end by itself after TERM, how long
    a submitted job may show nothing, neither in Slurm nor in its directory, how long the shared file system may take
    to show here what was written on a node, for how long an answer of Slurm's programs is waited for, and how much
    the clocks may differ.
    """

    def __init__(
        self,
        work_area: Path,
        nodes: Mapping[str, tuple[str, ...]],
        shell: Shell,
        wrapper: bytes,
        *,
        options: tuple[str, ...] = (),
        load_limit: float = math.inf,
        look_interval_s: float = 30.0,
        grace_s: int = 10,
        patience_s: float = 60.0,
        settle_s: float = 60.0,
        timeout_s: float = 5.0,
        clock_slack_s: float = 60.0,
    ) -> None:
        self._files = JobFiles(work_area, wrapper)
        self._nodes = dict(nodes)
        self._slurm = _Slurm(shell, timeout_s, options)
        self._load_limit = load_limit
        self._look_interval_s = look_interval_s
        self._grace_s = grace_s
        self._patience_s = patience_s
        self._settle_s = settle_s
        self._clock_slack_s = clock_slack_s
        self._launching = threading.Lock()
        self._noticed: dict[tuple[str, str], float] = {}

    # --- the nodes -------------------------------------------------------------------------------------------------

    def loads(self) -> Sequence[NodeLoad]:
        """Return for each kind of node the least loaded usable one, from one question to Slurm. Never raises."""
        try:
            found = self._slurm.nodes()
        except (TransientError, FatalError) as trouble:
            return [NodeLoad(name, None, labels, str(trouble)) for name, labels in self._nodes.items()]
        return [self._load_of(name, labels, found) for name, labels in self._nodes.items()]

    def check(self) -> Sequence[Finding]:
        """Return what was tried of Slurm: the way to its programs, these, slurmctld, records of what has ended, and
        for each kind of node whether there is one. Never raises.
        """
        try:
            programs = self._slurm.programs()
        except (TransientError, FatalError) as error:
            return (Finding("programs", False, str(error)),)
        findings = [Finding("programs", True, f"sbatch, squeue, sinfo and scancel are there ({programs})")]
        try:
            self._slurm.check()
        except TransientError as error:
            return (*findings, Finding("slurmctld", False, str(error)))
        findings += [Finding("slurmctld", True, "squeue is answered"), self._slurm.records()]
        for look in self.loads():
            labels = "&".join(look.labels) or "any node"
            findings.append(Finding(look.name, not look.trouble, look.trouble or f"a node is up ({labels})"))
        return findings

    def _load_of(self, name: str, labels: tuple[str, ...], found: Sequence[_Node]) -> NodeLoad:
        known = frozenset[str]().union(*(node.features for node in found))
        unknown = [label for label in labels if label not in known]
        fitting = [node for node in found if node.features.issuperset(labels)]
        usable = [node for node in fitting if node.is_usable]
        if unknown:
            trouble = f"no node of Slurm has the feature {', '.join(unknown)}: correct the labels of {name}"
        elif not fitting:
            trouble = f"no node of Slurm has all the features {'&'.join(labels)}"
        elif not usable:
            states = ", ".join(sorted({f"{node.name} {node.state}" for node in fitting}))
            trouble = f"no fitting node of Slurm is up ({states[:200]})"
        else:
            least = min(node.load_per_core for node in usable)
            return NodeLoad(name, min(least, self._load_limit), labels)
        return NodeLoad(name, None, labels, trouble)

    # --- the life of a job -----------------------------------------------------------------------------------------

    def prepare(self, job: JobHandle, files: Mapping[str, bytes]) -> None:
        """Make the job directory durably, by one rename; the directory of the same job is left as it is.

        Raises FatalError if something else stands under its name, or a file has a name that cannot be.
        """
        self._check(job)
        for name in (SLURM_JOB, ORPHANED):
            if name in files:
                raise FatalError(f"{job.work}: a job file cannot be called {name!r}")
        self._files.prepare(job, files)

    def launch(self, job: JobHandle, lease_until: datetime) -> None:
        """Submit the job, if nobody ever tried to; else make sure that its number in Slurm is known.

        Raises FatalError if the job was not prepared or Slurm refuses it, TransientError if Slurm cannot take it now
        or it is not known whether it has it: `poll` finds that out.
        """
        self._check(job)
        with self._launching, self._files.trouble(job, "launch"), self._files.opened(job) as directory:
            if directory is None:
                raise FatalError(f"{self.directory(job)} is not there: prepare the job before it is launched")
            if exists(layout.LOCK, directory):
                return
            if not exists(layout.LAUNCHED, directory):
                # sbatch would wait long for a slurmctld that does not answer, and leave us in doubt.
                self._slurm.check()
                write(layout.LEASE, layout.lease_text(lease_until), directory)
            mark = layout.launched_text(layout.LaunchMark(uptime_s(), boot_id()))
            if write_once(layout.LAUNCHED, mark, directory):
                self._submit(job, directory)
            elif read(SLURM_JOB, directory) is None:
                found = self._find(job, None, directory, asked=time.monotonic())
                if found is None:
                    raise TransientError(f"{job.work} was submitted, but Slurm does not know it (yet)")

    def _submit(self, job: JobHandle, directory: int) -> None:
        labels = self._nodes[job.node]
        script = _BATCH_SCRIPT.format(
            directory=shlex.quote(str(self._files.path(job))),
            nonce=shlex.quote(job.nonce),
            interval=self._look_interval_s,
            grace=self._grace_s,
            orphaned=ORPHANED,
        )
        answer = self._slurm.submit(
            "--parsable",
            "--no-requeue",
            "--export=ALL",
            f"--job-name={_name_of(job)}",
            f"--comment={job.nonce}",
            f"--chdir={self._files.path(job)}",
            # Relative to that directory; a whole path would be searched for patterns.
            f"--output={layout.OUTPUT}",
            "--open-mode=append",
            *((f"--constraint={'&'.join(labels)}",) if labels else ()),
            script=script.encode("utf-8", errors="surrogateescape"),
        )
        number = _submitted_number(answer)
        if number is not None:
            write(SLURM_JOB, f"{number}\n", directory, durable=True)
            return
        words = _last_line(answer.errors) or f"sbatch ended with {answer.code}"
        refused = _REFUSED.search(answer.errors.decode(errors="replace"))
        reason = plain(refused[1]) if refused else words
        # A program that was killed has not told everything; any other failure without an answer came before the
        # submission.
        in_doubt = answer.code == 0 or 128 < answer.code < 255 or bool(refused and _IN_DOUBT.search(reason))
        if in_doubt:
            raise TransientError(f"{job.work}: it is not known whether Slurm has it: {words}")
        os.unlink(layout.LAUNCHED, dir_fd=directory)
        os.fsync(directory)
        if _WAITING_MAY_HELP.search(reason):
            raise TransientError(f"Slurm cannot take {job.work} now: {reason}")
        raise FatalError(
            f"Slurm refuses {job.work}: {reason} (see [cluster] sbatch_options and the labels of {job.node})"
        )

    def poll(self, job: JobHandle) -> JobStatus:
        """Return what the job's files and Slurm say. A submission that came to nothing is closed for ever by it."""
        self._check(job)
        asked = time.monotonic()
        with self._files.trouble(job, "poll"), self._files.opened(job) as directory:
            if directory is None:
                return self._without_directory(job, asked)
            files = _look(job, directory)
            if files.is_settled:
                return self._settled(job, directory, files, asked)
            try:
                found = self._find(job, files.number, directory, asked=asked)
                if found and not found.has_ended:
                    return _active(found, files)
                # The proof needs to know whether the node of an ended job answers.
                is_down = found is not None and self._slurm.is_down(found.node)
            except TransientError as trouble:
                return self._silent(directory, _look(job, directory), str(trouble))
            # What the job wrote before Slurm told its end is seen only now.
            files = _look(job, directory)
            if files.is_settled:
                return self._settled(job, directory, files, asked)
            if found is None:
                return self._unknown(job, directory, files)
            return self._ended(job, directory, files, found, is_down=is_down)

    def _settled(self, job: JobHandle, directory: int, files: _Files, asked: float) -> JobStatus:
        """Return what the files alone tell, but for a job killed by a signal: somebody may have cancelled it in Slurm.

        `scancel` reaches run.sh and its wrapper at once, and either may be the first to end.
        """
        status = layout.status_of(files.seen, patience_s=self._patience_s)
        if status.state is not JobState.EXITED or status.exit_code not in _KILLED:
            return status
        try:
            found = self._find(job, files.number, directory, asked=asked)
        except TransientError as trouble:
            return JobStatus(JobState.UNREACHABLE, detail=f"it was killed, and nobody tells by whom: {trouble}")
        if found is not None and found.state == "CANCELLED":
            return JobStatus(JobState.LOST, detail=f"Slurm says that it was cancelled (exit status {status.exit_code})")
        return status

    def _without_directory(self, job: JobHandle, asked: float) -> JobStatus:
        try:
            found = self._slurm.job(_name_of(job), None, asked=asked)
        except TransientError as trouble:
            return JobStatus(JobState.UNREACHABLE, detail=str(trouble))
        if found and not found.has_ended:
            return JobStatus(JobState.RUNNING, detail=f"has no directory, but is job {found.number} of Slurm")
        return JobStatus(JobState.NOT_STARTED, detail="there is no job directory")

    def _silent(self, directory: int, files: _Files, trouble: str) -> JobStatus:
        """Return what is known of a job while Slurm does not answer."""
        if files.is_settled:
            return layout.status_of(files.seen, patience_s=self._patience_s)
        if self._lease_is_over(files):
            if not files.seen.locked and not claim("lease", directory):
                return JobStatus(JobState.UNREACHABLE, detail=trouble)
            return JobStatus(JobState.LOST, detail=f"{layout.REASONS['lease']} ({trouble})")
        return JobStatus(JobState.UNREACHABLE, detail=trouble)

    def _unknown(self, job: JobHandle, directory: int, files: _Files) -> JobStatus:
        """Return what is known of a job of which Slurm has no record."""
        if files.number is None:
            what = "its submission has not shown itself in Slurm yet"
        else:
            what = f"Slurm has no record of job {files.number}"
        if not files.seen.locked:
            if not layout.is_overdue(files.seen, patience_s=self._patience_s):
                state = JobState.RUNNING if files.number is None else JobState.UNREACHABLE
                return JobStatus(state, detail=what)
            if claim("unstarted", directory):
                return JobStatus(JobState.LOST, detail=f"{layout.REASONS['unstarted']} ({what})")
        elif self._seconds_since(job, "unknown") >= self._patience_s:
            return self._given_up(directory, files, what)
        return JobStatus(JobState.UNREACHABLE, detail=what)

    def _ended(self, job: JobHandle, directory: int, files: _Files, found: SlurmJob, *, is_down: bool) -> JobStatus:
        """Return what became of a job that Slurm has ended and that has told no exit status."""
        what = f"Slurm has ended it: {found.state}"
        if not files.seen.locked:
            # Whoever makes the lock proves that the job never starts; patience is for what may still show itself.
            hopeless = found.state not in _ENDED_BY_ITSELF
            overdue = layout.is_overdue(files.seen, patience_s=self._patience_s)
            if (hopeless or overdue) and claim("unstarted", directory):
                return JobStatus(JobState.LOST, detail=f"{layout.REASONS['unstarted']} ({what})")
            return JobStatus(JobState.RUNNING, detail=f"{what}, nothing of it is seen here yet")
        # A node that does not answer cannot have told Slurm that it killed the job.
        if found.state == "NODE_FAIL" or (is_down and found.state not in _ENDED_BY_ITSELF):
            return self._given_up(directory, files, f"{what}, {found.node or 'its node'} does not answer")
        if self._seconds_since(job, "ended") < self._settle_s:
            return JobStatus(JobState.RUNNING, detail=f"{what}, its exit status is not here yet")
        reason = layout.REASONS.get(files.seen.ended, files.seen.ended)
        return JobStatus(JobState.LOST, detail=f"{reason} ({what})" if reason else what)

    def _given_up(self, directory: int, files: _Files, what: str) -> JobStatus:
        """Tell a job to end that Slurm cannot end any more; it is dead at the latest when its lease has run out."""
        write_once(layout.ENDED, f"{what}\n", directory)
        if self._lease_is_over(files):
            return JobStatus(JobState.LOST, detail=f"{what}; {layout.REASONS['lease']}")
        return JobStatus(JobState.UNREACHABLE, detail=f"{what}; it ends itself at the latest when its lease runs out")

    def renew_lease(self, job: JobHandle, until: datetime) -> None:
        """Replace the lease by one rename. Raises FatalError if there is no job directory."""
        self._check(job)
        self._files.renew_lease(job, until)

    def output(self, job: JobHandle) -> str:
        """Return the last mebibyte of the job's terminal output, '' if there is none yet."""
        self._check(job)
        return self._files.output(job)

    def directory(self, job: JobHandle) -> Path:
        """Return the job directory's path. Raises FatalError if the handle cannot be one of ours."""
        self._check(job)
        return self._files.path(job)

    def fetch(self, job: JobHandle, tell: Callable[[int, int], None]) -> Path:
        """Return the job directory: the work area is shared."""
        return self.directory(job)

    def cancel(self, job: JobHandle) -> None:
        """Let the wrapper end the job, and keep one that waits in Slurm from starting; return at once.

        A job that was never launched is closed: its lock is claimed (in a directory of its own if it was not even
        prepared). What does not end in time is left to Slurm's own way of killing when this is called again.
        """
        self._check(job)
        with self._files.trouble(job, "cancel"):
            with self._files.opened(job) as directory:
                prepared = directory is not None
            if not prepared:
                self._files.prepare(job, {})
            with self._files.opened(job) as directory:
                if directory is None:
                    raise TransientError(f"{self.directory(job)} was removed while the job was being cancelled")
                files = _look(job, directory)
                if files.seen.exit_code is not None:
                    return
                write(layout.CANCEL, "", directory, durable=True)
                never_starts = claim("cancelled", directory)
                if files.seen.launched is None:
                    return
                gently = not never_starts and self._seconds_since(job, "cancel") <= 2 * self._grace_s
                # The files have said it already, and a job whose lock is claimed ends as soon as it starts: where
                # Slurm does not hear us, this only takes longer.
                with suppress(TransientError, FatalError):
                    found = self._find(job, files.number, directory, asked=time.monotonic())
                    if found and not found.has_ended:
                        self._slurm.cancel(found.number, gently=gently)

    def clean(self, job: JobHandle) -> None:
        """Remove the job directory: out of sight by one rename, then entry by entry; what is gone is fine.

        Raises FatalError if the job is alive, or if what stands under the name is not its directory, TransientError
        if it is not known whether the job lives.
        """
        self._check(job)
        with self._files.trouble(job, "clean"), self._files.opened(job) as directory:
            is_there = directory is not None
        status = self.poll(job) if is_there else JobStatus(JobState.NOT_STARTED)
        if status.state is JobState.RUNNING:
            raise FatalError(f"{self.directory(job)} is of a living job: cancel it, and clean when it is proven dead")
        if status.state is JobState.UNREACHABLE:
            raise TransientError(f"{self.directory(job)} may be of a living job: {status.detail}")
        self._files.remove(job)
        for key in [key for key in self._noticed if key[0] == job.nonce]:
            self._noticed.pop(key, None)

    def _check(self, job: JobHandle) -> None:
        layout.check_handle(job)
        if job.node not in self._nodes:
            raise FatalError(f"{job.work} is a job of {job.node}, but only {', '.join(self._nodes)} is known here")

    def _find(self, job: JobHandle, number: int | None, directory: int, *, asked: float) -> SlurmJob | None:
        """Return what Slurm says of a submitted job, None if it answers but knows nothing; keep its number."""
        found = self._slurm.job(_name_of(job), number, asked=asked)
        if found and number is None:
            write(SLURM_JOB, f"{found.number}\n", directory, durable=True)
        return found

    def _lease_is_over(self, files: _Files) -> bool:
        """Return whether the wrapper has certainly ended the job by itself, even if its node's clock is slow."""
        slack = self._look_interval_s + self._grace_s + self._clock_slack_s
        return files.lease_until is not None and time.time() >= files.lease_until + slack

    def _seconds_since(self, job: JobHandle, what: str) -> float:
        """Return for how long something is known of a job. A daemon that was started anew begins to count anew."""
        now = time.monotonic()
        return now - self._noticed.setdefault((job.nonce, what), now)


def _name_of(job: JobHandle) -> str:
    return f"stagecal-{job.nonce}"


def _active(found: SlurmJob, files: _Files) -> JobStatus:
    """Return what to say of a job that Slurm has not ended."""
    if files.orphaned:
        return JobStatus(JobState.RUNNING, detail="without its wrapper, Slurm's batch script watches what is left")
    if found.state in {"SUSPENDED", "STOPPED"}:
        return JobStatus(JobState.RUNNING, detail=f"suspended in Slurm ({found.reason})")
    if files.seen.wrapper:
        return layout.status_of(replace(files.seen, wrapper_alive=True), patience_s=0)
    if found.state in {"COMPLETING", "STAGE_OUT", "SIGNALING"}:
        return JobStatus(JobState.RUNNING, detail=f"Slurm is ending it ({found.state})")
    if found.state in _WAITING:
        return JobStatus(JobState.RUNNING, detail=f"waiting in Slurm ({found.reason or found.state})")
    return JobStatus(JobState.RUNNING, detail=f"starting on {found.node or 'its node'} ({found.state} in Slurm)")


def _look(job: JobHandle, directory: int) -> _Files:
    """Return what a job's files show.

    The order makes it true though everything moves: a wrapper makes the lock after `launched`, `pid` before `ended`,
    and `exit` last of all.
    """
    # A network file system may deny for half a minute that there is a file which was not there before; a list helps.
    os.listdir(directory)
    locked = exists(layout.LOCK, directory)
    launched = layout.read_launched(read(layout.LAUNCHED, directory))
    exit_code = layout.read_exit(read(layout.EXIT, directory))
    ended = layout.read_ended(read(layout.ENDED, directory))
    wrapper = layout.read_pid(read(layout.PID, directory), job.nonce)
    number = read(SLURM_JOB, directory)
    if number is not None and not _NUMBER.fullmatch(number.strip().encode()):
        raise FatalError(f"the file {SLURM_JOB} says {number[:80]!r}: it was damaged, look at the job by hand")
    lease = (read(layout.LEASE, directory) or "").strip()
    seen = layout.Sighting(
        boot_id=boot_id(),
        uptime_s=uptime_s(),
        locked=locked,
        launched=launched,
        wrapper=wrapper,
        exit_code=exit_code,
        ended=plain(ended),
    )
    return _Files(
        seen=seen,
        number=int(number) if number else None,
        orphaned=exists(ORPHANED, directory),
        lease_until=float(lease) if lease.isascii() and lease.isdecimal() else None,
    )


# --- Slurm's programs ----------------------------------------------------------------------------------------------


class _Slurm:
    """Asks Slurm's programs. One answer of squeue serves all that is asked within a second, and so does its silence."""

    def __init__(self, shell: Shell, timeout_s: float, options: tuple[str, ...]) -> None:
        self._shell = shell
        self._timeout_s = timeout_s
        self._options = options
        self._lock = threading.Lock()
        self._asked = -math.inf
        self._answered = -math.inf
        self._jobs: Sequence[SlurmJob] | TransientError = ()

    def submit(self, *arguments: str, script: bytes) -> Answer:
        """Run sbatch; return its answer. Raises TransientError if its end is not known."""
        with self._lock:
            self._asked = self._answered = -math.inf
        return self._shell.run(_SUBMIT, *self._options, *arguments, stdin=script, timeout_s=_SUBMIT_TIMEOUT_S)

    def check(self) -> None:
        """Raise TransientError if Slurm does not answer."""
        self._queue()

    def programs(self) -> str:
        """Return Slurm's version. Raises TransientError or FatalError if it cannot be told where jobs are submitted."""
        answer = self._shell.run(_PROGRAMS, timeout_s=self._timeout_s)
        if answer.code:
            raise FatalError(f"Slurm's programs cannot be used: {_last_line(answer.errors) or 'sinfo says nothing'}")
        return plain(answer.output.decode(errors="replace"))

    def records(self) -> Finding:
        """Return what knows of jobs that slurmctld has forgotten. That there is nothing makes jobs wait, not fail."""
        try:
            found = self._run(_RECORDS, "sacct").output.decode(errors="replace").strip()
        except TransientError as trouble:
            return Finding("records", False, str(trouble))
        nothing = (
            "neither accounting nor a file of completed jobs: a job that slurmctld has forgotten before it told its "
            "end keeps its slot until its lease is over"
        )
        return Finding("records", True, _RECORDED.get(found, nothing))

    def cancel(self, number: int, *, gently: bool) -> None:
        """Tell a job's batch script to end it, or let Slurm kill all of it. What has ended meanwhile is fine."""
        words = ("--batch", "--signal=TERM") if gently else ()
        self._shell.run(_CANCEL, *words, str(number), timeout_s=self._timeout_s)

    def job(self, name: str, number: int | None, *, asked: float) -> SlurmJob | None:
        """Return the job of this name (and number, if it is known), None if Slurm answers but knows none.

        `asked` (monotonic) is when the caller began: an earlier answer does not prove that there is no such job.
        Raises TransientError if Slurm does not answer.
        """

        def fitting(jobs: Sequence[SlurmJob]) -> SlurmJob | None:
            # Numbers are given anew where Slurm has lost its state; the name is the job's alone.
            return next((job for job in jobs if job.name == name and number in (None, job.number)), None)

        return fitting(self._queue()) or fitting(self._queue(since=asked)) or fitting(self._accounted(name, number))

    def _queue(self, since: float = -math.inf) -> Sequence[SlurmJob]:
        """Return all jobs of ours that slurmctld remembers, by an answer that is a second old at most."""
        with self._lock:
            now = time.monotonic()
            silent = isinstance(self._jobs, TransientError)
            is_old = now >= self._answered + (self._timeout_s if silent else _CACHE_S)
            if is_old or (self._asked < since and not silent):
                self._asked = now
                try:
                    answer = self._run(_QUEUE, "squeue")
                    self._jobs = [_queued(line) for line in _lines(answer) if line.count("|") == 4]
                except TransientError as trouble:
                    self._jobs = trouble
                self._answered = time.monotonic()
            if isinstance(self._jobs, TransientError):
                raise TransientError(str(self._jobs))
            return self._jobs

    def _accounted(self, name: str, number: int | None) -> Sequence[SlurmJob]:
        """Return what the accounting or the file of completed jobs knows; a site may have neither."""
        start = (datetime.now(UTC) - _SEARCHED_BACK).strftime("%Y-%m-%d")
        which = (f"--name={name}", f"--starttime={start}") if number is None else (f"--jobs={number}",)
        answer = self._run(_ACCOUNTED, "sacct", *which)
        return [_completed(line) for line in _lines(answer) if line.count("|") == 3 and line.split("|")[0].isdecimal()]

    def nodes(self) -> Sequence[_Node]:
        """Return all nodes that our jobs may go to. Raises TransientError if Slurm does not answer."""
        partition = _partition_of(self._options)
        words = (f"--partition={partition}",) if partition else ()
        return [_node(line) for line in _lines(self._run(_NODES, "sinfo", *words)) if line.count("|") == 4]

    def is_down(self, node: str) -> bool:
        """Return whether a node (or one of several) does not answer Slurm. Raises TransientError."""
        if not node or "None" in node:
            return False
        found = [_node(line) for line in _lines(self._run(_NODES, "sinfo", f"--nodes={node}")) if line.count("|") == 4]
        return any(one.state.endswith("*") or one.state.strip("~#!%$@^-+*") in {"down", "fail"} for one in found)

    def _run(self, script: str, program: str, *arguments: str) -> Answer:
        try:
            answer = self._shell.run(script, *arguments, timeout_s=self._timeout_s)
        except (TransientError, FatalError) as trouble:
            # A submit host that a person has to look at says nothing about jobs that run.
            raise TransientError(f"Slurm does not answer: {program}: {trouble}") from trouble
        if answer.code:
            words = _last_line(answer.errors) or f"{program} ended with {answer.code}"
            raise TransientError(f"Slurm does not answer: {words}")
        return answer


def _lines(answer: Answer) -> Iterator[str]:
    return map(printable, answer.output.decode("utf-8", errors="replace").splitlines())


def _last_line(errors: bytes) -> str:
    lines = [line.strip() for line in errors.decode("utf-8", errors="replace").splitlines() if line.strip()]
    return plain(lines[-1]) if lines else ""


def _submitted_number(answer: Answer) -> int | None:
    """Return the number that `sbatch --parsable` told, perhaps after words of a site's own."""
    if answer.code:
        return None
    matches = [_NUMBER.fullmatch(line.strip()) for line in answer.output.splitlines()]
    return next((int(match[1]) for match in reversed(matches) if match), None)


def _queued(line: str) -> SlurmJob:
    number, state, reason, node, name = line.split("|")
    return SlurmJob(int(number) if number.isdecimal() else 0, name, state, "" if reason == "None" else reason, node)


def _completed(line: str) -> SlurmJob:
    # "CANCELLED by 1000" tells who did it.
    number, state, node, name = line.split("|")
    return SlurmJob(int(number), name, state.split()[0] if state else "", state, node)


def _node(line: str) -> _Node:
    name, state, load, cores, features = line.split("|")
    try:
        load_per_core = float(load) / max(1, int(cores))
    except ValueError:
        load_per_core = 0.0 if state.startswith("idle") else 1.0
    return _Node(name, state, load_per_core, frozenset(features.split(",")) - {"(null)"})


def _partition_of(options: Sequence[str]) -> str:
    """Return the partition among the options of sbatch, '' if it is the site's default one."""
    found = ""
    # The last one counts, as for sbatch.
    for option, following in zip(options, (*options[1:], ""), strict=False):
        if option in {"-p", "--partition"}:
            found = following
        elif option.startswith("--partition="):
            found = option.partition("=")[2]
        elif option.startswith("-p") and not option.startswith("--"):
            found = option[2:]
    return found
