"""The event of the archive's tools becomes a request for a restore, or is refused with what is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecal.domain.identifiers import Malformed
from stagecal.domain.restore.event import RestoreEvent, read_event

METADATA: dict[str, Any] = {
    "workflowName": "AlmaOusRestoreWorkflow",
    "processingSite": "NAASC",
    "deliveryFormat": "CMS",
    "telescope": "ALMA",
    "fileSetIds": ["uid://A002/Xd248b5/Xa7a"],
    "ousStatusId": "uid://A001/X12d1/X23e",
    "projectCodeOrDataType": "2017.1.00370.S",
    "cliCorrId": "f1a4dd4a-73ae-4aa7-ac30-9397d31dadab",
    "casaHome": "/home/casa/packages/RHEL6/release/casa-release-5.4.0-68",
}
EVENT: dict[str, Any] = {
    "eventName": "runAlmaBasicRestoreWorkflow",
    "type": "edu.nrao.archive.workflow.messaging.commands.StartWorkflow",
    "additionalPaths": [],
    "metadata": METADATA,
}
EXPECTED = RestoreEvent(
    mous="uid://A001/X12d1/X23e",
    project="2017.1.00370.S",
    casa_home="/home/casa/packages/RHEL6/release/casa-release-5.4.0-68",
    execution_blocks=("uid://A002/Xd248b5/Xa7a",),
    processing_site="NAASC",
    correlation_id="f1a4dd4a-73ae-4aa7-ac30-9397d31dadab",
)


def changed(**metadata: Any) -> str:
    return json.dumps({**EVENT, "metadata": {**METADATA, **metadata}})


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(EVENT),
        json.dumps(EVENT, indent=4).replace("\n", "\r\n"),
        "\ufeff" + json.dumps(EVENT),
        json.dumps(EVENT)[1:-1],
        "\n" + json.dumps(EVENT, indent=1)[1:-1].strip() + ",\n",
        json.dumps(METADATA),
        changed(fileSetIds="uid://A002/Xd248b5/Xa7a"),
        changed(ousStatusId="uid___A001_X12d1_X23e"),
        changed(deliveryPath="/of/a/larger/event", userOptions={"any": ["thing"]}),
        changed(casaHome=METADATA["casaHome"] + "/"),
    ],
    ids=[
        *("whole", "CRLF", "BOM", "without braces", "without braces, comma", "metadata only"),
        *("one EB", "sanitized UID", "unknown fields", "slash at the end"),
    ],
)
def test_the_event_of_the_archives_tools_is_read_in_its_forms(text: str) -> None:
    assert read_event(text) == EXPECTED


def test_only_the_mous_is_needed() -> None:
    assert read_event('{"ousStatusId": "uid://A001/X1/X2"}') == RestoreEvent(mous="uid://A001/X1/X2")


def test_an_address_is_taken_for_the_mail_at_the_end() -> None:
    assert read_event(changed(email="somebody@example.org")).email == "somebody@example.org"


def test_a_data_type_is_no_project() -> None:
    assert read_event(changed(projectCodeOrDataType="EXECBLOCK")).project == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no JSON"),
        ("[]", "no JSON object"),
        ("{", "no JSON"),
        (json.dumps({**EVENT, "metadata": "x"}), "metadata is no object"),
        (json.dumps({**EVENT, "type": "a.b.StopWorkflow"}), "only StartWorkflow is done here"),
        (changed(workflowName="VlassCalibration"), "only AlmaOusRestoreWorkflow"),
        (changed(telescope="EVLA"), "telescope is 'EVLA'"),
        (changed(deliveryFormat="SDM"), "only CMS"),
        (changed(ousStatusId=""), "must name the MOUS"),
        (changed(ousStatusId=None), "must name the MOUS"),
        (changed(ousStatusId="uid://A001/X1"), "is not a UID"),
        (changed(ousStatusId=7), "ousStatusId is no text"),
        (changed(projectCodeOrDataType="2017.1.S"), "is not a project code"),
        (changed(casaHome="../casa"), "absolute path"),
        (changed(casaHome="/opt/casa\nrm -rf"), "control characters"),
        (changed(email="nobody"), "is not an e-mail address"),
        (changed(fileSetIds=[1]), "no list of UIDs"),
        (changed(fileSetIds=["../x"]), "is not a UID"),
        ('{"ousStatusId": "uid://A001/X1/X2", "ousStatusId": "uid://A001/X1/X3"}', "says 'ousStatusId' twice"),
        ('{"a":' * 100_000, "nested too deeply"),
        (" " * 10 + "x" * 1_000_001, "longer than a million"),
    ],
)
def test_what_is_no_such_event_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(Malformed, match=message) as refused:
        read_event(text)
    assert "\n" not in str(refused.value)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=10), lambda inner: st.lists(inner, max_size=3)
    )
)
def test_a_field_of_any_kind_is_read_or_refused(value: object) -> None:
    for name in METADATA:
        try:
            assert read_event(changed(**{name: value})).mous == EXPECTED.mous
        except Malformed as refused:
            assert "\n" not in str(refused)
