"""The online state of one key against the offline expressions: every column, at every change and beside it, for any schedule."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feature_repo.aggregates import Aggregates, Distinct, Extreme, Instant, Latest, Sum
from pipelines import changepoints, engine, sessions, tables, tiles, windows
from pipelines.tiles import Tiles, Visit

MINUTE, HOUR, DAY = 60_000_000, 3_600_000_000, 86_400_000_000
START = 20_089 * DAY  # 2025-01-01, a multiple of every hop
GAP_MINUTES = 30
KINDS = ["view", "cart_add", "cart_remove", "search", "purchase", "return", "page", "exposure", "consent"]

# On, just before and just after hop edges and window lengths; several at one instant; arrivals in time, late, later than any window.
EVENT = st.tuples(
    st.builds(
        lambda base, step, edge: START + base * step + edge,
        st.integers(0, 5),
        st.sampled_from([MINUTE, 5 * MINUTE, HOUR, DAY, 8 * DAY]),
        st.sampled_from([-1, 0, 0, 1, 123_456_789]),
    ),
    st.sampled_from([-30_000_000, 0, 0, 0, 1, 5 * MINUTE, 31 * MINUTE, HOUR, 65 * MINUTE, 25 * HOUR, 8 * DAY, 40 * DAY, 120 * DAY]),
    st.sampled_from(KINDS),
    st.sampled_from(["i1", "i2", "i3", None]),
    st.sampled_from(["o1", "o2", None]),
    st.sampled_from([0, 100, 250, 10**12, None]),
    st.sampled_from([1, 3, None]),
    st.sampled_from(["toys", "books", None]),
    st.sampled_from(["web-1", "web-2", "s:0123456789abcdef", "gap-1", None, None, None]),
)
SCHEDULES = st.lists(st.lists(EVENT, min_size=1, max_size=14), min_size=1, max_size=20)
NAMES = ["customer_id", "ts", "late", "type", "item_id", "order_id", "price_cents", "quantity", "category", "session_id"]
pytestmark = pytest.mark.slow
LAW = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


@pytest.fixture(scope="module")
def con(tmp_path_factory):
    import ibis

    return ibis.duckdb.from_connection(engine.connect(tmp_path_factory.mktemp("engine")))


def frame_of(schedules):
    frame = pd.DataFrame([(f"c{i:02}", *event) for i, schedule in enumerate(schedules) for event in schedule], columns=NAMES)
    return enriched(frame)


def enriched(frame):
    frame = frame.astype({"price_cents": "Int64", "quantity": "Int64"})
    sign = frame["type"].map({"purchase": 1, "return": -1}).fillna(0).astype("int64")
    frame["revenue_cents"] = sign * frame["price_cents"].fillna(0) * frame["quantity"].fillna(1)
    frame["enter"] = frame["ts"] + frame["late"].clip(lower=0)
    return frame


def table(con, frame):
    shown = frame.assign(
        event_timestamp=pd.to_datetime(frame["ts"], unit="us", utc=True),
        created_timestamp=pd.to_datetime(frame["ts"] + frame["late"], unit="us", utc=True),
    )
    schema = pa.schema([*(f for f in tables.EVENTS.schema if f.name in shown.columns), pa.field("category", pa.string())])
    return con.create_table("events", pa.Table.from_pandas(shown[schema.names], schema, preserve_index=False), overwrite=True, temp=True)


def rows_of(frame):
    """As the stream has them: plain values, None where null, in order of enter."""
    ordered = frame.sort_values(["enter", "ts"]).astype(object)
    return ordered.where(ordered.notna(), None).to_dict("records")


class Timeline:
    """The change points of one key, as the offline expression gives them."""

    def __init__(self, changes, columns, nothing):
        micros = pd.DatetimeIndex(changes["event_timestamp"]).as_unit("us").asi8
        order = np.argsort(micros)
        self.at = micros[order]
        held = changes.iloc[order]
        self.rows = [
            {c: None if pd.isna(row[c]) else int(row[c]) for c in columns} for row in held[columns].astype(object).to_dict("records")
        ]
        self.nothing = nothing

    def state(self, at):
        place = int(np.searchsorted(self.at, at, side="right")) - 1
        return self.rows[place] if place >= 0 else self.nothing

    def next_change(self, at):
        """The first instant after `at` from which the values are others."""
        now = self.state(at)
        later = np.flatnonzero(self.at > at)
        return next((int(self.at[i]) for i in later if self.rows[i] != now), None)


def differences(state, rows, timeline, rng):
    """What `state`, given the rows in order, says otherwise than the change points, at every change, before and after it, and at random."""
    probes = np.concatenate([timeline.at, timeline.at - 1, timeline.at + 1, timeline.at[rng.integers(0, len(timeline.at), 20)] + 7 * HOUR])
    found, place = [], 0
    for at in np.unique(probes).tolist():
        while place < len(rows) and rows[place]["enter"] <= at:
            state.add(rows[place], rows[place]["enter"])
            place += 1
        state.advance(at)
        values, wanted = state.values(), timeline.state(at)
        found += [(at - START, name, value, wanted[name]) for name, value in values.items() if value != wanted[name]]
        if list(values) != list(wanted):
            found.append((at - START, "columns", list(values), list(wanted)))
        change, following = timeline.next_change(at), rows[place]["enter"] if place < len(rows) else None
        expiry = state.next_us()
        if expiry is not None and expiry <= at:
            found.append((at - START, "next_us", expiry, "after now"))
        if change is not None and (following is None or change < following) and (expiry is None or expiry > change):
            found.append((at - START, "next_us", expiry, change))
    return found


def timelines(changes, key, columns, counts):
    nothing = {c: 0 if c in counts else None for c in columns}
    return {who: Timeline(rows, columns, nothing) for who, rows in changes.groupby(list(key))}


def compare(con, frame, spec, make=Tiles):
    changes = windows.changelog(table(con, frame), spec).to_pandas()
    rng = np.random.default_rng(1)
    found = []
    for who, timeline in timelines(changes, spec.key, spec.columns(), set(spec.counts())).items():
        rows = rows_of(frame[(frame[list(spec.key)] == who).all(axis=1)])
        found += [(who, *difference) for difference in differences(make(spec), rows, timeline, rng)]
    return found


ALL = Aggregates(
    key=("customer_id",),
    sums=(
        Sum("priced", carrying="price_cents", windows=("1h", "7d"), has_total=True),
        Sum("cents", types=("view", "purchase"), value="price_cents", carrying="item_id", windows=("24h",), has_total=True),
    ),
    distincts=(Distinct("items", "item_id", windows=("1h", "7d"), has_total=True), Distinct("orders", "order_id", types=("purchase",))),
    extremes=(
        Extreme("max", "price_cents", windows=("1h", "24h", "90d"), has_total=True),
        Extreme("min", "price_cents", types=("view", "page"), is_min=True, windows=("24h", "7d"), has_total=True),
        Extreme("max_revenue", "revenue_cents", types=("return", "purchase"), windows=("24h",)),
    ),
    instants=(Instant("first", types=("purchase",), is_first=True), Instant("last")),
    latests=(
        Latest("last_price", "price_cents"),
        Latest("first_price", "price_cents", types=("purchase",), is_first=True),
        Latest("last_view_price", "price_cents", types=("view",), window="24h"),
        Latest("first_view_price", "price_cents", types=("view",), is_first=True, window="1h"),
    ),
)
SPECS = pytest.mark.parametrize(
    "spec",
    [ALL, *windows.ENTITIES],
    ids=["every function", "customer", "item", "pair", "category"],
)


@SPECS
@settings(max_examples=3, **LAW)
@given(schedules=SCHEDULES)
def test_tiles_equal_the_change_points_at_every_instant(con, spec, schedules):
    assert compare(con, frame_of(schedules), spec) == []


@pytest.mark.parametrize("limit", [1, 2])
@settings(max_examples=2, **LAW)
@given(schedules=SCHEDULES)
def test_distinct_counts_beyond_their_limit_are_the_limit_on_both_sides(con, limit, schedules):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(changepoints, "DISTINCT_LIMIT", limit)
        patch.setattr(tiles, "DISTINCT_LIMIT", limit)
        assert compare(con, frame_of(schedules), ALL) == []
        patch.setattr(tiles, "DISTINCT_LIMIT", limit + 1)  # control: a state with another limit is told apart
        three = [(START + i, 0, "view", f"i{i}", None, None, None, None, None) for i in range(3)]
        assert compare(con, frame_of([three]), ALL)


@SPECS
@settings(max_examples=1, **LAW)
@given(schedules=SCHEDULES)
def test_tiles_equal_the_values_strictly_before_any_instant(con, spec, schedules):
    """The other offline expression: the state from `t` on is the state strictly before the next microsecond."""
    key = list(spec.key)
    frame = frame_of(schedules).dropna(subset=key)
    rng = np.random.default_rng(2)
    asked = frame.iloc[rng.integers(0, len(frame), 40)] if len(frame) else frame
    at = asked["enter"].to_numpy() + rng.choice([0, 1, HOUR, 25 * HOUR, 8 * DAY], len(asked))
    probes = asked[key].assign(event_timestamp=pd.to_datetime(at + 1, unit="us", utc=True), at=at).astype(dict.fromkeys(key, "str"))
    probed = con.create_table("probes", pa.Table.from_pandas(probes, preserve_index=False), overwrite=True, temp=True)
    for wanted in windows.values_at(table(con, frame), probed, spec).to_pandas().astype(object).to_dict("records"):
        state = Tiles(spec)
        mine = (frame[key] == [wanted[name] for name in key]).all(axis=1) & (frame["enter"] <= wanted["at"])
        for row in rows_of(frame[mine]):
            state.add(row, row["enter"])
        state.advance(wanted["at"])
        assert state.values() == {c: None if pd.isna(wanted[c]) else int(wanted[c]) for c in spec.columns()}


class _Early(Tiles):
    """Everything leaves one microsecond before its time."""

    def advance(self, to_us):
        super().advance(to_us + 1)


class _Forgetful(Tiles):
    """Values are read without letting what expired leave: what a state that is pushed on events alone says."""

    def advance(self, to_us):
        return


@pytest.mark.parametrize("wrong", [_Early, _Forgetful])
def test_state_that_expires_a_microsecond_early_or_never_is_told_apart(con, wrong):
    """Control of the law above."""
    frame = frame_of(
        [[(START, 0, "view", "i1", None, 100, 1, None, None), (START + 3 * DAY, 0, "purchase", "i1", "o1", 100, 1, None, None)]]
    )
    assert compare(con, frame, windows.CUSTOMER_ACTIVITY) == []
    assert compare(con, frame, windows.CUSTOMER_ACTIVITY, make=wrong)


def test_next_change_told_too_late_is_noticed(con):
    """Control of the law above: an hour later is too late."""

    class Late(Tiles):
        def next_us(self):
            expiry = super().next_us()
            return None if expiry is None else expiry + HOUR

    frame = frame_of([[(START, 0, "view", "i1", None, 100, 1, None, None)]])
    assert {found[2] for found in compare(con, frame, windows.CUSTOMER_ACTIVITY, make=Late)} == {"next_us"}


def visits(con, frame, make=None):
    """Differences of the session, and of the aggregates over the names that it gives, from the offline expressions."""
    told = sessions.identified(table(con, frame), gap_minutes=GAP_MINUTES)
    rng = np.random.default_rng(3)
    columns = tables.CUSTOMER_SESSION.schema.names[2:]
    held = sessions.changelog(told, gap_minutes=GAP_MINUTES).to_pandas()
    activity = windows.changelog(told, windows.CUSTOMER_ACTIVITY).to_pandas()
    spec = windows.CUSTOMER_ACTIVITY
    counted = timelines(activity, ("customer_id",), spec.columns(), set(spec.counts()))
    found = []
    for who, timeline in timelines(held, ("customer_id",), columns, set(windows.SESSION_COUNTS)).items():
        mine = frame[(frame["customer_id"] == who[0]) & ~frame["type"].isin(windows.NOT_BEHAVIOUR)]
        rows = rows_of(mine)
        visit = make() if make else Visit(gap_minutes=GAP_MINUTES)
        found += [(who, *difference) for difference in differences(visit, rows, timeline, rng)]
        naming = Visit(gap_minutes=GAP_MINUTES)
        named = []
        for row in rows:
            named.append(row | {"session_id": naming.name(row, row["enter"])})
            naming.add(row, row["enter"])
        found += [(who, *difference) for difference in differences(Tiles(spec), named, counted[who], rng)]
    return found


def shortened(schedules):
    """Into minutes, so that sessions meet, part and are joined late."""
    return [[(START + (e[0] - START) // 60 % (4 * HOUR) // MINUTE * MINUTE, min(e[1], HOUR), *e[2:]) for e in s] for s in schedules]


@settings(max_examples=2, **LAW)
@given(SCHEDULES)
def test_session_and_the_names_it_gives_equal_the_offline_sessions(con, schedules):
    assert visits(con, frame_of(schedules)) == []
    assert visits(con, frame_of(shortened(schedules))) == []


def test_session_that_ends_a_microsecond_late_is_told_apart(con):
    """Control of the law above."""

    def lingering():
        visit = Visit(gap_minutes=GAP_MINUTES)
        visit._gap += 1
        return visit

    frame = frame_of([[(START, 0, "view", "i1", None, 100, 1, None, None), (START + HOUR, 0, "view", "i1", None, 100, 1, None, None)]])
    assert visits(con, frame) == []
    assert visits(con, frame, make=lingering)


def test_memory_of_a_state_does_not_grow_with_its_events():
    """100,000 events of one customer over a year: the tiles that count, and the values that distinct counts remember."""
    state, visit = Tiles(windows.CUSTOMER_ACTIVITY), Visit(gap_minutes=GAP_MINUTES)
    n, most = 100_000, 0
    for i in range(n):
        ts = START + i * 365 * DAY // n
        row = {"type": KINDS[i % 7], "ts": ts, "item_id": f"i{i % 500}", "order_id": f"o{i % 50}", "session_id": None}
        row |= {"price_cents": 100, "quantity": 1, "revenue_cents": 100}
        state.add(row | {"session_id": visit.name(row, ts)}, ts)
        visit.add(row, ts)
        most = max(most, len(state._leaving))
    spec = windows.CUSTOMER_ACTIVITY
    used = [name for name in windows.WINDOWS if any(name in a.windows for a in spec.sums)]  # one tile for all sums of a window
    used += [name for a in (*spec.distincts, *spec.extremes) for name in a.windows] + [a.window for a in spec.latests if a.window]
    assert most <= sum(windows.WINDOWS[name].size // windows.WINDOWS[name].hop + 1 for name in used)
    assert state.values()["events_total"] == n
    assert state.values()["views_1h"] == sum(
        1 for i in range(n) if i % 7 == 0 and START + i * 365 * DAY // n >= ts - HOUR - ts % (5 * MINUTE)
    )


def test_advancing_into_the_past_changes_nothing():
    state = Tiles(windows.ITEM_ACTIVITY)
    state.add({"type": "view", "ts": START, "price_cents": 5, "revenue_cents": 0}, START)
    state.advance(START + 2 * DAY)
    before = state.values()
    state.advance(START)
    assert state.values() == before
    assert before["item_views_24h"] == 0
    assert before["item_views_7d"] == 1


def test_sessions_that_ingest_names_are_told_from_those_of_a_source():
    from pipelines.ingest.forming import SESSION

    visit = Visit(gap_minutes=GAP_MINUTES)
    row = {"type": "view", "ts": START, "item_id": None, "price_cents": None, "quantity": None}
    given = {
        name: visit.name(row | {"session_id": name}, START) for name in (f"{SESSION}0123456789abcdef", "s:summer", None, "gap-7", "web-7")
    }
    assert list(given.values()) == ["gap-1", "s:summer", "gap-1", "gap-1", "web-7"]
