"""What the port StagingArea promises, on real disks: nothing half, nothing outside the root, nothing through a link."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from stagecal.adapters.staging_area import FileStagingArea
from stagecal.ports import FatalError, SourceVanishedError, StagedFile, StagingArea, TransientError

A, B, C = (digit * 32 for digit in "abc")
TAR = "uid___A002_Xcf92df_X3453.ms.split.cal.tar"

AREAS = [pytest.param(lambda root: FileStagingArea(root, site="the test"), id="FileStagingArea")]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "preview").mkdir()
    return tmp_path / "preview"


@pytest.fixture(params=AREAS)
def area(request: pytest.FixtureRequest, root: Path) -> FileStagingArea:
    made: FileStagingArea = request.param(root)
    return made


@pytest.fixture
def source(tmp_path: Path) -> Path:
    top = tmp_path / "work" / TAR.removesuffix(".tar")
    (top / "ANTENNA").mkdir(parents=True)
    (top / "table.dat").write_bytes(os.urandom(100_000))
    (top / "ANTENNA" / "table.lock").write_bytes(bytes(325))
    return top


@pytest.fixture
def mount() -> Iterator[Callable[..., None]]:
    """Mount something for one test. Needs root; where CI says that nothing is skipped, it has to work."""
    mounted: list[Path] = []

    def do(*arguments: str | Path) -> None:
        if os.geteuid() != 0:
            pytest.skip("needs root: mounts a file system")
        result = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
        if result.returncode:
            if os.environ.get("CI") == "true":
                pytest.fail(f"cannot mount although CI=true: {result.stderr}")
            pytest.skip(f"needs mount(8): {result.stderr.strip()}")
        mounted.append(Path(arguments[-1]))

    yield do
    for path in reversed(mounted):
        subprocess.run(["umount", "-l", path], check=True)


def published(area: StagingArea, token: str, content: bytes = b"data" * 1000) -> StagedFile:
    area.begin(token)
    file = area.write(token, TAR, content)
    area.publish(token)
    return file


def record(path: Path, sha256: str) -> StagedFile:
    status = path.stat()
    return StagedFile(path.name, status.st_size, sha256, status.st_dev, status.st_ino, status.st_mtime_ns)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def everything(top: Path) -> dict[str, tuple[int, bytes | None]]:
    """Return all that lies below, to show that nothing changed."""
    return {
        str(path.relative_to(top)): (path.lstat().st_ino, path.read_bytes() if path.is_file() else None)
        for path in top.rglob("*")
    }


# --- making and publishing --------------------------------------------------------------------------------------


def test_a_draft_can_be_looked_into_before_it_appears(area: FileStagingArea) -> None:
    area.begin(A)
    area.write(A, "README.txt", b"words")
    assert area.draft(A, "README.txt").read_bytes() == b"words"
    with pytest.raises(FatalError):
        area.draft("../outside", "README.txt")


def test_nothing_is_seen_before_publish_and_all_of_it_after(area: FileStagingArea, root: Path, source: Path) -> None:
    area.begin(A)
    area.pack(A, TAR, source)
    area.write(A, "README.txt", b"read me")
    area.write(A, "fetch.sh", b"#!/bin/sh\n", executable=True)
    assert not area.is_published(A)
    assert list(area.tokens()) == []
    assert not (root / A).exists()
    assert mode(root / ".incoming") == 0o700
    area.publish(A)
    assert area.is_published(A)
    assert list(area.tokens()) == [A]
    assert list(area.incoming_tokens()) == []
    assert {path.name: mode(path) for path in (root / A).iterdir()} == {
        TAR: 0o444,
        "README.txt": 0o444,
        "fetch.sh": 0o555,
    }
    assert mode(root / A) == 0o755


def test_modes_do_not_depend_on_the_umask(area: FileStagingArea, root: Path) -> None:
    before = os.umask(0o077)
    try:
        published(area, A)
    finally:
        os.umask(before)
    assert (mode(root / A), mode(root / A / TAR)) == (0o755, 0o444)


def test_what_is_returned_is_what_lies_there(area: FileStagingArea, root: Path, source: Path, tmp_path: Path) -> None:
    (tmp_path / "weblog.tgz").write_bytes(os.urandom(10_000))
    area.begin(A)
    made = [
        area.pack(A, TAR, source),
        area.copy(A, "weblog.tgz", tmp_path / "weblog.tgz"),
        area.write(A, "empty", b""),
    ]
    area.publish(A)
    for file in made:
        path = root / A / file.name
        assert file == record(path, hashlib.sha256(path.read_bytes()).hexdigest())
    assert area.files(A) == {file.name: (file.device, file.inode, file.size, file.modified_ns) for file in made}
    assert (root / A / "weblog.tgz").read_bytes() == (tmp_path / "weblog.tgz").read_bytes()


def test_a_packed_directory_has_its_members_below_its_own_name(area: FileStagingArea, root: Path, source: Path) -> None:
    area.begin(A)
    area.pack(A, TAR, source)
    area.publish(A)
    with tarfile.open(root / A / TAR) as tar:
        assert tar.getnames() == [
            source.name,
            f"{source.name}/ANTENNA",
            f"{source.name}/ANTENNA/table.lock",
            f"{source.name}/table.dat",
        ]


def test_publishing_again_is_fine(area: FileStagingArea, root: Path) -> None:
    published(area, A)
    before = everything(root)
    area.publish(A)
    assert everything(root) == before


def test_publishing_what_was_never_begun_is_refused(area: FileStagingArea) -> None:
    with pytest.raises(FatalError, match="nothing was begun"):
        area.publish(A)


def test_publish_refuses_if_it_stands_in_both_places(area: FileStagingArea, root: Path) -> None:
    published(area, A)
    shutil.copytree(root / A, root / ".incoming" / A)
    before = everything(root)
    with pytest.raises(FatalError, match="at once"):
        area.publish(A)
    assert everything(root) == before


def test_a_rename_that_happened_but_reported_an_error_counts_as_done(
    area: FileStagingArea, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def rename_and_fail(*arguments: object, **options: object) -> None:
        rename(*arguments, **options)  # type: ignore[arg-type]  # Whatever the area gives is handed on.
        raise OSError(errno.EIO, "the answer was lost")

    area.begin(A)
    area.write(A, "README.txt", b"x")
    monkeypatch.setattr(os, "rename", rename_and_fail)
    area.publish(A)
    assert area.is_published(A)
    area.withdraw(A)
    assert not area.is_published(A)
    assert list(area.retired_tokens()) == [A]


def test_a_rename_that_failed_is_told_and_leaves_all_as_it_was(
    area: FileStagingArea, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, "stale", A)

    area.begin(A)
    area.write(A, "README.txt", b"x")
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        with pytest.raises(TransientError):
            area.publish(A)
    assert not area.is_published(A)
    area.publish(A)
    assert area.read(A, "README.txt") == b"x"


def test_begin_removes_what_a_broken_attempt_left(area: FileStagingArea, root: Path) -> None:
    area.begin(A)
    area.write(A, "README.txt", b"old")
    (root / ".incoming" / A / "below").mkdir()
    (root / ".incoming" / A / "below" / "x").touch()
    area.begin(A)
    assert list((root / ".incoming" / A).iterdir()) == []


def test_begin_refuses_a_token_that_was_published_or_withdrawn(area: FileStagingArea, root: Path) -> None:
    published(area, A)
    published(area, B)
    area.withdraw(B)
    before = everything(root)
    for token in (A, B):
        with pytest.raises(FatalError, match="used before"):
            area.begin(token)
    assert everything(root) == before


def test_writing_before_begin_is_refused(area: FileStagingArea) -> None:
    with pytest.raises(FatalError, match="not begun"):
        area.write(A, "README.txt", b"x")


def test_a_name_is_given_once_and_the_first_file_stays(area: FileStagingArea) -> None:
    area.begin(A)
    area.write(A, "README.txt", b"first")
    with pytest.raises(FatalError, match="File exists"):
        area.write(A, "README.txt", b"second")
    area.publish(A)
    assert area.read(A, "README.txt") == b"first"


def test_an_unfinished_or_foreign_entry_is_never_published(area: FileStagingArea, root: Path) -> None:
    entries: list[Callable[[Path], object]] = [
        lambda path: path.write_bytes(b"half"),
        lambda path: path.mkdir(),
        lambda path: path.symlink_to("/etc/passwd"),
        os.mkfifo,
    ]
    for number, put in enumerate(entries):
        token = f"{number:032x}"
        area.begin(token)
        put(root / ".incoming" / token / "entry")
        with pytest.raises(FatalError, match="unfinished"):
            area.publish(token)
        assert not area.is_published(token)


def test_what_cannot_be_packed_leaves_nothing(area: FileStagingArea, root: Path, source: Path) -> None:
    (source / "passwd").symlink_to("/etc/passwd")
    area.begin(A)
    with pytest.raises(FatalError, match="neither"):
        area.pack(A, TAR, source)
    assert list((root / ".incoming" / A).iterdir()) == []


def test_copy_takes_plain_files_only(area: FileStagingArea, root: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "link").symlink_to("secret")
    os.mkfifo(tmp_path / "fifo")
    area.begin(A)
    for name in ("link", "fifo", "missing", "."):
        with pytest.raises(FatalError):
            area.copy(A, "flux.csv", tmp_path / name)
    assert list((root / ".incoming" / A).iterdir()) == []


PACK = """
import sys
from pathlib import Path
from stagecal.adapters.staging_area import FileStagingArea
area = FileStagingArea(Path(sys.argv[1]))
area.begin(sys.argv[2])
area.pack(sys.argv[2], "x.tar", Path(sys.argv[3]))
area.publish(sys.argv[2])
"""


def start(script: str, *arguments: str | Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def test_death_in_the_middle_of_pack_publishes_nothing_and_begin_starts_clean(
    area: FileStagingArea, root: Path, source: Path
) -> None:
    os.truncate(source / "table.dat", 20 * 2**30)  # Sparse; it is never packed to its end.
    half = root / ".incoming" / A / "x.tar"
    child = start(PACK, root, A, source)
    try:
        until = time.monotonic() + 30
        while not (half.exists() and half.stat().st_size > 10_000_000):
            assert child.poll() is None
            assert time.monotonic() < until
    finally:
        child.kill()
        child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert list(area.tokens()) == []
    assert list(area.incoming_tokens()) == [A]
    with pytest.raises(FatalError, match="unfinished"):
        area.publish(A)
    area.begin(A)
    assert not half.exists()
    os.truncate(source / "table.dat", 1000)
    area.pack(A, "x.tar", source)
    area.publish(A)
    assert list(area.files(A)) == ["x.tar"]


def test_a_tar_file_that_somebody_damages_while_it_is_written_is_not_taken(
    area: FileStagingArea, root: Path, source: Path
) -> None:
    os.truncate(source / "table.dat", 200_000_000)
    half = root / ".incoming" / A / TAR

    def damage() -> None:
        until = time.monotonic() + 30
        while time.monotonic() < until:
            if half.exists() and half.stat().st_size > 2_000_000:
                os.truncate(half, 0)
                return

    area.begin(A)
    thread = threading.Thread(target=damage)
    thread.start()
    with pytest.raises(FatalError, match="members"):
        area.pack(A, TAR, source)
    thread.join()
    assert not half.exists()


def test_a_full_disk_is_transient_and_leaves_nothing(tmp_path: Path, source: Path, mount: Callable[..., None]) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount("-t", "tmpfs", "-o", "size=2m", "tmpfs", small)
    area = FileStagingArea(small)
    area.begin(A)
    free = area.free_bytes()
    assert 0 < free <= 2 * 2**20
    (source / "table.f1").write_bytes(os.urandom(5_000_000))
    attempts: list[Callable[[], object]] = [
        lambda: area.pack(A, TAR, source),
        lambda: area.copy(A, "weblog.tgz", source / "table.f1"),
        lambda: area.write(A, "README.txt", bytes(5_000_000)),
    ]
    for attempt in attempts:
        with pytest.raises(TransientError, match="No space left on device"):
            attempt()
        assert list((small / ".incoming" / A).iterdir()) == []
        assert area.free_bytes() == free
    (source / "table.f1").unlink()
    area.pack(A, TAR, source)
    area.publish(A)
    assert list(area.files(A)) == [TAR]


def test_a_read_only_disk_is_fatal(tmp_path: Path, mount: Callable[..., None]) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount("-t", "tmpfs", "-o", "size=2m", "tmpfs", small)
    area = FileStagingArea(small)
    area.begin(A)
    subprocess.run(["mount", "-o", "remount,ro", small], check=True)
    with pytest.raises(FatalError, match="Read-only file system"):
        area.write(A, "README.txt", b"x")


# --- reuse by hard link -----------------------------------------------------------------------------------------


def test_a_linked_file_is_the_same_inode_and_outlives_the_first_directory(area: FileStagingArea, root: Path) -> None:
    file = published(area, A)
    area.begin(B)
    linked = area.link(B, file, A)
    area.publish(B)
    assert linked == file
    assert (root / B / TAR).stat().st_ino == (root / A / TAR).stat().st_ino
    area.withdraw(A)
    area.purge(A)
    assert area.read(B, TAR) == b"data" * 1000


def test_a_file_that_is_not_the_recorded_one_is_not_linked(area: FileStagingArea, root: Path, tmp_path: Path) -> None:
    file = published(area, A)
    area.begin(B)
    os.link(root / A / TAR, tmp_path / "kept")  # Keeps the inode number from being used again.
    foreign = tmp_path / "proprietary.tar"
    foreign.write_bytes(b"DATA" * 1000)
    foreign.chmod(0o444)
    os.utime(foreign, ns=(file.modified_ns, file.modified_ns))

    def replace_by(put: Callable[[Path], object]) -> None:
        (root / A / TAR).unlink(missing_ok=True)
        put(root / A / TAR)

    attacks: list[Callable[[Path], object]] = [
        lambda path: path.hardlink_to(foreign),
        lambda path: path.symlink_to(foreign),
        lambda path: path.symlink_to(tmp_path / "kept"),
        os.mkfifo,
        lambda path: path.mkdir(),
    ]
    for attack in attacks:
        replace_by(attack)
        with pytest.raises(SourceVanishedError):
            area.link(B, file, A)
        assert list((root / ".incoming" / B).iterdir()) == []
        if (root / A / TAR).is_dir():
            (root / A / TAR).rmdir()
    with pytest.raises(SourceVanishedError, match="gone"):
        area.link(B, file, A)
    replace_by(lambda path: path.hardlink_to(tmp_path / "kept"))
    assert area.link(B, file, A) == file


@pytest.mark.parametrize("field", ["device", "inode", "size", "modified_ns"])
def test_each_part_of_the_record_is_compared(area: FileStagingArea, field: str) -> None:
    file = published(area, A)
    area.begin(B)
    with pytest.raises(SourceVanishedError, match="not the file that was recorded"):
        area.link(B, replace(file, **{field: getattr(file, field) + 1}), A)


def test_a_file_that_was_made_writable_is_not_trusted(area: FileStagingArea, root: Path) -> None:
    file = published(area, A)
    (root / A / TAR).chmod(0o644)
    area.begin(B)
    with pytest.raises(SourceVanishedError, match="writable"):
        area.link(B, file, A)


def test_a_source_that_was_withdrawn_or_never_there_has_vanished(area: FileStagingArea) -> None:
    file = published(area, A)
    area.withdraw(A)
    area.begin(B)
    for token in (A, C):
        with pytest.raises(SourceVanishedError, match="gone"):
            area.link(B, file, token)


def too_many_links(root: Path, _: Callable[..., None]) -> None:
    limit = os.pathconf(root, "PC_LINK_MAX")
    spare = root.parent / "links"
    spare.mkdir()
    for number in range(70_000):
        try:
            os.link(root / A / TAR, spare / str(number))
        except OSError as error:
            assert error.errno == errno.EMLINK
            return
    pytest.skip(f"needs a file system with a limit of links below 70 000, here {limit}")


def other_mount(root: Path, mount: Callable[..., None]) -> None:
    mount("--bind", root / A, root / A)


@pytest.mark.parametrize("obstacle", [too_many_links, other_mount])
def test_where_no_link_is_granted_the_file_is_copied_and_compared(
    area: FileStagingArea, root: Path, mount: Callable[..., None], obstacle: Callable[..., None]
) -> None:
    file = published(area, A)
    obstacle(root, mount)
    area.begin(B)
    copied = area.link(B, file, A)
    assert (copied.sha256, copied.size) == (file.sha256, file.size)
    assert copied.inode != file.inode
    area.begin(C)
    with pytest.raises(SourceVanishedError, match="another content"):
        area.link(C, replace(file, sha256="0" * 64), A)
    assert list((root / ".incoming" / C).iterdir()) == []
    area.publish(B)
    assert area.read(B, TAR) == b"data" * 1000


LINK = """
import json, sys
from pathlib import Path
from stagecal.adapters.staging_area import FileStagingArea
from stagecal.ports import SourceVanishedError, StagedFile
area = FileStagingArea(Path(sys.argv[1]))
print("ready", flush=True)
for theirs, ours, *file in json.loads(sys.stdin.readline()):
    area.begin(ours)
    try:
        area.link(ours, StagedFile(*file), theirs)
    except SourceVanishedError:
        area.discard(ours)
        print("vanished", ours)
    else:
        area.publish(ours)
        print("linked", ours)
