"""`stagecal ppr`: the pipeline processing request that would restore a MOUS, on standard output."""

from __future__ import annotations

import argparse

from stagecal.cli.common import DONE, FORBIDDEN, CommandError, load, parser


def make_parser(program: str) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    made = parser(
        program,
        "Print the PPR that would restore a MOUS. Exit code 3, and what speaks against it, if none would.",
        f"{program} uid://A001/X12a3/X80e\n  {program} --products MOUS/products uid://A001/X12a3/X80e",
    )
    made.add_argument("mous", metavar="MOUS_UID", help="in either form")
    made.add_argument(
        "--products",
        metavar="DIR",
        help="plan by the archived products in this directory, without a database or a site",
    )
    made.add_argument("--root", metavar="DIR", help="RootDirectory (default: the work area)")
    made.add_argument(
        "--path",
        metavar="PATH",
        help="RelativePath, from the root to rawdata/, products/, working/ (default: the MOUS)",
    )
    return made


def command(options: argparse.Namespace, _name: str) -> int:
    """Plan, render, validate, print."""
    from datetime import UTC, datetime
    from pathlib import Path

    from stagecal import wiring
    from stagecal.domain.identifiers import parse_uid, sanitized
    from stagecal.domain.restore.errors import RestoreError
    from stagecal.domain.restore.ppr import ppr_faults, ppr_values
    from stagecal.services.restoring import planned, planned_from_products

    mous = parse_uid(options.mous)
    path = options.path or sanitized(mous)
    try:
        if options.products:
            templates = wiring.own_templates()
            root = options.root or "."
            plan, _, _ = planned_from_products(Path(options.products), mous)
        else:
            config = load(options)
            templates = wiring.templates(config)
            root = options.root or str(config.cluster.work_area)
            plan, _, _ = planned(wiring.archive(config), wiring.products(config), mous)
        values = ppr_values(plan, root_directory=root, relative_path=path, now=datetime.now(UTC))
    except RestoreError as error:
        raise CommandError(FORBIDDEN, str(error)) from None
    text = templates.render("ppr.xml", ppr=values)
    faults = ppr_faults(text, plan, relative_path=path)
    if faults:
        raise CommandError(FORBIDDEN, "\n".join(faults))
    print(text, end="" if text.endswith("\n") else "\n")
    return DONE
