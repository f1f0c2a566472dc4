"""Stand-ins for tests of the life cycle: ports that die at a chosen effect, and a mail server that answers by address.

`Effects` counts every call that changes something outside the process. It raises Crash, which no service may catch,
before or after the call of a chosen number; the site is then taken from disk anew, as a new process would find it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from email import message_from_string
from pathlib import Path
from typing import Any

from stagecal import wiring
from stagecal.config import load_config
from stagecal.domain.requests import Request, State
from stagecal.ports import JobHandle, Mailer, MailReply, RecipientResult
from stagecal.services.context import Site
from stagecal.services.sweeping import know_root
from tests.sites import FakeClock, SiteForTests, make_test_site

EFFECTS = {
    "archive": {"facts"},
    "ledger": {
        *("add", "commit", "claim_slot", "hand_over_job", "set_wish", "note", "enqueue", "update_recipients"),
        *("update_staging", "set_setting", "leave_behind", "forget_left"),
        *("record_begun", "record_verified", "record_rotten", "tell_rotten"),
    },
    "mailer": {"send"},
    "nodes": {"prepare", "launch", "renew_lease", "cancel", "clean"},
    "staging": {"begin", "pack", "copy", "link", "write", "publish", "withdraw", "purge", "discard"},
    "triggers": {"quarantine", "remove"},
}
"""The calls that leave something behind, by port (a question to the archive leaves a line in its log)."""


class Crash(BaseException):
    """The process dies here. No service catches it."""


@dataclass
class Effects:
    """Counts the effects of a site; dies before or after the one with the number `crash_at` (from 1), or this name.

    What is repeated while a job is waited for counts once, so that the numbers do not depend on how long it takes.
    """

    crash_at: int | str = 0
    before: bool = False
    names: list[str] = field(default_factory=list)
    waits: set[str] = field(default_factory=set)

    def wrap(self, site: Site) -> Site:
        """Return the site with every port that has effects counted."""
        return replace(site, **{name: _Port(getattr(site, name), name, self) for name in EFFECTS})

    def call(self, name: str, function: Callable[..., Any], arguments: Any, keywords: Any) -> Any:
        """Do one effect, unless we die first."""
        if name == "nodes.renew_lease" or (
            name == "ledger.commit" and keywords.keys() == {"now", "not_before", "attempts", "reason", "leased_until"}
        ):
            if name in self.waits:
                return function(*arguments, **keywords)
            self.waits.add(name)
        self.names.append(name)
        here = self.crash_at in (len(self.names), name)
        if here and self.before:
            raise Crash(f"before {name}")
        result = function(*arguments, **keywords)
        if here:
            raise Crash(f"after {name}")
        return result


class _Port:
    def __init__(self, port: Any, name: str, effects: Effects) -> None:
        self._port, self._name, self._effects = port, name, effects

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._port, name)
        if name not in EFFECTS[self._name]:
            return attribute
        return lambda *arguments, **keywords: self._effects.call(f"{self._name}.{name}", attribute, arguments, keywords)


@dataclass
class HonestMailer:
    """A mail server that answers for some addresses as it is told, and takes everything else."""

    inner: Mailer
    replies: dict[str, RecipientResult] = field(default_factory=dict)
    attempts: list[tuple[str, ...]] = field(default_factory=list)

    def answer(self, address: str, reply: MailReply, text: str = "") -> None:
        """Answer so for this address from now on; ACCEPTED takes its mail."""
        self.replies.pop(address, None)
        if reply is not MailReply.ACCEPTED:
            self.replies[address] = RecipientResult(reply, text or f"this is {reply}")

    def send(self, sender: str, recipients: Sequence[str], message: bytes) -> Mapping[str, RecipientResult]:
        self.attempts.append(tuple(recipients))
        taken = [one for one in recipients if one not in self.replies]
        results = self.inner.send(sender, taken, message) if taken else {}
        return {one: self.replies.get(one) or results[one] for one in recipients}


def with_ports(site: SiteForTests, **ports: Any) -> SiteForTests:
    """Return the same site with other ports."""
    return SiteForTests(site.directory, site.config, site.clock, replace(site.site, **ports))


def with_mailer(site: SiteForTests) -> tuple[SiteForTests, HonestMailer]:
    """Return the site with a mail server whose answers a test chooses."""
    mailer = HonestMailer(site.site.mailer)
    return with_ports(site, mailer=mailer), mailer


def settle(site: SiteForTests, *, seconds: float = 60) -> None:
    """Do rounds until nothing can move any more; the clock jumps over long waits, jobs are real and are waited for."""
    rounds = site.rounds()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if rounds.run().moved:
            continue
        if rounds.is_idle():
            return
        if rounds.waits_long(site.clock.now()):
            site.clock.advance(minutes=5)
        else:
            time.sleep(0.01)
            site.clock.advance(seconds=1)
    raise AssertionError(f"not settled within {seconds} s: {site.requests()}")


def run_until(site: SiteForTests, state: State) -> None:
    """Do rounds until some request is in this state, or nothing can move any more."""
    rounds = site.rounds()
    site.run(lambda: any(one.state is state for one in site.requests()) or rounds.is_idle())


def wish(site: SiteForTests, what: str, request: Request | None = None) -> None:
    """Ask for something as the operators' commands do."""
    request = request or site.only()
    site.site.ledger.set_wish(request.id, what, site.clock.now())