"""

SWEEP = """
import json, sys
from pathlib import Path
from stagecal.adapters.staging_area import FileStagingArea
area = FileStagingArea(Path(sys.argv[1]))
print("ready", flush=True)
for theirs, *_ in json.loads(sys.stdin.readline()):
    area.withdraw(theirs)
    area.purge(theirs)
"""


def test_linking_and_sweeping_at_the_same_time_gives_whole_files_or_a_vanished_source(
    area: FileStagingArea, root: Path
) -> None:
    work = []
    for _ in range(60):
        theirs, ours = secrets.token_hex(16), secrets.token_hex(16)
        file = published(area, theirs)
        work.append((theirs, ours, file.name, file.size, file.sha256, file.device, file.inode, file.modified_ns))
    linker, sweeper = start(LINK, root), start(SWEEP, root)
    try:
        for child in (linker, sweeper):
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
        for child in (linker, sweeper):
            assert child.stdin is not None
            child.stdin.write(json.dumps(work) + "\n")
            child.stdin.flush()
        outcome, _ = linker.communicate(timeout=60)
        sweeper.communicate(timeout=60)
    finally:
        linker.kill()
        sweeper.kill()
    assert (linker.returncode, sweeper.returncode) == (0, 0)
    linked = {line.split()[1] for line in outcome.splitlines() if line.startswith("linked")}
    assert len(outcome.splitlines()) == len(work)
    assert set(area.tokens()) == linked
    assert all(area.read(token, TAR) == b"data" * 1000 for token in linked)
    assert (list(area.incoming_tokens()), list(area.retired_tokens())) == ([], [])


# --- withdrawing and removing -----------------------------------------------------------------------------------


def test_withdraw_takes_it_out_of_reach_and_gone_is_fine(area: FileStagingArea, root: Path) -> None:
    published(area, A)
    for _ in range(2):
        area.withdraw(A)
        assert not area.is_published(A)
        assert list(area.tokens()) == []
        assert list(area.retired_tokens()) == [A]
    assert mode(root / ".expired") == 0o700
    assert area.purge(A) > 0
    area.withdraw(A)
    assert area.purge(A) == 0


def test_an_invisible_directory_can_be_withdrawn_too(area: FileStagingArea) -> None:
    area.begin(A)
    area.write(A, "README.txt", b"x")
    area.withdraw(A)
    assert list(area.incoming_tokens()) == []
    assert list(area.retired_tokens()) == [A]


def test_a_running_download_goes_on_after_withdraw_and_purge(area: FileStagingArea, root: Path) -> None:
    published(area, A)
    with (root / A / TAR).open("rb") as download:
        area.withdraw(A)
        area.purge(A)
        assert download.read() == b"data" * 1000


def test_purge_does_not_touch_what_was_not_withdrawn(area: FileStagingArea, root: Path) -> None:
    published(area, A)
    area.begin(B)
    before = everything(root)
    assert (area.purge(A), area.purge(B), area.purge(C)) == (0, 0, 0)
    assert everything(root) == before


def test_purge_frees_only_what_no_other_directory_links(area: FileStagingArea, root: Path) -> None:
    shared = published(area, A, os.urandom(100_000))
    area.begin(B)
    area.link(B, shared, A)
    area.write(B, "own", os.urandom(50_000))
    area.publish(B)
    allocated = {name: (root / B / name).stat().st_blocks * 512 for name in (TAR, "own")}
    area.withdraw(B)
    assert area.purge(B) == allocated["own"] >= 50_000
    area.withdraw(A)
    assert area.purge(A) == allocated[TAR] >= 100_000


def test_an_inode_with_two_names_in_one_directory_is_counted_once(area: FileStagingArea, root: Path) -> None:
    published(area, A, os.urandom(100_000))
    (root / A / "second").hardlink_to(root / A / TAR)
    allocated = (root / A / TAR).stat().st_blocks * 512
    area.withdraw(A)
    assert area.purge(A) == allocated


@pytest.mark.parametrize(
    "keep", [lambda path: path.touch(), lambda path: path.symlink_to("nowhere"), lambda path: path.mkdir()]
)
def test_a_directory_with_donotremove_is_put_back_whole(
    area: FileStagingArea, root: Path, keep: Callable[[Path], None]
) -> None:
    published(area, A)
    assert not area.is_kept(A)
    keep(root / A / ".donotremove")
    assert area.is_kept(A)
    before = everything(root / A)
    area.withdraw(A)
    assert area.purge(A) == -1
    assert everything(root / A) == before
    assert mode(root / A) == 0o755
    assert list(area.retired_tokens()) == []
    assert area.purge(A) == 0


def test_a_donotremove_that_came_after_withdraw_still_counts(area: FileStagingArea, root: Path) -> None:
    published(area, A)
    inside = os.open(root / A, os.O_RDONLY)  # Somebody's shell stands in the directory.
    try:
        area.withdraw(A)
        os.close(os.open(".donotremove", os.O_CREAT | os.O_WRONLY, dir_fd=inside))
    finally:
        os.close(inside)
    assert area.purge(A) == -1
    assert area.read(A, TAR) == b"data" * 1000


def test_a_kept_directory_is_not_put_over_another_one(area: FileStagingArea, root: Path) -> None:
    published(area, A)
    (root / A / ".donotremove").touch()
    area.withdraw(A)
    (root / A).mkdir()
    (root / A / "other").touch()
    with pytest.raises(FatalError, match="stands under its token again"):
        area.purge(A)
    assert (root / ".expired" / A / TAR).exists()
    assert (root / A / "other").exists()


TOUCH = """
import os, sys, time
for line in sys.stdin:
    directory, delay = line.split()
    inside = os.open(directory, os.O_RDONLY)
    os.seteuid(65534)
    print("ready", flush=True)
    until = time.perf_counter() + float(delay)
    while time.perf_counter() < until:
        pass
    try:
        os.close(os.open(".donotremove", os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=inside))
        print("kept", flush=True)
    except OSError as error:
        print("refused", error.errno, flush=True)
    os.seteuid(0)
    os.close(inside)
