"""`stagecal ms`: measurement sets checked, sealed, repaired, their fields listed, and locked, without CASA.

Needs no configuration and no site. What is wrong is told in a line each, on standard output; exit codes are those of
all commands, and 3 of `ms check` means that something could not be verified, while nothing was found to be wrong.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from stagecal.cli.common import Parser, parser

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    Subcommands = _SubParsersAction[Parser]


def make_parser(program: str) -> argparse.ArgumentParser:
    """Return the parser of `stagecal ms`, with one for each of its subcommands."""
    made = parser(
        program,
        "Check, seal, repair, list the fields of, and lock measurement sets. Needs neither CASA nor a configuration.",
        "stagecal ms check X.ms",
    )
    subcommands: Subcommands = made.add_subparsers(dest="subcommand", metavar="SUBCOMMAND", required=True)
    for add, _ in SUBCOMMANDS.values():
        add(subcommands)
    return made


def command(options: argparse.Namespace, _name: str) -> int:
    """Do the subcommand and return the exit code."""
    _, do = SUBCOMMANDS[options.subcommand]
    return do(options)


def _subparser(subcommands: Subcommands, name: str, summary: str, description: str, example: str) -> Parser:
    return subcommands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


# --- check -----------------------------------------------------------------------------------------------------------


def _add_check(subcommands: Subcommands) -> None:
    made = _subparser(subcommands, "check", "say whether measurement sets are whole", "(to come)", "x")
    made.add_argument("paths", metavar="PATH", nargs="+", type=Path)


def _check(options: argparse.Namespace) -> int:
    raise NotImplementedError


# Each subcommand: what adds its parser, and what does it. A new one is two functions and a line here.
SUBCOMMANDS: dict[str, tuple[Callable[[Subcommands], None], Callable[[argparse.Namespace], int]]] = {
    "check": (_add_check, _check),
}
