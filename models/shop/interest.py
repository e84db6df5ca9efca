"""Who did what with which item, held as numbers -> what is popular in the shop and in each segment of its customers: weights by item.

A segment of few people tells what each of them did: it has none.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

FEWEST = 10  # customers with interactions who make a segment that is told about
OF_LIFECYCLE = " customers"  # the group of those who are in no segment, by the state of their life cycle: "new customers"

Places = NDArray[np.int64]


@dataclass(frozen=True)
class Interest:
    """What the customers of a segment care for. `order`: items that any of them touched, most popular first; `share`: (n,), 1 the most."""

    order: Places
    share: NDArray[np.float32]


@dataclass(frozen=True)
class Acts:
    """Interactions as arrays (n_acts,): codes of customer and item, weight, microseconds since 1970, and which were purchases."""

    customer_ids: list[str]
    item_ids: list[str]
    customer: NDArray[np.int64]
    item: NDArray[np.int64]
    weight: NDArray[np.float64]
    at_us: NDArray[np.int64]
    is_purchase: NDArray[np.bool_]

    def placed(self, index: Mapping[str, int]) -> Places:
        """The place of each act's item."""
        return np.array([index[item] for item in self.item_ids], dtype=np.int64)[self.item] if self.item_ids else np.empty(0, np.int64)

    def totals(self, index: Mapping[str, int]) -> NDArray[np.float64]:
        """The weight of each item (n_items,)."""
        return np.bincount(self.placed(index), weights=self.weight, minlength=len(index)).astype(np.float64)

    def seen(self, index: Mapping[str, int]) -> NDArray[np.bool_]:
        """Which items anybody touched (n_items,)."""
        flags = np.zeros(len(index), dtype=bool)
        flags[[index[item] for item in self.item_ids]] = True
        return flags

    def by_segment(self, index: Mapping[str, int], segments: pd.DataFrame) -> dict[str, Interest]:
        """What is popular in each group; segments: customer_id, event_timestamp, segment, lifecycle. A customer's newest row counts."""
        groups = groups_of(segments)
        if groups.empty or not self.customer_ids:
            return {}
        code, names = pd.factorize(groups, sort=True)
        place = groups.index.get_indexer(pd.Index(self.customer_ids))
        segment_of = np.where(place >= 0, code[place], -1)
        people = np.bincount(segment_of[segment_of >= 0], minlength=len(names))
        mine, item = segment_of[self.customer], self.placed(index)
        return {
            str(name): _interest(item[mine == number], self.weight[mine == number], len(index))
            for number, name in enumerate(names)
            if people[number] >= FEWEST
        }


def groups_of(segments: pd.DataFrame) -> "pd.Series[str]":
    """By customer the segment that they are in; else the group of their state of life cycle. A customer's newest row counts.

    segments: customer_id, event_timestamp, segment, lifecycle. Whoever has neither is not among them.
    """
    newest = segments.sort_values("event_timestamp", kind="stable").drop_duplicates("customer_id", keep="last")
    newest = newest.dropna(subset=["segment", "lifecycle"], how="all").set_index("customer_id")
    return newest["segment"].fillna(newest["lifecycle"] + OF_LIFECYCLE)


def _interest(item: Places, weight: NDArray[np.float64], n_items: int) -> Interest:
    total = np.bincount(item, weights=weight, minlength=n_items)
    order = np.argsort(-total, kind="stable")[: np.count_nonzero(total)]
    return Interest(order.astype(np.int64), (total / total.max(initial=1e-12)).astype(np.float32))
