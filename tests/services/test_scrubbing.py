"""Staged data are read again and compared: rot is found, told once with all who hold it, and never handed out again."""

from __future__ import annotations

import errno
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from email import message_from_string
from pathlib import Path

import pytest

from stagecal import wiring
from stagecal.domain.products import tar_name
from stagecal.domain.requests import Outcome, State
from stagecal.ports import FatalError, MailReply, TransientError
from stagecal.services.collecting import ProductError, verify_packed
from stagecal.services.rebuilding import rebuild
from stagecal.services.scrubbing import EVERY, GATHER, REST_S, Scrubber
from stagecal.services.sweeping import plan, sweep
from tests.services.effects import end_jobs, hidden, settle, verified, wish, with_mailer
from tests.sites import SiteForTests, make_test_site

BLOCK = "uid://A002/Xcf92df/X3453"
TAR = tar_name(BLOCK)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[SiteForTests]:
    made = make_test_site(tmp_path)
    yield made
    end_jobs(made)


@pytest.fixture
def delivered(site: SiteForTests) -> SiteForTests:
    """One request that was delivered."""
    site.place()
    settle(site)
    return site


@pytest.fixture
def shared(delivered: SiteForTests) -> SiteForTests:
    """Two requests whose directories share their files."""
    place_another(delivered)
    assert delivered.calibrations() == 1
    return delivered


def place_another(site: SiteForTests, ticket: str = "23456") -> None:
    site.clock.advance(hours=1)
    site.place(ticket=ticket, email="delegee@example.org", user="Dele Gee")
    settle(site)


@dataclass
class Disk:
    """A disk that counts what is read, and a watch that only runs while the scrub rests."""

    seconds: float = 0.0
    bytes_read: int = 0
    pieces: list[int] = field(default_factory=list)
    answer: Callable[[int, bytes], bytes] = lambda number, piece: piece

    def monotonic(self) -> float:
        return self.seconds

    def read(self, descriptor: int, length: int, position: int) -> bytes:
        piece = self.answer(len(self.pieces), os.pread(descriptor, length, position))
        self.pieces.append(len(piece))
        self.bytes_read += len(piece)
        return piece


def scrubber(site: SiteForTests, disk: Disk | None = None, *, mb_s: float = 20) -> Scrubber:
    disk = disk or Disk()
    config = replace(site.config, staging=replace(site.config.staging, scrub_mb_s=mb_s))
    return Scrubber(replace(site.site, config=config), wiring.ledger(site.config), disk.monotonic, disk.read)


def scrub(site: SiteForTests, disk: Disk | None = None, *, mb_s: float = 20) -> Disk:
    """Verify until nothing is due any more."""
    disk = disk or Disk()
    worker = scrubber(site, disk, mb_s=mb_s)
    for _ in range(10_000):
        rest = worker.step()
        if rest == REST_S:
            return disk
        disk.seconds += rest
    raise AssertionError("the scrub comes to no end")


def damaged(path: Path, change: Callable[[int], None]) -> None:
    """Change a published file behind everybody's back: its mode and time stay."""
    before = path.stat()
    path.chmod(0o644)
    with path.open("r+b") as file:
        change(file.fileno())
    path.chmod(before.st_mode & 0o777)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def flip(path: Path, position: int = -1) -> None:
    """Flip one byte, by default one in the middle of the file."""
    at = path.stat().st_size // 2 if position < 0 else position

    def change(descriptor: int) -> None:
        os.pwrite(descriptor, bytes([os.pread(descriptor, 1, at)[0] ^ 0xFF]), at)

    damaged(path, change)


def directory(site: SiteForTests, number: int = 0) -> Path:
    return site.config.staging.root / site.requests()[number].token


def tar(site: SiteForTests, number: int = 0) -> Path:
    return directory(site, number) / TAR


def alarms(site: SiteForTests) -> list[str]:
    """The alarm mails, after all that is due was sent."""
    settle(site)
    mails = [message_from_string(text) for text in site.mails()]
    return [str(mail.get_payload()) for mail in mails if "rotten" in mail["Subject"] or "broken" in mail["Subject"]]


def steps(site: SiteForTests, number: int = 0) -> list[str]:
    return [one.step.seen for one in site.site.ledger.steps(site.requests()[number].id) if one.step.step == "scrub"]