"""


def test_a_donotremove_at_any_moment_keeps_all_or_comes_too_late(area: FileStagingArea, root: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: another user, who stands in the directory, puts the .donotremove")
    child = start(TOUCH)
    try:
        assert child.stdout is not None
        assert child.stdin is not None
        for number in range(40):
            token = f"{number:032x}"
            published(area, token)
            for extra in range(20):
                (root / token / f"file{extra}").touch()
            (root / token).chmod(0o777)
            child.stdin.write(f"{root / token} {number * 5e-5}\n")
            child.stdin.flush()
            assert child.stdout.readline() == "ready\n"
            area.withdraw(token)
            freed = area.purge(token)
            said = child.stdout.readline()
            if freed == -1:
                assert said == "kept\n"
                assert len(list((root / token).iterdir())) == 22
            else:
                assert said.startswith("refused")
                assert not area.is_published(token)
            assert list(area.retired_tokens()) == []
    finally:
        child.kill()
        child.communicate()


def test_while_it_is_removed_nobody_else_can_put_a_file_into_it(area: FileStagingArea, root: Path) -> None:
    published(area, A)
    (root / A / Path(*["below"] * 70)).mkdir(parents=True)
    (root / A).chmod(0o777)
    area.withdraw(A)
    with pytest.raises(FatalError, match="64 directories deep"):
        area.purge(A)
    assert mode(root / ".expired" / A) == 0o700


def test_an_interrupted_purge_is_finished_by_the_next(area: FileStagingArea, root: Path) -> None:
    published(area, A)
    area.withdraw(A)
    (root / ".expired" / A / TAR).unlink()
    (root / ".expired" / A).chmod(0o700)
    assert list(area.retired_tokens()) == [A]
    assert area.purge(A) == 0
    assert list(area.retired_tokens()) == []


def test_discard_removes_the_invisible_directory_only(area: FileStagingArea, root: Path) -> None:
    published(area, A)
    area.begin(B)
    area.write(B, "README.txt", b"x")
    area.discard(B)
    area.discard(B)
    area.discard(A)
    assert list(area.incoming_tokens()) == []
    assert list(area.tokens()) == [A]


# --- never outside the root -------------------------------------------------------------------------------------


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A directory with something to lose."""
    precious = tmp_path / "precious"
    (precious / A).mkdir(parents=True)
    (precious / A / TAR).write_bytes(b"precious")
    (precious / "README.txt").write_bytes(b"precious")
    return precious


