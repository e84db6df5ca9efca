"""Rows -> Feast's SQLite online store, written directly, in Feast's own key and value encoding. Newer wins.

In: rows of a feature view, with when they happened and when we knew. Out: what `get_online_features` would find had Feast written
them, except that an older row never replaces a newer one: the comparison is part of the statement, so writers may race.
Feast keeps `event_ts` in whole seconds and never reads `created_ts`, which here holds the fraction that decides within a second.
Feast itself is not imported. Never creates a table (`feature_store.apply` does), and never writes what the store was not made for.

    with OnlineWriter(home).transaction() as online:      # all of it is seen, or nothing
        online.write("customer_consent", [Row(customer_id, {"is_personalization_allowed": False}, event_us=now)])
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pipelines.errors import InputError, StoreError
from pipelines.online import schema as online_schema
from pipelines.online.feast_format import (
    JoinKey,
    Key,
    Value,
    decode_value,
    encode_value,
    key_decoder,
    key_encoder,
    sorted_names,
    stored_seconds,
    table_of,
)
from pipelines.online.reader import CUSTOMER, FORMER, IDENTIFIER_VIEW, K, OnlineReader, is_former, micros
from pipelines.online.rows import Standing, StandingRows

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "CONSENT_VIEW", "CUSTOMER", "FORMER", "IDENTIFIER_VIEW", "K", "OnlineWriter", "Row", "as_text", "encoded_keys", "encoded_value",
    "is_former", "mapped",
]  # fmt: skip

CONSENT_VIEW = "customer_consent"

Self = TypeVar("Self", bound="OnlineWriter")
Cell = tuple[bytes, str, bytes, str | None, int, float]  # as stored: key, feature, value and its text, times

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


class OnlineWriter(OnlineReader):
    """Writes rows to the online store of one home; one thread. Everything but reading is done inside a `transaction`."""

    def __init__(self, home: Path, *, schema: str = "", is_durable: bool = True) -> None:
        """See OnlineFile."""
        super().__init__(home, schema=schema, is_durable=is_durable)
        self._standing = StandingRows()

    @contextmanager
    def transaction(self: Self) -> Iterator[Self]:
        """See OnlineFile."""
        try:
            with super().transaction():
                self._standing.follow(self.db)
                yield self
        except BaseException:
            self._standing.clear()
            raise

    def write(self, view: str, rows: Iterable[Row], *, join_key: JoinKey = CUSTOMER) -> int:
        """Write the rows, each value unless a newer one is there; returns the values written. Equal times: the later call wins.

        Raises StoreError where the store was not made for the view or a feature, InputError where a value is not of its type.
        """
        encode, cells, kinds = key_encoder(join_key), [], self._kinds(view, (), join_key)
        for row in rows:
            values, key, stamps = self._checked(view, kinds, row.values, join_key), encode(row.key), _stamps(row.event_us, row.created_us)
            cells += [(key, name, *_cell(view, name, value), *stamps) for name, value in values.items()]
        return self._upserted(view, cells)

    def renew(self, view: str, rows: Sequence[Row], *, join_key: JoinKey = CUSTOMER) -> int:
        """Write the rows, whole ones, whatever is there; returns their values. Raises as `write` does.

        What is newer was told before something was taken back, so they are made as new as that. Of a row that stands there already
        only its time and the values that are others are written.
        """
        return sum(len(row.values) for row in self._renewed(view, rows, join_key))

    def _renewed(self, view: str, rows: Sequence[Row], join_key: JoinKey) -> list[Row]:
        """The rows with the times that they were given."""
        encode, kinds = key_encoder(join_key), self._kinds(view, (), join_key)
        keys = [encode(row.key) for row in rows]
        there = self._there(view, {key: tuple(row.values) for key, row in zip(keys, rows, strict=True)})
        fresh, odd, changed, dated = [], [], [], []
        for key, row in zip(keys, rows, strict=True):
            before = there.get(key)
            made = Standing(tuple(row.values), tuple(row.values.values()), *_stamps(row.event_us, row.created_us))
            if before is not None and made.time < before.time:
                row = replace(row, event_us=max(row.event_us, micros(before.known_s)), created_us=None)
                made = Standing(made.names, made.values, *_stamps(row.event_us, None))
            dated.append(row)
            if before is not None and before.names == made.names:
                values = self._checked(
                    view, kinds, {(name := made.names[at]): row.values[name] for at in before.differences(made)}, join_key
                )
                if values or made.time != before.time:
                    changed.append((made, key, [part for name, value in values.items() for part in (name, *_cell(view, name, value))]))
            else:
                values = self._checked(view, kinds, row.values, join_key)
                if before is None:
                    fresh.append((made, key, [half for name, value in values.items() for half in _cell(view, name, value)]))
                else:
                    odd += [(key, name, *_cell(view, name, value), *made.time) for name, value in values.items()]
            there[key] = made if before is None or before.names == made.names else Standing((), (), *made.time)
        if rows:
            self._mark(view)  # also where a load wrote them as they are: from now on they are the stream's
        for made, key, halves in fresh:
            self.db.execute(_insert(view, made.names), (key, *made.time, *halves))
        self._upserted(view, odd)
        for made, key, parts in changed:
            self._changed(view, (key, *made.time, *parts), n_cells=len(made.names))
        for key in keys:
            if there[key].names:
                self._standing.put(view, key, there[key])
        return dated

    def _there(self, view: str, columns: Mapping[bytes, tuple[str, ...]]) -> dict[bytes, Standing]:
        """The rows under these keys. One of other columns, or not written all at once, has no names; its time is the newest."""
        found = {key: row for key in columns if (row := self._standing.get(view, key)) is not None}
        cells: dict[bytes, dict[str, tuple]] = {}
        head = f'SELECT entity_key, feature_name, value, value_text, event_ts, coalesce(created_ts, event_ts) FROM "{table_of(view)}"'
        for key, name, *cell in self._select(f"{head} WHERE entity_key", [key for key in columns if key not in found]):
            cells.setdefault(key, {})[name] = tuple(cell)
        return found | {key: _standing(some, columns[key]) for key, some in cells.items()}

    def _checked(self, view: str, kinds: Mapping[str, str], values: Mapping[str, Value], join_key: JoinKey) -> Mapping[str, Value]:
        if not values.keys() <= kinds.keys():
            self._kinds(view, values, join_key)
        return online_schema.checked(view, kinds, values)

    def _upserted(self, view: str, cells: Sequence[Cell]) -> int:
        if not cells:
            return 0
        self._mark(view)
        self._standing.drop(view, {cell[0] for cell in cells})
        return self.db.executemany(_upsert(view), cells).rowcount

    def _changed(self, view: str, parts: Sequence[object], *, n_cells: int) -> None:
        """Change a row that stands there, of so many cells. parts: as `_change` takes them."""
        found = self.db.execute(_change(view, (len(parts) - 3) // 3), parts).rowcount
        if found != n_cells:
            raise StoreError(
                f"online store: expected {n_cells} cells of {view} to stand in {self.path}, found {found}; the next look tells"
            )

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
        self._standing.clear()
        return self.db.executemany(_upsert(view, is_guarded=is_guarded), cells).rowcount if features else 0

    def remove(self, view: str, keys: Sequence[Key], *, join_key: JoinKey = CUSTOMER) -> int:
        """Delete the keys' rows of a view; returns the values deleted."""
        encode = key_encoder(join_key)
        return self._delete(view, [encode(key) for key in keys])

    def remove_customers(self, customers: Sequence[str]) -> int:
        """Delete everything that the online store holds under these customer ids, in whatever view; returns the values deleted."""
        return sum(self._delete(view, self.keys_of(view, customers)) for view in self._personal()) if customers else 0

    def clear(self, view: str, kept: "Iterable[bytes]") -> int:
        """Delete the rows of all keys but `kept`, encoded; returns the values deleted."""
        self._standing.clear()
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

    def _mark(self, view: str) -> None:
        if view in self._marked:
            return
        if not self.is_streamed(view):
            self.db.execute(_STREAMED)
            self.db.execute("INSERT OR IGNORE INTO streamed_views VALUES (?)", (view,))
        self._marked.add(view)

    def _delete(self, view: str, keys: Sequence[bytes]) -> int:
        self._standing.drop(view, keys)
        statement = f'DELETE FROM "{table_of(view)}" WHERE entity_key = ?'
        return self.db.executemany(statement, [(key,) for key in keys]).rowcount if keys else 0


