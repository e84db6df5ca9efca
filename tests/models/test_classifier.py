from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from models import evaluation
from models.classifier import Classifier


@dataclass(frozen=True)
class World:
    """Rows with the probability that their labels were drawn from."""

    features: pd.DataFrame
    label: np.ndarray
    truth: np.ndarray


def _world(n: int, seed: int) -> World:
    """A noisy logistic world with text, flags, nullable whole numbers, and columns that say nothing."""
    rng = np.random.default_rng(seed)
    features = pd.DataFrame({f"x{j}": rng.normal(size=n) for j in range(4)})
    features["region"] = rng.choice(["north", "south", "east", None], n)
    features["is_new"] = rng.random(n) < 0.5
    features["visits"] = pd.array(rng.integers(0, 9, n), dtype="Int64")
    features.loc[::7, "visits"] = pd.NA
    features["constant"], features["empty"] = 1, None
    visits = features["visits"].astype("Float64").fillna(4).to_numpy(dtype=float)
    logit = -1.5 + features["x0"] + 0.7 * features["x1"] + 1.2 * (features["region"] == "north") - 0.5 * features["is_new"] + 0.15 * visits
    truth = (1 / (1 + np.exp(-logit))).to_numpy()
    return World(features, (rng.random(n) < truth).astype(int), truth)


@pytest.fixture(scope="module")
def test_rows() -> World:
    return _world(20_000, 2)


@pytest.fixture(scope="module")
def fitted() -> Classifier:
    train, validation = _world(8_000, 0), _world(6_000, 1)
    return Classifier(learning_rate=0.1, num_leaves=7).fit(train.features, train.label, (validation.features, validation.label))


def test_auc_comes_close_to_the_optimum_and_beats_a_single_column(fitted: Classifier, test_rows: World) -> None:
    auc = evaluation.expected_auc(test_rows.truth, fitted.predict_proba(test_rows.features)[:, 1])
    assert auc > evaluation.expected_auc(test_rows.truth, test_rows.truth) - 0.02
    assert auc > evaluation.expected_auc(test_rows.truth, test_rows.features["x0"]) + 0.05


def test_probabilities_are_calibrated_nearly_as_well_as_the_truth(fitted: Classifier, test_rows: World) -> None:
    of = lambda p: evaluation.expected_calibration_error(test_rows.label, p)  # noqa: E731
    positive = fitted.predict_proba(test_rows.features)[:, 1]
    assert of(positive) < of(test_rows.truth) + 0.01
    assert of(positive**1.3) > of(test_rows.truth) + 0.03


def test_trees_of_a_rare_label_keep_its_rate_before_any_calibration() -> None:
    train, later = _world(6_000, 0), _world(3_000, 1)
    label, label_later = (world.label * (np.arange(len(world.label)) % 7 == 0) for world in (train, later))
    fitted = Classifier(n_rounds=40).fit(train.features, label, (later.features, label_later))
    assert fitted.booster_.predict(fitted.encode(later.features)).mean() == pytest.approx(label.mean(), abs=0.01)


def test_refitted_learns_the_newest_rows_too_and_keeps_what_was_judged_on_them(test_rows: World) -> None:
    """A column that counts in the newest rows alone: a fit that is only stopped on them cannot know it."""
    train, validation = _world(3_000, 3), _world(3_000, 4)
    newest = validation.features.assign(x3=validation.features["x3"] + 3.0 * validation.label)
    stopped = Classifier(num_leaves=7).fit(train.features, train.label, (newest, validation.label))
    both, labels = pd.concat([train.features, newest], ignore_index=True), np.concatenate([train.label, validation.label])
    again = stopped.refitted(both, labels)
    assert (again.calibration_, again.threshold_, again.get_params()) == (stopped.calibration_, stopped.threshold_, stopped.get_params())
    assert again.booster_.num_trees() == stopped.booster_.num_trees()
    rows = test_rows.features.assign(x3=test_rows.features["x3"] + 3.0 * test_rows.label)
    of = lambda learner: evaluation.auc(test_rows.label, learner.predict_proba(rows)[:, 1])  # noqa: E731
    assert of(again) > of(stopped) + 0.05
    with pytest.raises(ValueError, match="features must have the columns of fit"):
        stopped.refitted(both.drop(columns="x3"), labels)


def test_probability_rows_sum_to_one(fitted: Classifier, test_rows: World) -> None:
    both = fitted.predict_proba(test_rows.features)
    assert both.shape == (20_000, 2)
    assert np.allclose(both.sum(axis=1), 1)
    assert fitted.predict_proba(test_rows.features.head(0)).shape == (0, 2)


