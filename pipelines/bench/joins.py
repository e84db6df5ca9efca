"""Training sets: Feast's API over our offline store, beside a hand-written ASOF join and Feast's own DuckDB store.

In: an empty folder. Out: rows for `rapport bench features`. All sides give the same frame; that is checked.
"""

import importlib
from pathlib import Path
from typing import Any

import pandas as pd

from pipelines import engine
from pipelines.bench.measured import Measured, measured
from pipelines.bench.row import BenchRow, row
from pipelines.engine import literal
from pipelines.errors import PipelineError

FEATURES = [f"f{n:02}" for n in range(20)]
_HISTORY = 50  # rows of a customer


def join_rows(folder: Path, *, labels: int, rows: int, stock_labels: int, stock_rows: int) -> list[BenchRow]:
    """Wall, CPU and memory for the large sizes; Feast's own store on the small ones, where it ends in time."""
    folder = folder.resolve()  # Feast looks for a relative registry below its repository, which here is the same folder again
    for module in ("feast", "feast.infra.offline_stores.duckdb", "ibis", "pipelines.offline_store"):
        importlib.import_module(module)  # before the sides part, so that none of them pays for it
    large, small = _filled(folder / "large", labels, rows), _filled(folder / "small", stock_labels, stock_rows)
    name = f"training set of {_k(labels)} labels from {_k(rows)} rows x {len(FEATURES)}"
    ours, hand = measured(_through(large, _OURS)), measured(_by_hand(large))
    _check(ours, hand)
    ours_small, stock = measured(_through(small, _OURS)), measured(_through(small, "duckdb"))
    _check(ours_small, stock)
    small_name = f"beside stock Feast, training set of {_k(stock_labels)} labels from {_k(stock_rows)} rows x {len(FEATURES)}"
    return [
        row(f"{name}: wall", ours.wall_s, "s", "hand-written ASOF join", hand.wall_s),
        row(f"{name}: CPU", ours.cpu_s, "s", "hand-written ASOF join", hand.cpu_s),
        row(f"{name}: peak memory", ours.peak_mb, "MB", "hand-written ASOF join", hand.peak_mb),
        row(f"{small_name}: wall", ours_small.wall_s, "s", "Feast's DuckDB store", stock.wall_s),
        row(f"{small_name}: CPU", ours_small.cpu_s, "s", "Feast's DuckDB store", stock.cpu_s),
        row(f"{small_name}: peak memory", ours_small.peak_mb, "MB", "Feast's DuckDB store", stock.peak_mb),
    ]


_OURS = "pipelines.offline_store.AsofOfflineStore"


def _k(n: int) -> str:
    return f"{n / 1_000_000:g}M" if n >= 1_000_000 else f"{n // 1_000}k"


def _filled(folder: Path, labels: int, rows: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    measured(lambda _: _write(folder, labels, rows))
    return folder


def _write(folder: Path, labels: int, rows: int) -> None:
    """Change points of customers at random instants of half a year, and labels at others; no two of a customer at one instant."""
    customers, span = max(rows // _HISTORY, 1), 180 * 86_400_000_000
    step = span // _HISTORY
    numbers = ", ".join(f"CAST(hash(i, {n}) % 100000 AS BIGINT) AS {name}" for n, name in enumerate(FEATURES))
    # one row in each of a customer's slices of the time, so that the instants of a customer differ
    at = f"make_timestamptz(1700000000000000 + CAST((i // {customers}) * {step} + hash(i, 's') % {step} AS BIGINT))"
    with engine.connect(folder) as con:
        con.execute(f"""COPY (SELECT 'c' || (i % {customers}) AS customer_id, {at} AS event_timestamp, {numbers} FROM range({rows}) t(i))
            TO {literal(str(folder / "rows.parquet"))} (FORMAT parquet)""")
        con.execute(f"""COPY (SELECT 'c' || CAST(hash(i, 'k') % {customers} AS BIGINT) AS customer_id,
                make_timestamptz(1700000000000000 + CAST(hash(i, 't') % {span} AS BIGINT)) AS event_timestamp FROM range({labels}) t(i))
            TO {literal(str(folder / "labels.parquet"))} (FORMAT parquet)""")


def _through(folder: Path, kind: str) -> Any:
    """Feast's API over an offline store."""

    def work(_: None) -> int:
        from datetime import timedelta

        from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
        from feast.types import Int64, String

        config = RepoConfig(
            project="bench",
            provider="local",
            registry=str(folder / f"{kind[-8:]}.db"),
            online_store={"type": "sqlite", "path": str(folder / "online.db")},
            offline_store={"type": kind},
            entity_key_serialization_version=3,
            repo_path=folder,
        )
        store = FeatureStore(repo_path=str(folder), config=config)
        customer = Entity(name="customer", join_keys=["customer_id"], value_type=ValueType.STRING)
        source = FileSource(name="rows", path=str(folder / "rows.parquet"), timestamp_field="event_timestamp")
        fields = [Field(name="customer_id", dtype=String), *(Field(name=name, dtype=Int64) for name in FEATURES)]
        store.apply([customer, FeatureView(name="v", entities=[customer], ttl=timedelta(0), schema=fields, source=source)])
        labels = pd.read_parquet(folder / "labels.parquet")
        return _sum(store.get_historical_features(labels, [f"v:{name}" for name in FEATURES]).to_df())

    return work


def _by_hand(folder: Path) -> Any:
    def work(_: None) -> int:
        labels = pd.read_parquet(folder / "labels.parquet")
        with engine.connect(folder) as con:
            con.register("labels", labels.assign(row=range(len(labels))))
            picked = ", ".join(f"f.{name}" for name in FEATURES)
            found = con.sql(f"""SELECT l.customer_id, l.event_timestamp, {picked} FROM labels l ASOF LEFT JOIN
                read_parquet({literal(str(folder / "rows.parquet"))}) f
                ON l.customer_id = f.customer_id AND l.event_timestamp > f.event_timestamp ORDER BY l.row""").df()
        return _sum(found)

    return work


def _sum(found: pd.DataFrame) -> int:
    """Something that hangs on every value."""
    return int(sum((n + 1) * int(found[name].fillna(0).sum()) for n, name in enumerate(FEATURES))) + len(found)


def _check(one: Measured, other: Measured) -> None:
    if one.value != other.value:
        raise PipelineError(f"bench: two sides gave different training sets ({one.value} and {other.value}); one of them is wrong")
