"""Clean events -> feature tables.

In: the tables `events` and, where there is one, `items`. Out: the tables of features as change points. Reads no clock and never
changes a clean event. Consent was applied when the events were ingested.
"""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipelines import engine, tables, windows
from pipelines.errors import StoreError
from pipelines.settings import IngestSettings
from pipelines.tables import Table

if TYPE_CHECKING:
    import ibis

SESSION_GAP_MINUTES = IngestSettings().session_gap_minutes
BUCKET_EVENTS = 200_000  # events worked on at a time: about 1.5 GB at the peak
BATCH_ROWS = 500_000
_TOLD = (
    "customer_id", "type", "event_timestamp", "created_timestamp", "received_timestamp", "item_id", "order_id", "session_id", "quantity",
    "price_cents", "revenue_cents",
)  # fmt: skip


@dataclass(frozen=True)
class FeatureReport:
    """Rows (change points) written to each feature table."""

    customer_activity: int
    customer_session: int
    item_activity: int
    customer_item: int
    customer_category: int


def build(home: Path, *, session_gap_minutes: int = SESSION_GAP_MINUTES) -> FeatureReport:
    """Write the feature tables from the events stored under `home`; each table is replaced at once or not at all.

    Works through ranges of keys, so memory does not grow with the log; what does not fit is spilled beside the tables.
    Raises StoreError where no events were ingested, or the disk is full.
    """
    from pipelines import sessions

    if not tables.exists(home, tables.EVENTS):
        raise StoreError(f"features: the table events was expected under {home / 'tables'}, found nothing; ingest events first")
    gap = session_gap_minutes
    with closing(engine.connect(home)) as con, _room(home):
        events, items = _open(con, home, tables.EVENTS).select(_TOLD), _open(con, home, tables.ITEMS)
        of_customers: dict[Table, Callable[[ibis.Table], ibis.Table]] = {
            tables.CUSTOMER_ACTIVITY: lambda e: windows.changelog(sessions.identified(e, gap_minutes=gap), windows.CUSTOMER_ACTIVITY),
            tables.CUSTOMER_SESSION: lambda e: sessions.changelog(sessions.identified(e, gap_minutes=gap), gap_minutes=gap),
            tables.CUSTOMER_ITEM: lambda e: windows.changelog(e, windows.CUSTOMER_ITEM),
            tables.CUSTOMER_CATEGORY: lambda e: windows.changelog(of_categories(e, items), windows.CUSTOMER_CATEGORY),
        }
        ranges = _Ranges(con, events, "customer_id")
        rows = {table.name: _write(home, ranges, table, make) for table, make in of_customers.items()}
        ranges.drop()
        ranges = _Ranges(con, of_items(events, items), "item_id")
        rows["item_activity"] = _write(home, ranges, tables.ITEM_ACTIVITY, lambda e: windows.changelog(e, windows.ITEM_ACTIVITY))
        return FeatureReport(**rows)


@contextmanager
def _room(home: Path) -> Iterator[None]:
    """What DuckDB says where it cannot spill, as a StoreError."""
    import duckdb

    try:
        yield
    except (duckdb.IOException, duckdb.OutOfMemoryException) as error:
        raise StoreError(
            f"features: no room to work in under {home} ({error}); the tables are untouched; free space, then run again"
        ) from error


def of_items(events: "ibis.Table", items: "ibis.Table") -> "ibis.Table":
    """What is told of items: the events, and the catalogue's lines as events of their own (availability and price).

    An item's event counts from the moment that we had it: whose it is makes no difference, and when people are merged no item moves.
    """
    import ibis

    wanted = ["item_id", "type", "event_timestamp", "created_timestamp", "price_cents", "revenue_cents"]
    told = events.mutate(created_timestamp=ibis.coalesce(events["received_timestamp"], events["event_timestamp"]))
    lines = items.mutate(type=ibis.literal("catalogue"), revenue_cents=ibis.literal(0, "int64"))
    return ibis.union(told.select(wanted), lines.select(wanted))


def of_categories(events: "ibis.Table", items: "ibis.Table") -> "ibis.Table":
    """The events with the category that their item has in the catalogue now; without those of items that have none."""
    categories = items.filter(items["category"].notnull()).select("item_id", "category")
    return events.join(categories, "item_id").select(*events.columns, "category")


def _open(con: Any, home: Path, table: Table) -> "ibis.Table":
    return _view(con, table.name, tables.rows_sql(home, table))


def _view(con: Any, name: str, query: str) -> "ibis.Table":
    import ibis

    con.execute(f"CREATE OR REPLACE TEMP VIEW {name} AS {query}")
    return ibis.duckdb.from_connection(con).table(name)


def _query(expression: "ibis.Table") -> str:
    import ibis

    return str(ibis.to_sql(expression, dialect="duckdb"))


class _Ranges:
    """Events in ranges of a key, about BUCKET_EVENTS each, more where one key has more. Sorted once: a range is read without the others."""

    def __init__(self, con: Any, events: "ibis.Table", key: str) -> None:
        self.con = con
        _view(con, "whole", _query(events))
        con.execute(
            f"""
            CREATE OR REPLACE TEMP TABLE ranged AS
            SELECT whole.*, number FROM whole JOIN (
                SELECT {key}, CAST(sum(n) OVER (ORDER BY {key}) // {BUCKET_EVENTS} AS INTEGER) AS number
                FROM (SELECT {key}, count(*) AS n FROM whole WHERE {key} IS NOT NULL GROUP BY {key})
            ) USING ({key}) ORDER BY number
            """
        ).fetchall()
        self.part = _view(con, "part", "SELECT * EXCLUDE (number) FROM ranged WHERE number = getvariable('number')")

    def run(self, query: str) -> Iterator[pa.RecordBatch]:
        """What `query` over `part` gives for each range, one after the other."""
        for (number,) in self.con.sql("SELECT DISTINCT number FROM ranged ORDER BY number").fetchall():
            self.con.execute("SET VARIABLE number = ?", [number])
            yield from self.con.sql(query).to_arrow_reader(BATCH_ROWS)

    def drop(self) -> None:
        """Give back the memory."""
        self.con.execute("DROP TABLE ranged")


def _write(home: Path, ranges: _Ranges, table: Table, expression: "Callable[[ibis.Table], ibis.Table]") -> int:
    """Write what `expression` makes of the events, range by range of the key, each by key and time: same events, same bytes."""
    # compiled once: that takes longer than running a small range
    return tables.write(home, table, ranges.run(_query(expression(ranges.part).order_by(*table.key, "event_timestamp"))))
