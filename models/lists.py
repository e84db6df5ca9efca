"""Scores of rows -> the best items of each row. Knows nothing of where scores come from; never breaks a tie by chance."""

import numpy as np
from numpy.typing import NDArray

Singles = NDArray[np.float32]
Ranked = tuple[NDArray[np.int64], Singles]

GROUPS_PER_PLACE = 8  # groups of columns for each place of a list: more give a closer bound

_LOWEST = np.finfo(np.float32).min


def best(scores: Singles, k: int) -> Ranked:
    """The k best finite columns of each row (m, k), best first, ties by column; -1 and -inf where there are fewer."""
    n_rows, n_items = scores.shape
    rows, columns = np.divmod(np.flatnonzero(scores >= bound(scores, k)), n_items)
    return best_of_pairs(rows, columns, scores[rows, columns], n_rows=n_rows, k=k)


def best_of_pairs(rows: NDArray[np.integer], columns: NDArray[np.integer], values: NDArray[np.floating], *, n_rows: int, k: int) -> Ranked:
    """As `best`, of the pairs given (n,), their rows in order; a pair that is not given is not ranked."""
    order = np.lexsort((columns, -values, rows))
    starts = np.searchsorted(rows, np.arange(n_rows))
    places = np.arange(len(rows)) - starts[rows]  # rows are in order before and after the sort
    kept = order[places < k]
    items, top = np.full((n_rows, k), -1, dtype=np.int64), np.full((n_rows, k), -np.inf, dtype=np.float32)
    items[rows[kept], places[places < k]], top[rows[kept], places[places < k]] = columns[kept], values[kept]
    return items, top


def chosen(scores: Singles, k: int) -> NDArray[np.bool_]:
    """Which of the columns are the k best finite ones of each row (m, n_items), ties by column; cheaper than `best`, without the order."""
    n_items = scores.shape[1]
    is_there = np.isfinite(scores)
    if k >= n_items:
        return np.asarray(is_there)
    limit = np.partition(scores, n_items - k, axis=1)[:, n_items - k, None]
    above, at_limit = scores > limit, (scores == limit) & is_there
    room = k - np.count_nonzero(above, axis=1)
    return np.asarray(above | (at_limit & (np.cumsum(at_limit, axis=1, dtype=np.int32) <= room[:, None])))


def bound(scores: Singles, k: int) -> Singles:
    """A finite number at or below the k-th best finite score of each row (m, 1), close to it, from one pass.

    The k-th best of the maxima of disjoint groups cannot exceed it. Groups take every n-th column, since good items tend to
    be neighbours. Far cheaper than a partition of the row, and ties at the k-th place all stay in.
    """
    size = scores.shape[1] // (GROUPS_PER_PLACE * k)
    if size < 2:
        return np.full((len(scores), 1), _LOWEST, dtype=np.float32)
    n_groups = scores.shape[1] // size
    maxima = scores[:, : size * n_groups].reshape(len(scores), size, n_groups).max(axis=1)
    return np.maximum(np.partition(maxima, n_groups - k, axis=1)[:, n_groups - k, None], _LOWEST)
