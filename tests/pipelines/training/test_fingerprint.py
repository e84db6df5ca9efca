import numpy as np
import pandas as pd
from scipy import sparse

from pipelines.training.fingerprint import fingerprint


def rows(n):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"spend": rng.normal(size=n), "region": rng.choice(["north", "south"], n)})
    return frame, (rng.random(n) < 0.5).astype(float)


def test_fingerprint_sees_values_order_names_and_types():
    frame, label = rows(5)
    same = fingerprint(frame.copy(), label.copy())
    assert fingerprint(frame, label) == same
    for other in (
        frame.iloc[::-1],
        frame.rename(columns={"spend": "spent"}),
        frame.assign(spend=frame["spend"] + 1e-12),
        frame.assign(spend=frame["spend"].astype("float32")),
    ):
        assert fingerprint(other, label) != same
    assert fingerprint(frame, 1 - label) != same
    matrix = sparse.csr_matrix(np.eye(3))
    assert fingerprint(matrix) != fingerprint(sparse.csr_matrix(np.eye(3)[::-1]))
