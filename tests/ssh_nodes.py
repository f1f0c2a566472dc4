"""Real SSH servers on loopback addresses, each with its own host key, to be stopped, frozen and crashed.

As root or as an ordinary user: whoever runs the tests logs in as himself. Login files of the account are not read,
because HOME is an empty directory. Where there is no sshd, the test that asks for a server is skipped.
"""

from __future__ import annotations

import atexit
import getpass
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest

from stagecal.adapters.nodes_ssh import Machine
from stagecal.adapters.remote_shell import LEGACY_LABEL, Shell, SshTarget
from stagecal.adapters.ssh_openssh import OpenSshShell, ssh_command
from stagecal.adapters.ssh_paramiko import ParamikoShell

CONFIGURATION = """\
ListenAddress {host}:{port}
HostKey {directory}/host_key
AuthorizedKeysFile {directory}/authorized_keys
PidFile none
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
StrictModes no
LogLevel VERBOSE
MaxStartups 100:30:200
MaxSessions 10
PrintMotd no
SetEnv HOME={directory}/home {environment}
"""
# What a server of the RHEL5 age speaks, and nothing else.
LEGACY = """\
KexAlgorithms diffie-hellman-group14-sha1
HostKeyAlgorithms ssh-rsa
PubkeyAcceptedAlgorithms ssh-rsa
Ciphers aes128-cbc
MACs hmac-sha1
"""


def sshd_program() -> str:
    """Return the path of sshd; a test that needs it is skipped where there is none."""
    found = shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if found is None or shutil.which("ssh") is None:
        pytest.skip("needs the programs sshd and ssh")
    return found


@cache
def client_key(kind: str) -> Path:
    """Return a private key of this kind, made once."""
    directory = Path(tempfile.mkdtemp(prefix="stagecal-keys-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return make_key(directory / "key", kind)


def make_key(path: Path, kind: str) -> Path:
    """Make a pair of keys."""
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-C", "test", "-f", path], check=True)
    return path


@dataclass
class SshServer:
    """One sshd, which is one node. `legacy` makes it speak as a server of the RHEL5 age does."""

    directory: Path
    name: str
    host: str = "127.0.0.1"
    legacy: bool = False
    environment: str = ""

    def __post_init__(self) -> None:
        self._program = sshd_program()
        self._process: subprocess.Popen[bytes] | None = None
        self.key = client_key("rsa" if self.legacy else "ed25519")
        (self.directory / "home").mkdir(parents=True, exist_ok=True)
        make_key(self.directory / "host_key", "rsa" if self.legacy else "ed25519")
        shutil.copy(self.key.with_suffix(".pub"), self.directory / "authorized_keys")
        self.port = free_port(self.host)
        self.pin()

    @property
    def known_hosts(self) -> Path:
        """The file with this node's host key alone."""
        return self.directory / "known_hosts"

    def pin(self, key: Path | None = None) -> None:
        """Write this host key (or another one) into the file of known ones."""
        words = (key or self.directory / "host_key").with_suffix(".pub").read_text().split()
        self.known_hosts.write_text(f"[{self.host}]:{self.port} {words[0]} {words[1]}\n")

    def target(self, *labels: str, connect_s: float = 5.0) -> SshTarget:
        """Return how to reach it."""
        return SshTarget(
            self.name, self.host, self.port, getpass.getuser(), self.key, self.known_hosts, labels, connect_s
        )

    def start(self) -> SshServer:
        """Start it, at the same port again if it was there before; return it when it answers."""
        configuration = self.directory / "sshd_config"
        text = CONFIGURATION.format(
            host=self.host, port=self.port, directory=self.directory, environment=self.environment
        )
        configuration.write_text(text + (LEGACY if self.legacy else ""))
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        log = self.directory / "log"
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [self._program, "-D", "-e", "-f", configuration],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        deadline = time.monotonic() + 10
        while True:
            try:
                with socket.create_connection((self.host, self.port), 1) as line:
                    if line.recv(4) == b"SSH-":
                        return self
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"sshd does not start: {log.read_text()[-2000:]}") from None
                time.sleep(0.005)

    def sessions(self) -> list[int]:
        """Return the processes of sshd that serve connections, not what they have started."""
        return [pid for pid in self._below(self._pid()) if command_name(pid).startswith("sshd")]

    def drop_sessions(self) -> None:
        """Kill what serves connections; new ones are taken."""
        signal_all(self.sessions(), signal.SIGKILL)

    def freeze(self) -> None:
        """Let nothing be answered any more: packets are acknowledged, connections stay, all is silent."""
        signal_all([self._pid(), *self.sessions()], signal.SIGSTOP)

    def thaw(self) -> None:
        """Go on after a freeze."""
        signal_all([self._pid(), *self.sessions()], signal.SIGCONT)

    def stop(self) -> None:
        """End it with all its connections; jobs live on. Not running is fine."""
        if self._process is not None and self._process.poll() is None:
            signal_all([*self.sessions(), self._process.pid], signal.SIGKILL)
            self._process.wait()

    def _pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def _below(self, pid: int) -> list[int]:
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except OSError:
            return []
        return [found for child in map(int, children) for found in (child, *self._below(child))]


def command_name(pid: int) -> str:
    """Return the name of a process, '' if it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def signal_all(pids: list[int], number: int) -> None:
    """Signal processes; those that are gone are fine."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def free_port(host: str) -> int:
    """Return a port on which nobody listens, and which the system gives to no outgoing connection meanwhile."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind((host, port))
            return port


# --- the servers that all tests of one process share ---------------------------------------------------------------

_KINDS = {"paramiko": ParamikoShell, "openssh": OpenSshShell, "legacy": OpenSshShell}
_shared: dict[bool, SshServer] = {}


def shared_server(kind: str) -> SshServer:
    """Return the server for a kind of Shell ("paramiko", "openssh", "legacy"), started once for all tests."""
    legacy = kind == "legacy"
    if legacy not in _shared:
        sshd_program()
        directory = Path(tempfile.mkdtemp(prefix="stagecal-sshd-"))
        _shared[legacy] = SshServer(directory / "node", "far", legacy=legacy).start()
    return _shared[legacy]


def make_shell(kind: str, target: SshTarget) -> Shell:
    """Return a new Shell of this kind."""
    if kind == "legacy":
        target = replace(target, labels=(*target.labels, LEGACY_LABEL))
    return _KINDS[kind](target)


def machine(kind: str, server: SshServer, *labels: str) -> Machine:
    """Return the node behind a server."""
    target = server.target(*labels, *([LEGACY_LABEL] if kind == "legacy" else []))
    return Machine(make_shell(kind, target), labels, ssh_command(target))


def stop_shared_servers() -> None:
    """End what `shared_server` started."""
    while _shared:
        server = _shared.popitem()[1]
        server.stop()
        shutil.rmtree(server.directory.parent, ignore_errors=True)


atexit.register(stop_shared_servers)
