"""What the service tells of itself at /metrics, beside BentoML's own figures. Out: the series to count, observe and set.

The one place for their names and labels: dashboards and alerts of `deploy/` are held against it. A series is looked up once and then
kept. Labels are names of ours, never a customer's or a stranger's. Sound with several workers: counters add up, a gauge says how.
"""

import asyncio
import functools
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

SECONDS = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0)
AGES_S = (0.05, 0.25, 1.0, 5.0, 60.0, 600.0, 3_600.0, 21_600.0, 86_400.0, 604_800.0, 2_592_000.0)
SCORES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)


@dataclass(frozen=True)
class Family:
    """The series of one name. `over_workers`: how a gauge's values become one; `buckets`: a histogram's."""

    about: str
    labels: tuple[str, ...]
    kind: Literal["counter", "gauge", "histogram"] = "counter"
    buckets: tuple[float, ...] = ()
    over_workers: Literal["livesum", "livemax"] = "livesum"


FAMILIES: Mapping[str, Family] = {
    "rapport_request_seconds": Family("Seconds from the first byte to the answer", ("endpoint", "code"), "histogram", SECONDS),
    "rapport_answer_seconds": Family("Seconds of work for an answer, by its rung", ("endpoint", "source"), "histogram", SECONDS),
    "rapport_feature_age_seconds": Family("Since the features behind an answer had changed", ("endpoint",), "histogram", AGES_S),
    "rapport_score": Family("Probabilities that a model foretold from live features", ("model",), "histogram", SCORES),
    "rapport_fallback": Family("Steps down the ladder: the rung that did not answer, and why", ("endpoint", "rung", "cause")),
    "rapport_ranking": Family("Orders of items for a customer: taken from a moment ago, or found anew", ("outcome",)),
    "rapport_shed": Family("Requests refused because too many came", ("priority",)),
    "rapport_rate_limited": Family("Requests of a key that asked for more than it may", ("role",)),
    "rapport_breaker_state": Family("0: the dependency is asked; 1: it is left alone", ("dependency",), "gauge", over_workers="livemax"),
    "rapport_model_workers": Family("Workers that answer with this version", ("model", "version"), "gauge"),
    "rapport_model_refused": Family("Versions that a worker would not load", ("model",)),
    "rapport_shadow": Family("Requests for the challenger", ("model", "outcome")),
    "rapport_traces": Family("Traces for the collector", ("outcome",)),
}


def request(endpoint: str, code: str) -> Any:
    """Observes the seconds of a request."""
    return _child("rapport_request_seconds", endpoint, code)


def turned_away(endpoint: str, n: int) -> None:
    """Counts requests that were refused with 503 before anybody looked at them, so many at once: each took no time."""
    request(endpoint, "503").observe(0.0, n)


def answer(endpoint: str, source: str) -> Any:
    """Observes the seconds of an answer."""
    return _child("rapport_answer_seconds", endpoint, source)


def feature_age(endpoint: str) -> Any:
    """Observes the seconds since the features changed."""
    return _child("rapport_feature_age_seconds", endpoint)


def score(model: str) -> Any:
    """Observes a probability."""
    return _child("rapport_score", model)


def fallback(endpoint: str, rung: str, cause: str) -> Any:
    """Counts steps down."""
    return _child("rapport_fallback", endpoint, rung, cause)


def ranking(*, is_remembered: bool) -> Any:
    """Counts orders of items: `remembered` or `found`."""
    return _child("rapport_ranking", "remembered" if is_remembered else "found")


def shed(priority: str) -> Any:
    """Counts refusals under load."""
    return _child("rapport_shed", priority)


def rate_limited(role: str) -> Any:
    """Counts requests of a key beyond its rate."""
    return _child("rapport_rate_limited", role)


def breaker(dependency: str) -> Any:
    """Is set to the state."""
    return _child("rapport_breaker_state", dependency)


def model_workers(model: str, version: str) -> Any:
    """Is set to 1 while this worker answers with the version, then to 0."""
    return _child("rapport_model_workers", model, version)


def model_refused(model: str) -> Any:
    """Counts refused versions."""
    return _child("rapport_model_refused", model)


def shadow(model: str, outcome: str) -> Any:
    """Counts requests for the challenger: `scored`, `dropped`, `failed`, or `other_service`: fed from another one than the champion."""
    return _child("rapport_shadow", model, outcome)


def traces(outcome: str) -> Any:
    """Counts traces: `exported`, `failed`: the collector did not take them, or `dropped`: too many waited."""
    return _child("rapport_traces", outcome)


class _Tally:
    """What a histogram of the client observed in one round of the event loop, handed over at its end: each by itself would cost two locks,
    and two writes to a file that the workers share.
    """

    def __init__(self, child: Any) -> None:
        self._child, self._bounds = child, child._upper_bounds
        self._sum, self._counts = 0.0, [0] * len(self._bounds)
        self._of: asyncio.AbstractEventLoop | None = None  # who hands over what there is

    def observe(self, value: float, n: int = 1) -> None:
        """Note a value, as often as it came. Beside the event loop it is handed over at once."""
        loop = asyncio._get_running_loop()
        if loop is None:
            for _ in range(n):
                self._child.observe(value)
            return
        if self._of is not loop:
            self._of = loop
            loop.call_soon(self._hand_over)
        self._sum += n * value
        self._counts[bisect_left(self._bounds, value)] += n

    def _hand_over(self) -> None:
        self._child._sum.inc(self._sum)
        for bucket, n in zip(self._child._buckets, self._counts, strict=True):
            if n:
                bucket.inc(n)
        self._of, self._sum, self._counts = None, 0.0, [0] * len(self._bounds)


@functools.cache
def _child(name: str, *labels: str) -> Any:
    child = _family(name).labels(*labels)
    return _Tally(child) if FAMILIES[name].kind == "histogram" else child


@functools.cache
def _family(name: str) -> Any:
    # imported here: the client chooses its multi-process mode on import, from an environment that the server sets
    from prometheus_client import Counter, Gauge, Histogram

    family = FAMILIES[name]
    if family.kind == "counter":
        return Counter(name, family.about, family.labels)
    if family.kind == "gauge":
        return Gauge(name, family.about, family.labels, multiprocess_mode=family.over_workers)
    return Histogram(name, family.about, family.labels, buckets=family.buckets)
