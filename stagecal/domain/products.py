"""Which calibrated data are the same: the recipe by which products are made decides reuse, never a file name.

A full request and a calibrator request can have products with the same file name; a link from one to the other would
publish proprietary data. So every product is known by (EB, kind, sorted calfields, calibration id), and one recipe
digest stands for all the products of a request.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

from stagecal.domain.identifiers import sanitized


@dataclass(frozen=True)
class ProductKey:
    """What one calibrated MS is: two products with equal keys hold the same data."""

    execution_block: str
    kind: str
    calfields: tuple[str, ...]
    calibration: str


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def calibration_id(mous: str, execution_blocks: Iterable[str], archived_products: Iterable[str], engine: str) -> str:
    """Return the digest that identifies a calibration.

    Given the MOUS, its expected EBs, the identity and version of its calibration products in the archive, and the
    engine with its version: if any of them changes, older products are not reused.
    """
    return _digest([mous, sorted(execution_blocks), sorted(archived_products), engine])


def product_keys(execution_blocks: Iterable[str], calfields: Iterable[str], calibration: str) -> tuple[ProductKey, ...]:
    """Return the key of each product of a request, sorted by EB."""
    fields = tuple(sorted(set(calfields)))
    kind = "calibrator" if fields else "full"
    return tuple(ProductKey(block, kind, fields, calibration) for block in sorted(set(execution_blocks)))


def recipe_id(keys: Iterable[ProductKey]) -> str:
    """Return the digest of all product keys of a request: equal recipes need equal products."""
    return _digest([[key.execution_block, key.kind, list(key.calfields), key.calibration] for key in keys])


def own_recipe(request_id: str) -> str:
    """Return a recipe that no other request has: what a restore leaves in its job directory is for nobody else."""
    return _digest(["restore", request_id])


def measurement_set_name(execution_block: str) -> str:
    """Return the name of the calibrated MS of an EB."""
    return f"{sanitized(execution_block)}.ms.split.cal"


def tar_name(execution_block: str) -> str:
    """Return the name of the file that is published for an EB."""
    return f"{measurement_set_name(execution_block)}.tar"
