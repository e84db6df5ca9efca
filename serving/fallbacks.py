"""The ladder: from the best answer to the one that cannot fail. In: rungs and a deadline. Out: a value, and which rung gave it.

A rung answers, declines (it does not apply: consent, an unknown customer) or is unavailable (it should have answered:
store, model, deadline). Only the last makes the answer degraded. Every step down has a name and is counted. Never raises
for a failing rung, and never logs what a request held.

Unanswered
|-- Declined       the rung does not apply to this request
`-- Unavailable    the rung should have answered and could not
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from pipelines.log_lines import where_from
from serving import metrics, tracing

log = logging.getLogger("rapport.serving")

T = TypeVar("T")

CONSENT = "consent"
UNKNOWN_CUSTOMER = "unknown_customer"
UNKNOWN_ITEM = "unknown_item"
NOT_IN_MODEL = "customer_not_in_model"
NO_FEATURES = "features_missing"
NO_MATCH = "no_item_matches"
NO_SEGMENT = "segment_missing"
NO_HISTORY = "history_unreadable"
NO_CATALOGUE = "catalogue_missing"
STORE = "store_unavailable"
BUSY = "store_busy"
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

    is_expected = True


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
    """An instant of the monotonic clock, passed down so that every step can ask how long it has.

    is_crowded: more wait than can be answered in time, so that what an answer can do without is left out of it.
    """

    at: float
    is_crowded: bool = False

    @classmethod
    def after_ms(cls, milliseconds: float, *, is_crowded: bool = False) -> "Deadline":
        """The deadline that lies this far ahead of now."""
        return cls(time.monotonic() + milliseconds / 1000, is_crowded)

    def left_s(self) -> float:
        """Seconds left; negative once it has passed."""
        return self.at - time.monotonic()

    def check(self) -> None:
        """Raises Unavailable once it has passed."""
        if self.left_s() <= 0:
            raise Unavailable(DEADLINE)


def descend(endpoint: str, rungs: Sequence[Rung[T]]) -> Outcome[T]:
    """The first rung's answer that comes, from best to last. The last one must not fail; if it does, that is raised."""
    causes: list[str] = []
    is_degraded = False
    for rung in rungs[:-1]:
        is_failure = True
        try:
            with tracing.span("rung", rung.source):
                return Outcome(rung.answer(), rung.source, is_degraded, tuple(causes))
        except Declined as reason:
            cause, is_failure = reason.cause, False
        except Unavailable as reason:
            cause = reason.cause
        except Exception as error:  # a defect of one rung must not cost the answer
            cause = MODEL_FAILED
            told = {"endpoint": endpoint, "rung": rung.source, "cause": cause}
            log.error("%s: rung %s failed with %s", endpoint, rung.source, trace(error), extra=told)
        is_degraded |= is_failure
        if cause not in causes:
            causes.append(cause)
        count(endpoint, rung.source, cause, is_failure=is_failure)
    last = rungs[-1]
    with tracing.span("rung", last.source):
        return Outcome(last.answer(), last.source, is_degraded, tuple(causes))


def trace(error: BaseException) -> str:
    """The error's type and where it came from, without its message: that may hold a value from a profile."""
    return where_from(error)


def count(endpoint: str, rung: str, cause: str, *, is_failure: bool) -> None:
    """One step down: `rung` did not answer, for `cause`."""
    metrics.fallback(endpoint, rung, cause).inc()
    tracing.step_down(rung, cause, is_failure=is_failure)
