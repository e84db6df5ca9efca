"""At which nodes a row goes left: rules of LightGBM, each on a node of its own."""

import numpy as np
import pytest

from models.branching import Branching

NAN, INF = float("nan"), float("inf")


def _node(threshold: float | str, missing: str = "None", *, is_left: bool = True, feature: int = 1) -> dict:
    kind = "==" if isinstance(threshold, str) else "<="
    return {"split_feature": feature, "threshold": threshold, "decision_type": kind, "missing_type": missing, "default_left": is_left}


@pytest.mark.parametrize(
    ("node", "left", "right"),
    [
        (_node(2.0), [2.0, -INF, NAN], [2.1, INF]),  # what was never missing in training is 0 where it is now
        (_node(-2.0), [-2.0], [0.0, NAN]),
        (_node(2.0, "NaN", is_left=False), [2.0], [3.0, NAN]),
        (_node(-2.0, "NaN", is_left=True), [-2.0, NAN], [0.0]),
        (_node("1||3"), [1.0, 3.0, 3.9], [0.0, 2.0, 4.0, -1.0, -0.5, 1e9, NAN, INF]),
        (_node("0", "NaN"), [0.0, -0.5], [-1.0, 1.0, NAN]),
        (None, [], [0.0, NAN, -INF]),
    ],
    ids=["number", "negative", "missing_right", "missing_left", "set", "set_of_first", "no_node"],
)
def test_a_row_goes_where_lightgbm_sends_it(node, left, right) -> None:
    beside = [_node("5", feature=0), _node(0.0, feature=2)]  # control: nodes do not take one another's values
    for value in left + right:
        found = Branching.of([beside[0], node, beside[1]], 3)(np.array([5.0, value, 1.0]))
        assert found.tolist() == [True, value in left or (value != value and any(one != one for one in left)), False]


def test_nodes_to_which_a_zero_is_missing_are_refused() -> None:
    with pytest.raises(ValueError, match="zero_as_missing"):
        Branching.of([_node(1.0, "Zero")], 2)
