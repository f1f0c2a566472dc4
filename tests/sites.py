"""A whole site for tests: real ledger, archive, trigger directory, staging area, maildir and local jobs, in tmp_path.

Only the clock is ours, and the calibration: the site's `command` unpacks small real MSs (tests/data/measurement_sets)
instead of calibrating. Files in `<site>/behaviour/` steer it: `exit` (its exit code), `sleep` (seconds before it ends),
`without` (an EB for which it leaves nothing), `use` (the name of the MS that it delivers), `report` (its report.json).
"""

from __future__ import annotations

import sqlite3
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from stagecal import wiring
from stagecal.config import Config, load_config
from stagecal.domain.requests import Request
from stagecal.domain.trigger import Trigger, render, trigger_name
from stagecal.embedded import make_site
from stagecal.services.context import Site
from stagecal.services.receiving import Receiver
from stagecal.services.rounds import Rounds
from stagecal.services.sweeping import know_root

MEASUREMENT_SETS = Path(__file__).parent / "data" / "measurement_sets"
# In the future, because a job compares its lease with the real time of its node.
START = datetime(2031, 1, 2, 3, 4, 5, tzinfo=UTC)
MAIN = "uid://A001/X12a3/X80e"
MAIN_PROJECT = "2017.1.01347.S"
RELEASED = "uid://A001/X1296/X675"
RELEASED_PROJECT = "2017.1.00727.S"
CALIBRATORS = "uid://A001/X159a/X6b"
CALIBRATORS_PROJECT = "2021.1.01582.S"

_COMMAND = """#!/bin/sh
# calibrate.sh PROJECT MOUS OUTPUT [--calfields A,B] EB...: delivers small real MSs as a site's command would.
set -eu
behaviour={behaviour}
output=$3
use=full
shift 3
if [ "${{1:-}}" = --calfields ]; then
    use=calibrators
    [ "$2" != J0510+1800 ] || use=J0510+1800
    [ "$2" != HL_Tau ] || use=HL_Tau
    shift 2
fi
[ ! -e "$behaviour/use" ] || use=$(cat "$behaviour/use")
[ ! -e "$behaviour/sleep" ] || sleep "$(cat "$behaviour/sleep")"
echo calibrated >> {runs}
echo "calibrating $*"
for uid do
    eb=$(printf '%s' "$uid" | tr ':/' '__')
    if [ -e "$behaviour/without" ] && grep -qx "$uid" "$behaviour/without"; then continue; fi
    cp -R "{sets}/$use.ms" "$output/$eb.ms.split.cal"
done
[ ! -e "$behaviour/report" ] || cp "$behaviour/report" ../report.json
[ ! -e "$behaviour/exit" ] || exit "$(cat "$behaviour/exit")"
"""


@dataclass
class FakeClock:
    """A clock that stands still until it is moved."""

    time: datetime = START

    def now(self) -> datetime:
        return self.time

    def advance(self, **amount: float) -> None:
        self.time += timedelta(**amount)


