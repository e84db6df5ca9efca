import numpy as np
import pandas as pd
import pytest

from models.task import Task
from pipelines import labels, outcomes
from pipelines.errors import NotTrainable
from pipelines.settings import LabelSettings, Settings

T0 = pd.Timestamp("2026-01-01", tz="UTC")
DAY, MINUTE = pd.Timedelta(1, "D"), pd.Timedelta(1, "min")
MINE = Settings(labels=LabelSettings(churn_horizon_days=10, churn_active_days=30))


def events(*acts):
    """customer, type, time, session."""
    frame = pd.DataFrame(acts, columns=["customer_id", "type", "event_timestamp", "session_id"])
    return frame.assign(created_timestamp=frame["event_timestamp"])


def at(*asked):
    return pd.DataFrame(asked, columns=["customer_id", "event_timestamp"])


def test_churn_is_silence_of_whoever_was_active_once_the_horizon_has_passed():
    log = events(("a", "purchase", T0, "s"), ("b", "purchase", T0, "s"), ("b", "purchase", T0 + 9 * DAY, "s"), ("c", "view", T0, "s"))
    rows = at(("a", T0 + DAY), ("b", T0 + DAY), ("c", T0 + DAY), ("a", T0 + 5 * DAY), ("a", T0 + 40 * DAY), ("nobody", T0 + DAY))
    found = outcomes.of_rows("churn", rows, log, settings=MINE, as_of=T0 + 14 * DAY)
    np.testing.assert_array_equal(found, [1.0, 0.0, np.nan, np.nan, np.nan, np.nan])


def test_churn_at_a_cut_off_is_the_label_that_training_gives():
    rng = np.random.default_rng(3)
    acts = [(f"c{rng.integers(40)}", "purchase", T0 + float(day) * DAY, "s") for day in rng.uniform(0, 120, 400)]
    log, as_of = events(*acts), T0 + 120 * DAY
    for cutoff in labels.churn_cutoffs(log["event_timestamp"].min(), as_of, settings=MINE):
        expected = labels._churn_rows(log, cutoff, settings=MINE)
        found = outcomes.of_rows("churn", expected, log, settings=MINE, as_of=as_of)
        np.testing.assert_array_equal(found, expected["label"])


def test_intent_is_a_purchase_in_the_session_that_the_request_fell_into():
    log = events(
        ("a", "view", T0, "1"), ("a", "purchase", T0 + 20 * MINUTE, "1"), ("a", "view", T0 + 25 * MINUTE, "1"),
        ("b", "view", T0, "2"), ("b", "purchase", T0 + 90 * MINUTE, "3"), ("a", "view", T0 + 10 * DAY, "4"),
    )  # fmt: skip
    rows = at(
        ("a", T0 + 5 * MINUTE),  # before the purchase
        ("a", T0 + 21 * MINUTE),  # after it
        ("b", T0 + 5 * MINUTE),  # none in that session
        ("b", T0 + 40 * MINUTE),  # between two
        ("a", T0 + 10 * DAY + MINUTE),  # not over yet
    )
    found = outcomes.of_rows("intent", rows, log, settings=MINE, as_of=T0 + 10 * DAY + 2 * MINUTE)
    np.testing.assert_array_equal(found, [1.0, np.nan, 0.0, np.nan, np.nan])
    within = outcomes.of_rows("intent_24h", rows, log, settings=MINE, as_of=T0 + 10 * DAY + 2 * MINUTE)
    np.testing.assert_array_equal(within, [1.0, 0.0, 1.0, 1.0, np.nan])


def test_task_that_chooses_its_own_instants_has_no_outcomes_of_requests(monkeypatch):
    own = Task("own", "churn_v1", "auc", "none", lambda f: np.zeros(len(f)), label=lambda e: e)
    monkeypatch.setattr(outcomes.tasks, "declared", lambda: {"own": own})
    with pytest.raises(NotTrainable, match="own choice"):
        outcomes.of_rows("own", at(("a", T0)), events(("a", "view", T0, "s")), settings=MINE, as_of=T0)
