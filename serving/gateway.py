"""The ASGI gateway: every request passes here first. In: HTTP. Out: an answer, a refusal in one shape, or BentoML's own page.

Undeclared paths end here, so that no path of a stranger becomes a metric's label. Keys, methods, body size and load are
checked before a body is read; the decision endpoints and the collection of events are answered here, without BentoML's middleware;
documentation, health and metrics fall through to it. Nothing raised below can leave a caller waiting. Never logs a body, a key or an
identifier.
"""

import asyncio
import functools
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol

from serving import access, admission, metrics, tracing, wire
from serving.access import Keys, Route
from serving.access_log import AccessLog
from serving.admission import Gate
from serving.crowd import Crowd, priority_of
from serving.fallbacks import Deadline, trace
from serving.keyring import digest
from serving.rates import Rates
from serving.tracing import Request, Tracer

log = logging.getLogger("rapport.serving")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Handler = Callable[[bytes, Deadline], Awaitable[bytes]]

BODY_TIMEOUT_S = 5.0
DRAINED_BYTES = 4 * 2**20  # of a body beyond its limit that are read and let go, for many callers hear the refusal only once all is sent

_JSON = b"application/json"
_READ = frozenset(
    (b"authorization", b"content-length", b"content-encoding", b"origin", b"access-control-request-method", b"cookie", b"sec-fetch-site")
)
# The page that BentoML serves would load a tracker; the policy keeps a browser from going anywhere else.
_PAGE_POLICY = (
    b"content-security-policy",
    b"default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'",
)
# On every answer, whoever made it: browsers neither guess its kind, nor frame it, nor tell others where they were.
_GUARDS = [(b"x-content-type-options", b"nosniff"), (b"x-frame-options", b"DENY"), (b"referrer-policy", b"no-referrer")]
_NOT_KEPT = (b"cache-control", b"no-store")
_LAST = (b"connection", b"close")
_TLS_ONLY = (b"strict-transport-security", b"max-age=31536000")


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
    """What somebody behind the gateway answers. `headers`: beside those that every answer has."""

    status: int
    body: bytes
    kind: bytes = b"application/json"
    headers: tuple[tuple[bytes, bytes], ...] = ()


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


class Pages(Protocol):
    """Where people of the shop look."""

    async def answer(self, arrival: Arrival, keys: Keys) -> Answer:
        """The page; raises Refused."""


