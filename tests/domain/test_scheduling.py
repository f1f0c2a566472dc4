"""Which node gets the next job, and what people are told about the others."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecal.domain.scheduling import Wanted, choose_node, explain_choice
from stagecal.ports import NodeLoad

NOBODY: frozenset[str] = frozenset()


def look(name: str, load: float | None, *labels: str, trouble: str = "") -> NodeLoad:
    return NodeLoad(name, load, labels, trouble)


CASES = {
    "no node at all": ([], "", NOBODY, None),
    "the lowest load per core": ([look("a", 0.5), look("b", 0.2), look("c", 0.4)], "", NOBODY, "b"),
    "of equals the first name": ([look("b", 0.2), look("a", 0.2)], "", NOBODY, "a"),
    "a load at the limit is still fit": ([look("a", 0.9)], "", NOBODY, "a"),
    "a load above the limit is not": ([look("a", 0.91)], "", NOBODY, None),
    "a silent node is not": ([look("a", None, trouble="no answer"), look("b", 0.8)], "", NOBODY, "b"),
    "only nodes with the label": ([look("a", 0.1), look("b", 0.8, "rhel5", "big")], "rhel5", NOBODY, "b"),
    "no node with the label": ([look("a", 0.1, "rhel8")], "rhel5", NOBODY, None),
    "a part of a label is none": ([look("a", 0.1, "rhel58")], "rhel5", NOBODY, None),
    "avoided nodes are left out": ([look("a", 0.1), look("b", 0.8)], "", frozenset({"a"}), "b"),
    "all avoided": ([look("a", 0.1)], "", frozenset({"a"}), None),
    "a negative load is a lie": ([look("a", -1.0), look("b", 0.5)], "", NOBODY, "b"),
    "no number is no load": ([look("a", math.nan), look("b", 0.5)], "", NOBODY, "b"),
}


@pytest.mark.parametrize(("loads", "label", "avoid", "expected"), CASES.values(), ids=CASES.keys())
def test_choice(loads: list[NodeLoad], label: str, avoid: frozenset[str], expected: str | None) -> None:
    assert choose_node(loads, Wanted(label, 0.9, avoid)) == expected


def test_each_node_gets_its_reason_in_the_given_order() -> None:
    loads = [
        look("z", 0.30, "casa"),
        look("silent", None, "casa", trouble="connection refused"),
        look("busy", 3.0, "casa"),
        look("other", 0.0, "rhel5"),
        look("tried", 0.0, "casa"),
        look("y", 0.25, "casa"),
        look("odd", math.inf, "casa"),
    ]
    opinions = explain_choice(loads, Wanted("casa", 0.9, frozenset({"tried"})))
    assert [(opinion.name, opinion.chosen, opinion.reason) for opinion in opinions] == [
        ("z", False, "fit, but y comes first (load per core 0.30)"),
        ("silent", False, "gets no job: connection refused"),
        ("busy", False, "is busy: load per core 3.00 is above 0.90"),
        ("other", False, "has no label casa"),
        ("tried", False, "must not be used again for this request"),
        ("y", True, "chosen: load per core 0.25"),
        ("odd", False, "reports an impossible load (inf)"),
    ]


NODES = st.lists(
    st.builds(
        NodeLoad,
        name=st.sampled_from("abcdefgh"),
        load_per_core=st.none() | st.floats(),
        labels=st.lists(st.sampled_from(["x", "y"])).map(tuple),
    ),
    unique_by=lambda node: node.name,
)


COUNTS = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 3))


@given(
    loads=NODES,
    label=st.sampled_from(["", "x"]),
    avoid=st.frozensets(st.sampled_from("abc")),
    jobs=COUNTS,
    limits=COUNTS,
)
def test_order_of_looks_does_not_matter_and_the_explanation_agrees_with_the_choice(
    loads: list[NodeLoad], label: str, avoid: frozenset[str], jobs: dict[str, int], limits: dict[str, int]
) -> None:
    wanted = Wanted(label, 1.0, avoid, jobs, limits)
    chosen = choose_node(loads, wanted)
    assert chosen == choose_node(loads[::-1], wanted)
    opinions = explain_choice(loads, wanted)
    assert [opinion.name for opinion in opinions if opinion.chosen] == ([] if chosen is None else [chosen])
    assert chosen not in avoid
    assert chosen is None or chosen not in limits or jobs.get(chosen, 0) < limits[chosen]


def test_a_node_without_a_job_of_ours_comes_before_an_idler_one_with_a_job() -> None:
    loads = [look("a", 0.1), look("b", 0.5)]
    wanted = Wanted("", 0.9, jobs={"a": 1})
    assert choose_node(loads, wanted) == "b"
    assert [opinion.reason for opinion in explain_choice(loads, wanted)] == [
        "fit, but b comes first (load per core 0.10, 1 of our jobs)",
        "chosen: load per core 0.50",
    ]


def test_a_node_gets_no_more_jobs_than_it_may_have() -> None:
    loads = [look("a", 0.1)]
    assert choose_node(loads, Wanted("", 0.9, jobs={"a": 1}, limits={"a": 2})) == "a"
    wanted = Wanted("", 0.9, jobs={"a": 2}, limits={"a": 2})
    assert choose_node(loads, wanted) is None
    assert explain_choice(loads, wanted)[0].reason == "has 2 of our jobs, and may have 2"
