"""Interactions -> ranked items for each customer: implicit matrix factorisation, own history, popularity for strangers.

Rows are customers, columns items, both by position: which position is whose is the caller's
knowledge. Never reads a clock: recency is in the weights it is given.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from models import als, evaluation
from models.als import Objective, Singles, Solved
from models.candidates.source import checked
from models.learner import Learner, read_array, read_json, write_json
from models.lists import Ranked, best

Indices = NDArray[np.int64]

LOSS_K = 20
CHUNK_CELLS = 4_000_000  # scores held at a time
_ARRAYS = ("customer_factors_", "item_factors_", "popularity_")
_CSR = ("data", "indices", "indptr")


class Recommender(Learner):
    """Scores an item for a customer by their factors' product, raised by what the customer did with that very item.

    n_factors: dimensions. regularization: ridge per unit of frequency. alpha0: weight of a cell without interaction.
    nu: how the ridge grows with a row's frequency, 0 (not) to 1 (in proportion). n_epochs: passes over both sides.
    repeat_weight: what the customer's strongest own item gains, the others in proportion to their weight; 0 = nothing.

    Learned: `customer_factors_`, `item_factors_`, `popularity_` (n_items,) the items' total weight, `history_` csr of own
    weights over the row's largest, `largest_` (n_customers,) that largest weight, NaN where a version of before it was kept was
    loaded, `objective_`.
    """

    objective_: Objective
    customer_factors_: Singles
    item_factors_: Singles
    popularity_: NDArray[np.float64]
    history_: Any
    largest_: Singles

    def __init__(
        self,
        *,
        n_factors: int = 64,
        regularization: float = 0.01,
        alpha0: float = 0.3,
        nu: float = 0.5,
        n_epochs: int = 15,
        repeat_weight: float = 1.0,
        random_state: int = 0,
        num_threads: int = 1,
    ) -> None:
        self.n_factors = n_factors
        self.regularization = regularization
        self.alpha0 = alpha0
        self.nu = nu
        self.n_epochs = n_epochs
        self.repeat_weight = repeat_weight
        self.random_state = random_state
        self.num_threads = num_threads

    @staticmethod
    def suggest(trial: Any) -> dict[str, Any]:
        """One point of the search space of an Optuna trial; the defaults lie inside, so they can be the first trial."""
        return {
            "n_factors": trial.suggest_int("n_factors", 16, 128, log=True),
            "regularization": trial.suggest_float("regularization", 1e-4, 0.3, log=True),
            "alpha0": trial.suggest_float("alpha0", 3e-3, 3.0, log=True),
            "nu": trial.suggest_float("nu", 0.0, 1.0),
            "n_epochs": trial.suggest_int("n_epochs", 5, 25),
            "repeat_weight": trial.suggest_float("repeat_weight", 0.0, 3.0),
        }

    def fit(self, interactions: Any, validation: Any = None) -> Self:
        """Learn from weights >= 0, csr (n_customers, n_items); an explicit 0 is no interaction.

        `validation` is there so that all learners are called alike: nothing is stopped early here. Raises ValueError on
        weights that are negative or not finite, no interaction at all, or a parameter outside its range.
        """
        self._check_params()
        weights = checked(interactions)
        if not weights.nnz:
            raise ValueError(f"Recommender: expected interactions to learn from, found none in shape {weights.shape}")
        objective = Objective.balanced(weights, alpha0=self.alpha0, regularization=self.regularization, nu=self.nu)
        customers, items = als.factorize(
            weights, objective, n_factors=self.n_factors, n_epochs=self.n_epochs, seed=self.random_state, num_threads=self.num_threads
        )
        popularity = np.asarray(weights.sum(axis=0), dtype=np.float64).ravel()
        return self._learned(
            objective,
            customers,
            items,
            popularity,
            _over_largest(weights),
            _largest(weights),
        )

    def keep(self, rows: ArrayLike) -> Self:
        """Forget every customer but those in these rows of `fit`, which are numbered anew in the order given."""
        kept = self._check_customers(rows)
        self.customer_factors_, self.history_, self.largest_ = self.customer_factors_[kept], self.history_[kept], self.largest_[kept]
        return self

    def folded(self, interactions: Any) -> Self:
        """The same items for other customers, csr (m, n_items) of weights >= 0: their factors are solved for, as training would have.

        Raises ValueError on weights that are negative or not finite, or of other items.
        """
        self._check_fitted("item_factors_")
        weights = checked(interactions, len(self.item_factors_))
        factors = als.fold_in(weights, self.objective_, self.item_factors_, gram=self._gram, num_threads=self.num_threads)
        other = type(self)(**self.get_params())
        return other._learned(self.objective_, factors, self.item_factors_, self.popularity_, _over_largest(weights), _largest(weights))

    def score(self, customers: ArrayLike, items: ArrayLike) -> Singles:
        """The score of each pair (m,) of customer and item; -1 is an unknown customer. Comparable within a customer only.

        A customer without history gets the item's popularity over that of the most popular.
        """
        rows, columns = self._check_customers(customers), np.asarray(items, dtype=np.int64)
        if columns.shape != rows.shape or (columns.size and (columns.min() < 0 or columns.max() >= len(self.item_factors_))):
            raise ValueError(f"Recommender: expected {rows.size} items in [0, {len(self.item_factors_)}), one for each customer")
        scores = np.einsum("md,md->m", self.customer_factors_[rows], self.item_factors_[columns])
        scores += np.asarray(self._bonus(rows)[np.arange(rows.size), columns]).ravel()
        return np.asarray(np.where(self._strangers(rows), self._popularity_share[columns], scores))

    def recommend(self, customers: ArrayLike, k: int, exclude: Any = None) -> Ranked:
        """The k best items (m, k) for each customer and their scores (m, k), best first, of equal ones the lower position.

        customers: (m,) rows of `fit`, -1 for an unknown one. exclude: csr (m, n_items), one row for each customer asked
        for; its non-zero entries are never returned. Places that cannot be filled hold item -1 and score -inf.
        """
        rows, n_items = self._check_customers(customers), len(self.item_factors_)
        if k < 1:
            raise ValueError(f"Recommender: k must be 1 or more, found {k}")
        barred = None if exclude is None else _checked_shape(exclude, (rows.size, n_items))
        items, values = np.empty((rows.size, k), dtype=np.int64), np.empty((rows.size, k), dtype=np.float32)
        for part in self._chunks(rows.size):
            scores, strangers = self._scores(rows[part]), self._strangers(rows[part])
            scores[strangers] = self._popularity_place
            if barred is not None:
                out = barred[part]
                scores[np.repeat(np.arange(len(scores)), np.diff(out.indptr)), out.indices] = -np.inf
            items[part], values[part] = best(scores, k)
            listed = items[part][strangers]
            values[part][strangers] = np.where(listed < 0, -np.inf, self._popularity_share[listed])
        return items, values

    def solve(self, items: Indices, weights: NDArray[np.floating]) -> Solved:
        """One customer's factors from the items touched (r,), each once, and their weights, above 0; and what each of them adds."""
        self._check_fitted("item_factors_")
        return als.solve_one(items, weights, self.objective_, self.item_factors_, gram=self._gram)

    def loss(self, relevant: Any) -> float:
        """Minus the NDCG@20 of recommending to the customers of `fit` with something relevant, csr (n_customers, n_items)."""
        self._check_fitted("item_factors_")
        wanted = checked(relevant, len(self.item_factors_))
        rows = np.flatnonzero(np.diff(wanted.indptr))
        if not rows.size:
            raise ValueError("Recommender: no customer has anything relevant; there is nothing to judge by")
        return -evaluation.ndcg_at_k(self.recommend(rows, LOSS_K)[0], wanted[rows], k=LOSS_K)

    def save(self, folder: Path) -> None:
        """Write the arrays as `.npy` and `recommender.json` into the folder, made if absent."""
        self._check_fitted("item_factors_")
        folder.mkdir(parents=True, exist_ok=True)
        for name in _ARRAYS:
            np.save(folder / f"{name.rstrip('_')}.npy", getattr(self, name), allow_pickle=False)
        for part in _CSR:
            np.save(folder / f"history_{part}.npy", getattr(self.history_, part), allow_pickle=False)
        np.save(folder / "largest.npy", self.largest_, allow_pickle=False)
        write_json(folder / "recommender.json", {"kind": "recommender", "params": self.get_params(), "objective": vars(self.objective_)})

    @classmethod
    def load(cls, folder: Path, *, is_mapped: bool = False) -> Self:
        """The learner as it was saved; mapped, processes share one copy in memory. Raises ValueError if the files disagree."""
        saved = read_json(folder / "recommender.json", "recommender")
        customers, items, popularity = (read_array(folder / f"{name.rstrip('_')}.npy", is_mapped=is_mapped) for name in _ARRAYS)
        parts = tuple(read_array(folder / f"history_{part}.npy", is_mapped=is_mapped) for part in _CSR)
        told = folder / "largest.npy"
        largest = read_array(told, is_mapped=is_mapped) if told.exists() else np.full(len(customers), np.nan, dtype=np.float32)
        is_whole = len(parts[-1]) == len(customers) + 1 and len(largest) == len(customers)
        if not is_whole or len(popularity) != len(items) or customers.shape[1:] != items.shape[1:]:
            raise ValueError(f"{folder}: the arrays do not belong together; save the model again")
        history = sparse.csr_matrix(parts, (len(customers), len(items)), copy=False)
        return cls(**saved["params"])._learned(Objective(**saved["objective"]), customers, items, popularity, history, largest)

    def _learned(
        self,
        objective: Objective,
        customers: Singles,
        items: Singles,
        popularity: NDArray[np.float64],
        history: Any,
        largest: Singles,
    ) -> Self:
        self.objective_, self.customer_factors_, self.item_factors_ = objective, customers, items
        self.popularity_, self.history_, self.largest_ = popularity, history, largest
        self._gram = items.T @ items
        self._popularity_share = (popularity / popularity.max()).astype(np.float32)
        place = np.empty(len(popularity), dtype=np.float32)
        place[np.lexsort((np.arange(len(popularity)), -popularity))] = -np.arange(len(popularity), dtype=np.float32)
        self._popularity_place = place  # 0 for the most popular, then -1, ...: no ties, so cheap to rank by
        return self

    def _chunks(self, n_rows: int) -> Iterator[slice]:
        step = max(1, CHUNK_CELLS // len(self.item_factors_))
        return (slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step))

    def _scores(self, rows: Indices) -> Singles:
        """The scores of all items for these rows; a fresh array."""
        scores, bonus = self.customer_factors_[rows] @ self.item_factors_.T, self._bonus(rows)
        scores[np.repeat(np.arange(len(scores)), np.diff(bonus.indptr)), bonus.indices] += bonus.data
        return np.asarray(scores)

    def _bonus(self, rows: Indices) -> Any:
        """What own history adds to the scores of these rows, csr of float32."""
        own = _take(self.history_, rows)
        own.data = own.data * np.float32(self.repeat_weight)
        return own

    def _strangers(self, rows: Indices) -> NDArray[np.bool_]:
        """Which of these rows have no history, or are unknown."""
        return np.asarray((rows < 0) | (self.history_.indptr[rows + 1] == self.history_.indptr[rows]))

    def _check_customers(self, customers: ArrayLike) -> Indices:
        self._check_fitted("item_factors_")
        rows, n = np.asarray(customers, dtype=np.int64), len(self.customer_factors_)
        if rows.ndim != 1 or (rows.size and (rows.min() < -1 or rows.max() >= n)):
            raise ValueError(f"Recommender: expected a list of rows in [0, {n}), or -1 for an unknown customer; found others")
        return rows

    def _check_params(self) -> None:
        positive = {name: getattr(self, name) for name in ("n_factors", "regularization", "alpha0", "n_epochs")}
        wrong = [f"{name} = {value} (above 0)" for name, value in positive.items() if not value > 0]
        wrong += [] if 0 <= self.nu <= 1 else [f"nu = {self.nu} (0 to 1)"]
        wrong += [] if self.repeat_weight >= 0 else [f"repeat_weight = {self.repeat_weight} (0 or more)"]
        if wrong:
            raise ValueError(f"Recommender: parameters outside their range: {', '.join(wrong)}")


