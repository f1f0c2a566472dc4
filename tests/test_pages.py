"""What stands beside the data: pages as golden files, and fetch.sh against real HTTP servers on loopback."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stagecal.adapters.templates import JinjaTemplates
from stagecal.domain.records import ProductFile
from stagecal.domain.requests import Origin, Request, State
from stagecal.domain.retention import Staging
from stagecal.resources import resource
from stagecal.services.context import Site
from stagecal.services.publishing import page_values, product_file, publish

MOUS = "uid://A001/X12a3/X80e"
BLOCKS = ("uid://A002/Xce574d/Xa33e", "uid://A002/Xcf92df/X3453")
TARS = ("uid___A002_Xce574d_Xa33e.ms.split.cal.tar", "uid___A002_Xcf92df_X3453.ms.split.cal.tar")
TOKEN = "0123456789abcdef0123456789abcdef"
DIRECTORY = "uid___A001_X12a3_X80e_012345"

Compare = Callable[[str, str], None]


def request_of(time: datetime, *calfields: str) -> Request:
    return Request(
        id="5f0c1a2b3c4d5e6f",
        sequence=1,
        origin=Origin.TRIGGER,
        mous=MOUS,
        project="2017.1.01347.S",
        ticket="16140",
        user="Ada Example",
        email="pi@example.org",
        calfields=calfields,
        contact="contact@example.org",
        trigger_name="",
        trigger_text="",
        trigger_sha256="",
        received_at=time,
        state=State.STAGING,
        since=time,
        execution_blocks=BLOCKS,
        recipe="r",
        token=TOKEN,
    )


def files_of(blocks: tuple[str, ...], *others: str) -> list[ProductFile]:
    names = [(tar, block) for tar, block in zip(TARS, BLOCKS, strict=True) if block in blocks]
    return [
        ProductFile(name, block, 5_764_321_280 + number, "1" * 64, 1, number, 1)
        for number, (name, block) in enumerate([*names, *((name, "") for name in others)])
    ]


# --- README.txt and index.html -------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["README.txt", "index.html"])
@pytest.mark.parametrize("kind", ["full", "calibrators"])
def test_the_pages(text_site: Site, golden: Compare, example_time: datetime, kind: str, page: str) -> None:
    calfields = () if kind == "full" else ("J0510+1800", "J0440+1437")
    files = files_of(BLOCKS, "flux.csv") if kind == "full" else files_of(BLOCKS[:1])
    absent = [] if kind == "full" else [BLOCKS[1]]
    values = page_values(
        text_site, request_of(example_time, *calfields), files, absent, example_time + timedelta(days=28)
    )
    stem, suffix = page.split(".")
    golden(f"pages/{stem}_{kind}.{suffix}", text_site.templates.render(f"pages/{page}", **values))


@dataclass
class Page(HTMLParser):
    """What a page links to, runs and says about itself."""

    references: list[str] = field(default_factory=list)
    tags: set[str] = field(default_factory=set)
    names: dict[str, str] = field(default_factory=dict)
    language: str = ""
    open_tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.add(tag)
        self.references += [value for name, value in attrs if name in ("href", "src", "action") and value]
        if tag == "meta" and values.get("name"):
            self.names[str(values["name"])] = str(values["content"])
        if tag == "html":
            self.language = str(values.get("lang"))
        if tag not in ("meta", "link", "br"):
            self.open_tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag


def page_of(text: str) -> Page:
    page = Page()
    page.feed(text)
    page.close()
    assert page.open_tags == []
    return page


def test_the_page_needs_and_names_nobody_else(text_site: Site, example_time: datetime) -> None:
    values = page_values(text_site, request_of(example_time), files_of(BLOCKS, "flux.csv"), [], example_time)
    page = page_of(text_site.templates.render("pages/index.html", **values))
    assert sorted(set(page.references)) == sorted(
        [*TARS, "flux.csv", "README.txt", "SHA256SUMS", "fetch.sh", "receipt.json"]
    )
    assert not page.tags & {"script", "img", "link", "iframe", "form", "base"}
    assert page.names["referrer"] == "no-referrer"
    assert "noindex" in page.names["robots"]
    assert page.language == "en"


def test_the_papers_name_no_person(text_site: Site, example_time: datetime) -> None:
    values = page_values(text_site, request_of(example_time), files_of(BLOCKS), [], example_time)
    for name in ("README.txt", "index.html", "fetch.sh"):
        text = text_site.templates.render(f"pages/{name}", **values)
        for private in ("pi@example.org", "contact@example.org", "Ada Example"):
            assert private not in text


HOSTILE = """https://x.example.org/a'b"c<script>alert(1)</script>$(touch broken)`touch broken`;{{ 7*7 }}\\&"""


