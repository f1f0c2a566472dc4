"""The tar files: what GNU tar and Python extract is the source, the same tree gives the same bytes, cuts are seen."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import stat
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stagecal.adapters.tarball import PackedTar, disk_error, pack_directory, verify_members
from stagecal.ports import FatalError, TransientError

LONG = "flag_version_" + "x" * 180


class Interrupting(io.BytesIO):
    """An output that lets something happen once, after the first write of at least this many bytes."""

    def __init__(self, happen: Callable[[], object], after: int) -> None:
        super().__init__()
        self._happen: Callable[[], object] | None = happen
        self._after = after

    def write(self, piece: Any, /) -> int:
        written = super().write(piece)
        if self._happen and written >= self._after:
            happen, self._happen = self._happen, None
            happen()
        return written


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tree like a measurement set, with all that is awkward in one."""
    top = tmp_path / "uid___A002_Xcf92df_X3453.ms.split.cal"
    (top / "ANTENNA").mkdir(parents=True)
    (top / "EMPTY").mkdir()
    (top / LONG / LONG).mkdir(parents=True)
    (top / "table.dat").write_bytes(b"\xbe\xbe\xbe\xbe" + bytes(range(256)))
    (top / "table.lock").write_bytes(b"\0" * 325)
    (top / "ANTENNA" / "table.lock").write_bytes(b"\0\1" * 160)
    (top / "ANTENNA" / "table.f0").write_bytes(b"")
    (top / LONG / LONG / LONG).write_bytes(b"deep")
    (top / "Süß 李").write_bytes(b"name")
    (top / "block").write_bytes(b"b" * 512)
    with (top / "table.f1_TSM0").open("wb") as sparse:
        sparse.truncate(9_000_001)
        sparse.seek(5_000_000)
        sparse.write(os.urandom(4096))
    (top / "private").write_bytes(b"for the group as well")
    (top / "private").chmod(0o600)
    (top / "script").write_bytes(b"#!/bin/sh\n")
    (top / "script").chmod(0o4755)
    os.utime(top / "table.dat", ns=(0, 1_700_000_000_123_456_789))
    return top


def packed(source: Path, output: Path) -> PackedTar:
    with output.open("w+b") as file:
        return pack_directory(source, file)


def contents(top: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(top)): path.read_bytes() if path.is_file() else None for path in top.rglob("*")}


def by_gnu_tar(tar: Path, target: Path) -> None:
    subprocess.run(["tar", "-xf", tar, "-C", target], check=True, capture_output=True)


def by_python(tar: Path, target: Path) -> None:
    with tarfile.open(tar) as archive:
        archive.extractall(target)


@pytest.mark.parametrize("extract", [by_gnu_tar, by_python])
def test_what_is_extracted_is_the_source(source: Path, tmp_path: Path, extract: Callable[[Path, Path], None]) -> None:
    packed(source, tmp_path / "x.tar")
    target = tmp_path / "extracted"
    target.mkdir()
    extract(tmp_path / "x.tar", target)
    assert [path.name for path in target.iterdir()] == [source.name]
    there = contents(target / source.name)
    assert there == contents(source)
    assert {"table.lock", "ANTENNA/table.lock", "EMPTY", f"{LONG}/{LONG}/{LONG}", "Süß 李"} < set(there)


def test_gnu_tar_finds_no_difference_in_content_and_nanoseconds(source: Path, tmp_path: Path) -> None:
    packed(source, tmp_path / "x.tar")
    result = subprocess.run(
        ["tar", "--diff", "-f", tmp_path / "x.tar", "-C", source.parent], capture_output=True, text=True, check=False
    )
    differences = [
        line for line in result.stdout.splitlines() if "Uid differs" not in line and "Gid differs" not in line
    ]
    assert sorted(differences) == [f"{source.name}/{name}: Mode differs" for name in ("private", "script")]


def test_members_are_sorted_belong_to_nobody_and_are_readable_by_everybody(source: Path, tmp_path: Path) -> None:
    packed(source, tmp_path / "x.tar")
    with tarfile.open(tmp_path / "x.tar") as archive:
        members = archive.getmembers()
    assert [member.name.split("/") for member in members] == sorted(member.name.split("/") for member in members)
    assert {(member.uid, member.gid, member.uname, member.gname) for member in members} == {(0, 0, "", "")}
    modes = {member.name.removeprefix(source.name + "/"): member.mode for member in members}
    assert (modes["private"], modes["script"], modes["EMPTY"]) == (0o644, 0o755, 0o755)


def test_the_same_tree_gives_the_same_bytes_and_the_digest_is_theirs(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "again" / source.name)
    for path in [source, *source.rglob("*")]:
        status = path.stat()
        os.utime(tmp_path / "again" / path.relative_to(source.parent), ns=(0, status.st_mtime_ns))
    first = packed(source, tmp_path / "1.tar")
    second = packed(tmp_path / "again" / source.name, tmp_path / "2.tar")
    assert first == second
    whole = (tmp_path / "1.tar").read_bytes()
    assert (first.size, first.sha256) == (len(whole), hashlib.sha256(whole).hexdigest())
    assert first.size % tarfile.RECORDSIZE == 0


