"""Stops asking a dependency that keeps failing, and finds out when it is well again. In: permits and how they ended. Out: whether to ask.

Closed: everybody may ask; `limit` failures in a row open it. Open: nobody may, but for one probe after each pause. A probe has a time of
its own, after which it counts as failed, so that one that never returns does not keep the breaker open for ever. How a permit of before the
last change ended is ignored: a success that began before the breaker opened says nothing about now. Never calls anything itself.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

CLOSED, OPEN = 0, 1  # as the metric tells them


class _For(Enum):
    """Who may ask with a permit."""

    ALL = 0  # the breaker is closed
    PROBE = 1
    NOBODY = 2


@dataclass(frozen=True, slots=True, eq=False)
class Permit:
    """Leave to ask. The one given last is the only one whose end counts."""

    whose: _For

    @property
    def is_probe(self) -> bool:
        """Whether it alone decides if the breaker closes."""
        return self.whose is _For.PROBE


class Breaker:
    """Safe from several threads. `tell`: learns each new state."""

    def __init__(
        self,
        *,
        limit: int = 3,
        pause_s: float = 1.0,
        probe_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        tell: Callable[[int], None] = lambda state: None,
    ) -> None:
        self.limit, self.pause_s, self.probe_s = limit, pause_s, probe_s
        self._clock, self._tell = clock, tell
        self._lock = threading.Lock()
        self._permit = Permit(_For.ALL)  # says the state too: in one object, for it is read without the lock
        self._failures = 0
        self._retry_at, self._probe_ends = 0.0, 0.0

    @property
    def is_open(self) -> bool:
        """Whether only a probe may ask."""
        return self._permit.whose is not _For.ALL

    def enter(self) -> Permit | None:
        """Leave to ask now; None: do not. Whoever has it tells how it ended: `succeeded` or `failed`."""
        permit = self._permit
        if permit.whose is _For.ALL:
            return permit
        with self._lock:
            now = self._clock()
            if not self.is_open:
                return self._permit
            if now < self._retry_at:
                return None
            self._permit = Permit(_For.PROBE)  # a probe that is still out is too late by now
            self._probe_ends = now + self.probe_s
            self._retry_at = now + max(self.probe_s, self.pause_s)
            return self._permit

    def succeeded(self, permit: Permit) -> None:
        """It answered. A probe closes the breaker, if its time is not over."""
        if not self._failures or permit is not self._permit:
            return
        with self._lock:
            if permit is not self._permit or (permit.is_probe and self._clock() >= self._probe_ends):
                return
            self._failures = 0
            if permit.is_probe:
                self._permit = Permit(_For.ALL)
                self._tell(CLOSED)

    def failed(self, permit: Permit) -> None:
        """It did not. The failure that reaches the limit opens the breaker; a probe's starts the next pause."""
        with self._lock:
            if permit is not self._permit:
                return
            self._failures += 1
            if permit.is_probe or self._failures >= self.limit:
                self._retry_at = self._clock() + self.pause_s
                self._permit = Permit(_For.NOBODY)
                if not permit.is_probe:
                    self._tell(OPEN)
