import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import adjusted_rand_score

from models.segments import Segmenter, WeakStructure
from models.segments.assigner import Assigner
from models.segments.scaling import Scaling

CENTERS = np.array([[0.0, 0.0, 0.0], [5.0, 0.0, 1.0], [0.0, 5.0, 2.0], [6.0, 6.0, 6.0]])
QUICK = {"sample_rows": 500, "bootstrap_draws": 8, "k_max": 6}


def customers(n=600, seed=0, groups=(0, 1, 2), shares=(0.5, 0.3, 0.2), shift=0.0):
    rng = np.random.default_rng(seed)
    truth = rng.choice(groups, n, p=shares)
    return pd.DataFrame(CENTERS[truth] + rng.normal(size=(n, 3)) * 0.7 + shift, columns=["a", "b", "c"]), truth


@pytest.fixture(scope="module")
def fitted():
    return Segmenter(**QUICK).fit(customers()[0])


def test_three_planted_groups_are_found_and_everybody_is_assigned(fitted):
    features, truth = customers(20_000, seed=1)
    assert fitted.names_ == ("S1", "S2", "S3")
    assert adjusted_rand_score(truth, fitted.predict_codes(features)) > 0.97
    assert fitted.stability_.min() > 0.9
    assert fitted.assigner_.accuracy > 0.97


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("d", [1, 2, 4])
def test_a_uniform_cloud_is_refused_with_the_evidence(d, seed):
    cloud = pd.DataFrame(np.random.default_rng(seed).uniform(size=(600, d))).add_prefix("x")
    with pytest.raises(WeakStructure, match="uniform cloud") as refusal:
        Segmenter(method="kmeans", **QUICK).fit(cloud)
    assert refusal.value.evidence["curves"]
    json.dumps(refusal.value.evidence, allow_nan=False)
    assert Segmenter(method="kmeans", **{**QUICK, "reference_draws": 0}).fit(cloud)  # control: nothing else stops it


def test_one_normal_cloud_with_correlated_columns_is_refused():
    rng = np.random.default_rng(0)
    cloud = pd.DataFrame(rng.multivariate_normal([0, 0, 0], [[1, 0.9, 0.8], [0.9, 1, 0.7], [0.8, 0.7, 1]], 600), columns=list("abc"))
    with pytest.raises(WeakStructure, match="cloud without groups looks nearly as clear"):
        Segmenter(**QUICK).fit(cloud)


def test_order_of_rows_and_columns_and_units_make_no_difference(fitted):
    features, _ = customers()
    drawn = features.sample(frac=1.0, random_state=3)[["c", "a", "b"]] * [100.0, 1.0, 0.001]
    again = Segmenter(**QUICK).fit(drawn)
    assert again.predict(drawn.loc[features.index]).tolist() == fitted.predict(features).tolist()


def test_a_refit_on_later_customers_keeps_names_and_meaning(fitted):
    later, _ = customers(700, seed=5, shares=(0.2, 0.3, 0.5))  # sizes turn around, so their order does
    refitted = Segmenter(**QUICK).fit(later, before=fitted)
    assert np.mean(refitted.predict(later) == fitted.predict(later)) > 0.97
    fresh = Segmenter(**QUICK).fit(later)
    assert np.mean(fresh.predict(later) == fitted.predict(later)) < 0.6  # control: on its own it would name them by size


def test_a_new_group_gets_a_new_name_and_a_lost_one_is_not_named_again(fitted):
    grown, truth = customers(900, seed=6, groups=(0, 1, 2, 3), shares=(0.3, 0.3, 0.2, 0.2))
    refitted = Segmenter(**QUICK).fit(grown, before=fitted)
    assert sorted(refitted.names_) == ["S1", "S2", "S3", "S4"]
    assert set(refitted.predict(grown[truth == 3])) == {"S4"}
    back = Segmenter(**QUICK).fit(customers()[0], before=refitted)
    again = Segmenter(**QUICK).fit(grown.assign(a=grown["a"] + 40.0), before=back)
    assert back.next_number == 5
    assert "S4" not in set(again.names_) - set(back.names_)


def test_a_name_reserved_elsewhere_is_passed_over(fitted):
    grown, _ = customers(900, seed=6, groups=(0, 1, 2, 3), shares=(0.3, 0.3, 0.2, 0.2))
    assert "S9" in Segmenter(**QUICK).fit(grown, before=fitted, first_number=9).names_


def test_a_fit_of_other_columns_inherits_nothing(fitted):
    other = customers()[0].rename(columns={"a": "other"})
    assert Segmenter(**QUICK).fit(other, before=fitted).names_ == ("S4", "S5", "S6")


def test_profile_tells_what_sets_segments_apart(fitted):
    features, _ = customers()
    found = fitted.profile(features).set_index("segment")
    assert found["customers"].tolist() == np.bincount(fitted.predict_codes(features)).tolist()
    assert found["share"].sum() == pytest.approx(1)
    assert found.loc["S2", "description"].startswith("high a, median 5")
    assert found.loc["S2", "description"].endswith("32 % of customers")
    assert found.loc["S2", "delta_a"] > 0.9 > abs(found.loc["S1", "delta_c"])


