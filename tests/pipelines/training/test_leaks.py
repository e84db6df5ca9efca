"""The five questions about leaks, on the small shop of conftest.py: clean as it is, and each with a planted leak that it catches."""

import numpy as np
import pandas as pd
import pytest

from pipelines import feature_store, tables
from pipelines.training import leaks
from pipelines.training.rows import KEYS
from pipelines.training.tasks import discover, label_rows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows(trained):
    return label_rows(trained.home, discover()["churn"], settings=trained.settings, as_of=trained.as_of)[list(KEYS)]


@pytest.fixture(scope="module")
def frame(trained, rows):
    return honest(trained.home, rows)


def honest(home, wanted):
    return feature_store.training_frame(home, wanted, service="churn_v1")


def inputs(frame):
    return [name for name in frame.columns if name not in KEYS]


def as_of_today(home, wanted):
    """A lifetime aggregate joined as it is at the end of the log."""
    events = tables.read(home, tables.EVENTS, ["customer_id"])
    return honest(home, wanted).assign(events_ever=wanted["customer_id"].map(events["customer_id"].value_counts()).to_numpy())


def with_target_encoding(home, wanted):
    """The mean label of the customer over all rows, those of the test among them."""
    return honest(home, wanted).assign(encoded=wanted.groupby("customer_id")["label"].transform("mean").to_numpy())


def test_the_shop_as_it_is_asks_all_five_and_finds_nothing(trained):
    found = leaks.audit(trained.home, discover()["churn"], settings=trained.settings, as_of=trained.as_of)
    assert [one.name for one in found] == ["truncation", "future shuffle", "single feature", "permuted labels", "adversarial split"]
    assert all(one.is_clean for one in found[:4]), found
    assert "told apart" in found[4].found  # everybody came in the same week, and a window of 90 days is longer than the log: drift
    assert not list(trained.home.glob(".leaks-*"))


@pytest.mark.parametrize("question", [leaks.truncation, leaks.future_shuffle], ids=["truncation", "future shuffle"])
def test_aggregate_joined_as_of_today_is_caught_by_another_future(trained, rows, question):
    assert question(trained.home, rows, honest, settings=trained.settings).is_clean
    found = question(trained.home, rows, as_of_today, settings=trained.settings)
    assert not found.is_clean
    assert "events_ever in" in found.found
    assert "purchases" not in found.found  # only the planted column moved


def test_column_that_tells_the_label_alone_is_named(frame):
    train = frame[frame["split"] == "train"]
    label = train["label"].to_numpy(dtype=float)
    assert leaks.single_feature(train[inputs(frame)], label).is_clean
    noise = np.random.default_rng(0).normal(0, 0.1, len(label))
    found = leaks.single_feature(train[inputs(frame)].assign(leak=label + noise), label)
    assert not found.is_clean
    assert "leak" in found.found


def test_column_far_better_than_the_next_is_suspect_though_it_does_not_tell_all():
    rng = np.random.default_rng(0)
    label = (rng.random(2_000) < 0.3).astype(float)
    weak = {f"x{j}": label + rng.normal(0, 6, 2_000) for j in range(3)}
    frame = pd.DataFrame({**weak, "leak": label + rng.normal(0, 0.8, 2_000), "region": "north"})
    assert list(leaks.suspects(frame, label)) == ["leak"]
    assert leaks.suspects(frame.assign(other=label + rng.normal(0, 1.0, 2_000)), label) == {}  # control: it is not alone


def test_labels_without_meaning_are_told_only_by_a_column_made_of_them(trained, rows, frame):
    clean = leaks.permuted_labels(trained.home, rows, honest, inputs(frame), seed=7)
    assert clean.is_clean, clean.found
    found = leaks.permuted_labels(trained.home, rows, with_target_encoding, [*inputs(frame), "encoded"], seed=7)
    assert not found.is_clean


def test_column_that_says_which_rows_are_the_test_is_named_first(frame):
    short = [name for name in inputs(frame) if name.endswith(("_24h", "_7d")) and "share" not in name]
    counted = frame.assign(row=(frame["event_timestamp"] - frame["event_timestamp"].min()).dt.days)
    clean, found = leaks.adversarial(frame, short, seed=7), leaks.adversarial(counted, [*short, "row"], seed=7)
    assert clean.is_clean, clean.found
    assert not found.is_clean
    assert "first by row" in found.found
