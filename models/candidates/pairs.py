"""A moment, its sources and some customers -> the rows that the second stage ranks: one for each customer and candidate."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.candidates.features import Features
from models.candidates.occasion import Occasion
from models.candidates.retrieval import KINDS, Retrieval


@dataclass(frozen=True)
class Pairs:
    """Rows (n,) by customer, then item. values: (n, n_features), NaN where unknown; names: of the columns. label: 1 where relevant."""

    customer: NDArray[np.int64]
    item: NDArray[np.int64]
    values: NDArray[np.float32]
    names: tuple[str, ...]
    label: NDArray[np.int8]

    def thinned(self, share: float, *, seed: int) -> "Pairs":
        """All relevant rows and this share of the others, drawn: the order that trees learn does not depend on their rate."""
        kept = (self.label > 0) | (np.random.default_rng(seed).random(len(self.label)) < share)
        return Pairs(self.customer[kept], self.item[kept], self.values[kept], self.names, self.label[kept])


def pairs(retrieval: Retrieval, now: Occasion, customers: NDArray[np.int64], *, new_only: bool, relevant: Any = None) -> Iterator[Pairs]:
    """The pairs of these customers, some customers at a time. relevant: csr (n_customers, n_items); without it every label is 0.

    Features of a source that is not there are NaN, so that the columns are the same at every moment.
    """
    counted = Features.of(now)
    for found in retrieval.candidates(now, customers, new_only=new_only):
        columns = counted.at(found.customer, found.item)
        nothing = np.full(len(found.item), np.nan)
        for name in KINDS:
            columns[f"{name}_score"], columns[f"{name}_rank"] = found.scores.get(name, nothing), found.ranks.get(name, nothing)
        values = np.stack([column.astype(np.float32) for column in columns.values()], axis=1)
        label = np.zeros(len(found.item), dtype=np.int8)
        if relevant is not None and len(label):
            label[np.asarray(relevant[found.customer, found.item]).ravel() > 0] = 1
        yield Pairs(found.customer, found.item, values, tuple(columns), label)
