"""Which fields a measurement set holds, how many rows each has, and for what it was observed.

Fails closed: what cannot be read raises, so that no field ever passes for a calibrator by a gap in the reading.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stagecal.measurement_set.check import MAIN, read_measurement_set
from stagecal.measurement_set.columns import integer_runs, strings
from stagecal.measurement_set.errors import CannotVerify, Damaged, NotAMeasurementSet
from stagecal.measurement_set.files import Files
from stagecal.measurement_set.tables import Table


@dataclass(frozen=True)
class FieldUse:
    """One row of FIELD and its use in the main table.

    `rows` counts the main table's rows of this field; `intents` are the observing intents of all of them, such as
    CALIBRATE_PHASE or OBSERVE_TARGET; `rows_without_intent` counts those whose state is not given or empty.
    """

    id: int
    name: str
    rows: int
    intents: frozenset[str]
    rows_without_intent: int = 0


def read_fields(place: Path | Files) -> tuple[FieldUse, ...]:
    """Return every row of FIELD in its order, with its use.

    Raises NotAMeasurementSet if `place` is none, Damaged if its tables contradict each other, CannotVerify if a
    column that is needed is stored in a way not known here.
    """
    tables = read_measurement_set(place)
    path = tables[MAIN].files.place
    main, field = _sound(path, tables, MAIN), _sound(path, tables, "FIELD")
    names = strings(field, "NAME")
    state_intents = _state_intents(path, tables)
    pairs = _pairs(main)
    if len(names) != field.true_rows or sum(pairs.values()) != main.true_rows:
        raise Damaged(f"{path}: FIELD or MAIN has another number of rows than its columns; check it")
    rows: Counter[int] = Counter()
    silent: Counter[int] = Counter()
    intents: dict[int, set[str]] = defaultdict(set)
    for (field_id, state_id), number in pairs.items():
        if not 0 <= field_id < len(names):
            raise Damaged(f"{path}: MAIN has FIELD_ID {field_id}, FIELD has {len(names)} rows; check it")
        if state_intents and not -1 <= state_id < len(state_intents):
            raise Damaged(f"{path}: MAIN has STATE_ID {state_id}, STATE has {len(state_intents)} rows; check it")
        found = state_intents[state_id] if state_intents and state_id >= 0 else frozenset()
        rows[field_id] += number
        intents[field_id] |= found
        if not found:
            silent[field_id] += number
    return tuple(
        FieldUse(number, name, rows[number], frozenset(intents[number]), silent[number])
        for number, name in enumerate(names)
    )


def parse_intents(observing_mode: str) -> frozenset[str]:
    """Return the intents in a value of OBS_MODE: separated by commas, each without its part after '#'."""
    intents = (part.split("#", 1)[0].strip() for part in observing_mode.split(","))
    return frozenset(intent for intent in intents if intent)


def _sound(path: str, tables: dict[str, Table], name: str) -> Table:
    table = tables.get(name)
    if table is None or (table.description and table.description.kind != "PlainTable"):
        raise NotAMeasurementSet(f"{path} has no {name} table of its own; give the path of a measurement set")
    if table.damage:
        raise Damaged(f"{path}: {name}: {'; '.join(table.damage)}")
    if table.true_rows is None:
        raise CannotVerify(f"{path}: {name}: {'; '.join(table.problems)}")
    return table


def _state_intents(path: str, tables: dict[str, Table]) -> list[frozenset[str]]:
    """Return the intents of each row of STATE; nothing if the observatory left the table out or empty."""
    if "STATE" not in tables:
        return []
    state = _sound(path, tables, "STATE")
    if state.true_rows == 0:
        return []
    modes = strings(state, "OBS_MODE")
    if len(modes) != state.true_rows:
        raise Damaged(f"{path}: STATE has another number of rows than OBS_MODE; check it")
    return [parse_intents(mode) for mode in modes]


def _pairs(main: Table) -> Counter[tuple[int, int]]:
    """Count the rows of the main table for each pair of FIELD_ID and STATE_ID."""
    fields = integer_runs(main, "FIELD_ID")
    states = integer_runs(main, "STATE_ID")
    pairs: Counter[tuple[int, int]] = Counter()
    field, field_rows = next(fields, (0, 0))
    state, state_rows = next(states, (0, 0))
    while field_rows and state_rows:
        together = min(field_rows, state_rows)
        pairs[field, state] += together
        field_rows -= together
        state_rows -= together
        if not field_rows:
            field, field_rows = next(fields, (0, 0))
        if not state_rows:
            state, state_rows = next(states, (0, 0))
    if field_rows or state_rows or _left(fields) or _left(states):
        raise Damaged(f"{main.files.place}: FIELD_ID and STATE_ID have different numbers of rows; check it")
    return pairs


def _left(runs: Iterator[tuple[int, int]]) -> bool:
    return next(runs, None) is not None