class Gateway:
    """Wraps BentoML's app. `handlers`: the decision endpoints by path, one for each model that scores; `pages`: GET answers of our own,
    by path; `door`: for events; `people`: for requests about one person; `rates`: how much each key may ask for, None: anything;
    `access_log`, `tracer`: who writes about requests, and where their traces go, if anybody does.
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
        console: Pages | None = None,
        rates: Rates | None = None,
        is_tls: bool = False,
        access_log: AccessLog | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self.app, self.handlers, self.pages, self.keys = app, handlers, pages, keys
        self._access_log, self._tracer = access_log, tracer
        self.door, self.people, self.console, self.rates = door, people, console, rates
        self._guards = [*_GUARDS, _TLS_ONLY] if is_tls else _GUARDS
        self.is_loopback_only, self.max_body_bytes, self.deadline_ms = is_loopback_only, max_body_bytes, deadline_ms
        self._models = sorted(path.rpartition("/")[2] for path in handlers if access.is_score(path))
        self.crowd = Crowd(deadline_ms / 1000)
        self.gate = Gate(self.crowd, handlers, self._guards)
        # of an answer with 200, but for its number and length
        self._head = b"".join(b"%b: %b\r\n" % one for one in [_NOT_KEPT, *self._guards, (b"content-type", _JSON)])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI connection: HTTP is answered, websockets are closed, the lifespan is BentoML's."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._serve(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        started, waited_s = time.perf_counter(), self.crowd.arrive()
        request = tracing.begin(self._tracer.begin(scope["headers"]) if self._tracer else None)
        reply = _Reply(send, self._guards, request)
        priority = priority_of(scope["path"])
        try:
            if priority and self.crowd.refuses(priority, waited_s):
                metrics.shed(priority).inc()
                request.refused = "overloaded"
                await reply.send(503, admission.TOO_MANY, admission.LATER)
            else:
                await self._answer(scope, receive, reply, waited_s)
        except Refused as refused:
            request.refused = refused.code
            await reply.send(refused.status, refused.body, refused.header)
        except ClientLeft:
            reply.status = 499
        except Exception as error:
            endpoint = self._endpoint(scope)
            log.error("%s failed with %s", endpoint, trace(error), extra={"endpoint": endpoint})
            if not reply.is_started:
                await reply.send(500, wire.encode_problem("internal", "the service failed on this request; its log has the trace"))
        finally:
            self._note(request, scope, reply.status, self.crowd.leave() - started)

    async def _answer(self, scope: Scope, receive: Receive, reply: "_Reply", waited_s: float) -> None:
        person = access.person_in(_raw_path(scope))
        path = person[0] if person else scope["path"]
        route = access.route_of(path)
        if route is None or (route.need is access.Need.ADMIN and not person):
            raise Refused(404, "not_found", "no such path; the documentation at /docs lists them")
        headers = _headers(scope)
        if route.need is access.Need.COLLECT:
            await self._collect(scope, receive, reply, headers)
            return
        if route.need is access.Need.CONSOLE:
            await self._show(scope, route, receive, reply, headers)
            return
        self._admit(scope, route, headers.get(b"authorization"))
        _expect_method(scope, route)
        if person:
            answer = await self.people.answer(path, scope["method"], person[1], scope["query_string"])
            await reply.send(answer.status, answer.body, kind=answer.kind)
        elif path in self.handlers:
            await self._decide(scope, receive, reply, headers, waited_s)
        elif access.is_score(path):
            raise Refused(404, "not_found", f"no such model; there are: {', '.join(self._models)}", "model")
        elif path in self.pages:
            await reply.send(200, self.pages[path](), is_head=scope["method"] == "HEAD")
        elif path in ("/", "/docs"):
            reply.extra = [_PAGE_POLICY]
            await self.app({**scope, "path": "/", "raw_path": b"/"}, receive, reply.forward)
        else:
            await self.app(scope, receive, reply.forward)

    async def _decide(self, scope: Scope, receive: Receive, reply: "_Reply", headers: Mapping[bytes, bytes], waited_s: float) -> None:
        connection: admission.Admission | None = scope.get(admission.CONNECTION)
        body = await self._body(receive, headers, self.max_body_bytes, is_here=connection is not None)
        try:
            with self.crowd:  # not before the body is here: those who only drip must not keep others out
                deadline = Deadline.after_ms(self.deadline_ms - 1_000 * waited_s, is_crowded=self.crowd.is_crowded)
                answer = await self.handlers[scope["path"]](body, deadline)
        except wire.BadRequest as bad:
            raise Refused(400, bad.code, bad.message, bad.field) from None
        if connection is None or not reply.send_at_once(connection, scope, self._head, answer):
            await reply.send(200, answer)

    async def _collect(self, scope: Scope, receive: Receive, reply: "_Reply", headers: Mapping[bytes, bytes]) -> None:
        reply.extra = self.door.headers_for(headers.get(b"origin"))
        _expect_method(scope, access.ROUTES[scope["path"]])
        read = functools.partial(self._body, receive, headers)
        answer = await self.door.answer(Arrival(scope["path"], scope["method"], headers, scope["query_string"], read), self.keys())
        await reply.send(answer.status, answer.body, kind=answer.kind)

    async def _show(self, scope: Scope, route: Route, receive: Receive, reply: "_Reply", headers: Mapping[bytes, bytes]) -> None:
        _expect_method(scope, route)
        if self.console is None:
            raise Refused(404, "not_found", "this service has no console")
        read = functools.partial(self._body, receive, headers)
        arrival = Arrival(scope["path"], scope["method"], headers, scope["query_string"], read)
        answer = await self.console.answer(arrival, self.keys())
        reply.extra = list(answer.headers)
        await reply.send(answer.status, answer.body, kind=answer.kind, is_head=scope["method"] == "HEAD")

    def _note(self, request: Request, scope: Scope, status: int, took_s: float) -> None:
        """What became of a request, to metrics, log and trace."""
        endpoint = self._endpoint(scope)
        metrics.request(endpoint, str(status)).observe(took_s)
        if self._access_log:
            self._access_log.note(request, endpoint, status, took_s)
        if self._tracer:
            self._tracer.end(request, scope["method"], endpoint, status)

    def _endpoint(self, scope: Scope) -> str:
        """The declared path, so that nobody's name becomes a metric's label or a line of the log."""
        path: str = scope["path"]
        if path in self.handlers:
            return path
        person = access.person_in(_raw_path(scope))
        path = person[0] if person else path
        if path in access.ROUTES:
            return path
        return access.SCORE if access.is_score(path) else "other"

    def _admit(self, scope: Scope, route: Route, authorization: bytes | None) -> None:
        if route.need is access.Need.NOTHING:
            return
        is_local = route.need is access.Need.READ and self.is_loopback_only and access.is_loopback((scope.get("client") or ("", 0))[0])
        key = access.key_in(authorization)
        mine = digest(key)
        role = self.keys().role_of_digest(mine) if key else None
        refusal = access.refuse(route, role, is_local=is_local)
        if refusal:
            header = (b"www-authenticate", b"Bearer") if refusal.status == 401 else None
            raise Refused(refusal.status, refusal.code, refusal.message, header=header)
        wait_s = self.rates.wait_s(mine, time.monotonic()) if self.rates and role else 0.0
        if role and wait_s:
            metrics.rate_limited(role).inc()
            retry = b"%d" % max(1, math.ceil(wait_s))
            raise Refused(429, "rate_limited", "this key asked for more than it may; go on later", header=(b"retry-after", retry))

    async def _body(self, receive: Receive, headers: Mapping[bytes, bytes], limit: int, *, is_here: bool = False) -> bytes:
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit + DRAINED_BYTES:
            raise _too_large(limit)
        if is_here:
            return await _chunks(receive, limit)
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                return await _chunks(receive, limit)
        except TimeoutError:
            raise Refused(408, "body_timeout", f"the body is expected within {BODY_TIMEOUT_S:g} s", header=_LAST) from None


class _Reply:
    """Sends one answer, and remembers whether and with which status it began."""

    def __init__(self, send: Send, guards: list[tuple[bytes, bytes]], request: Request) -> None:
        self._number = request.id.encode()
        self._send, self._guards = send, [*guards, (admission.NUMBER, self._number)]
        self.status, self.is_started = 500, False
        self.extra: list[tuple[bytes, bytes]] = []

    async def send(
        self, status: int, body: bytes, header: tuple[bytes, bytes] | None = None, *, is_head: bool = False, kind: bytes = _JSON
    ) -> None:
        headers = [_NOT_KEPT, *self._guards, *self.extra]
        if status != 204:
            headers += [(b"content-type", kind), (b"content-length", b"%d" % len(body))]
        self.status, self.is_started = status, True
        await self._send({"type": "http.response.start", "status": status, "headers": headers + ([header] if header else [])})
        await self._send({"type": "http.response.body", "body": b"" if is_head else body})

    def send_at_once(self, connection: admission.Admission, scope: Scope, head: bytes, body: bytes) -> bool:
        """Send an answer with 200, in one piece; whether that could be done."""
        if not connection.answer(scope, b"%b%b: %b\r\ncontent-length: %d\r\n" % (head, admission.NUMBER, self._number, len(body)), body):
            return False
        self.status, self.is_started = 200, True
        return True

    async def forward(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self.is_started = message["status"], True
            message = {**message, "headers": [*message.get("headers", []), *self._guards, *self.extra]}
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
        chunk, is_last = message.get("body", b""), not message.get("more_body", False)
        size += len(chunk)
        if size <= limit:
            chunks.append(chunk)
        elif is_last or size > limit + DRAINED_BYTES:
            raise _too_large(limit)
        if is_last:
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _too_large(limit: int) -> Refused:
    return Refused(413, "body_too_large", f"at most {limit} bytes are expected", header=_LAST)


def _raw_path(scope: Scope) -> bytes:
    raw: bytes | None = scope.get("raw_path")  # servers need not give it
    return scope["path"].encode() if raw is None else raw
