"""`stagecal retry`, `withdraw`, `hold`, `release`: what operators want done; the daemon does it at its next step."""

from __future__ import annotations

import argparse

from stagecal.cli.common import DONE, FORBIDDEN, CommandError, find_request, load, only_the_service, parser

_ABOUT = {
    "retry": "Start a held request again: from the beginning, or only its mail if its data are published.",
    "withdraw": "Take a request back: its job is ended, its unpublished data and its trigger are removed.",
    "hold": "Start no new job until `stagecal release`; running jobs, links and mails go on.",
    "release": "Start jobs again after `stagecal hold`.",
}


def make_parser(program: str) -> argparse.ArgumentParser:
    """Return the parser of one of the four commands."""
    name = program.rsplit(maxsplit=1)[-1]
    example = f"stagecal {name} 3fa9" if name in ("retry", "withdraw") else f"stagecal {name}"
    made = parser(program, _ABOUT[name], example)
    if name in ("retry", "withdraw"):
        made.add_argument("id", metavar="ID", help="the request, as short as it is unique")
    return made


def command(options: argparse.Namespace, name: str) -> int:
    """Note the wish and do what can be done at once."""
    from stagecal import wiring
    from stagecal.domain.requests import WITHDRAWABLE, State
    from stagecal.services.life import advance

    config = load(options)
    only_the_service(config.state.directory)
    site = wiring.site(config)
    if name in ("hold", "release"):
        site.ledger.set_setting("held", site.clock.now().isoformat(timespec="seconds") if name == "hold" else "")
        print("no new jobs are started" if name == "hold" else "jobs are started again")
        return DONE
    request = find_request(site, options.id)
    possible = request.state is State.HELD if name == "retry" else request.state in WITHDRAWABLE
    if not possible:
        wanted = "HELD" if name == "retry" else "open and not yet notified"
        raise CommandError(FORBIDDEN, f"request {request.id} is {request.state}; {name} needs one that is {wanted}")
    site.ledger.set_wish(request.id, name, site.clock.now())
    if name == "withdraw":
        advance(site, request.id)
    print(f"request {request.id}: {name} noted ({site.ledger.get(request.id).state})")
    return DONE
