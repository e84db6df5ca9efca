"""Features of pairs: what they count, and that nothing but what was known at the moment can move them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.candidates import features
from models.candidates.history import DAY_US
from models.candidates.occasion import Occasion
from models.candidates.shelf import Shelf

AT_US = 200 * DAY_US + DAY_US // 2  # noon


def occasion(acts: list[tuple[int, int, float, float]], *, n_customers: int = 3, n_items: int = 4) -> Occasion:
    """acts: customer, item, age in days, weight."""
    columns = np.array(acts, dtype=float).reshape(-1, 4)
    return Occasion(
        n_customers=n_customers,
        n_items=n_items,
        at_us=AT_US,
        customer=columns[:, 0].astype(np.int64),
        item=columns[:, 1].astype(np.int64),
        done_us=AT_US - np.rint(columns[:, 2] * DAY_US).astype(np.int64),
        weight=columns[:, 3],
        category=np.array([0, 0, 1, -1] * n_items)[:n_items].astype(np.int64),
        price=np.array([10.0, 20.0, 40.0, np.nan] * n_items)[:n_items],
        offered_us=np.full(n_items, AT_US - 100 * DAY_US),
    )


BOUGHT_AGAIN = occasion([(0, 0, 50.25, 1), (0, 0, 30.25, 1), (0, 1, 10.25, 1), (0, 2, 3.5, 0.15), (1, 0, 1.5, 1)])


def at(now: Occasion, customer: int, item: int) -> dict[str, float]:
    known = now.histories()
    out = np.zeros((len(features.NAMES), 1), dtype=np.float32)
    features.values(known.customer(customer).at(now.at_us), Shelf.of(now, known), np.array([item]), out)
    return dict(zip(features.NAMES, out[:, 0].tolist(), strict=True))


def test_what_a_customer_did_with_an_item_is_counted_and_dated() -> None:
    found = at(BOUGHT_AGAIN, 0, 0)
    assert found["own_purchases"] == 2
    assert (found["own_age"], found["touch_age"]) == (30.25, 30.25)
    looked = at(BOUGHT_AGAIN, 0, 2)
    assert (looked["own_purchases"], looked["touches"], looked["touch_age"]) == (0, pytest.approx(0.15), 3.5)
    assert np.isnan(looked["own_age"])
    assert np.isnan(at(BOUGHT_AGAIN, 1, 3)["own_purchases"])  # nothing was done with it: unknown, not 0


def test_what_a_customer_and_an_item_are_like_is_told_for_every_pair() -> None:
    found = at(BOUGHT_AGAIN, 0, 3)
    assert (found["customer_orders"], found["customer_items"], found["customer_again"]) == (2, 2, 0.5)
    assert (found["customer_age"], found["customer_first_age"], found["customer_gap"]) == (10.25, 30.25, 20.0)
    assert found["order_gap_left"] == pytest.approx(10.25 / 20)
    assert found["customer_orders_28"] == 1
    assert np.isnan(found["item_price"])
    assert at(BOUGHT_AGAIN, 1, 0)["item_again"] == 0.5
    assert at(BOUGHT_AGAIN, 1, 1)["price_ratio"] == pytest.approx(2.0)
    assert at(BOUGHT_AGAIN, 0, 1)["category_share"] == pytest.approx(3 / 3.15)
    assert at(BOUGHT_AGAIN, 0, 1)["category_age"] == 10.25
    assert np.isnan(at(BOUGHT_AGAIN, 0, 3)["category_share"])  # an item of no known category
    assert np.isnan(at(BOUGHT_AGAIN, 2, 0)["customer_age"])  # somebody of whom nothing is known


def test_what_has_no_known_category_counts_in_the_whole_and_in_no_category() -> None:
    both = occasion([(0, 0, 1.0, 1), (0, 3, 2.0, 1)])
    assert (at(both, 0, 0)["category_share"], at(both, 0, 0)["category_age"]) == (0.5, 1.0)
    assert all(np.isnan(at(both, 0, 3)[name]) for name in features.CATEGORY)


def test_lines_of_one_day_are_one_order() -> None:
    assert at(occasion([(0, 0, 10.25, 1), (0, 1, 10.125, 1)]), 0, 0)["customer_orders"] == 1
    for lines in ([(0, 0, 10.25, 1), (0, 0, 10.125, 1)], [(0, 0, 10.125, 1), (0, 0, 10.25, 1)]):
        found = at(occasion(lines), 0, 0)
        assert (found["own_age"], found["own_purchases"]) == (10.125, 2)  # in whatever order they are held


@given(st.integers(0, 10_000), st.sets(st.integers(0, 3), min_size=1))
@settings(max_examples=25)
def test_items_that_are_asked_for_together_are_told_as_each_alone(seed: int, asked: set[int]) -> None:
    rng, items = np.random.default_rng(seed), np.array(sorted(asked))
    acts = [(int(rng.integers(3)), int(rng.integers(4)), float(rng.uniform(0.1, 60)), float(rng.choice([1, 0.15]))) for _ in range(6)]
    now = occasion(acts)
    known, out = now.histories(), np.zeros((len(features.NAMES), len(items)), dtype=np.float32)
    features.values(known.customer(0).at(now.at_us), Shelf.of(now, known), items, out)
    assert np.array_equal(out.T, [list(at(now, 0, item).values()) for item in items], equal_nan=True)


@given(st.integers(0, 10_000))
@settings(max_examples=25)
def test_the_order_of_acts_and_the_number_of_customers_do_not_matter(seed: int) -> None:
    rng = np.random.default_rng(seed)
    acts = [(int(rng.integers(3)), int(rng.integers(4)), float(rng.uniform(0.1, 60)), float(rng.choice([1, 0.5, 0.15]))) for _ in range(20)]
    for other in (occasion(acts[::-1]), occasion(acts, n_customers=9)):
        for customer in range(3):
            for item in range(4):
                one, two = at(occasion(acts), customer, item), at(other, customer, item)
                assert np.allclose(list(one.values()), list(two.values()), equal_nan=True)


def test_a_shop_without_purchases_or_prices_gives_the_same_columns() -> None:
    views = occasion([(0, 0, 1.0, 0.15)])
    bare = Occasion(**{**vars(views), "price": np.full(4, np.nan), "category": np.full(4, -1)})
    found = at(bare, 0, 0)
    assert np.isnan(found["item_purchases_28"])
    assert np.isnan(found["category_share"])
    assert found["touch_age"] == 1.0


def test_weights_fade_by_halves_and_windows_end() -> None:
    now = occasion([(0, 0, 10.0, 1), (0, 1, 20.0, 0.5), (1, 0, 40.0, 1)])
    assert now.matrix(half_life_days=10).toarray()[0, :2].tolist() == [0.5, 0.125]
    assert now.matrix(half_life_days=10, within_days=15).nnz == 1
    assert now.matrix(half_life_days=np.inf, purchases_only=True).sum() == 2
    assert now.bought().toarray()[:2, :2].tolist() == [[1, 0], [1, 0]]
    assert now.attributes(n_bands=3).sum(axis=1).ravel().tolist() == [[3, 3, 3, 0]]
