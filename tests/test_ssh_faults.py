"""What breaks between us and the nodes, on real SSH servers: never a second job, never an endless wait, no lost end."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from stagecal.adapters.nodes_ssh import Machine, SshNodes, clock_off
from stagecal.adapters.remote_shell import LEGACY_LABEL, Answer, LocalShell, Shell, run_program
from stagecal.adapters.ssh_openssh import OpenSshShell
from stagecal.adapters.ssh_paramiko import ParamikoShell
from stagecal.ports import FatalError, JobHandle, JobState, JobStatus, TransientError
from tests.ssh_nodes import SshServer, make_key, make_shell, signal_all

CHECKOUT = Path(__file__).resolve().parents[1]
WRAPPER = (CHECKOUT / "templates" / "job" / "wrapper.sh").read_bytes()
NODE_PROGRAM = (CHECKOUT / "templates" / "job" / "node.sh").read_text()
FOREIGN_BOOT = "00000000-0000-4000-8000-000000000000"
LIVE = "echo once >> count; while [ ! -e go ]; do sleep 0.05; done; exit 7"
# What a node of the RHEL5 age has of all that scripts like to use. The envelope of each script needs head.
OLD_USERLAND = (
    *("cat", "chmod", "date", "dd", "env", "find", "grep", "head", "mkdir", "mv", "rm", "setsid", "sh", "sleep"),
    *("tail", "tar", "wc", "xargs"),
)

both_transports = pytest.mark.parametrize("kind", ["paramiko", "openssh"])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[SshServer]:
    server = SshServer(tmp_path / "sshd", "node07").start()
    yield server
    server.stop()


@pytest.fixture
def make(server: SshServer) -> Iterator[Callable[..., Shell]]:
    """A function that makes shells to the server; all are closed at the end."""
    made: list[Shell] = []

    def make_one(kind: str, connect_s: float = 2.0) -> Shell:
        made.append(make_shell(kind, server.target(connect_s=connect_s)))
        return made[-1]

    yield make_one
    server.thaw()
    for shell in made:
        shell.close()


class Bench:
    """Jobs on one node."""

    def __init__(self, area: Path, shell: Shell, *, timeout_s: float = 3.0) -> None:
        area.mkdir()
        self.area = area
        self.shell = shell
        self.nodes = SshNodes(
            area,
            {"node07": Machine(shell, ("casa",))},
            WRAPPER,
            NODE_PROGRAM,
            timeout_s=timeout_s,
            look_interval_s=0.2,
            grace_s=1,
        )
        self.jobs: list[JobHandle] = []

    def prepared(self, script: str) -> JobHandle:
        job = JobHandle("node07", f"WORK{len(self.jobs) + 1}", secrets.token_hex(8))
        self.jobs.append(job)
        self.nodes.prepare(job, {"run.sh": f"#!/bin/sh\n{script}\n".encode()})
        return job

    def launched(self, script: str, lease_s: float = 3600) -> JobHandle:
        job = self.prepared(script)
        self.nodes.launch(job, soon(lease_s))
        return job

    def file(self, job: JobHandle, name: str) -> Path:
        return self.area / job.work / name

    def ended(self, job: JobHandle) -> JobStatus:
        seen: list[JobStatus] = []

        def is_over() -> bool:
            seen.append(self.nodes.poll(job))
            return seen[-1].state is not JobState.RUNNING

        until(is_over, f"the end of {job.work}")
        return seen[-1]


@pytest.fixture
def bench(request: pytest.FixtureRequest, tmp_path: Path, make: Callable[..., Shell], kind: str) -> Iterator[Bench]:
    bench = Bench(tmp_path / "area", make(kind))
    yield bench
    for job in bench.jobs:
        kill_everyone(job)


def launches(bench: Bench, job: JobHandle) -> bool:
    try:
        bench.nodes.launch(job, soon(3600))
    except TransientError:
        return False
    return True


def soon(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


def carriers(nonce: str) -> list[int]:
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


def kill_everyone(job: JobHandle) -> None:
    """End all processes of a job, those that are just being started too."""

    def is_empty() -> bool:
        found = carriers(job.nonce)
        signal_all(found, signal.SIGKILL)
        return not found

    until(is_empty, "the death of the job")


class Timed:
    """Says how long something took."""

    def __enter__(self) -> Timed:
        self._begin = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.monotonic() - self._begin


# --- the connection ------------------------------------------------------------------------------------------------


@both_transports
def test_a_connection_that_dies_in_the_middle_of_a_command_leaves_its_end_unknown(
    server: SshServer, make: Callable[..., Shell], kind: str, tmp_path: Path
) -> None:
    shell = make(kind)
    begun = tmp_path / "begun"
    script = 'echo > "$1"; sleep 20; echo never'
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(shell.run, script, str(begun), timeout_s=15)
        until(begun.exists, "the command to begin")
        with Timed() as timed:
            server.drop_sessions()
            with pytest.raises(TransientError, match=r"node07.*not known"):
                answer.result()
    assert timed.seconds < 5
    assert shell.run("echo again").output == b"again\n"


@both_transports
def test_a_command_that_does_not_end_is_given_up_at_its_deadline(make: Callable[..., Shell], kind: str) -> None:
    shell = make(kind)
    shell.run("true")
    with Timed() as timed, pytest.raises(TransientError, match=r"node07.*no end within 0\.5 s"):
        shell.run("sleep 5", timeout_s=0.5)
    assert timed.seconds < 3


@both_transports
def test_commands_that_never_end_do_not_use_up_the_sessions_of_the_node(make: Callable[..., Shell], kind: str) -> None:
    shell = make(kind)

    def hang(_: int) -> None:
        with pytest.raises(TransientError):
            shell.run("trap '' PIPE HUP; sleep 6", timeout_s=1)

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(hang, range(12)))
    assert shell.run("echo free", timeout_s=5).output == b"free\n"


@both_transports
def test_a_frozen_node_is_noticed_within_the_deadline_and_used_again_when_it_thaws(
    server: SshServer, make: Callable[..., Shell], kind: str
) -> None:
    shell = make(kind, connect_s=1)
    assert shell.run("echo here").output == b"here\n"
    server.freeze()
    with Timed() as timed, pytest.raises(TransientError, match="node07"):
        shell.run("echo late", timeout_s=1.5)
    assert timed.seconds < 5
    with Timed() as timed, pytest.raises(TransientError, match="node07"):
        shell.run("echo later", timeout_s=3)
    assert timed.seconds < 5
    server.thaw()
    assert shell.run("echo back").output == b"back\n"


@both_transports
def test_a_banner_that_never_arrives_is_waited_for_as_long_as_configured(server: SshServer, kind: str) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(5)
        shell = make_shell(kind, replace(server.target(connect_s=1), port=silent.getsockname()[1]))
        with Timed() as timed, pytest.raises(TransientError, match="node07"):
            shell.run("true", timeout_s=10)
        shell.close()
    assert timed.seconds < 5


@both_transports
def test_a_node_that_refuses_connections_is_unreachable_and_nothing_else(bench: Bench, server: SshServer) -> None:
    job = bench.prepared("true")
    server.stop()
    status = bench.nodes.poll(job)
    assert status.state is JobState.UNREACHABLE
    assert "node07" in status.detail
    for act in (
        lambda: bench.nodes.launch(job, soon(60)),
        lambda: bench.nodes.renew_lease(job, soon(60)),
        lambda: bench.nodes.output(job),
        lambda: bench.nodes.cancel(job),
        lambda: bench.nodes.clean(job),
    ):
        with pytest.raises(TransientError, match="node07"):
            act()
    (load,) = bench.nodes.loads()
    assert load.load_per_core is None
    assert "node07" in load.trouble


@pytest.mark.parametrize("kind", ["paramiko", "openssh"])
def test_a_changed_host_key_is_an_alarm_that_names_the_node_and_nothing_is_sent(
    server: SshServer, make: Callable[..., Shell], kind: str, tmp_path: Path
) -> None:
    server.pin(make_key(tmp_path / "other", "ed25519"))
    pinned = server.known_hosts.read_bytes()
    ran = tmp_path / "ran"
    with pytest.raises(FatalError, match=r"node07: ALARM.*another host key"):
        make(kind).run('echo > "$1"', str(ran))
    assert server.known_hosts.read_bytes() == pinned
    assert not ran.exists()


@both_transports
def test_an_unknown_host_key_is_refused_and_never_added(
    server: SshServer, make: Callable[..., Shell], kind: str
) -> None:
    server.known_hosts.write_text("")
    for _ in range(2):
        with pytest.raises(FatalError, match=r"node07: the host key of .* is not in"):
            make(kind).run("true")
    assert server.known_hosts.read_text() == ""


@both_transports
def test_a_refused_key_and_a_missing_file_are_for_a_person(
    server: SshServer, make: Callable[..., Shell], kind: str
) -> None:
    with pytest.raises(FatalError, match=r"node07.*set \[cluster\] ssh_key"):
        make_shell(kind, replace(server.target(), key=server.directory / "nothing")).run("true")
    with pytest.raises(FatalError, match=r"node07.*set \[cluster\] known_hosts"):
        make_shell(kind, replace(server.target(), known_hosts=server.directory / "nothing")).run("true")
    (server.directory / "authorized_keys").write_text("")
    with pytest.raises(FatalError, match=r"node07: 127\.0\.0\.1 refuses our key"):
        make(kind).run("true")


@both_transports
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602])
def test_a_key_that_others_may_read_or_write_is_not_used(
    server: SshServer, tmp_path: Path, kind: str, mode: int
) -> None:
    key = tmp_path / "key"
    shutil.copyfile(server.key, key)
    key.chmod(mode)
    shell = make_shell(kind, replace(server.target(), key=key))
    try:
        with pytest.raises(FatalError, match=rf"node07: the private key .*has mode {mode:04o}.*run: chmod 600 {key}"):
            shell.run("true")
        key.chmod(0o400)
        assert shell.run("echo in").output == b"in\n"
    finally:
        shell.close()


@both_transports
def test_a_host_or_user_is_never_taken_for_an_option(server: SshServer, kind: str, tmp_path: Path) -> None:
    trap = f"-oProxyCommand=touch {tmp_path}/trapped"
    for target in (replace(server.target(), host=trap), replace(server.target(), user=trap)):
        shell = make_shell(kind, replace(target, connect_s=1))
        with pytest.raises((TransientError, FatalError)):
            shell.run("true", timeout_s=3)
        shell.close()
    assert not (tmp_path / "trapped").exists()


def test_a_node_of_the_rhel5_age_is_reached_by_the_ssh_program_and_only_with_its_label(tmp_path: Path) -> None:
    server = SshServer(tmp_path / "sshd", "old", legacy=True).start()
    labelled = OpenSshShell(server.target(LEGACY_LABEL))
    try:
        with pytest.raises(FatalError, match=f'transport = "openssh" and the label "{LEGACY_LABEL}"'):
            ParamikoShell(server.target(LEGACY_LABEL)).run("true")
        with pytest.raises(FatalError, match=f'give it the label "{LEGACY_LABEL}"'):
            OpenSshShell(server.target("rhel5")).run("true")
        assert labelled.run("echo old").output == b"old\n"
    finally:
        labelled.close()
        server.stop()


@both_transports
def test_five_megabytes_of_errors_block_nothing(make: Callable[..., Shell], kind: str) -> None:
    shell = make(kind)
    answer = shell.run("head -c 5000000 /dev/zero | tr '\\0' e >&2; head -c 5000000 /dev/zero; exit 3", timeout_s=20)
    assert (answer.code, answer.output) == (3, bytes(5_000_000))
    assert 0 < len(answer.errors) < 1_000_000
    assert set(answer.errors) == {ord("e")}


@both_transports
def test_a_megabyte_of_input_arrives_whole_while_output_is_written(make: Callable[..., Shell], kind: str) -> None:
    content = os.urandom(4_000_000)
    assert make(kind).run("cat", stdin=content, timeout_s=20) == Answer(0, content, b"")


@pytest.mark.parametrize("code", [0, 1, 126, 255])
@both_transports
def test_the_code_of_a_script_is_never_mixed_up_with_that_of_the_connection(
    make: Callable[..., Shell], kind: str, code: int
) -> None:
    assert make(kind).run('echo "$2"; exit "$1"', str(code), "a 'b' $HOME\n!\\") == Answer(
        code, b"a 'b' $HOME\n!\\\n", b""
    )


@both_transports
def test_what_login_files_print_does_not_disturb(server: SshServer, make: Callable[..., Shell], kind: str) -> None:
    (server.directory / "home" / ".bashrc").write_text("echo Welcome to the node; echo 'Disk quota: fine'\n")
    shell = make(kind)
    assert shell.run("echo clean").output == b"clean\n"
    assert shell.ask("while read -r question; do echo answer; done") == b"answer"


@both_transports
def test_more_commands_at_once_than_a_server_has_sessions_wait_for_each_other(
    make: Callable[..., Shell], kind: str
) -> None:
    shell = make(kind)
    with ThreadPoolExecutor(25) as pool:
        answers = list(pool.map(lambda number: shell.run("sleep 0.1; echo $1", str(number)).output, range(25)))
    assert answers == [f"{number}\n".encode() for number in range(25)]


@both_transports
def test_a_question_is_asked_again_on_a_new_connection_when_the_old_one_is_dead(
    server: SshServer, make: Callable[..., Shell], kind: str
) -> None:
    shell = make(kind)
    counting = "n=0; while read -r question; do n=$((n + 1)); echo $n; done"
    assert [shell.ask(counting), shell.ask(counting)] == [b"1", b"2"]
    server.drop_sessions()
    assert shell.ask(counting) == b"1"
    server.stop()
    with pytest.raises(TransientError):
        shell.ask(counting, timeout_s=3)
    server.start()
    assert shell.ask(counting) == b"1"


@pytest.mark.parametrize("depth", [1, 70])
def test_closing_leaves_no_process_and_no_directory(
    server: SshServer, monkeypatch: pytest.MonkeyPatch, depth: int
) -> None:
    """However long the name of the directory for temporary files is: that of a socket must be short."""
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        base = Path(short, "t" * depth)
        base.mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(base))
        shell = OpenSshShell(server.target())
        assert shell.ask("while read -r question; do echo answer; done") == b"answer"
        assert shell.run("true").code == 0
        assert len(list(base.iterdir())) == (1 if depth == 1 else 0)
        shell.close()
        assert list(base.iterdir()) == []
    until(lambda: server.sessions() == [], "the end of the connection", 5)


# --- the nodes -----------------------------------------------------------------------------------------------------


@both_transports
def test_a_silent_node_is_told_in_time_and_not_asked_twice(server: SshServer, kind: str, tmp_path: Path) -> None:
    fast = SshServer(tmp_path / "fast", "fast", host="127.0.0.2").start()
    machines = {
        "node07": Machine(make_shell(kind, server.target(connect_s=1)), ("casa",)),
        "fast": Machine(make_shell(kind, fast.target(connect_s=1))),
    }
    nodes = SshNodes(tmp_path, machines, WRAPPER, NODE_PROGRAM, timeout_s=2, rest_s=1)
    try:
        assert [look.trouble for look in nodes.loads()] == ["", ""]
        server.freeze()
        threads = []
        for bound in (2.5, 0.5, 0.5):
            with Timed() as timed:
                silent, other = nodes.loads()
            assert timed.seconds < bound, "a node that owes an answer is not waited for again"
            assert (silent.name, silent.load_per_core, silent.labels) == ("node07", None, ("casa",))
            assert silent.trouble
            assert (other.name, other.trouble) == ("fast", "")
            threads.append(sum(thread.name == "node load" for thread in threading.enumerate()))
        assert max(threads) <= 1
        server.thaw()
        until(lambda: [look.trouble for look in nodes.loads()] == ["", ""], "the node to be back")
    finally:
        server.thaw()
        nodes.close()
        fast.stop()


@both_transports
def test_a_node_that_was_silent_rests_before_it_is_asked_again(
    server: SshServer, make: Callable[..., Shell], kind: str, tmp_path: Path
) -> None:
    nodes = SshNodes(tmp_path, {"node07": Machine(make(kind, 1))}, WRAPPER, NODE_PROGRAM, timeout_s=0.5, rest_s=3600)
    server.freeze()
    with Timed() as timed:
        assert nodes.loads()[0].load_per_core is None
    assert timed.seconds < 1.5
    server.thaw()
    until(lambda: all(thread.name != "node load" for thread in threading.enumerate()), "the end of the question")
    with Timed() as timed:
        assert nodes.loads()[0].load_per_core is None
    assert timed.seconds < 0.2


def test_the_shell_of_this_machine_keeps_its_word_too() -> None:
    shell = LocalShell({"PATH": os.environ["PATH"], "ONLY": "this"}, "submit host")
    assert shell.run('cat; echo "$1$ONLY"; echo e >&2; exit 255', "a b ", stdin=b"in ") == Answer(
        255, b"in a b this\n", b"e\n"
    )
    assert shell.run("kill -s TERM $$").code == 128 + signal.SIGTERM
    with Timed() as timed, pytest.raises(TransientError, match=r"submit host: no end within 0\.3 s"):
        shell.run("sleep 20 & sleep 20", timeout_s=0.3)
    assert timed.seconds < 3
    counting = "n=0; while read -r question; do n=$((n + 1)); echo $n; done"
    assert [shell.ask(counting), shell.ask(counting)] == [b"1", b"2"]
    shell.close()
    with pytest.raises(TransientError, match="submit host"):
        shell.ask("exec sleep 20", timeout_s=0.3)
    assert shell.ask(counting) == b"1"
    shell.close()


def test_thirty_nodes_tell_their_load_over_kept_connections_in_one_round(server: SshServer, tmp_path: Path) -> None:
    """The bound is generous for a busy machine; benchmarks/nodes_round.py gives the real number."""
    machines = {f"node{number:02}": Machine(ParamikoShell(server.target())) for number in range(30)}
    nodes = SshNodes(tmp_path, machines, WRAPPER, NODE_PROGRAM, timeout_s=30)
    try:
        assert {look.trouble for look in nodes.loads()} == {""}
        seconds = []
        for _ in range(5):
            with Timed() as timed:
                looks = nodes.loads()
            seconds.append(timed.seconds)
            assert [look.name for look in looks] == list(machines)
            assert {look.trouble for look in looks} == {""}
        assert min(seconds) < 0.5
    finally:
        nodes.close()


@both_transports
def test_a_node_whose_work_area_is_not_mounted_says_so_and_gets_no_job(bench: Bench) -> None:
    bench.area.rmdir()
    (load,) = bench.nodes.loads()
    assert load.load_per_core is None
    assert "is it mounted?" in load.trouble


def node_here(area: Path, path: Path | None = None) -> SshNodes:
    """Return a node that is this machine with another PATH, without a connection between."""
    return SshNodes(
        area, {"node07": Machine(AnyShell("/bin/sh", path=str(path) if path else None))}, WRAPPER, NODE_PROGRAM
    )


def clock_shim(directory: Path, off_s: int) -> Path:
    """Make a userland whose clock is so many seconds ahead; each look at it is noted in the file `looks`."""
    path = userland(directory, (*OLD_USERLAND, "df"))
    (path / "date").unlink()
    (path / "date").write_text(
        f"#!/bin/sh\necho >> {directory}/looks\necho $(($({shutil.which('date')} +%s) + {off_s}))\n"
    )
    (path / "date").chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("off_s", "words"), [(3600, "3600 s off: ahead of ours"), (-90, "90 s off: behind ours"), (20, ""), (-20, "")]
)
def test_a_node_whose_clock_is_off_gets_no_job_and_is_told(tmp_path: Path, off_s: int, words: str) -> None:
    nodes = node_here(tmp_path, clock_shim(tmp_path / "bin", off_s))
    (load,) = nodes.loads()
    assert load.clock_off_s is not None and abs(load.clock_off_s - off_s) <= 3
    assert (load.load_per_core is None) is bool(words)
    ok, text = findings(nodes)["clock"]
    assert ok is not bool(words)
    for said in (load.trouble, text) if words else ():
        # The seconds of two clocks begin at different moments.
        assert re.sub(r"\d+ s", "", words) in re.sub(r"\d+ s", "", said)
        (seconds,) = re.findall(r"(\d+) s off", said)
        assert abs(int(seconds) - abs(off_s)) <= 3


def test_a_node_without_a_clock_gets_no_job(tmp_path: Path) -> None:
    path = userland(tmp_path / "bin", tuple(name for name in OLD_USERLAND if name != "date"))
    (load,) = node_here(tmp_path, path).loads()
    assert (load.load_per_core, load.clock_off_s) == (None, None)
    assert "cannot tell its time" in load.trouble


def test_the_clock_of_a_node_is_not_asked_by_a_process_at_each_look(tmp_path: Path) -> None:
    path = clock_shim(tmp_path / "bin", 0)
    shell = LocalShell({"PATH": str(path)})
    nodes = SshNodes(tmp_path, {"node07": Machine(shell)}, WRAPPER, NODE_PROGRAM)
    try:
        for _ in range(5):
            (load,) = nodes.loads()
            assert load.trouble == ""
            assert load.clock_off_s is not None and abs(load.clock_off_s) <= 3
    finally:
        nodes.close()
    assert (path / "looks").read_text().count("\n") == 1


@pytest.mark.parametrize(("told", "off_s"), [(95.0, -5.0), (100.0, 0.0), (107.0, 0.0), (110.0, 0.0), (117.0, 7.0)])
def test_the_time_that_a_question_takes_is_not_held_against_a_clock(told: float, off_s: float) -> None:
    assert clock_off(told, 100.0, 110.0) == off_s


RUDE = b"\x1b]0;owned\x07\x1b[2J\xff\xe2\x80\xae" + 1000 * b"spam "


class RudeShell:
    """A node that says what would steer a terminal, and much of it."""

    def run(self, script: str, *arguments: str, stdin: bytes = b"", timeout_s: float | None = None) -> Answer:
        return Answer(75, RUDE + b"\tno\t" + RUDE, RUDE)

    def ask(self, script: str, *arguments: str, timeout_s: float | None = None) -> bytes:
        return RUDE

    def close(self) -> None:
        return


def test_words_of_a_node_reach_people_as_one_printable_line_of_bounded_length(tmp_path: Path) -> None:
    nodes = SshNodes(tmp_path, {"node07": Machine(RudeShell())}, WRAPPER, NODE_PROGRAM)
    job = JobHandle("node07", "WORK1", secrets.token_hex(8))
    with pytest.raises(TransientError) as caught:
        nodes.prepare(job, {"run.sh": b""})
    said = [str(caught.value), nodes.loads()[0].trouble, *(finding.text for finding in nodes.check("node07"))]
    assert len(said) > 3
    for words in said:
        assert words.isprintable() and len(words) < 400, words
    assert any("?]0;owned?" in words for words in said)


@both_transports
def test_what_a_job_wrote_about_its_end_is_told_in_printable_words(bench: Bench) -> None:
    job = bench.launched("true")
    bench.ended(job)
    bench.file(job, "ended").write_bytes(RUDE)
    status = bench.nodes.poll(job)
    assert status.state is JobState.LOST
    assert status.detail.isprintable() and "?]0;owned?" in status.detail and len(status.detail) < 400


# --- jobs ----------------------------------------------------------------------------------------------------------


@both_transports
def test_a_job_outlives_the_connection_and_the_server_and_is_found_again(bench: Bench, server: SshServer) -> None:
    job = bench.launched(LIVE)
    until(bench.file(job, "count").exists, "the job to start")
    server.stop()
    assert bench.nodes.poll(job).state is JobState.UNREACHABLE
    assert carriers(job.nonce)
    server.start()
    assert bench.nodes.poll(job) == JobStatus(JobState.RUNNING)
    bench.nodes.launch(job, soon(3600))
    server.stop()
    bench.file(job, "go").touch()
    until(lambda: not carriers(job.nonce), "the end of the job")
    server.start()
    assert bench.nodes.poll(job) == JobStatus(JobState.EXITED, 7)
    assert bench.file(job, "count").read_text() == "once\n"


@both_transports
def test_a_launch_whose_connection_breaks_at_any_moment_is_repeated_without_a_second_job(
    bench: Bench, server: SshServer
) -> None:
    for delay in (0.0, 0.005, 0.01, 0.02, 0.04):
        job = bench.prepared(LIVE)
        with ThreadPoolExecutor(1) as pool:
            broken = pool.submit(bench.nodes.launch, job, soon(3600))
            time.sleep(delay)
            server.drop_sessions()
            with suppress(TransientError):
                broken.result()
        until(lambda job=job: launches(bench, job), "a launch that succeeds")
        until(bench.file(job, "count").exists, "the job to start")
        bench.file(job, "go").touch()
        assert bench.ended(job) == JobStatus(JobState.EXITED, 7)
        assert bench.file(job, "count").read_text() == "once\n"


@both_transports
def test_a_job_that_cannot_be_reached_ends_itself_when_its_lease_is_over(bench: Bench, server: SshServer) -> None:
    job = bench.launched(LIVE, lease_s=1)
    until(bench.file(job, "count").exists, "the job to start")
    server.stop()
    until(lambda: not carriers(job.nonce), "the end of the lease")
    server.start()
    status = bench.nodes.poll(job)
    assert (status.state, "its lease ran out" in status.detail) == (JobState.LOST, True)


@both_transports
def test_a_node_that_comes_back_from_another_boot_has_lost_the_job(bench: Bench, server: SshServer) -> None:
    job = bench.launched(LIVE)
    until(bench.file(job, "count").exists, "the job to start")
    until(bench.file(job, "pid").exists, "the wrapper's number")
    server.stop()
    kill_everyone(job)
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    for name in ("pid", "launched"):
        text = bench.file(job, name).read_text()
        bench.file(job, name).write_text(text.replace(boot, FOREIGN_BOOT))
    server.start()
    assert bench.nodes.poll(job) == JobStatus(JobState.LOST, detail="its node was started anew")
    bench.nodes.clean(job)
    assert list(bench.area.iterdir()) == []


@both_transports
def test_a_changed_host_key_does_not_make_a_running_job_anything_else(bench: Bench, server: SshServer) -> None:
    job = bench.launched(LIVE)
    server.stop()
    (server.directory / "host_key").unlink()
    make_key(server.directory / "host_key", "ed25519")
    server.start()
    with pytest.raises(FatalError, match="node07: ALARM"):
        bench.nodes.poll(job)
    (load,) = bench.nodes.loads()
    assert "ALARM" in load.trouble
    server.pin()
    assert bench.nodes.poll(job).state is JobState.RUNNING
    bench.nodes.cancel(job)
    assert bench.ended(job).state is JobState.LOST


@both_transports
def test_a_truncated_package_never_becomes_a_job_directory(bench: Bench) -> None:
    job = JobHandle("node07", "WORK1", secrets.token_hex(8))
    for content in (b"", b"x" * 100):
        answer = bench.shell.run(
            *(NODE_PROGRAM, "prepare", str(bench.area), job.work, job.nonce, "token", "10240", "0" * 64),
            stdin=content,
        )
        assert (answer.code, b"did not arrive whole" in answer.errors) == (75, True)
        assert bench.nodes.poll(job).state is JobState.NOT_STARTED
    bench.nodes.prepare(job, {"run.sh": b"true\n"})
    assert [entry.name for entry in bench.area.iterdir()] == [job.work]


# --- old nodes, and other shells -----------------------------------------------------------------------------------


class AnyShell:
    """Runs scripts here by a given program."""

    def __init__(self, *program: str, path: str | None = None) -> None:
        self._program = program
        self._environment: Mapping[str, str] = {**os.environ, "PATH": path or os.environ["PATH"]}

    def run(self, script: str, *arguments: str, stdin: bytes = b"", timeout_s: float | None = None) -> Answer:
        command = (*self._program, "-c", script, "sh", *arguments)
        return run_program(command, stdin=stdin, timeout_s=20, environment=self._environment, who="here")

    def ask(self, script: str, *arguments: str, timeout_s: float | None = None) -> bytes:
        return self.run(script, *arguments, stdin=b"\n").output.rstrip(b"\n")

    def close(self) -> None:
        return


def live_a_whole_life(bench: Bench) -> None:
    """Every verb once, and each end of a job."""
    (load,) = bench.nodes.loads()
    assert (load.trouble, load.load_per_core is not None) == ("", True)
    job = bench.launched(LIVE + "; echo")
    until(bench.file(job, "count").exists, "the job to start")
    bench.nodes.renew_lease(job, soon(3600))
    assert bench.nodes.poll(job) == JobStatus(JobState.RUNNING)
    bench.file(job, "go").touch()
    assert bench.ended(job) == JobStatus(JobState.EXITED, 7)
    assert bench.nodes.output(job) == ""
    cancelled = bench.launched("setsid sleep 300 & sleep 300")
    until(bench.file(cancelled, "pid").exists, "the wrapper")
    bench.nodes.cancel(cancelled)
    assert bench.ended(cancelled).state is JobState.LOST
    orphan = bench.launched(LIVE)
    until(bench.file(orphan, "count").exists, "the job to start")
    os.killpg(int(bench.file(orphan, "pid").read_text().split()[0]), signal.SIGKILL)
    until(lambda: "without its wrapper" in bench.nodes.poll(orphan).detail, "the wrapper's death to be seen")
    bench.nodes.cancel(orphan)
    assert bench.ended(orphan).state is JobState.LOST
    for each in (job, cancelled, orphan):
        bench.nodes.clean(each)
    assert list(bench.area.iterdir()) == []


def userland(directory: Path, names: tuple[str, ...]) -> Path:
    """Make a directory that has these programs and no other."""
    directory.mkdir()
    for name in names:
        found = shutil.which(name)
        assert found, name
        (directory / name).symlink_to(found)
    return directory


def test_jobs_live_with_the_userland_of_the_rhel5_age(tmp_path: Path) -> None:
    path = userland(tmp_path / "bin", OLD_USERLAND)
    server = SshServer(tmp_path / "sshd", "node07", legacy=True, environment=f"PATH={path}").start()
    shell = OpenSshShell(server.target(LEGACY_LABEL))
    try:
        assert shell.run("command -v timeout sync nproc sha256sum python3; echo $PATH").output == f"{path}\n".encode()
        live_a_whole_life(Bench(tmp_path / "area", shell))
    finally:
        shell.close()
        server.stop()


@pytest.mark.parametrize("program", [("bash", "--posix"), ("busybox", "sh"), ("dash",)], ids=lambda words: words[0])
def test_jobs_live_under_any_shell_of_a_node(program: tuple[str, ...], tmp_path: Path) -> None:
    if shutil.which(program[0]) is None:
        pytest.skip(f"needs the program {program[0]}")
    live_a_whole_life(Bench(tmp_path / "area", AnyShell(*program)))


def test_a_node_without_grep_does_not_prove_a_job_dead(tmp_path: Path) -> None:
    path = userland(tmp_path / "bin", tuple(name for name in OLD_USERLAND if name != "grep"))
    bench = Bench(tmp_path / "area", AnyShell("/bin/sh"))
    job = bench.launched(LIVE)
    until(bench.file(job, "pid").exists, "the wrapper")
    os.killpg(int(bench.file(job, "pid").read_text().split()[0]), signal.SIGKILL)
    crippled = SshNodes(bench.area, {"node07": Machine(AnyShell("/bin/sh", path=str(path)))}, WRAPPER, NODE_PROGRAM)
    try:
        with pytest.raises((TransientError, FatalError), match="grep"):
            crippled.poll(job)
    finally:
        kill_everyone(job)


# --- what doctor shows ---------------------------------------------------------------------------------------------


def findings(nodes: SshNodes, *homes: Path, worker: Path | None = None) -> dict[str, tuple[bool, str]]:
    return {finding.name: (finding.ok, finding.text) for finding in nodes.check("node07", homes, worker)}


@both_transports
def test_a_check_of_a_good_node_finds_all_well(bench: Bench, tmp_path: Path) -> None:
    home = tmp_path / "casa"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "casa").write_text("#!/bin/sh\n")
    (home / "bin" / "casa").chmod(0o755)
    found = findings(bench.nodes, home)
    assert [name for name, (ok, _) in found.items() if not ok] == []
    assert {"connection", "clock", "shell", "tools", "rsync", "area", "flock", "casa"} <= set(found)
    assert re.search(r"free: \d+ GiB", found["area"][1])
    assert "excludes" in found["flock"][1]
    assert list(bench.area.iterdir()) == []
    assert not findings(bench.nodes, tmp_path)["casa"][0]


def test_a_check_tells_what_a_node_lacks(tmp_path: Path, server: SshServer) -> None:
    path = userland(tmp_path / "bin", (*OLD_USERLAND, "df"))
    nodes = SshNodes(tmp_path, {"node07": Machine(AnyShell("/bin/sh", path=str(path)))}, WRAPPER, NODE_PROGRAM)
    assert findings(nodes)["flock"] == (False, "cannot be tried: neither flock, nor python, nor perl is there")
    assert findings(nodes)["tools"] == (False, "missing: sha256sum")
    assert "by tar" in findings(nodes)["rsync"][1]
    away = SshNodes(tmp_path / "away", {"node07": Machine(AnyShell("/bin/sh"))}, WRAPPER, NODE_PROGRAM)
    assert not findings(away)["area"][0]
    server.stop()
    unreachable = SshNodes(tmp_path, {"node07": Machine(make_shell("openssh", server.target()))}, WRAPPER, NODE_PROGRAM)
    ((name, (ok, _)),) = findings(unreachable).items()
    assert (name, ok) == ("connection", False)


@pytest.mark.parametrize(
    ("shim", "words"),
    [
        ("echo 'flock: 9: Function not implemented' >&2; exit 71", "does not work"),
        ("exit 0", "hold the same lock"),
    ],
)
def test_a_check_finds_locks_that_do_not_exclude(tmp_path: Path, shim: str, words: str) -> None:
    path = userland(tmp_path / "bin", (*OLD_USERLAND, "df"))
    (path / "flock").write_text(f"#!/bin/sh\n{shim}\n")
    (path / "flock").chmod(0o755)
    nodes = SshNodes(tmp_path, {"node07": Machine(AnyShell("/bin/sh", path=str(path)))}, WRAPPER, NODE_PROGRAM)
    ok, text = findings(nodes)["flock"]
    assert (ok, words in text) == (False, True)


def test_a_work_area_with_less_than_the_reserve_is_a_fault(tmp_path: Path) -> None:
    machines = {"node07": Machine(AnyShell("/bin/sh"))}
    disk = os.statvfs(tmp_path)
    nodes = SshNodes(tmp_path, machines, WRAPPER, NODE_PROGRAM, reserve_bytes=2 * disk.f_blocks * disk.f_frsize)
    found = findings(nodes)
    assert not found["area"][0] and "less than reserve_gb" in found["area"][1]
    assert found["flock"][0], "locks are tried all the same"


def test_the_python_with_casatasks_is_tried_on_the_node(tmp_path: Path) -> None:
    (tmp_path / "casatasks").mkdir()
    (tmp_path / "casatasks" / "__init__.py").write_text("raise SystemExit('it takes seconds to import, and is not')")
    worker = tmp_path / "python"
    start = "import sys; sys.path.insert(0, sys.argv.pop()); exec(sys.argv.pop())"
    worker.write_text(f"#!/bin/sh\nexec '{sys.executable}' -c '{start}' \"$4\" '{tmp_path}'\n")
    nodes = node_here(tmp_path)
    assert "worker" not in findings(nodes)
    assert "there is no program" in findings(nodes, worker=worker)["worker"][1]
    worker.chmod(0o755)
    assert findings(nodes, worker=worker)["worker"] == (True, f"{worker} has casatasks")
    (tmp_path / "casatasks" / "__init__.py").unlink()
    (tmp_path / "casatasks").rmdir()
    assert findings(nodes, worker=worker)["worker"] == (False, f"{worker}: it has no casatasks")


@pytest.mark.parametrize("tool", ["flock", "python3", "perl"])
def test_each_tool_that_tries_a_lock_finds_a_good_one(tmp_path: Path, tool: str) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"needs the program {tool}")
    path = userland(tmp_path / "bin", (*OLD_USERLAND, "df"))
    real = subprocess.run(["which", tool], capture_output=True, text=True, check=True).stdout.strip()
    (path / tool).write_text(f'#!/bin/sh\nPATH={os.environ["PATH"]} exec {real} "$@"\n')
    (path / tool).chmod(0o755)
    nodes = SshNodes(tmp_path, {"node07": Machine(AnyShell("/bin/sh", path=str(path)))}, WRAPPER, NODE_PROGRAM)
    ok, text = findings(nodes)["flock"]
    assert (ok, f"tried with {tool}" in text) == (True, True)
