"""One contract for all learners: constructor, parameters, determinism, files, refusals."""

from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest
from scipy import sparse
from sklearn.base import clone

from models.classifier import Classifier
from models.learner import Learner
from models.recommender import Recommender
from models.segments import Segmenter


def _frame(seed: int) -> tuple[pd.DataFrame, np.ndarray]:
    rng = np.random.default_rng(seed)
    features = pd.DataFrame({"x": rng.normal(size=300), "place": rng.choice(["north", "south"], 300)})
    return features, (rng.random(300) < 1 / (1 + np.exp(-features["x"]))).astype(int).to_numpy()


def _matrix(seed: int) -> tuple[Any]:
    return (sparse.random(40, 25, density=0.2, format="csr", random_state=seed),)


def _groups(seed: int) -> tuple[pd.DataFrame]:
    rng = np.random.default_rng(seed)
    return (pd.DataFrame(np.repeat([[0.0, 0.0], [3.0, 3.0], [6.0, 0.0]], 60, axis=0) + rng.normal(size=(180, 2)), columns=["x", "y"]),)


def _answer(learner: Any) -> np.ndarray:
    """Everything that the learner would say about fixed questions."""
    if isinstance(learner, Classifier):
        return np.column_stack([learner.predict_proba(_frame(2)[0]), learner.explain(_frame(2)[0])])
    if isinstance(learner, Segmenter):
        return np.concatenate([learner.predict_codes(_groups(2)[0]), *learner.profile(_groups(2)[0])[["share", "stability"]].to_numpy()])
    items, scores = learner.recommend([0, 5, -1], 10)
    return np.column_stack([items, scores])


CASES = [
    pytest.param(Classifier(n_rounds=20), _frame, id="classifier"),
    pytest.param(Recommender(n_factors=4, n_epochs=3), _matrix, id="recommender"),
    pytest.param(Segmenter(method="kmeans", k_max=5, bootstrap_draws=5), _groups, id="segmenter"),
]


@pytest.mark.parametrize(("learner", "data"), CASES)
def test_parameters_are_read_set_and_cloned_as_scikit_learn_does(learner: Learner, data: Any) -> None:
    params = learner.get_params()
    assert type(learner)(**params).get_params() == params
    assert clone(learner).get_params() == params
    assert learner.set_params(random_state=3) is learner
    assert learner.get_params() == params | {"random_state": 3}
    learner.set_params(**params)
    with pytest.raises(ValueError, match="not parameters"):
        learner.set_params(colour="blue")


@pytest.mark.parametrize(("learner", "data"), CASES)
def test_the_constructor_learns_nothing_and_an_unfitted_learner_says_so(learner: Learner, data: Any, tmp_path: Path) -> None:
    fresh = clone(learner)
    assert not [name for name in vars(fresh) if name.endswith("_")]
    for ask in (lambda: _answer(fresh), lambda: fresh.save(tmp_path), lambda: fresh.loss(data(1))):
        with pytest.raises(ValueError, match="call fit or load first"):
            ask()


@pytest.mark.parametrize(("learner", "data"), CASES)
def test_fit_returns_self_twice_is_once_and_the_seed_decides(learner: Learner, data: Any) -> None:
    first = clone(learner)
    assert first.fit(*data(1)) is first
    once = _answer(first)
    assert np.array_equal(once, _answer(first.fit(*data(1))))
    assert np.array_equal(once, _answer(clone(learner).set_params(num_threads=2).fit(*data(1))))
    assert not np.array_equal(once, _answer(clone(learner).set_params(random_state=99).fit(*data(1))))


@pytest.mark.parametrize(("learner", "data"), CASES)
def test_fit_leaves_its_data_as_they_were(learner: Learner, data: Any) -> None:
    given, same = data(1), data(1)
    clone(learner).fit(*given)
    if isinstance(given[0], pd.DataFrame):
        pd.testing.assert_frame_equal(given[0], same[0])
    else:
        assert abs(given[0] - same[0]).nnz == 0


@pytest.mark.parametrize(("learner", "data"), CASES)
def test_a_saved_learner_answers_to_the_bit_as_before(learner: Learner, data: Any, tmp_path: Path) -> None:
    fitted = clone(learner).fit(*data(1))
    fitted.save(tmp_path / "model")
    loaded = type(learner).load(tmp_path / "model")
    assert np.array_equal(_answer(loaded), _answer(fitted))
    assert loaded.get_params() == fitted.get_params()
    assert {path.suffix for path in (tmp_path / "model").iterdir()} <= {".lgb", ".json", ".npy"}


@pytest.mark.parametrize(("learner", "data"), CASES)
def test_the_files_of_another_learner_are_refused(learner: Learner, data: Any, tmp_path: Path) -> None:
    clone(learner).fit(*data(1)).save(tmp_path)
    for name in ("classifier.json", "recommender.json", "segmenter.json"):
        (tmp_path / name).write_text('{"kind": "something else"}')
    with pytest.raises(ValueError, match="something else"):
        type(learner).load(tmp_path)


@pytest.mark.parametrize(("learner", "data"), CASES)
def test_the_search_space_holds_the_defaults_and_only_parameters(learner: Learner, data: Any) -> None:
    defaults = type(learner)().get_params()
    with_defaults = type(learner).suggest(optuna.trial.FixedTrial(defaults))
    assert with_defaults == {name: defaults[name] for name in with_defaults}
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    drawn = type(learner).suggest(study.ask())
    assert np.isfinite(clone(learner).set_params(**drawn).fit(*data(1)).loss(data(2) if isinstance(learner, Classifier) else data(2)[0]))
