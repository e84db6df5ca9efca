"""A moment -> ranked items for its customers: what the sources find, in the order that the ranker learned from earlier moments.

Keeps items and trees, no customer: who they are and what they did comes with the moment that is asked about.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from models.candidates.factors import Liked
from models.candidates.history import Histories, History
from models.candidates.occasion import Occasion
from models.candidates.pairs import Pairs, described
from models.candidates.retrieval import Retrieval
from models.learner import Learner, read_json, write_json
from models.lists import Ranked
from models.ranker import Ranker

ALL_ITEMS, NEW_ITEMS = "all_items", "new_items"  # what may be recommended: anything, or only what the customer never bought
MODES = (ALL_ITEMS, NEW_ITEMS)


@dataclass(frozen=True)
class Order:
    """One customer's candidates (c,) and their scores (c,), best first. liked: what the factors say of the customer, None without them."""

    items: NDArray[np.int64]
    scores: NDArray[np.float32]
    liked: Liked | None


class TwoStage(Learner):
    """Retrieval, and a ranker for each mode. Learned: `retrieval_`, `rankers_` by mode.

    retrieval, ranker: parameters of either; none keeps the defaults.
    """

    def __init__(
        self,
        *,
        retrieval: dict[str, Any] | None = None,
        ranker: dict[str, Any] | None = None,
        random_state: int = 0,
        num_threads: int = 1,
    ) -> None:
        self.retrieval = retrieval
        self.ranker = ranker
        self.random_state = random_state
        self.num_threads = num_threads

    def fit(self, now: Occasion, examples: Mapping[str, Sequence[Pairs]], *, retrieval: Retrieval | None = None) -> Self:
        """Fit the sources on `now`, and a ranker of each mode on the pairs of earlier moments. A mode without examples is left out.

        retrieval: the sources, where they are already fitted on `now`. Raises ValueError where there is nothing to learn from.
        """
        known = retrieval or Retrieval(random_state=self.random_state, **(self.retrieval or {})).fit(now)
        rankers = {}
        for mode, given in examples.items():
            if mode not in MODES:
                raise ValueError(f"TwoStage: expected examples of {', '.join(MODES)}, found {mode!r}")
            learner = Ranker(random_state=self.random_state, num_threads=self.num_threads, **(self.ranker or {}))
            rankers[mode] = learner.fit(given)
        self.retrieval_, self.rankers_ = known, rankers
        return self

    def rank(self, history: History, at_us: int, *, mode: str = ALL_ITEMS) -> Order:
        """All candidates of one customer with this history at this moment, best first, of equal ones the lower position.

        Raises ValueError on a mode that has no ranker.
        """
        self._check_fitted("rankers_")
        if mode not in self.rankers_:
            raise ValueError(f"TwoStage: it was not trained for {mode!r}, only for {', '.join(self.rankers_)}")
        found, values = described(self.retrieval_, history, at_us, new_only=mode == NEW_ITEMS)
        scores = self.rankers_[mode].score_rows(values)
        order = (-scores).argsort(kind="stable")
        return Order(found.items.take(order), scores.take(order), found.liked)

    def recommend(
        self, histories: Histories, customers: ArrayLike, k: int, exclude: Any = None, *, at_us: int, mode: str = ALL_ITEMS
    ) -> Ranked:
        """The k best items (m, k) for these rows of the histories and their scores (m, k), best first: the head of each one's `rank`.

        exclude: csr (m, n_items), its non-zero entries are never returned. Only candidates are ranked: places beyond them hold -1
        and -inf. Raises ValueError on a mode that has no ranker.
        """
        self._check_fitted("rankers_")
        rows, n_items = np.asarray(customers, dtype=np.int64), len(self.retrieval_.shelf_.category)
        if rows.ndim != 1 or (rows.size and (rows.min() < 0 or rows.max() >= len(histories))):
            raise ValueError(f"TwoStage: expected a list of rows in [0, {len(histories)}); found others")
        barred = None if exclude is None else _barred(exclude, (rows.size, n_items))
        items, scores = np.full((rows.size, k), -1, dtype=np.int64), np.full((rows.size, k), -np.inf, dtype=np.float32)
        for place, row in enumerate(rows.tolist()):
            ranked = self.rank(histories.customer(row), at_us, mode=mode)
            found, values = ranked.items, ranked.scores
            if barred is not None:
                open_ = ~np.isin(found, barred[place].indices)
                found, values = found[open_], values[open_]
            n = min(k, len(found))
            items[place, :n], scores[place, :n] = found[:n], values[:n]
        return items, scores

    def save(self, folder: Path) -> None:
        """Write the sources and the rankers, each into its own folder, and `two_stage.json`."""
        self._check_fitted("rankers_")
        folder.mkdir(parents=True, exist_ok=True)
        self.retrieval_.save(folder / "retrieval")
        for mode, ranker in self.rankers_.items():
            ranker.save(folder / mode)
        write_json(folder / "two_stage.json", {"kind": "two_stage", "params": self.get_params(), "modes": list(self.rankers_)})

    @classmethod
    def load(cls, folder: Path, *, is_mapped: bool = False) -> Self:
        """Both stages as they were saved; mapped, processes share one copy in memory."""
        saved = read_json(folder / "two_stage.json", "two_stage")
        learner = cls(**saved["params"])
        learner.retrieval_ = Retrieval.load(folder / "retrieval", is_mapped=is_mapped)
        learner.rankers_ = {mode: Ranker.load(folder / mode) for mode in saved["modes"]}
        return learner


def _barred(exclude: Any, shape: tuple[int, int]) -> Any:
    matrix = sparse.csr_matrix(exclude)
    if matrix.shape != shape:
        raise ValueError(f"TwoStage: exclude must have one row for each customer asked for, {shape}; found {matrix.shape}")
    matrix.eliminate_zeros()
    return matrix
