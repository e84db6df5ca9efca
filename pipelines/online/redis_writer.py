"""Rows -> Feast's Redis online store, written directly, in Feast's own encoding. Newer wins, decided inside the server.

In: rows of a feature view. Out: what Feast's own writer would have left, except that a row is compared and written in one step, by a
script, so that writers may race (Feast reads, then writes), and that of two rows of one instant the later call wins.

It is used as `OnlineWriter` is, with these differences:
- the comparison is of whole rows, to the microsecond, by when they happened; when they were known decides nothing;
- what is written inside a `transaction` is sent at its end, seen all at once, and lasts as well as the server's own disk settings say;
  reading inside it does not see it;
- it keeps nothing else: who is who and what was consented, decided in transactions, stays in SQLite (see `outbox`).

Beside Feast's hashes: `rapport:pairs:CUSTOMER`, the keys of a customer's rows with a second join key, so that one customer can be
taken out without a walk over all keys; `rapport:names:CUSTOMER`, the identifiers; `rapport:declared`; `rapport:streamed`.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pipelines.online import schema as online_schema
from pipelines.online.feast_format import (
    PROJECT,
    JoinKey,
    Key,
    decode_time,
    decode_value,
    encode_time,
    encode_value,
    entity_of,
    key_decoder,
    key_encoder,
    key_prefix,
    redis_field,
    redis_key,
    redis_time_field,
    sorted_names,
)
from pipelines.online.redis_server import RedisServer, pack, piece
from pipelines.online.schema import Schema, ViewSchema
from pipelines.online.writer import CUSTOMER, IDENTIFIER_VIEW, K, Row, as_text, encoded_keys, encoded_value, mapped

if TYPE_CHECKING:
    import pyarrow as pa

DECLARED, STREAMED = f"{PROJECT}:declared", f"{PROJECT}:streamed"

# KEYS: the hash, and a set of its customer's keys or none. ARGV: time field, time, its seconds, its nanoseconds, then field, value, ...
_WRITE = """
local old = redis.call('HGET', KEYS[1], ARGV[1])
if old then
  local parts, i = {[8] = 0, [16] = 0}, 1
  while i <= #old do
    local tag, value, scale, digit = string.byte(old, i), 0, 1, 128
    i = i + 1
    while digit >= 128 do
      digit = string.byte(old, i)
      value, scale, i = value + digit % 128 * scale, scale * 128, i + 1
    end
    if value >= 9223372036854775808 then value = value - 18446744073709551616 end
    parts[tag] = value
  end
  local seconds = tonumber(ARGV[3])
  if seconds < parts[8] or (seconds == parts[8] and tonumber(ARGV[4]) < parts[16]) then return 0 end
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2], unpack(ARGV, 5))
if KEYS[2] then redis.call('SADD', KEYS[2], KEYS[1]) end
return (#ARGV - 4) / 2
"""
# KEYS: hashes. ARGV: the fields of one view. Returns the values deleted.
_DROP = """
local gone = 0
for _, key in ipairs(KEYS) do gone = gone + redis.call('HDEL', key, unpack(ARGV)) end
return gone
"""
# KEYS: the customer's hash, pairs and names. Returns the values deleted.
_FORGET = """
local gone = redis.call('HLEN', KEYS[1])
for _, key in ipairs(redis.call('SMEMBERS', KEYS[2])) do gone = gone + redis.call('HLEN', key) redis.call('DEL', key) end
redis.call('DEL', KEYS[1], KEYS[2], KEYS[3])
return gone
"""
_COUNT = "local n = 0 for _, key in ipairs(KEYS) do n = n + redis.call('HEXISTS', key, ARGV[1]) end return n"
_SHA = {text: hashlib.sha1(text.encode()).hexdigest() for text in (_WRITE, _DROP, _FORGET, _COUNT)}


class RedisWriter:
    """Writes rows to a Redis; one thread."""

    def __init__(self, url: str, *, timeout_s: float = 10.0) -> None:
        """Connects at the first use. Raises InputError for an address that is none."""
        self.server = RedisServer(url, timeout_s=timeout_s)
        self._held: list[bytes] | None = None  # commands of the open transaction
        self._schema: Schema | None = None

    @contextmanager
    def transaction(self) -> Iterator["RedisWriter"]:
        """Everything written inside is seen at its end, or not at all. Raises StoreError where the server does not answer."""
        self._schema, self._held = None, []
        try:
            yield self
            held, self._held = self._held, None
            if held:
                self.server.together([pack("SCRIPT", "LOAD", text) for text in _SHA] + held)
        finally:
            self._held = None

    @property
    def schema(self) -> Schema:
        """What the store was made for, as it was when the transaction began."""
        if self._schema is None:
            (found,) = self.server.send([pack("GET", DECLARED)])
            self._schema = online_schema.load(found) if found else {}
        return self._schema

    def migrate(self, wanted: Schema) -> None:
        """Take out what is no longer declared, or not as it was, and note what the store is made for by now."""
        self._schema = None
        for view, made in self.schema.items():
            declared = wanted.get(view)
            is_other = declared is None or declared.join_key != made.join_key
            kept = {} if is_other or declared is None else declared.features
            fields = [redis_field(view, name) for name, kind in made.features.items() if kept.get(name) != kind]
            if fields:
                self._drop(_keys_of_view(self.server, made), [*fields, *([redis_time_field(view)] if is_other else [])])
        self._do([pack("SET", DECLARED, online_schema.dump(wanted))])
        self._schema = None

    def write(self, view: str, rows: Iterable[Row], *, join_key: JoinKey = CUSTOMER) -> int:
        """Write the rows, each unless a newer one is there; returns the values written, inside a transaction 0: they are not yet.

        Raises StoreError where the store was not made for the view or a feature, InputError where a value is not of its type.
        """
        encode, kinds, commands = key_encoder(join_key), self._made(view, (), join_key).features, []
        for row in rows:
            if not row.values.keys() <= kinds.keys():
                self._made(view, row.values, join_key)
            values = online_schema.checked(view, kinds, row.values)
            cells = b"".join([_cell(view, name, encoded_value(view, name, value)) for name, value in values.items()])
            beside = _beside(view, join_key, row.key, values.get("customer_id"))
            commands.append(_guarded(redis_key(encode(row.key)), beside, _time(view, row.event_us), cells, len(values)))
        if not commands:
            return 0
        return sum(int(reply) for reply in self._do([*commands, pack("SADD", STREAMED, view)])[:-1])

    def load(self, view: str, batch: "pa.RecordBatch | pa.Table", *, join_key: JoinKey, is_guarded: bool) -> int:
        """Write a batch: join keys, features, event_us. Not guarded: whatever is there is replaced. Returns and raises as `write` does."""
        own = sorted_names(join_key)
        features = [name for name in batch.schema.names if name not in (*own, "event_us", "created_us")]
        kinds = self._made(view, features, join_key).features
        online_schema.check_columns(view, kinds, {name: str(batch.schema.field(name).type) for name in features})
        keys = encoded_keys(batch, join_key)
        columns = [mapped(batch[name], lambda value, name=name: _cell(view, name, encode_value(value))) for name in features]
        times = mapped(batch["event_us"], lambda time_us: _time(view, time_us))
        owners = batch["customer_id"].to_pylist() if "customer_id" in batch.schema.names else [None] * len(keys)
        commands = []
        for key, time, owner, *cells in zip(keys, times, owners, *columns, strict=True):
            beside = _owned(view, join_key, owner)
            if is_guarded:
                commands.append(_guarded(redis_key(key), beside, time, b"".join(cells), len(features)))
                continue
            commands.append(_plain(redis_key(key), time, b"".join(cells), len(features)))
            if beside is not None:
                commands.append(pack("SADD", beside, redis_key(key)))
        replies = self._do(commands)
        return sum(int(reply) for reply in replies) if is_guarded else len(keys) * len(features) * bool(replies)

    def is_streamed(self, view: str) -> bool:
        """Whether rows of the view were ever written one by one, as events came, and not only loaded from its table."""
        return bool(self.server.send([pack("SISMEMBER", STREAMED, view)])[0])

    def read(self, view: str, feature: str, keys: Sequence[K], *, join_key: JoinKey = CUSTOMER) -> dict[K, tuple[str | None, int]]:
        """One feature as text and when it happened (microseconds), by key; keys without a row are left out."""
        encode, fields = key_encoder(join_key), (redis_field(view, feature), redis_time_field(view))
        found = self.server.send([pack("HMGET", redis_key(encode(key)), *fields) for key in keys])
        there = [(key, value, then) for key, (value, then) in zip(keys, found, strict=True) if then is not None]
        return {key: (as_text(decode_value(value or b"")), decode_time(then)) for key, value, then in there}

    def everything(self, view: str, feature: str, *, join_key: str = CUSTOMER) -> Iterator[tuple[str, str | None]]:
        """Key and text of one feature, of every row: a walk over all keys of these entities."""
        decode = key_decoder(join_key)
        for page in _keys_of_view(self.server, ViewSchema(join_key, {})):
            keys = [str(decode(entity_of(key))) for key in page]
            for key, (text, _) in self.read(view, feature, keys, join_key=join_key).items():
                yield key, text

    def remove(self, view: str, keys: Sequence[Key], *, join_key: JoinKey = CUSTOMER) -> int:
        """Delete the keys' rows of a view; returns the values deleted, inside a transaction 0."""
        encode, fields = key_encoder(join_key), self._fields(view)
        replies = self._do([pack("HDEL", redis_key(encode(key)), *fields) for key in keys])
        return sum(int(reply) for reply in replies)

    def remove_customers(self, customers: Sequence[str]) -> int:
        """Delete everything that the store holds under these customer ids; returns the values deleted, inside a transaction 0."""
        encode = key_encoder(CUSTOMER)
        commands = [_script(_FORGET, [redis_key(encode(c)), _set("pairs", c), _set("names", c)], []) for c in customers]
        return sum(int(reply) for reply in self._do(commands))

    def identifiers_of(self, customers: Sequence[str]) -> dict[str, list[str]]:
        """Whose identifiers these customers are known by; every customer is a key."""
        found = self.server.send([pack("SMEMBERS", _set("names", customer)) for customer in customers])
        decode = key_decoder("identifier")
        names = {c: sorted(str(decode(entity_of(key))) for key in keys) for c, keys in zip(customers, found, strict=True)}
        owners = self.read(IDENTIFIER_VIEW, "customer_id", [n for some in names.values() for n in some], join_key="identifier")
        return {c: [name for name in some if name in owners and owners[name][0] == c] for c, some in names.items()}

    def keys_of(self, view: str, customers: Sequence[str]) -> list[bytes]:
        """The encoded keys of these customers' rows in a view with a second join key."""
        prefix, field = key_prefix(self.schema[view].join_key), redis_time_field(view)
        noted = self.server.send([pack("SMEMBERS", _set("pairs", customer)) for customer in customers])
        keys = [key for some in noted for key in some if entity_of(key).startswith(prefix)]
        there = self.server.send([pack("HEXISTS", key, field) for key in keys])
        return [entity_of(key) for key, is_there in zip(keys, there, strict=True) if is_there]

    def clear(self, view: str, kept: Iterable[bytes]) -> int:
        """Delete the rows of all keys but `kept`, encoded; returns the values deleted."""
        left = {redis_key(key) for key in kept}
        pages = ([key for key in page if key not in left] for page in _keys_of_view(self.server, self.schema[view]))
        return self._drop(pages, self._fields(view))

    def clear_orphans(self, views: Sequence[str]) -> int:
        """Delete from these views the customers whom no identifier names: they were merged into another. Returns the values deleted."""
        deleted = 0
        for view in views:
            made = self.schema[view]
            decode, place = key_decoder(made.join_key), None if isinstance(made.join_key, str) else made.join_key.index(CUSTOMER)
            keys = [key for page in _keys_of_view(self.server, made) for key in page]  # first these: who comes meanwhile is named after
            named = {owner for _, owner in self.everything(IDENTIFIER_VIEW, "customer_id", join_key="identifier")}
            found = ((key, decode(entity_of(key))) for key in keys)
            gone = [key for key, who in found if (who if place is None else who[place]) not in named]
            deleted += self._drop((gone[start : start + 1_000] for start in range(0, len(gone), 1_000)), self._fields(view))
        return deleted

    def count(self, view: str) -> int:
        """The rows of a view."""
        pages = _keys_of_view(self.server, self.schema[view])
        return sum(int(self._now([_script(_COUNT, page, [redis_time_field(view)])])[0]) for page in pages)

    def has(self, view: str) -> bool:
        """Whether the view was applied."""
        return view in self.schema

    def close(self) -> None:
        """Close the connections."""
        self.server.close()

    def _made(self, view: str, features: Iterable[str], join_key: JoinKey) -> ViewSchema:
        return online_schema.view_of(self.schema, view, features, join_key, self.server.name)

    def _fields(self, view: str) -> list[bytes]:
        return [redis_time_field(view), *(redis_field(view, name) for name in self.schema[view].features)]

    def _drop(self, pages: Iterable[list[bytes]], fields: Sequence[bytes]) -> int:
        return sum(int(self._now([_script(_DROP, page, fields)])[0]) for page in pages if page)

    def _do(self, commands: Sequence[bytes]) -> list[Any]:
        """Hold the commands for the end of the transaction, or send them now."""
        if self._held is not None:
            self._held += commands
            return []
        return self._now(commands)

    def _now(self, commands: Sequence[bytes]) -> list[Any]:
        scripts = [pack("SCRIPT", "LOAD", text) for text in _SHA]  # each time: a server that was started again has forgotten them
        return self.server.send([*scripts, *commands])[len(scripts) :]


def _keys_of_view(server: RedisServer, made: ViewSchema) -> Iterable[list[bytes]]:
    return server.keys(key_prefix(made.join_key), PROJECT.encode())


def _script(text: str, keys: Sequence[bytes], values: Sequence[bytes]) -> bytes:
    return pack("EVALSHA", _SHA[text], len(keys), *keys, *values)


def _set(kind: str, customer: str) -> bytes:
    return f"{PROJECT}:{kind}:{customer}".encode()


def _beside(view: str, join_key: JoinKey, key: Key, owner: object) -> bytes | None:
    """The set in which the row's key is noted: its customer's."""
    if not isinstance(join_key, str) and CUSTOMER in join_key:
        return _owned(view, join_key, key[join_key.index(CUSTOMER)])
    return _owned(view, join_key, owner)


def _owned(view: str, join_key: JoinKey, owner: object) -> bytes | None:
    if owner is None:
        return None
    if view == IDENTIFIER_VIEW:
        return _set("names", str(owner))
    return None if isinstance(join_key, str) else _set("pairs", str(owner))


def _cell(view: str, name: str, value: bytes) -> bytes:
    return piece(redis_field(view, name)) + piece(value)


def _time(view: str, time_us: int) -> tuple[bytes, bytes]:
    """The time's field and value, as they are written; and its seconds and nanoseconds, as the script compares them."""
    seconds, micros = divmod(time_us, 1_000_000)
    return piece(redis_time_field(view)) + piece(encode_time(time_us)), piece(seconds) + piece(micros * 1_000)


def _guarded(key: bytes, beside: bytes | None, time: tuple[bytes, bytes], cells: bytes, n: int) -> bytes:
    keys = piece(1) + piece(key) if beside is None else piece(2) + piece(key) + piece(beside)
    return b"*%d\r\n" % (8 + (beside is not None) + 2 * n) + _EVALSHA + keys + time[0] + time[1] + cells


def _plain(key: bytes, time: tuple[bytes, bytes], cells: bytes, n: int) -> bytes:
    return b"*%d\r\n" % (4 + 2 * n) + _HSET + piece(key) + time[0] + cells


_EVALSHA = piece("EVALSHA") + piece(_SHA[_WRITE])
_HSET = piece("HSET")
