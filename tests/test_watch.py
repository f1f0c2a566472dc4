"""Events wake the daemon whatever happens to the directory, and systemd is told how the daemon is."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stagecal.adapters import service_notify
from stagecal.adapters.trigger_directory import TriggerDirectory
from stagecal.adapters.watch import DirectoryWatch

LIMIT_S = 10.0


def eventually(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "triggers"
    path.mkdir()
    return path


@pytest.fixture
def woken() -> threading.Event:
    return threading.Event()


@pytest.fixture
def watch(directory: Path, woken: threading.Event):
    watch = DirectoryWatch(directory, woken.set)
    assert not watch.healthy()
    assert watch.renew()
    yield watch
    watch.stop()


def wakes(watch: DirectoryWatch, woken: threading.Event, act: Callable[[], object]) -> bool:
    settle(woken)
    act()
    return woken.wait(LIMIT_S)


def settle(woken: threading.Event) -> None:
    """Wait until no event has come for a while."""
    woken.clear()
    while woken.wait(0.2):
        woken.clear()


@pytest.mark.parametrize("way", ["written", "renamed inside", "moved in", "linked", "removed"])
def test_every_way_in_which_a_trigger_comes_or_goes_wakes(watch, woken, directory, way):
    outside = directory.with_name("outside")
    outside.write_bytes(b"x")
    (directory / ".hidden").write_bytes(b"x")
    acts: dict[str, Callable[[], object]] = {
        "written": lambda: (directory / "trigger-a").write_bytes(b"x"),
        "renamed inside": lambda: (directory / ".hidden").rename(directory / "trigger-a"),
        "moved in": lambda: outside.rename(directory / "trigger-a"),
        "linked": lambda: os.link(outside, directory / "trigger-a"),
        "removed": (directory / ".hidden").unlink,
    }
    assert wakes(watch, woken, acts[way])


def test_our_own_look_does_not_wake_us(watch, woken, directory):
    (directory / "trigger-a").write_bytes(b"x")
    settle(woken)
    for _ in range(3):
        assert len(TriggerDirectory(directory).look().entries) == 1
    assert not woken.wait(0.3)


def test_a_wake_that_raises_does_not_end_the_watch(directory):
    calls = []

    def wake() -> None:
        calls.append(1)
        raise RuntimeError("a fault of ours")

    watch = DirectoryWatch(directory, wake)
    assert watch.renew()
    try:
        for number in range(3):
            seen = len(calls)
            (directory / f"trigger-{number}").write_bytes(b"x")
            assert eventually(lambda seen=seen: len(calls) > seen)
        assert watch.healthy()
    finally:
        watch.stop()


def remove_and_make(directory: Path) -> None:
    directory.rmdir()
    directory.mkdir()


def rename_and_make(directory: Path) -> None:
    directory.rename(directory.with_name("away"))
    directory.mkdir()


@pytest.mark.parametrize("replace", [remove_and_make, rename_and_make])
def test_a_replaced_directory_is_noticed_and_watched_again(watch, woken, directory, replace):
    replace(directory)
    assert eventually(lambda: not watch.healthy())
    assert watch.renew()
    assert watch.healthy()
    assert wakes(watch, woken, lambda: (directory / "trigger-a").write_bytes(b"x"))


def test_a_missing_directory_stays_unhealthy_until_it_returns(watch, woken, directory):
    shutil.rmtree(directory)
    assert not watch.healthy()
    assert not watch.renew()
    assert not watch.renew()
    assert not watch.healthy()
    directory.mkdir()
    assert watch.renew()
    assert wakes(watch, woken, lambda: (directory / "trigger-a").write_bytes(b"x"))


def test_a_watch_of_no_directory_can_be_made_and_stopped(tmp_path):
    watch = DirectoryWatch(tmp_path / "missing", lambda: None)
    assert not watch.renew()
    watch.stop()
    watch.stop()


def test_a_stopped_watch_leaves_no_threads(directory):
    before = set(threading.enumerate())
    watch = DirectoryWatch(directory, lambda: None)
    assert watch.renew()
    assert set(threading.enumerate()) > before
    watch.stop()
    assert not watch.healthy()
    assert eventually(lambda: set(threading.enumerate()) <= before)


def test_renewing_a_healthy_watch_changes_nothing(watch):
    before = set(threading.enumerate())
    assert watch.renew()
    assert set(threading.enumerate()) == before


# --- systemd -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["file", "abstract"])
def service_manager(request, tmp_path, monkeypatch):
    """A datagram socket as systemd makes it; gives the socket and the value of NOTIFY_SOCKET."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        name = f"stagecal-test-{os.getpid()}-{time.monotonic_ns()}"
        address = f"/tmp/{name}" if request.param == "file" else f"@{name}"
        receiver.bind(address.replace("@", "\0"))
        receiver.settimeout(LIMIT_S)
        yield receiver, {"NOTIFY_SOCKET": address}
        Path(address).unlink(missing_ok=True)


def test_systemd_hears_what_the_daemon_says(service_manager):
    receiver, environ = service_manager
    lines = (service_notify.READY, service_notify.status("watching\nREADY=0  Süß"))
    assert service_notify.notify(*lines, environ=environ)
    assert receiver.recv(1000).decode() == "READY=1\nSTATUS=watching READY=0 Süß"
    for line in (service_notify.WATCHDOG, service_notify.STOPPING, service_notify.extend_timeout(1.5)):
        assert service_notify.notify(line, environ=environ)
    assert [receiver.recv(1000) for _ in range(3)] == [b"WATCHDOG=1", b"STOPPING=1", b"EXTEND_TIMEOUT_USEC=1500000"]


@pytest.mark.parametrize(
    "address", ["", "relative", "/missing/socket", "@nobody-listens-here", "/dev/null", "@a\0b", "/" + "x" * 200]
)
def test_without_a_listener_nothing_is_told_and_nothing_raised(address):
    assert service_notify.notify(service_notify.READY, environ={"NOTIFY_SOCKET": address}) is False
    assert service_notify.notify(service_notify.READY, environ={}) is False


@pytest.mark.timeout(20)
def test_a_listener_that_never_reads_does_not_hold_the_daemon_up(service_manager):
    _, environ = service_manager
    answers = [service_notify.notify(service_notify.WATCHDOG, environ=environ) for _ in range(5000)]
    assert answers[0] is True
    assert answers[-1] is False


@pytest.mark.parametrize(
    ("environ", "interval"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "1500000", "WATCHDOG_PID": str(os.getpid())}, 1.5),
        ({"WATCHDOG_USEC": "1500000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "-5"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "²"}, None),
    ],
)
def test_the_watchdog_interval_is_that_of_this_process(environ, interval):
    assert service_notify.watchdog_interval_s(environ) == interval
