"""What a stored table says and what the state holds of it, both in order -> what is new and what is gone, some rows at a time.

In: a query of DuckDB, and how the rows that are held are found after a given one. Out: the differences, range by range of the key, however
many rows are the same. The query runs beside the worker: to sort a table takes as long as it is large. Writes nothing.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import duckdb

Row = tuple[Any, ...]

WAIT_S = 0.005  # for the query, between two looks for calls


class Difference(NamedTuple):
    """Rows of one range of the key. `gone`: that are held and are not told any more; `n`: how many were compared."""

    fresh: list[Row]
    gone: list[Row]
    n: int


class Differences:
    """One comparison. query: its rows are unique and sorted by their first `width` columns, as texts and numbers without nulls.

    held: the first rows after a key, as many as asked for at most, in the same order and the same columns.
    """

    def __init__(self, db: duckdb.DuckDBPyConnection, query: str, *, held: Callable[[Row, int], list[Row]], width: int) -> None:
        self._db, self._query, self._held, self._width = db, query, held, width
        self._told: list[Row] = []  # read, and beyond the range that was compared last
        self._is_read = False
        self._after: Row = ("",) * width
        self.is_done = False

    def begin(self) -> Iterator[None]:
        """Have the query answered: a step every few milliseconds until it is."""
        with ThreadPoolExecutor(1) as beside:
            running = beside.submit(self._db.execute, self._query)
            try:
                while wait([running], timeout=WAIT_S).not_done:
                    yield
            finally:
                if not running.done():  # nobody wants it any more
                    self._db.interrupt()
            running.result()

    def next(self, most: int) -> Difference:
        """Those of the next range, in which neither side has more rows than this; the last one where `is_done` is true afterwards."""
        if not self._is_read and len(self._told) < most:
            lacking = most - len(self._told)
            found = self._db.fetchmany(lacking)
            self._told, self._is_read = self._told + found, len(found) < lacking
        held = self._held(self._after, most)
        ends = [*([] if self._is_read else [self._key(self._told[-1])]), *([self._key(held[-1])] if len(held) == most else [])]
        self.is_done = not ends
        told = self._told
        if ends:
            self._after = min(ends)
            told, held = ([row for row in rows if self._key(row) <= self._after] for rows in (told, held))
        self._told = self._told[len(told) :]
        return Difference(sorted(set(told) - set(held)), sorted(set(held) - set(told)), len(told) + len(held))

    def _key(self, row: Row) -> Row:
        return row[: self._width]
