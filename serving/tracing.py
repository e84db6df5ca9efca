"""What is known of the request that is being answered, and where its time went. In: a `traceparent`, steps, spans. Out: a trace.

Spans are made for requests whose caller sampled them (W3C Trace Context) and where somebody wants them; for all others a span is one look
at a variable. Their names and attributes are words of ours: routes, rungs, causes, versions, counts. Never a name, a key or a body.
"""

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import count
from types import TracebackType
from typing import Any

from pipelines.log_lines import CONTEXT

Value = str | int | float | bool

HEADER = b"traceparent"
_PARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED = 1
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
_NOTHING = contextlib.nullcontext()
_PROCESS = os.urandom(4).hex()
_NUMBERS = count(1)


@dataclass(slots=True)
class Span:
    """A part of a request's time. parent: the id of the span that it is a part of; the times: nanoseconds since 1970."""

    name: str
    parent: bytes
    id: bytes = field(default_factory=lambda: os.urandom(8))
    start_ns: int = field(default_factory=time.time_ns)
    end_ns: int = 0
    attributes: dict[str, Value] = field(default_factory=dict)
    is_failed: bool = False


@dataclass(slots=True)
class Trace:
    """One request of a caller's trace: `root` is the request itself, `spans` those that ended."""

    id: bytes
    root: Span
    spans: list[Span] = field(default_factory=list)


class Request:
    """One request on its way: its number, how far down the ladder it went, and its trace where there is one."""

    __slots__ = ("is_degraded", "number", "refused", "steps", "trace")

    def __init__(self, trace: Trace | None = None) -> None:
        self.number = next(_NUMBERS)
        self.steps: list[tuple[str, str]] = []
        self.is_degraded = False
        self.refused: str | None = None  # the code of its refusal
        self.trace = trace

    @property
    def id(self) -> str:
        """What its answer and its lines of the log carry."""
        return _id(self.number)

    @property
    def causes(self) -> str:
        """Why it was refused, or why better rungs did not answer, each cause once."""
        return ", ".join(dict.fromkeys([self.refused] if self.refused else [cause for _, cause in self.steps]))

    def log_fields(self) -> Mapping[str, object]:
        """What every line about it carries."""
        return {"request_id": self.id} if self.trace is None else {"request_id": self.id, "trace_id": self.trace.id.hex()}


def next_id() -> str:
    """Of a request that nothing is made of."""
    return _id(next(_NUMBERS))


def _id(number: int) -> str:
    return f"{_PROCESS}-{number:x}"


_span: ContextVar[Span | None] = ContextVar("rapport_span", default=None)


def begin(trace: Trace | None = None) -> Request:
    """A request begins, in the context that this is called in."""
    request = Request(trace)
    CONTEXT.set(request)
    if trace is not None:
        _span.set(trace.root)
    return request


def step_down(rung: str, cause: str, *, is_failure: bool) -> None:
    """A rung did not answer the request that is under way."""
    request = CONTEXT.get()
    if isinstance(request, Request):
        request.steps.append((rung, cause))
        request.is_degraded |= is_failure


def span(name: str, rung: str | None = None) -> "contextlib.AbstractContextManager[Any]":
    """The time until the end of the block is a span of the request, where its trace is wanted. An exception ends it as failed."""
    parent = _span.get()
    return _NOTHING if parent is None else _Spanning(name, rung, parent)


class _Spanning:
    """A span that is under way."""

    def __init__(self, name: str, rung: str | None, parent: Span) -> None:
        self._span = Span(name, parent.id, attributes={} if rung is None else {"rapport.rung": rung})

    def __enter__(self) -> Span:
        self._token = _span.set(self._span)
        return self._span

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _span.reset(self._token)
        self._span.end_ns = time.time_ns()
        if error is not None:
            self._span.is_failed = not getattr(error, "is_expected", False)
            self._span.attributes["rapport.cause"] = getattr(error, "cause", None) or type(error).__name__
        request = CONTEXT.get()
        if isinstance(request, Request) and request.trace is not None:
            request.trace.spans.append(self._span)


class Tracer:
    """Begins the traces of sampled requests, and hands over what they became. `export`: takes a trace; must not wait."""

    def __init__(self, export: Callable[[Trace], None]) -> None:
        self._export = export

    def begin(self, headers: Iterable[tuple[bytes, bytes]]) -> Trace | None:
        """The request's trace; None unless its caller sampled it."""
        given = next((value for name, value in headers if name == HEADER), None)
        parsed = None if given is None else parent_of(given)
        return None if parsed is None else Trace(parsed[0], Span("", parsed[1]))

    def end(self, request: Request, method: str, endpoint: str, status: int) -> None:
        """The request was answered: its trace goes where traces go."""
        trace = request.trace
        if trace is None:
            return
        root = trace.root
        method = method if method in _METHODS else "_OTHER"
        root.end_ns, root.name, root.is_failed = time.time_ns(), f"{method} {endpoint}", status >= 500
        root.attributes |= {
            "http.request.method": method,
            "http.route": endpoint,
            "http.response.status_code": status,
            "rapport.request_id": request.id,
            "rapport.degraded": request.is_degraded,
        }
        if causes := request.causes:
            root.attributes["rapport.causes"] = causes
        self._export(trace)


def parent_of(header: bytes) -> tuple[bytes, bytes] | None:
    """Trace and span id of a `traceparent` that is sampled; None of any other, and of one that is none."""
    found = _PARENT.fullmatch(header)
    if found is None or found[1] == b"ff" or (found[1] == b"00" and found[5]) or not int(found[4], 16) & _SAMPLED:
        return None
    trace, parent = bytes.fromhex(found[2].decode()), bytes.fromhex(found[3].decode())
    return (trace, parent) if any(trace) and any(parent) else None


def ended(trace: Trace) -> Sequence[Span]:
    """Its spans, the request's own first; one that is still under way, in a thread that nobody waited for, is left out."""
    return [trace.root, *trace.spans]
