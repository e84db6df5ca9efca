"""Rows -> Feast's SQLite online store, written directly, in Feast's own key and value encoding. Newer wins.

In: rows of a feature view, with when they happened and when we knew. Out: what `get_online_features` would find had Feast written
them, except that an older row never replaces a newer one: the comparison is part of the statement, so writers may race.
Feast keeps `event_ts` in whole seconds and never reads `created_ts`, which here holds the fraction that decides within a second.
Feast itself is not imported. Never creates a table: `feature_store.apply` does.

    with OnlineWriter(home).transaction() as online:      # all of it is seen, or nothing
        online.write("customer_consent", [Row(customer_id, {"is_personalization_allowed": False}, event_us=now)])
"""

import math
import sqlite3
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import StoreError

if TYPE_CHECKING:
    import pyarrow as pa

PROJECT = "rapport"  # of feature_repo/feature_store.yaml
IDENTIFIER_VIEW = "identifier_customer"
CONSENT_VIEW = "customer_consent"
FORMER = "customer_id"  # the kind of an identifier that was a customer's id before it was merged into another

Value = str | int | float | bool | None

_TEXT = 2  # feast's ValueType.STRING
_BUSY_S = 30.0  # a batch load holds the file for some tenths of a second at a time
_AT_A_TIME = 500
_OURS = (len(PROJECT) + 2, f"{PROJECT}_*")
_EPOCH = datetime(1970, 1, 1)
_MEND = "run `rapport features apply`, or free space on its disk"


@dataclass(frozen=True, slots=True)
class Row:
    """One key's values. Times in microseconds since 1970, UTC; `created_us` None: known when it happened."""

    key: str
    values: Mapping[str, Value]
    event_us: int
    created_us: int | None = None


