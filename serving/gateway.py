"""The ASGI gateway: every request passes here first. In: HTTP. Out: an answer, a refusal in one shape, or BentoML's own page.

Undeclared paths end here, so that no path of a stranger becomes a metric's label. Keys, methods, body size and load are
checked before a body is read; the decision endpoints and the collection of events are answered here, without BentoML's middleware;
documentation, health and metrics fall through to it. Nothing raised below can leave a caller waiting. Never logs a body, a key or an
identifier.
"""

import asyncio
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol

from serving import access, wire
from serving.access import Keys, Route
from serving.fallbacks import Deadline, trace

log = logging.getLogger("rapport.serving")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Handler = Callable[[bytes, Deadline], Awaitable[bytes]]

BODY_TIMEOUT_S = 5.0
MAX_IN_FLIGHT = 128
BUCKETS = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0)

_JSON = b"application/json"
_READ = frozenset((b"authorization", b"content-length", b"content-encoding", b"origin", b"access-control-request-method"))
# The page that BentoML serves would load a tracker; the policy keeps a browser from going anywhere else.
_PAGE_POLICY = (b"content-security-policy", b"default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:")


class ClientLeft(Exception):
    """The caller closed the connection before the body was complete."""


class Refused(Exception):
    """The request goes no further: status, body, headers."""

    def __init__(
        self, status: int, code: str, message: str, field: str | None = None, *, header: tuple[bytes, bytes] | None = None
    ) -> None:
        super().__init__(code)
        self.status, self.code, self.body, self.header = status, code, wire.encode_problem(code, message, field), header


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request of collection as it came: its body is still on the way. `read`: the body, refused beyond so many bytes."""

    path: str
    method: str
    headers: Mapping[bytes, bytes]
    query: bytes
    read: Callable[[int], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class Answer:
    """What collection answers."""

    status: int
    body: bytes
    kind: bytes = b"application/json"


class Door(Protocol):
    """Where events come in."""

    def headers_for(self, origin: bytes | None) -> list[tuple[bytes, bytes]]:
        """What every answer says to a browser whose page is from this origin."""

    async def answer(self, arrival: Arrival, keys: Keys) -> Answer:
        """Keep what came; raises Refused."""


class Desk(Protocol):
    """Where requests about one person are answered."""

    async def answer(self, path: str, method: str, name: str, query: bytes) -> Answer:
        """Answer for the person of this name; raises Refused."""


class Gateway:
    """Wraps BentoML's app. `handlers`: the decision endpoints by path, one for each model that scores; `pages`: GET answers of our own,
    by path; `door`: for events; `people`: for requests about one person.
    """

    def __init__(
        self,
        app: App,
        *,
        handlers: Mapping[str, Handler],
        pages: Mapping[str, Callable[[], bytes]],
        door: Door,
        people: Desk,
        keys: Callable[[], Keys],
        is_loopback_only: bool,
        max_body_bytes: int,
        deadline_ms: int,
    ) -> None:
        self.app, self.handlers, self.pages, self.keys = app, handlers, pages, keys
        self.door, self.people = door, people
        self.is_loopback_only, self.max_body_bytes, self.deadline_ms = is_loopback_only, max_body_bytes, deadline_ms
        self._models = sorted(path.rpartition("/")[2] for path in handlers if access.is_score(path))
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI connection: HTTP is answered, websockets are closed, the lifespan is BentoML's."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._serve(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        reply = _Reply(send)
        try:
            await self._answer(scope, receive, reply)
        except Refused as refused:
            await reply.send(refused.status, refused.body, refused.header)
        except ClientLeft:
            reply.status = 499
        except Exception as error:
            log.error("%s failed with %s", self._endpoint(scope), trace(error))
            if not reply.is_started:
                await reply.send(500, wire.encode_problem("internal", "the service failed on this request; its log has the trace"))
        finally:
            _observe(self._endpoint(scope), reply.status, time.perf_counter() - started)

    async def _answer(self, scope: Scope, receive: Receive, reply: "_Reply") -> None:
        person = access.person_in(_raw_path(scope))
        path = person[0] if person else scope["path"]
        route = access.route_of(path)
        if route is None or (route.need is access.Need.ADMIN and not person):
            raise Refused(404, "not_found", "no such path; the documentation at /docs lists them")
        headers = _headers(scope)
        if route.need is access.Need.COLLECT:
            await self._collect(scope, receive, reply, headers)
            return
        self._admit(scope, route, headers.get(b"authorization"))
        _expect_method(scope, route)
        if person:
            answer = await self.people.answer(path, scope["method"], person[1], scope["query_string"])
            await reply.send(answer.status, answer.body, kind=answer.kind)
        elif path in self.handlers:
            await self._decide(path, receive, reply, headers)
        elif access.is_score(path):
            raise Refused(404, "not_found", f"no such model; there are: {', '.join(self._models)}", "model")
        elif path in self.pages:
            await reply.send(200, self.pages[path](), is_head=scope["method"] == "HEAD")
        elif path in ("/", "/docs"):
            reply.extra = [_PAGE_POLICY]
            await self.app({**scope, "path": "/", "raw_path": b"/"}, receive, reply.forward)
        else:
            await self.app(scope, receive, reply.forward)

    async def _decide(self, path: str, receive: Receive, reply: "_Reply", headers: Mapping[bytes, bytes]) -> None:
        if self._in_flight >= MAX_IN_FLIGHT:
            raise Refused(
                429, "too_many_requests", f"{MAX_IN_FLIGHT} requests are being answered; try again", header=(b"retry-after", b"1")
            )
        self._in_flight += 1
        try:
            body = await self._body(receive, headers, self.max_body_bytes)
            answer = await self.handlers[path](body, Deadline.after_ms(self.deadline_ms))
        except wire.BadRequest as bad:
            raise Refused(400, bad.code, bad.message, bad.field) from None
        finally:
            self._in_flight -= 1
        await reply.send(200, answer)

    async def _collect(self, scope: Scope, receive: Receive, reply: "_Reply", headers: Mapping[bytes, bytes]) -> None:
        reply.extra = self.door.headers_for(headers.get(b"origin"))
        _expect_method(scope, access.ROUTES[scope["path"]])
        read = functools.partial(self._body, receive, headers)
        answer = await self.door.answer(Arrival(scope["path"], scope["method"], headers, scope["query_string"], read), self.keys())
        await reply.send(answer.status, answer.body, kind=answer.kind)

    def _endpoint(self, scope: Scope) -> str:
        """The declared path, so that nobody's name becomes a metric's label or a line of the log."""
        person = access.person_in(_raw_path(scope))
        path: str = person[0] if person else scope["path"]
        if path in access.ROUTES or path in self.handlers:
            return path
        return access.SCORE if access.is_score(path) else "other"

    def _admit(self, scope: Scope, route: Route, authorization: bytes | None) -> None:
        if route.need is access.Need.NOTHING:
            return
        is_local = self.is_loopback_only and access.is_loopback((scope.get("client") or ("", 0))[0])
        refusal = access.refuse(route, self.keys().role_of(authorization), is_local=is_local)
        if refusal:
            header = (b"www-authenticate", b"Bearer") if refusal.status == 401 else None
            raise Refused(refusal.status, refusal.code, refusal.message, header=header)

    async def _body(self, receive: Receive, headers: Mapping[bytes, bytes], limit: int) -> bytes:
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit:
            raise _too_large(limit)
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                return await _chunks(receive, limit)
        except TimeoutError:
            raise Refused(408, "body_timeout", f"the body is expected within {BODY_TIMEOUT_S:g} s") from None


class _Reply:
    """Sends one answer, and remembers whether and with which status it began."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status, self.is_started = 500, False
        self.extra: list[tuple[bytes, bytes]] = []

    async def send(
        self, status: int, body: bytes, header: tuple[bytes, bytes] | None = None, *, is_head: bool = False, kind: bytes = _JSON
    ) -> None:
        headers = [(b"cache-control", b"no-store"), *self.extra]
        if status != 204:
            headers += [(b"content-type", kind), (b"content-length", b"%d" % len(body))]
        self.status, self.is_started = status, True
        await self._send({"type": "http.response.start", "status": status, "headers": headers + ([header] if header else [])})
        await self._send({"type": "http.response.body", "body": b"" if is_head else body})

    async def forward(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self.is_started = message["status"], True
            if self.extra:
                message = {**message, "headers": [*message.get("headers", []), *self.extra]}
        await self._send(message)


def _headers(scope: Scope) -> dict[bytes, bytes]:
    return {name: value for name, value in scope["headers"] if name in _READ}


def _expect_method(scope: Scope, route: Route) -> None:
    if scope["method"] not in route.methods:
        allowed = ", ".join(route.methods)
        raise Refused(405, "method_not_allowed", f"{allowed} is expected here", header=(b"allow", allowed.encode()))


async def _chunks(receive: Receive, limit: int) -> bytes:
    chunks, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > limit:
            raise _too_large(limit)
        if not message.get("more_body", False):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _too_large(limit: int) -> Refused:
    return Refused(413, "body_too_large", f"at most {limit} bytes are expected", header=(b"connection", b"close"))


def _raw_path(scope: Scope) -> bytes:
    raw: bytes | None = scope.get("raw_path")  # servers need not give it
    return scope["path"].encode() if raw is None else raw


def _observe(endpoint: str, status: int, seconds: float) -> None:
    _child(endpoint, str(status)).observe(seconds)


@functools.cache
def _child(endpoint: str, code: str) -> Any:
    return _histogram().labels(endpoint, code)


@functools.cache
def _histogram() -> Any:
    # imported here: the client chooses its multi-process mode on import, from an environment that the server sets
    from prometheus_client import Histogram

    return Histogram("rapport_request_seconds", "Seconds from the first byte to the answer", ["endpoint", "code"], buckets=BUCKETS)
