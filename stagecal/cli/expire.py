"""`stagecal expire`: the sweeper that cron or a timer starts once a day."""

from __future__ import annotations

import argparse
import sys
from datetime import UTC, datetime

from stagecal.cli.common import (
    ALREADY_RUNNING,
    DONE,
    FORBIDDEN,
    WORK_FAILED,
    CommandError,
    load,
    only_the_service,
    parser,
    print_json,
)


def make_parser(program: str) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    made = parser(program, "Delete staged data whose time is over.", "stagecal expire --dry-run")
    made.add_argument("--dry-run", action="store_true", help="print the plan and delete nothing")
    made.add_argument("--now", metavar="TIME", help="act as if it were this time (ISO 8601, UTC): for tests")
    made.add_argument("--force", action="store_true", help="act although the plan looks unusual")
    made.add_argument("--json", action="store_true", help="print the result for programs")
    return made


def command(options: argparse.Namespace, _name: str) -> int:
    """Plan, then act."""
    from stagecal import wiring
    from stagecal.domain.identifiers import masked_token
    from stagecal.domain.sizes import readable_size
    from stagecal.services.alarms import alarm_mail
    from stagecal.services.notifying import deliver_due
    from stagecal.services.sweeping import know_root, plan, sweep

    config = load(options)
    only_the_service(config.state.directory)
    site = wiring.site(config)
    now = _time(options.now) if options.now is not None else site.clock.now()
    with site.locks.try_lock("sweep") as free:
        if not free:
            raise CommandError(ALREADY_RUNNING, "another sweep is running")
        if not options.dry_run and not site.ledger.stagings():
            know_root(site)
        planned = plan(site, now)
        refused = planned.refusal and not options.force
        if not options.json:
            for staging in planned.delete:
                print(f"{masked_token(staging.token)}  delete, expired {staging.expires:%Y-%m-%dT%H:%M:%SZ}")
            for token, why in planned.keep.items():
                print(f"{masked_token(token)}  keep, {why}")
            for token in planned.unknown:
                print(f"{masked_token(token)}  not ours: left alone")
        record = {
            "now": now.isoformat(timespec="seconds").replace("+00:00", "Z"),
            "dry_run": options.dry_run,
            "refusal": planned.refusal or None,
            "delete": [masked_token(staging.token) for staging in planned.delete],
            "keep": {masked_token(token): why for token, why in planned.keep.items()},
            "unknown": [masked_token(token) for token in planned.unknown],
            "deleted": [],
            "freed": 0,
            "kept": [],
            "troubles": {},
        }
        if options.dry_run or refused:
            if options.json:
                print_json(record)
            if not refused:
                return DONE
            if not options.dry_run:
                text = f"the sweep deleted nothing: {planned.refusal}"
                site.ledger.enqueue("", [alarm_mail(site, "the sweeper refuses to act", text, now)], site.clock.now())
                deliver_due(site, site.clock.now())
            raise CommandError(FORBIDDEN, f"nothing is deleted: {planned.refusal}")
        result = sweep(site, planned, now)
    if options.json:
        # What cron prints goes into mails and logs, and a token there would be a link to the data.
        record |= {
            "deleted": [masked_token(token) for token in result.deleted],
            "freed": result.freed,
            "kept": [masked_token(token) for token in result.kept],
            "troubles": {masked_token(token): trouble for token, trouble in result.troubles.items()},
        }
        print_json(record)
    else:
        print(f"{len(result.deleted)} directories deleted, {readable_size(result.freed)} freed")
    for token, trouble in result.troubles.items():
        print(f"stagecal expire: {masked_token(token)}: {trouble}", file=sys.stderr)
    return WORK_FAILED if result.troubles else DONE


def _time(text: str) -> datetime:
    from stagecal.ports import UsageError

    try:
        time = datetime.fromisoformat(text)
        return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise UsageError(f"--now {text!r} is no time: write it as 2026-12-24T06:00:00Z") from error
