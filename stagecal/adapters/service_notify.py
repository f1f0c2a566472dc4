"""Tells systemd how the daemon is, over the datagram socket that it names in NOTIFY_SOCKET.

Never raises and never waits: without a socket, or with one that is broken, nothing is told and False is returned.
The protocol is that of sd_notify(3).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

READY = "READY=1"
WATCHDOG = "WATCHDOG=1"
STOPPING = "STOPPING=1"


def status(text: str) -> str:
    """Return the line that shows `text` in `systemctl status`; it can hold no other assignment."""
    return "STATUS=" + " ".join(text.split())


def extend_timeout(seconds: float) -> str:
    """Return the line that asks for this much more time to start or stop."""
    return f"EXTEND_TIMEOUT_USEC={round(seconds * 1_000_000)}"


def notify(*lines: str, environ: Mapping[str, str] | None = None) -> bool:
    """Send these lines (READY, WATCHDOG, STOPPING, `status(...)`) as one message; return whether it was handed over."""
    address = (os.environ if environ is None else environ).get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.setblocking(False)
            channel.connect(address)
            channel.sendall("\n".join(lines).encode(errors="backslashreplace"))
    except (OSError, ValueError):
        return False
    return True


def watchdog_interval_s(environ: Mapping[str, str] | None = None) -> float | None:
    """Return after how many seconds without WATCHDOG=1 systemd ends this process; None if it does not watch it.

    Tell it at least twice as often.
    """
    values = os.environ if environ is None else environ
    interval, process = values.get("WATCHDOG_USEC", ""), values.get("WATCHDOG_PID", "")
    if not (interval.isascii() and interval.isdigit() and int(interval) > 0):
        return None
    if process and process != str(os.getpid()):
        return None
    return int(interval) / 1_000_000
