"""What was known at a moment: who did what with which item how long ago, and what is known of the items. Positions, no names."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

PURCHASE = 1.0  # the weight of a purchase; weaker events weigh less


@dataclass(frozen=True)
class Occasion:
    """One moment. An act is one row of `customer`, `item`, `age_days` (above 0) and `weight` (a purchase weighs 1), all (n_acts,).

    category: (n_items,) int, -1 where unknown. price: (n_items,) NaN where unknown. offered_days: (n_items,) since when on offer.
    """

    n_customers: int
    n_items: int
    customer: Integers
    item: Integers
    age_days: Floats
    weight: Floats
    category: Integers
    price: Floats
    offered_days: Floats

    def matrix(self, *, half_life_days: float, within_days: float | None = None, purchases_only: bool = False) -> sparse.csr_matrix:
        """Weights that halve with age, summed by customer and item, csr (n_customers, n_items)."""
        kept = np.ones(len(self.weight), dtype=bool) if within_days is None else self.age_days <= within_days
        if purchases_only:
            kept &= self.weight >= PURCHASE
        data = self.weight[kept] * np.exp2(-self.age_days[kept] / half_life_days)
        matrix = sparse.csr_matrix((data, (self.customer[kept], self.item[kept])), (self.n_customers, self.n_items))
        matrix.sum_duplicates()
        return matrix

    def bought(self) -> sparse.csr_matrix:
        """1 where a customer ever bought an item: what is not new to them."""
        matrix = self.matrix(half_life_days=np.inf, purchases_only=True)
        matrix.data[:] = 1.0
        return matrix

    def attributes(self, *, n_bands: int = 8) -> sparse.csr_matrix:
        """Category, price band, and both together, one column for each that occurs, csr (n_items, n_attributes) of 0 and 1."""
        known = np.flatnonzero(np.isfinite(self.price))
        band = np.full(self.n_items, -1, dtype=np.int64)
        if known.size:
            edges = np.unique(np.quantile(self.price[known], np.linspace(0, 1, n_bands + 1)[1:-1]))
            band[known] = np.searchsorted(edges, self.price[known], side="right")
        both = np.where((band >= 0) & (self.category >= 0), self.category * n_bands + band, -1)
        return sparse.csr_matrix(sparse.hstack([_one_hot(codes) for codes in (self.category, band, both)]))


def _one_hot(codes: Integers) -> sparse.csr_matrix:
    rows = np.flatnonzero(codes >= 0)
    values, column = np.unique(codes[rows], return_inverse=True)
    return sparse.csr_matrix((np.ones(rows.size), (rows, column.ravel())), (codes.size, values.size))
