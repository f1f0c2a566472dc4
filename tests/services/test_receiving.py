"""From files in the trigger directory to requests: nothing partial, nothing hostile, nothing lost, nobody starved."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from datetime import timedelta
from email import message_from_string
from pathlib import Path

import pytest

from stagecal.domain.identifiers import sanitized
from stagecal.domain.requests import Outcome, State
from stagecal.domain.trigger import MAXIMUM_BYTES
from tests.services.effects import end_jobs, settle
from tests.sites import MAIN, RELEASED, START, SiteForTests, make_test_site


@pytest.fixture
def site(tmp_path: Path) -> Iterator[SiteForTests]:
    made = make_test_site(tmp_path)
    # What is received here need not be made.
    made.site.ledger.set_setting("held", "for this test")
    yield made
    end_jobs(made)


def put(site: SiteForTests, content: bytes, name: str = "") -> Path:
    """Put a file under the name of a trigger."""
    path = site.config.triggers.directory / (name or f"trigger-{sanitized(MAIN)}-2031-01-02T03-04-05.txt")
    path.write_bytes(content)
    return path


def good(site: SiteForTests, **values: str) -> bytes:
    """Return the content of a trigger, and leave none."""
    path = site.config.triggers.directory / site.place(**values)
    content = path.read_bytes()
    path.unlink()
    return content


def look(site: SiteForTests) -> timedelta | None:
    """Look once; return in how much time it wants to look again."""
    _, again = site.receiver.look(site.clock.now())
    return again and again - site.clock.now()


def rejected(site: SiteForTests) -> list[str]:
    directory = site.config.triggers.directory / "rejected"
    return sorted(os.listdir(directory)) if directory.is_dir() else []


def told(site: SiteForTests) -> list[tuple[str, str | None]]:
    """Send what is to be sent; return To and Cc of each mail."""
    site.rounds().run()
    mails = [message_from_string(text) for text in site.mails()]
    return [(mail["To"], mail["Cc"]) for mail in mails]


# --- partial files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line_end", "user"), [(b"\n", "Pi Person"), (b"\r\n", "李 Süß")], ids=["LF", "CRLF, any script"]
)
def test_no_beginning_of_a_trigger_is_ever_a_request(site: SiteForTests, line_end: bytes, user: str) -> None:
    content = good(site, user=user).replace(b"\n", line_end)
    path = put(site, b"")
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert look(site) is not None, "it wants to look again"
        assert site.requests() == [] and rejected(site) == [], content[:length]
        site.clock.advance(seconds=0.05)
    path.write_bytes(content)
    assert look(site) is None
    assert (site.only().ticket, site.only().user) == ("12345", user)


def test_a_file_without_a_last_line_end_is_believed_when_it_has_settled(site: SiteForTests) -> None:
    put(site, good(site).rstrip())
    pause = look(site)
    assert pause is not None and timedelta(0) < pause <= timedelta(seconds=30) and site.requests() == []
    site.clock.time += pause
    assert look(site) is None
    assert site.only().ticket == "12345"


def test_a_ticket_that_still_grows_is_read_whole(site: SiteForTests) -> None:
    path = put(site, good(site).rstrip())
    look(site)
    site.clock.advance(seconds=20)
    path.write_bytes(path.read_bytes() + b"6")
    look(site)
    site.clock.advance(seconds=20)
    look(site)
    assert site.requests() == []
    site.clock.advance(seconds=20)
    look(site)
    assert site.only().ticket == "123456"


@pytest.mark.parametrize("known", [True, False])
def test_what_stays_incomplete_is_rejected_after_five_minutes_and_told_to_those_we_know(
    site: SiteForTests, known: bool
) -> None:
    contact = "contact@example.org" if known else "contact@elsewhere.net"
    content = good(site, contact=contact)
    content = content[: content.index(b"helpdesk")]
    path = put(site, content)
    pause = look(site)
    assert pause is not None
    site.clock.advance(seconds=299)
    look(site)
    assert rejected(site) == []
    site.clock.advance(seconds=2)
    look(site)
    assert rejected(site) == [path.name, f"{path.name}.reason.txt"] and not path.exists()
    reason = (path.parent / "rejected" / f"{path.name}.reason.txt").read_text()
    assert "helpdesk ticket" in reason and "not changed for" in reason
    assert (path.parent / "rejected" / path.name).read_bytes() == content
    assert told(site) == [("aog@example.org", contact if known else None)]
    assert site.requests() == []


def test_an_incomplete_file_that_still_changes_is_waited_for(site: SiteForTests) -> None:
    content = good(site)
    for end in (20, 40, 60):
        put(site, content[:end])
        look(site)
        site.clock.advance(seconds=299)
    look(site)
    assert rejected(site) == []
    put(site, content)
    look(site)
    assert len(site.requests()) == 1


def test_an_unfinished_file_keeps_the_service_from_being_idle(site: SiteForTests) -> None:
    put(site, good(site)[:50])
    worker = site.rounds()
    result = worker.run()
    assert result.next_at is not None and not worker.is_idle()


# --- hostile files -------------------------------------------------------------------------------------------------


def _symlink(path: Path) -> None:
    secret = path.parent.parent / "secret.txt"
    secret.write_text("a secret")
    path.symlink_to(secret)


def _hostile(name: str, path: Path, content: bytes) -> None:
    if name == "symbolic link":
        _symlink(path)
    elif name == "named pipe":
        os.mkfifo(path)
    elif name == "directory":
        path.mkdir()
    elif name == "huge":
        path.write_bytes(content + b"x" * MAXIMUM_BYTES)
    elif name == "sparse and huge":
        path.write_bytes(content)
        os.truncate(path, 50 * 2**30)
    elif name == "not UTF-8":
        path.write_bytes(content.replace(b"Pi Person", b"Pi \xff Person"))
    elif name == "NUL":
        path.write_bytes(content.replace(b"Pi Person", b"Pi \0 Person"))
    elif name == "escape sequence":
        path.write_bytes(content.replace(b"Pi Person", b"Pi \x1b[2J Person"))
    elif name == "header injection":
        path.write_bytes(content.replace(b"contact@example.org", b"contact@example.org\rBcc: x@example.org"))
    elif name == "another MOUS":
        path.write_bytes(content.replace(sanitized(MAIN).encode(), sanitized(RELEASED).encode()))
    elif name == "unknown contact":
        path.write_bytes(content.replace(b"contact@example.org", b"contact@elsewhere.net"))
    elif name == "lookalike contact":
        path.write_bytes(content.replace(b"contact@example.org", b"contact@notexample.org"))
    elif name == "no calfield":
        path.write_bytes(content.replace(b"for user", b"calfield \nfor user"))
    elif name == "shell in the ticket":
        path.write_bytes(content.replace(b"ticket 12345", b"ticket $(id)"))
    elif name == "path in the project":
        path.write_bytes(content.replace(b"project 2017", b"project ../../2017"))
    elif name == "another line":
        path.write_bytes(content.replace(b"for user", b"rm -rf /\nfor user"))


HOSTILE = [
    *("symbolic link", "named pipe", "directory", "huge", "sparse and huge", "not UTF-8", "NUL", "escape sequence"),
    *("header injection", "another MOUS", "unknown contact", "lookalike contact", "no calfield"),
    *("shell in the ticket", "path in the project", "another line"),
]


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_can_never_be_a_request_is_moved_aside_with_a_reason_and_told_to_aog(
    site: SiteForTests, kind: str
) -> None:
    content = good(site)
    path = site.config.triggers.directory / f"trigger-{sanitized(MAIN)}-2031-01-02T03-04-05.txt"
    _hostile(kind, path, content)
    site.clock.advance(seconds=60)
    site.place(ticket="2")
    look(site)
    assert rejected(site) == [path.name, f"{path.name}.reason.txt"]
    assert [request.ticket for request in site.requests()] == ["2"], "the next one is not kept waiting"
    (mail,) = told(site)
    assert mail[0] == "aog@example.org" and mail[1] in (None, "contact@example.org")
    text = site.mails()[0]
    assert path.name in text and "\x1b" not in text and "\0" not in text and "a secret" not in text
    assert "elsewhere.net" not in (text.partition("\n\n")[0]), "nobody unknown gets a mail"
    assert "x@example.org" not in text.partition("\n\n")[0]
    site.clock.advance(minutes=10)
    look(site)
    assert len(told(site)) == 1 and len(rejected(site)) == 2


@pytest.mark.parametrize(
    "name",
    [
        b"trigger-\xff\xfe.txt",
        b"trigger-\x1b[2J.txt",
        b"trigger-uid___A001_X12a3_X80e-2031-01-02.txt",
        b"Trigger-uid___A001_X12a3_X80e-2031-01-02T03-04-05.txt",
        b"trigger-uid___A001_X12a3_X80e-2031-02-31T03-04-05.txt",
        b"trigger-uid___A001_X12a3_X80e-2031-01-02T03-04-05.txt~",
        b"trigger-" + b"x" * 240,
        b"trigger-$(touch x)-`id`;rm -rf.txt",
    ],
    ids=["not UTF-8", "control", "no time", "capital", "31 February", "backup", "long", "shell"],
)
def test_a_wrong_name_is_rejected_whatever_bytes_it_has(site: SiteForTests, name: bytes) -> None:
    content = good(site)
    (Path(os.fsdecode(bytes(site.config.triggers.directory) + b"/" + name))).write_bytes(content)
    look(site)
    assert site.requests() == [] and len(rejected(site)) == 2
    # What has a name that nobody can print is not even read.
    ((to, copy),) = told(site)
    assert to == "aog@example.org" and copy in ("contact@example.org", None)
    assert not (site.config.triggers.directory / "x").exists()


def test_strangers_in_the_directory_are_left_alone(site: SiteForTests) -> None:
    directory = site.config.triggers.directory
    for name in ("README", ".hidden", ".trigger-x.reserved", "notes.txt"):
        (directory / name).write_text("mine")
    look(site)
    assert rejected(site) == [] and len(os.listdir(directory)) == 4


def test_a_file_that_cannot_be_moved_aside_stops_nobody_and_is_told_once_a_day(site: SiteForTests) -> None:
    (site.config.triggers.directory / "rejected").write_text("a file where the directory should be")
    put(site, b"\xff nonsense\n")
    site.clock.advance(seconds=60)
    site.place(ticket="2")
    worker = site.rounds()
    for _ in range(5):
        worker.run()
        site.clock.advance(minutes=1)
    assert [request.ticket for request in site.requests()] == ["2"]
    assert len({text for text in site.mails() if "Message-ID: <alarm" in text}) <= 1
    assert len(site.mails()) <= 2


def test_two_bad_files_of_one_name_are_both_kept_and_both_told(site: SiteForTests) -> None:
    first = put(site, b"\xff first nonsense\n")
    look(site)
    put(site, b"\xff second nonsense\n")
    look(site)
    assert len(rejected(site)) == 4 and len(told(site)) == 2
    contents = {path.read_bytes() for path in (first.parent / "rejected").glob("*") if "reason" not in path.name}
    assert contents == {b"\xff first nonsense\n", b"\xff second nonsense\n"}


# --- the same trigger again ----------------------------------------------------------------------------------------


def test_a_trigger_is_one_request_however_often_it_is_seen(site: SiteForTests) -> None:
    site.place()
    for _ in range(5):
        look(site)
    again = site.restart()
    look(again)
    assert len(again.requests()) == 1


def test_a_trigger_that_changes_while_its_request_is_open_is_a_request_of_its_own_afterwards(
    site: SiteForTests,
) -> None:
    path = site.config.triggers.directory / site.place(email="stranger@example.org")
    look(site)
    path.write_bytes(path.read_bytes().replace(b"12345", b"77777"))
    settle(site)
    tickets = [(request.ticket, request.outcome) for request in site.requests()]
    assert tickets == [("12345", Outcome.REFUSED), ("77777", Outcome.REFUSED)]
    assert site.triggers() == [] and len(site.mails()) == 2


def test_the_same_trigger_after_its_request_was_closed_is_a_new_request(site: SiteForTests) -> None:
    path = site.config.triggers.directory / site.place(email="stranger@example.org")
    content = path.read_bytes()
    for _ in range(3):
        path.write_bytes(content)
        settle(site)
    assert len({request.id for request in site.requests()}) == 3
    assert {request.state for request in site.requests()} == {State.CLOSED}
    assert len({message_from_string(text)["Message-ID"] for text in site.mails()}) == 3


def test_triggers_of_one_look_are_served_by_the_time_in_their_names(site: SiteForTests) -> None:
    site.clock.time = START + timedelta(seconds=30)
    site.place(ticket="2")
    site.clock.time = START
    site.place("uid://A001/X133d/X3cf3", "2018.1.01406.S", ticket="1")
    look(site)
    assert [request.ticket for request in site.requests()] == ["1", "2"]


# --- many ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", ["nonsense", "named pipe"])
def test_two_hundred_triggers_at_once_with_a_poisonous_one_at_the_head_all_end(tmp_path: Path, poison: str) -> None:
    site = make_test_site(tmp_path)
    directory = site.config.triggers.directory
    if poison == "nonsense":
        put(site, b"\xff" * 1000)
    else:
        os.mkfifo(directory / f"trigger-{sanitized(MAIN)}-2031-01-02T03-04-05.txt")
    site.clock.advance(seconds=1)
    first = directory / site.place(email="stranger@example.org", ticket="1")
    content = first.read_bytes()
    for number in range(2, 201):
        at = START + timedelta(seconds=number)
        name = f"trigger-{sanitized(MAIN)}-{at:%Y-%m-%dT%H-%M-%S}.txt"
        put(site, content.replace(b"ticket 1\n", b"ticket %d\n" % number), name)
    settle(site)
    assert [request.ticket for request in site.requests()] == [str(number) for number in range(1, 201)]
    assert {request.outcome for request in site.requests()} == {Outcome.REFUSED}
    assert site.triggers() == [] and len(site.mails()) == 201 and len(rejected(site)) == 2
    shutil.rmtree(site.directory / "mail")


def test_fifty_requests_for_one_product_make_it_once_and_deliver_fifty_times(tmp_path: Path) -> None:
    site = make_test_site(tmp_path)
    for number in range(50):
        site.place(ticket=str(number + 1))
    settle(site)
    assert {request.outcome for request in site.requests()} == {Outcome.DELIVERED}
    assert site.calibrations() == 1 and len(site.published()) == 50 and len(site.mails()) == 50
