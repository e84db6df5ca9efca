from datetime import UTC, datetime, timedelta

import duckdb
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import contract, events, tables
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
    "order_id": "o1",
    "consent": "{}",
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
    "item_missing": {"item_id": None, "order_id": None},
    "order_empty": {"item_id": None, "price_cents": None},
    "return_empty": {"type": "return", "item_id": None, "order_id": None},
    "consent_missing": {"type": "consent", "consent": None},
    "quantity_missing": {"quantity": None},
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
    rejected = contract.validate(rows).rejected
    return dict(zip(rejected["index"], rejected["reason"], strict=True))


def test_a_good_row_passes_untouched() -> None:
    rows = frame({})
    checked = contract.validate(rows)
    assert checked.rejected.empty
    pd.testing.assert_frame_equal(checked.clean, rows)


@pytest.mark.parametrize("reason", BROKEN)
def test_a_row_broken_in_one_way_is_refused_for_that_and_its_neighbours_pass(reason: str) -> None:
    rows = frame({}, BROKEN[reason], {})
    checked = contract.validate(rows)
    assert reasons(rows) == {1: reason}
    assert list(checked.clean.index) == [0, 2]


def test_a_row_broken_in_every_way_is_refused_once_for_the_first_reason() -> None:
    everything = {name: value for change in BROKEN.values() for name, value in change.items()} | {"event_timestamp": None, "type": "x"}
    assert reasons(frame(everything)) == {0: "type_unknown"}


def test_every_reason_that_the_schema_gives_has_a_sentence() -> None:
    given_by = {check.error for column in contract.CLEAN.columns.values() for check in column.checks}
    assert given_by == set(BROKEN)
    assert given_by <= set(events.REASONS)


@pytest.mark.parametrize("kind", ["view", "cart_add", "cart_remove", "purchase", "wishlist"])
def test_types_about_an_item_need_one(kind: str) -> None:
    assert reasons(frame({"type": kind, "item_id": None, "order_id": None})) == {0: "item_missing"}
    assert reasons(frame({"type": kind, "item_id": None}).drop(columns=["order_id", "consent"])) == {0: "item_missing"}


@pytest.mark.parametrize("kind", sorted(set(events.TYPES) - set(events.ITEM_TYPES)))
def test_other_types_need_none(kind: str) -> None:
    assert reasons(frame({"type": kind, "item_id": None, "quantity": None, "price_cents": None})) == {}


def test_an_order_may_be_known_by_its_amount_alone_and_a_view_may_not() -> None:
    assert reasons(frame({"item_id": None})) == {}
    assert reasons(frame({"item_id": None, "type": "view"})) == {0: "item_missing"}
    assert reasons(frame({"item_id": None, "type": "return", "price_cents": None})) == {}


def test_what_a_frame_has_no_column_for_is_not_judged() -> None:
    rows = frame({"type": "consent"}, {"type": "return", "item_id": None, "order_id": None})
    assert reasons(rows) == {1: "return_empty"}
    assert reasons(rows.drop(columns=["order_id", "consent"])) == {}


NEAR = {
    "type": [*events.TYPES, "telemetry", None],
    "event_id": ["m", None],
    "event_timestamp": [NOON, None, NOON + timedelta(minutes=61), NOON - timedelta(days=3_651), datetime(1989, 1, 1, tzinfo=UTC)],
    "created_timestamp": [NOON, None, NOON + timedelta(microseconds=1), datetime(1980, 1, 1, tzinfo=UTC)],
    "user_id": ["u", None],
    "anonymous_id": ["a", None],
    "item_id": ["i", None],
    "order_id": ["o", None],
    "consent": ["{}", None],
    "quantity": [1, 0, None, events.MAX_QUANTITY, events.MAX_QUANTITY + 1, -3, events.UNREADABLE],
    "price_cents": [1, 0, None, events.MAX_PRICE_CENTS, events.MAX_PRICE_CENTS + 1, -1, events.UNREADABLE],
}
KINDS = {"quantity": pa.int64(), "price_cents": pa.int64(), **dict.fromkeys(("event_timestamp", "created_timestamp"), tables.TIME)}
ARROW = pa.schema([(name, KINDS.get(name, pa.string())) for name in NEAR])


