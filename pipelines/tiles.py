"""Windowed aggregates of one key, event by event: the online twin of `changepoints.changelog`. For sessions see `Visit`.

In: the rows of one key, and the time. Out: its values from now on, and when they next change by themselves. Bit for bit what
the offline expression gives for the same rows. Opens no file, reads no clock, keeps no event.

An event of a window leaves at its exit, which is on a multiple of the hop: what leaves together is one tile. So memory grows with
the tiles that count and with the different values that distinct counts must remember, never with the number of events.
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from feature_repo.aggregates import DISTINCT_LIMIT, LARGEST, NOT_BEHAVIOUR, WINDOWS, Aggregates, Extreme, Latest
from pipelines.visit import Visit

__all__ = ["Tiles", "Values", "Visit"]

Values = dict[str, int | None]

_NEVER = -(2**63)


class Tiles:
    """The state of one key. Rows may come in any order of enter; what is told after each is right where they come in that order."""

    __slots__ = ("_best", "_kept", "_leaving", "_now", "_plan", "_seen", "_state", "_sums")

    def __init__(self, aggregates: Aggregates) -> None:
        self._plan = plan = _plan_of(aggregates)
        self._now = _NEVER
        self._state: list[Any] = list(plan.start)  # by column; of a value that its time decides the pair (ts, value)
        self._leaving: list[tuple[int, int]] = []  # heap of (exit, place): the tiles of sums first, then of distinct, then of best values
        self._sums: list[dict[int, dict[int, int]]] = [{} for _ in plan.windows]  # exit -> column -> what leaves then
        self._seen: list[set[Any]] = [set() for _ in plan.seen]
        self._kept = [_Kept() for _ in plan.kept]
        self._best: list[dict[int, Any]] = [{} for _ in plan.best]  # exit -> the best that leaves then

    def add(self, row: Mapping[str, Any], enter_us: int) -> None:
        """Count a row from `enter_us` on. row: "type", "ts" (microseconds) and the columns that the aggregates name, None where null."""
        kind = row["type"]
        if kind in NOT_BEHAVIOUR:
            return
        self.advance(enter_us)
        rule = self._plan.rules.get(kind, self._plan.other)
        self._add_sums(rule, row)
        self._add_distinct(rule, row)
        self._add_best(rule, row)

    def advance(self, to_us: int) -> None:
        """Let everything leave that expires up to and including `to_us`. Never goes back."""
        if to_us <= self._now:
            return
        self._now = to_us
        leaving, n_sums, n_kept = self._leaving, len(self._sums), len(self._sums) + len(self._kept)
        while leaving and leaving[0][0] <= to_us:
            exit_us, place = heapq.heappop(leaving)
            if place < n_sums:
                for column, amount in self._sums[place].pop(exit_us).items():
                    self._state[column] -= amount
            elif place < n_kept:
                self._kept[place - n_sums].drop(exit_us)
                self._state[self._plan.kept[place - n_sums].column] = len(self._kept[place - n_sums].exits)
            else:
                self._drop_best(place - n_kept, exit_us)

    def values(self) -> Values:
        """By column name, in the order of the aggregates' columns: the state from now on. Counts 0, else None, before any event."""
        values = dict(zip(self._plan.names, self._state, strict=True))
        for column in self._plan.dated:
            found = self._state[column]
            values[self._plan.names[column]] = None if found is None else found[1]
        return values

    def next_us(self) -> int | None:
        """When a tile leaves next, in microseconds since 1970; None where nothing will change by itself."""
        return self._leaving[0][0] if self._leaving else None

    def _add_sums(self, rule: "_Rule", row: Mapping[str, Any]) -> None:
        ts, state, now = row["ts"], self._state, self._now
        amounts = [
            0 if carrying is not None and row[carrying] is None else 1 if value is None else _held(row[value] or 0)
            for value, carrying in self._plan.amounts
        ]
        for column, amount in rule.totals:
            state[column] += amounts[amount]
        for window, sums in rule.sums:
            exit_us = self._plan.windows[window].exit_us(ts)
            if exit_us <= now:
                continue
            tile = self._sums[window].get(exit_us)
            if tile is None:
                tile = self._sums[window][exit_us] = {}
                heapq.heappush(self._leaving, (exit_us, window))
            for column, amount in sums:
                state[column] += amounts[amount]
                tile[column] = tile.get(column, 0) + amounts[amount]
        for column, is_first in rule.instants:
            held = state[column]
            state[column] = ts if held is None else min(held, ts) if is_first else max(held, ts)

    def _add_distinct(self, rule: "_Rule", row: Mapping[str, Any]) -> None:
        for i in rule.seen:
            place, seen = self._plan.seen[i], self._seen[i]
            if row[place.name] is not None and len(seen) < DISTINCT_LIMIT:
                seen.add(row[place.name])
                self._state[place.column] = len(seen)
        for i in rule.kept:
            place, kept = self._plan.kept[i], self._kept[i]
            exit_us = place.window.exit_us(row["ts"])
            if row[place.name] is not None and exit_us > self._now:
                if kept.add(row[place.name], exit_us):
                    heapq.heappush(self._leaving, (exit_us, len(self._sums) + i))
                self._state[place.column] = len(kept.exits)

    def _add_best(self, rule: "_Rule", row: Mapping[str, Any]) -> None:
        ts, state = row["ts"], self._state
        for best in rule.lasting:
            if row[best.name] is not None:
                state[best.column] = best.of(state[best.column], best.candidate(ts, row[best.name]))
        for i in rule.best:
            best, tiles = self._plan.best[i], self._best[i]
            exit_us = best.window.exit_us(ts)
            if row[best.name] is None or exit_us <= self._now:
                continue
            found = best.candidate(ts, row[best.name])
            if exit_us not in tiles:
                heapq.heappush(self._leaving, (exit_us, len(self._sums) + len(self._kept) + i))
            tiles[exit_us] = best.of(tiles.get(exit_us), found)
            state[best.column] = best.of(state[best.column], found)

    def _drop_best(self, i: int, exit_us: int) -> None:
        best, tiles = self._plan.best[i], self._best[i]
        if tiles.pop(exit_us) == self._state[best.column]:
            self._state[best.column] = (min if best.is_least else max)(tiles.values(), default=None)


