"""A Shell on one node by the ssh program: one kept master connection, pinned host key, an end to every wait.

For nodes that are too old for paramiko (the label "legacy" allows the algorithms of the RHEL5 age, for that node
only), and for sites that trust the ssh program more. Commands go through the master or not at all: there is no
silent second connection. Fails with TransientError if the node cannot be reached or the end of a script is not known,
with FatalError if the host key is unknown or changed, or our key is refused.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stagecal.adapters.remote_shell import (
    DEFAULT_TIMEOUT_S,
    HOST_ALIAS,
    LEGACY_LABEL,
    Answer,
    Answerer,
    Envelope,
    SshTarget,
    plain,
    run_program,
)
from stagecal.ports import FatalError, TransientError

# A server gives ten sessions to one connection (MaxSessions); one is for the kept script, one is left free.
_SESSIONS = 8
# A master that nobody used for so long ends by itself: that of a daemon that was killed, for instance.
_PERSIST_S = 300
_ALIVE_INTERVAL_S = 10
_ALIVE_COUNT = 3
_PREFIX = "stagecal-ssh-"
# The name of a Unix socket has 107 bytes: ours takes 24 below this directory, and ssh appends 17 while it makes one.
_LONGEST_DIRECTORY = 66

# The fast cipher first; the list is written out because old ssh programs cannot move one to the front.
_CIPHERS = (
    "aes128-gcm@openssh.com",
    "aes128-ctr",
    "aes256-gcm@openssh.com",
    "aes256-ctr",
    "chacha20-poly1305@openssh.com",
)
# What a server of the RHEL5 age (OpenSSH 4.3) speaks. All of it is broken or weak: for labelled nodes only.
_LEGACY_CIPHERS = ("aes128-cbc", "aes256-cbc", "3des-cbc")
_LEGACY_OPTIONS = (
    "HostKeyAlgorithms=+ssh-rsa",
    # An RSA key has to sign with SHA-1: the newer ways are left out, so that none of them is tried first.
    "PubkeyAcceptedKeyTypes=ssh-rsa,ssh-ed25519,ecdsa-sha2-nistp256",
    "KexAlgorithms=+diffie-hellman-group14-sha1,diffie-hellman-group-exchange-sha1,diffie-hellman-group1-sha1",
    "MACs=+hmac-sha1,hmac-md5",
)


def ssh_command(target: SshTarget) -> tuple[str, ...]:
    """Return the ssh program with all options for this node, without a host: HOST_ALIAS has to follow.

    Nothing of the user's or the system's configuration is read, nothing is asked, and only the pinned keys count.
    """
    is_old = LEGACY_LABEL in target.labels
    options = [
        f"HostName={target.host}",
        f"Port={target.port}",
        f"UserKnownHostsFile={_quoted(target.known_hosts)}",
        "GlobalKnownHostsFile=/dev/null",
        "StrictHostKeyChecking=yes",
        "UpdateHostKeys=no",
        "CheckHostIP=no",
        "BatchMode=yes",
        "PreferredAuthentications=publickey",
        "IdentitiesOnly=yes",
        "IdentityAgent=none",
        f"IdentityFile={_quoted(target.key)}" if target.key else "",
        f"User={target.user}" if target.user else "",
        f"ConnectTimeout={max(1, round(target.connect_s))}",
        f"ServerAliveInterval={_ALIVE_INTERVAL_S}",
        f"ServerAliveCountMax={_ALIVE_COUNT}",
        "TCPKeepAlive=yes",
        "ForwardAgent=no",
        "ForwardX11=no",
        "ClearAllForwardings=yes",
        "PermitLocalCommand=no",
        "RequestTTY=no",
        "EscapeChar=none",
        # Below this level ssh does not even say why it could not agree with a server.
        "LogLevel=INFO",
        f"Ciphers={','.join(_CIPHERS + (_LEGACY_CIPHERS if is_old else ()))}",
        *(_LEGACY_OPTIONS if is_old else ()),
    ]
    return ("ssh", "-F", "/dev/null", "-T", *(f"-o{option}" for option in options if option))


class OpenSshShell:
    """The Shell of one node. The master lives in a private directory of its own, and is made anew when it is gone."""

    def __init__(self, target: SshTarget) -> None:
        self._target = target
        self._sessions = threading.BoundedSemaphore(_SESSIONS)
        self._lock = threading.Lock()
        self._directory: Path | None = None
        self._question_lock = threading.Lock()
        self._answerer: Answerer | None = None

    def run(self, script: str, *arguments: str, stdin: bytes = b"", timeout_s: float | None = None) -> Answer:
        """Run the script on the node; see Shell."""
        patience = timeout_s or DEFAULT_TIMEOUT_S
        deadline = time.monotonic() + patience
        envelope = Envelope(script, arguments)
        if not self._sessions.acquire(timeout=patience):
            raise TransientError(f"{self._target.node}: too many commands at once, none of them ends")
        try:
            with self._master(deadline) as client:
                answer = run_program(
                    (*client, envelope.command),
                    stdin=envelope.program + stdin,
                    timeout_s=max(0.001, deadline - time.monotonic()),
                    environment=_environment(),
                    who=self._target.node,
                )
                opened = envelope.opened(answer.output)
                if opened is None:
                    raise TransientError(
                        f"{self._target.node}: the connection was lost, what became of the command is not known: "
                        f"{_words(answer.errors)}"
                    )
                return Answer(*opened, answer.errors)
        finally:
            self._sessions.release()

    def ask(self, script: str, *arguments: str, timeout_s: float | None = None) -> bytes:
        """Ask the kept script; see Shell."""
        deadline = time.monotonic() + (timeout_s or DEFAULT_TIMEOUT_S)
        with self._question_lock:
            if self._answerer is not None:
                # The line may have been dead since the last question. A silent one has used up the time then.
                with suppress(TransientError):
                    self._answerer.say(b"\n")
                    return self._answerer.line(deadline)
                self._forget_answerer()
            try:
                with self._master(deadline) as client:
                    envelope = Envelope(script, arguments)
                    self._answerer = Answerer(
                        (*client, envelope.command), envelope.program, _environment(), self._target.node
                    )
                    while self._answerer.line(deadline) + b"\n" != envelope.begin:
                        continue
                    self._answerer.say(b"\n")
                    return self._answerer.line(deadline)
            except BaseException:
                self._forget_answerer()
                raise

    def close(self) -> None:
        """End the kept script and the master."""
        if self._question_lock.acquire(timeout=self._target.connect_s):
            try:
                self._forget_answerer()
            finally:
                self._question_lock.release()
        self._end_master(self._directory)

    # --- the master ------------------------------------------------------------------------------------------------

    @contextmanager
    def _master(self, deadline: float) -> Iterator[tuple[str, ...]]:
        """Give the command of a client that goes through a living master. After trouble the next one is made anew."""
        if not self._lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise TransientError(f"{self._target.node}: the connection is still being made")
        try:
            if self._directory is None or not _listens(self._directory / "m"):
                self._remove_directory()
                self._directory = _start_master(self._target, deadline)
            client = (
                *ssh_command(self._target),
                f"-oControlPath={self._directory}/m",
                "-oControlMaster=no",
                # Without this a client whose master is gone would make a connection of its own.
                "-oProxyCommand=false",
                HOST_ALIAS,
            )
            used = self._directory
        finally:
            self._lock.release()
        try:
            yield client
        except BaseException:
            self._end_master(used)
            raise

    def _end_master(self, used: Path | None) -> None:
        """End this master, also one that hangs on the line, unless another one has taken its place already."""
        with self._lock:
            if used is not None and used == self._directory:
                _end_master_at(used / "m", self._target.connect_s)
                self._remove_directory()

    def _remove_directory(self) -> None:
        directory, self._directory = self._directory, None
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)

    def _forget_answerer(self) -> None:
        answerer, self._answerer = self._answerer, None
        if answerer is not None:
            answerer.close()


def _start_master(target: SshTarget, deadline: float) -> Path:
    """Make the connection; return the private directory of its socket `m`. ssh stays in the background of its own."""
    target.check_files()
    if shutil.which("ssh") is None:
        raise FatalError(f"{target.node}: the program ssh is not on PATH (Debian: apt-get install openssh-client)")
    # A connection has as many steps as a login has; none of them may last longer than the target says.
    patience = max(0.001, min(3 * target.connect_s, deadline - time.monotonic()))
    directory = _private_directory()
    try:
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                (
                    *ssh_command(target),
                    *("-f", "-N", "-M", f"-oControlPath={directory}/m", f"-oControlPersist={_PERSIST_S}", HOST_ALIAS),
                ),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env=_environment(),
                start_new_session=True,
            )
            try:
                code = process.wait(patience)
            except subprocess.TimeoutExpired:
                raise TransientError(f"{target.node}: no connection to {target.host} in time") from None
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
            errors.seek(0)
            if code:
                raise _trouble(target, errors.read(20_000))
        return directory
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _private_directory() -> Path:
    """Make a directory for one socket. What a killed daemon left is removed an hour after its socket has gone."""
    base = Path(tempfile.gettempdir())
    if len(os.fsencode(base)) > _LONGEST_DIRECTORY:
        base = Path("/tmp")  # noqa: S108 - what is made in it is for us alone
    for left in base.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > 3600:
                left.rmdir()
    return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))


def _listens(path: Path) -> bool:
    """Return whether a master accepts at its socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(1)
        try:
            client.connect(str(path))
        except OSError:
            return False
        return True


