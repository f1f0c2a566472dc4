"""`trigger-calms` as staff of a regional centre meet it: each rule by its name."""

from __future__ import annotations

import email
import email.policy
import itertools
import json
import os
import pwd
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from email.message import EmailMessage
from typing import Any, cast

import pytest

from stagecal import wiring
from stagecal.domain.trigger import Trigger, parse
from stagecal.ports import Listing, TransientError, Triggers
from stagecal.services.requesting import Desk, place
from tests.cli.conftest import Commands, Ended, everything_below, wait_until
from tests.sites import (
    CALIBRATORS,
    CALIBRATORS_PROJECT,
    MAIN,
    MAIN_PROJECT,
    RELEASED,
    RELEASED_PROJECT,
    SiteForTests,
)

Call = Callable[..., Ended]

IN_QA3 = ("2019.1.00337.S", "uid://A001/X14d7/X160")
NOT_DELIVERED = ("2017.1.00370.S", "uid://A001/X1284/X265f")
NO_PASS = ("2017.1.00370.S", "uid://A001/X1284/X266")
CONTACT = ("--contact", "helper@example.org")
NO_QA0_PASS = (
    "ERROR: No QA0_PASS data found for this MOUS. Please double-check MOUS UID. "
    "If confirmed, please inform the user that ALMA cannot offer calibrated data for this MOUS."
)
NAMES = ["Süß", "李", "O'Brien", "Doe, J.", 'Anna "Nan" Bell', "Иван Петров", "د. سارة"]


def order(
    project: str = MAIN_PROJECT,
    mous: str = MAIN,
    *more: str,
    user: str = "Pi Person",
    address: str = "pi@example.org",
    ticket: str = "12345",
) -> tuple[str, ...]:
    """The arguments in the order of the old script, with a contact."""
    return (project, user, address, ticket, mous, *more, *CONTACT)


def nothing_happened(site: SiteForTests) -> bool:
    """Whether neither a trigger, nor a reservation, nor a mail is there."""
    return not list(site.config.triggers.directory.iterdir()) and not site.mails()


def parsed(mail: str) -> EmailMessage:
    """The mail as a mail program reads it, without the envelope that the maildir keeps above it."""
    headers = re.sub(r"\AX-Envelope-To: .*\nX-Envelope-From: .*\n", "", mail)
    return cast(EmailMessage, email.message_from_bytes(headers.encode(), policy=email.policy.default))


def the_trigger(site: SiteForTests) -> Trigger:
    """What the one trigger file asks for."""
    (name,) = site.triggers()
    return parse((site.config.triggers.directory / name).read_text(encoding="utf-8"))


# --- placing -------------------------------------------------------------------------------------------------------


def test_arguments_stand_in_the_order_of_the_old_script(site: SiteForTests, call: Call) -> None:
    ended = call(
        "trigger-calms",
        CALIBRATORS_PROJECT,
        "Franco Nero",
        "franco@gmail.com",
        "12345",
        CALIBRATORS,
        "J0510+1800,J0440+1437",
        *CONTACT,
    )
    assert (ended.code, ended.err) == (0, "")
    assert the_trigger(site) == Trigger(
        contact="helper@example.org",
        copy="maintainer@example.org",
        mous=CALIBRATORS,
        project=CALIBRATORS_PROJECT,
        calfields=("J0510+1800", "J0440+1437"),
        user="Franco Nero",
        email="franco@gmail.com",
        ticket="12345",
    )


def test_the_trigger_file_is_named_and_written_as_the_procedure_says(site: SiteForTests, call: Call) -> None:
    ended = call("trigger-calms", *order())
    (name,) = site.triggers()
    assert re.fullmatch(r"trigger-uid___A001_X12a3_X80e-\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d\.txt", name)
    assert (site.config.triggers.directory / name).read_text() == (
        "EU ARC contact helper@example.org\n"
        "CC email maintainer@example.org\n"
        "ALMA: REQUEST FOR CALIBRATED DATA MOUS uid___A001_X12a3_X80e\n"
        "\n"
        "Dear AOG,\n"
        "please create the calibrated MS for\n"
        "MOUS uid___A001_X12a3_X80e\n"
        "project 2017.1.01347.S\n"
        "for user Pi Person\n"
        "email pi@example.org\n"
        "helpdesk ticket 12345\n"
    )
    assert str(site.config.triggers.directory / name) in ended.out
    assert list(site.config.triggers.directory.iterdir()) == [site.config.triggers.directory / name]


