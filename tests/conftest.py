"""What all tests share: marks for what a machine has to have, and a loud count of what it lacked.

`@pytest.mark.requires_root("why")` and `@pytest.mark.requires_program("strace", "openssl")` skip a test where the
machine cannot run it. With CI=true nothing may be skipped: every skip, of these marks or of a test's own, is a failure.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Golden files, and the option that renews them.
pytest_plugins = ["tests.goldens"]

# What the person who runs the tests has configured for their own site must not reach them. The CASA worker may.
for _name in ("STAGECAL_CONFIG", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "CREDENTIALS_DIRECTORY"):
    os.environ.pop(_name, None)
# Tests of modes expect the usual mask; those of another mask set it themselves.
os.umask(0o022)


def nothing_may_be_skipped() -> bool:
    """Return whether this machine promises to have everything."""
    return os.environ.get("CI") == "true"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "requires_root(why): needs root, for instance to make files of other users")
    config.addinivalue_line("markers", "requires_program(*names): needs these programs on PATH")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if os.geteuid() != 0:
        for mark in item.iter_markers("requires_root"):
            pytest.skip(f"needs root: {' '.join(mark.args) or 'it does what only root may'}")
    for mark in item.iter_markers("requires_program"):
        missing = [name for name in mark.args if shutil.which(name) is None]
        if missing:
            pytest.skip(f"needs the program {', '.join(missing)}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Turn a skip into a failure where nothing may be skipped."""
    report: pytest.TestReport = yield
    if report.skipped and not hasattr(report, "wasxfail") and nothing_may_be_skipped():
        report.outcome = "failed"
        report.longrepr = f"skipped, although CI=true promises that nothing is: {skip_reason(report)}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Any:
    """The same for a whole module that skips itself."""
    report: pytest.CollectReport = yield
    if report.skipped and nothing_may_be_skipped():
        report.outcome = "failed"
        report.longrepr = f"skipped, although CI=true promises that nothing is: {skip_reason(report)}"
    return report


def skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Return why a test was skipped."""
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return re.sub(r"^Skipped: ", "", reason)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say loudly how many tests were skipped, and for want of what."""
    skipped = terminalreporter.stats.get("skipped", [])
    if not skipped:
        return
    reasons = Counter(skip_reason(report) for report in skipped)
    terminalreporter.section(f"{len(skipped)} TESTS WERE SKIPPED, THIS MACHINE LACKS:", sep="!", yellow=True, bold=True)
    for reason, number in reasons.most_common():
        terminalreporter.line(f"{number:5} x {reason}")


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The top of the checkout."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """A function (name, make) that returns a directory that `make` filled, once for all processes of a run."""

    def directory_of(name: str, make: Callable[[Path], None]) -> Path:
        base = tmp_path_factory.getbasetemp()
        if "PYTEST_XDIST_WORKER" in os.environ:
            base = base.parent
        directory = base / name
        with (base / f"{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not directory.exists():
                partial = base / f"{name}.partial"
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                make(partial)
                partial.rename(directory)
        return directory

    return directory_of
