"""The terminal output of a staging, word for word as operators know it from the ESO procedure of 2022.

Each function returns the lines of one moment. Programs and people search for these words: change none of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime

from stagecal.domain.identifiers import masked_token, sanitized
from stagecal.domain.products import tar_name


def start(url: str, calfields: Sequence[str]) -> list[str]:
    """The first lines: where the data will be, and whether only calibrators are staged."""
    lines = []
    if calfields:
        lines.append(f"*** Based on your selection, only data for field {','.join(calfields)} will be staged. ***")
    lines.append(f"The staging directory will be accessible at {url}")
    return lines


def restoring(mous: str) -> list[str]:
    """A restore was accepted: the words of NRAO's almaRestore."""
    return [f"Restoring a CMS of {mous} to spool."]


def restore_runs(request_id: str, directory: str) -> list[str]:
    """A restore was started: the words of NRAO's almaRestore."""
    return [f"Alma Restore ({request_id}) running in: {directory}"]


def dispatched(node: str, account: str, work_directory: str, *, old_casa: bool) -> list[str]:
    """A node was chosen and gets its work directory."""
    return [
        *(["Old project, using RHEL5 build of CASA."] if old_casa else []),
        "Looking for cluster node with low load ...",
        f"DATAMACHINE chosen: {node}",
        f"Working as {account} ...",
        f"(re-)creating directory {work_directory}",
        "Now generating the calibrated MS(s) ...",
    ]


def checking(execution_blocks: Iterable[str]) -> list[str]:
    """The search for products that are staged already."""
    return [
        "Checking for pre-existing MSs for the following EBs ...",
        *(sanitized(block) for block in execution_blocks),
    ]


def not_found(execution_block: str) -> list[str]:
    """The search ended at this EB: all products are made anew."""
    return [
        f"MS for {sanitized(execution_block)} was not found among the already staged MSs. Will not search further ...",
        "None or not all of the needed MSs found: Will regenerate all the MSs ...",
    ]


def found(root: str, token: str, execution_block: str) -> str:
    """A product of another directory is used again; that directory's token is its owner's secret."""
    return (
        f"Found pre-existing {root}/{masked_token(token)}/{tar_name(execution_block)} . "
        "Will try to use this instead of recreating it (making hard link) ..."
    )


SUBMITTED = "Generated the job script. Now submitting and waiting for completion ..."


def completed() -> list[str]:
    """The job ended well."""
    return ["Completed.", "Determining the list of generated MSs ..."]


def copied(sizes: dict[str, int], seconds: float) -> list[str]:
    """The products were brought into the staging directory: names, bytes and rate as rsync says them."""
    total = sum(sizes.values())
    return [
        "Copying over the generated MSs ...",
        "receiving incremental file list",
        *sizes,
        "",
        f"sent 0 bytes received {total} bytes {total / max(seconds, 1e-6):.2f} bytes/sec",
        f"total size is {total} speedup is 1.00",
    ]


CLEANED = ["Deleting redundant logs ...", "Deleting temporary work directory ..."]


def published(project: str, mous: str, ticket: str, url: str, at: datetime, retention_days: int) -> list[str]:
    """The data are there."""
    return [
        f"Staging of calibrated MS(s) for {project} {sanitized(mous)} helpdesk ticket #{ticket} completed at {url}",
        f"Data will be deleted {retention_days} days from {at:%a %b %e %H:%M:%S UTC %Y} "
        "unless you put a .donotremove into the directory.",
    ]


def failed(staging_directory: str, mous: str, work_directory: str) -> list[str]:
    """The staging failed."""
    lines = [
        f"Failed. Please investigate {staging_directory} and possibly remove incomplete data belonging to MOUS {mous}",
    ]
    if work_directory:
        lines.append(f"The working directory {work_directory} on the EU ARC cluster was not removed.")
    return lines
