"""The direct call to LightGBM against `Booster.predict`."""

from concurrent.futures import ThreadPoolExecutor

import lightgbm as lgb
import numpy as np
import pytest

from models.forest import Forest


@pytest.fixture(scope="module")
def booster() -> lgb.Booster:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(400, 5)).astype(np.float32)
    rows[rng.random(rows.shape) < 0.2] = np.nan
    options = {"objective": "lambdarank", "num_leaves": 15, "num_threads": 1, "verbosity": -1, "min_data_in_leaf": 5}
    return lgb.train(options, lgb.Dataset(rows, np.nan_to_num(rows[:, 0]) > 0, group=[20] * 20), 12)


@pytest.mark.parametrize("n", [1, 90])
def test_rows_score_to_the_bit_what_the_booster_predicts(booster: lgb.Booster, n: int) -> None:
    rows = np.random.default_rng(1).normal(size=(n, 5)).astype(np.float32)
    rows[::3, 1], rows[::4, 0] = np.nan, np.inf
    found = Forest(booster)(rows)
    assert np.array_equal(found, booster.predict(rows, num_threads=1))
    assert np.array_equal(Forest(booster)(np.asfortranarray(rows)), found)
    assert len(set(found.tolist())) > 1 or n == 1  # control: there is something to tell apart


def test_several_may_ask_at_a_time(booster: lgb.Booster) -> None:
    forest, asked = Forest(booster), [np.random.default_rng(n).normal(size=(n + 1, 5)).astype(np.float32) for n in range(60)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(forest, asked))
    assert all(np.array_equal(one, booster.predict(rows, num_threads=1)) for one, rows in zip(found, asked, strict=True))


@pytest.mark.parametrize("shape", [(3, 4), (5,)], ids=["narrow", "a row alone"])
def test_rows_of_another_width_are_refused(booster: lgb.Booster, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected rows of 5 features"):
        Forest(booster)(np.zeros(shape, dtype=np.float32))
