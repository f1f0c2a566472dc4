"""Rounds of work: what one waits for, and what it does not."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

from stagecal.ports import MailReply, RecipientResult
from stagecal.services.alarms import alarm_mail
from stagecal.services.rounds import Rounds
from tests.sites import make_test_site


@dataclass
class SilentMailer:
    """A mail server that says nothing until it is let go."""

    asked: threading.Event
    let_go: threading.Event

    def send(self, sender: str, recipients: Sequence[str], message: bytes) -> Mapping[str, RecipientResult]:
        self.asked.set()
        self.let_go.wait(20)
        return {one: RecipientResult(MailReply.ACCEPTED) for one in recipients}


def test_a_silent_mail_server_keeps_the_loop_from_nothing_and_does_not_make_it_spin(tmp_path: Path) -> None:
    made = make_test_site(tmp_path)
    mailer = SilentMailer(threading.Event(), threading.Event())
    site = replace(made.site, mailer=mailer)
    now = made.clock.now()
    site.ledger.enqueue("", [alarm_mail(site, "a test", "of the loop", now)], now)
    with ThreadPoolExecutor(2) as executor:
        rounds = Rounds(site, executor=executor, next_mail_at=now - timedelta(minutes=1))
        try:
            rounds.run()
            assert mailer.asked.wait(10)
            assert rounds.run().next_at is None
        finally:
            mailer.let_go.set()
    assert site.ledger.unsent_mails() == []
