"""Points -> clusterings by one method over its range of settings, each with what speaks for it: silhouette, dispersion, size.

Deterministic given a seed. Bounded by the points it is given: the silhouette and the hierarchy need all their distances. Never
says whether the points fall into groups at all: see `structure`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]

NOISE = -1  # the label of a point that a density method leaves out
BY_NUMBER = ("kmeans", "hierarchical", "gaussian_mixture")  # their setting is the number of clusters
BY_DENSITY = ("hdbscan", "dbscan")
METHODS = (*BY_NUMBER, *BY_DENSITY)  # of equally good ones the first is taken: the simplest

REACH_QUANTILES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)  # DBSCAN's eps, as a quantile of the distances to the nearest points
SIZE_SHARES = (0.02, 0.05, 0.1, 0.2)  # HDBSCAN's smallest cluster, as a share of the points
STARTS = 2  # of K-Means; the better is kept


@dataclass(frozen=True)
class Clustering:
    """One clustering. `setting`: clusters asked for, eps as a quantile, or a share of the points, by method.

    labels: (n,), NOISE for a point left out. silhouette: mean over all points, 0 for one left out. standard_error: of that mean.
    dispersion: squared distances to the own centroid, summed; the elbow is looked for in it.
    """

    method: str
    setting: float
    labels: Labels
    n_clusters: int
    coverage: float
    smallest: int
    silhouette: float
    standard_error: float
    dispersion: float

    def row(self) -> dict[str, float | int | str]:
        """Its figures, without the labels."""
        return {name: value for name, value in vars(self).items() if name != "labels"}


def clusterings(method: str, points: Floats, *, k_max: int, seed: int) -> list[Clustering]:
    """All clusterings of a method that have two clusters or more, in order of the setting."""
    distances = distances_of(points)
    settings: Sequence[float] = range(2, min(k_max, len(points) - 1) + 1)
    if method in BY_DENSITY:
        settings = REACH_QUANTILES if method == "dbscan" else SIZE_SHARES
    made = (_judged(method, setting, labels, points, distances) for setting, labels in _label(method, points, settings, distances, seed))
    return [clustering for clustering in made if clustering.n_clusters > 1]


def cluster(method: str, points: Floats, setting: float, *, seed: int) -> Labels:
    """The labels (n,) of one setting, numbered from 0; NOISE for a point left out."""
    distances = distances_of(points) if method in BY_DENSITY else None
    return _label(method, points, [setting], distances, seed)[0][1]


@contextmanager
def on_one_thread() -> Iterator[None]:
    """Everything here gives the same bits again only inside this: sums over several threads are rounded in the order they end in."""
    import sklearn.cluster  # noqa: F401  what is loaded later would not be held to one thread
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        yield


def in_order(found: Sequence[Clustering], *, smallest: int) -> list[Clustering]:
    """The clusterings to take, the best first: none with a cluster below `smallest` points.

    The best silhouette decides. Among those within one standard error of it (Breiman et al. 1984, ch. 3) the simplest method is
    taken, then the elbow of its curve, then the fewest clusters; the others follow by silhouette.
    """
    able = [clustering for clustering in found if clustering.smallest >= smallest]
    if not able:
        return []
    best = max(able, key=lambda clustering: clustering.silhouette)
    as_good = [clustering for clustering in able if clustering.silhouette >= best.silhouette - best.standard_error]
    elbows = {method: elbow([c for c in found if c.method == method]) for method in {c.method for c in as_good}}
    as_good.sort(key=lambda c: (METHODS.index(c.method), c.setting != elbows[c.method], c.n_clusters, c.setting))
    others = [clustering for clustering in able if clustering not in as_good]
    return [*as_good, *sorted(others, key=lambda c: (-c.silhouette, METHODS.index(c.method), c.n_clusters))]


def elbow(curve: Sequence[Clustering]) -> float | None:
    """The setting at which more clusters stop paying: the dispersion's largest distance below its chord (Satopaa et al. 2011).

    None for fewer than three clusterings, or methods that are not asked for a number.
    """
    if len(curve) < 3 or curve[0].method not in BY_NUMBER:
        return None
    x, y = (np.array([getattr(c, name) for c in curve], dtype=np.float64) for name in ("setting", "dispersion"))
    span = y.max() - y.min()
    if span <= 0:
        return None
    below = 1.0 - (x - x[0]) / (x[-1] - x[0]) - (y - y.min()) / span
    return float(x[int(np.argmax(below))])


def silhouettes(distances: Floats, labels: Labels) -> Floats:
    """The silhouette of each point (n,) in [-1, 1], from all distances (n, n); 0 for a point left out or alone (Rousseeuw 1987).

    With one cluster there is nothing to be nearer to: all are 0.
    """
    n, k = len(labels), int(labels.max(initial=-1)) + 1
    known = labels != NOISE
    if k < 2:
        return np.zeros(n)
    is_in = np.zeros((n, k))
    is_in[np.flatnonzero(known), labels[known]] = 1.0
    sizes = is_in.sum(axis=0)
    sums = distances @ is_in
    rows, own = np.arange(n), np.where(known, labels, 0)
    within = sums[rows, own] / np.maximum(sizes[own] - 1, 1)
    means = sums / np.maximum(sizes, 1)
    means[rows, own] = np.inf
    means[:, sizes == 0] = np.inf
    other = means.min(axis=1)
    larger = np.maximum(within, other)
    values = np.divide(other - within, larger, out=np.zeros(n), where=larger > 0)
    return np.where(known & (sizes[own] > 1), values, 0.0)


def distances_of(points: Floats) -> Floats:
    """Euclidean distances (n, n)."""
    from scipy.spatial.distance import pdist, squareform

    return np.asarray(squareform(pdist(points)))


def dispersion_of(points: Floats, labels: Labels) -> float:
    """Squared distances of the points to the centroid of their cluster, summed; points left out do not count."""
    known = labels != NOISE
    return float(np.sum((points[known] - centroids_of(points, labels)[labels[known]]) ** 2))


def centroids_of(points: Floats, labels: Labels) -> Floats:
    """The mean (k, d) of each cluster's points."""
    known, k = labels != NOISE, int(labels.max()) + 1
    sizes = np.bincount(labels[known], minlength=k)
    sums = [np.bincount(labels[known], weights=points[known, j], minlength=k) for j in range(points.shape[1])]
    return np.column_stack(sums) / np.maximum(sizes, 1)[:, None]


