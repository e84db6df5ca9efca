"""Positions of the log as text, in ranges: how a run notes down what it has applied.

In: whole numbers. Out: "1-500,502-600", and the reverse. Opens nothing.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Any

_RANGE = re.compile(r"(\d+)-(\d+)")


class Ranges:
    """A set of positions: `position in ranges`. What is no whole number is in none."""

    def __init__(self, pairs: Iterable[tuple[int, int]] = ()) -> None:
        """`pairs`: first and last position of each, in any order; they may overlap."""
        self._pairs: list[list[int]] = []
        for first, last in sorted(pairs):
            if self._pairs and first <= self._pairs[-1][1] + 1:
                self._pairs[-1][1] = max(self._pairs[-1][1], last)
            else:
                self._pairs.append([first, last])
        self._firsts = [first for first, _ in self._pairs]

    @classmethod
    def read(cls, texts: Iterable[str]) -> "Ranges":
        """Of what `str` made of several; anything else in the texts is passed over."""
        return cls((int(first), int(last)) for text in texts for first, last in _RANGE.findall(text))

    @classmethod
    def of(cls, positions: Iterable[int]) -> "Ranges":
        """Of single positions."""
        return cls((position, position) for position in positions)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """First and last position of each range, in order."""
        return ((first, last) for first, last in self._pairs)

    def __contains__(self, position: Any) -> bool:
        if not isinstance(position, int):
            return False
        at = bisect_right(self._firsts, position) - 1
        return at >= 0 and position <= self._pairs[at][1]

    def __str__(self) -> str:
        return ",".join(f"{first}-{last}" for first, last in self._pairs)
