"""Fetching archived products: only what the archive has gets a name, whatever the server, the disk and archives do.

The script runs as on a node: a process of its own, under this Python and under Python 2.7 where the machine has one.
"""

from __future__ import annotations

import ast
import contextlib
import gzip
import io
import json
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ngas_server import Ngas, ngas_server, unused_address

SCRIPT = Path(__file__).resolve().parents[1] / "templates" / "job" / "fetch_products.py"
MOUS = "member.uid___A001_X12a3_X80e"
MANIFEST = f"{MOUS}.calimage.pipeline_manifest.xml"
AUXILIARY = f"{MOUS}.hifa_calimage.auxproducts.tgz"
TABLES = f"{MOUS}.session_2.caltables.tgz"
CALAPPLY = "uid___A002_Xcf92df_X3453.ms.calapply.txt"
DONE, PERSON, SURROUNDINGS = 0, 1, 5


def pythons() -> Iterator[str]:
    yield sys.executable
    # Old CASA brings a Python 2.7; few machines have one.
    for name in ("python2.7", "python2"):
        path = shutil.which(name)
        if path and subprocess.run([path, "-c", "import zlib"], capture_output=True, check=False).returncode == 0:
            yield path
            return


@pytest.fixture(params=list(pythons()), ids=lambda path: Path(path).name)
def job(request: pytest.FixtureRequest, tmp_path: Path) -> Job:
    directory = tmp_path / "job"
    directory.mkdir()
    return Job(directory, request.param)


@pytest.fixture
def ngas(tmp_path: Path) -> Iterator[Ngas]:
    store = tmp_path / "store"
    store.mkdir()
    with ngas_server(store) as server:
        yield server


class Job:
    """A job directory, and the script run in it."""

    def __init__(self, directory: Path, python: str) -> None:
        self.directory, self.python = directory, python

    def words(self, **plan: Any) -> list[str]:
        path = self.directory.parent / "plan.json"
        path.write_text(json.dumps({"files": [], "tries": 3, "timeout_s": 5, "pause_s": 0} | plan))
        return [self.python, "-B", "-E", "-S", str(SCRIPT), str(path)]

    def run(self, expected: int, **plan: Any) -> str:
        """Run the script, and return what it printed; of a failure its one line of stderr."""
        done = subprocess.run(
            self.words(**plan), cwd=self.directory, capture_output=True, text=True, timeout=30, check=False
        )
        assert done.returncode == expected, done.stdout + done.stderr
        if expected == DONE:
            assert done.stderr == ""
            return done.stdout
        assert done.stderr.startswith("fetch_products.py: failed: ")
        assert done.stderr.count("\n") == 1, done.stderr
        assert not (self.directory / "fetched.json").exists()
        self.output = done.stdout
        return done.stderr

    def instrumented(self, change: str, **plan: Any) -> subprocess.CompletedProcess[str]:
        """Run the script where `os` has been changed: what the file system does is the machine's, not ours."""
        words = self.words(**plan)
        wrapper = self.directory.parent / "wrapper.py"
        wrapper.write_text(
            f"import os, sys\n{change}\nsys.argv.pop(0)\nexec(compile(open(sys.argv[0]).read(), sys.argv[0], 'exec'))\n"
        )
        words.insert(words.index(str(SCRIPT)), str(wrapper))
        return subprocess.run(words, cwd=self.directory, capture_output=True, text=True, timeout=30, check=False)

    def fetch(self, expected: int, ngas: Ngas | str, *names: str, **plan: Any) -> str:
        address = ngas if isinstance(ngas, str) else ngas.address
        return self.run(expected, ngas=address, files=[entry(name) for name in names], **plan)

    @property
    def products(self) -> Path:
        return self.directory / "products"

    def record(self) -> list[dict[str, Any]]:
        value: list[dict[str, Any]] = json.loads((self.directory / "fetched.json").read_text())
        return value

    def tree(self) -> dict[str, bytes]:
        """Return each file below the job directory, hidden and partial ones included."""
        files = (path for path in self.directory.rglob("*") if path.is_file() and path.name != "fetched.json")
        return {str(path.relative_to(self.directory)): path.read_bytes() for path in sorted(files)}


def entry(name: str, /, **more: Any) -> dict[str, Any]:
    return {"file_id": name, "name": name, "into": "products"} | more


