"""Candidates with their features -> the order in which they are shown: LambdaRank trees over one customer's candidates at a time.

Learns from earlier moments whose outcome is known; the sources' scores in its rows must come from fits that had not seen that outcome.
What somebody looked at and left teaches as well as what they bought, by what it is worth: there is several times as much of it.
Source: Burges, "From RankNet to LambdaRank to LambdaMART", 2010; LightGBM's implementation.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from models.candidates.pairs import Pairs
from models.forest import Forest
from models.learner import Learner, read_json, write_json

if TYPE_CHECKING:
    import lightgbm as lgb

# Small shops get smaller trees: chosen candidates worth this much for each leaf, and never fewer leaves than SMALLEST_TREE.
CHOSEN_A_LEAF, SMALLEST_TREE = 150, 7
ROWS_SHARE, SMALLEST_LEAF = 100, 5  # a leaf holds 1 / ROWS_SHARE of the rows where min_data_in_leaf asks for more


class Ranker(Learner):
    """Boosted trees for the order of one customer's candidates.

    num_leaves, min_data_in_leaf: at most; on little data less. truncation: places of a list that the order is learned for. The same
    rows and `random_state` give the same bytes, whatever `num_threads`. Learned: `booster_`, `feature_names_`.
    """

    def __init__(
        self,
        *,
        n_rounds: int = 40,
        num_leaves: int = 31,
        learning_rate: float = 0.1,
        min_data_in_leaf: int = 200,
        feature_fraction: float = 0.5,
        truncation: int = 30,
        random_state: int = 0,
        num_threads: int = 1,
    ) -> None:
        self.n_rounds = n_rounds
        self.num_leaves = num_leaves
        self.learning_rate = learning_rate
        self.min_data_in_leaf = min_data_in_leaf
        self.feature_fraction = feature_fraction
        self.truncation = truncation
        self.random_state = random_state
        self.num_threads = num_threads

    def fit(self, examples: Sequence[Pairs], validation: Any = None) -> Self:
        """Learn from the pairs of earlier moments; a customer at a moment is one list. Nothing is stopped early.

        A label is what the candidate is worth at the top of the list. Customers to whom all candidates are worth the same teach nothing.
        Raises ValueError where that is everybody, or columns differ.
        """
        import lightgbm as lgb

        values, worth, groups = self._lists(examples)
        gains, grade = np.unique(np.append(worth, 0.0), return_inverse=True)
        self.feature_names_ = list(examples[0].names)
        options = {
            "objective": "lambdarank", "label_gain": gains.tolist(), "lambdarank_truncation_level": self.truncation,
            "num_leaves": min(self.num_leaves, max(SMALLEST_TREE, int(worth.sum()) // CHOSEN_A_LEAF)),
            "learning_rate": self.learning_rate, "feature_fraction": self.feature_fraction, "seed": self.random_state,
            "min_data_in_leaf": max(SMALLEST_LEAF, min(self.min_data_in_leaf, len(worth) // ROWS_SHARE)),
            "num_threads": self.num_threads, "deterministic": True, "force_row_wise": True, "verbosity": -1,
        }  # fmt: skip
        data = lgb.Dataset(values, grade[:-1], group=groups, feature_name=self.feature_names_, free_raw_data=True)
        return self._learned(lgb.train(options, data, self.n_rounds))

    def score(self, candidates: Pairs) -> NDArray[np.float32]:
        """(n,), higher is better, comparable within a customer only. Raises ValueError where the columns are not those of `fit`."""
        self._check_fitted("booster_")
        if list(candidates.names) != self.feature_names_:
            odd = sorted(set(candidates.names) ^ set(self.feature_names_))
            raise ValueError(f"Ranker: expected the columns of fit in their order; missing or foreign: {odd}")
        return self.score_rows(candidates.values)

    def score_rows(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """As `score`, for rows (n, n_features) whose columns are known to be those of `fit`."""
        if not len(values):
            return np.empty(0, dtype=np.float32)
        return self._forest(values).astype(np.float32)

    def save(self, folder: Path) -> None:
        """Write `ranker.lgb`, LightGBM's own text, and `ranker.json` into the folder, made if absent."""
        self._check_fitted("booster_")
        folder.mkdir(parents=True, exist_ok=True)
        self.booster_.save_model(folder / "ranker.lgb")
        write_json(folder / "ranker.json", {"kind": "ranker", "params": self.get_params(), "feature_names": self.feature_names_})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The ranker as it was saved. Raises ValueError if the files disagree."""
        import lightgbm as lgb

        saved = read_json(folder / "ranker.json", "ranker")
        ranker = cls(**saved["params"])
        ranker.feature_names_ = list(saved["feature_names"])
        ranker._learned(lgb.Booster(model_file=folder / "ranker.lgb"))
        if ranker.booster_.feature_name() != ranker.feature_names_:
            raise ValueError(f"{folder}: the trees and their description do not belong together; save the ranker again")
        return ranker

    booster_: "lgb.Booster"
    feature_names_: list[str]

    def _learned(self, booster: "lgb.Booster") -> Self:
        self.booster_, self._forest = booster, Forest(booster)
        return self

    def _lists(self, examples: Sequence[Pairs]) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
        """Rows to learn from, what they are worth, and the length of each list."""
        if len({example.names for example in examples}) > 1:
            raise ValueError("Ranker: the examples do not have the same columns")
        parts = []
        for example in examples:
            starts = np.flatnonzero(np.diff(example.customer, prepend=-1))
            size = np.diff(np.append(starts, len(example.customer)))
            least, most = (of.reduceat(example.label, starts) if starts.size else example.label for of in (np.minimum, np.maximum))
            teaches = least < most
            kept = np.repeat(teaches, size)
            parts.append((example.values[kept], example.label[kept], size[teaches]))
        if not any(len(groups) for _, _, groups in parts):
            raise ValueError("Ranker: no customer has candidates that are worth more than their others; there is no order to learn")
        values, worth, groups = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return values, worth, groups
