"""One version of the recommender: the first stage for everybody, the second above it where there is one, and what it knew its customers by.

The second stage's list leads, the first fills the places that are left. Rows are customers, columns items, both by position.
"""

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from models.candidates.history import Histories
from models.lists import Ranked
from models.recommender import Recommender
from models.two_stage import ALL_ITEMS, NEW_ITEMS, TwoStage

SECOND_STAGE, HISTORIES = "second_stage", "histories"  # folders of their files, beside those of the first
LEAD = 0.01  # between the last score of the second stage and the first that follows it


@dataclass(frozen=True)
class Stages:
    """first, second: fitted on one moment; second: None where it is not used. histories: of the customers of `first`, in its order."""

    first: Recommender
    second: TwoStage | None
    histories: Histories | None

    def recommend(self, customers: ArrayLike, k: int, *, at_us: int, mode: str = ALL_ITEMS) -> Ranked:
        """The k best items (m, k) for these rows at this moment and their scores (m, k), best first; -1 and -inf where there are fewer.

        A customer without a history is a stranger, and gets the first stage's list; so does everybody in a mode that the second was not
        trained for. Raises ValueError for `NEW_ITEMS` where no histories tell what is new.
        """
        rows = np.asarray(customers, dtype=np.int64)
        barred = self._bought(rows) if mode == NEW_ITEMS else None
        if self.second is None or self.histories is None or mode not in self.second.rankers_:
            return self.first.recommend(rows, k, exclude=barred)
        items, scores = np.full((rows.size, k), -1, dtype=np.int64), np.full((rows.size, k), -np.inf, dtype=np.float32)
        known = np.flatnonzero((rows >= 0) & (np.diff(self.histories.indptr)[rows] > 0))
        items[known], scores[known] = self.second.recommend(self.histories, rows[known], k, at_us=at_us, mode=mode)
        short = np.flatnonzero(items[:, -1] < 0)
        if short.size:
            others = self.first.recommend(rows[short], 2 * k, exclude=None if barred is None else barred[short])
            for row, more, values in zip(short.tolist(), *others, strict=True):
                items[row], scores[row] = followed(items[row], scores[row], more, values)
        return items, scores

    def keep(self, customers: NDArray[np.int64]) -> "Stages":
        """Of these rows alone, numbered anew in the order given."""
        histories = None if self.histories is None else self.histories.keep(customers)
        return replace(self, first=copy.copy(self.first).keep(customers), histories=histories)

    def save(self, folder: Path) -> None:
        """Write what `load` needs; and `Recommender.load(folder)` gives the first stage alone."""
        self.first.save(folder)
        if self.second is not None and self.histories is not None:
            self.second.save(folder / SECOND_STAGE)
            self.histories.save(folder / HISTORIES)

    @classmethod
    def load(cls, folder: Path, *, is_mapped: bool = False) -> Self:
        """As they were saved; mapped, processes share one copy in memory. Raises ValueError if the files disagree, or are those of a
        version whose second stage is in the scores of its first.
        """
        first = Recommender.load(folder, is_mapped=is_mapped)
        if not (folder / SECOND_STAGE).is_dir():
            return cls(first, None, None)
        if not (folder / HISTORIES).is_dir():
            said = "its second stage ranked when it was trained, and now ranks when it is asked"
            raise ValueError(f"{folder}: {said}; train the recommender again")
        second = TwoStage.load(folder / SECOND_STAGE, is_mapped=is_mapped)
        histories = Histories.load(folder / HISTORIES, is_mapped=is_mapped)
        if len(histories) != len(first.customer_factors_) or len(second.retrieval_.shelf_.category) != len(first.item_factors_):
            raise ValueError(f"{folder}: the two stages do not know the same customers and items; save the model again")
        return cls(first, second, histories)

    def _bought(self, rows: NDArray[np.int64]) -> Any:
        if self.histories is None:
            raise ValueError("Stages: a version without histories does not know what is new to a customer")
        return self.histories.bought(len(self.first.item_factors_))[rows]


def followed(
    items: NDArray[np.int64], scores: NDArray[np.float32], more: NDArray[np.int64], values: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """A list (k,) with the next of another, best first, in its empty places (-1), scored below what leads."""
    n, size = np.count_nonzero(items >= 0), len(items)
    fresh = np.flatnonzero((more >= 0) & ~np.isin(more, items[:n]))[: size - n]
    items, scores = items.copy(), scores.copy()
    items[n : n + fresh.size] = more[fresh]
    if fresh.size:
        top = scores[n - 1] - LEAD if n else values[fresh[0]]
        scores[n : n + fresh.size] = top - (values[fresh[0]] - values[fresh])
    return items, scores
