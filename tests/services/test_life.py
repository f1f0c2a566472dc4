"""The life of a request on a whole site, with real files, jobs and mails: each row of the table of states by name."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from email import message_from_string
from email.message import Message
from itertools import pairwise
from pathlib import Path

import pytest

from stagecal.domain.records import Step
from stagecal.domain.requests import Origin, Outcome, Request, State, uws_phase
from stagecal.domain.verdicts import Verdict
from stagecal.ports import JobHandle, JobState, MailReply
from stagecal.services.notifying import request_message_id
from stagecal.services.sweeping import plan, sweep
from tests.services.effects import Crash, Effects, end_jobs, hidden, settle, verified, wish, with_mailer, with_ports
from tests.sites import (
    CALIBRATORS,
    CALIBRATORS_PROJECT,
    MAIN,
    MAIN_PROJECT,
    RELEASED,
    RELEASED_PROJECT,
    START,
    SiteForTests,
    make_test_site,
)

EB = "uid___A002_Xcf92df_X3453"
THIRD, THIRD_PROJECT = "uid://A001/X133d/X3cf3", "2018.1.01406.S"
DELIVERED = (State.CLOSED, Outcome.DELIVERED)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[SiteForTests]:
    made = make_test_site(tmp_path)
    yield made
    end_jobs(made)


def end_of(request: Request) -> tuple[State, Outcome | None]:
    return request.state, request.outcome


def parsed(site: SiteForTests) -> list[Message]:
    return [message_from_string(text) for text in site.mails()]


def body(mail: Message) -> str:
    return str(mail.get_payload())


def slots(site: SiteForTests) -> int:
    return sum(request.holds_slot for request in site.requests())


def running(site: SiteForTests) -> None:
    """Do rounds until a job runs."""
    site.run(lambda: bool(site.requests()) and site.requests()[0].state is State.STAGING)


def job_of(request: Request) -> JobHandle:
    return JobHandle(request.node, request.work, request.nonce)


def kill(site: SiteForTests, job: JobHandle) -> None:
    """End a job from outside, and wait until it is over."""
    end = time.monotonic() + 30
    while site.site.nodes.poll(job).state is JobState.RUNNING:
        assert time.monotonic() < end, "the job lives on"
        site.site.nodes.cancel(job)
        time.sleep(0.02)


def rounds(site: SiteForTests, number: int, seconds: float = 2) -> None:
    worker = site.rounds()
    for _ in range(number):
        worker.run()
        site.clock.advance(seconds=seconds)


def place_calfields(site: SiteForTests, *fields: str) -> str:
    return site.place(CALIBRATORS, CALIBRATORS_PROJECT, calfields=fields, email="franco@gmail.com")


# --- a good day ----------------------------------------------------------------------------------------------------


def test_a_full_request_is_delivered_once_and_its_trigger_goes_last(site: SiteForTests) -> None:
    site.place()
    site.run()
    request = site.only()
    assert end_of(request) == DELIVERED
    (directory,) = site.published()
    assert (directory / f"{EB}.ms.split.cal.tar").is_file()
    (mail,) = site.mails()
    assert f"http://localhost:8000/preview/{directory.name}" in mail
    assert site.triggers() == [] and site.job_directories() == [] and site.calibrations() == 1


def test_the_delivered_mail_goes_to_the_user_and_to_everybody_else_in_the_envelope_only(site: SiteForTests) -> None:
    site.place()
    site.run()
    (mail,) = parsed(site)
    assert mail["To"] == "pi@example.org" and mail["Cc"] is None and mail["Reply-To"] == "no_reply@example.org"
    assert mail["X-Envelope-To"] == "pi@example.org, contact@example.org, aog@example.org, maintainer@example.org"


def test_the_copy_line_of_a_trigger_is_never_a_recipient(site: SiteForTests) -> None:
    site.place(copy="thief@elsewhere.net")
    site.run()
    assert "thief" not in site.mails()[0]


def test_a_published_directory_is_complete_and_names_no_person(site: SiteForTests) -> None:
    site.place()
    site.run()
    (directory,) = site.published()
    assert verified(directory) == (
        *("README.txt", "SHA256SUMS", "fetch.sh", "index.html", "receipt.json"),
        f"{EB}.ms.split.cal.tar",
    )
    for name in ("README.txt", "fetch.sh", "index.html", "receipt.json"):
        text = (directory / name).read_text()
        assert "@example.org" not in text and "Pi Person" not in text and str(site.directory) not in text


# --- judged: no ----------------------------------------------------------------------------------------------------

REFUSALS = {
    Verdict.INVALID_MOUS_UID: {"mous": MAIN, "project": RELEASED_PROJECT},
    Verdict.CYCLE_0_PROJECT: {"mous": "uid://A002/X2a5c2f/X1", "project": "2011.0.00010.S"},
    Verdict.NOT_ENTITLED: {"email": "stranger@example.org"},
    Verdict.MOUS_IN_QA3: {"mous": "uid://A001/X14d7/X160", "project": "2019.1.00337.S"},
    Verdict.MOUS_NOT_DELIVERED: {"mous": "uid://A001/X1284/X265f", "project": "2017.1.00370.S"},
    Verdict.NO_QA0_PASS_DATA: {"mous": "uid://A001/X1284/X266", "project": "2017.1.00370.S"},
    Verdict.NOT_A_CALIBRATOR_FIELD: {
        "mous": CALIBRATORS,
        "project": CALIBRATORS_PROJECT,
        "calfields": ("HL_Tau",),
        "email": "franco@gmail.com",
    },
}


def test_every_verdict_is_tried() -> None:
    assert set(REFUSALS) == set(Verdict)


@pytest.mark.parametrize("verdict", REFUSALS, ids=lambda verdict: verdict.name)
def test_a_refusal_answers_the_request_mail_with_the_verdict_above_the_quoted_request(
    site: SiteForTests, verdict: Verdict
) -> None:
    values = {"mous": MAIN, "project": MAIN_PROJECT, **REFUSALS[verdict]}
    name = site.place(**values)
    text = (site.config.triggers.directory / name).read_text()
    settle(site)
    request = site.only()
    assert (end_of(request), request.verdict) == ((State.CLOSED, Outcome.REFUSED), verdict)
    (mail,) = parsed(site)
    assert (mail["To"], mail["Cc"]) == ("contact@example.org", "aog@example.org, maintainer@example.org")
    assert mail["In-Reply-To"] == request_message_id("stagecal.example.org", name)
    lines = body(mail).splitlines()
    assert lines[0] == verdict
    assert lines[-len(text.splitlines()) :] == [f"> {line}" if line else ">" for line in text.splitlines()]
    assert values.get("email", "pi@example.org") not in mail["X-Envelope-To"]
    assert site.published() == [] and site.triggers() == [] and slots(site) == 0 and site.job_directories() == []
    assert hidden(site, ".incoming") == [] and uws_phase(request, expired=False) == "ERROR"


def test_an_unknown_mous_is_invalid(site: SiteForTests) -> None:
    site.place("uid://A001/Xabc/Xdef", MAIN_PROJECT)
    settle(site)
    assert site.only().verdict is Verdict.INVALID_MOUS_UID


def test_a_refused_request_starts_no_job(site: SiteForTests) -> None:
    site.set_state(MAIN, "Delivered/Something")
    site.place()
    settle(site)
    assert site.only().verdict is Verdict.MOUS_NOT_DELIVERED and site.calibrations() == 0


def test_what_the_archive_cannot_answer_refuses_nobody(site: SiteForTests) -> None:
    archive = site.directory / "archive.db"
    archive.rename(archive.with_suffix(".away"))
    site.place(email="stranger@example.org")
    rounds(site, 5)
    request = site.only()
    assert request.state is State.RECEIVED and request.not_before is not None and request.verdict is None
    assert site.mails() == [] and site.triggers() != []
    archive.with_suffix(".away").rename(archive)
    settle(site)
    assert site.only().verdict is Verdict.NOT_ENTITLED


def test_an_archive_that_is_away_before_the_mail_keeps_the_link_back(site: SiteForTests) -> None:
    slow, mailer = with_mailer(site)
    mailer.answer("pi@example.org", MailReply.TRANSIENT)
    slow.place()
    slow.run()
    assert slow.only().state is State.STAGED
    archive = site.directory / "archive.db"
    archive.rename(archive.with_suffix(".away"))
    mailer.answer("pi@example.org", MailReply.ACCEPTED)
    attempts = len(mailer.attempts)
    site.clock.advance(days=1)
    rounds(slow, 5, seconds=600)
    assert slow.only().state is State.STAGED and len(mailer.attempts) == attempts
    archive.with_suffix(".away").rename(archive)
    settle(slow)
    assert end_of(slow.only()) == DELIVERED


# --- products that exist already -----------------------------------------------------------------------------------


def test_a_second_request_is_served_by_hard_links_under_a_token_of_its_own(site: SiteForTests) -> None:
    site.place()
    settle(site)
    (first,) = site.published()
    site.clock.advance(hours=1)
    site.place(email="delegee@example.org", ticket="2")
    settle(site)
    assert [end_of(request) for request in site.requests()] == [DELIVERED, DELIVERED]
    (second,) = set(site.published()) - {first}
    tar = f"{EB}.ms.split.cal.tar"
    assert (first / tar).stat().st_ino == (second / tar).stat().st_ino
    assert verified(second) == verified(first)
    receipt = json.loads((second / "receipt.json").read_text())
    assert (receipt["request"], receipt["helpdesk_ticket"]) == (site.requests()[1].id, "2")
    assert (first / "receipt.json").stat().st_ino != (second / "receipt.json").stat().st_ino
    assert site.calibrations() == 1 and not any(step.step.step == "launch" for step in steps_of(site, 1))
    assert first.name not in site.mails()[1], "nobody learns the token of somebody else"
    lines = "\n".join(line for _, line in site.site.ledger.terminal(site.requests()[1].id))
    assert first.name not in lines and "Found pre-existing" in lines


def steps_of(site: SiteForTests, number: int) -> list[object]:
    return list(site.site.ledger.steps(site.requests()[number].id))


@pytest.mark.parametrize("blocked", ["held", "slots full"])
def test_links_need_no_slot_and_no_release(tmp_path: Path, blocked: str) -> None:
    site = make_test_site(tmp_path)
    site.place()
    settle(site)
    site.clock.advance(hours=1)
    if blocked == "held":
        site.site.ledger.set_setting("held", "since today")
    else:
        site.behave(sleep="60")
        site.place(RELEASED, RELEASED_PROJECT)
        site.place(THIRD, THIRD_PROJECT)
        site.run(lambda: slots(site) == 2 and all(one.state is not State.ACCEPTED for one in site.requests()))
    site.place(ticket="2")
    site.run(lambda: end_of(site.requests()[-1]) == DELIVERED)
    for request in site.requests():
        if request.state is State.STAGING:
            wish(site, "withdraw", request)
    settle(site)
    assert site.calibrations() == 1


def test_links_that_had_to_rest_are_tried_again_though_no_slot_is_free(site: SiteForTests) -> None:
    site.place()
    settle(site)
    site.site.ledger.set_setting("held", "since today")
    root = site.config.staging.root
    root.rename(root.with_name("away"))
    site.clock.advance(hours=1)
    site.place(ticket="2")
    worker = site.rounds()
    for _ in range(3):
        worker.run()
        assert site.requests()[1].state is State.ACCEPTED and site.requests()[1].not_before
        site.clock.advance(minutes=30)
    root.with_name("away").rename(root)
    site.clock.advance(hours=2)
    for _ in range(3):
        worker.run()
    assert end_of(site.requests()[1]) == DELIVERED


def test_hold_keeps_jobs_back_until_release(site: SiteForTests) -> None:
    site.site.ledger.set_setting("held", "since today")
    site.place()
    rounds(site, 5)
    assert site.only().state is State.ACCEPTED and slots(site) == 0
    site.site.ledger.set_setting("held", "")
    settle(site)
    assert end_of(site.only()) == DELIVERED


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_a_source_that_is_not_as_recorded_is_not_linked_but_made_anew(site: SiteForTests, damage: str) -> None:
    site.place()
    settle(site)
    (first,) = site.published()
    tar = first / f"{EB}.ms.split.cal.tar"
    if damage == "gone":
        tar.unlink()
    else:
        os.truncate(tar, 1000)
    site.clock.advance(hours=1)
    site.place(ticket="2")
    settle(site)
    assert end_of(site.requests()[1]) == DELIVERED and site.calibrations() == 2
    (second,) = set(site.published()) - {first}
    assert verified(second) and hidden(site, ".incoming") == []


def test_a_source_that_is_not_as_recorded_is_told_once_however_long_a_request_waits(site: SiteForTests) -> None:
    site.place()
    settle(site)
    (site.published()[0] / f"{EB}.ms.split.cal.tar").unlink()
    site.clock.advance(hours=1)
    site.site.ledger.set_setting("held", "since today")
    site.place(ticket="2")
    rounds(site, 20)
    assert len(steps_of(site, 1)) < 6


def test_another_calibration_in_the_archive_is_another_product(site: SiteForTests) -> None:
    site.place()
    settle(site)
    site.archive(
        "INSERT INTO ASA_PRODUCT_FILES (ASA_OUS_ID, NGAS_FILE_ID, FILE_CLASS) VALUES (?, ?, ?)",
        *(MAIN, "new.ms.caltables.tgz", "calibration"),
    )
    site.clock.advance(hours=1)
    site.place(ticket="2")
    settle(site)
    assert site.calibrations() == 2


# --- several requests at once --------------------------------------------------------------------------------------


def test_two_requests_for_one_product_make_it_once_and_deliver_twice(site: SiteForTests) -> None:
    site.place()
    site.place(email="delegee@example.org", ticket="2")
    settle(site)
    assert [end_of(request) for request in site.requests()] == [DELIVERED, DELIVERED]
    assert site.calibrations() == 1 and len(site.published()) == 2
    assert [mail["To"] for mail in parsed(site)] == ["pi@example.org", "delegee@example.org"]


def test_when_the_maker_fails_its_follower_fails_with_it_and_the_maintainer_gets_one_mail(site: SiteForTests) -> None:
    site.behave(exit="3", sleep="0.2")
    site.place()
    site.place(email="delegee@example.org", ticket="2")
    settle(site)
    assert [request.state for request in site.requests()] == [State.HELD, State.HELD]
    assert site.requests()[1].failed_with == site.requests()[0].id
    assert [mail["To"] for mail in parsed(site)] == ["maintainer@example.org"] and site.calibrations() == 1
    assert len(site.triggers()) == 2 and slots(site) == 0


def test_a_follower_that_failed_with_its_maker_is_started_again_by_itself(site: SiteForTests) -> None:
    site.behave(exit="3", sleep="0.2")
    site.place()
    site.place(email="delegee@example.org", ticket="2")
    settle(site)
    site.behave(exit="")
    site.clock.advance(minutes=1)
    wish(site, "retry", site.requests()[1])
    settle(site)
    assert [request.state for request in site.requests()] == [State.HELD, State.CLOSED]
    wish(site, "retry", site.requests()[0])
    settle(site)
    assert [end_of(request) for request in site.requests()] == [DELIVERED, DELIVERED] and site.calibrations() == 2


def test_a_request_that_comes_after_a_failure_is_tried_by_itself(site: SiteForTests) -> None:
    slow, mailer = with_mailer(site)
    mailer.answer("maintainer@example.org", MailReply.TRANSIENT)
    site.behave(exit="3")
    slow.place()
    slow.run()
    assert slow.only().state is State.FAILED
    site.behave(exit="")
    slow.clock.advance(minutes=2)
    slow.place(ticket="2")
    rounds(slow, 1)
    mailer.answer("maintainer@example.org", MailReply.ACCEPTED)
    settle(slow)
    assert [request.state for request in slow.requests()] == [State.HELD, State.CLOSED]


def test_when_the_maker_is_withdrawn_its_job_goes_on_for_the_follower(site: SiteForTests) -> None:
    site.behave(sleep="0.5")
    site.place()
    site.place(email="delegee@example.org", ticket="2")
    running(site)
    wish(site, "withdraw", site.requests()[0])
    settle(site)
    assert [request.outcome for request in site.requests()] == [Outcome.WITHDRAWN, Outcome.DELIVERED]
    assert site.calibrations() == 1 and len(site.published()) == 1 and site.job_directories() == []
    assert [mail["To"] for mail in parsed(site)] == ["delegee@example.org"]


def test_a_third_request_waits_for_a_slot_and_the_first_come_is_served_first(site: SiteForTests) -> None:
    site.behave(sleep="0.2")
    places = [(RELEASED, RELEASED_PROJECT), (MAIN, MAIN_PROJECT), (THIRD, THIRD_PROJECT)]
    for mous, project in places:
        site.clock.advance(seconds=1)
        site.place(mous, project)
    alive: list[int] = []
    holding: list[int] = []

    def looked() -> bool:
        live = [one for one in site.requests() if one.work and one.state is State.STAGING]
        alive.append(sum(site.site.nodes.poll(job_of(one)).state is JobState.RUNNING for one in live))
        holding.append(slots(site))
        return len(site.requests()) == 3 and all(one.state is State.CLOSED for one in site.requests())

    site.run(looked)
    assert max(alive) == 2 and max(holding) == 2
    assert [request.mous for request in site.requests()] == [mous for mous, _ in places]
    launched = sorted(
        (step.time, request.sequence)
        for request in site.requests()
        for step in site.site.ledger.steps(request.id)
        if step.step.step == "launch"
    )
    assert [sequence for _, sequence in launched] == [1, 2, 3]


# --- calibrator fields ---------------------------------------------------------------------------------------------


def test_calibrators_are_given_without_entitlement(site: SiteForTests) -> None:
    place_calfields(site, "J0510+1800")
    settle(site)
    assert end_of(site.only()) == DELIVERED
    (mail,) = parsed(site)
    assert mail["To"] == "franco@gmail.com" and "J0510+1800" in body(mail)


def test_full_products_are_never_linked_for_calibrators_nor_the_reverse(site: SiteForTests) -> None:
    site.place(CALIBRATORS, CALIBRATORS_PROJECT)
    settle(site)
    (full,) = site.published()
    site.clock.advance(hours=1)
    place_calfields(site, "J0510+1800")
    settle(site)
    (calibrators,) = set(site.published()) - {full}
    site.clock.advance(hours=1)
    site.place(CALIBRATORS, CALIBRATORS_PROJECT, ticket="3")
    settle(site)
    (third,) = set(site.published()) - {full, calibrators}
    (tar,) = (path.name for path in full.glob("*.tar"))
    assert (calibrators / tar).stat().st_ino != (full / tar).stat().st_ino
    assert (third / tar).stat().st_ino == (full / tar).stat().st_ino
    assert site.calibrations() == 2


def test_calfields_are_a_set_whose_order_does_not_count(site: SiteForTests) -> None:
    place_calfields(site, "J0510+1800", "J0440+1437")
    settle(site)
    site.clock.advance(hours=1)
    place_calfields(site, "J0440+1437", "J0510+1800")
    settle(site)
    assert [end_of(request) for request in site.requests()] == [DELIVERED, DELIVERED] and site.calibrations() == 1


def test_a_part_of_the_calfields_is_another_product(site: SiteForTests) -> None:
    place_calfields(site, "J0510+1800", "J0440+1437")
    settle(site)
    site.clock.advance(hours=1)
    place_calfields(site, "J0510+1800")
    settle(site)
    assert site.calibrations() == 2


REPORT = json.dumps({"engine": "x", "not_calibrators": [{"field": "J0510+1800", "reason": "observed as target"}]})


@pytest.mark.parametrize(
    "behaviour", [{"use": "HL_Tau"}, {"report": REPORT}], ids=["seen in the data", "reported by the engine"]
)
def test_a_calfield_that_is_no_calibrator_is_refused_and_nothing_is_published(
    site: SiteForTests, behaviour: dict[str, str]
) -> None:
    site.behave(**behaviour)
    fields = ("HL_Tau",) if "use" in behaviour else ("J0510+1800",)
    place_calfields(site, *fields)
    settle(site)
    request = site.only()
    assert (request.outcome, request.verdict) == (Outcome.REFUSED, Verdict.NOT_A_CALIBRATOR_FIELD)
    assert site.published() == [] and hidden(site, ".incoming") == [] and slots(site) == 0
    assert site.job_directories() == [] and site.triggers() == []
    (mail,) = parsed(site)
    assert body(mail).startswith("NOT A CALIBRATOR FIELD\n") and fields[0] in body(mail)


@pytest.mark.parametrize("use", ["full", "HL_Tau"])
def test_a_product_with_data_that_nobody_asked_for_fails_and_is_never_published(site: SiteForTests, use: str) -> None:
    site.behave(use=use)
    place_calfields(site, "J0510+1800", "J0440+1437")
    settle(site)
    assert site.only().state is State.HELD and "not asked for" in site.only().reason
    assert site.published() == [] and hidden(site, ".incoming") == []


def test_a_calfield_that_no_execution_block_has_is_refused(site: SiteForTests) -> None:
    site.behave(use="calibrators")
    place_calfields(site, "J0510+1800", "J0440+1437", "J9999+9999")
    settle(site)
    assert site.only().verdict is Verdict.NOT_A_CALIBRATOR_FIELD and "J9999+9999" in site.only().reason


def both_pass(site: SiteForTests) -> None:
    site.archive("UPDATE AQUA_EXECBLOCK SET QA0STATUS = 'Pass' WHERE EXECBLOCKUID = ?", "uid://A002/Xce574d/Xa33e")


def test_an_execution_block_without_the_calfields_is_named_and_has_no_file(site: SiteForTests) -> None:
    both_pass(site)
    block = "uid://A002/Xce574d/Xa33e"
    site.behave(without=block, report=json.dumps({"execution_blocks": {block: {"without_calfields": True}}}))
    site.place(calfields=("J0510+1800",))
    settle(site)
    assert end_of(site.only()) == DELIVERED
    (directory,) = site.published()
    assert [path.name for path in directory.glob("*.tar")] == [f"{EB}.ms.split.cal.tar"]
    receipt = json.loads((directory / "receipt.json").read_text())
    assert receipt["execution_blocks_without_calfields"] == [block]
    assert "uid___A002_Xce574d_Xa33e" in (directory / "README.txt").read_text()


# --- what fails ----------------------------------------------------------------------------------------------------


def _break(path: Path) -> None:
    with (path / "table.f1").open("r+b") as stream:
        stream.truncate(path.joinpath("table.f1").stat().st_size // 2)


def _damaged(site: SiteForTests, damage: str) -> None:
    sets = site.directory / "sets" / "full.ms"
    if damage == "exit code":
        site.behave(exit="3")
    elif damage == "nothing":
        site.behave(without="uid://A002/Xcf92df/X3453")
    elif damage == "empty directory":
        shutil.rmtree(sets)
        sets.mkdir()
    elif damage == "table.dat empty":
        os.truncate(sets / "table.dat", 0)
    elif damage == "data truncated":
        largest = max((path for path in sets.glob("table.f*")), key=lambda path: path.stat().st_size)
        os.truncate(largest, largest.stat().st_size // 2)
    elif damage == "subtable gone":
        shutil.rmtree(sets / "FIELD")
    elif damage == "report is no JSON":
        site.behave(report="{ this is no JSON")


DAMAGES = [
    *("exit code", "nothing", "empty directory", "table.dat empty", "data truncated", "subtable gone"),
    "report is no JSON",
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_job_that_fails_or_leaves_no_whole_product_is_held_with_one_mail_to_the_maintainer(
    site: SiteForTests, damage: str
) -> None:
    _damaged(site, damage)
    site.place()
    settle(site)
    request = site.only()
    assert request.state is State.HELD and request.reason and uws_phase(request, expired=False) == "HELD"
    assert site.published() == [] and hidden(site, ".incoming") == [] and slots(site) == 0
    assert len(site.triggers()) == 1 and len(site.job_directories()) == 1
    (mail,) = parsed(site)
    assert (mail["To"], mail["X-Envelope-To"]) == ("maintainer@example.org", "maintainer@example.org")
    text = body(mail)
    assert f"stagecalms {MAIN_PROJECT} {MAIN} 12345" in text
    assert "calibrating uid://A002/Xcf92df/X3453" in text, "the job's whole output"
    assert "Failed." in text and "Please investigate" in text, "the terminal output"
    rounds(site, 5, seconds=3600)
    assert site.calibrations() == 1 and len(site.mails()) == 1


def test_data_of_an_execution_block_that_nobody_expected_fail(site: SiteForTests) -> None:
    command = site.directory / "calibrate.sh"
    command.write_text(
        command.read_text().replace("echo calibrated", 'cp -R "$3" "$output/uid___A002_X1_X2.ms.split.cal" || ') + ""
    )
    command.write_text(
        command.read_text() + f'\ncp -R "{site.directory}/sets/full.ms" "$output/uid___A002_X1_X2.ms.split.cal"\n'
    )
    site.place()
    settle(site)
    assert site.only().state is State.HELD and site.published() == []


def test_a_retry_starts_from_the_beginning_in_a_new_directory_with_a_new_token(site: SiteForTests) -> None:
    site.behave(exit="3")
    site.place()
    settle(site)
    before = site.only()
    site.behave(exit="")
    wish(site, "retry")
    settle(site)
    after = site.only()
    assert end_of(after) == DELIVERED and after.round == 1 and after.token != before.token
    assert site.calibrations() == 2 and site.job_directories() == [] and site.triggers() == []
    assert [mail["To"] for mail in parsed(site)] == ["maintainer@example.org", "pi@example.org"]


def test_a_retry_that_fails_again_mails_again(site: SiteForTests) -> None:
    site.behave(exit="3")
    site.place()
    settle(site)
    wish(site, "retry")
    settle(site)
    identities = {mail["Message-ID"] for mail in parsed(site)}
    assert site.only().state is State.HELD and len(identities) == 2 and len(site.job_directories()) == 1


def test_a_retry_leaves_nothing_of_the_attempt_before_it(site: SiteForTests) -> None:
    site.place()
    settle(site)
    # A page of the site's own that cannot be rendered ends the linking of a second request after its links are made.
    page = site.directory / "templates" / "pages" / "README.txt"
    page.parent.mkdir(parents=True)
    page.write_text("{{ nothing_of_this_name }}")
    site.clock.advance(hours=1)
    site.place(ticket="2")
    broken = site.restart()
    settle(broken)
    assert broken.requests()[1].state is State.HELD and hidden(broken, ".incoming") != []
    page.unlink()
    wish(broken, "retry", broken.requests()[1])
    site = broken.restart()
    settle(site)
    assert end_of(site.requests()[1]) == DELIVERED and hidden(site, ".incoming") == []


def test_the_failure_of_an_engine_that_is_not_there_frees_its_slot(site: SiteForTests) -> None:
    site.place()
    site.run(lambda: bool(site.requests()))
    (site.directory / "calibrate.sh").unlink()
    settle(site)
    assert site.only().state is State.HELD and slots(site) == 0


def test_a_job_that_was_killed_is_started_again_and_given_up_after_three_losses(site: SiteForTests) -> None:
    site.behave(sleep="60")
    site.place()
    for number in range(1, 4):
        site.run(lambda: site.requests()[0].state is State.STAGING)
        kill(site, job_of(site.only()))
        site.run(lambda number=number: len(site.only().lost_on) == number or site.only().state is State.HELD)
    settle(site)
    request = site.only()
    assert request.state is State.HELD and "lost on" in request.reason and slots(site) == 0
    assert site.published() == []


def test_a_job_that_was_lost_once_is_done_again_and_delivered(site: SiteForTests) -> None:
    site.behave(sleep="60")
    site.place()
    running(site)
    first = site.only()
    site.site.ledger.set_setting("held", "so that it is not started again at once")
    kill(site, job_of(first))
    site.run(lambda: site.only().state is State.ACCEPTED)
    assert slots(site) == 0
    site.behave(sleep="")
    site.site.ledger.set_setting("held", "")
    settle(site)
    assert end_of(site.only()) == DELIVERED and site.only().lost_on == (first.node,)
    assert site.calibrations() == 1 and site.job_directories() == []


# --- withdrawal ----------------------------------------------------------------------------------------------------


def _received(site: SiteForTests) -> SiteForTests:
    (site.directory / "archive.db").rename(site.directory / "archive.away")
    site.place()
    rounds(site, 2)
    return site


def _accepted(site: SiteForTests) -> SiteForTests:
    site.site.ledger.set_setting("held", "since today")
    site.place()
    rounds(site, 2)
    return site


def _dispatching(site: SiteForTests) -> SiteForTests:
    _accepted(site)
    (request,) = site.requests()
    site.site.ledger.claim_slot(request, max_jobs=2, now=site.clock.now(), step=Step("dispatch"), **_job(site))
    return site


def _job(site: SiteForTests) -> dict[str, str]:
    (look,) = site.site.nodes.loads()
    return {"node": look.name, "work": "WORK17", "nonce": "0" * 32}


def _staging(site: SiteForTests) -> SiteForTests:
    site.behave(sleep="60")
    site.place()
    running(site)
    return site


def _staged(site: SiteForTests) -> SiteForTests:
    slow, mailer = with_mailer(site)
    mailer.answer("pi@example.org", MailReply.TRANSIENT)
    slow.place()
    slow.run()
    return slow


def _refused(site: SiteForTests) -> SiteForTests:
    slow, mailer = with_mailer(site)
    mailer.answer("contact@example.org", MailReply.TRANSIENT)
    slow.place(email="stranger@example.org")
    slow.run()
    return slow


def _failed(site: SiteForTests) -> SiteForTests:
    slow, mailer = with_mailer(site)
    mailer.answer("maintainer@example.org", MailReply.TRANSIENT)
    site.behave(exit="3")
    slow.place()
    slow.run()
    return slow


def _held(site: SiteForTests) -> SiteForTests:
    site.behave(exit="3")
    site.place()
    settle(site)
    return site


STATES = {
    State.RECEIVED: _received,
    State.ACCEPTED: _accepted,
    State.DISPATCHING: _dispatching,
    State.STAGING: _staging,
    State.STAGED: _staged,
    State.REFUSED: _refused,
    State.FAILED: _failed,
    State.HELD: _held,
}


@pytest.mark.parametrize("way", ["withdraw", "trigger removed"])
@pytest.mark.parametrize("state", STATES, ids=str)
def test_a_request_can_be_withdrawn_in_every_state_before_its_mail(site: SiteForTests, state: State, way: str) -> None:
    at = STATES[state](site)
    assert at.only().state is state
    token = at.only().token
    sent = len(at.mails())
    if way == "withdraw":
        wish(at, "withdraw")
    else:
        (at.config.triggers.directory / at.only().trigger_name).unlink()
        rounds(at, 3)
    rounds(at, 1)
    at.run(lambda: at.only().state is State.CLOSED)
    request = at.only()
    assert request.outcome is Outcome.WITHDRAWN and uws_phase(request, expired=False) == "ABORTED"
    assert at.triggers() == [] and slots(at) == 0 and at.published() == [] and at.job_directories() == []
    assert hidden(at, ".incoming") == []
    if token:
        staging = at.site.ledger.staging(token)
        assert staging is None or staging.withdrawn_at is not None
    at.clock.advance(hours=7)
    rounds(at, 3, seconds=3600)
    assert not [mail for mail in parsed(at)[sent:] if "preview/" in body(mail)], "no link leaves any more"


def test_the_slot_of_a_withdrawn_request_is_kept_until_its_job_is_proven_dead(site: SiteForTests) -> None:
    _staging(site)
    job = job_of(site.only())
    wish(site, "withdraw")
    worker = site.rounds()
    kept = 0
    while site.only().state is not State.CLOSED and site.clock.now() < START + timedelta(hours=1):
        worker.run()
        alive = site.site.nodes.poll(job).state is JobState.RUNNING
        assert not alive or site.only().holds_slot, "a living job without a slot"
        kept += alive
        site.clock.advance(seconds=1)
    assert site.site.nodes.poll(job).state is JobState.NOT_STARTED
    assert site.job_directories() == [] and not _processes_of(job)


def _processes_of(job: JobHandle) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if job.nonce.encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def test_nothing_can_be_withdrawn_after_the_mail(site: SiteForTests) -> None:
    site.place()
    settle(site)
    wish(site, "withdraw")
    settle(site)
    assert end_of(site.only()) == DELIVERED and len(site.published()) == 1


@pytest.mark.parametrize("trouble", ["replaced", "unmounted", "emptied by a mount"])
def test_a_directory_that_is_replaced_or_away_withdraws_nobody(site: SiteForTests, trouble: str) -> None:
    _staging(site)
    directory = site.config.triggers.directory
    away = directory.with_name("away")
    directory.rename(away)
    if trouble != "unmounted":
        directory.mkdir()
    rounds(site, 8)
    assert site.only().state is State.STAGING and site.only().wish == ""
    if trouble != "unmounted":
        directory.rmdir()
    away.rename(directory)
    rounds(site, 3)
    site.behave(sleep="")
    kill(site, job_of(site.only()))
    settle(site)
    assert end_of(site.only()) == DELIVERED and site.triggers() == []


def test_a_trigger_that_is_seen_again_withdraws_nothing(site: SiteForTests) -> None:
    _accepted(site)
    path = site.config.triggers.directory / site.only().trigger_name
    text = path.read_text()
    path.unlink()
    worker = site.rounds()
    worker.run()
    assert site.only().missing_since is not None
    path.write_text(text)
    site.clock.advance(seconds=5)
    worker.run()
    assert site.only().missing_since is None and not site.only().wish


def test_a_withdrawal_after_a_death_between_publishing_and_its_record_leaves_nothing_behind(
    site: SiteForTests,
) -> None:
    dying = with_ports(site, **vars(Effects("staging.publish").wrap(site.site)))
    dying.place()
    with pytest.raises(Crash, match=r"after staging\.publish"):
        settle(dying)
    again = site.restart()
    assert len(again.published()) == 1
    wish(again, "withdraw")
    settle(again)
    assert again.only().outcome is Outcome.WITHDRAWN and again.published() == []
    sweep(again.site, plan(again.site, again.clock.now()), again.clock.now())
    assert hidden(again, ".expired") == []


# --- mails ---------------------------------------------------------------------------------------------------------


def test_a_user_whose_address_is_refused_is_held_and_the_contact_is_told(site: SiteForTests) -> None:
    strict, mailer = with_mailer(site)
    mailer.answer("pi@example.org", MailReply.REFUSED, "550 no such user")
    strict.place()
    settle(strict)
    request = strict.only()
    assert request.state is State.HELD and "550 no such user" in request.reason
    assert len(strict.published()) == 1 and len(strict.triggers()) == 1
    (told,) = [mail for mail in parsed(strict) if mail["To"] == "contact@example.org"]
    assert "550 no such user" in body(told) and "pi@example.org" in body(told)
    assert told["In-Reply-To"] == request_message_id("stagecal.example.org", request.trigger_name)
    assert "preview/" not in body(told)


def test_a_retry_after_a_refused_mail_only_mails_and_no_copy_twice(site: SiteForTests) -> None:
    strict, mailer = with_mailer(site)
    mailer.answer("pi@example.org", MailReply.REFUSED)
    strict.place()
    settle(strict)
    mailer.answer("pi@example.org", MailReply.ACCEPTED)
    mailer.attempts.clear()
    wish(strict, "retry")
    settle(strict)
    assert end_of(strict.only()) == DELIVERED and strict.calibrations() == 1 and len(strict.published()) == 1
    assert mailer.attempts == [("pi@example.org",)]


def test_an_owed_directory_never_expires_while_it_is_held(site: SiteForTests) -> None:
    strict, mailer = with_mailer(site)
    mailer.answer("pi@example.org", MailReply.REFUSED)
    strict.place()
    settle(strict)
    found = plan(strict.site, strict.clock.now() + timedelta(days=400))
    assert found.delete == () and "owes" in found.keep[strict.only().token]


def test_a_refusal_that_the_contact_refuses_is_held_and_the_operators_are_told(site: SiteForTests) -> None:
    strict, mailer = with_mailer(site)
    mailer.answer("contact@example.org", MailReply.REFUSED)
    strict.place(email="stranger@example.org")
    settle(strict)
    assert strict.only().state is State.HELD
    assert [mail["To"] for mail in parsed(strict)][-1] == "maintainer@example.org"
    mailer.answer("contact@example.org", MailReply.ACCEPTED)
    wish(strict, "retry")
    settle(strict)
    assert end_of(strict.only()) == (State.CLOSED, Outcome.REFUSED)


def test_a_transient_answer_is_tried_again_after_5_10_20_minutes_to_67(site: SiteForTests) -> None:
    slow, mailer = with_mailer(site)
    mailer.answer("pi@example.org", MailReply.TRANSIENT)
    slow.place()
    slow.run(lambda: bool(mailer.attempts))
    times = [slow.clock.now()]
    worker = slow.rounds()
    while len(times) < 7 and slow.clock.now() < START + timedelta(days=1):
        before = len(mailer.attempts)
        worker.run()
        if len(mailer.attempts) > before and "pi@example.org" in mailer.attempts[-1]:
            times.append(slow.clock.now())
        slow.clock.advance(seconds=20)
    pauses = [(later - earlier).total_seconds() for earlier, later in pairwise(times)]
    assert pauses == pytest.approx([300, 600, 1200, 2400, 4000, 4000], abs=21)


def test_copies_that_were_taken_are_not_sent_again_when_the_user_was_not_reached(site: SiteForTests) -> None:
    slow, mailer = with_mailer(site)
    mailer.answer("pi@example.org", MailReply.TRANSIENT)
    slow.place()
    slow.run()
    mailer.answer("pi@example.org", MailReply.ACCEPTED)
    settle(slow)
    assert mailer.attempts == [
        ("pi@example.org", "contact@example.org", "aog@example.org", "maintainer@example.org"),
        ("pi@example.org",),
    ]
    assert len({mail["Message-ID"] for mail in parsed(slow)}) == 1


@pytest.mark.parametrize("reply", [MailReply.TRANSIENT, MailReply.REFUSED, MailReply.UNKNOWN], ids=str)
def test_trouble_with_a_copy_never_keeps_the_users_mail_back(site: SiteForTests, reply: MailReply) -> None:
    slow, mailer = with_mailer(site)
    mailer.answer("aog@example.org", reply)
    slow.place()
    slow.run(lambda: bool(slow.requests()) and slow.only().state is State.CLOSED)
    assert end_of(slow.only()) == DELIVERED and slow.triggers() == []
    mailer.answer("aog@example.org", MailReply.ACCEPTED)
    mailer.attempts.clear()
    settle(slow)
    assert mailer.attempts == ([] if reply is MailReply.REFUSED else [("aog@example.org",)])


def test_a_copy_with_the_link_leaves_on_a_later_day_only_after_another_judgement(site: SiteForTests) -> None:
    slow, mailer = with_mailer(site)
    mailer.answer("aog@example.org", MailReply.TRANSIENT)
    slow.place()
    slow.run(lambda: bool(slow.requests()) and slow.only().state is State.CLOSED)
    mailer.answer("aog@example.org", MailReply.ACCEPTED)
    mailer.attempts.clear()
    site.clock.advance(days=1)
    site.set_state(MAIN, "QA3InProgress")
    settle(slow)
    assert mailer.attempts == [] and end_of(slow.only()) == DELIVERED


def test_a_copy_that_may_still_leave_on_a_later_day_does(site: SiteForTests) -> None:
    slow, mailer = with_mailer(site)
    mailer.answer("aog@example.org", MailReply.TRANSIENT)
    slow.place()
    slow.run(lambda: bool(slow.requests()) and slow.only().state is State.CLOSED)
    mailer.answer("aog@example.org", MailReply.ACCEPTED)
    mailer.attempts.clear()
    site.clock.advance(days=1)
    settle(slow)
    assert mailer.attempts == [("aog@example.org",)] and slow.only().judged_on == slow.clock.now().date()


def test_a_mail_is_given_up_after_five_days(site: SiteForTests) -> None:
    slow, mailer = with_mailer(site)
    mailer.answer("pi@example.org", MailReply.TRANSIENT)
    slow.place()
    slow.run()
    first = slow.clock.now()
    settle(slow)
    assert slow.only().state is State.HELD
    assert timedelta(days=5) < slow.clock.now() - first < timedelta(days=5, hours=3)


def test_nobody_gets_the_link_who_lost_the_right_to_it_overnight(site: SiteForTests) -> None:
    slow = _staged(site)
    (directory,) = slow.published()
    token = slow.only().token
    slow.site.mailer.answer("pi@example.org", MailReply.ACCEPTED)
    site.clock.time = START + timedelta(days=1)
    site.set_state(MAIN, "QA3InProgress/UserInitiated")
    settle(slow)
    request = slow.only()
    assert (request.outcome, request.verdict) == (Outcome.REFUSED, Verdict.MOUS_IN_QA3)
    assert not directory.exists() and slow.published() == []
    assert slow.site.ledger.staging(token).withdrawn_at is not None
    to_user = [mail for mail in parsed(slow) if "pi@example.org" in mail["X-Envelope-To"]]
    assert to_user == []
    site.set_state(MAIN, "Delivered")
    site.clock.advance(hours=1)
    slow.place(ticket="2")
    settle(slow)
    assert [path.name for path in slow.published()] == [slow.requests()[1].token] != [token]
    assert slow.calibrations() == 2


def test_the_same_day_needs_no_second_judgement(site: SiteForTests) -> None:
    slow = _staged(site)
    slow.site.mailer.answer("pi@example.org", MailReply.ACCEPTED)
    site.set_state(MAIN, "QA3InProgress")
    settle(slow)
    assert end_of(slow.only()) == DELIVERED


# --- operators -----------------------------------------------------------------------------------------------------


def _typed(site: SiteForTests, **changes: object) -> Request:
    now = site.clock.now()
    values = Request(
        id=f"{len(site.requests()):016x}",
        sequence=0,
        origin=Origin.OPERATOR,
        mous=MAIN,
        project=MAIN_PROJECT,
        ticket="12345",
        user="",
        email="",
        calfields=(),
        contact="",
        trigger_name="",
        trigger_text="",
        trigger_sha256="",
        received_at=now,
        state=State.RECEIVED,
        since=now,
    )
    added = site.site.ledger.add(replace(values, **changes), Step("receive", decided="RECEIVED"))
    assert added is not None
    return added


def test_what_an_operator_types_is_staged_without_mail_and_without_a_question_of_entitlement(
    site: SiteForTests,
) -> None:
    request = _typed(site)
    settle(site)
    assert end_of(site.only()) == DELIVERED and site.mails() == [] and len(site.published()) == 1
    lines = [line for _, line in site.site.ledger.terminal(request.id)]
    assert lines[0].startswith("The staging directory will be accessible at http://localhost:8000/preview/")
    assert any(line.endswith(site.published()[0].name) and "completed at" in line for line in lines)


@pytest.mark.parametrize(("email", "outcome"), [("pi@example.org", "delivered"), ("x@example.org", "refused")])
def test_an_operator_who_names_a_user_has_the_entitlement_checked(site: SiteForTests, email: str, outcome: str) -> None:
    _typed(site, email=email)
    settle(site)
    assert site.only().outcome == outcome and site.mails() == []


def test_what_an_operator_types_waits_in_the_same_queue(site: SiteForTests) -> None:
    site.behave(sleep="0.2")
    site.place(RELEASED, RELEASED_PROJECT)
    site.place(THIRD, THIRD_PROJECT)
    rounds(site, 1)
    _typed(site)
    rounds(site, 1)
    assert site.requests()[2].state is State.ACCEPTED and slots(site) == 2
    settle(site)
    assert [end_of(request) for request in site.requests()] == [DELIVERED] * 3


def test_the_failure_of_what_an_operator_typed_is_mailed_and_can_be_retried(site: SiteForTests) -> None:
    site.behave(exit="3")
    _typed(site)
    settle(site)
    assert site.only().state is State.HELD and len(site.mails()) == 1
    site.behave(exit="")
    wish(site, "retry")
    settle(site)
    assert end_of(site.only()) == DELIVERED


# --- the disk ------------------------------------------------------------------------------------------------------


def test_a_disk_without_room_makes_requests_wait_and_fails_nobody(tmp_path: Path) -> None:
    site = make_test_site(tmp_path)
    full = SiteForTests(
        site.directory,
        replace(site.config, staging=replace(site.config.staging, reserve_gb=1e9)),
        site.clock,
        replace(site.site, config=replace(site.config, staging=replace(site.config.staging, reserve_gb=1e9))),
    )
    full.place()
    rounds(full, 5)
    request = full.only()
    assert request.state is State.ACCEPTED and request.not_before and "free" in request.reason
    assert full.calibrations() == 0 and full.job_directories() == []
    # Trouble that lasts is told, once a day.
    for _ in range(200):
        full.rounds().run()
        full.clock.advance(minutes=5)
    (alarm,) = parsed(full)
    assert alarm["To"] == "maintainer@example.org" and "free" in body(alarm)
    again = site.restart()
    settle(again)
    assert end_of(again.only()) == DELIVERED


def test_a_disk_that_fills_while_the_job_runs_keeps_the_products_until_there_is_room(tmp_path: Path) -> None:
    site = make_test_site(tmp_path)
    site.behave(sleep="0.2")
    site.place()
    running(site)
    config = replace(site.config, staging=replace(site.config.staging, reserve_gb=1e9))
    full = SiteForTests(site.directory, config, site.clock, replace(site.site, config=config))
    full.run(lambda: "free" in full.only().reason)
    assert full.only().state is State.STAGING and full.published() == [] and hidden(full, ".incoming") == []
    again = site.restart()
    settle(again)
    assert end_of(again.only()) == DELIVERED and again.calibrations() == 1
