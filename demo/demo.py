"""The whole service on this machine, step by step: what people type, what they get, and what lies where.

Makes a new site in demo-site/ (or the directory named by the first argument), with real data and a real daemon. Ends
with exit code 1 if anything is not as it should be.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

BIN = Path(sys.executable).parent
MAIN = "uid://A001/X12a3/X80e"
CALIBRATORS = "uid://A001/X159a/X6b"
CONTACT = ("--contact", "contact@example.org")
MARKER = ".made-by-demo"


class DemoError(Exception):
    """Something did not happen as it should."""


class Demo:
    """One run of the demonstration in one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {
            **os.environ,
            "STAGECAL_CONFIG": str(directory / "stagecal.toml"),
            "PATH": f"{BIN}:{os.environ.get('PATH', os.defpath)}",
        }
        self.shown_mails: set[Path] = set()

    # --- telling -------------------------------------------------------------------------------------------------

    def title(self, number: int, text: str) -> None:
        line = f" {number}. {text} "
        print(f"\n{line:=^100}\n", flush=True)

    def say(self, text: str) -> None:
        print(f"-- {text}", flush=True)

    def show(self, text: str) -> None:
        print("".join(f"   | {line}\n" for line in text.rstrip("\n").split("\n")), flush=True)

    def command(self, *words: str | Path, expect: int = 0) -> str:
        """Run one of our commands as a person would; show it and what it prints."""
        shown = " ".join(_as_typed(str(word)) for word in words)
        print(f"$ {shown}", flush=True)
        program = BIN / str(words[0]) if (BIN / str(words[0])).exists() else words[0]
        done = subprocess.run(
            [program, *words[1:]],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        self.show(done.stdout + (f"(exit code {done.returncode})" if done.returncode else ""))
        if done.returncode != expect:
            raise DemoError(f"{shown}: exit code {done.returncode}, expected {expect}")
        return done.stdout

    def mails(self, what: str, *, count: int = 1, seconds: float = 30) -> list[str]:
        """Show the mails that came since the last time, waiting for as many as are expected."""
        new: list[Path] = []
        for _ in _patiently(seconds):
            new = [path for path in sorted((self.directory / "mail" / "new").iterdir()) if path not in self.shown_mails]
            if len(new) >= count:
                break
        if len(new) < count:
            raise DemoError(f"{what}: {len(new)} mails of {count}")
        self.shown_mails |= set(new)
        texts = [path.read_bytes().decode().replace("\r\n", "\n") for path in new]
        for text in texts:
            self.say(what)
            self.show(text)
        return texts

    # --- looking -------------------------------------------------------------------------------------------------

    def status(self) -> list[dict[str, object]]:
        done = subprocess.run(
            [BIN / "stagecal", "status", "--all", "--json", "--show-urls"],
            env=self.environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return list(json.loads(done.stdout))

    def ended(self, ticket: str, *, outcome: str, state: str = "CLOSED") -> dict[str, object]:
        """Wait until the request of this ticket has ended, and check how."""
        request: dict[str, object] = {}
        for _ in _patiently(120):
            request = next((one for one in self.status() if one["ticket"] == ticket), {})
            if request.get("state") in ("CLOSED", "HELD"):
                break
        if (request.get("state"), request.get("outcome")) != (state, outcome):
            raise DemoError(f"ticket {ticket}: {request or 'no request'}, expected {state}, {outcome}")
        return request

    def staged(self, request: dict[str, object]) -> Path:
        """Return the published directory of a request."""
        return self.directory / "preview" / str(request["url"]).rpartition("/")[2]

    def trigger_by_hand(self, mous: str, project: str, ticket: str) -> None:
        """Place a trigger as an old script or a hand may do it, past the checks of trigger-calms."""
        name = f"trigger-{_sanitized(mous)}-{datetime.now(UTC):%Y-%m-%dT%H-%M-%S}.txt"
        text = (
            "EU ARC contact contact@example.org\nCC email maintainer@example.org\n"
            f"ALMA: REQUEST FOR CALIBRATED DATA MOUS {_sanitized(mous)}\n\nDear AOG,\n"
            f"please create the calibrated MS for MOUS {_sanitized(mous)}\nproject {project}\n"
            f"for user Hand Made\nemail pi@example.org\nhelpdesk ticket {ticket}\n"
        )
        self.say(f"by hand: triggers/{name}")
        self.show(text)
        temporary = self.directory / "triggers" / f".{name}"
        temporary.write_text(text)
        temporary.rename(self.directory / "triggers" / name)


def _patiently(seconds: float) -> Iterator[None]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(0.1)


def _sanitized(uid: str) -> str:
    return uid.replace(":", "_").replace("/", "_")


def _as_typed(word: str) -> str:
    return word if re.fullmatch(r"[A-Za-z0-9@%+=:,./_-]+", word) else f'"{word}"'


@contextlib.contextmanager
def _running(command: list[str | Path], log: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A program in the background, ended by its own number."""
    with log.open("ab") as stream:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def main() -> int:
    """Run the demonstration."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("directory", nargs="?", type=Path, default=Path("demo-site"))
    directory = arguments.parse_args().directory.absolute()
    if directory.exists():
        if not (directory / MARKER).exists():
            print(f"demo: {directory} is there and was not made by the demo: name another directory", file=sys.stderr)
            return 2
        shutil.rmtree(directory)
    try:
        _demonstrate(Demo(directory))
    except DemoError as error:
        print(f"\ndemo: NOT AS IT SHOULD BE: {error}", file=sys.stderr)
        print(f"demo: look at {directory}/watch.log", file=sys.stderr)
        return 1
    return 0


def _demonstrate(demo: Demo) -> None:
    demo.title(1, "A site in a directory of its own")
    demo.say("The first time this makes the environment in which CASA runs (some 260 MB from the package index).")
    print(f"$ stagecal init {demo.directory}", flush=True)
    subprocess.run([BIN / "stagecal", "init", demo.directory], check=True, stdin=subprocess.DEVNULL)
    (demo.directory / MARKER).touch()
    port = _serve_on_a_free_port(demo)
    demo.say("The daemon is started, and a web server for what is staged.")
    print("$ stagecal watch &\n", flush=True)
    server = [
        sys.executable,
        "-m",
        "http.server",
        "--bind",
        "127.0.0.1",
        "--directory",
        demo.directory / "www",
        str(port),
    ]
    with (
        _running([BIN / "stagecal", "watch"], demo.directory / "watch.log", demo.environment),
        _running(server, demo.directory / "server.log", demo.environment),
    ):
        _requests(demo)
        _restore(demo)
    _sweep(demo)
    _where(demo)


def _serve_on_a_free_port(demo: Demo) -> int:
    import socket

    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", 8000))
        except OSError:
            probe.close()
            with socket.socket() as other:
                other.bind(("127.0.0.1", 0))
                port = int(other.getsockname()[1])
            config = demo.directory / "stagecal.toml"
            config.write_text(config.read_text().replace("localhost:8000", f"localhost:{port}"))
            return port
    return 8000


def _requests(demo: Demo) -> None:
    demo.title(2, "A request, from the command line to the link in the user's mail")
    demo.command("trigger-calms", "2017.1.01347.S", "Pi Person", "pi@example.org", "12345", MAIN, *CONTACT)
    triggers = sorted((demo.directory / "triggers").glob("trigger-*"))
    if triggers:
        demo.say(f"The trigger file, triggers/{triggers[0].name}:")
        with contextlib.suppress(FileNotFoundError):
            demo.show(triggers[0].read_text())
    demo.mails("The request mail to AOG, the contact and the maintainer:")
    demo.say("The daemon checks entitlement and state, starts the job, checks, packs and publishes its product ...")
    first = demo.ended("12345", outcome="delivered")
    demo.command("stagecal", "why", str(first["id"]))
    staged = demo.staged(first)
    demo.say(f"The published directory preview/{staged.name}:")
    demo.command("ls", "-l", staged)
    demo.mails("The mail to the user:")
    demo.say("The user fetches and verifies the data:")
    download = demo.directory / "download"
    download.mkdir()
    demo.command("sh", staged / "fetch.sh", "-d", download)

    demo.title(3, "A second request for the same MOUS: served by hard links, by another link of its own")
    demo.command("trigger-calms", "2017.1.01347.S", "Del Egee", "delegee@example.org", "12346", MAIN, *CONTACT)
    second = demo.ended("12346", outcome="delivered")
    demo.command("stagecal", "why", str(second["id"]))
    product = f"{_sanitized('uid://A002/Xcf92df/X3453')}.ms.split.cal.tar"
    demo.command("ls", "-li", staged / product, demo.staged(second) / product)
    if (staged / product).stat().st_ino != (demo.staged(second) / product).stat().st_ino:
        raise DemoError("the second request was not served by a hard link")
    demo.mails("The request mail and the mail to the user:", count=2)

    demo.title(4, "Only calibrator fields: for anyone, without a check of entitlement")
    fields = "J0510+1800,J0440+1437"
    demo.command(
        "trigger-calms", "2021.1.01582.S", "Franco Nero", "franco@gmail.com", "12347", CALIBRATORS, fields, *CONTACT
    )
    third = demo.ended("12347", outcome="delivered")
    demo.command("ls", "-l", demo.staged(third))
    demo.mails("The request mail and the mail to the user:", count=2)
    _refusals(demo)


def _refusals(demo: Demo) -> None:
    demo.title(5, "What is refused, and how")
    demo.say("Refused at once, in words for the ticket:")
    demo.command(
        "trigger-calms",
        "2011.0.00010.S",
        "A User",
        "user@example.org",
        "1",
        "uid://A002/X2a5c2f/X1",
        *CONTACT,
        expect=3,
    )
    demo.command(
        "trigger-calms", "2017.1.00370.S", "A User", "pi@example.org", "1", "uid://A001/X1284/X266", *CONTACT, expect=3
    )
    demo.command("trigger-calms", "2017.1.00727.S", "A User", "pi@example.org", "1", MAIN, *CONTACT, expect=3)
    cases = [
        ("20001", "NOT ENTITLED", ("2017.1.01347.S", "A Stranger", "stranger@example.com", "20001", MAIN)),
        ("20002", "MOUS IN QA3", ("2019.1.00337.S", "Pi Person", "pi@example.org", "20002", "uid://A001/X14d7/X160")),
        (
            "20003",
            "MOUS NOT DELIVERED",
            ("2017.1.00370.S", "Pi Person", "pi@example.org", "20003", "uid://A001/X1284/X265f"),
        ),
        (
            "20004",
            "NOT A CALIBRATOR FIELD",
            ("2021.1.01582.S", "Franco Nero", "franco@gmail.com", "20004", CALIBRATORS, "HL_Tau"),
        ),
    ]
    for ticket, verdict, words in cases:
        demo.say(f"Refused by the daemon: {verdict}")
        demo.command("trigger-calms", *words, *CONTACT)
        demo.ended(ticket, outcome="refused")
        _expect_verdict(demo.mails("The request mail, and the reply to the contact:", count=2), verdict)
    for ticket, verdict, mous, project in (
        ("20005", "INVALID MOUS UID", "uid://A001/Xffff/Xffff", "2017.1.01347.S"),
        ("20006", "CYCLE 0 PROJECT", "uid://A002/X2a5c2f/X1", "2011.0.00010.S"),
        ("20007", "NO QA0_PASS DATA", "uid://A001/X1284/X266", "2017.1.00370.S"),
    ):
        demo.say(f"Refused by the daemon where trigger-calms would have refused first: {verdict}")
        demo.trigger_by_hand(mous, project, ticket)
        demo.ended(ticket, outcome="refused")
        _expect_verdict(demo.mails("The reply to the contact:"), verdict)
    demo.say("A file that can never become a request is moved aside, and told:")
    (demo.directory / "triggers" / "trigger-me.txt").write_text("please calibrate everything\n")
    demo.mails("The mail to AOG:")
    demo.command("ls", demo.directory / "triggers" / "rejected")
    demo.command("stagecal", "status")


def _expect_verdict(mails: list[str], verdict: str) -> None:
    if not any(f"\n\n{verdict}\n" in mail for mail in mails):
        raise DemoError(f"no mail says {verdict}")


def _restore(demo: Demo) -> None:
    demo.title(6, "A restore: calibrated data in a directory of one's own, as NRAO's almaRestore makes them")
    demo.say("Can it be restored? Exit code 3 says that one of them cannot.")
    demo.command("stagecal", "restorable", MAIN, "uid://A001/X1284/X266", expect=3)
    demo.say("The sessions in the processing request that would do it; that of the EB without QA0 Pass is kept, empty:")
    demo.command("sh", "-c", f"stagecal ppr {MAIN} | grep -A1 SESSION_")
    demo.say("It is started, and mails where the data are at the end:")
    started = demo.command("stagecal", "restore", "-E", "operator@example.org", MAIN)
    (mail,) = demo.mails("The mail at the end:", seconds=120)
    products = [line for line in mail.splitlines() if line.endswith(".ms.split.cal")]
    if not products or not products[0].startswith(started.split("running in: ")[1].strip()):
        raise DemoError("the mail does not say where the restored data are")
    demo.command("stagecal", "ms", "check", products[0])


def _sweep(demo: Demo) -> None:
    demo.title(7, "The sweep of what has expired")
    later = datetime.now(UTC) + timedelta(days=29)
    demo.say("In 29 days:")
    now = f"{later:%Y-%m-%dT%H:%M:%SZ}"
    demo.command("stagecal", "expire", "--now", now, "--dry-run")
    kept = demo.staged(next(one for one in demo.status() if one["ticket"] == "12345"))
    (kept / ".donotremove").touch()
    demo.say(f"Somebody puts a .donotremove into {kept.name[:6]}…")
    demo.command("stagecal", "expire", "--now", now)
    if not kept.is_dir() or len(list((demo.directory / "preview").glob("[0-9a-f]*"))) != 1:
        raise DemoError("the sweep did not delete what it should, or more")


def _where(demo: Demo) -> None:
    demo.title(8, "Where everything lies")
    for name, what in (
        ("stagecal.toml", "the configuration"),
        ("archive.db", "the archive's database (SQLite, with examples)"),
        ("store/", "the archive's raw data and calibration products"),
        ("triggers/", "the watched directory; triggers/rejected/ what could not be read"),
        ("mail/new/", "all mails"),
        ("preview/", "what is staged"),
        ("download/", "what the user fetched"),
        ("work/", "job directories (those of restores and of failed jobs stay)"),
        ("state/", "the ledger"),
        ("watch.log", "what the daemon said"),
    ):
        print(f"   {demo.directory / name!s:<60} {what}")
    print(f"\nGo on with it:\n   export STAGECAL_CONFIG={demo.directory / 'stagecal.toml'} PATH={BIN}:$PATH")
    print("   stagecal watch &   trigger-calms --help   stagecal --help\n")


if __name__ == "__main__":
    sys.exit(main())
