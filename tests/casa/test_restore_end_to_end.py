"""A restore with real parts from end to end: archive, NGAS over HTTP, nodes behind sshd, and CASA.

What the commands and the daemon deliver is compared with the first calibration bit by bit: on a good day, when the
server went away in the middle, when a job was killed while it calibrated, and after a failure and `stagecal retry`.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from casa_jobs import FIRST, MOUS, SECOND, SEMI_PASS, SESSION_OF, THIRD, sanitized, unit_of_tests

from stagecal import wiring
from stagecal.config import load_config
from stagecal.domain.requests import Origin, Outcome, Request, State
from stagecal.domain.trigger import Trigger, render, trigger_name
from stagecal.embedded import make_site
from stagecal.measurement_set import check_measurement_set
from stagecal.services.context import Site
from stagecal.services.dispatching import handle_of
from tests.domain.restore.examples import status_xml
from tests.ngas_server import Ngas, ngas_server
from tests.ssh_nodes import SshServer

CHECKOUT = Path(__file__).resolve().parents[2]
PROJECT = "2017.1.01347.S"
MEMBER = f"member.{sanitized(MOUS)}"
SCHED_BLOCK = "uid://A001/X12a3/X804"
CALAPPLY, CALTABLES = f"{sanitized(SECOND)}.ms.calapply.txt", f"{MEMBER}.session_4.caltables.tgz"
# A run of its own by the imaging pipeline left a second manifest, and one EB's files got the prefix of the archive.
IMAGING_MANIFEST = f"{MEMBER}.hifa_image.pipeline_manifest.xml"
PREFIXED = [f"{sanitized(THIRD)}.ms.calapply.txt", f"{sanitized(THIRD)}.ms.flagversions.tgz"]
CALFIELDS = ("J0440+1437", "J0510+1800")
PATIENCE_S = 150

CONFIGURATION = """
[triggers]
directory = "triggers"
[archive]
backend = "sqlite"
path = "archive.db"
[cluster]
runner = "ssh"
work_area = "work"
max_load_per_core = 1000
poll_interval_s = 0.2
ssh_key = "{key}"
known_hosts = "{known_hosts}"
{nodes}
[restore]
engine = "casatasks"
casa_worker = "{python}"
raw_fetch = ["{store}/fetch_raw.sh"]
ngas = "{ngas}"
layout = "production"
[staging]
root = "preview"
url = "http://localhost:8000/preview"
reserve_gb = 0
scrub_mb_s = 0
[mail]
transport = "maildir"
maildir = "mail"
aog = "aog@example.org"
maintainer = "maintainer@example.org"
sender = "stagecal@example.org"
message_id_domain = "stagecal.example.org"
contact_domains = ["example.org"]
[state]
directory = "state"
"""
NODE = """[[cluster.nodes]]
name = "{name}"
host = "127.0.0.1"
port = {port}
user = "{user}"
"""

# Compares pairs of measurement sets bit by bit: a list of (made, first calibration, names of fields or none).
COMPARE = """
import json, sys
import casacore.tables as tables
options = dict(ack=False, lockoptions="autonoread")
answers = []
for made, expected, names in json.loads(sys.argv[1]):
    one, other = tables.table(made, **options), tables.table(expected, **options)
    if names:
        known = tables.table(expected + "/FIELD", **options).getcol("NAME")
        other = other.query("FIELD_ID IN %s" % [number for number, name in enumerate(known) if name in names])
    order = "DATA_DESC_ID, TIME, ANTENNA1, ANTENNA2"
    one, other = one.sort(order), other.sort(order)
    answer = {"rows": one.nrows(), "different": [] if one.nrows() == other.nrows() else ["rows"]}
    for window in sorted(set(other.getcol("DATA_DESC_ID"))):
        parts = [table.query("DATA_DESC_ID==%d" % window) for table in (one, other)]
        for column in "TIME ANTENNA1 ANTENNA2 FIELD_ID UVW DATA WEIGHT SIGMA FLAG FLAG_ROW".split():
            first, second = (part.getcol(column) for part in parts)
            if first.dtype != second.dtype or first.shape != second.shape or first.tobytes() != second.tobytes():
                answer["different"].append(column)
    answer["flagged"] = float(one.getcol("FLAG").mean())
    answer["weights"] = len(set(one.getcol("WEIGHT").ravel().tolist()))
    answers.append(answer)
