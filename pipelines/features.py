"""Clean events -> feature tables.

In: the tables `events` and, where there is one, `items`. Out: customer_activity, customer_session and item_activity as change
points. Reads no clock and never changes a clean event. Consent was applied when the events were ingested.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipelines import engine, tables, windows
from pipelines.engine import literal
from pipelines.errors import StoreError
from pipelines.settings import IngestSettings
from pipelines.tables import Table

if TYPE_CHECKING:
    import ibis

SESSION_GAP_MINUTES = IngestSettings().session_gap_minutes
BUCKET_EVENTS = 200_000  # events worked on at a time: about 1.5 GB at the peak
BATCH_ROWS = 500_000


@dataclass(frozen=True)
class FeatureReport:
    """Rows (change points) written to each feature table."""

    customer_activity: int
    customer_session: int
    item_activity: int


def build(home: Path, *, session_gap_minutes: int = SESSION_GAP_MINUTES) -> FeatureReport:
    """Write the three feature tables from the events stored under `home`; each table is replaced at once or not at all.

    Works through ranges of keys, so memory does not grow with the log. Raises StoreError where no events were ingested.
    """
    from pipelines import sessions

    if not tables.exists(home, tables.EVENTS):
        raise StoreError(f"features: the table events was expected under {home / 'tables'}, found nothing; ingest events first")
    with closing(engine.connect(home)) as con:
        events = _open(con, home, tables.EVENTS)
        told = sessions.identified(events, gap_minutes=session_gap_minutes)
        return FeatureReport(
            customer_activity=_write(home, con, told, tables.CUSTOMER_ACTIVITY, lambda e: windows.changelog(e, windows.CUSTOMER_ACTIVITY)),
            customer_session=_write(
                home, con, told, tables.CUSTOMER_SESSION, lambda e: sessions.changelog(e, gap_minutes=session_gap_minutes)
            ),
            item_activity=_write(
                home, con, _with_catalogue(con, home, events), tables.ITEM_ACTIVITY, lambda e: windows.changelog(e, windows.ITEM_ACTIVITY)
            ),
        )


def _with_catalogue(con: Any, home: Path, events: "ibis.Table") -> "ibis.Table":
    """What is told of items: the events, and the catalogue's lines as events of their own (availability and price)."""
    import ibis

    wanted = ["item_id", "type", "event_timestamp", "created_timestamp", "price_cents", "revenue_cents"]
    told = events.select(wanted)
    if not tables.exists(home, tables.ITEMS):
        return told
    lines = _open(con, home, tables.ITEMS).mutate(type=ibis.literal("catalogue"), revenue_cents=ibis.literal(0, "int64"))
    return ibis.union(told, lines.select(wanted))


def _open(con: Any, home: Path, table: Table) -> "ibis.Table":
    return _view(con, table.name, f"SELECT * FROM read_parquet({literal(tables.glob(home, table))}, hive_partitioning = false)")


def _view(con: Any, name: str, query: str) -> "ibis.Table":
    import ibis

    con.execute(f"CREATE OR REPLACE TEMP VIEW {name} AS {query}")
    return ibis.duckdb.from_connection(con).table(name)


def _query(expression: "ibis.Table") -> str:
    import ibis

    return str(ibis.to_sql(expression, dialect="duckdb"))


def _write(home: Path, con: Any, events: "ibis.Table", table: Table, expression: "Callable[[ibis.Table], ibis.Table]") -> int:
    """Write what `expression` makes of the events, range by range of the key, each by key and time: same events, same bytes."""
    key = table.key[0]
    _view(con, "whole", _query(events))
    part = _view(con, "part", f"SELECT * FROM whole WHERE {key} BETWEEN getvariable('first') AND getvariable('last')")
    query = _query(expression(part).order_by(key, "event_timestamp"))  # compiled once: that takes longer than running a small range

    def batches() -> Iterator[pa.RecordBatch]:
        for first, last in _ranges(con, key):
            con.execute("SET VARIABLE first = ?", [first])
            con.execute("SET VARIABLE last = ?", [last])
            yield from con.sql(query).to_arrow_reader(BATCH_ROWS)

    return tables.write(home, table, batches())


def _ranges(con: Any, key: str) -> list[tuple[str, str]]:
    """First and last key of each range of `whole`: about BUCKET_EVENTS events each, more where one key has more."""
    counted = con.sql(f"SELECT {key}, count(*) AS n FROM whole WHERE {key} IS NOT NULL GROUP BY {key} ORDER BY {key}").to_arrow_table()
    bucket = np.cumsum(counted["n"].to_numpy()) // BUCKET_EVENTS
    first = np.flatnonzero(np.diff(bucket, prepend=-1))
    last = np.flatnonzero(np.diff(bucket, append=np.inf))
    return list(zip(counted[key].take(first).to_pylist(), counted[key].take(last).to_pylist(), strict=True))
