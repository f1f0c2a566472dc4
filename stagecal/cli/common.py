"""What all commands share: parsing, the configuration, one-line errors, exit codes, questions.

Exit codes everywhere: 0 done, 1 the work itself failed, 2 bad argument or configuration, 3 a rule or the state forbids
it, 4 not confirmed or unknown or ambiguous ID, 5 the surroundings failed, 75 already running.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from stagecal.config import Config
    from stagecal.domain.requests import Request
    from stagecal.services.context import Site

DONE, WORK_FAILED, BAD_ARGUMENT, FORBIDDEN, NOT_CONFIRMED, SURROUNDINGS, ALREADY_RUNNING = 0, 1, 2, 3, 4, 5, 75
INTERRUPTED = 130


class CommandError(Exception):
    """The command ends with this exit code and this one line."""

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        line = "".join(character if character.isprintable() else "?" for character in message)
        print(f"{self.prog}: {line} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(BAD_ARGUMENT)


def parser(program: str, description: str, example: str) -> Parser:
    """Return a parser with the option that every command has, and an example in its help."""
    made = Parser(
        prog=program,
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument(
        "--config",
        metavar="FILE",
        help="configuration (else $STAGECAL_CONFIG, else /etc/stagecal/stagecal.toml)",
    )
    return made


def load(arguments: argparse.Namespace) -> Config:
    """Return the configuration that the arguments name. Raises UsageError with all its faults."""
    from stagecal.config import config_path, load_config
    from stagecal.ports import UsageError

    path = config_path(arguments.config, os.environ)
    try:
        return load_config(path, environ=os.environ)
    except RecursionError:
        raise UsageError(f"{path}: is nested too deeply to be a configuration") from None


def run(program: str, work: Callable[[], int]) -> NoReturn:
    """Do the command's work and leave the program with its exit code; errors become lines, never a traceback."""
    if sys.stdout is not None and hasattr(sys.stdout, "reconfigure"):
        # A terminal that cannot show a letter must not turn what was done into a failure.
        sys.stdout.reconfigure(errors="backslashreplace")
    raise SystemExit(outcome(program, work))


def outcome(program: str, work: Callable[[], int]) -> int:
    """Do the work; return its exit code, or the one that belongs to its error, which is told in a line."""
    try:
        code = work()
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except CommandError as error:
        return _told(program, error, error.exit_code)
    except KeyboardInterrupt as interrupt:
        print(file=sys.stderr)
        return _told(program, interrupt, INTERRUPTED) if str(interrupt) else INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone; the interpreter must not complain about it at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:
        from stagecal.domain.identifiers import Malformed
        from stagecal.ports import FatalError, TransientError, UsageError

        if isinstance(error, UsageError | Malformed):
            return _told(program, error, BAD_ARGUMENT)
        if isinstance(error, TransientError | FatalError):
            already = type(error).__name__ in ("AlreadyRunningError", "LeaseLostError")
            return _told(program, error, ALREADY_RUNNING if already else SURROUNDINGS)
        if os.environ.get("STAGECAL_DEBUG"):
            raise
        name = type(error).__name__
        return _told(
            program, f"unexpected {name}: {error} (set STAGECAL_DEBUG=1 to see where; please report it)", SURROUNDINGS
        )


def _told(program: str, error: object, code: int) -> int:
    for line in str(error).splitlines() or [""]:
        print(f"{program}: {line}", file=sys.stderr)
    return code


def ask(question: str) -> bool:
    """Ask at the terminal; without one, the answer is no."""
    if not (sys.stdin and sys.stdin.isatty()):
        return False
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def print_json(value: Any) -> None:
    """Print a value as JSON for programs."""
    import json

    plain = sys.stdout is None or sys.stdout.encoding.lower() not in ("utf-8", "utf8")
    print(json.dumps(value, indent=1, ensure_ascii=plain, default=str))


def only_the_service(state_directory: Path) -> None:
    """Raise CommandError unless we are the service's own user, the owner of its state directory."""
    try:
        owner = state_directory.stat().st_uid
    except FileNotFoundError:
        return
    if owner != os.geteuid():
        import pwd

        try:
            name = pwd.getpwuid(owner).pw_name
        except KeyError:
            name = f"uid {owner}"
        raise CommandError(FORBIDDEN, f"this is an operator's act: do it as the service's user {name}")


def find_request(site: Site, prefix: str) -> Request:
    """Return the request whose id begins so. Raises CommandError if there is none, or more than one."""
    from stagecal.domain.requests import State

    found = list(site.ledger.find(prefix.lower())) if prefix else []
    if len(found) > 1:
        found = [one for one in found if one.state is not State.CLOSED] or found
    if not found:
        raise CommandError(NOT_CONFIRMED, f"there is no request {prefix!r}: see `stagecal status --all`")
    if len(found) > 1:
        ids = ", ".join(request.id for request in found[:5])
        raise CommandError(NOT_CONFIRMED, f"{prefix!r} can mean {ids}: write more of it")
    return found[0]
