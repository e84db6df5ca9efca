"""What the tables say of what people allow -> the state: those of the table consents, and from when on sources speak.

In: the tables. Out: the state's stored statements are those of the table; of whom one is refused, they are due at once. What allows comes
first and what refuses last, each a slice at a time: who is made anew in between loses nothing that all of them together allow. Of people
of whom an erasure takes something out meanwhile nothing is written: see `require`.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import duckdb

from pipelines import consent, tables
from pipelines.engine import literal
from pipelines.stream.differences import Differences, Row
from pipelines.stream.item_rows import NEVER
from pipelines.stream.pace import SLICE_S, Pace
from pipelines.stream.state import State

MOST = 5_000  # of a slice

_EARLIER = "earlier"  # name of a note
_KEY = "who, purpose, said_us, is_stated"
_ALLOWED = 4  # the column


def take(
    state: State, home: Path, db: duckdb.DuckDBPyConnection, *, purposes: Sequence[str], require: Callable[[], None]
) -> Iterator[set[str]]:
    """Take them over, a slice for each step, which tells the customers of whom something is said otherwise.

    require: raises where a table has been replaced since; called in each transaction.
    """
    with state.transaction():
        _take_speakers(state, home, db)
        require()
    yield set()
    differences = Differences(db, _told_sql(home, purposes), held=lambda after, most: _held(state, after, most), width=4)
    for _ in differences.begin():
        yield set()
    pace, refusing = Pace(), list[tuple[list[Row], list[Row]]]()
    while not differences.is_done:
        begun_s = time.thread_time()
        with state.transaction():
            fresh, gone, n = differences.next(pace.fitting(MOST, slice_s=SLICE_S / 2))
            require()
            touched = _change(state, [row for row in fresh if row[_ALLOWED]], [row for row in gone if not row[_ALLOWED]])
        refusing.append(([row for row in fresh if not row[_ALLOWED]], [row for row in gone if row[_ALLOWED]]))
        pace.took(n, time.thread_time() - begun_s)
        yield touched
    for fresh, gone in refusing:  # of as many statements as fitted a slice
        if fresh or gone:
            with state.transaction():
                require()
                touched = _change(state, fresh, gone)
                state.timetable.mark_owners_of({row[0] for row in fresh})
            yield touched


def earlier(state: State) -> dict[str, int]:
    """The sources that spoke earlier than the stream knew, and since when, until `looked_at`. Microseconds."""
    return dict(json.loads(state.note(_EARLIER) or "{}"))


def looked_at(state: State) -> None:
    """What a declared basis does not cover because of these has been taken out."""
    state.put_note(_EARLIER, "{}")


def _take_speakers(state: State, home: Path, db: duckdb.DuckDBPyConnection) -> None:
    """The sources whose people speak for themselves; those that did so earlier than was known are to be looked at."""
    spoken, found = state.spoken(), earlier(state)
    for source, since_us in db.execute(
        f"SELECT source, epoch_us(event_timestamp) FROM ({tables.rows_sql(home, tables.SPEAKING_SOURCES)})"
    ).fetchall():
        if since_us < spoken.get(source, NEVER):
            found[source] = since_us
            state.speak(source, since_us)
    state.put_note(_EARLIER, json.dumps(found))


def _told_sql(home: Path, purposes: Sequence[str]) -> str:
    """As the state holds them. Of two words of one instant the refusal holds."""
    some = ", ".join(literal(purpose) for purpose in purposes)
    return f"""
        SELECT identifier, purpose, epoch_us(event_timestamp) AS said_us, CAST(basis = '{consent.STATED}' AS INTEGER) AS is_stated,
            CAST(bool_and(coalesce(is_allowed, false)) AS INTEGER), 1
        FROM ({tables.rows_sql(home, tables.CONSENTS)}) WHERE list_contains([{some}], purpose) GROUP BY ALL
        ORDER BY identifier, purpose, said_us, is_stated"""


def _held(state: State, after: Row, most: int) -> list[Row]:
    return state.db.execute(
        f"SELECT * FROM said WHERE is_stored AND ({_KEY}) > (?, ?, ?, ?) ORDER BY {_KEY} LIMIT ?", (*after, most)
    ).fetchall()


def _change(state: State, fresh: list[Row], gone: list[Row]) -> set[str]:
    """Hold the fresh ones, and those that are gone no more; returns the customers whose they are."""
    own = " AND ".join(f"{name} = ?" for name in (*_KEY.split(", "), "is_allowed"))  # a call may have said otherwise meanwhile
    state.db.executemany(f"DELETE FROM said WHERE is_stored AND {own}", [row[:5] for row in gone])
    state.db.executemany(
        f"""INSERT INTO said VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT ({_KEY})
        DO UPDATE SET is_allowed = min(is_allowed, excluded.is_allowed), is_stored = 1""",
        fresh,
    )
    owners = state.owners({row[0] for row in (*fresh, *gone)})
    return {owned.customer_id for states in owners.values() for owned in states}
