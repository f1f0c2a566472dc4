"""Where the archive keeps the product files of MOUSs: reads the few small ones that a restore is planned from.

The work is done by the very program that fetches files on the nodes (templates/job/fetch_products.py), in a process of
its own. Raises TransientError if the store cannot be reached now, FatalError for a file that it does not have or that
differs from what the store says of it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stagecal.ports import FatalError, TransientError

_TRY_LATER = 5
_LARGEST = 64 * 1024 * 1024


@dataclass(frozen=True)
class ProductStore:
    """The ProductFiles port over NGAS servers (`host:port`, several separated by commas), or a command of the site.

    `program` is the fetching program; `timeout_s` is how long all files of one call may take.
    """

    program: Path
    ngas: str | None
    command: tuple[str, ...] | None
    timeout_s: float = 300.0

    def read(self, names: Sequence[str]) -> Mapping[str, bytes]:
        """Return the content of these files of the archive."""
        if not names:
            return {}
        if not self.ngas and not self.command:
            raise FatalError(
                "nobody knows where archived products are: set [restore] ngas, or products_fetch for a command"
            )
        try:
            return self._fetched(names)
        except OSError as error:
            # A full disk, most likely; the names come from the program itself, which has looked at them.
            raise TransientError(f"archived products cannot be kept here: {error}") from error

    def _fetched(self, names: Sequence[str]) -> Mapping[str, bytes]:
        with tempfile.TemporaryDirectory(prefix="stagecal-") as made:
            directory = Path(made)
            plan = {
                "ngas": self.ngas,
                "fetch_command": list(self.command) if self.command and not self.ngas else None,
                "files": [
                    {"file_id": name, "name": name, "into": "files", "size": None, "checksum": None} for name in names
                ],
                "expand": [],
                "copies": [],
                "one_manifest_in": None,
                "need_bytes": None,
                "tries": 3,
                "timeout_s": 20,
                "deadline_s": self.timeout_s,
            }
            (directory / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
            self._run(directory)
            return {name: _content(directory / "files" / name) for name in names}

    def _run(self, directory: Path) -> None:
        try:
            done = subprocess.run(
                [sys.executable, "-I", str(self.program.resolve()), "plan.json"],
                cwd=directory,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=self.timeout_s + 30,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise TransientError(f"archived products did not arrive within {self.timeout_s:g} s") from None
        except OSError as error:
            raise TransientError(f"archived products cannot be fetched: {error.strerror}") from error
        if done.returncode == 0:
            return
        said = done.stderr.decode("utf-8", errors="replace").strip().splitlines()
        reason = said[-1][:500] if said else f"exit code {done.returncode}"
        kind = TransientError if done.returncode == _TRY_LATER or done.returncode < 0 else FatalError
        raise kind(f"archived products cannot be fetched: {reason}")


def _content(path: Path) -> bytes:
    if path.stat().st_size > _LARGEST:
        raise FatalError(f"{path.name} is too large to be what a restore is planned from ({path.stat().st_size} bytes)")
    return path.read_bytes()
