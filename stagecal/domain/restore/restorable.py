"""Whether a MOUS can be restored: the first rule that matches refuses, and says what can be done instead.

NRAO's rule stands in the middle: a calibration is complete when files of class `science` are archived, and no script
named scriptFor...Cal... marks it as made by hand.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from stagecal.domain.archive_facts import QA0_PASS
from stagecal.domain.identifiers import is_cycle_0
from stagecal.domain.restore.errors import RestoreError
from stagecal.domain.restore.facts import RestoreFacts
from stagecal.domain.restore.product_names import is_manual_calibration, manifest_of, restore_script_of

_CALIBRATION = "calibration"
_SCIENCE = "science"


@dataclass(frozen=True)
class Restorability:
    """Yes or no, and why: one line for the person who asked."""

    possible: bool
    reason: str


def restorable(facts: RestoreFacts) -> Restorability:
    """Return whether the archive holds what a restore of this MOUS needs, or the first reason why not."""
    reason = _reason_against(facts)
    if reason:
        return Restorability(False, reason)
    passed = sum(1 for block in facts.execution_blocks if block.qa0 == QA0_PASS)
    return Restorability(True, f"calibrated by the pipeline, with {passed} execution block(s) of QA0 {QA0_PASS}")


def _reason_against(facts: RestoreFacts) -> str:
    classes = {file.file_class.casefold() for file in facts.files}
    if is_cycle_0(facts.project):
        return "Cycle 0 project: its calibrated data are in the archive already, download them from there"
    if not facts.execution_blocks:
        return "the archive lists no execution block of this MOUS: check its UID"
    if not any(block.qa0 == QA0_PASS for block in facts.execution_blocks):
        states = Counter(block.qa0 or "unknown" for block in facts.execution_blocks)
        said = ", ".join(f"{number} {state}" for state, number in sorted(states.items()))
        return f"no execution block has QA0 {QA0_PASS} ({said}): there are no data to calibrate"
    if not facts.files:
        return "not calibrated: the archive has no product of this MOUS, ask again when it is delivered"
    manual = sorted(file.name for file in facts.files if is_manual_calibration(file.name))
    if manual:
        return f"calibrated by hand ({manual[0]}): run the scriptForPI of its delivery with the same CASA version"
    if _SCIENCE not in classes:
        return "not calibrated completely: no files of class science are archived, ask again when it is delivered"
    if _CALIBRATION not in classes:
        return (
            "its calibration products are not archived separately (usual before October 2017): "
            "download the delivery package and run its scriptForPI"
        )
    try:
        manifest_of(facts.files)
        restore_script_of(facts.files)
    except RestoreError as error:
        return f"{error}; the delivery package with its scriptForPI is another way"
    return ""
