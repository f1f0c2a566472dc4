"""Runs jobs on far nodes, detached from us and from the connection, and finds them again whatever broke.

Promises what nodes_local promises for this machine: a job directory appears whole or not at all; run.sh starts at most
once per directory; no process is signalled that is not proven to be the job's; nothing outside `<work area>/WORK<n>`
is touched. Every verb is one or a few scripts (templates/job/node.sh) in a Shell, and may be repeated.

Fails with TransientError where a node cannot be reached or waiting may help, else with FatalError. A poll of a node
that cannot be reached does not fail: it answers UNREACHABLE.
"""

from __future__ import annotations

import hashlib
import io
import math
import secrets
import tarfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from stagecal.adapters import bulk_transfer
from stagecal.adapters import job_directory as layout
from stagecal.adapters.remote_shell import Answer, Envelope, Finding, HostKeyChangedError, Shell, plain
from stagecal.ports import FatalError, JobHandle, JobState, JobStatus, NodeLoad, TransientError

_FATAL = 70
_SYSTEM_TROUBLE = 74
_TRANSIENT = 75
# What the system says (in the language C) where waiting does not help.
_WAITING_DOES_NOT_HELP = (
    "Permission denied",
    "Operation not permitted",
    "Read-only file system",
    "Not a directory",
    "Is a directory",
    "Too many levels of symbolic links",
    "File name too long",
    "not found",
)


@dataclass(frozen=True)
class Machine:
    """One node: the way to it, its labels, and the ssh program with its options for bulk data (without a host)."""

    shell: Shell
    labels: tuple[str, ...] = ()
    ssh_command: tuple[str, ...] = ()


class _Question:
    """Asks one node for its load in a thread of its own, so that nobody has to wait for a silent one."""

    def __init__(self, ask: Callable[[], bytes]) -> None:
        self.answer = b""
        self.trouble = ""
        self.alarm = False
        self.ended_at = 0.0
        self.asked_at = time.monotonic()
        self.clock_at_asking = time.time()
        self.done = threading.Event()
        self._ask = ask
        threading.Thread(target=self._run, name="node load", daemon=True).start()

    def _run(self) -> None:
        try:
            self.answer = self._ask()
        except (TransientError, FatalError) as error:
            self.trouble = str(error)
            self.alarm = isinstance(error, HostKeyChangedError)
        finally:
            self.ended_at = time.monotonic()
            self.done.set()