def test_the_path_without_pandas_gives_the_same_bits(fitted: Classifier, test_rows: World) -> None:
    some = test_rows.features.head(50)
    expected = fitted.predict_proba(some)[:, 1]
    plain = {name: some[name].astype(object).where(some[name].notna(), None).to_list() for name in some}
    assert np.array_equal(fitted.predict_values(fitted.encode(plain | {"more": [0] * 50})), expected)
    one = {name: values[7:8] for name, values in plain.items()}
    assert fitted.predict_values(fitted.encode(one))[0] == expected[7]
    assert fitted.predict_values(fitted.encode({**one, "x0": [9.0]}))[0] != expected[7]


def test_contributions_and_base_add_up_to_the_logit_of_the_calibrated_probability(fitted: Classifier, test_rows: World) -> None:
    some = test_rows.features.iloc[100:400]
    parts, positive = fitted.explain(some), fitted.predict_proba(some)[:, 1]
    assert parts.shape == some.shape
    assert parts.index.equals(some.index)
    assert np.allclose(parts.sum(axis=1) + fitted.base_, np.log(positive / (1 - positive)), atol=1e-9)
    assert fitted.calibration_ != (1.0, 0.0)  # otherwise the sum would hold without the calibration in it
    assert (parts[["constant", "empty"]] == 0).all(axis=None)
    assert np.array_equal(parts.to_numpy(), fitted.explain_values(fitted.encode(some)))
    assert fitted.probability_of(parts.to_numpy()) == pytest.approx(positive, rel=1e-12)


def test_unseen_text_and_null_are_missing_and_known_text_is_not(fitted: Classifier, test_rows: World) -> None:
    some = test_rows.features.head(200)
    unseen, null, north = (fitted.predict_proba(some.assign(region=value)) for value in ("atlantis", None, "north"))
    assert np.array_equal(unseen, null)
    assert not np.array_equal(unseen, north)
    assert fitted.categories_["region"] == ("east", "north", "south")


def test_text_means_the_same_as_category_object_or_string(fitted: Classifier, test_rows: World) -> None:
    some = test_rows.features.head(200)
    expected = fitted.predict_proba(some)
    for kind in ("category", "string"):
        assert np.array_equal(fitted.predict_proba(some.astype({"region": kind})), expected)


def test_a_column_empty_in_training_may_hold_anything_later(fitted: Classifier, test_rows: World) -> None:
    some = test_rows.features.head(20)
    assert np.array_equal(fitted.predict_proba(some.assign(empty="surprise")), fitted.predict_proba(some))


def test_columns_are_found_by_name_not_by_place(fitted: Classifier, test_rows: World) -> None:
    some = test_rows.features.head(50)
    assert np.array_equal(fitted.predict_proba(some[some.columns[::-1]]), fitted.predict_proba(some))


def test_the_threshold_follows_the_costs() -> None:
    train = _world(3_000, 0)
    patient, eager = (Classifier(n_rounds=30, cost_false_negative=cost).fit(train.features, train.label) for cost in (0.5, 20.0))
    assert eager.threshold_ < patient.threshold_
    assert eager.predict(train.features).sum() > patient.predict(train.features).sum()


def test_a_label_without_signal_gives_the_base_rate_to_all() -> None:
    rng = np.random.default_rng(4)
    features, label = pd.DataFrame({"x": rng.normal(size=4_000)}), (rng.random(4_000) < 0.3).astype(int)
    positive = Classifier().fit(features, label).predict_proba(features)[:, 1]
    assert positive.mean() == pytest.approx(0.3, abs=0.05)
    assert positive.std() < 0.03


def test_a_rise_of_the_base_rate_is_met_by_the_newest_rows() -> None:
    train, validation = _world(4_000, 0), _world(4_000, 1)
    doubled = np.random.default_rng(5).random(len(validation.label)) < 0.3
    risen = np.maximum(validation.label, doubled)
    fitted = Classifier(n_rounds=60).fit(train.features, train.label, (validation.features, risen))
    newest = validation.features[2_000:]
    assert fitted.predict_proba(newest)[:, 1].mean() == pytest.approx(risen[2_000:].mean(), abs=0.02)
    assert fitted.booster_.predict(fitted.encode(newest)).mean() < risen[2_000:].mean() - 0.1  # before calibration


