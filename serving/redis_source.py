"""Rows of Feast's Redis online store, for many keys at once: one round trip for each view of a request.

In: a view and keys. Out: each key's row and its time. Reads in Feast's own encoding, which is checked against Feast before it is
trusted. A server that does not answer within the deadline is a failure like any other of the store; the next read connects again.
Never writes, never judges the age of a row.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from pipelines.online.feast_format import (
    PROJECT,
    Key,
    Value,
    decode_time,
    entity_of,
    key_decoder,
    key_encoder,
    key_prefix,
    redis_field,
    redis_key,
    redis_time_field,
)
from serving.fallbacks import Deadline
from serving.online_store import NO_ROW, Decoder, EncodingChanged, Row, StoreFailure, View

CONNECT_S = 0.1  # for each step of it: a server that hangs costs a request no more than its deadline
LOOK_EVERY = 16  # replies between two looks at the deadline
SILENCE_S = 0.05  # a server that says nothing for so long is not waited for, however much time the request has


class RedisSource:
    """Feast's Redis, read directly. Safe to use from several threads: each has a connection of its own."""

    def __init__(self, url: str, *, decode: Callable[[bytes], Value] | None = None) -> None:
        self._url, self._decode = url, decode or Decoder().__getitem__
        self._local = threading.local()

    def fetch(self, view: View, keys: Sequence[Key], deadline: Deadline) -> list[Row]:
        """See Source."""
        return self.fetch_views([view], keys, deadline)[0]

    def fetch_views(self, views: Sequence[View], keys: Sequence[Key], deadline: Deadline) -> list[list[Row]]:
        """See Source. Views of one entity lie in one hash: one command for each key and entity, all of them in one round trip."""
        commands = []
        entities = list(dict.fromkeys(view.join_key for view in views))
        for join_key in entities:
            encode, fields = key_encoder(join_key), [field for view in views if view.join_key == join_key for field in _fields(view)]
            commands += [("HMGET", redis_key(encode(key)), *fields) for key in keys]
        replies = self._ask(commands, deadline)
        found, decode = [], self._decode
        places = dict.fromkeys(entities, 0)  # the first field of the next view, of those of its entity
        for view in views:
            at, places[view.join_key] = places[view.join_key], places[view.join_key] + 1 + len(view.columns)
            start = entities.index(view.join_key) * len(keys)
            found.append([_row(reply[at : at + 1 + len(view.columns)], decode) for reply in replies[start : start + len(keys)]])
        return found

    def fetch_permitted(self, permit: View, column: str, views: Sequence[View], key: Key, deadline: Deadline) -> list[Row] | None:
        """See Source: not without a script of its own."""
        return None

    def present(self, view: View, keys: Sequence[Key], deadline: Deadline) -> list[bool]:
        """See Source."""
        encode, field = key_encoder(view.join_key), redis_time_field(view.name)
        return [bool(reply) for reply in self._ask([("HEXISTS", redis_key(encode(key)), field) for key in keys], deadline)]

    def keys_with(self, view: View, text: str, deadline: Deadline) -> list[str]:
        """See Source. The writer notes by customer the identifiers that it wrote; those that are another's by now are left out."""
        (noted,) = self._ask([("SMEMBERS", f"{PROJECT}:names:{text}")], deadline)
        decode = key_decoder(view.join_key)
        (column,) = view.columns
        names = sorted(str(decode(entity_of(key))) for key in noted)
        return [name for name, row in zip(names, self.fetch(view, names, deadline), strict=True) if view.value(row, column) == text]

    def keys_under(self, view: View, first: str, column: str, deadline: Deadline, *, since_s: float, limit: int) -> list[Key] | None:
        """See Source. The writer notes by customer the keys of what is about them and something else."""
        (noted,) = self._ask([("SMEMBERS", f"{PROJECT}:pairs:{first}")], deadline)
        start, decode = key_prefix(view.join_key, first), key_decoder(view.join_key)
        keys = sorted(key for key in noted if key.startswith(start))
        fields = (redis_time_field(view.name), redis_field(view.name, column))
        replies = self._ask([("HMGET", key, *fields) for key in keys], deadline)
        found = [
            (-_seconds(then), key)
            for key, (then, value) in zip(keys, replies, strict=True)
            if then and value and self._decode(value) is not None
        ]
        return [decode(entity_of(key)) for at, key in sorted(found)[:limit] if -at >= int(since_s)]

    def some_keys(self, view: View, n: int) -> list[bytes]:
        """Encoded keys of up to `n` rows: of those that one look at the server finds."""
        deadline, field = Deadline.after_ms(1_000), redis_time_field(view.name)
        decode, found, cursor = key_decoder(view.join_key), [], b"0"
        for _ in range(20):
            ((cursor, page),) = self._ask([("SCAN", cursor, "MATCH", f"*{PROJECT}", "COUNT", 1_000)], deadline)
            mine = [key for key in page if _is_key(decode, entity_of(key))]
            there = self._ask([("HEXISTS", key, field) for key in mine], deadline)
            found += [entity_of(key) for key, is_there in zip(mine, there, strict=True) if is_there]
            if len(found) >= n or cursor == b"0":
                break
        return found[:n]

    def _ask(self, commands: Sequence[tuple[Any, ...]], deadline: Deadline) -> list[Any]:
        """The replies, in one round trip."""
        deadline.check()
        if not commands:
            return []
        connection = None
        try:
            connection = self._connection()
            connection._sock.settimeout(_patience_s(deadline))
            connection.send_packed_command(connection.pack_commands(commands), check_health=False)
            replies = []
            for i in range(len(commands)):
                if i % LOOK_EVERY == LOOK_EVERY - 1:  # one that only drips must not outlast the deadline either
                    deadline.check()
                    connection._sock.settimeout(_patience_s(deadline))
                replies.append(connection.read_response())
            return replies
        except (redis.RedisError, OSError) as error:
            self._close()
            deadline.check()
            raise StoreFailure(f"online store: Redis: {type(error).__name__}") from error
        except BaseException:
            self._close()  # replies that were not read would be taken for the next ones
            raise

    def _connection(self) -> Any:  # its socket, whose patience is set here, is not of the public interface
        connection: Any = getattr(self._local, "connection", None)
        if connection is None:
            limits = {"socket_timeout": CONNECT_S, "socket_connect_timeout": CONNECT_S}
            pool = redis.ConnectionPool.from_url(self._url, retry=Retry(NoBackoff(), 0), protocol=2, **limits)
            connection = self._local.connection = pool.make_connection()
        if connection._sock is None:
            connection.connect()
        return connection

    def _close(self) -> None:
        connection = getattr(self._local, "connection", None)
        self._local.connection = None
        if connection is not None:
            connection.disconnect()


def _patience_s(deadline: Deadline) -> float:
    return min(max(deadline.left_s(), 0.001), SILENCE_S)


def _fields(view: View) -> list[bytes]:
    return [redis_time_field(view.name), *(redis_field(view.name, name) for name in view.columns)]


def _row(reply: Sequence[bytes | None], decode: Callable[[bytes], Value]) -> Row:
    then, *values = reply
    return NO_ROW if then is None else (_seconds(then), [None if value is None else decode(value) for value in values])


def _seconds(then: bytes) -> float:
    """Whole seconds, as Feast and its SQLite store tell them."""
    try:
        return float(decode_time(then) // 1_000_000)
    except ValueError as error:
        raise EncodingChanged(f"online store: {error}") from error


def _is_key(decode: Callable[[bytes], Key], key: bytes) -> bool:
    try:
        decode(key)
    except ValueError:
        return False
    return True