def test_a_token_that_is_a_link_is_refused_everywhere(area: FileStagingArea, root: Path, outside: Path) -> None:
    (root / A).symlink_to(outside)
    before = everything(outside)
    for act in (area.begin, area.publish, area.withdraw, area.is_published, area.is_kept, area.files):
        with pytest.raises((FatalError, TransientError)):
            act(A)
    with pytest.raises(FatalError):
        area.read(A, "README.txt")
    assert list(area.tokens()) == []
    assert everything(outside) == before
    assert (root / A).is_symlink()


@pytest.mark.parametrize("place", [".incoming", ".expired"])
def test_an_invisible_parent_that_is_a_link_is_refused(
    area: FileStagingArea, root: Path, outside: Path, place: str
) -> None:
    published(area, B)
    shutil.rmtree(root / place, ignore_errors=True)
    (root / place).symlink_to(outside)
    before = everything(outside)
    acts = {
        ".incoming": (area.begin, area.publish, area.discard),
        ".expired": (area.withdraw, area.purge, lambda _: area.withdraw(B)),
    }
    for act in acts[place]:
        with pytest.raises(FatalError, match="link"):
            act(A)
    assert everything(outside) == before
    assert area.is_published(B)


@pytest.mark.parametrize("place", [".incoming", ".expired"])
def test_a_token_below_an_invisible_parent_that_is_a_link_is_refused(
    area: FileStagingArea, root: Path, outside: Path, place: str
) -> None:
    published(area, B)
    area.withdraw(B)
    (root / place / A).symlink_to(outside)
    before = everything(outside)
    with pytest.raises(FatalError, match="link"):
        (area.discard if place == ".incoming" else area.purge)(A)
    assert everything(outside) == before


