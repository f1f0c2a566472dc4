"""What the archive says about a MOUS: plain records, as the queries return them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

QA0_PASS = "Pass"


@dataclass(frozen=True)
class ExecutionBlock:
    """One EB (= ASDM) of a MOUS with the result of its quality check at the telescope (Pass, SemiPass, Fail, ...)."""

    uid: str
    qa0: str


@dataclass(frozen=True)
class EntitledPerson:
    """Somebody who may have the proprietary data of a MOUS: its PI, or a delegee of the PI."""

    email: str
    role: str


@dataclass(frozen=True)
class MousFacts:
    """Everything that a judgement needs to know, read in one round.

    `state` is the archive's whole text (`QA3InProgress/UserInitiated`). `release` is when the data become public
    (UTC), None if the archive has no date: then they are not. `products` are the archived calibration products as
    name and version, sorted: they identify the calibration.
    """

    mous: str
    project: str
    state: str
    release: datetime | None
    entitled: tuple[EntitledPerson, ...]
    execution_blocks: tuple[ExecutionBlock, ...]
    products: tuple[str, ...]

    @property
    def passed(self) -> tuple[str, ...]:
        """The UIDs of the EBs with QA0 Pass, sorted: these are calibrated and delivered."""
        return tuple(sorted({block.uid for block in self.execution_blocks if block.qa0 == QA0_PASS}))
