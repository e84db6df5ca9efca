"""A Redis stream as a port: one entry an event, one consumer group for each group of readers.

In: entries with the field `body`, ours or any program's; of an entry without it the fields are the call. Out: events; what a consumer
held that fell silent goes to the next one. An event is as durable as the server makes it: `appendonly yes` with `appendfsync always`
has it on disk before the answer, `everysec` may lose the last second in a power cut, and without the append-only file a restart loses
everything (a warning says so).
Never deletes an entry, except in `trim`. Commands: https://redis.io/docs/latest/commands/?group=stream
"""

import contextlib
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from pipelines.edges import envelope
from pipelines.errors import StoreError
from pipelines.log.port import Incoming, Logged, Outcome, Position
from pipelines.settings import EdgeSettings

BODY = b"body"
_CLAIMED_AT_ONCE = 100
_ANSWER_S = 10.0  # a server that is silent for longer counts as gone
_LONG_AGO_MS = 86_400_000
_FIRST = "0-0"

_log = logging.getLogger("rapport.edges")


class RedisStreams:
    """The stream `name` of a Redis server, 6.2 or newer."""

    name = "redis"

    def __init__(self, edges: EdgeSettings) -> None:
        if edges.redis_url is None:
            raise ValueError("redis_url is not set")
        self._stream, self._takeover_ms = edges.name, int(edges.takeover_s * 1_000)
        self._consumer = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._redis = redis.Redis.from_url(
            edges.redis_url.get_secret_value(),
            socket_timeout=_ANSWER_S,
            socket_connect_timeout=_ANSWER_S,
            retry=Retry(NoBackoff(), 1),  # once, for a connection that went stale; whoever calls decides on the rest
        )
        self._groups: set[str] = set()
        self._claims_at: dict[str, float] = {}
        self._is_checked = False

    def append(self, events: Sequence[Incoming]) -> list[Outcome]:
        """As Port.append, all or none. A broker does not know what it had before: every outcome is APPENDED."""
        with self._refusals():
            self._warn_if_volatile()
            with self._redis.pipeline(transaction=True) as several:
                for event in events:
                    several.xadd(self._stream, _fields(event.payload, envelope.headers(event)))
                several.execute()
        return [Outcome.APPENDED] * len(events)

    def read(self, group: str, *, max_events: int, wait_s: float = 0.0) -> list[Logged]:
        """As Port.read. What anybody of the group has held for longer than the time of a takeover comes first."""
        until = time.monotonic() + wait_s
        with self._refusals():
            while True:
                left = max(0.0, until - time.monotonic())
                try:
                    events = self._next(group, max_events, min(left, self._takeover_ms / 5_000))
                except redis.ResponseError as error:
                    if not str(error).startswith("NOGROUP"):
                        raise
                    self._groups.discard(group)  # the server came back without its data, or somebody removed the stream
                    events = self._next(group, max_events, 0.0)
                if events or time.monotonic() >= until:
                    return events

    def commit(self, group: str, positions: Sequence[Position]) -> None:
        """As Port.commit."""
        if positions:
            with self._refusals():
                self._redis.xack(self._stream, group, *[str(position) for position in positions])

    def park(self, group: str, event: Logged, reason: str) -> None:
        """As Port.park: into the stream `name`.dead."""
        with self._refusals(), self._redis.pipeline(transaction=True) as both:
            both.xadd(self._stream + envelope.DEAD, _fields(event.payload, envelope.aside(event, reason)))
            both.xack(self._stream, group, str(event.position))
            both.execute()

    def trim(self, *, before_us: int) -> int:
        """As Port.trim; when an entry was received is told by its id. What no group reads is kept."""
        with self._refusals():
            groups: Any = self._redis.xinfo_groups(self._stream) if self._redis.exists(self._stream) else []
            if not groups:
                return 0
            floor = min([(before_us // 1_000, 0), *(self._first_open(found) for found in groups)])
            removed: Any = self._redis.xtrim(self._stream, minid=f"{floor[0]}-{floor[1]}", approximate=False)
            return int(removed)

    def close(self) -> None:
        """As Port.close. A server that is away is left as it is: its group hands the work over by itself."""
        with contextlib.suppress(redis.RedisError):
            for group in self._groups:
                self._hand_over(group)
        self._redis.close()

    # -- private

    def _next(self, group: str, max_events: int, wait_s: float) -> list[Logged]:
        self._ensure(group)
        events = self._taken_over(group, max_events)
        if len(events) < max_events:
            events += self._fresh(group, max_events - len(events), 0.0 if events else wait_s)
        return events

    def _ensure(self, group: str) -> None:
        if group not in self._groups:
            self._warn_if_volatile()
            with contextlib.suppress(redis.ResponseError):  # BUSYGROUP: it is there
                self._redis.xgroup_create(self._stream, group, id="0", mkstream=True)
            self._groups.add(group)

    def _fresh(self, group: str, count: int, wait_s: float) -> list[Logged]:
        block = max(1, int(wait_s * 1_000)) if wait_s > 0 else None  # 0 would wait for ever
        found: Any = self._redis.xreadgroup(group, self._consumer, {self._stream: ">"}, count=count, block=block)
        return [self._logged(entry, fields, 0) for _, entries in found or [] for entry, fields in entries]

    def _taken_over(self, group: str, count: int) -> list[Logged]:
        """What was held for too long, this consumer's own work included; looked for five times in the time of a takeover."""
        if time.monotonic() < self._claims_at.get(group, 0.0):
            return []
        claimed: list[tuple[bytes, dict[bytes, bytes]]] = []
        cursor, gone = _FIRST, 0
        while len(claimed) < count:
            some = min(_CLAIMED_AT_ONCE, count - len(claimed))
            answer: Any = self._redis.xautoclaim(self._stream, group, self._consumer, self._takeover_ms, cursor, count=some)
            cursor, entries, lost = answer[0].decode(), answer[1], answer[2] if len(answer) > 2 else []
            claimed += [(entry, fields) for entry, fields in entries if fields is not None]
            gone += len(lost)
            if cursor == _FIRST:
                self._claims_at[group] = time.monotonic() + self._takeover_ms / 5_000
                break
        if gone:
            _log.warning("redis: %d entries were deleted by somebody else before they were committed", gone)
        return [self._logged(entry, fields, tries) for (entry, fields), tries in zip(claimed, self._tries(group, claimed), strict=True)]

    def _tries(self, group: str, claimed: Sequence[tuple[bytes, Any]]) -> list[int]:
        """How often each was given before this time."""
        with self._redis.pipeline(transaction=False) as several:
            for entry, _ in claimed:
                several.xpending_range(self._stream, group, min=entry, max=entry, count=1)
            return [found[0]["times_delivered"] - 1 if found else 0 for found in several.execute()]

    def _logged(self, entry: bytes, fields: Mapping[bytes, bytes], tries: int) -> Logged:
        at, given = entry.decode(), {name.decode(errors="replace"): value.decode(errors="replace") for name, value in fields.items()}
        body = fields.get(BODY)
        return envelope.logged(
            at,
            json.dumps(given).encode() if body is None else body,
            {} if body is None else given,
            edge=self.name,
            known_as=f"redis:{self._stream}:{at}",
            received_us=int(at.partition("-")[0]) * 1_000 + 999,
            tries=tries,
        )

    def _first_open(self, group: Mapping[str, Any]) -> tuple[int, int]:
        """The id of the first entry that the group has not committed."""
        if group["pending"]:
            pending: Any = self._redis.xpending(self._stream, group["name"])
            if pending["pending"]:
                return _ordered(pending["min"])
        at, nth = _ordered(group["last-delivered-id"])
        return at, nth + 1

    def _hand_over(self, group: str) -> None:
        """Make what this consumer holds look old, so that the next reader takes it at once; a consumer with nothing is removed."""
        start, held = "-", 0
        while True:
            pending: Any = self._redis.xpending_range(
                self._stream, group, min=start, max="+", count=_CLAIMED_AT_ONCE, consumername=self._consumer
            )
            if not pending:
                break
            ids = [one["message_id"] for one in pending]
            self._redis.xclaim(self._stream, group, self._consumer, 0, ids, idle=_LONG_AGO_MS, justid=True)
            start, held = "(" + ids[-1].decode(), held + len(ids)
        if not held:
            self._redis.xgroup_delconsumer(self._stream, group, self._consumer)

    def _warn_if_volatile(self) -> None:
        if self._is_checked:
            return
        self._is_checked = True
        with contextlib.suppress(redis.ResponseError):  # an account may be forbidden to ask
            persistence: Any = self._redis.info("persistence")
            if not persistence.get("aof_enabled"):
                _log.warning("redis: the server keeps no append-only file, so its restart loses events; set `appendonly yes` there")

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except redis.RedisError as error:
            raise StoreError(
                f"redis: the stream {self._stream!r} was expected to answer, found {type(error).__name__}; is the server up, and may this "
                "account use the stream?"
            ) from error


def _fields(body: bytes, headers: Mapping[str, str]) -> dict[Any, Any]:
    return {BODY: body, **headers}


def _ordered(entry: bytes | str) -> tuple[int, int]:
    at, _, nth = (entry.decode() if isinstance(entry, bytes) else entry).partition("-")
    return int(at), int(nth)