def test_links_and_special_files_inside_are_removed_and_never_followed(
    area: FileStagingArea, root: Path, outside: Path
) -> None:
    published(area, A)
    (root / A / "directory").symlink_to(outside)
    (root / A / "file").symlink_to(outside / "README.txt")
    (root / A / "below").mkdir()
    (root / A / "below" / "again").symlink_to(outside / A)
    (root / A / "hard").hardlink_to(outside / "README.txt")
    os.mkfifo(root / A / "fifo")
    before = everything(outside)
    area.withdraw(A)
    area.purge(A)
    assert everything(outside) == before
    assert list((root / ".expired").iterdir()) == []


@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
def test_purge_never_enters_what_is_mounted_inside(
    area: FileStagingArea, root: Path, outside: Path, mount: Callable[..., None], kind: str
) -> None:
    published(area, A)
    (root / A / "mounted").mkdir()
    area.withdraw(A)
    inside = root / ".expired" / A / "mounted"
    if kind == "tmpfs":
        mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", inside)
        (inside / "precious").write_bytes(b"precious")
    else:
        mount("--bind", outside, inside)
    before = everything(inside)
    with pytest.raises(FatalError, match=r"mounted|another file system"):
        area.purge(A)
    assert before
    assert everything(inside) == before


def test_tokens_are_real_directories_of_this_file_system_with_the_right_name(
    area: FileStagingArea, root: Path, outside: Path
) -> None:
    published(area, A)
    for foreign in ("0" * 31, "0" * 33, "A" * 32, "g" * 32, "lost+found", ".hidden"):
        (root / foreign).mkdir()
    (root / ("1" * 32)).write_bytes(b"a file")
    (root / ("2" * 32)).symlink_to(outside)
    assert list(area.tokens()) == [A]


