"""The Triggers port over a real directory: what is listed, how a trigger appears, what is moved away."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import socket
import stat
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from stagecal.adapters.trigger_directory import TriggerDirectory
from stagecal.domain.trigger import MAXIMUM_BYTES, trigger_name
from stagecal.ports import FatalError, TransientError, TriggerEntry, Triggers, UsageError

MOUS = "uid://A001/X1296/X675"
AT = datetime(2019, 9, 2, 14, 0, 27, tzinfo=UTC)
NAME = "trigger-uid___A001_X1296_X675-2019-09-02T14-00-27.txt"
NEXT_NAME = "trigger-uid___A001_X1296_X675-2019-09-02T14-00-28.txt"

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: files of other users, devices")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "triggers"
    path.mkdir()
    return path


@pytest.fixture(params=["TriggerDirectory"])
def triggers(directory: Path) -> Triggers:
    return TriggerDirectory(directory)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def place(triggers: Triggers, content: bytes = b"content\n", at: datetime = AT) -> str:
    name = triggers.reserve(MOUS, at)
    triggers.write_reserved(name, content)
    triggers.publish(name)
    return name


def problem_of(triggers: Triggers, name: str) -> str:
    (entry,) = [entry for entry in triggers.look().entries if entry.name == name]
    if entry.problem:
        assert entry.content == b""
    return entry.problem


# --- looking -------------------------------------------------------------------------------------------------------


def test_an_empty_directory_has_no_entries(triggers, directory):
    listing = triggers.look()
    assert listing.entries == ()
    assert (listing.directory.device, listing.directory.inode) == (directory.stat().st_dev, directory.stat().st_ino)


def test_entries_are_sorted_and_carry_their_bytes(triggers, directory):
    (directory / "trigger-b").write_bytes(b"\xff\0b")
    (directory / "trigger-a").write_bytes(b"a\r\n")
    assert triggers.look().entries == (TriggerEntry("trigger-a", b"a\r\n"), TriggerEntry("trigger-b", b"\xff\0b"))


def test_only_names_that_begin_with_trigger_are_meant_for_us(directory):
    triggers = TriggerDirectory(directory)
    for name in ["trigger-a", "Trigger.txt", "TRIGGER~", ".trigger-a.reserved", ".nfs0001", "README", "my-trigger.txt"]:
        (directory / name).write_bytes(b"x")
    (directory / "rejected").mkdir()
    assert [entry.name for entry in triggers.look().entries] == ["TRIGGER~", "Trigger.txt", "trigger-a"]
    assert triggers.strangers() == ("README", "my-trigger.txt")


def test_a_file_of_64_kib_is_read_and_a_larger_one_is_not(triggers, directory):
    (directory / "trigger-fits").write_bytes(b"x" * MAXIMUM_BYTES)
    (directory / "trigger-large").write_bytes(b"x" * (MAXIMUM_BYTES + 1))
    with (directory / "trigger-sparse").open("wb") as file:
        file.truncate(50 * 1024**3)
    assert problem_of(triggers, "trigger-fits") == ""
    assert "larger than 64 KiB" in problem_of(triggers, "trigger-large")
    assert "larger than 64 KiB" in problem_of(triggers, "trigger-sparse")


@pytest.mark.parametrize("target", ["/etc/passwd", "trigger-real", "missing"])
def test_a_symbolic_link_is_not_followed(triggers, directory, target):
    (directory / "trigger-real").write_bytes(b"x")
    (directory / "trigger-link").symlink_to(target)
    assert "symbolic link" in problem_of(triggers, "trigger-link")


def test_a_directory_is_no_trigger(triggers, directory):
    (directory / "trigger-directory").mkdir()
    assert "a directory" in problem_of(triggers, "trigger-directory")


@pytest.mark.timeout(10)
def test_a_named_pipe_does_not_block_the_look(triggers, directory):
    os.mkfifo(directory / "trigger-pipe")
    assert "a named pipe" in problem_of(triggers, "trigger-pipe")


def test_a_socket_is_no_trigger(triggers, directory, monkeypatch):
    monkeypatch.chdir(directory)  # The path of a socket may have 107 bytes only.
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("trigger-socket")
        assert "a socket" in problem_of(triggers, "trigger-socket")


@needs_root
def test_a_device_is_no_trigger(triggers, directory):
    try:
        os.mknod(directory / "trigger-device", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("this container may not make devices")
    assert "a device" in problem_of(triggers, "trigger-device")


def test_a_name_that_is_no_text_is_a_problem(triggers, directory):
    raw = os.fsencode(directory) + b"/trigger-\xff\n.txt"
    Path(os.fsdecode(raw)).write_bytes(b"x")
    (entry,) = triggers.look().entries
    assert "its name" in entry.problem
    there = triggers.quarantine(entry.name, "its name is no text")
    assert there.isprintable()
    assert (directory / "rejected" / there).read_bytes() == b"x"


@needs_root
def test_only_configured_owners_may_ask(directory):
    for name, owner in [("trigger-root", 0), ("trigger-foreign", 12345)]:
        (directory / name).write_bytes(b"x")
        os.chown(directory / name, owner, -1)
    for owners in [("root",), ("0",)]:
        triggers = TriggerDirectory(directory, owners)
        assert problem_of(triggers, "trigger-root") == ""
        assert "12345" in problem_of(triggers, "trigger-foreign")
    assert problem_of(TriggerDirectory(directory, ("root", "12345")), "trigger-foreign") == ""
    assert problem_of(TriggerDirectory(directory), "trigger-foreign") == ""


def test_an_owner_who_is_no_user_is_a_mistake_of_the_configuration(directory):
    with pytest.raises(FatalError, match="no-such-user"):
        TriggerDirectory(directory, ("no-such-user",)).look()


def look_without_privileges(directory: Path, results) -> None:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    try:
        results.put([(entry.name, entry.problem) for entry in TriggerDirectory(directory).look().entries])
    except TransientError as error:
        results.put(str(error))


@pytest.mark.parametrize(
    ("mode", "answer"),
    [
        (0o755, [("trigger-secret", "it cannot be read: permission denied")]),
        # The names can be listed, but nothing can be asked of them: that is no fault of each trigger.
        (0o644, "cannot be read: Permission denied"),
    ],
    ids=["unreadable file", "unreadable directory"],
)
def test_an_unreadable_file_is_a_problem_and_an_unreadable_directory_is_trouble(mode, answer):
    with tempfile.TemporaryDirectory() as base:  # Other users may not enter the directories of tmp_path.
        Path(base).chmod(0o755)
        directory = Path(base) / "triggers"
        directory.mkdir()
        (directory / "trigger-secret").write_bytes(b"x")
        (directory / "trigger-secret").chmod(0)
        directory.chmod(mode)
        context = multiprocessing.get_context("fork")
        results = context.Queue()
        child = context.Process(target=look_without_privileges, args=(directory, results))
        child.start()
        found = results.get(timeout=20)
        child.join(20)
        directory.chmod(0o755)
    assert found == answer or (isinstance(answer, str) and answer in found)


def test_a_missing_directory_is_transient_and_not_an_empty_listing(triggers, directory):
    place(triggers)
    directory.rename(directory.with_name("away"))
    with pytest.raises(TransientError):
        triggers.look()
    with pytest.raises(TransientError):
        triggers.remove(NAME, digest(b"content\n"))
    directory.write_bytes(b"a file now")
    with pytest.raises(TransientError):
        triggers.look()


def test_a_replaced_directory_has_another_identity(triggers, directory):
    before = triggers.look().directory
    directory.rename(directory.with_name("away"))
    directory.mkdir()
    assert triggers.look().directory != before


def test_files_that_vanish_or_grow_during_the_look_do_no_harm(triggers, directory):
    """Somebody writes and removes files all the time: what is read is a beginning of a file, or it is left out."""
    whole = os.urandom(60_000)
    end = threading.Event()

    def disturb() -> None:
        while not end.is_set():
            for number in range(20):
                path = directory / f"trigger-{number}"
                with path.open("wb", buffering=0) as file:
                    file.write(whole[:30_000])
                    file.write(whole[30_000:])
            for number in range(20):
                (directory / f"trigger-{number}").unlink()

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        entries: list[TriggerEntry] = []
        latest = time.monotonic() + 20
        while len(entries) < 300 and time.monotonic() < latest:
            entries += triggers.look().entries
    finally:
        end.set()
        thread.join()
    assert len(entries) >= 300
    assert all(whole.startswith(entry.content) and not entry.problem for entry in entries)


# --- placing -------------------------------------------------------------------------------------------------------


def test_a_reservation_is_invisible_until_it_is_published(triggers, directory):
    name = triggers.reserve(MOUS, AT)
    assert name == NAME
    assert triggers.look().entries == ()
    triggers.write_reserved(name, b"content\n")
    assert triggers.look().entries == ()
    triggers.publish(name)
    assert triggers.look().entries == (TriggerEntry(NAME, b"content\n"),)
    assert sorted(os.listdir(directory)) == [NAME]


def test_the_group_may_read_and_write_what_was_placed(triggers, directory):
    before = os.umask(0o077)
    try:
        place(triggers)
    finally:
        os.umask(before)
    assert stat.S_IMODE((directory / NAME).stat().st_mode) == 0o664


def test_a_taken_second_gives_the_next_one(triggers):
    assert triggers.reserve(MOUS, AT) == NAME
    assert triggers.reserve(MOUS, AT) == NEXT_NAME
    triggers.abandon(NAME)
    assert place(triggers) == NAME
    assert triggers.reserve("uid://A001/X1/X1", AT).startswith("trigger-uid___A001_X1_X1-2019-09-02T14-00-27")


def test_a_published_name_is_not_reserved_again(triggers, directory):
    place(triggers)
    assert triggers.reserve(MOUS, AT) == NEXT_NAME
    assert sorted(os.listdir(directory)) == [f".{NEXT_NAME}.reserved", NAME]


def test_after_sixty_taken_seconds_it_is_given_up(triggers, directory):
    for second in range(60):
        (directory / trigger_name(MOUS, AT + timedelta(seconds=second))).write_bytes(b"x")
    with pytest.raises(TransientError):
        triggers.reserve(MOUS, AT)
    assert not [name for name in os.listdir(directory) if name.startswith(".")]


def test_an_abandoned_reservation_leaves_nothing(triggers, directory):
    name = triggers.reserve(MOUS, AT)
    triggers.write_reserved(name, b"content\n")
    triggers.abandon(name)
    triggers.abandon(name)
    assert os.listdir(directory) == []


def test_publishing_never_replaces_a_trigger(triggers, directory):
    name = triggers.reserve(MOUS, AT)
    triggers.write_reserved(name, b"ours\n")
    (directory / name).write_bytes(b"theirs\n")
    with pytest.raises(TransientError, match="taken"):
        triggers.publish(name)
    assert (directory / name).read_bytes() == b"theirs\n"


def test_a_link_that_worked_and_says_that_it_did_not_counts(directory):
    def link(*names: str, **options: object) -> None:
        os.link(*names, **options)
        os.link(*names, **options)  # What a network file system does when the first answer is lost.

    place(TriggerDirectory(directory, link=link))
    assert os.listdir(directory) == [NAME]


@pytest.mark.parametrize("taken", [False, True])
def test_without_hard_links_a_rename_publishes(directory, taken):
    def link(*names: str, **options: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    triggers = TriggerDirectory(directory, link=link)
    if not taken:
        assert place(triggers) == NAME
        assert os.listdir(directory) == [NAME]
        return
    name = triggers.reserve(MOUS, AT)
    (directory / name).write_bytes(b"theirs\n")
    with pytest.raises(TransientError, match="taken"):
        triggers.publish(name)
    assert (directory / name).read_bytes() == b"theirs\n"


def test_a_lost_reservation_is_said_clearly(triggers, directory):
    name = triggers.reserve(MOUS, AT)
    (directory / f".{name}.reserved").unlink()
    with pytest.raises(FatalError, match="reservation"):
        triggers.write_reserved(name, b"x")
    with pytest.raises(FatalError, match="reservation"):
        triggers.publish(name)
    assert os.listdir(directory) == []


@pytest.mark.parametrize("name", ["../trigger", "trigger-x/../../y", "", ".", "README", "trigger-x\0", "/etc/passwd"])
def test_no_other_name_is_ever_touched(triggers, directory, name):
    for act in (
        lambda: triggers.write_reserved(name, b"x"),
        lambda: triggers.publish(name),
        lambda: triggers.abandon(name),
        lambda: triggers.remove(name, digest(b"")),
        lambda: triggers.quarantine(name, "x"),
    ):
        with pytest.raises(UsageError):
            act()
    assert os.listdir(directory) == []


def reserve_many(directory: Path, results) -> None:
    triggers = TriggerDirectory(directory)
    with ThreadPoolExecutor(5) as pool:
        results.put(
            list(
                pool.map(
                    lambda number: place(triggers, b"%d\n" % number, AT + timedelta(seconds=number % 5)), range(25)
                )
            )
        )


def test_processes_and_threads_at_the_same_second_get_different_names(directory):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    children = [context.Process(target=reserve_many, args=(directory, results)) for _ in range(2)]
    for child in children:
        child.start()
    names = [name for _ in children for name in results.get(timeout=60)]
    for child in children:
        child.join(20)
    assert len(names) == len(set(names)) == 50
    assert sorted(os.listdir(directory)) == sorted(names)


def test_only_reservations_older_than_an_hour_are_stale(directory):
    triggers = TriggerDirectory(directory)
    names = [triggers.reserve(MOUS, AT), triggers.reserve(MOUS, AT)]
    placed = place(triggers)
    others = [".nfs0001", ".trigger-notes", ".stagecal-lease", ".trigger-x.reserved"]
    for other in others:
        (directory / other).write_bytes(b"x")
    now = datetime.now(UTC)
    for path in directory.iterdir():
        age = timedelta(minutes=59) if path.name == f".{names[1]}.reserved" else timedelta(hours=2)
        os.utime(path, ((now - age).timestamp(),) * 2)
    assert triggers.discard_stale_reservations(now) == (f".{names[0]}.reserved",)
    assert sorted(os.listdir(directory)) == sorted([f".{names[1]}.reserved", placed, *others])


# --- taking away ---------------------------------------------------------------------------------------------------


def test_a_trigger_with_its_content_is_removed(triggers, directory):
    place(triggers)
    assert triggers.remove(NAME, digest(b"content\n")) is True
    assert os.listdir(directory) == []
    assert triggers.remove(NAME, digest(b"content\n")) is True


def test_another_content_under_the_name_stays(triggers, directory):
    place(triggers)
    assert triggers.remove(NAME, digest(b"another\n")) is False
    (directory / NAME).unlink()
    (directory / NAME).symlink_to("/etc/passwd")
    assert triggers.remove(NAME, digest(Path("/etc/passwd").read_bytes())) is False
    assert os.listdir(directory) == [NAME]


def test_a_rejected_file_stands_beside_its_reason(triggers, directory):
    (directory / "trigger-bad").write_bytes(b"bad")
    assert triggers.quarantine("trigger-bad", "no ticket: Süß") == "trigger-bad"
    rejected = directory / "rejected"
    assert sorted(os.listdir(rejected)) == ["trigger-bad", "trigger-bad.reason.txt"]
    assert (rejected / "trigger-bad").read_bytes() == b"bad"
    assert (rejected / "trigger-bad.reason.txt").read_text() == "no ticket: Süß\n"
    assert stat.S_IMODE(rejected.stat().st_mode) == 0o775
    assert triggers.look().entries == ()


def test_the_same_name_rejected_again_gets_a_number(triggers, directory):
    names = []
    for content in ("one", "two", "three"):
        (directory / "trigger-bad").write_text(content)
        names.append(triggers.quarantine("trigger-bad", "bad"))
    assert names == ["trigger-bad", "trigger-bad-1", "trigger-bad-2"]
    assert [(directory / "rejected" / name).read_text() for name in names] == ["one", "two", "three"]
    assert len(os.listdir(directory / "rejected")) == 6


def test_links_pipes_and_directories_are_moved_as_themselves(triggers, directory):
    (directory / "trigger-link").symlink_to("/etc/passwd")
    os.mkfifo(directory / "trigger-pipe")
    (directory / "trigger-directory" / "below").mkdir(parents=True)
    for entry in triggers.look().entries:
        triggers.quarantine(entry.name, entry.problem)
    rejected = directory / "rejected"
    assert os.readlink(rejected / "trigger-link") == "/etc/passwd"
    assert stat.S_ISFIFO((rejected / "trigger-pipe").lstat().st_mode)
    assert (rejected / "trigger-directory" / "below").is_dir()
    assert triggers.look().entries == ()


def test_a_long_name_is_shortened_so_that_its_reason_fits(triggers, directory):
    name = "trigger-" + "ü" * 120
    (directory / name).write_bytes(b"x")
    there = triggers.quarantine(name, "its name is none")
    assert (directory / "rejected" / there).read_bytes() == b"x"
    assert (directory / "rejected" / f"{there}.reason.txt").exists()


def test_a_crash_between_reason_and_move_does_not_leave_two_reasons(triggers, directory):
    (directory / "trigger-bad").write_bytes(b"bad")
    (directory / "rejected").mkdir()
    (directory / "rejected" / "trigger-bad.reason.txt").write_text("bad\n")
    assert triggers.quarantine("trigger-bad", "bad") == "trigger-bad"
    assert len(os.listdir(directory / "rejected")) == 2


def test_a_crash_after_the_move_gives_the_same_name(triggers, directory):
    (directory / "trigger-bad").write_bytes(b"bad")
    assert triggers.quarantine("trigger-bad", "bad") == triggers.quarantine("trigger-bad", "bad") == "trigger-bad"


def test_what_is_gone_cannot_be_rejected(triggers, directory):
    with pytest.raises(TransientError, match="gone"):
        triggers.quarantine("trigger-gone", "bad")
    assert os.listdir(directory / "rejected") == []


def test_a_rejected_directory_that_leads_elsewhere_is_not_used(triggers, directory, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (directory / "rejected").symlink_to(tmp_path / "elsewhere")
    (directory / "trigger-bad").write_bytes(b"bad")
    with pytest.raises(FatalError):
        triggers.quarantine("trigger-bad", "bad")
    assert os.listdir(tmp_path / "elsewhere") == []
    assert (directory / "trigger-bad").exists()


def test_a_thousand_triggers_and_a_poison_are_all_seen(triggers, directory):
    for second in range(1000):
        (directory / trigger_name(MOUS, AT + timedelta(seconds=second))).write_bytes(b"x\n")
    (directory / "trigger-aaa").symlink_to("/dev/zero")
    listing = triggers.look()
    assert len(listing.entries) == 1001
    assert [entry.name for entry in listing.entries if entry.problem] == ["trigger-aaa"]
    shutil.rmtree(directory)
