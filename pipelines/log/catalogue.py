"""Which segments there are, the ids of the closed ones, and what became of all events: the file `log.db` beside the segments.

In: a folder. Out: the segment to append to, ids known from before, totals. A segment goes open -> closing (its ids are being
copied to `known`) -> closed (they are there); each step is one transaction that a crash leaves done or undone, and is repeatable.
Locks are taken in one order: this file, then a segment.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import StoreError
from pipelines.log.connection import Connect, reading, translated, writing
from pipelines.log.segments import Segment, add_counts, create, known
from pipelines.private_file import sync

OPEN, CLOSING, CLOSED = "open", "closing", "closed"
_COPIED_AT_ONCE = 2_000  # ids: a few milliseconds, which an append waits for

_SCHEMA = """
CREATE TABLE IF NOT EXISTS segments (
    number INTEGER PRIMARY KEY, first INTEGER NOT NULL, last INTEGER, newest_us INTEGER, closed_us INTEGER,
    state TEXT NOT NULL, copied BLOB NOT NULL DEFAULT x'');
CREATE TABLE IF NOT EXISTS known (digest BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS counts (source TEXT, outcome TEXT, events INTEGER NOT NULL, PRIMARY KEY (source, outcome)) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Place:
    """A segment as the catalogue knows it. `last`, `newest_us`: None while it is open."""

    number: int
    first: int
    last: int | None
    newest_us: int | None
    state: str


class Catalogue:
    """`log.db` through one connection, for one thread at a time."""

    def __init__(self, folder: Path, connect: Connect) -> None:
        self.path = folder / "log.db"
        self._folder, self._connect = folder / "segments", connect
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with translated(self.path):
            self.db = connect(self.path)
        with writing(self.db, self.path) as db:
            for statement in _SCHEMA.split(";\n"):
                db.execute(statement)
            if not db.execute("SELECT 1 FROM segments LIMIT 1").fetchone():
                self._begin(1, first=1)

    def close(self) -> None:
        """Close the file."""
        self.db.close()

    def segment(self, number: int) -> Segment:
        """Open one of the segments. Raises StoreError where its file is not there."""
        if not self._path(number).exists():
            raise StoreError(f"log: {self._path(number)} is missing; put it back from a backup, its events are nowhere else")
        return Segment(self._path(number), self._connect)

    def places(self, *, after: int = 0) -> list[Place]:
        """The segments that hold positions behind this one, oldest first; the last is the open one."""
        with translated(self.path):
            found = self.db.execute(
                "SELECT number, first, last, newest_us, state FROM segments WHERE last IS NULL OR last > ? ORDER BY number", (after,)
            ).fetchall()
        return [Place(*row) for row in found]

    def newest(self) -> int:
        """The number of the segment that events are appended to."""
        with translated(self.path):
            return int(self.db.execute("SELECT max(number) FROM segments").fetchone()[0])

    def known(self, digests: Sequence[bytes]) -> set[bytes]:
        """Which of the ids were taken in by any segment but the newest."""
        with reading(self.db, self.path) as db:
            found = known(db, "known", digests)
            closing = [row[0] for row in db.execute("SELECT number FROM segments WHERE state = ?", (CLOSING,)).fetchall()]
        for number in closing:
            found |= self._ask(number, digests)
        return found

    def roll(self, number: int, *, now_us: int) -> None:
        """Close this segment and begin the next, unless another process was first."""
        with writing(self.db, self.path) as db:
            if self.newest() != number:
                return
            segment = self.segment(number)
            try:
                head = segment.seal_off()
            finally:
                segment.close()
            db.execute(
                "UPDATE segments SET state = ?, last = ?, newest_us = ?, closed_us = ? WHERE number = ?",
                (CLOSING, head.last, min(head.newest_us, now_us), now_us, number),
            )
            self._begin(number + 1, first=head.last + 1)

    def copy_ids(self) -> bool:
        """Copy some ids of a closing segment to where they stay for ever; whether there is more to copy."""
        if not self._closing():
            return False
        with writing(self.db, self.path) as db:
            closing = self._closing()
            if not closing:
                return False
            number, copied = closing
            segment = self.segment(number)
            try:
                digests = segment.ids(copied, _COPIED_AT_ONCE)
                db.executemany("INSERT OR IGNORE INTO known VALUES (?)", [(digest,) for digest in digests])
                if len(digests) == _COPIED_AT_ONCE:
                    db.execute("UPDATE segments SET copied = ? WHERE number = ?", (digests[-1], number))
                else:
                    add_counts(db, segment.counts())
                    db.execute("UPDATE segments SET state = ? WHERE number = ?", (CLOSED, number))
            finally:
                segment.close()
        return True

    def counts(self) -> Counter[tuple[str, str]]:
        """(source, outcome) -> events, since ever."""
        with reading(self.db, self.path) as db:
            rows = db.execute("SELECT source, outcome, events FROM counts").fetchall()
            live = [row[0] for row in db.execute("SELECT number FROM segments WHERE state != ?", (CLOSED,)).fetchall()]
        totals: Counter[tuple[str, str]] = Counter()
        for number in live:
            segment = self.segment(number)
            rows += segment.counts()
            segment.close()
        for source, outcome, events in rows:
            totals[source, outcome] += events
        return totals

    def forget(self, place: Place) -> int:
        """Unlink a closed segment; returns the events that it held."""
        segment = self.segment(place.number)
        head = segment.head()
        segment.close()
        with writing(self.db, self.path) as db:
            if not db.execute("DELETE FROM segments WHERE number = ? AND state = ?", (place.number, CLOSED)).rowcount:
                return 0
        self.sweep()
        return head.last - head.first + 1 - head.removed

    def sweep(self) -> None:
        """Unlink files of segments that are forgotten: a crash may have left some."""
        oldest = self.places()[0].number
        for path in self._folder.glob("*.db*"):
            if path.name.partition(".")[0].isdigit() and int(path.name.partition(".")[0]) < oldest:
                path.unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:08d}.db"

    def _begin(self, number: int, *, first: int) -> None:
        create(self._path(number), self._connect, first=first)
        sync(self._folder)  # else a power cut may take the file's name, and its events with it
        self.db.execute("INSERT INTO segments (number, first, state) VALUES (?, ?, ?)", (number, first, OPEN))

    def _closing(self) -> tuple[int, bytes] | None:
        with translated(self.path):
            row = self.db.execute("SELECT number, copied FROM segments WHERE state = ? ORDER BY number LIMIT 1", (CLOSING,)).fetchone()
        return (row[0], row[1]) if row else None

    def _ask(self, number: int, digests: Sequence[bytes]) -> set[bytes]:
        segment = self.segment(number)
        try:
            return segment.known(digests)
        finally:
            segment.close()
