"""A Shell on one node by paramiko: one kept connection, pinned host key, an end to every wait.

Promises that a script is sent again only if it provably never began (its channel could not be opened). Fails with
TransientError if the node cannot be reached or the end of a script is not known, with FatalError if the host key is
unknown or changed, our key is refused, or the node speaks only algorithms that paramiko has given up.
"""

from __future__ import annotations

import logging
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from stagecal.adapters.remote_shell import (
    DEFAULT_TIMEOUT_S,
    ERRORS_LIMIT,
    LEGACY_LABEL,
    LINE_LIMIT,
    OUTPUT_LIMIT,
    Answer,
    Envelope,
    SshTarget,
    keep,
    plain,
)
from stagecal.ports import FatalError, TransientError

if TYPE_CHECKING:
    import paramiko

# A server gives ten sessions to one connection (MaxSessions); one is for the kept script, one is left free.
_SESSIONS = 8
# A dead line is noticed after about 25 seconds, whether we are sending or waiting.
_KEEPALIVE_S = 10
_KEEPALIVE_PROBES = 3
_USER_TIMEOUT_MS = 25_000
_CHUNK = 65536

# What goes wrong is told by our errors; paramiko would log the same with a stack trace.
logging.getLogger("paramiko").setLevel(logging.CRITICAL)


class ParamikoShell:
    """The Shell of one node. Threads share the connection; a connection that failed is given up and made anew."""

    def __init__(self, target: SshTarget) -> None:
        self._target = target
        self._sessions = threading.BoundedSemaphore(_SESSIONS)
        self._connection_lock = threading.Lock()
        self._connection: _Connection | None = None
        self._question_lock = threading.Lock()
        self._answerer: _Answerer | None = None

    def run(self, script: str, *arguments: str, stdin: bytes = b"", timeout_s: float | None = None) -> Answer:
        """Run the script on the node; see Shell."""
        patience = timeout_s or DEFAULT_TIMEOUT_S
        deadline = time.monotonic() + patience
        envelope = Envelope(script, arguments)
        if not self._sessions.acquire(timeout=patience):
            raise TransientError(f"{self._target.node}: too many commands at once, none of them ends")
        try:
            with self._channel(deadline) as channel:
                return self._converse(channel, envelope, stdin, deadline, patience)
        finally:
            self._sessions.release()

    def ask(self, script: str, *arguments: str, timeout_s: float | None = None) -> bytes:
        """Ask the kept script; see Shell."""
        deadline = time.monotonic() + (timeout_s or DEFAULT_TIMEOUT_S)
        with self._question_lock:
            if self._answerer is not None:
                # The line may have been dead since the last question. A silent one has used up the time then.
                with suppress(TransientError):
                    return self._answerer.ask(deadline)
                self._forget_answerer()
            try:
                self._answerer = _Answerer(self, Envelope(script, arguments), deadline)
                return self._answerer.ask(deadline)
            except BaseException:
                self._forget_answerer()
                raise

    def close(self) -> None:
        """Close the connection."""
        with self._connection_lock:
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    # --- connections and channels ----------------------------------------------------------------------------------

    @contextmanager
    def _channel(self, deadline: float) -> Iterator[paramiko.Channel]:
        """Give a new channel of the kept connection; if it has none to give any more, of a new connection."""
        connection, channel = self.open_channel(deadline)
        try:
            yield channel
        except BaseException:
            # What was not answered may block a session of the server for ever, and the line may be dead.
            self.retire(connection)
            raise
        finally:
            with suppress(Exception):
                channel.close()
            connection.leave()

    def open_channel(self, deadline: float) -> tuple[_Connection, paramiko.Channel]:
        """Return a connection that is entered, and a channel of it. Nothing has been started on the node yet."""
        import paramiko

        for attempt in (1, 2):
            connection, is_new = self._connected(deadline)
            try:
                return connection, connection.open_channel(self._step(deadline))
            except (paramiko.SSHException, EOFError, OSError) as error:
                self.retire(connection)
                connection.leave()
                if is_new or attempt == 2 or time.monotonic() >= deadline:
                    raise TransientError(f"{self._target.node}: no new session: {_said(error)}") from error
        raise TransientError(f"{self._target.node}: no new session")

    def retire(self, connection: _Connection) -> None:
        """Give no channels of this connection any more. It is closed when its last user has left."""
        with self._connection_lock:
            if self._connection is connection:
                self._connection = None
        connection.retire()

    def _connected(self, deadline: float) -> tuple[_Connection, bool]:
        """Return the kept connection, entered, or a new one, and whether it is new."""
        if not self._connection_lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise TransientError(f"{self._target.node}: the connection is still being made")
        try:
            connection = self._connection
            if connection is not None and connection.enter():
                return connection, False
            self._connection = _connect(self._target, deadline)
            self._connection.enter()
            return self._connection, True
        finally:
            self._connection_lock.release()

    def _step(self, deadline: float) -> float:
        return max(0.001, min(self._target.connect_s, deadline - time.monotonic()))

    # --- scripts ---------------------------------------------------------------------------------------------------

    def _converse(
        self, channel: paramiko.Channel, envelope: Envelope, stdin: bytes, deadline: float, patience: float
    ) -> Answer:
        """Send the script, and read both streams as they come until they end."""
        import paramiko

        node = self._target.node
        output, errors = bytearray(), bytearray()
        try:
            _start(channel, envelope, deadline)
            channel.setblocking(False)
            waiting = memoryview(envelope.program + stdin)
            poll = select.poll()
            poll.register(channel.fileno(), select.POLLIN)
            while True:
                is_over = channel.eof_received or channel.closed
                while waiting and channel.send_ready():
                    waiting = waiting[channel.send(bytes(waiting[:_CHUNK])) :]
                    if not waiting:
                        channel.shutdown_write()
                while channel.recv_ready():
                    keep(output, channel.recv(_CHUNK), OUTPUT_LIMIT, output, node)
                while channel.recv_stderr_ready():
                    keep(errors, channel.recv_stderr(_CHUNK), ERRORS_LIMIT, output, node)
                if is_over:
                    break
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise TransientError(f"{node}: no end within {patience:.1f} s, what became of it is not known")
                # The descriptor tells what arrives. That the window for sending opened again, only time tells.
                poll.poll(10 if waiting else remaining * 1000 + 1)
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise TransientError(f"{node}: the connection was lost: {_said(error)}") from error
        opened = envelope.opened(bytes(output))
        if opened is None:
            raise TransientError(f"{node}: the connection was lost, what became of the command is not known")
        return Answer(*opened, bytes(errors))

    def _forget_answerer(self) -> None:
        answerer, self._answerer = self._answerer, None
        if answerer is not None:
            answerer.close()


