import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.bands import NAMES, band_cuts, bands


@given(threshold=st.floats(0.01, 0.99), probability=st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_band_rises_with_the_probability_and_acting_begins_with_medium(threshold, probability):
    found = bands(sorted(probability), threshold)
    assert (np.diff(found) >= 0).all()
    assert [NAMES[i] != "low" for i in found] == [p >= threshold for p in sorted(probability)]


def test_cuts_belong_to_the_band_above_them():
    medium, high = band_cuts(0.2)
    assert (medium, high) == (0.2, pytest.approx(0.6))
    assert [NAMES[i] for i in bands([0.0, medium, high, 1.0], 0.2)] == ["low", "medium", "high", "high"]
