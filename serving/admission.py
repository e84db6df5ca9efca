"""Admission: where more requests are read than can be answered in time, the rest is turned away before anything is made of them.

In: what a connection received. Out: the same to uvicorn, or at once a refusal that was written beforehand. A request that was parsed, made
a task and given to the application has cost a good part of an answer before it is refused there; at ten times the load nothing would be
left for answers. Only a whole request that came in one piece is turned away here, on a connection that owes no answer; all others go
their usual way, and the gateway decides. What is no request, and a head that is too long or does not come to its end, is refused here too,
for the gateway never sees it. Never looks at a body, and never breaks the order of answers.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from http import HTTPStatus
from typing import Any

import uvicorn.config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serving import metrics, tracing, wire
from serving.crowd import Crowd, priority_of

log = logging.getLogger("rapport.serving")

QUIET_S = 10.0  # between two lines of the log about those who were turned away
HEAD_BYTES = 64 * 1024  # that a request's line and headers may have together
HEAD_S = 10.0  # within which they are to come
TOO_MANY = wire.encode_problem("overloaded", "more requests come than can be answered in time; try again later")
LATER = (b"retry-after", b"1")
NUMBER = b"x-request-id"
CONNECTION = "rapport.connection"  # in the scope of a request that is here as a whole: the Admission that it came by

_ENDS = b"\r\n\r\n"
_LENGTH = b"\r\ncontent-length:"
_NOT_PLAIN = (b"\r\ntransfer-encoding:", b"\r\nexpect:", b"\r\nupgrade:", b"\r\nconnection: close", b"\r\nconnection:close")
_LAST = (b"connection", b"close")
_NO_REQUEST = {  # what is told to those whose request does not become one
    400: (
        "invalid_http",
        "one request of HTTP/1.1 after the other is expected; over TLS where the service has a certificate, else without",
    ),
    408: ("head_timeout", f"the request's line and headers are expected within {HEAD_S:g} s"),
    431: ("head_too_large", f"the request's line and headers are expected to have at most {HEAD_BYTES} bytes"),
}

Header = tuple[bytes, bytes]


class Gate:
    """Who may pass: one per worker. paths: those whose requests may be turned away; guards: headers that every answer has."""

    def __init__(self, crowd: Crowd, paths: Iterable[str], guards: Sequence[Header] = ()) -> None:
        self.crowd = crowd
        self.refusal = written(503, TOO_MANY, [*guards, LATER])
        self._no_request = {status: written(status, wire.encode_problem(*told), [*guards, _LAST]) for status, told in _NO_REQUEST.items()}
        self._kinds = {f"POST {path}".encode(): (path, priority) for path in paths if (priority := priority_of(path))}
        self._turned_away: Counter[bytes] = Counter()
        self._untold, self._told_at = 0, float("-inf")

    def no_request(self, status: int, told: Sequence[Header]) -> bytes:
        """What is answered where no request was recognised, with the headers that the server tells in every answer."""
        metrics.request("other", str(status)).observe(0.0)
        return self._no_request[status](told)

    def turns_away(self, asked: bytes) -> bool:
        """Whether a request that was read is to have the refusal. asked: its method and path, as b"POST /churn"."""
        kind = self._kinds.get(asked)
        if kind is None or self.crowd.lets_in(kind[1]):
            return False
        if not self._turned_away:
            asyncio.get_running_loop().call_soon(self._tell)
        self._turned_away[asked] += 1
        return True

    def _tell(self) -> None:
        """All that were read in one go together: a metric for each would cost as much as the refusal."""
        for asked, n in self._turned_away.items():
            path, priority = self._kinds[asked]
            metrics.shed(priority).inc(n)
            metrics.turned_away(path, n)
            self._untold += n
        self._turned_away.clear()
        now = time.monotonic()
        if now - self._told_at >= QUIET_S:
            log.warning("%d requests were turned away: more come than can be answered in time", self._untold)
            self._untold, self._told_at = 0, now


class Admission(HttpToolsProtocol):
    """One connection to the gateway."""

    def __init__(self, config: uvicorn.config.Config, *given: Any, **named: Any) -> None:
        super().__init__(config, *given, **named)
        self._gate: Gate | None = getattr(config.app, "gate", None)  # of a Gateway; another application has none
        self._is_refused = False  # since it was last looked at whether the connection is idle
        self._whole_head, self._whole_bytes = b"", 0  # of the last whole request that was looked at: callers repeat themselves
        self._head_bytes = 0  # of a head that has begun and not come to its end
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See HttpToolsProtocol: whoever connects is to ask for something."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """See HttpToolsProtocol."""
        self._head_came()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Turn the request away where the line is too long for its kind; else have it parsed."""
        gate = self._gate
        if gate is not None:
            if gate.crowd.is_long and self._is_between_requests() and self._is_whole(data) and gate.turns_away(data[: data.find(b" ", 5)]):
                self._is_refused = True
                self.transport.write(gate.refusal(self.server_state.default_headers))
                return
            gate.crowd.stand_in_line()
        super().data_received(data)
        if self._is_in_head():
            self._bound_head(len(data))
        elif self._head_timer is not None and not self._is_unwatched():
            self._head_came()

    def on_response_complete(self) -> None:
        """See HttpToolsProtocol: whoever was refused before all of their body came has some time for the rest, which nobody reads."""
        super().on_response_complete()
        if self.cycle.more_body and self._head_timer is None and not self.transport.is_closing():
            self._await_head()

    def on_message_complete(self) -> None:
        """See HttpToolsProtocol. Whoever answers finds in the scope that nothing more of the request is to come."""
        super().on_message_complete()
        self.scope[CONNECTION] = self  # type: ignore[literal-required]

    def answer(self, scope: object, head: bytes, body: bytes) -> bool:
        """Send a whole answer with 200 to the request of this scope; whether that was done: not where uvicorn has more to do for it.

        head: its headers, each with its end. Uvicorn would take it in two pieces, and look at every header with two patterns.
        """
        cycle = self.cycle
        if cycle.scope is not scope or cycle.response_started or cycle.disconnected or not cycle.keep_alive or self.flow.write_paused:
            return False
        told = [b"%b: %b\r\n" % one for one in self.server_state.default_headers]
        self.transport.write(b"".join((STATUS_LINE[200], *told, head, b"\r\n", body)))
        cycle.response_started = cycle.response_complete = True
        cycle.message_event.set()
        cycle.on_response()
        return True

    def send_400_response(self, msg: str) -> None:
        """See HttpToolsProtocol: in the words that all refusals have."""
        if self._gate is None:
            super().send_400_response(msg)
        else:
            self._end(400)

    def timeout_keep_alive_handler(self) -> None:
        """See HttpToolsProtocol: who was refused meanwhile was not idle."""
        if not self._is_refused:
            super().timeout_keep_alive_handler()
            return
        self._is_refused = False
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _should_upgrade(self) -> bool:
        return False  # what asks for another protocol is answered in this one (RFC 9110, 7.8)

    def _unsupported_upgrade_warning(self) -> None:
        pass

    def _is_between_requests(self) -> bool:
        cycle = self.cycle
        if cycle is None:
            return self.scope is None
        # a request that began has a scope that is not yet a cycle's
        return cycle.response_complete and not cycle.more_body and cycle.scope is self.scope and not self.flow.write_paused

    def _is_whole(self, data: bytes) -> bool:
        if len(data) == self._whole_bytes and data.startswith(self._whole_head):
            return True
        if not is_whole(data):
            return False
        self._whole_head, self._whole_bytes = data[: data.find(_ENDS) + len(_ENDS)], len(data)
        return True

    def _is_in_head(self) -> bool:
        return self.scope is not None and (self.cycle is None or self.cycle.scope is not self.scope)

    def _is_unwatched(self) -> bool:
        """Whether the answer is given, and no timer ends an idle connection: uvicorn stops it with the next byte, of whatever that is."""
        return self.cycle is not None and self.cycle.response_complete and self.timeout_keep_alive_task is None

    def _bound_head(self, n_bytes: int) -> None:
        self._head_bytes += n_bytes
        if self._head_bytes > HEAD_BYTES:
            self._end(431)
        elif self._head_timer is None:
            self._await_head()

    def _await_head(self) -> None:
        if self._gate is not None:
            self._head_timer = self.loop.call_later(HEAD_S, self._head_is_late)

    def _head_came(self) -> None:
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._is_in_head():
            self._end(408)
        elif self._is_refused:
            self._is_refused = False
            self._await_head()
        elif self.cycle is None or self._is_unwatched():  # nothing ever came, or no end of what was answered long ago
            self.transport.close()

    def _end(self, status: int) -> None:
        """Refuse what never became a request: what follows on this connection cannot be told from it. Where the answer to an earlier one is
        owed, this would be taken for it, and the connection ends without a word.
        """
        if self._gate is None or self.transport.is_closing():
            return
        cycle = self.cycle
        is_its_own = (
            cycle is None
            or cycle.response_complete
            or (cycle.scope is self.scope and cycle.more_body and not cycle.response_started and not self.pipeline)
        )
        if is_its_own:
            self.transport.write(self._gate.no_request(status, self.server_state.default_headers))
        self.transport.close()


