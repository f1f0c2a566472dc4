"""Finds, or makes once per user, the Python environment in which CASA runs: our own processes never import CASA.

CASA reads the command line of the program that imports it, and may crash or hang: it lives in a worker process with
an environment of its own. Making one needs a package index (pip's own configuration says which) and 2 GiB of disk;
TransientError and FatalError say what was missing. An interrupted attempt leaves nothing that would be taken for a
worker, and two processes that want one at the same time make it once.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from stagecal.ports import FatalError, TransientError, UsageError
from stagecal.resources import resource

WORKER_VARIABLE = "STAGECAL_CASA_WORKER"
CASA_IMPORTS = ("casatasks", "casacore.tables")
NEEDED_BYTES = 2 * 1024**3
_COMPLETE = "complete"
_CHECK_TIMEOUT_S = 300
_KEPT_LINES = 400
# What pip says when the index cannot be reached, and when the disk is full.
_NETWORK_WORDS = ("Retrying (", "Could not fetch URL", "ConnectionError", "Connection refused", "timed out", "Timeout")
_DISK_WORDS = ("No space left on device", "Disk quota exceeded")


def find_casa_worker(
    configured: Path | None = None,
    environ: Mapping[str, str] = os.environ,
    *,
    requirements: Path | None = None,
) -> Path | None:
    """Return the Python of the CASA worker environment, or None if it has still to be made.

    It is the one that $STAGECAL_CASA_WORKER names, else `configured`, else the user's own in the cache directory
    ($XDG_CACHE_HOME or ~/.cache), of the given requirements (by default ours). Raises UsageError if the one that is
    named is no program.
    """
    named = environ.get(WORKER_VARIABLE)
    if named:
        return _program(Path(named).absolute(), f"${WORKER_VARIABLE}")
    if configured is not None:
        return _program(configured.absolute(), "casa_worker in [restore]")
    python = _python_of(_worker_directory(requirements or requirements_file(), environ))
    return python if _is_complete(python) else None


def ensure_casa_worker(
    configured: Path | None = None,
    *,
    requirements: Path | None = None,
    progress: TextIO,
    environ: Mapping[str, str] = os.environ,
    imports: Sequence[str] = CASA_IMPORTS,
    needed_bytes: int = NEEDED_BYTES,
) -> Path:
    """Return the Python of the CASA worker environment, after making it if there is none.

    What happens is shown on `progress`: on a terminal one moving line, elsewhere a line per package. The new
    environment counts only after it has imported `imports` under our site configuration of CASA.
    Raises TransientError (no network, no disk space, a cache directory that cannot be written) or FatalError (no venv
    module, an index without these packages, a CASA that cannot be imported); UsageError as `find_casa_worker`.
    """
    requirements = requirements or requirements_file()
    found = find_casa_worker(configured, environ, requirements=requirements)
    if found is not None:
        return found
    directory = _worker_directory(requirements, environ)
    display = _Display(progress)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _lock(directory, display):
            python = _python_of(directory)
            if not _is_complete(python):
                _make(directory, requirements, environ, display, imports=imports, needed_bytes=needed_bytes)
            return python
    except OSError as error:
        raise TransientError(
            f"the CASA worker environment cannot be made in {directory.parent} ({error.strerror or error}): "
            f"make room or set XDG_CACHE_HOME to a directory on a local disk, and try again"
        ) from error
    finally:
        display.close()


def casa_environment(python: Path, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment for a process of this worker Python that imports CASA: `environ`, made fit for it.

    CASA's site configuration is ours, by an absolute path, so that neither the network nor the home directory is
    used; settings of our own Python stay out. The command line is the caller's duty: CASA reads it.
    """
    fit = {name: value for name, value in environ.items() if not name.startswith("PYTHON")}
    fit["CASASITECONFIG"] = str(resource("templates", "casa", "casasiteconfig.py"))
    fit["PATH"] = os.pathsep.join([str(python.absolute().parent), environ.get("PATH", os.defpath)])
    return fit


def requirements_file() -> Path:
    """Return the file that lists the packages of the CASA worker environment."""
    return resource("etc", "casa-worker-requirements.txt")


def _program(python: Path, source: str) -> Path:
    if not (python.is_file() and os.access(python, os.X_OK)):
        raise UsageError(f"{source} names {python}, which is no program: name the Python of an environment with CASA")
    return python


