"""What a source says of one customer: its best items, and its score of any item."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from models.candidates.history import is_in
from models.lists import Singles

Places = NDArray[np.int64]


class Opinion(Protocol):
    """barred: items that are not asked about, ascending."""

    def best(self, k: int, barred: Places) -> Places:
        """The k items of the highest scores above 0, in any order; fewer where there are no more."""

    def of(self, items: Places) -> Singles:
        """The score of each of the items (n,)."""


@dataclass(frozen=True)
class Sparse:
    """Scores of some items, ascending; all others have 0."""

    items: Places
    scores: Singles

    def best(self, k: int, barred: Places) -> Places:
        """See `Opinion`."""
        is_open = self.scores > 0
        if len(barred):
            is_open &= ~is_in(self.items, barred)
        items = self.items[is_open]
        return items if len(items) <= k else items[np.argsort(-self.scores[is_open], kind="stable")[:k]]

    def of(self, items: Places) -> Singles:
        """See `Opinion`."""
        if not len(self.items):
            return np.zeros(len(items), dtype=np.float32)
        place = np.minimum(self.items.searchsorted(items), len(self.items) - 1)
        return np.where(self.items.take(place) == items, self.scores.take(place), np.float32(0))


@dataclass(frozen=True)
class Listed:
    """The same for everybody. order: the items with a score above 0, best first; scores: (n_items,)."""

    order: Places
    scores: Singles

    def best(self, k: int, barred: Places) -> Places:
        """See `Opinion`."""
        head = self.order[: k + len(barred)]
        return head[~is_in(head, barred)][:k] if len(barred) else head

    def of(self, items: Places) -> Singles:
        """See `Opinion`."""
        return self.scores[items]