class _Answerer:
    """The script that is kept running on a channel of its own."""

    def __init__(self, shell: ParamikoShell, envelope: Envelope, deadline: float) -> None:
        self._shell = shell
        self._rest = b""
        self._connection, self._channel = shell.open_channel(deadline)
        try:
            _start(self._channel, envelope, deadline)
            self._channel.settimeout(max(0.001, deadline - time.monotonic()))
            self._channel.sendall(envelope.program)
            while self._line(deadline) + b"\n" != envelope.begin:
                continue
        except BaseException as error:
            self.close()
            if isinstance(error, OSError | EOFError) or type(error).__module__.startswith("paramiko"):
                raise TransientError(f"the connection was lost: {_said(error)}") from error
            raise

    def ask(self, deadline: float) -> bytes:
        """Return the line that answers. Raises TransientError if none comes until then, or ever."""
        try:
            self._channel.settimeout(max(0.001, deadline - time.monotonic()))
            self._channel.sendall(b"\n")
            return self._line(deadline)
        except (OSError, EOFError) as error:
            raise TransientError(f"the connection was lost, or is silent: {_said(error)}") from error

    def close(self) -> None:
        """Give up the channel and its connection: both may be dead."""
        self._shell.retire(self._connection)
        with suppress(Exception):
            self._channel.close()
        self._connection.leave()

    def _line(self, deadline: float) -> bytes:
        while b"\n" not in self._rest:
            self._channel.settimeout(max(0.001, deadline - time.monotonic()))
            chunk = self._channel.recv(_CHUNK)
            if not chunk or len(self._rest) > LINE_LIMIT:
                raise TransientError("the connection was lost")
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        return line


