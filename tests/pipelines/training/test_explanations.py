"""What is written of a fitted classifier: the tables say what the model says."""

import json

import numpy as np
import optuna
import pandas as pd
import pytest

from models.classifier import Classifier
from pipelines.training import explanations, pictures
from pipelines.training.rows import Rows


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    n = 1_200
    frame = pd.DataFrame({"x0": rng.normal(size=n), "x1": rng.normal(size=n), "region": rng.choice(["north", "south"], n)})
    frame["label"] = (rng.random(n) < 1 / (1 + np.exp(-2 * frame["x0"] - (frame["region"] == "north")))).astype(int)
    frame["split"] = np.repeat(["train", "validation", "test"], n // 3)
    frame["customer_id"], frame["event_timestamp"] = [f"secret-{i}" for i in range(n)], pd.Timestamp("2026-01-01", tz="UTC")
    return Rows(frame, ["x0", "x1", "region"], frame["event_timestamp"])


@pytest.fixture(scope="module")
def learner(rows):
    return Classifier(n_rounds=60).fit(*rows.part("train"), validation=rows.part("validation"))


def trials(n):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(lambda trial: (trial.suggest_float("x", 0, 1) - 0.3) ** 2 + 0.01 * trial.suggest_float("y", 0, 1), n_trials=n)
    return study.trials


def test_written_contributions_add_up_to_the_written_probability_and_name_nobody(rows, learner, tmp_path):
    explanations.write(tmp_path, learner, rows, trials=trials(12), seed=7)
    shown = pd.read_csv(tmp_path / "contributions_by_row.csv")
    logit = shown[[*rows.inputs, "base"]].sum(axis=1)
    assert np.allclose(1 / (1 + np.exp(-logit)), shown["probability"], atol=1e-9)
    assert pd.read_csv(tmp_path / "contributions.csv")["feature"].iloc[0] == "x0"
    assert not any(b"secret-" in path.read_bytes() for path in tmp_path.iterdir())
    told = json.loads((tmp_path / "search_importance.json").read_text())
    assert told["x"] > told["y"]
    search = pd.read_csv(tmp_path / "search.csv")
    assert len(search) == 12
    assert (search["best_loss"].diff().dropna() <= 0).all()
    pictures = {path.stem for path in tmp_path.glob("*.png")}
    assert pictures == {"contributions", "contributions_by_row", "partial_dependence", "calibration", "gain", "search"}


def test_partial_dependence_is_the_mean_probability_with_the_column_set(rows, learner):
    some = rows.part("test")[0].head(50)
    found = explanations.partial_dependence(learner, some, ["x0", "region"])
    at = found[found["feature"] == "region"].set_index("value")["probability"]
    assert at["north"] == pytest.approx(learner.predict_proba(some.assign(region="north"))[:, 1].mean())
    assert at["north"] > at["south"]
    rising = found[found["feature"] == "x0"]["probability"].astype(float)
    assert rising.iloc[-1] > rising.iloc[0] + 0.3


def test_gain_of_a_score_that_says_nothing_is_none_and_the_order_of_rows_never_matters():
    label = np.array([1, 1, 0, 0, 0, 0, 0, 0, 0, 0] * 20, dtype=float)
    flat = explanations.gain_table(label, np.full(200, 0.2))
    assert np.allclose(flat["gain"], 0)
    assert np.allclose(flat["lift"], 1)
    best = explanations.gain_table(label, label)
    assert best.loc[best["share"] == 0.2, "found"].item() == pytest.approx(1.0)
    order = np.random.default_rng(0).permutation(200)
    coarse = np.round(label * 0.3 + np.linspace(0, 0.5, 200), 1)
    whose = np.arange(200)
    as_given, otherwise = explanations.gain_table(label, coarse, whose), explanations.gain_table(label[order], coarse[order], order)
    pd.testing.assert_frame_equal(as_given, otherwise)


def test_gain_of_a_score_that_tells_something_lies_beyond_chance_and_draws_of_whole_customers_are_wider():
    rng = np.random.default_rng(1)
    whose, own = np.repeat(np.arange(100), 10), np.repeat(rng.random(100), 10)
    label = (rng.random(1_000) < own).astype(float)
    told, of_rows = explanations.gain_table(label, own, whose, seed=3), explanations.gain_table(label, own, seed=3)
    assert (told["low"] <= told["gain"] + 1e-9).all()
    assert (told["high"] >= told["gain"] - 1e-9).all()
    assert told["low"].iloc[4:15].min() > 0
    assert explanations.gain_table(label, rng.random(1_000), whose)["low"].iloc[4:15].max() < 0  # control: a score of nothing is by chance
    assert (told["high"] - told["low"]).mean() > 1.5 * (of_rows["high"] - of_rows["low"]).mean()
    pd.testing.assert_frame_equal(told, explanations.gain_table(label, own, whose, seed=3))


def test_calibration_has_the_interval_that_its_rows_leave():
    label, probability = np.tile([1.0, 0.0, 0.0, 0.0], 100), np.full(400, 0.25)
    table = explanations.calibration_table(label, probability)
    assert table["rows"].sum() == 400
    assert ((table["low"] <= table["observed"]) & (table["observed"] <= table["high"])).all()
    assert ((table["low"] < 0.25) & (table["high"] > 0.25)).all()
    certain = explanations.calibration_table(np.zeros(20), probability[:20])
    assert (certain["low"] == 0).all()
    assert (certain["high"] > 0.5).all()  # two rows without an event prove little


def test_a_search_of_which_trials_were_broken_off_and_a_picture_of_one_row_are_drawn(rows, learner, tmp_path):
    whole, broken = trials(3), optuna.trial.create_trial(state=optuna.trial.TrialState.PRUNED, intermediate_values={0: 0.3})
    explanations.write_search(tmp_path, [*whole, broken])
    assert pd.read_csv(tmp_path / "search.csv")["state"].tolist() == ["complete"] * 3 + ["pruned"]
    one = learner.explain(rows.part("test")[0].head(1)).assign(base=learner.base_, probability=0.5)
    assert len(pictures.rows(one).axes) == 1
    assert len(pictures.rows(pd.concat([one] * 3, ignore_index=True).assign(probability=[0.1, 0.9, 0.5])).axes) == 3


def test_too_few_trials_explain_nothing():
    assert explanations.search_importance(trials(2)) == {}
    assert explanations.search_table([]).empty
