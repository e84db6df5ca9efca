"""What every source of candidates shares: learned from interactions, it scores all items for any history, not only those it was fitted on.

A source holds items only. Whose history a row is, it neither knows nor keeps: nothing of a person is in its files.
"""

from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from models import evaluation, lists
from models.candidates.opinion import Opinion, Places
from models.learner import Learner, read_array, read_json, write_json
from models.lists import Ranked, Singles

LOSS_K = 20
CHUNK_CELLS = 4_000_000  # scores held at a time
REACH = 500  # items that one item speaks for: the most popular would speak for all of them, and of almost all say next to nothing
USUAL_SHARE, LONGEST = 0.9, 5.0  # of customers; how much longer than theirs a history may be
_CSR = ("data", "indices", "indptr")


class Source(Learner):
    """Base of the sources. A subclass names its learned arrays: `_arrays` dense ones, `_matrices` csr ones."""

    _arrays: ClassVar[tuple[str, ...]] = ()
    _matrices: ClassVar[tuple[str, ...]] = ()

    n_items_: int

    def fit(self, interactions: Any, validation: Any = None) -> Self:
        """Learn from weights >= 0, csr (n_customers, n_items). `validation` is there so that all learners are called alike.

        Raises ValueError on weights that are negative or not finite, no interaction at all, or a parameter outside its range.
        """
        weights = checked(interactions)
        if not weights.nnz:
            raise ValueError(f"{type(self).__name__}: expected interactions to learn from, found none in shape {weights.shape}")
        self.n_items_ = int(weights.shape[1])
        self._learn(weights)
        return self

    def score(self, histories: Any) -> Singles:
        """The score of every item (m, n_items) for customers with these weights, csr (m, n_items); a higher one is better.

        Comparable within a row only. A row that says nothing to this source is all zeros.
        """
        self._check_fitted("n_items_")
        return self._score(checked(histories, self.n_items_))

    def asked(self, items: Places, weights: NDArray[np.float64]) -> Opinion:
        """What the source says of one customer with these weights > 0 (r,) of items (r,), each once: as `score`, without all items. Linear
        sources are asked together, by their `Stack`.
        """
        raise NotImplementedError

    def recommend(self, histories: Any, k: int, exclude: Any = None) -> Ranked:
        """The k best items (m, k) for each history and their scores (m, k), best first, of equal ones the lower position.

        exclude: csr (m, n_items), its non-zero entries are never returned. Places that cannot be filled hold -1 and -inf.
        """
        self._check_fitted("n_items_")
        if k < 1:
            raise ValueError(f"{type(self).__name__}: k must be 1 or more, found {k}")
        weights = checked(histories, self.n_items_)
        barred = None if exclude is None else checked(exclude, self.n_items_)
        if barred is not None and barred.shape != weights.shape:
            raise ValueError(f"{type(self).__name__}: exclude must have the shape {weights.shape}, found {barred.shape}")
        items, scores = np.empty((weights.shape[0], k), dtype=np.int64), np.empty((weights.shape[0], k), dtype=np.float32)
        for part in chunks(weights.shape[0], self.n_items_):
            dense = self._score(weights[part])
            if barred is not None:
                dense[_coordinates(barred[part])] = -np.inf
            items[part], scores[part] = lists.best(dense, k)
        return items, scores

    def loss(self, histories: Any, relevant: Any) -> float:
        """Minus the NDCG@20 of recommending to the rows with something relevant, csr (m, n_items)."""
        wanted = checked(relevant, getattr(self, "n_items_", None))
        rows = np.flatnonzero(np.diff(wanted.indptr))
        if not rows.size:
            raise ValueError(f"{type(self).__name__}: no customer has anything relevant; there is nothing to judge by")
        return -evaluation.ndcg_at_k(self.recommend(checked(histories)[rows], LOSS_K)[0], wanted[rows], k=LOSS_K)

    def save(self, folder: Path) -> None:
        """Write the arrays as `.npy` and `source.json` into the folder, made if absent."""
        self._check_fitted("n_items_")
        folder.mkdir(parents=True, exist_ok=True)
        for name in self._arrays:
            np.save(folder / f"{name.rstrip('_')}.npy", getattr(self, name), allow_pickle=False)
        for name in self._matrices:
            for part in _CSR:
                np.save(folder / f"{name.rstrip('_')}_{part}.npy", getattr(getattr(self, name), part), allow_pickle=False)
        shapes = {name: list(getattr(self, name).shape) for name in self._matrices}
        described = {"kind": self._kind(), "params": self.get_params(), "n_items": self.n_items_, "shapes": shapes, **self._described()}
        write_json(folder / "source.json", described)

    @classmethod
    def load(cls, folder: Path, *, is_mapped: bool = False) -> Self:
        """The source as it was saved; mapped, processes share one copy in memory. Raises ValueError if the files are another source's or
        do not belong together.
        """
        saved = read_json(folder / "source.json", cls._kind())
        source = cls(**saved["params"])
        source.n_items_ = int(saved["n_items"])
        for name in cls._arrays:
            setattr(source, name, read_array(folder / f"{name.rstrip('_')}.npy", is_mapped=is_mapped))
        for name in cls._matrices:
            parts = tuple(read_array(folder / f"{name.rstrip('_')}_{part}.npy", is_mapped=is_mapped) for part in _CSR)
            setattr(source, name, sparse.csr_matrix(parts, tuple(saved["shapes"][name])))
        source._restored(saved)
        return source

    def _learn(self, weights: Any) -> None:
        """Set what is learned from a checked csr."""
        raise NotImplementedError

    def _score(self, histories: Any) -> Singles:
        """`score` of a checked csr; a fresh array."""
        raise NotImplementedError

    def _described(self) -> dict[str, Any]:
        """What the description holds beyond parameters."""
        return {}

    def _restored(self, saved: dict[str, Any]) -> None:
        """Finish a loaded source: check what was read, and set what the arrays alone do not say."""

    @classmethod
    def _kind(cls) -> str:
        return cls.__name__.lower()


