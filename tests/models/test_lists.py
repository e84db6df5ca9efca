import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from models.lists import best, best_of_pairs, chosen


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 60))
@settings(max_examples=40)
def test_what_is_chosen_is_the_set_of_the_best_whatever_the_ties(seed: int, k: int, n_items: int) -> None:
    rng = np.random.default_rng(seed)
    scores = np.round(rng.normal(size=(4, n_items)), 1).astype(np.float32)
    scores[rng.random(scores.shape) < 0.3] = -np.inf
    items, values = best(scores, k)
    marks = chosen(scores, k)
    assert [set(np.flatnonzero(row)) for row in marks] == [set(row[row >= 0].tolist()) for row in items]
    rows, columns = np.nonzero(np.isfinite(scores))
    again = best_of_pairs(rows, columns, scores[rows, columns], n_rows=4, k=k)
    assert np.array_equal(again[0], items)
    assert np.array_equal(again[1], values)
