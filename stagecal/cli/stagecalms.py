"""`stagecalms`: an operator stages calibrated data by hand, in the same queue and with the same code as the daemon.

Entitlement is the operator's duty (--user EMAIL checks it too). While no daemon runs, this command does the work of all
open requests itself, because the queue is one.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from stagecal.cli.common import (
    DONE,
    FORBIDDEN,
    INTERRUPTED,
    WORK_FAILED,
    load,
    only_the_service,
    parser,
    run,
)

if TYPE_CHECKING:
    import argparse
    from concurrent.futures import Future

    from stagecal.config import Config
    from stagecal.domain.requests import Request
    from stagecal.services.context import Site
    from stagecal.services.rounds import Rounds

PROGRAM = "stagecalms"
_LOOK_S = 0.05


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command."""
    options = _parser().parse_args(arguments)
    run(PROGRAM, lambda: _stage(options))


def _parser() -> argparse.ArgumentParser:
    made = parser(
        PROGRAM,
        "Create and stage the calibrated MSs of a MOUS (an operator's act; entitlement is your duty).",
        "stagecalms 2019.1.00337.S uid://A001/X14d7/X160 18704\n"
        '  stagecalms 2019.1.00337.S uid://A001/X14d7/X160 18704 X "J0217-0820,J0238+1636"',
    )
    made.add_argument("project", metavar="PROJECT", help="project code")
    made.add_argument("mous", metavar="MOUS_UID", help="in either form")
    made.add_argument("ticket", metavar="TICKET", help="helpdesk ticket number")
    made.add_argument("mark", metavar="X", nargs="?", choices=["X"], help="the letter X before calibrator fields")
    made.add_argument("calfields", metavar="CALFIELDS", nargs="?", help="exact field names, separated by commas")
    made.add_argument("--user", metavar="EMAIL", help="check that this person is entitled")
    return made


def _stage(options: argparse.Namespace) -> int:
    import logging

    from stagecal import wiring
    from stagecal.domain.identifiers import parse_address, parse_calfields, parse_project, parse_ticket, parse_uid
    from stagecal.ports import UsageError

    if options.mark and options.calfields is None:
        raise UsageError("X must be followed by the calibrator fields; leave both out for all data")
    project, mous, ticket = parse_project(options.project), parse_uid(options.mous), parse_ticket(options.ticket)
    calfields = parse_calfields(options.calfields) if options.mark else ()
    # Without --user nobody's entitlement is checked; an empty address is a slip that must never mean the same.
    email = parse_address(options.user) if options.user is not None else ""
    # The operator's terminal shows the staging; what the service logs beside it would only break the known lines.
    logging.getLogger("stagecal").addHandler(logging.NullHandler())
    config = load(options)
    only_the_service(config.state.directory)
    site = wiring.site(config)
    request, printed = _joined(site, project, mous, ticket, calfields, email)
    worker = _Worker(config, site, request.id)
    worker.start()
    try:
        code = _follow(site, request, worker, printed)
    except KeyboardInterrupt:
        worker.stop()
        code = _interrupted(site, request)
        if worker.is_busy():
            # The step is taken again by the daemon or the next command: nobody has to wait for it here.
            sys.stdout.flush()
            os._exit(code)
    worker.stop()
    return code


def _joined(
    site: Site, project: str, mous: str, ticket: str, calfields: tuple[str, ...], email: str
) -> tuple[Request, int]:
    """Return the open request of the same command, started again if it was held, else a new one.

    The number says how many lines of its terminal output belong to an earlier attempt.
    """
    import getpass

    from stagecal.domain.records import Step
    from stagecal.domain.requests import Origin, State, request_id, typed_request

    now = site.clock.now()
    for one in site.ledger.open_requests():
        same = (one.project, one.mous, one.ticket, one.calfields, one.email) == (
            project,
            mous,
            ticket,
            calfields,
            email,
        )
        going_away = one.wish == "withdraw" or one.state is State.WITHDRAWING
        if one.origin is Origin.OPERATOR and same and not going_away:
            printed = 0
            if one.state is State.HELD:
                printed = max((number for number, _ in site.ledger.terminal(one.id)), default=0)
                site.ledger.set_wish(one.id, "retry", now)
            return one, printed
    request = typed_request(
        request_id("operator", site.new_secret()),
        Origin.OPERATOR,
        mous=mous,
        project=project,
        at=now,
        ticket=ticket,
        email=email,
        calfields=calfields,
    )
    by = f"typed by {getpass.getuser()}: {request.command_line}"
    added = site.ledger.add(request, Step("receive", "who asks?", by, "RECEIVED"))
    return added or request, 0


