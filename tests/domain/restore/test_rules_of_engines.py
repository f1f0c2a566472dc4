"""An engine is chosen only if it repeats all that the archive's own restore script does; a bad version never."""

from __future__ import annotations

import dataclasses

import pytest

from stagecal.domain.casa_versions import (
    CasaChoice,
    casa_faults,
    casa_for_version,
    is_older,
    pipeline_key,
    release_key,
)
from stagecal.domain.restore.engines import ENGINES, choose_engine
from stagecal.domain.restore.errors import RestoreError
from stagecal.domain.restore.restore_script import read_restore_script
from tests.domain.restore.examples import SCRIPT, SCRIPT_WITH_OTHER_CALLS, example_plan

ALL = set(ENGINES)
PLAN = example_plan()
RENORMALISED = example_plan(renorm=True)
SINGLE_DISH = dataclasses.replace(PLAN, task="hsd_restoredata")
PLAIN = read_restore_script(SCRIPT)
FIXED = read_restore_script(SCRIPT_WITH_OTHER_CALLS)


def with_parameters(text: str) -> str:
    return SCRIPT.replace("ocorr_mode='ca'", text)


def test_a_plain_restore_goes_to_the_pipeline_where_there_is_one() -> None:
    assert choose_engine(PLAN, PLAIN, available=ALL).engine == "pipeline"


def test_without_a_casa_with_pipeline_the_modular_one_does_it_and_says_why() -> None:
    choice = choose_engine(PLAN, PLAIN, available={"casatasks"})
    assert choice.engine == "casatasks"
    assert choice.reason == "not pipeline: it is not configured here; not script: it is not configured here"


def test_other_calls_of_the_archives_script_need_the_script_engine() -> None:
    choice = choose_engine(PLAN, FIXED, available=ALL)
    assert choice.engine == "script"
    assert "also calls hifa_importdata, fixsyscaltimes" in choice.reason


def test_nothing_is_left_out_where_the_script_engine_is_missing() -> None:
    with pytest.raises(RestoreError, match=r"no engine of this site.*casatasks: the archive's restore script also"):
        choose_engine(PLAN, FIXED, available={"casatasks"})


@pytest.mark.parametrize("engine", ["pipeline", "casatasks"])
def test_a_wanted_engine_that_would_leave_something_out_is_refused(engine: str) -> None:
    with pytest.raises(RestoreError, match=rf"engine {engine} cannot restore this MOUS: .*fixsyscaltimes"):
        choose_engine(PLAN, FIXED, wanted=engine, available=ALL)


def test_a_wanted_engine_that_is_not_here_is_refused() -> None:
    with pytest.raises(RestoreError, match="engine script is not configured here: there are pipeline, casatasks"):
        choose_engine(PLAN, PLAIN, wanted="script", available={"casatasks", "pipeline"})


def test_a_wanted_engine_is_taken() -> None:
    assert choose_engine(PLAN, PLAIN, wanted="casatasks", available=ALL).engine == "casatasks"
    assert choose_engine(PLAN, FIXED, wanted="command", available=ALL).engine == "command"


@pytest.mark.parametrize(
    ("parameters", "engine"),
    [
        ("ocorr_mode='ca'", "pipeline"),
        ("ocorr_mode='ca', bdfflags=True, lazy=False, copytoraw=True", "pipeline"),
        ("ocorr_mode='ca', products_dir='../products', rawdata_dir='../rawdata'", "pipeline"),
        ("ocorr_mode='ao'", "script"),
        ("bdfflags=False", "script"),
        ("lazy=True", "script"),
        ("asis='Source Receiver'", "script"),
        ("rawdata_dir='/elsewhere'", "script"),
        ("unheard_of=1", "script"),
        ("bdfflags=some_variable", "script"),
        ("**options", "script"),
        ("asis=[]", "script"),
    ],
)
def test_parameters_that_a_ppr_does_not_say_need_the_script_engine(parameters: str, engine: str) -> None:
    assert choose_engine(PLAN, read_restore_script(with_parameters(parameters)), available=ALL).engine == engine


def test_single_dish_data_need_the_pipeline() -> None:
    script = read_restore_script(SCRIPT.replace("hifa_", "hsd_").replace("'ca'", "'ao', hm_rasterscan='time'"))
    assert choose_engine(SINGLE_DISH, script, available=ALL).engine == "pipeline"
    with pytest.raises(RestoreError, match="hsd_restoredata is single-dish calibration"):
        choose_engine(SINGLE_DISH, script, wanted="casatasks", available=ALL)


def test_a_ppr_cannot_give_sessions_to_a_task_without_them() -> None:
    plan = dataclasses.replace(PLAN, task="hsdn_restoredata")
    script = read_restore_script("hsdn_restoredata(vis=['uid___A002_X1_X2'])")
    assert choose_engine(plan, script, available=ALL).engine == "script"


def test_a_renormalisation_needs_a_pipeline_that_repeats_it() -> None:
    assert choose_engine(RENORMALISED, PLAIN, available=ALL, casa_version="6.2.1-7").engine == "pipeline"
    with pytest.raises(RestoreError, match="skips the renormalisation"):
        choose_engine(RENORMALISED, PLAIN, available={"pipeline", "script"}, casa_version="6.1.1-15")
    with pytest.raises(RestoreError, match="asks for hifa_renorm, which needs the pipeline"):
        choose_engine(RENORMALISED, PLAIN, wanted="casatasks", available=ALL)


