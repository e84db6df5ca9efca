"""How many requests wait, and who is sent away so that the others are answered in time. In: arrivals. Out: whether to answer.

Answers are made one after the other on the event loop, so a request waits for those before it in the same round; how long is read off
the clock, and no limit has to be guessed. Once rounds grow long, requests that waited for more than their share of the deadline are
refused, which costs a small part of an answer: decisions last, documentation first. A single long round, as a busy machine has them,
turns nobody away who can still be answered. Beside it, so many at most may be under way at once. Never refuses events, health or
metrics.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Protocol

from serving import access


class Priority(StrEnum):
    """Who goes first, last to first."""

    DOCS = "docs"
    PROFILE = "profile"
    SCORES = "scores"
    DECISION = "decision"


# Of the deadline: how long a request may have waited while it is crowded. What waited before the round began comes on top of it.
SHARE: Mapping[Priority, float] = {Priority.DOCS: 0.1, Priority.PROFILE: 0.15, Priority.SCORES: 0.3, Priority.DECISION: 0.4}
AT_ONCE: Mapping[Priority, int] = {Priority.DOCS: 16, Priority.PROFILE: 32, Priority.SCORES: 96, Priority.DECISION: 128}
PATIENCE = 0.8  # of the deadline, in a round that follows a short one
LONG = 0.25  # of the deadline: such a round makes the next one crowded


class Loop(Protocol):
    """What is needed of an event loop."""

    def call_soon(self, call: Callable[[], None], /) -> object:
        """Run the call in the next round."""


class Crowd:
    """One per worker; for its event loop alone, which `loop` gives."""

    def __init__(
        self,
        deadline_s: float,
        *,
        clock: Callable[[], float] = time.perf_counter,
        loop: Callable[[], Loop] = asyncio.get_running_loop,
    ) -> None:
        self._clock, self._loop = clock, loop
        self._patience_s, self._long_s = PATIENCE * deadline_s, LONG * deadline_s
        self._share_s = {priority: share * deadline_s for priority, share in SHARE.items()}
        self._began = 0.0
        self._of: Loop | None = None  # the round that is under way, and the loop that ends it
        self._is_crowded = False
        self.under_way = 0

    def arrive(self) -> float:
        """Seconds that the request whose turn it is has waited in this round."""
        now, loop = self._clock(), self._loop()
        if self._of is not loop:  # a round that ended, or of a loop that did
            self._began, self._of = now, loop
            loop.call_soon(self._end_round)
        return now - self._began

    def refuses(self, priority: Priority, waited_s: float) -> bool:
        """Whether one that waited so long is to be sent away."""
        return waited_s > (self._share_s[priority] if self._is_crowded else self._patience_s) or self.under_way >= AT_ONCE[priority]

    def __enter__(self) -> None:
        """One more is under way."""
        self.under_way += 1

    def __exit__(self, *_: object) -> None:
        """One less."""
        self.under_way -= 1

    def _end_round(self) -> None:
        self._is_crowded = self._clock() - self._began > self._long_s
        self._of = None


def priority_of(path: str) -> Priority | None:
    """How urgent requests to this path are; None: never refused."""
    known = _PRIORITIES.get(path)
    if known is not None:
        return known
    if access.is_score(path):
        return Priority.SCORES
    if path.startswith(("/profile/", access.CONSOLE)):
        return Priority.PROFILE
    return Priority.DOCS if path.startswith(access.ASSETS_PREFIX) else None


_PRIORITIES: Mapping[str, Priority] = {
    "/recommend": Priority.DECISION,
    "/decide": Priority.DECISION,
    **dict.fromkeys(access.SHORT.values(), Priority.SCORES),
    **dict.fromkeys(("/", "/docs", "/docs.json", "/schema.json"), Priority.DOCS),
}