class OnlineWriter:
    """A connection to the online store of one home; one thread. Follows the file when it is replaced."""

    def __init__(self, home: Path, *, schema: str = "") -> None:
        """`schema`: statements that create what the caller keeps beside Feast's tables, in the same transactions."""
        self.path = home / "feature_store" / "online.db"
        self._schema = schema
        self._db: sqlite3.Connection | None = None
        self._inode: tuple[int, int] | None = None

    @contextmanager
    def transaction(self) -> Iterator["OnlineWriter"]:
        """Everything written inside is durable and visible at its end, or not at all. Raises StoreError where the store refuses."""
        db = self._connection()
        try:
            db.execute("BEGIN IMMEDIATE")
            yield self
            db.execute("COMMIT")
        except sqlite3.Error as error:
            self._roll_back(db)
            raise StoreError(
                f"online store: {self.path} could not be written ({error}); run `rapport features apply`, free space"
            ) from error
        except BaseException:
            self._roll_back(db)
            raise

    @property
    def db(self) -> sqlite3.Connection:
        """The connection, for what the caller keeps in the same file."""
        return self._connection() if self._db is None else self._db

    def write(self, view: str, rows: Iterable[Row], *, join_key: str = "customer_id") -> int:
        """Write the rows, each value unless a newer one is there; returns the values written. Equal times: the later call wins."""
        encode = key_encoder(join_key)
        cells = [
            (encode(row.key), name, encode_value(value), _text(value), *_stamps(row.event_us, row.created_us))
            for row in rows
            for name, value in row.values.items()
        ]
        return self.db.executemany(_upsert(view), cells).rowcount if cells else 0

    def load(self, view: str, batch: "pa.RecordBatch | pa.Table", *, join_key: str, is_guarded: bool) -> int:
        """Write a batch: join key, features, event_us and created_us (null: none). Not guarded: whatever is there is replaced.

        Column by column: each distinct value is encoded once. Returns the values written.
        """
        import pyarrow.compute as pc

        keys = _mapped(batch[join_key], key_encoder(join_key))
        events = _mapped(batch["event_us"], _local_s)
        known = _mapped(pc.coalesce(batch["created_us"], batch["event_us"]), _exact_s)
        written = 0
        for name in batch.schema.names:
            if name in (join_key, "event_us", "created_us"):
                continue
            column = batch[name]
            cells = zip(keys, repeat(name), _mapped(column, encode_value), _mapped(column, _text), events, known, strict=False)
            written += self.db.executemany(_upsert(view, is_guarded=is_guarded), cells).rowcount
        return written

    def read(self, view: str, feature: str, keys: Sequence[str], *, join_key: str = "customer_id") -> dict[str, tuple[str | None, int]]:
        """The stored text of one feature and when it was known (microseconds), by key; keys without a row are left out."""
        encode = key_encoder(join_key)
        names = {encode(key): key for key in keys}
        columns = "entity_key, value_text, coalesce(created_ts, event_ts)"
        head = f'SELECT {columns} FROM "{table_of(view)}" WHERE feature_name = ? AND entity_key'
        return {names[key]: (text, math.ceil(known * 1e6)) for key, text, known in self._select(head, list(names), feature)}

    def everything(self, view: str, feature: str, *, join_key: str = "customer_id") -> Iterator[tuple[str, str | None]]:
        """Key and stored text of one feature, of every row."""
        start = len(key_encoder(join_key)("")) + 1
        query = f'SELECT CAST(substr(entity_key, {start}) AS TEXT), value_text FROM "{table_of(view)}" WHERE feature_name = ?'
        yield from self.db.execute(query, (feature,))

    def identifiers_of(self, customers: Sequence[str]) -> dict[str, list[str]]:
        """Whose identifiers these customers are known by, as the view of identifiers has it now; every customer is a key."""
        found: dict[str, list[str]] = {customer: [] for customer in customers}
        table, start = table_of(IDENTIFIER_VIEW), len(key_encoder("identifier")("")) + 1
        self.db.execute(f'CREATE INDEX IF NOT EXISTS "{table}_owner" ON "{table}" (value_text)')
        head = f'SELECT value_text, CAST(substr(entity_key, {start}) AS TEXT) FROM "{table}" WHERE feature_name = ? AND value_text'
        for customer, identifier in self._select(head, list(found), "customer_id"):
            found[customer].append(identifier)
        return found

    def remove(self, view: str, keys: Sequence[str], *, join_key: str = "customer_id") -> int:
        """Delete the keys' rows of a view; returns the values deleted."""
        encode = key_encoder(join_key)
        return (
            self.db.executemany(f'DELETE FROM "{table_of(view)}" WHERE entity_key = ?', [(encode(key),) for key in keys]).rowcount
            if keys
            else 0
        )

    def remove_customers(self, customers: Sequence[str]) -> int:
        """Delete everything that the online store holds under these customer ids, in whatever view; returns the values deleted."""
        views = self.db.execute("SELECT substr(name, ?) FROM sqlite_master WHERE type = 'table' AND name GLOB ?", _OURS).fetchall()
        return sum(self.remove(view, customers) for (view,) in views) if customers else 0

    def clear(self, view: str, kept: Iterable[str], *, join_key: str) -> int:
        """Delete the rows of all keys but `kept`; returns the values deleted."""
        encode = key_encoder(join_key)
        self.db.execute("CREATE TEMP TABLE IF NOT EXISTS kept_keys (entity_key BLOB PRIMARY KEY) WITHOUT ROWID")
        self.db.execute("DELETE FROM kept_keys")
        self.db.executemany("INSERT OR IGNORE INTO kept_keys VALUES (?)", ((encode(key),) for key in kept))
        return self.db.execute(f'DELETE FROM "{table_of(view)}" WHERE entity_key NOT IN (SELECT entity_key FROM kept_keys)').rowcount

    def clear_orphans(self) -> int:
        """Delete the consent of customers whom no identifier names: they were merged into another. Returns the values deleted."""
        start = len(key_encoder("customer_id")("")) + 1
        return self.db.execute(
            f"""DELETE FROM "{table_of(CONSENT_VIEW)}" WHERE CAST(substr(entity_key, {start}) AS TEXT) NOT IN (
                SELECT value_text FROM "{table_of(IDENTIFIER_VIEW)}" WHERE value_text IS NOT NULL)"""
        ).rowcount

    def has(self, view: str) -> bool:
        """Whether the view was applied."""
        return self.db.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", (table_of(view),)).fetchone() is not None

    def checkpoint(self) -> None:
        """Move the write-ahead log into the file and empty it. Raises StoreError where a reader keeps it in use."""
        if self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
            raise StoreError(f"online store: {self.path} stayed in use for {_BUSY_S:g} s, its write-ahead log was not emptied; do it again")

    def close(self) -> None:
        """Close the file."""
        if self._db is not None:
            self._db.close()
        self._db = self._inode = None

    def _select(self, head: str, values: Sequence[str | bytes], *first: str) -> list[tuple]:
        rows: list[tuple] = []
        for start in range(0, len(values), _AT_A_TIME):
            some = values[start : start + _AT_A_TIME]
            rows += self.db.execute(f"{head} IN ({','.join('?' * len(some))})", (*first, *some)).fetchall()
        return rows

    def _connection(self) -> sqlite3.Connection:
        """The connection; a new one when the file is another one than it was opened on."""
        try:
            status = self.path.stat()
        except OSError as error:
            self.close()
            raise StoreError(f"online store: expected {self.path}, found nothing; run `rapport features apply`") from error
        if self._db is None or self._inode != (status.st_dev, status.st_ino):
            self.close()
            self._db, self._inode = self._opened(), (status.st_dev, status.st_ino)
        return self._db

    def _opened(self) -> sqlite3.Connection:
        try:
            # never created here: an empty file would look like a store that knows nobody
            db = sqlite3.connect(
                f"{self.path.resolve().as_uri()}?mode=rw", uri=True, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
            )
            for pragma in ("journal_mode = WAL", "synchronous = FULL", "secure_delete = ON"):
                db.execute(f"PRAGMA {pragma}").fetchall()
            if self._schema:
                db.executescript(self._schema)
        except sqlite3.Error as error:
            raise StoreError(f"online store: {self.path} could not be opened ({error}); {_MEND}") from error
        return db

    def _roll_back(self, db: sqlite3.Connection) -> None:
        if db.in_transaction:
            db.execute("ROLLBACK")


