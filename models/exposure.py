"""Lists of items -> how attention is spread over the catalogue. Says nothing of whether the lists are any good."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def gini(items: ArrayLike, n_items: int) -> float:
    """Inequality of how often each item of the catalogue is listed: 0 all alike, towards 1 one item only; NaN without any list.

    items: (m, k), -1 for an empty place.
    """
    listed = np.asarray(items).ravel()
    counts = np.sort(np.bincount(listed[listed >= 0], minlength=n_items)).astype(np.float64)
    if not counts.sum():
        return float("nan")
    rank = np.arange(1, n_items + 1)
    return float(((2 * rank - n_items - 1) @ counts) / (n_items * counts.sum()))


def novelty(items: ArrayLike, bought: Any) -> float:
    """Mean surprise, in bits, that a customer drawn at random had the listed item: -log2 of the share who did; NaN without any list.

    bought: csr (n_customers, n_items), non-zero where a customer had it. An item nobody had counts as one customer's.
    """
    listed = np.asarray(items).ravel()
    listed = listed[listed >= 0]
    owners = np.bincount(bought.indices[bought.data != 0], minlength=bought.shape[1])
    return float(np.mean(-np.log2(np.maximum(owners[listed], 1) / bought.shape[0]))) if listed.size else float("nan")
