"""Whether points fall into groups at all, and whether the groups are the same when the points are drawn again.

In: points and a clustering. Out: evidence with a verdict. Two clouds without groups are the rivals: a uniform box along the principal
axes (Tibshirani et al. 2001) and one normal cloud of the same covariance (Liu et al. 2008). Both go through the same search for
the best number of clusters, so that having searched is no advantage. Never chooses a clustering.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from models.segments.clustering import BY_NUMBER, NOISE, Clustering, Floats, Labels, cluster, clusterings, dispersion_of

WEAK_SILHOUETTE = 0.25  # at or below: no substantial structure (Kaufman & Rousseeuw 1990, p. 88)
DISSOLVED = 0.5  # Jaccard at or below: the cluster was dissolved (Hennig 2007)
UNSTABLE = 0.6  # mean Jaccard below: not to be trusted; 0.75 and above: stable (Hennig 2007, and `clusterboot` of R's fpc)
SIGNIFICANCE = 0.05  # chance that a cloud without groups looks as clear
MARGIN = 0.05  # silhouette above that of the mean cloud: with many points the least unevenness is significant
REFERENCE_POINTS = 500  # what a search over a cloud works on: silhouettes of more points are the same, only slower
NULLS = ("uniform", "normal")


@dataclass(frozen=True)
class Reference:
    """The best silhouette found in the points against those in clouds without groups.

    p_values: by null, chance of so clear a structure in such a cloud. gap: rows of k, gap and standard error against the uniform
    box (Tibshirani et al. 2001), by methods that are asked for a number.
    """

    silhouette: float
    nulls: dict[str, list[float]]
    p_values: dict[str, float]
    gap: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Stability:
    """Over bootstrap draws: the mean Jaccard of each cluster with the most similar one found again, and the adjusted Rand index."""

    jaccard: Floats
    adjusted_rand: float


def reference(points: Floats, method: str, *, k_max: int, smallest_share: float, draws: int, seed: int) -> Reference:
    """The points against `draws` clouds of each null, all of one size."""
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(len(points))[:REFERENCE_POINTS])
    ours, fits = _best(points[chosen], method, k_max, smallest_share, seed)
    makers = {"uniform": _uniform, "normal": _normal}
    nulls: dict[str, list[float]] = {}
    clouds: list[list[float]] = []
    for name in NULLS:
        found = nulls[name] = []
        # once it cannot be significant any more, no further cloud is drawn (Besag & Clifford 1991)
        while len(found) < draws and 1 + sum(value >= ours for value in found) <= SIGNIFICANCE * (1 + draws):
            best, curve = _best(makers[name](points[chosen], rng), method, k_max, smallest_share, seed)
            found.append(best)
            if name == "uniform":
                clouds.append(curve)
    p_values = {name: (1 + sum(value >= ours for value in found)) / (1 + len(found)) for name, found in nulls.items()}
    return Reference(ours, nulls, p_values, _gap(fits, clouds) if method in BY_NUMBER else [])


def stability(points: Floats, clustering: Clustering, *, draws: int, seed: int) -> Stability:
    """How well the clusters are found again in bootstrap draws; of a point drawn several times one is kept (Hennig 2007)."""
    from sklearn.metrics import adjusted_rand_score

    rng = np.random.default_rng(seed)
    m = min(len(points), 2 * REFERENCE_POINTS)
    jaccard, rand = np.zeros((draws, clustering.n_clusters)), np.zeros(draws)
    for draw in range(draws):
        kept = np.unique(rng.permutation(len(points))[:m][rng.integers(0, m, m)])
        again = cluster(clustering.method, points[kept], clustering.setting, seed=seed)
        overlap = overlaps(clustering.labels[kept], again, clustering.n_clusters)
        jaccard[draw] = overlap.max(axis=1, initial=0.0)
        rand[draw] = adjusted_rand_score(clustering.labels[kept], again)
    return Stability(jaccard.mean(axis=0), float(rand.mean()))


def overlaps(left: Labels, right: Labels, n_left: int | None = None, n_right: int | None = None) -> Floats:
    """Jaccard similarity (k_left, k_right) of each cluster of one clustering with each of another of the same points."""
    k_left = int(left.max(initial=-1)) + 1 if n_left is None else n_left
    k_right = int(right.max(initial=-1)) + 1 if n_right is None else n_right
    both = (left != NOISE) & (right != NOISE)
    shared = np.bincount(left[both] * k_right + right[both], minlength=k_left * k_right).reshape(k_left, k_right).astype(np.float64)
    sizes = [np.bincount(labels[labels != NOISE], minlength=k) for labels, k in ((left, k_left), (right, k_right))]
    union = sizes[0][:, None] + sizes[1][None, :] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def weaknesses(clustering: Clustering, against: Reference, found_again: Stability) -> list[str]:
    """What speaks against calling these clusters segments, in words; nothing: they may be called so."""
    found = []
    if clustering.silhouette <= WEAK_SILHOUETTE:
        found.append(f"the silhouette is {clustering.silhouette:.2f}, and {WEAK_SILHOUETTE} or less is no substantial structure")
    for name, clouds in against.nulls.items():
        mean = float(np.mean(clouds)) if clouds else 0.0
        if against.p_values[name] > SIGNIFICANCE or against.silhouette < mean + MARGIN:
            compared = f"silhouette {mean:.2f}, that of the customers {against.silhouette:.2f}"
            found.append(f"a {name} cloud without groups looks nearly as clear ({compared})")
    if found_again.jaccard.size and found_again.jaccard.min() < UNSTABLE:
        found.append(f"a cluster is not found again in other draws (Jaccard {found_again.jaccard.min():.2f}, needed {UNSTABLE})")
    return found


# -- private -----------------------------------------------------------------------------------------------------------


def _best(points: Floats, method: str, k_max: int, smallest_share: float, seed: int) -> tuple[float, list[float]]:
    """The best silhouette among able clusterings, and the log dispersions from one cluster on."""
    found = clusterings(method, points, k_max=k_max, seed=seed)
    able = [c.silhouette for c in found if c.smallest >= smallest_share * len(points)]
    whole = dispersion_of(points, np.zeros(len(points), dtype=np.int64))
    logs = [float(np.log(max(value, 1e-12))) for value in (whole, *(c.dispersion for c in found))]
    return max(able, default=0.0), logs


def _uniform(points: Floats, rng: np.random.Generator) -> Floats:
    """As many points, uniform in the box along the principal axes."""
    center = points.mean(axis=0)
    axes = np.linalg.svd(points - center, full_matrices=False)[2]
    turned = (points - center) @ axes.T
    return np.asarray(rng.uniform(turned.min(axis=0), turned.max(axis=0), turned.shape) @ axes + center)


def _normal(points: Floats, rng: np.random.Generator) -> Floats:
    """As many points of one normal cloud with the same mean and covariance."""
    covariance = np.cov(points, rowvar=False).reshape(points.shape[1], points.shape[1])
    return rng.multivariate_normal(points.mean(axis=0), covariance, len(points), method="eigh")


def _gap(ours: list[float], clouds: list[list[float]]) -> list[dict[str, float]]:
    whole = [curve for curve in clouds if len(curve) == len(ours)]
    if not whole:
        return []
    logs = np.array(whole)
    error = logs.std(axis=0) * np.sqrt(1 + 1 / len(logs))
    return [{"k": k + 1, "gap": float(logs[:, k].mean() - ours[k]), "standard_error": float(error[k])} for k in range(len(ours))]


def told(against: Reference, found_again: Stability) -> dict[str, Any]:
    """The evidence as JSON values."""
    return {
        "reference_silhouette": against.silhouette,
        "reference_nulls": against.nulls,
        "p_values": against.p_values,
        "gap": against.gap,
        "jaccard": found_again.jaccard.tolist(),
        "adjusted_rand": found_again.adjusted_rand,
    }
