"""The current session of one customer, event by event: the online twin of `sessions`.

In: the rows of one customer that are behaviour, and the time. Out: what the session holds from now on and when it falls silent; the
session id under which aggregates count each row. Bit for bit what `sessions.identified` and `sessions.changelog` give for the same rows.
Opens no file, reads no clock, keeps no event.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from feature_repo.aggregates import LARGEST, SESSION_COUNTS, SESSION_INSTANTS

ASSIGNED = "s:[0-9a-f]{16}|gap-[0-9]+"  # no name of a source: what ingest or `sessions` calls a session that came without

_ASSIGNED = re.compile(ASSIGNED)
_NEVER = -(2**63)


class Visit:
    """The current session of one customer. Rows come in order of (enter, ts); only those that are behaviour.

    A session that a source named can be taken up again whenever it likes, so what each of them holds is remembered.
    """

    __slots__ = ("_gap", "_given", "_newest", "_newest_bare", "_now", "_number", "_unnamed")

    def __init__(self, *, gap_minutes: int) -> None:
        self._gap = gap_minutes * 60_000_000
        self._now = _NEVER
        self._newest: tuple[int, str] | None = None  # (ts, session) of the newest row of all
        self._newest_bare: int | None = None  # ts of the newest row that came without a session
        self._number = 0  # of the session that such rows are in; none before is ever taken up again
        self._unnamed = _Held()
        self._given: dict[str, _Held] = {}

    def name(self, row: Mapping[str, Any], enter_us: int) -> str | None:
        """The session id under which aggregates count this row, before it is added; None: it came after its session was long over."""
        given = row["session_id"]
        if given is not None and not _ASSIGNED.fullmatch(given):
            return str(given)
        newest = self._newest_bare
        if newest is not None and newest - row["ts"] > self._gap:
            return None
        return f"gap-{self._number + (newest is None or row['ts'] - newest > self._gap)}"

    def add(self, row: Mapping[str, Any], enter_us: int) -> None:
        """Count a row from `enter_us` on. row: "type", "ts", "session_id" as the source gave it, "item_id", "price_cents", "quantity"."""
        name, ts = self.name(row, enter_us), row["ts"]
        self.advance(enter_us)
        given = row["session_id"]
        if given is not None and not _ASSIGNED.fullmatch(given):
            held = self._given.setdefault(str(given), _Held())
        else:
            if self._newest_bare is None or ts - self._newest_bare > self._gap:
                self._number, self._unnamed = self._number + 1, _Held()
            self._newest_bare = ts if self._newest_bare is None else max(self._newest_bare, ts)
            held = self._unnamed
        if name is None:
            return
        held.add(row)
        self._newest = (ts, name) if self._newest is None else max(self._newest, (ts, name))

    def advance(self, to_us: int) -> None:
        """Let time pass until `to_us`. Never goes back."""
        self._now = max(self._now, to_us)

    def values(self) -> dict[str, int | None]:
        """By column name of customer_session: what the session holds from now on; zeros and None once it has fallen silent."""
        end = self._end()
        held = _Held() if end is None or self._now >= end or self._newest is None else self._held(self._newest[1])
        counts = (*held.counts, len(held.items), max(held.cart_cents, 0))
        return dict(zip((*SESSION_COUNTS, *SESSION_INSTANTS), (*counts, held.first, held.last), strict=True))

    def next_us(self) -> int | None:
        """When the session falls silent, in microseconds since 1970; None where it has."""
        end = self._end()
        return end if end is not None and self._now < end else None

    def _end(self) -> int | None:
        return None if self._newest is None else self._newest[0] + self._gap

    def _held(self, name: str) -> "_Held":
        return self._given.get(name, self._unnamed)


_COUNTED = {"view": 1, "cart_add": 2, "search": 3, "purchase": 4}  # places in `_Held.counts`, after that of all events
_CART = {"cart_add": 1, "cart_remove": -1, "purchase": -1}


@dataclass(slots=True)
class _Held:
    """What one session holds: counts in the order of SESSION_COUNTS, without the two that are made when they are read."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(SESSION_COUNTS) - 2))
    items: set[str] = field(default_factory=set)
    cart_cents: int = 0
    first: int | None = None
    last: int | None = None

    def add(self, row: Mapping[str, Any]) -> None:
        kind, ts = row["type"], row["ts"]
        self.counts[0] += 1
        if kind in _COUNTED:
            self.counts[_COUNTED[kind]] += 1
        if row["item_id"] is not None:
            self.items.add(row["item_id"])
        quantity = 1 if row["quantity"] is None else row["quantity"]
        self.cart_cents += _CART.get(kind, 0) * max(0, min(LARGEST, (row["price_cents"] or 0) * quantity))
        self.first = ts if self.first is None else min(self.first, ts)
        self.last = ts if self.last is None else max(self.last, ts)
