import numpy as np
import pytest
from scipy import sparse

from models import exposure


def test_equal_attention_has_no_inequality_and_one_item_for_all_nearly_the_most() -> None:
    assert exposure.gini([[0, 1], [2, 3]], 4) == pytest.approx(0.0)
    assert exposure.gini([[0], [0], [-1]], 4) == pytest.approx(0.75)
    assert exposure.gini([[0, 1], [0, 2]], 3) == pytest.approx(exposure.gini([[2, 1], [2, 0]], 3))
    assert np.isnan(exposure.gini([[-1]], 4))


def test_novelty_is_the_surprise_of_owning_the_item() -> None:
    bought = sparse.csr_matrix(np.array([[1, 1, 0], [1, 0, 0], [1, 0, 0], [1, 1, 0]]))
    assert exposure.novelty([[0]], bought) == 0.0
    assert exposure.novelty([[1]], bought) == 1.0
    assert exposure.novelty([[2, -1]], bought) == 2.0
    assert exposure.novelty([[0], [1]], bought) == 0.5
    assert np.isnan(exposure.novelty([[-1]], bought))