@pytest.mark.parametrize("written", ["uid://A001/X12a3/X80e", "uid___A001_X12a3_X80e"])
def test_both_forms_of_a_uid_are_understood(site: SiteForTests, call: Call, written: str) -> None:
    assert call("trigger-calms", *order(mous=written)).code == 0
    assert the_trigger(site).mous == MAIN


def test_the_mail_goes_to_aog_the_contact_and_the_maintainer(site: SiteForTests, call: Call) -> None:
    call("trigger-calms", *order())
    (text,) = site.mails()
    assert text.startswith("X-Envelope-To: aog@example.org, helper@example.org, maintainer@example.org\n")
    mail = parsed(text)
    assert mail["To"] == "aog@example.org"
    assert mail["Cc"] == "helper@example.org, maintainer@example.org"
    assert mail["From"] == "stagecal@example.org"
    assert mail["Subject"] == "ALMA: REQUEST FOR CALIBRATED DATA MOUS uid___A001_X12a3_X80e"
    (name,) = site.triggers()
    assert mail.get_content() == (site.config.triggers.directory / name).read_text()


@pytest.mark.parametrize("name", NAMES)
def test_names_in_any_script_arrive_unharmed_in_file_and_mail(site: SiteForTests, call: Call, name: str) -> None:
    assert call("trigger-calms", *order(user=name)).code == 0
    assert the_trigger(site).user == name
    (mail,) = site.mails()
    assert f"for user {name}\n" in parsed(mail).get_content()


def test_names_arrive_unharmed_from_a_real_command_line_of_an_old_locale(commands: Commands) -> None:
    ended = commands.run("trigger-calms", *order(user="Süß 李"), PYTHONUTF8="", LC_ALL="C")
    assert (ended.code, ended.err) == (0, "")
    assert the_trigger(commands.site).user == "Süß 李"


def test_the_later_reply_refers_to_the_request_mail(site: SiteForTests, call: Call) -> None:
    ended = call("trigger-calms", *order(*NOT_DELIVERED), "--json")
    site.run()
    request, reply = (parsed(mail) for mail in site.mails())
    assert "MOUS NOT DELIVERED" in reply.get_content()
    assert reply["In-Reply-To"] == request["Message-ID"] == ended.json[0]["message_id"]
    assert reply["Subject"] == f"Re: {request['Subject']}"


def test_several_mous_of_a_ticket_each_get_a_mail_and_a_trigger(site: SiteForTests, call: Call) -> None:
    ended = call("trigger-calms", *order(*NOT_DELIVERED), "--also", NOT_DELIVERED[1].replace("265f", "265e"))
    assert ended.code == 3
    assert len(site.triggers()) == len(site.mails()) == 1
    site.archive("UPDATE AQUA_EXECBLOCK SET QA0STATUS = 'Pass'")
    ended = call("trigger-calms", *order(*NOT_DELIVERED), "--yes", "--also", NO_PASS[1])
    assert ended.code == 0
    assert len(site.triggers()) == len(site.mails()) == 3
    assert len({parsed(mail)["Message-ID"] for mail in site.mails()}) == 3


@pytest.mark.parametrize(
    ("also", "code"),
    [
        ("uid://A001/X12a3/X80f", 3),
        ("X80e", 2),
        (RELEASED, 3),
    ],
    ids=["unknown", "no UID", "of another project"],
)
def test_one_bad_mous_does_not_stop_the_others_and_the_exit_code_is_the_highest(
    site: SiteForTests, call: Call, also: str, code: int
) -> None:
    ended = call("trigger-calms", *order(mous=also), "--also", MAIN)
    assert ended.code == code
    assert the_trigger(site).mous == MAIN
    (line,) = ended.err.splitlines()
    assert also in line and f"{MAIN}: placed" in ended.out


