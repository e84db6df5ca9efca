"""A customer as the second stage ranks for them at this moment: candidates in order, and what speaks for each.

In: rows of the model, and what the store says that the customer did since it was trained. Out: the best items, those of the second stage
first, then those that suit their taste; and which item of the history adds most to each. Somebody the model never met is ranked for as
everybody is, from what they did. Knows no names and no consent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Self

import numpy as np
from numpy.typing import NDArray

from models.candidates.factors import Liked
from models.candidates.history import NOTHING, History
from models.shop.selection import LOOKED_AT, Allows, Places, capped
from models.stages import LEAD
from models.two_stage import ALL_ITEMS, NEW_ITEMS, Order
from serving.champions import Recommending
from serving.recent import Act
from serving.taste import LONGEST, Taste, strongest

Singles = NDArray[np.float32]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True)
class Ranking:
    """One customer of a version with two stages. `is_folded`: what came since the training counts."""

    order: Order
    liked: Liked
    repeat_weight: float
    is_folded: bool

    @classmethod
    def of(cls, model: Recommending, rows: Sequence[int], acts: Sequence[Act], at: datetime, *, new_only: bool) -> Self | None:
        """The customer of these rows, several where the model met parts of one person apart; None where there is nothing to go by."""
        second, history = model.stages.second, known(model, rows, acts)
        if second is None or not history.item.size:
            return None
        mode = NEW_ITEMS if new_only and NEW_ITEMS in second.rankers_ else ALL_ITEMS
        order = second.rank(history, (at - _EPOCH) // _MICROSECOND, mode=mode)
        assert order.liked is not None  # every moment has factors
        return cls(order, order.liked, model.learner.repeat_weight, any(act.item_id in model.items for act in acts))

    def best(self, allows: Allows, k: int, *, category: Places, most: int | None) -> tuple[Places, Singles]:
        """The k best items that are allowed, at most so many of a category, and their scores, best first."""
        found, scores = self.order.items, self.order.scores
        stays = allows(found)
        found, scores = found[stays], scores[stays]
        if most is not None:
            stays = capped(category[found], most)
            found, scores = found[stays], scores[stays]
        if found.size >= k:
            return found[:k], scores[:k]
        others = allows(None)
        others[self.order.items] = False
        size = k if most is None else LOOKED_AT * k
        while True:
            more, likes = self.liked.products.best(self.liked.factors, size, allowed=others)
            stays = capped(category[np.concatenate([found, more])], most)[found.size :]
            if found.size + np.count_nonzero(stays) >= k or more.size < size:
                break
            size *= LOOKED_AT
        more, likes = more[stays][: k - found.size], likes[stays][: k - found.size]
        if found.size and more.size:
            likes = scores[-1] - LEAD - (likes[0] - likes)
        return np.concatenate([found, more]), np.concatenate([scores, likes])

    def strongest(self, wanted: Places) -> Places:
        """For each wanted item (k,) the item of the history that adds most to its score, itself perhaps; -1 where none adds anything."""
        liked = self.liked
        if not 0 < liked.items.size <= LONGEST:
            return np.full(wanted.size, -1, dtype=np.int64)
        own = self.repeat_weight * liked.weights / liked.weights.max()
        return strongest(liked.solved, liked.products.items[wanted], wanted, liked.items, own)


def seen(model: Recommending, rows: Sequence[int], acts: Sequence[Act], at: datetime, *, new_only: bool) -> Ranking | Taste | None:
    """The customer as the version's stages see them; None where there is nothing to go by."""
    if model.stages.second is None:
        return Taste.of(model, rows, acts, at)
    return Ranking.of(model, rows, acts, at, new_only=new_only)


def known(model: Recommending, rows: Sequence[int], acts: Sequence[Act]) -> History:
    """What is known of the customer: what the training knew, and of items touched since what the store says, which counts from the first
    act on.
    """
    histories = model.stages.histories
    parts = [] if histories is None else [histories.customer(row) for row in rows]
    history = History.of(parts) if len(parts) > 1 else parts[0] if parts else NOTHING
    fresh = sorted((model.items[act.item_id], act) for act in acts if act.item_id in model.items) if acts else []
    if not fresh:
        return history
    newer = History(
        item=np.array([item for item, _ in fresh], dtype=np.int64),
        touches=np.array([act.touches for _, act in fresh]),
        purchases=np.array([act.purchases for _, act in fresh], dtype=np.float64),
        seen_us=np.array([act.seen_us for _, act in fresh], dtype=np.int64),
        bought_us=np.array([act.bought_us for _, act in fresh], dtype=np.int64),
    )
    return history.updated(newer)
