"""`stagecal extend`: keep the data behind a link longer."""

from __future__ import annotations

import argparse
import re

from stagecal.cli.common import (
    DONE,
    FORBIDDEN,
    NOT_CONFIRMED,
    CommandError,
    load,
    only_the_service,
    parser,
)

_TOKEN = re.compile(r"(?:.*/)?([0-9a-f]{32})/?")
_MAXIMUM_DAYS = 3650


def make_parser(program: str) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    made = parser(
        program,
        "Keep staged data so many days longer than they would stay.",
        "stagecal extend https://almascience.eso.org/arcdistribution/preview/8672af71dac32e0ad9703dae3438fcac 14",
    )
    made.add_argument("token", metavar="URL_OR_TOKEN", help="the link that the user got, or its last part")
    made.add_argument("days", metavar="DAYS", type=int, help="how many days longer")
    return made


def command(options: argparse.Namespace, _name: str) -> int:
    """Extend and say until when the data stay now."""
    from stagecal import wiring
    from stagecal.ports import FatalError, UsageError
    from stagecal.services.sweeping import extend

    if not 1 <= options.days <= _MAXIMUM_DAYS:
        raise UsageError(f"{options.days} is no number of days from 1 to {_MAXIMUM_DAYS}")
    match = _TOKEN.fullmatch(options.token)
    if match is None:
        raise UsageError("this is no link to staged data: it ends with 32 hexadecimal digits")
    config = load(options)
    only_the_service(config.state.directory)
    site = wiring.site(config)
    if site.ledger.staging(match[1]) is None:
        raise CommandError(NOT_CONFIRMED, "no staged data are known under this link")
    try:
        staging = extend(site, match[1], options.days, site.clock.now())
    except FatalError as error:
        raise CommandError(FORBIDDEN, str(error)) from error
    print(f"the data stay at least until {staging.expires:%Y-%m-%dT%H:%M:%SZ}")
    return DONE