class SshNodes:
    """The Nodes port for the machines given by their names; the work area has the same path on each of them.

    `wrapper` and `node_program` are the texts of the job wrapper and of node.sh. `timeout_s` bounds each look at a
    node, and four times that each other verb (the verbs that move data are bounded by their progress). Results are
    brought to `fetch_area` on this machine, or are seen at the same path here if that is None. A node that was silent
    for the whole time-out is not asked for its load again for `rest_s` seconds: each question to a node whose disks
    hang leaves a process there, and costs everybody the time-out.

    A lease is a time of day, so a node whose clock differs by more than `clock_slack_s` seconds from ours gets no job.
    `reserve_bytes` have to stay free in the fetch area, and are free in the work area of a node that `check` approves.
    """

    def __init__(
        self,
        work_area: Path,
        machines: Mapping[str, Machine],
        wrapper: bytes,
        node_program: str,
        *,
        timeout_s: float = 5.0,
        fetch_area: Path | None = None,
        look_interval_s: float = 30.0,
        grace_s: int = 10,
        patience_s: float = 10.0,
        stall_s: float = 300.0,
        rest_s: float = 60.0,
        clock_slack_s: float = 60.0,
        reserve_bytes: int = 0,
    ) -> None:
        self.work_area = work_area
        self._machines = dict(machines)
        self._wrapper = wrapper
        self._program = node_program
        self._timeout_s = timeout_s
        self._fetch_area = fetch_area
        self._look_interval_s = look_interval_s
        self._grace_s = grace_s
        self._patience_s = patience_s
        self._stall_s = stall_s
        self._rest_s = rest_s
        self._clock_slack_s = clock_slack_s
        self._reserve_bytes = reserve_bytes
        self._questions: dict[str, _Question] = {}
        self._questions_lock = threading.Lock()

    # --- the nodes -------------------------------------------------------------------------------------------------

    def loads(self) -> Sequence[NodeLoad]:
        """Return the load average of the last minute per core of each node, all asked at once. Never raises.

        A node that does not answer within the time-out is told as silent. It is neither asked again nor waited for
        while it still owes us an answer.
        """
        with self._questions_lock:
            now = time.monotonic()
            known = dict(self._questions)
            for name in self._machines:
                if name not in known or self._is_settled(known[name], now):
                    self._questions[name] = _Question(self._question(name))
            asked = {name: self._questions[name] for name in self._machines}
        looks = []
        for name, question in asked.items():
            # Another thread may have asked just before: who comes second waits as long as the first.
            patience = question.asked_at + self._timeout_s - time.monotonic()
            if question.done.wait(max(0.0, patience)):
                looks.append(self._load(name, question))
            else:
                looks.append(self._silent(name, f"no answer within {self._timeout_s:g} s"))
        return looks

    def check(self, node: str, casa_homes: Sequence[Path] = (), casa_worker: Path | None = None) -> Sequence[Finding]:
        """Return what was tried on a node: the connection first, then what jobs need of it.

        The clock, the work area, its free space and its locks, the tools, these homes of CASA, and the Python that
        has casatasks (if one is given). Never raises for a node that is configured.
        """
        machine = self._machine(node)
        place = (str(self.work_area), "-", "-", secrets.token_hex(4))
        reserve_kib = math.ceil(self._reserve_bytes / 1024)
        try:
            # Nothing else is asked along: what takes long would hide how far the clock is ahead.
            machine.shell.run("true", timeout_s=4 * self._timeout_s)
            begin = time.time()
            clock = machine.shell.run(self._program, "clock", *place, timeout_s=4 * self._timeout_s)
            end = time.time()
            answer = machine.shell.run(
                self._program,
                *("check", *place, str(reserve_kib), str(casa_worker or "-"), *map(str, casa_homes)),
                timeout_s=4 * self._timeout_s,
            )
        except (TransientError, FatalError) as error:
            return (Finding("connection", False, str(error)),)
        findings = [Finding("connection", True, "the host key is the pinned one, and our key is taken")]
        findings.append(self._clock_finding(clock.output, begin, end))
        for line in answer.output.decode("utf-8", errors="replace").splitlines():
            name, ok, text = [*line.split("\t", 2), "", ""][:3]
            findings.append(Finding(plain(name), ok == "yes", plain(text)))
        if answer.code:
            findings.append(
                Finding("shell", False, plain(_last_words(answer)) or f"the check ended with {answer.code}")
            )
        return findings

    def close(self) -> None:
        """Let go of all connections. Jobs are not touched."""
        for machine in self._machines.values():
            machine.shell.close()

    # --- the verbs -------------------------------------------------------------------------------------------------

    def prepare(self, job: JobHandle, files: Mapping[str, bytes]) -> None:
        """Make the job directory, by one rename of what came whole; the directory of the same job is left as it is.

        Raises FatalError if something else stands under its name, or a file has a name that cannot be.
        """
        self._check(job)
        layout.check_file_names(job, files)
        package = _package({**files, layout.WRAPPER: self._wrapper, layout.NONCE: f"{job.nonce}\n".encode()})
        digest = hashlib.sha256(package).hexdigest()
        # A megabyte a second is less than any node's line has.
        patience = 4 * self._timeout_s + len(package) / 1e6
        self._do(job, "prepare", str(len(package)), digest, stdin=package, timeout_s=patience)

    def launch(self, job: JobHandle, lease_until: datetime) -> None:
        """Start the wrapper, which starts run.sh if nobody claimed the job before. Does not wait for it.

        Raises FatalError if the job was not prepared.
        """
        self._check(job)
        self._do(
            job,
            "launch",
            layout.lease_text(lease_until).strip(),
            " ".join(layout.INHERITED_VARIABLES),
            *layout.launch_arguments(self._look_interval_s, self._grace_s),
        )

    def poll(self, job: JobHandle) -> JobStatus:
        """Return what the job's files and processes say. A launch that came to nothing is closed for ever by it."""
        self._check(job)
        try:
            seen = self._look(job)
            if not seen.locked and layout.is_overdue(seen, patience_s=self._patience_s):
                self._do(job, "rule", "unstarted")
                seen = self._look(job)
        except _UnreachableError as error:
            return JobStatus(JobState.UNREACHABLE, detail=str(error))
        return layout.status_of(seen, patience_s=self._patience_s)

    def renew_lease(self, job: JobHandle, until: datetime) -> None:
        """Replace the lease by one rename. Raises FatalError if there is no job directory."""
        self._check(job)
        self._do(job, "lease", layout.lease_text(until).strip())

    def output(self, job: JobHandle) -> str:
        """Return the last mebibyte of the job's terminal output, '' if there is none yet."""
        self._check(job)
        return layout.decode_output(self._do(job, "output", str(layout.OUTPUT_LIMIT)))

    def directory(self, job: JobHandle) -> Path:
        """Return the job directory's path on the node. Raises FatalError if the handle cannot be one of ours."""
        self._check(job)
        return self.work_area / job.work

    def fetch(self, job: JobHandle, tell: Callable[[int, int], None]) -> Path:
        """Return the job directory where the work area is shared, else a copy of the results on this machine.

        The copy is compared with the node's digests, file by file. Raises TransientError if the transfer broke or
        stood still (what came is used next time), FatalError if there is a link among the results, or a file comes
        differently twice.
        """
        self._check(job)
        if self._fetch_area is None:
            return self.directory(job)
        machine = self._machine(job.node)
        source = bulk_transfer.Source(
            name=f"{job.node}:{self.directory(job)}",
            directory=self.directory(job),
            call=lambda verb, stdin, timeout_s: self._do(job, verb, stdin=stdin, timeout_s=timeout_s),
            send=Envelope(self._program, self._arguments("send", job)),
            ssh_command=machine.ssh_command,
        )
        copy = self._fetch_area / job.work
        bulk_transfer.fetch(source, copy, job.nonce, tell, stall_s=self._stall_s, reserve_bytes=self._reserve_bytes)
        return copy

    def cancel(self, job: JobHandle) -> None:
        """Let the wrapper end the job, or, where it is dead, kill what is left of the job; return at once.

        A job that was never launched is closed: its lock is claimed (in a directory of its own if it was not even
        prepared). Calling this again helps against what escaped the first time.
        """
        self._check(job)
        seen = self._look(job)
        if not seen.exists:
            self.prepare(job, {})
            seen = self._look(job)
        if seen.exit_code is not None:
            return
        if _fields(self._do(job, "cancel")).get("claimed") == "yes":
            return
        if seen.wrapper_alive and seen.wrapper:
            wrapper = seen.wrapper
            self._do(job, "terminate", str(wrapper.pid), str(wrapper.start_time), wrapper.boot_id)
        elif seen.wrapper or layout.is_overdue(seen, patience_s=self._patience_s):
            self._do(job, "kill")

    def clean(self, job: JobHandle) -> None:
        """Remove the job directory, and the copy of its results here; what is gone is fine.

        Raises FatalError if the job is alive, or if what stands under the name is not its directory.
        """
        status = self.poll(job)
        if status.state is JobState.RUNNING:
            raise FatalError(f"{self.directory(job)} is of a living job: cancel it, and clean when it is proven dead")
        if status.state is JobState.UNREACHABLE:
            raise TransientError(f"{self.directory(job)} cannot be cleaned away now: {status.detail}")
        self._do(job, "remove")
        if self._fetch_area is not None:
            bulk_transfer.remove_copy(self._fetch_area / job.work, job.nonce)

    # --- how a verb is done ----------------------------------------------------------------------------------------

    def _check(self, job: JobHandle) -> None:
        layout.check_handle(job)
        self._machine(job.node)

    def _machine(self, node: str) -> Machine:
        try:
            return self._machines[node]
        except KeyError:
            raise FatalError(
                f"the node {node} is not configured: add it again (with the name that it had) until its jobs are gone"
            ) from None

    def _arguments(self, verb: str, job: JobHandle) -> tuple[str, ...]:
        return (verb, str(self.work_area), job.work, job.nonce, secrets.token_hex(4))

    def _do(
        self, job: JobHandle, verb: str, *arguments: str, stdin: bytes = b"", timeout_s: float | None = None
    ) -> bytes:
        """Return the output of a verb on the job's node; its trouble is raised in its own words."""
        shell = self._machine(job.node).shell
        patience = timeout_s or 4 * self._timeout_s
        try:
            answer = shell.run(self._program, *self._arguments(verb, job), *arguments, stdin=stdin, timeout_s=patience)
        except TransientError as error:
            raise _UnreachableError(f"cannot {verb} {job.work}: {error}") from error
        if answer.code == 0:
            return answer.output
        words = _last_words(answer)
        message = f"cannot {verb} {job.work} on {job.node}: {plain(words) or f'node.sh ended with {answer.code}'}"
        if answer.code == _FATAL:
            raise FatalError(message)
        if answer.code == _SYSTEM_TROUBLE and any(reason in words for reason in _WAITING_DOES_NOT_HELP):
            raise FatalError(message)
        raise TransientError(message)

    def _look(self, job: JobHandle) -> layout.Sighting:
        seen = _fields(self._do(job, "look", timeout_s=self._timeout_s))
        try:
            boot_id, uptime_s, survivors = seen["boot"], float(seen["uptime"]), int(seen.get("survivors", "0"))
        except (KeyError, ValueError):
            raise TransientError(f"a look at {job.work} on {job.node} told nothing that can be read") from None
        return layout.Sighting(
            boot_id=boot_id,
            uptime_s=uptime_s,
            exists="exists" not in seen,
            locked="locked" in seen,
            launched=layout.read_launched(seen.get("launched")),
            wrapper=layout.read_pid(seen.get("pid"), job.nonce),
            wrapper_alive="alive" in seen,
            exit_code=layout.read_exit(seen.get("exit")),
            ended=plain(layout.read_ended(seen.get("ended"))),
            survivors=survivors,
        )

    def _question(self, name: str) -> Callable[[], bytes]:
        shell = self._machines[name].shell
        return lambda: shell.ask(self._program, "loads", str(self.work_area), timeout_s=self._timeout_s)

    def _is_settled(self, question: _Question, now: float) -> bool:
        """Return whether the node may be asked again."""
        if not question.done.is_set():
            return False
        was_silent = question.trouble and question.ended_at - question.asked_at >= 0.9 * self._timeout_s
        return not was_silent or now - question.ended_at >= self._rest_s

    def _load(self, name: str, question: _Question) -> NodeLoad:
        if question.trouble:
            return NodeLoad(name, None, self._machines[name].labels, question.trouble, question.alarm)
        words = question.answer.decode("utf-8", errors="replace").split()
        try:
            load, cores, clock = (float(word) for word in words)
            per_core = load / cores
        except (ValueError, ZeroDivisionError):
            return self._silent(name, plain(" ".join(words)) or "it answered nothing")
        if not math.isfinite(per_core):
            return self._silent(name, f"it reports an impossible load ({plain(' '.join(words))})")
        answered_at = question.clock_at_asking + question.ended_at - question.asked_at
        off_s = clock_off(clock, question.clock_at_asking, answered_at)
        labels = self._machines[name].labels
        # What is no number is off, too.
        if not abs(off_s) <= self._clock_slack_s:
            return NodeLoad(name, None, labels, _clock_trouble(off_s), clock_off_s=off_s)
        return NodeLoad(name, per_core, labels, clock_off_s=off_s)

    def _clock_finding(self, output: bytes, begin: float, end: float) -> Finding:
        if not output.strip().isdigit():
            return Finding("clock", False, f"it cannot tell its time: {plain(output.decode(errors='replace'))}")
        off_s = clock_off(float(output), begin, end)
        if abs(off_s) > self._clock_slack_s:
            return Finding("clock", False, _clock_trouble(off_s))
        return Finding("clock", True, f"goes with ours ({off_s:+.0f} s)")

    def _silent(self, name: str, trouble: str) -> NodeLoad:
        return NodeLoad(name, None, self._machines[name].labels, trouble)


