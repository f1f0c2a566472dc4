"""The ways in which looking at a measurement set can fail; every message is one line for a person who must act."""


def one_line(text: str) -> str:
    """Return `text` fit for a terminal: names out of damaged files may hold anything."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


class MeasurementSetError(Exception):
    """Anything that this package refuses to do or to believe."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class NotAMeasurementSet(MeasurementSetError):
    """The path holds no casacore table, or a table that is no measurement set."""


class Damaged(MeasurementSetError):
    """The files contradict each other or end too early: no answer from them can be trusted."""


class CannotVerify(MeasurementSetError):
    """The files may be sound, but they are stored in a way that is not known here."""


class InUse(MeasurementSetError):
    """Another process has the measurement set open."""
