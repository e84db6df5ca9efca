import numpy as np
import pandas as pd
import pytest
from scipy.stats import mannwhitneyu

from models.segments import behaviour
from models.segments.behaviour import PHRASES
from models.segments.profiling import cliffs_delta, profile


def features(**columns):
    base = {"first_event_age_days": 60.0, "last_event_age_days": 4.0, "sessions_total": 10, "views_total": 40, "orders_total": 5}
    return pd.DataFrame({**base, "revenue_cents_total": 25_000, "region": "north", **columns}, index=range(7, 10))


def test_rates_are_per_month_of_thirty_days_since_first_seen():
    found = behaviour(features())
    assert list(found.columns) == list(PHRASES)
    assert found.index.tolist() == [7, 8, 9]
    assert found.iloc[0].to_dict() == {
        "orders_per_month": 2.5, "visits_per_month": 5.0, "last_seen_days": 4.0, "mean_order_cents": 5_000.0, "views_per_visit": 4.0,
    }  # fmt: skip


def test_one_visit_on_the_first_day_is_one_a_month():
    found = behaviour(features(first_event_age_days=0.1, sessions_total=1, orders_total=0, revenue_cents_total=0))
    assert found["visits_per_month"].tolist() == [1, 1, 1]
    assert found["mean_order_cents"].tolist() == [0, 0, 0]


def test_missing_counts_are_nothing_and_more_returned_than_bought_is_nothing_spent():
    found = behaviour(features(sessions_total=None, views_total=pd.NA, revenue_cents_total=-500))
    assert (found[["visits_per_month", "views_per_visit", "mean_order_cents"]] == 0).all(axis=None)
    with pytest.raises(ValueError, match=r"\['orders_total'\] are missing"):
        behaviour(features().drop(columns="orders_total"))


def test_who_somebody_is_makes_no_difference():
    assert behaviour(features()).equals(behaviour(features(region="south", age_band="30-44", gender="f")))


def test_cliffs_delta_is_that_of_the_rank_sum_and_says_nothing_without_others():
    rng = np.random.default_rng(0)
    values, codes = rng.integers(0, 9, 200).astype(float), rng.integers(-1, 2, 200)
    values[::11] = np.nan
    known = ~np.isnan(values)
    for code in (0, 1):
        inside, outside = values[known & (codes == code)], values[known & (codes != code)]
        expected = 2 * mannwhitneyu(inside, outside).statistic / (len(inside) * len(outside)) - 1
        assert cliffs_delta(values, codes, 2)[code] == pytest.approx(expected)
    assert np.isnan(cliffs_delta(np.arange(3.0), np.zeros(3, dtype=np.int64), 1)).all()


def test_a_segment_is_told_in_plain_words_with_its_medians_and_share():
    often, seldom = np.repeat([3.1, 0.2], [12, 88]), np.repeat([4.0, 50.0], [12, 88])
    rows = pd.DataFrame({"orders_per_month": often, "last_seen_days": seldom, "mean_order_cents": 1_999.0})
    found = profile(rows, np.repeat([0, 1], [12, 88]), ["S1", "S2"], list(rows.columns))["description"].tolist()
    assert found[0] == "was here lately, last 4 days ago; buys often, 3.1 orders a month; 12 % of customers"
    assert found[1] == "has been away for long, last 50 days ago; buys seldom, 0.2 orders a month; 88 % of customers"


def test_who_never_bought_is_told_so_and_who_differs_in_nothing_too():
    rows = pd.DataFrame({"orders_per_month": np.repeat([0.0, 2.0], 50), "mean_order_cents": np.repeat([0.0, 900.0], 50)})
    found = profile(rows, np.repeat([0, 1], 50), ["S1", "S2"], list(rows.columns))["description"]
    assert found[0] == "has never bought; 50 % of customers"
    mixed = profile(rows, np.tile([0, 1], 50), ["S1", "S2"], list(rows.columns))["description"]
    assert mixed[0] == "much like the others; 50 % of customers"


def test_customers_without_a_segment_are_others():
    rows = pd.DataFrame({"orders_per_month": [5.0] * 10 + [1.0] * 10})
    found = profile(rows, np.repeat([0, -1], 10), ["S1"], ["orders_per_month"])
    assert found["share"].tolist() == [0.5]
    assert found["delta_orders_per_month"].tolist() == [1.0]
