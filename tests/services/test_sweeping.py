"""What is deleted is what has expired by the ledger, nothing earlier and nothing else; in doubt nothing is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from stagecal.domain.retention import Staging
from stagecal.ports import FatalError, MailReply
from stagecal.services.sweeping import SweepResult, extend, know_root, plan, sweep
from tests.services.effects import (
    Crash,
    Effects,
    end_jobs,
    hidden,
    settle,
    verified,
    with_mailer,
    with_ports,
)
from tests.sites import SiteForTests, make_test_site

DAYS = timedelta(days=28)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[SiteForTests]:
    made = make_test_site(tmp_path)
    yield made
    end_jobs(made)


@pytest.fixture
def delivered(site: SiteForTests) -> SiteForTests:
    site.place()
    settle(site)
    return site


def staging_of(site: SiteForTests, number: int = 0) -> Staging:
    found = site.site.ledger.staging(site.requests()[number].token)
    assert found is not None
    return found


def swept(site: SiteForTests, at: datetime) -> SweepResult:
    """Let the sweeper act at this time."""
    site.clock.time = at
    planned = plan(site.site, at)
    assert planned.refusal == ""
    return sweep(site.site, planned, at)


def publish_many(site: SiteForTests, number: int, published_at: datetime) -> list[str]:
    """Publish so many small directories."""
    tokens = [f"{index:032x}" for index in range(1, number + 1)]
    for token in tokens:
        site.site.staging.begin(token)
        site.site.staging.write(token, "README.txt", b"hello")
        site.site.staging.publish(token)
        site.site.ledger.restore(None, Staging(token, "", "", published_at, None, 28), (), ())
    return tokens


# --- when ----------------------------------------------------------------------------------------------------------


def test_a_directory_goes_at_its_expiry_and_not_a_second_before(delivered: SiteForTests) -> None:
    expires = staging_of(delivered).expires
    assert swept(delivered, expires - timedelta(seconds=1)).deleted == []
    assert len(delivered.published()) == 1
    assert swept(delivered, expires).deleted == [delivered.only().token]
    assert delivered.published() == [] and hidden(delivered, ".expired") == []
    assert staging_of(delivered).purged_at == expires


def test_the_clock_starts_when_the_mail_was_accepted(site: SiteForTests) -> None:
    slow, mailer = with_mailer(site)
    mailer.answer("pi@example.org", MailReply.TRANSIENT)
    slow.place()
    slow.run()
    published = staging_of(slow).published_at
    slow.clock.advance(days=2)
    mailer.answer("pi@example.org", MailReply.ACCEPTED)
    settle(slow)
    notified = staging_of(slow).notified_at
    assert notified is not None and notified - published >= timedelta(days=2)
    assert staging_of(slow).expires == notified + DAYS


@pytest.mark.parametrize("touched", ["long ago", "in the future"])
def test_dates_of_files_decide_nothing(delivered: SiteForTests, touched: str) -> None:
    (directory,) = delivered.published()
    seconds = 0 if touched == "long ago" else datetime(2099, 1, 1, tzinfo=UTC).timestamp()
    for path in (directory, *directory.iterdir()):
        os.utime(path, (seconds, seconds))
    expires = staging_of(delivered).expires
    assert swept(delivered, expires - timedelta(hours=1)).deleted == []
    assert len(swept(delivered, expires).deleted) == 1


def test_an_extension_counts_from_the_old_end(delivered: SiteForTests) -> None:
    expires = staging_of(delivered).expires
    extend(delivered.site, delivered.only().token, 10, delivered.clock.now())
    assert staging_of(delivered).expires == expires + timedelta(days=10)
    assert swept(delivered, expires + timedelta(days=9)).deleted == []
    assert len(swept(delivered, expires + timedelta(days=10)).deleted) == 1


def test_an_extension_between_plan_and_act_counts(delivered: SiteForTests) -> None:
    delivered.clock.time = staging_of(delivered).expires
    now = delivered.clock.now()
    planned = plan(delivered.site, now)
    extend(delivered.site, delivered.only().token, 1, now)
    assert sweep(delivered.site, planned, now).deleted == [] and len(delivered.published()) == 1


def test_what_is_gone_cannot_be_extended(delivered: SiteForTests) -> None:
    swept(delivered, staging_of(delivered).expires)
    with pytest.raises(FatalError, match="requested again"):
        extend(delivered.site, delivered.only().token, 1, delivered.clock.now())
    with pytest.raises(FatalError, match="requested again"):
        extend(delivered.site, "0" * 32, 1, delivered.clock.now())


def test_what_a_deleted_directory_held_is_made_again_for_the_next_request(delivered: SiteForTests) -> None:
    swept(delivered, staging_of(delivered).expires)
    delivered.place(ticket="2")
    settle(delivered)
    assert delivered.calibrations() == 2 and len(delivered.published()) == 1


# --- what is kept --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "directory", "dangling link"])
def test_a_donotremove_of_any_kind_keeps_a_directory(delivered: SiteForTests, kind: str) -> None:
    (directory,) = delivered.published()
    mark = directory / ".donotremove"
    if kind == "file":
        mark.touch()
    elif kind == "directory":
        mark.mkdir()
    else:
        mark.symlink_to("nowhere")
    expires = staging_of(delivered).expires
    assert swept(delivered, expires).deleted == [] and delivered.published() == [directory]
    mark.rmdir() if kind == "directory" else mark.unlink()
    assert len(swept(delivered, expires + timedelta(days=1)).deleted) == 1


def test_a_donotremove_after_the_plan_keeps_a_directory(delivered: SiteForTests) -> None:
    (directory,) = delivered.published()
    now = delivered.clock.time = staging_of(delivered).expires
    planned = plan(delivered.site, now)
    (directory / ".donotremove").touch()
    assert sweep(delivered.site, planned, now).kept == [directory.name]
    assert directory.is_dir() and staging_of(delivered).withdrawn_at is None


def test_a_donotremove_in_the_last_moment_brings_a_directory_back(delivered: SiteForTests) -> None:
    (directory,) = delivered.published()
    now = delivered.clock.time = staging_of(delivered).expires
    dying = with_ports(delivered, **vars(Effects("staging.withdraw").wrap(delivered.site)))
    with pytest.raises(Crash):
        sweep(dying.site, plan(dying.site, now), now)
    assert hidden(delivered, ".expired") == [directory.name]
    (directory.parent / ".expired" / directory.name / ".donotremove").touch()
    again = delivered.restart()
    assert sweep(again.site, plan(again.site, now), now).kept == [directory.name]
    (directory / ".donotremove").unlink()
    assert verified(directory)
    assert staging_of(again).withdrawn_at is None
    # What came back is linked again, and goes when it may.
    again.place(ticket="2")
    settle(again)
    assert again.calibrations() == 1
    assert len(swept(again, now + timedelta(hours=1)).deleted) == 1


def test_what_an_open_request_still_owes_is_kept(site: SiteForTests) -> None:
    slow, mailer = with_mailer(site)
    mailer.answer("pi@example.org", MailReply.REFUSED)
    slow.place()
    settle(slow)
    assert swept(slow, slow.clock.now() + timedelta(days=100)).deleted == [] and len(slow.published()) == 1


# --- what is never touched -----------------------------------------------------------------------------------------


def test_nothing_that_is_not_ours_is_ever_touched(delivered: SiteForTests, tmp_path: Path) -> None:
    root = delivered.config.staging.root
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("data")
    (root / ("a" * 32)).symlink_to(outside)
    (root / ("b" * 32)).mkdir()
    (root / ("b" * 32) / "theirs").write_text("data")
    (root / ("c" * 32)).write_text("a file")
    (root / "someone").mkdir()
    now = staging_of(delivered).expires + timedelta(days=1000)
    planned = plan(delivered.site, now)
    assert planned.unknown == ("b" * 32,)
    assert swept(delivered, now).deleted == [delivered.only().token]
    left = {name for name in os.listdir(root) if not name.startswith(".")}
    assert left - {"index.html"} == {"a" * 32, "b" * 32, "c" * 32, "someone"}
    assert (outside / "precious").exists() and (root / ("b" * 32) / "theirs").exists()


def test_a_directory_that_was_replaced_by_a_link_is_left_alone_and_stops_no_other(
    delivered: SiteForTests, tmp_path: Path
) -> None:
    delivered.clock.advance(hours=1)
    delivered.place(ticket="2")
    settle(delivered)
    first, second = (delivered.config.staging.root / request.token for request in delivered.requests())
    outside = tmp_path / "outside"
    first.rename(outside)
    first.symlink_to(outside)
    result = swept(delivered, staging_of(delivered, 1).expires)
    assert result.deleted == [second.name] or result.deleted == []
    assert first.is_symlink() and verified(outside)
    assert not second.exists()


def test_links_inside_a_directory_are_removed_and_never_followed(delivered: SiteForTests, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("data")
    (directory,) = delivered.published()
    (directory / "link").symlink_to(outside)
    assert len(swept(delivered, staging_of(delivered).expires).deleted) == 1
    assert (outside / "precious").read_text() == "data"


# --- in doubt ------------------------------------------------------------------------------------------------------


def test_a_clock_that_is_earlier_than_what_is_known_deletes_nothing(delivered: SiteForTests) -> None:
    planned = plan(delivered.site, delivered.clock.now() - timedelta(days=1))
    assert "clock" in planned.refusal


def test_another_root_deletes_nothing(delivered: SiteForTests) -> None:
    root = delivered.config.staging.root
    shutil.copytree(root, root.with_name("copy"), symlinks=True)
    (root / ".stagecal-root").unlink()
    (root / ".stagecal-root").write_text("f" * 32 + "\n")
    assert "root" in plan(delivered.site, staging_of(delivered).expires).refusal
    with pytest.raises(FatalError, match="right disk"):
        know_root(delivered.site)
    shutil.rmtree(root)
    root.mkdir()
    assert "root" in plan(delivered.site, staging_of(delivered).expires).refusal, "an empty mount point"
    shutil.rmtree(root)
    shutil.copytree(root.with_name("copy"), root, symlinks=True)
    assert plan(delivered.site, staging_of(delivered).expires).refusal == ""


@pytest.mark.parametrize(
    ("expired", "fresh", "refused"),
    [(21, 0, True), (20, 0, False), (21, 20, True), (21, 21, False), (21, 30, False)],
)
def test_more_than_twenty_and_more_than_half_need_a_person(
    site: SiteForTests, expired: int, fresh: int, refused: bool
) -> None:
    now = site.clock.now()
    tokens = publish_many(site, expired + fresh, now - timedelta(days=30))
    for token in tokens[expired:]:
        staging = site.site.ledger.staging(token)
        assert staging is not None
        site.site.ledger.update_staging(replace(staging, extension_days=10), now)
    planned = plan(site.site, now)
    assert len(planned.delete) == expired
    assert bool(planned.refusal) is refused
    # With --force the same plan is carried out.
    assert len(sweep(site.site, planned, now).deleted) == expired and len(site.published()) == fresh


# --- interruption and account --------------------------------------------------------------------------------------


@pytest.mark.parametrize("effect", ["ledger.update_staging", "staging.withdraw", "staging.purge"])
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_an_interrupted_sweep_is_finished_by_the_next(delivered: SiteForTests, effect: str, before: bool) -> None:
    now = delivered.clock.time = staging_of(delivered).expires
    dying = with_ports(delivered, **vars(Effects(effect, before).wrap(delivered.site)))
    with pytest.raises(Crash):
        sweep(dying.site, plan(dying.site, now), now)
    again = delivered.restart()
    result = swept(again, now + timedelta(hours=1))
    assert result.deleted == [again.only().token] and result.troubles == {}
    assert again.published() == [] and hidden(again, ".expired") == []
    assert swept(again, now + timedelta(hours=2)) == SweepResult()


def test_space_is_counted_when_the_last_link_goes(delivered: SiteForTests) -> None:
    delivered.clock.advance(days=1)
    delivered.place(ticket="2")
    settle(delivered)
    (tar,) = delivered.published()[0].glob("*.tar")
    size = tar.stat().st_blocks * 512
    first = swept(delivered, staging_of(delivered, 0).expires)
    second = swept(delivered, staging_of(delivered, 1).expires)
    assert len(first.deleted) == len(second.deleted) == 1
    assert first.freed < size <= second.freed


def test_leftovers_of_broken_attempts_go_and_those_of_open_requests_stay(site: SiteForTests) -> None:
    orphan = "d" * 32
    site.site.staging.begin(orphan)
    dying = with_ports(site, **vars(Effects("staging.pack").wrap(site.site)))
    dying.place()
    with pytest.raises(Crash):
        settle(dying)
    again = site.restart()
    assert len(hidden(again, ".incoming")) == 2
    swept(again, again.clock.now())
    assert hidden(again, ".incoming") == [again.only().token]
    settle(again)
    assert len(again.published()) == 1 and hidden(again, ".incoming") == []


def test_a_directory_that_somebody_removed_is_forgotten_when_its_time_is_over(delivered: SiteForTests) -> None:
    (directory,) = delivered.published()
    shutil.rmtree(directory)
    expires = staging_of(delivered).expires
    assert swept(delivered, expires - timedelta(days=1)).deleted == []
    swept(delivered, expires)
    assert delivered.site.ledger.stagings() == []


def test_linking_waits_for_a_sweep_and_never_links_what_goes(delivered: SiteForTests) -> None:
    from stagecal.services.context import STAGED_DATA_LOCK

    now = delivered.clock.time = staging_of(delivered).expires
    planned = plan(delivered.site, now)
    with delivered.site.locks.lock(STAGED_DATA_LOCK), delivered.restart().site.locks.try_lock(STAGED_DATA_LOCK) as free:
        assert not free, "another process is kept out"
    sweep(delivered.site, planned, now)
    delivered.place(ticket="2")
    settle(delivered)
    assert verified(delivered.published()[0])
