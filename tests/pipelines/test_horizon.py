from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pytest

from pipelines import horizon, labels, tables
from pipelines.errors import NotTrainable
from pipelines.settings import LabelSettings, Settings

START = pd.Timestamp(datetime(2026, 1, 1, tzinfo=UTC))
SETTINGS = Settings(labels=LabelSettings(churn_horizon_days=None, churn_active_days=120, min_rows=10, min_class_rows=5))


def orders(days=400, customers=1_500, mean_gap=12.0, leaves=0.15, seed=0):
    """Customers who come back after exponential gaps; at each order some leave for good."""
    rng = np.random.default_rng(seed)
    rows = []
    for c in range(customers):
        at = rng.uniform(0, days * 0.8)
        while at < days:
            rows.append((f"c{c}", START + pd.Timedelta(at, "D")))
            if rng.random() < leaves:
                break
            at += rng.exponential(mean_gap)
    frame = pd.DataFrame(rows, columns=["customer_id", "event_timestamp"])
    return frame.assign(type="purchase", created_timestamp=frame["event_timestamp"], item_id="i", session_id=None, event_id="e")


def share_within(found, days):
    return float(np.interp(days, found["gap_days"], found["share"]))


def test_horizon_is_the_gap_that_most_returning_customers_keep_and_leavers_do_not_lengthen_it():
    acts = orders()
    settings = horizon.chosen(acts, START, START + pd.Timedelta(400, "D"), settings=SETTINGS)
    expected = -12 * np.log(1 - 0.85)  # of the exponential
    assert settings.labels.churn_horizon_days == pytest.approx(expected, abs=2.5)
    many = orders(leaves=0.4)
    again = horizon.chosen(many, START, START + pd.Timedelta(400, "D"), settings=SETTINGS)
    assert again.labels.churn_horizon_days == pytest.approx(expected, abs=3.5)


def test_a_short_log_does_not_shorten_the_gaps_and_closed_gaps_alone_would():
    acts = orders(days=160, mean_gap=20.0, leaves=0.0)
    end = START + pd.Timedelta(160, "D")
    found = horizon.returning(acts, longest=pd.Timedelta(40, "D"), as_of=end)
    truth = (1 - np.exp(-15 / 20)) / (1 - np.exp(-40 / 20))
    assert share_within(found, 15) == pytest.approx(truth, abs=0.03)
    ordered = acts.sort_values(["customer_id", "event_timestamp"])  # control: closed gaps that began just before the end are short
    gap = ordered.groupby("customer_id")["event_timestamp"].shift(-1) - ordered["event_timestamp"]
    late = gap[ordered["event_timestamp"] > end - pd.Timedelta(40, "D")].dropna() / pd.Timedelta(1, "D")
    assert (late <= 15).sum() / (late <= 40).sum() > truth + 0.05
    assert horizon.returning(acts[acts["event_timestamp"] > end - pd.Timedelta(39, "D")], longest=pd.Timedelta(40, "D"), as_of=end).empty


def test_labels_made_with_a_chosen_horizon_say_which_it_was_and_are_never_censored():
    acts, as_of = orders(customers=300), START + pd.Timedelta(400, "D")
    people = acts["customer_id"].unique()
    consents = pd.DataFrame({"customer_id": people, "event_timestamp": START - pd.Timedelta(1, "D"), "is_allowed": True})
    consents = consents.assign(created_timestamp=consents["event_timestamp"], purpose="personalization", basis="consent", identifier="x")
    consents = consents.assign(source="web", policy_version="1", evidence="m")[tables.CONSENTS.schema.names]
    rows = labels.churn(acts, consents, settings=SETTINGS, as_of=as_of)
    assert (rows["matured_timestamp"] <= as_of).all()
    days = horizon.of_rows(rows, settings=SETTINGS)
    assert 15 < days < 35
    fixed = SETTINGS.model_copy(update={"labels": SETTINGS.labels.model_copy(update={"churn_horizon_days": days})})
    pd.testing.assert_frame_equal(labels.churn(acts, consents, settings=fixed, as_of=as_of), rows)


def test_where_nobody_comes_back_the_data_name_no_horizon():
    once = orders(leaves=1.0)
    with pytest.raises(NotTrainable, match="come back"):
        horizon.chosen(once, START, START + pd.Timedelta(400, "D"), settings=SETTINGS)
    with pytest.raises(ValueError, match="found none"):
        horizon.of_settings(SETTINGS)


def test_auto_leaves_the_horizon_to_the_data_also_from_the_environment(monkeypatch):
    monkeypatch.setenv("RAPPORT_LABELS__CHURN_HORIZON_DAYS", "auto")
    assert Settings().labels.churn_horizon_days is None
    monkeypatch.setenv("RAPPORT_LABELS__CHURN_HORIZON_DAYS", "56")
    assert Settings().labels.churn_horizon_days == 56
    assert LabelSettings().churn_horizon_days == 28
