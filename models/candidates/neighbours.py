"""Items that the same customers choose: cosine between items, shrunk where few customers speak for it."""

import numpy as np
from scipy import sparse

from models.candidates.source import REACH, Linear, bounded, heaviest
from models.lists import best

BLOCK_CELLS = 4_000_000


class Neighbours(Linear):
    """cos(i, j) = x_i'x_j / (|x_i| |x_j| + shrinkage * mean |x|^2), of which each item keeps its nearest.

    n_neighbours: how many. shrinkage: 0 is the plain cosine. max_row: of a customer with more items the heaviest so many
    count when items are compared: who touches everything says nothing about what goes together. reach: an item counts for so many
    others, those it is nearest to.
    """

    def __init__(
        self, *, n_neighbours: int = 100, shrinkage: float = 1.0, max_row: int = 1_000, reach: int = REACH, random_state: int = 0
    ) -> None:
        self.n_neighbours = n_neighbours
        self.shrinkage = shrinkage
        self.max_row = max_row
        self.reach = reach
        self.random_state = random_state

    def _learn(self, weights: sparse.csr_matrix) -> None:
        if self.n_neighbours < 1 or self.max_row < 1 or self.reach < 1 or self.shrinkage < 0:
            raise ValueError(
                f"Neighbours: n_neighbours, max_row and reach must be 1 or more, shrinkage 0 or more; found {self.n_neighbours}, "
                f"{self.max_row}, {self.reach}, {self.shrinkage}"
            )
        by_item = bounded(heaviest(weights, self.max_row)).T.tocsr()
        by_customer = by_item.T.tocsr()
        length = np.sqrt(np.asarray(by_item.multiply(by_item).sum(axis=1)).ravel())
        slack = self.shrinkage * float(np.mean(length[length > 0] ** 2))
        step = max(1, BLOCK_CELLS // self.n_items_)
        items, near, cosine = [], [], []
        for start in range(0, self.n_items_, step):
            block = (by_item[start : start + step] @ by_customer).tocsr()
            row = np.repeat(np.arange(block.shape[0]), np.diff(block.indptr))
            dense = np.full(block.shape, -np.inf, dtype=np.float32)
            dense[row, block.indices] = block.data / (length[start + row] * length[block.indices] + slack)
            dense[np.arange(len(dense)), start + np.arange(len(dense))] = -np.inf
            found, value = best(dense, self.n_neighbours)
            row, place = np.nonzero(found >= 0)
            items.append(start + row)
            near.append(found[row, place])
            cosine.append(value[row, place])
        where = (np.concatenate(near), np.concatenate(items))  # an item's neighbours speak for it: its column of weights
        self.weights_ = sparse.csr_matrix((np.concatenate(cosine), where), (self.n_items_, self.n_items_), dtype=np.float32)
        self.weights_ = heaviest(self.weights_, self.reach)