def _worker_directory(requirements: Path, environ: Mapping[str, str]) -> Path:
    """Return where the worker of these requirements stands, for this version of Python."""
    cache = Path(environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():
        cache = Path(environ.get("HOME") or os.path.expanduser("~")) / ".cache"
    lines = (line.partition("#")[0].strip() for line in requirements.read_text(encoding="utf-8").splitlines())
    digest = hashlib.sha256("\n".join(line for line in lines if line).encode()).hexdigest()[:12]
    return cache / "stagecal" / f"casa-worker-{sys.implementation.cache_tag}-{digest}"


def _python_of(directory: Path) -> Path:
    return directory / "bin" / "python"


def _is_complete(python: Path) -> bool:
    # The environment's Python is a link to the system's, which may have gone since.
    return (python.parent.parent / _COMPLETE).is_file() and os.access(python, os.X_OK)


@contextmanager
def _lock(directory: Path, display: _Display) -> Iterator[None]:
    """Hold the lock of this worker; the lock file stays, because removing it would let two holders in."""
    with (directory.parent / f".{directory.name}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            display.line("another process is making the CASA worker environment: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(
    directory: Path,
    requirements: Path,
    environ: Mapping[str, str],
    display: _Display,
    *,
    imports: Sequence[str],
    needed_bytes: int,
) -> None:
    """Make the environment beside its place and move it there; the caller holds the lock."""
    for leftover in directory.parent.glob(f".{directory.name}.part*"):
        shutil.rmtree(leftover, ignore_errors=True)
    free = shutil.disk_usage(directory.parent).free
    if free < needed_bytes:
        raise TransientError(
            f"the CASA worker environment needs {needed_bytes / 1024**3:.1f} GiB and {directory.parent} has "
            f"{free / 1024**3:.1f} GiB free: make room, or set XDG_CACHE_HOME to a larger disk"
        )
    log = directory.parent / f"{directory.name}.log"
    partial = directory.parent / f".{directory.name}.part{os.getpid()}"
    try:
        display.line(f"making the CASA worker environment {directory} (once per user; the log is {log})")
        temporary = partial / "tmp"
        temporary.mkdir(parents=True)
        # An environment must not be installed into by our own settings, and large files go where there is room.
        fit = {
            name: value
            for name, value in environ.items()
            if not name.startswith("PYTHON") and name not in ("PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT")
        } | {"TMPDIR": str(temporary)}
        with log.open("w", encoding="utf-8") as log_file:
            _make_venv(partial, fit, log_file, display)
            _install(_python_of(partial), requirements, fit, log_file, display)
            _check(_python_of(partial), imports, fit, log_file, display)
        shutil.rmtree(temporary)
        (partial / _COMPLETE).write_text(f"imports {' '.join(imports)}\n", encoding="utf-8")
        if directory.exists():
            # Left over from a Python that is gone: it is not complete, else we would not be here.
            directory.rename(directory.parent / f"{partial.name}.old")
            shutil.rmtree(directory.parent / f"{partial.name}.old", ignore_errors=True)
        partial.rename(directory)
        display.line("the CASA worker environment is ready")
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _make_venv(directory: Path, environ: Mapping[str, str], log: TextIO, display: _Display) -> None:
    display.show("making an empty environment")
    if not sys.executable:
        raise FatalError("the CASA worker environment cannot be made: this Python does not know its own program")
    code, lines = _run([sys.executable, "-m", "venv", str(directory)], environ, log, display)
    if code:
        _raise_if_disk(lines, log)
        raise FatalError(
            f"an empty Python environment could not be made, see {log.name}: install the venv module of this Python "
            f"(on Debian the package python{sys.version_info[0]}.{sys.version_info[1]}-venv)"
        )


def _install(python: Path, requirements: Path, environ: Mapping[str, str], log: TextIO, display: _Display) -> None:
    # Only wheels: building casacore from its sources would take hours, or fail after as long.
    command = [str(python), "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    # With no second try at all, pip would not say that it was the network.
    command += ["--retries", "2", "--progress-bar", "off", "--only-binary", ":all:", "--requirement", str(requirements)]
    code, lines = _run(command, environ, log, display)
    if code == 0:
        return
    _raise_if_disk(lines, log)
    if any(word in line for line in lines for word in _NETWORK_WORDS):
        raise TransientError(
            f"the packages of the CASA worker environment could not be downloaded, see {log.name}: "
            f"check the network and pip's configuration, and try again"
        )
    reason = next((line for line in lines if line.startswith("ERROR:")), f"pip ended with code {code}")
    raise FatalError(f"the CASA worker environment could not be installed, see {log.name}: {reason}")


def _check(python: Path, imports: Sequence[str], environ: Mapping[str, str], log: TextIO, display: _Display) -> None:
    display.show(f"checking: import {', '.join(imports)}")
    text = "".join(f"import {name}\n" for name in imports)
    code, lines = _run([str(python), "-s", "-c", text], casa_environment(python, environ), log, display)
    if code:
        last = next((line for line in reversed(lines) if line.strip()), f"exit code {code}")
        raise FatalError(f"the new CASA worker environment cannot import CASA, see {log.name}: {last}")


def _raise_if_disk(lines: Sequence[str], log: TextIO) -> None:
    if any(word in line for line in lines for word in _DISK_WORDS):
        raise TransientError(
            f"the disk is full, see {log.name}: make room for the CASA worker environment, "
            "or set XDG_CACHE_HOME to a larger disk"
        )


def _run(
    command: Sequence[str], environ: Mapping[str, str], log: TextIO, display: _Display
) -> tuple[int, Sequence[str]]:
    """Run a command, show its progress, copy its output to the log; return exit code and last lines of output."""
    import selectors

    kept: deque[str] = deque(maxlen=_KEPT_LINES)
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=dict(environ),
    )
    assert process.stdout is not None  # noqa: S101 - it was asked for above
    try:
        with process.stdout as stdout, selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            rest = b""
            while True:
                if not selector.select(timeout=1.0):
                    display.tick()
                    continue
                chunk = os.read(stdout.fileno(), 65536)
                *complete, rest = (rest + chunk).split(b"\n")
                if not chunk:
                    complete, rest = ([rest] if rest else []), b""
                for raw in complete:
                    line = raw.decode("utf-8", "replace").rstrip()
                    log.write(line + "\n")
                    kept.append(line)
                    display.pip_line(line)
                if not chunk:
                    break
        return process.wait(), kept
    finally:
        # Ctrl-C or a full disk must not leave pip running behind our back.
        if process.poll() is None:
            process.kill()
            process.wait()


class _Display:
    """Progress for a person: a line that moves on a terminal, else a line for each new thing."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._moving = stream.isatty()
        self._begin = time.monotonic()
        self._text = ""

    def line(self, text: str) -> None:
        """Say something that stays to be read."""
        self._erase()
        self._write(f"{text}\n")

    def show(self, text: str) -> None:
        """Say what is going on now."""
        if text == self._text:
            return
        self._text = text
        if self._moving:
            self.tick()
        else:
            self._write(f"{self._elapsed()} {text}\n")

    def tick(self) -> None:
        """A second has passed."""
        if self._moving and self._text:
            width = shutil.get_terminal_size().columns - 1
            self._write("\r\x1b[K" + f"{self._elapsed()} {self._text}"[:width])

    def pip_line(self, line: str) -> None:
        """Say what a line of pip's output means, if it is worth it."""
        match line.split():
            case ["Downloading", file, *size] | ["Using", "cached", file, *size]:
                self.show(f"{_package(file)} {' '.join(size)}".rstrip())
            case ["Processing", file, *_]:
                self.show(_package(file))
            case ["Installing", "collected", "packages:", *names]:
                self.show(f"installing {len(names)} packages")

    def close(self) -> None:
        """End the moving line."""
        self._erase()

    def _elapsed(self) -> str:
        return f"{time.monotonic() - self._begin:5.0f} s "

    def _erase(self) -> None:
        if self._moving and self._text:
            self._write("\r\x1b[K")
            self._text = ""

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def _package(wheel: str) -> str:
    """Return name and version of a file that pip takes: casatools-6.7.0.31-cp311-....whl."""
    return " ".join(wheel.rpartition("/")[2].split("-")[:2])


def main() -> int:
    """Make the worker environment if there is none, and say where it is (`python -m stagecal.casa_worker`)."""
    try:
        print(f"CASA worker environment: {ensure_casa_worker(progress=sys.stderr).parents[1]}")
    except (FatalError, TransientError, UsageError) as error:
        print(f"stagecal.casa_worker: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
