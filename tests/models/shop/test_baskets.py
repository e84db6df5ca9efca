from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.shop.baskets import COMPANIONS, LARGEST_BASKET, SHRINKAGE, together
from models.shop.interest import Acts

DAY_US = 86_400_000_000
N = 6
INDEX = {f"i{i}": i for i in range(N)}
LINES = st.lists(st.tuples(st.integers(0, 4), st.integers(0, N - 1), st.integers(0, 2), st.booleans()), max_size=60)


def acts(lines, n=N, index=INDEX):
    customer, item, day, bought = (np.array([line[i] for line in lines], dtype=np.int64) for i in range(4))
    people = int(customer.max(initial=0)) + 1
    return Acts([f"c{i}" for i in range(people)], list(index), customer, item, np.ones(len(lines)), day * DAY_US, bought.astype(bool))


def told(found, item):
    places, nearness = found.of(item)
    return dict(zip(places.tolist(), nearness.tolist(), strict=True))


@given(LINES)
def test_companions_are_what_two_customers_bought_on_one_day(lines):
    found, baskets, buyers, both = together(acts(lines), INDEX), defaultdict(set), defaultdict(set), defaultdict(set)
    for customer, item, day, bought in lines:
        if bought:
            baskets[customer, day].add(item)
            buyers[item].add(customer)
    for (customer, _), items in baskets.items():
        for one in items:
            for other in items - {one}:
                both[one, other].add(customer)
    for one in range(N):
        wanted = {
            other: len(both[one, other]) / (np.sqrt(len(buyers[one]) * len(buyers[other])) + SHRINKAGE)
            for other in range(N)
            if len(both[one, other]) > 1
        }
        assert told(found, one) == pytest.approx(wanted, abs=1e-6)
        nearness = list(told(found, one).values())
        assert nearness == sorted(nearness, reverse=True)


def test_a_dealers_basket_says_nothing_and_each_item_keeps_its_nearest():
    n = LARGEST_BASKET + 1
    index = {f"i{i}": i for i in range(n)}
    dealers = [(customer, item, 0, True) for customer in range(2) for item in range(n)]
    assert together(acts(dealers, index=index), index).items.size == 0
    small = [(customer + 2, item, 0, True) for item in range(1, n) for customer in range(2 * item, 2 * item + 2) for item in (0, item)]
    found = together(acts(dealers + small, index=index), index)
    assert set(told(found, 0)) == set(range(1, n))
    assert n - 1 <= COMPANIONS
    assert set(told(found, 3)) == {0}
