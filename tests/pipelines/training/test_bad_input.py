"""Shops that cannot teach what they are asked to: training says why, or answers as well as can be; it never ends in a traceback."""

from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pytest

from models.task import TICK, Task
from pipelines import labels
from pipelines.errors import InputError, NotTrainable
from pipelines.settings import LabelSettings, Settings, TrainingSettings
from pipelines.training import baselines
from pipelines.training.ranking import Moments
from pipelines.training.rows import Rows, require_sound

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


def _label(events):
    orders = events[events["type"] == "purchase"]
    knew = orders[["event_timestamp", "created_timestamp"]].max(axis=1) + TICK
    rows = pd.DataFrame({"customer_id": orders["customer_id"], "event_timestamp": knew}).drop_duplicates(ignore_index=True)
    return rows.assign(label=np.arange(len(rows)) % 3 == 0, matured_timestamp=rows["event_timestamp"] + pd.Timedelta(1, "D"))


SOUND = Task("probe", "churn_v1", metric="auc", rival_name="rule", rival=lambda rows: rows["x"].to_numpy(float), label=_label)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            lambda rows: rows.drop(columns="matured_timestamp"),
            "to give a frame with customer_id, event_timestamp, label, matured_timestamp",
        ),
        (lambda rows: len(rows), "it gave the type int"),
        (lambda rows: rows.assign(label=rows["label"].where(rows.index % 2 == 0)), "the label is not 0 or 1"),
        (lambda rows: rows.assign(label=2), "in 540 the label is not 0 or 1"),
        (lambda rows: rows.assign(event_timestamp=rows["event_timestamp"].dt.tz_localize(None)), "event_timestamp in UTC"),
        (lambda rows: rows.assign(matured_timestamp=rows["event_timestamp"] - TICK), "known before it is asked for"),
        (lambda rows: rows.assign(customer_id=None), "a customer_id or a timestamp is null"),
    ],
    ids=["column", "number", "null", "two", "naive", "known before", "nobody"],
)
def test_a_label_that_is_none_is_told_by_the_name_of_its_task(tmp_path, given, sentence):
    frame, settings = shop(tmp_path, items=["i0", "i1"])
    events, consents = events_of(frame)
    assert len(labels.declared(SOUND, events, consents, settings=settings, as_of=AS_OF))  # control
    wrong = replace(SOUND, label=lambda known: given(_label(known)))
    with pytest.raises(InputError, match=sentence) as told:
        labels.declared(wrong, events, consents, settings=settings, as_of=AS_OF)
    assert "task probe" in str(told.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"metric": "aucc"}, "the metric 'aucc'; there are auc, average_precision"),
        ({"monotone": {"z": 1}}, "declares a direction of z, which churn_v1 does not have"),
        ({"is_silence": True, "history": {"visits": "sessions_totl"}}, "sessions_totl, .* near it are sessions_total"),
        ({"rival": lambda rows: rows["xx"]}, "the rule of task probe reads xx"),
        ({"rival": lambda rows: rows["x"].to_numpy()[1:]}, r"one finite number for each of 100 rows; it gave float64 of shape \(99,\)"),
        ({"rival": lambda rows: rows["x"] * np.nan}, "or not all finite"),
        ({"rival": lambda rows: rows["customer_id"]}, "it gave object"),
    ],
    ids=["metric", "monotone", "history", "column", "length", "nan", "text"],
)
def test_a_task_that_asks_for_what_there_is_not_is_told_before_anything_is_tried(change, sentence):
    frame = pd.DataFrame({"customer_id": [f"c{i}" for i in range(300)], "event_timestamp": START, "x": 1.0, "sessions_total": 2.0})
    frame = frame.assign(label=0, split=np.repeat(["train", "validation", "test"], 100))
    found = Rows(frame, ["x", "sessions_total"], frame["event_timestamp"])
    require_sound(SOUND, found)  # control
    with pytest.raises(InputError, match=sentence):
        require_sound(replace(SOUND, **change), found)


def test_five_customers_train_nothing_and_every_reason_has_its_counts(tmp_path):
    frame, settings = shop(tmp_path, items=["i0", "i1"], customers=5)
    settings = settings.model_copy(update={"labels": settings.labels.model_copy(update={"min_rows": 100, "min_class_rows": 20})})
    events, consents = events_of(frame)
    for make, why in ((labels.churn, "rows"), (labels.intent, "no view among them"), (labels.interactions, "of those customers buying")):
        with pytest.raises(NotTrainable, match=why) as told:
            make(events, consents, settings=settings, as_of=AS_OF)
        assert any(letter.isdigit() for letter in str(told.value))
