"""Rows of Feast's online store, for many keys at once. In: a view and keys. Out: each key's row and its time.

`SqliteSource` reads Feast's SQLite file directly, in Feast's own key and value encoding, over a read-only connection, and
`redis_source` Feast's Redis; `FeastSource` reads the same rows through Feast. `difference` says whether two agree, which is
checked before a direct read is trusted. Never writes, never judges the age of a row.
"""

import functools
import os
import sqlite3
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec

from pipelines.online.feast_format import (
    JoinKey,
    Key,
    Value,
    decode_value,
    encode_value,
    key_decoder,
    key_encoder,
    key_prefix,
    read_seconds,
    stored_seconds,
)
from serving.fallbacks import Deadline

MAX_BOUND = 500  # keys in one statement
BUSY_MS = 20  # how long a read waits for a writer's lock
TRUE = encode_value(True)  # a truth value as the store has it

# When it changed, seconds since 1970, and its values in the order of the view's columns.
Row = tuple[float | None, Sequence[Value]]
NO_ROW: Row = (None, ())

# A row's cells as one: handing over each for itself costs more than finding it. Values in hexadecimal digits, for JSON has no bytes.
_ROW = "json_group_object(feature_name, hex(value)), max(event_ts)"


class StoreFailure(Exception):
    """The online store is missing, locked, slow or not what it was when it was resolved."""


class EncodingChanged(StoreFailure):
    """Bytes in the store are not what this version of Feast was known to write."""


@dataclass(frozen=True)
class View:
    """A resolved feature view: its table in the store, its join key or keys, the columns wanted, and how old a row may be to count."""

    name: str
    table: str
    join_key: JoinKey
    columns: tuple[str, ...]
    max_age_s: float

    def value(self, row: Row, column: str) -> Value:
        """One value of a row of this view; None where there is no row."""
        return row[1][self.columns.index(column)] if row[1] else None

    @functools.cached_property
    def cells(self) -> Callable[[str], Any]:
        """How the cells of a row (`_ROW`) are taken apart, into an object with the digits of each column in their order."""
        fields = [(f"column_{i}", str, msgspec.field(name=column, default="")) for i, column in enumerate(self.columns)]
        return msgspec.json.Decoder(msgspec.defstruct("Cells", fields, gc=False)).decode


class Source(Protocol):
    """How the rows of one view are fetched."""

    def fetch(self, view: View, keys: Sequence[Key], deadline: Deadline) -> list[Row]:
        """For each key its row; `NO_ROW` where there is none. Raises StoreFailure."""

    def fetch_views(self, views: Sequence[View], keys: Sequence[Key], deadline: Deadline) -> list[list[Row]]:
        """The same for several views, each a list of rows. Raises StoreFailure."""

    def fetch_permitted(self, permit: View, column: str, views: Sequence[View], key: Key, deadline: Deadline) -> list[Row] | None:
        """The key's row in `permit` and, where its `column` is true there, those in the views, else nothing of them, all as of one
        instant. None where the store cannot look at both at once. Raises StoreFailure."""

    def present(self, view: View, keys: Sequence[Key], deadline: Deadline) -> list[bool]:
        """Whether each key has a row of whatever age; reads no value. Raises StoreFailure."""

    def keys_with(self, view: View, text: str, deadline: Deadline) -> list[str]:
        """The keys whose row holds this text; none where the store cannot find them quickly. Raises StoreFailure."""

    def keys_under(self, view: View, first: str, column: str, deadline: Deadline, *, since_s: float, limit: int) -> list[Key] | None:
        """Of a view with two join keys, keys whose first text, in Feast's order, is this one, whose `column` is not null, and whose row
        changed since; the newest first, at most so many. None where the store cannot find them quickly. Raises StoreFailure.
        """


class Fast(Source, Protocol):
    """A source that reads the store's own bytes."""

    def some_keys(self, view: View, n: int) -> list[bytes]:
        """Encoded keys of up to `n` rows. Raises StoreFailure."""


