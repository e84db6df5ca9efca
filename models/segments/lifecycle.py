"""What is known of customers at an instant -> where they stand: new, frequent, sporadic or dormant.

In: days since they were first and last seen, and their visits of late. Out: one word each, null for who was never seen. The four
exclude each other. Never looks at what comes after the instant.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

STATES = ("new", "frequent", "sporadic", "dormant")
MONTH_DAYS = 30.0


@dataclass(frozen=True)
class Lifecycle:
    """The rule, in days and visits.

    new: first seen at most `new_days` ago. dormant: last seen more than `dormant_days` ago. frequent: of the others, at least
    `frequent_visits` a month of 30 days over the last `window_days`, or since first seen where that is less. sporadic: the rest.
    """

    new_days: float = 30.0
    dormant_days: float = 60.0
    frequent_visits: float = 2.0
    window_days: float = 30.0

    def __post_init__(self) -> None:
        if not 0 < self.new_days <= self.dormant_days:
            raise ValueError(f"Lifecycle: expected 0 < new_days <= dormant_days, found {self.new_days:g} and {self.dormant_days:g}")
        if self.frequent_visits <= 0 or self.window_days <= 0:
            raise ValueError("Lifecycle: frequent_visits and window_days must be above 0")

    def states(self, first_seen_days: Floats, last_seen_days: Floats, visits: Floats) -> NDArray[np.object_]:
        """The state (n,) of each customer, None for one never seen. visits: of the last `window_days`."""
        known = ~np.isnan(first_seen_days) & ~np.isnan(last_seen_days)
        months = np.clip(first_seen_days, self.new_days, self.window_days) / MONTH_DAYS
        new, frequent, sporadic, dormant = STATES
        rules = [~known, first_seen_days <= self.new_days, last_seen_days > self.dormant_days, visits >= self.frequent_visits * months]
        found = np.select(rules, ["", new, dormant, frequent], sporadic).astype(object)
        found[~known] = None
        return found
