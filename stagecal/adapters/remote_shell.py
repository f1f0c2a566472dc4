"""Runs a POSIX shell script on some machine and says what became of it: the code, the output, the errors.

A `Shell` answers only for a script that is proven to have ended. Fails with TransientError where that is unknown or
the machine cannot be reached (the script may have run, may still run, or never began), with FatalError where a person
has to look: a host key that is unknown or has changed, a refused key.
"""

from __future__ import annotations

import os
import re
import secrets
import selectors
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol

from stagecal.config import private_file_fault
from stagecal.ports import FatalError, TransientError

OUTPUT_LIMIT = 64 * 1024 * 1024
ERRORS_LIMIT = 256 * 1024
LINE_LIMIT = 64 * 1024
WORDS_LIMIT = 300
DEFAULT_TIMEOUT_S = 30.0

# Stands where the ssh program wants a host; the real one is an option, so that no host can pass for an option.
HOST_ALIAS = "node"

# A node with this label is as old as RHEL5: its SSH server knows only algorithms that are refused everywhere else.
LEGACY_LABEL = "legacy"


@dataclass(frozen=True)
class Answer:
    """What a script that ended left: its exit status, its output, and the beginning of its errors."""

    code: int
    output: bytes
    errors: bytes


@dataclass(frozen=True)
class Finding:
    """One thing that was tried on a machine: what, whether it is as jobs need it, and words for people."""

    name: str
    ok: bool
    text: str


class Shell(Protocol):
    """A way to one machine. It may be used by several threads at once."""

    def run(self, script: str, *arguments: str, stdin: bytes = b"", timeout_s: float | None = None) -> Answer:
        """Run `sh` with this script text and these positional arguments; return its answer.

        Raises TransientError if the machine cannot be reached, or the end is not known after `timeout_s` seconds;
        FatalError if waiting mends nothing (host key, refused key), or the script writes more than OUTPUT_LIMIT bytes.
        """
        ...

    def ask(self, script: str, *arguments: str, timeout_s: float | None = None) -> bytes:
        """Put a question (an empty line) to a script that is kept running and answers each line by one line.

        It is started when it does not run yet. A question may reach the machine twice. Raises as `run` does.
        """
        ...

    def close(self) -> None:
        """Let go of connections and processes of this side. What runs on the machine is not touched."""
        ...


class HostKeyChangedError(FatalError):
    """A node shows another host key than the pinned one: it was installed anew, or somebody stands in between."""


@dataclass(frozen=True)
class SshTarget:
    """Whom to talk to, and what proves that it is the one. `connect_s` bounds each step of making a connection."""

    node: str
    host: str
    port: int
    user: str | None
    key: Path | None
    known_hosts: Path
    labels: tuple[str, ...] = field(default=())
    connect_s: float = 5.0

    @property
    def host_key_name(self) -> str:
        """The name under which the host key stands in a known_hosts file."""
        return self.host if self.port == 22 else f"[{self.host}]:{self.port}"

    def check_files(self) -> None:
        """Raise FatalError if the key or the known host keys cannot be read, or others can read or write the key.

        No other keys than this one are tried.
        """
        if self.key is None:
            raise FatalError(f"{self.node}: there is no private key to be let in with: set [cluster] ssh_key")
        for file, what in ((self.known_hosts, "known host keys"), (self.key, "private key")):
            if not os.access(file, os.R_OK):
                raise FatalError(
                    f"{self.node}: the file of the {what}, {file}, is not there or cannot be read: "
                    f"set [cluster] {'ssh_key' if file is self.key else 'known_hosts'}"
                )
        try:
            fault = private_file_fault(self.key)
        except OSError as error:
            raise FatalError(f"{self.node}: the private key {self.key} cannot be read: {error.strerror}") from error
        if fault:
            raise FatalError(f"{self.node}: the private key {self.key} {fault}")

    def unknown_host_key(self) -> FatalError:
        """Return the error for a node whose host key nobody has pinned."""
        return FatalError(
            f"{self.node}: the host key of {self.host_key_name} is not in {self.known_hosts}: "
            "get it from the node's administrators and add it, nothing was sent"
        )

    def changed_host_key(self) -> HostKeyChangedError:
        """Return the error for a node that shows another host key than the pinned one."""
        return HostKeyChangedError(
            f"{self.node}: ALARM, {self.host_key_name} shows another host key than {self.known_hosts} has: "
            "either the node was installed anew or somebody stands in between; "
            "ask its administrators before you replace the line, nothing was sent"
        )

    def refused(self, words: str) -> FatalError:
        """Return the error for a node that does not let us in."""
        return FatalError(
            f"{self.node}: {self.host} refuses our key {self.key} ({words}): "
            "add its public half to authorized_keys of the account on the node"
        )


