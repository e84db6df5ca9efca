"""Several linear sources read in one pass: what they say of one customer costs little more than what one of them says."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from models.candidates.history import Floats, is_in
from models.candidates.opinion import Places
from models.candidates.source import Linear
from models.lists import Singles, bound

MOST_ITEMS = 100  # of one customer's history, the heaviest, that are added up
LIGHTEST = 0.003  # of the heaviest: what is lighter moves nothing

_NO_ITEMS, _NO_WEIGHTS = np.empty(0, dtype=np.int32), np.empty(0)
_SMALLEST = np.finfo(np.float32).smallest_subnormal


@dataclass(frozen=True)
class Stack:
    """The weights of sources of the same items, csr (n_items, n_items)."""

    matrices: Sequence[Any]

    @classmethod
    def of(cls, sources: Sequence[Linear]) -> Self:
        """Of these sources, which keep their weights."""
        return cls([source.weights_ for source in sources])

    def asked(self, items: Places, weights: Floats) -> "Sums":
        """What the sources say of one customer with these items (r,), each once, of which each source is told the weights (n_sources, r).

        Of more items than `MOST_ITEMS` the heaviest are added up, and none that is lighter than `LIGHTEST`.
        """
        found, told, counting = [_NO_ITEMS], [_NO_WEIGHTS], [_NO_WEIGHTS]
        counts = weights >= np.maximum(LIGHTEST * weights.max(axis=1, initial=0.0, keepdims=True), _SMALLEST)
        for matrix, mine, has in zip(self.matrices, weights, counts, strict=True):
            some, mine = _heaviest(items[has], mine[has])
            begins, ends = matrix.indptr.take(some), matrix.indptr.take(some + 1)
            rows = list(zip(begins.tolist(), ends.tolist(), strict=True))  # copied whole: cheaper than entry by entry
            found += [matrix.indices[begin:end] for begin, end in rows]
            told += [matrix.data[begin:end] for begin, end in rows]
            counting.append(mine.repeat(ends - begins))
        entries, added = np.concatenate(found, dtype=np.intp), np.concatenate(told)
        added *= np.concatenate(counting)
        # few of many items are told of: what is told of one is added up at one of its entries
        n, entry = len(entries), np.empty(self.matrices[0].shape[1] if self.matrices else 0, dtype=np.intp)
        entry[entries] = np.arange(n)
        cells, first = entry.take(entries), 0
        for mine in counting[1:-1]:
            first += len(mine)
            cells[first:] += n
        sums = np.bincount(cells, weights=added, minlength=len(self.matrices) * n)
        return Sums(entries, sums.astype(np.float32).reshape(len(self.matrices), n), entry)


@dataclass(frozen=True)
class Sums:
    """Items (n,), in any order, some of them several times, and their scores by source (n_sources, n), each at one of its item's places, 0
    at the others. An item that is not there has 0. entry: (n_items,) the place of its score; of an item that is not there any number.
    """

    items: Places
    scores: Singles
    entry: Places

    def best(self, k: int, barred: Places) -> Places:
        """The k items of each source's highest scores above 0, of equal ones the lower position, fewer where there are no more; in any
        order, an item of several sources several times. barred: items that are not asked about.
        """
        scores = self.scores
        if len(barred):
            scores = np.where(is_in(self.items, barred), np.float32(0), scores)
        found = list[Places]()
        for mine, at_least in zip(scores, np.maximum(bound(scores, k), _SMALLEST), strict=True):
            near = (mine >= at_least).nonzero()[0]
            items = self.items.take(near)
            found.append(items if len(items) <= k else items[np.lexsort((items, -mine.take(near)))[:k]])
        return np.concatenate(found) if found else self.items[:0]

    def of(self, items: Places) -> Singles:
        """By source the score of each of the items (n_sources, n)."""
        if not len(self.items):
            return np.zeros((len(self.scores), len(items)), dtype=np.float32)
        place = self.entry.take(items)
        is_there = self.items.take(place, mode="clip") == items
        return np.where(is_there, self.scores.take(place, axis=1, mode="clip"), np.float32(0))


def _heaviest(items: Places, weights: Floats) -> tuple[Places, Floats]:
    if len(items) <= MOST_ITEMS:
        return items, weights
    heaviest = np.sort(np.argsort(-weights, kind="stable")[:MOST_ITEMS])
    return items[heaviest], weights[heaviest]