def test_a_token_on_another_file_system_is_none(area: FileStagingArea, root: Path, mount: Callable[..., None]) -> None:
    published(area, A)
    (root / B).mkdir()
    mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", root / B)
    assert list(area.tokens()) == [A]
    for act in (area.withdraw, area.is_published, area.is_kept):
        with pytest.raises(FatalError, match="another file system"):
            act(B)


@pytest.mark.parametrize(
    "token", ["", "..", ".incoming", "a" * 31, "a" * 33, "A" * 32, "a" * 32 + "\n", "../" + "a" * 29, "a/" * 16]
)
def test_what_is_no_token_is_refused_everywhere(area: FileStagingArea, token: str, source: Path) -> None:
    file = published(area, A)
    area.begin(B)
    acts: list[Callable[[], object]] = [
        lambda: area.begin(token),
        lambda: area.publish(token),
        lambda: area.is_published(token),
        lambda: area.is_kept(token),
        lambda: area.files(token),
        lambda: area.withdraw(token),
        lambda: area.purge(token),
        lambda: area.discard(token),
        lambda: area.read(token, TAR),
        lambda: area.write(token, TAR, b""),
        lambda: area.copy(token, TAR, source / "table.dat"),
        lambda: area.pack(token, TAR, source),
        lambda: area.link(token, file, A),
        lambda: area.link(B, file, token),
    ]
    for act in acts:
        with pytest.raises(FatalError, match="not a token"):
            act()


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".donotremove", "-rf", "a/b", "/etc/passwd", "a\n", "a b", "Süß", "a" * 256, "a\0", "$(a)"]
)
def test_what_is_no_name_for_a_staged_file_is_refused(area: FileStagingArea, name: str, source: Path) -> None:
    file = published(area, A)
    area.begin(B)
    for act in (
        lambda: area.write(B, name, b""),
        lambda: area.copy(B, name, source / "table.dat"),
        lambda: area.pack(B, name, source),
        lambda: area.link(B, replace(file, name=name), A),
        lambda: area.read(A, name),
    ):
        with pytest.raises(FatalError, match="not a name"):
            act()


