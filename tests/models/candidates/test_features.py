"""Features of pairs: what they count, and that nothing but what was known at the moment can move them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.candidates.features import Features
from models.candidates.occasion import Occasion


def occasion(acts: list[tuple[int, int, float, float]], *, n_customers: int = 3, n_items: int = 4) -> Occasion:
    """acts: customer, item, age in days, weight."""
    columns = np.array(acts, dtype=float).reshape(-1, 4)
    return Occasion(
        n_customers=n_customers,
        n_items=n_items,
        customer=columns[:, 0].astype(np.int64),
        item=columns[:, 1].astype(np.int64),
        age_days=columns[:, 2],
        weight=columns[:, 3],
        category=np.array([0, 0, 1, -1] * n_items)[:n_items].astype(np.int64),
        price=np.array([10.0, 20.0, 40.0, np.nan] * n_items)[:n_items],
        offered_days=np.full(n_items, 100.0),
    )


BOUGHT_AGAIN = occasion([(0, 0, 30.5, 1), (0, 0, 10.5, 1), (0, 1, 10.2, 1), (0, 2, 3.5, 0.15), (1, 0, 1.5, 1)])


def at(now: Occasion, customer: int, item: int) -> dict[str, float]:
    return {name: float(column[0]) for name, column in Features.of(now).at(np.array([customer]), np.array([item])).items()}


def test_what_a_customer_did_with_an_item_is_counted_by_days_and_dated() -> None:
    found = at(BOUGHT_AGAIN, 0, 0)
    assert found["own_purchases"] == 2
    assert (found["own_age"], found["own_first_age"], found["own_gap"]) == (10.5, 30.5, 20.0)
    assert found["gap_left"] == pytest.approx(10.5 / 20)
    assert found["own_purchases_28"] == 1
    assert found["touch_age"] == 10.5
    looked = at(BOUGHT_AGAIN, 0, 2)
    assert (looked["own_purchases"], looked["touches"], looked["touches_7"]) == (0, 0.15, 0.15)
    assert np.isnan(looked["own_age"])
    assert np.isnan(at(BOUGHT_AGAIN, 1, 3)["own_purchases"])  # nothing was done with it: unknown, not 0


def test_what_a_customer_and_an_item_are_like_is_told_for_every_pair() -> None:
    found = at(BOUGHT_AGAIN, 0, 3)
    assert (found["customer_orders"], found["customer_items"], found["customer_again"]) == (2, 2, 0.5)
    assert found["customer_age"] == 10
    assert found["order_gap_left"] == pytest.approx(10 / 20)
    assert np.isnan(found["item_price"])
    assert at(BOUGHT_AGAIN, 1, 0)["item_again"] == 0.5
    assert at(BOUGHT_AGAIN, 1, 1)["price_ratio"] == pytest.approx(2.0)
    assert at(BOUGHT_AGAIN, 0, 1)["category_share"] == pytest.approx(3 / 3.15)
    assert np.isnan(at(BOUGHT_AGAIN, 2, 0)["customer_age"])  # somebody of whom nothing is known


def test_lines_of_one_day_are_one_order() -> None:
    twice = occasion([(0, 0, 10.6, 1), (0, 0, 10.4, 1)])
    assert at(twice, 0, 0)["own_purchases"] == 1
    assert at(twice, 0, 0)["customer_orders"] == 1
    for lines in ([(0, 0, 10.6, 1), (0, 0, 10.4, 1)], [(0, 0, 10.4, 1), (0, 0, 10.6, 1)]):
        assert at(occasion(lines), 0, 0)["own_age"] == 10.4  # as old as its last line, in whatever order they are held


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_the_order_of_acts_and_the_number_of_customers_do_not_matter(seed: int) -> None:
    rng = np.random.default_rng(seed)
    acts = [(int(rng.integers(3)), int(rng.integers(4)), float(rng.uniform(0.1, 60)), float(rng.choice([1, 0.5, 0.15]))) for _ in range(20)]
    customer, item = np.repeat(np.arange(3), 4), np.tile(np.arange(4), 3)
    one = Features.of(occasion(acts)).at(customer, item)
    for other in (occasion(acts[::-1]), occasion(acts, n_customers=9)):
        two = Features.of(other).at(customer, item)
        assert list(one) == list(two)
        assert all(np.allclose(one[name], two[name], equal_nan=True) for name in one)


def test_a_shop_without_purchases_or_prices_gives_the_same_columns() -> None:
    views = occasion([(0, 0, 1.0, 0.15)])
    bare = Occasion(**{**vars(views), "price": np.full(4, np.nan), "category": np.full(4, -1)})
    full = Features.of(BOUGHT_AGAIN).at(np.array([0]), np.array([0]))
    found = Features.of(bare).at(np.array([0]), np.array([0]))
    assert list(found) == list(full)
    assert np.isnan(found["item_purchases_28"][0])
    assert np.isnan(found["category_share"][0])


def test_weights_fade_by_halves_and_windows_end() -> None:
    now = occasion([(0, 0, 10.0, 1), (0, 1, 20.0, 0.5), (1, 0, 40.0, 1)])
    assert now.matrix(half_life_days=10).toarray()[0, :2].tolist() == [0.5, 0.125]
    assert now.matrix(half_life_days=10, within_days=15).nnz == 1
    assert now.matrix(half_life_days=np.inf, purchases_only=True).sum() == 2
    assert now.bought().toarray()[:2, :2].tolist() == [[1, 0], [1, 0]]
    assert now.attributes(n_bands=3).sum(axis=1).ravel().tolist() == [[3, 3, 3, 0]]
