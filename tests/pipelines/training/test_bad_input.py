"""Shops that cannot teach what they are asked to: training says why, or answers as well as can be; it never ends in a traceback."""

from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pytest

from pipelines import labels
from pipelines.errors import NotTrainable
from pipelines.settings import LabelSettings, Settings, TrainingSettings
from pipelines.training import baselines
from pipelines.training.ranking import Moments
from pipelines.training.rows import Rows

START, DAYS = pd.Timestamp("2026-01-01", tz="UTC"), 84
AS_OF = datetime(2026, 3, 26, tzinfo=UTC)


def shop(tmp_path, *, items, customers=90):
    """Interactions: everybody buys each of their items every other week; the settings that label them."""
    rows = [
        (f"c{c:03d}", i, START + pd.Timedelta(day + c / 100, "D")) for c in range(customers) for i in items for day in range(0, DAYS, 14)
    ]
    frame = pd.DataFrame(rows, columns=["customer_id", "item_id", "event_timestamp"]).sort_values("event_timestamp", ignore_index=True)
    frame = frame.assign(type="purchase", weight=1.0, created_timestamp=frame["event_timestamp"])
    options = LabelSettings(churn_horizon_days=14, ranking_horizon_days=14, min_rows=20, min_class_rows=5)
    return frame, Settings(home=tmp_path, labels=options, training=TrainingSettings(k=5, bootstrap_draws=100))


def catalogue(frame):
    first = frame.groupby("item_id", as_index=False)["event_timestamp"].min()
    return first.assign(category=None, price_cents=np.nan)


def events_of(frame):
    made = frame.assign(event_id=[f"e{n}" for n in range(len(frame))], session_id=None)
    people = pd.DataFrame({"customer_id": frame["customer_id"].unique(), "event_timestamp": START, "created_timestamp": START})
    told = {"basis": "consent", "source": "web", "policy_version": "1", "evidence": "m1", "identifier": people["customer_id"]}
    return made, people.assign(purpose="personalization", is_allowed=True, **told)


def test_a_shop_of_one_item_is_told_that_there_is_no_choice(tmp_path):
    frame, settings = shop(tmp_path, items=["i0"])
    with pytest.raises(NotTrainable, match="are with one item: there is no choice"):
        labels.interactions(*events_of(frame), settings=settings, as_of=AS_OF)
    frame, settings = shop(tmp_path, items=["i0", "i1"])
    assert len(labels.interactions(*events_of(frame), settings=settings, as_of=AS_OF)) == len(frame)


def test_where_everybody_buys_everything_there_is_no_second_stage(tmp_path):
    """Every candidate was chosen by all: no order to learn, though the buyers are many."""
    at = labels.ranking_cutoffs(AS_OF, settings=shop(tmp_path, items=["i0"])[1])[0].at
    frame, settings = shop(tmp_path, items=["i0", "i1"])
    assert Moments(frame, catalogue(frame), settings, 90.0, {"n_factors": 4, "n_epochs": 2}).second_stage(at) is None
    some = frame[(frame["item_id"] == "i0") | (frame.index % 3 > 0)]
    few = pd.concat([some, some.head(40).assign(item_id="i2")]).sort_values("event_timestamp", ignore_index=True)
    assert (
        Moments(few, catalogue(few), settings, 90.0, {"n_factors": 4, "n_epochs": 2}).second_stage(at) is not None
    )  # the control: with a choice there is one


@pytest.mark.parametrize(
    "columns",
    [{"x": 1.0}, {"x": np.nan}, {"x": True}, {"x": pd.array([pd.NA] * 300, dtype="Int64")}, {"x": None}, {"x": "a"}, {"x": 1.0, "y": None}],
    ids=["constant", "nan", "flag", "null-numbers", "null-text", "one-text", "both"],
)
def test_logistic_regression_of_columns_that_say_nothing_is_the_base_rate(columns):
    n = 300
    frame = pd.DataFrame({"customer_id": [f"c{i}" for i in range(n)], "event_timestamp": START, "label": np.arange(n) % 4 == 0})
    frame = frame.assign(split=np.repeat(["train", "validation", "test"], n // 3), **columns)
    found = baselines.logistic(Rows(frame, list(columns), frame["event_timestamp"]), seed=1)
    assert found == pytest.approx(np.full(100, 0.25), abs=0.01)


def test_five_customers_train_nothing_and_every_reason_has_its_counts(tmp_path):
    frame, settings = shop(tmp_path, items=["i0", "i1"], customers=5)
    settings = settings.model_copy(update={"labels": settings.labels.model_copy(update={"min_rows": 100, "min_class_rows": 20})})
    events, consents = events_of(frame)
    for make, why in ((labels.churn, "rows"), (labels.intent, "no view among them"), (labels.interactions, "of those customers buying")):
        with pytest.raises(NotTrainable, match=why) as told:
            make(events, consents, settings=settings, as_of=AS_OF)
        assert any(letter.isdigit() for letter in str(told.value))