def encoded_keys(batch: "pa.RecordBatch | pa.Table", join_key: JoinKey) -> list[bytes]:
    """The keys of a batch's rows, encoded."""
    encode = key_encoder(join_key)
    if isinstance(join_key, str):
        return mapped(batch[join_key], encode)  # type: ignore[return-value]
    return [encode(key) for key in zip(*(batch[name].to_pylist() for name in join_key), strict=True)]


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
    return (b"", None) if value is None else (encoded_value(view, feature, value), as_text(value))


def _standing(cells: Mapping[str, tuple[bytes, str | None, int, float]], names: tuple[str, ...]) -> Standing:
    """A row of its stored cells: value, its text and its times by feature."""
    times = {(event_s, known_s) for _, _, event_s, known_s in cells.values()}
    if len(times) > 1 or cells.keys() != set(names):
        return Standing((), (), *max(times))
    return Standing(names, tuple(_told(*cells[name][:2]) for name in names), *times.pop())


@lru_cache(_LOW)  # a row that is not remembered is read whole, and most of its values are those of others
def _told(value: bytes, text: str | None) -> Value | object:
    """What a cell holds; something that equals nothing where its two forms do not agree."""
    try:
        told = decode_value(value)
    except ValueError:
        return object()
    return told if as_text(told) == text else object()


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
def _insert(view: str, names: tuple[str, ...]) -> str:
    """Of a whole row: its key, its times, then a value and its text for each name. One statement costs half of one for each cell."""
    quoted = ["'" + name.replace("'", "''") + "'" for name in names]
    cells = ", ".join(f"(?1, {name}, ?{2 * at + 4}, ?{2 * at + 5}, ?2, ?3)" for at, name in enumerate(quoted))
    return f'INSERT INTO "{table_of(view)}" (entity_key, feature_name, value, value_text, event_ts, created_ts) VALUES {cells}'


