"""What one customer allows at any time: statements -> whether a row may be kept. As ingest/permission.py judges, one customer at a time.

In: statements on the purposes that events are stored for. Out: whether a row of a time may be stored, and whether one that is stored
may no longer be. Of two statements at one instant the refusal holds; a declared basis stands until the first word of their own.
Fails closed. Opens no file.
"""

from bisect import bisect_right, insort
from collections.abc import Iterable

from pipelines.stream.state import Said


class Permits:
    """One customer. `purposes`: those for which events are stored, any one of which is enough."""

    __slots__ = ("_declared", "_stated", "_times", "purposes", "refused_us")

    def __init__(self, purposes: Iterable[str], statements: Iterable[Said] = ()) -> None:
        self.purposes = tuple(purposes)
        self.refused_us: int | None = None  # the first refusal of any of the purposes
        self._stated: dict[str, dict[int, bool]] = {purpose: {} for purpose in self.purposes}
        self._times: dict[str, list[int]] = {purpose: [] for purpose in self.purposes}  # of what was stated, in order
        self._declared: dict[str, int] = {}  # purpose -> since when
        for said in statements:
            self.hear(said)

    def hear(self, said: Said) -> None:
        """Take a statement in, in any order."""
        if said.purpose not in self._stated:
            return
        if not said.is_stated:
            if said.is_allowed:
                self._declared[said.purpose] = min(said.said_us, self._declared.get(said.purpose, said.said_us))
            return
        told, times = self._stated[said.purpose], self._times[said.purpose]
        if said.said_us not in told:
            insort(times, said.said_us)
        told[said.said_us] = told.get(said.said_us, True) and said.is_allowed
        if not said.is_allowed:
            self.refused_us = said.said_us if self.refused_us is None else min(self.refused_us, said.said_us)

    def allow(self, purposes: Iterable[str], at_us: int) -> None:
        """A row of their own allowed these then."""
        for purpose in purposes:
            self.hear(Said(purpose, at_us, is_stated=True, is_allowed=True))

    def may_store(self, at_us: int, *, covered: str | None) -> bool:
        """Whether a row of this time may be stored that comes now. `covered`: the purpose that its source's declared basis covers."""
        return any(self._holds(purpose, at_us, is_declared=covered == purpose) for purpose in self.purposes)

    def is_declared(self, purpose: str, at_us: int) -> bool:
        """Whether a basis was declared for the purpose by then."""
        since_us = self._declared.get(purpose)
        return since_us is not None and since_us <= at_us

    def must_go(self, at_us: int) -> bool:
        """Whether a row of this time that is stored may no longer be: they refused, and allow nothing at that time."""
        if self.refused_us is None or at_us < self.refused_us:
            return False
        return not any(self._holds(purpose, at_us, is_declared=self.is_declared(purpose, at_us)) for purpose in self.purposes)

    def _holds(self, purpose: str, at_us: int, *, is_declared: bool) -> bool:
        times = self._times[purpose]
        place = bisect_right(times, at_us)
        return self._stated[purpose][times[place - 1]] if place else is_declared
