"""A customer as the recommender sees them at this moment: factors, the history behind them, and what speaks for each item.

In: rows of the model, and what the customer did since it was trained. Out: scores of all items, and for the best of them which item of
the history adds most. Somebody the model never met is solved for as training would have solved; one who was active since is solved
anew, their history faded to this day. Knows no names and no consent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from models.als import Solved
from models.recommender import Recommender
from models.shop.selection import Allows, best_of
from serving.champions import Recommending
from serving.recent import Act

LONGEST = 1_000  # items of a history that reasons are looked for in

Places = NDArray[np.int64]
Singles = NDArray[np.float32]

_DAY_US = 86_400_000_000


@dataclass(frozen=True)
class Taste:
    """One customer of a version with one stage. `items` (r,): what they touched, with its `weights`, NaN where the model does not tell
    them; `own` (r,): the weight over the largest. `is_folded`: what came since the training counts.
    """

    learner: Recommender
    factors: Singles
    items: Places
    weights: NDArray[np.float64]
    own: Singles
    is_folded: bool = False
    solved: Solved | None = None

    @classmethod
    def of(cls, model: Recommending, rows: Sequence[int], acts: Sequence[Act], at: datetime) -> Self | None:
        """The customer of these rows, several where the model met parts of one person apart; None where there is nothing to go by."""
        learner = model.learner
        fresh = {model.items[act.item_id]: act for act in acts if act.item_id in model.items}
        rows = [row for row in rows if learner.history_.indptr[row] < learner.history_.indptr[row + 1]]
        if not rows and not fresh:
            return None
        is_told = not np.isnan(learner.largest_[rows]).any()
        if rows and not (fresh and is_told):
            return cls._trained(learner, rows, is_told=is_told)
        faded = {item: weight * _fading(model, at) for item, weight in _known(learner, rows).items()}
        weights = faded | {item: faded[item] + act.last_weight if item in faded else act.weight for item, act in fresh.items()}
        return cls._solved(learner, weights, is_folded=True)

    @classmethod
    def _trained(cls, learner: Recommender, rows: Sequence[int], *, is_told: bool) -> Self:
        """As the training left them."""
        if len(rows) > 1:
            if is_told:
                return cls._solved(learner, _known(learner, rows), is_folded=False)
            factors, own = learner.customer_factors_[rows].mean(axis=0), learner.history_[rows].sum(axis=0)
            shares = np.asarray(own, dtype=np.float32).ravel()
            items = np.flatnonzero(shares)
            return cls(learner, factors, items, np.full(items.size, np.nan), shares[items] / shares.max())
        (row,) = rows
        items, shares = _row(learner.history_, row)
        weights = shares.astype(np.float64) * learner.largest_[row]
        return cls(learner, learner.customer_factors_[row], items, weights, shares)

    @classmethod
    def _solved(cls, learner: Recommender, weights: Mapping[int, float], *, is_folded: bool) -> Self:
        items = np.array(sorted(weights), dtype=np.int64)
        values = np.array([weights[item] for item in items.tolist()])
        solved = learner.solve(items, values)
        own = (values / values.max()).astype(np.float32)
        return cls(learner, solved.factors, items, values, own, is_folded, solved)

    def scores(self) -> Singles:
        """The score of every item (n_items,), a fresh array."""
        scores = self.learner.item_factors_ @ self.factors
        scores[self.items] += np.float32(self.learner.repeat_weight) * self.own
        return np.asarray(scores)

    def best(self, allows: Allows, k: int, *, category: Places, most: int | None) -> tuple[Places, Singles]:
        """The k best items that are allowed, at most so many of a category, and their scores, best first."""
        scores = self.scores()
        found = best_of(scores, allows(None), k, category=category, most=most)
        return found, scores[found]

    def strongest(self, wanted: Places) -> Places:
        """For each wanted item (k,) the item of the history that adds most to its score, itself perhaps; -1 where none adds anything."""
        if not 0 < self.items.size <= LONGEST or np.isnan(self.weights).any():
            return np.full(wanted.size, -1, dtype=np.int64)
        solved = self.solved or self.learner.solve(self.items, self.weights)
        return strongest(solved, self.learner.item_factors_[wanted], wanted, self.items, self.learner.repeat_weight * self.own)


def strongest(solved: Solved, factors: Singles, wanted: Places, items: Places, own: NDArray[np.floating]) -> Places:
    """Of the items (r,) of a history the one that adds most to the score of each wanted one (k,), whose factors are given; -1 where none
    adds anything. own: (r,) what an item adds to itself.
    """
    shares = solved.shares(factors)
    shares += (wanted[:, None] == items) * own
    return np.where(shares.max(axis=1) > 0, items.take(shares.argmax(axis=1)), -1)


def _known(learner: Recommender, rows: Sequence[int]) -> dict[int, float]:
    """What the model was trained on for these rows, by item."""
    found: dict[int, float] = {}
    for row in rows:
        items, own = _row(learner.history_, row)
        for item, weight in zip(items.tolist(), (own * learner.largest_[row]).tolist(), strict=True):
            found[item] = found.get(item, 0.0) + weight
    return found


def _fading(model: Recommending, at: datetime) -> float:
    age_us = 0.0 if model.trained_us is None else max(0.0, at.timestamp() * 1e6 - model.trained_us)
    return float(2.0 ** (-age_us / _DAY_US / model.half_life_days))


def _row(matrix: sparse.csr_matrix, row: int) -> tuple[Places, Singles]:
    part = slice(matrix.indptr[row], matrix.indptr[row + 1])
    return matrix.indices[part], matrix.data[part]
