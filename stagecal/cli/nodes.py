"""`stagecal nodes`: every node as it is now, what of ours runs there, and why it would or would not be chosen."""

from __future__ import annotations

import argparse
from typing import Any

from stagecal.cli.common import DONE, WORK_FAILED, load, only_the_service, parser, print_json


def make_parser(program: str) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    made = parser(
        program,
        "Look at all nodes at once. Exit code 1 if one of them does not answer.",
        "stagecal nodes --label rhel5",
    )
    made.add_argument("--label", metavar="LABEL", default="", help="choose as for a job that needs this label")
    made.add_argument("--json", action="store_true", help="print a list of objects for programs")
    return made


def command(options: argparse.Namespace, _name: str) -> int:
    """Print a line for each node."""
    from stagecal import wiring
    from stagecal.services.dispatching import node_overview

    config = load(options)
    only_the_service(config.state.directory)
    site = wiring.site(config)
    records = node_overview(site, options.label)
    if options.json:
        print_json(records)
    else:
        _table(records)
        for record in records:
            if record["left_behind"]:
                left = ", ".join(record["left_behind"])
                print(f"left behind on {record['name']}, removed when it can be: {left}")
        slots = site.config.cluster.max_jobs
        taken = sum(request.holds_slot for request in site.ledger.open_requests())
        held = site.ledger.setting("held")
        print(f"{taken} of {slots} job slots are taken" + (f"; dispatching is held since {held}" if held else ""))
    return DONE if all(record["reachable"] for record in records) else WORK_FAILED


def _table(records: list[dict[str, Any]]) -> None:
    rows = [["NODE", "REACHABLE", "LOAD/CORE", "LABELS", "OUR JOBS", "NEXT JOB"]]
    for record in records:
        load_per_core = record["load_per_core"]
        rows.append(
            [
                record["name"],
                "yes" if record["reachable"] else "NO",
                "-" if load_per_core is None else f"{load_per_core:.2f}",
                ",".join(record["labels"]) or "-",
                ",".join(f"{job['job']} ({job['request']})" for job in record["jobs"]) or "-",
                record["why"],
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
