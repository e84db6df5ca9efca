"""What the home's tables hold -> the stream's state, after every change of them: what came by files counts, and what was taken out goes.

In: the versions of the tables events, consents, items and ingests. Out: the state's rows are those of the events table, and what came
by the log since; its lines are the catalogue's. Works by the files of the table: those that are new are read, rows of those that are
gone go. Rows of the log that an ingest has covered are those that it stored. Writes nothing but the state.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import duckdb

from pipelines import consent, engine, tables
from pipelines.engine import literal
from pipelines.errors import StoreError
from pipelines.ingest.forming import SESSION
from pipelines.ingest.names import identifier_sql
from pipelines.log.ranges import Ranges
from pipelines.stream.state import COLUMNS, INDICES, State

_TABLES = (tables.INGESTS, tables.CONSENTS, tables.EVENTS, tables.ITEMS)  # in this order: what was covered is then in the events
_VERSION, _CATALOGUE = "version", "catalogue"  # names of notes
_BATCH_ROWS = 100_000
_FILES_AT_ONCE = 64
_NAMES = ", ".join(COLUMNS)
_OWN = ("source", "event_id", "known_us", "category", "file", "position")  # columns that make no other row of it
_SAME = " AND ".join(f"new.{name} IS old.{name}" for name in COLUMNS if name not in _OWN)
_LINKED = "ifnull((SELECT min(linked_us) FROM owners WHERE owners.who = new.who), 0)"
_ENTER = f"max({{0}}.event_us, {{0}}.known_us, {_LINKED})"


def bring(state: State, home: Path, *, purposes: Sequence[str]) -> bool:
    """Bring the state to the tables; whether anything was new. Customers of whom something changed are due at once.

    purposes: those for which events are stored. Whose identifiers are has to be known by then. Raises StoreError where a table was
    replaced meanwhile, or the disk refuses: call it again.
    """
    version = version_of(home)
    if state.note(_VERSION) == version:
        return False
    try:
        covered = _covered(home)  # first: see above
        with closing(engine.connect(home, threads=1, memory_limit="512MB")) as db:
            _take_events(state, home, db, purposes)
            with state.transaction():
                _drop_covered(state, covered)
                _take_statements(state, home, db, purposes)
                _take_catalogue(state, home)
                state.categories.look_again()
                state.put_note(_VERSION, version)
    except (duckdb.Error, OSError) as error:
        raise StoreError("stream: the tables could not be read, they are being replaced; the next look tries again") from error
    return True


def version_of(home: Path) -> str:
    """The versions of the tables that the state follows."""
    return json.dumps([tables.folder(home, table).resolve().name if tables.exists(home, table) else "" for table in _TABLES])


def _covered(home: Path) -> Ranges:
    """What of the log an ingest has applied."""
    told = tables.read_arrow(home, tables.INGESTS, ["positions"])["positions"].to_pylist()
    return Ranges.read(text for text in told if text)


def _stamps(home: Path) -> dict[str, Path]:
    """The files of the events table by what tells one from another: a file that is kept is linked, not copied."""
    found = {}
    for path in tables.files(home, tables.EVENTS) if tables.exists(home, tables.EVENTS) else ():
        status = path.stat()
        found[f"{status.st_ino} {status.st_mtime_ns} {status.st_size}"] = path
    return found


def _take_events(state: State, home: Path, db: duckdb.DuckDBPyConnection, purposes: Sequence[str]) -> None:
    there = _stamps(home)
    known = dict(state.db.execute("SELECT stamp, number FROM files").fetchall())
    fresh = [(stamp, path) for stamp, path in there.items() if stamp not in known]
    is_first = state.db.execute("SELECT 1 FROM rows LIMIT 1").fetchone() is None and not known
    if is_first and fresh:
        with state.transaction():
            for name in INDICES:
                state.db.execute(f"DROP INDEX IF EXISTS {name}")
    for start in range(0, len(fresh), _FILES_AT_ONCE):
        some = fresh[start : start + _FILES_AT_ONCE]
        with state.transaction():
            numbers = [state.db.execute("INSERT INTO files (stamp) VALUES (?)", (stamp,)).lastrowid or 0 for stamp, _ in some]
            for rows in _read(db, dict(zip([str(path) for _, path in some], numbers, strict=True)), purposes):
                _insert(state, rows) if is_first else _merge(state, rows)
    if is_first and fresh:
        with state.transaction():
            for statement in INDICES.values():
                state.db.execute(f"CREATE {statement}")
            state.timetable.mark_all()
            state.items.mark_all()
    gone = [number for stamp, number in known.items() if stamp not in there]
    if gone:
        with state.transaction():
            for number in gone:
                state.timetable.mark_owners("SELECT who FROM rows WHERE file = ?", number)
                state.db.execute("DELETE FROM rows WHERE file = ?", (number,))
                state.db.execute("DELETE FROM files WHERE number = ?", (number,))


def _read(db: duckdb.DuckDBPyConnection, numbers: dict[str, int], purposes: Sequence[str]) -> Iterator[list[tuple[Any, ...]]]:
    """The rows of these files, as the state has them."""
    files = ", ".join(literal(path) for path in numbers)
    source = f"read_parquet([{files}], filename = true, union_by_name = true, hive_partitioning = false)"
    names = {row[0] for row in db.execute(f"DESCRIBE SELECT * FROM {source}").fetchall()}
    known = "epoch_us(coalesce(created_timestamp, event_timestamp))"
    received = "epoch_us(coalesce(received_timestamp, event_timestamp))" if "received_timestamp" in names else known
    allows = ", ".join(
        f"CASE WHEN CAST(json_extract(consent, {literal(f'$.{json.dumps(purpose)}')}) AS VARCHAR) = 'true' THEN {literal(purpose)} END"
        for purpose in sorted(purposes)
    )
    number = " ".join(f"WHEN {literal(path)} THEN {n}" for path, n in numbers.items())
    query = f"""
        SELECT source, event_id, coalesce({identifier_sql("user_id")}, 'anonymous_id:' || anonymous_id) AS who, type,
            epoch_us(event_timestamp), {known}, {received}, item_id, order_id,
            CASE WHEN NOT regexp_full_match(session_id, '{SESSION}[0-9a-f]{{16}}') THEN session_id END,
            quantity, price_cents, revenue_cents, concat_ws(',', {allows}), NULL, CASE filename {number} END, NULL
        FROM {source} WHERE who IS NOT NULL"""
    found = db.execute(query)
    while rows := found.fetchmany(_BATCH_ROWS):
        yield rows


def _insert(state: State, rows: list[tuple[Any, ...]]) -> None:
    state.db.executemany(f"INSERT INTO rows ({_NAMES}) VALUES ({', '.join('?' * len(COLUMNS))})", rows)


def _merge(state: State, rows: list[tuple[Any, ...]]) -> None:
    """Take rows over; of those that were there already only what counts otherwise is a change."""
    state.db.execute("CREATE TEMP TABLE IF NOT EXISTS fresh AS SELECT * FROM rows LIMIT 0")
    state.db.execute("DELETE FROM fresh")
    state.db.executemany(f"INSERT INTO fresh ({_NAMES}) VALUES ({', '.join('?' * len(COLUMNS))})", rows)
    state.timetable.mark_owners(
        f"""SELECT new.who FROM fresh new LEFT JOIN rows old USING (source, event_id)
        WHERE old.who IS NULL OR NOT ({_SAME} AND {_ENTER.format("new")} = {_ENTER.format("old")})
        UNION SELECT old.who FROM fresh new JOIN rows old USING (source, event_id) WHERE old.who <> new.who""",
    )
    state.items.mark(
        f"""SELECT new.item_id FROM fresh new LEFT JOIN rows old USING (source, event_id) WHERE old.who IS NULL OR NOT ({_SAME})
        UNION SELECT old.item_id FROM fresh new JOIN rows old USING (source, event_id) WHERE old.item_id IS NOT new.item_id"""
    )
    state.db.execute(f"INSERT OR REPLACE INTO rows ({_NAMES}) SELECT {_NAMES} FROM fresh")
    state.db.execute("DELETE FROM fresh")


def _drop_covered(state: State, covered: Ranges) -> None:
    """Rows of the log that an ingest has seen and did not keep."""
    own = state.db.execute("SELECT rowid, who, position FROM rows WHERE file IS NULL AND position IS NOT NULL").fetchall()
    gone = [(rowid, who) for rowid, who, position in own if position in covered]
    for _, who in gone:
        state.timetable.mark_owners("SELECT ?", who)
    state.db.executemany("DELETE FROM rows WHERE rowid = ?", [(rowid,) for rowid, _ in gone])


def _take_statements(state: State, home: Path, db: duckdb.DuckDBPyConnection, purposes: Sequence[str]) -> None:
    """What people said by files, and what was declared for them."""
    files = [str(path) for path in tables.files(home, tables.CONSENTS)] if tables.exists(home, tables.CONSENTS) else []
    told: list[tuple[Any, ...]] = []
    if files:
        told = db.execute(
            f"""SELECT identifier, purpose, epoch_us(event_timestamp), CAST(basis = '{consent.STATED}' AS INTEGER) AS is_stated,
                CAST(bool_and(coalesce(is_allowed, false)) AS INTEGER), 1
            FROM read_parquet($files) WHERE list_contains($purposes, purpose) GROUP BY ALL""",
            {"files": files, "purposes": list(purposes)},
        ).fetchall()
    for source, since_us in db.execute(
        f"SELECT source, epoch_us(event_timestamp) FROM ({tables.rows_sql(home, tables.SPEAKING_SOURCES)})"
    ).fetchall():
        state.speak(source, since_us)
    held = set(state.db.execute("SELECT * FROM said WHERE is_stored").fetchall())
    fresh, gone = set(told) - held, held - set(told)
    state.db.executemany("DELETE FROM said WHERE who = ? AND purpose = ? AND said_us = ? AND is_stated = ?", [row[:4] for row in gone])
    state.db.executemany(
        """INSERT INTO said VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (who, purpose, said_us, is_stated)
        DO UPDATE SET is_allowed = min(is_allowed, excluded.is_allowed), is_stored = 1""",
        sorted(fresh),
    )
    for who in {row[0] for row in fresh if not row[4]}:
        state.timetable.mark_owners("SELECT ?", who)


def _take_catalogue(state: State, home: Path) -> None:
    """What the table of items says of them, where it says something else than before: the catalogue's lines, and categories."""
    version = tables.folder(home, tables.ITEMS).resolve().name if tables.exists(home, tables.ITEMS) else ""
    if state.note(_CATALOGUE) == version:
        return
    lines: list[tuple[str, int, int, int | None]] = []
    listed: list[tuple[str, str]] = []
    if version:
        with closing(engine.connect(home, threads=1, memory_limit="512MB")) as db:
            lines = db.execute(
                f"""SELECT item_id, epoch_us(event_timestamp), epoch_us(created_timestamp), price_cents
                FROM ({tables.rows_sql(home, tables.ITEMS)}) WHERE item_id IS NOT NULL AND created_timestamp IS NOT NULL"""
            ).fetchall()
            listed = db.execute(
                f"SELECT item_id, category FROM ({tables.rows_sql(home, tables.ITEMS)}) WHERE item_id IS NOT NULL AND category IS NOT NULL"
            ).fetchall()
    state.items.take_lines(lines)
    state.categories.take(listed)
    state.put_note(_CATALOGUE, version)
