"""`trigger-calms`: regional-centre staff place a request for calibrated data for a helpdesk ticket."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from stagecal.cli.common import BAD_ARGUMENT, ask, load, parser, print_json, run

if TYPE_CHECKING:
    import argparse

    from stagecal.config import Config
    from stagecal.services.requesting import Placement

PROGRAM = "trigger-calms"
MAXIMUM_MOUS = 10


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command; exits with the highest code of its MOUSs."""
    options = _parser().parse_args(arguments)
    run(PROGRAM, lambda: _place_all(options))


def _parser() -> argparse.ArgumentParser:
    made = parser(
        PROGRAM,
        "Place a request for calibrated data of a MOUS: checks it, writes the trigger file, mails it to AOG.",
        'trigger-calms 2017.1.00727.S "Judit Szulagyi" judits@phys.ethz.ch 16140 uid://A001/X1296/X675\n'
        '  trigger-calms 2021.1.01582.S "Franco Nero" franco@gmail.com 12345 uid://A001/X159a/X6b '
        '"J0510+1800,J0440+1437"',
    )
    made.add_argument("project", metavar="PROJECT", help="project code, as 2017.1.00727.S")
    made.add_argument("user", metavar="NAME", help="official user name from the helpdesk profile")
    made.add_argument("email", metavar="EMAIL", help="official user e-mail from the helpdesk profile")
    made.add_argument("ticket", metavar="TICKET", help="helpdesk ticket number")
    made.add_argument("mous", metavar="MOUS_UID", help="as uid://A001/X1296/X675 or uid___A001_X1296_X675")
    made.add_argument(
        "calfields", metavar="CALFIELDS", nargs="?", help="exact calibrator field names, separated by commas"
    )
    made.add_argument(
        "--also", metavar="MOUS_UID", action="append", default=[], help="another MOUS of the same ticket (repeatable)"
    )
    made.add_argument("--contact", metavar="EMAIL", help="the EU ARC contact (else from your login name)")
    made.add_argument("--dry-run", action="store_true", help="check and show everything, write and send nothing")
    made.add_argument("--yes", action="store_true", help="ask no question about an active duplicate")
    made.add_argument("--json", action="store_true", help="print the result for programs")
    return made


def _place_all(options: argparse.Namespace) -> int:
    from stagecal import wiring
    from stagecal.domain.identifiers import (
        Malformed,
        parse_address,
        parse_calfields,
        parse_person,
        parse_project,
        parse_ticket,
        parse_uid,
    )
    from stagecal.domain.trigger import Trigger
    from stagecal.ports import UsageError
    from stagecal.services.requesting import Placement, place

    faults: list[str] = []
    uids: dict[str, str] = {}
    for text in (options.mous, *options.also):
        try:
            uids[parse_uid(text)] = ""
        except Malformed as fault:
            uids[text] = str(fault)
    if len(uids) > MAXIMUM_MOUS:
        faults.append(f"{len(uids)} MOUSs are too many: at most {MAXIMUM_MOUS} for one ticket")

    def checked(parse: Callable[[str], str], text: str) -> str:
        try:
            return parse(text)
        except Malformed as fault:
            faults.append(str(fault))
            return ""

    project = checked(parse_project, options.project)
    user = checked(parse_person, options.user)
    email = checked(parse_address, options.email)
    ticket = checked(parse_ticket, options.ticket)
    calfields: tuple[str, ...] = ()
    # No sixth argument asks for all data; an empty one is a slip that must never mean the same.
    if options.calfields is not None:
        try:
            calfields = parse_calfields(options.calfields)
        except Malformed as fault:
            faults.append(str(fault))
    if faults:
        raise UsageError("\n".join([*faults, *filter(None, uids.values())]))
    config = load(options)
    contact = _contact(config, options.contact)
    desk = wiring.desk(config)
    placements: list[Placement] = []
    for mous, fault_of_uid in uids.items():
        if fault_of_uid:
            placements.append(Placement(mous, BAD_ARGUMENT, "refused", fault_of_uid))
        else:
            trigger = Trigger(contact, config.mail.maintainer, mous, project, calfields, user, email, ticket)
            placements.append(place(desk, trigger, confirm=lambda q: options.yes or ask(q), dry_run=options.dry_run))
        if not options.json:
            _tell(placements[-1])
    if options.json:
        print_json([vars(placement) for placement in placements])
    return max(placement.exit_code for placement in placements)


def _contact(config: Config, given: str | None) -> str:
    from stagecal.domain.identifiers import contact_is_known, parse_address
    from stagecal.ports import UsageError

    contact = given
    if contact is None:
        import getpass

        try:
            login = getpass.getuser()
        except (KeyError, OSError):
            raise UsageError("your login name is not known here: use --contact EMAIL") from None
        contact = config.mail.contact_map.get(login)
        if contact is None and config.mail.contact_domains:
            contact = f"{login}@{config.mail.contact_domains[0]}"
        if contact is None:
            raise UsageError(f"no contact is configured for the login name {login}: use --contact EMAIL")
    contact = parse_address(contact)
    if not contact_is_known(contact, config.mail.contact_domains, config.mail.contacts):
        raise UsageError(
            f"the contact {contact} is not among the known contacts: use --contact with your address at the centre"
        )
    return contact


def _tell(placement: Placement) -> None:
    if placement.exit_code:
        print(f"{placement.mous}: {placement.message}", file=sys.stderr)
        if not placement.text:
            return
    print(f"{placement.mous}: {placement.status}")
    if placement.path:
        print(f"  trigger file  {placement.path}")
    if placement.verdict_now:
        print(f"  verdict now   {placement.verdict_now}")
        if placement.advice:
            print(f"                {placement.advice}")
        for header, value in placement.headers.items():
            print(f"  mail          {header}: {value}")
        print("  text of trigger file and mail:")
        print("".join(f"    {line}\n" for line in placement.text.splitlines()), end="")
    for address, reply in placement.mail.items():
        print(f"  mail to       {address}: {reply}")
    for warning in placement.warnings if not placement.exit_code else ():
        print(f"{placement.mous}: WARNING: {warning}", file=sys.stderr)
