"""Composing mails: the same values come back, the same bytes leave, nothing forges a header."""

from __future__ import annotations

import dataclasses
import email
import re
from datetime import UTC, datetime
from email.header import decode_header, make_header
from email.message import EmailMessage
from email.policy import compat32, default
from email.utils import getaddresses
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stagecal.domain.mails import (
    Mail,
    compose,
    is_address,
    message_fault,
    message_id,
    quoted,
    split_mailbox,
)

DATE = datetime(2024, 2, 29, 12, 30, 5, tzinfo=UTC)
NAMES = (
    "Süß",
    "李",
    "O'Brien",
    "Doe, J.",
    "Judit Szulagyi",
    'Jo "Joe" \\ Smith',
    "A <b@c.org>",
    "🔭 Ω",
    "=?utf-8?q?x?=",
)


def a_mail(**changes: Any) -> Mail:
    mail = Mail(
        kind="delivered",
        subject="ALMA data",
        sender="alma@arc.example.org",
        to=("user@example.org",),
        auto_submitted="auto-generated",
        message_id=message_id("delivered", "trigger-1", "arc.example.org"),
        body="Dear user,\n\nhttps://example.org/preview/0123456789abcdef0123456789abcdef/\n",
    )
    return dataclasses.replace(mail, **changes)


def parsed(mail: Mail) -> EmailMessage:
    message = email.message_from_bytes(compose(mail, DATE), policy=default)
    assert isinstance(message, EmailMessage)
    assert not message.defects
    return message


def body_of(mail: Mail) -> str:
    return str(parsed(mail).get_content()).replace("\r\n", "\n")


def names_in(raw: bytes, header: str) -> list[tuple[str, str]]:
    """Names and addresses as RFC 2047 reads them.

    Python's newer parser puts blanks between the encoded words of one name, which the standard forbids.
    """
    value = " ".join(str(email.message_from_bytes(raw, policy=compat32)[header]).split("\r\n "))
    return [(str(make_header(decode_header(name))), address) for name, address in getaddresses([value])]


def header_lines(raw: bytes) -> list[bytes]:
    return raw.partition(b"\r\n\r\n")[0].split(b"\r\n")


def test_message_id_is_deterministic_and_differs_by_kind_and_identity() -> None:
    first = message_id("request", "trigger-a", "arc.example.org")
    assert first == message_id("request", "trigger-a", "arc.example.org")
    assert re.fullmatch(r"<request\.[0-9a-f]{32}@arc\.example\.org>", first)
    others = {message_id("delivered", "trigger-a", "x.org"), message_id("request", "trigger-b", "x.org"), first}
    assert len(others) == 3


def test_message_id_is_the_documented_digest() -> None:
    # printf 'request\nID' | sha256sum
    assert message_id("request", "ID", "x.org") == "<request.51fa962c373719553b291c738ea713cd@x.org>"


@pytest.mark.parametrize(("kind", "domain"), [("a b", "x.org"), ("a", "x.org>\r\nBcc: y"), ("a", ""), ("<", "x.org")])
def test_message_id_refuses_what_would_break_it(kind: str, domain: str) -> None:
    with pytest.raises(ValueError, match="Message-ID"):
        message_id(kind, "ID", domain)


def test_recipients_are_each_once_in_order_whatever_their_case() -> None:
    mail = a_mail(to=("Süß <B@x.org>",), cc=("a@x.org", "b@X.org"), bcc=("c@x.org", "A@x.org"))
    assert mail.recipients == ("B@x.org", "a@x.org", "c@x.org")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a@x.org", ("", "a@x.org")),
        ("Doe, J. <a@x.org>", ("Doe, J.", "a@x.org")),
        ("A <b@c.org> <a@x.org>", ("A <b@c.org>", "a@x.org")),
        ("<a@x.org>", ("", "a@x.org")),
    ],
)
def test_mailboxes_split_into_name_and_address(text: str, expected: tuple[str, str]) -> None:
    assert split_mailbox(text) == expected


@pytest.mark.parametrize("text", ["a@x.org", "-f@x.org", "o'brien+alma@x-y.org", "A.B@localhost"])
def test_plain_addresses_are_addresses(text: str) -> None:
    assert is_address(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "a@",
        "@x.org",
        "a@b@c",
        "a b@x.org",
        "a@x.org\r\nRCPT TO:<e@x.org>",
        "a@x.org\n",
        "a\0@x.org",
        "a@x.org>",
        "<a@x.org",
        "a@x.org,b@x.org",
        '"a b"@x.org',
        "jü@x.org",
        "a@ü.org",
        "a@-x.org",
        "x" * 250 + "@x.org",
    ],
)
def test_everything_else_is_no_address(text: str) -> None:
    assert not is_address(text)


