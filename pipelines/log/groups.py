"""How far each group of readers has come, who of it reads now, and how often an event was given.

In: positions. Out: which of them a reader may be given. A group has a watermark (everything up to it is done), the done positions
above it, and a lease: the reader that holds it reads alone, until it gives it back or says nothing for the time of a takeover.
Time is that of the machine's uptime, which no wall clock moves. Looks at no event, and begins no transaction: its caller does.
"""

import sqlite3
from collections.abc import Collection
from dataclasses import astuple, dataclass

SCHEMA = """
CREATE TABLE IF NOT EXISTS groups (
    name TEXT PRIMARY KEY, watermark INTEGER NOT NULL, committed INTEGER NOT NULL, parked INTEGER NOT NULL, erased INTEGER NOT NULL,
    owner TEXT, turn INTEGER NOT NULL, renewed_ns INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS done (name TEXT, position INTEGER, PRIMARY KEY (name, position)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS given (at INTEGER PRIMARY KEY, name TEXT NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL);
"""


@dataclass(frozen=True, slots=True)
class Group:
    """A group as stored. Every position up to `watermark` is committed, parked or erased. `turn`: counts the leases."""

    watermark: int
    committed: int
    parked: int
    erased: int
    owner: str | None
    turn: int
    renewed_ns: int

    def is_free(self, owner: str, *, now_ns: int, takeover_ns: int) -> bool:
        """Whether this reader may read: nobody does, or it does, or who did has fallen silent (or the machine was started anew)."""
        return self.owner in (None, owner) or not 0 <= now_ns - self.renewed_ns < takeover_ns


def find(db: sqlite3.Connection, name: str) -> Group | None:
    """The group; None before its first read."""
    row = db.execute("SELECT watermark, committed, parked, erased, owner, turn, renewed_ns FROM groups WHERE name = ?", (name,)).fetchone()
    return Group(*row) if row else None


def unbegun(watermark: int) -> Group:
    """A group before its first read; what the log had forgotten before counts as committed."""
    return Group(watermark, watermark, 0, 0, None, 0, 0)


def begin(db: sqlite3.Connection, name: str, *, watermark: int) -> None:
    """Make the group where it is not there, as `unbegun`."""
    db.execute("INSERT OR IGNORE INTO groups VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (name, *astuple(unbegun(watermark))))


def lease(db: sqlite3.Connection, name: str, owner: str | None, *, now_ns: int) -> int:
    """Give the group to a reader (None: to nobody); returns its turn, which ends when another one begins."""
    db.execute("UPDATE groups SET owner = ?, turn = turn + 1, renewed_ns = ? WHERE name = ?", (owner, now_ns, name))
    found = find(db, name)
    return found.turn if found else 0


def renew(db: sqlite3.Connection, name: str, turn: int, *, now_ns: int) -> bool:
    """Keep the lease; whether it still is this reader's."""
    return db.execute("UPDATE groups SET renewed_ns = ? WHERE name = ? AND turn = ?", (now_ns, name, turn)).rowcount == 1


def done(db: sqlite3.Connection, name: str) -> set[int]:
    """The done positions above the watermark."""
    return {row[0] for row in db.execute("SELECT position FROM done WHERE name = ?", (name,)).fetchall()}


def given(db: sqlite3.Connection, name: str, *, since: int) -> list[tuple[int, int]]:
    """First and last position of every earlier read that reaches above the watermark, and to this position or beyond."""
    return db.execute("SELECT first, last FROM given WHERE name = ? AND last >= ?", (name, since)).fetchall()


def give(db: sqlite3.Connection, name: str, first: int, last: int) -> None:
    """Note down a read, so that the next one knows how often its events were given."""
    db.execute("INSERT INTO given (name, first, last) VALUES (?, ?, ?)", (name, first, last))


def furthest(db: sqlite3.Connection, name: str) -> int:
    """The last position that the group was given."""
    group = find(db, name)
    return max((last for _, last in given(db, name, since=0)), default=group.watermark if group else 0)


def settle(db: sqlite3.Connection, name: str, positions: Collection[int], counter: str) -> set[int]:
    """Count the positions as `committed`, `parked` or `erased`, and move the watermark; returns those that were not done before."""
    group, above = find(db, name), done(db, name)
    fresh = {position for position in positions if group and position > group.watermark} - above
    if not fresh or group is None:
        return set()
    every, watermark = above | fresh, group.watermark
    while watermark + 1 in every:
        watermark += 1
    db.execute(f"UPDATE groups SET watermark = ?, {counter} = {counter} + ? WHERE name = ?", (watermark, len(fresh), name))
    db.executemany("INSERT INTO done VALUES (?, ?)", [(name, position) for position in fresh if position > watermark])
    if watermark > group.watermark:
        db.execute("DELETE FROM done WHERE name = ? AND position <= ?", (name, watermark))
        db.execute("DELETE FROM given WHERE name = ? AND last <= ?", (name, watermark))
    return fresh


def lowest(db: sqlite3.Connection) -> int:
    """Up to where every group is done; 0 while there is no group: what nobody has read is not forgotten."""
    return int(db.execute("SELECT coalesce(min(watermark), 0) FROM groups").fetchone()[0])
