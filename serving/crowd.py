"""How many requests wait, and who is sent away so that the others are answered in time. In: arrivals. Out: whether to answer.

Answers are made one after the other on the event loop: it reads what came meanwhile, then works on all of it in one round, and nobody is
read until that is done. So a request waits for those read before it, and how long is known when it is read: their number times what an
answer took lately, and no limit has to be guessed. Who would wait for more than their share of the deadline is turned away there and then
(`admission`), which costs a hundredth of an answer: decisions last, documentation first. What was read and then waited longer than was
foreseen is refused when its turn comes, once rounds are long; a single long round, as a busy machine has them, turns nobody away who
can still be answered. Beside it, so many at most may be under way at once. Never refuses events, health or metrics.

While rounds are long, answers leave out what they can do without (`fallbacks.Deadline`): reasons are a third of what a score costs.
Source: Klein et al., "Brownout: building more robust cloud applications", 2014.
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


# Of the deadline: how long a request may have to wait by what is foreseen. What waited before the round began comes on top of it.
SHARE: Mapping[Priority, float] = {Priority.DOCS: 0.1, Priority.PROFILE: 0.15, Priority.SCORES: 0.3, Priority.DECISION: 0.4}
AT_ONCE: Mapping[Priority, int] = {Priority.DOCS: 16, Priority.PROFILE: 32, Priority.SCORES: 96, Priority.DECISION: 128}
SLACK = 2  # times their share: so long may those wait who were let in, for what was foreseen comes out otherwise where others work too
PATIENCE = 0.8  # of the deadline, in a round that follows a short one
BURST = 0.6  # of the deadline: how long a line may be foreseen to take that follows a short round
LONG = 0.25  # of the deadline: a round of so many answers makes the next one crowded
FEW = 8  # in line: as many are let in whatever answers took lately, for one that waited for something tells nothing of the others
ANSWER_S = 0.001  # that an answer takes, until one was measured
_MEASURED = 8  # requests in a round from which on it tells what one takes
_WEIGHT = 1 / 8  # of the newest round in the mean
_MOST_TIMES = 4  # the mean: what an answer takes more in a round is that it stood still


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
        self._patience_s, self._burst_s, self._long_s = PATIENCE * deadline_s, BURST * deadline_s, LONG * deadline_s
        self._share_s = {priority: share * deadline_s for priority, share in SHARE.items()}
        self._began = 0.0
        self._of: Loop | None = None  # the round that is under way, and the loop that ends it
        self._n, self._last = 0, 0.0  # answers in this round, and when the last one was done
        self.is_crowded = False  # whether rounds are long
        self._in_line = 0
        self.answer_s = ANSWER_S
        self.under_way = 0

    @property
    def is_long(self) -> bool:
        """Whether the line is such that some might have to be turned away."""
        return self._in_line >= FEW

    def lets_in(self, priority: Priority) -> bool:
        """Whether a request that was just read may stand in line."""
        return self._in_line < FEW or self._in_line * self.answer_s <= (self._share_s[priority] if self.is_crowded else self._burst_s)

    def stand_in_line(self) -> None:
        """One more was read that has its turn once the loop goes to work."""
        if not self._in_line:
            self._loop().call_soon(self._go_to_work)
        self._in_line += 1

    def arrive(self) -> float:
        """Seconds that the request whose turn it is has waited in this round."""
        now, loop = self._clock(), self._loop()
        if self._of is not loop:  # a round that ended, or of a loop that did
            self._began, self._of = now, loop
            self._n = 0
            loop.call_soon(self._end_round)
        self._n += 1
        return now - self._began

    def leave(self) -> float:
        """One is answered; what the clock says."""
        self._last = self._clock()
        return self._last

    def refuses(self, priority: Priority, waited_s: float) -> bool:
        """Whether one that waited so long is to be sent away."""
        most_s = min(SLACK * self._share_s[priority], self._patience_s) if self.is_crowded else self._patience_s
        if waited_s <= most_s and self.under_way < AT_ONCE[priority]:
            return False
        self._n -= 1  # it tells nothing of what an answer takes
        return True

    def __enter__(self) -> None:
        """One more is under way."""
        self.under_way += 1

    def __exit__(self, *_: object) -> None:
        """One less."""
        self.under_way -= 1

    def _go_to_work(self) -> None:
        self._in_line = 0  # nothing more is read until all of them had their turn

    def _end_round(self) -> None:
        took_s = self._last - self._began
        # one that is long by the clock alone stood still: those who came meanwhile are not more than can be answered
        self.is_crowded = min(self._clock() - self._began, self._n * self.answer_s) > self._long_s
        self._of = None
        if self._n >= _MEASURED and took_s > 0:
            self.answer_s += _WEIGHT * (min(took_s / self._n, _MOST_TIMES * self.answer_s) - self.answer_s)


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
