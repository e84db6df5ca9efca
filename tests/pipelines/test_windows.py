"""Windowed aggregates against a brute-force reference: exact at every instant, late events, hop edges and expiries included."""

from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feature_repo.aggregates import DISTINCT_LIMIT, LARGEST, Aggregates, Distinct, Extreme, Instant, Latest, Sum, spans_of
from pipelines import engine, tables, windows
from pipelines.windows import WINDOWS

HOUR, DAY = 3_600_000_000, 86_400_000_000
START = 20_089 * DAY  # 2025-01-01, a multiple of every hop
SMALL = Aggregates(
    key=("customer_id",),
    sums=(
        Sum("events", windows=("1h", "7d"), has_total=True),
        Sum("revenue_cents", value="revenue_cents", windows=("24h",), has_total=True),
        Sum("views", types=("view",), windows=("7d",)),
        Sum("priced", carrying="price_cents", windows=("24h",)),
        Sum("paid", types=("purchase",), value="price_cents", carrying="item_id", has_total=True),
    ),
    distincts=(
        Distinct("items", "item_id", windows=("1h", "7d"), has_total=True),
        Distinct("orders", "order_id", types=("purchase",), windows=("24h",), has_total=True),
    ),
    extremes=(
        Extreme("dearest", "price_cents", windows=("1h", "7d"), has_total=True),
        Extreme("cheapest", "price_cents", types=("view", "search"), is_min=True, windows=("24h",), has_total=True),
        Extreme("largest", "revenue_cents", types=("purchase", "return"), windows=("24h",)),
    ),
    instants=(Instant("first_event", is_first=True), Instant("last_event"), Instant("last_purchase", types=("purchase",))),
    latests=(
        Latest("price", "price_cents"),
        Latest("first_paid", "price_cents", types=("purchase",), is_first=True),
        Latest("viewed", "price_cents", types=("view",), window="24h"),
        Latest("first_searched", "price_cents", types=("search",), is_first=True, window="1h"),
    ),
)

# Times on, just before and just after hop edges and window lengths; arrivals in time, late, and later than any window.
TIMES = st.builds(
    lambda base, step, edge: START + base * step + edge,
    st.integers(0, 5),
    st.sampled_from([60_000_000, 5 * 60_000_000, HOUR, DAY, 8 * DAY]),
    st.sampled_from([-1, 0, 0, 1, 123_456_789]),
)
LATENESS = st.sampled_from([-30_000_000, 0, 0, 0, 1, 5 * 60_000_000, HOUR, 65 * 60_000_000, 25 * HOUR, 8 * DAY, 40 * DAY])
EVENT = st.tuples(
    TIMES,
    LATENESS,
    st.sampled_from(["view", "purchase", "return", "search", "exposure", "consent"]),
    st.sampled_from(["i1", "i2", None]),
    st.sampled_from(["o1", "o2", None]),
    st.sampled_from([100, 250, None]),
)
SCHEDULES = st.lists(st.lists(EVENT, min_size=1, max_size=9), min_size=1, max_size=25)


def instants(micros: object) -> pd.DatetimeIndex:
    return pd.DatetimeIndex(pd.to_datetime(np.asarray(micros, dtype="int64"), unit="us", utc=True)).as_unit("us")


def frame_of(schedules: list[list[tuple]]) -> pd.DataFrame:
    rows = [(f"c{i}", *event) for i, schedule in enumerate(schedules) for event in schedule]
    frame = pd.DataFrame(rows, columns=["customer_id", "ts", "late", "type", "item_id", "order_id", "price_cents"])
    sign = frame["type"].map({"purchase": 1, "return": -1}).fillna(0).astype("int64")
    frame["revenue_cents"] = (sign * frame["price_cents"].astype("float64").fillna(0)).astype("int64")
    frame["price_cents"] = frame["price_cents"].astype("Int64")
    frame["event_timestamp"], frame["created_timestamp"] = instants(frame["ts"]), instants(frame["ts"] + frame["late"])
    return frame


def counted(event: dict, window: str, at: int) -> bool:
    """The definition, word for word: known strictly before `at`, and not yet expired strictly before `at`."""
    enter = max(event["ts"], event["ts"] + event["late"])
    if window == "total":
        return enter < at
    size, hop = WINDOWS[window].size_us, WINDOWS[window].hop_us
    exit_ = event["ts"] // hop * hop + size + hop
    return enter < exit_ and enter < at and not exit_ < at


