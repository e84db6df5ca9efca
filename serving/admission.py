"""Admission: where more requests are read than can be answered in time, the rest is turned away before anything is made of them.

In: what a connection received. Out: the same to uvicorn, or at once a refusal that was written beforehand. A request that was parsed, made
a task and given to the application has cost a good part of an answer before it is refused there; at ten times the load nothing would be
left for answers. Only a whole request that came in one piece is turned away here, on a connection that owes no answer; all others go
their usual way, and the gateway decides. Never looks at a body, and never breaks the order of answers.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from http import HTTPStatus
from typing import Any

import uvicorn.config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving import metrics
from serving.crowd import Crowd, priority_of

log = logging.getLogger("rapport.serving")

QUIET_S = 10.0  # between two lines of the log about those who were turned away
_ENDS = b"\r\n\r\n"
_LENGTH = b"\r\ncontent-length:"
_NOT_PLAIN = (b"\r\ntransfer-encoding:", b"\r\nexpect:", b"\r\nupgrade:", b"\r\nconnection: close", b"\r\nconnection:close")


class Gate:
    """Who may pass: one per worker. paths: those whose requests may be turned away; refusal: what these get, byte for byte."""

    def __init__(self, crowd: Crowd, paths: Iterable[str], refusal: bytes) -> None:
        self.crowd, self.refusal = crowd, refusal
        self._kinds = {f"POST {path}".encode(): (path, priority) for path in paths if (priority := priority_of(path))}
        self._turned_away: Counter[bytes] = Counter()
        self._untold, self._told_at = 0, float("-inf")

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

    def data_received(self, data: bytes) -> None:
        """Turn the request away where the line is too long for its kind; else have it parsed."""
        gate = self._gate
        if gate is not None:
            if gate.crowd.is_long and self._is_between_requests() and is_whole(data) and gate.turns_away(data[: data.find(b" ", 5)]):
                self._is_refused = True
                self.transport.write(gate.refusal)
                return
            gate.crowd.stand_in_line()
        super().data_received(data)

    def timeout_keep_alive_handler(self) -> None:
        """See HttpToolsProtocol: who was refused meanwhile was not idle."""
        if not self._is_refused:
            super().timeout_keep_alive_handler()
            return
        self._is_refused = False
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _is_between_requests(self) -> bool:
        cycle = self.cycle
        if cycle is None:
            return self.scope is None
        # a request that began has a scope that is not yet a cycle's
        return cycle.response_complete and not cycle.more_body and cycle.scope is self.scope and not self.flow.write_paused


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


def written(status: int, body: bytes, headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    """A whole answer in JSON, in the words of HTTP/1.1."""
    told = ((b"cache-control", b"no-store"), *headers, (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)))
    return b"\r\n".join((b"HTTP/1.1 %d %b" % (status, HTTPStatus(status).phrase.encode()), *(b"%b: %b" % one for one in told), b"", body))


def use() -> None:
    """Let uvicorn, which BentoML starts with its defaults, take connections in this way."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{Admission.__module__}:{Admission.__name__}"