def test_messages_are_one_line_and_never_show_a_whole_token(area: FileStagingArea, root: Path, source: Path) -> None:
    token = secrets.token_hex(16)
    file = published(area, token)
    said = []

    def withdraw_twice() -> None:
        area.withdraw(token)
        (root / token).mkdir()
        (root / token / "x").touch()
        area.withdraw(token)

    acts: list[Callable[[], object]] = [
        lambda: area.begin(token),
        lambda: area.write(token, "x", b""),
        lambda: area.link(B, file, token),
        lambda: area.read(token, "missing"),
        lambda: area.withdraw(token + "0"),
        withdraw_twice,
    ]
    for act in acts:
        with pytest.raises((FatalError, SourceVanishedError, FileNotFoundError)) as caught:
            act()
        said.append(str(caught.value))
        assert caught.value.__cause__ is None
        assert caught.value.__context__ is None or caught.value.__suppress_context__
    assert all(message.isprintable() and token not in message for message in said)
    assert any(f"{token[:6]}…" in message for message in said)


# --- reading, and the identity of the root ----------------------------------------------------------------------


def test_read_returns_a_file_or_says_that_it_is_missing(area: FileStagingArea, root: Path, outside: Path) -> None:
    published(area, A, b"content")
    assert area.read(A, TAR) == b"content"
    for token, name in ((A, "missing"), (B, TAR)):
        with pytest.raises(FileNotFoundError):
            area.read(token, name)
    (root / A / "link").symlink_to(outside / "README.txt")
    os.mkfifo(root / A / "fifo")
    for name in ("link", "fifo"):
        with pytest.raises(FatalError):
            area.read(A, name)


