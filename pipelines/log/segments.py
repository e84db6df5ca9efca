"""One part of the log: a SQLite file with the events of some hours, the ids that they came with, and what became of each.

In: sealed events. Out: rows by position. A file is appended to until it is closed, and forgotten as a whole. Ids, counts and rows
are one transaction of one file, so that no crash can part them. Never opens what is sealed.
"""

import hashlib
import sqlite3
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import StoreError
from pipelines.log.connection import Connect, is_damage, pieced, reading, translated, truncate, writing

DIGEST_BYTES = 16

_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    position INTEGER PRIMARY KEY, source TEXT NOT NULL, subjects TEXT NOT NULL, received_us INTEGER NOT NULL,
    checksum INTEGER NOT NULL, sealed BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS ids (digest BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS people (position INTEGER, person INTEGER, PRIMARY KEY (position, person)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS counts (source TEXT, outcome TEXT, events INTEGER NOT NULL, PRIMARY KEY (source, outcome)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS head (
    one INTEGER PRIMARY KEY CHECK (one = 1), first INTEGER NOT NULL, last INTEGER NOT NULL, removed INTEGER NOT NULL,
    started_us INTEGER NOT NULL, newest_us INTEGER NOT NULL, is_closed INTEGER NOT NULL);
"""


@dataclass(frozen=True, slots=True)
class Head:
    """Where a segment stands. `last` < `first`: it is empty. `removed`: rows taken out by erasure. `newest_us`: of received_us."""

    first: int
    last: int
    removed: int
    started_us: int
    newest_us: int
    is_closed: int


@dataclass(frozen=True, slots=True)
class Row:
    """An event as stored. `sealed`: None once an erasure took it out. `is_damaged`: it is not what was written, or is not there."""

    position: int
    source: str
    subjects: tuple[str, ...]
    received_us: int
    sealed: bytes | None
    is_damaged: bool = False


class Segment:
    """One file of the log through one connection, for one thread at a time."""

    def __init__(self, path: Path, connect: Connect) -> None:
        self.path = path
        with translated(path):
            self.db = connect(path)

    def close(self) -> None:
        """Close the connection."""
        self.db.close()

    def head(self) -> Head:
        """Where it stands now."""
        with translated(self.path):
            row = self.db.execute("SELECT first, last, removed, started_us, newest_us, is_closed FROM head").fetchone()
        return Head(*row)

    def known(self, digests: Sequence[bytes]) -> set[bytes]:
        """Which of the ids were taken in here."""
        with translated(self.path):
            return known(self.db, "ids", digests)

    def add(self, digests: Iterable[bytes], rows: Sequence[tuple], counts: Iterable[tuple[str, str, int]], *, now_us: int) -> None:
        """Inside `writing`: the ids, the rows (source, subjects, received_us, checksum, sealed) after the last one, and the counts."""
        self.db.executemany("INSERT INTO ids VALUES (?)", [(digest,) for digest in sorted(digests)])
        add_counts(self.db, counts)
        if not rows:
            return
        head = self.head()
        numbered = [(at, *row[:3], numbered_checksum(row[3], at), row[4]) for at, row in enumerate(rows, head.last + 1)]
        people = {(row[0], person_key(subject)) for row in numbered for subject in row[2].split()}
        self.db.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?)", numbered)
        self.db.executemany("INSERT INTO people VALUES (?, ?)", sorted(people))
        started = head.started_us if head.last >= head.first else now_us
        newest = max(head.newest_us, max(row[2] for row in rows))
        self.db.execute("UPDATE head SET last = ?, started_us = ?, newest_us = ?", (numbered[-1][0], started, newest))

    def read(self, after: int, limit: int) -> list[Row]:
        """One row for each of the next positions, none left out: what is not there any more comes as damaged."""
        with reading(self.db, self.path):
            last = min(self._last(), after + limit)
            try:
                found = self._rows("position > ? AND position <= ? ORDER BY position", after, last)
            except sqlite3.DatabaseError as error:
                if not is_damage(error):
                    raise
                found = [row for position in range(after + 1, last + 1) for row in self._one(position)]
        if len(found) == last - after:
            return found
        there = {row.position: row for row in found}
        return [there.get(position) or _lost(position) for position in range(after + 1, last + 1)]

    def subjects(self, positions: Sequence[int]) -> dict[int, tuple[str, ...]]:
        """Whom the events at these positions name; without those that an erasure took out."""
        with translated(self.path):
            found = pieced(self.db, "SELECT position, subjects FROM events WHERE position IN ({}) AND sealed != x''", list(positions))
        return {position: tuple(text.split()) for position, text in found}

    def at(self, positions: Sequence[int]) -> list[Row]:
        """The rows at these positions, those that are there."""
        columns = "position, source, subjects, received_us, checksum, sealed"
        with translated(self.path):
            return [_row(*row) for row in pieced(self.db, f"SELECT {columns} FROM events WHERE position IN ({{}})", list(positions))]

    def ids(self, after: bytes, limit: int) -> list[bytes]:
        """Ids in order, behind the given one."""
        with translated(self.path):
            found = self.db.execute("SELECT digest FROM ids WHERE digest > ? ORDER BY digest LIMIT ?", (after, limit)).fetchall()
        return [row[0] for row in found]

    def counts(self) -> list[tuple[str, str, int]]:
        """What became of the events offered while this was the newest segment: source, outcome, events."""
        with translated(self.path):
            return self.db.execute("SELECT source, outcome, events FROM counts").fetchall()

    def seal_off(self) -> Head:
        """Close it: from now on nothing is appended, by anybody."""
        with writing(self.db, self.path):
            self.db.execute("UPDATE head SET is_closed = 1")
        return self.head()

    def remove(self, subjects: Sequence[str]) -> int:
        """Take out what names any of the subjects, and every byte of it; returns the events. Their positions stay, marked as erased."""
        keys = sorted({person_key(subject) for subject in subjects})
        with writing(self.db, self.path):
            positions = [row[0] for row in pieced(self.db, "SELECT DISTINCT position FROM people WHERE person IN ({})", keys)]
            named = pieced(self.db, "SELECT position, subjects FROM events WHERE position IN ({})", positions)
            hit = [(position,) for position, text in named if not set(subjects).isdisjoint(text.split())]
            self.db.executemany("UPDATE events SET subjects = '', received_us = 0, checksum = 0, sealed = x'' WHERE position = ?", hit)
            self.db.executemany("DELETE FROM people WHERE position = ?", hit)
            self.db.execute("UPDATE head SET removed = removed + ?", (len(hit),))
        if hit:
            truncate(self.db, self.path)
        return len(hit)

    def _last(self) -> int:
        """The last position, as both the head and the rows say."""
        head = self.head()
        top = self.db.execute("SELECT max(position) FROM events").fetchone()[0]
        if (head.first - 1 if top is None else top) != head.last:
            raise StoreError(f"log: {self.path} is damaged (its head says {head.last}, its last event is {top}); restore it from a backup")
        return head.last

    def _rows(self, condition: str, *values: int) -> list[Row]:
        columns = "position, source, subjects, received_us, checksum, sealed"
        return [_row(*row) for row in self.db.execute(f"SELECT {columns} FROM events WHERE {condition}", values).fetchall()]

    def _one(self, position: int) -> list[Row]:
        try:
            return self._rows("position = ?", position)
        except sqlite3.DatabaseError as error:
            if not is_damage(error):
                raise
            return [_lost(position)]


def create(path: Path, connect: Connect, *, first: int) -> None:
    """Make an empty segment whose first event gets this position; one that a crash left half made is finished."""
    segment = Segment(path, connect)
    try:
        with writing(segment.db, path):
            for statement in _SCHEMA.split(";\n"):
                segment.db.execute(statement)
            segment.db.execute("INSERT OR IGNORE INTO head VALUES (1, ?, ?, 0, 0, 0, 0)", (first, first - 1))
    finally:
        segment.close()


def digest_of(source: str, message_id: str) -> bytes:
    """By which the log knows an event for ever."""
    return hashlib.blake2b(f"{source}\0{message_id}".encode(errors="surrogatepass"), digest_size=DIGEST_BYTES).digest()


def person_key(subject: str) -> int:
    """A short key of a subject. Two may share one, so whoever finds a row by it compares the subjects."""
    return zlib.crc32(subject.encode())


def checksum_of(source: str, subjects: str, received_us: int, sealed: bytes) -> int:
    """CRC-32 of an event's bytes and envelope."""
    return zlib.crc32(sealed, zlib.crc32(f"{source}\0{subjects}\0{received_us}".encode()))


def numbered_checksum(checksum: int, position: int) -> int:
    """The same once it is known where the event stands: a row that changes places is damaged too."""
    return zlib.crc32(position.to_bytes(8, "big"), checksum)


def known(db: sqlite3.Connection, table: str, digests: Sequence[bytes]) -> set[bytes]:
    """Which of the digests the table holds."""
    return {row[0] for row in pieced(db, f"SELECT digest FROM {table} WHERE digest IN ({{}})", list(digests))}


def add_counts(db: sqlite3.Connection, counts: Iterable[tuple[str, str, int]]) -> None:
    """Add to the counters of (source, outcome)."""
    db.executemany(
        "INSERT INTO counts VALUES (?, ?, ?) ON CONFLICT (source, outcome) DO UPDATE SET events = events + excluded.events", list(counts)
    )


def _row(position: int, source: str, subjects: str, received_us: int, checksum: int, sealed: bytes) -> Row:
    if sealed == b"" and checksum == 0:
        return Row(position, source, (), 0, None)
    try:
        is_damaged = numbered_checksum(checksum_of(source, subjects, received_us, sealed), position) != checksum
    except TypeError:  # a damaged row may hold anything
        return _lost(position)
    if is_damaged and not (isinstance(source, str) and isinstance(subjects, str) and isinstance(received_us, int)):
        return _lost(position)
    return Row(position, source, tuple(subjects.split()), received_us, sealed, is_damaged)


def _lost(position: int) -> Row:
    return Row(position, "", (), 0, b"", is_damaged=True)
