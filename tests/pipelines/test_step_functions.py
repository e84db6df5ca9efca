"""Change points by arithmetic on arrays against their definition in Ibis: the same rows for any schedule, to the last bit."""

import dataclasses

import ibis
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feature_repo.aggregates import LARGEST, Aggregates, Distinct, Extreme, Instant, Latest, Sum
from pipelines import changepoints, engine, step_functions, tables, windows

MINUTE, HOUR, DAY = 60_000_000, 3_600_000_000, 86_400_000_000
START = 20_089 * DAY  # 2025-01-01, a multiple of every hop
KINDS = ["view", "cart_add", "search", "purchase", "return", "exposure", "consent"]

# On, just before and just after hop edges and window lengths; several at one instant; arrivals in time, late, later than any window.
EVENT = st.tuples(
    st.builds(
        lambda base, step, edge: START + base * step + edge,
        st.integers(0, 5),
        st.sampled_from([MINUTE, 5 * MINUTE, HOUR, DAY, 8 * DAY]),
        st.sampled_from([-1, 0, 0, 1, 123_456_789]),
    ),
    st.sampled_from([None, -30_000_000, 0, 0, 0, 1, 5 * MINUTE, HOUR, 65 * MINUTE, 25 * HOUR, 8 * DAY, 40 * DAY, 120 * DAY]),
    st.sampled_from(KINDS),
    st.sampled_from(["c1", "c2", "c3", "ü", None]),
    st.sampled_from(["i1", "i2", None]),
    st.sampled_from(["o1", "o2", None]),
    st.sampled_from(["s1", "s2", None]),
    st.sampled_from(["toys", "books", None]),
    st.sampled_from([0, 100, 250, -5, 10**18, None]),
)
EVENTS = st.lists(EVENT, max_size=60)
TEXTS = ["type", "customer_id", "item_id", "order_id", "session_id", "category"]
SCHEMA = pa.schema(
    [("event_timestamp", tables.TIME), ("created_timestamp", tables.TIME), *((name, tables.TEXT) for name in TEXTS)]
    + [(name, tables.WHOLE) for name in ("price_cents", "revenue_cents")]
)
# Every kind of aggregate over windows that no sum has: only then are there instants that are no sum's.
LONELY = Aggregates(
    key=("item_id", "customer_id"),
    sums=(Sum("paid", types=("purchase",), value="price_cents", carrying="order_id", windows=("24h",)),),
    distincts=(
        Distinct("orders", "order_id", windows=("1h",)),
        Distinct("sessions", "session_id", types=("view", "search"), has_total=True),
    ),
    extremes=(Extreme("dearest", "price_cents", windows=("7d",)), Extreme("cheapest", "price_cents", is_min=True, has_total=True)),
    instants=(Instant("first", is_first=True), Instant("last", types=("view", "return"))),
    latests=(Latest("seen", "price_cents", window="30d"), Latest("sought", "price_cents", types=("search",), is_first=True, window="1h")),
)
SPECS = {"-".join(spec.key): spec for spec in (*windows.ENTITIES, LONELY)}


@pytest.fixture(scope="module")
def con(tmp_path_factory):
    with engine.connect(tmp_path_factory.mktemp("engine")) as con:
        con.register("e", SCHEMA.empty_table())
        yield con


@pytest.fixture(scope="module")
def defined(con):
    """The definition's rows of some events, by key and time; compiled once."""
    table = ibis.duckdb.from_connection(con).table("e")
    queries = {
        name: ibis.to_sql(changepoints.changelog(table, spec).order_by(*spec.key, "event_timestamp"), dialect="duckdb")
        for name, spec in SPECS.items()
    }

    def rows(name, events):
        con.register("e", events)
        found = con.sql(queries[name]).to_arrow_table()
        kinds = dict.fromkeys(TEXTS, tables.TEXT) | {"event_timestamp": tables.TIME}  # DuckDB's sums are wider than 64 bits
        return found.cast(pa.schema([(name, kinds.get(name, tables.WHOLE)) for name in found.column_names]))

    return rows


def table_of(events):
    columns = list(zip(*events, strict=True)) if events else [[]] * 9
    ts, late, *texts, price = columns
    known = [None if by is None else at + by for at, by in zip(ts, late, strict=True)]
    sign = {"purchase": 1, "return": -1}
    revenue = [sign.get(kind, 0) * (cents or 0) for kind, cents in zip(texts[0], price, strict=True)]
    arrays = [pa.array(c, pa.int64()) for c in (ts, known)] + [pa.array(c, pa.string()) for c in texts] + [price, revenue]
    return pa.table(arrays, names=SCHEMA.names).cast(SCHEMA)


