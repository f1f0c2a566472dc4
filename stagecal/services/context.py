"""Everything that the services work with, put together once by stagecal.wiring."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass

from stagecal.config import Config
from stagecal.ports import (
    Archive,
    Clock,
    Engines,
    Ledger,
    Locks,
    Mailer,
    Nodes,
    ProductFiles,
    StagingArea,
    Templates,
    Triggers,
)


@dataclass(frozen=True)
class Site:
    """The ports and settings of one installation."""

    config: Config
    clock: Clock
    archive: Archive
    triggers: Triggers
    mailer: Mailer
    templates: Templates
    ledger: Ledger
    nodes: Nodes
    staging: StagingArea
    engines: Engines
    products: ProductFiles
    locks: Locks
    new_secret: Callable[[], str] = lambda: secrets.token_hex(16)

    def url(self, token: str) -> str:
        """Return the address under which the directory of this token is served."""
        return f"{self.config.staging.url}/{token}"


STAGED_DATA_LOCK = "staged-data"
"""Held while files are linked from a staged directory and while directories are taken out of reach."""
