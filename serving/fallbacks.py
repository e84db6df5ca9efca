"""The ladder: from the best answer to the one that cannot fail. In: rungs and a deadline. Out: a value, and which rung gave it.

A rung answers, declines (it does not apply: consent, an unknown customer) or is unavailable (it should have answered:
store, model, deadline). Only the last makes the answer degraded. Every step down has a name and is counted. Never raises
for a failing rung, and never logs what a request held.

Unanswered
|-- Declined       the rung does not apply to this request
`-- Unavailable    the rung should have answered and could not
"""

import functools
import logging
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

log = logging.getLogger("rapport.serving")

T = TypeVar("T")

CONSENT = "consent"
UNKNOWN_CUSTOMER = "unknown_customer"
UNKNOWN_ITEM = "unknown_item"
NOT_IN_MODEL = "customer_not_in_model"
NO_FEATURES = "features_missing"
NO_MATCH = "no_item_matches"
NO_CATALOGUE = "catalogue_missing"
STORE = "store_unavailable"
MODEL_MISSING = "model_missing"
MODEL_REFUSED = "model_refused"
NOT_TRAINABLE = "model_not_trainable"
MODEL_FAILED = "model_failed"
DEADLINE = "deadline"
NO_SCORE = "score_missing"
REASONS = "reasons_missing"


class Unanswered(Exception):
    """A rung gave no answer, for a named cause."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


class Declined(Unanswered):
    """The rung does not apply to this request; the answer below it is not degraded by that."""


class Unavailable(Unanswered):
    """The rung should have answered and could not."""


@dataclass(frozen=True)
class Rung(Generic[T]):
    """One way to answer: the name that the answer carries as its `source`, and the call."""

    source: str
    answer: Callable[[], T]


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """The first answer found, who gave it, and why the rungs above did not."""

    value: T
    source: str
    is_degraded: bool
    causes: tuple[str, ...]


@dataclass(frozen=True)
class Deadline:
    """An instant of the monotonic clock, passed down so that every step can ask how long it has."""

    at: float

    @classmethod
    def after_ms(cls, milliseconds: float) -> "Deadline":
        """The deadline that lies this far ahead of now."""
        return cls(time.monotonic() + milliseconds / 1000)

    def left_s(self) -> float:
        """Seconds left; negative once it has passed."""
        return self.at - time.monotonic()

    def check(self) -> None:
        """Raises Unavailable once it has passed."""
        if self.left_s() <= 0:
            raise Unavailable(DEADLINE)


class Breaker:
    """Stops asking a failing dependency: open after `limit` failures in a row, one probe each `pause_s` seconds.

    Not locked: the worst of a race is one probe more.
    """

    def __init__(self, *, limit: int = 3, pause_s: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit, self.pause_s, self.clock = limit, pause_s, clock
        self._failures, self._retry_at = 0, 0.0

    def allows(self) -> bool:
        """Whether a call may be tried now. While open, one caller per pause gets a yes."""
        if self._failures < self.limit:
            return True
        now = self.clock()
        if now < self._retry_at:
            return False
        self._retry_at = now + self.pause_s
        return True

    def succeeded(self) -> None:
        """Record a success: closed again."""
        self._failures = 0

    def failed(self) -> None:
        """Record a failure; the one that reaches the limit opens it."""
        self._failures += 1
        if self._failures == self.limit:
            self._retry_at = self.clock() + self.pause_s


def descend(endpoint: str, rungs: Sequence[Rung[T]]) -> Outcome[T]:
    """The first rung's answer that comes, from best to last. The last one must not fail; if it does, that is raised."""
    causes: list[str] = []
    is_degraded = False
    for rung in rungs[:-1]:
        try:
            return Outcome(rung.answer(), rung.source, is_degraded, tuple(causes))
        except Declined as reason:
            cause = reason.cause
        except Unavailable as reason:
            cause, is_degraded = reason.cause, True
        except Exception as error:  # a defect of one rung must not cost the answer
            cause, is_degraded = MODEL_FAILED, True
            log.error("%s: rung %s failed with %s", endpoint, rung.source, trace(error))
        if cause not in causes:
            causes.append(cause)
        count(endpoint, rung.source, cause)
    last = rungs[-1]
    return Outcome(last.answer(), last.source, is_degraded, tuple(causes))


def trace(error: BaseException) -> str:
    """The error's type and where it came from, without its message: that may hold a value from a profile."""
    return type(error).__name__ + "\n" + "".join(traceback.format_tb(error.__traceback__)).rstrip()


def count(endpoint: str, rung: str, cause: str) -> None:
    """One step down: `rung` did not answer, for `cause`."""
    _child(endpoint, rung, cause).inc()


@functools.cache
def _child(endpoint: str, rung: str, cause: str):  # type: ignore[no-untyped-def]
    return _counter().labels(endpoint, rung, cause)


@functools.cache
def _counter():  # type: ignore[no-untyped-def]
    # imported here: the client chooses its multi-process mode on import, from an environment that the server sets
    from prometheus_client import Counter

    return Counter("rapport_fallback", "Steps down the ladder: the rung that did not answer, and why", ["endpoint", "rung", "cause"])
