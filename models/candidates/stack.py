"""Several linear sources read in one pass: what they say of one customer costs little more than what one of them says."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from models.candidates.history import Floats, Integers
from models.candidates.opinion import Places
from models.candidates.source import Linear
from models.lists import Singles, best

MOST_ITEMS = 100  # of one customer's history, the heaviest, that are added up
LIGHTEST = 0.003  # of the heaviest: what is lighter moves nothing


@dataclass(frozen=True)
class Stack:
    """The weights of the sources, one behind the other. starts: (n_sources, n_items + 1), where in `items` and `weights` an item's are."""

    starts: Integers
    items: NDArray[np.int32]
    weights: Singles

    @classmethod
    def of(cls, sources: Sequence[Linear]) -> Self:
        """Of sources of the same items, whose own `weights_` become views of these: they are held once."""
        matrices = [source.weights_ for source in sources]
        items = np.concatenate([matrix.indices for matrix in matrices]).astype(np.int32, copy=False)
        weights = np.concatenate([matrix.data for matrix in matrices])
        ends = np.cumsum([matrix.nnz for matrix in matrices])
        for source, matrix, end in zip(sources, matrices, ends.tolist(), strict=True):
            part = slice(end - matrix.nnz, end)
            source.weights_ = sparse.csr_matrix((weights[part], items[part], matrix.indptr), matrix.shape, copy=False)
        firsts = [0, *ends[:-1].tolist()]
        starts = np.stack([matrix.indptr.astype(np.int64) + first for matrix, first in zip(matrices, firsts, strict=True)])
        return cls(starts, items, weights)

    def asked(self, histories: Sequence[tuple[Places, Floats]]) -> "Sums":
        """What the sources say of one customer, of whom each is told the weights > 0 (r,) of items (r,), each once.

        Of more items than `MOST_ITEMS` the heaviest are added up, and none that is lighter than `LIGHTEST`.
        """
        told = [_heaviest(items, weights) for items, weights in histories]
        begins = np.concatenate([starts[items] for starts, (items, _) in zip(self.starts, told, strict=True)])
        counts = np.concatenate([starts[items + 1] for starts, (items, _) in zip(self.starts, told, strict=True)]) - begins
        ends = np.cumsum(counts)
        n = int(ends[-1]) if len(ends) else 0
        places = np.arange(n)
        places += np.repeat(begins - (ends - counts), counts)
        found = self.items.take(places)
        added = self.weights.take(places) * np.repeat(np.concatenate([weights for _, weights in told]), counts)
        scores = np.empty((len(told), self.starts.shape[1] - 1), dtype=np.float32)
        first, row = 0, 0
        for source, (items, _) in enumerate(told):
            row += len(items)
            last = int(ends[row - 1]) if row else 0
            scores[source] = np.bincount(found[first:last], weights=added[first:last], minlength=scores.shape[1])
            first = last
        return Sums(scores)


@dataclass(frozen=True)
class Sums:
    """The score of every item by source (n_sources, n_items)."""

    scores: Singles

    def best(self, k: int, barred: Places) -> Places:
        """The k items of each source's highest scores above 0, of equal ones the lower position, fewer where there are no more; in any
        order, an item of several sources several times. barred: items that are not asked about.
        """
        scores = self.scores
        if len(barred):
            scores = scores.copy()
            scores[:, barred] = 0.0
        items, top = best(scores, k)
        return items[top > 0]

    def of(self, items: Places) -> Singles:
        """By source the score of each of the items (n_sources, n)."""
        return self.scores.take(items, axis=1)


def _heaviest(items: Places, weights: Floats) -> tuple[Places, Floats]:
    counts = weights >= LIGHTEST * weights.max(initial=0.0)
    if not counts.all():
        items, weights = items[counts], weights[counts]
    if len(items) <= MOST_ITEMS:
        return items, weights
    heaviest = np.sort(np.argsort(-weights, kind="stable")[:MOST_ITEMS])
    return items[heaviest], weights[heaviest]
