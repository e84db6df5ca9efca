"""The batch twin of sessions gives the rows of their definition."""

import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines import engine, session_steps, sessions, tables

MINUTE = 60_000_000
START = 20_089 * 24 * 60 * MINUTE
GAP = 30 * MINUTE
EVENT = st.tuples(
    st.sampled_from(["a", "a", "b", None]),
    st.integers(0, 40).map(lambda i: START + i * 10 * MINUTE),
    st.sampled_from([0, 0, 0, 10 * MINUTE, GAP, 2 * GAP, None]),
    st.sampled_from(["view", "view", "cart_add", "cart_remove", "search", "purchase", "page", "exposure", None]),
    st.sampled_from(["i1", "i2", None]),
    st.sampled_from([100, 250, None]),
    st.sampled_from([1, 3, None]),
    st.sampled_from([None, None, None, "web", "app", "gap-3", "s:0123456789abcdef", "s:summer"]),
)
SCHEDULES = st.lists(st.lists(EVENT, min_size=1, max_size=14), min_size=1, max_size=12)
QUICK = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


def table_of(schedules):
    names = ["customer_id", "ts", "late", "type", "item_id", "price_cents", "quantity", "session_id"]
    rows = [(f"{who}{n}" if who else None, *event) for n, schedule in enumerate(schedules) for who, *event in schedule]
    frame = pd.DataFrame(rows, columns=names).astype({"price_cents": "Int64", "quantity": "Int64", "late": "Int64"})
    times = {
        "event_timestamp": pd.to_datetime(frame["ts"], unit="us", utc=True),
        "created_timestamp": pd.to_datetime((frame["ts"] + frame["late"]).astype("Float64"), unit="us", utc=True),
    }
    schema = pa.schema([tables.EVENTS.schema.field(name) for name in session_steps.COLUMNS])
    return pa.Table.from_pandas(frame.assign(**times)[schema.names], schema, preserve_index=False)


@pytest.fixture(scope="module")
def con(tmp_path_factory):
    import ibis

    return ibis.duckdb.from_connection(engine.connect(tmp_path_factory.mktemp("engine")))


def defined(con, events):
    named = sessions.identified(con.create_table("events", events, overwrite=True, temp=True), gap_minutes=30)
    changes = sessions.changelog(named, gap_minutes=30)
    return rows_of(named.to_pyarrow()), rows_of(changes.to_pyarrow())


def rows_of(table):
    """As texts, sorted: events may be alike."""
    return sorted(repr(sorted(row.items())) for row in table.to_pylist())


def behaviour(rows):
    """Those that any feature counts: what is nobody's, or no behaviour, keeps what it had."""
    others = ("('customer_id', None)", "('type', None)", "('type', 'exposure')")
    return [row for row in rows if not any(text in row for text in others)]


def made(events):
    named = session_steps.identified(events, gap_minutes=30)
    changes = session_steps.changelog(named, gap_minutes=30)
    keys = list(zip(changes["customer_id"].to_pylist(), changes["event_timestamp"].to_pylist(), strict=True))
    assert keys == sorted(set(keys)), "by customer and time, one row for each"
    return behaviour(rows_of(named)), rows_of(changes)


@settings(max_examples=8, **QUICK)
@given(SCHEDULES)
def test_same_rows_as_the_definition_for_any_schedule(con, schedules):
    events = table_of(schedules)
    named, changes = defined(con, events)
    assert made(events) == (behaviour(named), changes)


def test_control_a_gap_that_is_one_minute_longer_is_told_apart(con):
    events = table_of([[("a", START + minute * MINUTE, 0, "view", "i1", 100, 1, None) for minute in (0, 30, 61)]])
    named, changes = defined(con, events)
    other = session_steps.identified(events, gap_minutes=31)
    assert made(events) == (named, changes)
    assert rows_of(other) != named
    assert rows_of(session_steps.changelog(other, gap_minutes=31)) != changes


def test_no_events_give_no_rows_and_all_columns():
    none = table_of([[("a", START, 0, "view", "i1", 100, 1, None)]]).slice(0, 0)
    found = session_steps.changelog(session_steps.identified(none, gap_minutes=30), gap_minutes=30)
    assert (found.num_rows, set(found.column_names)) == (0, set(tables.CUSTOMER_SESSION.schema.names))