# --- what a machine says -------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """Return text for a terminal: what would steer it (escapes, bells, line ends, marks of direction) becomes a ?."""
    return text if text.isprintable() else "".join(letter if letter.isprintable() else "?" for letter in text)


def plain(words: str, limit: int = WORDS_LIMIT) -> str:
    """Return words of another machine as one printable line of at most `limit` characters."""
    line = printable(" ".join(words.split()))
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


# --- how a script travels ------------------------------------------------------------------------------------------


class Envelope:
    """A script on its way over a line on which others may write too, and on which the end must be unmistakable.

    `command` is for the account's login shell, whichever that is; the script itself and its arguments follow on
    standard input, then the script's own input. What a login file prints before the script begins is dropped, and
    its code stands in a last line of our own, so that the code of a broken connection is never taken for it.
    """

    def __init__(self, script: str, arguments: Sequence[str]) -> None:
        self._mark = f"stagecal-{secrets.token_hex(8)}"
        words = " ".join(shlex.quote(argument) for argument in arguments)
        program = f"echo {self._mark}\n(\nset -- {words}\n{script}\n)\necho {self._mark} $?\n"
        self.program = program.encode("utf-8", errors="surrogateescape")
        self.command = f"exec /bin/sh -c 'eval \"$(head -c {len(self.program)})\"'"
        self.begin = f"{self._mark}\n".encode()
        self._end = re.compile(rf"{self._mark} ([0-9]{{1,3}})\n\Z".encode())

    def opened(self, output: bytes) -> tuple[int, bytes] | None:
        """Given all that arrived, return the script's code and output, or None if its end did not arrive."""
        begin = output.find(self.begin)
        end = self._end.search(output, max(0, len(output) - 64))
        if begin < 0 or not end:
            return None
        return int(end[1]), output[begin + len(self.begin) : end.start()]


# --- programs of this machine --------------------------------------------------------------------------------------


def run_program(
    command: Sequence[str], *, stdin: bytes, timeout_s: float, environment: Mapping[str, str] | None, who: str
) -> Answer:
    """Run a program with bounded time and output; return its answer (a signal's number is negative in the code).

    Raises TransientError after `timeout_s` seconds, the program and its process group being killed then, and
    FatalError if it cannot be started or says too much. `who` begins each message.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        raise FatalError(f"{who}: {command[0]} cannot be started: {error.strerror}") from error
    try:
        output, errors = _converse(process, stdin, time.monotonic() + timeout_s, timeout_s, who)
    except BaseException:
        kill_group(process)
        raise
    finally:
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream:
                with suppress(OSError):
                    stream.close()
    return Answer(process.returncode, output, errors)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """End a program that was started as the leader of its own session, with its children; wait for it.

    Its children are ended too when it died before them. Once it was waited for, its number may be another's: then
    nothing is done.
    """
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Return whether a program has ended, without waiting for it: its number stays its own."""
    if process.returncode is not None:
        return True
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _converse(
    process: subprocess.Popen[bytes], stdin: bytes, deadline: float, timeout_s: float, who: str
) -> tuple[bytes, bytes]:
    """Feed and read a program until it is gone and both its streams have ended."""
    output, errors = bytearray(), bytearray()
    waiting = memoryview(stdin)
    assert process.stdin and process.stdout and process.stderr  # noqa: S101 - all three are pipes, for the type checker
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ, output)
        selector.register(process.stderr, selectors.EVENT_READ, errors)
        os.set_blocking(process.stdin.fileno(), False)
        selector.register(process.stdin, selectors.EVENT_WRITE)
        while selector.get_map():
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TransientError(f"{who}: no end within {timeout_s:.1f} s, what became of it is not known")
            for key, _ in selector.select(remaining):
                if key.data is None:
                    try:
                        waiting = waiting[os.write(key.fd, waiting[:65536]) :] if waiting else waiting
                    except BlockingIOError:
                        continue
                    except BrokenPipeError:
                        waiting = waiting[:0]
                    if not waiting:
                        selector.unregister(process.stdin)
                        process.stdin.close()
                elif chunk := os.read(key.fd, 65536):
                    keep(key.data, chunk, OUTPUT_LIMIT if key.data is output else ERRORS_LIMIT, output, who)
                else:
                    selector.unregister(key.fileobj)
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise TransientError(f"{who}: no end within {timeout_s:.1f} s, what became of it is not known") from None
    return bytes(output), bytes(errors)


