"""The collector: the Segment HTTP API -> the durable log. One per worker process.

In: requests of collection as they arrive at the gateway. Out: 200 once every event of the request is on disk; else a refusal that says
whether sending again helps. A batch is answered as Segment does: its good calls are kept, and each bad one is set aside with a reason.
Never keeps an event that it refused, never sets a cookie, and never logs a payload, a key or an identifier.
"""

import asyncio
import base64
import binascii
import contextlib
import functools
import logging
import math
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qsl

import msgspec

from pipelines.errors import StoreError
from pipelines.log import Aside, Log, LogFull, Outcome, QueueFull, Writer, open_log
from pipelines.log.calls import CallError, Calls, parse, write_key
from pipelines.settings import Settings
from pipelines.vault import Vault, open_vault
from serving import access
from serving.access import Keys, Need, Route
from serving.commits import Commits
from serving.fallbacks import trace
from serving.gateway import Answer, Arrival, Refused
from serving.rates import Bucket

log = logging.getLogger("rapport.serving")

INLINE_BYTES = 32 * 1024  # a larger body is parsed beside the event loop, so that a decision never waits for a batch
MAX_HELD_BYTES = 64 * 2**20  # of bodies that are being read, or whose events wait for their commit
COMMIT_TIMEOUT_S = 10.0  # the disk hangs: who waits is told so, and may find the events duplicates when sending again
UNKNOWN = "unknown"  # stands for the source of a request without a valid key
DONE = Answer(200, b'{"success": true}')
GIF = Answer(200, base64.b64decode("R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"), b"image/gif")

_REQUEST_BYTES = 4_096  # that the smallest request takes, its objects included
_ROUTE = Route((), Need.COLLECT)
_CALL_FIELDS = ("type", "event", "name", "userId", "anonymousId", "previousId", "groupId", "messageId", "timestamp", "sentAt")
_ALLOWED = [
    (b"access-control-allow-methods", b"POST, GET"),
    (b"access-control-allow-headers", b"authorization, content-type, content-encoding, x-retry-count"),
    (b"access-control-expose-headers", b"retry-after"),
    (b"access-control-max-age", b"86400"),
]
_VARIES = (b"vary", b"origin")


@dataclass(frozen=True)
class Store:
    """What a collector writes with."""

    log: Log
    writer: Writer
    vault: Vault

    def close(self) -> None:
        """Wait until what was taken is on disk, then close."""
        self.writer.close()
        self.log.close()
        self.vault.close()


def open_store(settings: Settings) -> Store:
    """The home's log and vault. Raises StoreError."""
    vault = open_vault(settings.home, master=settings.master_key)
    events = open_log(settings.home, settings=settings, vault=vault)
    limits = settings.collect
    return Store(events, Writer(events, group_events=limits.group_events, queue_events=limits.queue_events), vault)


