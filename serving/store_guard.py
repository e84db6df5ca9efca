"""The way to the online store, for all that ask it: leaves a failing store alone, and lets a slow one hold only so many.

In: questions. Out: their answers, or why there is none. While the breaker is open nobody waits for the store: a thread of its own asks
it whether it is well again. A store that lets a question wait in vain is asked beside the event loop from then on, so that it stops the
loop, and all who stand in line there, no more than once a second. Never keeps an answer.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from serving import metrics
from serving.breaker import Breaker, Permit
from serving.fallbacks import BUSY, STORE, Deadline, Unavailable
from serving.online_store import StoreFailure
from serving.profile import Profiles

log = logging.getLogger("rapport.serving")

T = TypeVar("T")

NAME = "online_store"
PLACES = 8  # questions at once
PROBE_MS = 200  # a probe connects anew, which takes several turns
BLAME_S = 0.02  # an answer that had less time than this when its deadline passed was late before it came to the store
SLOW_S = 0.01  # a question's mean time, or the time of one that failed, from which on the event loop must not wait for it
SLOW_FOR_S = 1.0  # then it is tried there again: beside the loop, waiting for it cannot be told from waiting for the processor
_WEIGHT = 1 / 16  # of the newest time in the mean


class Guard:
    """The profiles in use, behind a breaker and a bulkhead. Safe from several threads.

    `aside`: runs a probe, not here and now; `is_on_loop`: whether who asks holds up an event loop.
    """

    def __init__(
        self,
        *,
        profiles: Profiles | None = None,
        breaker: Breaker | None = None,
        aside: Callable[[Callable[[], None]], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        is_on_loop: Callable[[], bool] = lambda: asyncio._get_running_loop() is not None,
    ) -> None:
        self.profiles = profiles
        self.breaker = breaker or Breaker(tell=lambda state: metrics.breaker(NAME).set(state))
        self._aside = aside or _Aside()
        self._clock, self._is_on_loop = clock, is_on_loop
        self._places = deque(range(PLACES))
        self._mean_s, self._slow_until = 0.0, 0.0

    @property
    def is_slow(self) -> bool:
        """Whether the store was lately so slow that questions are better asked beside the event loop."""
        return self._slow_until > 0 and self._clock() < self._slow_until

    @property
    def has_room(self) -> bool:
        """Whether a question would be let through at this moment."""
        return bool(self._places) and not self.breaker.is_open

    def ask(self, question: Callable[[Profiles], T], *, is_batch: bool = False) -> T:
        """The answer. Raises Unavailable when there is no store, it fails, too many ask it already, or the breaker is open."""
        profiles = self.profiles
        permit = None if profiles is None else self.breaker.enter()
        if profiles is None or permit is None:
            raise Unavailable(STORE)
        if permit.is_probe:
            self._aside(lambda: self._probe(profiles, permit))
            raise Unavailable(STORE)
        if self.is_slow and self._is_on_loop():  # a second question of the one that waited in vain, or no place is free beside the loop
            raise Unavailable(BUSY)
        try:
            place = self._places.pop()
        except IndexError:
            raise Unavailable(BUSY) from None
        started = self._clock()
        try:
            answer = question(profiles)
        except StoreFailure as error:
            self._failed(permit, self._clock() - started)
            log.warning("%s", error)
            raise Unavailable(STORE) from error
        except Unavailable:
            took_s = self._clock() - started
            if took_s >= BLAME_S:
                self._failed(permit, took_s)
            raise
        finally:
            self._places.append(place)
        self.breaker.succeeded(permit)
        if not is_batch:
            self._measure(self._clock() - started)
        return answer

    def _failed(self, permit: Permit, took_s: float) -> None:
        self.breaker.failed(permit)
        if took_s > SLOW_S:
            self._slow_until = self._clock() + SLOW_FOR_S

    def _measure(self, took_s: float) -> None:
        if self._slow_until > 0:
            if self._clock() < self._slow_until:
                return
            self._slow_until, self._mean_s = 0.0, 0.0
        self._mean_s += _WEIGHT * (took_s - self._mean_s)
        if self._mean_s > SLOW_S:
            self._slow_until = self._clock() + SLOW_FOR_S

    def _probe(self, profiles: Profiles, permit: Permit) -> None:
        try:
            profiles.check(Deadline.after_ms(PROBE_MS))
        except (StoreFailure, Unavailable):
            self.breaker.failed(permit)
        except BaseException:
            self.breaker.failed(permit)
            raise
        else:
            self.breaker.succeeded(permit)
            log.warning("the online store answers again")


class _Aside:
    """Runs work in a thread of its own, one at a time; what comes while one still hangs is not run."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def __call__(self, work: Callable[[], None]) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=work, name="probe", daemon=True)
            self._thread.start()
