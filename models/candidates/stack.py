"""Several linear sources read in one pass: what they say of one customer costs little more than what one of them says."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from models.candidates.history import Floats, is_in
from models.candidates.opinion import Places
from models.candidates.source import Linear
from models.lists import Singles, best

MOST_ITEMS = 100  # of one customer's history, the heaviest, that are added up
LIGHTEST = 0.003  # of the heaviest: what is lighter moves nothing

_NO_ITEMS, _NO_WEIGHTS = np.empty(0, dtype=np.int32), np.empty(0)


@dataclass(frozen=True)
class Stack:
    """The weights of sources of the same items, csr (n_items, n_items)."""

    matrices: Sequence[Any]

    @classmethod
    def of(cls, sources: Sequence[Linear]) -> Self:
        """Of these sources, which keep their weights."""
        return cls([source.weights_ for source in sources])

    def asked(self, histories: Sequence[tuple[Places, Floats]]) -> "Sums":
        """What the sources say of one customer, of whom each is told the weights > 0 (r,) of items (r,), each once.

        Of more items than `MOST_ITEMS` the heaviest are added up, and none that is lighter than `LIGHTEST`.
        """
        found, told, counting = [_NO_ITEMS], [_NO_WEIGHTS], [_NO_WEIGHTS]
        for matrix, (items, weights) in zip(self.matrices, histories, strict=True):
            items, weights = _heaviest(items, weights)
            begins, ends = matrix.indptr[items], matrix.indptr[items + 1]
            rows = [slice(*row) for row in zip(begins.tolist(), ends.tolist(), strict=True)]  # copied whole: cheaper than entry by entry
            found += [matrix.indices[row] for row in rows]
            told += [matrix.data[row] for row in rows]
            counting.append(weights.repeat(ends - begins))
        entries, added = np.concatenate(found), np.concatenate(told) * np.concatenate(counting)
        # few of many items are told of: these are numbered, and added up under their numbers
        is_told = np.zeros(self.matrices[0].shape[1] if self.matrices else 0, dtype=bool)
        is_told[entries] = True
        items = is_told.nonzero()[0]
        number = np.empty(len(is_told), dtype=np.int64)
        number[items] = np.arange(len(items))
        cells, first = number.take(entries), 0
        for some in counting[1:-1]:
            first += len(some)
            cells[first:] += len(items)
        sums = np.bincount(cells, weights=added, minlength=len(histories) * len(items))
        return Sums(items, sums.astype(np.float32).reshape(len(histories), len(items)))


@dataclass(frozen=True)
class Sums:
    """Scores of some items (n,), ascending, by source (n_sources, n); all others have 0."""

    items: Places
    scores: Singles

    def best(self, k: int, barred: Places) -> Places:
        """The k items of each source's highest scores above 0, of equal ones the lower position, fewer where there are no more; in any
        order, an item of several sources several times. barred: items that are not asked about.
        """
        scores = self.scores
        if len(barred):
            scores = np.where(is_in(self.items, barred), np.float32(0), scores)
        places, top = best(scores, k)
        return self.items[places[top > 0]]

    def of(self, items: Places) -> Singles:
        """By source the score of each of the items (n_sources, n)."""
        if not len(self.items):
            return np.zeros((len(self.scores), len(items)), dtype=np.float32)
        place = np.minimum(self.items.searchsorted(items), len(self.items) - 1)
        return np.where(self.items.take(place) == items, self.scores.take(place, axis=1), np.float32(0))


def _heaviest(items: Places, weights: Floats) -> tuple[Places, Floats]:
    counts = weights >= LIGHTEST * weights.max(initial=0.0)
    if not counts.all():
        items, weights = items[counts], weights[counts]
    if len(items) <= MOST_ITEMS:
        return items, weights
    heaviest = np.sort(np.argsort(-weights, kind="stable")[:MOST_ITEMS])
    return items[heaviest], weights[heaviest]
