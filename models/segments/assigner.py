"""Clustered points -> a rule that tells the cluster of any further point: the nearest centroid, or trees where those are better.

Which of the two is measured on points that the rule has not seen. Never decides what the clusters are.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from models.segments.clustering import NOISE, Floats, Labels, centroids_of

if TYPE_CHECKING:
    import lightgbm as lgb

TESTED_SHARE = 0.3  # of the points, held out to measure a rule
ENOUGH = 0.98  # accuracy at which trees are not even tried
WORTH = 0.01  # accuracy that trees must add to be worth their weight
NEARLY_ALL = 0.99  # of the members of a cluster lie within its radius
CHUNK = 100_000  # points assigned at a time
TREES = {
    "objective": "multiclass", "num_leaves": 15, "min_data_in_leaf": 5, "learning_rate": 0.1, "deterministic": True,
    "force_row_wise": True, "verbosity": -1,
}  # fmt: skip
ROUNDS = 60


@dataclass(frozen=True)
class Assigner:
    """The rule. `trees` is None where the nearest centroid decides. Accuracies were measured on points held out; -1: not tried.

    radii: (k,) how far from its centroid nearly all members of a cluster lie.
    """

    centroids: Floats
    radii: Floats
    trees: "lgb.Booster | None"
    accuracy: float
    centroid_accuracy: float
    trees_accuracy: float

    @classmethod
    def learn(cls, points: Floats, labels: Labels, *, seed: int, num_threads: int = 1) -> Self:
        """The simplest rule that is good enough for points (n, d) with labels (n,), NOISE being a class of its own."""
        order = np.random.default_rng(seed).permutation(len(points))
        test, rest = np.split(order, [max(1, int(TESTED_SHARE * len(points)))])
        by_centroid = float(np.mean(_nearest(points[test], _part_centroids(points, labels, rest)) == labels[test]))
        by_trees, trees = -1.0, None
        if by_centroid < ENOUGH:
            by_trees = float(
                np.mean(_ask(_grow(points[rest], labels[rest], labels, seed, num_threads), points[test], num_threads) == labels[test])
            )
            if by_trees > by_centroid + WORTH:
                trees = _grow(points, labels, labels, seed, num_threads)
        centroids = centroids_of(points, labels)
        return cls(centroids, _radii(points, labels, centroids), trees, by_centroid if trees is None else by_trees, by_centroid, by_trees)

    def assign(self, points: Floats, *, num_threads: int = 1) -> Labels:
        """The cluster (n,) of each point; NOISE for one that belongs to none."""
        parts = [points[start : start + CHUNK] for start in range(0, len(points), CHUNK)]
        if self.trees is None:
            found = [_nearest(part, self.centroids) for part in parts]
        else:
            found = [_ask(self.trees, part, num_threads) for part in parts]
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)

    def typical(self, points: Floats, *, num_threads: int = 1) -> Labels:
        """As `assign`, and NOISE also for a point that lies farther out than nearly all members did: it may be of a group not yet known."""
        labels = self.assign(points, num_threads=num_threads)
        far = np.linalg.norm(points - self.centroids[labels], axis=1) > self.radii[labels]
        return np.where(far, NOISE, labels)

    def save(self, folder: Path) -> dict[str, Any]:
        """Write `centroids.npy` and perhaps `model.lgb`; returns the rest as JSON values."""
        np.save(folder / "centroids.npy", self.centroids, allow_pickle=False)
        if self.trees is not None:
            self.trees.save_model(folder / "model.lgb")
        rest = {name: getattr(self, name) for name in ("accuracy", "centroid_accuracy", "trees_accuracy")}
        return {**rest, "radii": self.radii.tolist(), "rule": "nearest centroid" if self.trees is None else "trees"}

    @classmethod
    def load(cls, folder: Path, saved: dict[str, Any]) -> Self:
        """The rule as it was saved. Raises ValueError if the files do not belong together."""
        centroids = np.load(folder / "centroids.npy", allow_pickle=False)
        trees = None
        if saved["rule"] == "trees":
            import lightgbm

            trees = lightgbm.Booster(model_str=(folder / "model.lgb").read_text())
            if trees.num_feature() != centroids.shape[1]:
                raise ValueError(f"{folder}: model.lgb reads {trees.num_feature()} columns, centroids.npy has {centroids.shape[1]}")
        radii = np.array(saved["radii"], dtype=np.float64)
        return cls(centroids, radii, trees, saved["accuracy"], saved["centroid_accuracy"], saved["trees_accuracy"])


# -- private -----------------------------------------------------------------------------------------------------------


def _nearest(points: Floats, centroids: Floats) -> Labels:
    distances = (centroids**2).sum(axis=1) - 2.0 * points @ centroids.T  # the point's own square is the same for all
    return np.asarray(distances.argmin(axis=1), dtype=np.int64)


def _radii(points: Floats, labels: Labels, centroids: Floats) -> Floats:
    distances = np.linalg.norm(points - centroids[labels], axis=1)
    return np.array([np.quantile(distances[labels == code], NEARLY_ALL) for code in range(len(centroids))])


def _part_centroids(points: Floats, labels: Labels, kept: Labels) -> Floats:
    """Centroids of the kept points; a cluster of which none is kept has that of all its points."""
    part = labels[kept]
    whole = centroids_of(points, labels)
    counts = np.bincount(part[part != NOISE], minlength=len(whole))
    some = np.zeros_like(whole)
    np.add.at(some, part[part != NOISE], points[kept][part != NOISE])
    return np.where(counts[:, None] > 0, some / np.maximum(counts, 1)[:, None], whole)


def _grow(points: Floats, labels: Labels, all_labels: Labels, seed: int, num_threads: int) -> "lgb.Booster":
    """Trees whose class 0 is NOISE and class i + 1 the cluster i."""
    import lightgbm

    params = {**TREES, "num_class": int(all_labels.max()) + 2, "seed": seed, "num_threads": num_threads}
    grown = lightgbm.train(params, lightgbm.Dataset(points, labels + 1, params=params), num_boost_round=ROUNDS)
    return lightgbm.Booster(model_str=grown.model_to_string())  # what is used now is what will be loaded later


def _ask(trees: "lgb.Booster", points: Floats, num_threads: int) -> Labels:
    return np.asarray(np.asarray(trees.predict(points, num_threads=num_threads)).argmax(axis=1), dtype=np.int64) - 1