def content(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def tgz(path: Path, members: list[tuple[tarfile.TarInfo, bytes]], **options: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w:gz", **options) as archive:
        for member, data in members:
            archive.addfile(member, io.BytesIO(data))
    return path


def member(
    name: str, data: bytes = b"text", kind: bytes = tarfile.REGTYPE, **more: Any
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.size = len(data) if kind == tarfile.REGTYPE else 0
    info.mode = 0o755
    for key, value in more.items():
        setattr(info, key, value)
    return info, data if info.size else b""


def fill(store: Path) -> None:
    """Put into a store what a restore fetches."""
    (store / MANIFEST).write_text("<piperesults/>\n")
    (store / TABLES).write_bytes(gzip.compress(content(300_000)))
    (store / CALAPPLY).write_text("applycal(...)\n")
    tgz(store / AUXILIARY, [
        member("./", kind=tarfile.DIRTYPE), member("./flux.csv", b"a,b\n"), member("x.flagtemplate.txt"),
        member("tables", kind=tarfile.DIRTYPE), member("tables/deep/table.dat", b"12"), member("empty", b""),
    ])  # fmt: skip


def whole_plan(ngas: Ngas) -> dict[str, Any]:
    return {
        "ngas": ngas.address,
        "files": [entry(MANIFEST), entry(AUXILIARY), entry(TABLES), entry(CALAPPLY)],
        "expand": [{"archive": f"products/{AUXILIARY}", "into": "products", "most_members": 9, "most_bytes": 99}],
        "copies": [{"from": f"products/{MANIFEST}", "to": f"rawdata/{MANIFEST}"}],
        "one_manifest_in": "rawdata",
    }


def whole_tree(store: Path) -> dict[str, bytes]:
    fetched = {f"products/{name}": (store / name).read_bytes() for name in (MANIFEST, AUXILIARY, TABLES, CALAPPLY)}
    return dict(sorted({
        **fetched, "products/flux.csv": b"a,b\n", "products/x.flagtemplate.txt": b"text", "products/empty": b"",
        "products/tables/deep/table.dat": b"12", f"rawdata/{MANIFEST}": fetched[f"products/{MANIFEST}"],
    }.items()))  # fmt: skip


# --- when all is well ------------------------------------------------------------------------------------------------


def test_everything_of_a_plan_is_there_in_the_end_and_nothing_else(ngas: Ngas, job: Job) -> None:
    fill(ngas.directory)
    output = job.run(DONE, **whole_plan(ngas))
    assert job.tree() == whole_tree(ngas.directory)
    tables = (ngas.directory / TABLES).read_bytes()
    assert f"products/{TABLES}: {len(tables)} bytes in " in output
    record = job.record()[2]
    assert record.pop("seconds") >= 0
    assert record == {
        "file_id": TABLES, "name": TABLES, "into": "products", "size": len(tables), "crc32": zlib.crc32(tables),
        "verified": "size and crc32", "source": ngas.address,
    }  # fmt: skip


def test_a_second_run_verifies_and_fetches_nothing(ngas: Ngas, job: Job) -> None:
    fill(ngas.directory)
    job.run(DONE, **whole_plan(ngas))
    before = len(ngas.requests)
    job.run(DONE, **whole_plan(ngas))
    assert [request.command for request in ngas.requests[before:]] == ["STATUS"] * 4
    assert job.tree() == whole_tree(ngas.directory)
    assert job.record()[0]["source"] is None


def test_a_file_gets_the_name_of_the_plan(ngas: Ngas, job: Job) -> None:
    (ngas.directory / MANIFEST).write_bytes(b"<x/>")
    name = MANIFEST.removeprefix("member.")
    job.run(DONE, ngas=ngas.address, files=[{"file_id": MANIFEST, "name": name, "into": "."}])
    assert job.tree() == {name: b"<x/>"}


def test_an_empty_file_is_fetched_too(ngas: Ngas, job: Job) -> None:
    (ngas.directory / "empty").touch()
    job.fetch(DONE, ngas, "empty")
    assert job.tree() == {"products/empty": b""}


@pytest.mark.parametrize("plugin", ["ngamsGenCrc32", "ngamsPlugIns.ngamsGenCrc32", "crc32", "crc32z"])
def test_a_signed_checksum_is_the_same_checksum(ngas: Ngas, job: Job, plugin: str) -> None:
    data = next(data for data in map(content, range(1000, 1100)) if zlib.crc32(data) >= 2**31)
    (ngas.directory / "x").write_bytes(data)
    ngas.signed, ngas.plugin = True, plugin
    job.run(DONE, ngas=ngas.address, files=[entry("x", checksum=str(zlib.crc32(data) - 2**32), size=len(data))])
    assert job.record()[0]["verified"] == "size and crc32"


def test_the_node_of_a_cluster_that_has_the_file_is_asked(ngas: Ngas, job: Job, tmp_path: Path) -> None:
    other_store = tmp_path / "other"
    other_store.mkdir()
    (other_store / "x").write_bytes(b"there")
    with ngas_server(other_store) as other:
        ngas.elsewhere = other.address
        ngas.misbehave("x", "refer", command="STATUS", times=9)
        ngas.misbehave("x", "refer", times=9)
        job.fetch(DONE, ngas, "x")
        assert len(other.retrieved("x")) == 1
    assert job.tree() == {"products/x": b"there"}


def test_a_large_file_tells_every_ten_seconds_how_far_it_is(ngas: Ngas, job: Job) -> None:
    (ngas.directory / "x").write_bytes(content(300_000))
    ngas.bytes_per_second = 600_000
    # A hundred times as fast: monotonic is the clock of Python 3, time that of Python 2.
    faster = "import time\nfor name in ('monotonic', 'time'):\n    real = getattr(time, name, time.time)\n"
    faster += "    setattr(time, name, lambda real=real: 100 * real())\n"
    done = job.instrumented(faster, ngas=ngas.address, files=[entry("x")], timeout_s=60)
    assert done.returncode == DONE, done.stderr
    told = [line for line in done.stdout.splitlines() if line.endswith(" of 300000 bytes")]
    assert 2 <= len(told) <= 8
    assert told == sorted(told, key=lambda line: int(line.split()[1]))


# --- going on where it stopped ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", ["ngas", "standard", "none"])
def test_a_killed_fetch_goes_on_where_it_stopped(ngas: Ngas, job: Job, ranges: Any) -> None:
    data = content(3_000_000)
    (ngas.directory / TABLES).write_bytes(data)
    ngas.bytes_per_second, ngas.ranges = 6_000_000, ranges
    part = job.products / f"{TABLES}.part"
    words = job.words(ngas=ngas.address, files=[entry(TABLES)])
    process = subprocess.Popen(words, cwd=job.directory, stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 10
        while not (part.exists() and part.stat().st_size > 1_000_000) and time.monotonic() < end:
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    there = part.stat().st_size
    assert 1_000_000 < there < len(data)
    assert list(job.tree()) == [f"products/{TABLES}.part"]
    ngas.bytes_per_second = None
    job.fetch(DONE, ngas, TABLES)
    last = ngas.retrieved(TABLES)[-1]
    assert last.offset == there
    assert last.sent == (len(data) if ranges == "none" else len(data) - there)
    assert job.tree() == {f"products/{TABLES}": data}


def test_a_partial_file_that_is_complete_is_not_fetched_again(ngas: Ngas, job: Job) -> None:
    (ngas.directory / "x").write_bytes(b"0123456789")
    job.products.mkdir()
    (job.products / "x.part").write_bytes(b"0123456789")
    job.fetch(DONE, ngas, "x")
    assert not ngas.retrieved("x")
    assert job.tree() == {"products/x": b"0123456789"}


@pytest.mark.parametrize("left", [b"abcde", b"abcdefghij", b"abcdefghijklmnop"])
def test_wrong_bytes_of_an_earlier_run_are_fetched_anew(ngas: Ngas, job: Job, left: bytes) -> None:
    (ngas.directory / "x").write_bytes(b"0123456789")
    job.products.mkdir()
    (job.products / "x.part").write_bytes(left)
    job.fetch(DONE, ngas, "x", tries=1)
    assert job.tree() == {"products/x": b"0123456789"}


@pytest.mark.parametrize("kind", ["wrong part", "no such part"])
def test_a_server_that_goes_on_elsewhere_is_asked_for_all(ngas: Ngas, job: Job, kind: Any) -> None:
    (ngas.directory / "x").write_bytes(b"0123456789")
    job.products.mkdir()
    (job.products / "x.part").write_bytes(b"01234")
    ngas.misbehave("x", kind)
    job.fetch(DONE, ngas, "x")
    assert [request.offset for request in ngas.retrieved("x")] == [5, 0]
    assert job.tree() == {"products/x": b"0123456789"}


def test_tries_are_counted_anew_when_much_has_come(ngas: Ngas, job: Job) -> None:
    data = content(20_000_000)
    (ngas.directory / "x").write_bytes(data)
    ngas.misbehave("x", "break off", bytes=17_000_000)
    job.fetch(DONE, ngas, "x", tries=1)
    assert [request.offset for request in ngas.retrieved("x")] == [0, 17_000_000]
    assert (job.products / "x").read_bytes() == data


KILLED = """
left = [{moment}]
def dying(function):
    def call(*words, **more):
        left[0] -= 1
        if left[0] == 0:
            os._exit(9)
        return function(*words, **more)
    return call
for name in ("open", "rename", "mkdir", "fsync", "listdir", "remove", "unlink", "rmdir"):
    setattr(os, name, dying(getattr(os, name)))
"""


def test_killed_at_any_moment_it_is_completed_by_the_next_run(ngas: Ngas, job: Job) -> None:
    fill(ngas.directory)
    plan, expected = whole_plan(ngas), whole_tree(ngas.directory)
    for moment in range(1, 400, 11):
        done = job.instrumented(KILLED.format(moment=moment), **plan)
        assert done.returncode in (9, DONE), done.stderr
        assert all(data == expected[name] for name, data in job.tree().items() if name in expected)
        job.run(DONE, **plan)
        assert job.tree() == expected, moment
        assert not list(job.directory.rglob(".*"))
        if done.returncode == DONE:
            break
        shutil.rmtree(job.directory)
        job.directory.mkdir()
    else:
        pytest.fail("it never came to its end")
    assert moment > 50


SYNCED = """
synced = set()
fsync, rename = os.fsync, os.rename
def marking(descriptor):
    fsync(descriptor)
    synced.add(os.fstat(descriptor).st_ino)
def asking(old, new):
    if not os.path.isdir(old):
        assert os.stat(old).st_ino in synced, old
    rename(old, new)
    synced.discard(os.stat(os.path.dirname(new) or ".").st_ino)
    renamed.append(new)
renamed = []
os.fsync, os.rename = marking, asking
import atexit
@atexit.register
def directories():
    for new in renamed:
        assert os.stat(os.path.dirname(new) or ".").st_ino in synced, new
    print("%d renamed" % len(renamed))
"""


def test_a_name_is_given_to_what_is_on_the_disk_and_is_on_the_disk_itself(ngas: Ngas, job: Job) -> None:
    fill(ngas.directory)
    done = job.instrumented(SYNCED, **whole_plan(ngas))
    assert (done.returncode, done.stderr) == (DONE, "")
    # Four fetched files, four members at the top, a copy, the record.
    assert done.stdout.endswith("10 renamed\n")


# --- servers that fail -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["STATUS", "RETRIEVE"])
@pytest.mark.parametrize("kind", ["silence", "page", "busy", "gateway", "loop", "garbage", "forbidden"])
def test_a_failed_answer_is_asked_for_again(ngas: Ngas, job: Job, kind: Any, command: str) -> None:
    (ngas.directory / "x").write_bytes(content(5000))
    ngas.misbehave("x", kind, command=command)
    job.fetch(DONE, ngas, "x", timeout_s=0.3)
    assert job.tree() == {"products/x": content(5000)}


def test_a_server_that_always_knows_another_place_is_left(ngas: Ngas, job: Job) -> None:
    (ngas.directory / "x").write_bytes(b"12345")
    ngas.misbehave("x", "circle", times=99)
    assert "redirects in a loop" in job.fetch(SURROUNDINGS, ngas, "x", tries=1)
    assert len(ngas.retrieved("x")) == 6


@pytest.mark.parametrize(
    ("kind", "code", "text"),
    [
        ("silence", SURROUNDINGS, "is silent for 0.2 s"),
        ("busy", SURROUNDINGS, "answers 400: NGAMS_ER_MAX_REQ"),
        ("gateway", SURROUNDINGS, "answers 502: <html>"),
        ("loop", SURROUNDINGS, "redirects in a loop"),
        ("garbage", SURROUNDINGS, "gives no HTTP answer: SSH-2.0"),
        ("page", PERSON, "announces 67 bytes instead of 5000"),
        ("forbidden", PERSON, "answers 403"),
        ("stall", SURROUNDINGS, "is silent for 0.2 s"),
        ("drip", SURROUNDINGS, "is too slow"),
        ("break off", SURROUNDINGS, "breaks off, 4000 bytes before the end"),
        ("go on", PERSON, "sends more than 5000 bytes"),
        ("flip", PERSON, "the checksum (crc32) is "),
        ("announce", PERSON, "announces 1000 bytes instead of 5000"),
    ],
)
def test_a_server_that_does_not_recover_is_an_error(ngas: Ngas, job: Job, kind: Any, code: int, text: str) -> None:
    (ngas.directory / "x").write_bytes(content(5000))
    ngas.ranges = "none"
    ngas.misbehave("x", kind, bytes=1000, times=9)
    message = job.fetch(code, ngas, "x", timeout_s=0.2, tries=2)
    assert text in message
    assert "products/x: " in message
    assert "(2 tries)" in message
    assert len(ngas.retrieved("x")) == 2
    assert set(job.tree()) <= {"products/x.part"}


@pytest.mark.parametrize("kind", ["break off", "stall"])
def test_what_came_before_a_break_is_kept(ngas: Ngas, job: Job, kind: Any) -> None:
    (ngas.directory / "x").write_bytes(content(5000))
    ngas.misbehave("x", kind, bytes=1000)
    job.fetch(DONE, ngas, "x", timeout_s=0.3)
    assert [(request.offset, request.sent) for request in ngas.retrieved("x")][1:] == [(1000, 4000)]
    assert job.tree() == {"products/x": content(5000)}


@pytest.mark.parametrize("kind", ["flip", "announce", "go on"])
def test_what_is_not_as_in_the_archive_is_fetched_again_from_its_beginning(ngas: Ngas, job: Job, kind: Any) -> None:
    (ngas.directory / "x").write_bytes(content(5000))
    ngas.misbehave("x", kind, bytes=1000)
    job.fetch(DONE, ngas, "x")
    assert [request.offset for request in ngas.retrieved("x")] == [0, 0]
    assert job.tree() == {"products/x": content(5000)}


@pytest.mark.parametrize("command", ["STATUS", "RETRIEVE"])
def test_a_file_that_the_archive_does_not_have_is_asked_for_once(ngas: Ngas, job: Job, command: str) -> None:
    for name in ("x", "y"):
        (ngas.directory / name).write_bytes(b"1")
    ngas.misbehave("y", "unavailable", command=command)
    message = job.fetch(PERSON, ngas, "x", "y")
    assert "products/y: the archive does not have it: " in message
    assert "NGAMS_ER_UNAVAIL_FILE" in message
    assert len([request for request in ngas.requests if (request.command, request.file_id) == (command, "y")]) == 1
    # What the archive lacks is known before anything is fetched.
    assert len(ngas.retrieved("x")) == (0 if command == "STATUS" else 1)


def test_nobody_there_is_the_surroundings_failure(job: Job) -> None:
    assert "cannot be reached" in job.fetch(SURROUNDINGS, unused_address(), "x", tries=2)


def test_an_unknown_host_is_the_surroundings_failure(job: Job) -> None:
    # A label of more than 63 letters is no host name anywhere, and no name server has to be asked.
    assert "cannot be reached" in job.fetch(SURROUNDINGS, f"{'a' * 64}.invalid:7777", "x", tries=1)


def test_the_next_server_is_asked_when_one_fails_or_does_not_have_the_file(
    ngas: Ngas, job: Job, tmp_path: Path
) -> None:
    (ngas.directory / "x").write_bytes(b"1")
    empty = tmp_path / "empty"
    empty.mkdir()
    with ngas_server(empty) as other:
        addresses = f"{unused_address()}, {other.address},{ngas.address}"
        job.fetch(DONE, addresses, "x", tries=1)
        assert job.record()[0]["source"] == ngas.address
        # A server that is away may be the one that has it.
        message = job.fetch(SURROUNDINGS, f"{other.address},{unused_address()}", "y", tries=2)
        assert "cannot be reached" in message
        assert "the archive does not have it" in job.fetch(PERSON, f"{other.address},{ngas.address}", "y")


def test_the_time_for_everything_ends_a_fetch(ngas: Ngas, job: Job) -> None:
    (ngas.directory / "x").write_bytes(content(5000))
    ngas.misbehave("x", "stall", bytes=1000, times=9)
    begun = time.monotonic()
    assert "not done within 0.5 s" in job.fetch(SURROUNDINGS, ngas, "x", deadline_s=0.5)
    assert time.monotonic() - begun < 4


# --- what is known of a file -----------------------------------------------------------------------------------------


def test_a_checksum_of_another_kind_is_said_and_the_size_counts(ngas: Ngas, job: Job) -> None:
    (ngas.directory / "x").write_bytes(b"12345")
    ngas.plugin = "crc32c"
    output = job.fetch(DONE, ngas, "x")
    assert "verified: size; a checksum of the kind crc32c cannot be" in output


def test_without_size_and_checksum_a_gzip_file_is_read_to_its_end(ngas: Ngas, job: Job) -> None:
    ngas.tells = frozenset()
    (ngas.directory / "good.tgz").write_bytes(gzip.compress(content(5000)))
    (ngas.directory / "cut.tgz").write_bytes(gzip.compress(content(5000))[:-3])
    job.fetch(DONE, ngas, "good.tgz")
    assert job.record()[0]["verified"] == "size and gzip"
    assert "it is no complete gzip file" in job.fetch(PERSON, ngas, "cut.tgz")
    assert "cut.tgz" not in "".join(job.tree())


def test_what_nobody_knows_the_size_of_is_refused(ngas: Ngas, job: Job) -> None:
    (ngas.directory / "x").write_bytes(b"12345")
    ngas.tells = frozenset()
    ngas.misbehave("x", "announce nothing", times=9)
    assert "does not say how large it is" in job.fetch(PERSON, ngas, "x")


def test_a_server_need_not_announce_what_status_says(ngas: Ngas, job: Job) -> None:
    (ngas.directory / "x").write_bytes(b"12345")
    ngas.misbehave("x", "announce nothing")
    job.fetch(DONE, ngas, "x")
    assert job.tree() == {"products/x": b"12345"}


@pytest.mark.parametrize(
    ("known", "text"), [({"size": 4}, "the size is 4 in the plan, 5 at"), ({"checksum": "7"}, "crc32 is 7")]
)
def test_plan_and_archive_have_to_agree(ngas: Ngas, job: Job, known: dict[str, Any], text: str) -> None:
    (ngas.directory / "x").write_bytes(b"12345")
    assert text in job.run(PERSON, ngas=ngas.address, files=[entry("x", **known)])
    assert not ngas.retrieved("x")


@pytest.mark.parametrize("there", [b"1234", b"54321"])
def test_a_file_that_is_there_and_different_is_not_overwritten(ngas: Ngas, job: Job, there: bytes) -> None:
    (ngas.directory / "x").write_bytes(b"12345")
    job.products.mkdir()
    (job.products / "x").write_bytes(there)
    assert "it is not overwritten" in job.fetch(PERSON, ngas, "x")
    assert job.tree() == {"products/x": there}


@pytest.mark.parametrize("name", ["x", "x.part"])
def test_no_link_is_followed(ngas: Ngas, job: Job, tmp_path: Path, name: str) -> None:
    (ngas.directory / "x").write_bytes(b"12345")
    precious = tmp_path / "precious"
    precious.write_bytes(b"12345" if name == "x" else b"123")
    job.products.mkdir()
    (job.products / name).symlink_to(precious)
    job.fetch(PERSON, ngas, "x")
    assert len(precious.read_bytes()) in (3, 5)
    assert (job.products / name).is_symlink()


# --- space -----------------------------------------------------------------------------------------------------------


def test_where_the_needed_space_is_not_free_nothing_is_asked_for(ngas: Ngas, job: Job) -> None:
    (ngas.directory / "x").write_bytes(b"12345")
    message = job.fetch(SURROUNDINGS, ngas, "x", need_bytes=10**18)
    assert f" bytes are free, {10**18} are needed" in message
    assert not ngas.requests


def test_where_the_files_do_not_fit_nothing_is_fetched(ngas: Ngas, job: Job) -> None:
    for name in ("x", "y"):
        (ngas.directory / name).write_bytes(b"12345")
    ngas.sizes["y"] = 10**17
    assert f" bytes are free, {10**17 + 5} are needed" in job.fetch(SURROUNDINGS, ngas, "x", "y")
    assert not ngas.retrieved("x")


def test_a_full_disk_is_the_surroundings_failure(ngas: Ngas, job: Job) -> None:
    (ngas.directory / "x").write_bytes(b"12345")
    done = job.instrumented(FULL_DISK, ngas=ngas.address, files=[entry("x")])
    assert done.returncode == SURROUNDINGS, done.stderr
    assert "No space left on device" in done.stderr
    job.fetch(DONE, ngas, "x")
    assert job.tree() == {"products/x": b"12345"}


FULL_DISK = """
import errno
def full(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
os.fsync = full
"""


# --- archives --------------------------------------------------------------------------------------------------------


def expansion(most_members: int = 100, most_bytes: int = 100_000, archive: str = "products/a.tgz") -> dict[str, Any]:
    plan = {"archive": archive, "into": "products", "most_members": most_members, "most_bytes": most_bytes}
    return {"expand": [plan]}


GOOD = member("good.txt")
HEADERS = {"format": tarfile.PAX_FORMAT}
UNSAFE: dict[str, tuple[list[tuple[tarfile.TarInfo, bytes]], str]] = {
    "symlink": ([GOOD, member("x", kind=tarfile.SYMTYPE, linkname="../../precious")], "neither a plain file"),
    "hard link": ([GOOD, member("x", kind=tarfile.LNKTYPE, linkname="good.txt")], "neither a plain file"),
    "character device": ([member("x", kind=tarfile.CHRTYPE, devmajor=1, devminor=3)], "neither a plain file"),
    "block device": ([member("x", kind=tarfile.BLKTYPE, devmajor=8)], "neither a plain file"),
    "fifo": ([member("x", kind=tarfile.FIFOTYPE)], "neither a plain file"),
    "contiguous file": ([member("x", kind=tarfile.CONTTYPE)], "neither a plain file"),
    "sparse file": ([member("x", kind=tarfile.GNUTYPE_SPARSE)], "neither a plain file"),
    "unknown kind": ([member("x", kind=b"Z")], "neither a plain file"),
    "sparse file of pax": (
        [member("x", pax_headers={"GNU.sparse.map": "0,4", "GNU.sparse.size": "9", "GNU.sparse.numblocks": "1"})],
        "described in a way",
    ),
    "attributes": ([member("x", pax_headers={"SCHILY.xattr.user.x": "1"})], "described in a way"),
    "parent": ([GOOD, member("../x")], "no path of plain names"),
    "parent below": ([member("a/../../x")], "no path of plain names"),
    "parent directory": ([member("../x", kind=tarfile.DIRTYPE)], "no path of plain names"),
    "absolute": ([member("/tmp/x")], "no path of plain names"),
    "absolute of pax": ([member("x", pax_headers={"path": "/tmp/x"})], "no path of plain names"),
    "twice a slash": ([member("a//x")], "no path of plain names"),
    "hidden": ([member("a/.x")], "no path of plain names"),
    "option": ([member("-rf")], "no path of plain names"),
    "blank": ([member("a b")], "no path of plain names"),
    "newline": ([member("a\nb")], "no path of plain names"),
    "terminal": ([member("a\x1b[2Jb")], "no path of plain names"),
    "not ASCII": ([member("\u00e4")], "no path of plain names"),
    "partial": ([member("x.part")], "no path of plain names"),
    "very deep": ([member("d/" * 30 + "x")], "no path of plain names"),
    "no name": ([member(".")], "without a name"),
    "twice": ([GOOD, GOOD], "good.txt is there twice"),
    "twice in other words": ([GOOD, member("./good.txt")], "good.txt is there twice"),
    "directory twice": ([member("d", kind=tarfile.DIRTYPE)] * 2, "d is there twice"),
    "file and directory": ([GOOD, member("good.txt", kind=tarfile.DIRTYPE)], "good.txt is there twice"),
    "file as directory": ([GOOD, member("good.txt/x")], "good.txt/x is there twice"),
    "directory as file": ([member("d/x"), member("d")], "d is there twice"),
    "too many": ([member(f"m{number}", b"") for number in range(101)], "has more than 100 members"),
    "too large": ([member("m", b"0" * 60_000), member("n", b"0" * 60_000)], "holds more than 100000 bytes"),
}


@pytest.mark.parametrize("case", UNSAFE)
def test_an_unsafe_archive_is_refused_and_leaves_nothing(job: Job, case: str) -> None:
    members, text = UNSAFE[case]
    archive = tgz(job.products / "a.tgz", members, format=tarfile.PAX_FORMAT)
    message = job.run(PERSON, **expansion())
    assert text in message
    assert "products/a.tgz" in message
    assert [path.name for path in job.products.iterdir()] == ["a.tgz"]
    assert sorted(path.name for path in job.directory.parent.iterdir()) == ["job", "plan.json"]
    assert archive.is_file()


def raw_tar(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return whole.getvalue()


TWO = raw_tar(member("one", content(3000)), member("two", content(3000)))
DAMAGED: dict[str, bytes] = {
    "cut at the end": gzip.compress(TWO)[:-4],
    "cut in the middle": gzip.compress(TWO)[:2000],
    "no gzip": TWO,
    "empty": b"",
    "no tar": gzip.compress(b"<html>" * 1000),
    "cut before it was compressed": gzip.compress(TWO[:3072]),
    "cut in a member": gzip.compress(TWO[:5000]),
    "cut in a header": gzip.compress(TWO[: 3584 + 100]),
    "no mark of the end": gzip.compress(TWO[: 2 * 3584]),
    "a damaged header": gzip.compress(TWO[:3584] + b"X" + TWO[3585:]),
    "something after the end": gzip.compress(TWO + b"surplus"),
    "changed": gzip.compress(TWO)[:-8] + bytes(8),
    "a bomb": gzip.compress(bytes(50_000_000)),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_archive_is_refused_and_leaves_nothing(job: Job, case: str) -> None:
    job.products.mkdir()
    (job.products / "a.tgz").write_bytes(DAMAGED[case])
    assert "products/a.tgz" in job.run(PERSON, **expansion())
    assert [path.name for path in job.products.iterdir()] == ["a.tgz"]


def test_a_header_is_not_believed_to_be_large(job: Job) -> None:
    # Python would read it at once, whatever its size is.
    tgz(job.products / "a.tgz", [member("x" * 900_000)], format=tarfile.GNU_FORMAT)
    assert "a header of 900096 bytes" in job.run(PERSON, **expansion(most_bytes=10**9))


def test_a_header_for_all_members_is_refused(job: Job) -> None:
    tgz(job.products / "a.tgz", [GOOD], format=tarfile.PAX_FORMAT, pax_headers={"path": "x"})
    job.run(PERSON, **expansion())
    assert [path.name for path in job.products.iterdir()] == ["a.tgz"]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_what_archives_usually_hold_is_expanded(job: Job, form: int) -> None:
    name = "uid___A002_Xcf92df_X3453.ms.h_applycal.s16_1.tsys.tbl"
    long = f"{'d' * 90}/{'e' * 90}.txt"
    members = [member(name, mtime=1531221286.5), member(long, content(512)), member("d", kind=tarfile.DIRTYPE)]
    tgz(job.products / "a.tgz", members, format=form)
    (job.products / "a.tgz").rename(job.products / "b.tgz")
    job.run(DONE, **expansion(archive="products/b.tgz"))
    tree = job.tree()
    del tree["products/b.tgz"]
    assert tree == {f"products/{long}": content(512), f"products/{name}": b"text"}
    assert (job.products / "d").is_dir()
    # Nothing of the archive says who may do what.
    assert (job.products / name).stat().st_mode & 0o777 == 0o644


def allowing(*patterns: str) -> dict[str, Any]:
    plan = expansion()
    plan["expand"][0]["allowed"] = list(patterns)
    return plan


def test_only_what_is_allowed_is_expanded_and_the_rest_is_named(job: Job) -> None:
    names = ["./flux.csv", "a.flagtemplate.txt", "x.pipeline_manifest.xml", "new/flux.csv", "sc_workdir_1/table.dat"]
    tgz(job.products / "a.tgz", [member("./", kind=tarfile.DIRTYPE), *map(member, names)])
    output = job.run(DONE, **allowing("flux.csv", "*.flag*template.txt", "sc_workdir_*"))
    assert "products/a.tgz: expanded into products, 3 files" in output
    assert "products/a.tgz: of a kind that is not expanded, left in it: new, x.pipeline_manifest.xml" in output
    expanded = {"products/flux.csv", "products/a.flagtemplate.txt", "products/sc_workdir_1/table.dat"}
    assert set(job.tree()) - {"fetched.json"} == {*expanded, "products/a.tgz"}
    assert not (job.products / "new").exists()


@pytest.mark.parametrize("case", ["symlink", "parent", "absolute", "twice", "too many", "too large"])
def test_what_is_not_expanded_is_looked_at_all_the_same(job: Job, case: str) -> None:
    members, text = UNSAFE[case]
    tgz(job.products / "a.tgz", members, format=tarfile.PAX_FORMAT)
    assert text in job.run(PERSON, **allowing("flux.csv"))


def test_what_an_earlier_run_expanded_is_kept_and_the_rest_completed(job: Job) -> None:
    tgz(job.products / "a.tgz", [member("one"), member("d/two"), member("three")])
    (job.products / "d").mkdir()
    (job.products / "d" / "two").write_bytes(b"text")
    (job.products / "one").write_bytes(b"text")
    before = (job.products / "one").stat().st_ino
    job.run(DONE, **expansion())
    assert (job.products / "one").stat().st_ino == before
    assert {"products/one", "products/d/two", "products/three"} < set(job.tree())


@pytest.mark.parametrize("there", ["other", "longer", "directory", "link", "more"])
def test_expanding_overwrites_nothing(job: Job, tmp_path: Path, there: str) -> None:
    tgz(job.products / "a.tgz", [member("first"), member("x/y")])
    other = job.products / "x" / "y"
    other.parent.mkdir()
    match there:
        case "other" | "longer":
            other.write_text("TEXT" if there == "other" else "text and more")
        case "directory":
            other.mkdir()
        case "link":
            (tmp_path / "precious").write_text("text")
            other.symlink_to(tmp_path / "precious")
        case "more":
            other.write_text("text")
            (other.parent / "z").touch()
    before = job.tree()
    assert "products/x is already there and different" in job.run(PERSON, **expansion())
    assert job.tree() == before
    assert not (job.products / "first").exists()


# --- manifests and copies --------------------------------------------------------------------------------------------


def test_a_manifest_that_was_left_over_is_an_error(ngas: Ngas, job: Job) -> None:
    fill(ngas.directory)
    (job.directory / "rawdata").mkdir()
    (job.directory / "rawdata" / "older.pipeline_manifest.xml").touch()
    message = job.run(PERSON, **whole_plan(ngas))
    assert f"exactly one *pipeline_manifest.xml, but has {MANIFEST}, older.pipeline_manifest.xml" in message


def test_no_manifest_is_an_error(job: Job) -> None:
    assert "but has none" in job.run(PERSON, one_manifest_in="rawdata")


def test_a_copy_overwrites_nothing(job: Job) -> None:
    job.products.mkdir()
    (job.products / "a").write_bytes(b"new")
    (job.directory / "b").write_bytes(b"old")
    assert "not the same as products/a" in job.run(PERSON, copies=[{"from": "products/a", "to": "b"}])
    assert (job.directory / "b").read_bytes() == b"old"
    assert "products/c is not there" in job.run(PERSON, copies=[{"from": "products/c", "to": "d"}])


# --- the command of a site -------------------------------------------------------------------------------------------


def command(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "fetch it"
    path.write_text(f"#!/bin/sh\nstore='{tmp_path}/store'\n{text}\n")
    path.chmod(0o755)
    return [str(path), "--from", "the archive"]


def test_the_command_of_the_site_fetches_each_file(ngas: Ngas, job: Job, tmp_path: Path) -> None:
    for name in (CALAPPLY, TABLES):
        (ngas.directory / name).write_bytes(gzip.compress(name.encode()))
    words = command(tmp_path, 'echo "$@" >> "$store/asked"; [ -z "$(ls)" ] && cp "$store/$3" .')
    files = [entry(CALAPPLY), entry(TABLES, name="tables.tgz")]
    job.run(DONE, fetch_command=words, files=files)
    asked = (ngas.directory / "asked").read_text().splitlines()
    assert asked == [f"--from the archive {CALAPPLY}", f"--from the archive {TABLES}"]
    assert sorted(job.tree()) == ["products/tables.tgz", f"products/{CALAPPLY}"]
    assert [record["verified"] for record in job.record()] == ["nothing", "gzip"]
    assert job.record()[0]["source"] == words[0]
    job.run(DONE, fetch_command=words, files=files)
    assert len((ngas.directory / "asked").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ('cp "$store/x" .; touch y', PERSON, "has to leave exactly the file x, but left x, y"),
        ("true", PERSON, "has to leave exactly the file x, but left nothing"),
        ('cp "$store/x" z', PERSON, "but left z"),
        ("mkdir x", PERSON, "x"),
        ('ln -s "$store/x" x', PERSON, "x"),
        ('cp "$store/x" .; exit 3', SURROUNDINGS, "ends with exit code 3 (2 tries)"),
        ("echo wrong > x", PERSON, "the size is 6 bytes instead of 5"),
    ],
)
def test_a_command_that_does_not_do_as_agreed(
    ngas: Ngas, job: Job, tmp_path: Path, text: str, code: int, message: str
) -> None:
    (ngas.directory / "x").write_bytes(b"12345")
    words = command(tmp_path, text)
    assert message in job.run(code, fetch_command=words, files=[entry("x", size=5)], tries=2)
    assert job.tree() == {}
    assert list(job.products.iterdir()) == []


def test_what_a_command_fetched_is_verified_by_what_ngas_says(ngas: Ngas, job: Job, tmp_path: Path) -> None:
    (ngas.directory / "x").write_bytes(b"12345")
    assert "the checksum (crc32) is " in job.fetch(
        PERSON, ngas, "x", fetch_command=command(tmp_path, "printf 54321 > x")
    )
    job.fetch(DONE, ngas, "x", fetch_command=command(tmp_path, "printf 12345 > x"))
    assert not ngas.retrieved("x")


def test_a_command_that_is_not_there_is_for_a_person(job: Job, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    assert "missing cannot be started" in job.run(PERSON, fetch_command=[missing], files=[entry("x")])


def test_a_command_ends_when_the_time_is_over(job: Job, tmp_path: Path) -> None:
    words = command(tmp_path, "exec sleep 20")
    begun = time.monotonic()
    assert "not done within" in job.run(SURROUNDINGS, fetch_command=words, files=[entry("x")], deadline_s=0.4)
    assert time.monotonic() - begun < 5


# --- the plan --------------------------------------------------------------------------------------------------------

BAD_NAMES = [
    "",
    ".",
    "..",
    ".hidden",
    "a/b",
    "/a",
    "../a",
    "a..b",
    "-a",
    "a b",
    "a\n",
    "\u00e4",
    "a.part",
    "a" * 201,
    None,
    7,
]


def read_plan(plan: dict[str, Any]) -> str:
    """Return what the script says of a plan that it refuses; nothing has been done then."""
    script = runpy.run_path(str(SCRIPT))
    with pytest.raises(script["PersonNeeded"]) as refused:
        script["Plan"]({"ngas": "127.0.0.1:1", "files": []} | plan)
    return str(refused.value)


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
@pytest.mark.parametrize("field", ["name", "file_id"])
def test_names_that_are_not_plain_are_refused(field: str, name: Any) -> None:
    message = read_plan({"files": [entry("x", **{field: name})]})
    assert message.startswith(f"the plan: files[0].{field} is ")
    assert "expected a plain file name" in message


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        ({"files": [entry("x", into="..")]}, "files[0].into"),
        ({"files": [entry("x", into="/tmp")]}, "files[0].into"),
        ({"files": [entry("x", into="a/../../b")]}, "files[0].into"),
        ({"files": [entry("x", size=-1)]}, "files[0].size"),
        ({"files": [entry("x", size=True)]}, "files[0].size"),
        ({"files": [entry("x", checksum="d41d8cd98f")]}, "files[0].checksum"),
        ({"files": [entry("x", checksum=2**32)]}, "files[0].checksum"),
        ({"files": [entry("x", md5="0")]}, "md5, which means nothing"),
        ({"files": [{"file_id": "x", "into": "."}]}, "has no name"),
        ({"files": [entry("x"), entry("y", name="x")]}, "two files would get the name products/x"),
        ({"files": [entry("x")], "ngas": None}, "neither ngas nor fetch_command"),
        ({"files": {}}, "expected a list"),
        ({"ngas": "http://archive/"}, "expected host:port"),
        ({"ngas": "archive:70000"}, "expected host:port"),
        ({"ngas": "archive:7777\r\nX: y"}, "expected host:port"),
        ({"fetch_command": "get it"}, "fetch_command"),
        ({"fetch_command": []}, "fetch_command"),
        ({"tries": 0}, "tries"),
        ({"timeout_s": "60"}, "timeout_s"),
        ({"deadline_s": -1}, "deadline_s"),
        ({"need_bytes": 1.5}, "need_bytes"),
        ({"expand": [{"archive": "a.tgz", "into": "."}]}, "has no most_members"),
        (
            {"expand": [{"archive": "a", "into": ".", "most_members": 1, "most_bytes": 1, "allowed": [1]}]},
            "a list of shell patterns",
        ),
        ({"copies": [{"from": "a", "to": "../b"}]}, "copies[0].to"),
        ({"one_manifest_in": "/"}, "one_manifest_in"),
        ({"surprise": 1}, "surprise, which means nothing"),
    ],
)
def test_a_bad_plan_is_refused(plan: dict[str, Any], text: str) -> None:
    message = read_plan(plan)
    assert message.startswith("the plan: ")
    assert text in message


def test_a_bad_plan_is_refused_before_anything_is_done(job: Job, ngas: Ngas) -> None:
    (ngas.directory / "x").write_bytes(b"12345")
    files = [entry("x"), entry("y", name="../y")]
    assert "failed: the plan: files[1].name" in job.run(PERSON, ngas=ngas.address, files=files)
    assert job.tree() == {}
    assert not ngas.requests


def test_a_plan_that_is_no_json_is_refused(job: Job) -> None:
    words = job.words()
    Path(words[-1]).write_text("{")
    done = subprocess.run(words, cwd=job.directory, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == PERSON
    assert "cannot be read as a plan" in done.stderr


# --- the script and the server themselves ----------------------------------------------------------------------------


def test_the_python_of_old_casa_can_read_it() -> None:
    source = SCRIPT.read_text()
    source.encode("ascii")
    # What Python 3 would let pass, also where there is no Python 2.
    later = (ast.JoinedStr, ast.AnnAssign, ast.NamedExpr, ast.AsyncFunctionDef, ast.Nonlocal, ast.YieldFrom, ast.Match)
    tree = ast.parse(source)
    imported = set()
    for node in ast.walk(tree):
        assert not isinstance(node, later), f"line {getattr(node, 'lineno', '?')}"
        if isinstance(node, ast.FunctionDef):
            assert node.returns is None
            assert not any(argument.annotation for argument in node.args.args)
            assert not node.args.kwonlyargs
        elif isinstance(node, ast.Raise):
            assert node.cause is None
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module))
    # What Python 3 calls otherwise.
    imported -= {"urllib", "urlparse"}
    assert {name.split(".")[0] for name in imported} <= sys.stdlib_module_names
    assert "pathlib" not in imported


def test_a_person_can_start_the_server(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    port = unused_address().rsplit(":")[1]
    server = subprocess.Popen(
        [sys.executable, str(SCRIPT.parents[2] / "tests" / "ngas_server.py"), str(tmp_path), port],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    with server, contextlib.ExitStack() as at_the_end:
        at_the_end.callback(server.terminate)
        assert server.stdout is not None
        assert f"http://127.0.0.1:{port}/RETRIEVE?file_id=NAME" in server.stdout.readline()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/RETRIEVE?file_id=x", timeout=5) as answer:
            assert answer.read() == b"12345"
