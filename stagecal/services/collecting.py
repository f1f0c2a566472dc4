"""From a job that ended well to a published directory: products complete, checked, sealed, checked again, packed.

A product that is missing, empty or broken fails the request; nothing partial is ever published. For calibrator requests
the data themselves are read, before and after packing: every field in them must be asked for, a calibrator, and no
science target.
"""

from __future__ import annotations

import json
import os
import re
import stat
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from stagecal.domain import terminal
from stagecal.domain.products import measurement_set_name, tar_name
from stagecal.domain.records import ProductFile, Step
from stagecal.domain.requests import Request, State
from stagecal.domain.restore.engines import COMMAND
from stagecal.domain.sizes import readable_size
from stagecal.domain.verdicts import Verdict
from stagecal.measurement_set import (
    FieldUse,
    Files,
    Found,
    MeasurementSetError,
    check_measurement_set,
    find_tables,
    read_fields,
    seal_measurement_set,
)
from stagecal.ports import FatalError, JobHandle, StagingArea, TransientError
from stagecal.services.context import Site
from stagecal.services.judging import refusal_lines
from stagecal.services.publishing import (
    PAPERS,
    product_file,
    publish,
    published_already,
    published_lines,
    restore_receipt,
    write_receipt,
)

# What NRAO's and ESO's deliveries hold beside the data; never the manifest or the AQUA report.
_AUXILIARY = re.compile(
    r"(README[A-Za-z0-9._+-]*|[A-Za-z0-9][A-Za-z0-9._+-]*"
    r"(calapply\.txt|caltables\.tgz|casa_commands\.log|casa_piperestorescript\.py|casa_pipescript\.py|weblog\.tgz"
    r"|flux\.csv|flagtemplate\.txt|PPR[A-Za-z0-9._+-]*\.xml)|casa_commands\.log|flux\.csv|PPR_[A-Za-z0-9._+-]*\.xml)"
)
_TELL_EVERY = timedelta(seconds=10)
_LARGEST_REPORT = 16 * 1024 * 1024
_SESSION = re.compile(r"session_[0-9]{1,9}")
_ABSOLUTE_PATH = re.compile(r"(?<![A-Za-z0-9_.:/-])/[A-Za-z0-9_.-]")


class ProductError(Exception):
    """The job's products are not what was asked for: the request fails, and a person looks."""


@dataclass(frozen=True)
class NoCalibratorError(Exception):
    """A named field is no calibrator, or not only one."""

    detail: str


class WithdrawnMeanwhileError(Exception):
    """An operator withdrew the request while its products were collected."""


def collect(site: Site, request: Request, now: datetime) -> Request:
    """STAGING, after the job ended well: check, seal, pack and publish its products."""
    already = published_already(site, request)
    if already is not None:
        staging, files, absent = already
        return site.ledger.commit(
            request,
            now=now,
            to=State.STAGED,
            step=Step("publish", "is it published?", "yes, before an interruption", "recorded"),
            staging=staging,
            files=files,
            absent=absent,
            holds_slot=False,
            terminal=[*terminal.CLEANED, *published_lines(site, request, staging.published_at)],
        )
    request, directory = _brought_here(site, request)
    report = read_report(directory)
    products = directory / "products"
    try:
        sets = find_products(request, report, products)
        for measurement_set in sets.values():
            make_trustworthy(measurement_set)
        check_fields(request, sets.values())
    except NoCalibratorError as refusal:
        return site.ledger.commit(
            request,
            now=now,
            to=State.REFUSED,
            step=Step(
                "judge",
                f"are {', '.join(request.calfields)} calibrators?",
                refusal.detail,
                Verdict.NOT_A_CALIBRATOR_FIELD,
            ),
            verdict=Verdict.NOT_A_CALIBRATOR_FIELD,
            reason=refusal.detail,
            holds_slot=False,
            terminal=refusal_lines(request, Verdict.NOT_A_CALIBRATOR_FIELD, refusal.detail),
        )
    need = sum(size_of(measurement_set) for measurement_set in sets.values())
    free = site.staging.free_bytes()
    reserve = int(site.config.staging.reserve_gb * 1e9)
    if free < need + reserve:
        raise TransientError(
            f"the staging disk has {free / 1e9:.1f} GB free; {need / 1e9:.1f} GB and the reserve of "
            f"{reserve / 1e9:.1f} GB are needed: delete staged data or make the disk larger"
        )
    started = time.monotonic()
    files = _pack(site, request, sets, directory)
    absent = tuple(block for block in request.execution_blocks if block not in sets)
    if site.ledger.get(request.id).wish == "withdraw":
        site.staging.discard(request.token)
        raise WithdrawnMeanwhileError
    # Packing may have taken hours, and the retention counts from here.
    now = site.clock.now()
    staging = publish(site, request, files, absent, made_by_of(report), now)
    sizes = {file.name: file.size for file in files if file.execution_block}
    checked = "; ".join(f"{name}: {size} bytes" for name, size in sizes.items())
    return site.ledger.commit(
        request,
        now=now,
        to=State.STAGED,
        step=Step("publish", "are the products complete and healthy?", checked, "published"),
        staging=staging,
        files=files,
        absent=absent,
        holds_slot=False,
        reason="",
        terminal=[
            *terminal.completed(),
            *terminal.copied(sizes, time.monotonic() - started),
            *terminal.CLEANED,
            *published_lines(site, request, now),
        ],
    )