print(json.dumps(answers))
"""


@dataclass
class Observatory:
    """The site, its two nodes, and the server of its archive."""

    directory: Path
    store: Path
    served: Path
    in_worker: Callable[..., Any]
    nodes: list[SshServer]
    site: Site = field(init=False)
    ngas: Ngas = field(init=False)
    stack: ExitStack = field(default_factory=ExitStack)

    def serve(self) -> None:
        """Start the archive's server; at the same port again if it was there before."""
        self.stack = ExitStack()
        port = int(self.ngas.address.rpartition(":")[2]) if hasattr(self, "ngas") else 0
        self.ngas = self.stack.enter_context(ngas_server(self.served, port))
        self.ngas.signed = True

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run `stagecal` as a person does."""
        return subprocess.run(
            [sys.executable, "-m", "stagecal.cli.main", *words],
            env=self.environment,
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(CHECKOUT), "STAGECAL_CONFIG": str(self.directory / "stagecal.toml")}

    def until_idle(self) -> None:
        """Let a daemon do all that can be done."""
        done = self.run("watch", "--until-idle")
        assert done.returncode == 0, done.stderr

    def place(self, *calfields: str, ticket: str) -> None:
        """Put a trigger into the directory."""
        trigger = Trigger(
            contact="contact@example.org",
            copy="maintainer@example.org",
            mous=MOUS,
            project=PROJECT,
            calfields=calfields,
            user="Pi Person",
            email="pi@example.org",
            ticket=ticket,
        )
        name = trigger_name(MOUS, datetime.now(UTC))
        (self.directory / "triggers" / name).write_text(render(trigger), encoding="utf-8")

    def request(self, ticket: str = "") -> Request:
        """Return the newest request of a ticket, or the newest restore."""
        return [
            one
            for one in self.site.ledger.requests()
            if (one.ticket == ticket if ticket else one.origin is Origin.RESTORE)
        ][-1]

    def wait(self, holds: Callable[[], object], what: str) -> None:
        """Wait for real processes to get there, for a bounded time."""
        end = time.monotonic() + PATIENCE_S
        while not holds():
            held = [one for one in self.site.ledger.open_requests() if one.state is State.HELD]
            if held or time.monotonic() > end:
                said = [f"{one.reason}\n{self.site.nodes.output(handle_of(one))}" for one in held if one.work]
                pytest.fail(f"{what} did not happen: {said}")
            time.sleep(0.01)

    def mails(self, address: str) -> list[str]:
        """Return the mails to an address."""
        texts = [path.read_bytes().decode() for path in sorted((self.directory / "mail" / "new").iterdir())]
        return [text for text in texts if address in text.partition("\r\n\r\n")[0]]

    def differences(self, products: Path, names: Sequence[str] = ()) -> list[Any]:
        """Return in what the products of all EBs differ from the first calibration."""
        pairs = [
            [str(products / product_of(uid)), str(self.store / "expected" / product_of(uid)), list(names)]
            for uid in SESSION_OF
        ]
        found = self.in_worker(COMPARE, json.dumps(pairs))
        # They are worth a comparison: edges and an antenna are flagged, and the calibration made the weights.
        assert all(one["rows"] > 0 and 0.05 < one["flagged"] < 0.3 and one["weights"] > 20 for one in found), found
        return [one["different"] for one in found]


IDENTICAL: list[Any] = [[] for _ in SESSION_OF]


def product_of(uid: str) -> str:
    return f"{sanitized(uid)}.ms.split.cal"


def describe(archive: Path) -> list[str]:
    """Let the archive's database describe the MOUS of the store; return the names of its files."""
    files = [f"member.{name}" if name in PREFIXED else name for name in unit_of_tests().files]
    with contextlib.closing(sqlite3.connect(archive)) as database, database:
        for table, column in (("AQUA_EXECBLOCK", "EXECBLOCKUID"), ("SHIFTLOG_ENTRIES", "SE_EB_UID")):
            database.executemany(f"DELETE FROM {table} WHERE {column} = ?", [[SECOND], [THIRD]])
        for uid, session in ((SECOND, "X00000003"), (THIRD, "X00000003")):
            database.execute(
                "INSERT INTO AQUA_EXECBLOCK VALUES (?, ?, ?, 'Pass', '2018-07-11', '2018-07-11', ?)",
                [uid, SCHED_BLOCK, PROJECT, session],
            )
            database.execute(
                "INSERT INTO SHIFTLOG_ENTRIES VALUES (?, ?, ?, 'SBEX', '2018-07-11')", [uid, SCHED_BLOCK, PROJECT]
            )
        database.execute(
            "UPDATE OBS_UNIT_SET_STATUS SET XML = ? WHERE STATUS_ENTITY_ID = ?",
            [status_xml([[SEMI_PASS], [FIRST], [], [SECOND, THIRD]]), MOUS],
        )
        database.execute("DELETE FROM ASA_PRODUCT_FILES WHERE ASA_OUS_ID = ?", [MOUS])
        rows = [[MOUS, name, "script" if name.endswith((".py", ".xml")) else "calibration"] for name in files]
        rows += [[MOUS, IMAGING_MANIFEST, "script"], [MOUS, f"{MEMBER}.HL_Tau_sci.fits", "science"]]
        database.executemany("INSERT INTO ASA_PRODUCT_FILES VALUES (?, ?, ?)", rows)
    return files