@dataclass
class SiteForTests:
    """The site, its clock, and what a test does with it."""

    directory: Path
    config: Config
    clock: FakeClock
    site: Site
    receiver: Receiver = field(init=False)

    def __post_init__(self) -> None:
        self.receiver = Receiver(self.site)

    def place(self, mous: str = MAIN, project: str = MAIN_PROJECT, **changes: Any) -> str:
        """Put a trigger as `trigger-calms` writes it into the directory; return its name."""
        values = {
            "contact": "contact@example.org",
            "copy": "maintainer@example.org",
            "mous": mous,
            "project": project,
            "calfields": (),
            "user": "Pi Person",
            "email": "pi@example.org",
            "ticket": "12345",
            **changes,
        }
        at = self.clock.now()
        directory = self.config.triggers.directory
        while (directory / trigger_name(mous, at)).exists():
            at += timedelta(seconds=1)
        name = trigger_name(mous, at)
        (directory / name).write_text(render(Trigger(**values)), encoding="utf-8")
        return name

    def behave(self, **files: str) -> None:
        """Steer the calibration command; an empty text removes the file."""
        for name, text in files.items():
            path = self.directory / "behaviour" / name
            if text:
                path.write_text(text, encoding="utf-8")
            else:
                path.unlink(missing_ok=True)

    def rounds(self) -> Rounds:
        """Return a worker that takes every step in this thread."""
        return Rounds(self.site, self.receiver)

    def run(self, until: Callable[[], bool] | None = None, *, seconds: float = 30) -> None:
        """Do rounds until nothing can move any more (or `until` holds); jobs are real and are waited for.

        The clock moves on by a second per round in which nothing moved, so that polls become due.
        """
        import time

        rounds = self.rounds()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            moved = rounds.run().moved
            if until is not None and until():
                return
            if until is None and (rounds.is_idle() or rounds.waits_long(self.clock.now())):
                return
            if not moved:
                time.sleep(0.01)
                self.clock.advance(seconds=1)
        raise AssertionError(f"not done within {seconds} s: {self.requests()}")

    def requests(self) -> list[Request]:
        """Return all requests in the order of the queue."""
        return list(self.site.ledger.requests())

    def only(self) -> Request:
        """Return the one request that there is."""
        (request,) = self.requests()
        return request

    def mails(self) -> list[str]:
        """Return the mails in the maildir, the oldest first, with LF line ends."""
        files = sorted((self.directory / "mail" / "new").glob("*"))
        return [path.read_bytes().decode("utf-8").replace("\r\n", "\n") for path in files]

    def triggers(self) -> list[str]:
        """Return the names of the triggers in the directory."""
        return sorted(path.name for path in self.config.triggers.directory.glob("trigger-*"))

    def published(self) -> list[Path]:
        """Return the published directories."""
        return sorted(path for path in self.config.staging.root.iterdir() if len(path.name) == 32)

    def job_directories(self) -> list[Path]:
        """Return the job directories that are there."""
        return sorted(self.config.cluster.work_area.glob("WORK*"))

    def calibrations(self) -> int:
        """Return how often the calibration command ran."""
        runs = self.directory / "runs"
        return len(runs.read_text().splitlines()) if runs.exists() else 0

    def archive(self, sql: str, *values: str) -> None:
        """Change the archive's database."""
        with sqlite3.connect(self.directory / "archive.db") as database:
            database.execute(sql, values)
        database.close()

    def set_state(self, mous: str, state: str) -> None:
        """Set the state of a MOUS in the archive."""
        self.archive("UPDATE OBS_UNIT_SET_STATUS SET DOMAIN_ENTITY_STATE = ? WHERE STATUS_ENTITY_ID = ?", state, mous)

    def restart(self) -> SiteForTests:
        """Return the site as a new process would find it on disk."""
        again = replace(wiring.site(self.config), clock=self.clock)
        return SiteForTests(self.directory, self.config, self.clock, again)


def make_test_site(directory: Path, *, config: str = "") -> SiteForTests:
    """Make a site below `directory`; `config` is TOML that is added to the end of the embedded configuration."""
    home = directory / "site"
    path = make_site(home)
    (home / "behaviour").mkdir()
    sets = home / "sets"
    sets.mkdir()
    for archive in MEASUREMENT_SETS.glob("*.tar.xz"):
        with tarfile.open(archive) as tar:
            tar.extractall(sets, filter="data")
    command = home / "calibrate.sh"
    command.write_text(_COMMAND.format(behaviour=home / "behaviour", sets=sets, runs=home / "runs"), encoding="utf-8")
    command.chmod(0o755)
    text = path.read_text(encoding="utf-8")
    text = text.replace('engine = "casatasks"', f'engine = "command"\ncommand = "{command}"')
    text = text.replace('raw_fetch = ["store/fetch_raw.sh"]\n', "")
    text = text.replace("reserve_gb = 1\n", "reserve_gb = 0\n").replace(
        "poll_interval_s = 1\n", "poll_interval_s = 0.1\n"
    )
    path.write_text(text + config, encoding="utf-8")
    loaded = load_config(path, environ={})
    clock = FakeClock()
    site = replace(wiring.site(loaded), clock=clock)
    know_root(site)
    return SiteForTests(home, loaded, clock, site)
