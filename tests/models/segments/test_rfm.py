import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.segments.rfm import LEVELS, TIERS, RfmEdges

SETTINGS = settings(max_examples=60)
customers = st.lists(
    st.tuples(st.one_of(st.just(float("nan")), st.integers(0, 400).map(float)), st.integers(0, 30), st.integers(-500, 100_000)),
    min_size=1, max_size=60,
)  # fmt: skip


def columns(rows):
    return tuple(np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))


@SETTINGS
@given(customers)
def test_equal_customers_have_equal_scores_and_the_order_of_rows_makes_no_difference(rows):
    values = columns(rows)
    scored = RfmEdges.learn(*values).score(*values)
    assert scored.groupby([np.nan_to_num(column, nan=-1) for column in values])["tier"].nunique().max() == 1
    turned = tuple(column[::-1] for column in values)
    again = RfmEdges.learn(*turned).score(*turned)
    assert scored["tier"].tolist() == again["tier"].tolist()[::-1]


@SETTINGS
@given(customers)
def test_whoever_is_better_in_one_and_no_worse_in_the_others_is_never_in_a_lower_tier(rows):
    values = columns(rows)
    edges, rank = RfmEdges.learn(*values), {tier: place for place, tier in enumerate(TIERS)}
    before = edges.score(*values)
    better = edges.score(values[0] - 30, values[1] + 3, values[2] + 5_000)
    bought = before["tier"] != TIERS[3]
    assert (better["tier"].map(rank) <= before["tier"].map(rank))[bought].all()
    assert (better["recency"] >= before["recency"])[bought].all()


@SETTINGS
@given(customers)
def test_scores_lie_between_1_and_5_and_who_never_bought_has_none(rows):
    values = columns(rows)
    scored = RfmEdges.learn(*values).score(*values)
    never = np.isnan(values[0]) | (values[1] == 0)
    assert (scored.loc[never, "tier"] == "never bought").all()
    assert scored.loc[never, ["recency", "frequency", "monetary"]].isna().all(axis=None)
    bought = scored.loc[~never, ["recency", "frequency", "monetary"]]
    assert bought.apply(lambda column: column.between(1, LEVELS)).all(axis=None)


def test_fifths_of_distinct_customers_have_the_five_scores_in_stated_units():
    days = np.arange(100.0)
    edges = RfmEdges.learn(days, 100 - days, 1_000 * (100 - days))
    scored = edges.score(days, 100 - days, 1_000 * (100 - days))
    assert scored["recency"].value_counts().tolist() == [20] * 5
    assert scored["recency"].iloc[[0, 99]].tolist() == [5, 1]  # seen today is best
    assert edges.recency_days == (79.0, 59.0, 39.0, 19.0)
    assert edges.frequency_orders == (21.0, 41.0, 61.0, 81.0)


def test_a_heap_of_equal_values_shares_one_score_in_the_middle_of_its_ranks():
    orders = np.array([1.0] * 60 + [2.0] * 20 + [9.0] * 20)
    days, cents = np.ones(100), np.full(100, 500.0)
    scored = RfmEdges.learn(days, orders, cents).score(days, orders, cents)
    assert scored.groupby(orders)["frequency"].nunique().tolist() == [1, 1, 1]
    assert scored.groupby(orders)["frequency"].first().tolist() == [2, 4, 5]
    assert scored["recency"].nunique() == scored["monetary"].nunique() == 1


def test_nobody_bought_and_nobody_there():
    nobody = np.array([np.nan, np.nan])
    assert RfmEdges.learn(nobody, np.zeros(2), np.zeros(2)).score(nobody, np.zeros(2), np.zeros(2))["tier"].tolist() == ["never bought"] * 2
    assert len(RfmEdges.learn(*(np.empty(0),) * 3).score(*(np.empty(0),) * 3)) == 0


def test_edges_of_yesterday_score_customers_of_today_by_the_same_yardstick():
    days = np.arange(100.0)
    edges = RfmEdges.learn(days, 100 - days, 100 - days)
    scored = edges.score(np.array([19.0, 20.0]), np.array([50.0, 50.0]), np.array([50.0, 50.0]))
    assert scored["recency"].tolist() == [5, 4]
    alone = RfmEdges.learn(np.array([20.0]), np.array([50.0]), np.array([50.0]))
    assert alone.score(np.array([20.0]), np.array([50.0]), np.array([50.0]))["recency"].item() == 3  # control: by edges of its own


@pytest.mark.parametrize("row", [(1.0, 0.0, 500.0), (float("nan"), 3.0, 500.0)])
def test_no_order_or_no_purchase_known_is_never_bought(row):
    values = tuple(np.array([value]) for value in row)
    assert RfmEdges.learn(*values).score(*values)["tier"].item() == "never bought"
