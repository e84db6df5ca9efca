"""What everybody does: the same list for all. The weights carry what is recent; a stranger, too, gets this one."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.candidates.opinion import Listed, Opinion, Places
from models.candidates.source import Source
from models.lists import Singles


class Popularity(Source):
    """Scores an item by its total weight over that of the most popular, whatever the history. Learned: `share_` (n_items,)."""

    _arrays = ("share_",)

    share_: Singles

    def __init__(self, *, random_state: int = 0) -> None:
        self.random_state = random_state

    def _learn(self, weights: Any) -> None:
        total = np.asarray(weights.sum(axis=0), dtype=np.float64).ravel()
        self.share_ = (total / total.max()).astype(np.float32)
        self._restored({})

    def asked(self, items: Places, weights: NDArray[np.float64]) -> Opinion:
        """See `Source`."""
        return Listed(self._order, self.share_)

    def _restored(self, saved: dict[str, Any]) -> None:
        self._order = np.argsort(-self.share_, kind="stable")[: np.count_nonzero(self.share_)]

    def _score(self, histories: Any) -> Singles:
        return np.tile(self.share_, (histories.shape[0], 1))
