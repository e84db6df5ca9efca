"""The stream's writer where features are served from Redis: SQLite decides, Redis follows.

In: what the stream writes, in one transaction with what it keeps beside (who is who, words of consent, its own state). Out: the same
rows in the file, and after the transaction in Redis. What is still owed to Redis is noted in the file by the same transaction, so a
worker that dies in between, or a server that is away, loses nothing: the next transaction sends it first. It may be sent twice; the
newer row wins there as everywhere. Never reads Redis.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pipelines.online.feast_format import JoinKey, Key
from pipelines.online.redis_writer import RedisWriter
from pipelines.online.writer import CUSTOMER, OnlineWriter, Row

_SCHEMA = "CREATE TABLE IF NOT EXISTS outbox (id INTEGER PRIMARY KEY, told TEXT NOT NULL);"

Self = TypeVar("Self", bound="MirroredWriter")


class MirroredWriter(OnlineWriter):
    """An OnlineWriter whose rows are in Redis as well once its transaction has ended."""

    def __init__(self, home: Path, *, url: str, schema: str = "", is_durable: bool = True) -> None:
        """See OnlineWriter. `url`: of the Redis. Raises InputError for an address that is none."""
        super().__init__(home, schema=_SCHEMA + schema, is_durable=is_durable)
        self.mirror = RedisWriter(url)

    @contextmanager
    def transaction(self: Self) -> Iterator[Self]:
        """See OnlineWriter. Raises StoreError as well where the file was written and Redis refuses: what is owed stays noted."""
        with super().transaction():
            yield self
        self.deliver()

    def deliver(self) -> None:
        """Send what is owed, in the order in which it was written; one process at a time, or a row could be sent after its removal."""
        with super().transaction():
            owed = self.db.execute("SELECT told FROM outbox ORDER BY id").fetchall()
            if owed:
                with self.mirror.transaction() as mirror:
                    for (told,) in owed:
                        _apply(mirror, json.loads(told))
                self.db.execute("DELETE FROM outbox")

    def write(self, view: str, rows: Iterable[Row], *, join_key: JoinKey = CUSTOMER) -> int:
        """See OnlineWriter."""
        some = list(rows)
        written = super().write(view, some, join_key=join_key)
        if some:
            self._owe("write", view, join_key, [[row.key, dict(row.values), row.event_us] for row in some])
        return written

    def _renewed(self, view: str, rows: Sequence[Row], join_key: JoinKey) -> list[Row]:
        dated = super()._renewed(view, rows, join_key)
        if dated:
            self._owe("write", view, join_key, [[row.key, dict(row.values), row.event_us] for row in dated])
        return dated

    def remove(self, view: str, keys: Sequence[Key], *, join_key: JoinKey = CUSTOMER) -> int:
        """See OnlineWriter."""
        if keys:
            self._owe("remove", view, join_key, list(keys))
        return super().remove(view, keys, join_key=join_key)

    def remove_customers(self, customers: Sequence[str]) -> int:
        """See OnlineWriter."""
        if customers:
            self._owe("forget", "", CUSTOMER, list(customers))
        return super().remove_customers(customers)

    def close(self) -> None:
        """Close the file and the connections."""
        super().close()
        self.mirror.close()

    def _owe(self, what: str, view: str, join_key: JoinKey, told: list[Any]) -> None:
        self.db.execute("INSERT INTO outbox (told) VALUES (?)", (json.dumps([what, view, join_key, told]),))


def _apply(mirror: RedisWriter, told: list[Any]) -> None:
    what, view, names, some = told
    join_key = names if isinstance(names, str) else tuple(names)
    if what == "write":
        mirror.write(view, [Row(_key(key), values, event_us) for key, values, event_us in some], join_key=join_key)
    elif what == "remove":
        mirror.remove(view, [_key(key) for key in some], join_key=join_key)
    else:
        mirror.remove_customers(some)


def _key(key: Any) -> Key:
    return key if isinstance(key, str) else tuple(key)
