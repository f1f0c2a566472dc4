"""The columns that every measurement set of version 2 has in its tables, without which casacore refuses it.

Of each: its name, the type of its values ([] for arrays), the units, and the measure. casacore looks at names and types
of all, and at units and measures where the standard gives some (the definition of MeasurementSet version 2.0, as
casacore has it). Tables that an observatory adds may hold what they like.
"""

from __future__ import annotations

from collections.abc import Iterator

from stagecal.measurement_set.aipsio import Record
from stagecal.measurement_set.description import TYPE_NAMES, Column, Description

COLUMNS = {
    "MAIN": """
        UVW double[] m,m,m uvw
        FLAG Bool[]
        FLAG_CATEGORY Bool[]
        WEIGHT float[]
        SIGMA float[]
        ANTENNA1 Int
        ANTENNA2 Int
        ARRAY_ID Int
        DATA_DESC_ID Int
        EXPOSURE double s
        FEED1 Int
        FEED2 Int
        FIELD_ID Int
        FLAG_ROW Bool
        INTERVAL double s
        OBSERVATION_ID Int
        PROCESSOR_ID Int
        SCAN_NUMBER Int
        STATE_ID Int
        TIME double s epoch
        TIME_CENTROID double s epoch
    """,
    "ANTENNA": """
        OFFSET double[] m,m,m position
        POSITION double[] m,m,m position
        TYPE String
        DISH_DIAMETER double m
        FLAG_ROW Bool
        MOUNT String
        NAME String
        STATION String
    """,
    "DATA_DESCRIPTION": """
        FLAG_ROW Bool
        POLARIZATION_ID Int
        SPECTRAL_WINDOW_ID Int
    """,
    "DOPPLER": """
        DOPPLER_ID Int
        SOURCE_ID Int
        TRANSITION_ID Int
        VELDEF double m/s doppler
    """,
    "FEED": """
        POSITION double[] m,m,m position
        BEAM_OFFSET double[] rad,rad direction
        POLARIZATION_TYPE String[]
        POL_RESPONSE Complex[]
        RECEPTOR_ANGLE double[] rad
        ANTENNA_ID Int
        BEAM_ID Int
        FEED_ID Int
        INTERVAL double s
        NUM_RECEPTORS Int
        SPECTRAL_WINDOW_ID Int
        TIME double s epoch
    """,
    "FIELD": """
        DELAY_DIR double[] rad,rad direction
        PHASE_DIR double[] rad,rad direction
        REFERENCE_DIR double[] rad,rad direction
        CODE String
        FLAG_ROW Bool
        NAME String
        NUM_POLY Int
        SOURCE_ID Int
        TIME double s epoch
    """,
    "FLAG_CMD": """
        APPLIED Bool
        COMMAND String
        INTERVAL double s
        LEVEL Int
        REASON String
        SEVERITY Int
        TIME double s epoch
        TYPE String
    """,
    "FREQ_OFFSET": """
        ANTENNA1 Int
        ANTENNA2 Int
        FEED_ID Int
        INTERVAL double s
        OFFSET double Hz
        SPECTRAL_WINDOW_ID Int
        TIME double s epoch
    """,
    "HISTORY": """
        APP_PARAMS String[]
        CLI_COMMAND String[]
        APPLICATION String
        MESSAGE String
        OBJECT_ID Int
        OBSERVATION_ID Int
        ORIGIN String
        PRIORITY String
        TIME double s epoch
    """,
    "OBSERVATION": """
        TIME_RANGE double[] s epoch
        LOG String[]
        SCHEDULE String[]
        FLAG_ROW Bool
        OBSERVER String
        PROJECT String
        RELEASE_DATE double s epoch
        SCHEDULE_TYPE String
        TELESCOPE_NAME String
    """,
    "POINTING": """
        DIRECTION double[] rad,rad direction
        ANTENNA_ID Int
        INTERVAL double s
        NAME String
        NUM_POLY Int
        TARGET double[] rad,rad direction
        TIME double s epoch
        TIME_ORIGIN double s epoch
        TRACKING Bool
    """,
    "POLARIZATION": """
        CORR_TYPE Int[]
        CORR_PRODUCT Int[]
        FLAG_ROW Bool
        NUM_CORR Int
    """,
    "PROCESSOR": """
        FLAG_ROW Bool
        MODE_ID Int
        TYPE String
        TYPE_ID Int
        SUB_TYPE String
    """,
    "SOURCE": """
        DIRECTION double[] rad,rad direction
        PROPER_MOTION double[] rad/s
        CALIBRATION_GROUP Int
        CODE String
        INTERVAL double s
        NAME String
        NUM_LINES Int
        SOURCE_ID Int
        SPECTRAL_WINDOW_ID Int
        TIME double s epoch
    """,
    "SPECTRAL_WINDOW": """
        MEAS_FREQ_REF Int
        CHAN_FREQ double[] Hz frequency
        REF_FREQUENCY double Hz frequency
        CHAN_WIDTH double[] Hz
        EFFECTIVE_BW double[] Hz
        RESOLUTION double[] Hz
        FLAG_ROW Bool
        FREQ_GROUP Int
        FREQ_GROUP_NAME String
        IF_CONV_CHAIN Int
        NAME String
        NET_SIDEBAND Int
        NUM_CHAN Int
        TOTAL_BANDWIDTH double Hz
    """,
    "STATE": """
        CAL double K
        FLAG_ROW Bool
        LOAD double K
        OBS_MODE String
        REF Bool
        SIG Bool
        SUB_SCAN Int
    """,
    "SYSCAL": """
        ANTENNA_ID Int
        FEED_ID Int
        INTERVAL double s
        SPECTRAL_WINDOW_ID Int
        TIME double s epoch
    """,
    "WEATHER": """
        ANTENNA_ID Int
        INTERVAL double s
        TIME double s epoch
    """,
}


def faults(name: str, description: Description) -> Iterator[str]:
    """Give for the table `name` every column that is not as the standard demands; nothing for other tables."""
    for line in COLUMNS.get(name, "").split("\n"):
        words = line.split()
        if not words:
            continue
        column = description.column(words[0])
        fault = "is missing" if column is None else _fault(column, *words[1:])
        if column is not None and column.name == "FLAG_CATEGORY" and "CATEGORY" not in column.keywords:
            fault = "has no keyword CATEGORY"
        if fault:
            yield f"{words[0]} {fault}"


def _fault(column: Column, kind: str, units: str = "", measure: str = "") -> str:
    """Return what is wrong with a column, nothing if it is as it has to be."""
    is_array = kind.endswith("[]")
    if column.data_type != TYPE_NAMES[kind.removesuffix("[]")] or column.scalar is is_array:
        return f"does not hold {'arrays of ' if is_array else ''}{kind.removesuffix('[]')}"
    each = tuple(units.split(","))
    if units and column.keywords.get("QuantumUnits") != each:
        return f"is not in {units}"
    if len(each) > 1 and column.fixed_shape and column.shape and column.shape[0] != len(each):
        return f"has the shape {list(column.shape)}, and holds vectors of {len(each)}"
    if measure and _measure(column.keywords) != measure:
        return f"is not known as a measure of {measure}"
    return ""


def _measure(keywords: Record) -> str:
    information = keywords.get("MEASINFO")
    if not isinstance(information, dict):
        return ""
    kind = information.get("type", information.get("Type"))
    if isinstance(kind, dict):  # the older form
        kind = kind.get("type")
    return str(kind)
