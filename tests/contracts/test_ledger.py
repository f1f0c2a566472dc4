"""What every Ledger promises: each method is one durable transaction, and the table of states cannot be left.

The suite runs over every adapter; what only concerns the SQLite file and its sidecars stands at the end.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest

from stagecal.adapters.ledger import SqliteLedger
from stagecal.domain.records import LeftBehind, MailKind, NewMail, ProductFile, RecipientState, Step
from stagecal.domain.requests import TRANSITIONS, Origin, Outcome, Request, State
from stagecal.domain.retention import Staging
from stagecal.domain.verdicts import Verdict
from stagecal.ports import FatalError, StaleRequestError, TransientError

NOW = datetime(2031, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
STEP = Step("test", "what?", "this", "that")
TOKEN = "0123456789abcdef" * 2


@pytest.fixture(params=["sqlite"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], SqliteLedger]]:
    """A function that opens the ledger, as each process would."""
    ledgers = []

    def open_one() -> SqliteLedger:
        ledgers.append({"sqlite": SqliteLedger}[request.param](tmp_path / "state"))
        return ledgers[-1]

    yield open_one
    for one in ledgers:
        one.close()


@pytest.fixture
def ledger(opened: Callable[[], SqliteLedger]) -> SqliteLedger:
    return opened()


def a_request(number: int = 1, **changes: object) -> Request:
    request = Request(
        id=f"{number:016x}",
        sequence=0,
        origin=Origin.TRIGGER,
        mous="uid://A001/X1/X2",
        project="2017.1.01347.S",
        ticket="12345",
        user="李 Süß O'Brien",
        email="pi@example.org",
        calfields=(),
        contact="contact@example.org",
        trigger_name=f"trigger-{number}.txt",
        trigger_text="a\nb\n",
        trigger_sha256="ab" * 32,
        received_at=NOW,
        state=State.RECEIVED,
        since=NOW,
    )
    return replace(request, **changes)


def added(ledger: SqliteLedger, number: int = 1, **changes: object) -> Request:
    request = ledger.add(a_request(number, **changes), STEP)
    assert request is not None
    return request


def a_mail(number: int = 1, copies: tuple[str, ...] = ("aog@example.org",)) -> NewMail:
    return NewMail(
        MailKind.DELIVERED,
        f"<delivered.{number}@example.org>",
        "sender@example.org",
        ("pi@example.org",),
        copies,
        b"Subject: x\r\n\r\n\xff\0body\r\n",
    )


def a_staging(token: str = TOKEN, **changes: object) -> Staging:
    return replace(Staging(token, f"{1:016x}", "recipe", NOW, None, 28), **changes)


FILES = (
    ProductFile("b.tar", "uid://A002/X1/X2", 2**40, "cd" * 32, 2**33, 2**62, 1_900_000_000_123_456_789),
    ProductFile("a.txt", "", 1, "ef" * 32, 1, 2, 3),
)


# --- requests ------------------------------------------------------------------------------------------------------


def test_a_request_is_added_once_and_gets_its_place_in_the_queue(ledger: SqliteLedger) -> None:
    first, second = added(ledger, 7), added(ledger, 3)
    assert (first.sequence, second.sequence) == (1, 2)
    assert ledger.add(a_request(7), STEP) is None
    assert ledger.requests() == ledger.open_requests() == [first, second]
    assert ledger.requests(limit=1) == [second] and len(ledger.steps(first.id)) == 1


def test_every_field_of_a_request_survives(ledger: SqliteLedger, opened: Callable[[], SqliteLedger]) -> None:
    request = added(
        ledger,
        origin=Origin.OPERATOR,
        calfields=("J0510+1800", "B a,c"),
        state=State.HELD,
        round=3,
        outcome=Outcome.REFUSED,
        verdict=Verdict.MOUS_IN_QA3,
        reason="why; 'DROP TABLE",
        not_before=NOW + timedelta(microseconds=1),
        attempts=4,
        judged_on=date(2031, 1, 2),
        execution_blocks=("uid://A002/X1/X2", "uid://A002/X1/X3"),
        calibration="c",
        recipe="r",
        token=TOKEN,
        node="n",
        work="WORK1",
        nonce="0" * 32,
        holds_slot=True,
        lost_on=("a", "b"),
        seen_in="1:2",
        missing_since=NOW,
        wish="retry",
        waits_for="f" * 16,
        failed_with="e" * 16,
        engine="casatasks",
        casa_home="/opt/casa",
        leased_until=NOW,
    )
    unset = [field.name for field in fields(Request) if getattr(request, field.name) in ("", (), None, 0, False)]
    assert unset == [], "every field is tried"
    assert opened().get(request.id) == request


def test_an_unknown_id_is_a_key_error(ledger: SqliteLedger) -> None:
    with pytest.raises(KeyError):
        ledger.get("0" * 16)


def test_requests_are_found_by_the_beginning_of_their_id_and_nothing_else(ledger: SqliteLedger) -> None:
    added(ledger, 0x10)
    added(ledger, 0x11)
    assert len(ledger.find("0000")) == 2 and len(ledger.find(f"{0x11:016x}")) == 1
    assert ledger.find("%") == ledger.find("_") == ledger.find("1") == []


@pytest.mark.parametrize("state", State, ids=str)
@pytest.mark.parametrize("to", State, ids=str)
def test_only_the_changes_of_the_table_of_states_are_possible(ledger: SqliteLedger, state: State, to: State) -> None:
    request = added(ledger, state=state, attempts=3, not_before=NOW)
    later = NOW + timedelta(seconds=1)
    if to is state:
        assert ledger.commit(request, now=later, to=to).since == NOW
    elif to in TRANSITIONS[state]:
        changed = ledger.commit(request, now=later, to=to)
        assert changed == ledger.get(request.id)
        assert (changed.state, changed.since, changed.attempts, changed.not_before) == (to, later, 0, None)
    else:
        with pytest.raises(FatalError, match="no way"):
            ledger.commit(request, now=later, to=to, mails=[a_mail()], step=STEP)
        assert ledger.get(request.id) == request and ledger.unsent_mails() == []


def test_a_stale_request_changes_nothing_at_all(ledger: SqliteLedger) -> None:
    old = added(ledger)
    ledger.commit(old, now=NOW, to=State.ACCEPTED)
    with pytest.raises(StaleRequestError):
        ledger.commit(
            *(old,),
            now=NOW,
            to=State.REFUSED,
            step=STEP,
            terminal=["line"],
            mails=[a_mail()],
            staging=a_staging(),
            files=FILES,
            reason="lost",
        )
    assert ledger.get(old.id).state is State.ACCEPTED and ledger.get(old.id).reason == ""
    assert ledger.unsent_mails() == ledger.stagings() == [] and len(ledger.steps(old.id)) == 1
    assert ledger.terminal(old.id) == [] and ledger.staged_files(TOKEN) == ([], [])


def test_a_change_in_the_same_state_keeps_what_others_changed_meanwhile(ledger: SqliteLedger) -> None:
    old = added(ledger)
    ledger.set_wish(old.id, "withdraw", NOW)
    ledger.commit(old, now=NOW, not_before=NOW, attempts=2)
    assert (ledger.get(old.id).wish, ledger.get(old.id).attempts) == ("withdraw", 2)


def test_a_wish_is_heard_at_once(ledger: SqliteLedger) -> None:
    request = added(ledger, not_before=NOW + timedelta(days=1))
    ledger.set_wish(request.id, "withdraw", NOW)
    assert ledger.get(request.id).not_before is None
    assert ledger.steps(request.id)[-1].step.decided == "withdraw"


def test_closed_requests_are_counted_by_their_trigger(ledger: SqliteLedger) -> None:
    added(ledger, 1, trigger_name="t", state=State.CLOSED)
    added(ledger, 2, trigger_name="t", state=State.CLOSED)
    added(ledger, 3, trigger_name="t")
    assert ledger.count_named("t") == 2 and ledger.count_named("u") == 0
    assert [request.id for request in ledger.open_requests()] == [f"{3:016x}"]


def test_terminal_lines_are_numbered_and_can_be_followed(ledger: SqliteLedger) -> None:
    request = ledger.commit(added(ledger), now=NOW, terminal=["one", "two"])
    ((first, _), (second, _)) = ledger.terminal(request.id)
    ledger.commit(request, now=NOW, terminal=["three"])
    assert [line for _, line in ledger.terminal(request.id, after=first)] == ["two", "three"]
    assert second > first


# --- slots ---------------------------------------------------------------------------------------------------------


def test_many_who_claim_at_once_get_no_more_slots_than_there_are(opened: Callable[[], SqliteLedger]) -> None:
    ledgers = [opened() for _ in range(4)]
    requests = [added(ledgers[0], number, state=State.ACCEPTED) for number in range(1, 13)]
    start = threading.Barrier(len(requests))
    claimed: list[Request | None] = []

    def claim(request: Request) -> None:
        start.wait()
        one = ledgers[request.sequence % 4]
        claimed.append(one.claim_slot(request, max_jobs=2, now=NOW, step=STEP, node="n", work="WORK1", nonce="x"))

    threads = [threading.Thread(target=claim, args=(request,)) for request in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    holders = [request for request in ledgers[0].open_requests() if request.holds_slot]
    assert len(claimed) == 12 and len([one for one in claimed if one]) == len(holders) == 2
    assert {request.state for request in holders} == {State.DISPATCHING}


def test_a_slot_that_is_given_back_can_be_claimed(ledger: SqliteLedger) -> None:
    first, second = added(ledger, 1, state=State.ACCEPTED), added(ledger, 2, state=State.ACCEPTED)
    held = ledger.claim_slot(first, max_jobs=1, now=NOW, step=STEP)
    assert held is not None and ledger.claim_slot(second, max_jobs=1, now=NOW, step=STEP) is None
    assert ledger.get(second.id) == second
    ledger.commit(held, now=NOW, to=State.ACCEPTED, holds_slot=False)
    assert ledger.claim_slot(second, max_jobs=1, now=NOW, step=STEP) is not None


def test_what_was_left_behind_is_remembered_until_it_is_gone(
    ledger: SqliteLedger, opened: Callable[[], SqliteLedger]
) -> None:
    first = LeftBehind("a", "WORK1", "x" * 32, NOW)
    second = LeftBehind("b", "WORK1", "y" * 32, NOW + timedelta(hours=1))
    for left in (second, first, replace(first, since=NOW + timedelta(days=1))):
        ledger.leave_behind(left)
    assert opened().left_behind() == [first, second]
    ledger.forget_left(first)
    assert opened().left_behind() == [second]


def test_a_node_gets_no_more_slots_than_it_may_have(ledger: SqliteLedger) -> None:
    requests = [added(ledger, number, state=State.ACCEPTED) for number in (1, 2, 3)]

    def claim(request: Request, node: str) -> Request | None:
        return ledger.claim_slot(
            request, max_jobs=9, max_on_node=1, now=NOW, step=STEP, node=node, work="WORK1", nonce="x"
        )

    assert claim(requests[0], "a") is not None
    assert claim(requests[1], "a") is None
    assert claim(requests[1], "b") is not None
    assert ledger.claim_slot(requests[2], max_jobs=9, now=NOW, step=STEP, node="a", work="W", nonce="x") is not None


def test_a_job_that_is_handed_over_takes_its_slot_with_it(ledger: SqliteLedger) -> None:
    maker = added(ledger, 1, state=State.WITHDRAWING, holds_slot=True, node="n", work="WORK1", nonce="x")
    heir = added(ledger, 2, state=State.ACCEPTED, not_before=NOW)
    ledger.hand_over_job(maker, heir, NOW)
    maker, heir = ledger.get(maker.id), ledger.get(heir.id)
    assert (maker.holds_slot, maker.work) == (False, "")
    assert (heir.state, heir.holds_slot, heir.node, heir.work, heir.nonce) == (State.STAGING, True, "n", "WORK1", "x")


def test_a_job_is_not_handed_to_somebody_who_went_on_meanwhile(ledger: SqliteLedger) -> None:
    maker = added(ledger, 1, state=State.WITHDRAWING, holds_slot=True, work="WORK1")
    heir = added(ledger, 2, state=State.ACCEPTED)
    ledger.commit(heir, now=NOW, to=State.WITHDRAWING)
    with pytest.raises(StaleRequestError):
        ledger.hand_over_job(maker, heir, NOW)
    assert ledger.get(maker.id) == maker, "the slot did not get lost"


# --- mails ---------------------------------------------------------------------------------------------------------


def test_a_mail_is_kept_byte_by_byte_and_once_under_its_message_id(ledger: SqliteLedger) -> None:
    request = added(ledger)
    ledger.enqueue(request.id, [a_mail()], NOW)
    ledger.enqueue(request.id, [replace(a_mail(), message=b"other", primary=("x@example.org",))], NOW)
    ledger.commit(request, now=NOW, mails=[replace(a_mail(), message=b"other")])
    (mail,) = ledger.unsent_mails()
    assert mail == ledger.mail(a_mail().message_id)
    assert (mail.message, mail.sender, mail.created_at) == (a_mail().message, a_mail().sender, NOW)
    assert [(one.address, one.primary) for one in mail.recipients] == [
        ("pi@example.org", True),
        ("aog@example.org", False),
    ]
    assert ledger.mail("<unknown@example.org>") is None


def test_the_state_is_kept_per_recipient(ledger: SqliteLedger) -> None:
    ledger.enqueue("", [a_mail(), a_mail(2)], NOW)
    mail = ledger.unsent_mails()[0]
    user, copy = mail.recipients
    sent = replace(user, state=RecipientState.ACCEPTED, attempts=1, text="250 ok")
    waiting = replace(copy, attempts=1, not_before=NOW, text="451", tried_since=NOW, unconfirmed=True)
    ledger.update_recipients(mail.id, [sent])
    ledger.update_recipients(mail.id, [waiting])
    after = ledger.mail(mail.message_id)
    assert after is not None and after.recipients == (sent, waiting) and after.accepted
    assert [one.id for one in ledger.unsent_mails()] == [mail.id, mail.id + 1]
    ledger.update_recipients(mail.id, [replace(waiting, state=RecipientState.DROPPED)])
    assert [one.id for one in ledger.unsent_mails()] == [mail.id + 1]


# --- staged data ---------------------------------------------------------------------------------------------------


def test_staged_data_are_recorded_with_their_files(ledger: SqliteLedger, opened: Callable[[], SqliteLedger]) -> None:
    request = added(ledger)
    ledger.commit(request, now=NOW, staging=a_staging(), files=FILES, absent=("uid://A002/X1/X9",))
    other = opened()
    assert other.stagings() == [a_staging()] and other.staging(TOKEN) == a_staging()
    assert other.staged_files(TOKEN) == ([FILES[1], FILES[0]], ["uid://A002/X1/X9"])
    changed = a_staging(notified_at=NOW, extension_days=3)
    other.update_staging(changed, NOW)
    assert ledger.staging(TOKEN) == changed
    assert ledger.staged_files(TOKEN) == ([FILES[1], FILES[0]], ["uid://A002/X1/X9"]), "its files stay"


def test_staged_data_are_listed_by_their_expiry_until_they_are_purged(ledger: SqliteLedger) -> None:
    late, soon = a_staging("a" * 32, extension_days=5), a_staging("b" * 32)
    for one in (late, soon):
        ledger.restore(None, one, (), ())
    assert ledger.stagings() == [soon, late]
    ledger.update_staging(replace(soon, withdrawn_at=NOW, purged_at=NOW), NOW)
    assert ledger.stagings() == [late]
    assert ledger.staging("b" * 32) is not None, "the token is known for ever"


def test_what_is_known_is_not_overwritten_by_a_restoration(ledger: SqliteLedger) -> None:
    request = added(ledger, state=State.ACCEPTED)
    ledger.commit(request, now=NOW, staging=a_staging(extension_days=4), files=FILES)
    ledger.restore(a_request(state=State.RECEIVED), a_staging(), (), ())
    assert ledger.get(request.id).state is State.ACCEPTED
    assert ledger.staging(TOKEN).extension_days == 4 and len(ledger.staged_files(TOKEN)[0]) == 2


# --- verification --------------------------------------------------------------------------------------------------

OTHER = "f" * 32
WEEK = timedelta(days=7)
PRODUCT, PAPER = FILES


def linked(
    ledger: SqliteLedger, number: int, token: str, files: tuple[ProductFile, ...] = FILES, **changes: object
) -> Request:
    """A request whose directory holds these files."""
    staging = a_staging(token, request=f"{number:016x}", **changes)
    return ledger.commit(added(ledger, number), now=NOW, staging=staging, files=files)


def test_what_was_never_read_is_due_first_then_what_was_begun_longest_ago(ledger: SqliteLedger) -> None:
    assert ledger.next_to_verify(NOW) is None and ledger.oldest_verification() == (0, None)
    linked(ledger, 1, TOKEN)
    assert ledger.oldest_verification() == (2, None)
    assert ledger.next_to_verify(NOW) == (TOKEN, PAPER)
    ledger.record_begun(PAPER, NOW)
    assert ledger.next_to_verify(NOW) == (TOKEN, PRODUCT), "what was interrupted waits for the others"
    ledger.record_begun(PRODUCT, NOW + timedelta(seconds=1))
    assert ledger.next_to_verify(NOW) == (TOKEN, PAPER)
    ledger.record_verified(PAPER, NOW + timedelta(seconds=2))
    assert ledger.next_to_verify(NOW) == (TOKEN, PRODUCT)
    ledger.record_verified(PRODUCT, NOW + timedelta(seconds=3))
    assert ledger.next_to_verify(NOW) is None
    assert ledger.oldest_verification() == (0, NOW + timedelta(seconds=2))
    assert ledger.next_to_verify(NOW + timedelta(seconds=3)) == (TOKEN, PAPER)
    assert ledger.next_to_verify(NOW + timedelta(seconds=2)) is None, "at that very moment it counts still"


def test_a_file_is_one_however_many_tokens_link_it(ledger: SqliteLedger, opened: Callable[[], SqliteLedger]) -> None:
    linked(ledger, 1, TOKEN, (PRODUCT,))
    linked(ledger, 2, OTHER, (replace(PRODUCT, name="b.tar"),))
    assert ledger.oldest_verification() == (1, None)
    ledger.record_verified(PRODUCT, NOW)
    assert opened().next_to_verify(NOW) is None
    linked(ledger, 3, "a" * 32, (PRODUCT,))
    assert ledger.next_to_verify(NOW) is None and ledger.oldest_verification() == (0, NOW)
    for changed in ({"inode": 7}, {"modified_ns": 7}, {"sha256": "77" * 32}, {"device": 7}):
        linked(ledger, 10 + len(ledger.requests()), f"{len(ledger.requests()):032x}", (replace(PRODUCT, **changed),))
    assert ledger.oldest_verification() == (4, NOW), "another inode, time, content or device is another file"


def test_what_is_out_of_reach_is_not_verified_and_forgotten_with_its_last_link(ledger: SqliteLedger) -> None:
    linked(ledger, 1, TOKEN, (PRODUCT,))
    linked(ledger, 2, OTHER, (PRODUCT,))
    ledger.record_verified(PRODUCT, NOW)
    for token, request in ((TOKEN, 1), (OTHER, 2)):
        assert ledger.oldest_verification() == (0, NOW)
        gone = a_staging(token, request=f"{request:016x}", withdrawn_at=NOW)
        ledger.update_staging(gone, NOW)
        ledger.update_staging(replace(gone, purged_at=NOW), NOW)
    assert ledger.oldest_verification() == (0, None)
    linked(ledger, 3, "a" * 32, (PRODUCT,))
    assert ledger.next_to_verify(NOW) is not None, "who gets the same numbers again is not verified by them"


def test_a_rotten_file_is_given_to_nobody_and_noted_in_every_request_that_holds_it(
    ledger: SqliteLedger, opened: Callable[[], SqliteLedger]
) -> None:
    first, second = linked(ledger, 1, TOKEN, extension_days=1), linked(ledger, 2, OTHER)
    third = linked(ledger, 3, "a" * 32, (replace(PRODUCT, inode=7), PAPER))
    step = Step("scrub", "as recorded?", "it is rotten", "never linked again")
    assert ledger.record_rotten(PRODUCT, "", "why", step, NOW)
    assert not ledger.record_rotten(PRODUCT, "", "again", step, NOW), "once for all"
    other = opened()
    for request, token in ((first, TOKEN), (second, OTHER)):
        assert other.staged_files(token)[0] == []
        assert [one.step for one in other.steps(request.id)].count(step) == 1
        assert other.get(request.id) == replace(request, reason="it is rotten")
    assert len(other.staged_files("a" * 32)[0]) == 2 and other.get(third.id) == third
    found = other.holders(PRODUCT)
    assert [staging.token for staging, _, _ in found] == [OTHER, TOKEN], "by their expiry"
    assert [request and request.id for _, _, request in found] == [second.id, first.id]
    assert other.untold_rotten() == [(PRODUCT, "", "why", NOW)]
    # Who linked it in the same moment holds it too; what else was read is due all the same.
    linked(ledger, 4, "b" * 32)
    assert ledger.staged_files("b" * 32)[0] == []
    ledger.record_verified(PAPER, NOW)
    assert ledger.next_to_verify(NOW) == ("a" * 32, replace(PRODUCT, inode=7))


def test_what_is_rotten_in_one_directory_is_good_in_the_others(ledger: SqliteLedger) -> None:
    first, second = linked(ledger, 1, TOKEN), linked(ledger, 2, OTHER)
    assert ledger.record_rotten(PRODUCT, TOKEN, "gone", STEP, NOW)
    assert ledger.staged_files(TOKEN)[0] == [] and len(ledger.staged_files(OTHER)[0]) == 2
    assert [request and request.id for _, _, request in ledger.holders(PRODUCT, TOKEN)] == [first.id]
    assert len(ledger.steps(second.id)) == 1
    ledger.record_verified(PAPER, NOW)
    assert ledger.next_to_verify(NOW) == (OTHER, PRODUCT)
    assert ledger.untold_rotten() == [(PRODUCT, TOKEN, "gone", NOW)]
    assert ledger.record_rotten(PRODUCT, "", "flipped", STEP, NOW), "and may rot as a whole later"


def test_rot_is_told_together_with_its_mail_or_not_at_all(ledger: SqliteLedger) -> None:
    linked(ledger, 1, TOKEN)
    for file in FILES:
        ledger.record_rotten(file, "", "why", STEP, NOW)
    assert ledger.last_told() is None and len(ledger.untold_rotten()) == 2
    with pytest.raises(FatalError):
        ledger.tell_rotten([(PAPER, object())], a_mail(), NOW)
    assert len(ledger.untold_rotten()) == 2 and ledger.unsent_mails() == []
    ledger.tell_rotten([(PAPER, "")], a_mail(), NOW)
    assert [file for file, *_ in ledger.untold_rotten()] == [PRODUCT]
    assert ledger.last_told() == NOW and len(ledger.unsent_mails()) == 1


def test_a_file_of_a_directory_without_request_can_rot_too(ledger: SqliteLedger) -> None:
    ledger.restore(None, a_staging(), FILES, ())
    assert ledger.record_rotten(PRODUCT, "", "why", STEP, NOW)
    assert [request for _, _, request in ledger.holders(PRODUCT)] == [None]


# --- the rest ------------------------------------------------------------------------------------------------------


def test_settings_and_the_newest_time(ledger: SqliteLedger, opened: Callable[[], SqliteLedger]) -> None:
    assert ledger.setting("held") == "" and ledger.newest_time() is None
    ledger.set_setting("held", "since")
    ledger.set_setting("held", "until")
    ledger.note("", STEP, NOW)
    ledger.note("", STEP, NOW - timedelta(days=1))
    assert opened().setting("held") == "until" and opened().newest_time() == NOW
    assert [one.step for one in ledger.steps("")] == [STEP, STEP]


def test_times_of_other_zones_are_kept_as_the_same_moment(ledger: SqliteLedger) -> None:
    from datetime import timezone

    request = added(ledger, received_at=NOW.astimezone(timezone(timedelta(hours=5))))
    assert ledger.get(request.id).received_at == NOW and ledger.get(request.id).received_at.tzinfo == UTC


def test_threads_of_one_process_share_a_ledger(ledger: SqliteLedger) -> None:
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for step in range(20):
                added(ledger, number * 1000 + step)
                ledger.note("", STEP, NOW)
                ledger.open_requests()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and [one.sequence for one in ledger.requests()] == list(range(1, 121))


# --- the file and its sidecars -------------------------------------------------------------------------------------


def test_the_files_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    ledger = SqliteLedger(tmp_path / "state")
    ledger.restore(None, a_staging(), (), ())
    modes = {path.name: path.stat().st_mode & 0o077 for path in (tmp_path / "state").rglob("*")}
    ledger.close()
    assert set(modes.values()) == {0}, modes


def test_a_locked_database_is_trouble_that_passes(tmp_path: Path) -> None:
    ledger = SqliteLedger(tmp_path, timeout_s=0.05)
    other = sqlite3.connect(tmp_path / "stagecal.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(TransientError, match="cannot be used now"):
        ledger.add(a_request(), STEP)
    assert ledger.requests() == [], "reading goes on"
    other.execute("ROLLBACK")
    assert ledger.add(a_request(), STEP) is not None
    other.close()
    ledger.close()


@pytest.mark.parametrize("damage", ["no database", "middle overwritten", "another version", "gone", "empty"])
def test_a_ledger_that_cannot_be_trusted_is_fatal_and_says_what_to_do(tmp_path: Path, damage: str) -> None:
    ledger = SqliteLedger(tmp_path)
    for number in range(200):
        added(ledger, number)
    ledger.close()
    path = tmp_path / "stagecal.db"
    if damage == "no database":
        path.write_bytes(b"this is text " * 1000)
    elif damage == "middle overwritten":
        content = bytearray(path.read_bytes())
        content[4096:] = b"\xaa" * (len(content) - 4096)
        path.write_bytes(bytes(content))
    elif damage == "another version":
        with sqlite3.connect(path) as database:
            database.execute("PRAGMA user_version = 99")
        database.close()
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"")
    with pytest.raises(FatalError, match=r"rebuild|version"):
        opened = SqliteLedger(tmp_path)
        opened.requests()
    if damage in ("gone", "empty"):
        made = SqliteLedger(tmp_path, anew=True)
        assert made.requests() == []
        made.close()


FORMER = ["DROP TABLE verifications", "DROP TABLE rotten", "DROP INDEX files_by_inode", "DROP TABLE left_behind"]
FORMER += [f"ALTER TABLE requests DROP COLUMN {name}" for name in ("engine", "casa_home", "leased_until")]


def made_former(path: Path) -> None:
    """Make a ledger what version 1 of it was."""
    database = sqlite3.connect(path / "stagecal.db", isolation_level=None)
    for statement in [*FORMER, "PRAGMA user_version = 1"]:
        database.execute(statement)
    database.close()


def schema(path: Path) -> set[tuple[str, str, str]]:
    """Return the kinds and names of what there is in a database, and the names of the columns."""
    database = sqlite3.connect(path / "stagecal.db")
    found = set(database.execute("SELECT 'column', m.name, c.name FROM sqlite_master m, pragma_table_info(m.name) c"))
    found |= set(database.execute("SELECT type, name, '' FROM sqlite_master WHERE name NOT LIKE 'sqlite%'"))
    database.close()
    return found


def test_a_ledger_of_the_former_version_is_brought_up_to_date_and_loses_nothing(tmp_path: Path) -> None:
    ledger = SqliteLedger(tmp_path / "state")
    request = ledger.commit(added(ledger), now=NOW, staging=a_staging(), files=FILES, mails=[a_mail()])
    whole = schema(tmp_path / "state")
    ledger.close()
    made_former(tmp_path / "state")
    assert schema(tmp_path / "state") < whole
    for _ in range(2):
        opened = SqliteLedger(tmp_path / "state")
        assert schema(tmp_path / "state") == whole
        assert opened.get(request.id) == request and opened.stagings() == [a_staging()]
        assert len(opened.staged_files(TOKEN)[0]) == 2 and len(opened.unsent_mails()) == 1
        assert opened.oldest_verification() == (2, None), "nothing of it was verified yet"
        opened.close()


def test_a_migration_happens_whole_or_not_at_all(tmp_path: Path) -> None:
    SqliteLedger(tmp_path / "state").close()
    made_former(tmp_path / "state")
    with sqlite3.connect(tmp_path / "state" / "stagecal.db") as database:
        database.execute("CREATE TABLE rotten (in_the_way)")
    database.close()
    before = schema(tmp_path / "state")
    with pytest.raises(TransientError, match="rotten already exists"):
        SqliteLedger(tmp_path / "state")
    assert schema(tmp_path / "state") == before


def test_a_sidecar_of_the_former_version_can_be_read(ledger: SqliteLedger, tmp_path: Path) -> None:
    request = ledger.commit(added(ledger), now=NOW, staging=a_staging(), files=FILES)
    path = tmp_path / "state" / "staged" / f"{TOKEN}.json"
    content = json.loads(path.read_text())
    for name in ("engine", "casa_home", "leased_until"):
        del content["request"][name]
    path.write_text(json.dumps(content))
    assert list(ledger.sidecars()) == [(a_staging(), request)]


def test_a_death_at_the_very_first_start_is_no_loss(tmp_path: Path) -> None:
    (tmp_path / "stagecal.db").touch()
    ledger = SqliteLedger(tmp_path)
    assert ledger.requests() == []
    ledger.close()


def test_sidecars_repeat_the_ledger_and_go_with_the_data(ledger: SqliteLedger) -> None:
    request = added(ledger)
    changed = ledger.commit(request, now=NOW, staging=a_staging(), files=FILES)
    assert list(ledger.sidecars()) == [(a_staging(), changed)]
    longer = a_staging(extension_days=9)
    ledger.update_staging(longer, NOW)
    assert list(ledger.sidecars()) == [(longer, changed)]
    ledger.update_staging(replace(longer, withdrawn_at=NOW, purged_at=NOW), NOW)
    assert list(ledger.sidecars()) == []


@pytest.mark.parametrize("damage", ["missing", "older", "half", "of purged data"])
def test_sidecars_are_mended_after_a_death_between_record_and_sidecar(
    ledger: SqliteLedger, tmp_path: Path, damage: str
) -> None:
    request = ledger.commit(added(ledger), now=NOW, staging=a_staging(), files=FILES)
    path = tmp_path / "state" / "staged" / f"{TOKEN}.json"
    before = path.read_text()
    current = a_staging(notified_at=NOW + timedelta(days=2))
    if damage == "of purged data":
        current = replace(current, withdrawn_at=NOW, purged_at=NOW)
    ledger.update_staging(current, NOW)
    if damage == "missing":
        path.unlink()
    else:
        path.write_text(before[: len(before) // 2] if damage == "half" else before)
    ledger.mend_sidecars()
    assert list(ledger.sidecars()) == ([] if damage == "of purged data" else [(current, request)])


@pytest.mark.parametrize("when", ["at once", "after a death"])
def test_a_sidecar_says_that_nothing_may_be_linked_from_rot(ledger: SqliteLedger, tmp_path: Path, when: str) -> None:
    request = ledger.commit(added(ledger), now=NOW, staging=a_staging(), files=FILES)
    path = tmp_path / "state" / "staged" / f"{TOKEN}.json"
    before = path.read_text()
    ledger.record_rotten(FILES[0], "", "why", STEP, NOW)
    if when == "after a death":
        path.write_text(before)
        ledger.mend_sidecars()
    ((staging, found),) = ledger.sidecars()
    assert staging == a_staging(recipe="")
    assert found == replace(request, reason=STEP.seen)
    assert ledger.staging(TOKEN) == a_staging(), "the ledger itself forgets nothing"


def test_drafts_of_sidecars_go_with_the_data(ledger: SqliteLedger, tmp_path: Path) -> None:
    ledger.restore(None, a_staging(), (), ())
    left = tmp_path / "state" / "staged" / f"{TOKEN}.0123abcd.part"
    left.write_text("half")
    ledger.update_staging(a_staging(withdrawn_at=NOW, purged_at=NOW), NOW)
    assert list(left.parent.iterdir()) == []


def test_a_damaged_sidecar_names_its_file(ledger: SqliteLedger, tmp_path: Path) -> None:
    ledger.restore(None, a_staging(), (), ())
    (tmp_path / "state" / "staged" / f"{TOKEN}.json").write_text("{}")
    with pytest.raises(FatalError, match=r"staged/.*\.json cannot be read"):
        list(ledger.sidecars())
