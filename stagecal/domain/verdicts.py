"""The judgement of a request: which verdict the archive's facts give on a day, and what the contact is told.

Rules of the ESO procedure of 2022 for calibrated ALMA data: the first rule that matches gives the verdict. A request
for calibrator fields skips the question of entitlement, and only that one, because calibrator data are public at once.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from stagecal.domain.archive_facts import MousFacts
from stagecal.domain.identifiers import is_cycle_0


class Verdict(StrEnum):
    """The words that stand above the quoted request."""

    INVALID_MOUS_UID = "INVALID MOUS UID"
    CYCLE_0_PROJECT = "CYCLE 0 PROJECT"
    NOT_ENTITLED = "NOT ENTITLED"
    MOUS_IN_QA3 = "MOUS IN QA3"
    MOUS_NOT_DELIVERED = "MOUS NOT DELIVERED"
    NO_QA0_PASS_DATA = "NO QA0_PASS DATA"
    NOT_A_CALIBRATOR_FIELD = "NOT A CALIBRATOR FIELD"


NO_QA0_PASS_TEXT = (
    "ERROR: No QA0_PASS data found for this MOUS. Please double-check MOUS UID. "
    "If confirmed, please inform the user that ALMA cannot offer calibrated data for this MOUS."
)
CYCLE_0_TEXT = (
    "The calibrated data of Cycle 0 projects (2011.*) are in the ALMA archive already: "
    "please remind the user to download them from there."
)


def judge(
    facts: MousFacts | None, *, project: str, email: str, calfields: tuple[str, ...], now: datetime
) -> Verdict | None:
    """Given the archive's facts (None: no such MOUS) and what is asked, return the verdict that refuses, or None.

    An empty `email` asks for no check of entitlement: an operator's own act.
    """
    if facts is None or facts.project != project:
        return Verdict.INVALID_MOUS_UID
    if is_cycle_0(project):
        return Verdict.CYCLE_0_PROJECT
    if email and not calfields and not is_entitled(facts, email, now):
        return Verdict.NOT_ENTITLED
    if facts.state.partition("/")[0] == "QA3InProgress":
        return Verdict.MOUS_IN_QA3
    if facts.state != "Delivered":
        return Verdict.MOUS_NOT_DELIVERED
    if not facts.passed:
        return Verdict.NO_QA0_PASS_DATA
    return None


def is_entitled(facts: MousFacts, email: str, now: datetime) -> bool:
    """Return whether this person may have the data now: anyone once they are released, else the PI and delegees."""
    if facts.release is not None and facts.release <= now:
        return True
    return email.casefold() in {person.email.casefold() for person in facts.entitled}


def advice(verdict: Verdict) -> str:
    """Return what the contact can tell the user or do next, as it is written below the verdict."""
    return {
        Verdict.INVALID_MOUS_UID: (
            "The archive does not know this MOUS, or it does not belong to this project. "
            "Please check the MOUS UID and the project code with the user. "
            "For the corrected request please use a fresh request and no history of the previous mails."
        ),
        Verdict.CYCLE_0_PROJECT: CYCLE_0_TEXT,
        Verdict.NOT_ENTITLED: (
            "You can tell the user: You presently do not have access permission for the requested data. "
            "Please wait until the data becomes public."
        ),
        Verdict.MOUS_IN_QA3: (
            "The quality of this MOUS is being reviewed (QA3). "
            "Calibrated data can be requested again when the review is over."
        ),
        Verdict.MOUS_NOT_DELIVERED: (
            "Please investigate the status of the MOUS and tell the user what can be done. "
            "Calibrated data can be requested when it is delivered."
        ),
        Verdict.NO_QA0_PASS_DATA: (
            "No execution block of this MOUS has passed QA0. Please double-check the MOUS UID. "
            "If confirmed, please inform the user that ALMA cannot offer calibrated data for this MOUS."
        ),
        Verdict.NOT_A_CALIBRATOR_FIELD: (
            "Only fields that were observed as calibrators, and never as science target, are given without a check "
            "of entitlement. Please check the exact field names (they are case-sensitive) with the user."
        ),
    }[verdict]
