"""What stops a restore: one kind of error, because in each case a person has to look."""

from __future__ import annotations


class RestoreError(Exception):
    """What the archive says of a MOUS cannot be restored as it is; the message says what is wrong and what to do."""


class DisagreementError(RestoreError):
    """The sources disagree about the sessions; the message ends with a table of who says what.

    `reasons` are the disagreements, one sentence each.
    """

    def __init__(self, message: str, reasons: tuple[str, ...]) -> None:
        super().__init__(message)
        self.reasons = reasons
