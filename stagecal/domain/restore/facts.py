"""What the archive knows of a MOUS that a restore needs: plain records, as the queries return them."""

from __future__ import annotations

from dataclasses import dataclass

from stagecal.domain.archive_facts import ExecutionBlock


@dataclass(frozen=True)
class ArchivedFile:
    """One product file of a MOUS: its name in the archive (which may begin with `member.`) and its class.

    `file_class` is calibration, script, science, ...; `version` is the archive's version of the file, '' if it
    records none.
    """

    name: str
    file_class: str
    version: str = ""


@dataclass(frozen=True)
class SchedBlock:
    """A scheduling block under a MOUS, its status entity, and that one's state (FullyObserved, Deleted, ...)."""

    uid: str
    status_uid: str
    state: str
    execution_blocks: tuple[str, ...]


@dataclass(frozen=True)
class RestoreFacts:
    """Everything that the planning of a restore asks the archive, read in one round.

    `project_uid` and `part_id` name the ObsProject entity and the part of it that is this MOUS; `status_xml` is the
    OUSStatus document. A text that the archive does not have is ''.
    """

    mous: str
    project: str
    project_uid: str
    part_id: str
    project_status_uid: str
    sous_uid: str
    gous_uid: str
    execution_blocks: tuple[ExecutionBlock, ...]
    sched_blocks: tuple[SchedBlock, ...]
    files: tuple[ArchivedFile, ...]
    status_xml: str