class Collector:
    """Where events come in. `open` and `close` at either end of a worker's life, the rest on its event loop."""

    def __init__(
        self,
        settings: Settings,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        open_store: Callable[[Settings], Store] = open_store,
    ) -> None:
        self.settings, self.limits, self.now = settings, settings.collect, now
        self._open_store = open_store
        self._origins = frozenset(origin.rstrip("/").lower().encode() for origin in settings.collect.origins)
        self._buckets: dict[str, Bucket] = {}
        self._held = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="calls")
        self._store: Store | None = None
        self._commits: Commits | None = None

    # -- life

    def open(self) -> None:
        """Open the log, if it is not. Where that fails events are refused until a later call succeeds; never raises."""
        if self._store:
            return
        try:
            self._store = self._open_store(self.settings)
        except Exception as error:  # decisions are still answered
            log.error("the log could not be opened, events are refused for now: %s", trace(error))
            return
        self._commits = Commits(self._store.writer, self.limits, timeout_s=COMMIT_TIMEOUT_S)

    def close(self) -> None:
        """Wait until what was taken is on disk, then let the log go."""
        self._pool.shutdown()
        if self._store:
            self._store.close()
        self._store = self._commits = None

    # -- requests

    def headers_for(self, origin: bytes | None) -> list[tuple[bytes, bytes]]:
        """What a browser is told: may this page send, and see the answer. As https://fetch.spec.whatwg.org/#http-cors-protocol."""
        if not origin or not self._origins:
            return []
        if b"*" in self._origins:
            return [(b"access-control-allow-origin", b"*"), *_ALLOWED]
        return [(b"access-control-allow-origin", origin), *_ALLOWED, _VARIES] if origin.lower() in self._origins else [_VARIES]

    async def answer(self, arrival: Arrival, keys: Keys) -> Answer:
        """Keep what came. Raises Refused: after 429, 503 and 507 sending again helps, after the others it does not."""
        if arrival.method == "OPTIONS":
            return Answer(204, b"")
        source = UNKNOWN
        try:
            key = access.key_in(arrival.headers.get(b"authorization"))
            if key:
                source = self._admit(key, keys)
            with self._holding(arrival):
                body, call, own_key = await self._read(arrival)
                if not key:
                    source = self._admit(own_key, keys)
                await self._keep(body, call, source)
        except Refused as refused:
            _refused(source, refused.code).inc()
            raise
        return GIF if arrival.path == access.PIXEL else DONE

    def _admit(self, key: bytes, keys: Keys) -> str:
        """The source whose key this is. Raises Refused: no such key, a key for something else, too much of late, no log."""
        refusal = access.refuse(_ROUTE, keys.role_of_key(key), is_local=False)
        if refusal:
            header = (b"www-authenticate", b"Bearer") if refusal.status == 401 else None  # Basic would make browsers ask their users
            raise Refused(refusal.status, refusal.code, refusal.message, header=header)
        if self._commits is None:
            raise Refused(503, "log_unavailable", "the log cannot be opened; the service's log says why", header=_retry(5))
        source = keys.source_of(key)
        wait_s = self._bucket(source).wait_s(time.monotonic())
        if wait_s:
            raise Refused(429, "rate_limited", "this source sent more than it may; go on later", header=_retry(wait_s))
        return source

    def _bucket(self, source: str) -> Bucket:
        if source not in self._buckets:
            share = self.settings.serving.workers  # a connection stays with one worker, so each has its share
            self._buckets[source] = Bucket(self.limits.rate_per_s / share, self.limits.burst / share, time.monotonic())
        return self._buckets[source]

    @contextlib.contextmanager
    def _holding(self, arrival: Arrival) -> Iterator[None]:
        """Count the body as held in memory. Raises Refused where that is too much."""
        declared = arrival.headers.get(b"content-length", b"")
        size = int(declared) if declared.isdigit() else self.limits.max_batch_bytes
        size = min(max(size, _REQUEST_BYTES), self.limits.max_batch_bytes)
        if self._held + size > MAX_HELD_BYTES:
            raise Refused(503, "busy", "too many events are being read; send them again", header=_retry(1))
        self._held += size
        try:
            yield
        finally:
            self._held -= size

    async def _read(self, arrival: Arrival) -> tuple[bytes, str, bytes]:
        """The body as plain JSON, the call that it is, and the key in it."""
        if arrival.path == access.PIXEL:
            return _pixel(arrival.query, limit=self.limits.max_event_bytes)
        body = await arrival.read(self.limits.max_batch_bytes)
        body = _unpacked(body, arrival.headers.get(b"content-encoding", b""), limit=self.limits.max_batch_bytes)
        key = b"" if b"authorization" in arrival.headers else write_key(body).encode()
        return body, access.COLLECTION[arrival.path], key

    async def _keep(self, body: bytes, call: str, source: str) -> None:
        """Return once the events are on disk, and the bad calls set aside. Raises Refused."""
        store, commits = self._store, self._commits
        if store is None or commits is None:
            raise Refused(503, "log_unavailable", "the service is ending; send it again", header=_retry(1))
        calls = await self._parsed(body, call, source, store.vault)
        self._bucket(source).take(len(calls.events) + len(calls.refused))
        try:
            outcomes = await commits.kept(calls.events) if calls.events else []
            aside: list[Outcome] = []
            if calls.refused:  # comes second: the sender repeats what fails, and repeated events are known while these are not
                refused = [Aside(source, call.raw, call.reason, call.subjects) for call in calls.refused]
                aside = await asyncio.to_thread(store.log.set_aside, refused)
        except QueueFull:
            raise Refused(503, "queue_full", "more events wait for the disk than may; send them again", header=_retry(1)) from None
        except TimeoutError:
            raise Refused(503, "commit_timeout", f"the disk took more than {COMMIT_TIMEOUT_S:g} s", header=_retry(5)) from None
        except LogFull:
            raise Refused(507, "log_full", "the disk is full; send the events again later", header=_retry(5)) from None
        except StoreError as error:
            log.error("events could not be written: %s", trace(error))
            raise Refused(503, "log_unavailable", "the log could not be written; send them again later", header=_retry(5)) from None
        for outcome in set(outcomes):
            _events(source, outcome.value).inc(outcomes.count(outcome))
        for left, outcome in zip(calls.refused, aside, strict=True):
            if outcome is Outcome.APPENDED:
                _aside(source, left.reason).inc()
            else:  # the same bytes were set aside before
                _events(source, outcome.value).inc()

    async def _parsed(self, body: bytes, call: str, source: str, vault: Vault) -> Calls:
        read = functools.partial(parse, body, call, source=source, received=self.now(), vault=vault, limits=self.limits)
        try:
            if len(body) <= INLINE_BYTES:
                return read()
            return await asyncio.get_running_loop().run_in_executor(self._pool, read)
        except CallError as error:
            raise Refused(error.status, error.code, str(error), error.field) from None