def hostile_values(**changes: Any) -> dict[str, Any]:
    file = SimpleNamespace(name=HOSTILE, size=1, execution_block="x")
    names = ("mous", "mous_uid", "project", "ticket", "url")
    return {
        **dict.fromkeys(names, HOSTILE),
        "calfields": [HOSTILE],
        "absent": [HOSTILE],
        "products": [file],
        "auxiliary": [file],
        "total": 2,
        "names": [],
        "until": datetime(2026, 1, 2, tzinfo=UTC),
        "retention_days": 28,
        **changes,
    }


def test_nothing_in_the_page_can_become_markup() -> None:
    text = JinjaTemplates(resource("templates")).render("pages/index.html", **hostile_values())
    assert "script" not in page_of(text).tags
    assert "{{ 7*7 }}" in text and "49" not in text


@pytest.mark.requires_program("curl")
def test_nothing_in_fetch_sh_can_become_a_command(tmp_path: Path) -> None:
    script = tmp_path / "fetch.sh"
    script.write_text(JinjaTemplates(resource("templates")).render("pages/fetch.sh", **hostile_values(ticket="1'")))
    done = subprocess.run(
        ["sh", script, "-d", "here"],
        cwd=tmp_path,
        env=environment(tmp_path, "curl", FETCH_TRIES="1"),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "the list of files cannot be fetched" in done.stdout
    assert sorted(path.name for path in tmp_path.rglob("*broken*")) == []


def test_fetch_sh_is_plain_shell(text_site: Site, tmp_path: Path, example_time: datetime) -> None:
    values = page_values(text_site, request_of(example_time), files_of(BLOCKS), [], example_time)
    script = tmp_path / "fetch.sh"
    script.write_text(text_site.templates.render("pages/fetch.sh", **values))
    checks = [["sh", "-n"], ["dash", "-n"], ["busybox", "sh", "-n"], ["bash", "--posix", "-n"], ["shellcheck"]]
    for check in checks:
        if shutil.which(check[0]):
            done = subprocess.run([*check, script], capture_output=True, text=True, timeout=60, check=False)
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- fetch.sh ------------------------------------------------------------------------------------------------------


@dataclass
class Shop:
    """A web server's behaviour: what it shows, what it does wrong, and what it was asked.

    `cut` says after how many bytes the connection breaks, time after time, and `stalled` holds it open there until it
    is set; `damaged` how often a file is sent with one wrong byte. `asked` are GETs as (name, first byte, bytes sent).
    """

    directory: Path
    ranges: bool = True
    cut: dict[str, list[int]] = field(default_factory=dict)
    stalled: threading.Event | None = None
    damaged: dict[str, int] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)
    asked: list[tuple[str, int, int]] = field(default_factory=list)

    def sent(self, name: str) -> list[tuple[int, int]]:
        return [(first, count) for asked, first, count in self.asked if asked == name]


