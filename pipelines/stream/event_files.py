"""The files of the events table -> rows of the state: those of files that are new, instead of those of files that are gone.

In: the files as they lie there; a file that another version of the table keeps is linked, so it is the same one. Out: their rows, the
customers and items of whom one is new or another due at once. A file counts as taken in once all of its rows are: of one that was begun
and not finished the rows go as those of a file that is gone do, after they were read again. Each slice is a transaction that begins by
looking whether its file is in the table still.
"""

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import duckdb

from pipelines import tables
from pipelines.engine import literal
from pipelines.ingest.forming import SESSION
from pipelines.ingest.names import identifier_sql
from pipelines.stream.pace import SLICE_S, Pace
from pipelines.stream.state import COLUMNS, INDICES, State

MOST_ROWS = 5_000  # of a slice

_BATCH_ROWS = 100_000  # where nobody waits
_FILES_AT_ONCE = 64
_NAMES = ", ".join(COLUMNS)
_VALUES = ", ".join("?" * len(COLUMNS))
_WHO, _KNOWN, _ITEM = (COLUMNS.index(name) for name in ("who", "known_us", "item_id"))
_OWN = ("source", "event_id", "known_us", "category", "file", "position")  # columns that make no other row of it
_SAME = " AND ".join(f"new.{name} IS old.{name}" for name in COLUMNS if name not in _OWN)
_LINKED = "ifnull((SELECT min(linked_us) FROM owners WHERE owners.who = new.who), 0)"
_ENTER = f"max({{0}}.event_us, {{0}}.known_us, {_LINKED})"
# of rows that come the ones that are there: which, what they hold, and whether they are the same, and count from the same moment on
_THERE = f"""
    SELECT new.rowid, old.rowid, old.who, old.item_id, old.category IS NOT NULL, {_SAME},
        CASE WHEN new.known_us = old.known_us THEN 1 ELSE {_ENTER.format("new")} = {_ENTER.format("old")} END
    FROM fresh new CROSS JOIN rows old USING (source, event_id)"""

_Rows = list[tuple[Any, ...]]


class Replaced(Exception):
    """A table is another one than that which is being read."""