def _unpacked(body: bytes, encoding: bytes, *, limit: int) -> bytes:
    """The body as its sender had it. Unpacking ends at the limit, however small the packed bytes are."""
    encoding = encoding.strip().lower()
    if encoding in (b"", b"identity"):
        return body
    if encoding not in (b"gzip", b"x-gzip"):
        raise Refused(415, "encoding_unknown", "a body without content encoding, or in gzip, is expected", "content-encoding")
    found, rest = b"", body
    try:
        while rest:  # a gzip stream may have several members
            unpacker = zlib.decompressobj(zlib.MAX_WBITS | 16)
            found += unpacker.decompress(rest, limit + 1 - len(found))
            if len(found) > limit:
                raise Refused(413, "too_long", f"a body of at most {limit} bytes once unpacked is expected")
            if not unpacker.eof:
                raise zlib.error
            rest = unpacker.unused_data
    except zlib.error:
        raise Refused(400, "not_gzip", "a whole gzip stream is expected", "content-encoding") from None
    return found


def _pixel(query: bytes, *, limit: int) -> tuple[bytes, str, bytes]:
    """The call that a pixel's address describes: as JSON in `data`, or field by field, the unknown ones being properties."""
    if len(query) > 2 * limit:  # base64, its padding percent-encoded
        raise Refused(413, "too_long", f"an event of at most {limit} bytes is expected")
    fields = dict(parse_qsl(query.decode("latin-1")))
    key = fields.pop("writeKey", "")
    if "data" in fields:
        body = _plain(fields["data"])
        key = key or write_key(body)
        return body, fields.get("type") or _type_in(body), key.encode()
    call = {name: fields.pop(name) for name in _CALL_FIELDS if name in fields}
    kind = call.pop("type", "track" if "event" in call else "page")
    call["traits" if kind in ("identify", "group") else "properties"] = fields  # type: ignore[assignment]
    return msgspec.json.encode(call), kind, key.encode()


def _plain(data: str) -> bytes:
    """base64 in either alphabet, padded or not."""
    text = data.strip().replace(" ", "+").replace("-", "+").replace("_", "/").rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise Refused(400, "not_json", "data: one JSON object in base64url is expected", "data") from None


def _type_in(body: bytes) -> str:
    try:
        return msgspec.json.decode(body, type=_Typed).type
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""  # parse says what is wrong


class _Typed(msgspec.Struct):
    type: str = ""


def _retry(seconds: float) -> tuple[bytes, bytes]:
    return b"retry-after", str(max(1, math.ceil(seconds))).encode()


# Sources are configured, outcomes and reasons are codes: no stranger can make a new series.
@functools.cache
def _events(source: str, outcome: str) -> Any:
    return _counter("rapport_collect_events", "Events answered with success", "outcome").labels(source, outcome)


@functools.cache
def _aside(source: str, reason: str) -> Any:
    return _counter("rapport_collect_set_aside", "Calls of batches that are no events", "reason").labels(source, reason)


@functools.cache
def _refused(source: str, reason: str) -> Any:
    return _counter("rapport_collect_refused", "Requests refused", "reason").labels(source, reason)


@functools.cache
def _counter(name: str, about: str, label: str) -> Any:
    # imported here: the client chooses its multi-process mode on import, from an environment that the server sets
    from prometheus_client import Counter as Series

    return Series(name, about, ["source", label])