def verified_at(site: SiteForTests) -> tuple[int, datetime | None]:
    return wiring.ledger(site.config).oldest_verification()


# --- healthy data --------------------------------------------------------------------------------------------------


def test_healthy_data_are_read_once_a_week_and_nobody_hears_of_it(delivered: SiteForTests) -> None:
    now = delivered.clock.now()
    first = scrub(delivered)
    assert first.bytes_read == tar(delivered).stat().st_size
    assert verified_at(delivered) == (0, now)
    delivered.clock.advance(seconds=EVERY.total_seconds())
    assert scrub(delivered).bytes_read == 0
    delivered.clock.advance(seconds=1)
    assert scrub(delivered).bytes_read == first.bytes_read
    assert verified_at(delivered) == (0, delivered.clock.now())
    assert alarms(delivered) == [] and steps(delivered) == []


def test_one_reading_counts_for_every_directory_that_links_the_file(shared: SiteForTests) -> None:
    assert tar(shared, 0).samefile(tar(shared, 1))
    assert scrub(shared).bytes_read == tar(shared).stat().st_size
    place_another(shared, "3")
    assert scrub(shared).bytes_read == 0, "a third link is verified already"


def test_what_was_never_read_is_read_first(delivered: SiteForTests) -> None:
    scrub(delivered)
    delivered.clock.advance(days=8)
    place_another_made_anew(delivered)
    token, _ = wiring.ledger(delivered.config).next_to_verify(delivered.clock.now()) or ("", None)
    assert token == delivered.requests()[1].token
    scrub(delivered)
    assert verified_at(delivered) == (0, delivered.clock.now())


def test_reading_leaves_no_trace_in_the_times_of_a_file(delivered: SiteForTests) -> None:
    before = tar(delivered).stat()
    os.utime(tar(delivered), ns=(0, before.st_mtime_ns))
    scrub(delivered)
    after = tar(delivered).stat()
    assert (after.st_atime_ns, after.st_mtime_ns, after.st_ctime_ns >= before.st_ctime_ns) == (
        0,
        before.st_mtime_ns,
        True,
    )


# --- rot -----------------------------------------------------------------------------------------------------------


def test_a_flipped_byte_is_found_and_told_once_with_all_who_hold_the_file(shared: SiteForTests) -> None:
    scrub(shared)
    first, second = shared.requests()
    readme = (directory(shared) / "README.txt").read_bytes()
    flip(tar(shared))
    shared.clock.advance(days=8)
    scrub(shared)
    (alarm,) = alarms(shared)
    said = " ".join(alarm.split())
    assert f"{TAR} (" in said and "another SHA-256" in said
    for request in (first, second):
        staging = shared.site.ledger.staging(request.token)
        assert staging is not None
        assert f"request {request.id}, ticket {request.ticket}, for {request.user} {request.email}" in said
        assert f"contact {request.contact}" in said and f"until {staging.expires:%Y-%m-%dT%H:%M:%SZ}" in said
        assert request.token not in alarm, "a link is a secret"
    assert steps(shared, 0) == steps(shared, 1) != []
    assert all("rotten" in request.reason and request.state is State.CLOSED for request in shared.requests())
    # It is told once: neither the next pass nor a new start says it again.
    shared.clock.advance(days=30)
    scrub(shared.restart())
    assert len(alarms(shared)) == 1 and len(steps(shared)) == 1
    # A person decides what becomes of the directories.
    assert [path.name for path in shared.published()] == sorted(one.token for one in (first, second))
    assert (directory(shared) / "README.txt").read_bytes() == readme


def test_what_is_rotten_is_made_anew_for_the_next_request_and_that_is_linked_then(shared: SiteForTests) -> None:
    flip(tar(shared))
    scrub(shared)
    place_another(shared, "3")
    assert shared.calibrations() == 2
    place_another(shared, "4")
    assert shared.calibrations() == 2
    assert [one.outcome for one in shared.requests()] == [Outcome.DELIVERED] * 4
    assert tar(shared, 3).samefile(tar(shared, 2)) and not tar(shared, 2).samefile(tar(shared, 0))
    assert verified(directory(shared, 2)) and verified(directory(shared, 3))
    scrub(shared)
    assert len(alarms(shared)) == 1, "the new copy is another file, and a good one"


