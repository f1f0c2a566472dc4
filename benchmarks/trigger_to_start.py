"""How long from a trigger becoming visible to its job's process running, on the embedded site, with a real daemon.

    .venv/bin/python benchmarks/trigger_to_start.py [--count 50]

Each request is for a calibrator field of its own, so that none is served by a link; its command notes the time at
which it runs and reports that the field is no calibrator, which ends the request.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from stagecal.domain.trigger import Trigger, render, trigger_name
from stagecal.embedded import make_site

_COMMAND = """#!/bin/sh
date +%s.%N >{started}.part && mv {started}.part {started}
echo '{{"engine": "command", "not_calibrators": [{{"field": "x", "reason": "a benchmark"}}]}}' >../report.json
"""
MOUS, PROJECT = "uid://A001/X133d/X3cf3", "2018.1.01406.S"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50)
    count = parser.parse_args().count
    with tempfile.TemporaryDirectory() as directory:
        site = Path(directory) / "site"
        config = make_site(site)
        started, command = site / "started", site / "command.sh"
        command.write_text(_COMMAND.format(started=started))
        command.chmod(0o755)
        text = config.read_text().replace('engine = "casatasks"', f'engine = "command"\ncommand = "{command}"')
        config.write_text(text.replace('raw_fetch = ["store/fetch_raw.sh"]\n', ""))
        daemon = subprocess.Popen(
            [sys.executable, "-c", "from stagecal.cli.main import main; main()", "watch"],
            env={**os.environ, "STAGECAL_CONFIG": str(config)},
            stderr=(site / "watch.log").open("wb"),
        )
        try:
            _wait(lambda: "watching" in (site / "watch.log").read_text(), 20)
            figures = [_one(site, started, number) for number in range(count)]
        finally:
            daemon.terminate()
            daemon.wait(30)
    figures = sorted(1000 * figure for figure in figures)
    print(
        f"trigger visible -> job running, {count} requests: median {statistics.median(figures):.0f} ms, "
        f"p95 {figures[int(0.95 * count)]:.0f} ms, worst {figures[-1]:.0f} ms"
    )


def _one(site: Path, started: Path, number: int) -> float:
    started.unlink(missing_ok=True)
    request = Trigger("contact@example.org", "x", MOUS, PROJECT, (f"F{number}",), "A User", "u@example.org", "1")
    name = trigger_name(MOUS, datetime.now(UTC) + timedelta(seconds=number))
    hidden = site / "triggers" / f".{name}"
    hidden.write_text(render(request))
    visible = time.time()
    hidden.rename(site / "triggers" / name)
    _wait(started.exists, 20)
    _wait(lambda: not (site / "triggers" / name).exists(), 20)
    return float(started.read_text()) - visible


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise SystemExit("not in time: the daemon does not do what it should")
        time.sleep(0.002)


if __name__ == "__main__":
    main()
