"""The Oracle adapter through every failure that needs no Oracle server.

Each round ends within its deadline, with the right kind of error on one line, and leaves no process behind; the
password is in no message; the next round is not harmed.
"""

from __future__ import annotations

import ctypes.util
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

import stagecal
from stagecal.adapters.archive_oracle import OracleArchive, OracleSettings, decoded_row
from stagecal.adapters.archive_queries import load_queries
from stagecal.adapters.oracle_worker import FATAL, TRANSIENT, diagnosis, encoded_row
from stagecal.ports import FatalError, TransientError

PACKAGE_ROOT = Path(stagecal.__file__).parents[1]
QUERIES = load_queries(PACKAGE_ROOT / "etc" / "queries")
MOUS = "uid://A001/X12a3/X80e"
PASSWORD = "s3cret of the archive"
# Long enough for a worker to start and connect on a busy machine, short enough to wait for.
DEADLINE_S = 2.5


@pytest.fixture
def password_file(tmp_path: Path) -> Path:
    path = tmp_path / "password"
    path.write_text(PASSWORD + "\n")
    path.chmod(0o600)
    return path


def archive(dsn: str, password_file: Path, *, timeout_s: float = 30.0, thick: bool = False) -> OracleArchive:
    return OracleArchive(OracleSettings(dsn, "aog", password_file, None, thick, timeout_s), QUERIES)


def workers() -> list[int]:
    """Return the process ids of our children that are workers, dead but not waited for included."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                name = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if parent == os.getpid() and (b"oracle_worker" in name or not name):
                found.append(int(entry.name))
    return found


def failure(asked: OracleArchive, kind: type[Exception]) -> str:
    """Ask; return the message of the error, which must be of this kind, on one line, and leave nothing behind."""
    with pytest.raises(kind) as caught:
        asked.facts(MOUS)
    message = str(caught.value)
    assert "\n" not in message
    assert PASSWORD not in message
    assert workers() == []
    return message


@contextmanager
def listener(behaviour: Callable[[socket.socket], None]) -> Iterator[tuple[str, list[socket.socket]]]:
    """Yield the dsn of a listener on loopback that does this to every connection, and the connections it got."""
    server = socket.create_server(("127.0.0.1", 0))
    connections: list[socket.socket] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            connections.append(connection)
            threading.Thread(target=behaviour, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.getsockname()[1]}/ALMA", connections
    finally:
        # Closing alone would not wake the thread that waits in accept().
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        for connection in connections:
            connection.close()
        thread.join(10)


def stays_silent(connection: socket.socket) -> None:
    """Accept, and say nothing."""


def closes(connection: socket.socket) -> None:
    connection.recv(8192)
    connection.close()


def answers_http(connection: socket.socket) -> None:
    connection.recv(8192)
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def refuses(code: int) -> Callable[[socket.socket], None]:
    """Answer as a real listener that does not know the service or the SID: a TNS packet of type REFUSE (4)."""
    text = f"(DESCRIPTION=(TMP=)(VSNNUM=0)(ERR={code})(ERROR_STACK=(ERROR=(CODE={code})(EMFI=4))))".encode()
    body = struct.pack(">BBH", 1, 0, len(text)) + text
    packet = struct.pack(">HHBBH", 8 + len(body), 0, 4, 0, 0) + body

    def refuse(connection: socket.socket) -> None:
        connection.recv(8192)
        connection.sendall(packet)

    return refuse


@pytest.fixture
def closed_port() -> Iterator[str]:
    """Yield a dsn where nothing listens: the port is bound, so that nobody else can take it."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{holder.getsockname()[1]}/ALMA"