def handler_of(shop: Shop) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            token, _, name = self.path.strip("/").partition("/")
            path = shop.directory / token / name
            if name in shop.missing or not path.is_file():
                self.send_error(404)
                return
            content = path.read_bytes()
            first = 0
            asked = self.headers.get("Range", "")
            if shop.ranges and asked:
                first = int(asked.removeprefix("bytes=").partition("-")[0])
                if first >= len(content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(content)}")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    if with_body:
                        shop.asked.append((name, first, 0))
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(content) - first))
            self.end_headers()
            if not with_body:
                return
            if shop.damaged.get(name, 0) > 0:
                shop.damaged[name] -= 1
                content = content[:-1] + bytes([content[-1] ^ 1])
            body = content[first:]
            if shop.cut.get(name):
                body = body[: shop.cut[name].pop(0)]
                self.close_connection = True
            shop.asked.append((name, first, len(body)))
            try:
                self.wfile.write(body)
                if self.close_connection and shop.stalled is not None:
                    self.wfile.flush()
                    shop.stalled.wait(60)
            except OSError:
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


@pytest.fixture
def shop(text_site: Site, tmp_path: Path, example_time: datetime) -> Iterator[Shop]:
    """A published directory of two tar files, one auxiliary file and all the papers, behind a web server."""
    shop = Shop(text_site.config.staging.root)
    with Served(handler_of(shop)) as address:
        staging = replace(text_site.config.staging, url=address)
        site = replace(text_site, config=replace(text_site.config, staging=staging))
        site.staging.begin(TOKEN)
        packed = []
        for number, (block, tar) in enumerate(zip(BLOCKS, TARS, strict=True)):
            source = tmp_path / "products" / tar.removesuffix(".tar")
            source.mkdir(parents=True)
            (source / "table.dat").write_bytes(bytes([number]) * 300_000)
            packed.append(product_file(site.staging.pack(TOKEN, tar, source), block))
        auxiliary = tmp_path / "flux.csv"
        auxiliary.write_text("field,flux\n")
        packed.append(product_file(site.staging.copy(TOKEN, "flux.csv", auxiliary), ""))
        record: Staging = publish(site, request_of(example_time), packed, [], {"engine": "test"}, example_time)
        assert record.token == TOKEN
        yield shop


class Served:
    """Serve on a loopback port within the context, whose value is the server's address."""

    def __init__(self, handler: Any) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> str:
        self._thread.start()
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


_PROGRAMS = ("sh", "sed", "grep", "tail", "ls", "mv", "rm", "mkdir", "sleep", "sha256sum")


def environment(tmp_path: Path, *tools: str, programs: tuple[str, ...] = _PROGRAMS, **more: str) -> Mapping[str, str]:
    """Return an environment in which only these programs are found."""
    directory = tmp_path / ("bin-" + "-".join(tools))
    directory.mkdir(exist_ok=True)
    for program in (*programs, *tools):
        found = shutil.which(program)
        assert found is not None, f"{program} is not installed"
        if not (directory / program).exists():
            (directory / program).symlink_to(found)
    return {"PATH": str(directory), "HOME": str(tmp_path), "FETCH_PAUSE": "0", "FETCH_TRIES": "5", **more}


