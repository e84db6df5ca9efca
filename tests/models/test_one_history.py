"""One history by itself is told what it is told among many."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.special import expit

from models import one_history
from models.silence import LARGEST, MOST, NAMES, ROLES, SMALLEST, Silence

NUMBERS = st.one_of(st.floats(allow_nan=True, allow_infinity=True), st.integers(0, 500).map(float))
HISTORIES = st.tuples(*[NUMBERS] * len(ROLES))
SOUND = st.tuples(*[st.floats(0.0, most) for most in MOST])
PARAMS = st.tuples(*[st.floats(math.log(SMALLEST), math.log(LARGEST)).map(math.exp)] * len(NAMES))
USUAL = (1.3, 7.0, 1.1, 150.0, 0.8, 4.0)


@settings(max_examples=150)
@given(PARAMS, SOUND, HISTORIES, st.floats(0.1, 400.0))
@example(USUAL, (6.0, 1.0, 60.0, 5.0), (12.0, 3.0, 90.0, 2.0), 28.0)
@example(USUAL, (6.0, 1.0, 60.0, 5.0), (1.0, 3.0, 90.0, 2.0), 28.0)
@example(USUAL[2:4] + USUAL[:2] + USUAL[4:], (6.0, 1.0, 60.0, 5.0), (math.nan, math.inf, -1.0, math.nan), 28.0)
def test_it_and_its_parts_are_those_of_the_arrays(params, reference, history, horizon_days) -> None:
    model = Silence(horizon_days, dict(zip(NAMES, params, strict=True)), reference)
    alone, among = model.logit_of(history), model.logit(np.array([history]))[0]
    assert expit(alone) == pytest.approx(expit(among), abs=1e-8)
    parts = model.contributions_of(history)
    assert parts.tolist() == pytest.approx(model.contributions(np.array([history]))[0].tolist(), abs=1e-6, rel=1e-6)
    assert parts.sum() + model.base() == pytest.approx(alone, abs=1e-6, rel=1e-6)


def test_mixtures_are_told_in_the_order_in_which_their_columns_are_known() -> None:
    history, reference = (12.0, 3.0, 90.0, 2.0), (6.0, 1.0, 60.0, 5.0)
    model = Silence(28.0, dict(zip(NAMES, USUAL, strict=True)), reference)
    mixed = [
        [h if is_known else r for h, r, is_known in zip(history, reference, known, strict=True)]
        for known in product([False, True], repeat=4)
    ]
    found = one_history.logits_of_mixtures(USUAL, history, reference, 28.0).tolist()
    assert found == pytest.approx(model.logit(np.array(mixed)).tolist(), rel=1e-12)
    assert len(set(found)) == len(found)  # control: none could stand for another