def _end_master_at(path: Path, timeout_s: float) -> None:
    with suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(
            ("ssh", "-F", "/dev/null", f"-oControlPath={path}", "-O", "exit", HOST_ALIAS),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=timeout_s,
            check=False,
        )


def _trouble(target: SshTarget, errors: bytes) -> Exception:
    """Return what the last words of an ssh program mean that could not connect (its code is always 255)."""
    words = _words(errors)
    if b"REMOTE HOST IDENTIFICATION HAS CHANGED" in errors:
        return target.changed_host_key()
    if "Host key verification failed" in words:
        return target.unknown_host_key()
    if "Permission denied" in words or "Too many authentication failures" in words:
        return target.refused(words)
    if "Unable to negotiate" in words or "no matching" in words:
        return FatalError(
            f'{target.node}: {words}: if the node is that old on purpose, give it the label "{LEGACY_LABEL}"'
        )
    if "Bad configuration option" in words or "Unsupported" in words or "Bad SSH2" in words:
        return FatalError(f"{target.node}: the ssh program here does not know what it should use: {words}")
    return TransientError(f"{target.node}: no connection to {target.host}: {words}")


def _words(errors: bytes) -> str:
    # What `_trouble` looks for is long where a server offers much.
    return plain(" ".join(errors.decode("utf-8", errors="replace").split())[-400:], 400) or "ssh said nothing"


def _quoted(path: Path) -> str:
    """Return a path as a value in a configuration of ssh, where blanks divide and % begins a pattern."""
    text = str(path).replace("%", "%%")
    return f'"{text}"'


def _environment() -> dict[str, str]:
    """Return our environment without an agent, and with messages that we can read."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SSH_", "LC_"))}
    return {**environment, "LC_ALL": "C"}