class _UnreachableError(TransientError):
    """The node did not answer: what became of the verb is not known."""


def clock_off(told: float, begin: float, end: float) -> float:
    """Return by how many seconds the clock of a node is ahead of ours at least (less than 0: behind), 0 if it may be
    right: it told a time when ours was between `begin` and `end`. All times are seconds since 1970.
    """
    return told - min(max(told, begin), end)


def _clock_trouble(off_s: float) -> str:
    where = "ahead of" if off_s > 0 else "behind"
    return f"its clock is {abs(off_s):.0f} s off: {where} ours, and jobs live by the time of day; let both keep time"


def _fields(output: bytes) -> dict[str, str]:
    """Return name -> value of the lines that node.sh tells."""
    lines = output.decode("ascii", errors="replace").split("\n")
    return {name: value for name, _, value in (line.partition(" ") for line in lines) if name}


def _last_words(answer: Answer) -> str:
    """Return the last errors of a script as they are, what node.sh itself said (the last line) first."""
    lines = [line.strip() for line in answer.errors.decode("utf-8", errors="replace").splitlines() if line.strip()]
    return ": ".join(reversed(lines[-4:]))


def _package(contents: Mapping[str, bytes]) -> bytes:
    """Return a tar file of a job's files, with their modes; `sub/file` brings the directory `sub`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for directory in sorted({path.partition("/")[0] for path in contents if "/" in path}):
            entry = tarfile.TarInfo(directory)
            entry.type = tarfile.DIRTYPE
            entry.mode = 0o750
            tar.addfile(entry)
        for path, content in contents.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(content)
            entry.mode = 0o755 if path.endswith(".sh") else 0o640
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()
