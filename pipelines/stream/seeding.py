"""What the home's tables hold -> the stream's state, after every change of them: what came by files counts, and what was taken out goes.

In: the versions of the tables events, consents, items and ingests. Out: the state's rows are those of the events table, and what came
by the log since; its lines are the catalogue's. Rows of the log that an ingest has covered are those that it stored. Writes nothing but
the state.

A slice at a time, each a transaction: calls, an erasure and another ingest may come between two of them. What is written of a person is
in the tables at that moment: an erasure takes out there before it does here, so what was read before it is not written after it. The
catalogue and what people said come before the events, so that who is made anew meanwhile loses nothing that may stay.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import duckdb

from pipelines import engine, tables
from pipelines.errors import StoreError
from pipelines.identity.filling import drained_of
from pipelines.log.ranges import Ranges
from pipelines.stream import catalogue, statements
from pipelines.stream.event_files import MOST_ROWS, EventFiles, Replaced
from pipelines.stream.pace import SLICE_S, Pace
from pipelines.stream.state import State

_TABLES = (tables.INGESTS, tables.CONSENTS, tables.EVENTS, tables.ITEMS)  # in this order: what was covered is then in the events
_VERSION = "version"  # name of a note
_RANGES_AT_ONCE = 200
_COVERED = """SELECT rows.rowid, rows.who FROM json_each(?) span CROSS JOIN rows
    WHERE rows.file IS NULL AND rows.position BETWEEN span.value ->> 0 AND span.value ->> 1 LIMIT ?"""


def bring(state: State, home: Path, *, purposes: Sequence[str]) -> Iterator[set[str]]:
    """Bring the state to the tables, a slice for each step; nothing where they have not changed. Customers of whom something changed are
    due at once: a step tells them, and all of them are shown.

    purposes: those for which events are stored. Whose identifiers are has to be known by then, but for the first time: who is known
    later is due then. May be begun anew at any time, and is where a table is replaced meanwhile. Raises StoreError where one cannot be
    read, or the disk refuses: call it again.
    """
    while is_behind(state, home):
        version = version_of(home)
        try:
            yield from _brought(state, home, version, purposes)
        except Replaced:
            yield set()
        except (duckdb.Error, OSError) as error:
            if version_of(home) == version:
                raise StoreError("stream: the tables could not be read; the next look tries again") from error
            yield set()


def is_begun(state: State) -> bool:
    """Whether the state ever followed the tables."""
    return state.note(_VERSION) is not None


def is_behind(state: State, home: Path) -> bool:
    """Whether a table has changed since the state followed them."""
    return state.note(_VERSION) != version_of(home)


def version_of(home: Path) -> str:
    """The versions of the tables that the state follows."""
    return json.dumps([tables.folder(home, table).resolve().name if tables.exists(home, table) else "" for table in _TABLES])


def _brought(state: State, home: Path, version: str, purposes: Sequence[str]) -> Iterator[set[str]]:
    covered = drained_of(home)  # first: see above
    yield set()
    with closing(_connected(home)) as db:
        yield set()
        for _ in catalogue.take(state, home, db):
            yield set()
        yield from statements.take(state, home, db, purposes=purposes, require=lambda: _require(home, version))
        yield from EventFiles(state, home, db, purposes=purposes).take(is_first=not is_begun(state))
    yield from _drop_covered(state, covered)
    with state.transaction():
        _require(home, version)
        state.put_note(_VERSION, version)


def _connected(home: Path) -> duckdb.DuckDBPyConnection:
    """One whose rows come as they lie in the files, few at a time, and as they are asked for."""
    db = engine.connect(home, threads=1, memory_limit="512MB")
    db.execute("SET preserve_insertion_order = true")
    db.execute("SET streaming_buffer_size = '100KB'")
    return db


def _require(home: Path, version: str) -> None:
    """Raises Replaced where the tables are others by now. Inside the transaction that writes what was read of them."""
    if version_of(home) != version:
        raise Replaced


def _drop_covered(state: State, covered: Ranges) -> Iterator[set[str]]:
    """Rows of the log that an ingest has seen and did not keep."""
    pace, spans = Pace(), list(covered)
    for start in range(0, len(spans), _RANGES_AT_ONCE):
        some, is_left = json.dumps(spans[start : start + _RANGES_AT_ONCE]), True
        while is_left:
            begun_s = time.thread_time()
            with state.transaction():
                gone = state.db.execute(_COVERED, (some, pace.fitting(MOST_ROWS, slice_s=SLICE_S / 2))).fetchall()
                touched = state.timetable.mark_owners_of(who for _, who in gone)
                state.db.executemany("DELETE FROM rows WHERE rowid = ?", [(rowid,) for rowid, _ in gone])
            pace.took(len(gone), time.thread_time() - begun_s)
            is_left = bool(gone)
            yield touched