def reference(events: list[dict], at: int, spec: Aggregates) -> dict:
    behaviour = [e for e in events if e["type"] not in windows.NOT_BEHAVIOUR]

    def known(a, window: str, column: str | None = None) -> list[dict]:
        rows = [e for e in behaviour if counted(e, window, at) and (not a.types or e["type"] in a.types)]
        return [e for e in rows if column is None or not (e[column] is None or pd.isna(e[column]))]

    values: dict = {}
    for a in spec.sums:
        for w in spans_of(a):
            values[spec.column(a, w)] = sum((0 if pd.isna(e[a.value]) else e[a.value]) if a.value else 1 for e in known(a, w, a.carrying))
    for d in spec.distincts:
        for w in spans_of(d):
            values[spec.column(d, w)] = min(len({e[d.column] for e in known(d, w, d.column)}), DISTINCT_LIMIT)
    for x in spec.extremes:
        for w in spans_of(x):
            found = [e[x.column] for e in known(x, w, x.column)]
            values[spec.column(x, w)] = (min if x.is_min else max)(found, default=None)
    for i in spec.instants:
        times = [e["ts"] for e in known(i, "total")]
        values[spec.column(i)] = (min if i.is_first else max)(times, default=None)
    for x in spec.latests:
        dated = [(e["ts"], e[x.column]) for e in known(x, x.window or "total", x.column)]
        values[spec.column(x, x.window)] = (min if x.is_first else max)(dated, default=(None, None))[1]
    return values


