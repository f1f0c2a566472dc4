"""The few small files that a restore is planned from: from NGAS over HTTP, or by a command of the site."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from stagecal.adapters.product_store import ProductStore
from stagecal.ports import FatalError, TransientError
from stagecal.resources import resource
from tests.ngas_server import Ngas, ngas_server, unused_address

PROGRAM = resource("templates", "job", "fetch_products.py")
MANIFEST, SCRIPT = "member.uid___A001_X1_X1.pipeline_manifest.xml", "member.uid___A001_X1_X1.casa_piperestorescript.py"
CONTENTS = {MANIFEST: b"<piperesults/>\n", SCRIPT: b"h_init()\n" * 1000}


@pytest.fixture
def ngas(tmp_path: Path) -> Iterator[Ngas]:
    directory = tmp_path / "ngas"
    directory.mkdir()
    for name, content in CONTENTS.items():
        (directory / name).write_bytes(content)
    with ngas_server(directory) as server:
        yield server


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory for temporary files, which has to be empty in the end."""
    directory = tmp_path / "temporary"
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    yield directory
    assert not directory.exists() or list(directory.iterdir()) == []


def store(ngas: Ngas) -> ProductStore:
    return ProductStore(PROGRAM, ngas.address, None)


def command(path: Path, text: str) -> ProductStore:
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return ProductStore(PROGRAM, None, (str(path), "--from", "a b"))


def test_files_come_as_they_are_archived(ngas: Ngas) -> None:
    assert store(ngas).read(list(CONTENTS)) == CONTENTS


def test_signed_checksums_are_understood(ngas: Ngas) -> None:
    ngas.signed = True
    assert store(ngas).read([SCRIPT]) == {SCRIPT: CONTENTS[SCRIPT]}


def test_nothing_is_asked_for_nothing() -> None:
    assert ProductStore(PROGRAM, None, None).read([]) == {}


def test_without_a_server_and_a_command_the_key_to_set_is_named() -> None:
    with pytest.raises(FatalError, match=r"set \[restore\] ngas, or products_fetch"):
        ProductStore(PROGRAM, None, None).read([MANIFEST])


def test_a_site_command_gets_the_name_as_its_last_word(tmp_path: Path) -> None:
    made = command(tmp_path / "fetch", 'printf "%s|" "$@" >"$3"')
    assert made.read([MANIFEST]) == {MANIFEST: f"--from|a b|{MANIFEST}|".encode()}


def test_a_file_that_the_archive_does_not_have_is_for_a_person(ngas: Ngas) -> None:
    with pytest.raises(FatalError, match=r"archived products cannot be fetched: .*none\.xml"):
        store(ngas).read([MANIFEST, "none.xml"])


def test_a_file_that_differs_from_what_the_archive_says_is_for_a_person(ngas: Ngas) -> None:
    ngas.misbehave(MANIFEST, "flip", bytes=3, times=100)
    with pytest.raises(FatalError, match=MANIFEST):
        store(ngas).read([MANIFEST])


def test_a_connection_that_breaks_off_once_is_no_trouble(ngas: Ngas) -> None:
    ngas.misbehave(SCRIPT, "break off", bytes=100)
    assert store(ngas).read([SCRIPT]) == {SCRIPT: CONTENTS[SCRIPT]}


def test_a_server_that_is_away_or_busy_is_tried_again_later(ngas: Ngas) -> None:
    with pytest.raises(TransientError, match="archived products cannot be fetched"):
        ProductStore(PROGRAM, unused_address(), None).read([MANIFEST])
    ngas.misbehave(MANIFEST, "busy", times=100)
    with pytest.raises(TransientError, match="archived products cannot be fetched"):
        store(ngas).read([MANIFEST])


def test_a_server_that_never_ends_is_given_up(ngas: Ngas) -> None:
    ngas.misbehave(SCRIPT, "stall", bytes=10, times=100)
    with pytest.raises(TransientError):
        ProductStore(PROGRAM, ngas.address, None, timeout_s=1).read([SCRIPT])


@pytest.mark.parametrize("name", ["../up.xml", "a/b.xml", "/etc/passwd", "-rf", ".hidden", "a b", "a\nb", ""])
def test_a_name_that_is_none_is_never_asked_for(ngas: Ngas, name: str) -> None:
    with pytest.raises(FatalError):
        store(ngas).read([name])
    assert ngas.requests == []


def test_a_file_too_large_to_plan_from_is_for_a_person(tmp_path: Path) -> None:
    made = command(tmp_path / "fetch", 'dd if=/dev/zero of="$3" bs=1 count=0 seek=104857600 2>/dev/null')
    with pytest.raises(FatalError, match="is too large to be what a restore is planned from"):
        made.read([MANIFEST])


def test_no_place_for_temporary_files_is_tried_again_later(ngas: Ngas, kept: Path) -> None:
    kept.rmdir()
    with pytest.raises(TransientError, match="archived products cannot be kept here"):
        store(ngas).read([MANIFEST])


def test_a_program_that_is_not_there_is_for_a_person(ngas: Ngas, tmp_path: Path) -> None:
    with pytest.raises(FatalError):
        ProductStore(tmp_path / "none.py", ngas.address, None).read([MANIFEST])
