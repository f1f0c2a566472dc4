"""Results come from a node whole or not at all: resumed, watched, compared end to end, by real sshd, rsync and tar."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from stagecal.adapters.bulk_transfer import Source, fetch, read_listing, rsync_command
from stagecal.adapters.nodes_ssh import Machine, SshNodes
from stagecal.adapters.remote_shell import Envelope, LocalShell
from stagecal.adapters.ssh_openssh import ssh_command
from stagecal.ports import FatalError, JobHandle, TransientError
from tests.ssh_nodes import SshServer, command_name, make_shell

CHECKOUT = Path(__file__).resolve().parents[1]
NODE_PROGRAM = (CHECKOUT / "templates" / "job" / "node.sh").read_text()
MEBIBYTE = 1024 * 1024
ODD_NAMES = ("a b", "it's", '"$HOME"', "new\nline", "-n", "back\\slash", "bücher", os.fsdecode(b"\xff\xfe"), "*", "#")
WITHOUT_RSYNC = (
    *("cat", "env", "find", "grep", "head", "mkdir", "mv", "rm", "sh", "sha256sum", "tar", "wc", "xargs", "chmod"),
    "dd",
)

pytestmark = pytest.mark.requires_program("rsync")
both_ways = pytest.mark.parametrize("way", ["rsync", "tar"])


class Gate:
    """A TCP proxy that lets so many bytes come from the server, then none until it is opened; nothing is cut off."""

    def __init__(self, port: int, limit: int) -> None:
        self._port = port
        self._left = limit
        self._opened = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._lines: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def open(self) -> None:
        self._opened.set()

    def close(self) -> None:
        self.open()
        for line in (self._listener, *self._lines):
            with suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
            line.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                far = socket.create_connection(("127.0.0.1", self._port))
                self._lines += [near, far]
                threading.Thread(target=self._pump, args=(near, far, False), daemon=True).start()
                threading.Thread(target=self._pump, args=(far, near, True), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if counted:
                    self._left -= len(data)
                    if self._left < 0:
                        self._opened.wait()
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


@dataclass
class Bench:
    """One ended job on a node, and where its results are brought to."""

    server: SshServer
    area: Path
    fetched: Path
    job: JobHandle
    made: list[SshNodes]

    @property
    def directory(self) -> Path:
        return self.area / self.job.work

    @property
    def copy(self) -> Path:
        return self.fetched / self.job.work

    def nodes(
        self, *, gate: Gate | None = None, stall_s: float = 60.0, shared: bool = False, reserve_bytes: int = 0
    ) -> SshNodes:
        """Return the adapter; with a gate the bulk data has to pass it."""
        target = self.server.target()
        if gate:
            known = self.server.directory / f"known_hosts_{gate.port}"
            known.write_text(self.server.known_hosts.read_text().replace(str(self.server.port), str(gate.port)))
            target = replace(target, port=gate.port, known_hosts=known)
        machine = Machine(make_shell("paramiko", self.server.target()), (), ssh_command(target))
        self.made.append(
            SshNodes(
                self.area,
                {"node07": machine},
                b"",
                NODE_PROGRAM,
                timeout_s=20,
                fetch_area=None if shared else self.fetched,
                stall_s=stall_s,
                reserve_bytes=reserve_bytes,
            )
        )
        return self.made[-1]

    def result(self, name: str, content: bytes) -> Path:
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path


@pytest.fixture
def bench(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Bench]:
    area = tmp_path / "work area 'of' $HOME; exit"
    area.mkdir()
    environment = ""
    if "way" in request.fixturenames and request.getfixturevalue("way") == "tar":
        (tmp_path / "bin").mkdir()
        for name in WITHOUT_RSYNC:
            (tmp_path / "bin" / name).symlink_to(shutil.which(name) or name)
        environment = f"PATH={tmp_path}/bin"
    server = SshServer(tmp_path / "sshd", "node07", environment=environment).start()
    bench = Bench(server, area, tmp_path / "fetched", JobHandle("node07", "WORK1", secrets.token_hex(8)), [])
    bench.nodes().prepare(bench.job, {"run.sh": b"true\n"})
    yield bench
    for nodes in bench.made:
        nodes.close()
    server.stop()


class Told:
    """What the progress was, each time that it was told."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []

    def __call__(self, done: int, total: int) -> None:
        self.steps.append((done, total))


def tree(directory: Path) -> dict[str, bytes | None]:
    """Return path -> content (None for a directory) of the results in a directory."""
    found: dict[str, bytes | None] = {}
    for top in ("products", "auxiliary", "report.json"):
        for path in (directory / top, *sorted((directory / top).rglob("*"))):
            if path.exists():
                found[str(path.relative_to(directory))] = None if path.is_dir() else path.read_bytes()
    return found


