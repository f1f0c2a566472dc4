"""`stagecal why`: the whole story of a request in one place."""

from __future__ import annotations

import argparse
import re

from stagecal.cli.common import DONE, find_request, load, only_the_service, parser, print_json

_TOKEN = re.compile(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f@])")


def make_parser(program: str) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    made = parser(program, "Show every step of a request: when, what was asked, seen, decided.", "stagecal why 3fa9")
    made.add_argument("id", metavar="ID", help="the request, as short as it is unique")
    made.add_argument("--json", action="store_true", help="print an object for programs")
    made.add_argument("--show-urls", action="store_true", help="show the link whole (a link is a secret)")
    return made


def command(options: argparse.Namespace, _name: str) -> int:
    """Print the request, its steps, and its terminal output."""
    from stagecal import wiring
    from stagecal.cli.overview import overview
    from stagecal.domain.identifiers import masked_token

    config = load(options)
    only_the_service(config.state.directory)
    site = wiring.site(config)
    request = find_request(site, options.id)
    record = overview(site, [request], show_urls=options.show_urls, now=site.clock.now())[0]

    def shown(text: str) -> str:
        return text if options.show_urls else _TOKEN.sub(lambda match: masked_token(match[0]), text)

    steps = [
        {
            "time": one.time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "step": one.step.step,
            "asked": shown(one.step.asked),
            "seen": shown(one.step.seen),
            "decided": shown(one.step.decided),
        }
        for one in site.ledger.steps(request.id)
    ]
    lines = [shown(line) for _, line in site.ledger.terminal(request.id)]
    if options.json:
        print_json({**record, "steps": steps, "terminal": lines})
        return DONE
    print(f"request {request.id}: {request.state}" + (f", {request.outcome}" if request.outcome else ""))
    print(
        f"  {request.mous} of {request.project}, ticket {request.ticket}, for {request.user} {request.email}".rstrip()
    )
    if request.reason:
        print(f"  {request.reason}")
    print()
    for step in steps:
        question = f"{step['asked']} " if step["asked"] else ""
        decided = f" -> {step['decided']}" if step["decided"] else ""
        print(f"{step['time']}  {step['step']:<12} {question}{step['seen']}{decided}")
    if lines:
        print("\nterminal output:")
        for line in lines:
            print(f"  {line}")
    return DONE
