"""A DuckDB connection that stays within its memory: what every query over stored tables runs on.

In: how much memory and where to spill. Out: an open in-memory connection, UTC, without network or extensions to fetch.
Never opens a database file and never decides what is queried.
"""

from pathlib import Path

import duckdb


def literal(text: str) -> str:
    """A text as SQL has it."""
    return "'" + text.replace("'", "''") + "'"


def connect(home: Path, *, threads: int = 2, memory_limit: str = "2GB") -> duckdb.DuckDBPyConnection:
    """An in-memory DuckDB that spills below `home` beyond `memory_limit`. Results need an ORDER BY to have an order."""
    connection = duckdb.connect(
        config={
            "threads": threads,
            "memory_limit": memory_limit,
            "temp_directory": str(home / ".spill"),
            "preserve_insertion_order": False,  # else whole results are buffered to keep an order nobody asked for
            "autoinstall_known_extensions": False,  # nothing is fetched from the network in the middle of a query
            "autoload_known_extensions": False,
        }
    )
    connection.execute("SET TimeZone = 'UTC'")  # instants leave as UTC whatever the machine's zone
    return connection