def collect_restored(site: Site, request: Request, now: datetime) -> Request:
    """STAGING of a restore, after the job ended well: its products stay where they are, complete and sealed."""
    request, directory = _brought_here(site, request)
    report = read_report(directory)
    try:
        sets = find_products(request, report, directory / "products")
    except NoCalibratorError as refusal:
        raise ProductError(f"the engine reports fields that are no calibrators: {refusal.detail}") from refusal
    for measurement_set in sets.values():
        make_trustworthy(measurement_set)
    absent = tuple(block for block in request.execution_blocks if block not in sets)
    sizes = {block: size_of(path) for block, path in sets.items()}
    write_receipt(directory, restore_receipt(request, sizes, absent, made_by_of(report), now))
    names = sorted(path.name for path in sets.values())
    return site.ledger.commit(
        request,
        now=now,
        to=State.STAGED,
        step=Step("restore", "are the products complete and healthy?", ", ".join(names), f"{directory}/products"),
        holds_slot=False,
        reason="",
        terminal=[*terminal.completed(), *(f"{directory}/products/{name}" for name in names)],
    )


def _brought_here(site: Site, request: Request) -> tuple[Request, Path]:
    """Bring the job's results here if they are elsewhere; `status` and the terminal show what is on its way."""
    told = site.clock.now()
    tenths = 0

    def tell(done: int, total: int) -> None:
        nonlocal request, told, tenths
        now = site.clock.now()
        if now - told < _TELL_EVERY:
            return
        told = now
        received = f"{readable_size(done)} of {readable_size(total)} received from {request.node}"
        passed = 10 * done // total if total else 0
        lines = [f"{received} ..."] if passed > tenths else []
        tenths = max(tenths, passed)
        request = site.ledger.commit(request, now=now, reason=received, terminal=lines)

    directory = site.nodes.fetch(JobHandle(request.node, request.work, request.nonce), tell)
    return request, directory


def read_report(directory: Path) -> Mapping[str, Any]:
    """Return what the engine reported about its work; only the site's own command may leave no report.

    The job wrote it: only a plain file of reasonable size is read. Raises ProductError if it cannot be understood, or
    is missing where another engine worked: that one writes it when all products are complete and right.
    """
    report = _object_in(directory, "report.json")
    if report is not None:
        return report
    engine = (_object_in(directory, "job.json") or {}).get("engine", COMMAND)
    if engine != COMMAND:
        raise ProductError(f"the engine {engine} left no report.json: its products are not known to be complete")
    return {"engine": COMMAND}


