"""A plain Redis server as the online store: connection, scripts, and how Feast is told of it.

In: a redis:// or rediss:// address. Out: replies to commands that are sent many at a time. Never knows what a row is.
"""

from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import unquote, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from pipelines.errors import InputError, StoreError

Part = bytes | str | int

TIMEOUT_S = 10.0
_AT_ONCE = 1_000  # commands that are sent before their replies are read: the server holds these


class RedisServer:
    """Commands of one thread. A connection that was lost is made anew by the next call."""

    def __init__(self, url: str, *, timeout_s: float = TIMEOUT_S) -> None:
        """Connects at the first command. Raises InputError for an address that is none."""
        try:
            self.client = redis.Redis.from_url(
                url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=Retry(NoBackoff(), 0), protocol=2
            )
        except ValueError as error:
            raise InputError(
                f"online store: a Redis address like redis://host:6379/0 was expected ({error}); mend online.redis_url"
            ) from None
        kept = self.client.connection_pool.connection_kwargs
        self.name = f"Redis at {kept.get('host', 'localhost')}:{kept.get('port', 6379)}"  # never the address: it may hold a password

    def send(self, commands: Sequence[bytes]) -> list[Any]:
        """The replies to packed commands, in order. Raises StoreError where the server does not answer, or refuses one of them."""
        try:
            connection = self.client.connection_pool.get_connection()
        except (redis.RedisError, OSError) as error:
            raise self._failure(error) from error
        try:
            replies: list[Any] = []
            for start in range(0, len(commands), _AT_ONCE):
                some = commands[start : start + _AT_ONCE]
                connection.send_packed_command([b"".join(some)], check_health=False)
                replies += [connection.read_response() for _ in some]
            return replies
        except (redis.RedisError, OSError) as error:
            connection.disconnect()  # replies that were not read would be taken for the next ones
            raise self._failure(error) from error
        except BaseException:
            connection.disconnect()
            raise
        finally:
            self.client.connection_pool.release(connection)

    def together(self, commands: Sequence[bytes]) -> list[Any]:
        """The same, seen by others all at once."""
        replies: list[Any] = self.send([pack("MULTI"), *commands, pack("EXEC")])[-1]
        failed = next((reply for reply in replies if isinstance(reply, Exception)), None)
        if failed is not None:
            raise self._failure(failed) from failed
        return replies

    def keys(self, prefix: bytes, suffix: bytes, *, page: int = 1_000) -> Iterable[list[bytes]]:
        """The keys that begin and end so, page by page; one that comes or goes meanwhile may be there or not."""
        pattern, cursor = escaped(prefix) + b"*" + escaped(suffix), b"0"
        while True:
            cursor, found = self.send([pack("SCAN", cursor, "MATCH", pattern, "COUNT", page)])[0]
            if found:
                yield sorted(set(found))
            if cursor == b"0":
                return

    def close(self) -> None:
        """Close the connections."""
        self.client.close()

    def _failure(self, error: Exception) -> StoreError:
        return StoreError(f"online store: {self.name} did not do what it was asked ({type(error).__name__}: {error}); start or mend it")


def pack(*parts: Part) -> bytes:
    """A command in the server's protocol."""
    return b"*%d\r\n" % len(parts) + b"".join([piece(part) for part in parts])


def piece(part: Part) -> bytes:
    """One part of a command."""
    data = part if isinstance(part, bytes) else str(part).encode()
    return b"$%d\r\n%b\r\n" % (len(data), data)


def escaped(text: bytes) -> bytes:
    """A text as SCAN's patterns have it. The lengths within Feast's keys may be any byte, a star's too."""
    return b"".join(b"\\" + bytes([c]) if c in b"*?[]\\^" else bytes([c]) for c in text)


def feast_connection(url: str) -> str:
    """The address as Feast's configuration has it: host:port,db=0,... Raises InputError for what it cannot say."""
    read = urlsplit(url)
    if read.scheme not in ("redis", "rediss") or not read.hostname:
        raise InputError("online store: a Redis address like redis://host:6379/0 was expected; mend online.redis_url")
    named = {"db": read.path.strip("/") or "0", "username": read.username, "password": read.password}
    given = {name: unquote(value) for name, value in named.items() if value}
    if any("," in value for value in given.values()):
        raise InputError("online store: Feast cannot be told of a Redis user or password with a comma; choose another in online.redis_url")
    options = [f"{name}={value}" for name, value in given.items()] + (["ssl=true"] if read.scheme == "rediss" else [])
    return ",".join([f"{read.hostname}:{read.port or 6379}", *options])
