"""What items are, not who chose them: the source that can rank an item nobody has touched yet."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from models.candidates.history import is_in
from models.candidates.opinion import Opinion, Places
from models.candidates.source import Source, checked
from models.lists import Singles


class Content(Source):
    """How much likelier than by chance the customer turns to items with these attributes, averaged over an item's attributes.

    An attribute is a column of 0 and 1, such as one category or one price band. With n weights of the customer, of them n_a on
    items with attribute a, and p_a the share of all customers' weights there: (n_a + prior * p_a) / (n + prior) over a's share
    of the catalogue. prior: how much weight of one's own counts as much as everybody's taste, in purchases.

    Learned: `attributes_` csr (n_items, n_attributes), `taste_` (n_attributes,) p_a, `popular_` (n_items,) all items by their total weight:
    of items with the same attributes one customer is offered the most popular.
    """

    _arrays = ("taste_", "popular_")
    _matrices = ("attributes_",)

    taste_: Singles
    popular_: Places
    attributes_: Any

    def __init__(self, *, prior: float = 1.0, random_state: int = 0) -> None:
        self.prior = prior
        self.random_state = random_state

    def fit(self, interactions: Any, validation: Any = None, *, attributes: Any = None) -> Self:
        """As every source, with what items are: csr (n_items, n_attributes) of 0 and 1. Without it every score is 0."""
        if not self.prior > 0:
            raise ValueError(f"Content: prior must be above 0, found {self.prior}")
        n_items = interactions.shape[1]
        self.attributes_ = sparse.csr_matrix((n_items, 0)) if attributes is None else checked(attributes)
        if self.attributes_.shape[0] != n_items or (self.attributes_.data != 1).any():
            raise ValueError(f"Content: expected attributes of 0 and 1 for {n_items} items, found shape {self.attributes_.shape}")
        return super().fit(interactions)

    def _learn(self, weights: Any) -> None:
        by_item = np.asarray(weights.sum(axis=0)).ravel()
        self.taste_ = np.asarray((by_item @ self.attributes_) / weights.sum(), dtype=np.float32).ravel()
        self.popular_ = np.argsort(-by_item, kind="stable")
        self._arrange()

    def asked(self, items: Places, weights: NDArray[np.float64]) -> Opinion:
        """See `Source`."""
        has = self._has[:, items]
        own = np.bincount(has.ravel(), weights=np.concatenate([weights] * len(has)), minlength=len(self._expected)) + self._expected
        own /= self._offered * (weights.sum() + self.prior)
        own[-1] = 0.0
        return Cells((own.take(self._kinds).sum(axis=0) / self._size).astype(np.float32), self._cell, self._members, self._starts)

    def _arrange(self) -> None:
        """Items with the same attributes are one cell. An item with fewer attributes than others has the one after the last instead."""
        matrix, (n_items, n) = self.attributes_, self.attributes_.shape
        offered = np.append(np.asarray(matrix.mean(axis=0)).ravel(), 1.0)
        self._offered = np.where(offered > 0, offered, 1.0)
        self._expected = np.append(self.prior * self.taste_.astype(np.float64), 0.0)
        counts = np.diff(matrix.indptr)
        has = np.full((n_items, max(1, int(counts.max(initial=0)))), n, dtype=np.int64)
        has[np.repeat(np.arange(n_items), counts), np.arange(matrix.nnz) - np.repeat(matrix.indptr[:-1], counts)] = matrix.indices
        _, first, cell = np.unique(has, axis=0, return_index=True, return_inverse=True)
        self._has = np.ascontiguousarray(has.T)  # (most attributes of an item, n_items)
        self._cell, self._kinds, self._size = cell.ravel(), self._has[:, first], np.maximum(counts[first], 1)
        self._members = self.popular_[np.argsort(self._cell[self.popular_], kind="stable")]
        self._starts = np.concatenate([[0], np.cumsum(np.bincount(self._cell, minlength=len(first)))])

    def _score(self, histories: Any) -> Singles:
        own = (histories @ self.attributes_).toarray()
        mass = np.asarray(histories.sum(axis=1)).reshape(-1, 1)
        offered = np.asarray(self.attributes_.mean(axis=0)).ravel()
        lift = (own + self.prior * self.taste_) / (mass + self.prior) / np.where(offered > 0, offered, 1.0)
        n = np.maximum(np.diff(self.attributes_.indptr), 1)
        return np.asarray((self.attributes_ @ lift.T).T / n, dtype=np.float32)

    def _restored(self, saved: dict[str, Any]) -> None:
        if self.attributes_.shape != (self.n_items_, len(self.taste_)):
            raise ValueError(f"Content: expected {len(self.taste_)} attributes of {self.n_items_} items, found {self.attributes_.shape}")
        self._arrange()


@dataclass(frozen=True)
class Cells:
    """The items of one cell have one score. members: items by cell, those of cell c at `starts[c]:starts[c + 1]`, most popular first."""

    scores: Singles
    cell: Places
    members: Places
    starts: Places

    def best(self, k: int, barred: Places) -> Places:
        """The k of the best cells; see `Opinion`."""
        found, n, scores = list[Places](), 0, self.scores.copy()
        for _ in range(min(k + len(barred), len(scores))):
            cell = int(scores.argmax())  # of many cells the first few are wanted: far cheaper than their order
            if n >= k or not scores[cell] > 0:
                break
            scores[cell] = 0.0
            members = self.members[self.starts[cell] : self.starts[cell + 1]][: k - n + len(barred)]
            found.append(members[~is_in(members, barred)][: k - n] if len(barred) else members)
            n += len(found[-1])
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)

    def of(self, items: Places) -> Singles:
        """See `Opinion`."""
        return self.scores[self.cell[items]]
