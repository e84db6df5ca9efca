"""Items that predict one another: the linear auto-encoder without a diagonal, in closed form. Source: Steck, WWW 2019 (EASE^R)."""

import numpy as np
from scipy import sparse
from scipy.linalg import lapack

from models.candidates.source import REACH, Linear, bounded, heaviest
from models.lists import best

BLOCK_CELLS = 4_000_000


class Ease(Linear):
    """Minimises |X - X B|^2 + ridge |B|^2 with diag(B) = 0: B = I - P / diag(P), P = (X'X + ridge I)^-1.

    ridge: the one hyper-parameter; a multiple of the mean of the Gram matrix' diagonal, so that it travels between shops.
    n_neighbours: how many weights are kept for each item, the largest in size; None keeps all. reach: and so many with which an item counts
    for others. max_items: the inversion takes
    n_items^3 operations and 8 n_items^2 bytes: a larger catalogue is refused.
    """

    def __init__(
        self, *, ridge: float = 10.0, n_neighbours: int | None = 200, reach: int = REACH, max_items: int = 20_000, random_state: int = 0
    ) -> None:
        self.ridge = ridge
        self.n_neighbours = n_neighbours
        self.reach = reach
        self.max_items = max_items
        self.random_state = random_state

    def _learn(self, weights: sparse.csr_matrix) -> None:
        if not self.ridge > 0 or self.reach < 1:
            raise ValueError(f"Ease: ridge must be above 0 and reach 1 or more, found {self.ridge} and {self.reach}")
        used = np.unique(weights.indices)  # an item nobody touched predicts nothing and is predicted by nothing
        if used.size > self.max_items:
            raise ValueError(f"Ease: {used.size:,} items are more than the {self.max_items:,} it inverts; use another source")
        part = bounded(weights)[:, used]
        gram = (part.T @ part).toarray(order="F")
        gram[np.diag_indices_from(gram)] += self.ridge * np.diagonal(gram).mean()
        inverse = _inverted(gram)
        scale = -1.0 / np.diagonal(inverse)
        step = max(1, BLOCK_CELLS // used.size)
        items, others, data = [], [], []
        for start in range(0, used.size, step):
            block = (inverse[start : start + step] * scale[start : start + step, None]).astype(np.float32)  # symmetric: rows are columns
            block[np.arange(len(block)), start + np.arange(len(block))] = 0.0
            found, size = best(np.abs(block), min(self.n_neighbours or used.size, used.size))
            row, place = np.nonzero(size > 0)
            items.append(used[start + row])
            others.append(used[found[row, place]])
            data.append(block[row, found[row, place]])
        where = (np.concatenate(others), np.concatenate(items))
        self.weights_ = sparse.csr_matrix((np.concatenate(data), where), (self.n_items_, self.n_items_), dtype=np.float32)
        self.weights_ = heaviest(self.weights_, self.reach)


def _inverted(gram: np.ndarray) -> np.ndarray:
    """The inverse of a symmetric positive matrix, in its own memory."""
    factor, failed = lapack.dpotrf(gram, lower=1, overwrite_a=1)
    if not failed:
        inverse, failed = lapack.dpotri(factor, lower=1, overwrite_c=1)
    if failed:
        raise ValueError("Ease: the Gram matrix cannot be inverted; give a larger ridge")
    for start in range(1, len(inverse)):  # the upper half, from the lower one
        inverse[:start, start] = inverse[start, :start]
    return np.asarray(inverse)