def test_every_header_of_the_convention_is_there_and_bcc_is_not() -> None:
    request = message_id("request", "trigger-1", "arc.example.org")
    message = parsed(
        a_mail(
            cc=("c@x.org", "d@x.org"),
            bcc=("secret@x.org",),
            reply_to="reply@x.org",
            in_reply_to=request,
            auto_submitted="auto-replied",
        )
    )
    assert {name: str(value) for name, value in message.items()} == {
        "From": "alma@arc.example.org",
        "To": "user@example.org",
        "Cc": "c@x.org, d@x.org",
        "Reply-To": "reply@x.org",
        "Subject": "ALMA data",
        "Date": "Thu, 29 Feb 2024 12:30:05 +0000",
        "Message-ID": message_id("delivered", "trigger-1", "arc.example.org"),
        "In-Reply-To": request,
        "References": request,
        "Auto-Submitted": "auto-replied",
        "X-Auto-Response-Suppress": "All",
        "Content-Language": "en",
        "MIME-Version": "1.0",
        "Content-Type": 'text/plain; charset="utf-8"',
        "Content-Transfer-Encoding": "7bit",
    }
    assert b"secret" not in compose(a_mail(bcc=("secret@x.org",)), DATE)


def test_absent_values_make_no_headers() -> None:
    message = parsed(a_mail())
    assert not {"Cc", "Bcc", "Reply-To", "In-Reply-To", "References"} & set(message.keys())


def test_same_mail_gives_the_same_bytes() -> None:
    mail = a_mail(subject="Süß", to=("李 <a@x.org>",), body="Süß\n")
    assert compose(mail, DATE) == compose(dataclasses.replace(mail), DATE)


def test_long_message_ids_stay_as_they_are() -> None:
    long = message_id("request", "x", "a-very-long-host-name." * 9 + "example.org")
    raw = compose(a_mail(message_id=long, in_reply_to=long), DATE)
    for header in (b"Message-ID", b"In-Reply-To", b"References"):
        assert header + b": " + long.encode() in header_lines(raw)


def test_headers_are_folded_at_blanks_within_78_characters() -> None:
    raw = compose(a_mail(subject="many short words " * 30 + "end", to=("Some Name <user@example.org>",) * 9), DATE)
    assert max(map(len, header_lines(raw))) <= 78
    assert all(line.strip() and not line.endswith(b":") for line in header_lines(raw))


