"""What was known at a moment: who did what with which item when, and what is known of the items. Positions, no names."""

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from models.candidates.history import PURCHASE, Floats, Histories, Integers, ages

N_BANDS = 8  # of prices


@dataclass(frozen=True)
class Occasion:
    """One moment, `at_us`. An act is one row of `customer`, `item`, `done_us` (before the moment) and `weight` (a purchase weighs 1), all
    (n_acts,). Instants in microseconds since 1970.

    category: (n_items,) int, -1 where unknown. price: (n_items,) NaN where unknown. offered_us: (n_items,) since when on offer, `UNKNOWN`
    where nobody said.
    """

    n_customers: int
    n_items: int
    at_us: int
    customer: Integers
    item: Integers
    done_us: Integers
    weight: Floats
    category: Integers
    price: Floats
    offered_us: Integers

    @property
    def age_days(self) -> Floats:
        """Of each act."""
        return ages(self.at_us, self.done_us)

    @property
    def offered_days(self) -> Floats:
        """Of each item, NaN where unknown."""
        return np.where(self.offered_us == UNKNOWN, np.nan, ages(self.at_us, self.offered_us))

    def histories(self) -> Histories:
        """What is kept of the acts by customer and item."""
        return Histories.of(self.customer, self.item, self.weight, self.done_us, n_customers=self.n_customers)

    def matrix(self, *, half_life_days: float, within_days: float | None = None, purchases_only: bool = False) -> sparse.csr_matrix:
        """Weights that halve with age, summed by customer and item, csr (n_customers, n_items)."""
        age = self.age_days
        kept = np.ones(len(self.weight), dtype=bool) if within_days is None else age <= within_days
        if purchases_only:
            kept &= self.weight >= PURCHASE
        data = self.weight[kept] * np.exp2(-age[kept] / half_life_days)
        matrix = sparse.csr_matrix((data, (self.customer[kept], self.item[kept])), (self.n_customers, self.n_items))
        matrix.sum_duplicates()
        return matrix

    def bought(self) -> sparse.csr_matrix:
        """1 where a customer ever bought an item: what is not new to them."""
        matrix = self.matrix(half_life_days=np.inf, purchases_only=True)
        matrix.data[:] = 1.0
        return matrix

    def attributes(self, *, n_bands: int = N_BANDS) -> sparse.csr_matrix:
        """Category, price band, and both together, one column for each that occurs, csr (n_items, n_attributes) of 0 and 1."""
        known = np.flatnonzero(np.isfinite(self.price))
        band = np.full(self.n_items, -1, dtype=np.int64)
        if known.size:
            edges = np.unique(np.quantile(self.price[known], np.linspace(0, 1, n_bands + 1)[1:-1]))
            band[known] = np.searchsorted(edges, self.price[known], side="right")
        both = np.where((band >= 0) & (self.category >= 0), self.category * n_bands + band, -1)
        return sparse.csr_matrix(sparse.hstack([_one_hot(codes) for codes in (self.category, band, both)]))


UNKNOWN = np.iinfo(np.int64).max  # an instant that nobody told


def _one_hot(codes: Integers) -> sparse.csr_matrix:
    rows = np.flatnonzero(codes >= 0)
    values, column = np.unique(codes[rows], return_inverse=True)
    return sparse.csr_matrix((np.ones(rows.size), (rows, column.ravel())), (codes.size, values.size))
