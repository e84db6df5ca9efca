"""Windowed features from events, beside pandas. In: an empty folder. Out: rows for `rapport bench features`.

Ours builds every feature table. The rival is pandas as one would write it well, with no loop over rows or customers: the customers'
moving sums and totals alone, as change points; so beside it stands what we need for these alone, and both are held against each other.
"""

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import engine, tables, windows
from pipelines.bench.measured import measured
from pipelines.bench.row import BenchRow, row
from pipelines.errors import PipelineError
from pipelines.ranges import MEMORY_LIMIT, Ranges, open_table

_BATCH = 250_000
_DAYS = 120
SUMS = windows.Aggregates(
    key=windows.CUSTOMER_ACTIVITY.key,
    sums=tuple(s for s in windows.CUSTOMER_ACTIVITY.sums if s.carrying is None and s.value in (None, "revenue_cents")),
)
_SUMS = tables.Table(
    "bench_sums",
    SUMS.key,
    "event_timestamp",
    None,
    pa.schema([(SUMS.key[0], tables.TEXT), ("event_timestamp", tables.TIME), *((name, tables.WHOLE) for name in SUMS.columns())]),
)
_BY_PANDAS = "pandas.parquet"


def build_rows(folder: Path, *, sizes: Sequence[int], rival_events: int) -> list[BenchRow]:
    """Events a second, CPU and memory of the whole build at each size; the sums alone beside pandas; how the time grows."""
    for module in ("ibis", "pipelines.features"):
        importlib.import_module(module)  # before the sides part, so that neither pays for it
    homes = {events: folder / f"{events}" for events in {*sizes, rival_events}}
    for events, home in homes.items():
        measured(lambda _, home=home, events=events: tables.write(home, tables.EVENTS, _events(events)))  # type: ignore[misc]
    compared = homes[rival_events]
    ours, theirs = measured(lambda _: _sums(compared)), measured(lambda _: _by_pandas(compared))
    mine, other = (
        measured(lambda _: _digest(tables.folder(compared, _SUMS))).value,
        measured(lambda _: _digest(compared / _BY_PANDAS)).value,
    )
    if mine != other:
        raise PipelineError(f"bench: the sums of customers differ: {mine} of ours and {other} by pandas; one of them is wrong")
    rival = rival_events / theirs.wall_s
    name = f"customers' sums of {_m(rival_events)} events as change points"
    found = [
        row(name, rival_events / ours.wall_s, "events/s", "pandas", rival),
        row(f"{name}: CPU", ours.cpu_s, "s", "pandas", theirs.cpu_s),
        row(f"{name}: peak memory", ours.peak_mb, "MB", "pandas", theirs.peak_mb),
    ]
    built = {events: measured(lambda _, home=homes[events]: _built(home)) for events in sizes}  # type: ignore[misc]
    least, first = sizes[0], built[sizes[0]]
    for events, side in built.items():
        name = f"all features of {_m(events)} events ({_m(side.value)} change points)"
        found += [
            row(name, events / side.wall_s, "events/s", f"pandas, customers' sums alone, {_m(rival_events)} events", rival),
            row(f"{name}: CPU", side.cpu_s, "s", f"in step with {_m(least)} events", first.cpu_s * events / least),
            row(f"{name}: peak memory", side.peak_mb, "MB", f"the same, {_m(least)} events", first.peak_mb),
        ]
    for events in sizes[1:]:
        grown = built[events].wall_s / first.wall_s
        found.append(
            row(f"time of all features, {_m(least)} to {_m(events)} events", grown, "times", "in step with the events", events / least)
        )
    return found


def _m(events: int) -> str:
    return f"{events / 1_000_000:.3g}M" if events >= 1_000_000 else f"{events / 1_000:.3g}k"


def _events(count: int) -> Iterator[pa.RecordBatch]:
    """What visitors of a shop did in four months, most of them a little, some a lot; one event in ten known later than it happened."""
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
        yield from pa.Table.from_pandas(frame, tables.EVENTS.schema, preserve_index=False).to_batches()


def _built(home: Path) -> int:
    from pipelines import features

    return sum(vars(features.build(home)).values())


def _sums(home: Path) -> int:
    columns = ["customer_id", "type", "event_timestamp", "created_timestamp", "revenue_cents"]
    with engine.connect(home, memory_limit=MEMORY_LIMIT) as con:
        ranges = Ranges(con, open_table(con, home, tables.EVENTS).select(columns), "customer_id")
        return ranges.write(home, _SUMS, ranges.part, SUMS)


def _by_pandas(home: Path) -> int:
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
    values.to_parquet(home / _BY_PANDAS, coerce_timestamps="us", allow_truncated_timestamps=True)
    return len(values)


def _micros(instants: "pd.Series[pd.Timestamp]") -> "np.ndarray":
    return instants.dt.tz_localize(None).to_numpy().astype("datetime64[us]").astype(np.int64)


def _digest(path: Path) -> list[int]:
    """Sums of columns, and what hangs on a sample of rows; equal for equal change points."""
    found = pq.read_table(path, partitioning=None).to_pandas()
    values = found.astype(dict.fromkeys(SUMS.columns(), "int64")).assign(at=_micros(found["event_timestamp"]))
    sample = values[values["customer_id"].str.endswith("7")].sort_values(["customer_id", "event_timestamp"])
    hashed = int(pd.util.hash_pandas_object(sample[["customer_id", "at", *sorted(SUMS.columns())]], index=False).sum() % 2**53)
    return [len(values), hashed, *(int(values[name].sum()) for name in sorted(SUMS.columns()))]