def until(condition: Callable[[], bool], what: str, seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for: {what}"
        time.sleep(0.01)


def state(path: Path) -> tuple[int, int]:
    """Return which file it is and when it was written."""
    return path.stat().st_ino, path.stat().st_mtime_ns


def our_children(name: str) -> list[int]:
    """Return our child processes of this name."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):
            found += [pid for pid in map(int, (task / "children").read_text().split()) if command_name(pid) == name]
    return found


def flip_a_byte(path: Path) -> None:
    with path.open("r+b") as file:
        first = file.read(1)
        file.seek(0)
        file.write(bytes([first[0] ^ 1]))


# --- what comes ----------------------------------------------------------------------------------------------------


@both_ways
def test_all_results_come_as_they_are_whatever_their_names(bench: Bench, way: str) -> None:
    for number, name in enumerate(ODD_NAMES):
        bench.result(f"products/X1.ms.split.cal/{name}/{name}", os.urandom(1000 + number))
    bench.result("products/X1.ms.split.cal/table.lock", b"")
    (bench.directory / "products" / "X1.ms.split.cal" / "empty").mkdir()
    bench.result("auxiliary/weblog.tgz", os.urandom(3 * MEBIBYTE))
    os.link(bench.directory / "auxiliary" / "weblog.tgz", bench.directory / "auxiliary" / "again.tgz")
    bench.result("report.json", b"{}")
    bench.result("scratch/large", b"stays there")
    told = Told()
    assert bench.nodes().fetch(bench.job, told) == bench.copy
    assert tree(bench.copy) == tree(bench.directory)
    assert not (bench.copy / "scratch").exists()
    total = sum(len(content) for content in tree(bench.directory).values() if content)
    assert told.steps[-1] == (total, total)
    assert told.steps == sorted(told.steps)


@both_ways
def test_a_job_without_results_brings_nothing(bench: Bench, way: str) -> None:
    told = Told()
    bench.nodes().fetch(bench.job, told)
    assert tree(bench.copy) == {}
    assert told.steps == [(0, 0)]


def test_a_shared_work_area_is_read_where_it_is(bench: Bench) -> None:
    assert bench.nodes(shared=True).fetch(bench.job, Told()) == bench.directory
    assert not bench.fetched.exists()


@both_ways
def test_what_is_here_is_not_brought_again_and_what_the_node_has_no_more_goes(bench: Bench, way: str) -> None:
    bench.result("products/one", b"one")
    gone = bench.result("products/sub/two", b"two")
    nodes = bench.nodes()
    nodes.fetch(bench.job, Told())
    before = state(bench.copy / "products" / "one")
    shutil.rmtree(gone.parent)
    bench.result("products/three", b"three")
    nodes.fetch(bench.job, Told())
    assert tree(bench.copy) == tree(bench.directory)
    assert state(bench.copy / "products" / "one") == before


@pytest.mark.parametrize("kind", ["link to a file", "link to a directory", "link instead of products", "pipe"])
def test_what_is_neither_file_nor_directory_is_refused(bench: Bench, kind: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    products = bench.directory / "products"
    if kind == "link instead of products":
        products.symlink_to(tmp_path)
    else:
        products.mkdir()
        if kind == "pipe":
            os.mkfifo(products / "odd")
        else:
            (products / "odd").symlink_to(tmp_path / "secret" if kind.endswith("file") else tmp_path)
    with pytest.raises(FatalError, match="neither a file nor a directory"):
        bench.nodes().fetch(bench.job, Told())
    assert not bench.copy.exists()


@pytest.mark.parametrize("path", [b"../out", b"/etc/passwd", b"products/../../x", b"products//x", b"./x"])
def test_a_name_that_leads_out_of_the_copy_is_refused(path: bytes) -> None:
    with pytest.raises(FatalError, match="neither a file nor a directory"):
        read_listing(b"rsync 3.2.7\nf 1 " + path + b"\0", "node07")


# --- what goes wrong -----------------------------------------------------------------------------------------------


def test_a_killed_rsync_is_resumed_where_it_was(bench: Bench) -> None:
    bench.result("products/large", os.urandom(24 * MEBIBYTE))
    gate = Gate(bench.server.port, 10 * MEBIBYTE)
    here = bench.copy / "products" / "large"
    with ThreadPoolExecutor(1) as pool:
        broken = pool.submit(bench.nodes(gate=gate).fetch, bench.job, Told())
        until(lambda: here.exists() and here.stat().st_size > 4 * MEBIBYTE, "the first megabytes")
        with pytest.raises(TransientError, match="still being written"):
            bench.nodes().fetch(bench.job, Told())
        for pid in our_children("rsync"):
            descriptors = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
            assert str(bench.copy / "nonce") in descriptors, "an rsync whose daemon died must hold the lock"
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(TransientError, match="rsync ended"):
            broken.result(timeout=20)
    gate.close()
    until(lambda: our_children("rsync") == [], "the end of rsync")
    beginning = here.stat()
    assert 4 * MEBIBYTE < beginning.st_size < 24 * MEBIBYTE
    # The second attempt gets no more bytes than are missing, and a little for the talk.
    second = Gate(bench.server.port, 24 * MEBIBYTE - beginning.st_size + MEBIBYTE)
    told = Told()
    bench.nodes(gate=second, stall_s=5).fetch(bench.job, told)
    second.close()
    assert tree(bench.copy) == tree(bench.directory)
    assert here.stat().st_ino == beginning.st_ino
    assert told.steps[0][0] == beginning.st_size


@pytest.mark.parametrize("way", ["tar"])
def test_a_broken_tar_keeps_the_files_that_came_whole(bench: Bench, way: str) -> None:
    for number in range(6):
        bench.result(f"products/file{number}", os.urandom(4 * MEBIBYTE))
    gate = Gate(bench.server.port, 14 * MEBIBYTE)
    products = bench.copy / "products"

    def whole() -> list[Path]:
        return [path for path in products.glob("file?") if path.stat().st_size == 4 * MEBIBYTE]

    with ThreadPoolExecutor(1) as pool:
        broken = pool.submit(bench.nodes(gate=gate).fetch, bench.job, Told())
        until(lambda: len(whole()) == 3, "the first files")
        for pid in our_children("ssh"):
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(TransientError, match="did not come"):
            broken.result(timeout=20)
    gate.close()
    kept = {path: state(path) for path in whole()}
    assert len(kept) == 3
    bench.nodes().fetch(bench.job, Told())
    assert tree(bench.copy) == tree(bench.directory)
    assert {path: state(path) for path in kept} == kept
    assert sorted(path.name for path in products.iterdir()) == [f"file{number}" for number in range(6)]


@both_ways
def test_a_transfer_that_stands_still_is_broken_off_and_leaves_no_process(bench: Bench, way: str) -> None:
    bench.result("products/large", os.urandom(6 * MEBIBYTE))
    gate = Gate(bench.server.port, 2 * MEBIBYTE)
    # Other tests of this process may keep a connection by the ssh program.
    before = our_children("ssh")
    begin = time.monotonic()
    with pytest.raises(TransientError, match=r"nothing arrived for 2 s|rsync ended"):
        bench.nodes(gate=gate, stall_s=2).fetch(bench.job, Told())
    assert time.monotonic() - begin < 10
    assert our_children("rsync") == [] and set(our_children("ssh")) <= set(before)
    gate.close()
    bench.nodes().fetch(bench.job, Told())
    assert tree(bench.copy) == tree(bench.directory)


@both_ways
def test_a_byte_that_flipped_here_is_found_and_mended(bench: Bench, way: str) -> None:
    bench.result("products/table.f0", os.urandom(MEBIBYTE))
    nodes = bench.nodes()
    nodes.fetch(bench.job, Told())
    flip_a_byte(bench.copy / "products" / "table.f0")
    nodes.fetch(bench.job, Told())
    assert tree(bench.copy) == tree(bench.directory)


def test_a_beginning_that_is_wrong_is_found_and_mended(bench: Bench) -> None:
    content = bench.result("products/table.f0", os.urandom(MEBIBYTE)).read_bytes()
    nodes = bench.nodes()
    nodes.fetch(bench.job, Told())
    here = bench.copy / "products" / "table.f0"
    here.write_bytes(bytes(MEBIBYTE // 2))
    nodes.fetch(bench.job, Told())
    assert here.read_bytes() == content


def test_a_byte_that_flips_at_every_arrival_is_for_a_person(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.result("products/table.f0", b"A" * 1000)
    shim = tmp_path / "shim" / "rsync"
    shim.parent.mkdir()
    real = shutil.which("rsync")
    flip = f"printf B | dd of='{bench.copy}/products/table.f0' conv=notrunc 2>/dev/null"
    shim.write_text(f'#!/bin/sh\n{real} "$@"\ncode=$?\n{flip}\nexit $code\n')
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", f"{shim.parent}:{os.environ['PATH']}")
    with pytest.raises(FatalError, match=r"table\.f0.*came differently twice"):
        bench.nodes().fetch(bench.job, Told())


def test_a_node_that_goes_away_is_transient(bench: Bench) -> None:
    bench.result("products/one", b"one")
    nodes = bench.nodes()
    bench.server.stop()
    with pytest.raises(TransientError, match="node07"):
        nodes.fetch(bench.job, Told())


def test_nothing_is_brought_that_would_use_up_the_reserve(bench: Bench) -> None:
    bench.result("products/one", bytes(3 * MEBIBYTE))
    disk = os.statvfs(bench.area)
    free = disk.f_bavail * disk.f_frsize
    with pytest.raises(
        TransientError, match=r"0\.0 GB have still to come, .* has \d+\.\d GB free, of which \d+\.\d GB"
    ):
        bench.nodes(reserve_bytes=2 * free).fetch(bench.job, Told())
    assert [path.name for path in bench.copy.rglob("*") if path.is_file()] == ["nonce"]
    bench.nodes().fetch(bench.job, Told())
    # What is here already needs no room any more.
    bench.nodes(reserve_bytes=2 * free).fetch(bench.job, Told())
    assert tree(bench.copy) == tree(bench.directory)


def test_progress_is_told_before_the_node_reads_for_its_digests(bench: Bench) -> None:
    """The digests of a large data set take an hour, in which `status` must not look dead."""
    bench.result("products/one", b"one")
    told, at_digest = Told(), []

    def call(verb: str, stdin: bytes, timeout_s: float | None) -> bytes:
        if verb == "digest":
            at_digest.extend(told.steps)
        words = (verb, str(bench.area), bench.job.work, bench.job.nonce, "token")
        return LocalShell().run(NODE_PROGRAM, *words, stdin=stdin, timeout_s=20).output

    words = ("send", str(bench.area), bench.job.work, bench.job.nonce, "token")
    ssh = ssh_command(bench.server.target())
    source = Source("node07", bench.directory, call, Envelope(NODE_PROGRAM, words), ssh)
    fetch(source, bench.copy, bench.job.nonce, told, stall_s=20)
    assert at_digest == [(0, 3)]
    assert told.steps[-1] == (3, 3)
    assert tree(bench.copy) == tree(bench.directory)


# --- whose copy it is ----------------------------------------------------------------------------------------------


def test_a_copy_of_another_job_is_never_touched(bench: Bench) -> None:
    bench.result("products/one", b"one")
    bench.copy.mkdir(parents=True)
    (bench.copy / "nonce").write_text("another-job\n")
    (bench.copy / "data").write_text("data")
    with pytest.raises(FatalError, match="another job"):
        bench.nodes().fetch(bench.job, Told())
    bench.nodes().clean(bench.job)
    assert (bench.copy / "data").read_text() == "data"


def test_a_job_directory_is_never_taken_for_a_copy(bench: Bench) -> None:
    """Where the fetch area is the node's own work area, the job directory has the job's nonce, and the same name."""
    bench.result("products/one", b"one")
    bench.result("scratch/large", b"stays there")
    bench.fetched.symlink_to(bench.area)
    before = sorted(bench.directory.rglob("*"))
    with pytest.raises(FatalError, match="is a job directory"):
        bench.nodes().fetch(bench.job, Told())
    assert sorted(bench.directory.rglob("*")) == before
    assert bench.directory / "run.sh" in before


def test_nothing_is_written_through_a_link_in_the_copy(bench: Bench, tmp_path: Path) -> None:
    bench.result("products/one", b"one")
    nodes = bench.nodes()
    nodes.fetch(bench.job, Told())
    shutil.rmtree(bench.copy / "products")
    outside = tmp_path / "outside"
    outside.mkdir()
    (bench.copy / "products").symlink_to(outside)
    with pytest.raises(FatalError, match="neither a file nor a directory"):
        nodes.fetch(bench.job, Told())
    assert list(outside.iterdir()) == []


def test_cleaning_removes_the_job_and_its_copy(bench: Bench) -> None:
    bench.result("products/one", b"one")
    nodes = bench.nodes()
    nodes.fetch(bench.job, Told())
    nodes.clean(bench.job)
    assert list(bench.area.iterdir()) == []
    assert list(bench.fetched.iterdir()) == []
    nodes.clean(bench.job)


# --- rsync ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "option"), [("3.2.7", "--append-verify"), ("2.6.8", "--inplace")])
def test_an_rsync_of_the_rhel5_age_gets_only_options_that_it_knows(version: str, option: str, tmp_path: Path) -> None:
    source = Source("node07", tmp_path, lambda *_: b"", Envelope("", ()), ("ssh",))
    command = rsync_command(source, tmp_path, version, 60)
    assert option in command
    assert {"--append-verify", "--inplace"} & set(command) == {option}