def test_the_same_mous_in_both_forms_is_one_request(site: SiteForTests, call: Call) -> None:
    ended = call("trigger-calms", *order(), "--yes", "--also", "uid___A001_X12a3_X80e", "--also", MAIN)
    assert ended.code == 0
    assert len(site.triggers()) == len(site.mails()) == 1


def test_ten_mous_are_enough_for_one_ticket(site: SiteForTests, call: Call) -> None:
    uids = [f"uid://A001/X1/X{number:x}" for number in range(10)]
    also = list(itertools.chain.from_iterable(("--also", uid) for uid in uids))
    ended = call("trigger-calms", *order(), *also)
    assert ended.code == 2 and "at most 10" in ended.err and len(ended.err.splitlines()) == 1
    assert nothing_happened(site)
    ended = call("trigger-calms", *order(), *also[2:])
    assert ended.code == 3 and len(ended.err.splitlines()) == 9
    assert len(site.triggers()) == 1


# --- refusals ------------------------------------------------------------------------------------------------------


def test_cycle_0_is_refused_with_advice_and_aog_is_not_contacted(site: SiteForTests, call: Call) -> None:
    ended = call("trigger-calms", *order(project="2011.0.00131.S"))
    assert ended.code == 3 and ended.out == ""
    (line,) = ended.err.splitlines()
    assert "Cycle 0" in line and "archive" in line and "Do not contact AOG" in line
    assert nothing_happened(site)


def test_cycle_0_is_refused_without_asking_the_archive(site: SiteForTests, call: Call) -> None:
    (site.directory / "archive.db").unlink()
    assert call("trigger-calms", *order(project="2011.0.00131.S")).code == 3


def test_without_qa0_pass_data_the_words_of_the_procedure_are_said(site: SiteForTests, call: Call) -> None:
    ended = call("trigger-calms", *order(*NO_PASS))
    assert ended.code == 3 and ended.err.endswith(f"{NO_QA0_PASS}\n")
    assert nothing_happened(site)


def test_semipass_alone_is_no_qa0_pass(site: SiteForTests, call: Call) -> None:
    site.archive("UPDATE AQUA_EXECBLOCK SET QA0STATUS = 'SemiPass'")
    ended = call("trigger-calms", *order())
    assert ended.code == 3 and NO_QA0_PASS in ended.err and nothing_happened(site)


@pytest.mark.parametrize(
    ("project", "mous", "words"),
    [
        (MAIN_PROJECT, "uid://A001/X12a3/X80f", "knows no MOUS uid://A001/X12a3/X80f"),
        (RELEASED_PROJECT, MAIN, "belongs to project 2017.1.01347.S, not to 2017.1.00727.S"),
    ],
    ids=["unknown MOUS", "wrong project"],
)
def test_what_the_archive_does_not_know_is_refused(
    site: SiteForTests, call: Call, project: str, mous: str, words: str
) -> None:
    ended = call("trigger-calms", *order(project, mous))
    assert ended.code == 3 and words in ended.err and len(ended.err.splitlines()) == 1
    assert nothing_happened(site)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (order(address="pi"), "e-mail"),
        (order(address="pi@example.org, x@example.org"), "e-mail"),
        (order(address=""), "e-mail"),
        (order(ticket="12x"), "ticket"),
        (order(ticket=""), "ticket"),
        (order(user=" "), "name"),
        (order(user="A\nhelpdesk ticket 1"), "name"),
        (order(user="\N{RIGHT-TO-LEFT OVERRIDE}eve"), "name"),
        (order(project="2017.1.1347.S"), "project"),
        (order(mous="A001/X12a3/X80e"), "UID"),
        (order(MAIN_PROJECT, MAIN, ""), "calibrator"),
        (order(MAIN_PROJECT, MAIN, "J0510+1800,"), "calibrator"),
        (order(MAIN_PROJECT, MAIN, "J0510+1800, J0440+1437"), "calibrator"),
        (order(MAIN_PROJECT, MAIN, "*"), "calibrator"),
    ],
)
def test_a_bad_argument_is_one_line_and_exit_2(
    site: SiteForTests, call: Call, arguments: tuple[str, ...], word: str
) -> None:
    ended = call("trigger-calms", *arguments)
    assert ended.code == 2 and ended.out == ""
    (line,) = ended.err.splitlines()
    assert word in line
    assert nothing_happened(site)


