"""Clean events -> feature tables.

In: the tables `events` and, where there is one, `items`, both of one moment. Out: the tables of features as change points. Reads no clock
and never changes a clean event. Consent was applied when the events were ingested.
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines import engine, provenance, session_steps, tables, windows
from pipelines.errors import StoreError
from pipelines.ranges import MEMORY_LIMIT, Ranges, open_table
from pipelines.settings import IngestSettings

if TYPE_CHECKING:
    import ibis

SESSION_GAP_MINUTES = IngestSettings().session_gap_minutes
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

    Works through ranges of keys, so memory does not grow with the log; what does not fit is spilled beside the tables. A key is never
    parted: one with millions of events takes some 350 bytes for each of them. An ingest may go on meanwhile: the next build has it.
    Raises StoreError where no events were ingested, or the disk is full.
    """
    if not tables.exists(home, tables.EVENTS):
        raise StoreError(f"features: the table events was expected under {home / 'tables'}, found nothing; ingest events first")
    gap = session_gap_minutes
    with tables.snapshot(home, provenance.SOURCES) as seen, closing(engine.connect(home, memory_limit=MEMORY_LIMIT)) as con, _room(home):
        events, items = open_table(con, seen, tables.EVENTS, _TOLD), open_table(con, seen, tables.ITEMS)
        ranges = Ranges(con, events, "customer_id")
        named = partial(session_steps.identified, gap_minutes=gap)
        activity = ranges.write(home, tables.CUSTOMER_ACTIVITY, ranges.part, windows.CUSTOMER_ACTIVITY, within=named)
        session = ranges.write_made(
            home,
            tables.CUSTOMER_SESSION,
            ranges.part.select(session_steps.COLUMNS),
            lambda part: session_steps.changelog(named(part), gap_minutes=gap),
        )
        pairs = ranges.write(home, tables.CUSTOMER_ITEM, ranges.part, windows.CUSTOMER_ITEM)
        categories = ranges.write(home, tables.CUSTOMER_CATEGORY, of_categories(ranges.part, items), windows.CUSTOMER_CATEGORY)
        ranges.drop()
        ranges = Ranges(con, of_items(events, items), "item_id")
        of_item = ranges.write(home, tables.ITEM_ACTIVITY, ranges.part, windows.ITEM_ACTIVITY)
        provenance.note(home, seen, tables.FEATURE_TABLES)
        return FeatureReport(
            customer_activity=activity, customer_session=session, item_activity=of_item, customer_item=pairs, customer_category=categories
        )


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
    What the table `items` has of an item that no catalogue lists is made of its events, and is no line.
    """
    import ibis

    wanted = ["item_id", "type", "event_timestamp", "created_timestamp", "price_cents", "revenue_cents"]
    told = events.mutate(created_timestamp=ibis.coalesce(events["received_timestamp"], events["event_timestamp"]))
    listed = items.filter(items["created_timestamp"].notnull())
    lines = listed.mutate(type=ibis.literal("catalogue"), revenue_cents=ibis.literal(0, "int64"))
    return ibis.union(told.select(wanted), lines.select(wanted))


def of_categories(events: "ibis.Table", items: "ibis.Table") -> "ibis.Table":
    """The events with the category that their item has in the catalogue now; without those of items that have none."""
    categories = items.filter(items["category"].notnull()).select("item_id", "category")
    return events.join(categories, "item_id").select(*events.columns, "category")
