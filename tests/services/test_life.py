"""The life of a request on a whole site: real ledger, files, jobs and mails."""

from __future__ import annotations

from pathlib import Path

import pytest

from stagecal.domain.requests import Outcome, State
from tests.sites import SiteForTests, make_test_site


@pytest.fixture
def site(tmp_path: Path) -> SiteForTests:
    return make_test_site(tmp_path)


def test_a_full_request_is_delivered_once_and_its_trigger_goes_last(site: SiteForTests) -> None:
    site.place()
    site.run()
    request = site.only()
    assert (request.state, request.outcome) == (State.CLOSED, Outcome.DELIVERED)
    (directory,) = site.published()
    assert (directory / "uid___A002_Xcf92df_X3453.ms.split.cal.tar").is_file()
    (mail,) = site.mails()
    assert f"http://localhost:8000/preview/{directory.name}" in mail
    assert site.triggers() == [] and site.job_directories() == [] and site.calibrations() == 1
