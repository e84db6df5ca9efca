"""Scores or an order of items -> the best that are allowed, at most so many of a category. Knows positions only, no names."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from models.lists import best

Places = NDArray[np.int64]
Flags = NDArray[np.bool_]
Allows = Callable[[Places | None], Flags]  # which items may be had: of all (n_items,), or of those in these places (m,)

LOOKED_AT = 4  # times as many as are wanted, at first, where a cap may leave some out


def best_of(scores: NDArray[np.float32], allowed: Flags, k: int, *, category: Places, most: int | None) -> Places:
    """Positions of the k highest scores that are allowed, best first, ties by position; fewer where there are no more."""
    open_ = np.where(allowed, scores, np.float32(-np.inf))
    size = k if most is None else LOOKED_AT * k
    while True:
        size = min(size, len(scores))
        found = best(open_[None], size)[0][0] if size else np.empty(0, dtype=np.int64)
        found = found[found >= 0]
        kept = found[capped(category[found], most)]
        if len(kept) >= k or len(found) < size or size == len(scores):
            return kept[:k]
        size *= LOOKED_AT


def first_of(order: Places, allowed: Flags, k: int, *, category: Places, most: int | None) -> Places:
    """The first k positions of the order that are allowed; fewer where there are no more."""
    size = 64 + 2 * k
    while True:
        found = order[:size]
        found = found[allowed[found]]
        kept = found[capped(category[found], most)]
        if len(kept) >= k or size >= len(order):
            return kept[:k]
        size *= 8


def capped(category: Places, most: int | None) -> Flags:
    """Which of a list, best first, stay if at most so many may be of one category; what has none (-1) always does."""
    if most is None:
        return np.ones(len(category), dtype=bool)
    order = np.argsort(category, kind="stable")
    ordered = category[order]
    nth = np.empty(len(category), dtype=np.int64)
    nth[order] = np.arange(len(category)) - np.searchsorted(ordered, ordered)
    return (nth < most) | (category < 0)
