"""Whether a MOUS can be restored: the first reason against it, and what can be done instead."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from stagecal.domain.archive_facts import ExecutionBlock
from stagecal.domain.restore.facts import ArchivedFile
from stagecal.domain.restore.restorable import restorable
from tests.domain.restore.examples import PASSED, SEMIPASS, facts_of

FACTS = facts_of({2: [PASSED]}, {SEMIPASS: "SemiPass"})


def without(*parts: str) -> tuple[ArchivedFile, ...]:
    """Return the files of the example without those whose name or class has one of these parts."""
    return tuple(file for file in FACTS.files if not any(part in file.name + " " + file.file_class for part in parts))


def test_the_example_can_be_restored() -> None:
    answer = restorable(FACTS)
    assert answer.possible
    assert answer.reason == "calibrated by the pipeline, with 1 execution block(s) of QA0 Pass"


MANUAL = ArchivedFile("uid___A002_Xcf92df_X3453.ms.scriptForCalibration.py", "script")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"project": "2011.0.00010.S"}, "Cycle 0 project: its calibrated data are in the archive already"),
        ({"execution_blocks": ()}, "the archive lists no execution block of this MOUS"),
        (
            {"execution_blocks": (ExecutionBlock(PASSED, "Fail"), ExecutionBlock(SEMIPASS, "SemiPass"))},
            "no execution block has QA0 Pass (1 Fail, 1 SemiPass)",
        ),
        ({"execution_blocks": (ExecutionBlock(PASSED, ""),)}, "no execution block has QA0 Pass (1 unknown)"),
        ({"files": ()}, "not calibrated: the archive has no product"),
        ({"files": (*FACTS.files, MANUAL)}, "calibrated by hand (uid___A002_Xcf92df_X3453.ms.scriptForCalibration.py)"),
        ({"files": without("science")}, "not calibrated completely: no files of class science"),
        ({"files": without("calibration")}, "not archived separately (usual before October 2017)"),
        ({"files": without("pipeline_manifest")}, "no pipeline manifest"),
        ({"files": without("casa_piperestorescript")}, "no casa_piperestorescript.py"),
    ],
)
def test_each_reason_against_it_says_what_to_do(changes: dict[str, Any], reason: str) -> None:
    answer = restorable(dataclasses.replace(FACTS, **changes))
    assert not answer.possible
    assert reason in answer.reason
    assert len(answer.reason.split()) > 9
    assert "\n" not in answer.reason


def test_the_first_reason_counts() -> None:
    facts = dataclasses.replace(FACTS, project="2011.0.00010.S", files=(MANUAL,), execution_blocks=())
    assert "Cycle 0" in restorable(facts).reason


def test_a_script_for_the_pi_is_no_sign_of_manual_calibration() -> None:
    assert any("scriptForPI" in file.name for file in FACTS.files)
    assert restorable(FACTS).possible
