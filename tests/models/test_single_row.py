"""The call for single rows says what LightGBM's own `predict` says, to the bit, in any thread and after a copy."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import lightgbm as lgb
import numpy as np
import pytest

from models.single_row import CONTRIBUTIONS, RAW_SCORE, SingleRow

ASKED = {RAW_SCORE: {"raw_score": True}, CONTRIBUTIONS: {"pred_contrib": True}}


@pytest.fixture(scope="module")
def trained():
    rng = np.random.default_rng(3)
    rows = np.where(rng.random((400, 6)) < 0.1, np.nan, rng.normal(size=(400, 6)))
    rows[:, 5] = rng.integers(0, 4, 400)
    label = (np.nan_to_num(rows[:, 0]) + rows[:, 5] + rng.normal(size=400) > 1).astype(int)
    data = lgb.Dataset(rows, label, categorical_feature=[5])
    return lgb.train({"objective": "binary", "num_leaves": 7, "verbosity": -1, "num_threads": 1}, data, 20), rows[:60]


@pytest.mark.parametrize("kind", ASKED, ids=["raw_score", "contributions"])
def test_a_single_row_gets_the_bits_of_predict(trained, kind):
    booster, rows = trained
    expected = booster.predict(rows, num_threads=1, **ASKED[kind]).reshape(len(rows), -1)
    one = SingleRow(booster, kind)
    for call in (one, copy.deepcopy(one), pickle.loads(pickle.dumps(one))):  # noqa: S301 - our own bytes
        np.testing.assert_array_equal(np.stack([call(row) for row in rows]), expected)
    with ThreadPoolExecutor(4) as threads:
        np.testing.assert_array_equal(np.stack([*threads.map(one, [*rows] * 5)]), np.tile(expected, (5, 1)))


def test_answers_do_not_share_memory(trained):
    booster, rows = trained
    call = SingleRow(booster, CONTRIBUTIONS)
    first = call(rows[0])
    kept = first.copy()
    call(rows[1])
    np.testing.assert_array_equal(first, kept)