class SqliteSource:
    """Feast's SQLite online store, read directly. Follows the file when it is replaced; sees every commit of a writer."""

    def __init__(self, path: Path, *, decode: Callable[[str], Value] | None = None) -> None:
        self.path = path
        self._decode = decode or Decoder().__getitem__
        self._local = threading.local()

    def fetch(self, view: View, keys: Sequence[Key], deadline: Deadline) -> list[Row]:
        """See Source. One indexed look-up per key, `MAX_BOUND` keys to a statement."""
        encode = key_encoder(view.join_key)
        encoded = [encode(key) for key in keys]
        found: dict[bytes, Row] = {}
        for start in range(0, len(encoded), MAX_BOUND):
            some = encoded[start : start + MAX_BOUND]
            marks = ",".join("?" * len(some))
            statement = f'SELECT entity_key, {_ROW} FROM "{view.table}" WHERE entity_key IN ({marks}) GROUP BY entity_key'
            found.update((key, self._row(view, cells, then)) for key, cells, then in self._execute(statement, some, deadline))
        return [found.get(key, NO_ROW) for key in encoded]

    def fetch_views(self, views: Sequence[View], keys: Sequence[Key], deadline: Deadline) -> list[list[Row]]:
        """See Source. One key is one statement over all views; of many each view has its own."""
        if len(keys) != 1 or len({view.join_key for view in views}) != 1:
            return [self.fetch(view, keys, deadline) for view in views]
        key = key_encoder(views[0].join_key)(keys[0])
        return [[row] for row in self._rows(views, _of_one(tuple([view.table for view in views])), key, deadline)]

    def fetch_permitted(self, permit: View, column: str, views: Sequence[View], key: Key, deadline: Deadline) -> list[Row] | None:
        """See Source. One statement."""
        if any(view.join_key != permit.join_key for view in views):
            return None
        asked = [permit, *views]
        return self._rows(asked, _of_one(tuple([view.table for view in asked]), column), key_encoder(permit.join_key)(key), deadline)

    def present(self, view: View, keys: Sequence[Key], deadline: Deadline) -> list[bool]:
        """See Source."""
        encode = key_encoder(view.join_key)
        encoded = [encode(key) for key in keys]
        found: set[bytes] = set()
        for start in range(0, len(encoded), MAX_BOUND):
            some = encoded[start : start + MAX_BOUND]
            statement = f'SELECT DISTINCT entity_key FROM "{view.table}" WHERE entity_key IN ({",".join("?" * len(some))})'
            found.update(key for (key,) in self._execute(statement, some, deadline))
        return [key in found for key in encoded]

    def keys_with(self, view: View, text: str, deadline: Deadline) -> list[str]:
        """See Source. The stream keeps an index for it."""
        decode, index = key_decoder(view.join_key), f"{view.table}_owner"
        if not self._execute("SELECT 1 FROM sqlite_master WHERE type = 'index' AND name = ?", (index,), deadline):
            return []
        statement = f'SELECT entity_key FROM "{view.table}" INDEXED BY "{index}" WHERE value_text = ?'
        return [str(decode(key)) for (key,) in self._execute(statement, (text,), deadline)]

    def keys_under(self, view: View, first: str, column: str, deadline: Deadline, *, since_s: float, limit: int) -> list[Key] | None:
        """See Source. One walk over the part of the index that begins with this text."""
        decode, start = key_decoder(view.join_key), key_prefix(view.join_key, first)
        since = stored_seconds(int(max(since_s, 0.0) * 1e6))
        statement = (
            f'SELECT entity_key FROM "{view.table}" WHERE entity_key >= ? AND entity_key < ? AND feature_name = ? '
            "AND value NOT IN (x'', x'980100') AND event_ts >= ? ORDER BY event_ts DESC, entity_key LIMIT ?"
        )
        found = self._execute(statement, (start, start + b"\xff", column, since, limit), deadline)
        return [decode(key) for (key,) in found]

    def some_keys(self, view: View, n: int) -> list[bytes]:
        """Encoded keys of up to `n` rows."""
        statement = f'SELECT entity_key FROM "{view.table}" GROUP BY entity_key LIMIT {int(n)}'
        return [key for (key,) in self._execute(statement, (), Deadline.after_ms(1_000))]

    def _rows(self, views: Sequence[View], statement: str, key: bytes, deadline: Deadline) -> list[Row]:
        """The key's row in each of these views, for which the statement numbers them."""
        found = sorted(self._execute(statement, [key], deadline))
        return [self._row(view, cells, then) for view, (_, cells, then) in zip(views, found, strict=True)]

    def _row(self, view: View, cells: str, then: int | float | str | None) -> Row:
        return NO_ROW if then is None else (read_seconds(then), [*map(self._decode, msgspec.structs.astuple(view.cells(cells)))])

    def _execute(self, statement: str, values: Sequence[bytes | str | int], deadline: Deadline) -> list[Any]:
        deadline.check()
        try:
            connection = self._connection()
            self._local.deadline = deadline
            return connection.execute(statement, values).fetchall()
        except (sqlite3.Error, OSError) as error:
            self._close()
            deadline.check()
            raise StoreFailure(f"online store {self.path}: {type(error).__name__}: {error}") from error

    def _connection(self) -> sqlite3.Connection:
        """This thread's connection; a new one when the file is another one than it was opened on."""
        status = os.stat(self.path)  # noqa: PTH116 - on every read: Path.stat costs twice as much
        identity = (status.st_dev, status.st_ino)
        if getattr(self._local, "identity", None) != identity:
            self._close()
            connection = sqlite3.connect(f"{self.path.as_uri()}?mode=ro", uri=True, timeout=BUSY_MS / 1000, isolation_level=None)
            connection.execute("PRAGMA query_only=1")
            connection.set_progress_handler(self._is_late, 20_000)
            self._local.connection, self._local.identity = connection, identity
        current: sqlite3.Connection = self._local.connection
        return current

    def _is_late(self) -> bool:
        deadline: Deadline = self._local.deadline
        return deadline.left_s() <= 0

    def _close(self) -> None:
        connection = getattr(self._local, "connection", None)
        self._local.connection = self._local.identity = None
        if connection is not None:
            connection.close()


