"""The ASGI gateway: every request passes here first. In: HTTP. Out: an answer, a refusal in one shape, or BentoML's own page.

Undeclared paths end here, so that no path of a stranger becomes a metric's label. Keys, methods, body size and load are
checked before a body is read; the decision endpoints are answered here, without BentoML's middleware; documentation, health
and metrics fall through to it. Nothing raised below can leave a caller waiting. Never logs a body, a key or an identifier.
"""

import asyncio
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

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
        self.status, self.body, self.header = status, wire.encode_problem(code, message, field), header


class Gateway:
    """Wraps BentoML's app. `handlers`: the decision endpoints by path; `pages`: GET answers of our own, by path."""

    def __init__(
        self,
        app: App,
        *,
        handlers: Mapping[str, Handler],
        pages: Mapping[str, Callable[[], bytes]],
        keys: Callable[[], Keys],
        is_loopback_only: bool,
        max_body_bytes: int,
        deadline_ms: int,
    ) -> None:
        self.app, self.handlers, self.pages, self.keys = app, handlers, pages, keys
        self.is_loopback_only, self.max_body_bytes, self.deadline_ms = is_loopback_only, max_body_bytes, deadline_ms
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
        self._in_flight += 1
        try:
            await self._answer(scope, receive, reply)
        except Refused as refused:
            await reply.json(refused.status, refused.body, refused.header)
        except ClientLeft:
            reply.status = 499
        except Exception as error:
            log.error("%s failed with %s", scope["path"] if access.route_of(scope["path"]) else "a request", trace(error))
            if not reply.is_started:
                await reply.json(500, wire.encode_problem("internal", "the service failed on this request; its log has the trace"))
        finally:
            self._in_flight -= 1
            _observe(scope["path"], reply.status, time.perf_counter() - started)

    async def _answer(self, scope: Scope, receive: Receive, reply: "_Reply") -> None:
        path = scope["path"]
        route = access.route_of(path)
        if route is None:
            raise Refused(404, "not_found", "no such path; the documentation at /docs lists them")
        headers = _headers(scope)
        self._admit(scope, route, headers.get(b"authorization"))
        if scope["method"] not in route.methods:
            allowed = ", ".join(route.methods)
            raise Refused(405, "method_not_allowed", f"{allowed} is expected here", header=(b"allow", allowed.encode()))
        if path in self.handlers:
            await self._decide(path, receive, reply, headers)
        elif path in self.pages:
            await reply.json(200, self.pages[path](), is_head=scope["method"] == "HEAD")
        elif path in ("/", "/docs"):
            reply.extra = _PAGE_POLICY
            await self.app({**scope, "path": "/", "raw_path": b"/"}, receive, reply.forward)
        else:
            await self.app(scope, receive, reply.forward)

    async def _decide(self, path: str, receive: Receive, reply: "_Reply", headers: Mapping[bytes, bytes]) -> None:
        if self._in_flight > MAX_IN_FLIGHT:
            raise Refused(
                429, "too_many_requests", f"{MAX_IN_FLIGHT} requests are being answered; try again", header=(b"retry-after", b"1")
            )
        body = await self._body(receive, headers)
        try:
            answer = await self.handlers[path](body, Deadline.after_ms(self.deadline_ms))
        except wire.BadRequest as bad:
            raise Refused(400, bad.code, bad.message, bad.field) from None
        await reply.json(200, answer)

    def _admit(self, scope: Scope, route: Route, authorization: bytes | None) -> None:
        if route.need is access.Need.NOTHING:
            return
        is_local = self.is_loopback_only and access.is_loopback((scope.get("client") or ("", 0))[0])
        refusal = access.refuse(route, self.keys().role_of(authorization), is_local=is_local)
        if refusal:
            header = (b"www-authenticate", b"Bearer") if refusal.status == 401 else None
            raise Refused(refusal.status, refusal.code, refusal.message, header=header)

    async def _body(self, receive: Receive, headers: Mapping[bytes, bytes]) -> bytes:
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.max_body_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                return await self._chunks(receive)
        except TimeoutError:
            raise Refused(408, "body_timeout", f"the body is expected within {BODY_TIMEOUT_S:g} s") from None

    async def _chunks(self, receive: Receive) -> bytes:
        chunks, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientLeft
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > self.max_body_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _too_large(self) -> Refused:
        return Refused(413, "body_too_large", f"at most {self.max_body_bytes} bytes are expected", header=(b"connection", b"close"))


class _Reply:
    """Sends one answer, and remembers whether and with which status it began."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status, self.is_started = 500, False
        self.extra: tuple[bytes, bytes] | None = None

    async def json(self, status: int, body: bytes, header: tuple[bytes, bytes] | None = None, *, is_head: bool = False) -> None:
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), (b"cache-control", b"no-store")]
        self.status, self.is_started = status, True
        await self._send({"type": "http.response.start", "status": status, "headers": headers + ([header] if header else [])})
        await self._send({"type": "http.response.body", "body": b"" if is_head else body})

    async def forward(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self.is_started = message["status"], True
            if self.extra:
                message = {**message, "headers": [*message.get("headers", []), self.extra]}
        await self._send(message)


def _headers(scope: Scope) -> dict[bytes, bytes]:
    return {name: value for name, value in scope["headers"] if name in (b"authorization", b"content-length")}


def _observe(path: str, status: int, seconds: float) -> None:
    endpoint = path if path in access.ROUTES else "other"
    _child(endpoint, str(status)).observe(seconds)


@functools.cache
def _child(endpoint: str, code: str) -> Any:
    return _histogram().labels(endpoint, code)


@functools.cache
def _histogram() -> Any:
    # imported here: the client chooses its multi-process mode on import, from an environment that the server sets
    from prometheus_client import Histogram

    return Histogram("rapport_request_seconds", "Seconds from the first byte to the answer", ["endpoint", "code"], buckets=BUCKETS)