def table_of(view: str) -> str:
    """The view's table in the store."""
    return f"{PROJECT}_{view}"


def is_former(identifier: str) -> bool:
    """Whether it is the id of a customer who was merged into another."""
    return identifier.startswith(f"{FORMER}:")


def erase(home: Path, *, identifiers: Sequence[str], customers: Sequence[str]) -> int:
    """Delete everything that the online store, and the stream beside it, hold of a person; returns the rows deleted.

    The bytes are overwritten in the file and gone from its write-ahead log. Entomb first: the stream looks before it writes.
    Raises StoreError where the store refuses, or a reader keeps the write-ahead log in use; nothing happens where there is none.
    """
    if not (home / "feature_store" / "online.db").exists():
        return 0
    online = OnlineWriter(home)
    try:
        with online.transaction():
            names = [*identifiers, *(f"{FORMER}:{customer}" for customer in customers)]
            removed = online.remove_customers(customers)
            if online.has(IDENTIFIER_VIEW):
                led = [name for some in online.identifiers_of(customers).values() for name in some]
                removed += online.remove(IDENTIFIER_VIEW, [*names, *led], join_key="identifier")
            if online.db.execute("SELECT 1 FROM sqlite_master WHERE name = 'stream_words'").fetchone():
                removed += online.db.executemany("DELETE FROM stream_words WHERE identifier = ?", [(name,) for name in names]).rowcount
        online.checkpoint()
    finally:
        online.close()
    return removed


@cache
def key_encoder(join_key: str) -> Callable[[str], bytes]:
    """Feast's serialisation (version 3) of an entity with one text key."""
    name = join_key.encode()
    head = struct.pack("<III", 1, _TEXT, len(name)) + name + struct.pack("<I", _TEXT)

    def encode(key: str) -> bytes:
        text = key.encode()
        return head + struct.pack("<I", len(text)) + text

    return encode


def encode_value(value: Value) -> bytes:
    """Feast's Value message: string_val 2, int64_val 4, double_val 5, bool_val 7; empty for a null."""
    if value is None:
        return b""
    if isinstance(value, str):
        text = value.encode()
        return b"\x12" + _varint(len(text)) + text
    if isinstance(value, bool):
        return b"\x38\x01" if value else b"\x38\x00"
    return b"\x20" + _varint(value & 0xFFFFFFFFFFFFFFFF) if isinstance(value, int) else b"\x29" + struct.pack("<d", value)


def _varint(number: int) -> bytes:
    digits = bytearray()
    while number > 0x7F:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    digits.append(number)
    return bytes(digits)


def _text(value: Value) -> str | None:
    return None if value is None else str(value)


def _stamps(event_us: int, created_us: int | None) -> tuple[int, float]:
    return _local_s(event_us), _exact_s(event_us if created_us is None else created_us)


def _local_s(time_us: int) -> int:
    """`event_ts` as Feast writes it: naive UTC taken for local time, in whole seconds."""
    return int((_EPOCH + timedelta(microseconds=time_us)).timestamp())


def _exact_s(time_us: int) -> float:
    return time_us / 1e6


def _mapped(column: "pa.Array | pa.ChunkedArray", call: Callable[..., object]) -> list[object]:
    """`call` of every value, made once for each distinct one."""
    import numpy as np
    import pyarrow as pa

    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    coded = whole.dictionary_encode(null_encoding="encode")
    made = np.empty(len(coded.dictionary), dtype=object)
    made[:] = [call(value) for value in coded.dictionary.to_pylist()]
    answer: list[object] = made[coded.indices.to_numpy(zero_copy_only=False)].tolist()
    return answer


@cache
def _upsert(view: str, *, is_guarded: bool = True) -> str:
    table = table_of(view)
    newer = f'WHERE (excluded.event_ts, excluded.created_ts) >= ("{table}".event_ts, coalesce("{table}".created_ts, "{table}".event_ts))'
    return f"""
        INSERT INTO "{table}" (entity_key, feature_name, value, value_text, event_ts, created_ts) VALUES (?, ?, ?, ?, ?, ?)
        ON CONFLICT (entity_key, feature_name) DO UPDATE SET value = excluded.value, value_text = excluded.value_text,
            event_ts = excluded.event_ts, created_ts = excluded.created_ts {newer if is_guarded else ""}"""