def test_long_groups_are_assigned_by_trees_where_centroids_fail():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 2_000)
    points = np.column_stack([rng.normal(size=2_000) * 6, label * 3.0 + rng.normal(size=2_000) * 0.3])
    points[:, 0] += np.where(label == 1, -6, 6) * (rng.random(2_000) < 0.2)
    rule = Assigner.learn(points, label, seed=0)
    assert rule.trees is not None
    assert rule.accuracy > 0.97 > rule.centroid_accuracy
    round_ones = Assigner.learn(np.column_stack([label * 9.0, points[:, 1]]), label, seed=0)
    assert round_ones.trees is None  # the simplest that works


def test_assignment_in_parts_is_that_at_once(fitted, monkeypatch):
    features, _ = customers(1_000, seed=2)
    once = fitted.predict_codes(features)
    monkeypatch.setattr("models.segments.assigner.CHUNK", 77)
    assert np.array_equal(fitted.predict_codes(features), once)


def test_customers_that_no_cluster_takes_in_have_no_segment(tmp_path: Path):
    features, _ = customers(600)
    scattered = pd.DataFrame(np.random.default_rng(8).uniform(-30, 30, size=(60, 3)), columns=["a", "b", "c"])
    learner = Segmenter(method="dbscan", **QUICK).fit(pd.concat([features, scattered]))
    learner.save(tmp_path)
    assert (learner.predict(features) != None).mean() > 0.9  # noqa: E711
    if learner.assigner_.trees is not None:
        assert None in set(learner.predict(scattered))
        assert Segmenter.load(tmp_path).predict(scattered).tolist() == learner.predict(scattered).tolist()


@pytest.mark.parametrize(
    ("features", "sentence"),
    [
        (customers(5)[0], "expected 50 customers or more, found 5"),
        (pd.DataFrame(np.zeros((60, 2)), columns=["x", "x"]), "each column once"),
        (pd.DataFrame(np.zeros((60, 2))), "columns with names"),
        (pd.DataFrame({"x": np.ones(60), "y": None}), "no column tells customers apart"),
        (pd.DataFrame({"x": ["a"] * 60}), "x must hold numbers"),
        (pd.DataFrame({"x": pd.Timestamp("2026-01-01")}, index=range(60)), "turn times into ages"),
        (pd.DataFrame({"x": [np.inf] * 60}), "infinite"),
    ],
)
def test_data_that_cannot_teach_are_refused_with_a_sentence(features, sentence):
    with pytest.raises(ValueError, match=sentence):
        Segmenter(**QUICK).fit(features)


@pytest.mark.parametrize(
    "wrong", [{"method": "tarot"}, {"k_max": 1}, {"min_share": 0.0}, {"sample_rows": 5}, {"bootstrap_draws": -1}, {"reference_draws": 5}]
)
def test_parameters_outside_their_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)).split("_")[-1]):
        Segmenter(**wrong).fit(customers()[0])


def test_constant_and_empty_columns_nulls_and_one_giant_do_no_harm(fitted):
    features, truth = customers()
    spoilt = features.assign(constant=1, empty=None, flag=True)
    spoilt.loc[::9, "a"] = np.nan
    spoilt.loc[0, ["a", "b", "c"]] = [50_000, 50_000, 50_000]
    learner = Segmenter(**QUICK).fit(spoilt)
    assert learner.scaling_.dropped == ("constant", "empty", "flag")
    known = features.index % 9 != 0
    assert adjusted_rand_score(truth[known], learner.predict_codes(spoilt)[known]) > 0.9


def test_a_column_of_fit_that_is_missing_is_named(fitted):
    with pytest.raises(ValueError, match=r"\['b'\] are missing"):
        fitted.predict(customers()[0].drop(columns="b"))


def test_skewed_counts_are_scaled_by_the_log_and_bounded():
    counts = np.random.default_rng(0).lognormal(2, 1.5, 5_000)
    scaling = Scaling.learn(pd.DataFrame({"x": counts, "y": np.linspace(0, 1, 5_000)}))
    x, y = scaling.columns
    assert x.unit == pytest.approx(np.median(counts))
    assert y.unit == 0
    points = scaling.apply(pd.DataFrame({"x": [1e12, 0.0, np.nan], "y": 0.5}))
    assert np.isfinite(points).all()
    assert abs(points[:, 0]).max() < 4
    assert Scaling.from_json(json.loads(json.dumps(scaling.to_json()))) == scaling


def test_saved_files_of_another_fit_are_refused(fitted, tmp_path):
    fitted.save(tmp_path)
    np.save(tmp_path / "centroids.npy", fitted.assigner_.centroids[:2])
    with pytest.raises(ValueError, match="do not belong together"):
        Segmenter.load(tmp_path)


@pytest.mark.slow
def test_two_processes_write_the_same_files(tmp_path):
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[3])!r})
import numpy as np, pandas as pd
from pathlib import Path
from models.segments import Segmenter
rng = np.random.default_rng(0)
x = np.concatenate([rng.normal(size=(150, 2)), rng.normal(size=(150, 2)) + 4])
Segmenter(method="kmeans", bootstrap_draws=4, k_max=4).fit(pd.DataFrame(x, columns=["a", "b"])).save(Path(sys.argv[1]))
"""
    for name in ("one", "two"):
        subprocess.run([sys.executable, "-c", script, str(tmp_path / name)], check=True, timeout=120)
    contents = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert contents[0] == contents[1]
