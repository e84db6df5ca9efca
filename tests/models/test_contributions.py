"""Contributions that are looked up against LightGBM's own, for trees of every kind that is trained here."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import lightgbm as lgb
import numpy as np
import pytest

from models import contributions
from models.contributions import Contributions, Tables

N_FEATURES, CATEGORY = 6, 5
MISSING, COMPLETE = 0.15, 0.0  # share of values


def _booster(
    seed: int, *, n_leaves: int = 15, missing: float = MISSING, rounds: int = 12, **options: object
) -> tuple[lgb.Booster, np.ndarray]:
    """Trees over few features, so that paths look at one several times, and rows such as they were learned of and others."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(600, N_FEATURES))
    rows[:, 1] = rng.integers(-3, 4, len(rows))  # zeros on purpose
    rows[:, CATEGORY] = rng.integers(0, 40, len(rows))
    rows[rng.random(rows.shape) < missing] = np.nan
    label = (np.nan_to_num(rows[:, 0] * rows[:, 1]) + (rows[:, CATEGORY] % 3 == 0) + rng.normal(0, 0.3, len(rows)) > 0.5).astype(int)
    given = {"objective": "binary", "num_leaves": n_leaves, "min_data_in_leaf": 5, "bagging_fraction": 0.7, "bagging_freq": 1,
             "min_data_per_group": 5, "cat_smooth": 1.0, "seed": seed, "num_threads": 1, "verbosity": -1, **options}  # fmt: skip
    booster = lgb.train(given, lgb.Dataset(rows, label, categorical_feature=[CATEGORY]), rounds)
    odd = np.vstack([np.full((6, N_FEATURES), [[np.nan], [np.inf], [-np.inf], [0.0], [-0.0], [1e300]]), rng.normal(size=(40, N_FEATURES))])
    odd[:, CATEGORY] = np.tile([np.nan, -1.0, -0.5, 0.5, 39.0, 39.9, 40.0, 1e6], 6)[: len(odd)]
    return booster, np.vstack([rows[:80], odd])


def _told(booster: lgb.Booster, rows: np.ndarray) -> np.ndarray:
    return np.asarray(booster.predict(rows, pred_contrib=True, num_threads=1))[:, :-1]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("missing", [MISSING, COMPLETE], ids=["some missing", "none missing in training"])
@pytest.mark.parametrize("n_leaves", [2, 3, 15])
def test_every_row_gets_what_lightgbm_works_out(seed: int, missing: float, n_leaves: int) -> None:
    booster, rows = _booster(seed, n_leaves=n_leaves, missing=missing)
    tables = Tables.of(booster)
    assert tables is not None
    found = np.array([tables(row) for row in rows])
    np.testing.assert_allclose(found, _told(booster, rows), rtol=0, atol=1e-13)
    assert np.ptp(found, axis=0).any()  # control: rows differ


def test_trees_are_of_every_kind_that_is_told_apart() -> None:
    nodes = [node for missing in (MISSING, COMPLETE) for node in _nodes(_booster(0, missing=missing)[0])]
    assert {node["decision_type"] for node in nodes} == {"<=", "=="}
    assert {(node["missing_type"], node["default_left"]) for node in nodes} >= {("NaN", True), ("NaN", False), ("None", True)}


def _nodes(booster: lgb.Booster) -> list[dict]:
    waiting, found = [tree["tree_structure"] for tree in booster.dump_model()["tree_info"]], []
    while waiting:
        node = waiting.pop()
        if "split_feature" in node:
            found.append(node)
            waiting += [node["left_child"], node["right_child"]]
    return found


def test_trees_too_deep_and_tables_too_large_are_left_to_lightgbm(monkeypatch) -> None:
    deep, rows = _booster(1, n_leaves=200, missing=COMPLETE, min_data_in_leaf=1)
    assert Tables.of(deep) is None
    np.testing.assert_array_equal(np.array([Contributions(deep)(row) for row in rows]), _told(deep, rows))
    booster, rows = _booster(1)
    tables = Tables.of(booster)
    assert tables is not None
    monkeypatch.setattr(contributions, "MOST_NUMBERS", tables.numbers.size)
    assert Tables.of(booster) is not None
    monkeypatch.setattr(contributions, "MOST_NUMBERS", tables.numbers.size - 1)
    assert Tables.of(booster) is None
    np.testing.assert_array_equal(np.array([Contributions(booster)(row) for row in rows]), _told(booster, rows))


def test_trees_that_are_leaves_say_nothing_of_features() -> None:
    booster, rows = _booster(0, min_data_in_leaf=10_000, rounds=3)
    assert np.array_equal(Contributions(booster)(rows[0]), np.zeros(N_FEATURES))


def test_copies_threads_and_answers_of_their_own() -> None:
    booster, rows = _booster(2)
    one, expected = Contributions(booster), _told(booster, rows)
    with ThreadPoolExecutor(4) as threads:
        np.testing.assert_allclose(np.stack([*threads.map(one, rows)]), expected, atol=1e-13)
    first = one(rows[0])
    kept = first.copy()
    one(rows[1])
    assert np.array_equal(first, kept)
    for other in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):  # noqa: S301 - our own bytes
        np.testing.assert_array_equal(other(rows[0]), kept)