def _held(value: int) -> int:
    return max(-LARGEST, min(LARGEST, value))


class _Kept:
    """The different values within one window, each until the latest exit of its events; of too many those that stay longest."""

    __slots__ = ("exits", "tiles")

    def __init__(self) -> None:
        self.exits: dict[Any, int] = {}
        self.tiles: dict[int, list[Any]] = {}  # exit -> values that had it as their latest once

    def add(self, value: Any, exit_us: int) -> bool:
        """Keep `value` until `exit_us` at least. Returns whether this is a tile that was not there."""
        held = self.exits.get(value)
        if (held is not None and held >= exit_us) or (held is None and len(self.exits) >= DISTINCT_LIMIT and not self._make_room(exit_us)):
            return False
        self.exits[value] = exit_us
        is_new = exit_us not in self.tiles
        self.tiles.setdefault(exit_us, []).append(value)
        return is_new

    def drop(self, exit_us: int) -> None:
        """Forget the values whose latest exit this is."""
        for value in self.tiles.pop(exit_us):
            if self.exits.get(value) == exit_us:
                del self.exits[value]

    def _make_room(self, exit_us: int) -> bool:
        """Forget a value that leaves before `exit_us`: it could not be missed before the limit is no longer reached."""
        for held in sorted(tile for tile in self.tiles if tile < exit_us):
            while self.tiles[held]:
                value = self.tiles[held].pop()
                if self.exits.get(value) == held:
                    del self.exits[value]
                    return True
        return False


