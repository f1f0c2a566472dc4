"""A packed measurement set is read where it lies; a tar file that is cut is never taken for a whole one."""

import io
import shutil
import tarfile
import time
import tracemalloc
from pathlib import Path

import pytest

from stagecal.measurement_set import (
    CannotVerify,
    Damaged,
    Found,
    NotRead,
    Verdict,
    check_measurement_set,
    find_tables,
    read_fields,
)

from .examples import example, lose_locks, pack, unpacked

__all__ = ["example", "unpacked"]


def found_in(path: Path) -> list[Found | NotRead]:
    return list(find_tables(path))


def problems_of(path: Path) -> list[str]:
    """Everything that is said against what is in a tar file."""
    lines: list[str] = []
    for found in find_tables(path):
        lines += [found.problem] if isinstance(found, NotRead) else check_measurement_set(found.files).problems
    return lines


def test_what_is_packed_is_judged_as_what_is_not(example: Path, tmp_path: Path) -> None:
    (example / "STATE" / "table.lock").unlink()
    tar = pack(example, tmp_path / "X.tar")
    [found] = [found for found in find_tables(tar) if isinstance(found, Found)]
    assert found.is_measurement_set and found.in_tar == tar
    packed = [
        (check_measurement_set(found.files), read_fields(found.files))
        for found in find_tables(tar)
        if isinstance(found, Found)
    ]
    directly = check_measurement_set(example)
    assert directly.verdict is Verdict.WRONG_ROWS
    assert [(report.tables, report.problems) for report, _ in packed] == [(directly.tables, directly.problems)]
    assert [fields for _, fields in packed] == [read_fields(example)]


def test_names_that_begin_with_a_dot_are_the_same_names(example: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "X.tar", "w") as tar:
        tar.add(example, f"./{example.name}")
    assert problems_of(tmp_path / "X.tar") == []


def test_the_last_of_two_members_of_a_name_counts(example: Path, tmp_path: Path) -> None:
    tar = pack(example, tmp_path / "X.tar")
    with tarfile.open(tar, "a") as more:
        member = tarfile.TarInfo(f"{example.name}/STATE/table.f0")
        member.size = 3
        more.addfile(member, io.BytesIO(b"bad"))
    assert [line for line in problems_of(tar) if line.startswith("STATE: table.f0 ")]


def test_a_tar_file_cut_anywhere_has_a_problem(example: Path, tmp_path: Path) -> None:
    whole = pack(example, tmp_path / "X.tar")
    assert problems_of(whole) == []
    with tarfile.open(whole) as tar:
        offsets = [member.offset for member in tar][1::7]
        end = tar.offset
    content = whole.read_bytes()
    cut = tmp_path / "cut.tar"
    for place in [
        *offsets,
        *(offset + 512 for offset in offsets),
        *(offset + 700 for offset in offsets),
        end,
        end + 512,
    ]:
        cut.write_bytes(content[:place])
        assert problems_of(cut), f"cut at byte {place}"


def test_a_header_that_is_lost_in_the_middle_is_a_problem(example: Path, tmp_path: Path) -> None:
    """Both GNU tar and Python take what comes after it for nothing at all."""
    path = pack(example, tmp_path / "X.tar")
    with tarfile.open(path) as tar:
        middle = tar.getmembers()[30].offset
    content = bytearray(path.read_bytes())
    content[middle : middle + 512] = b"x" * 512
    path.write_bytes(content)
    with tarfile.open(path) as tar:
        assert len(tar.getmembers()) == 30
    assert any(line.startswith(f"the tar file is cut or damaged at byte {middle} ") for line in problems_of(path))


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_a_compressed_tar_file_cannot_be_verified(mode: str, example: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "X.tar", f"w:{mode}") as tar:  # type: ignore[call-overload]  # any mode of these
        tar.add(example / "STATE", "X/STATE")
    [found] = found_in(tmp_path / "X.tar")
    assert isinstance(found, NotRead) and not found.verifiable
    assert found.problem.startswith("is compressed")


def test_what_is_no_tar_file_is_broken(tmp_path: Path) -> None:
    (tmp_path / "X.tar").write_bytes(b"x" * 5000)
    [found] = found_in(tmp_path / "X.tar")
    assert isinstance(found, NotRead) and found.verifiable


def test_members_that_are_no_plain_files_cannot_be_verified(example: Path, tmp_path: Path) -> None:
    state = example / "STATE" / "table.f0"
    state.rename(tmp_path / "elsewhere")
    state.symlink_to(tmp_path / "elsewhere")
    for found in find_tables(pack(example, tmp_path / "X.tar")):
        assert isinstance(found, Found)
        assert check_measurement_set(found.files).verdict is Verdict.CANNOT_BE_VERIFIED


def test_names_that_lead_outside_hold_nothing(example: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "X.tar", "w") as tar:
        tar.add(example, f"../{example.name}")
        tar.add(example, f"/{example.name}", filter=_absolute)
    [found] = found_in(tmp_path / "X.tar")
    assert isinstance(found, NotRead) and "holds no table" in found.problem


def _absolute(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.name = f"/{member.name.lstrip('/')}"
    return member


def test_a_large_tar_file_takes_no_more_memory_or_time(example: Path, tmp_path: Path) -> None:
    """Four gigabytes of data that are a hole in the file: reading them would take seconds."""
    path = pack(example, tmp_path / "X.tar")
    with tarfile.open(path) as tar:
        end = max(member.offset_data + -(-member.size // 512) * 512 for member in tar)
    member = tarfile.TarInfo(f"{example.name}/data.bin")
    member.size = 4 << 30
    with path.open("r+b") as file:
        file.seek(end)
        file.truncate()
        file.write(member.tobuf())
        file.seek(member.size, 1)
        file.write(bytes(10240))
    tracemalloc.start()
    started = time.monotonic()
    assert problems_of(path) == []
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
    assert time.monotonic() - started < 5


def test_nothing_is_unpacked_and_nothing_changes(example: Path, tmp_path: Path) -> None:
    directory = tmp_path / "readonly"
    directory.mkdir()
    path = pack(example, directory / "X.tar")
    shutil.rmtree(example)
    before = path.stat()
    directory.chmod(0o555)
    assert problems_of(path) == []
    directory.chmod(0o755)
    after = path.stat()
    assert (before.st_mtime_ns, before.st_size, list(directory.iterdir())) == (
        after.st_mtime_ns,
        after.st_size,
        [path],
    )


def test_a_tar_file_of_several_holds_each_of_them(example: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(example, tmp_path / "Y.ms"))
    lose_locks(other)
    with tarfile.open(tmp_path / "both.tar", "w") as tar:
        tar.add(example, "a/X.ms")
        tar.add(other, "a/Y.ms")
        tar.add(example / "STATE", "a/alone")
    verdicts = {
        found.files.name: (found.is_measurement_set, check_measurement_set(found.files).verdict)
        for found in find_tables(tmp_path / "both.tar")
        if isinstance(found, Found) and found.is_measurement_set
    }
    assert verdicts == {"X.ms": (True, Verdict.DEPENDS_ON_LOCK), "Y.ms": (True, Verdict.WRONG_ROWS)}


def test_errors_have_their_kind(tmp_path: Path) -> None:
    from stagecal.measurement_set import open_tar

    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(Damaged), open_tar(tmp_path / "a"):
        pass
    (tmp_path / "b").write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(CannotVerify), open_tar(tmp_path / "b"):
        pass
