"""`stagecal watch`: the daemon. It looks at the trigger directory, takes the steps of every request, and stays alive.

Events only wake it; what is true it reads from the directory and the ledger. It stops before its next side effect when
another daemon holds the lease. Jobs outlive it, and the next one finds them again.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stagecal.cli.common import DONE, FORBIDDEN, load, only_the_service, outcome, parser

if TYPE_CHECKING:
    from datetime import datetime

    from stagecal.adapters.lease import Lease
    from stagecal.adapters.watch import DirectoryWatch
    from stagecal.config import Config
    from stagecal.services.context import Site
    from stagecal.services.rounds import Rounds

log = logging.getLogger("stagecal.watch")

PROGRAM = "stagecal watch"
_THREADS = 12
_BEAT_S = 10
_TROUBLE_S = 2
# What operators wish for is seen this soon.
_OPEN_S = 2
# Nobody takes a lease over before its heartbeat is missed for longer than this (adapters/lease.py).
_UNSEEN_S = 60
_HOUSEKEEPING_S = 3600
_SCRUB_NICE = 10
# A slice of the scrub takes a fraction of a second, unless the disk hangs: then nobody waits for it.
_SCRUB_ENDS_S = 2


def make_parser(program: str) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    made = parser(program, "Watch the trigger directory and do what is asked (started by systemd).", "stagecal watch")
    made.add_argument(
        "--until-idle",
        action="store_true",
        help="end when no request can move any more (0), or when some only wait for a later time (3)",
    )
    return made


def command(options: argparse.Namespace, _name: str) -> int:
    """Run until told to stop, or until idle."""
    from stagecal import wiring

    config = load(options)
    _log_to_stderr(config)
    config.state.directory.mkdir(parents=True, exist_ok=True)
    only_the_service(config.state.directory)
    site = wiring.site(config)
    lease = wiring.claim_lease(config, site.clock.now())
    if lease.predecessor:
        log.warning("took the lease over from %s", lease.predecessor)
    daemon = _daemon(config, site, lease)
    return daemon.close(outcome(PROGRAM, lambda: daemon.run(until_idle=options.until_idle)))


def _log_to_stderr(config: Config) -> None:
    logging.basicConfig(
        level=config.state.log_level.upper(),
        format="%(asctime)sZ %(levelname)s %(name)s: %(message)s",
        datefmt="%Y-%m-%dT%H:%M:%S",
        stream=sys.stderr,
    )
    logging.Formatter.converter = time.gmtime


def _daemon(config: Config, site: Site, lease: Lease) -> _Daemon:
    from stagecal import wiring
    from stagecal.services.receiving import Receiver
    from stagecal.services.rounds import Rounds
    from stagecal.services.sweeping import know_root

    know_root(site)
    wiring.mend(config)
    if config.restore.chosen_engine == "casatasks" or (
        config.restore.chosen_engine == "auto" and config.restore.raw_fetch and not config.restore.casa
    ):
        from stagecal.casa_worker import ensure_casa_worker

        # The first start may download it, which takes longer than a service may take to start.
        wiring.ask_for_time(1800)
        ensure_casa_worker(config.restore.casa_worker, progress=sys.stderr)
    wake = threading.Event()
    # Each job that ended may be packed for hours, and keeps a thread; looks at the others never wait for that.
    executor = ThreadPoolExecutor(max_workers=_THREADS + config.cluster.max_jobs, thread_name_prefix="step")
    post = ThreadPoolExecutor(max_workers=2, thread_name_prefix="post")
    return _Daemon(
        config=config,
        site=site,
        lease=lease,
        wake=wake,
        executor=executor,
        post=post,
        rounds=Rounds(site, Receiver(site), executor, post, wake.set),
        watch=wiring.directory_watch(config, wake.set),
        ended=threading.Event(),
    )


@dataclass
class _Daemon:
    """The main loop and what it keeps alive."""

    config: Config
    site: Site
    lease: Lease
    wake: threading.Event
    executor: ThreadPoolExecutor
    post: ThreadPoolExecutor
    rounds: Rounds
    watch: DirectoryWatch
    ended: threading.Event
    probe: Future[None] | None = None
    beaten_at: float = 0.0
    lease_trouble: str = ""
    housekept_at: float = 0.0
    scrub: threading.Thread | None = None
    leftovers: Future[None] | None = None

    def run(self, *, until_idle: bool) -> int:
        import schedule

        from stagecal import wiring
        from stagecal.ports import TransientError

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        # The schedule only wakes the loop: a look that an event did not ask for.
        looks = schedule.Scheduler()
        looks.every(max(1, int(self.config.triggers.scan_interval_s))).seconds.do(self.wake.set)
        ping_s = (wiring.watchdog_interval_s() or 60.0) / 2
        self.watch.renew()
        if self.config.staging.scrub_mb_s and not until_idle:
            self.scrub = threading.Thread(target=self._scrub, name="scrub", daemon=True)
            self.scrub.start()
        ready = False
        while not self.ended.is_set():
            self.wake.clear()
            if not self._lease_holds():
                wiring.tell_service_manager("WATCHDOG=1", f"STATUS=waiting: {self.lease_trouble}")
                self.ended.wait(min(_BEAT_S, ping_s))
                continue
            self._housekeep()
            if not self.watch.healthy() and self.watch.renew():
                log.info("the watch on %s is renewed", self.config.triggers.directory)
            try:
                result = self.rounds.run()
            except TransientError as trouble:
                log.error("%s: trying again", trouble)
                self.ended.wait(_BEAT_S)
                continue
            if not ready:
                wiring.tell_service_manager("READY=1")
                ready = True
                log.info("watching %s", self.config.triggers.directory)
            if self._threads_live():
                count = len(self.site.ledger.open_requests())
                wiring.tell_service_manager("WATCHDOG=1", f"STATUS={count} open requests")
            if result.moved:
                continue
            if until_idle and not self.wake.is_set():
                if self.rounds.is_idle():
                    return DONE
                if self.rounds.waits_long(self.site.clock.now()):
                    return FORBIDDEN
            self._sleep(result.next_at, ping_s, until_idle=until_idle)
            looks.run_pending()
        wiring.tell_service_manager("STOPPING=1")
        log.info("ended; jobs go on, the next start finds them")
        return DONE

    def close(self, code: int) -> int:
        """End the watch, give the lease back, and return the exit code.

        A step that is still at work (packing takes hours) is not waited for, least of all when another daemon holds
        the lease now: it is done again by the next one.
        """
        self.ended.set()
        self.watch.stop()
        if self.scrub is not None:
            self.scrub.join(_SCRUB_ENDS_S)
        busy = any(not future.done() for future in self.rounds.in_flight.values())
        for pool in (self.executor, self.post):
            pool.shutdown(wait=not busy, cancel_futures=True)
        self.lease.release()
        if busy:
            logging.shutdown()
            sys.stderr.flush()
            os._exit(code)
        return code

    def _end(self, *_: object) -> None:
        self.ended.set()
        self.wake.set()

    def _sleep(self, next_at: datetime | None, ping_s: float, *, until_idle: bool) -> None:
        # What is typed at a terminal reaches us through the ledger alone.
        pause = min(ping_s, _OPEN_S, self.config.triggers.scan_interval_s)
        if next_at is not None:
            pause = min(pause, max(0.0, (next_at - self.site.clock.now()).total_seconds()))
        if until_idle:
            pause = min(pause, 0.2)
        self.wake.wait(max(0.005, pause))

    def _scrub(self) -> None:
        """Verify staged files for as long as the daemon lives, in a thread of low priority.

        It has a connection to the ledger of its own, so that the rounds never wait for it; no trouble ends it.
        """
        from stagecal import wiring
        from stagecal.ports import FatalError, TransientError
        from stagecal.services.scrubbing import REST_S, Scrubber

        with suppress(OSError):
            # On Linux this is the thread's alone, and its place among those who wait for the disk follows from it.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _SCRUB_NICE)
        scrubber: Scrubber | None = None
        said = ""
        while not self.ended.is_set():
            rest_s = REST_S
            try:
                if scrubber is None:
                    scrubber = Scrubber(self.site, wiring.ledger(self.config), wake=self.wake.set)
                # Who may have lost the lease records nothing.
                if not self.lease_trouble:
                    rest_s = scrubber.step()
                    said = ""
            except (TransientError, FatalError) as trouble:
                if str(trouble) != said:
                    log.warning("staged data are not verified for now: %s", trouble)
                said = str(trouble)
            except Exception:
                log.exception("the scrub of staged data")
            self.ended.wait(rest_s)
        if scrubber is not None:
            scrubber.close()

    def _lease_holds(self) -> bool:
        """Look at the lease or renew it; return whether it can be nobody else's now.

        A trigger directory that is away for a while ends nothing: the work goes on, and rests when others may take
        over. LeaseLostError ends the daemon before its next side effect.
        """
        from stagecal.ports import TransientError

        since = time.monotonic() - self.beaten_at
        try:
            if self.beaten_at and since < _BEAT_S and not self.lease_trouble:
                self.lease.check()
            else:
                self.lease.beat(self.site.clock.now())
                self.beaten_at = time.monotonic()
                if self.lease_trouble:
                    log.info("the lease in %s is renewed", self.config.triggers.directory)
                self.lease_trouble = ""
        except TransientError as trouble:
            if str(trouble) != self.lease_trouble:
                log.error("%s", trouble)
            self.lease_trouble = str(trouble)
            return since < _UNSEEN_S
        return True

    def _housekeep(self) -> None:
        if time.monotonic() - self.housekept_at >= _HOUSEKEEPING_S or not self.housekept_at:
            from stagecal import wiring

            wiring.keep_triggers_tidy(self.config, self.site.clock.now())
            if self.leftovers is None or self.leftovers.done():
                self.leftovers = self.executor.submit(self._remove_leftovers)
            self.housekept_at = time.monotonic()

    def _remove_leftovers(self) -> None:
        from stagecal.services.dispatching import clean_what_was_left

        try:
            clean_what_was_left(self.site)
        except Exception:
            log.exception("the job directories that were left behind")

    def _threads_live(self) -> bool:
        """Return whether the threads that do nothing long still take work: if they hang, systemd has to restart us."""
        if self.probe is not None and not self.probe.done():
            return False
        self.probe = self.post.submit(_nothing)
        return True


def _nothing() -> None:
    return None