@pytest.mark.parametrize(
    ("features", "label", "sentence"),
    [
        (pd.DataFrame({"x": []}), [], "expected rows and columns"),
        (pd.DataFrame(index=range(4)), [0, 1, 0, 1], "expected rows and columns"),
        (pd.DataFrame({"x": [1, 2, 3]}), [1, 1, 1], "both classes"),
        (pd.DataFrame({"x": [1, 2, 3]}), [0, 1, np.nan], "must be 0 or 1"),
        (pd.DataFrame({"x": [1, 2, 3]}), [0, 1, 2], "must be 0 or 1"),
        (pd.DataFrame({"x": [1, 2, 3]}), ["no", "yes", "no"], "must hold numbers"),
        (pd.DataFrame({"x": [1, 2, 3]}), [0, 1], "one label for each"),
        (pd.DataFrame([[1, 2], [3, 4]], columns=["x", "x"]), [0, 1], "each column once"),
        (pd.DataFrame({"x": pd.to_datetime(["2024-01-01", "2024-01-02"])}), [0, 1], "turn times into ages"),
        (pd.DataFrame({"x": [1, "one"]}), [0, 1], "expected numbers, booleans or text"),
    ],
)
def test_data_that_cannot_teach_are_refused_with_a_sentence(features: pd.DataFrame, label: list, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Classifier().fit(features, label)


def test_other_columns_than_those_of_fit_are_refused(fitted: Classifier, test_rows: World) -> None:
    some = test_rows.features.head(5)
    for wrong in (some.drop(columns="x0"), some.assign(more=1), some.rename(columns={"x0": "y0"}), pd.concat([some, some[["x0"]]], axis=1)):
        with pytest.raises(ValueError, match="columns of fit"):
            fitted.predict_proba(wrong)
        with pytest.raises(ValueError, match="columns of fit"):
            fitted.explain(wrong)
    with pytest.raises(ValueError, match="columns of fit"):
        Classifier().fit(some, [0, 1, 0, 1, 0], (some.drop(columns="x0"), [0, 1, 0, 1, 0]))
    with pytest.raises(ValueError, match="x0 must hold numbers"):
        fitted.predict_proba(some.assign(x0="many"))
    with pytest.raises(ValueError, match=r"\['x0'\] are missing"):
        fitted.encode({name: [1] for name in some if name != "x0"})
    with pytest.raises(ValueError, match="x1 has shape"):
        fitted.encode({name: [1] if name == "x1" else [1, 2] for name in some})


def test_a_handful_of_rows_a_constant_column_and_sorted_labels_do_no_harm() -> None:
    for n in (2, 3, 5, 40):
        label = np.sort(np.arange(n) % 2)
        features = pd.DataFrame({"constant": np.ones(n), "empty": np.full(n, np.nan)})
        positive = Classifier().fit(features, label).predict_proba(features)[:, 1]
        assert np.isfinite(positive).all()
        assert ((positive > 0) & (positive < 1)).all()


def test_validation_rows_of_one_class_calibrate_without_certainty() -> None:
    train = _world(600, 0)
    later = _world(100, 1).features
    positive = Classifier(n_rounds=20).fit(train.features, train.label, (later, np.zeros(100))).predict_proba(later)[:, 1]
    assert (positive > 0).all()
    assert positive.mean() < train.label.mean()


def test_loss_is_the_log_loss_of_the_calibrated_probabilities(fitted: Classifier, test_rows: World) -> None:
    expected = evaluation.log_loss(test_rows.label, fitted.predict_proba(test_rows.features)[:, 1])
    assert fitted.loss((test_rows.features, test_rows.label)) == expected
    assert expected < evaluation.log_loss(test_rows.label, np.full(len(test_rows.label), test_rows.label.mean()))


def test_rows_prepared_once_serve_fits_of_any_parameters_as_rows_given_anew_do() -> None:
    train, later = _world(1_500, 0), _world(700, 1)
    validation = (later.features, later.label)
    prepared = Classifier().prepare(train.features, train.label, validation)
    tried = [{"min_data_in_leaf": 200}, {"min_data_in_leaf": 5, "cat_smooth": 1.0}, {"monotone": {"x0": 1}, "n_seeds": 2}, {}]
    for params in tried:
        learner = Classifier(n_rounds=15, num_leaves=31, **params)
        loss = learner.search_loss(prepared)
        alone = Classifier(**learner.get_params()).fit(train.features, train.label, validation)
        assert learner.booster_.model_to_string() == alone.booster_.model_to_string()
        assert (learner.calibration_, learner.threshold_, loss) == (alone.calibration_, alone.threshold_, alone.loss(validation))


def test_frame_that_is_a_matrix_already_is_read_where_it_lies_and_left_as_it_is() -> None:
    values = np.random.default_rng(0).normal(size=(400, 3))
    frame, kept = pd.DataFrame(values, columns=["a", "b", "c"]), values.copy()
    learner = Classifier(n_rounds=5).fit(frame, values[:, 0] > 0)
    assert np.shares_memory(learner.encode(frame), frame.to_numpy())
    assert not np.shares_memory(learner.encode(frame[["c", "b", "a"]]), frame.to_numpy())  # control: other places
    np.testing.assert_array_equal(values, kept)


def test_saved_trees_of_other_features_are_refused(fitted: Classifier, tmp_path: Path) -> None:
    fitted.save(tmp_path)
    other = Classifier(n_rounds=5).fit(pd.DataFrame({"x": range(100)}), np.arange(100) % 2)
    other.booster_.save_model(tmp_path / "model.lgb")
    with pytest.raises(ValueError, match="reads 1 features"):
        Classifier.load(tmp_path)
