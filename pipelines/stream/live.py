"""One customer's activity and session as they are at this moment: rows in order of enter -> values, and when they last changed.

In: a customer's rows, and the time. Out: by view, the values from now on, the instant at which they became so, and the next instant
at which they change by themselves. The arithmetic is that of `pipelines.tiles`. Opens no file, reads no clock.
"""

from collections.abc import Iterable

from feature_repo.aggregates import CUSTOMER_ACTIVITY, CUSTOMER_CATEGORY, CUSTOMER_ITEM, NOT_BEHAVIOUR
from pipelines.stream.keyed import Changed, Keyed
from pipelines.stream.permits import Permits
from pipelines.stream.state import Held
from pipelines.tiles import Tiles, Visit

ACTIVITY_VIEW, SESSION_VIEW = "customer_activity", "customer_session"
VIEWS = (ACTIVITY_VIEW, SESSION_VIEW)
PAIRS = {"customer_item": CUSTOMER_ITEM, "customer_category": CUSTOMER_CATEGORY}  # views of a customer and something

_BEFORE_ALL = (-(2**63), -(2**63))


class Live:
    """One customer. `permits`: what they allow; `mark`: how often they had been marked when this was made."""

    __slots__ = (
        "_gap_minutes", "_last", "_seen", "_session", "_since", "_tiles", "_visit", "_waiting", "mark", "n_rows", "pairs", "permits",
    )  # fmt: skip

    def __init__(self, *, gap_minutes: int, permits: Permits, mark: int = 0) -> None:
        self.permits, self.mark = permits, mark
        self.n_rows = 0  # what it costs to make it anew
        self._gap_minutes = gap_minutes
        self._tiles, self._visit = Tiles(CUSTOMER_ACTIVITY), Visit(gap_minutes=gap_minutes)
        self.pairs = {view: Keyed(aggregates) for view, aggregates in PAIRS.items()}
        self._session = self._visit.values()
        self._since: dict[str, int] = {}  # view -> when it last changed; a view that never held anything is not there
        self._last = _BEFORE_ALL  # (enter, time) of the newest row
        self._seen = _BEFORE_ALL[0]  # up to when time has passed
        self._waiting: int | None = None  # when the next row that is known already begins to count

    def fits(self, held: Held) -> bool:
        """Whether the row comes after all that were counted, so that it can be counted as well."""
        return (held.enter_us, held.row["ts"]) >= self._last

    def add(self, held: Held, *, now_us: int) -> None:
        """Count a row that fits. One that its sender's clock puts in the future counts when the time has come."""
        self.n_rows += 1
        if held.enter_us > max(now_us, held.known_us):
            self._waiting = held.enter_us if self._waiting is None else min(self._waiting, held.enter_us)
            return
        row, enter_us = held.row, held.enter_us
        if row["type"] in NOT_BEHAVIOUR:
            return
        self._last = (enter_us, row["ts"])
        self._seen = max(self._seen, enter_us)
        self._pass(enter_us)
        self._tiles.add({**row, "session_id": self._visit.name(row, enter_us)}, enter_us)
        self._since[ACTIVITY_VIEW] = max(enter_us, self._since.get(ACTIVITY_VIEW, enter_us))
        for keyed in self.pairs.values():
            keyed.add(row, enter_us)
        self._visit.add(row, enter_us)
        self._look(enter_us)

    def advance(self, now_us: int) -> None:
        """Let time pass: what expires until then, that instant included, has left."""
        now_us = max(now_us, self._seen)
        self._seen = now_us
        before = None
        while (at_us := self._tiles.next_us()) is not None and at_us <= now_us:
            before = self._tiles.values() if before is None else before
            self._tiles.advance(at_us)
            after = self._tiles.values()
            if after != before:
                self._since[ACTIVITY_VIEW] = max(at_us, self._since.get(ACTIVITY_VIEW, at_us))
            before = after
        for keyed in self.pairs.values():
            keyed.advance(now_us)
        self._pass(now_us)

    def is_due(self, now_us: int) -> bool:
        """Whether a row that was waiting has to be counted by now: it is made anew then."""
        return self._waiting is not None and self._waiting <= now_us

    def next_us(self) -> int | None:
        """When something next changes by itself, no later; None: never."""
        pairs = (keyed.next_us() for keyed in self.pairs.values())
        parts = (self._tiles.next_us(), self._visit.next_us(), *pairs, self._waiting)
        return min((at_us for at_us in parts if at_us is not None), default=None)

    @property
    def seen_us(self) -> int:
        """Up to when time has passed."""
        return self._seen

    def shown(self) -> dict[str, Changed]:
        """What each view of the customer alone shows; a view of which there never was anything is left out."""
        values = {ACTIVITY_VIEW: self._tiles.values(), SESSION_VIEW: self._session}
        return {view: Changed(values[view], since_us) for view, since_us in self._since.items()}

    def _pass(self, to_us: int) -> None:
        """The session falls silent until then, if it does."""
        end_us = self._visit.next_us()
        if end_us is not None and end_us <= to_us:
            self._visit.advance(end_us)
            self._look(end_us)

    def _look(self, at_us: int) -> None:
        values = self._visit.values()
        if values != self._session:
            self._session = values
            self._since[SESSION_VIEW] = max(at_us, self._since.get(SESSION_VIEW, at_us))


def made_of(rows: Iterable[Held], permits: Permits, *, gap_minutes: int, now_us: int, mark: int) -> Live:
    """A customer's state of all their rows, in order of enter."""
    live = Live(gap_minutes=gap_minutes, permits=permits, mark=mark)
    for held in rows:
        live.add(held, now_us=now_us)
    live.advance(now_us)
    return live
