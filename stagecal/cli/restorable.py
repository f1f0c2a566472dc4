"""`stagecal restorable` and `stagecal mous-of`: what the archive says before anybody asks for a restore."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from stagecal.cli.common import DONE, FORBIDDEN, NOT_CONFIRMED, CommandError, load, parser, print_json

if TYPE_CHECKING:
    from stagecal.ports import Archive


def make_parser(program: str) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    if program.endswith("mous-of"):
        made = parser(program, "Say to which MOUS an execution block belongs.", f"{program} uid://A002/Xcf92df/X3453")
        made.add_argument("execution_block", metavar="EB_UID", type=_uid, help="in either form")
        return made
    made = parser(
        program,
        "Say whether MOUSs can be restored. Exit code 3 if one of them cannot, 4 if the archive does not know one.",
        f"{program} uid://A001/X12a3/X80e\n  {program} --since 2026-11-01",
    )
    made.add_argument("mous", metavar="MOUS_UID", nargs="*", type=_uid, help="in either form")
    made.add_argument(
        "--since", metavar="DATE", help="list what was delivered since this date (UTC) and can be restored"
    )
    made.add_argument("--json", action="store_true", help="print a list of objects for programs")
    return made


def _uid(text: str) -> str:
    from stagecal.domain.identifiers import Malformed, parse_uid

    try:
        return parse_uid(text)
    except Malformed as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def command(options: argparse.Namespace, name: str) -> int:
    """Ask the archive, and print a line for each answer."""
    from stagecal import wiring
    from stagecal.ports import UsageError

    if name == "mous-of":
        return _mous_of(wiring.archive(load(options)), options.execution_block)
    if bool(options.mous) == (options.since is not None):
        raise UsageError("name one or more MOUSs, or a date with --since")
    since = _date(options.since) if options.since is not None else None
    archive = wiring.archive(load(options))
    if since is not None:
        answers = [
            one for one in (_answer(archive, mous) for mous in archive.delivered_since(since)) if one["restorable"]
        ]
    else:
        answers = [_answer(archive, mous) for mous in options.mous]
    if options.json:
        print_json(answers)
    else:
        for answer in answers:
            print(f"{answer['mous']}  {'yes' if answer['restorable'] else 'no'}: {answer['reason']}")
    if any(not answer["known"] for answer in answers):
        return NOT_CONFIRMED
    return DONE if all(answer["restorable"] for answer in answers) else FORBIDDEN


def _date(text: str) -> datetime:
    from stagecal.ports import UsageError

    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(f"--since {text!r} is no date: write it as 2026-11-01, or with a time") from None
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)


def _answer(archive: Archive, mous: str) -> dict[str, object]:
    from stagecal.domain.restore.restorable import restorable

    facts = archive.restore_facts(mous)
    if facts is None:
        return {
            "mous": mous,
            "known": False,
            "restorable": False,
            "reason": "the archive has no such MOUS",
            "project": None,
        }
    verdict = restorable(facts)
    return {
        "mous": mous,
        "known": True,
        "restorable": verdict.possible,
        "reason": verdict.reason,
        "project": facts.project,
    }


def _mous_of(archive: Archive, execution_block: str) -> int:
    found = archive.mous_of(execution_block)
    if not found:
        raise CommandError(NOT_CONFIRMED, f"the archive has no execution block {execution_block}")
    if len(found) > 1:
        raise CommandError(NOT_CONFIRMED, f"{execution_block} belongs to several MOUSs: {', '.join(found)}")
    print(found[0])
    return DONE