def test_all_bad_arguments_are_said_at_once(site: SiteForTests, call: Call) -> None:
    ended = call("trigger-calms", "2017", " ", "pi", "x", "uid", "", *CONTACT, "--also", "X80e")
    assert ended.code == 2
    lines = ended.err.splitlines()
    assert len(lines) == 7 and all(line.startswith("trigger-calms: ") for line in lines)
    words = ("project", "name", "e-mail", "ticket", "calibrator", "'uid' is not a UID", "'X80e' is not a UID")
    assert all(any(word in line for line in lines) for word in words)
    assert nothing_happened(site)


@pytest.mark.parametrize("arguments", [(), order()[:4], (*order(), "--bad"), ("a\x1b[2Jb\nc", *order(), "x", "y")])
def test_a_wrong_command_line_is_one_line_that_names_the_help(call: Call, arguments: tuple[str, ...]) -> None:
    ended = call("trigger-calms", *arguments)
    assert ended.code == 2 and "--help" in ended.err
    assert len(ended.err.splitlines()) == 1 and "\x1b" not in ended.err


# --- the contact ---------------------------------------------------------------------------------------------------


def test_the_contact_comes_from_the_login_name_by_the_configuration(commands_on: Callable[[str], Commands]) -> None:
    login = pwd.getpwuid(os.geteuid()).pw_name
    commands = commands_on("")
    config = commands.config.read_text()
    commands.config.write_text(config.replace("[mail]", f'[mail]\ncontact_map = {{ {login} = "mapped@example.org" }}'))
    arguments = order()[:-2]
    assert commands.run("trigger-calms", *arguments, LOGNAME=login).code == 0
    assert the_trigger(commands.site).contact == "mapped@example.org"


def test_without_a_map_the_contact_is_the_login_name_in_the_first_domain(commands: Commands) -> None:
    assert commands.run("trigger-calms", *order()[:-2], LOGNAME="evkampe").code == 0
    assert the_trigger(commands.site).contact == "evkampe@example.org"


@pytest.mark.parametrize("contact", ["somebody@example.com", "x@evil-example.org", "helper", ""])
def test_an_unknown_contact_is_refused(site: SiteForTests, call: Call, contact: str) -> None:
    ended = call("trigger-calms", *order()[:-2], "--contact", contact)
    assert ended.code == 2 and len(ended.err.splitlines()) == 1
    assert nothing_happened(site)


# --- the question --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("answer", "code", "triggers"), [("y", 0, 2), ("yes", 0, 2), ("n", 4, 1), ("", 4, 1)])
def test_an_active_duplicate_is_asked_about_at_a_terminal(
    commands: Commands, answer: str, code: int, triggers: int
) -> None:
    name = commands.site.place()
    ended = commands.typed(answer, "trigger-calms", *order())
    assert f"WARNING: there is an active request for this MOUS already: {name}" in ended.err
    assert ended.code == code
    assert len(commands.site.triggers()) == triggers


def test_without_a_terminal_a_duplicate_is_not_placed(site: SiteForTests, call: Call) -> None:
    name = site.place()
    ended = call("trigger-calms", *order())
    assert ended.code == 4 and name in ended.err and "--yes" in ended.err and len(ended.err.splitlines()) == 1
    assert site.triggers() == [name] and site.mails() == []


def test_yes_places_a_duplicate_without_a_question(site: SiteForTests, call: Call) -> None:
    site.place()
    assert call("trigger-calms", *order(), "--yes").code == 0
    assert len(site.triggers()) == 2


def test_a_trigger_of_another_mous_is_no_duplicate(site: SiteForTests, call: Call) -> None:
    site.place(RELEASED, RELEASED_PROJECT)
    assert call("trigger-calms", *order()).code == 0


# --- dry run and JSON ----------------------------------------------------------------------------------------------

