"""When which customer is to be looked at again: what expires, and what somebody else's rows or a catalogue changed.

In: changes of the table `due` of the state's file, by whatever process. Out: the customers that are due. Who was marked while they were
being looked at stays due. Never looks at rows.
"""

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

# shown_us: up to when what is online is right, but for what changes by itself; mark: how often it had to be made anew otherwise than by
# a call
SCHEMA = """
CREATE TABLE IF NOT EXISTS due (
    customer_id TEXT PRIMARY KEY, at_us INTEGER NOT NULL, shown_us INTEGER NOT NULL, mark INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS due_by_time ON due (at_us);
"""
_AT_A_TIME = 500
_AGAIN = "ON CONFLICT (customer_id) DO UPDATE SET at_us = 0, shown_us = 0, mark = mark + 1"
_OWNERS = f"INSERT INTO due SELECT DISTINCT customer_id, 0, 0, 1 FROM owners WHERE who IN ({{}}) {_AGAIN}"


class Due(NamedTuple):
    """When a customer next changes by itself (0: is to be made anew), up to when it is shown, and how often it was marked. Microseconds."""

    at_us: int
    shown_us: int
    mark: int


UNKNOWN = Due(0, 0, 0)


class Timetable:
    """The customers of one state; written inside its transactions."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db

    def mark(self, customers: Iterable[str]) -> None:
        """These are to be made anew now, and all that is shown of them."""
        self.db.executemany(f"INSERT INTO due VALUES (?, 0, 0, 1) {_AGAIN}", [(customer,) for customer in customers])

    def mark_owners(self, names: str, *values: object) -> None:
        """The same of the customers of the identifiers that this query names."""
        self.db.execute(_OWNERS.format(names), values)

    def mark_owners_of(self, names: Iterable[str]) -> set[str]:
        """The same of the customers of these identifiers; returns them."""
        found = self.db.execute(f"{_OWNERS.format('SELECT value FROM json_each(?)')} RETURNING customer_id", (json.dumps(list(names)),))
        return {customer for (customer,) in found.fetchall()}

    def mark_all(self) -> None:
        """The same of everybody."""
        self.db.execute(f"INSERT INTO due SELECT DISTINCT customer_id, 0, 0, 1 FROM owners WHERE true {_AGAIN}")

    def are_all_marked(self) -> bool:
        """Whether nobody is left who is not to be made anew."""
        return self.db.execute("SELECT 1 FROM due WHERE at_us > 0 LIMIT 1").fetchone() is None

    def put(self, due: Mapping[str, Due | None]) -> None:
        """When each customer next changes by itself; None: never. Who was marked since they were looked at stays due."""
        self._drop(due)
        self.db.executemany(
            """INSERT INTO due VALUES (?, ?, ?, ?)
            ON CONFLICT (customer_id) DO UPDATE SET at_us = excluded.at_us, shown_us = excluded.shown_us WHERE mark = excluded.mark""",
            [(name, *found) for name, found in due.items() if found],
        )

    def move(self, due: Mapping[str, Due | None]) -> None:
        """The same, of those that are there still: who was erased meanwhile stays away."""
        self._drop(due)
        rows = [(found.at_us, found.shown_us, customer, found.mark) for customer, found in due.items() if found]
        self.db.executemany("UPDATE due SET at_us = ?, shown_us = ? WHERE customer_id = ? AND mark = ?", rows)

    def of(self, customers: Sequence[str]) -> dict[str, Due]:
        """What is noted of these; of whom nothing is, they are left out."""
        found: dict[str, Due] = {}
        for start in range(0, len(customers), _AT_A_TIME):
            some = customers[start : start + _AT_A_TIME]
            rows = self.db.execute(f"SELECT * FROM due WHERE customer_id IN ({','.join('?' * len(some))})", some)
            found |= {customer: Due(*row) for customer, *row in rows}
        return found

    def due(self, now_us: int, *, limit: int) -> list[str]:
        """The customers whose state has changed by itself by then, or who are marked, the oldest first."""
        found = self.db.execute("SELECT customer_id FROM due WHERE at_us <= ? ORDER BY at_us LIMIT ?", (now_us, limit))
        return [customer for (customer,) in found]

    def next_us(self) -> int | None:
        """When that is next the case for anybody."""
        found: int | None = self.db.execute("SELECT min(at_us) FROM due").fetchone()[0]
        return found

    def _drop(self, due: Mapping[str, Due | None]) -> None:
        self.db.executemany("DELETE FROM due WHERE customer_id = ?", [(customer,) for customer, found in due.items() if found is None])