@given(
    st.lists(st.sampled_from(NAMES) | st.text(min_size=1, max_size=200), min_size=1, max_size=4),
    st.text(max_size=200),
    st.text(max_size=300),
)
@example(list(NAMES), "Re: Süß 李", "Dear Süß 李 O'Brien 🔭,\n.\n..\nFrom here\n")
@example(["two  blanks", "x"], "  blanks   everywhere ", "  \n \n")
@example(["x" * 200, "李" * 200, "ab " * 60, "🔭" * 100], "y" * 2000, "z" * 3000)
def test_composed_values_come_back(names: list[str], subject: str, body: str) -> None:
    def header_text(text: str) -> str:
        return "".join(character for character in text if not re.match(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", character))

    names = [header_text(name).strip() or "x" for name in names]
    subject = header_text(subject)
    mail = a_mail(
        to=tuple(f"{name} <user{number}@example.org>" for number, name in enumerate(names)), subject=subject, body=body
    )
    raw = compose(mail, DATE)
    message = parsed(mail)
    assert message_fault(raw) == ""
    assert names_in(raw, "To") == [(name, f"user{number}@example.org") for number, name in enumerate(names)]
    assert tuple(address.addr_spec for address in message["To"].addresses) == mail.recipients
    assert message["Subject"] == subject
    lines = body.replace("\r\n", "\n").replace("\r", "\n")
    assert body_of(mail) == (lines if lines.endswith("\n") or not lines else lines + "\n")
    assert all(line.isascii() and len(line) <= 998 for line in header_lines(raw))
    assert all(len(word) <= 75 for word in re.findall(rb"=\?utf-8\?[bq]\?[^?]*\?=", b"\n".join(header_lines(raw))))


@pytest.mark.parametrize("name", [*NAMES, "x" * 200])
def test_the_newer_parser_of_python_reads_each_name(name: str) -> None:
    message = parsed(a_mail(to=(f"{name} <user@example.org>",), subject=name))
    assert [address.display_name for address in message["To"].addresses] == [name]
    assert message["Subject"] == name


@pytest.mark.parametrize(
    "character", ["\r", "\n", "\r\nBcc: e@x.org", "\0", "\x1b[2J", "\x7f", "\x85", "\u2028", "\u2029", "\ud800"]
)
@pytest.mark.parametrize("field", ["subject", "sender", "to", "cc", "bcc", "reply_to", "in_reply_to", "message_id"])
def test_control_characters_in_any_header_value_are_refused(field: str, character: str) -> None:
    good = {"subject": "Data", "in_reply_to": "<a@x.org>", "message_id": "<a@x.org>"}.get(field, "A <a@x.org>")
    for bad in (character + good, good[:2] + character + good[2:], good + character):
        with pytest.raises(ValueError, match=r"^(Subject|From|To|Cc|Bcc|Reply-To|In-Reply-To|Message-ID): "):
            compose(a_mail(**{field: (bad,) if field in ("to", "cc", "bcc") else bad}), DATE)


def test_the_refusal_of_a_control_character_is_one_printable_line() -> None:
    with pytest.raises(ValueError, match="U\\+001B") as caught:
        compose(a_mail(subject="\x1b[2J\r\nx"), DATE)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("changes", "header"),
    [
        ({"to": ()}, "To"),
        ({"to": ("nobody",)}, "To"),
        ({"cc": ("a@x.org, b@x.org",)}, "Cc"),
        ({"bcc": ("jüdit@x.org",)}, "Bcc"),
        ({"sender": "A <a@x.org>, B <b@x.org"}, "From"),
        ({"message_id": "no-brackets@x.org"}, "Message-ID"),
        ({"in_reply_to": "<a@x.org> <b@x.org>"}, "In-Reply-To"),
        ({"auto_submitted": "no"}, "Auto-Submitted"),
    ],
)
def test_what_cannot_be_a_header_is_refused_by_its_name(changes: dict[str, object], header: str) -> None:
    with pytest.raises(ValueError, match=f"^{header}: "):
        compose(a_mail(**changes), DATE)


def test_a_date_without_time_zone_is_refused() -> None:
    with pytest.raises(ValueError, match="time zone"):
        compose(a_mail(), DATE.replace(tzinfo=None))


URL = "https://almascience.example.org/preview/0123456789abcdef0123456789abcdef/"


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("plain = text, 100 %\n", "7bit"),
        ("Liebe Frau Süß\n", "8bit"),
        ("x" * 998 + "\n", "7bit"),
        ("x" * 999 + "\n", "quoted-printable"),
        ("ü" * 500 + "\n", "quoted-printable"),
        ("\x1b[31mSEVERE\x1b[0m \0\n", "quoted-printable"),
    ],
)
def test_urls_stand_alone_on_their_line_in_every_encoding(text: str, encoding: str) -> None:
    mail = a_mail(body=f"{text}{URL}\n")
    raw = compose(mail, DATE)
    assert parsed(mail)["Content-Transfer-Encoding"] == encoding
    assert URL.encode() in raw.split(b"\r\n")
    assert body_of(mail) == f"{text}{URL}\n"
    if encoding != "quoted-printable":
        assert text.rstrip("\n").encode() in raw.split(b"\r\n")


def test_nothing_of_a_body_reaches_a_terminal_as_a_control_character() -> None:
    raw = compose(a_mail(body="\x1b[2J\0\x07\x0b\n"), DATE)
    assert not re.search(rb"[\x00-\x09\x0b\x0c\x0e-\x1f\x7f]", raw)


def test_a_progress_display_becomes_lines() -> None:
    assert body_of(a_mail(body="10%\r20%\r\n30%")) == "10%\n20%\n30%\n"


def test_an_undecodable_body_still_leaves() -> None:
    assert body_of(a_mail(body="log \udcff end\n")) == "log ? end\n"


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (b"Subject: x\r\n\r\nbody", "does not end"),
        (b"Subject: x\r\n\r\n.\n.\r\n", "CR LF"),
        (b"Subject: x\r\n\r\n.\r.\r\n", "CR LF"),
        (b"Subject: x\r\n\r\n\0\r\n", "NUL"),
        (b"Subject: x\r\n\r\n" + b"x" * 999 + b"\r\n", "998"),
    ],
)
def test_messages_that_systems_read_differently_have_a_fault(message: bytes, words: str) -> None:
    assert words in message_fault(message)


def test_quoted_marks_every_line() -> None:
    assert quoted("Dear AOG,\n\nplease\r\nx\n") == "> Dear AOG,\n>\n> please\n> x"
    assert quoted("") == ""


@given(st.text())
def test_no_line_of_a_quoted_text_looks_unquoted(text: str) -> None:
    assert all(line.startswith(">") for line in quoted(text).splitlines())