def cut(path: Path) -> None:
    damaged(path, lambda descriptor: os.ftruncate(descriptor, path.stat().st_size // 2))


def replaced(path: Path) -> None:
    copy = path.with_name("copy")
    shutil.copy2(path, copy)
    copy.replace(path)


def by_a_link(path: Path) -> None:
    away = path.rename(path.parents[1] / "elsewhere")
    path.symlink_to(away)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip, "another SHA-256"),
        (cut, "were recorded"),
        (Path.unlink, "it is gone"),
        (lambda path: shutil.rmtree(path.parent), "it is gone"),
        (replaced, "another file stands under its name"),
        (by_a_link, "another file stands under its name"),
    ],
    ids=["flipped", "cut", "gone", "directory gone", "another inode", "a link"],
)
def test_every_kind_of_rot_is_found_and_never_linked(
    delivered: SiteForTests, damage: Callable[[Path], None], said: str
) -> None:
    damage(tar(delivered))
    scrub(delivered)
    (alarm,) = alarms(delivered)
    assert said in " ".join(alarm.split()) and delivered.only().id in alarm
    place_another(delivered)
    assert delivered.calibrations() == 2


def test_what_is_missing_in_one_directory_is_not_rotten_in_another(shared: SiteForTests) -> None:
    shutil.rmtree(directory(shared, 0))
    scrub(shared)
    (alarm,) = alarms(shared)
    first, second = shared.requests()
    assert first.id in alarm and second.id not in alarm
    assert steps(shared, 1) == []
    place_another(shared, "3")
    assert shared.calibrations() == 1 and tar(shared, 2).samefile(tar(shared, 1))


def test_a_sector_that_cannot_be_read_is_rot(delivered: SiteForTests) -> None:
    def broken(number: int, piece: bytes) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    scrub(delivered, Disk(answer=broken))
    (alarm,) = alarms(delivered)
    assert "cannot be read: Input/output error" in " ".join(alarm.split())


def test_an_error_that_a_second_look_does_not_see_is_no_rot(delivered: SiteForTests) -> None:
    disk = Disk(answer=lambda number, piece: piece[:-1] + b"?" if number == 0 else piece)
    scrub(delivered, disk)
    assert disk.bytes_read == 2 * tar(delivered).stat().st_size
    assert verified_at(delivered) == (0, delivered.clock.now()) and alarms(delivered) == []


def test_a_server_that_does_not_answer_is_no_rot(delivered: SiteForTests) -> None:
    def stale(number: int, piece: bytes) -> bytes:
        raise OSError(errno.ESTALE, "")

    worker = scrubber(delivered, Disk(answer=stale))
    with pytest.raises(TransientError, match="verified now"):
        worker.step()
    assert worker._reading is None and alarms(delivered) == []
    scrub(delivered)
    assert verified_at(delivered)[0] == 0


@pytest.mark.parametrize("moment", ["before a file is opened", "while it is read"])
def test_a_root_that_is_not_mounted_is_no_rot(delivered: SiteForTests, moment: str) -> None:
    root = delivered.config.staging.root
    disk = Disk()
    worker = scrubber(delivered, disk)
    if moment == "while it is read":

        def unmounted(number: int, piece: bytes) -> bytes:
            root.rename(root.with_name("away"))
            root.mkdir()
            raise OSError(errno.EIO, "")

        disk.answer = unmounted
    else:
        root.rename(root.with_name("away"))
        root.mkdir()
    with pytest.raises((TransientError, FatalError), match="root"):
        worker.step()
    shutil.rmtree(root)
    root.with_name("away").rename(root)
    assert steps(delivered) == [] and alarms(delivered) == []


def test_rot_that_comes_in_masses_is_told_once_an_hour(delivered: SiteForTests) -> None:
    for _ in range(3):
        place_another_made_anew(delivered)
    assert delivered.calibrations() == 4
    for number in range(4):
        flip(tar(delivered, number))
    scrub(delivered)
    assert len(alarms(delivered)) == 1
    delivered.clock.advance(seconds=GATHER.total_seconds())
    scrub(delivered)
    first, second = alarms(delivered)
    ids = [request.id for request in delivered.requests()]
    assert sum(one in first for one in ids) == 1 and sum(one in second for one in ids) == 3
    delivered.clock.advance(days=1)
    scrub(delivered)
    assert len(alarms(delivered)) == 2