def missed(rows: list[dict], passes_sql: str) -> set[int]:
    """Which rows `validate` refuses although the fast path lets them pass."""
    table = pa.Table.from_pylist(rows, schema=ARROW).append_column("place", pa.array(range(len(rows))))
    with duckdb.connect() as db:
        db.execute("SET TimeZone = 'UTC'").register("rows", table)
        suspects = {place for (place,) in db.sql(f"SELECT place FROM rows WHERE NOT {passes_sql}").fetchall()}
    return set(contract.validate(table.to_pandas(types_mapper=pd.ArrowDtype)).rejected["index"]) - suspects


@settings(max_examples=40)
@given(st.lists(st.fixed_dictionaries({name: st.sampled_from(values) for name, values in NEAR.items()}), min_size=1, max_size=60))
def test_no_row_that_the_fast_path_lets_pass_would_be_refused(rows: list[dict]) -> None:
    assert missed(rows, contract.passes_sql()) == set()


def test_every_single_defect_is_a_suspect_and_a_fast_path_that_forgets_one_is_found_out() -> None:
    good = GOOD | {"created_timestamp": NOON}
    rows = [good | {name: value} for name, values in NEAR.items() for value in values]
    rows += [
        good | {"type": kind, "item_id": item, name: None}
        for kind in events.TYPES
        for item in ("i", None)
        for name in NEAR
        if name != "type"
    ]
    assert missed(rows, contract.passes_sql()) == set()
    for forgotten in ("event_id IS NOT NULL", "quantity BETWEEN 1 AND 1000000", "consent IS NOT NULL", "order_id IS NOT NULL"):
        assert forgotten in contract.passes_sql()
        assert missed(rows, contract.passes_sql().replace(forgotten, "true")), forgotten


def test_the_fast_path_has_no_suspects_among_good_rows_and_follows_the_settings() -> None:
    good = pa.Table.from_pylist([GOOD, GOOD | {"type": "view", "quantity": None}, GOOD | {"type": "search", "item_id": None}], schema=ARROW)
    with duckdb.connect() as db:
        db.execute("SET TimeZone = 'UTC'").register("rows", good)
        assert db.sql(f"SELECT * FROM rows WHERE NOT {contract.passes_sql()}").fetchall() == []
        strict = contract.passes_sql(IngestSettings(max_future_minutes=0), {"event_timestamp": "event_timestamp + INTERVAL 1 HOUR"})
        assert db.sql(f"SELECT {strict} FROM rows").fetchall() == [(False,)] * 3


def test_a_receipt_that_nobody_noted_is_no_reason_to_refuse() -> None:
    assert reasons(frame({"created_timestamp": None, "event_timestamp": NOON - timedelta(days=5_000)})) == {}


def test_a_clock_that_was_never_set_is_refused_even_without_a_receipt() -> None:
    assert reasons(frame({"created_timestamp": None, "event_timestamp": datetime(1970, 1, 1, tzinfo=UTC)})) == {0: "time_too_old"}


def test_limits_come_from_the_settings() -> None:
    late = frame({"event_timestamp": NOON - timedelta(days=2)})
    assert contract.validate(late, IngestSettings(max_age_days=3)).rejected.empty
    assert len(contract.validate(late, IngestSettings(max_age_days=1)).rejected) == 1


def test_the_detail_names_what_was_found() -> None:
    assert contract.validate(frame({"quantity": -3})).rejected["detail"][0] == "quantity: -3"
    assert contract.validate(frame({"quantity": events.UNREADABLE})).rejected["detail"][0] == "quantity: not a number"


def test_a_frame_without_a_column_is_the_callers_defect() -> None:
    with pytest.raises(KeyError, match="item_id"):
        contract.validate(frame({}).drop(columns="item_id"))


@settings(max_examples=25)
@given(st.lists(st.sampled_from([None, *BROKEN]), min_size=1, max_size=30))
def test_every_row_is_either_clean_or_rejected(kinds: list[str | None]) -> None:
    rows = frame(*(BROKEN[kind] if kind else {} for kind in kinds))
    checked = contract.validate(rows)
    assert sorted([*checked.clean.index, *checked.rejected["index"]]) == list(range(len(kinds)))
    assert reasons(rows) == {at: kind for at, kind in enumerate(kinds) if kind}