VERDICTS = [
    ("entitled", order(), 0, "yes"),
    ("delegee", order(address="Delegee@example.org"), 0, "yes"),
    ("not entitled", order(address="eve@example.org"), 0, "NOT ENTITLED"),
    ("QA3", order(*IN_QA3), 0, "MOUS IN QA3"),
    ("not delivered", order(*NOT_DELIVERED), 0, "MOUS NOT DELIVERED"),
    ("released", order(RELEASED_PROJECT, RELEASED, address="eve@example.org"), 0, "yes"),
    ("calibrators", order(MAIN_PROJECT, MAIN, "J0510+1800", address="eve@example.org"), 0, "yes"),
    ("no QA0 Pass", order(*NO_PASS), 3, None),
    ("Cycle 0", order(project="2011.0.00131.S"), 3, None),
    ("no UID", order(mous="X80e"), 2, None),
]


@pytest.mark.parametrize(("arguments", "code", "verdict"), [v[1:] for v in VERDICTS], ids=[v[0] for v in VERDICTS])
def test_a_dry_run_ends_as_placing_would_and_touches_nothing(
    site: SiteForTests, call: Call, arguments: tuple[str, ...], code: int, verdict: str | None
) -> None:
    before = everything_below(site.directory)
    dry = call("trigger-calms", *arguments, "--dry-run")
    shown = call("trigger-calms", *arguments, "--dry-run", "--json")
    assert everything_below(site.directory) == before
    assert dry.code == shown.code == code
    placed = call("trigger-calms", *arguments)
    assert placed.code == code
    if verdict is None:
        assert dry.err == placed.err
        return
    assert re.search(rf"verdict now +{verdict}$", dry.out, re.MULTILINE)
    assert shown.json[0]["verdict_now"] == verdict
    (name,) = site.triggers()
    text = (site.config.triggers.directory / name).read_text()
    assert shown.json[0]["text"] == text
    assert all(line in dry.out for line in text.splitlines())
    mail = parsed(site.mails()[0])
    assert all(f"{header}: {mail[header]}" in dry.out for header in ("To", "Cc", "Subject"))
    assert re.search(r"trigger-uid___A001_\w+-\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d\.txt", dry.out)


def test_a_dry_run_of_a_duplicate_ends_as_placing_would(site: SiteForTests, call: Call) -> None:
    site.place()
    before = everything_below(site.directory)
    assert call("trigger-calms", *order(), "--dry-run").code == 4
    assert call("trigger-calms", *order(), "--dry-run", "--yes").code == 0
    assert everything_below(site.directory) == before
    assert call("trigger-calms", *order()).code == 4


def test_json_is_json_with_nothing_else_on_stdout(site: SiteForTests, call: Call) -> None:
    ended = call("trigger-calms", *order(user="李"), "--also", "uid://A001/X1/X1", "--json")
    assert ended.code == 3
    good, bad = ended.json
    assert good["exit_code"] == 0 and good["status"] == "placed" and good["trigger"] == site.triggers()[0]
    assert good["mail"] == dict.fromkeys(
        ("aog@example.org", "helper@example.org", "maintainer@example.org"), "accepted"
    )
    assert "for user 李\n" in good["text"]
    assert bad["exit_code"] == 3 and "knows no MOUS" in bad["message"]


def test_json_keeps_stdout_clean_when_a_question_is_asked(commands: Commands) -> None:
    commands.site.place()
    ended = commands.typed("y", "trigger-calms", *order(), "--json")
    assert ended.code == 0 and ended.json[0]["status"] == "placed"


# --- when the surroundings fail ------------------------------------------------------------------------------------

DROP = "drop"


@contextmanager
def mail_server(replies: dict[str, str], after: Callable[[str], None] = lambda verb: None) -> Iterator[int]:
    """A server that speaks SMTP, answers verbs as told (or drops the line), and says which verb it got."""
    listener = socket.create_server(("127.0.0.1", 0))

    def converse() -> None:
        connection, _ = listener.accept()
        with connection, connection.makefile("rwb", buffering=0) as lines:
            lines.write(b"220 mail\r\n")
            body = False
            while line := lines.readline():
                verb = "DOT" if line == b".\r\n" else line[:4].decode().upper().strip()
                if body and verb != "DOT":
                    continue
                body = verb == "DATA"
                after(verb)
                reply = replies.get(f"{line.decode().strip()}") or replies.get(verb)
                if reply == DROP:
                    return
                lines.write((reply or {"DATA": "354 go"}.get(verb, "250 ok")).encode() + b"\r\n")

    def serve() -> None:
        try:
            while True:
                converse()
        except OSError:
            return

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(timeout=5)


