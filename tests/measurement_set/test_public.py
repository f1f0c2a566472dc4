"""Measurement sets of several observatories, if there are any: STAGECAL_PUBLIC_MS names the directory that holds them.

Those in the source distribution of pyuvdata 3.2.3 were looked at (docs/measurement-sets.md says how to get them).
"""

import os
from pathlib import Path

import pytest

from stagecal.measurement_set import Found, check_measurement_set, check_table, find_tables

from .conftest import Casa

DIRECTORY = os.environ.get("STAGECAL_PUBLIC_MS")
# The one of ALMA was made smaller by its keepers, without this table.
KNOWN_LACK = "ASDM_CALATMOSPHERE: its directory is missing"


@pytest.mark.skipif(not DIRECTORY, reason="STAGECAL_PUBLIC_MS names no directory with measurement sets")
def test_real_ones_are_healthy_and_casacore_reports_the_same_rows(casa: Casa) -> None:
    looked_at = 0
    for found in find_tables(Path(str(DIRECTORY))):
        assert isinstance(found, Found), found
        report = (check_measurement_set if found.is_measurement_set else check_table)(found.files)
        problems = [line for line in report.problems if not line.startswith(KNOWN_LACK)]
        assert problems == [], found.files.place
        if found.in_tar is None:
            path = Path(found.files.place).absolute()
            seen = casa.look(path)[str(path)]
            for table in report.tables:
                if table.rows is not None:
                    assert table.reported_rows == table.rows == seen["rows"][table.name], (path, table.name)
                    looked_at += 1
    assert looked_at > 20