@cache
def _change(view: str, n: int) -> str:
    """Of a row's times and some of its values: its key, its times, then name, value and text of each. One pass over the cells that are
    written anyway, for their times, costs less than a statement for each value.
    """
    cells = range(4, 3 * n + 4, 3)
    parts = [(column, " ".join(f"WHEN ?{at} THEN ?{at + place}" for at in cells)) for place, column in ((1, "value"), (2, "value_text"))]
    values = "".join(f", {column} = CASE feature_name {cases} ELSE {column} END" for column, cases in parts if cases)
    return f'UPDATE "{table_of(view)}" SET event_ts = ?2, created_ts = ?3{values} WHERE entity_key = ?1'


@cache
def _upsert(view: str, *, is_guarded: bool = True) -> str:
    table = table_of(view)
    newer = f'WHERE (excluded.event_ts, excluded.created_ts) >= ("{table}".event_ts, coalesce("{table}".created_ts, "{table}".event_ts))'
    return f"""
        INSERT INTO "{table}" (entity_key, feature_name, value, value_text, event_ts, created_ts) VALUES (?, ?, ?, ?, ?, ?)
        ON CONFLICT (entity_key, feature_name) DO UPDATE SET value = excluded.value, value_text = excluded.value_text,
            event_ts = excluded.event_ts, created_ts = excluded.created_ts {newer if is_guarded else ""}"""
