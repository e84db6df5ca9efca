import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score, silhouette_samples

from models.segments import clustering, structure
from models.segments.clustering import METHODS, NOISE, cluster, clusterings, distances_of, elbow, in_order, on_one_thread, silhouettes


def blobs(n=300, seed=0, spread=0.4):
    rng = np.random.default_rng(seed)
    truth = rng.choice(3, n, p=[0.5, 0.3, 0.2])
    return np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])[truth] + rng.normal(size=(n, 2)) * spread, truth


@pytest.fixture(autouse=True)
def one_thread():
    with on_one_thread():
        yield


def test_silhouettes_are_those_of_scikit_learn():
    points, truth = blobs(spread=1.5)
    assert silhouettes(distances_of(points), truth) == pytest.approx(silhouette_samples(points, truth))


def test_a_point_left_out_alone_or_in_the_only_cluster_has_no_silhouette():
    points = np.array([[0.0], [0.1], [5.0], [5.1], [9.0]])
    distances = distances_of(points)
    assert silhouettes(distances, np.array([0, 0, 1, 1, NOISE]))[4] == 0
    assert silhouettes(distances, np.array([0, 0, 1, 1, 2]))[4] == 0
    assert not silhouettes(distances, np.zeros(5, dtype=np.int64)).any()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_planted_groups_and_their_number(method):
    points, truth = blobs()
    best = in_order(clusterings(method, points, k_max=8, seed=0), smallest=10)[0]
    assert best.n_clusters == 3
    assert adjusted_rand_score(truth[best.labels != NOISE], best.labels[best.labels != NOISE]) > 0.95
    assert best.coverage > 0.9
    assert structure.stability(points, best, draws=5, seed=0).jaccard.min() > structure.UNSTABLE


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_labels(method):
    points, _ = blobs()
    setting = 3 if method in clustering.BY_NUMBER else 0.1 if method == "hdbscan" else 0.9
    assert np.array_equal(cluster(method, points, setting, seed=1), cluster(method, points, setting, seed=1))


def test_the_elbow_of_three_groups_is_at_three():
    points, _ = blobs()
    curve = clusterings("kmeans", points, k_max=9, seed=0)
    assert elbow(curve) == 3
    assert elbow(curve[:2]) is None
    assert elbow(clusterings("hdbscan", points, k_max=9, seed=0)) is None


def test_among_equally_good_ones_the_simplest_method_then_the_elbow_then_the_fewest():
    def made(method, k, silhouette, dispersion, smallest=20):
        return clustering.Clustering(method, k, np.zeros(1), k, 1.0, smallest, silhouette, 0.02, dispersion)

    curve = [made("kmeans", 2, 0.50, 100), made("kmeans", 3, 0.51, 20), made("kmeans", 4, 0.40, 18), made("kmeans", 5, 0.30, 17)]
    rival = made("hierarchical", 2, 0.515, 10)
    tiny = made("kmeans", 6, 0.90, 5, smallest=3)
    order = in_order([rival, *curve, tiny], smallest=10)
    assert [(c.method, c.n_clusters) for c in order] == [
        ("kmeans", 3), ("kmeans", 2), ("hierarchical", 2), ("kmeans", 4), ("kmeans", 5),
    ]  # fmt: skip
    assert in_order([tiny], smallest=10) == []


def test_overlaps_are_jaccard_similarities():
    found = structure.overlaps(np.array([0, 0, 0, 1, NOISE]), np.array([0, 0, 1, 1, 1]))
    assert found == pytest.approx(np.array([[2 / 3, 1 / 5], [0, 1 / 3]]))


@pytest.mark.parametrize("null", [structure._uniform, structure._normal])
def test_a_cloud_without_groups_keeps_place_and_spread_of_the_points(null):
    points = np.random.default_rng(0).multivariate_normal([3.0, -2.0], [[2.0, 1.5], [1.5, 2.0]], 2_000)
    cloud = null(points, np.random.default_rng(1))
    assert cloud.shape == points.shape
    assert cloud.mean(axis=0) == pytest.approx([3, -2], abs=1.0)
    assert np.corrcoef(cloud.T)[0, 1] == pytest.approx(0.75, abs=0.15)


def test_the_gap_statistic_of_three_groups_is_largest_at_three():
    points, _ = blobs()
    gap = structure.reference(points, "kmeans", k_max=6, smallest_share=0.02, draws=19, seed=0).gap
    assert [row["k"] for row in gap] == [1, 2, 3, 4, 5, 6]
    assert max(gap, key=lambda row: row["gap"])["k"] == 3


def test_once_nothing_can_be_significant_no_further_cloud_is_drawn():
    points = np.random.default_rng(0).normal(size=(200, 3))
    found = structure.reference(points, "kmeans", k_max=4, smallest_share=0.02, draws=19, seed=0)
    assert min(len(values) for values in found.nulls.values()) < 19
    assert max(found.p_values.values()) > structure.SIGNIFICANCE