def serve_under_these_names(store: Path, served: Path, names: Sequence[str]) -> None:
    served.mkdir()
    for name in names:
        stored = store / "products" / sanitized(MOUS) / name
        if not stored.exists():
            stored = stored.with_name(name.removeprefix("member."))
        (served / name).hardlink_to(stored)
    (served / IMAGING_MANIFEST).write_text("<piperesults name='imaging'/>\n")


@pytest.fixture(scope="module")
def observatory(
    casa_python: Path, store: Path, in_worker: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Observatory]:
    base = tmp_path_factory.mktemp("observatory")
    config = make_site(base / "site")
    served = base / "ngas"
    serve_under_these_names(store, served, describe(base / "site" / "archive.db"))
    nodes = [SshServer(base / name, name).start() for name in ("arc1", "arc2")]
    made = Observatory(base / "site", store, served, in_worker, nodes)
    try:
        made.serve()
        known_hosts = base / "known_hosts"
        known_hosts.write_text("".join(node.known_hosts.read_text() for node in nodes))
        text = CONFIGURATION.format(
            key=nodes[0].key,
            known_hosts=known_hosts,
            nodes="".join(NODE.format(name=one.name, port=one.port, user=getpass.getuser()) for one in nodes),
            python=casa_python,
            store=store,
            ngas=made.ngas.address,
        )
        config.write_text(text, encoding="utf-8")
        made.site = wiring.site(load_config(config, environ={}))
        yield made
    finally:
        end_jobs(made)
        made.stack.close()
        for node in nodes:
            node.stop()


def end_jobs(observatory: Observatory) -> None:
    """End what a failed test left alive: jobs by their nonce, and the daemon in the background."""
    with contextlib.suppress(AttributeError):
        for request in observatory.site.ledger.open_requests():
            if request.holds_slot:
                kill(processes_of(request))
    config = os.fsencode(observatory.directory / "stagecal.toml")
    kill([pid for pid in all_processes() if config in read(pid, "cmdline").split(b"\0")])


# --- processes of a job ---------------------------------------------------------------------------------------------


def all_processes() -> list[int]:
    return [
        int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal() and int(path.name) != os.getpid()
    ]


def read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def processes_of(request: Request) -> list[int]:
    """Return the wrapper of the job, and everything that it has started."""
    nonce = f"STAGECAL_NONCE={request.nonce}".encode()
    return [pid for pid in all_processes() if nonce in read(pid, "environ").split(b"\0")]


def kill(pids: Sequence[int], number: signal.Signals = signal.SIGKILL) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def stopped_in_the_middle_of_applycal(request: Request, job: Path) -> bool:
    """Stop all processes of the job if a call of applycal has begun and not ended; let them go on otherwise."""

    def is_in_applycal() -> bool:
        logs = [path.read_text(errors="replace") for path in job.glob("*/SOUS_*/GOUS_*/MOUS_*/working/casa.log")]
        return any(text.count("Begin Task: applycal") > text.count("End Task: applycal") for text in logs)

    if not is_in_applycal():
        return False
    stopped = processes_of(request)
    kill(stopped, signal.SIGSTOP)
    if is_in_applycal():
        return True
    kill(stopped, signal.SIGCONT)
    return False


# --- what is shown --------------------------------------------------------------------------------------------------


