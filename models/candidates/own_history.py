"""What a customer did, again: the rule to beat where people buy the same things. The weights carry how it fades with age."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.candidates.opinion import Opinion, Places, Sparse
from models.candidates.source import Source
from models.lists import Singles


class OwnHistory(Source):
    """Scores an item by its weight in the customer's own history over the row's largest: (0, 1], 0 for what is not in it."""

    def __init__(self, *, random_state: int = 0) -> None:
        self.random_state = random_state

    def _learn(self, weights: Any) -> None:
        """There is nothing to learn but how many items there are."""

    def asked(self, items: Places, weights: NDArray[np.float64]) -> Opinion:
        """See `Source`."""
        return Sparse(items, (weights / weights.max(initial=0.0)).astype(np.float32) if len(weights) else weights.astype(np.float32))

    def _score(self, histories: Any) -> Singles:
        dense = histories.toarray().astype(np.float32)
        largest = dense.max(axis=1, keepdims=True, initial=0.0)
        return np.asarray(np.divide(dense, largest, out=dense, where=largest > 0))