def end_jobs(site: SiteForTests) -> None:
    """End whatever jobs are still alive, so that a failed test leaves no process behind."""
    for directory in site.job_directories():
        with suppress(OSError, KeyError):
            job = json.loads((directory / "request.json").read_text())
            site.site.nodes.cancel(JobHandle(job["node"], directory.name, job["nonce"]))


@dataclass
class Arena:
    """One place on disk that becomes a fresh site as often as wanted, quickly."""

    directory: Path
    config: str = ""

    def __post_init__(self) -> None:
        self._site = make_test_site(self.directory, config=self.config)
        self._site.site.ledger.close()
        self._home = self._site.directory
        shutil.copyfile(self._home / "archive.db", self.directory / "archive.db")

    def fresh(self) -> SiteForTests:
        """Return the site as it was made, with nothing in it."""
        for name in ("triggers", "mail", "work", "preview", "state", "behaviour"):
            shutil.rmtree(self._home / name, ignore_errors=True)
            (self._home / name).mkdir(mode=0o700 if name == "state" else 0o755)
        (self._home / "runs").unlink(missing_ok=True)
        shutil.copyfile(self.directory / "archive.db", self._home / "archive.db")
        clock = FakeClock()
        site = replace(wiring.site(self._site.config), clock=clock)
        know_root(site)
        return SiteForTests(self._home, self._site.config, clock, site)


def existing(directory: Path) -> SiteForTests:
    """Return the site in this directory as a daemon that starts would find it."""
    config = load_config(directory / "stagecal.toml", environ={})
    wiring.mend(config)
    clock = FakeClock()
    site = replace(wiring.site(config), clock=clock)
    know_root(site)
    return SiteForTests(directory, config, clock, site)


# --- what is left at the end ---------------------------------------------------------------------------------------


def message_ids(site: SiteForTests) -> Counter[tuple[str, str]]:
    """Return how often each (Message-ID, envelope) was mailed."""
    mails = [message_from_string(text) for text in site.mails()]
    return Counter((mail["Message-ID"], mail["X-Envelope-To"]) for mail in mails)


def verified(directory: Path) -> tuple[str, ...]:
    """Return the names in a published directory, all of them verified by sha256sum as a user would."""
    done = subprocess.run(
        ["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=directory, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    names = tuple(sorted(os.listdir(directory)))
    assert len(done.stdout.splitlines()) == len(names) - 1, "SHA256SUMS covers every file but itself"
    return names


def hidden(site: SiteForTests, name: str) -> list[str]:
    """Return what stands in a hidden directory of the staging root."""
    directory = site.config.staging.root / name
    return sorted(os.listdir(directory)) if directory.exists() else []


def end_state(site: SiteForTests) -> dict[str, object]:
    """Return everything that must be the same at the end, however often the process died on the way."""
    ledger = site.site.ledger
    stagings = {staging.token: staging for staging in ledger.stagings()}
    rejected = site.config.triggers.directory / "rejected"
    return {
        "requests": [
            (one.trigger_name, one.state, one.outcome, one.verdict, one.holds_slot, one.wish, one.round)
            for one in site.requests()
        ],
        "triggers": site.triggers(),
        "other files beside the triggers": sorted(
            path.name for path in site.config.triggers.directory.iterdir() if not path.name.startswith("trigger-")
        ),
        "rejected": sorted(os.listdir(rejected)) if rejected.exists() else [],
        "mails": sorted((identity.partition(".")[0], envelope) for identity, envelope in message_ids(site)),
        "published": sorted(verified(path) for path in site.published()),
        "recorded": sorted(
            (staging.request, staging.withdrawn_at is None, staging.notified_at is None, path in stagings)
            for path, staging in stagings.items()
        ),
        "published without record": [path.name for path in site.published() if path.name not in stagings],
        "being made": hidden(site, ".incoming"),
        "withdrawn without record": [name for name in hidden(site, ".expired") if name not in stagings],
        "jobs": len(site.job_directories()),
        "in the work area": len(os.listdir(site.config.cluster.work_area)),
        "calibrations": site.calibrations(),
        "unsent": len(ledger.unsent_mails()),
    }