def test_files_of_a_directory_are_its_regular_files_and_none_if_it_is_gone(area: FileStagingArea, root: Path) -> None:
    published(area, A)
    (root / A / "link").symlink_to(TAR)
    (root / A / "below").mkdir()
    assert list(area.files(A)) == [TAR]
    assert area.files(B) == {}


def test_the_identity_is_made_once_and_stays(area: FileStagingArea, root: Path, tmp_path: Path) -> None:
    first = area.identity()
    published(area, A)
    assert len(first) == 32
    assert FileStagingArea(root).identity() == first
    assert "the test" in (root / ".stagecal-root").read_text()
    (tmp_path / "other").mkdir()
    assert FileStagingArea(tmp_path / "other").identity() != first
    assert sorted(path.name for path in root.iterdir()) == [".incoming", ".stagecal-root", A]


def test_a_root_with_directories_but_without_a_marker_is_not_trusted(area: FileStagingArea, root: Path) -> None:
    published(area, A)
    (root / ".stagecal-root").unlink()
    for act in (area.identity, lambda: area.begin(B)):
        with pytest.raises(TransientError, match="although directories stand in it"):
            act()
    area.withdraw(A)
    with pytest.raises(TransientError, match="although directories stand in it"):
        area.identity()


@pytest.mark.parametrize(
    "spoil", [lambda path: path.write_text(""), lambda path: path.mkdir(), lambda path: path.symlink_to("/etc/passwd")]
)
def test_a_marker_that_cannot_be_read_is_not_replaced(
    area: FileStagingArea, root: Path, spoil: Callable[[Path], None]
) -> None:
    area.identity()
    (root / ".stagecal-root").unlink()
    spoil(root / ".stagecal-root")
    for _ in range(2):
        with pytest.raises(TransientError, match="no identity"):
            area.identity()


def test_a_root_that_is_not_mounted_is_transient_and_is_not_made(tmp_path: Path) -> None:
    area = FileStagingArea(tmp_path / "missing")
    for act in (area.identity, area.free_bytes, area.tokens, lambda: area.begin(A), lambda: area.purge(A)):
        with pytest.raises(TransientError, match="mounted"):
            act()
    assert not (tmp_path / "missing").exists()


def test_a_root_that_is_a_link_is_refused(area: FileStagingArea, root: Path, tmp_path: Path) -> None:
    published(area, A)
    (tmp_path / "link").symlink_to(root)
    with pytest.raises(FatalError, match="real path"):
        FileStagingArea(tmp_path / "link").withdraw(A)
    assert area.is_published(A)


def test_free_bytes_is_what_the_system_grants_ordinary_users(area: FileStagingArea, root: Path) -> None:
    space = os.statvfs(root)
    assert abs(area.free_bytes() - space.f_bavail * space.f_frsize) < 2**30