class Linear(Source):
    """A source whose score is the history times a matrix of item by item. Learned: `weights_`, csr (n_items, n_items)."""

    _matrices = ("weights_",)

    weights_: Any

    def _score(self, histories: Any) -> Singles:
        return np.asarray((histories.astype(np.float32) @ self.weights_).toarray(), dtype=np.float32)

    def _restored(self, saved: dict[str, Any]) -> None:
        if self.weights_.shape != (self.n_items_, self.n_items_):
            raise ValueError(f"{type(self).__name__}: expected weights of {self.n_items_} items squared, found {self.weights_.shape}")


def checked(weights: Any, n_items: int | None = None) -> Any:
    """A csr of weights > 0 without duplicates, never the caller's own. Raises ValueError where it cannot be one."""
    if not sparse.issparse(weights):
        raise ValueError(f"interactions: expected a sparse matrix of customers by items, found {type(weights).__name__}")
    matrix = sparse.csr_matrix(weights, dtype=np.float64, copy=True)
    if n_items is not None and matrix.shape[1] != n_items:
        raise ValueError(f"interactions: expected {n_items} items as in fit, found {matrix.shape[1]} columns")
    if not np.all(np.isfinite(matrix.data) & (matrix.data >= 0)):
        raise ValueError("interactions: weights must be finite and not negative; found others")
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    return matrix


def bounded(weights: Any) -> Any:
    """The same csr with rows no longer (in Euclid's sense) than `LONGEST` times the row at the 90th percentile.

    Co-occurrences go with the square of a row: without a bound one robot among a hundred customers decides what goes with what.
    """
    length = np.sqrt(np.asarray(weights.multiply(weights).sum(axis=1)).ravel())
    bound = LONGEST * np.quantile(length[length > 0], USUAL_SHARE)
    if length.max() <= bound:
        return weights
    return sparse.csr_matrix(sparse.diags(bound / np.maximum(length, bound)) @ weights)


def heaviest(weights: Any, k: int) -> Any:
    """Each row of a csr with its k entries of the largest size, ties by column."""
    counts = np.diff(weights.indptr)
    if counts.max(initial=0) <= k:
        return weights
    rows = np.repeat(np.arange(len(counts)), counts)
    long = np.flatnonzero(counts[rows] > k)  # only rows with too many are put in order
    order = long[np.lexsort((weights.indices[long], -np.abs(weights.data[long]), rows[long]))]
    sizes = counts[counts > k]
    place = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    kept = np.ones(len(rows), dtype=bool)
    kept[order[place >= k]] = False
    return sparse.csr_matrix((weights.data[kept], (rows[kept], weights.indices[kept])), weights.shape)


def chunks(n_rows: int, n_items: int) -> list[slice]:
    """Slices of rows so small that their scores of all items are at most CHUNK_CELLS, or one row."""
    step = max(1, CHUNK_CELLS // max(1, n_items))
    return [slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]


def _coordinates(matrix: Any) -> tuple[NDArray[np.intp], NDArray[Any]]:
    return np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr)), matrix.indices
