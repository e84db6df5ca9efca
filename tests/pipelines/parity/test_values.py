"""Two rows are equal to the last bit and to their type, or they are told apart."""

import pytest

from pipelines.parity.values import Comparison, View, filled, instant, micros

VIEW = View("customer_activity", ("customer_id",), ("views_7d", "first_event_at"))


@pytest.mark.parametrize(
    ("online", "offline", "wrong"),
    [
        ({"views_7d": 1, "first_event_at": 5}, {"views_7d": 1, "first_event_at": 5}, 0),
        ({"views_7d": 1, "first_event_at": None}, {"views_7d": 1, "first_event_at": 0}, 1),
        ({"views_7d": 1, "first_event_at": 5}, {"views_7d": 1.0, "first_event_at": 5}, 1),
        ({"views_7d": 2**53, "first_event_at": 5}, {"views_7d": 2**53 + 1, "first_event_at": 6}, 2),
    ],
    ids=["equal", "null is not zero", "type", "beyond floats"],
)
def test_values_are_compared_to_the_last_bit(online, offline, wrong):
    found = Comparison()
    found.add(VIEW, online, offline, 0)
    assert (found.checked, found.mismatches, len(found.examples)) == (2, wrong, wrong)


def test_count_of_nothing_is_zero_and_an_instant_of_nothing_is_null():
    assert filled({"views_7d": None, "first_event_at": None}) == {"views_7d": 0, "first_event_at": None}


def test_instants_come_back_to_the_microsecond():
    assert micros(instant(1_772_361_423_000_001)) == 1_772_361_423_000_001


def test_every_feature_that_differs_has_an_example_however_many_there_are():
    total = Comparison()
    for n in range(20):
        one = Comparison()
        one.note(f"v:f{n}", n, 0, n)
        total += one
    assert {each.feature for each in total.examples} == set(total.by_feature)