def by_smtp(site: SiteForTests, port: int) -> None:
    """Let the site send its mail to this port."""
    path = site.directory / "stagecal.toml"
    text = path.read_text()
    smtp = f'transport = "smtp"\nhost = "127.0.0.1"\nport = {port}\nstarttls = false\n'
    path.write_text(text.replace('transport = "maildir"\nmaildir = "mail"\n', smtp))


def test_when_mail_is_down_nothing_is_placed(site: SiteForTests, call: Call) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    by_smtp(site, port)
    ended = call("trigger-calms", *order())
    assert ended.code == 5 and "nothing was placed" in ended.err and str(port) in ended.err
    assert len(ended.err.splitlines()) == 1
    assert nothing_happened(site)


def test_when_aog_is_refused_nothing_is_placed_and_who_got_mail_is_named(site: SiteForTests, call: Call) -> None:
    with mail_server({"rcpt TO:<aog@example.org>": "550 no such user"}) as port:
        by_smtp(site, port)
        ended = call("trigger-calms", *order())
    assert ended.code == 5 and nothing_happened(site)
    assert "550 no such user" in ended.err and "helper@example.org, maintainer@example.org" in ended.err


def test_a_refused_copy_does_not_keep_the_request_back(site: SiteForTests, call: Call) -> None:
    with mail_server({"rcpt TO:<maintainer@example.org>": "550 no such user"}) as port:
        by_smtp(site, port)
        ended = call("trigger-calms", *order())
    assert ended.code == 0 and len(site.triggers()) == 1
    assert "WARNING" in ended.err and "maintainer@example.org" in ended.err


def test_when_the_fate_of_the_mail_is_unknown_it_is_published_and_said(site: SiteForTests, call: Call) -> None:
    with mail_server({"DOT": DROP}) as port:
        by_smtp(site, port)
        ended = call("trigger-calms", *order())
    assert ended.code == 0 and len(site.triggers()) == 1
    assert "may or may not have gone" in ended.err and "aog@example.org" in ended.err


@pytest.mark.parametrize("fault", ["removed", "a file"])
def test_without_a_trigger_directory_nothing_is_mailed(site: SiteForTests, call: Call, fault: str) -> None:
    site.config.triggers.directory.rmdir()
    if fault == "a file":
        site.config.triggers.directory.write_text("")
    ended = call("trigger-calms", *order())
    assert ended.code == 5 and "nothing was placed" in ended.err and len(ended.err.splitlines()) == 1
    assert site.mails() == []


def test_in_a_trigger_directory_where_nothing_can_be_made_nothing_is_mailed(site: SiteForTests, call: Call) -> None:
    # Root is kept out by no mode, but by a directory of the kernel's.
    site.config.triggers.directory.rmdir()
    site.config.triggers.directory.symlink_to("/proc/self/fdinfo")
    ended = call("trigger-calms", *order())
    assert ended.code == 5 and "nothing was placed" in ended.err and len(ended.err.splitlines()) == 1
    assert site.mails() == []


def test_without_the_archive_nobody_is_refused_and_nothing_is_placed(site: SiteForTests, call: Call) -> None:
    (site.directory / "archive.db").unlink()
    ended = call("trigger-calms", *order())
    assert ended.code == 5 and "nothing was placed" in ended.err and len(ended.err.splitlines()) == 1
    assert nothing_happened(site)


class TriggersThatCannotPublish:
    """The real directory, but its disk fails at the last moment."""

    def __init__(self, triggers: Triggers) -> None:
        self._triggers = triggers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._triggers, name)

    def publish(self, name: str) -> None:
        raise TransientError(f"the trigger {name} cannot be published: Input/output error")


