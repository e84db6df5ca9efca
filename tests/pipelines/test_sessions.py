"""The current session against a brute-force reference, and sessions for events that came without one."""

import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines import engine, sessions, tables
from pipelines.windows import NOT_BEHAVIOUR, SESSION_COUNTS

MINUTE = 60_000_000
START = 20_089 * 24 * 60 * MINUTE
GAP = 30 * MINUTE
COLUMNS = tables.CUSTOMER_SESSION.schema.names[2:]
NOTHING = dict.fromkeys(SESSION_COUNTS, 0) | {"session_started_at": None, "session_last_event_at": None}

EVENT = st.tuples(
    st.integers(0, 24).map(lambda i: START + i * 5 * MINUTE),
    st.sampled_from([0, 0, 0, 0, 5 * MINUTE, 10 * MINUTE, GAP, 2 * GAP]),
    st.sampled_from(["view", "cart_add", "cart_remove", "search", "purchase", "page", "exposure"]),
    st.sampled_from(["i1", "i2", None]),
    st.sampled_from([100, 250, None]),
    st.sampled_from([1, 3, None]),
    st.sampled_from(["s1", "s1", "s2"]),
)
SCHEDULES = st.lists(st.lists(EVENT, min_size=1, max_size=8), min_size=1, max_size=30)


@pytest.fixture(scope="module")
def con(tmp_path_factory):
    import ibis

    return ibis.duckdb.from_connection(engine.connect(tmp_path_factory.mktemp("engine")))


def frame_of(schedules):
    names = ["customer_id", "ts", "late", "type", "item_id", "price_cents", "quantity", "session_id"]
    frame = pd.DataFrame([(f"c{i:02}", *e) for i, schedule in enumerate(schedules) for e in schedule], columns=names)
    return frame.astype({"price_cents": "Int64", "quantity": "Int64"})


def table(con, frame):
    shown = frame.drop(columns=["ts", "late"]).assign(
        event_timestamp=pd.to_datetime(frame["ts"], unit="us", utc=True),
        created_timestamp=pd.to_datetime(frame["ts"] + frame["late"], unit="us", utc=True),
    )
    schema = pa.schema([f for f in tables.EVENTS.schema if f.name in shown.columns])
    drawn = pa.Table.from_pandas(shown[schema.names], schema, preserve_index=False)
    return con.create_table("events", drawn, overwrite=True, temp=True)


def reference(events, at):
    """The session that the newest event known strictly before `at` belongs to, unless it has been silent for longer than the gap."""
    known = [e for e in events if e["ts"] + e["late"] < at and e["type"] not in NOT_BEHAVIOUR]
    if not known:
        return NOTHING
    newest = max((e["ts"], e["session_id"]) for e in known)
    if at > newest[0] + GAP:
        return NOTHING
    rows = [e for e in known if e["session_id"] == newest[1]]

    def number(kind):
        return sum(e["type"] == kind for e in rows)

    def cents(e):
        return (0 if pd.isna(e["price_cents"]) else e["price_cents"]) * (1 if pd.isna(e["quantity"]) else e["quantity"])

    cart = sum(cents(e) * {"cart_add": 1, "cart_remove": -1, "purchase": -1}.get(e["type"], 0) for e in rows)
    return {
        "session_events": len(rows),
        "session_views": number("view"),
        "session_cart_adds": number("cart_add"),
        "session_searches": number("search"),
        "session_purchases": number("purchase"),
        "session_distinct_items": len({e["item_id"] for e in rows} - {None}),
        "session_cart_cents": max(cart, 0),
        "session_started_at": min(e["ts"] for e in rows),
        "session_last_event_at": newest[0],
    }


def state_before(changes, at):
    rows = changes[changes["micros"] < at]
    if rows.empty:
        return NOTHING
    return {c: None if pd.isna(rows.iloc[-1][c]) else int(rows.iloc[-1][c]) for c in COLUMNS}


def changes_of(con, frame, gap_minutes=30):
    changes = sessions.changelog(table(con, frame), gap_minutes=gap_minutes).to_pandas()
    changes["micros"] = pd.DatetimeIndex(changes["event_timestamp"]).as_unit("us").asi8
    return changes.sort_values(["customer_id", "micros"])


@settings(max_examples=5, suppress_health_check=list(HealthCheck))
@given(SCHEDULES)
def test_state_at_any_instant_equals_the_definition(con, schedules):
    frame = frame_of(schedules)
    changes = changes_of(con, frame)
    assert not changes.duplicated(["customer_id", "event_timestamp"]).any()
    for customer, rows in frame.groupby("customer_id"):
        events, mine = rows.to_dict("records"), changes[changes["customer_id"] == customer]
        edges = {e["ts"] + e["late"] + d for e in events for d in (0, GAP, GAP - e["late"])}
        for at in sorted({edge + step for edge in edges for step in (-1, 0, 1)}):
            assert state_before(mine, at) == reference(events, at), (customer, at - START)


def test_silence_of_exactly_the_gap_leaves_nothing_until_the_next_event(con):
    first = (START, 0, "view", "i1", 100, 1, "s1")
    changes = changes_of(con, frame_of([[first, (START + 2 * GAP, 0, "view", "i1", 100, 1, "s2")]]))
    assert changes["micros"].sub(START).tolist() == [0, GAP, 2 * GAP, 3 * GAP]
    assert changes["session_events"].tolist() == [1, 0, 1, 0]
    # Control: with a longer gap there is no silence between the two.
    longer = changes_of(con, frame_of([[first, (START + 2 * GAP, 0, "view", "i1", 100, 1, "s2")]]), gap_minutes=61)
    assert longer["session_events"].tolist() == [1, 1, 0]


def named(con, rows):
    frame = frame_of([rows]).assign(session_id=None)
    found = sessions.identified(table(con, frame), gap_minutes=30).to_pandas().sort_values(["event_timestamp", "type"])
    return [None if pd.isna(name) else name for name in found["session_id"]]


def bare(minute, late=0):
    return (START + minute * MINUTE, late * MINUTE, "view", "i1", 100, 1, None)


def test_events_without_a_session_are_parted_by_silence(con):
    assert named(con, [bare(0), bare(10), bare(39), bare(69), bare(100), bare(101)]) == ["gap-1"] * 4 + ["gap-2"] * 2


def test_no_later_event_renames_an_earlier_session(con):
    """An event between two sessions, known late, must not join them in hindsight: what was told before stays as it was."""
    before = named(con, [bare(0), bare(50), bare(90)])
    after = named(con, [bare(0), bare(25, late=40), bare(50), bare(90)])
    assert before == ["gap-1", "gap-2", "gap-3"]
    assert [after[i] for i in (0, 2, 3)] == before
    assert named(con, [bare(0), bare(50), bare(5, late=60)])[1] is None  # belonged to a session long over


def test_given_session_ids_are_kept_and_those_told_in_hindsight_are_told_again(con):
    given = ["web-7", None, "s:0123456789abcdef", "s:summer"]
    frame = frame_of([[bare(minute) for minute in (0, 1, 2, 3)]]).assign(session_id=given)
    found = sessions.identified(table(con, frame), gap_minutes=30).to_pandas().sort_values("event_timestamp")
    assert found["session_id"].tolist() == ["web-7", "gap-1", "gap-1", "s:summer"]
    assert set(found.columns) == set(table(con, frame).columns)
