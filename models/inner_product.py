"""The items with the largest inner products with a query, found without looking at all of every item: exact, and two to four times cheaper.

Items are kept by length, longest first, and turned so that their first coordinates hold most of them. A few coordinates and the length of
the rest bound an inner product from above (Cauchy & Schwarz): what cannot reach the k-th best found so far is not looked at closer, and
what is too short to reach it is not looked at. Numpy only; knows positions, no names.

Sources: Teflioudi, Gemulla & Mykytiuk, "LEMP", SIGMOD 2015 (by length); Li, Chan, Yiu & Mamoulis, "FEXIPRO", SIGMOD 2017 (principal axes).
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from models import lists
from models.lists import Singles

Floats = NDArray[np.float64]
Places = NDArray[np.int64]
Flags = NDArray[np.bool_]

LEADING = 40  # coordinates that a bound is made of, beside lengths
GROUPS = 4  # of the other coordinates: each is bounded by its own length, which is closer than one length of all
FIRST_SHARE = 8  # the longest one in so many items are scored at once: what they reach is what the others are held against
FIRST_OF_ALL = 8  # one in so many of these before the others: where few items are far longer than most they are often enough
GROWTH = 8  # times as many items as all before are looked at next, at most
FEW_SHARE = 64  # where no more than one in so many items is allowed, each of them is scored
USELESS_SHARE = 4  # where more than one in so many items of a look is left, all items are scored
LONGEST = 1e15  # of an item or a query: no sum of products overflows

_UNIT = float(np.finfo(np.float32).eps)  # twice the largest relative error of one rounding
_SMALLEST = 1e-37  # products below it lose their digits
_LOWEST = float(np.finfo(np.float32).min)


@dataclass(frozen=True)
class InnerProducts:
    """Items (n, d), ready to be searched. Holds four bytes (LEADING + GROUPS + 4 + d / FIRST_SHARE) times for each, beside the items."""

    items: Singles
    axes: Floats  # (d, d), a rotation: the items' principal axes, strongest first
    order: Places  # (n,) positions, longest first
    shortness: Floats  # (n,) their lengths in that order, negative
    longest: Singles  # (m, d) the first items in that order
    table: Singles  # (coordinates and lengths of groups, n) in that order
    starts: Places  # coordinates with which groups begin

    @classmethod
    def of(cls, items: Singles, *, leading: int = LEADING, groups: int = GROUPS) -> Self:
        """The items, kept and not copied: they must not change.

        Raises ValueError where they are no matrix of float32, or not all of them finite and no longer than `LONGEST`.
        """
        if items.ndim != 2 or items.dtype != np.float32:
            raise ValueError(f"inner products: expected a matrix of float32, found {items.dtype} of shape {items.shape}")
        n, width = items.shape
        wide = items.astype(np.float64)
        lengths = np.sqrt(np.einsum("ij,ij->i", wide, wide))
        if not (lengths <= LONGEST).all():
            raise ValueError(f"inner products: expected finite items, found {int((~(lengths <= LONGEST)).sum())} others; train them again")
        axes = np.ascontiguousarray(np.linalg.eigh(wide.T @ wide)[1][:, ::-1])
        order = np.argsort(-lengths, kind="stable")
        turned = wide[order] @ axes
        first = min(leading, width)
        starts = np.array([part[0] for part in np.array_split(np.arange(first, width), groups) if len(part)], dtype=np.int64)
        table = np.vstack([turned[:, :first].T, _group_lengths(turned, starts).T]).astype(np.float32)
        return cls(items, axes, order, -lengths[order], items[order[: n // FIRST_SHARE]], table, starts)

    def best(self, query: Singles, k: int, *, allowed: Flags | None = None) -> tuple[Places, Singles]:
        """Positions of the k items with the largest `scores`, and these, best first, of equal ones the lower position; fewer where no more
        are allowed. query: (d,). allowed: (n,), None allows all. Raises ValueError on a query that is not finite, or longer than `LONGEST`.
        """
        point, n = query.astype(np.float64), len(self.items)
        length = float(np.sqrt(point @ point))
        if not length <= LONGEST:
            raise ValueError(f"inner products: expected a finite query, found one of length {length}")
        if k < 1 or (allowed is not None and np.count_nonzero(allowed) * FEW_SHARE <= n):
            return self._ranked(point, np.empty(0, np.int64) if allowed is None else np.flatnonzero(allowed), k)
        # what two float32 sums of products can be off together, and the rounding of a score
        longest = -float(self.shortness[0]) if n else 0.0
        slack = (self.items.shape[1] + 16) * _UNIT * (length * longest + _SMALLEST)
        if len(self.longest) < k:
            return self._plainly(query, k, allowed, slack)
        found, values, looked = self.order[:0], np.empty(0, dtype=np.float32), 0
        for stop in (len(self.longest) // FIRST_OF_ALL, len(self.longest)):
            look = slice(looked, stop)
            values = np.concatenate([values, self._open(self.longest[look] @ query, allowed, look)])
            near, at_least = _near(values, k, slack)
            found, values, looked = np.concatenate([found, self.order[look]]).take(near), values.take(near), stop
            reach = self._reach(at_least, length)
            if reach <= looked:
                return self._ranked(point, found, k)
        weights = self._weights(point @ self.axes)
        while reach > looked:
            look = slice(looked, min(reach, GROWTH * looked))
            bounds = self._open(weights @ self.table[:, look], allowed, look)
            left = np.flatnonzero(bounds >= at_least)
            if len(left) * USELESS_SHARE > look.stop - looked:
                return self._plainly(query, k, allowed, slack)
            left = self.order[look][left]
            found, values = np.concatenate([found, left]), np.concatenate([values, self.items[left] @ query])
            near, at_least = _near(values, k, slack)
            found, values, looked = found[near], values[near], look.stop
            reach = self._reach(at_least, length)
        return self._ranked(point, found, k)

    def scores(self, query: Singles, places: Places) -> Singles:
        """Inner products (r,) of the query with the items at these positions: summed in double precision and rounded once, so that a score
        does not depend on what else is asked for.
        """
        return self._scores(query.astype(np.float64), places)

    def _reach(self, at_least: float, length: float) -> int:
        """How many items, the longest, can have so large a product with a query of this length."""
        return len(self.items) if at_least <= 0 else int(self.shortness.searchsorted(-at_least / length, side="right"))

    def _weights(self, turned: Floats) -> Singles:
        """What each row of the table counts for in the bounds of a query that was turned (d,)."""
        rests = _group_lengths(turned, self.starts)
        return np.concatenate([turned[: len(self.table) - len(rests)], rests]).astype(np.float32)

    def _scores(self, point: Floats, places: Places) -> Singles:
        # einsum, not BLAS, whose sums depend on where in the matrix a row stands
        found: Singles = np.einsum("ij,j->i", self.items.take(places, axis=0).astype(np.float64), point).astype(np.float32)
        return found

    def _open(self, values: Singles, allowed: Flags | None, look: slice) -> Singles:
        """The values of items in their order, without those that are not allowed."""
        return values if allowed is None else np.where(allowed[self.order[look]], values, np.float32(-np.inf))

    def _plainly(self, query: Singles, k: int, allowed: Flags | None, slack: float) -> tuple[Places, Singles]:
        values = self.items @ query
        near, _ = _near(values if allowed is None else np.where(allowed, values, np.float32(-np.inf)), k, slack)
        return self._ranked(query.astype(np.float64), near, k)

    def _ranked(self, point: Floats, places: Places, k: int) -> tuple[Places, Singles]:
        scores = self._scores(point, places)
        best = np.lexsort((places, -scores))[:k]
        return places[best], scores[best]


# -- private -----------------------------------------------------------------------------------------------------------


def _near(values: Singles, k: int, slack: float) -> tuple[Places, float]:
    """Where the k best finite values are, and all that are no more than `slack` below them; and the value from which on they are kept."""
    if len(values) >= 2 * lists.GROUPS_PER_PLACE * k:
        least = float(lists.bound(values[None], k)[0, 0])  # a little lower, and several times cheaper
    else:
        least = float(np.partition(values, -k)[-k]) if len(values) >= k else _LOWEST
    at_least = max(least - slack, _LOWEST)
    return (values >= at_least).nonzero()[0], at_least


def _group_lengths(rows: Floats, starts: Places) -> Floats:
    """The length of each group of coordinates (.., groups) of rows (.., d)."""
    return np.asarray(np.sqrt(np.add.reduceat(rows * rows, starts, axis=-1))) if starts.size else np.empty((*rows.shape[:-1], 0))