# -- private -----------------------------------------------------------------------------------------------------------


def _judged(method: str, setting: float, labels: Labels, points: Floats, distances: Floats) -> Clustering:
    known = labels[labels != NOISE]
    sizes = np.bincount(known) if known.size else np.zeros(1, dtype=np.int64)
    values = silhouettes(distances, labels)
    return Clustering(
        method=method,
        setting=float(setting),
        labels=labels,
        n_clusters=int(np.count_nonzero(sizes)),
        coverage=float(known.size / len(labels)),
        smallest=int(sizes.min()),
        silhouette=float(values.mean()),
        standard_error=float(values.std() / np.sqrt(len(values))),
        dispersion=dispersion_of(points, labels) if known.size else 0.0,
    )


def _label(method: str, points: Floats, settings: Sequence[float], distances: Floats | None, seed: int) -> list[tuple[float, Labels]]:
    make = {"kmeans": _kmeans, "gaussian_mixture": _mixture, "hierarchical": _ward, "dbscan": _dbscan, "hdbscan": _hdbscan}[method]
    return [(setting, _numbered(labels)) for setting, labels in zip(settings, make(points, settings, distances, seed), strict=True)]


def _numbered(labels: Labels) -> Labels:
    """The same clusters numbered from 0 without gaps."""
    known = labels != NOISE
    numbered = np.full(len(labels), NOISE, dtype=np.int64)
    numbered[known] = np.unique(labels[known], return_inverse=True)[1].ravel()
    return numbered


def _kmeans(points: Floats, settings: Sequence[float], _distances: Floats | None, seed: int) -> list[Labels]:
    from sklearn.cluster import KMeans

    return [KMeans(int(k), n_init=STARTS, random_state=seed).fit_predict(points) for k in settings]


def _mixture(points: Floats, settings: Sequence[float], _distances: Floats | None, seed: int) -> list[Labels]:
    from sklearn.mixture import GaussianMixture

    # a column with a heap at one value would have a component of no width: its density, and so the fit, has no bound
    made = (GaussianMixture(int(k), reg_covar=1e-2, tol=5e-3, max_iter=300, random_state=seed) for k in settings)
    return [model.fit_predict(points) for model in made]


def _ward(points: Floats, settings: Sequence[float], _distances: Floats | None, _seed: int) -> list[Labels]:
    from scipy.cluster.hierarchy import fcluster, linkage

    tree = linkage(points, "ward")
    return [fcluster(tree, int(k), "maxclust").astype(np.int64) for k in settings]


def _dbscan(points: Floats, settings: Sequence[float], distances: Floats | None, _seed: int) -> list[Labels]:
    from sklearn.cluster import DBSCAN

    near = min(2 * points.shape[1], len(points) - 1)  # twice the dimensions: Sander et al. 1998
    assert distances is not None
    reach = np.partition(distances, near, axis=1)[:, near]
    radii = [float(np.quantile(reach, share)) for share in settings]
    return [DBSCAN(eps=max(radius, 1e-9), min_samples=near, metric="precomputed").fit_predict(distances) for radius in radii]


def _hdbscan(points: Floats, settings: Sequence[float], _distances: Floats | None, _seed: int) -> list[Labels]:
    from sklearn.cluster import HDBSCAN

    sizes = [max(5, int(share * len(points))) for share in settings]
    return [HDBSCAN(min_cluster_size=size, copy=True).fit_predict(points) for size in sizes]
