from datetime import UTC, datetime, timedelta

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import events
from pipelines.settings import IngestSettings

NOON = datetime(2024, 3, 1, 12, tzinfo=UTC)
GOOD = {
    "type": "purchase",
    "event_id": "m1",
    "event_timestamp": NOON,
    "created_timestamp": NOON + timedelta(seconds=2),
    "user_id": "u1",
    "anonymous_id": None,
    "item_id": "i1",
    "quantity": 2,
    "price_cents": 999,
}
BROKEN = {
    "type_unknown": {"type": "telemetry"},
    "event_id_missing": {"event_id": None},
    "time_unreadable": {"event_timestamp": None},
    "time_in_future": {"event_timestamp": NOON + timedelta(hours=2)},
    "time_too_old": {"event_timestamp": NOON - timedelta(days=4_000)},
    "identifier_missing": {"user_id": None},
    "item_missing": {"item_id": None},
    "quantity_invalid": {"quantity": 0},
    "price_invalid": {"price_cents": -1},
}


def frame(*changes: dict) -> pd.DataFrame:
    rows = pd.DataFrame([GOOD | change for change in changes])
    kinds = {
        "event_timestamp": "datetime64[us, UTC]",
        "created_timestamp": "datetime64[us, UTC]",
        "quantity": "Int64",
        "price_cents": "Int64",
    }
    return rows.astype({"user_id": "object", "anonymous_id": "object", **kinds})


def reasons(rows: pd.DataFrame) -> dict[int, str]:
    rejected = events.validate(rows).rejected
    return dict(zip(rejected["index"], rejected["reason"], strict=True))


def test_a_good_row_passes_untouched() -> None:
    rows = frame({})
    checked = events.validate(rows)
    assert checked.rejected.empty
    pd.testing.assert_frame_equal(checked.clean, rows)


@pytest.mark.parametrize("reason", BROKEN)
def test_a_row_broken_in_one_way_is_refused_for_that_and_its_neighbours_pass(reason: str) -> None:
    rows = frame({}, BROKEN[reason], {})
    checked = events.validate(rows)
    assert reasons(rows) == {1: reason}
    assert list(checked.clean.index) == [0, 2]


def test_a_row_broken_in_every_way_is_refused_once_for_the_first_reason() -> None:
    everything = {name: value for change in BROKEN.values() for name, value in change.items()} | {"event_timestamp": None}
    assert reasons(frame(everything)) == {0: "type_unknown"}


def test_every_reason_that_the_schema_gives_has_a_sentence() -> None:
    given_by = {check.error for column in events.CLEAN.columns.values() for check in column.checks}
    assert given_by == set(BROKEN)
    assert given_by <= set(events.REASONS)


@pytest.mark.parametrize("kind", ["view", "cart_add", "cart_remove", "purchase", "wishlist"])
def test_types_about_an_item_need_one(kind: str) -> None:
    assert reasons(frame({"type": kind, "item_id": None})) == {0: "item_missing"}


@pytest.mark.parametrize("kind", sorted(set(events.TYPES) - set(events.ITEM_TYPES)))
def test_other_types_need_none(kind: str) -> None:
    assert reasons(frame({"type": kind, "item_id": None, "quantity": None, "price_cents": None})) == {}


def test_a_receipt_that_nobody_noted_is_no_reason_to_refuse() -> None:
    assert reasons(frame({"created_timestamp": None, "event_timestamp": NOON - timedelta(days=5_000)})) == {}


def test_a_clock_that_was_never_set_is_refused_even_without_a_receipt() -> None:
    assert reasons(frame({"created_timestamp": None, "event_timestamp": datetime(1970, 1, 1, tzinfo=UTC)})) == {0: "time_too_old"}


def test_limits_come_from_the_settings() -> None:
    late = frame({"event_timestamp": NOON - timedelta(days=2)})
    assert events.validate(late, IngestSettings(max_age_days=3)).rejected.empty
    assert len(events.validate(late, IngestSettings(max_age_days=1)).rejected) == 1


def test_the_detail_names_what_was_found() -> None:
    assert events.validate(frame({"quantity": -3})).rejected["detail"][0] == "quantity: -3"
    assert events.validate(frame({"quantity": events.UNREADABLE})).rejected["detail"][0] == "quantity: not a number"


def test_a_frame_without_a_column_is_the_callers_defect() -> None:
    with pytest.raises(KeyError, match="item_id"):
        events.validate(frame({}).drop(columns="item_id"))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([None, *BROKEN]), min_size=1, max_size=30))
def test_every_row_is_either_clean_or_rejected(kinds: list[str | None]) -> None:
    rows = frame(*(BROKEN[kind] if kind else {} for kind in kinds))
    checked = events.validate(rows)
    assert sorted([*checked.clean.index, *checked.rejected["index"]]) == list(range(len(kinds)))
    assert reasons(rows) == {at: kind for at, kind in enumerate(kinds) if kind}


def test_an_address_has_one_identifier_however_it_is_written_and_is_not_in_it() -> None:
    assert events.email_identifier(" Ann@Example.com ") == events.email_identifier("ann@example.com")
    assert events.email_identifier("ann@example.com") != events.email_identifier("bob@example.com")
    assert "ann" not in events.email_identifier("ann@example.com")


def test_segment_names_lead_to_known_types() -> None:
    assert set(events.SEGMENT_NAMES.values()) | set(events.SEGMENT_CALLS.values()) <= set(events.TYPES)
    assert set(events.ITEM_TYPES) | set(events.ORDER_TYPES) <= set(events.TYPES)
