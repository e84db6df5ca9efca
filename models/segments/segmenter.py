"""Features of customers -> segments that are really there, that stay who they are, and that can be told in a sentence.

Several methods are tried; the number of segments comes from the silhouette and the elbow, never from a person. Where the customers do
not fall into groups there is no answer but a refusal, with its evidence. Large data are clustered on a sample, and everybody is
assigned. Never draws a curve or reads a file but its own.
"""

from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from models.learner import Learner, read_json, write_json
from models.segments import profiling, structure
from models.segments.assigner import Assigner
from models.segments.clustering import (
    METHODS,
    Clustering,
    Floats,
    Labels,
    clusterings,
    distances_of,
    elbow,
    in_order,
    on_one_thread,
    silhouettes,
)
from models.segments.naming import Names, by_size, inherited, match
from models.segments.scaling import Scaling

MIN_CUSTOMERS = 50  # fewer are no basis for groups of them
MIN_MEMBERS = 10  # a smaller group tells too much about each of its members
TRIES = 4  # clusterings whose stability is measured before the first is judged as it is
MATCHED_ROWS = 20_000  # customers that two fits are matched by


class WeakStructure(ValueError):
    """The customers do not fall into groups. `evidence`: the curves and comparisons that say so, as JSON values."""

    def __init__(self, why: str, evidence: dict[str, Any]) -> None:
        super().__init__(why)
        self.evidence = evidence


