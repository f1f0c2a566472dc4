"""`stagecal status`: which requests there are and where they stand."""

from __future__ import annotations

import argparse
from typing import Any

from stagecal.cli.common import DONE, find_request, load, only_the_service, parser, print_json

_RECENT = 20


def make_parser(program: str) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    made = parser(program, "List the open requests and the last closed ones, or show one request.", "stagecal status")
    made.add_argument("id", metavar="ID", nargs="?", help="one request, as short as it is unique")
    made.add_argument("--all", action="store_true", help="all requests on record")
    made.add_argument("--json", action="store_true", help="print a list of objects for programs")
    made.add_argument("--show-urls", action="store_true", help="show the links whole (a link is a secret)")
    return made


def command(options: argparse.Namespace, _name: str) -> int:
    """Print the overview."""
    from stagecal import wiring
    from stagecal.cli.overview import overview
    from stagecal.domain.requests import State

    config = load(options)
    only_the_service(config.state.directory)
    site = wiring.site(config)
    if options.id:
        requests = [find_request(site, options.id)]
    else:
        everything = list(site.ledger.requests())
        closed = [request for request in everything if request.state is State.CLOSED]
        shown = {request.id for request in closed[-_RECENT:]}
        requests = [one for one in everything if options.all or one.state is not State.CLOSED or one.id in shown]
    records = overview(site, requests, show_urls=options.show_urls, now=site.clock.now())
    if options.json:
        print_json(records)
    elif options.id:
        _details(records[0])
    else:
        held = site.ledger.setting("held")
        if held:
            print(f"No new jobs are started since {held} (stagecal release).")
        _table(records)
    return DONE


def _table(records: list[dict[str, Any]]) -> None:
    if not records:
        print("There are no requests.")
        return
    columns = ("id", "state", "outcome", "mous", "project", "ticket", "calfields", "since")
    rows = [
        [",".join(record[name]) if name == "calfields" else str(record[name] or "") for name in columns]
        for record in records
    ]
    for row, record in zip(rows, records, strict=True):
        if record["position"]:
            row[1] += f" #{record['position']}"
    widths = [max(len(name), *(len(row[index]) for row in rows)) for index, name in enumerate(columns)]
    for row in [[name.upper() for name in columns], *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _details(record: dict[str, Any]) -> None:
    width = max(len(name) for name in record)
    for name, value in record.items():
        if value not in (None, []):
            print(f"{name:<{width}}  {', '.join(value) if isinstance(value, list) else value}")
