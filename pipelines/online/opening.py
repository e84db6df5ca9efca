"""The writer of the online store that the settings name: of the home's SQLite file, of Redis, or of both.

Redis's client is loaded only where a Redis is named.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.online.writer import OnlineWriter
from pipelines.settings import Settings

if TYPE_CHECKING:
    from pipelines.online.redis_writer import RedisWriter


def open_writer(home: Path, settings: Settings | None = None) -> "OnlineWriter | RedisWriter":
    """Of the store that features are served from: Redis, or the home's file; without settings the file."""
    if settings is None or settings.online.redis_url is None:
        return OnlineWriter(home)
    from pipelines.online.redis_writer import RedisWriter

    return RedisWriter(settings.online.redis_url.get_secret_value())


def open_stream_writer(home: Path, settings: Settings, *, schema: str = "", is_durable: bool = True) -> OnlineWriter:
    """Of the stream: of the home's file, and of the Redis that the settings name."""
    if settings.online.redis_url is None:
        return OnlineWriter(home, schema=schema, is_durable=is_durable)
    from pipelines.online.outbox import MirroredWriter

    return MirroredWriter(home, url=settings.online.redis_url.get_secret_value(), schema=schema, is_durable=is_durable)
