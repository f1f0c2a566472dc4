"""From the trigger directory to requests: each look compares the listing, which is the truth, with the ledger.

A complete trigger becomes a request once. An incomplete one is looked at again. One that can never become a request is
moved aside with a reason, and told. A trigger that somebody removed withdraws its request.
"""

from __future__ import annotations

import hashlib
import logging
import re
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from stagecal.domain.identifiers import Malformed, contact_is_known, parse_address
from stagecal.domain.records import Step
from stagecal.domain.requests import WITHDRAWABLE, Origin, Request, State, request_id
from stagecal.domain.trigger import Incomplete, Trigger, decoded, is_terminated, parse, parse_trigger_name
from stagecal.ports import DirectoryIdentity, FatalError, Listing, StaleRequestError, TransientError, TriggerEntry
from stagecal.services.alarms import alarm_mail
from stagecal.services.context import Site
from stagecal.services.notifying import malformed_mail

log = logging.getLogger(__name__)

_SETTLE = timedelta(seconds=30)
_VANISHED = timedelta(seconds=1)
_CONTACT_LINE = re.compile(r"EU ARC contact (\S+)")


@dataclass
class Receiver:
    """The memory between looks: since when each unfinished file has had its present content."""

    site: Site
    unfinished: dict[tuple[str, str], datetime] = field(default_factory=dict)

    def look(self, now: datetime) -> tuple[int, datetime | None]:
        """Look once; return how many requests are new and when an unfinished file is to be looked at again.

        Raises TransientError if the directory cannot be listed: then nothing is concluded from it.
        """
        # The ledger is read first: a trigger that goes away with its request in between must not look like a new one.
        opened = {request.trigger_name: request for request in self.site.ledger.open_requests() if request.trigger_name}
        listing = self.site.triggers.look()
        new, again, unfinished = 0, [], {}
        for entry in sorted(listing.entries, key=_age):
            try:
                received, since = self._take(entry, opened, listing.directory, now)
            except (TransientError, FatalError) as trouble:
                # One entry that cannot be dealt with must not keep the others waiting.
                log.error("trigger %r: %s", entry.name, trouble)
                what = "a trigger cannot be dealt with"
                alarm = alarm_mail(self.site, what, f"{shown(entry.name)}: {trouble}", now, about=shown(entry.name))
                self.site.ledger.enqueue("", [alarm], now)
                continue
            new += received
            if since is not None:
                unfinished[(entry.name, _digest(entry))] = since
                again.append(min(since + self._limit, max(since + self._settle, now + timedelta(seconds=1))))
        self.unfinished = unfinished
        self._missing(listing, opened, now)
        return new, min(again, default=None)

    def _take(
        self, entry: TriggerEntry, opened: dict[str, Request], directory: DirectoryIdentity, now: datetime
    ) -> tuple[int, datetime | None]:
        """Deal with one entry; return whether it is a new request, and since when it is unfinished if it is."""
        digest = _digest(entry)
        request = opened.get(entry.name)
        if request is not None:
            self._seen(request, digest, directory, now)
            return 0, None
        since = self.unfinished.get((entry.name, digest), now)
        try:
            trigger = self._read(entry)
        except Malformed as reason:
            self._reject(entry, digest, str(reason), now)
            return 0, None
        except Incomplete as reason:
            if now - since < self._limit:
                return 0, since
            self._reject(entry, digest, f"{reason}, and the file has not changed for {self._limit}", now)
            return 0, None
        if not is_terminated(decoded(entry.content)) and now - since < self._settle:
            return 0, since
        return self._receive(entry, digest, trigger, directory, now), None

    @property
    def _limit(self) -> timedelta:
        return timedelta(seconds=self.site.config.triggers.incomplete_after_s)

    @property
    def _settle(self) -> timedelta:
        return min(_SETTLE, timedelta(seconds=self.site.config.triggers.scan_interval_s))

    def _read(self, entry: TriggerEntry) -> Trigger:
        if entry.problem:
            raise Malformed(entry.problem)
        mous, _ = parse_trigger_name(entry.name)
        text = decoded(entry.content)
        trigger = parse(text)
        if trigger.mous != mous:
            raise Malformed(f"the file's name says MOUS {mous}, its text {trigger.mous}")
        mail = self.site.config.mail
        if not contact_is_known(trigger.contact, mail.contact_domains, mail.contacts):
            raise Malformed(f"the EU ARC contact {trigger.contact} is not among the known contacts")
        return trigger

    def _receive(
        self, entry: TriggerEntry, digest: str, trigger: Trigger, directory: DirectoryIdentity, now: datetime
    ) -> int:
        request = self._request(entry, digest, trigger, directory, now)
        added = self.site.ledger.add(
            request, Step("receive", "is it complete and well-formed?", entry.name, "RECEIVED")
        )
        if added is not None:
            log.info("request %s: %s", request.id, entry.name)
        return int(added is not None)

    def requests_waiting(self, now: datetime) -> list[Request]:
        """Return the requests that the complete triggers ask for, without recording any: for a lost ledger."""
        listing = self.site.triggers.look()
        requests = []
        for entry in listing.entries:
            with suppress(Malformed, Incomplete):
                trigger = self._read(entry)
                digest = _digest(entry)
                requests.append(self._request(entry, digest, trigger, listing.directory, now))
        return requests

    def _request(
        self, entry: TriggerEntry, digest: str, trigger: Trigger, directory: DirectoryIdentity, now: datetime
    ) -> Request:
        # The same name and content once more, after its request ended, is a new request of its own.
        before = self.site.ledger.count_named(entry.name)
        return Request(
            id=request_id(entry.name, digest, str(before)),
            sequence=0,
            origin=Origin.TRIGGER,
            mous=trigger.mous,
            project=trigger.project,
            ticket=trigger.ticket,
            user=trigger.user,
            email=trigger.email,
            calfields=trigger.calfields,
            contact=trigger.contact,
            trigger_name=entry.name,
            trigger_text=decoded(entry.content),
            trigger_sha256=digest,
            received_at=now,
            state=State.RECEIVED,
            since=now,
            seen_in=_identity(directory),
        )

    def _seen(self, request: Request, digest: str, directory: DirectoryIdentity, now: datetime) -> None:
        place = _identity(directory)
        if request.seen_in != place or request.missing_since is not None:
            with suppress(StaleRequestError):
                self.site.ledger.commit(request, now=now, seen_in=place, missing_since=None)
        if digest != request.trigger_sha256:
            log.warning("request %s: its trigger was changed; the request goes on as received", request.id)

    def _reject(self, entry: TriggerEntry, digest: str, reason: str, now: datetime) -> None:
        text = entry.content.decode("utf-8", "replace")
        mail = malformed_mail(
            self.site, shown(entry.name), digest, reason, shown(text, lines=True), self._known_contact(text), now
        )
        # The mail first: its Message-ID is the same if we die in between and come here again.
        self.site.ledger.enqueue("", [mail], now)
        moved = self.site.triggers.quarantine(entry.name, reason)
        self.site.ledger.note("", Step("receive", shown(entry.name), reason, f"rejected/{moved}"), now)
        log.warning("trigger %r rejected: %s", entry.name, reason)

    def _known_contact(self, text: str) -> str:
        match = _CONTACT_LINE.search(text)
        try:
            contact = parse_address(match[1]) if match else ""
        except Malformed:
            return ""
        mail = self.site.config.mail
        return contact if contact and contact_is_known(contact, mail.contact_domains, mail.contacts) else ""

    def _missing(self, listing: Listing, opened: dict[str, Request], now: datetime) -> None:
        """Withdraw requests whose trigger somebody removed from the very directory in which it was seen."""
        there = {entry.name for entry in listing.entries}
        for name, request in opened.items():
            if name in there or request.state not in WITHDRAWABLE or request.wish or request.state is State.WITHDRAWING:
                continue
            if request.seen_in != _identity(listing.directory):
                continue
            if request.missing_since is None:
                with suppress(StaleRequestError):
                    self.site.ledger.commit(request, now=now, missing_since=now)
            elif now - request.missing_since >= _VANISHED:
                self.site.ledger.note(request.id, Step("receive", "is the trigger there?", "no, removed by hand"), now)
                self.site.ledger.set_wish(request.id, "withdraw", now)

    def watched_for(self) -> bool:
        """Return whether a trigger was missing at the last look, so that the next look should come soon."""
        return any(request.missing_since is not None for request in self.site.ledger.open_requests())


def _age(entry: TriggerEntry) -> tuple[str, str]:
    """Return what orders the triggers of one look: first come, first served, by the time in their names."""
    return entry.name[-len("YYYY-MM-DDThh-mm-ss.txt") :], entry.name


def _digest(entry: TriggerEntry) -> str:
    return hashlib.sha256(entry.content).hexdigest()


def shown(text: str, *, lines: bool = False) -> str:
    """Return hostile text as it may stand in a mail, a record or a log: what cannot be printed is replaced."""
    return "".join(
        character if character.isprintable() or (lines and character == "\n") else "\N{REPLACEMENT CHARACTER}"
        for character in text.replace("\r\n", "\n")
    )


def _identity(directory: DirectoryIdentity) -> str:
    return f"{directory.device}:{directory.inode}"