def place_another_made_anew(site: SiteForTests) -> None:
    """Let a request be served by a job although its data are staged: their file looks like another one."""
    for path in site.published():
        os.utime(path / TAR, ns=(1, 1))
    place_another(site)


# --- what is owed --------------------------------------------------------------------------------------------------


def test_data_that_rot_before_the_mail_leaves_are_never_handed_out(site: SiteForTests) -> None:
    slow, mailer = with_mailer(site)
    mailer.answer("pi@example.org", MailReply.TRANSIENT)
    slow.place()
    slow.run()
    assert slow.only().state is State.STAGED
    flip(tar(slow))
    scrub(slow)
    mailer.answer("pi@example.org", MailReply.ACCEPTED)
    settle(slow)
    request = slow.only()
    assert request.state is State.HELD and "rotten" in request.reason
    assert not any("pi@example.org" in message_from_string(text)["X-Envelope-To"] for text in slow.mails())
    wish(slow, "retry")
    settle(slow)
    assert slow.only().outcome is Outcome.DELIVERED and slow.calibrations() == 2
    assert verified(directory(slow))


def test_rot_is_remembered_when_the_ledger_is_lost(shared: SiteForTests) -> None:
    flip(tar(shared))
    scrub(shared)
    settle(shared)
    shared.site.ledger.close()
    for path in shared.config.state.directory.glob("stagecal.db*"):
        path.unlink()
    ledger = wiring.ledger(shared.config, anew=True)
    again = SiteForTests(
        shared.directory, shared.config, shared.clock, replace(wiring.site(shared.config), clock=shared.clock)
    )
    again.site.ledger.set_setting("staging-root", again.site.staging.identity())
    rebuild(again.site, ledger, shared.config.cluster.work_area, shared.clock.now())
    place_another(again, "3")
    assert again.calibrations() == 2


# --- the sweeper ---------------------------------------------------------------------------------------------------


def swept(site: SiteForTests) -> None:
    site.clock.advance(days=40)
    now = site.clock.now()
    assert len(sweep(site.site, plan(site.site, now), now).deleted) > 0


def test_what_is_swept_while_it_is_read_is_no_rot_and_its_space_comes_back(delivered: SiteForTests) -> None:
    worker = scrubber(delivered, mb_s=0.01)
    worker.step()
    assert worker._reading is not None
    swept(delivered)
    worker.step()
    assert worker._reading is None, "an open file would keep its space"
    scrub(delivered)
    assert alarms(delivered) == [] and steps(delivered) == []


def test_one_link_that_is_swept_while_it_is_read_stops_nothing(shared: SiteForTests) -> None:
    worker = scrubber(shared, mb_s=0.01)
    worker.step()
    sweeping = shared.site.ledger.staging(shared.requests()[0].token)
    assert sweeping is not None
    now = shared.clock.time = sweeping.expires
    assert sweep(shared.site, plan(shared.site, now), now).deleted == [sweeping.token]
    for _ in range(1000):
        worker.step()
    assert verified_at(shared) == (0, now) and alarms(shared) == []


def test_what_is_out_of_reach_or_over_is_no_rot(shared: SiteForTests) -> None:
    worker = scrubber(shared)
    first, second = (request.token for request in shared.requests())
    # Moved away, and not recorded yet: as a withdrawal does it.
    shared.site.staging.withdraw(first)
    # Removed by hand, and its time is over before anybody looks.
    shutil.rmtree(directory(shared, 1))
    assert worker.step() == REST_S
    shared.clock.advance(days=40)
    scrub(shared)
    assert alarms(shared) == [] and hidden(shared, ".expired") == [first] and second


# --- pace and interruption -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mb_s", [0.5, 1, 100])
def test_no_more_is_read_than_the_pace_allows(delivered: SiteForTests, mb_s: float) -> None:
    disk = scrub(delivered, mb_s=mb_s)
    size = tar(delivered).stat().st_size
    assert disk.bytes_read == size
    assert disk.seconds == pytest.approx(size / (mb_s * 1e6))
    assert max(disk.pieces) <= max(64 * 1024, mb_s * 1e6 / 4), "a slice is over soon"


