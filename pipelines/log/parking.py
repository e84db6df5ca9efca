"""Events and bytes that were set aside with a reason: the table `parked` beside the catalogue.

In: sealed bytes. Out: the same, oldest first, until somebody drops them; and for ever which bytes were brought before (`brought`).
Begins no transaction: its caller does. Opens nothing.
"""

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.log.segments import known as digests_in

SCHEMA = """
CREATE TABLE IF NOT EXISTS parked (
    id INTEGER PRIMARY KEY AUTOINCREMENT, source TEXT NOT NULL, subjects TEXT NOT NULL, received_us INTEGER NOT NULL,
    reason TEXT NOT NULL, tries INTEGER NOT NULL, sealed BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS brought (digest BLOB PRIMARY KEY) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Sealed:
    """One thing set aside, as stored."""

    id: int
    source: str
    subjects: tuple[str, ...]
    received_us: int
    reason: str
    tries: int
    sealed: bytes


def put(db: sqlite3.Connection, rows: Sequence[tuple[str, tuple[str, ...], int, str, int, bytes]]) -> None:
    """Set things aside: source, subjects, received_us, reason, tries, sealed bytes."""
    db.executemany(
        "INSERT INTO parked (source, subjects, received_us, reason, tries, sealed) VALUES (?, ?, ?, ?, ?, ?)",
        [(source, " ".join(subjects), *rest) for source, subjects, *rest in rows],
    )


def known(db: sqlite3.Connection, digests: Sequence[bytes]) -> set[bytes]:
    """Which of these were brought to be set aside before, whatever became of them."""
    return digests_in(db, "brought", digests)


def learn(db: sqlite3.Connection, digests: Sequence[bytes]) -> None:
    """Know them from now on."""
    db.executemany("INSERT OR IGNORE INTO brought VALUES (?)", [(digest,) for digest in digests])


def count(db: sqlite3.Connection) -> int:
    """How many things there are."""
    return int(db.execute("SELECT count(*) FROM parked").fetchone()[0])


def oldest(db: sqlite3.Connection, limit: int) -> list[Sealed]:
    """What was set aside first."""
    rows = db.execute(
        "SELECT id, source, subjects, received_us, reason, tries, sealed FROM parked ORDER BY id LIMIT ?", (limit,)
    ).fetchall()
    return [Sealed(row[0], row[1], tuple(row[2].split()), *row[3:]) for row in rows]


def drop(db: sqlite3.Connection, ids: Sequence[int]) -> int:
    """Take these out; returns how many were there."""
    return sum(db.execute("DELETE FROM parked WHERE id = ?", (one,)).rowcount for one in ids)


def of_people(db: sqlite3.Connection, subjects: Sequence[str]) -> list[int]:
    """The ids of what names any of the subjects."""
    wanted = set(subjects)
    rows = db.execute("SELECT id, subjects FROM parked WHERE subjects != ''").fetchall()
    return [row[0] for row in rows if not wanted.isdisjoint(row[1].split())]
