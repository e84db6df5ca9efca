"""Known chances of each item -> how good lists are on average over what customers then choose, without drawing any choice.

For a shop whose truth is known: the luck of one draw moves the NDCG of some hundred customers by more than models differ.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

_HALVINGS = 60


def chances(shares: ArrayLike, n_chosen: ArrayLike) -> Floats:
    """The chance (m, n_items) that each item is among the n_chosen (m,) different ones of each customer, who draw by these shares.

    shares: (m, n_items), 0 or more, of any sum above 0. 1 - exp(-rate * share), with the rate at which the chances add up to n_chosen.
    Source: Rosén, "Asymptotic theory for successive sampling", 1972. Raises ValueError on a customer without shares.
    """
    given, n = np.asarray(shares, dtype=float), np.asarray(n_chosen, dtype=float)
    total = given.sum(axis=1, keepdims=True)
    if not np.all(np.isfinite(total) & (total > 0)) or given.min(initial=0.0) < 0:
        raise ValueError("expectation: expected shares of 0 or more, some above it, of every customer; found others")
    share = given / total
    low, high = np.log(np.maximum(n, 1e-9)), np.full(len(n), np.log(1e12))  # no rate is lower than n: 1 - exp(-x) <= x
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        is_short = _included(share, middle).sum(axis=1) < n
        low, high = np.where(is_short, middle, low), np.where(is_short, high, middle)
    return _included(share, low)


def ndcg_by_customer(items: ArrayLike, chance: Floats, n_chosen: ArrayLike, *, k: int) -> Floats:
    """The NDCG@k (m,) that lists (m, >= 1) have on average over what customers choose, each n_chosen (m,) items, by `chances`.

    items: best first, -1 for an empty place.
    """
    listed = np.asarray(items, dtype=np.int64)[:, :k]
    discount = 1.0 / np.log2(np.arange(2, k + 2))
    gain = np.where(listed >= 0, np.take_along_axis(chance, np.maximum(listed, 0), axis=1), 0.0)
    best = np.cumsum(discount)[np.minimum(np.asarray(n_chosen, dtype=np.int64), k) - 1]
    return np.asarray(gain @ discount[: listed.shape[1]] / best)


def _included(share: Floats, log_rate: Floats) -> Floats:
    return -np.expm1(-np.exp(log_rate)[:, None] * share)
