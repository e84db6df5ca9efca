"""What a model must beat, on worlds where it is known how good that is."""

import numpy as np
import pandas as pd
import pytest

from models import evaluation
from models.task import Task
from pipelines import tables
from pipelines.settings import Settings
from pipelines.training import baselines
from pipelines.training.rows import Rows

SETTINGS = Settings()
START = pd.Timestamp("2026-01-01", tz="UTC")


def logistic_rows(n=3_000, seed=0):
    """A linear world with nulls, text, whole numbers, a constant and an empty column, in three roles."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({"x0": rng.lognormal(size=n), "x1": rng.normal(size=n), "region": rng.choice(["north", "south"], n)})
    logit = np.log(frame["x0"]) + 0.7 * frame["x1"] + (frame["region"] == "north") - 1
    frame["label"] = (rng.random(n) < 1 / (1 + np.exp(-logit))).astype(int)
    frame["visits"] = pd.array(rng.integers(0, 5, n), dtype="Int64")
    frame.loc[::9, ["x1", "visits"]] = None
    frame["constant"], frame["empty"] = 1.0, np.nan
    frame["split"] = np.repeat(["train", "validation", "test"], n // 3)
    frame["customer_id"], frame["event_timestamp"] = [f"c{i}" for i in range(n)], START + pd.to_timedelta(np.arange(n), "h")
    return Rows(frame, ["x0", "x1", "region", "visits", "constant", "empty"], frame["event_timestamp"]), logit


def test_logistic_regression_comes_close_to_the_optimum_of_a_linear_world():
    rows, logit = logistic_rows()
    test = rows.frame["split"] == "test"
    label = rows.frame.loc[test, "label"]
    found = baselines.logistic(rows, seed=7)
    assert evaluation.auc(label, found) > evaluation.auc(label, logit[test]) - 0.02
    assert evaluation.expected_calibration_error(label, found) < 0.08
    assert np.array_equal(found, baselines.logistic(rows, seed=7))


def test_logistic_regression_never_reads_a_label_of_the_test():
    rows, _ = logistic_rows()
    turned = rows.frame.assign(label=np.where(rows.frame["split"] == "test", 1 - rows.frame["label"], rows.frame["label"]))
    assert np.array_equal(baselines.logistic(Rows(turned, rows.inputs, rows.matured), seed=7), baselines.logistic(rows, seed=7))


def purchases(rows):
    frame = pd.DataFrame(rows, columns=["customer_id", "day", "known_day"])
    at, known = ((START + pd.to_timedelta(frame[name], "D")).dt.floor("s") for name in ("day", "known_day"))
    return frame.assign(event_timestamp=at, created_timestamp=known, received_timestamp=known)


def test_histories_are_what_was_known_before_the_cutoff_by_days():
    acts = purchases([("a", 1, 1), ("a", 1.2, 1.2), ("a", 11, 11), ("a", 30, 30), ("b", 5, 5), ("b", 9, 40), ("c", 25, 25)])
    found = baselines.histories(acts, START + pd.Timedelta(20, "D"))
    assert found.loc["a"].tolist() == [1.0, 10.0, 19.0]  # two orders of one day are one; that of day 30 lies ahead
    assert found.loc["b"].tolist() == [0.0, 0.0, 15.0]  # the second was not known yet
    assert "c" not in found.index


def home_of_leavers(home, customers=600, seed=0):
    """Customers with rates and lifetimes of their own; what they do after day 100 is the truth."""
    rng = np.random.default_rng(seed)
    rows = []
    for c in range(customers):
        first, rate, life = rng.uniform(0, 60), rng.gamma(1.2, 1 / 12), rng.exponential(60)
        days = first + np.concatenate([[0], np.cumsum(rng.exponential(1 / rate, 60))])
        rows += [(f"c{c}", day, day) for day in days if day - first < life and day < 128]
    acts = purchases(rows).assign(type="purchase")
    tables.write(home, tables.EVENTS, acts.reindex(columns=tables.EVENTS.schema.names))
    people = acts["customer_id"].unique()
    consents = pd.DataFrame({"customer_id": people, "event_timestamp": START, "created_timestamp": START, "is_allowed": True})
    consents = consents.assign(purpose="personalization", basis="consent", identifier="x", source="web", policy_version="1", evidence="m")
    tables.write(home, tables.CONSENTS, consents[tables.CONSENTS.schema.names])
    cut = START + pd.Timedelta(100, "D")
    asked = pd.DataFrame({"customer_id": acts.loc[acts["event_timestamp"] < cut, "customer_id"].unique(), "event_timestamp": cut})
    gone = ~asked["customer_id"].isin(acts.loc[acts["event_timestamp"] > cut, "customer_id"])
    return acts, asked, gone.astype(int), pd.Series(cut + pd.Timedelta(28, "D"), index=asked.index)


def test_silence_beats_recency_where_customers_have_rhythms_and_sees_nothing_after_the_cutoff(tmp_path):
    acts, asked, gone, matured = home_of_leavers(tmp_path)
    both = baselines.silence(tmp_path, asked, matured, settings=SETTINGS)
    assert list(both) == ["Pareto/NBD", "BG/NBD"]
    known = baselines.histories(acts, asked["event_timestamp"].iloc[0]).reindex(asked["customer_id"])
    recency = (known["age_days"] - known["recency_days"]).to_numpy()
    for found, lead in zip(both.values(), (0.01, 0.005), strict=True):  # the world's lifetimes do not end with an order
        assert evaluation.auc(gone, found) > evaluation.auc(gone, recency) + lead
        assert evaluation.auc(gone, found) > 0.75
    assert both["Pareto/NBD"].mean() == pytest.approx(gone.mean(), abs=0.06)  # the other takes who came once for alive
    tables.write(
        tmp_path,
        tables.EVENTS,
        acts[acts["event_timestamp"] < asked["event_timestamp"].iloc[0]].reindex(columns=tables.EVENTS.schema.names),
    )
    again = baselines.silence(tmp_path, asked, matured, settings=SETTINGS)
    assert all(np.array_equal(again[name], both[name]) for name in both)


def test_where_nobody_came_back_there_is_no_model_of_lifetimes(tmp_path):
    acts, asked, _, matured = home_of_leavers(tmp_path)
    once = acts.drop_duplicates("customer_id")
    tables.write(tmp_path, tables.EVENTS, once.reindex(columns=tables.EVENTS.schema.names))
    assert baselines.silence(tmp_path, asked, matured, settings=SETTINGS) == {}


def test_the_rule_comes_first_and_lifetimes_only_for_silence(tmp_path):
    rows, _ = logistic_rows(900)
    task = Task("t", "s", "auc", "rule", rival=lambda frame: frame["x0"].to_numpy())
    assert list(baselines.scores(task, rows, tmp_path, settings=SETTINGS)) == ["rule", "logistic regression"]
