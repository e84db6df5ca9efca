"""Whole rows of the online store as one connection last wrote or read them, so that what has not changed is not written again.

In: rows as they stand in the file, told inside the connection's transactions. Out: the same, for as long as nobody else has written to
the file; the least used go first. Never reads or writes the file: whoever changes rows tells.
"""

import sqlite3
from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

from pipelines.online.feast_format import Value

MOST = 50_000  # rows: a few thousand customers with their pairs, some 25 MB


class Standing(NamedTuple):
    """A row: its columns, their values, and its time as stored, both forms."""

    names: tuple[str, ...]
    values: tuple[Value | object, ...]
    event_s: int
    known_s: float

    @property
    def time(self) -> tuple[int, float]:
        """By which the newer of two is known."""
        return self.event_s, self.known_s

    def differences(self, other: "Standing") -> list[int]:
        """The places at which a row of the same columns holds something else. A float counts as such: there are two zeros, and NaN."""
        return [
            at
            for at, (mine, theirs) in enumerate(zip(self.values, other.values, strict=True))
            if (mine is not theirs and (mine != theirs or type(mine) is not type(theirs))) or type(theirs) is float
        ]


class StandingRows:
    """Of one writer."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._rows: OrderedDict[tuple[str, bytes], Standing] = OrderedDict()
        self._as_of: tuple[sqlite3.Connection, int] | None = None

    def follow(self, db: sqlite3.Connection) -> None:
        """A transaction begins on this connection: what another one has written since is not what stands here."""
        as_of = (db, int(db.execute("PRAGMA data_version").fetchone()[0]))  # its own commits do not move it
        if self._as_of != as_of:
            self._rows.clear()
            self._as_of = as_of

    def get(self, view: str, key: bytes) -> Standing | None:
        """The row, where it is known."""
        found = self._rows.get((view, key))
        if found is not None:
            self._rows.move_to_end((view, key))
        return found

    def put(self, view: str, key: bytes, row: Standing) -> None:
        """It stands there now, in the transaction that is open."""
        self._rows[view, key] = row
        self._rows.move_to_end((view, key))
        while len(self._rows) > self._most:
            self._rows.popitem(last=False)

    def drop(self, view: str, keys: Iterable[bytes]) -> None:
        """These were written otherwise, or taken out."""
        if self._rows:
            for key in keys:
                self._rows.pop((view, key), None)

    def clear(self) -> None:
        """Many were, or a transaction was rolled back."""
        self._rows.clear()
