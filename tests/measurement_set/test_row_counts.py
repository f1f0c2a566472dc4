"""What is read natively is what casacore reads: row counts and columns, in real and in random tables."""

from pathlib import Path
from typing import Any

import pytest

from stagecal.measurement_set import CannotVerify, Verdict, check_measurement_set, read_table
from stagecal.measurement_set.aipsio import STRING
from stagecal.measurement_set.check import read_measurement_set
from stagecal.measurement_set.columns import integer_parts, integer_range, integer_runs, strings

from .conftest import Casa


def test_every_table_of_every_measurement_set_has_the_rows_that_casacore_reports(
    casa: Casa, made: Path, products: Path
) -> None:
    paths = [*made.glob("*.ms"), *products.glob("*.ms"), *products.glob("*.cal")]
    native = {str(path): check_measurement_set(path) for path in paths}
    compared = 0
    for path, seen in casa.look(*paths).items():
        reported = {table.name: table.reported_rows for table in native[path].tables}
        stored = {table.name: table.rows for table in native[path].tables}
        assert reported == stored == seen["rows"], path
        compared += len(reported)
    assert compared > 80


def test_splits_leave_row_counts_of_zero_in_healthy_tables(products: Path) -> None:
    """The reason for all this: CASA's own products name 0 rows in table.dat and rely on table.lock."""
    tables = read_measurement_set(products / "transformed.ms")
    stale = {name for name, table in tables.items() if table.verdict is Verdict.DEPENDS_ON_LOCK}
    assert {"DATA_DESCRIPTION", "POLARIZATION", "PROCESSOR", "STATE"} <= stale
    for name in stale - {"HISTORY"}:
        description = tables[name].description
        assert description is not None and description.header.rows == 0, name


def test_random_tables_have_the_rows_that_casacore_reports(random_tables: dict[str, Any]) -> None:
    verdicts = set()
    byte_orders = set()
    for path, seen in random_tables.items():
        table = read_table(Path(path))
        assert (table.reported_rows, table.true_rows, table.problems) == (seen["rows"], seen["rows"], ()), path
        assert table.description is not None
        verdicts.add(table.verdict)
        byte_orders.add(table.description.big_endian)
    assert verdicts == {Verdict.OK, Verdict.DEPENDS_ON_LOCK}
    assert byte_orders == {True, False}


def test_random_columns_have_the_values_that_casacore_reads(random_tables: dict[str, Any]) -> None:
    managers = set()
    for path, seen in random_tables.items():
        table = read_table(Path(path))
        assert table.description is not None
        kinds = {manager.number: manager.kind for manager in table.description.managers}
        for name, values in seen["columns"].items():
            column = table.description.column(name)
            assert column is not None
            managers.add((kinds[column.manager], column.data_type))
            if column.data_type == STRING:
                assert strings(table, name) == values, (path, name)
            else:
                runs = integer_runs(table, name)
                assert [value for value, rows in runs for _ in range(rows)] == values, (path, name)
                assert integer_range(table, name) == ((min(values), max(values)) if values else None)
    assert len(managers) == 6, "three storage managers, integers and strings"


def test_array_files_are_demanded_only_where_casacore_has_them(random_tables: dict[str, Any]) -> None:
    demanded = 0
    for path in random_tables:
        table = read_table(Path(path))
        assert table.description is not None
        for manager in table.description.managers:
            columns = table.description.columns_of(manager.number)
            if not manager.kind.startswith("Tiled") and any(column.needs_array_file for column in columns):
                demanded += 1
                assert Path(path, f"table.f{manager.number}i").exists()
    assert demanded > 10


def test_a_column_is_read_in_parts_of_one_bucket(made: Path) -> None:
    table = read_table(made / "fresh.ms")
    lengths = [len(values) for values, _ in integer_parts(table, "ANTENNA1")]
    assert sum(lengths) == 1848
    assert max(lengths) * 4 <= 4096, "the bucket size of that table"


@pytest.mark.parametrize("column", ["DATA", "UVW", "TIME", "NO_SUCH_COLUMN"])
def test_a_column_that_is_no_column_of_integers_cannot_be_verified(made: Path, column: str) -> None:
    with pytest.raises(CannotVerify, match=column):
        list(integer_parts(read_table(made / "fresh.ms"), column))
