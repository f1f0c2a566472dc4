"""`stagecal expire` as cron starts it: a plan, then deeds, and a refusal when something looks wrong."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest

from tests.cli.conftest import Ended, everything_below
from tests.sites import SiteForTests

Call = Callable[..., Ended]
RECORD = {"now", "dry_run", "refusal", "delete", "keep", "unknown", "deleted", "freed", "kept", "troubles"}


def after(site: SiteForTests, days: float) -> str:
    return (site.clock.now() + timedelta(days=days)).isoformat()


def delivered(site: SiteForTests) -> str:
    site.place()
    site.run()
    return site.published()[-1].name


def test_the_plan_is_shown_and_nothing_is_touched(site: SiteForTests, call: Call) -> None:
    token = delivered(site)
    before = everything_below(site.config.staging.root)
    ended = call("stagecal", "expire", "--dry-run", "--now", after(site, 29))
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith(f"{token[:6]}…  delete, expired ") and token not in ended.out
    assert everything_below(site.config.staging.root) == before


def test_what_has_time_left_stays(site: SiteForTests, call: Call) -> None:
    token = delivered(site)
    ended = call("stagecal", "expire", "--now", after(site, 27.9))
    assert ended.code == 0 and f"{token[:6]}…  keep, until " in ended.out
    assert len(site.published()) == 1


def test_what_has_expired_is_deleted_and_the_bytes_are_said(site: SiteForTests, call: Call) -> None:
    delivered(site)
    size = sum(path.stat().st_size for path in site.published()[0].iterdir())
    record = call("stagecal", "expire", "--json", "--now", after(site, 28.1)).json
    assert set(record) == RECORD
    assert site.published() == [] and len(record["deleted"]) == 1
    assert size <= record["freed"] <= size + 100_000
    assert call("stagecal", "expire", "--json", "--now", after(site, 28.1)).json["deleted"] == []


def test_a_hard_link_frees_no_bytes_twice(site: SiteForTests, call: Call) -> None:
    delivered(site)
    site.place(ticket="2")
    site.run()
    tar = site.published()[0] / "uid___A002_Xcf92df_X3453.ms.split.cal.tar"
    assert tar.stat().st_nlink == 2
    size = tar.stat().st_size
    freed = call("stagecal", "expire", "--json", "--now", after(site, 29)).json["freed"]
    assert size < freed < 2 * size


def test_donotremove_and_strangers_stay(site: SiteForTests, call: Call) -> None:
    token = delivered(site)
    (site.published()[0] / ".donotremove").touch()
    stranger = site.config.staging.root / ("f" * 32)
    stranger.mkdir()
    ended = call("stagecal", "expire", "--now", after(site, 99))
    assert ended.code == 0
    assert f"{token[:6]}…  keep, .donotremove" in ended.out and "ffffff…  not ours: left alone" in ended.out
    assert len(site.published()) == 2


@pytest.mark.parametrize("more", [(), ("--dry-run",), ("--json",), ("--dry-run", "--json")])
def test_a_clock_that_goes_wrong_deletes_nothing(site: SiteForTests, call: Call, more: tuple[str, ...]) -> None:
    delivered(site)
    ended = call("stagecal", "expire", *more, "--now", "2020-01-01")
    assert ended.code == 3 and "set the clock right" in ended.err and len(ended.err.splitlines()) == 1
    if "--json" in more:
        assert set(ended.json) == RECORD and "clock" in ended.json["refusal"] and ended.json["deleted"] == []
    assert len(site.published()) == 1


def test_another_root_is_left_alone_and_somebody_is_told(site: SiteForTests, call: Call) -> None:
    delivered(site)
    root = site.config.staging.root
    root.rename(root.with_name("elsewhere"))
    root.mkdir()
    ended = call("stagecal", "expire", "--now", after(site, 99))
    assert ended.code == 3 and "right disk mounted" in ended.err
    assert any("the sweeper refuses to act" in mail for mail in site.mails())


def test_too_many_at_once_need_force(site: SiteForTests, call: Call) -> None:
    for number in range(21):
        site.place(ticket=str(number))
        site.clock.advance(seconds=1)
    site.run()
    assert len(site.published()) == 21
    late = after(site, 99)
    ended = call("stagecal", "expire", "--now", late)
    assert ended.code == 3 and "21 of 21 directories would go at once" in ended.err and len(site.published()) == 21
    ended = call("stagecal", "expire", "--now", late, "--force")
    assert ended.code == 0 and ended.out.endswith("freed\n") and site.published() == []


def test_no_token_is_printed_whole(site: SiteForTests, call: Call) -> None:
    first = delivered(site)
    site.clock.advance(days=5)
    second = next(path.name for path in [*site.published(), *_again(site)] if path.name != first)
    for words in (("--dry-run", "--json"), ("--json",), ("--dry-run",), ()):
        ended = call("stagecal", "expire", *words, "--now", after(site, 25))
        assert ended.code == 0
        assert first not in ended.out + ended.err and second not in ended.out + ended.err


def _again(site: SiteForTests) -> list[object]:
    site.place(ticket="2")
    site.run()
    return list(site.published())


@pytest.mark.parametrize(
    "time", ["", "yesterday", "2026-13-01", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"]
)
def test_a_time_that_is_none_is_exit_2(site: SiteForTests, call: Call, time: str) -> None:
    ended = call("stagecal", "expire", "--now", time)
    assert ended.code == 2 and len(ended.err.splitlines()) == 1


def test_a_second_sweep_at_the_same_time_is_exit_75(site: SiteForTests, call: Call) -> None:
    with site.site.locks.try_lock("sweep"):
        ended = call("stagecal", "expire")
    assert ended.code == 75 and len(ended.err.splitlines()) == 1