class Segmenter(Learner):
    """Segments of customers.

    method: one of kmeans, hierarchical, gaussian_mixture, hdbscan, dbscan; auto: the best of them. k_max: the most clusters looked for.
    min_share: a smaller cluster is no segment. sample_rows: customers that are clustered. reference_draws: clouds without groups of each
    kind that the structure must beat, 19 at least for a verdict at 5 %; 0: it is not judged. bootstrap_draws: of the stability.

    Learned: `scaling_`; `assigner_`; `names_`; `method_`, `setting_`; `curves_`, a row for each clustering tried; `evidence_`: what the
    verdict rests on; `stability_` (k,), Jaccard of each segment over bootstrap draws. Order of rows and of columns makes no difference.
    """

    def __init__(
        self,
        *,
        method: str = "auto",
        k_max: int = 10,
        min_share: float = 0.02,
        sample_rows: int = 2_000,
        reference_draws: int = 19,
        bootstrap_draws: int = 25,
        random_state: int = 0,
        num_threads: int = 1,
    ) -> None:
        self.method = method
        self.k_max = k_max
        self.min_share = min_share
        self.sample_rows = sample_rows
        self.reference_draws = reference_draws
        self.bootstrap_draws = bootstrap_draws
        self.random_state = random_state
        self.num_threads = num_threads

    @staticmethod
    def suggest(trial: Any) -> dict[str, Any]:
        """One method of an Optuna trial. Everything else is decided inside `fit`, from the data."""
        return {"method": trial.suggest_categorical("method", ("auto", *METHODS))}

    def fit(self, features: pd.DataFrame, validation: Any = None, *, before: "Segmenter | None" = None, first_number: int = 1) -> Self:
        """Learn from (n, d) numbers, one row a customer; nulls are filled by the median, empty and constant columns left out.

        before: an earlier fit, whose names segments of mostly the same customers keep. first_number: the least that a new name may have,
        so that those of fits in between are not given again. `validation` is there so that all learners are called alike. Raises
        WeakStructure where there are no groups, ValueError on fewer than 50 customers or values that are not numbers.
        """
        self._check_params()
        if len(features) < MIN_CUSTOMERS:
            raise ValueError(f"Segmenter: expected {MIN_CUSTOMERS} customers or more, found {len(features)}")
        scaling = Scaling.learn(features)
        points = _sample(scaling.apply(features), self.sample_rows, self.random_state)
        with on_one_thread():
            chosen, curves, evidence, stability = self._search(points)
            labels = by_size(chosen.labels, points)
            assigner = Assigner.learn(points, labels, seed=self.random_state, num_threads=self.num_threads)
        number_of = {int(old): int(new) for old, new in zip(chosen.labels, labels, strict=True)}
        in_order_of_names = np.array([stability[old] for old, new in sorted(number_of.items(), key=lambda pair: pair[1]) if new >= 0])
        names = Names.fresh(chosen.n_clusters, start=first_number)
        self._learned(scaling, assigner, names, chosen.method, chosen.setting, curves, evidence, in_order_of_names)
        if before is not None:
            self._named = self._inherited(before, features, first_number)
            self.names_ = self._named.names
        return self

    @property
    def next_number(self) -> int:
        """The number that the next new segment will be called by."""
        self._check_fitted("assigner_")
        return self._named.next_number

    def predict(self, features: pd.DataFrame) -> NDArray[np.object_]:
        """The segment's name (n,) of each customer, new ones too; None for one that belongs to none."""
        self._check_fitted("assigner_")
        return np.array([*self.names_, None], dtype=object)[self.predict_codes(features)]

    def predict_codes(self, features: pd.DataFrame) -> Labels:
        """The same as places (n,) in `names_`, -1 for none. Raises ValueError where a column of fit is missing."""
        self._check_fitted("assigner_")
        return self.assigner_.assign(self.scaling_.apply(features), num_threads=self.num_threads)

    def profile(self, features: pd.DataFrame) -> pd.DataFrame:
        """One row for each segment: its size among these customers, stability, what sets it apart; see `profiling.profile`."""
        columns = [column.name for column in self._scaling().columns]
        found = profiling.profile(features, self.predict_codes(features), self.names_, columns)
        found.insert(3, "stability", self.stability_)
        return found

    def silhouettes(self, features: pd.DataFrame, codes: Labels | None = None) -> Floats:
        """The silhouette (n,) of each customer on this learner's scale, of its own segments or of others given as codes.

        Needs all distances: for some thousands of customers at most.
        """
        labels = self.predict_codes(features) if codes is None else np.asarray(codes, dtype=np.int64)
        return silhouettes(distances_of(self._scaling().apply(features)), labels)

    def loss(self, features: pd.DataFrame) -> float:
        """Minus the mean silhouette of customers that were perhaps not seen, as many as `sample_rows` of them."""
        scaling = self._scaling()
        points = _sample(scaling.apply(features), self.sample_rows, self.random_state)
        return -float(silhouettes(distances_of(points), self.assigner_.assign(points, num_threads=self.num_threads)).mean())

    def save(self, folder: Path) -> None:
        """Write `segmenter.json`, `centroids.npy` and perhaps `model.lgb` into the folder, made if absent."""
        self._check_fitted("assigner_")
        folder.mkdir(parents=True, exist_ok=True)
        description = {
            "kind": "segmenter",
            "params": self.get_params(),
            "scaling": self.scaling_.to_json(),
            "assigner": self.assigner_.save(folder),
            "names": list(self.names_),
            "next_number": self.next_number,
            "method": self.method_,
            "setting": self.setting_,
            "curves": self.curves_,
            "evidence": self.evidence_,
            "stability": self.stability_.tolist(),
        }
        write_json(folder / "segmenter.json", description)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The learner as it was saved. Raises ValueError if the files do not belong together."""
        saved = read_json(folder / "segmenter.json", "segmenter")
        assigner, scaling = Assigner.load(folder, saved["assigner"]), Scaling.from_json(saved["scaling"])
        if assigner.centroids.shape != (len(saved["names"]), len(scaling.columns)):
            raise ValueError(f"{folder}: centroids.npy and segmenter.json do not belong together; save the model again")
        names = Names(tuple(saved["names"]), saved["next_number"])
        stability = np.array(saved["stability"], dtype=np.float64)
        return cls(**saved["params"])._learned(
            scaling, assigner, names, saved["method"], saved["setting"], saved["curves"], saved["evidence"], stability
        )

    # -- private -------------------------------------------------------------------------------------------------------

    def _search(self, points: Floats) -> tuple[Clustering, list[dict[str, Any]], dict[str, Any], Floats]:
        """The clustering to take, the curves, the evidence, and the stability of its clusters. Raises WeakStructure."""
        methods = METHODS if self.method == "auto" else (self.method,)
        found = [c for method in methods for c in clusterings(method, points, k_max=self.k_max, seed=self.random_state)]
        smallest = max(MIN_MEMBERS, int(np.ceil(self.min_share * len(points))))
        curves = [c.row() for c in found]
        elbows = {method: elbow([c for c in found if c.method == method]) for method in methods}
        evidence: dict[str, Any] = {"smallest": smallest, "elbows": elbows}
        able = in_order(found, smallest=smallest)
        if not able:
            raise WeakStructure(f"no clustering has two clusters of {smallest} customers or more", {**evidence, "curves": curves})
        chosen, stable = self._stable(able, points)
        if not self.reference_draws:
            return chosen, curves, {**evidence, "chosen": chosen.row()}, stable.jaccard
        share = smallest / len(points)
        against = structure.reference(
            points, chosen.method, k_max=self.k_max, smallest_share=share, draws=self.reference_draws, seed=self.random_state
        )
        evidence |= {"chosen": chosen.row(), **structure.told(against, stable)}
        why = structure.weaknesses(chosen, against, stable)
        if why:
            raise WeakStructure("; ".join(why), {**evidence, "curves": curves})
        return chosen, curves, evidence, stable.jaccard

    def _stable(self, able: list[Clustering], points: Floats) -> tuple[Clustering, structure.Stability]:
        """The first of the best clusterings all of whose clusters are found again; where none is, the very first."""
        if not self.bootstrap_draws:
            return able[0], structure.Stability(np.ones(able[0].n_clusters), 1.0)
        measured = []
        for clustering in able[:TRIES]:
            found = structure.stability(points, clustering, draws=self.bootstrap_draws, seed=self.random_state)
            if found.jaccard.min() >= structure.UNSTABLE:
                return clustering, found
            measured.append((clustering, found))
        return measured[0]

    def _inherited(self, before: "Segmenter", features: pd.DataFrame, first_number: int) -> Names:
        old = Names(before.names_, max(before.next_number, first_number))
        if not set(before.scaling_.names) <= set(features.columns):  # of other features, so nobody can be told to be the same
            return Names.fresh(len(self.names_), start=old.next_number)
        rows = np.linspace(0, len(features) - 1, min(len(features), MATCHED_ROWS)).astype(int)
        some = features.iloc[rows]
        known = before.assigner_.typical(before.scaling_.apply(some), num_threads=before.num_threads)
        matched = match(known, self.predict_codes(some), len(before.names_), len(self.names_))
        return inherited(old, matched)

    def _learned(
        self, scaling: Scaling, assigner: Assigner, names: Names, method: str, setting: float, curves: list[dict[str, Any]],
        evidence: dict[str, Any], stability: Floats,
    ) -> Self:  # fmt: skip
        self.scaling_, self.assigner_, self._named, self.names_ = scaling, assigner, names, names.names
        self.method_, self.setting_, self.curves_, self.evidence_, self.stability_ = method, setting, curves, evidence, stability
        return self

    def _scaling(self) -> Scaling:
        self._check_fitted("assigner_")
        return self.scaling_

    def _check_params(self) -> None:
        wrong = [] if self.method in ("auto", *METHODS) else [f"method = {self.method!r} (auto, {', '.join(METHODS)})"]
        wrong += [] if self.k_max >= 2 else [f"k_max = {self.k_max} (2 or more)"]
        wrong += [] if 0 < self.min_share < 0.5 else [f"min_share = {self.min_share} (above 0, below 0.5)"]
        wrong += [] if self.sample_rows >= MIN_CUSTOMERS else [f"sample_rows = {self.sample_rows} ({MIN_CUSTOMERS} or more)"]
        wrong += [] if self.bootstrap_draws >= 0 else [f"bootstrap_draws = {self.bootstrap_draws} (0 or more)"]
        fewest = round(1 / structure.SIGNIFICANCE) - 1  # of fewer clouds none could be significant
        if self.reference_draws and self.reference_draws < fewest:
            wrong += [f"reference_draws = {self.reference_draws} (0, or {fewest} or more)"]
        if wrong:
            raise ValueError(f"Segmenter: parameters outside their range: {', '.join(wrong)}")


def _sample(points: Floats, n: int, seed: int) -> Floats:
    """As many points, drawn from an order that is that of the points themselves: rows in another order give the same."""
    ordered = points[np.lexsort(points.T[::-1])]
    if len(ordered) <= n:
        return ordered
    return ordered[np.sort(np.random.default_rng(seed).permutation(len(ordered))[:n])]
