import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.segments.lifecycle import STATES, Lifecycle

ages = st.floats(0, 1_000)


@settings(max_examples=80)
@given(st.lists(st.tuples(ages, ages, st.integers(0, 40)), min_size=1, max_size=30))
def test_everybody_ever_seen_has_exactly_one_state(rows):
    first, last, visits = (
        np.array(column, dtype=np.float64) for column in zip(*[(max(a, b), min(a, b), v) for a, b, v in rows], strict=True)
    )
    states = Lifecycle().states(first, last, visits)
    assert set(states) <= set(STATES)
    assert ((first <= 30) == (states == "new")).all()
    assert ((last > 60) == (states == "dormant")).all()
    assert (visits[states == "frequent"] >= 2).all()
    assert (visits[states == "sporadic"] < 2).all()


@pytest.mark.parametrize(
    ("first", "last", "visits", "state"),
    [(30, 0, 9, "new"), (31, 0, 2, "frequent"), (31, 0, 1, "sporadic"), (400, 60, 0, "sporadic"), (400, 61, 5, "dormant")],
)
def test_the_edges_of_each_state(first, last, visits, state):
    assert Lifecycle().states(*(np.array([float(value)]) for value in (first, last, visits))).tolist() == [state]


def test_a_longer_window_asks_for_as_many_visits_a_month_of_who_is_not_long_here():
    rule = Lifecycle(window_days=90)
    first, last = np.array([45.0, 45.0, 200.0, 200.0]), np.ones(4)
    assert rule.states(first, last, np.array([3.0, 2.0, 6.0, 5.0])).tolist() == ["frequent", "sporadic", "frequent", "sporadic"]


def test_somebody_never_seen_has_no_state():
    assert Lifecycle().states(np.array([np.nan]), np.array([np.nan]), np.array([0.0])).tolist() == [None]


@pytest.mark.parametrize("wrong", [{"new_days": 90}, {"new_days": 0}, {"frequent_visits": 0}, {"window_days": 0}])
def test_rules_that_would_put_somebody_in_two_states_are_refused(wrong):
    with pytest.raises(ValueError, match="Lifecycle"):
        Lifecycle(**wrong)