def _object_in(directory: Path, name: str) -> Mapping[str, Any] | None:
    """Return the JSON object in a file of a job directory, None if the file is not there."""
    try:
        descriptor = os.open(directory / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ProductError(f"the engine's {name} cannot be read: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as stream:
        found = os.fstat(stream.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_size > _LARGEST_REPORT:
            raise ProductError(f"the engine's {name} is no plain file of reasonable size")
        content = stream.read()
    try:
        value = json.loads(content)
    except ValueError as error:
        raise ProductError(f"the engine's {name} is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise ProductError(f"the engine's {name} is no object")
    return value


def made_by_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the receipt says about how the products were made: no address of a person, no path of a machine."""
    made_by: dict[str, Any] = {
        name: report[name]
        for name in ("engine", "engine_reason", "started", "ended")
        if isinstance(report.get(name), str) and _is_public(report[name])
    }
    for name in ("calibrated_by", "restored_by"):
        said = report.get(name)
        versions = {one: said.get(one) for one in ("casa", "pipeline")} if isinstance(said, dict) else {}
        known = {one: text for one, text in versions.items() if isinstance(text, str) and text and _is_public(text)}
        made_by |= {name: known} if known else {}
    commands = report.get("commands")
    if isinstance(commands, list):
        made_by["commands"] = [one for one in commands if isinstance(one, str) and _is_public(one)]
    blocks = report.get("execution_blocks")
    if isinstance(blocks, dict):
        named = {uid: one.get("session") for uid, one in blocks.items() if isinstance(one, dict)}
        sessions = {uid: name for uid, name in named.items() if isinstance(name, str) and _SESSION.fullmatch(name)}
        made_by |= {"sessions": sessions} if sessions and all(map(_is_public, sessions)) else {}
    return made_by


def _is_public(text: str) -> bool:
    return "@" not in text and not _ABSOLUTE_PATH.search(text)


def _is_real_directory(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def find_products(request: Request, report: Mapping[str, Any], products: Path) -> dict[str, Path]:
    """Return the calibrated MS of each expected EB; an EB may lack one only if it has none of the calfields.

    Raises NoCalibratorError if the engine found a named field to be no calibrator, ProductError if an expected MS is
    missing or one is there that nobody asked for.
    """
    refused = report.get("not_calibrators") or []
    if refused:
        reasons = "; ".join(f"{one.get('field')}: {one.get('reason')}" for one in refused if isinstance(one, dict))
        raise NoCalibratorError(reasons or "the engine says so")
    blocks = report.get("execution_blocks") or {}
    found = {}
    for block in request.execution_blocks:
        path = products / measurement_set_name(block)
        if _is_real_directory(products) and _is_real_directory(path):
            found[block] = path
        elif not (request.calfields and (blocks.get(block) or {}).get("without_calfields") is True):
            raise ProductError(f"the job left no {measurement_set_name(block)}")
    expected = {measurement_set_name(block) for block in request.execution_blocks}
    others = sorted(path.name for path in products.glob("*.ms.split.cal") if path.name not in expected)
    if others:
        raise ProductError(f"the job left {others[0]}, which belongs to no expected EB")
    if not found:
        fields = ", ".join(request.calfields)
        raise NoCalibratorError(f"none of the EBs has the field {fields}")
    return found


def make_trustworthy(path: Path) -> None:
    """Check an MS, make it independent of its lock files, and check it again. Raises ProductError."""
    try:
        for attempt in ("check", "seal"):
            report = check_measurement_set(path)
            if not report.healthy:
                raise ProductError(f"{path.name} is not healthy: {'; '.join(report.problems[:3])}")
            if attempt == "check":
                seal_measurement_set(path)
    except MeasurementSetError as error:
        raise ProductError(f"{path.name}: {error}") from error


def check_fields(request: Request, places: Iterable[Path | Files]) -> None:
    """For a calibrator request, read the fields in the products: asked for, calibrators, no science target.

    Raises NoCalibratorError, or ProductError if a product holds data of another field or its fields cannot be read.
    """
    if request.calfields:
        _refuse_missing(request, {name for place in places for name in _calibrators_in(request, place)})


def _calibrators_in(request: Request, place: Path | Files) -> set[str]:
    """Return the names of the fields that have data in a product, each of them asked for and a calibrator."""
    try:
        uses: Sequence[FieldUse] = [use for use in read_fields(place) if use.rows > 0]
    except MeasurementSetError as error:
        raise ProductError(f"the fields of {place.name} cannot be verified: {error}") from error
    for use in uses:
        if use.name not in request.calfields:
            raise ProductError(f"{place.name} holds data of {use.name}, which was not asked for")
        if any(intent.startswith("OBSERVE_TARGET") for intent in use.intents):
            raise NoCalibratorError(f"{use.name} is observed as science target (OBSERVE_TARGET) in {place.name}")
        if use.rows_without_intent or not any(intent.startswith("CALIBRATE_") for intent in use.intents):
            raise NoCalibratorError(f"{use.name} is not observed as calibrator throughout in {place.name}")
    return {use.name for use in uses}


def _refuse_missing(request: Request, seen: set[str]) -> None:
    missing = sorted(set(request.calfields) - seen)
    if missing:
        raise NoCalibratorError(f"none of the EBs has the field {', '.join(missing)}")


def verify_packed(site: Site, request: Request, names: Iterable[str]) -> None:
    """Look into tar files that are about to be published for a request, without unpacking them.

    Each must hold one healthy measurement set, and for a calibrator request nothing but what may be given out. Only
    headers and columns of ids are read: a tenth of a second for a million rows, however large the data are. Raises
    ProductError.
    """
    seen: set[str] = set()
    for name in names:
        path = site.staging.draft(request.token, name)
        try:
            seen |= _verified(request, path)
        except NoCalibratorError as refusal:
            raise ProductError(f"the packed {name}: {refusal.detail}") from refusal
        except MeasurementSetError as error:
            raise ProductError(f"the packed {name}: {error}".replace(str(path), name)) from error
        except OSError as error:
            raise ProductError(f"the packed {name} cannot be read: {error.strerror}") from error
    if request.calfields:
        try:
            _refuse_missing(request, seen)
        except NoCalibratorError as refusal:
            raise ProductError(f"packed: {refusal.detail}") from refusal


def _verified(request: Request, path: Path) -> set[str]:
    """Return the calibrators in one tar file that holds one healthy measurement set."""
    seen: set[str] = set()
    number = 0
    for found in find_tables(path):
        if not isinstance(found, Found):
            raise ProductError(f"the packed {path.name} {found.problem}")
        report = check_measurement_set(found.files)
        if not report.healthy:
            raise ProductError(f"the packed {path.name} is not healthy: {'; '.join(report.problems[:3])}")
        if request.calfields:
            seen |= _calibrators_in(request, found.files)
        number += 1
    if number != 1:
        raise ProductError(f"the packed {path.name} holds {number} measurement sets instead of one")
    return seen


def size_of(directory: Path) -> int:
    """Return the bytes of all files below a directory."""
    return sum(path.lstat().st_size for path in directory.rglob("*") if path.is_file())


def _pack(site: Site, request: Request, sets: Mapping[str, Path], directory: Path) -> tuple[ProductFile, ...]:
    site.staging.begin(request.token)
    try:
        packed = [
            product_file(site.staging.pack(request.token, tar_name(block), path), block) for block, path in sets.items()
        ]
        verify_packed(site, request, [file.name for file in packed])
        if not request.calfields:
            packed += _auxiliary(site.staging, request, directory / "auxiliary")
    except (TransientError, FatalError, ProductError):
        site.staging.discard(request.token)
        raise
    return tuple(packed)


def _auxiliary(area: StagingArea, request: Request, directory: Path) -> list[ProductFile]:
    """Copy the auxiliary files of a full request; a calibrator directory holds none of them."""
    if not _is_real_directory(directory):
        return []
    return [
        product_file(area.copy(request.token, path.name, path), "")
        for path in sorted(directory.iterdir())
        if path.is_file() and not path.is_symlink() and _AUXILIARY.fullmatch(path.name) and path.name not in PAPERS
    ]