@dataclass
class Customer:
    """Somebody who fetches with one tool into a place whose name has blanks."""

    shop: Shop
    place: Path
    environment: Mapping[str, str]

    def fetch(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        script = self.shop.directory / TOKEN / "fetch.sh"
        return subprocess.run(
            ["sh", str(script), *arguments],
            cwd=self.place,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    @property
    def directory(self) -> Path:
        return self.place / DIRECTORY

    def assert_complete(self, directory: Path | None = None) -> None:
        offered = {path.name: path.read_bytes() for path in (self.shop.directory / TOKEN).iterdir()}
        fetched = {path.name: path.read_bytes() for path in (directory or self.directory).iterdir()}
        assert sorted(fetched) == sorted(offered)
        assert fetched == offered


@pytest.fixture(params=[pytest.param(tool, marks=pytest.mark.requires_program(tool)) for tool in ("curl", "wget")])
def customer(shop: Shop, tmp_path: Path, request: pytest.FixtureRequest) -> Customer:
    place = tmp_path / "my data"
    place.mkdir()
    return Customer(shop, place, environment(tmp_path, request.param))


def test_fetch_everything(customer: Customer) -> None:
    done = customer.fetch()
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{TARS[0]}: verified" in done.stdout.splitlines()
    assert done.stdout.splitlines()[-1] == f"All 7 files are in {DIRECTORY} and match their checksums."
    customer.assert_complete()


def test_fetch_again_fetches_only_the_list(customer: Customer) -> None:
    assert customer.fetch().returncode == 0
    customer.shop.asked.clear()
    done = customer.fetch()
    assert done.returncode == 0
    assert [name for name, _, _ in customer.shop.asked] == ["SHA256SUMS"]
    assert f"{TARS[0]}: verified (it was here already)" in done.stdout.splitlines()
    customer.assert_complete()


def test_a_broken_connection_is_continued_where_it_was(customer: Customer) -> None:
    size = (customer.shop.directory / TOKEN / TARS[0]).stat().st_size
    customer.shop.cut[TARS[0]] = [100_000]
    done = customer.fetch()
    assert done.returncode == 0
    assert customer.shop.sent(TARS[0]) == [(0, 100_000), (100_000, size - 100_000)]
    assert f"{TARS[0]}: interrupted after 100000 bytes, going on in 0 s" in done.stdout.splitlines()
    customer.assert_complete()


def test_a_connection_that_breaks_again_and_again_wins_as_long_as_it_advances(customer: Customer) -> None:
    customer.shop.cut[TARS[0]] = [30_000] * 8
    done = customer.fetch()
    assert done.returncode == 0, done.stdout
    assert [first for first, _ in customer.shop.sent(TARS[0])] == [30_000 * number for number in range(9)]
    customer.assert_complete()


def test_an_interruption_by_hand_costs_nothing(customer: Customer) -> None:
    size = (customer.shop.directory / TOKEN / TARS[0]).stat().st_size
    customer.shop.cut[TARS[0]] = [100_000]
    customer.shop.stalled = threading.Event()
    part = customer.directory / f"{TARS[0]}.part"
    script = customer.shop.directory / TOKEN / "fetch.sh"
    running = subprocess.Popen(
        ["sh", str(script)],
        cwd=customer.place,
        env=customer.environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        patience = time.monotonic() + 30
        while not (part.exists() and part.stat().st_size > 0) and time.monotonic() < patience:
            time.sleep(0.01)
        # A terminal sends Ctrl-C to everything that runs in it.
        os.killpg(running.pid, signal.SIGINT)
        printed, _ = running.communicate(timeout=30)
    finally:
        customer.shop.stalled.set()
        running.kill()
    assert running.returncode == 130
    assert printed.splitlines()[-1] == "Interrupted: run it again, it goes on where it stopped."
    assert not (customer.directory / TARS[0]).exists()
    there = part.stat().st_size
    assert 0 < there <= 100_000
    assert customer.fetch().returncode == 0
    assert customer.shop.sent(TARS[0])[1:] == [(there, size - there)]
    customer.assert_complete()


def test_what_an_earlier_run_or_another_tool_began_is_continued(customer: Customer) -> None:
    contents = [(customer.shop.directory / TOKEN / tar).read_bytes() for tar in TARS]
    customer.directory.mkdir()
    (customer.directory / f"{TARS[0]}.part").write_bytes(contents[0][:100_000])
    (customer.directory / TARS[1]).write_bytes(contents[1][:50_000])
    assert customer.fetch().returncode == 0
    assert customer.shop.sent(TARS[0]) == [(100_000, len(contents[0]) - 100_000)]
    assert customer.shop.sent(TARS[1]) == [(50_000, len(contents[1]) - 50_000)]
    customer.assert_complete()


def test_a_server_that_cannot_continue_files_is_asked_from_the_beginning(customer: Customer) -> None:
    customer.shop.ranges = False
    customer.shop.cut[TARS[0]] = [100_000]
    done = customer.fetch()
    assert done.returncode == 0, done.stdout
    size = (customer.shop.directory / TOKEN / TARS[0]).stat().st_size
    # It is tried once to continue, and understood at once that this cannot be.
    assert len(customer.shop.sent(TARS[0])) <= 3
    assert customer.shop.sent(TARS[0])[-1] == (0, size)
    customer.assert_complete()


def test_the_web_server_of_python_will_do(customer: Customer) -> None:
    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, directory=str(customer.shop.directory), **options)

        def log_message(self, format: str, *args: object) -> None:
            pass

    customer.directory.mkdir()
    (customer.directory / f"{TARS[0]}.part").write_bytes(b"\0" * 1000)
    with Served(Handler) as address:
        done = customer.fetch(f"{address}/{TOKEN}/")
    assert done.returncode == 0, done.stdout + done.stderr
    customer.assert_complete()


def test_a_file_that_is_complete_but_has_not_its_name_yet_is_not_fetched(customer: Customer) -> None:
    content = (customer.shop.directory / TOKEN / TARS[0]).read_bytes()
    customer.directory.mkdir()
    (customer.directory / f"{TARS[0]}.part").write_bytes(content)
    assert customer.fetch().returncode == 0
    assert sum(count for _, count in customer.shop.sent(TARS[0])) == 0
    customer.assert_complete()


@pytest.mark.parametrize("wrong", ["longer", "other"])
def test_a_part_that_is_not_ours_is_fetched_anew(customer: Customer, wrong: str) -> None:
    content = (customer.shop.directory / TOKEN / TARS[0]).read_bytes()
    customer.directory.mkdir()
    parts = {"longer": content + b"more", "other": b"x" * 1000}
    (customer.directory / f"{TARS[0]}.part").write_bytes(parts[wrong])
    done = customer.fetch()
    assert done.returncode == 0, done.stdout
    assert len(customer.shop.sent(TARS[0])) == 2
    assert customer.shop.sent(TARS[0])[-1] == (0, len(content))
    customer.assert_complete()


def test_a_byte_that_was_damaged_on_its_way_is_noticed_and_mended(customer: Customer) -> None:
    customer.shop.damaged[TARS[1]] = 1
    done = customer.fetch()
    assert done.returncode == 0
    assert f"{TARS[1]}: its checksum is wrong, fetching it anew" in done.stdout.splitlines()
    customer.assert_complete()


def test_a_file_that_is_damaged_at_its_source_is_named(customer: Customer) -> None:
    customer.shop.damaged[TARS[1]] = 99
    done = customer.fetch()
    assert done.returncode == 1
    assert f"{TARS[1]}: FAILED: its checksum is wrong, although it was fetched anew" in done.stdout.splitlines()
    assert done.stdout.splitlines()[-1].startswith("FAILED: 6 of 7 files")
    assert not (customer.directory / TARS[1]).exists()
    assert (customer.directory / TARS[0]).exists()


def test_a_file_that_is_missing_is_named_and_the_others_are_fetched(customer: Customer) -> None:
    customer.shop.missing.add(TARS[0])
    done = customer.fetch()
    assert done.returncode == 1
    assert f"{TARS[0]}: FAILED: the server answers 404: it is not there, or not any more" in done.stdout.splitlines()
    assert (customer.directory / TARS[1]).exists()
    assert "ticket 16140" in done.stdout


def test_a_directory_that_is_gone_is_said_to_be_gone(customer: Customer) -> None:
    customer.shop.missing.add("SHA256SUMS")
    done = customer.fetch()
    assert done.returncode == 1
    assert "FAILED: the list of files cannot be fetched" in done.stdout.splitlines()[-1]
    assert "404" in done.stdout


def test_a_server_that_is_silent_is_asked_a_bounded_number_of_times(customer: Customer) -> None:
    with Served(handler_of(customer.shop)) as address:
        pass
    done = customer.fetch(f"{address}/{TOKEN}")
    assert done.returncode == 1
    assert "SHA256SUMS: FAILED: no progress in 5 attempts" in done.stdout.splitlines()


@pytest.mark.parametrize(
    "content",
    [
        "<html>Please log in to this network</html>\n",
        f"{'0' * 64}  ../escaped\n",
        f"{'0' * 64}  -option\n",
        f"{'0' * 64}  $(touch broken)\n",
        "",
    ],
)
def test_a_list_that_is_none_is_not_believed(customer: Customer, tmp_path: Path, content: str) -> None:
    (customer.shop.directory / TOKEN / "SHA256SUMS").unlink()
    (customer.shop.directory / TOKEN / "SHA256SUMS").write_text(content)
    done = customer.fetch()
    assert done.returncode == 1
    assert sorted(path.name for path in customer.place.rglob("*") if path.is_file()) == []
    assert not (customer.place / "escaped").exists()


def test_the_directory_can_be_chosen(customer: Customer) -> None:
    target = customer.place / "a place" / "of mine"
    assert customer.fetch("-d", "a place/of mine").returncode == 0
    customer.assert_complete(target)
    assert not customer.directory.exists()


def test_files_of_the_same_names_beside_the_script_are_left_alone(customer: Customer) -> None:
    (customer.place / "README.txt").write_text("my own notes")
    assert customer.fetch().returncode == 0
    assert (customer.place / "README.txt").read_text() == "my own notes"


def test_a_wrong_argument_is_refused(customer: Customer) -> None:
    for arguments in (["-d"], ["-x"], ["file:///etc/passwd"], ["-d", ""]):
        done = customer.fetch(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("usage: sh fetch.sh")
    assert customer.shop.asked == []


@pytest.mark.requires_program("curl")
@pytest.mark.parametrize(
    "digester",
    [pytest.param(name, marks=pytest.mark.requires_program(name)) for name in ("shasum", "openssl")],
)
def test_other_programs_for_checksums_will_do(shop: Shop, tmp_path: Path, digester: str) -> None:
    place = tmp_path / "my data"
    place.mkdir()
    programs = tuple(program for program in _PROGRAMS if program != "sha256sum")
    customer = Customer(shop, place, environment(tmp_path, "curl", digester, programs=programs))
    shop.damaged[TARS[0]] = 1
    done = customer.fetch()
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{TARS[0]}: its checksum is wrong, fetching it anew" in done.stdout.splitlines()
    customer.assert_complete()


@pytest.mark.requires_program("curl")
def test_without_the_programs_it_needs_it_says_so(shop: Shop, tmp_path: Path) -> None:
    place = tmp_path / "my data"
    place.mkdir()
    done = Customer(shop, place, environment(tmp_path)).fetch()
    assert (done.returncode, done.stdout) == (1, "FAILED: neither curl nor wget is installed here\n")
    programs = tuple(program for program in _PROGRAMS if program != "sha256sum")
    done = Customer(shop, place, environment(tmp_path / "my data", "curl", programs=programs)).fetch()
    assert done.returncode == 1
    assert "none of sha256sum, shasum and openssl" in done.stdout


def test_the_list_covers_every_file_but_itself(shop: Shop) -> None:
    directory = shop.directory / TOKEN
    lines = [line.split("  ") for line in (directory / "SHA256SUMS").read_text().splitlines()]
    actual = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.iterdir()
        if path.name != "SHA256SUMS"
    }
    assert {name: sha256 for sha256, name in lines} == actual
    assert os.access(directory / "fetch.sh", os.X_OK)
