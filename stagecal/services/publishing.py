"""The last step of a staging: the papers of the directory are written, then it appears by one rename.

Papers: README.txt and index.html for people, fetch.sh to fetch and verify, receipt.json for programs, SHA256SUMS over
every file but itself. No e-mail address, no name of a person, no path of a machine stands in any of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from stagecal import __version__
from stagecal.domain.identifiers import sanitized
from stagecal.domain.products import measurement_set_name
from stagecal.domain.records import ProductFile
from stagecal.domain.requests import Request
from stagecal.domain.retention import Staging
from stagecal.domain.terminal import published as published_terminal
from stagecal.ports import FatalError, StagedFile, TransientError
from stagecal.services.context import Site

PAPERS = ("README.txt", "index.html", "fetch.sh", "receipt.json", "SHA256SUMS")


def publish(
    site: Site,
    request: Request,
    files: Sequence[ProductFile],
    absent: Sequence[str],
    made_by: Mapping[str, Any],
    now: datetime,
) -> Staging:
    """Write the papers beside the files and let the directory appear; return its record.

    `made_by` says how the products were made: engine, versions, commands, times.
    """
    until = now + timedelta(days=site.config.staging.retention_days)
    values = page_values(site, request, files, absent, until)
    papers = [
        site.staging.write(request.token, "receipt.json", _receipt(request, files, absent, made_by, now, until)),
        *(
            site.staging.write(
                request.token,
                name,
                site.templates.render(f"pages/{name}", **values).encode(),
                executable=name == "fetch.sh",
            )
            for name in ("README.txt", "index.html", "fetch.sh")
        ),
    ]
    sums = sorted([*((file.name, file.sha256) for file in files), *((paper.name, paper.sha256) for paper in papers)])
    content = "".join(f"{sha256}  {name}\n" for name, sha256 in sums)
    site.staging.write(request.token, "SHA256SUMS", content.encode())
    site.staging.publish(request.token)
    return _staging(site, request, now)


def _staging(site: Site, request: Request, published_at: datetime) -> Staging:
    return Staging(
        token=request.token,
        request=request.id,
        recipe=request.recipe,
        published_at=published_at,
        notified_at=None,
        retention_days=site.config.staging.retention_days,
    )


def page_values(
    site: Site, request: Request, files: Sequence[ProductFile], absent: Sequence[str], until: datetime
) -> dict[str, Any]:
    """Return what the pages and the delivery mail say about a directory."""
    products = [file for file in files if file.execution_block]
    return {
        "mous": sanitized(request.mous),
        "mous_uid": request.mous,
        "project": request.project,
        "ticket": request.ticket,
        "calfields": sorted(request.calfields),
        "url": site.url(request.token),
        "until": until,
        "retention_days": site.config.staging.retention_days,
        "products": sorted(products, key=lambda file: file.name),
        "auxiliary": sorted((file for file in files if not file.execution_block), key=lambda file: file.name),
        "absent": [sanitized(block) for block in sorted(absent)],
        "total": sum(file.size for file in files),
    }


def _receipt(
    request: Request,
    files: Sequence[ProductFile],
    absent: Sequence[str],
    made_by: Mapping[str, Any],
    now: datetime,
    until: datetime,
) -> bytes:
    content = {
        **_said_of(request, absent, made_by),
        "helpdesk_ticket": request.ticket,
        "recipe": request.recipe,
        "files": [
            {
                "name": file.name,
                "execution_block": file.execution_block or None,
                "size": file.size,
                "sha256": file.sha256,
            }
            for file in sorted(files, key=lambda file: file.name)
        ],
        "published": now.astimezone(UTC).isoformat(timespec="seconds"),
        "available_at_least_until": until.astimezone(UTC).isoformat(timespec="seconds"),
    }
    return _as_json(content)


def restore_receipt(
    request: Request, sizes: Mapping[str, int], absent: Sequence[str], made_by: Mapping[str, Any], now: datetime
) -> bytes:
    """Return the receipt of a restore, whose measurement sets stay where the job left them.

    `sizes` are the bytes of the measurement set of each EB that has one.
    """
    content = {
        **_said_of(request, absent, made_by),
        "files": [
            {"name": measurement_set_name(block), "execution_block": block, "size": size}
            for block, size in sorted(sizes.items())
        ],
        "restored": now.astimezone(UTC).isoformat(timespec="seconds"),
    }
    return _as_json(content)


def write_receipt(directory: Path, content: bytes) -> None:
    """Let receipt.json appear in a job directory, complete; one that is there is replaced. Raises TransientError."""
    part = directory / ".receipt.json.part"
    try:
        part.unlink(missing_ok=True)
        with part.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(directory / "receipt.json")
    except OSError as error:
        raise TransientError(f"{directory}/receipt.json cannot be written: {error.strerror}") from error


def _said_of(request: Request, absent: Sequence[str], made_by: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "schema": 1,
        "service": f"stagecal {__version__}",
        "request": request.id,
        "mous": request.mous,
        "project": request.project,
        "calfields": sorted(request.calfields),
        "execution_blocks": list(request.execution_blocks),
        "execution_blocks_without_calfields": sorted(absent),
        "calibration": request.calibration,
        "made_by": dict(made_by),
    }


def _as_json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"


def published_lines(site: Site, request: Request, at: datetime) -> list[str]:
    """Return the terminal's last lines of a staging that ended well."""
    return published_terminal(
        request.project, request.mous, request.ticket, site.url(request.token), at, site.config.staging.retention_days
    )


def published_already(site: Site, request: Request) -> tuple[Staging, tuple[ProductFile, ...], tuple[str, ...]] | None:
    """Return what stands published under the request's token, if a crash came between its rename and its record.

    The directory appears only complete, so its receipt is believed; sizes are compared all the same. Raises FatalError
    if something else stands there.
    """
    if not request.token or not site.staging.is_published(request.token):
        return None
    receipt = json.loads(site.staging.read(request.token, "receipt.json"))
    if receipt["request"] != request.id or receipt["recipe"] != request.recipe:
        raise FatalError(f"the directory of request {request.id} holds the data of another one: look at its receipt")
    present = site.staging.files(request.token)
    files = []
    for entry in receipt["files"]:
        device, inode, size, modified_ns = present.get(entry["name"], (0, 0, -1, 0))
        if size != entry["size"]:
            raise FatalError(f"the published {entry['name']} of request {request.id} is not complete: look at it")
        files.append(
            ProductFile(
                name=entry["name"],
                execution_block=entry["execution_block"] or "",
                size=size,
                sha256=entry["sha256"],
                device=device,
                inode=inode,
                modified_ns=modified_ns,
            )
        )
    published_at = datetime.fromisoformat(receipt["published"])
    absent = tuple(receipt["execution_blocks_without_calfields"])
    return _staging(site, request, published_at), tuple(files), absent


def stands_as_recorded(site: Site, token: str) -> bool:
    """Return whether the directory of this token is published and its files are the recorded ones."""
    staging = site.ledger.staging(token)
    if staging is None or staging.withdrawn_at is not None or not site.staging.is_published(token):
        return False
    present = site.staging.files(token)
    files, _ = site.ledger.staged_files(token)
    return bool(files) and all(present.get(file.name, ())[:3] == (file.device, file.inode, file.size) for file in files)


def product_file(staged: StagedFile, execution_block: str) -> ProductFile:
    """Return the record of a file that was just staged."""
    return ProductFile(
        name=staged.name,
        execution_block=execution_block,
        size=staged.size,
        sha256=staged.sha256,
        device=staged.device,
        inode=staged.inode,
        modified_ns=staged.modified_ns,
    )