def probes_of(events: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """Instants at, before and after every change, expiries among them, and some at random; in no order, some twice."""
    enter = np.maximum(events["ts"], events["ts"] + events["late"]).to_numpy()
    edges = [enter] + [events["ts"].to_numpy() // w.hop_us * w.hop_us + w.size_us + w.hop_us for w in WINDOWS.values()]
    keys = np.tile(events["customer_id"].to_numpy(), len(edges))
    at = np.concatenate(edges) + rng.choice([-1, 0, 1, 7 * HOUR], len(keys))
    order = rng.permutation(len(keys))[:300]
    order = np.concatenate([order, order[:5]])
    return pd.DataFrame({"customer_id": keys[order], "event_timestamp": instants(at[order]), "row": np.arange(len(order))})


def run(expression: object) -> pd.DataFrame:
    return expression.to_pandas()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def con(tmp_path_factory):
    import ibis

    return ibis.duckdb.from_connection(engine.connect(tmp_path_factory.mktemp("engine")))


def table(con, frame: pd.DataFrame, name: str):
    import pyarrow as pa

    drawn = pa.Table.from_pandas(frame.drop(columns=["ts", "late"], errors="ignore"), preserve_index=False)
    texts = {"item_id", "order_id", "session_id"}
    fields = [f.with_type(pa.string()) if f.name in texts else f for f in drawn.schema]
    return con.create_table(name, drawn.cast(pa.schema(fields)), overwrite=True, temp=True)


def as_python(value: object) -> object:
    return None if value is None or pd.isna(value) else int(value)  # type: ignore[call-overload]


@settings(max_examples=4, suppress_health_check=list(HealthCheck))
@given(SCHEDULES)
def test_values_at_any_instant_equal_the_definition(con, schedules):
    events = frame_of(schedules)
    probes = probes_of(events, np.random.default_rng(len(events)))
    found = run(windows.values_at(table(con, events, "e"), table(con, probes, "p"), SMALL)).sort_values("row")
    assert len(found) == len(probes)
    by_key = {key: rows.to_dict("records") for key, rows in events.groupby("customer_id")}
    at = found["event_timestamp"].astype("int64") // (1000 if found["event_timestamp"].dt.unit == "ns" else 1)
    for (_, row), instant in zip(found.iterrows(), at, strict=True):
        wanted = reference(by_key[row["customer_id"]], int(instant), SMALL)
        assert {c: as_python(row[c]) for c in SMALL.columns()} == {c: as_python(v) for c, v in wanted.items()}


@settings(max_examples=2, suppress_health_check=list(HealthCheck))
@given(SCHEDULES)
def test_last_change_point_before_an_instant_holds_the_values_at_it(con, schedules):
    events = frame_of(schedules)
    probes = probes_of(events, np.random.default_rng(1))
    direct = run(windows.values_at(table(con, events, "e"), table(con, probes, "p"), SMALL)).sort_values("row", ignore_index=True)
    changes = run(windows.changelog(table(con, events, "e"), SMALL))
    assert not changes.duplicated(["customer_id", "event_timestamp"]).any()
    joined = pd.merge_asof(
        probes.sort_values("event_timestamp"),
        changes.sort_values("event_timestamp").astype(dict.fromkeys(SMALL.columns(), "float64")),
        on="event_timestamp",
        by="customer_id",
        allow_exact_matches=False,
    ).sort_values("row", ignore_index=True)
    joined[SMALL.counts()] = joined[SMALL.counts()].fillna(0)
    pd.testing.assert_frame_equal(joined[SMALL.columns()], direct[SMALL.columns()].astype("float64"))


def test_reference_that_counts_the_instant_itself_is_told_apart(con):
    """Control: the comparison above notices one microsecond, so it would notice a state that is not strictly before."""
    events = frame_of([[(START, 0, "view", "i1", None, 100)]])
    probes = pd.DataFrame({"customer_id": ["c0"], "event_timestamp": instants([START]), "row": [0]})
    found = run(windows.values_at(table(con, events, "e"), table(con, probes, "p"), SMALL)).iloc[0]
    assert (found["events_total"], found["events_1h"], found["items_1h"]) == (0, 0, 0)
    assert reference(events.to_dict("records"), START, SMALL)["events_total"] == 0
    assert reference(events.to_dict("records"), START + 1, SMALL)["events_total"] == 1


@pytest.mark.parametrize("spec", windows.ENTITIES, ids=lambda spec: "-".join(spec.key))
def test_declared_aggregates_equal_the_definition(con, spec):
    rng = np.random.default_rng(3)
    n = 160
    schedule = [
        (START + int(t), int(late), str(kind), f"i{i}", f"o{o}", int(p))
        for t, late, kind, i, o, p in zip(
            rng.integers(0, 12 * DAY, n) // (5 * 60_000_000) * (5 * 60_000_000),
            rng.choice([0, 0, 0, HOUR, 9 * DAY], n),
            rng.choice(["view", "cart_add", "purchase", "return", "search", "exposure"], n),
            rng.integers(0, 3, n),
            rng.integers(0, 9, n),
            rng.integers(100, 999, n),
            strict=True,
        )
    ]
    events = frame_of([schedule[:80], schedule[80:]]).assign(session_id=[f"s{i // 7}" for i in range(n)])
    events["category"] = events["item_id"].map({"i0": "toys", "i1": "books", "i2": "toys"})
    probes = probes_of(events, rng).assign(item_id=lambda p: [f"i{i % 3}" for i in range(len(p))], category="toys")
    probes = probes[[*spec.key, "event_timestamp", "row"]]
    found = run(windows.values_at(table(con, events, "e"), table(con, probes, "p"), spec)).sort_values("row")
    by_key = {key: rows.to_dict("records") for key, rows in events.groupby(list(spec.key))}
    at = pd.DatetimeIndex(found["event_timestamp"]).as_unit("us").asi8
    for (_, row), instant in zip(found.iterrows(), at, strict=True):
        wanted = reference(by_key.get(tuple(row[list(spec.key)]), []), int(instant), spec)
        assert {c: as_python(row[c]) for c in spec.columns()} == {c: as_python(v) for c, v in wanted.items()}


@pytest.mark.parametrize(
    ("spec", "declared"),
    list(
        zip(windows.ENTITIES, (tables.CUSTOMER_ACTIVITY, tables.ITEM_ACTIVITY, tables.CUSTOMER_ITEM, tables.CUSTOMER_CATEGORY), strict=True)
    ),
    ids=["customer", "item", "pair", "category"],
)
def test_aggregates_are_the_declared_columns_of_their_table(spec, declared):
    assert [*spec.key, "event_timestamp", *spec.columns()] == declared.schema.names
    assert all(window in WINDOWS for a in (*spec.sums, *spec.distincts, *spec.extremes) for window in a.windows)
    assert all(a.window in WINDOWS for a in spec.latests if a.window)


def test_window_counts_for_at_least_its_size_and_at_most_a_hop_longer(con):
    """Follows one event through its life: the last instant at which each window still counts it."""
    moment = START + 12 * HOUR + 34 * 60_000_000
    events = frame_of([[(moment, 0, "view", None, None, None)]]).assign(session_id=None)
    changes = run(windows.changelog(table(con, events, "e"), windows.CUSTOMER_ACTIVITY)).sort_values("event_timestamp")
    for name, window in WINDOWS.items():
        left = changes.loc[changes[f"events_{name}"] == 0, "event_timestamp"].iloc[0]
        life = left - pd.Timestamp(moment, unit="us", tz="UTC")
        assert window.size <= life <= window.size + window.hop


def test_absurd_price_does_not_carry_a_sum_beyond_64_bits(con):
    events = frame_of([[(START + i, 0, "purchase", "i1", "o1", 1) for i in range(30)]])
    events["revenue_cents"] = 10**18
    changes = run(windows.changelog(table(con, events, "e"), SMALL))
    assert changes["revenue_cents_total"].max() == 30 * LARGEST


ROW = {
    "region": "north", "events_7d": 3, "events_30d": 4, "events_90d": 8, "revenue_cents_total": 3_000, "orders_total": 3, "views_total": 9,
    "cart_adds_total": 2, "purchases_total": 3, "first_purchase_at": START, "last_purchase_at": START + 8 * DAY,
    "session_started_at": None, "session_last_event_at": None, "item_price_cents": None,
}  # fmt: skip


def test_derive_turns_instants_into_ages_and_counts_into_ratios():
    derived = windows.derive(pd.DataFrame([ROW]), pd.Timestamp(START + 10 * DAY, unit="us", tz="UTC")).iloc[0]
    assert not [name for name in derived.index if name.endswith("_at")]
    assert (derived["last_purchase_age_days"], derived["first_purchase_age_days"], derived["purchase_span_days"]) == (2, 10, 8)
    assert (derived["average_order_cents"], derived["order_gap_days"], derived["recency_to_gap"]) == (1_000, 4, 0.5)
    assert derived["purchase_to_view"] == (3 + 1) / (9 + 20)
    assert np.isnan(derived["session_minutes"])
    assert derived["region"] == "north"


def test_derive_counts_a_missing_row_as_zero_and_its_ages_as_unknown():
    nothing = pd.DataFrame([dict.fromkeys(ROW, None)]).astype({name: float for name in ROW if name != "region"})
    derived = windows.derive(nothing, datetime(2025, 1, 1, tzinfo=UTC)).iloc[0]
    assert derived[["events_7d", "orders_total", "views_total"]].tolist() == [0, 0, 0]
    assert derived["purchase_to_view"] == 1 / 20
    assert derived[["last_purchase_age_days", "average_order_cents", "item_price_cents", "recency_to_gap"]].isna().all()


def test_derive_takes_missing_values_in_any_form():
    """A column that is null throughout arrives as objects; text stays text."""
    bare = {
        "views_30d": np.array([None], dtype=object),
        "last_event_at": np.array([None], dtype=object),
        "region": np.array([None], dtype=object),
    }
    derived = windows.derive_columns(bare, START)
    assert derived["views_30d"].tolist() == [0.0]
    assert np.isnan(derived["last_event_age_days"]).all()
    assert derived["region"].tolist() == [None]
    assert list(windows.derive_columns({"region": np.array(["north"], dtype=object)}, START)) == ["region"]
    assert windows.derive(pd.DataFrame([ROW]).head(0), pd.Series([], dtype="datetime64[us, UTC]")).empty


def test_derive_gives_one_row_what_it_gives_a_thousand():
    """Training derives a frame, serving a row: bit for bit the same, columns in the same order, whatever the input's integer type."""
    rng = np.random.default_rng(5)
    n = 200
    frame = pd.DataFrame({c: rng.integers(0, 50, n).astype(float) for c in (*windows.CUSTOMER_ACTIVITY.counts(), *windows.SESSION_COUNTS)})
    for name in ("first_event_at", "last_event_at", "first_purchase_at", "last_purchase_at", "session_started_at", "session_last_event_at"):
        frame[name] = np.where(rng.random(n) < 0.2, np.nan, START + rng.integers(0, 90 * DAY, n))
    frame = frame.mask(rng.random(frame.shape) < 0.05).assign(region=rng.choice(["north", "south"], n))
    at = instants(START + 100 * DAY + rng.integers(0, DAY, n))
    whole = windows.derive(frame, pd.Series(at))
    assert list(whole.columns) == windows.derived_names(list(frame.columns))
    for i in range(0, n, 7):
        row = {name: np.array([frame[name].iloc[i]]) for name in frame.columns}
        single = windows.derive_columns(row, int(at.asi8[i]))
        assert list(single) == list(whole.columns)
        for name, value in single.items():
            assert value[0] == whole[name].iloc[i] or (pd.isna(value[0]) and pd.isna(whole[name].iloc[i])), name
        given = [[None if pd.isna(values[0]) else values[0] for values in row.values()]]
        plan = windows.serving_plan(tuple(row), ["region"])
        alone, among = (windows.Derived(plan, given * n, int(at.asi8[i]), request={}) for n in (1, 2))
        pd.testing.assert_frame_equal(pd.DataFrame(single), pd.DataFrame({name: alone[name] for name in single}), check_exact=True)
        for name in single:
            assert [*map(str, among[name])] == [str(alone[name][0])] * 2 == [str(derived.value(name, 0)) for derived in (alone, among)]


def test_what_a_request_tells_is_set_against_the_stored_values_and_nothing_else_is_taken():
    stored = pd.DataFrame([{"viewed_cents_30d": 600, "priced_views_30d": 2, "revenue_cents_total": 800, "orders_total": 2}] * 2)
    told = pd.DataFrame({"request_price_cents": [150, None], "request_cart_cents": [1_000, 0]})
    derived = windows.derive(stored, datetime(2025, 1, 1, tzinfo=UTC), request=told)
    assert derived["request_price_to_viewed"].tolist()[0] == 0.5
    assert np.isnan(derived["request_price_to_viewed"][1])
    assert derived["request_cart_to_order"].tolist() == [2.5, 0]
    assert not [name for name in windows.derive(stored, datetime(2025, 1, 1, tzinfo=UTC)) if name.startswith("request")]
    with pytest.raises(ValueError, match=r"aggregates\.py"):
        windows.derive(stored, datetime(2025, 1, 1, tzinfo=UTC), request=stored)


def test_derive_does_not_change_the_frame_it_was_given_and_keeps_its_index():
    frame = pd.DataFrame([ROW, ROW], index=[7, 3])
    before = frame.copy(deep=True)
    derived = windows.derive(frame, datetime(2025, 3, 1) + timedelta(days=1))
    pd.testing.assert_frame_equal(frame, before)
    assert derived.index.tolist() == [7, 3]
    pd.testing.assert_frame_equal(derived, windows.derive(frame, pd.Series([pd.Timestamp("2025-03-02", tz="UTC")] * 2)))


def test_derive_refuses_instants_that_do_not_match_the_rows():
    with pytest.raises(ValueError, match="shapes"):
        windows.derive(pd.DataFrame([ROW, ROW, ROW]), pd.Series(instants([START, START])))


def stored_names() -> list[str]:
    return [name for t in tables.FEATURE_TABLES for name in t.schema.names if name not in (*t.key, "event_timestamp")]


def test_every_ratio_hangs_on_numbers_ages_spans_and_other_ratios_alone():
    names = windows.derived_names([*stored_names(), *windows.REQUEST])
    assert {ratio.name for ratio in windows.RATIOS} | {span.name for span in windows.SPANS} <= set(names)
    known = windows.NUMBERS | {n for n in names if n.endswith("_age_days")} | {span.name for span in windows.SPANS}
    assert {name for r in windows.RATIOS for name in (r.numerator, r.denominator)} <= known | {r.name for r in windows.RATIOS}


def test_no_name_means_two_things():
    names = [*stored_names(), *windows.REQUEST, *(span.name for span in windows.SPANS), *(ratio.name for ratio in windows.RATIOS)]
    assert len(names) == len(set(names))


def test_derive_takes_a_frame_in_which_every_value_is_missing_and_none_tells_its_type():
    """As a population of strangers arrives from the store: objects throughout."""
    nothing = pd.DataFrame([dict.fromkeys([*stored_names(), *windows.REQUEST])] * 2).astype(object)
    derived = windows.derive(nothing, datetime(2025, 1, 1, tzinfo=UTC))
    assert list(derived) == windows.derived_names(list(nothing))
    assert (derived[sorted(windows.COUNTS)] == 0).all(axis=None)
    assert derived["item_price_to_max"].isna().all()


def test_no_count_can_reach_a_model_as_missing():
    best = {spec.column(a, w) for spec in windows.ENTITIES for a in spec.extremes for w in spans_of(a)}
    best |= {spec.column(a, a.window) for spec in windows.ENTITIES for a in spec.latests}
    assert {name for name in stored_names() if not name.endswith("_at")} - windows.COUNTS == best
