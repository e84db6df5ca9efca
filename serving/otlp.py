"""Traces -> an OpenTelemetry collector, by OTLP over HTTP (protobuf). In: traces of answered requests. Out: POSTs from a thread of its own.

Nobody waits for it. What a collector cannot take now is sent again, some times and ever later, or when it says (the OTLP specification,
"OTLP/HTTP Response"); meanwhile one batch is held and the queue fills. What finds no room there, what is refused, and what was sent in
vain as often as may be, is dropped and counted. Attributes pass as `tracing` made them.
"""

import contextlib
import logging
import queue
import random
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from serving import metrics
from serving.tracing import Span, Trace, Value, ended

log = logging.getLogger("rapport.serving")

QUEUE_TRACES = 512
BATCH_TRACES = 128
BATCH_S = 1.0  # traces that come within it are sent together
TIMEOUT_S = 5.0
TRIES = 5
WAIT_S = 1.0  # before the second try, on average; twice as long before each one after it
LONGEST_WAIT_S = 60.0  # whatever the collector says
CLOSE_S = 3.0
QUIET_S = 60.0  # between two complaints
_SERVER, _INTERNAL = 2, 1  # kinds of spans
_ERROR = 2  # a status
_LATER = frozenset((429, 502, 503, 504))  # statuses after which the same may be sent again


class Exporter:
    """One per worker process; its thread starts with the first trace."""

    def __init__(self, endpoint: str, *, headers: Mapping[str, str] | None = None, queue_traces: int = QUEUE_TRACES) -> None:
        self._to, self._headers = urlsplit(endpoint), {**(headers or {}), "Content-Type": "application/x-protobuf"}
        self._queue: queue.Queue[Trace | None] = queue.Queue(queue_traces)
        self._thread: threading.Thread | None = None
        self._is_closing = threading.Event()
        self._complained = -QUIET_S

    def offer(self, trace: Trace) -> None:
        """Send it, some time, if there is room."""
        try:
            self._queue.put_nowait(trace)
        except queue.Full:
            metrics.traces("dropped").inc()
        if self._thread is None:
            self._is_closing.clear()
            self._thread = threading.Thread(target=self._run, name="traces", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Send what waits, without patience, and end."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._is_closing.set()
            with contextlib.suppress(queue.Full):  # then there is enough to wake up for
                self._queue.put_nowait(None)
            thread.join(CLOSE_S)

    def _run(self) -> None:
        is_open = True
        while is_open:
            traces, is_open = self._next()
            if traces:
                metrics.traces(self._send(traces)).inc(len(traces))
            is_open &= not (self._is_closing.is_set() and self._queue.empty())

    def _next(self) -> tuple[list[Trace], bool]:
        """What came within a moment, and whether more may come."""
        traces: list[Trace] = []
        end = 0.0
        while len(traces) < BATCH_TRACES:
            try:
                trace = self._queue.get(timeout=max(0.0, end - time.monotonic()) if traces else None)
            except queue.Empty:
                break
            if trace is None:
                return traces, False
            end = end if traces else time.monotonic() + BATCH_S
            traces.append(trace)
        return traces, True

    def _send(self, traces: Sequence[Trace]) -> str:
        """What became of them. Returns once that is known, or sooner where the end is near."""
        body, why, wait_s = encode(traces), "", WAIT_S
        for n in range(TRIES):
            is_last = n == TRIES - 1 or self._is_closing.is_set()
            try:
                status, told_s = self._post(body)
            except (OSError, HTTPException) as error:
                why, told_s = type(error).__name__, None
            else:
                if 200 <= status < 300:
                    return "exported"
                why = f"status {status}"
                is_last |= status not in _LATER
            if is_last:
                break
            self._is_closing.wait(min(wait_s * random.uniform(0.5, 1.5) if told_s is None else told_s, LONGEST_WAIT_S))
            wait_s *= 2
        return self._failed(why)

    def _post(self, body: bytes) -> tuple[int, float | None]:
        """The status, and after how many seconds the collector wants to be asked again. Raises OSError, HTTPException."""
        connection = (HTTPSConnection if self._to.scheme == "https" else HTTPConnection)(self._to.netloc, timeout=TIMEOUT_S)
        path = (self._to.path or "/v1/traces") + (f"?{self._to.query}" if self._to.query else "")
        with contextlib.closing(connection):
            connection.request("POST", path, body, self._headers)
            answer = connection.getresponse()
            return answer.status, _seconds(answer.headers.get("retry-after"))

    def _failed(self, why: str) -> str:
        if time.monotonic() - self._complained > QUIET_S:
            self._complained = time.monotonic()
            log.warning("traces could not be handed to the collector (%s); they are dropped", why)
        return "failed"


def _seconds(retry_after: str | None) -> float | None:
    """Of a Retry-After (RFC 9110, 10.2.3): seconds, or an instant; None where it is neither."""
    text = (retry_after or "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        at = parsedate_to_datetime(text)
    except ValueError:
        return None
    return max(0.0, (at.replace(tzinfo=at.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def encode(traces: Sequence[Trace]) -> bytes:
    """An ExportTraceServiceRequest of all their spans."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    request = ExportTraceServiceRequest()
    group = request.resource_spans.add()
    _attribute(group.resource.attributes, "service.name", "rapport")
    scope = group.scope_spans.add()
    scope.scope.name = "rapport.serving"
    for trace in traces:
        for span in ended(trace):
            _add(scope.spans.add(), trace, span)
    return bytes(request.SerializeToString())


def _add(to: Any, trace: Trace, span: Span) -> None:
    to.trace_id, to.span_id, to.parent_span_id, to.name = trace.id, span.id, span.parent, span.name
    to.kind = _SERVER if span is trace.root else _INTERNAL
    to.start_time_unix_nano, to.end_time_unix_nano = span.start_ns, span.end_ns
    for name, value in span.attributes.items():
        _attribute(to.attributes, name, value)
    if span.is_failed:
        to.status.code = _ERROR


def _attribute(to: Any, name: str, value: Value) -> None:
    found = to.add()
    found.key = name
    if isinstance(value, bool):  # which is an int as well
        found.value.bool_value = value
    elif isinstance(value, str):
        found.value.string_value = value
    elif isinstance(value, int):
        found.value.int_value = value
    else:
        found.value.double_value = value
