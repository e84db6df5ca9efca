"""What the table of items says of them, where it says something else than before -> the state: the catalogue's lines, and categories.

In: the table. Out: its lines and its categories, a slice of items at a time; items and customers of whom it says something else are due at
once. Holds nothing of a person.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import duckdb

from pipelines import tables
from pipelines.stream.differences import Differences, Row
from pipelines.stream.item_rows import NO_PRICE
from pipelines.stream.pace import SLICE_S, Pace
from pipelines.stream.state import State

MOST = 5_000  # of a slice

_VERSION = "catalogue"  # name of a note


def take(state: State, home: Path, db: duckdb.DuckDBPyConnection) -> Iterator[None]:
    """Take it over, a slice for each step; nothing where it has not changed."""
    version = tables.folder(home, tables.ITEMS).resolve().name if tables.exists(home, tables.ITEMS) else ""
    if state.note(_VERSION) == version:
        return
    rows = tables.rows_sql(home, tables.ITEMS)
    lines = f"""SELECT DISTINCT item_id, epoch_us(event_timestamp) AS event_us, epoch_us(created_timestamp) AS known_us,
            coalesce(price_cents, {NO_PRICE}) AS price_cents
        FROM ({rows}) WHERE item_id IS NOT NULL AND created_timestamp IS NOT NULL ORDER BY ALL"""
    yield from _each(state, Differences(db, lines, held=state.items.lines_after, width=4), state.items.change_lines)
    listed = f"""SELECT item_id, max(category) FROM ({rows}) WHERE item_id IS NOT NULL AND category IS NOT NULL
        GROUP BY item_id ORDER BY item_id"""
    yield from _each(state, Differences(db, listed, held=state.categories.listed_after, width=1), state.categories.change)
    with state.transaction():
        state.put_note(_VERSION, version)


def _each(state: State, differences: Differences, change: Callable[[Sequence[Row], Sequence[Row]], None]) -> Iterator[None]:
    yield from differences.begin()
    pace = Pace()
    while not differences.is_done:
        begun_s = time.thread_time()
        with state.transaction():
            fresh, gone, n = differences.next(pace.fitting(MOST, slice_s=SLICE_S / 2))
            change(fresh, gone)
        pace.took(n, time.thread_time() - begun_s)
        yield
