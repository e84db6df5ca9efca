"""What the SQLite online store holds: values by key, whose identifiers are whose, the keys of a person.

In: keys, customers, identifiers. Out: stored texts and encoded keys. Writes nothing but an index of its own, and knows no times but
those that are stored.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from pipelines.online import schema as online_schema
from pipelines.online.feast_format import JoinKey, Key, key_decoder, key_encoder, key_prefix, sorted_names, table_of
from pipelines.online.file import OnlineFile

IDENTIFIER_VIEW = "identifier_customer"
FORMER = "customer_id"  # the kind of an identifier that was a customer's id before it was merged into another
CUSTOMER = "customer_id"  # the join key, alone or with others, of what is known about a person

K = TypeVar("K", bound=Key)

_AT_A_TIME = 500


class OnlineReader(OnlineFile):
    """Reads the online store of one home; one thread."""

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
        return {names[key]: (text, micros(known)) for key, text, known in self._select(head, list(names), feature)}

    def everything(self, view: str, feature: str, *, join_key: str = CUSTOMER) -> Iterator[tuple[str, str | None]]:
        """Key and stored text of one feature, of every row."""
        decode = key_decoder(join_key)
        query = f'SELECT entity_key, value_text FROM "{table_of(view)}" WHERE feature_name = ?'
        for key, text in self.db.execute(query, (feature,)):
            yield str(decode(key)), text

    def identifiers_after(self, before: str | None, limit: int) -> list[str]:
        """The next identifiers that the store has, in the order of their keys."""
        after = b"" if before is None else key_encoder("identifier")(before)
        statement = f'''SELECT entity_key FROM "{table_of(IDENTIFIER_VIEW)}" WHERE entity_key > ? AND feature_name = 'customer_id'
            ORDER BY entity_key LIMIT ?'''
        decode = key_decoder("identifier")
        return [str(decode(key)) for (key,) in self.db.execute(statement, (after, limit))]

    def identifiers_of(self, customers: Sequence[str]) -> dict[str, list[str]]:
        """Whose identifiers these customers are known by, as the view of identifiers has it now; every customer is a key."""
        found: dict[str, list[str]] = {customer: [] for customer in customers}
        table, start = table_of(IDENTIFIER_VIEW), len(key_encoder("identifier")("")) + 1
        self.db.execute(f'CREATE INDEX IF NOT EXISTS "{table}_owner" ON "{table}" (value_text)')
        head = f'SELECT value_text, CAST(substr(entity_key, {start}) AS TEXT) FROM "{table}" WHERE feature_name = ? AND value_text'
        for customer, identifier in self._select(head, list(found), "customer_id"):
            found[customer].append(identifier)
        return found

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


def is_former(identifier: str) -> bool:
    """Whether it is the id of a customer who was merged into another."""
    return identifier.startswith(f"{FORMER}:")


def micros(known_s: float) -> int:
    """Seconds as stored -> microseconds."""
    return math.ceil(known_s * 1e6)


def _after(prefix: bytes) -> bytes:
    """The least bytes above all that begin with `prefix`."""
    kept = prefix.rstrip(b"\xff")
    return kept[:-1] + bytes([kept[-1] + 1])
