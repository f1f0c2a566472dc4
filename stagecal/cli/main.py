"""`stagecal`: one command for operators, newcomers and the service manager; each subcommand has a module of its own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from stagecal.cli.common import BAD_ARGUMENT, DONE, run

PROGRAM = "stagecal"

COMMANDS = {
    "watch": ("watch", "the daemon: watch the trigger directory and do what is asked"),
    "expire": ("expire", "delete staged data whose time is over (cron, timer)"),
    "status": ("status", "list requests, or show one"),
    "why": ("why", "the whole story of a request: what was asked, seen, decided"),
    "restore": ("restore", "restore the calibrated MSs of a MOUS, and leave them in products/"),
    "restorable": ("restorable", "say whether MOUSs can be restored, and why not"),
    "ppr": ("ppr", "print the pipeline processing request that would restore a MOUS"),
    "mous-of": ("restorable", "say to which MOUS an execution block belongs"),
    "retry": ("operate", "start a held request again"),
    "withdraw": ("operate", "take a request back"),
    "hold": ("operate", "start no new job until `release`"),
    "release": ("operate", "start jobs again"),
    "nodes": ("nodes", "every node: reachable, load, labels, our jobs, and whether it would be chosen now"),
    "extend": ("extend", "keep staged data longer"),
    "rebuild": ("rebuild", "make a lost ledger anew"),
    "doctor": ("doctor", "check configuration, directories, archive, nodes and mail"),
    "ms": ("ms", "check, seal, repair, list the fields of, and lock measurement sets"),
    "init": ("init", "make a self-contained site in a directory"),
}


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a subcommand and exit with its code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        run(PROGRAM, lambda: _show(_help(), DONE if words else BAD_ARGUMENT))
    if words[0] == "--version":
        from stagecal import __version__

        run(PROGRAM, lambda: _show(f"stagecal {__version__}", DONE))
    name = words[0]
    if name not in COMMANDS:
        import difflib

        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "see stagecal --help"
        print(f"{PROGRAM}: there is no command {name!r}: {hint}", file=sys.stderr)
        raise SystemExit(BAD_ARGUMENT)
    module = importlib.import_module(f"stagecal.cli.{COMMANDS[name][0]}")
    program = f"{PROGRAM} {name}"
    options = module.make_parser(program).parse_args(words[1:])
    run(program, lambda: module.command(options, name))


def _show(text: str, code: int) -> int:
    print(text)
    return code


def _help() -> str:
    width = max(len(name) for name in COMMANDS)
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: stagecal COMMAND [--config FILE] ...",
            "",
            "Calibrated ALMA data on request: operators' commands.",
            "",
            "commands:",
            *lines,
            "",
            "stagecal COMMAND --help explains one of them, with an example.",
            "Requests are placed by trigger-calms; stagecalms stages data by hand.",
            "",
            "example:",
            "  stagecal status --json",
        ]
    )


if __name__ == "__main__":
    main()
