"""Tasks found by looking, and the origins that a trial is judged at."""

import numpy as np
import pandas as pd
import pytest

import models
from models import returns
from models.task import LABELLED, follows
from pipelines.errors import InputError
from pipelines.training.rows import Rows
from pipelines.training.tasks import discover

START = pd.Timestamp("2026-01-01", tz="UTC")


def labelled(days, horizon, per_day=120, seed=0):
    rng = np.random.default_rng(seed)
    at = START + pd.to_timedelta(np.repeat(days, per_day), "D")
    frame = pd.DataFrame({"customer_id": [f"c{i}" for i in range(len(at))], "event_timestamp": at, "x": rng.normal(size=len(at))})
    frame["label"] = rng.integers(0, 2, len(at))
    last, before = days[-1], days[-2]
    day = np.repeat(days, per_day)
    frame["split"] = np.where(day == last, "test", np.where(day == before, "validation", "train"))
    return Rows(frame, ["x"], frame["event_timestamp"] + pd.Timedelta(horizon, "D"))


def test_earlier_origins_roll_back_over_cutoffs_and_their_labels_were_known_by_then():
    rows = labelled([0, 7, 14, 21, 28, 35, 63, 91], horizon=28)
    found = rows.earlier_origins(5)
    sizes = [(len(train[0]), len(later[0])) for train, later in found]
    assert sizes == [(240, 120), (120, 120)]  # judged at day 35 with those of 0 and 7, at day 28 with those of day 0
    at, first = rows.frame["event_timestamp"], START + pd.Timedelta(35, "D")
    assert (at.loc[found[0][1][0].index] == first).all()
    assert (rows.matured.loc[found[0][0][0].index] <= first).all()
    assert len(rows.earlier_origins(1)) == 1
    assert labelled([0, 7, 14, 21, 49, 77], horizon=28).earlier_origins(5) == []  # overlapping windows leave nothing to learn from


def test_earlier_origins_of_moments_are_stretches_as_long_as_the_validation():
    days = np.arange(100)
    rows = labelled(days, horizon=1, per_day=20)
    frame = rows.frame.assign(split=np.repeat(np.select([days < 70, days < 85], ["train", "validation"], "test"), 20))
    found = Rows(frame, ["x"], rows.matured).earlier_origins(2)
    assert len(found) == 2
    for (train, _), (later, _) in found:
        span = frame.loc[later.index, "event_timestamp"]
        assert span.max() - span.min() <= pd.Timedelta(14, "D")
        assert rows.matured.loc[train.index].max() <= span.min()
        assert set(frame.loc[later.index, "split"]) == {"train"}


def test_origins_without_both_classes_are_left_out():
    rows = labelled([0, 7, 35, 63, 91], horizon=28)
    one_class = rows.frame.assign(label=np.where(rows.frame["event_timestamp"] == START + pd.Timedelta(35, "D"), 1, rows.frame["label"]))
    assert len(rows.earlier_origins(3)) == 1
    assert Rows(one_class, ["x"], rows.matured).earlier_origins(3) == []


def test_tasks_are_found_by_looking_into_models():
    assert {"churn", "intent", "intent_24h", "intent_7d", "return_risk"} <= set(discover())


def test_two_tasks_of_one_name_are_refused(tmp_path, monkeypatch):
    (tmp_path / "weather.py").write_text(
        "from dataclasses import replace\nfrom models import churn\nTASK = replace(churn.TASK, metric='average_precision')\n"
    )
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    discover.cache_clear()
    try:
        with pytest.raises(InputError, match="'churn' again in weather"):
            discover()
    finally:
        monkeypatch.undo()
        discover.cache_clear()


def events(*rows):
    frame = pd.DataFrame(rows, columns=["customer_id", "type", "day", "known_day"])
    at, known = (START + pd.to_timedelta(frame.pop(name), "D") for name in ("day", "known_day"))
    return frame.assign(event_timestamp=at.astype("datetime64[us, UTC]"), created_timestamp=known.astype("datetime64[us, UTC]"))


def test_follows_counts_the_end_of_its_window_and_not_its_beginning():
    rows = events(("a", "x", 10, 10), ("a", "x", 12, 12), ("b", "x", 10, 10))
    later = events(("a", "y", 10, 10), ("a", "y", 15, 15), ("b", "y", 9, 9))
    assert follows(rows, later, within=pd.Timedelta(5, "D")).tolist() == [1, 1, 0]
    assert follows(rows, later, within=pd.Timedelta(4.9, "D")).tolist() == [0, 1, 0]
    assert follows(rows.iloc[::-1], later.iloc[::-1], within=pd.Timedelta(4.9, "D")).tolist() == [0, 1, 0]


def test_return_risk_is_asked_once_an_order_is_known_and_counts_thirty_days():
    log = events(
        ("a", "purchase", 1, 1), ("a", "purchase", 1, 1), ("a", "return", 20, 20), ("b", "purchase", 2, 2.5), ("b", "return", 40, 40),
        ("c", "purchase", 3, 9), ("c", "view", 4, 4),
    )  # fmt: skip
    rows = returns.label(log).set_index("customer_id")
    assert list(returns.label(log).columns) == list(LABELLED)
    assert rows["label"].to_dict() == {"a": 1, "b": 0}  # two lines of one order are one; c's was learned of too late
    assert rows.loc["b", "event_timestamp"] == START + pd.Timedelta(2.5, "D") + pd.Timedelta(1, "us")
