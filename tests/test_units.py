"""The systemd units and the cron file: valid, as hardened as promised, and true to what the service relies on."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

from stagecal.config import Config, load_config

SERVICES = ("stagecal.service", "stagecal-expire.service")
UNITS = (*SERVICES, "stagecal-expire.timer")
# `systemd-analyze security` counts tenths: 15 is an exposure of 1.5.
EXPOSURE = 15
Directives = dict[str, list[str]]


@pytest.fixture
def unit(checkout: Path) -> Callable[[str], Directives]:
    """A function that reads a unit: directive -> its values in their order, the empty one first where it is reset."""

    def read(name: str) -> Directives:
        directives: Directives = defaultdict(list)
        for line in (checkout / "systemd" / name).read_text(encoding="utf-8").splitlines():
            if line and not line.startswith(("#", "[")):
                key, _, value = line.partition("=")
                directives[key].append(value)
        return directives

    return read


@pytest.fixture
def config(checkout: Path) -> Config:
    """The example site, whose directories the units name."""
    return load_config(checkout / "etc" / "stagecal.toml", environ={})


def analyze(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.requires_program("systemd-analyze")
def test_systemd_finds_nothing_to_complain_about(checkout: Path, tmp_path: Path) -> None:
    for name in UNITS:
        text = (checkout / "systemd" / name).read_text(encoding="utf-8")
        # The one thing that a test machine lacks is the installed program.
        (tmp_path / name).write_text(re.sub(r"(?m)^ExecStart=\S+", "ExecStart=/bin/true", text))
    done = analyze("verify", "--man=no", *(tmp_path / name for name in UNITS))
    # Unknown keys and wrong values are warnings with exit code 0.
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.requires_program("systemd-analyze")
@pytest.mark.parametrize("name", SERVICES)
def test_the_exposure_is_at_most_1_5(checkout: Path, name: str) -> None:
    done = analyze("security", "--offline=true", f"--threshold={EXPOSURE}", checkout / "systemd" / name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Overall exposure level" in done.stdout


@pytest.mark.requires_program("systemd-analyze")
def test_the_measure_of_exposure_measures(checkout: Path, tmp_path: Path) -> None:
    text = (checkout / "systemd" / "stagecal.service").read_text(encoding="utf-8")
    soft = tmp_path / "stagecal.service"
    soft.write_text(re.sub(r"(?m)^(Protect|Private|Restrict|SystemCall|Capability).*\n", "", text))
    assert analyze("security", "--offline=true", f"--threshold={EXPOSURE}", soft).returncode == 1


@pytest.mark.parametrize(
    ("directive", "value"),
    [
        ("Type", "notify"),
        ("NotifyAccess", "main"),  # A job must not be able to speak for the daemon.
        ("KillMode", "process"),  # Jobs outlive the daemon ...
        ("OOMPolicy", "continue"),  # ... which outlives a job that the kernel ends ...
        ("RemoveIPC", "no"),  # ... and keep their shared memory.
        ("Restart", "always"),
        ("RestartPreventExitStatus", "2 75"),
        ("StartLimitIntervalSec", "0"),
        ("ProtectSystem", "strict"),
        ("ProcSubset", "all"),  # The load average and the boot id are read.
        ("PrivateUsers", "no"),  # The owners of triggers are compared.
        ("StateDirectory", "stagecal"),
    ],
)
def test_the_daemon_unit_says(unit: Callable[[str], Directives], directive: str, value: str) -> None:
    assert unit("stagecal.service")[directive] == [value]


def test_the_watchdog_leaves_time_for_more_than_one_sign_of_life(unit: Callable[[str], Directives]) -> None:
    (seconds,) = unit("stagecal.service")["WatchdogSec"]
    assert 30 <= int(seconds) <= 300


def test_jobs_keep_their_temporary_directory_when_the_daemon_restarts(unit: Callable[[str], Directives]) -> None:
    # systemd removes the private /tmp with the daemon; a job inherits TMPDIR.
    service = unit("stagecal.service")
    (temporary,) = [value for value in service["Environment"] if value.startswith("TMPDIR=")]
    assert temporary == f"TMPDIR=/var/cache/{service['CacheDirectory'][0]}"


def test_secrets_come_as_credentials_whose_names_the_example_uses(checkout: Path) -> None:
    text = (checkout / "systemd" / "stagecal.service").read_text(encoding="utf-8")
    offered = set(re.findall(r"(?m)^#LoadCredential=([\w-]+):/etc/stagecal/[\w-]+$", text))
    example = (checkout / "etc" / "stagecal.toml").read_text(encoding="utf-8")
    assert offered == set(re.findall(r'(?m)^#?password_file = "([\w-]+)"$', example))


def writable(directives: Directives) -> list[Path]:
    state = [f"/var/lib/{name}" for name in directives["StateDirectory"]]
    return [Path(path) for path in (*directives["ReadWritePaths"], *state)]


def test_each_directory_that_the_daemon_writes_lies_below_one_writable_mount(
    config: Config, unit: Callable[[str], Directives]
) -> None:
    places = writable(unit("stagecal.service"))
    # Links and renames stay inside one of these directories, and neither can cross a mount.
    for directory in (
        config.triggers.directory,
        config.cluster.work_area,
        config.staging.root,
        config.state.directory,
    ):
        assert len([place for place in places if directory.is_relative_to(place)]) == 1, directory


def test_directories_of_the_site_are_not_mounts_themselves(config: Config, unit: Callable[[str], Directives]) -> None:
    # A directory that is a mount of the unit would be read-only once somebody renamed it and made a new one.
    own = {config.triggers.directory, config.cluster.work_area, config.staging.root}
    for name in SERVICES:
        assert not own & set(writable(unit(name)))


def test_no_unit_starts_before_its_file_systems_are_mounted(unit: Callable[[str], Directives]) -> None:
    for name in SERVICES:
        service = unit(name)
        assert service["RequiresMountsFor"][0].split() == service["ReadWritePaths"]


def test_the_sweep_may_write_the_staging_root_and_the_state_only(
    config: Config, unit: Callable[[str], Directives]
) -> None:
    places = writable(unit("stagecal-expire.service"))
    assert any(config.staging.root.is_relative_to(place) for place in places)
    assert any(config.state.directory.is_relative_to(place) for place in places)
    assert not any(config.triggers.directory.is_relative_to(place) for place in places)
    assert not any(config.cluster.work_area.is_relative_to(place) for place in places)


def test_daemon_and_sweep_run_as_the_same_user(unit: Callable[[str], Directives]) -> None:
    daemon, sweep = (unit(name) for name in SERVICES)
    assert (daemon["User"], daemon["Group"]) == (sweep["User"], sweep["Group"])


def test_the_timer_runs_daily_spread_and_makes_up_for_a_missed_day(unit: Callable[[str], Directives]) -> None:
    timer = unit("stagecal-expire.timer")
    assert re.fullmatch(r"\*-\*-\* \d\d:\d\d:\d\d UTC", timer["OnCalendar"][0])
    assert timer["RandomizedDelaySec"]
    assert timer["Persistent"] == ["true"]


def test_cron_does_what_the_timer_does(checkout: Path, unit: Callable[[str], Directives]) -> None:
    lines = (checkout / "etc" / "cron.d" / "stagecal").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if line and not line.startswith("#") and not re.match(r"[A-Z]+=", line)]
    *when, user, command = line.split(maxsplit=6)
    assert len(when) == 5
    minute, hour, *rest = when
    assert int(minute) in range(60)
    assert int(hour) in range(24)
    assert rest == ["*", "*", "*"]
    service = unit("stagecal-expire.service")
    assert [user] == service["User"]
    # A percent sign would be a newline for cron.
    assert "%" not in command
    assert [shlex.join(shlex.split(command.removesuffix(" >/dev/null")))] == service["ExecStart"]


@pytest.mark.parametrize("name", SERVICES)
def test_units_start_a_program_of_the_package(checkout: Path, unit: Callable[[str], Directives], name: str) -> None:
    with (checkout / "pyproject.toml").open("rb") as file:
        programs = tomllib.load(file)["project"]["scripts"]
    program, subcommand, *options = shlex.split(unit(name)["ExecStart"][0])
    assert Path(program).name in programs
    assert subcommand == {"stagecal.service": "watch", "stagecal-expire.service": "expire"}[name]
    assert options == ["--config", "/etc/stagecal/stagecal.toml"]


@pytest.mark.parametrize("name", UNITS)
def test_units_are_explained(checkout: Path, name: str) -> None:
    lines = (checkout / "systemd" / name).read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith(f"# {name}: ")
    assert all(len(line) <= 120 for line in lines)