def keep(buffer: bytearray, chunk: bytes, limit: int, output: bytearray, who: str) -> None:
    """Add what arrived. Too much output is a FatalError; of errors the beginning is enough."""
    buffer += chunk
    if len(buffer) > limit:
        if buffer is output:
            raise FatalError(f"{who}: more than {limit} bytes came as the answer to one question")
        del buffer[limit:]


class Answerer:
    """A program of this machine that is kept running and answers each line by one line."""

    def __init__(self, command: Sequence[str], program: bytes, environment: Mapping[str, str] | None, who: str) -> None:
        self._who = who
        self._rest = b""
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
                bufsize=0,
            )
        except OSError as error:
            raise FatalError(f"{who}: {command[0]} cannot be started: {error.strerror}") from error
        self.say(program)

    def say(self, text: bytes) -> None:
        """Send it. Raises TransientError if nobody listens any more."""
        try:
            self._stream(self._process.stdin).write(text)
        except OSError:
            raise TransientError(f"{self._who}: the connection was lost") from None

    def line(self, deadline: float) -> bytes:
        """Return the next line without its end. Raises TransientError at the deadline (monotonic) or at the end."""
        stream = self._stream(self._process.stdout)
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TransientError(f"{self._who}: no answer in time")
                chunk = os.read(stream.fileno(), 65536)
                if not chunk or len(self._rest) > LINE_LIMIT:
                    raise TransientError(f"{self._who}: the connection was lost")
                self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def close(self) -> None:
        """End it."""
        kill_group(self._process)
        for stream in (self._process.stdin, self._process.stdout):
            if stream:
                with suppress(OSError):
                    stream.close()

    @staticmethod
    def _stream(stream: IO[bytes] | None) -> IO[bytes]:
        assert stream is not None  # noqa: S101 - both are pipes, for the type checker
        return stream


class LocalShell:
    """The shell of this machine, for what needs no connection (a Slurm client here) and for tests.

    Scripts get `environment`, or ours if it is None.
    """

    def __init__(self, environment: Mapping[str, str] | None = None, name: str = "this machine") -> None:
        self._environment = environment
        self._name = name
        self._lock = threading.Lock()
        self._answerer: Answerer | None = None

    def run(self, script: str, *arguments: str, stdin: bytes = b"", timeout_s: float | None = None) -> Answer:
        """Run the script here; see Shell. A script that is killed by a signal has the code of shells, 128 + number."""
        answer = run_program(
            ("/bin/sh", "-c", script, "sh", *arguments),
            stdin=stdin,
            timeout_s=timeout_s or DEFAULT_TIMEOUT_S,
            environment=self._environment,
            who=self._name,
        )
        return answer if answer.code >= 0 else Answer(128 - answer.code, answer.output, answer.errors)

    def ask(self, script: str, *arguments: str, timeout_s: float | None = None) -> bytes:
        """Ask the kept script; see Shell."""
        deadline = time.monotonic() + (timeout_s or DEFAULT_TIMEOUT_S)
        with self._lock:
            try:
                if self._answerer is None:
                    command = ("/bin/sh", "-c", script, "sh", *arguments)
                    self._answerer = Answerer(command, b"", self._environment, self._name)
                self._answerer.say(b"\n")
                return self._answerer.line(deadline)
            except BaseException:
                self._close_answerer()
                raise

    def close(self) -> None:
        """End the kept script."""
        with self._lock:
            self._close_answerer()

    def _close_answerer(self) -> None:
        if self._answerer is not None:
            self._answerer.close()
            self._answerer = None
