"""Numbers of bytes as people read them."""

from __future__ import annotations


def readable_size(size: int) -> str:
    """Return a number of bytes as people read it: 5.77 GB (decimal units)."""
    value = float(size)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.2f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"