# -- private -----------------------------------------------------------------------------------------------------------


def _checked_shape(exclude: Any, shape: tuple[int, int]) -> Any:
    matrix = sparse.csr_matrix(exclude)
    if matrix.shape != shape:
        raise ValueError(f"Recommender: exclude must have one row for each customer asked for, {shape}; found {matrix.shape}")
    if matrix.nnz and not matrix.data.all():
        matrix = matrix.copy()
        matrix.eliminate_zeros()
    return matrix


def _largest(weights: Any) -> Singles:
    """Each row's largest weight, 0 for an empty one."""
    counts, found = np.diff(weights.indptr), np.zeros(weights.shape[0], dtype=np.float32)
    if weights.nnz:
        found[counts > 0] = np.maximum.reduceat(weights.data, weights.indptr[:-1][counts > 0])
    return found


def _over_largest(weights: Any) -> Any:
    """Each row over its largest weight: (0, 1]."""
    counts = np.diff(weights.indptr)
    largest = np.maximum.reduceat(weights.data, weights.indptr[:-1][counts > 0]) if weights.nnz else np.empty(0)
    data = (weights.data / np.repeat(largest, counts[counts > 0])).astype(np.float32)
    return sparse.csr_matrix((data, weights.indices, weights.indptr), weights.shape)


def _take(matrix: Any, rows: Indices) -> Any:
    """Rows of a csr; row -1 is empty."""
    starts = matrix.indptr[rows].astype(np.int64)
    counts = np.where(rows < 0, 0, matrix.indptr[rows + 1] - starts)
    indptr = np.concatenate([[0], np.cumsum(counts)])
    places = np.repeat(starts - indptr[:-1], counts) + np.arange(indptr[-1])
    return sparse.csr_matrix((matrix.data[places], matrix.indices[places], indptr), (len(rows), matrix.shape[1]))