def test_a_version_known_as_bad_is_refused_for_pipeline_and_script() -> None:
    for wanted in ("pipeline", "script"):
        with pytest.raises(RestoreError, match="into session_1 without a word"):
            choose_engine(PLAN, PLAIN, wanted=wanted, available=ALL, pipeline_version="2020.1.0.36")


def test_casatasks_never_restore_what_a_newer_casa_calibrated() -> None:
    plan = dataclasses.replace(PLAN, casa_version="6.8.0-3")
    reason = "casatasks 6.7.0.31 are older than CASA 6.8.0-3, which calibrated it"
    with pytest.raises(RestoreError, match=f"engine casatasks cannot restore this MOUS: {reason}"):
        choose_engine(plan, PLAIN, wanted="casatasks", available=ALL, casatasks_version="6.7.0.31")
    passed_over = choose_engine(plan, PLAIN, available={"casatasks", "command"}, casatasks_version="6.7.0.31")
    assert passed_over.engine == "command" and f"not casatasks: {reason}" in passed_over.reason
    for version in ("6.8.0.3", "6.8.1", ""):
        chosen = choose_engine(plan, PLAIN, wanted="casatasks", available=ALL, casatasks_version=version)
        assert chosen.engine == "casatasks"


# --- versions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "pipeline", "renorm", "refused"),
    [
        ("6.1.1-15", "2020.1.0.40", False, False),
        ("6.1.1-10", "", False, True),
        ("6.1.1-15", "2020.1.0.36", False, True),
        ("", "2020.1.0.36", False, True),
        ("", "", True, False),
        ("5.6.1-8", "42866", False, False),
        ("6.2.1-7", "2021.2.0.128", True, False),
        ("6.2.1.7", "", True, False),
        ("6.2.1-3", "", True, True),
        ("6.2.1", "", True, False),
        ("", "2021.2.0.94", True, True),
        ("5.6.1-8", "42866 (trunk)", True, True),
        ("6.5.4-9", "2023.1.0.124", True, False),
        ("6.1.1-10-pipeline-2020.1.0.36", "", False, True),
    ],
)
def test_versions_that_go_wrong_without_a_word_are_refused(
    version: str, pipeline: str, renorm: bool, refused: bool
) -> None:
    assert bool(casa_faults(version, pipeline, renorm=renorm)) is refused


def choices(*versions: str) -> list[CasaChoice]:
    return [CasaChoice(version, f"/opt/casa-{version}", "") for version in versions]


@pytest.mark.parametrize(
    ("wanted", "configured", "chosen"),
    [
        ("5.1.1-5", ["4.7.2", "5.1.1-5", "5.4.0-70"], "5.1.1-5"),
        ("5.1.1-5", ["5.1.1", "5.4.0"], "5.1.1"),
        ("5.1.1-5", ["5.1.1-4", "5.6.1-8", "5.4.0-70"], "5.4.0-70"),
        ("5.6.1-8", ["6.1.1-10", "6.2.1-7"], "6.2.1-7"),
        ("6.2.1.7", ["6.2.1-7-pipeline-2021.2.0.128"], "6.2.1-7-pipeline-2021.2.0.128"),
        ("4.7.2-REL (r39762)", ["4.7.2", "5.1.1"], "4.7.2"),
        ("6.5.4", ["5.1.1", "6.4.1"], None),
        ("5.1.1-5", [], None),
        ("Undefined", ["5.1.1"], None),
        ("", ["5.1.1"], None),
    ],
)
def test_the_same_casa_or_the_closest_newer_one_is_chosen(
    wanted: str, configured: list[str], chosen: str | None
) -> None:
    found = casa_for_version(wanted, choices(*configured))
    assert (found.version if found else None) == chosen


def test_manual_calibration_wants_the_same_casa() -> None:
    assert casa_for_version("5.1.1-5", choices("5.4.0-70", "5.1.1"), exact=True) == choices("5.1.1")[0]
    assert casa_for_version("5.1.1-5", choices("5.4.0-70", "5.1.1-4"), exact=True) is None


def test_pipeline_revisions_are_older_than_pipeline_releases() -> None:
    versions = ["r30986", "40896 (Pipeline-CASA51-P2-B)", "r42866", "2020.1.0.40", "2021.2.0.128", "2022.2.0.64"]
    assert sorted(versions, key=pipeline_key) == versions
    assert pipeline_key("") == pipeline_key("Undefined") == release_key("Undefined") == ()


@pytest.mark.parametrize(
    ("version", "than", "older"),
    [
        ("6.7.0.31", "6.7.0-31", False),
        ("6.7.0.31", "6.7.0", False),
        ("6.7.0", "6.7.0-31", False),
        ("6.7.0.31", "6.7.0-32", True),
        ("6.7.0.31", "6.7.1-2-pipeline-2025.1.0.3", True),
        ("6.7.0.31", "5.1.1-5", False),
        ("", "6.7.1", False),
        ("6.7.0.31", "", False),
        ("6.7.0.31", "Undefined", False),
    ],
)
def test_only_a_known_version_is_older_than_a_known_one(version: str, than: str, older: bool) -> None:
    assert is_older(version, than) is older