class _Worker(threading.Thread):
    """Does the rounds while no daemon does them; beside a daemon, only the steps of the one request.

    A daemon looks at its triggers at once, but at what was typed only now and then. Locks keep the two apart. `trouble`
    is what ended the worker before its time.
    """

    def __init__(self, config: Config, site: Site, request_id: str) -> None:
        super().__init__(daemon=True, name="rounds")
        self._config = config
        self._site = site
        self._request_id = request_id
        self._step: Future[bool] | None = None
        self._ended = threading.Event()
        self._wake = threading.Event()
        self._rounds: Rounds | None = None
        self.trouble: Exception | None = None

    def run(self) -> None:
        try:
            self._work()
        except Exception as trouble:
            self.trouble = trouble

    def _work(self) -> None:
        from concurrent.futures import ThreadPoolExecutor

        from stagecal import wiring
        from stagecal.services.life import advance
        from stagecal.services.rounds import Rounds

        executor = ThreadPoolExecutor(max_workers=4, thread_name_prefix="step")
        self._rounds = rounds = Rounds(self._site, executor=executor, wake=self._wake.set)
        while not self._ended.is_set():
            self._wake.clear()
            pause = 1.0
            if not wiring.daemon_is_running(self._config):
                next_at = rounds.run().next_at
                if next_at is not None:
                    pause = min(1.0, max(0.05, (next_at - self._site.clock.now()).total_seconds()))
            else:
                pause = 0.2
                if self._step is None or self._step.done():
                    self._step = executor.submit(advance, self._site, self._request_id)
            self._wake.wait(pause)

    def stop(self) -> None:
        self._ended.set()
        self._wake.set()
        self.join(timeout=5)

    def is_busy(self) -> bool:
        """Return whether a step is being taken that may last: a mail server that is silent, a large tar file."""
        steps = [*(self._rounds.in_flight.values() if self._rounds else ()), *([self._step] if self._step else ())]
        return any(not future.done() for future in steps)


def _follow(site: Site, request: Request, worker: _Worker, printed: int) -> int:
    """Print the terminal output as it comes until the request ends or needs a person."""
    from stagecal.domain.requests import Outcome, State

    place = ""
    while True:
        if worker.trouble is not None:
            raise worker.trouble
        current = site.ledger.get(request.id)
        for number, line in site.ledger.terminal(request.id, printed):
            print(line, flush=True)
            printed = number
        if current.state is State.CLOSED:
            if current.outcome is Outcome.DELIVERED:
                return DONE
            return FORBIDDEN
        failed = current.state is State.HELD or (current.state is State.FAILED and current.not_before is not None)
        if failed and not current.wish:
            if current.reason:
                print(f"{PROGRAM}: {current.reason} (stagecal why {current.id})", file=sys.stderr)
            return WORK_FAILED
        place = _told_place(site, current, place)
        time.sleep(_LOOK_S)


def _told_place(site: Site, request: Request, told: str) -> str:
    """Say once what the request waits for, on standard error."""
    from stagecal.domain.requests import State
    from stagecal.services.dispatching import turns_of

    place = ""
    if request.state is State.ACCEPTED:
        queue = turns_of(site, site.clock.now())
        position = queue.place(request.id)
        if request.id in queue.makers:
            place = f"Request {queue.makers[request.id]} is making the same products: waiting for it ..."
        elif site.ledger.setting("held"):
            place = "No new jobs are started at present (stagecal release): waiting ..."
        elif position and not queue.may_start(request.id):
            place = f"Position {position} of {len(queue.queue)} in the queue: waiting for a slot ..."
    if request.not_before is not None and request.reason and request.state is not State.STAGING:
        place = f"Waiting until {request.not_before:%H:%M:%S} UTC: {request.reason}"
    if place and place != told:
        print(place, file=sys.stderr, flush=True)
    return place or told


def _interrupted(site: Site, request: Request) -> int:
    """Ctrl-C: before dispatch the request is withdrawn, afterwards only we go away."""
    from stagecal.domain.requests import State
    from stagecal.services.life import advance

    current = site.ledger.get(request.id)
    if current.state in (State.RECEIVED, State.ACCEPTED):
        site.ledger.set_wish(request.id, "withdraw", site.clock.now())
        advance(site, request.id)
        ended = site.ledger.get(request.id).state is State.CLOSED
        print(f"\n{PROGRAM}: withdrawn" + ("" if ended else " at its next step"), file=sys.stderr)
    else:
        print(
            f"\n{PROGRAM}: detached; the staging goes on with the daemon or the same command (stagecal status "
            f"{request.id})",
            file=sys.stderr,
        )
    return INTERRUPTED
