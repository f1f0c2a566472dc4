"""`stagecal rebuild`: make a lost or damaged ledger anew from triggers, job directories, receipts and sidecars."""

from __future__ import annotations

import argparse

from stagecal.cli.common import ALREADY_RUNNING, DONE, CommandError, load, only_the_service, parser


def make_parser(program: str) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    return parser(
        program,
        "Make a lost ledger anew from what stands elsewhere. A damaged one: move stagecal.db (and its -wal and -shm "
        "files) away first. Stop the daemon before; nothing is started, mailed or deleted.",
        "stagecal rebuild",
    )


def command(options: argparse.Namespace, _name: str) -> int:
    """Rebuild and say what was found."""
    from stagecal import wiring
    from stagecal.services.rebuilding import rebuild
    from stagecal.services.sweeping import know_root

    config = load(options)
    only_the_service(config.state.directory)
    if wiring.daemon_is_running(config):
        raise CommandError(ALREADY_RUNNING, "the daemon is running: stop it first (systemctl stop stagecal)")
    site = wiring.site(config, anew=True)
    know_root(site)
    found = rebuild(site, wiring.ledger(config), config.cluster.work_area, site.clock.now())
    print(
        f"{len(set(found.requests))} requests, {len(found.stagings)} staged directories, {len(found.jobs)} running jobs"
    )
    for remark in found.remarks:
        print(f"look at this: {remark}")
    return DONE
