"""Stored events in ranges of a key, so that memory does not grow with the log; and what is made of a range, written as a table.

In: an open DuckDB and an Ibis table of events. Out: tables whose rows are by key and time. Knows no feature.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from feature_repo.aggregates import Aggregates
from pipelines import step_functions, tables
from pipelines.tables import Table

if TYPE_CHECKING:
    import ibis

Change = Callable[[pa.Table], pa.Table]

MEMORY_LIMIT = "384MB"  # of DuckDB, which holds the sorted events and spills what is more; the arrays of a range come on top
HELD_BYTES = 16 << 20  # of Parquet: some 300,000 events
BUCKET_EVENTS = 60_000  # some 120 MB of change points of customers; two or three ranges are in memory, worked on and being written


class Ranges:
    """Events in ranges of a key, about BUCKET_EVENTS each, more where one key has more. Sorted once: a range is read without the others."""

    def __init__(self, con: Any, events: "ibis.Table", key: str) -> None:
        self._con = con
        _named(con, "VIEW", "whole", _query(events))
        con.execute(
            f"""
            CREATE OR REPLACE TEMP TABLE ranged AS
            SELECT whole.*, number FROM whole JOIN (
                SELECT {key}, CAST(sum(n) OVER (ORDER BY {key}) // {BUCKET_EVENTS} AS INTEGER) AS number
                FROM (SELECT {key}, count(*) AS n FROM whole WHERE {key} IS NOT NULL GROUP BY {key})
            ) USING ({key}) ORDER BY number
            """
        ).fetchall()
        self.part = _named(con, "VIEW", "part", "SELECT * EXCLUDE (number) FROM ranged WHERE number = getvariable('number')")

    def write(self, home: Path, table: Table, rows: "ibis.Table", aggregates: Aggregates, *, within: Change | None = None) -> int:
        """Replace `table` by the change points of `aggregates` over `rows`; returns how many.

        rows: an expression over `part`; within: what is made of each range of them first. Same events, same bytes.
        """
        columns = step_functions.columns_of(aggregates)

        def made(part: pa.Table) -> pa.Table:
            return step_functions.changelog(part if within is None else within(part), aggregates)

        return self.write_made(home, table, rows.select(columns), made)

    def write_made(self, home: Path, table: Table, rows: "ibis.Table", made: Change) -> int:
        """Replace `table` by what is made of each range of `rows`, by key and time; returns how many."""
        return tables.write(home, table, (made(part) for part in self._run(rows)))

    def drop(self) -> None:
        """Give back the memory."""
        self._con.execute("DROP TABLE ranged")

    def _run(self, rows: "ibis.Table") -> Iterator[pa.Table]:
        """What the expression gives for each range, one after the other."""
        query = _query(rows)  # compiled once: that takes longer than running a small range
        for (number,) in self._con.sql("SELECT DISTINCT number FROM ranged ORDER BY number").fetchall():
            self._con.execute("SET VARIABLE number = ?", [number])
            yield self._con.sql(query).to_arrow_table()


def open_table(con: Any, home: Path, table: Table, columns: Sequence[str] = ()) -> "ibis.Table":
    """The stored rows of a declared table, none where it was never written; these columns, or all.

    Of a small one they are held: it may lie in a file for every day of years, and each time that it is asked opens them all.
    """
    query = f"SELECT {', '.join(columns) or '*'} FROM ({tables.rows_sql(home, table)})"
    stored = tables.files(home, table) if tables.exists(home, table) else []
    is_small = sum(path.stat().st_size for path in stored) < HELD_BYTES
    return _named(con, "TABLE" if is_small else "VIEW", table.name, query)


def _named(con: Any, kind: str, name: str, query: str) -> "ibis.Table":
    import ibis

    con.execute(f"CREATE OR REPLACE TEMP {kind} {name} AS {query}").fetchall()
    return ibis.duckdb.from_connection(con).table(name)


def _query(expression: "ibis.Table") -> str:
    import ibis

    return str(ibis.to_sql(expression, dialect="duckdb"))