def is_whole(data: bytes) -> bool:
    """Whether these bytes are one request of HTTP/1.1 from its first byte to its last, after which the connection stays open."""
    ends = data.find(_ENDS)
    if ends < 0:
        return False
    head = data[:ends].lower()
    if b" http/1.1\r\n" not in head or any(name in head for name in _NOT_PLAIN):
        return False
    _, is_told, after = head.partition(_LENGTH)
    length = after.partition(b"\r\n")[0].strip()
    return bool(is_told) and length.isdigit() and _LENGTH not in after and ends + len(_ENDS) + int(length) == len(data)


def written(status: int, body: bytes, headers: Sequence[Header]) -> Callable[[Sequence[Header]], bytes]:
    """A whole answer in JSON, in the words of HTTP/1.1, under another number each time; what is told beside it, in a list that nobody
    changes, comes first.
    """
    told = ((b"cache-control", b"no-store"), *headers, (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)))
    start, number = b"HTTP/1.1 %d %b\r\n" % (status, HTTPStatus(status).phrase.encode()), b"%b: " % NUMBER
    end = b"\r\n".join((b"", *(b"%b: %b" % one for one in told), b"", body))
    said: tuple[Sequence[Header] | None, bytes] = (None, b"")  # what was told beside it last, and how it begins with that

    def answer(beside: Sequence[Header]) -> bytes:
        nonlocal said
        if said[0] is not beside:  # the server makes another list each second
            said = beside, b"".join((start, *(b"%b: %b\r\n" % one for one in beside), number))
        return b"".join((said[1], tracing.next_id().encode(), end))

    return answer


def use() -> None:
    """Let uvicorn, which BentoML starts with its defaults, take connections in this way."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{Admission.__module__}:{Admission.__name__}"
