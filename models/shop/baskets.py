"""Purchases -> which items are bought together. In: acts of all customers. Out: for each item the best companions and how near they are.

Two purchases belong together where one customer made them on one day. Never tells a pair that only one customer bought.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from models.shop.interest import Acts

MOST_LINES = 1_000_000  # of purchases, the newest: bounds the time it takes to load
LARGEST_BASKET = 30  # items; a larger one is a dealer's, and says little about what goes together
COMPANIONS = 50  # kept for each item
SHRINKAGE = 3.0  # buyers that a pair has to outweigh: a few that meet by chance do not lead
_DAY_US = 86_400_000_000


@dataclass(frozen=True)
class Together:
    """For item i its companions `items[indptr[i]:indptr[i + 1]]`, nearest first, and their `nearness`, in (0, 1)."""

    indptr: NDArray[np.int64]
    items: NDArray[np.int64]
    nearness: NDArray[np.float32]

    def of(self, item: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The companions of an item and their nearness."""
        part = slice(self.indptr[item], self.indptr[item + 1])
        return self.items[part], self.nearness[part]


def together(acts: Acts, index: Mapping[str, int]) -> Together:
    """Nearness is n_both / (sqrt(n_one * n_other) + SHRINKAGE), of customers."""
    n = len(index)
    bought = np.flatnonzero(acts.is_purchase)
    if bought.size > MOST_LINES:
        bought = bought[np.argpartition(acts.at_us[bought], -MOST_LINES)[-MOST_LINES:]]
    item, customer = acts.placed(index)[bought], acts.customer[bought]
    first, second = _pairs(item, customer, acts.at_us[bought] // _DAY_US)
    both = sparse.csr_matrix((np.ones(first.size), (first, second)), (n, n))  # so many customers bought both
    both.data[both.data < 2] = 0.0
    both.eliminate_zeros()
    buyers = np.bincount(_distinct(customer * max(n, 1) + item) % max(n, 1), minlength=n).astype(np.float64)
    row = np.repeat(np.arange(n), np.diff(both.indptr))
    nearness = both.data / (np.sqrt(buyers[row] * buyers[both.indices]) + SHRINKAGE)
    order = np.lexsort((both.indices, -nearness, row))
    kept = order[np.arange(order.size) - both.indptr[row] < COMPANIONS]
    indptr = np.concatenate([[0], np.cumsum(np.bincount(row[kept], minlength=n))]).astype(np.int64)
    return Together(indptr, both.indices[kept].astype(np.int64), nearness[kept].astype(np.float32))


def _pairs(item: NDArray[np.int64], customer: NDArray[np.int64], day: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Each pair of different items of a basket, both ways round, once for each customer: first, second."""
    if not item.size:
        return item, item
    n_items, n_days = int(item.max()) + 1, int(day.max() - day.min()) + 1
    lines = _distinct((customer * n_days + day - day.min()) * n_items + item)  # one number each: far cheaper to sort than rows
    basket, bought = np.divmod(lines, n_items)
    start = np.flatnonzero(np.diff(basket, prepend=-1))
    size = np.diff(start, append=len(lines))
    number = np.repeat(np.arange(len(start)), size)
    kept = np.flatnonzero((size > 1)[number] & (size <= LARGEST_BASKET)[number])
    count = size[number[kept]]
    left = np.repeat(kept, count)
    right = np.repeat(start[number[kept]], count) + np.arange(left.size) - np.repeat(np.cumsum(count) - count, count)
    left, right = left[left != right], right[left != right]
    if not left.size:
        return left, left
    people = np.cumsum(np.diff(basket // n_days, prepend=-1) != 0) - 1  # numbered without gaps: products of numbers stay within 63 bits
    n_people = int(people[-1]) + 1
    pairs = _distinct((bought[left] * n_items + bought[right]) * n_people + people[left]) // n_people
    return np.divmod(pairs, n_items)


def _distinct(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """The different ones, ascending: by sorting, which here is some ten times as fast as the hashing of `np.unique`."""
    ordered = np.sort(values)
    distinct: NDArray[np.int64] = ordered[np.diff(ordered, prepend=ordered[:1] - 1) != 0]
    return distinct
