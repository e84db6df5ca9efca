import numpy as np
import pandas as pd
import pytest

from models import boosters
from models.classifier import Classifier


def _rows(n: int = 1_500, seed: int = 0) -> tuple[pd.DataFrame, np.ndarray]:
    rng = np.random.default_rng(seed)
    features = pd.DataFrame({f"x{j}": rng.normal(size=n) for j in range(4)}).assign(region=rng.choice(list("abcd"), n))
    logit = features["x0"] + (features["region"] == "a") - 0.5
    return features, (rng.random(n) < 1 / (1 + np.exp(-logit))).astype(int)


def test_averaged_boosters_say_the_mean_logit_of_their_parts_and_so_do_their_contributions() -> None:
    features, label = _rows()
    whole = Classifier(n_seeds=3).fit(features, label)
    parts = [Classifier(random_state=seed).fit(features, label) for seed in whole._seeds()]
    matrix = whole.encode(features)
    for question in ({"raw_score": True}, {"pred_contrib": True}):
        told = [part.booster_.predict(matrix, **question) for part in parts]
        assert not np.allclose(told[0], told[1])  # otherwise a mean would prove nothing
        assert whole.booster_.predict(matrix, **question) == pytest.approx(np.mean(told, axis=0), abs=1e-12)
    assert whole.booster_.num_trees() == sum(part.booster_.num_trees() for part in parts)


def test_an_average_is_one_model_that_is_saved_loaded_and_explained_like_any(tmp_path) -> None:
    features, label = _rows()
    fitted = Classifier(n_seeds=2, n_rounds=30).fit(features, label)
    fitted.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model.lgb", "classifier.json"}
    assert np.array_equal(Classifier.load(tmp_path).predict_proba(features), fitted.predict_proba(features))
    positive = fitted.predict_proba(features)[:, 1]
    assert fitted.explain(features).sum(axis=1).to_numpy() + fitted.base_ == pytest.approx(np.log(positive / (1 - positive)), abs=1e-9)


def test_boosters_of_other_columns_and_texts_that_are_none_are_refused() -> None:
    features, label = _rows(300)
    some, others = (Classifier(n_rounds=3).fit(part, label).booster_.model_to_string() for part in (features, features.drop(columns="x0")))
    with pytest.raises(ValueError, match="same columns"):
        boosters.average([some, others])
    with pytest.raises(ValueError, match="found none"):
        boosters.average(["tree\n"])


@pytest.mark.parametrize("way", [1, -1])
def test_a_declared_direction_holds_everywhere_and_without_it_does_not(way: int) -> None:
    features, label = _rows(600)
    grid = np.linspace(-3, 3, 40)

    def steps(fitted: Classifier) -> np.ndarray:
        return np.diff([fitted.predict_proba(features.head(40).assign(x1=value))[:, 1] for value in grid], axis=0)

    assert (way * steps(Classifier(monotone={"x1": way}, n_rounds=60).fit(features, label)) >= -1e-12).all()
    assert (way * steps(Classifier(n_rounds=60).fit(features, label)) < -1e-9).any()


def test_a_direction_of_a_column_that_is_text_or_not_there_is_refused() -> None:
    features, label = _rows(100)
    for wrong in ({"region": 1}, {"nothing": 1}, {"x0": 2}):
        with pytest.raises(ValueError, match="monotone expects"):
            Classifier(monotone=wrong).fit(features, label)
