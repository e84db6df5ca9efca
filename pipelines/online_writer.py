"""Rows -> Feast's SQLite online store, written directly, in Feast's own key and value encoding. Newer wins.

In: rows of a feature view, with when they happened and when we knew. Out: what `get_online_features` would find had Feast written
them, except that an older row never replaces a newer one: the comparison is part of the statement, so writers may race.
Feast keeps `event_ts` in whole seconds and never reads `created_ts`, which here holds the fraction that decides within a second.
Feast itself is not imported. Never creates a table (`feature_store.apply` does), and never writes what the store was not made for.

    with OnlineWriter(home).transaction() as online:      # all of it is seen, or nothing
        online.write("customer_consent", [Row(customer_id, {"is_personalization_allowed": False}, event_us=now)])
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pipelines import online_schema
from pipelines.errors import InputError
from pipelines.feast_format import (
    JoinKey,
    Key,
    Value,
    encode_value,
    key_decoder,
    key_encoder,
    key_prefix,
    sorted_names,
    stored_seconds,
    table_of,
)
from pipelines.online_file import OnlineFile

if TYPE_CHECKING:
    import pyarrow as pa

    from pipelines.redis_writer import RedisWriter
    from pipelines.settings import Settings

IDENTIFIER_VIEW = "identifier_customer"
CONSENT_VIEW = "customer_consent"
FORMER = "customer_id"  # the kind of an identifier that was a customer's id before it was merged into another
CUSTOMER = "customer_id"  # the join key, alone or with others, of what is known about a person

K = TypeVar("K", bound=Key)

_AT_A_TIME = 500
_LOW = 4_096  # most values are counts below
_STREAMED = "CREATE TABLE IF NOT EXISTS streamed_views (view TEXT PRIMARY KEY) WITHOUT ROWID"


@dataclass(frozen=True, slots=True)
class Row:
    """One key's values; of an entity with several join keys, the texts in their order. Times in microseconds since 1970, UTC.

    `created_us` None: known when it happened.
    """

    key: Key
    values: Mapping[str, Value]
    event_us: int
    created_us: int | None = None


class OnlineWriter(OnlineFile):
    """Writes rows to the online store of one home; one thread. Everything but reading is done inside a `transaction`."""

    def write(self, view: str, rows: Iterable[Row], *, join_key: JoinKey = CUSTOMER) -> int:
        """Write the rows, each value unless a newer one is there; returns the values written. Equal times: the later call wins.

        Raises StoreError where the store was not made for the view or a feature, InputError where a value is not of its type.
        """
        encode, cells, kinds = key_encoder(join_key), [], self._kinds(view, (), join_key)
        for row in rows:
            if not row.values.keys() <= kinds.keys():
                self._kinds(view, row.values, join_key)
            values = online_schema.checked(view, kinds, row.values)
            key, stamps = encode(row.key), _stamps(row.event_us, row.created_us)
            cells += [(key, name, *_cell(view, name, value), *stamps) for name, value in values.items()]
        if cells:
            self._mark(view)
        return self.db.executemany(_upsert(view), cells).rowcount if cells else 0

    def renew(self, view: str, rows: Sequence[Row], *, join_key: JoinKey = CUSTOMER) -> int:
        """Write the rows whatever is there; returns the values. What is newer was told before something was taken back, so they are made
        as new as that.
        """
        values = sum(len(row.values) for row in rows)
        if not rows or self.write(view, rows, join_key=join_key) == values:
            return values
        there = self.read(view, next(iter(rows[0].values)), [row.key for row in rows], join_key=join_key)
        self.write(view, [replace(row, event_us=max(row.event_us, there[row.key][1])) for row in rows], join_key=join_key)
        return values

    def load(self, view: str, batch: "pa.RecordBatch | pa.Table", *, join_key: JoinKey, is_guarded: bool) -> int:
        """Write a batch: join keys, features, event_us and created_us (null: none). Not guarded: whatever is there is replaced.

        Column by column: each distinct value is encoded once. Returns the values written. Raises as `write` does.
        """
        import pyarrow.compute as pc

        own = sorted_names(join_key)
        features = [name for name in batch.schema.names if name not in (*own, "event_us", "created_us")]
        kinds = self._kinds(view, features, join_key)
        online_schema.check_columns(view, kinds, {name: str(batch.schema.field(name).type) for name in features})
        keys = encoded_keys(batch, join_key)
        events = mapped(batch["event_us"], stored_seconds)
        known = mapped(pc.coalesce(batch["created_us"], batch["event_us"]), _exact_s)
        columns = (
            zip(keys, repeat(name), mapped(batch[name], encode_value), mapped(batch[name], as_text), events, known, strict=False)
            for name in sorted(features)
        )
        # key by key, in the order of the table's index: column by column, pages come and go
        cells = chain.from_iterable(zip(*columns, strict=True))
        return self.db.executemany(_upsert(view, is_guarded=is_guarded), cells).rowcount if features else 0

    def is_streamed(self, view: str) -> bool:
        """Whether rows of the view were ever written one by one, as events came, and not only loaded from its table."""
        if self.db.execute("SELECT 1 FROM sqlite_master WHERE name = 'streamed_views'").fetchone() is None:
            return False
        return self.db.execute("SELECT 1 FROM streamed_views WHERE view = ?", (view,)).fetchone() is not None

    def read(self, view: str, feature: str, keys: Sequence[K], *, join_key: JoinKey = CUSTOMER) -> dict[K, tuple[str | None, int]]:
        """The stored text of one feature and when it was known (microseconds), by key; keys without a row are left out."""
        encode = key_encoder(join_key)
        names = {encode(key): key for key in keys}
        columns = "entity_key, value_text, coalesce(created_ts, event_ts)"
        head = f'SELECT {columns} FROM "{table_of(view)}" WHERE feature_name = ? AND entity_key'
        return {names[key]: (text, math.ceil(known * 1e6)) for key, text, known in self._select(head, list(names), feature)}

    def everything(self, view: str, feature: str, *, join_key: str = CUSTOMER) -> Iterator[tuple[str, str | None]]:
        """Key and stored text of one feature, of every row."""
        decode = key_decoder(join_key)
        query = f'SELECT entity_key, value_text FROM "{table_of(view)}" WHERE feature_name = ?'
        for key, text in self.db.execute(query, (feature,)):
            yield str(decode(key)), text

    def identifiers_of(self, customers: Sequence[str]) -> dict[str, list[str]]:
        """Whose identifiers these customers are known by, as the view of identifiers has it now; every customer is a key."""
        found: dict[str, list[str]] = {customer: [] for customer in customers}
        table, start = table_of(IDENTIFIER_VIEW), len(key_encoder("identifier")("")) + 1
        self.db.execute(f'CREATE INDEX IF NOT EXISTS "{table}_owner" ON "{table}" (value_text)')
        head = f'SELECT value_text, CAST(substr(entity_key, {start}) AS TEXT) FROM "{table}" WHERE feature_name = ? AND value_text'
        for customer, identifier in self._select(head, list(found), "customer_id"):
            found[customer].append(identifier)
        return found

    def remove(self, view: str, keys: Sequence[Key], *, join_key: JoinKey = CUSTOMER) -> int:
        """Delete the keys' rows of a view; returns the values deleted."""
        encode = key_encoder(join_key)
        return self._delete(view, [encode(key) for key in keys])

    def remove_customers(self, customers: Sequence[str]) -> int:
        """Delete everything that the online store holds under these customer ids, in whatever view; returns the values deleted."""
        return sum(self._delete(view, self.keys_of(view, customers)) for view in self._personal()) if customers else 0

    def keys_of(self, view: str, customers: Sequence[str]) -> list[bytes]:
        """The encoded keys of these customers in a view, all of them where it has a second join key."""
        join_key = self.schema[view].join_key
        if isinstance(join_key, str):
            encode = key_encoder(join_key)
            return [encode(customer) for customer in customers]
        if sorted_names(join_key)[0] == CUSTOMER:
            return [key for customer in customers for key in self._range(view, key_prefix(join_key, customer))]
        encode, other = key_encoder(join_key), join_key.index(CUSTOMER) ^ 1
        firsts = self._firsts(view, join_key, other)  # few, as categories are: each customer's key of every one is asked for
        made = ((customer, first) if other else (first, customer) for customer in customers for first in firsts)
        return [encode(key) for key in made]

    def held_of(self, view: str, customers: Sequence[str], identifiers: Sequence[str]) -> list[tuple[Key, str, str | None]]:
        """Key, feature and stored text of everything that a view holds of a person: by customer id, or by identifier."""
        join_key = self.schema[view].join_key
        is_personal = CUSTOMER in sorted_names(join_key)
        if not is_personal and join_key != "identifier":
            return []
        keys = self.keys_of(view, customers) if is_personal else [key_encoder(join_key)(name) for name in identifiers]
        decode = key_decoder(join_key)
        rows = self._select(f'SELECT entity_key, feature_name, value_text FROM "{table_of(view)}" WHERE entity_key', keys)
        return [(decode(key), name, text) for key, name, text in rows]

    def clear(self, view: str, kept: "Iterable[bytes]") -> int:
        """Delete the rows of all keys but `kept`, encoded; returns the values deleted."""
        self.db.execute("CREATE TEMP TABLE IF NOT EXISTS kept_keys (entity_key BLOB PRIMARY KEY) WITHOUT ROWID")
        self.db.execute("DELETE FROM kept_keys")
        self.db.executemany("INSERT OR IGNORE INTO kept_keys VALUES (?)", ((key,) for key in kept))
        return self.db.execute(f'DELETE FROM "{table_of(view)}" WHERE entity_key NOT IN (SELECT entity_key FROM kept_keys)').rowcount

    def clear_orphans(self, views: Sequence[str]) -> int:
        """Delete from these views the customers whom no identifier names: they were merged into another. Returns the values deleted."""
        named = {owner for _, owner in self.everything(IDENTIFIER_VIEW, "customer_id", join_key="identifier")}
        deleted = 0
        for view in views:
            join_key = self.schema[view].join_key
            decode, place = key_decoder(join_key), 0 if isinstance(join_key, str) else join_key.index(CUSTOMER)
            keys = self.db.execute(f'SELECT DISTINCT entity_key FROM "{table_of(view)}"')
            gone = [key for (key,) in keys if (decode(key) if isinstance(join_key, str) else decode(key)[place]) not in named]
            deleted += self._delete(view, gone)
        return deleted

    def count(self, view: str) -> int:
        """The rows of a view."""
        (found,) = self.db.execute(f'SELECT count(DISTINCT entity_key) FROM "{table_of(view)}"').fetchone()
        return int(found)

    def _kinds(self, view: str, features: Iterable[str], join_key: JoinKey) -> Mapping[str, str]:
        """The types of a view's features. Raises StoreError where the store was not made for these, or for this join key."""
        return online_schema.view_of(self.schema, view, features, join_key, str(self.path)).features

    def _personal(self) -> list[str]:
        """The views with rows of customers that are there."""
        views = [view for view, made in self.schema.items() if CUSTOMER in sorted_names(made.join_key)]
        return [view for view in views if self.has(view)]

    def _mark(self, view: str) -> None:
        if view in self._marked:
            return
        if not self.is_streamed(view):
            self.db.execute(_STREAMED)
            self.db.execute("INSERT OR IGNORE INTO streamed_views VALUES (?)", (view,))
        self._marked.add(view)

    def _delete(self, view: str, keys: Sequence[bytes]) -> int:
        statement = f'DELETE FROM "{table_of(view)}" WHERE entity_key = ?'
        return self.db.executemany(statement, [(key,) for key in keys]).rowcount if keys else 0

    def _range(self, view: str, prefix: bytes) -> list[bytes]:
        statement = f'SELECT DISTINCT entity_key FROM "{table_of(view)}" WHERE entity_key >= ? AND entity_key < ?'
        return [key for (key,) in self.db.execute(statement, (prefix, _after(prefix)))]

    def _firsts(self, view: str, join_key: JoinKey, place: int) -> list[str]:
        """The different first texts of a view's keys: one look-up for each."""
        statement, decode = f'SELECT min(entity_key) FROM "{table_of(view)}" WHERE entity_key >= ?', key_decoder(join_key)
        found, start = [], key_prefix(join_key)
        while (key := self.db.execute(statement, (start,)).fetchone()[0]) is not None:
            found.append(decode(key)[place])
            start = _after(key_prefix(join_key, found[-1]))
        return found

    def _select(self, head: str, values: Sequence[str | bytes], *first: str) -> list[tuple]:
        rows: list[tuple] = []
        for start in range(0, len(values), _AT_A_TIME):
            some = values[start : start + _AT_A_TIME]
            rows += self.db.execute(f"{head} IN ({','.join('?' * len(some))})", (*first, *some)).fetchall()
        return rows


