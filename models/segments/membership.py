"""The segments of customers at two times -> how much has moved: shares, flows, and whether it is more than chance and more than little.

In: a segment for each customer, at both times. Out: numbers about all of them. Names nobody.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

NOWHERE = "none"  # the row and column of customers without a segment
SMALL_EFFECT = 0.1  # Cramer's V below it is negligible (Cohen 1988, ch. 7)
PSI_LIMIT = 0.1  # below: no shift worth looking at; 0.25 and above: a large one (Siddiqi 2006, ch. 8)
SIGNIFICANCE = 0.05
FLOOR = 1e-4  # least share that the index counts with: it has no value at 0


@dataclass(frozen=True)
class Movement:
    """`flows`: customers of both times, from (rows) and to (columns). share_moved: of these; NaN without any.

    psi, chi_square, p_value, cramers_v: of the shares of all segments at the two times, customers of one time only included.
    Where both times hold the same customers the test is on the careful side: they are counted as if they were others.
    """

    flows: pd.DataFrame
    n_before: int
    n_after: int
    share_moved: float
    psi: float
    chi_square: float
    p_value: float
    cramers_v: float

    @property
    def is_material(self) -> bool:
        """Whether the shares moved by more than chance and by more than little."""
        return self.p_value < SIGNIFICANCE and (self.cramers_v >= SMALL_EFFECT or self.psi >= PSI_LIMIT)


def movement(before: pd.Series, after: pd.Series) -> Movement:
    """From `before` to `after`: segments by customer (the index), null for none. Raises ValueError on a customer twice."""
    for name, some in (("before", before), ("after", after)):
        if not some.index.is_unique:
            raise ValueError(f"movement: expected each customer once, found some twice {name}")
    left, right = before.astype(object).where(before.notna(), NOWHERE), after.astype(object).where(after.notna(), NOWHERE)
    both = left.index.intersection(right.index)
    names = sorted({*left.unique(), *right.unique()})
    old, new = (pd.Categorical(some.loc[both], categories=names) for some in (left, right))
    flows = pd.crosstab(old, new, rownames=["before"], colnames=["after"], dropna=False)
    counts = np.array([some.value_counts().reindex(names, fill_value=0).to_numpy() for some in (left, right)], dtype=np.float64)
    chi_square, p_value, cramers_v = _chi_square(counts)
    moved = float(np.mean(old != new)) if len(both) else float("nan")
    return Movement(flows, len(left), len(right), moved, _psi(counts), chi_square, p_value, cramers_v)


def _psi(counts: np.ndarray) -> float:
    if not counts.size or not counts.sum(axis=1).all():
        return float("nan")
    shares = np.maximum(counts / counts.sum(axis=1, keepdims=True), FLOOR)
    return float(np.sum((shares[1] - shares[0]) * np.log(shares[1] / shares[0])))


def _chi_square(counts: np.ndarray) -> tuple[float, float, float]:
    """Pearson's statistic of two rows of counts, its p-value, and Cramer's V; no difference can be seen with one segment."""
    from scipy.stats import chi2_contingency

    counts = counts[:, counts.sum(axis=0) > 0]
    if not counts.size or not counts.sum(axis=1).all():
        return float("nan"), float("nan"), float("nan")
    if counts.shape[1] < 2:
        return 0.0, 1.0, 0.0
    found = chi2_contingency(counts, correction=False)
    return float(found.statistic), float(found.pvalue), float(np.sqrt(found.statistic / counts.sum()))
