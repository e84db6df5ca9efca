"""Of which category the items are, as `features build` would have it now: the word of the table `items`, else that of the log's rows.

In: what the table says; rows of `rows` that come and go, by whatever process. Out: an item's category; where it becomes another one,
every customer with a row of the item is to be made anew. As in ingest/forming.py: what the table says stays, and of an item of which it
has no category the next ingest takes the word of its earliest event. Holds nothing of a person.
"""

import json
import sqlite3
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pipelines.stream.rows import CleanRow
from pipelines.stream.timetable import Timetable

_LAST = 2**63 - 1  # no row has a higher number
_NOTE = """WHEN {0}.category IS NOT NULL AND {0}.item_id IS NOT NULL
    AND NOT EXISTS (SELECT 1 FROM categories WHERE item_id = {0}.item_id AND {1})
BEGIN INSERT OR IGNORE INTO unsettled VALUES ({0}.item_id); END"""
# listed: by the table; category: what holds. unsettled: items of which a row with a word came or went since that may change it; one more
# that says what holds does not.
SCHEMA = f"""
CREATE TABLE IF NOT EXISTS categories (item_id TEXT PRIMARY KEY, listed TEXT, category TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS unsettled (item_id TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TRIGGER IF NOT EXISTS word_came AFTER INSERT ON rows {_NOTE.format("new", "(listed IS NOT NULL OR category = new.category)")};
CREATE TRIGGER IF NOT EXISTS word_gone AFTER DELETE ON rows {_NOTE.format("old", "listed IS NOT NULL")};
"""
TABLES = ("categories", "unsettled")
INDICES = {"rows_by_word": "INDEX rows_by_word ON rows (item_id, event_us, category) WHERE category IS NOT NULL"}

_TOLD = """(SELECT category FROM rows WHERE rows.item_id = {0}.item_id AND category IS NOT NULL ORDER BY event_us, category LIMIT 1)"""


class Categories:
    """The categories of one state; written inside its transactions."""

    def __init__(self, db: sqlite3.Connection, timetable: Timetable) -> None:
        self.db, self.timetable = db, timetable

    def of(self, items: Sequence[str]) -> dict[str, str]:
        """By item; those that have none are left out."""
        marks = ",".join("?" * len(items))
        query = f"SELECT item_id, category FROM categories WHERE item_id IN ({marks}) AND category IS NOT NULL"
        return dict(self.db.execute(query, items).fetchall())

    @contextmanager
    def hearing(self, rows: Sequence[CleanRow]) -> Iterator[dict[str, str]]:
        """The categories of the items of these rows, which the block keeps; after it as these say, for who then counts them.

        Of whom there are no other rows of an item they need not be made anew: else each new item would cost everybody who sees it first.
        """
        items = [row.item_id for row in rows if row.item_id is not None]
        held = self.of(items) if items else {}
        if all(row.category is None or row.item_id is None or row.category == held.get(row.item_id) for row in rows):
            yield held
            return
        (last,) = self.db.execute("SELECT ifnull(max(rowid), 0) FROM rows").fetchone()
        yield held
        self.settle(last=last)
        held |= self.of(items)

    def settle(self, *, last: int = _LAST) -> None:
        """Take over what the rows up to this number, and those after it that are not counted yet, say of items that the table does not."""
        if self.db.execute("SELECT 1 FROM unsettled LIMIT 1").fetchone() is None:
            return
        told = _TOLD.format("unsettled")
        moved = self.db.execute(
            f"""SELECT item_id, {told} FROM unsettled LEFT JOIN categories USING (item_id)
            WHERE listed IS NULL AND {told} IS NOT categories.category"""
        ).fetchall()
        self.db.execute("DELETE FROM unsettled")
        self.db.executemany(
            "INSERT INTO categories VALUES (?, NULL, ?) ON CONFLICT (item_id) DO UPDATE SET category = excluded.category", moved
        )
        for item, _ in moved:
            self.timetable.mark_owners("SELECT who FROM rows WHERE item_id = ? AND rowid <= ?", item, last)

    def listed_after(self, after: tuple[Any, ...], most: int) -> list[tuple[Any, ...]]:
        """The next items of which the table has a category, and this one."""
        query = "SELECT item_id, listed FROM categories WHERE listed IS NOT NULL AND item_id > ? ORDER BY item_id LIMIT ?"
        return self.db.execute(query, (after[0], most)).fetchall()

    def change(self, fresh: Sequence[tuple[Any, ...]], gone: Sequence[tuple[Any, ...]]) -> None:
        """The table says this: item, category; and that no more."""
        listed = dict(fresh)
        held = self.of(list(listed))
        unlisted = [item for item, _ in gone if item not in listed]
        moved = [item for item, category in listed.items() if category != held.get(item)] + unlisted
        self.db.executemany(
            f"UPDATE categories SET listed = NULL, category = {_TOLD.format('categories')} WHERE item_id = ?",
            [(item,) for item in unlisted],
        )
        self.db.executemany(
            """INSERT INTO categories VALUES (?1, ?2, ?2)
            ON CONFLICT (item_id) DO UPDATE SET listed = excluded.listed, category = excluded.category""",
            fresh,
        )
        if moved and not self.timetable.are_all_marked():
            self.timetable.mark_owners("SELECT who FROM rows WHERE item_id IN (SELECT value FROM json_each(?))", json.dumps(moved))

    def look_again(self, items: Collection[str]) -> None:
        """Rows of these items that had a word were replaced by those of the events table, which have none."""
        self.db.executemany(
            """INSERT OR IGNORE INTO unsettled SELECT ?1
            WHERE NOT EXISTS (SELECT 1 FROM categories WHERE item_id = ?1 AND listed IS NOT NULL)""",
            [(item,) for item in items],
        )
        self.settle()
