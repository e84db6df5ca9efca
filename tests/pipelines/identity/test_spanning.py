import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.identity import spanning
from pipelines.identity.spanning import Joins

LINKS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 5)), max_size=20)


def joins(links: list[tuple[int, int, int]]) -> Joins:
    left, right, time = (np.array([link[at] for link in links], np.int64) for at in range(3))
    return Joins(left, right, time)


@settings(max_examples=80)
@given(LINKS, st.permutations(range(10)))
def test_few_nodes_one_by_one_and_many_at_once_give_the_same(links: list[tuple[int, int, int]], order: list[int]) -> None:
    created = np.arange(10) - 100
    with pytest.MonkeyPatch.context() as patch:
        found = spanning.spread(joins(links), np.array(order), created), spanning.components(10, joins(links).left, joins(links).right)
        patch.setattr(spanning, "FEW", 0)
        again = spanning.spread(joins(links), np.array(order), created), spanning.components(10, joins(links).left, joins(links).right)
    np.testing.assert_array_equal(found[0], again[0])
    for labels in (found[1], again[1]):
        np.testing.assert_array_equal(labels[:, None] == labels, found[0][0][:, None] == found[0][0])


@settings(max_examples=80)
@given(LINKS, st.permutations(range(10)))
def test_a_node_is_connected_since_the_links_known_by_then_lead_to_the_first(links: list[tuple[int, int, int]], order: list[int]) -> None:
    root, since = spanning.spread(joins(links), np.array(order), np.full(10, -1))
    for node in range(10):
        reached = [time for time in [-1, *range(6)] if is_one([link for link in links if link[2] <= time], node, int(root[node]))]
        assert since[node] == reached[0]


def ends(links: list[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray]:
    return joins(links).left, joins(links).right


def is_one(links: list[tuple[int, int, int]], one: int, other: int) -> bool:
    labels = spanning.components(10, *ends(links))
    return bool(labels[one] == labels[other])