class EventFiles:
    """The events table of one home, as it is now. purposes: those for which events are stored."""

    def __init__(self, state: State, home: Path, db: duckdb.DuckDBPyConnection, *, purposes: Sequence[str]) -> None:
        self.state, self.home, self.db, self.purposes = state, home, db, purposes
        self._base = tables.folder(home, tables.EVENTS).resolve()
        self._there = {_stamp(path): path for path in (tables.files(home, tables.EVENTS) if self._base.is_dir() else ())}
        self._reading, self._removing = Pace(), Pace()

    def take(self, *, is_first: bool) -> Iterator[set[str]]:
        """Take the files over, a slice for each step, which tells the customers who were marked.

        is_first: none ever were, and no call came yet; then all is one step. Raises Replaced.
        """
        if is_first:
            self._take_all()
            return
        known = dict(self.state.db.execute("SELECT stamp, number FROM files").fetchall())
        for stamp, path in self._there.items():
            if stamp not in known:
                yield from self._take(stamp, path)
        for stamp, number in known.items():
            if stamp not in self._there:
                yield from self._remove(number)

    def _take_all(self) -> None:
        """What is left of one who was killed goes first. Without indices: to make them once costs less than to keep them all the while."""
        state = self.state
        with state.transaction():
            for table in ("rows", "files"):
                state.db.execute(f"DELETE FROM {table}")
            for name in INDICES:
                state.db.execute(f"DROP INDEX IF EXISTS {name}")
        files = list(self._there.items())
        for start in range(0, len(files), _FILES_AT_ONCE):
            some = files[start : start + _FILES_AT_ONCE]
            with state.transaction():
                for stamp, _ in some:
                    self._require(stamp)
                numbers = [state.db.execute("INSERT INTO files (stamp) VALUES (?)", (stamp,)).lastrowid or 0 for stamp, _ in some]
                found = self._read(dict(zip([str(path) for _, path in some], numbers, strict=True)))
                while rows := found.fetchmany(_BATCH_ROWS):
                    state.db.executemany(f"INSERT INTO rows ({_NAMES}) VALUES ({_VALUES})", rows)
        with state.transaction():
            for statement in INDICES.values():
                state.db.execute(f"CREATE {statement}")
            state.timetable.mark_all()
            state.items.mark_all()

    def _take(self, stamp: str, path: Path) -> Iterator[set[str]]:
        with self.state.transaction():
            (number,) = self.state.db.execute("SELECT ifnull(max(number), 0) + 1 FROM files").fetchone()
            self.state.db.execute("INSERT INTO files VALUES (?, ?)", (number, f"begun {number}"))
        found = self._read({str(path): number})
        yield set()
        is_left = True
        while is_left:
            begun_s = time.thread_time()
            rows = found.fetchmany(self._reading.fitting(MOST_ROWS, slice_s=SLICE_S / 2))
            is_left = bool(rows)
            with self.state.transaction():
                self._require(stamp)
                touched = self._merge(rows, number) if rows else set()
                if not is_left:
                    self.state.db.execute("UPDATE files SET stamp = ? WHERE number = ?", (stamp, number))
            self._reading.took(len(rows), time.thread_time() - begun_s)
            yield touched

    def _remove(self, number: int) -> Iterator[set[str]]:
        """The rows that are of this file still."""
        is_left = True
        while is_left:
            begun_s = time.thread_time()
            with self.state.transaction():
                most = self._removing.fitting(MOST_ROWS, slice_s=SLICE_S / 2)
                gone = self.state.db.execute("SELECT rowid, who FROM rows WHERE file = ? LIMIT ?", (number, most)).fetchall()
                touched = self.state.timetable.mark_owners_of(who for _, who in gone)
                self.state.db.executemany("DELETE FROM rows WHERE rowid = ?", [(rowid,) for rowid, _ in gone])
                is_left = bool(gone)
                if not is_left:
                    self.state.db.execute("DELETE FROM files WHERE number = ?", (number,))
            self._removing.took(len(gone), time.thread_time() - begun_s)
            yield touched

    def _require(self, stamp: str) -> None:
        """Raises Replaced where the file is not in the table any more: an erasure may have taken somebody out of both."""
        path = tables.folder(self.home, tables.EVENTS).resolve() / self._there[stamp].relative_to(self._base)
        try:
            if _stamp(path) == stamp:
                return
        except FileNotFoundError:
            pass
        raise Replaced

    def _merge(self, rows: _Rows, number: int) -> set[str]:
        """Take rows over; of those that were there already only what counts otherwise is a change. Returns the customers marked."""
        db = self.state.db
        db.execute("CREATE TEMP TABLE IF NOT EXISTS fresh AS SELECT * FROM rows LIMIT 0")
        db.execute("DELETE FROM fresh")
        db.executemany(f"INSERT INTO fresh ({_NAMES}) VALUES ({_VALUES})", rows)
        there = {place - 1: old for place, *old in db.execute(_THERE)}
        db.execute("DELETE FROM fresh")
        kept, names, items, silenced = [], set[str](), set[str](), set[str]()
        other = []
        for place, row in enumerate(rows):
            old, who, item, has_word, is_same, is_alike = there.get(place, (None, None, None, 0, 0, 0))
            if is_same:
                kept.append((row[_KNOWN], number, old))
            else:
                other.append(row)
                items.update(name for name in (row[_ITEM], item) if name is not None)
            if not (is_same and is_alike):
                names.update(name for name in (row[_WHO], who) if name is not None)
            if has_word and item is not None:
                silenced.add(item)
        db.executemany("UPDATE rows SET known_us = ?, category = NULL, file = ?, position = NULL WHERE rowid = ?", kept)
        db.executemany(f"INSERT OR REPLACE INTO rows ({_NAMES}) VALUES ({_VALUES})", other)
        self.state.items.mark("SELECT value AS item_id FROM json_each(?)", json.dumps(sorted(items)))
        self.state.categories.look_again(silenced)
        return self.state.timetable.mark_owners_of(names)

    def _read(self, numbers: dict[str, int]) -> duckdb.DuckDBPyConnection:
        """The rows of these files, as the state has them, to be fetched in the order in which they lie there."""
        files = ", ".join(literal(path) for path in numbers)
        source = f"read_parquet([{files}], filename = true, union_by_name = true, hive_partitioning = false)"
        names = {row[0] for row in self.db.execute(f"DESCRIBE SELECT * FROM {source}").fetchall()}
        known = "epoch_us(coalesce(created_timestamp, event_timestamp))"
        received = "epoch_us(coalesce(received_timestamp, event_timestamp))" if "received_timestamp" in names else known
        allows = ", ".join(
            f"CASE WHEN CAST(json_extract(consent, {literal(f'$.{json.dumps(purpose)}')}) AS VARCHAR) = 'true' THEN {literal(purpose)} END"
            for purpose in sorted(self.purposes)
        )
        number = " ".join(f"WHEN {literal(path)} THEN {n}" for path, n in numbers.items())
        return self.db.execute(
            f"""
            SELECT source, event_id, coalesce({identifier_sql("user_id")}, 'anonymous_id:' || anonymous_id) AS who, type,
                epoch_us(event_timestamp), {known}, {received}, item_id, order_id,
                CASE WHEN NOT regexp_full_match(session_id, '{SESSION}[0-9a-f]{{16}}') THEN session_id END,
                quantity, price_cents, revenue_cents, concat_ws(',', {allows}), NULL, CASE filename {number} END, NULL
            FROM {source} WHERE who IS NOT NULL"""
        )


def _stamp(path: Path) -> str:
    """What tells one file from another: one that is kept is linked, not copied."""
    status = path.stat()
    return f"{status.st_ino} {status.st_mtime_ns} {status.st_size}"