def test_a_member_may_be_larger_than_8_gibibytes(tmp_path: Path) -> None:
    class EnoughError(Exception):
        pass

    def stop() -> None:
        raise EnoughError

    top = tmp_path / "big.ms"
    top.mkdir()
    (top / "table.f1").touch()
    os.truncate(top / "table.f1", 9 * 2**30)
    output = Interrupting(stop, after=100_000)
    with pytest.raises(EnoughError):
        pack_directory(top, output)
    output.seek(0)
    with tarfile.open(fileobj=output) as archive:
        archive.next()
        member = archive.next()
    assert member is not None
    assert (member.name, member.size) == ("big.ms/table.f1", 9 * 2**30)


def add_link(top: Path) -> None:
    (top / "bad").symlink_to("/etc/passwd")


def add_link_to_directory(top: Path) -> None:
    (top / "bad").symlink_to("ANTENNA")


def add_fifo(top: Path) -> None:
    os.mkfifo(top / "bad")


def add_socket(top: Path) -> None:
    os.mknod(top / "bad", stat.S_IFSOCK | 0o600)


@pytest.mark.parametrize("add", [add_link, add_link_to_directory, add_fifo, add_socket])
def test_anything_but_directories_and_plain_files_is_refused(source: Path, add: Callable[[Path], None]) -> None:
    add(source)
    with pytest.raises(FatalError, match=f"{source.name}/bad is neither"):
        pack_directory(source, io.BytesIO())


@pytest.mark.parametrize("name", [b"new\nline", b"\xff\xfe", b"esc\x1b[0m"])
def test_names_that_are_not_printable_are_refused_in_one_printable_line(source: Path, name: bytes) -> None:
    (Path(os.fsdecode(bytes(source) + b"/" + name))).touch()
    with pytest.raises(FatalError, match="no name for a member") as caught:
        pack_directory(source, io.BytesIO())
    assert str(caught.value).isprintable()


def test_a_source_that_is_a_link_or_a_file_or_missing_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link.ms").symlink_to(source)
    for wrong in (tmp_path / "link.ms", source / "table.dat", tmp_path / "missing.ms", Path("..")):
        with pytest.raises(FatalError):
            pack_directory(wrong, io.BytesIO())


def test_a_file_that_grows_while_it_is_packed_is_refused(source: Path) -> None:
    def grow() -> None:
        with (source / "table.f1_TSM0").open("ab") as file:
            file.write(b"more")

    with pytest.raises(FatalError, match=r"table\.f1_TSM0 changed while"):
        pack_directory(source, Interrupting(grow, after=100_000))


def test_a_file_that_shrinks_while_it_is_packed_is_refused(source: Path) -> None:
    with pytest.raises(FatalError, match=r"table\.f1_TSM0 shrank"):
        pack_directory(source, Interrupting(lambda: os.truncate(source / "table.f1_TSM0", 7_000_000), after=100_000))


def test_a_file_that_is_rewritten_while_it_is_packed_is_refused(source: Path) -> None:
    def rewrite() -> None:
        with (source / "table.f1_TSM0").open("r+b") as file:
            file.write(b"others")

    with pytest.raises(FatalError, match=r"table\.f1_TSM0 changed while"):
        pack_directory(source, Interrupting(rewrite, after=100_000))


def test_a_member_that_appears_while_it_is_packed_is_not_silently_left_out(source: Path) -> None:
    with pytest.raises(FatalError, match="got or lost members"):
        pack_directory(source, Interrupting((source / "AAA").touch, after=100_000))


def test_a_whole_tar_file_is_found_whole(source: Path, tmp_path: Path) -> None:
    made = packed(source, tmp_path / "x.tar")
    with (tmp_path / "x.tar").open("rb") as tar:
        verify_members(tar, made.members)


def test_cuts_that_gnu_tar_does_not_see_are_seen(source: Path, tmp_path: Path) -> None:
    made = packed(source, tmp_path / "x.tar")
    with tarfile.open(tmp_path / "x.tar") as archive:
        members = archive.getmembers()
    before_the_mark = members[-1].offset_data + members[-1].size // 512 * 512 + 512
    assert members[-1].size % 512
    for cut in (*(member.offset for member in members[1:]), before_the_mark):
        os.truncate(shutil.copyfile(tmp_path / "x.tar", tmp_path / "cut.tar"), cut)
        assert subprocess.run(["tar", "-tf", tmp_path / "cut.tar"], capture_output=True, check=False).returncode == 0
        with (tmp_path / "cut.tar").open("rb") as tar, pytest.raises(FatalError):
            verify_members(tar, made.members)


def test_cuts_inside_the_data_and_other_members_are_seen(source: Path, tmp_path: Path) -> None:
    made = packed(source, tmp_path / "x.tar")
    with (tmp_path / "x.tar").open("rb") as tar:
        for other in (made.members[:-1], (*made.members, ("more", 1)), ((made.members[0][0], 1), *made.members[1:])):
            with pytest.raises(FatalError, match="members"):
                verify_members(tar, other)
    os.truncate(tmp_path / "x.tar", 6_000_000)
    with (tmp_path / "x.tar").open("rb") as tar, pytest.raises(FatalError, match="cannot be read back"):
        verify_members(tar, made.members)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.ETIMEDOUT, errno.ESTALE])
def test_trouble_that_passes_is_transient(number: int) -> None:
    assert isinstance(disk_error("cannot write", OSError(number, "x")), TransientError)


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.EACCES, errno.ELOOP, None])
def test_trouble_that_stays_is_fatal_and_says_what(number: int | None) -> None:
    error = disk_error("cannot write 0a1b2c…/x.tar", OSError(number, "x", "secret"))
    assert isinstance(error, FatalError)
    assert str(error).startswith("cannot write 0a1b2c…/x.tar: ")
    assert "secret" not in str(error)
