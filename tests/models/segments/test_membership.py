import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.segments import movement

SETTINGS = settings(max_examples=50)
segments = st.lists(st.sampled_from(["S1", "S2", "S3", None]), min_size=2, max_size=60)


def series(values):
    return pd.Series(values, index=[f"c{n}" for n in range(len(values))], dtype=object)


@SETTINGS
@given(segments)
def test_nothing_moves_between_a_fit_and_itself(values):
    found = movement(series(values), series(values))
    assert (found.share_moved, found.psi, found.chi_square, found.cramers_v) == (0, 0, pytest.approx(0), pytest.approx(0))
    assert not found.is_material


@SETTINGS
@given(segments, st.randoms(use_true_random=False))
def test_the_way_back_moves_as_many_and_the_names_make_no_difference(values, random):
    other = random.sample(values, len(values))
    there, back = movement(series(values), series(other)), movement(series(other), series(values))
    assert there.share_moved == back.share_moved
    assert there.psi == pytest.approx(back.psi)
    assert there.flows.to_numpy().sum() == len(values)
    renamed = {"S1": "S9", "S2": "S1", "S3": "S7", None: None}
    same = movement(series([renamed[v] for v in values]), series([renamed[v] for v in other]))
    assert same.share_moved == there.share_moved
    assert same.psi == pytest.approx(there.psi)


def test_a_shift_of_a_fifth_is_material_and_noise_is_not():
    rng = np.random.default_rng(0)
    before = series(rng.choice(["S1", "S2"], 3_000))
    noise = series(rng.choice(["S1", "S2"], 3_000))
    moved = movement(before, before.where(rng.random(3_000) > 0.4, "S2"))
    assert moved.is_material
    assert moved.share_moved == pytest.approx(0.2, abs=0.03)
    assert moved.flows.loc["S2", "S1"] == 0
    chance = movement(before, noise)
    assert chance.share_moved == pytest.approx(0.5, abs=0.05)  # everybody changes places
    assert not chance.is_material  # and the segments stay as large as they were


def test_a_difference_that_is_significant_and_little_is_not_material():
    counts = [["S1"] * 50_000 + ["S2"] * 50_000, ["S1"] * 51_500 + ["S2"] * 48_500]
    found = movement(*(series(values) for values in counts))
    assert found.p_value < 0.001
    assert not found.is_material


def test_customers_of_one_time_only_count_in_the_shares_and_not_in_the_flows():
    before, after = series(["S1", "S2", "S1"]), series(["S1", "S2", "S1", "S2", None])
    found = movement(before, after)
    assert (found.n_before, found.n_after, found.share_moved) == (3, 5, 0)
    assert found.flows.to_numpy().sum() == 3
    assert found.psi > 0


def test_no_customers_and_a_customer_twice():
    empty = movement(series([]), series(["S1"]))
    assert np.isnan(empty.share_moved)
    assert not empty.is_material
    with pytest.raises(ValueError, match="some twice before"):
        movement(pd.Series(["S1", "S1"], index=["c1", "c1"]), series(["S1"]))
