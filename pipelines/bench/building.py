"""Windowed features from events, beside pandas. In: an empty folder. Out: rows for `rapport bench features`.

Ours builds every feature table. The rival is pandas as one would write it well, with no loop over rows or customers: the customers'
moving sums and totals alone, as change points; so beside it stands what we need for these alone, and both are held against each other.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import engine, tables, windows
from pipelines.bench.measured import measured
from pipelines.bench.row import BenchRow, row
from pipelines.engine import literal
from pipelines.errors import PipelineError

_BATCH = 250_000
_DAYS = 120
SUMS = windows.Aggregates(
    key=windows.CUSTOMER_ACTIVITY.key,
    sums=tuple(s for s in windows.CUSTOMER_ACTIVITY.sums if s.carrying is None and s.value in (None, "revenue_cents")),
)


def build_rows(folder: Path, *, sizes: Sequence[int], rival_events: int) -> list[BenchRow]:
    """Events a second and memory of the whole build at each size; the sums alone beside pandas; how the time grows."""
    homes = {events: folder / f"{events}" for events in {*sizes, rival_events}}
    for events, home in homes.items():
        measured(lambda _, home=home, events=events: tables.write(home, tables.EVENTS, _events(events)))  # type: ignore[misc]
    ours, theirs = measured(lambda _: _sums(homes[rival_events])), measured(lambda _: _by_pandas(homes[rival_events]))
    if ours.value != theirs.value:
        raise PipelineError(f"bench: the sums of customers differ: {ours.value} of ours and {theirs.value} by pandas; one of them is wrong")
    rival = rival_events / theirs.wall_s
    name = f"customers' sums of {_m(rival_events)} events as change points"
    found = [
        row(name, rival_events / ours.wall_s, "events/s", "pandas", rival),
        row(f"{name}: peak memory", ours.peak_mb, "MB", "pandas", theirs.peak_mb),
    ]
    built = {events: measured(lambda _, home=homes[events]: _built(home)) for events in sizes}  # type: ignore[misc]
    for events, side in built.items():
        name = f"all features of {_m(events)} events ({_m(side.value)} change points)"
        found += [
            row(name, events / side.wall_s, "events/s", f"pandas, customers' sums alone, {_m(rival_events)} events", rival),
            row(f"{name}: peak memory", side.peak_mb, "MB", f"the same, {_m(sizes[0])} events", built[sizes[0]].peak_mb),
        ]
    for less, more in pairwise(sizes):
        grown = built[more].wall_s / built[less].wall_s
        found.append(row(f"time of all features, {_m(less)} to {_m(more)} events", grown, "times", "in step with the events", more / less))
    return found


def _m(events: int) -> str:
    return f"{events / 1_000_000:.3g}M" if events >= 1_000_000 else f"{events / 1_000:.3g}k"


def _events(count: int) -> "list[pa.RecordBatch]":
    """What visitors of a shop did in four months, most of them a little, some a lot; one event in ten known later than it happened."""
    batches = []
    for number, start in enumerate(range(0, count, _BATCH)):
        rng, n = np.random.default_rng(number), min(_BATCH, count - start)
        at = 1_700_000_000_000_000 + rng.integers(0, _DAYS * 86_400_000_000, n)
        known = at + np.where(rng.random(n) < 0.1, rng.integers(0, 86_400_000_000, n), 0)
        kind = rng.choice(["view", "cart_add", "purchase", "search"], n, p=[0.8, 0.1, 0.05, 0.05])
        price = rng.integers(100, 10_000, n)
        items = rng.zipf(1.3, n) % 20_000
        # heavy buyers end somewhere: nobody has more than some thousand events
        customers = (rng.pareto(1.2, n) * count / 200).astype(np.int64) % max(count // 20, 2)
        columns = {
            "source": "bench",
            "event_id": [f"e{i}" for i in range(start, start + n)],
            "type": kind,
            "name": kind,
            "customer_id": [f"c{i:x}" for i in customers],
            "item_id": pd.Series([f"i{i}" for i in items]).where(kind != "search"),
            "order_id": pd.Series([f"o{i}" for i in range(start, start + n)]).where(kind == "purchase"),
            "quantity": 1,
            "price_cents": price,
            "revenue_cents": np.where(kind == "purchase", price, 0),
            "is_outlier": False,
        }
        times = {"event_timestamp": at, "created_timestamp": known, "received_timestamp": known}
        frame = pd.DataFrame(columns | {name: pd.to_datetime(us, unit="us", utc=True) for name, us in times.items()})
        frame = frame.sort_values("event_timestamp").reindex(columns=tables.EVENTS.schema.names)  # type: ignore[union-attr]
        batches += pa.Table.from_pandas(frame, tables.EVENTS.schema, preserve_index=False).to_batches()
    return batches


def _built(home: Path) -> int:
    from pipelines import features

    return sum(vars(features.build(home)).values())


def _sums(home: Path) -> list[int]:
    import ibis

    with engine.connect(home) as con:
        con.execute(f"CREATE VIEW events AS {tables.rows_sql(home, tables.EVENTS)}")
        events = ibis.duckdb.from_connection(con).table("events")
        query = ibis.to_sql(windows.changelog(events, SUMS), dialect="duckdb")
        path = home / "sums.parquet"
        con.execute(f"COPY ({query}) TO {literal(str(path))} (FORMAT parquet)")
    return _digest(pq.read_table(path).to_pandas())


def _by_pandas(home: Path) -> list[int]:
    columns = ["customer_id", "event_timestamp", "created_timestamp", "type", "revenue_cents"]
    events = tables.read(home, tables.EVENTS, columns)
    ts, known = (_micros(events[name]) for name in ("event_timestamp", "created_timestamp"))
    enter = np.maximum(ts, known)
    parts = []
    for total in SUMS.sums:
        counted = events["type"].isin(total.types).to_numpy() if total.types else np.ones(len(events), bool)
        added = events[total.value].fillna(0).to_numpy() if total.value else np.ones(len(events), np.int64)
        spans = [*total.windows, *(["total"] if total.has_total else [])]
        for span in spans:
            alive = counted
            if span != "total":
                window = windows.WINDOWS[span]
                leave = ts // window.hop_us * window.hop_us + window.size_us + window.hop_us
                alive = counted & (enter < leave)
            column = SUMS.column(total, span)
            parts.append(pd.DataFrame({"customer_id": events["customer_id"][alive], "at": enter[alive], column: added[alive]}))
            if span != "total":
                parts.append(pd.DataFrame({"customer_id": events["customer_id"][alive], "at": leave[alive], column: -added[alive]}))
    deltas = pd.concat(parts, ignore_index=True).groupby(["customer_id", "at"], sort=True).sum()
    values = deltas.fillna(0).astype(np.int64).groupby(level=0).cumsum().reset_index()
    values["event_timestamp"] = pd.to_datetime(values.pop("at"), unit="us", utc=True)
    values.to_parquet(home / "pandas.parquet", coerce_timestamps="us", allow_truncated_timestamps=True)
    return _digest(pq.read_table(home / "pandas.parquet").to_pandas())


def _micros(instants: "pd.Series[pd.Timestamp]") -> "np.ndarray":
    return instants.dt.tz_localize(None).to_numpy().astype("datetime64[us]").astype(np.int64)


def _digest(found: pd.DataFrame) -> list[int]:
    """Sums of columns, and what hangs on a sample of rows; equal for equal change points."""
    values = found.astype(dict.fromkeys(SUMS.columns(), "int64")).assign(at=_micros(found["event_timestamp"]))
    sample = values[values["customer_id"].str.endswith("7")].sort_values(["customer_id", "event_timestamp"])
    hashed = int(pd.util.hash_pandas_object(sample[["customer_id", "at", *sorted(SUMS.columns())]], index=False).sum() % 2**53)
    return [len(values), hashed, *(int(values[name].sum()) for name in sorted(SUMS.columns()))]
