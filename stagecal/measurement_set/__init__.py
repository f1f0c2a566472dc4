"""Measurement sets read and mended without CASA: check, seal, and the fields with their intents.

Uses the standard library only and nothing else of stagecal. Never call it in a process that has the same
measurement set open through casacore (closing table.lock would drop that process's locks).
"""

from stagecal.measurement_set.check import CheckReport, TableReport, check_measurement_set
from stagecal.measurement_set.errors import (
    CannotVerify,
    Damaged,
    InUse,
    MeasurementSetError,
    NotAMeasurementSet,
)
from stagecal.measurement_set.fields import FieldUse, parse_intents, read_fields
from stagecal.measurement_set.seal import SealReport, seal_measurement_set
from stagecal.measurement_set.tables import Table, Verdict, read_table

__all__ = [
    "CannotVerify",
    "CheckReport",
    "Damaged",
    "FieldUse",
    "InUse",
    "MeasurementSetError",
    "NotAMeasurementSet",
    "SealReport",
    "Table",
    "TableReport",
    "Verdict",
    "check_measurement_set",
    "parse_intents",
    "read_fields",
    "read_table",
    "seal_measurement_set",
]