def open_writer(home: Path, settings: "Settings | None" = None) -> "OnlineWriter | RedisWriter":
    """The writer of the online store that the settings name: Redis, or the home's SQLite file."""
    if settings is None or settings.online.redis_url is None:
        return OnlineWriter(home)
    from pipelines.redis_writer import RedisWriter

    return RedisWriter(settings.online.redis_url.get_secret_value())


def is_former(identifier: str) -> bool:
    """Whether it is the id of a customer who was merged into another."""
    return identifier.startswith(f"{FORMER}:")


def encoded_keys(batch: "pa.RecordBatch | pa.Table", join_key: JoinKey) -> list[bytes]:
    """The keys of a batch's rows, encoded."""
    encode = key_encoder(join_key)
    if isinstance(join_key, str):
        return mapped(batch[join_key], encode)  # type: ignore[return-value]
    return [encode(key) for key in zip(*(batch[name].to_pylist() for name in join_key), strict=True)]


def _after(prefix: bytes) -> bytes:
    """The least bytes above all that begin with `prefix`."""
    kept = prefix.rstrip(b"\xff")
    return kept[:-1] + bytes([kept[-1] + 1])


def encoded_value(view: str, feature: str, value: Value) -> bytes:
    """Its bytes. Raises InputError for a number or text that Feast has no bytes for."""
    try:
        return encode_value(value)
    except (OverflowError, UnicodeEncodeError) as error:
        raise InputError(f"online store: {view}:{feature}: {error}; nothing was written, mend the writer") from error


def _cell(view: str, feature: str, value: Value) -> tuple[bytes, str | None]:
    """Both forms in which a value is stored."""
    if type(value) is int and 0 <= value < _LOW:
        return _low(value)
    return encoded_value(view, feature, value), as_text(value)


@cache
def _low(value: int) -> tuple[bytes, str | None]:
    return encode_value(value), as_text(value)


def as_text(value: Value) -> str | None:
    """A value as `value_text` has it; none for a null, which NaN is."""
    return None if value is None or value != value else str(value)


def _stamps(event_us: int, created_us: int | None) -> tuple[int, float]:
    return stored_seconds(event_us), _exact_s(event_us if created_us is None else created_us)


def _exact_s(time_us: int) -> float:
    return time_us / 1e6


def mapped(column: "pa.Array | pa.ChunkedArray", call: Callable[..., object]) -> list[object]:
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