def test_time_that_was_not_used_is_not_saved_for_a_rush(delivered: SiteForTests) -> None:
    disk = Disk()
    worker = scrubber(delivered, disk, mb_s=0.5)
    disk.seconds += 3600
    rests = []
    for _ in range(4):
        rests.append(worker.step())
        disk.seconds += rests[-1]
    assert all(rest > 0.1 for rest in rests)


def test_a_file_that_was_interrupted_is_begun_anew_after_the_others(delivered: SiteForTests) -> None:
    place_another_made_anew(delivered)
    assert not tar(delivered, 0).samefile(tar(delivered, 1))
    worker = scrubber(delivered, mb_s=0.01)
    worker.step()
    interrupted = worker._reading
    assert interrupted is not None and 0 < interrupted.position < interrupted.file.size
    worker.close()
    delivered.clock.advance(seconds=1)
    again = scrubber(delivered.restart(), mb_s=0.01)
    again.step()
    assert again._reading is not None and again._reading.file.inode != interrupted.file.inode
    disk = scrub(delivered)
    assert disk.bytes_read == tar(delivered, 0).stat().st_size + tar(delivered, 1).stat().st_size
    assert verified_at(delivered)[0] == 0


def test_no_lock_is_held_while_a_file_is_read(delivered: SiteForTests) -> None:
    worker = scrubber(delivered, mb_s=0.01)
    worker.step()
    place_another(delivered)
    swept(delivered)
    assert delivered.calibrations() == 1 and delivered.published() == []
    worker.close()


# --- the cheap look ------------------------------------------------------------------------------------------------


def test_a_measurement_set_that_was_broken_in_its_tar_file_is_not_linked_though_no_scrub_saw_it(
    delivered: SiteForTests,
) -> None:
    with tarfile.open(tar(delivered)) as packed:
        header = packed.getmember(f"{TAR.removesuffix('.tar')}/table.dat").offset_data
    flip(tar(delivered), header + 3)
    place_another(delivered)
    assert delivered.calibrations() == 2 and verified(directory(delivered, 1))
    (alarm,) = alarms(delivered)
    assert "is not healthy" in " ".join(alarm.split()) and delivered.requests()[0].id in alarm


@pytest.mark.parametrize(
    ("calfields", "held", "said"),
    [
        (("J0510+1800",), "full", "not asked for"),
        (("J0510+1800", "J0440+1437", "HL_Tau"), "full", "science target"),
        (("J0510+1800", "J0440+1437"), "J0510+1800", "none of the EBs has the field J0440"),
        (("J0510+1800", "J0440+1437"), "calibrators", ""),
        ((), "full", ""),
    ],
)
def test_what_was_packed_is_looked_at_once_more_before_it_is_published(
    delivered: SiteForTests, calfields: tuple[str, ...], held: str, said: str
) -> None:
    token = "f" * 32
    request = replace(delivered.only(), token=token, calfields=calfields)
    source = delivered.directory / "products" / TAR.removesuffix(".tar")
    shutil.copytree(delivered.directory / "sets" / f"{held}.ms", source)
    delivered.site.staging.begin(token)
    delivered.site.staging.pack(token, TAR, source)
    if said:
        with pytest.raises(ProductError, match=said):
            verify_packed(delivered.site, request, [TAR])
    else:
        verify_packed(delivered.site, request, [TAR])


@pytest.mark.parametrize("content", [b"", b"no tar file at all", b"\0" * 10240], ids=["empty", "text", "zeroes"])
def test_a_packed_file_without_a_measurement_set_is_refused(delivered: SiteForTests, content: bytes) -> None:
    token = "f" * 32
    delivered.site.staging.begin(token)
    delivered.site.staging.write(token, TAR, content)
    with pytest.raises(ProductError, match="packed uid___A002"):
        verify_packed(delivered.site, replace(delivered.only(), token=token), [TAR])
    with pytest.raises(ProductError) as gone:
        verify_packed(delivered.site, replace(delivered.only(), token="e" * 32), [TAR])
    assert "e" * 32 not in str(gone.value)