def test_a_restore_is_identical_although_the_server_went_away_and_a_job_was_killed_while_it_calibrated(
    observatory: Observatory,
) -> None:
    # The server stops in the middle of a file, and so does the connection.
    observatory.ngas.misbehave(CALTABLES, "stall", bytes=1000)
    started = observatory.run("restore", "-E", "me@example.org", MOUS)
    assert started.returncode == 0, started.stderr
    first = observatory.request()
    job = observatory.site.nodes.directory(handle_of(first))
    assert started.stdout.splitlines() == [
        f"Restoring a CMS of {MOUS} to spool.",
        f"Alma Restore ({first.id}) running in: {job}",
    ]
    observatory.wait(lambda: observatory.ngas.retrieved(CALTABLES), "the fetching of the tables")
    observatory.stack.close()
    nodes = observatory.site.nodes
    observatory.wait(lambda: "breaks off" in nodes.output(handle_of(first)), "the end of the connection")
    observatory.serve()
    observatory.wait(lambda: stopped_in_the_middle_of_applycal(first, job), "applycal")
    # It went on where it had stopped, and the manifest of another run was never asked for.
    assert [one.offset for one in observatory.ngas.retrieved(CALTABLES)] == [1000]
    assert observatory.ngas.retrieved(IMAGING_MANIFEST) == []
    kill(processes_of(first))
    observatory.wait(lambda: observatory.request().state is State.CLOSED, "the end of the restore")
    request = observatory.request()
    assert request.outcome is Outcome.DELIVERED, request.reason
    assert request.lost_on == (first.node,) and request.node not in request.lost_on
    second = observatory.site.nodes.directory(handle_of(request))
    assert not job.exists()
    products = second / "products"
    assert observatory.differences(products) == IDENTICAL
    for uid in SESSION_OF:
        report = check_measurement_set(products / product_of(uid))
        assert report.healthy and report.sealed, report.problems
    assert not (products / product_of(SEMI_PASS)).exists()
    metadata = json.loads((second / "metadata.json").read_text())
    assert metadata["sessions"] == {
        "session_1": [], "session_2": [FIRST], "session_3": [], "session_4": [SECOND, THIRD]
    }  # fmt: skip
    (area,) = second.glob(f"{PROJECT}_*/SOUS_*/GOUS_*/MOUS_{sanitized(MOUS)}")
    assert [path.name for path in (area / "rawdata").glob("*pipeline_manifest.xml")] == [
        f"{MEMBER}.hifa_calimage.pipeline_manifest.xml"
    ]
    (mail,) = observatory.mails("me@example.org")
    assert all(f"{products}/{product_of(uid)}" in mail for uid in SESSION_OF)


def test_a_request_whose_product_was_missing_is_delivered_identically_after_retry(
    observatory: Observatory, tmp_path: Path
) -> None:
    observatory.ngas.misbehave(CALAPPLY, "unavailable", times=1000, command="STATUS")
    observatory.ngas.misbehave(CALAPPLY, "unavailable", times=1000)
    observatory.place(ticket="1")
    observatory.until_idle()
    request = observatory.request("1")
    assert request.state is State.HELD and list(published(observatory)) == []
    (mail,) = observatory.mails("To: maintainer@example.org")
    assert CALAPPLY in mail, "the mail has the job's output, which names the file"

    observatory.ngas.faults.clear()
    assert observatory.run("retry", request.id).returncode == 0
    observatory.until_idle()
    request = observatory.request("1")
    assert (request.state, request.outcome) == (State.CLOSED, Outcome.DELIVERED), request.reason
    directory = observatory.directory / "preview" / request.token
    unpack(directory, tmp_path)
    assert observatory.differences(tmp_path) == IDENTICAL
    receipt = json.loads((directory / "receipt.json").read_text())
    assert sorted(receipt["execution_blocks"]) == sorted(SESSION_OF)
    assert receipt["made_by"]["engine"] == "casatasks" and receipt["made_by"]["sessions"] == SESSION_OF
    # What the archive calls otherwise than the manifest is delivered under the manifest's names.
    assert not list(directory.glob("member.uid___A002*"))
    assert (directory / PREFIXED[0]).is_file()


def test_a_request_for_calibrators_has_their_rows_of_the_first_calibration_and_nothing_else(
    observatory: Observatory, tmp_path: Path
) -> None:
    observatory.place(*CALFIELDS, ticket="2")
    observatory.until_idle()
    request = observatory.request("2")
    assert (request.state, request.outcome) == (State.CLOSED, Outcome.DELIVERED), request.reason
    directory = observatory.directory / "preview" / request.token
    unpack(directory, tmp_path)
    assert observatory.differences(tmp_path, CALFIELDS) == IDENTICAL
    assert not [path.name for path in directory.iterdir() if "calapply" in path.name or "caltables" in path.name]


def published(observatory: Observatory) -> Iterator[Path]:
    return (path for path in (observatory.directory / "preview").iterdir() if len(path.name) == 32)


def unpack(directory: Path, destination: Path) -> None:
    """Unpack the tar files of a published directory, as the user does after the check of their digests."""
    subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=directory, check=True, capture_output=True)
    for uid in SESSION_OF:
        with tarfile.open(directory / f"{product_of(uid)}.tar") as tar:
            tar.extractall(destination, filter="data")