def invented(n, seed, customers=3):
    rng = np.random.default_rng(seed)
    frame = {
        "at": START + rng.integers(0, 100 * DAY, n) // MINUTE * MINUTE,
        "late": rng.choice([0, 0, 0, HOUR, 9 * DAY], n),
        "kind": rng.choice(KINDS, n, p=[0.5, 0.1, 0.1, 0.15, 0.05, 0.05, 0.05]),
        "who": np.char.add("c", rng.integers(0, customers, n).astype(str)),
        "what": np.char.add("i", rng.integers(0, 9, n).astype(str)),
        "order": np.char.add("o", rng.integers(0, n, n).astype(str)),
        "visit": np.char.add("s", rng.integers(0, n // 4, n).astype(str)),
        "shelf": rng.choice(["toys", "books"], n),
        "price": rng.integers(1, 900, n),
    }
    return table_of(list(zip(*(column.tolist() for column in frame.values()), strict=True)))


def changes(found, spec):
    """Rows in which a value differs from that before: some that no value changes at are one's own way of numbering instants."""
    frame = found.to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get)
    values = frame[spec.columns()]
    same = frame[list(spec.key)].eq(frame[list(spec.key)].shift()).all(axis=1)
    same &= (values.eq(values.shift()).fillna(False) | (values.isna() & values.shift().isna())).all(axis=1)
    return frame[~same].reset_index(drop=True)


def differing(found, wanted, spec):
    """Names of the columns in which two tables differ; those of an aggregate whose windows no sum has, where values change."""
    if spec is LONELY:
        found, wanted = changes(found, spec), changes(wanted, spec)
        return [name for name in wanted.columns if not found[name].equals(wanted[name])]
    return [name for name in wanted.column_names if not found[name].combine_chunks().equals(wanted[name].combine_chunks())]


@settings(max_examples=8, suppress_health_check=list(HealthCheck))
@given(EVENTS)
def test_same_rows_as_the_definition_for_any_schedule(defined, events):
    for name, spec in SPECS.items():
        found = step_functions.changelog(table_of(events), spec)
        assert found.column_names == [*spec.key, "event_timestamp", *spec.columns()]
        assert differing(found, defined(name, table_of(events)), spec) == []


@pytest.mark.parametrize("name", list(SPECS))
def test_same_rows_as_the_definition_for_long_histories(defined, name):
    events = invented(2_500, seed=4)
    assert differing(step_functions.changelog(events, SPECS[name]), defined(name, events), SPECS[name]) == []


FAULTS = {
    "_running": lambda real: lambda count, enter, exit_, added: real(count, enter, np.maximum(enter, exit_ - 1), added),
    "_highest": lambda real: lambda count, enter, exit_: real(count, enter, np.maximum(enter, exit_ - 1)),
    "_highest_ever": lambda real: lambda key, enter: real(key * 0, enter),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_fault_in_the_arithmetic_is_told_apart(defined, monkeypatch, fault):
    """Control: a point too short, or what another key had, and the comparison above is red."""
    events = invented(300, seed=5)
    monkeypatch.setattr(step_functions, fault, FAULTS[fault](getattr(step_functions, fault)))
    found = step_functions.changelog(events, windows.CUSTOMER_ACTIVITY)
    assert differing(found, defined("customer_id", events), windows.CUSTOMER_ACTIVITY)


def test_order_of_the_rows_and_keys_beside_one_change_nothing():
    events = invented(900, seed=6, customers=5)
    wanted = step_functions.changelog(events, windows.CUSTOMER_ITEM)
    shuffled = events.take(pa.array(np.random.default_rng(1).permutation(900)))
    assert step_functions.changelog(shuffled, windows.CUSTOMER_ITEM).equals(wanted)
    alone = [
        step_functions.changelog(events.filter(pa.compute.equal(events["customer_id"], f"c{i}")), windows.CUSTOMER_ITEM) for i in range(5)
    ]
    assert pa.concat_tables(alone).combine_chunks().equals(wanted.combine_chunks())


def test_clocks_a_century_apart_in_thousands_of_histories_are_ordered_as_in_few():
    """Key and time together then need more than 64 bits."""
    first, last = (int(pd.Timestamp(day, tz="UTC").value) // 1_000 for day in ("1990-01-01", "2100-01-01"))
    rows = [(at, 0, "view", f"c{i:04}", "i1", None, None, None, i) for i in range(3_000) for at in (first + i, last - i)]
    whole = step_functions.changelog(table_of(rows), windows.CUSTOMER_ACTIVITY)
    halves = [step_functions.changelog(table_of(half), windows.CUSTOMER_ACTIVITY) for half in (rows[:3_000], rows[3_000:])]
    assert 3_000 * (last - first) > 2**63 > 1_500 * (last - first + 120 * DAY)  # so only the whole is beyond
    assert whole.combine_chunks().equals(pa.concat_tables(halves).combine_chunks())


def test_sums_beyond_what_a_float_holds_are_exact_and_absurd_values_held_within_the_limit():
    n = 20_001
    rows = [(START + i, 0, "purchase", "c1", "i1", "o1", "s1", None, cents) for i, cents in enumerate([LARGEST - 1] * (n - 1) + [10**18])]
    found = step_functions.changelog(table_of(rows), windows.CUSTOMER_ACTIVITY)
    total = found["revenue_cents_total"].to_numpy()
    assert total[-1] == (n - 1) * (LARGEST - 1) + LARGEST > 2**53
    assert found["revenue_cents_90d"].to_numpy().max() == total[-1]
    assert found["revenue_cents_90d"].to_numpy()[-1] == 0


@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
def test_no_events_give_no_rows_and_all_columns(spec):
    for kinds in ([], ["exposure"]):
        rows = [(START, 0, kind, "c1", "i1", None, None, "toys", 5) for kind in kinds]
        found = step_functions.changelog(table_of(rows), spec)
        assert (found.num_rows, found.column_names) == (0, [*spec.key, "event_timestamp", *spec.columns()])


def test_count_of_different_values_stops_at_its_limit(monkeypatch):
    monkeypatch.setattr(step_functions, "DISTINCT_LIMIT", 3)
    spec = dataclasses.replace(LONELY, key=("customer_id",))
    rows = [(START + i, 0, "view", "c1", "i1", f"o{i}", None, None, None) for i in range(5)]
    assert step_functions.changelog(table_of(rows), spec)["orders_1h"].to_pylist()[:6] == [1, 2, 3, 3, 3, 0]
