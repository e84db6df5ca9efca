"""One person out of the online store: of the home's file, of Redis, and of what the stream keeps beside.

In: a person's identifiers and customer ids. Out: how much was deleted. Never decides who is who: the caller says under which names.
"""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from pipelines.online.opening import open_stream_writer, open_writer
from pipelines.online.redis_writer import RedisWriter
from pipelines.online.writer import FORMER, IDENTIFIER_VIEW, OnlineWriter
from pipelines.settings import Settings


def erase(home: Path, *, identifiers: Sequence[str], customers: Sequence[str], settings: Settings | None = None) -> int:
    """Delete everything that the online store, and the stream beside it, hold of a person; returns the values deleted.

    No byte of it stays in the file, which is rewritten, or in its write-ahead log; Redis has them in its own files until it rewrites those.
    Entomb first: the stream looks before it writes. Raises StoreError where a store refuses, or a reader keeps the write-ahead log in
    use; nothing happens where there is none.
    """
    if not (home / "feature_store" / "online.db").exists():
        return 0
    names = [*identifiers, *(f"{FORMER}:{customer}" for customer in customers)]
    removed = 0
    if settings is not None and settings.online.redis_url is not None:
        with closing(open_writer(home, settings)) as other:
            removed += _remove(other, names, customers)
    # the stream's own writer: what it owes Redis is sent before the removal, and not after it
    with closing(OnlineWriter(home) if settings is None else open_stream_writer(home, settings)) as online:
        with online.transaction():
            removed += _remove(online, names, customers)
            if online.db.execute("SELECT 1 FROM sqlite_master WHERE name = 'stream_words'").fetchone():
                removed += online.db.executemany("DELETE FROM stream_words WHERE identifier = ?", [(name,) for name in names]).rowcount
        online.sweep()
    return removed


def _remove(online: OnlineWriter | RedisWriter, names: Sequence[str], customers: Sequence[str]) -> int:
    led = [name for some in online.identifiers_of(customers).values() for name in some] if online.has(IDENTIFIER_VIEW) else []
    removed = online.remove_customers(customers)
    if online.has(IDENTIFIER_VIEW):
        removed += online.remove(IDENTIFIER_VIEW, [*names, *led], join_key="identifier")
    return removed
