"""Lists are asked for as customers come back: with all that was known by then, and judged by what they did on that visit."""

from datetime import timedelta

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import labels
from pipelines.labels import Ranking
from pipelines.settings import Settings
from pipelines.training import visits

START = pd.Timestamp("2026-01-01", tz="UTC")
CUT, UNTIL = START + pd.Timedelta(10, "h"), START + pd.Timedelta(20, "h")
SILENCE = timedelta(minutes=30)
TYPES = {weight: kind for kind, weight in labels.WEIGHTS.items()}


def log(*acts: tuple) -> pd.DataFrame:
    """Customer, item, minutes since START, weight, and how many minutes later it was learned of, where not at once."""
    rows = [(*act, 0)[:5] for act in acts]
    frame = pd.DataFrame(rows, columns=["customer_id", "item_id", "minute", "weight", "late"])
    at = START + pd.to_timedelta(frame.pop("minute"), "min")
    knew = at + pd.to_timedelta(frame.pop("late"), "min")
    frame = frame.assign(type=frame["weight"].map(TYPES), event_timestamp=at, created_timestamp=knew)
    return frame.astype({"customer_id": object, "item_id": object}).sort_values("event_timestamp", kind="stable", ignore_index=True)


def ranking(frame: pd.DataFrame) -> Ranking:
    items = pd.DataFrame({"item_id": ["a", "b", "c", "d"], "event_timestamp": START})
    return labels.ranking(frame, items, at=CUT, settings=Settings())


def between(frame: pd.DataFrame, **options) -> visits.Visits:
    return visits.between(frame, ranking(frame), until=UNTIL, silence=SILENCE, **options)


def told(found: visits.Visits, row: int) -> tuple[float, dict, dict]:
    """Hour of a visit, the items known before it with their last minute, and the worth of what was done on it."""
    history, done = found.histories.customer(row), found.worth[row]
    minute = lambda us: (us - START.value // 1_000) / 60e6  # noqa: E731
    known = {"abcd"[item]: minute(seen) for item, seen in zip(history.item, history.seen_us, strict=True)}
    return minute(found.at_us[row]) / 60, known, {"abcd"[item]: worth for item, worth in zip(done.indices, done.data, strict=True)}


VIEW, CART, BUY = labels.WEIGHTS["view"], labels.WEIGHTS["cart_add"], labels.WEIGHTS["purchase"]
ACTS = (
    ("anna", "a", 60, VIEW),
    ("anna", "b", 660, VIEW), ("anna", "b", 670, CART), ("anna", "b", 675, BUY), ("anna", "unknown", 676, BUY),
    ("anna", "c", 900, CART), ("anna", "a", 920, VIEW),
    ("anna", "d", 1300, BUY),  # after the end
    ("ben", "a", 700, VIEW), ("ben", "c", 800, BUY),  # new at 700, back at 800
    ("cleo", "a", 60, BUY),  # never back
)  # fmt: skip


def test_each_return_is_a_row_with_what_was_done_before_and_what_on_the_visit():
    found = between(log(*ACTS))
    assert found.customers.tolist() == ["anna", "anna", "ben"]
    assert told(found, 0) == (11.0, {"a": 60.0}, {"b": BUY})
    assert told(found, 1) == (15.0, {"a": 60.0, "b": 675.0}, {"a": VIEW, "c": CART})
    assert told(found, 2) == (800 / 60, {"a": 700.0}, {"c": BUY})
    assert np.diff(found.relevant.indptr).tolist() == [1, 0, 1]


def test_one_visit_of_each_is_drawn_and_the_draw_is_the_seed_s():
    hours = [("anna", "abcd"[n % 4], 60 * n, VIEW) for n in range(1, 20)] + [("ben", "a", 60, VIEW), ("ben", "b", 700, VIEW)]
    draws = [between(log(*hours), rng=np.random.default_rng(seed)) for seed in (0, 0, 1, 2, 3)]
    assert all(one.customers.tolist() == ["anna", "ben"] for one in draws)
    assert draws[0].at_us.tolist() == draws[1].at_us.tolist()
    assert len({int(one.at_us[0]) for one in draws}) > 1
    every = between(log(*hours))
    for one in draws:
        (row,) = np.flatnonzero((every.at_us == one.at_us[0]) & (every.customers == "anna"))
        assert told(one, 0) == told(every, row)


def test_what_was_learned_of_late_is_not_known_on_the_visit():
    late = log(("anna", "a", 60, VIEW), ("anna", "b", 70, VIEW, 700), ("anna", "c", 660, BUY), ("anna", "d", 661, BUY, 900))
    assert told(between(late), 0) == (11.0, {"a": 60.0}, {"c": BUY})


def test_a_log_without_returns_has_no_rows():
    found = between(log(("anna", "a", 60, VIEW), ("ben", "b", 700, BUY)))
    assert len(found.histories) == found.worth.shape[0] == len(found.at_us) == 0


ACT = st.tuples(st.sampled_from(["anna", "ben"]), st.sampled_from("abcd"), st.integers(0, 1500), st.sampled_from([VIEW, CART, BUY]))


@given(st.lists(ACT, min_size=1, max_size=25))
def test_a_visit_knows_all_acts_before_its_begin_and_none_from_then_on(acts):
    frame = log(*acts)
    found = between(frame)
    for row in range(len(found.at_us)):
        began, whose = pd.Timestamp(found.at_us[row], unit="us", tz="UTC"), found.customers[row]
        theirs = frame[frame["customer_id"] == whose]
        past = theirs[theirs["event_timestamp"] < began]
        history = found.histories.customer(row)
        assert ["abcd"[item] for item in history.item] == sorted(past["item_id"].unique())
        assert history.purchases.sum() == (past["type"] == "purchase").sum()
        assert began - past["event_timestamp"].max() > SILENCE
        assert CUT <= began < UNTIL


@pytest.mark.parametrize("begun", [5, 40])
def test_nothing_from_the_end_on_counts(begun):
    """Also of a visit that is not over by then."""
    acts = [("anna", "a", 60, VIEW), ("anna", "b", 1200 - begun, VIEW)]
    more = [("anna", "c", 1200 + n, BUY) for n in range(0, 60, 10)]
    whole, cut = between(log(*acts, *more)), between(log(*acts))
    assert told(whole, 0) == told(cut, 0)
    assert len(whole.at_us) == 1
