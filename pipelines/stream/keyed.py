"""Aggregates of something, such as the items of one customer: for each of these the values, and when they last changed.

In: rows in order of enter, and the time. Out: what changed since it was last asked. Opens no file, reads no clock.
"""

import heapq
from collections.abc import Mapping
from typing import Any, NamedTuple

from feature_repo.aggregates import WINDOWS, Aggregates
from pipelines.tiles import Tiles, Values

_LIVES = {name: (window.hop_us, window.size_us + window.hop_us) for name, window in WINDOWS.items()}  # from an event's hop until its exit


class Changed(NamedTuple):
    """What a row shows, and since when (microseconds)."""

    values: Values
    since_us: int


class Keyed:
    """Values by the last key of the aggregates."""

    __slots__ = ("_aggregates", "_exits", "_fresh", "_leaving", "_lives", "_since", "_tiles", "name")

    def __init__(self, aggregates: Aggregates) -> None:
        self._aggregates, self.name = aggregates, aggregates.key[-1]
        self._lives = [_LIVES[name] for name in dict.fromkeys(name for declared in aggregates.sums for name in declared.windows)]
        self._tiles: dict[str, Tiles] = {}
        self._since: dict[str, int] = {}
        self._fresh: set[str] = set()  # keys that changed since they were last shown
        self._leaving: list[tuple[int, str]] = []  # heap: when a row of which key leaves a window
        self._exits: set[tuple[int, str]] = set()  # the same

    def add(self, row: Mapping[str, Any], enter_us: int) -> None:
        """Count a row, if it names a key."""
        key = row[self.name]
        if key is None:
            return
        tiles = self._tiles.get(key)
        if tiles is None:
            tiles = self._tiles[key] = Tiles(self._aggregates)
        tiles.add(row, enter_us)
        self._since[key] = max(enter_us, self._since.get(key, enter_us))
        self._fresh.add(key)
        ts = row["ts"]
        for hop_us, life_us in self._lives:  # also of rows that are not counted: their tables have a change point there
            self._note(ts - ts % hop_us + life_us, enter_us, key)

    def advance(self, now_us: int) -> None:
        """Let time pass: what expires until then, that instant included, has left."""
        while self._leaving and self._leaving[0][0] <= now_us:
            at_us, key = heapq.heappop(self._leaving)
            self._exits.discard((at_us, key))
            self._tiles[key].advance(at_us)
            self._since[key] = max(at_us, self._since[key])
            self._fresh.add(key)

    def next_us(self) -> int | None:
        """When something next changes by itself, no later; None: never."""
        return self._leaving[0][0] if self._leaving else None

    def shown_until(self, shown_us: int) -> None:
        """What it was at that time is shown already: only what changed later is still to be."""
        self._fresh = {key for key in self._fresh if self._since[key] > shown_us}

    def take(self) -> dict[str, Changed]:
        """By key what has changed since it was last taken."""
        fresh, self._fresh = self._fresh, set()
        return {key: Changed(self._tiles[key].values(), self._since[key]) for key in sorted(fresh)}

    def keys(self) -> set[str]:
        """All keys that there is something of."""
        return set(self._tiles)

    def _note(self, exit_us: int, enter_us: int, key: str) -> None:
        if enter_us < exit_us and (exit_us, key) not in self._exits:
            self._exits.add((exit_us, key))
            heapq.heappush(self._leaving, (exit_us, key))
