"""Measurement sets read and mended without CASA: check, seal, repair, digests, and the fields with their intents.

Uses the standard library only and nothing else of stagecal. Never call it in a process that has the same
measurement set open through casacore (closing table.lock would drop that process's locks).
"""

from stagecal.measurement_set.check import CheckReport, TableReport, check_measurement_set, check_table
from stagecal.measurement_set.digests import Comparison, compare, record, record_of
from stagecal.measurement_set.errors import (
    CannotVerify,
    Damaged,
    InUse,
    MeasurementSetError,
    NotAMeasurementSet,
)
from stagecal.measurement_set.fields import FieldUse, parse_intents, read_fields
from stagecal.measurement_set.files import Directory, Files
from stagecal.measurement_set.finding import Found, NotRead, find_tables
from stagecal.measurement_set.repair import (
    Refusal,
    RepairPlan,
    TableRepair,
    carry_out,
    find_splits,
    plan_repair,
)
from stagecal.measurement_set.seal import SealReport, seal_measurement_set, seal_table
from stagecal.measurement_set.tables import Table, Verdict, read_table
from stagecal.measurement_set.tar import Tar, open_tar

__all__ = [
    "CannotVerify",
    "CheckReport",
    "Comparison",
    "Damaged",
    "Directory",
    "FieldUse",
    "Files",
    "Found",
    "InUse",
    "MeasurementSetError",
    "NotAMeasurementSet",
    "NotRead",
    "Refusal",
    "RepairPlan",
    "SealReport",
    "Table",
    "TableRepair",
    "TableReport",
    "Tar",
    "Verdict",
    "carry_out",
    "check_measurement_set",
    "check_table",
    "compare",
    "find_splits",
    "find_tables",
    "open_tar",
    "parse_intents",
    "plan_repair",
    "read_fields",
    "read_table",
    "record",
    "record_of",
    "seal_measurement_set",
    "seal_table",
]
