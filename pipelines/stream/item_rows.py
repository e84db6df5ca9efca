"""What the state keeps by item: the catalogue's lines, whose rows of `rows` are whose, and when which item is to be looked at.

In: changes of the tables `rows` and `lines` of the state's file, by whatever process. Out: an item's rows; the items that are due. An
item that lost a row is noted down in the transaction that takes it out, so an erasure counts as soon as it is done. Holds nothing of
a person.
"""

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Line = tuple[Any, ...]  # item, when the catalogue said so, when we knew, price in cents

NEVER = 2**62  # microseconds
NO_PRICE = -(2**62)  # of a line, where lines are compared

_GONE = "INSERT INTO item_due VALUES (old.item_id, 0, 1) ON CONFLICT (item_id) DO UPDATE SET at_us = 0, mark = mark + 1;"
# mark: how often something was taken out of the item's rows, or came otherwise than by the log
SCHEMA = f"""
CREATE TABLE IF NOT EXISTS lines (item_id TEXT NOT NULL, event_us INTEGER NOT NULL, known_us INTEGER NOT NULL, price_cents INTEGER);
CREATE INDEX IF NOT EXISTS lines_by_item ON lines (item_id);
CREATE TABLE IF NOT EXISTS item_due (item_id TEXT PRIMARY KEY, at_us INTEGER NOT NULL, mark INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS item_due_by_time ON item_due (at_us);
CREATE TRIGGER IF NOT EXISTS row_gone AFTER DELETE ON rows WHEN old.item_id IS NOT NULL BEGIN {_GONE} END;
"""
TABLES = ("lines", "item_due")
_AT_A_TIME = 500


class ItemDue(NamedTuple):
    """When an item next changes by itself (microseconds, 0: it is to be made anew), and how often it had to be made anew."""

    at_us: int
    mark: int


class ItemRow(NamedTuple):
    """A row as it counts for its item, from `enter_us` on. `known_us`: when it came; 0 for a catalogue's line, which may announce. UTC."""

    enter_us: int
    known_us: int
    type: str
    event_us: int
    price_cents: int | None
    revenue_cents: int


class ItemRows:
    """The items of one state; written inside its transactions."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db

    def rows(self, item: str) -> Iterator[ItemRow]:
        """An item's rows in order of enter: what people did with it, and the catalogue's lines."""
        found = self.db.execute(
            """SELECT max(event_us, received_us) AS enter_us, received_us, type, event_us, price_cents, revenue_cents
            FROM rows WHERE item_id = ?1
            UNION ALL SELECT max(event_us, known_us), 0, 'catalogue', event_us, price_cents, 0 FROM lines WHERE item_id = ?1
            ORDER BY enter_us, event_us""",
            (item,),
        )
        yield from map(ItemRow._make, found)

    def lines_after(self, after: Line, most: int) -> list[Line]:
        """The catalogue's lines that come after this one in order, with `NO_PRICE` for null."""
        own = f"item_id, event_us, known_us, ifnull(price_cents, {NO_PRICE})"
        query = f"SELECT {own} FROM lines WHERE item_id >= ? AND ({own}) > (?, ?, ?, ?) ORDER BY 1, 2, 3, 4 LIMIT ?"
        return self.db.execute(query, (after[0], *after, most)).fetchall()

    def change_lines(self, fresh: Sequence[Line], gone: Sequence[Line]) -> None:
        """The catalogue says these, and those no more."""
        own = f"item_id = ? AND event_us = ? AND known_us = ? AND ifnull(price_cents, {NO_PRICE}) = ?"
        self.db.executemany(f"DELETE FROM lines WHERE {own}", gone)
        self.db.executemany(f"INSERT INTO lines VALUES (?, ?, ?, nullif(?, {NO_PRICE}))", fresh)
        self.mark("SELECT value AS item_id FROM json_each(?)", json.dumps([line[0] for line in (*fresh, *gone)]))

    def mark(self, names: str, *values: object) -> None:
        """The items that this query names, some of them perhaps null, are to be made anew."""
        self.db.execute(
            f"""INSERT INTO item_due SELECT DISTINCT item_id, 0, 1 FROM ({names}) WHERE item_id IS NOT NULL
            ON CONFLICT (item_id) DO UPDATE SET at_us = 0, mark = mark + 1""",
            values,
        )

    def mark_all(self) -> None:
        """All of them are."""
        self.mark("SELECT item_id FROM rows UNION SELECT item_id FROM lines UNION SELECT item_id FROM item_due")

    def marks(self, items: Sequence[str]) -> dict[str, int]:
        """How often each of these had to be made anew; those that never had are left out."""
        found: dict[str, int] = {}
        for start in range(0, len(items), _AT_A_TIME):
            some = items[start : start + _AT_A_TIME]
            found |= dict(self.db.execute(f"SELECT item_id, mark FROM item_due WHERE item_id IN ({','.join('?' * len(some))})", some))
        return found

    def due(self, now_us: int, *, limit: int) -> dict[str, int]:
        """The items that have changed by themselves by then, or are to be made anew, and how often they had to be; the oldest first."""
        found = self.db.execute("SELECT item_id, mark FROM item_due WHERE at_us <= ? ORDER BY at_us LIMIT ?", (now_us, limit))
        return dict(found.fetchall())

    def next_due_us(self) -> int | None:
        """When that is next the case for any."""
        found: int | None = self.db.execute("SELECT min(at_us) FROM item_due").fetchone()[0]
        return found

    def put_due(self, due: Mapping[str, ItemDue]) -> None:
        """When each of these next changes by itself."""
        rows = [(item, *found) for item, found in due.items()]
        self.db.executemany("INSERT INTO item_due VALUES (?, ?, ?) ON CONFLICT (item_id) DO UPDATE SET at_us = excluded.at_us", rows)

    def move_due(self, due: Mapping[str, ItemDue]) -> None:
        """The same, but for those that lost a row meanwhile: they stay due."""
        rows = [(found.at_us, item, found.mark) for item, found in due.items()]
        self.db.executemany("UPDATE item_due SET at_us = ? WHERE item_id = ? AND mark = ?", rows)
