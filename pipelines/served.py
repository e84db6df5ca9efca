"""What models were fed while serving: a sample of rows, kept for an audit, in `served/served.db` of the home.

In: rows as they were served. Out: the same rows. Several processes write at once. Rows of erased people are not taken in, and what is
too old or too much goes. Never judges a row, and is never on the way of an answer.
"""

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipelines.private_file import open_private, transaction

Value = str | int | float | bool | None

_SCHEMA = """
CREATE TABLE IF NOT EXISTS served (
    customer_id TEXT NOT NULL, served_us INTEGER NOT NULL, service TEXT NOT NULL, version TEXT NOT NULL, digest BLOB NOT NULL,
    read_us INTEGER NOT NULL, noted_us INTEGER NOT NULL, row TEXT NOT NULL,
    PRIMARY KEY (customer_id, served_us, service, version, digest)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_age ON served (noted_us);
"""
_COLUMNS = "customer_id, service, version, served_us, read_us, row"
_EVER = -(2**63)
SHADOW = "shadow"  # in the place of a service: what a challenger foretold, and what the champion did
_DIGEST = 8  # bytes: one customer, one instant, one version are never asked for so often that two rows meet


class Tombs(Protocol):
    """Knows the erased people (the vault)."""

    def entombed(self, subjects: Sequence[str]) -> frozenset[str]:
        """Which of the subjects are erased."""


@dataclass(frozen=True, slots=True)
class Row:
    """What a service had of a customer. version: the model that was fed, as "churn 3". values: as stored online, ages not yet derived.

    served_us: the instant of the answer; read_us: when the values had been read; both in microseconds since 1970.
    """

    customer_id: str
    service: str
    version: str
    served_us: int
    read_us: int
    values: Mapping[str, Value]


class Served:
    """The sample of one home. For one thread; `close` it at the end."""

    def __init__(self, home: Path, *, vault: Tombs) -> None:
        self.path, self._vault = file_of(home), vault
        self._db = open_private(self.path, _SCHEMA, room="served", is_durable=False)  # a sample: what a loss of power takes is no harm

    def add(self, rows: Sequence[Row], *, now_us: int) -> int:
        """Keep the rows, those of erased people aside; one that is there is not kept twice. Returns how many are new. Raises StoreError."""
        with self._write() as db:
            # inside the transaction: an erasure deletes rows after its tombstones, so either we see these or it sees our rows
            dead = self._vault.entombed(list({row.customer_id for row in rows}))
            told = [(row, json.dumps(dict(row.values), sort_keys=True)) for row in rows if row.customer_id not in dead]
            cells = [
                (row.customer_id, row.served_us, row.service, row.version, _digest(text), row.read_us, now_us, text) for row, text in told
            ]
            return db.executemany("INSERT OR IGNORE INTO served VALUES (?, ?, ?, ?, ?, ?, ?, ?)", cells).rowcount if cells else 0

    def rows(self, *, since_us: int | None = None) -> Iterator[Row]:
        """What models were fed, by customer and instant; only what was noted since."""
        since = _EVER if since_us is None else since_us
        query = f"SELECT {_COLUMNS} FROM served WHERE noted_us >= ? AND service <> ? ORDER BY customer_id, served_us"
        yield from (_row(*cells) for cells in self._db.execute(query, (since, SHADOW)))

    def challenged(self, model: str) -> Iterator[Row]:
        """What challengers of the model foretold, by customer and instant: `probability`, `champion_probability` and `champion`."""
        query = f"SELECT {_COLUMNS} FROM served WHERE service = ? ORDER BY customer_id, served_us"
        found = (_row(*cells) for cells in self._db.execute(query, (SHADOW,)))
        yield from (row for row in found if row.version.rpartition(" ")[0] == model)

    def of(self, customers: Sequence[str]) -> list[Row]:
        """The rows of these customers, by instant."""
        query = f"SELECT {_COLUMNS} FROM served WHERE customer_id = ? ORDER BY served_us"
        return [_row(*cells) for customer in customers for cells in self._db.execute(query, (customer,))]

    def prune(self, *, before_us: int, most: int) -> int:
        """Remove what was noted before, and the oldest beyond so many; returns how many."""
        with self._write() as db:
            gone = db.execute("DELETE FROM served WHERE noted_us < ?", (before_us,)).rowcount
            (held,) = db.execute("SELECT count(*) FROM served").fetchone()
            if held <= most:
                return gone
            key = "customer_id, served_us, service, version, digest"
            oldest = f"SELECT {key} FROM served ORDER BY noted_us LIMIT ?"
            return gone + db.execute(f"DELETE FROM served WHERE ({key}) IN ({oldest})", (held - most,)).rowcount

    def close(self) -> None:
        """Let the file go."""
        self._db.close()

    def _write(self) -> AbstractContextManager[sqlite3.Connection]:
        return transaction(self._db, self.path, room="served")


def file_of(home: Path) -> Path:
    """Where the sample lies; there is none before the first answer."""
    return home / "served" / "served.db"


def _row(customer_id: str, service: str, version: str, served_us: int, read_us: int, text: str) -> Row:
    return Row(customer_id, service, version, served_us, read_us, json.loads(text))


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=_DIGEST).digest()
