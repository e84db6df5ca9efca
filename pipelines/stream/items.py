"""What is done with items, online: the rows of everybody, and the catalogue's lines -> the rows of item_activity, at once and exactly.

In: rows as the state keeps and drops them, and the time. Out: a row for each item of which something came, went or expired: what
`features build` over the same events would say of this instant. An event counts from its receipt: whose it is makes no difference,
and when people are merged no item moves. An item of which a row went is made anew from those that are left; the state notes down
which. Never decides what may be kept.
"""

import heapq
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

from feature_repo.aggregates import ITEM_ACTIVITY, NOT_BEHAVIOUR
from pipelines.online.feast_format import Key
from pipelines.online.writer import Row
from pipelines.stream.item_rows import NEVER, ItemDue, ItemRows
from pipelines.stream.keyed import Keyed
from pipelines.stream.pace import SLICE_S, Pace
from pipelines.stream.rows import CleanRow
from pipelines.stream.shown import ITEM_VIEW, Shown

AT_A_TIME = 50  # looked at together at most when they expire


class Items:
    """One worker's items. `share`: (k, n), it writes the k-th of n parts; `most`: held ready. Called inside `state.transaction()`."""

    def __init__(self, held: ItemRows, *, share: tuple[int, int], most: int) -> None:
        self.held, self.share, self.most = held, share, most
        self._lives: OrderedDict[str, _Live] = OrderedDict()
        self._touched: dict[str, None] = {}  # since they were last shown
        self._expiring = Pace()

    def keep(self, rows: Iterable[CleanRow], *, now_us: int) -> None:
        """Rows that the state keeps as of this moment."""
        for row in rows:
            if row.item_id is not None and self._is_mine(row.item_id):
                self._touched[row.item_id] = None
                if row.item_id in self._lives:  # else it is made of all that are kept
                    enter_us = max(row.event_us, row.received_us)
                    told = _told(row.item_id, row.type, row.event_us, row.price_cents, row.revenue_cents)
                    self._lives[row.item_id].add(told, enter_us, known_us=row.received_us, now_us=now_us)

    def renew(self, rows: Iterable[CleanRow]) -> None:
        """Rows that the state had already, of which nobody knows whether they were shown."""
        for name in {row.item_id for row in rows if row.item_id is not None and self._is_mine(row.item_id)}:
            self._touched[name] = None
            self._lives.pop(name, None)

    def apply(self, *, now_us: int) -> Shown:
        """What is to be written of the items of which something came."""
        touched, self._touched = sorted(self._touched), {}
        shown, due = self._show(touched, self.held.marks(touched), now_us)
        self.held.put_due(due)
        return shown

    def expire(self, *, now_us: int) -> tuple[Shown, dict[str, ItemDue]]:
        """What has changed by itself or lost a row, of as many items as there is time for; and when they change next.

        The caller notes the latter down once the former is written and committed.
        """
        begun_s = time.thread_time()
        marks = self.held.due(now_us, limit=self._expiring.fitting(AT_A_TIME, slice_s=SLICE_S / 2))
        ready = []
        for name, mark in marks.items():
            ready.append(name)
            if self._is_mine(name):
                self._live(name, mark, now_us)
            if time.thread_time() > begun_s + SLICE_S / 2:
                break
        shown = self._show(ready, marks, now_us)
        self._expiring.took(len(ready), time.thread_time() - begun_s)
        return shown

    def look_again(self) -> None:
        """A transaction was rolled back: what is held ready may not be what is stored."""
        self._lives.clear()
        self._touched.clear()

    def _show(self, names: Sequence[str], marks: Mapping[str, int], now_us: int) -> tuple[Shown, dict[str, ItemDue]]:
        rows: list[Row] = []
        gone: list[Key] = []
        due = {}
        for name in names:
            mark = marks.get(name, 0)
            due[name] = ItemDue(NEVER, mark)
            if self._is_mine(name):
                live = self._live(name, mark, now_us)
                live.advance(now_us)
                due[name] = ItemDue(live.next_us(), mark)
                rows += [Row(name, changed.values, event_us=changed.since_us) for changed in live.keyed.take().values()]
                if not live.keyed.keys():
                    gone.append(name)
        return Shown({ITEM_VIEW: rows}, {ITEM_VIEW: gone}), due

    def _live(self, name: str, mark: int, now_us: int) -> "_Live":
        """The item's state, made anew where it is not held ready, or lost a row."""
        live = self._lives.get(name)
        if live is None or live.mark != mark:
            live = self._lives[name] = _Live(mark)
            for row in self.held.rows(name):
                told = _told(name, row.type, row.event_us, row.price_cents, row.revenue_cents)
                live.add(told, row.enter_us, known_us=row.known_us, now_us=now_us)
        self._lives.move_to_end(name)
        while len(self._lives) > self.most:
            self._lives.popitem(last=False)
        return live

    def _is_mine(self, name: str) -> bool:
        part, parts = self.share
        return parts == 1 or int.from_bytes(blake2b(name.encode(), digest_size=8).digest()) % parts == part


class _Live:
    """One item. `mark`: how often rows had gone when it was made."""

    __slots__ = ("_waiting", "keyed", "mark")

    def __init__(self, mark: int) -> None:
        self.keyed, self.mark = Keyed(ITEM_ACTIVITY), mark
        self._waiting: list[tuple[int, int, dict[str, Any]]] = []  # heap: rows that begin to count later

    def add(self, row: dict[str, Any], enter_us: int, *, known_us: int, now_us: int) -> None:
        """Count a row. Of an item they may come in any order. One that its sender's clock puts in the future counts when it has come."""
        if row["type"] in NOT_BEHAVIOUR:
            return
        if enter_us > max(now_us, known_us):
            heapq.heappush(self._waiting, (enter_us, id(row), row))
        else:
            self.keyed.add(row, enter_us)

    def advance(self, now_us: int) -> None:
        while self._waiting and self._waiting[0][0] <= now_us:
            enter_us, _, row = heapq.heappop(self._waiting)
            self.keyed.add(row, enter_us)
        self.keyed.advance(now_us)

    def next_us(self) -> int:
        own = self.keyed.next_us()
        return min(NEVER if own is None else own, self._waiting[0][0] if self._waiting else NEVER)


def _told(item: str, kind: str, event_us: int, price: int | None, revenue: int) -> dict[str, Any]:
    """As `features.of_items` has it."""
    return {"item_id": item, "type": kind, "ts": event_us, "price_cents": price, "revenue_cents": revenue}
