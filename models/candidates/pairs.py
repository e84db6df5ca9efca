"""A moment, its sources and some customers -> the rows that the second stage ranks: one for each customer and candidate."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from models.candidates import features
from models.candidates.history import Histories, History
from models.candidates.retrieval import KINDS, Candidates, Retrieval

NAMES = (*features.NAMES, *(f"{name}_score" for name in KINDS), *(f"{name}_rank" for name in KINDS))
AT_A_TIME = 200  # customers whose pairs are held
_COUNTED = len(features.NAMES)


@dataclass(frozen=True)
class Pairs:
    """Rows (n,) by customer, then item. values: (n, n_features), NaN where unknown; names: of the columns. label: what the choice of the
    item was worth, 0 where it was not chosen.
    """

    customer: NDArray[np.int64]
    item: NDArray[np.int64]
    values: NDArray[np.float32]
    names: tuple[str, ...]
    label: NDArray[np.float32]

    def thinned(self, share: float, *, seed: int) -> "Pairs":
        """All chosen rows and this share of the others, drawn: the order that trees learn does not depend on their rate."""
        kept = (self.label > 0) | (np.random.default_rng(seed).random(len(self.label)) < share)
        return Pairs(self.customer[kept], self.item[kept], self.values[kept], self.names, self.label[kept])


def described(retrieval: Retrieval, history: History, at_us: int, *, new_only: bool) -> tuple[Candidates, NDArray[np.float32]]:
    """One customer's candidates (c,), and what is known of each (c, len(NAMES)): training and serving both know it by this call.

    Features of a source that is not there are NaN, so that the columns are the same at every moment.
    """
    known = history.at(at_us)
    found = retrieval.candidates(known, new_only=new_only)
    values = np.empty((len(NAMES), len(found.items)), dtype=np.float32)  # by column: each is written whole
    features.values(known, retrieval.shelf_, found.items, values[:_COUNTED])
    values[_COUNTED:] = found.told
    return found, values.T


def pairs(
    retrieval: Retrieval, histories: Histories, customers: NDArray[np.int64], at_us: ArrayLike, *, new_only: bool, relevant: Any = None
) -> Iterator[Pairs]:
    """The pairs of these customers, some at a time. at_us: one moment, or of each row of the histories its own. relevant: csr (n_customers,
    n_items) of labels; without it every label is 0.
    """
    at_us = np.broadcast_to(np.asarray(at_us, dtype=np.int64), len(histories))
    for start in range(0, len(customers), AT_A_TIME):
        yield _pairs(retrieval, histories, customers[start : start + AT_A_TIME], at_us, new_only, relevant)


def _pairs(
    retrieval: Retrieval, histories: Histories, customers: NDArray[np.int64], at_us: NDArray[np.int64], new_only: bool, relevant: Any
) -> Pairs:
    found = [described(retrieval, histories.customer(row), int(at_us[row]), new_only=new_only) for row in customers.tolist()]
    sizes = [len(candidates.items) for candidates, _ in found]
    item = np.concatenate([np.empty(0, dtype=np.int64), *(candidates.items for candidates, _ in found)])
    values = np.concatenate([np.empty((0, len(NAMES)), dtype=np.float32), *(rows for _, rows in found)])
    customer, label = np.repeat(customers, sizes), np.zeros(len(item), dtype=np.float32)
    if relevant is not None and len(label):
        label[:] = np.asarray(relevant[customer, item]).ravel()
    return Pairs(customer, item, values, NAMES, label)
