import numpy as np
import pandas as pd

from models import tasks
from pipelines import labels, outcomes
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


def returning(*asked, as_of, log):
    return outcomes.of_rows("return_risk", at(*asked), log, settings=MINE, as_of=as_of).tolist()


def test_task_that_chooses_its_own_instants_is_asked_about_the_last_of_them():
    log = events(
        ("a", "purchase", T0, "s"), ("a", "return", T0 + 3 * DAY, "s"), ("a", "purchase", T0 + 5 * DAY, "s"), ("b", "view", T0, "s"),
    )  # fmt: skip
    found = returning(
        ("a", T0 - DAY),  # before any order
        ("a", T0 + DAY),  # about the first, which comes back
        ("a", T0 + 4 * DAY),  # about the same, which by then had come back
        ("a", T0 + 6 * DAY),  # about the second, which does not
        ("a", T0 + 36 * DAY),  # when that was over
        ("b", T0 + DAY),  # nothing was ordered
        as_of=T0 + 36 * DAY, log=log,
    )  # fmt: skip
    np.testing.assert_array_equal(found, [np.nan, 1.0, np.nan, 0.0, np.nan, np.nan])
    assert np.isnan(returning(("a", T0 + DAY), ("a", T0 + 6 * DAY), as_of=T0 + 29 * DAY, log=log)).all()  # nothing is known yet


def test_outcome_that_we_learnt_of_late_was_still_to_be_foretold():
    log = events(("a", "purchase", T0, "s"), ("a", "return", T0 + 3 * DAY, "s"))
    late = log.assign(created_timestamp=[T0, T0 + 9 * DAY])
    assert returning(("a", T0 + 4 * DAY), as_of=T0 + 40 * DAY, log=late) == [1.0]
    assert np.isnan(returning(("a", T0 + 9 * DAY), as_of=T0 + 40 * DAY, log=late)).all()


def test_at_its_own_instants_a_task_has_the_outcomes_that_it_was_trained_on():
    rng, kinds = np.random.default_rng(4), ["purchase", "purchase", "return", "view"]
    log = events(*((f"c{rng.integers(30)}", kinds[rng.integers(4)], T0 + float(day) * DAY, "s") for day in rng.uniform(0, 200, 500)))
    as_of = T0 + 200 * DAY
    rows = tasks.declared()["return_risk"].label(log)
    found = outcomes.of_rows("return_risk", rows, log, settings=MINE, as_of=as_of)
    np.testing.assert_array_equal(found, rows["label"].where(rows["matured_timestamp"] <= as_of))
    assert 20 < np.nansum(found) < len(rows) - 20


def test_its_own_label_may_look_at_any_column():
    assert outcomes.columns("return_risk") is None
    assert "session_id" in outcomes.columns("intent")