@pytest.fixture
def black_hole() -> Iterator[str]:
    """Yield a dsn whose connections are neither accepted nor refused: the listener's queue is full."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for client in waiting:
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        yield f"127.0.0.1:{server.getsockname()[1]}/ALMA"
        for client in waiting:
            client.close()


# --- nobody answers ------------------------------------------------------------------------------------------------


def test_refused_port_is_transient(closed_port: str, password_file: Path) -> None:
    message = failure(archive(closed_port, password_file), TransientError)
    assert closed_port in message
    assert "Connection refused" in message


def test_unreachable_host_ends_at_the_deadline_and_is_transient(black_hole: str, password_file: Path) -> None:
    started = time.monotonic()
    message = failure(archive(black_hole, password_file, timeout_s=DEADLINE_S), TransientError)
    assert time.monotonic() - started < DEADLINE_S + 2
    assert black_hole in message


def test_unknown_host_is_transient(password_file: Path) -> None:
    assert "nosuch.invalid/ALMA" in failure(archive("nosuch.invalid/ALMA", password_file), TransientError)


# --- something answers that is no database -------------------------------------------------------------------------


@pytest.mark.parametrize("behaviour", [stays_silent, answers_http], ids=["silent", "garbage"])
def test_listener_that_blocks_the_driver_is_cut_off_at_the_deadline_and_harms_no_later_round(
    behaviour: Callable[[socket.socket], None], closed_port: str, password_file: Path
) -> None:
    with listener(behaviour) as (dsn, connections):
        started = time.monotonic()
        message = failure(archive(dsn, password_file, timeout_s=DEADLINE_S), TransientError)
        assert time.monotonic() - started < DEADLINE_S + 2
        assert f"{dsn} gave no answer in 2.5 s" in message
        assert connections, "the worker never came to connect: this machine is too slow for the deadline of the test"
        assert "Connection refused" in failure(archive(closed_port, password_file), TransientError)


def test_listener_that_closes_is_transient(password_file: Path) -> None:
    with listener(closes) as (dsn, _):
        assert "DPY-4011" in failure(archive(dsn, password_file), TransientError)


@pytest.mark.parametrize(
    ("code", "advice"), [(12514, "service name"), (12505, "SID"), (12516, "listener"), (12520, "listener")]
)
def test_listener_that_refuses_is_transient_and_says_what_to_look_at(
    code: int, advice: str, password_file: Path
) -> None:
    with listener(refuses(code)) as (dsn, _):
        message = failure(archive(dsn, password_file), TransientError)
    assert f"ORA-{code}" in message
    assert advice in message.rpartition("):")[2]


# --- our own mistakes ----------------------------------------------------------------------------------------------


def test_missing_credentials_file_is_fatal(closed_port: str, tmp_path: Path) -> None:
    message = failure(archive(closed_port, tmp_path / "none"), FatalError)
    assert str(tmp_path / "none") in message


def test_credentials_file_that_others_can_read_is_fatal(closed_port: str, password_file: Path) -> None:
    password_file.chmod(0o644)
    message = failure(archive(closed_port, password_file), FatalError)
    assert str(password_file) in message
    assert "chmod 600" in message


def test_empty_credentials_file_is_fatal(closed_port: str, password_file: Path) -> None:
    password_file.write_text("\n")
    assert str(password_file) in failure(archive(closed_port, password_file), FatalError)


@pytest.mark.parametrize("dsn", ["ALMA_ALIAS", "(DESCRIPTION=(ADD", "127.0.0.1:port/ALMA"])
def test_dsn_that_names_no_database_is_fatal(dsn: str, password_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TNS_ADMIN", raising=False)
    assert "[archive] dsn" in failure(archive(dsn, password_file), FatalError)


@pytest.mark.skipif(bool(ctypes.util.find_library("clntsh")), reason="Oracle's client libraries are installed here")
def test_thick_without_client_libraries_is_fatal(closed_port: str, password_file: Path) -> None:
    message = failure(archive(closed_port, password_file, thick=True), FatalError)
    assert "DPI-1047" in message
    assert "thick = false" in message


# --- the worker as a process ---------------------------------------------------------------------------------------


def test_worker_that_is_killed_is_transient(password_file: Path) -> None:
    def kill_the_worker(connection: socket.socket) -> None:
        for process in workers():
            os.kill(process, signal.SIGKILL)

    with listener(kill_the_worker) as (dsn, _):
        assert "SIGKILL" in failure(archive(dsn, password_file), TransientError)


def test_worker_runs_no_code_from_the_current_directory(
    closed_port: str, password_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in ("json", "oracledb", "stagecal"):
        (foreign / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.chdir(foreign)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", *filter(None, [os.environ.get("PYTHONPATH")])]))
    assert "Connection refused" in failure(archive(closed_port, password_file), TransientError)
    assert not (tmp_path / "ran").exists()


def test_password_is_on_no_command_line_and_in_no_environment(password_file: Path) -> None:
    seen: list[bytes] = []

    def look_at_the_worker(connection: socket.socket) -> None:
        for process in workers():
            seen.extend(Path(f"/proc/{process}/{name}").read_bytes() for name in ("cmdline", "environ"))
        connection.close()

    with listener(look_at_the_worker) as (dsn, _):
        failure(archive(dsn, password_file), TransientError)
    assert len(seen) == 2
    assert not any(PASSWORD.encode() in text for text in seen)


def test_worker_ends_itself_when_nobody_is_left_to_kill_it(password_file: Path) -> None:
    with listener(stays_silent) as (dsn, connections):
        job = {
            "dsn": dsn,
            "user": "aog",
            "password_file": str(password_file),
            "password_group": None,
            "thick": False,
            "timeout_s": 1.0,
            "queries": {},
            "binds": {},
            "row_limit": 1,
        }
        with subprocess.Popen(
            [sys.executable, "-m", "stagecal.adapters.oracle_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(PACKAGE_ROOT)},
        ) as process:
            try:
                output, _ = process.communicate(json.dumps(job).encode(), timeout=60)
            finally:
                process.kill()
        assert connections
    assert (process.returncode, output) == (-signal.SIGALRM, b"")


def test_row_passes_from_the_worker_unchanged() -> None:
    naive = datetime(2018, 7, 10, 11, 0, 46, 672000)  # noqa: DTZ001 - as the driver gives them
    row = ("Süß 李", None, 7, 1.5, naive, datetime(2099, 1, 1, tzinfo=UTC))
    assert decoded_row(json.loads(json.dumps(encoded_row("mous", ["C"] * 6, row)))) == row


def test_value_that_the_worker_cannot_pass_on_is_fatal_and_names_query_and_column() -> None:
    with pytest.raises(FatalError, match="query products gives a value of type bytes in column NGAS_FILE_ID"):
        encoded_row("products", ["NGAS_FILE_ID"], (b"x",))


# --- how the driver's errors are told apart ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "transient", "advice"),
    [
        ("DPY-4011: the database or network closed the connection", True, "try again"),
        ("DPY-4024: call timeout of 10000 ms exceeded", True, "try again"),
        ("DPY-4005: timed out waiting for the connection pool to return a connection", True, "try again"),
        ("DPY-6005: cannot connect to database (CONNECTION_ID=x).\n[Errno 111] Connection refused", True, "try again"),
        ("ORA-12541: TNS:no listener", True, "try again"),
        ("ORA-03113: end-of-file on communication channel", True, "try again"),
        ("ORA-01033: ORACLE initialization or shutdown in progress", True, "try again"),
        ("ORA-08103: object no longer exists", True, "try again"),
        ("ORA-12514: TNS:listener does not currently know of service requested", True, "service name"),
        ("DPY-6005: cannot connect.\nDPY-6001: Service is not registered (Similar to ORA-12514)", True, "service name"),
        ("ORA-01017: invalid username/password; logon denied", False, "password_file"),
        ("ORA-28000: the account is locked", False, "locked"),
        ("ORA-00942: table or view does not exist", False, "table is missing"),
        ("DPY-3010: connections to this database server version are not supported", False, "thick = true"),
        ("DPY-3015: password verifier type 0x939 is not supported", False, "thick = true"),
        ("DPY-6005: cannot connect.\nDPY-3001: Native Network Encryption is only supported", False, "thick = true"),
        ("DPY-6005: cannot connect.\n[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed", False, "certificate"),
        ("DPI-1047: Cannot locate a 64-bit Oracle Client library", False, "thick = false"),
        ("DPY-6000: Listener refused connection. (Similar to ORA-01017)", True, "try again"),
        ("ORA-99999: never seen before", False, "administrators"),
        ("no code at all", False, "administrators"),
    ],
)
def test_driver_errors_are_told_apart(text: str, transient: bool, advice: str) -> None:
    found, what_to_do = diagnosis(text)
    assert found is transient
    assert advice in what_to_do


def test_no_code_is_both_fatal_and_transient() -> None:
    assert not set(FATAL) & set(TRANSIENT)
