"""Whose turn it is: the order within a user and between users, and who waits for whose products."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from stagecal.domain.requests import Origin, Request, State
from stagecal.domain.turns import Turns, turns

NOW = datetime(2031, 1, 2, 3, tzinfo=UTC)


def request(sequence: int, email: str = "", state: State = State.ACCEPTED, **more: object) -> Request:
    values = {
        "id": f"r{sequence:02d}",
        "sequence": sequence,
        "origin": Origin.TRIGGER,
        "mous": "uid://A001/X1/X1",
        "project": "2017.1.00001.S",
        "ticket": "1",
        "user": "",
        "email": email,
        "calfields": (),
        "contact": "",
        "trigger_name": "",
        "trigger_text": "",
        "trigger_sha256": "",
        "received_at": NOW,
        "state": state,
        "since": NOW,
        "recipe": f"recipe {sequence}",
        "holds_slot": state is State.STAGING,
    }
    return Request(**{**values, **more})  # type: ignore[arg-type]  # The names above are those of Request.


def order(*requests: Request, max_jobs: int = 2) -> Turns:
    return turns(requests, max_jobs=max_jobs, held=False, now=NOW)


def test_one_user_is_served_in_the_order_of_the_requests() -> None:
    assert order(*(request(number, "a@x.org") for number in (3, 1, 2))).queue == ("r01", "r02", "r03")


def test_different_users_are_served_in_the_order_of_their_requests() -> None:
    assert order(request(1, "a@x.org"), request(2, "b@x.org"), request(3, "c@x.org")).queue == ("r01", "r02", "r03")


def test_who_asks_for_one_mous_need_not_wait_for_somebodys_twentieth() -> None:
    many = [request(number, "many@x.org") for number in range(1, 21)]
    queue = order(*many, request(21, "one@x.org")).queue
    assert queue[:3] == ("r01", "r21", "r02")


def test_who_has_jobs_alive_comes_after_who_has_none() -> None:
    alive = request(1, "a@x.org", State.STAGING)
    found = order(alive, request(2, "A@X.org"), request(3, "b@x.org"))
    assert found.queue == ("r03", "r02")
    assert found.free_slots == 1
    assert found.may_start("r03")
    assert not found.may_start("r02")
    assert found.place("r02") == 2


def test_what_rests_after_trouble_keeps_nobody_waiting() -> None:
    resting = request(1, "a@x.org", not_before=NOW + timedelta(hours=1))
    assert order(resting, request(2, "a@x.org")).queue == ("r02",)


def test_who_needs_the_same_products_waits_for_their_maker() -> None:
    maker = request(1, "a@x.org", State.STAGING, recipe="same")
    found = order(maker, request(2, "b@x.org", recipe="same"), request(3, "c@x.org"))
    assert found.makers == {"r02": "r01"}
    assert found.queue == ("r03",)


@given(st.lists(st.sampled_from("abc"), max_size=30), st.lists(st.sampled_from("abc"), max_size=4))
def test_nobody_is_passed_over_and_no_user_gets_ahead(waiting: list[str], running: list[str]) -> None:
    alive = [request(number, user, State.STAGING) for number, user in enumerate(running, 1)]
    queue = [request(number, user) for number, user in enumerate(waiting, 50)]
    found = order(*alive, *queue).queue
    assert sorted(found) == [one.id for one in queue]
    users = {one.id: one.email for one in queue}
    had = {user: running.count(user) for user in "abc"}
    for place, name in enumerate(found):
        # Whoever still waits has at least as much already as the one who is served now.
        assert all(had[users[name]] <= had[users[later]] for later in found[place:])
        had[users[name]] += 1
    for user in "abc":
        own = [name for name in found if users[name] == user]
        assert own == sorted(own)