@functools.lru_cache(100)
def _of_one(tables: tuple[str, ...], permit: str | None = None) -> str:
    """The statement for the rows of one key in the tables of these views, each with its place. `permit`: a column of the first; of the
    others there are cells only where it is true."""
    first = tables[0]
    gate = f" AND EXISTS (SELECT 1 FROM \"{first}\" WHERE entity_key = ?1 AND feature_name = '{permit}' AND value = x'{TRUE.hex()}')"
    return " UNION ALL ".join(
        f'SELECT {place}, {_ROW} FROM "{table}" WHERE entity_key = ?1{gate if permit and place else ""}'
        for place, table in enumerate(tables)
    )


class FeastSource:
    """The same rows through `get_online_features`: slower, and right whatever the encoding."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self._lock = threading.Lock()  # Feast keeps one connection and is not made for threads

    def fetch(self, view: View, keys: Sequence[Key], deadline: Deadline) -> list[Row]:
        """See Source."""
        deadline.check()
        refs = [f"{view.name}:{column}" for column in view.columns]
        try:
            with self._lock:
                answer = self._store.get_online_features(features=refs, entity_rows=[_entity(view, key) for key in keys])
            found = answer.to_dict(include_event_timestamps=True)
        except Exception as error:
            raise StoreFailure(f"online store through Feast: {type(error).__name__}") from error
        times = [max(found[f"{column}__ts"][i] for column in view.columns) for i in range(len(keys))]
        rows = zip(*(found[column] for column in view.columns), strict=True)
        return [(float(then), row) if then else NO_ROW for then, row in zip(times, rows, strict=True)]

    def fetch_views(self, views: Sequence[View], keys: Sequence[Key], deadline: Deadline) -> list[list[Row]]:
        """See Source."""
        return [self.fetch(view, keys, deadline) for view in views]

    def fetch_permitted(self, permit: View, column: str, views: Sequence[View], key: Key, deadline: Deadline) -> list[Row] | None:
        """See Source: Feast cannot."""
        return None

    def keys_with(self, view: View, text: str, deadline: Deadline) -> list[str]:
        """See Source: Feast cannot."""
        return []

    def keys_under(self, view: View, first: str, column: str, deadline: Deadline, *, since_s: float, limit: int) -> list[Key] | None:
        """See Source: Feast cannot."""
        return None

    def present(self, view: View, keys: Sequence[Key], deadline: Deadline) -> list[bool]:
        """See Source."""
        return [then is not None for then, _ in self.fetch(view, keys, deadline)]


def _entity(view: View, key: Key) -> dict[str, str]:
    return {view.join_key: key} if isinstance(view.join_key, str) else dict(zip(view.join_key, key, strict=True))  # type: ignore[dict-item]


def difference(fast: Source, slow: Source, view: View, keys: Sequence[Key]) -> str | None:
    """What the first of the two reads differently from the second, in words; None if they agree on all keys."""
    deadline = Deadline.after_ms(10_000)
    for mine, theirs in zip(fast.fetch(view, keys, deadline), slow.fetch(view, keys, deadline), strict=True):
        if mine[0] != theirs[0]:
            return f"{view.name}: a row's time is {mine[0]} read directly and {theirs[0]} through Feast"
        odd = [name for name in view.columns if _shown(view.value(mine, name)) != _shown(view.value(theirs, name))]
        if odd:
            return f"{view.name}: {odd[0]} is not what Feast reads"
    present, deadline = fast.present(view, keys, deadline), deadline
    return None if present == slow.present(view, keys, deadline) else f"{view.name}: a row is there for one reader and not for the other"


class Decoder(dict[bytes | str, Value]):
    """Bytes of Feast's Value message, or their hexadecimal digits -> Python value. Counts and texts repeat, so what was decoded is
    remembered, up to a bound: a value that was seen costs one look-up in a dictionary.
    """

    LIMIT = 200_000

    def __missing__(self, value: bytes | str) -> Value:
        """The value; None for a null. Raises EncodingChanged for bytes that are no value of a feature."""
        if len(self) >= self.LIMIT:
            self.clear()
        try:
            self[value] = decoded = decode_value(bytes.fromhex(value) if isinstance(value, str) else value)
        except ValueError as error:
            raise EncodingChanged(f"online store: {error}") from error
        return decoded


def _shown(value: Value) -> str:
    """Equal for equal values of one type, NaN included."""
    return repr(value)
