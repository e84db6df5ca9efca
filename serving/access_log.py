"""Requests -> lines of the log: those that somebody will ask about, not too many. In: what became of a request. Out: a line, or none.

A request is notable that was refused, failed, went down the ladder for a failure, or took long. Beyond so many lines a second requests are
counted, and the next line says how many. A line has the declared endpoint, never the path, and nothing of the caller.
"""

import logging
import time
from collections.abc import Callable
from typing import Literal

from serving.tracing import Request

log = logging.getLogger("rapport.access")

Which = Literal["none", "notable", "all"]


class AccessLog:
    """One per worker, for its event loop."""

    def __init__(self, which: Which, *, slow_ms: float, per_s: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._slow_s = {"none": float("inf"), "notable": slow_ms / 1_000, "all": -1.0}[which]
        self._is_on, self._per_s, self._clock = which != "none", per_s, clock
        self._second, self._written, self._suppressed = -1, 0, 0

    def note(self, request: Request, endpoint: str, status: int, took_s: float) -> None:
        """Write a line about the request, if it is to have one."""
        if (took_s > self._slow_s or status >= 400 or request.is_degraded) and self._is_on:
            self._write(request, endpoint, status, took_s)

    def _write(self, request: Request, endpoint: str, status: int, took_s: float) -> None:
        second = int(self._clock())
        if second != self._second:
            self._second, self._written = second, 0
        if self._written >= self._per_s:
            self._suppressed += 1
            return
        self._written += 1
        extra = {
            "endpoint": endpoint,
            "status": status,
            "duration_ms": round(1_000 * took_s, 2),
            "rung": ", ".join(dict.fromkeys(rung for rung, _ in request.steps)) or None,
            "cause": request.causes or None,
            "suppressed": self._suppressed or None,
        }
        self._suppressed = 0
        log.log(logging.WARNING if status >= 500 else logging.INFO, "request", extra=extra)