def test_when_publishing_fails_after_the_mail_it_is_said_that_the_mail_went(site: SiteForTests) -> None:
    whole = wiring.desk(site.config)
    triggers = cast(Triggers, TriggersThatCannotPublish(whole.triggers))
    desk = Desk(site.config, whole.clock, whole.archive, triggers, whole.mailer)
    trigger = Trigger(
        "helper@example.org", "maintainer@example.org", MAIN, MAIN_PROJECT, (), "Pi", "pi@example.org", "1"
    )
    placement = place(desk, trigger, confirm=lambda question: False, dry_run=False)
    assert placement.exit_code == 5 and "the mail went out already" in placement.message
    assert len(site.mails()) == 1 and list(site.config.triggers.directory.iterdir()) == []


class TriggersOnABadDay(TriggersThatCannotPublish):
    """The real directory, but it disappears after the mail: the reservation cannot even be given up."""

    def abandon(self, name: str) -> None:
        raise TransientError(f"the reservation of {name} cannot be removed: Stale file handle")

    def look(self) -> Listing:
        return self._triggers.look()


def test_that_the_mail_went_is_said_even_if_the_reservation_cannot_be_given_up(site: SiteForTests) -> None:
    whole = wiring.desk(site.config)
    triggers = cast(Triggers, TriggersOnABadDay(whole.triggers))
    desk = Desk(site.config, whole.clock, whole.archive, triggers, whole.mailer)
    trigger = Trigger(
        "helper@example.org", "maintainer@example.org", MAIN, MAIN_PROJECT, (), "Pi", "pi@example.org", "1"
    )
    placement = place(desk, trigger, confirm=lambda question: False, dry_run=False)
    assert placement.exit_code == 5 and "the mail went out already" in placement.message


def test_ctrl_c_in_the_middle_leaves_nothing(commands: Commands) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        by_smtp(commands.site, silent.getsockname()[1])
        process = commands.start("trigger-calms", *order())
        wait_until(lambda: list(commands.site.config.triggers.directory.iterdir()), "the reservation")
        ended = commands.end(process, signal.SIGINT)
    assert ended.code == 130
    assert "nothing was placed" in ended.err
    assert list(commands.site.config.triggers.directory.iterdir()) == []


def test_ctrl_c_while_the_server_thinks_about_the_whole_mail_says_that_it_may_have_gone(commands: Commands) -> None:
    dot, goes_on = threading.Event(), threading.Event()

    def after(verb: str) -> None:
        if verb == "DOT":
            dot.set()
            goes_on.wait(10)

    with mail_server({}, after) as port:
        by_smtp(commands.site, port)
        process = commands.start("trigger-calms", *order())
        assert dot.wait(20)
        ended = commands.end(process, signal.SIGINT)
        goes_on.set()
    assert ended.code == 130 and "may have gone" in ended.err
    assert list(commands.site.config.triggers.directory.iterdir()) == []


def test_two_requests_for_one_mous_in_one_second_get_names_of_their_own(commands: Commands) -> None:
    processes = [commands.start("trigger-calms", *order(), "--yes") for _ in range(3)]
    assert [commands.end(process).code for process in processes] == [0, 0, 0]
    assert len(commands.site.triggers()) == 3
    assert len({parsed(mail)["Message-ID"] for mail in commands.site.mails()}) == 3


def test_output_that_nobody_can_encode_does_not_hide_what_was_done(commands: Commands) -> None:
    ended = commands.run("trigger-calms", *order(user="李"), "--json", PYTHONIOENCODING="latin-1", PYTHONUTF8="0")
    assert ended.code == 0
    assert json.loads(ended.out)[0]["status"] == "placed"


def test_the_time_in_the_name_is_utc(commands: Commands) -> None:
    assert commands.run("trigger-calms", *order(), TZ="Asia/Tokyo").code == 0
    (name,) = commands.site.triggers()
    written = datetime.strptime(name[-23:-4], "%Y-%m-%dT%H-%M-%S").replace(tzinfo=commands.site.clock.now().tzinfo)
    assert abs((written - commands.site.clock.now()).total_seconds()) < 60
