"""`stagecal restore`: restore the calibrated MSs of a MOUS on a node, and leave them in products/ of its job directory.

As NRAO's almaRestore: it prints where the restore runs, returns once it is started, and mails at the end. It stands in
the same queue as everything else. While no daemon runs, one is started in the background until there is nothing to do.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stagecal.cli.common import (
    DONE,
    FORBIDDEN,
    SURROUNDINGS,
    WORK_FAILED,
    CommandError,
    load,
    only_the_service,
    parser,
)

if TYPE_CHECKING:
    import subprocess

    from stagecal.config import Config
    from stagecal.domain.requests import Request
    from stagecal.services.context import Site

_LOOK_S = 0.1
_LARGEST_EVENT = 1_000_001


@dataclass(frozen=True)
class _Wish:
    """What is to be restored, and how."""

    mous: str
    project: str
    email: str
    casa_home: str
    engine: str


def make_parser(program: str) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    made = parser(
        program,
        "Restore the calibrated measurement sets of a MOUS (an operator's act; entitlement is your duty).",
        f"{program} -C /opt/casa/casa-6.5.4 -E me@nrao.edu uid://A001/X12d1/X23e\n  {program} --event - < event.json",
    )
    made.add_argument("mous", metavar="MOUS_UID", nargs="?", help="in either form")
    made.add_argument("-C", dest="casa_home", metavar="CASA_HOME", help="use this CASA (its directory on the nodes)")
    made.add_argument("-E", dest="email", metavar="EMAIL", help="mail here when it is done, or has failed")
    made.add_argument("-P", dest="profile", metavar="PROFILE", help="use the configuration of this name ([profiles])")
    made.add_argument(
        "--engine", choices=["auto", "pipeline", "script", "casatasks", "command"], help="(default: by the site)"
    )
    made.add_argument("--event", metavar="FILE", help="take everything from NRAO's JSON event; - is standard input")
    return made


def command(options: argparse.Namespace, _name: str) -> int:
    """Place the restore, and follow it until it runs."""
    from stagecal import wiring
    from stagecal.domain.restore.restorable import restorable

    config = _config(options)
    wish = _wish(options)
    only_the_service(config.state.directory)
    facts = wiring.archive(config).restore_facts(wish.mous)
    if facts is None:
        raise CommandError(FORBIDDEN, f"the archive has no MOUS {wish.mous}")
    if wish.project and wish.project != facts.project:
        raise CommandError(FORBIDDEN, f"{wish.mous} belongs to {facts.project}, not to {wish.project}")
    verdict = restorable(facts)
    if not verdict.possible and (wish.engine or config.restore.chosen_engine) != "command":
        raise CommandError(FORBIDDEN, f"{wish.mous} cannot be restored: {verdict.reason}")
    site = wiring.site(config)
    request, printed = _placed(site, wish, facts.project)
    try:
        return _follow(site, request, printed)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"the restore goes on without you: see it by `stagecal status {request.id}`, "
            f"take it back by `stagecal withdraw {request.id}`"
        ) from None


def _config(options: argparse.Namespace) -> Config:
    from stagecal.ports import UsageError

    config = load(options)
    if options.profile is None:
        return config
    if options.profile not in config.profiles:
        known = ", ".join(sorted(config.profiles)) or "none"
        raise UsageError(f"there is no profile {options.profile!r} in {config.path} ([profiles] has: {known})")
    return load(argparse.Namespace(config=str(config.profiles[options.profile])))


def _wish(options: argparse.Namespace) -> _Wish:
    from stagecal.domain.identifiers import parse_address, parse_uid
    from stagecal.domain.restore.event import read_event
    from stagecal.ports import UsageError

    if (options.event is None) == (options.mous is None):
        raise UsageError("name one MOUS, or an event with --event FILE")
    engine = options.engine or ""
    if options.event is not None:
        event = read_event(_event_text(options.event))
        mous, project, email, casa_home = event.mous, event.project, event.email, event.casa_home
    else:
        mous, project, email, casa_home = parse_uid(options.mous), "", "", ""
    email = parse_address(options.email) if options.email is not None else email
    casa_home = options.casa_home if options.casa_home is not None else casa_home
    if casa_home and (not Path(casa_home).is_absolute() or not casa_home.isprintable()):
        raise UsageError(f"-C {casa_home!r}: give the absolute path of a CASA on the nodes")
    if casa_home and engine == "casatasks":
        raise UsageError(
            f"the engine casatasks does not use {casa_home}: leave out one of the two (-C '' for an event)"
        )
    return _Wish(mous, project, email, casa_home.rstrip("/"), engine)


def _event_text(name: str) -> str:
    from stagecal.ports import UsageError

    try:
        if name == "-":
            return sys.stdin.buffer.read(_LARGEST_EVENT).decode()
        with Path(name).open("rb") as stream:
            return stream.read(_LARGEST_EVENT).decode()
    except UnicodeDecodeError:
        raise UsageError(f"the event in {name} is no text in UTF-8") from None
    except OSError as error:
        raise UsageError(f"the event in {name} cannot be read: {error.strerror}") from None


def _placed(site: Site, wish: _Wish, project: str) -> tuple[Request, int]:
    """Return the open restore of the same wish, else a new one; and how many of its lines were told before."""
    import getpass

    from stagecal.domain.records import Step
    from stagecal.domain.requests import Origin, State, request_id, typed_request

    now = site.clock.now()
    for one in site.ledger.open_requests():
        same = (one.mous, one.email, one.casa_home, one.engine) == (wish.mous, wish.email, wish.casa_home, wish.engine)
        going_away = one.wish == "withdraw" or one.state is State.WITHDRAWING
        if one.origin is Origin.RESTORE and same and not going_away:
            printed = 0
            if one.state is State.HELD:
                printed = max((number for number, _ in site.ledger.terminal(one.id)), default=0)
                site.ledger.set_wish(one.id, "retry", now)
            return site.ledger.get(one.id), printed
    request = typed_request(
        request_id("restore", site.new_secret()),
        Origin.RESTORE,
        mous=wish.mous,
        project=project,
        at=now,
        email=wish.email,
        engine=wish.engine,
        casa_home=wish.casa_home,
    )
    by = f"typed by {getpass.getuser()}: {request.command_line}"
    return site.ledger.add(request, Step("receive", "who asks?", by, "RECEIVED")) or request, 0


def _daemon(config: Config) -> subprocess.Popen[bytes]:
    """Start a daemon that outlives this command and ends when nothing is left to do."""
    import os
    import subprocess

    log = config.state.directory / "restore.log"
    words = [sys.executable, "-m", "stagecal.cli.main", "watch", "--until-idle", "--config", str(config.path)]
    with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as stream:
        print(f"No daemon is running: one works in the background until all is done (log: {log}).", file=sys.stderr)
        return subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True, cwd="/"
        )


def _follow(site: Site, request: Request, printed: int) -> int:
    """Print the lines of the restore as they come, until it runs, has ended, or needs a person."""
    from stagecal import wiring

    background: subprocess.Popen[bytes] | None = None
    told = ""
    while True:
        current = site.ledger.get(request.id)
        for number, line in site.ledger.terminal(request.id, printed):
            print(line, flush=True)
            printed = number
        code = _end_of(current)
        if code is not None:
            return code
        place = _place(site, current)
        if place and place != told:
            print(place, file=sys.stderr, flush=True)
            told = place
        if not wiring.daemon_is_running(site.config):
            if background is None:
                background = _daemon(site.config)
            elif background.poll() is not None:
                _nobody_works(site, request.id, background.returncode)
        time.sleep(_LOOK_S)


def _end_of(current: Request) -> int | None:
    """Return the exit code if there is nothing more to wait for. Raises CommandError if a person has to look."""
    from stagecal.domain.requests import Outcome, State

    if current.state in (State.REFUSED, State.NOTIFIED, State.CLOSED) and current.outcome is not Outcome.DELIVERED:
        return FORBIDDEN
    if current.state in (State.STAGING, State.STAGED, State.NOTIFIED, State.CLOSED):
        return DONE
    if current.state in (State.FAILED, State.HELD) and not current.wish:
        raise CommandError(WORK_FAILED, f"{current.reason} (stagecal why {current.id})")
    if current.state is State.WITHDRAWING:
        raise CommandError(FORBIDDEN, f"the restore {current.id} was withdrawn")
    return None


def _place(site: Site, current: Request) -> str:
    """Return what the restore waits for, '' if it moves."""
    from stagecal.domain.requests import State
    from stagecal.services.dispatching import turns_of

    queue = turns_of(site, site.clock.now())
    position = queue.place(current.id)
    if current.state is State.ACCEPTED and position and not queue.may_start(current.id):
        if site.ledger.setting("held"):
            return f"Position {position} of {len(queue.queue)} in the queue: dispatching is on hold ..."
        return f"Position {position} of {len(queue.queue)} in the queue: waiting for a slot ..."
    if current.not_before is not None and current.reason:
        return f"Waiting until {current.not_before:%H:%M:%S} UTC: {current.reason}"
    return ""


def _nobody_works(site: Site, request_id: str, code: int) -> None:
    """The daemon in the background has ended, and the restore does not run: say why, or go on if it does now."""
    current = site.ledger.get(request_id)
    if _end_of(current) is not None:
        return
    queued = f"the restore is in the queue ({current.id}), and nobody works on it: start `stagecal watch`"
    if site.ledger.setting("held"):
        raise CommandError(FORBIDDEN, f"dispatching is on hold; {queued}, or `stagecal release` and this command again")
    if code not in (0, 3, 75):
        raise CommandError(WORK_FAILED, f"the daemon in the background ended with code {code}; {queued}")
    raise CommandError(SURROUNDINGS, f"{current.reason or 'it waits'}; {queued}, or give this command again later")
