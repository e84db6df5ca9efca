"""Recency, frequency and monetary value of customers -> a score of 1 to 5 for each, and a tier.

In: days since the last purchase, orders, and cents spent; what they are counted over is the caller's. Edges lie between values that
occur and are stated in these units, so equal customers always have equal scores, however many share a value. Never bought: no score.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LEVELS = 5
HIGH, MIDDLE = 12, 8  # of a sum of 3 to 15: a mean score of 4 or more, and of somewhat below 3 or more
TIERS = ("high", "middle", "low", "never bought")


@dataclass(frozen=True)
class RfmEdges:
    """Where a next score begins: days (fewer is better), orders and cents (more is better). Fewer than four where values are tied."""

    recency_days: tuple[float, ...]
    frequency_orders: tuple[float, ...]
    monetary_cents: tuple[float, ...]

    @classmethod
    def learn(cls, recency_days: Floats, frequency_orders: Floats, monetary_cents: Floats) -> Self:
        """The edges of those who bought: (n,) each, NaN days for who never did. Nobody bought: no edges."""
        bought = _bought(recency_days, frequency_orders)
        return cls(
            tuple(-edge for edge in _edges(-recency_days[bought])),
            _edges(frequency_orders[bought]),
            _edges(monetary_cents[bought]),
        )

    def score(self, recency_days: Floats, frequency_orders: Floats, monetary_cents: Floats) -> pd.DataFrame:
        """The scores 1 (worst) to 5 and the tier of each customer: columns recency, frequency, monetary (null if never bought), tier.

        Whoever is better in one of the three and not worse in the others never has a lower tier.
        """
        bought = _bought(recency_days, frequency_orders)
        scores = {
            "recency": _scores(tuple(-edge for edge in self.recency_days), -recency_days),
            "frequency": _scores(self.frequency_orders, frequency_orders),
            "monetary": _scores(self.monetary_cents, monetary_cents),
        }
        total = sum(scores.values())
        tier = np.select([~bought, total >= HIGH, total >= MIDDLE], [TIERS[3], TIERS[0], TIERS[1]], TIERS[2])
        columns = {name: pd.array(np.where(bought, values, 0), dtype="Int64") for name, values in scores.items()}
        frame = pd.DataFrame({**columns, "tier": tier.astype(object)})
        frame.loc[~bought, list(scores)] = pd.NA
        return frame


def _bought(recency_days: Floats, frequency_orders: Floats) -> NDArray[np.bool_]:
    return np.asarray(~np.isnan(recency_days) & (frequency_orders > 0))


def _edges(values: Floats) -> tuple[float, ...]:
    """The smallest values whose mid-rank lies above one, two, ... fifths; ties share the mean of their ranks."""
    if not values.size:
        return ()
    distinct, counts = np.unique(values, return_counts=True)
    share = (np.cumsum(counts) - counts / 2) / values.size
    first = np.searchsorted(share, np.arange(1, LEVELS) / LEVELS, side="right")
    # where a heap of equal values spans several fifths, an edge occurs twice: who is above it is above both
    return tuple(float(distinct[i]) for i in first if i < len(distinct))


def _scores(edges: tuple[float, ...], values: Floats) -> NDArray[np.int64]:
    return np.asarray(1 + np.searchsorted(np.array(edges), np.nan_to_num(values, nan=-np.inf), side="right"), dtype=np.int64)