class _Connection:
    """One connection and how many use it. It is closed once it is retired and nobody uses it any more."""

    def __init__(self, client: paramiko.SSHClient) -> None:
        self._client = client
        self._lock = threading.Lock()
        self._users = 0
        self._retired = False

    def enter(self) -> bool:
        """Count one user more, unless the connection is retired or known to be dead."""
        transport = self._client.get_transport()
        with self._lock:
            if self._retired or transport is None or not transport.is_active():
                return False
            self._users += 1
            return True

    def leave(self) -> None:
        """Count one user less."""
        with self._lock:
            self._users -= 1
            last = self._retired and self._users == 0
        if last:
            self.close()

    def retire(self) -> None:
        """Take no more users."""
        with self._lock:
            last = not self._retired and self._users == 0
            self._retired = True
        if last:
            self.close()

    def open_channel(self, timeout_s: float) -> paramiko.Channel:
        """Open a session; that is also what proves the line alive."""
        import paramiko

        transport = self._client.get_transport()
        if transport is None:
            raise paramiko.SSHException("the connection is closed")
        return transport.open_session(timeout=timeout_s)

    def close(self) -> None:
        """Close it for everybody."""
        with self._lock:
            self._retired = True
        with suppress(Exception):
            self._client.close()


def _start(channel: paramiko.Channel, envelope: Envelope, deadline: float) -> None:
    """Start the script's shell. paramiko waits for the confirmation for ever: closing the channel ends that."""

    def give_up() -> None:
        with suppress(Exception):
            channel.close()

    guard = threading.Timer(max(0.0, deadline - time.monotonic()), give_up)
    guard.daemon = True
    guard.start()
    try:
        channel.exec_command(envelope.command)
    finally:
        guard.cancel()


def _connect(target: SshTarget, deadline: float) -> _Connection:
    """Make a connection to the one who has the pinned host key, within the target's time-outs and the deadline."""
    import paramiko

    target.check_files()

    def step() -> float:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TransientError(f"{target.node}: no connection to {target.host} in time")
        return min(target.connect_s, remaining)

    client = paramiko.SSHClient()
    client.set_missing_host_key_policy(paramiko.RejectPolicy())
    try:
        client.load_host_keys(str(target.known_hosts))
        line = _line_to(target, step())
    except UnicodeError as error:
        raise FatalError(f"{target.node}: {target.host!r} is no name of a host") from error
    except OSError as error:
        raise TransientError(f"{target.node}: cannot reach {target.host} port {target.port}: {_said(error)}") from error
    except paramiko.SSHException as error:
        raise FatalError(f"{target.node}: {target.known_hosts} cannot be read: {_said(error)}") from error
    try:
        client.connect(
            target.host,
            target.port,
            username=target.user,
            key_filename=str(target.key) if target.key else None,
            sock=line,
            timeout=step(),
            banner_timeout=step(),
            auth_timeout=step(),
            channel_timeout=step(),
            allow_agent=False,
            look_for_keys=False,
        )
        transport = client.get_transport()
        if transport is not None:
            transport.set_keepalive(_KEEPALIVE_S)
    except BaseException as error:
        client.close()
        line.close()
        raise _trouble(target, error) from error
    return _Connection(client)


def _line_to(target: SshTarget, timeout_s: float) -> socket.socket:
    """Return a TCP connection whose small packets are not held back, and whose death is noticed."""
    line = socket.create_connection((target.host, target.port), timeout_s)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_S)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_S // 2)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)
    return line


def _trouble(target: SshTarget, error: BaseException) -> BaseException:
    """Return what a failed connection means."""
    import paramiko

    words = _said(error)
    if isinstance(error, paramiko.BadHostKeyException):
        return target.changed_host_key()
    if isinstance(error, paramiko.PasswordRequiredException):
        return FatalError(f"{target.node}: the private key {target.key} has a passphrase: use one without")
    if isinstance(error, paramiko.AuthenticationException):
        # paramiko says so too when the answer did not come in time.
        if "timeout" in words.lower():
            return TransientError(f"{target.node}: {target.host} did not answer while it was let in: {words}")
        return target.refused(words)
    if type(error).__name__ == "IncompatiblePeer":
        return FatalError(
            f"{target.node}: {words}: the node is too old for paramiko, "
            f'give it transport = "openssh" and the label "{LEGACY_LABEL}"'
        )
    if isinstance(error, paramiko.SSHException):
        if "not found in known_hosts" in words:
            return target.unknown_host_key()
        if "No authentication methods available" in words or "not a valid" in words:
            return FatalError(f"{target.node}: the private key {target.key} cannot be used: {words}")
        return TransientError(f"{target.node}: no connection to {target.host}: {words}")
    if isinstance(error, OSError | EOFError):
        return TransientError(f"{target.node}: no connection to {target.host}: {words}")
    return error


def _said(error: BaseException) -> str:
    return plain(str(error)) or type(error).__name__