@dataclass(frozen=True, slots=True)
class _Life:
    hop_us: int
    life_us: int  # from the start of an event's hop until its exit

    def exit_us(self, ts: int) -> int:
        return ts - ts % self.hop_us + self.life_us


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a distinct count or a best value stands: the column of its values in a row, its own among the values, its window."""

    name: str
    column: int
    window: _Life  # not looked at where it is of all time
    is_dated: bool = False
    is_least: bool = False

    def candidate(self, ts: int, value: int) -> Any:
        return (ts, _held(value)) if self.is_dated else _held(value)

    def of(self, held: Any, found: Any) -> Any:
        return found if held is None else min(held, found) if self.is_least else max(held, found)


@dataclass(frozen=True, slots=True)
class _Rule:
    """What rows of one type add to."""

    totals: tuple[tuple[int, int], ...]  # (column, amount)
    sums: tuple[tuple[int, tuple[tuple[int, int], ...]], ...]  # (window, (column, amount) of each)
    instants: tuple[tuple[int, bool], ...]
    seen: tuple[int, ...]
    kept: tuple[int, ...]
    lasting: tuple[_Place, ...]
    best: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Plan:
    """Where everything stands: compiled once for all keys."""

    names: tuple[str, ...]
    start: tuple[int | None, ...]
    amounts: tuple[tuple[str | None, str | None], ...]  # what sums add: a column or 1, and the column that must be there
    windows: tuple[_Life, ...]
    seen: tuple[_Place, ...]  # distinct values of all time
    kept: tuple[_Place, ...]  # of windows
    best: tuple[_Place, ...]  # of windows
    dated: tuple[int, ...]
    rules: dict[str, _Rule]
    other: _Rule  # of types that no aggregate names


_PLANS: dict[int, tuple[Aggregates, _Plan]] = {}  # by identity: there is one of each entity, and its hash costs more than its state


def _plan_of(aggregates: Aggregates) -> _Plan:
    found = _PLANS.get(id(aggregates))
    if found is None or found[0] is not aggregates:
        found = _PLANS[id(aggregates)] = aggregates, _plan(aggregates)
    return found[1]


@cache
def _plan(aggregates: Aggregates) -> _Plan:
    names = tuple(aggregates.columns())
    at = {name: column for column, name in enumerate(names)}
    counts = set(aggregates.counts())
    lives = {name: _Life(window.hop_us, window.size_us + window.hop_us) for name, window in WINDOWS.items()}
    used = [name for name in WINDOWS if any(name in a.windows for a in aggregates.sums)]
    amounts = tuple(dict.fromkeys((a.value, a.carrying) for a in aggregates.sums))

    def best(a: Extreme | Latest, of: str | None) -> _Place:
        column, is_dated = at[aggregates.column(a, of)], isinstance(a, Latest)
        return _Place(a.column, column, lives.get(of or "", lives["1h"]), is_dated, a.is_first if isinstance(a, Latest) else a.is_min)

    seen = [(a, _Place(a.column, at[aggregates.column(a, "total")], lives["1h"])) for a in aggregates.distincts if a.has_total]
    kept = [(a, _Place(a.column, at[aggregates.column(a, of)], lives[of])) for a in aggregates.distincts for of in a.windows]
    lasting: list[tuple[Extreme | Latest, _Place]] = [(a, best(a, "total")) for a in aggregates.extremes if a.has_total]
    lasting += [(a, best(a, None)) for a in aggregates.latests if a.window is None]
    moving: list[tuple[Extreme | Latest, _Place]] = [(a, best(a, of)) for a in aggregates.extremes for of in a.windows]
    moving += [(a, best(a, a.window)) for a in aggregates.latests if a.window is not None]

    def rule(kind: str | None) -> _Rule:
        sums = [(a, amounts.index((a.value, a.carrying))) for a in aggregates.sums if not a.types or kind in a.types]
        by_window = [(i, tuple((at[aggregates.column(a, w)], n) for a, n in sums if w in a.windows)) for i, w in enumerate(used)]
        return _Rule(
            totals=tuple((at[aggregates.column(a, "total")], n) for a, n in sums if a.has_total),
            sums=tuple((i, columns) for i, columns in by_window if columns),
            instants=tuple((at[aggregates.column(a)], a.is_first) for a in aggregates.instants if not a.types or kind in a.types),
            seen=tuple(i for i, (a, _) in enumerate(seen) if not a.types or kind in a.types),
            kept=tuple(i for i, (a, _) in enumerate(kept) if not a.types or kind in a.types),
            lasting=tuple(place for a, place in lasting if not a.types or kind in a.types),
            best=tuple(i for i, (a, _) in enumerate(moving) if not a.types or kind in a.types),
        )

    every = (*aggregates.sums, *aggregates.distincts, *aggregates.extremes, *aggregates.instants, *aggregates.latests)
    return _Plan(
        names=names,
        start=tuple(0 if name in counts else None for name in names),
        amounts=amounts,
        windows=tuple(lives[name] for name in used),
        seen=tuple(place for _, place in seen),
        kept=tuple(place for _, place in kept),
        best=tuple(place for _, place in moving),
        dated=tuple(at[aggregates.column(a, a.window)] for a in aggregates.latests),
        rules={kind: rule(kind) for a in every for kind in a.types},  # type: ignore[attr-defined]
        other=rule(None),
    )
