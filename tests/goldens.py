"""Golden files under tests/data, and the small site whose texts they show.

`pytest --renew-goldens` writes them anew; the difference is then read before it is committed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest

from stagecal.adapters.archive_sqlite import SqliteArchive
from stagecal.adapters.clock import SystemClock
from stagecal.adapters.file_locks import FileLocks
from stagecal.adapters.ledger import SqliteLedger
from stagecal.adapters.mail_maildir import MaildirMailer
from stagecal.adapters.nodes_local import LocalNodes
from stagecal.adapters.staging_area import FileStagingArea
from stagecal.adapters.templates import JinjaTemplates
from stagecal.adapters.trigger_directory import TriggerDirectory
from stagecal.config import load_config
from stagecal.ports import Engines, ProductFiles
from stagecal.resources import resource
from stagecal.services.context import Site

DATA = Path(__file__).parent / "data"

_CONFIGURATION = """
[triggers]
directory = "triggers"
[archive]
backend = "sqlite"
path = "archive.db"
[cluster]
work_area = "work"
[staging]
root = "preview"
url = "https://data.example.org/preview"
[locks]
directory = "locks"
[mail]
transport = "maildir"
maildir = "mail"
aog = "aog@example.org"
maintainer = "maintainer@example.org"
sender = "service@example.org"
reply_to = "no_reply@example.org"
message_id_domain = "data.example.org"
contact_domains = ["example.org"]
signature = "The ESO ALMA Team"
[state]
directory = "state"
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--renew-goldens", action="store_true", help="write the golden files of tests/data anew")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Return a function that compares a text with the golden file of this name below tests/data."""
    renew = request.config.getoption("--renew-goldens")

    def compare(name: str, text: str) -> None:
        path = DATA / name
        if renew:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode())
        assert path.is_file(), f"there is no {path}: write it by --renew-goldens, and read it"
        assert text.split("\n") == path.read_bytes().decode().split("\n"), "if that is wanted: --renew-goldens"

    return compare


@pytest.fixture
def example_time() -> datetime:
    """The time at which everything in the golden files happens."""
    return datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture
def text_site(tmp_path: Path) -> Iterator[Site]:
    """A site of real parts; no mail and no page needs an engine, so it has none."""
    file = tmp_path / "stagecal.toml"
    file.write_text(_CONFIGURATION, encoding="utf-8")
    config = load_config(file, environ={})
    for directory in (config.staging.root, config.cluster.work_area, config.triggers.directory):
        directory.mkdir()
    ledger = SqliteLedger(config.state.directory)
    yield Site(
        config=config,
        clock=SystemClock(),
        archive=SqliteArchive(tmp_path / "archive.db", {}, 1),
        triggers=TriggerDirectory(config.triggers.directory),
        mailer=MaildirMailer(tmp_path / "mail"),
        templates=JinjaTemplates(resource("templates")),
        ledger=ledger,
        nodes=LocalNodes(config.cluster.work_area, "node-1", (), b""),
        staging=FileStagingArea(config.staging.root),
        engines=cast(Engines, cast(Any, None)),
        products=cast(ProductFiles, cast(Any, None)),
        locks=FileLocks(tmp_path / "locks"),
    )
    ledger.close()
