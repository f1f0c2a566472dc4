"""How a mail of the service is made, and the alarms to its operators, which any service may have to send.

Pure but for the templates, which raise FatalError if one is broken. Nothing is sent here: the outbox does that.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from stagecal.domain.mails import Mail, compose, message_id
from stagecal.domain.records import MailKind, NewMail
from stagecal.services.context import Site


def new_mail(
    site: Site,
    kind: MailKind,
    identity: str,
    *,
    subject: str,
    body: str,
    to: Sequence[str],
    now: datetime,
    cc: Sequence[str] = (),
    bcc: Sequence[str] = (),
    reply_to: str = "",
    in_reply_to: str = "",
    is_reply: bool = False,
) -> NewMail:
    """Return a mail as the outbox takes it; who is in `bcc` stands in the envelope only."""
    settings = site.config.mail
    mail = Mail(
        kind=kind,
        subject=subject,
        sender=settings.sender,
        to=tuple(to),
        cc=tuple(cc),
        bcc=tuple(bcc),
        reply_to=reply_to,
        in_reply_to=in_reply_to,
        auto_submitted="auto-replied" if is_reply else "auto-generated",
        message_id=message_id(kind, identity, settings.message_id_domain),
        body=body,
    )
    first = {address.casefold() for address in to}
    return NewMail(
        kind=kind,
        message_id=mail.message_id,
        sender=settings.envelope_sender or settings.sender,
        primary=tuple(to),
        copies=tuple(address for address in mail.recipients if address.casefold() not in first),
        message=compose(mail, now),
    )


def alarm_mail(site: Site, what: str, text: str, now: datetime, *, about: str = "") -> NewMail:
    """Return an alarm for the operators, at most one of a kind and `about` the same thing per day."""
    return new_mail(
        site,
        MailKind.ALARM,
        f"{what}/{about}/{now:%Y-%m-%d}",
        subject=f"stagecal: {what}",
        body=site.templates.render("mails/alarm.txt", what=what, text=text),
        to=[site.config.mail.maintainer],
        cc=[site.config.mail.aog],
        now=now,
    )
