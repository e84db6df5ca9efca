"""A column's values -> what is kept of them as a reference; reference + new values -> distances and their p-values.

What is kept does not grow with the rows: bin shares, quantiles, level counts. Nothing here says what is too far.
Rows of one customer are not independent, so p-values count customers: `unit_share` is independent units per row.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from models.evaluation import psi_of_counts

BINS = 10  # quantile bins of the PSI; a value that fills more than one gets a bin of its own
LEVELS = 501  # quantiles kept of a numeric column: W1 and the KS distance are read from them
MAX_CATEGORIES = 50  # rarer levels of a reference column are judged together
MIN_VALUES = 100  # with fewer values on either side nothing is said about their distribution
MIN_EXPECTED = 5  # rarer bins are merged before the chi-square test
SKEWED = 2.0  # skewness beyond which distances are measured on a log scale
OTHER = "(other)"

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Numbers:
    """What is kept of a numeric column. `shares` are those of the bins (-inf, edge], ..., (last edge, inf)."""

    rows: int
    n: int  # rows with a finite value
    unit_share: float
    edges: Array
    shares: Array
    quantiles: Array  # at (i + 0.5) / LEVELS
    grid: Array  # the distinct quantiles,
    cdf: Array  # and the share of values at or below each
    log_unit: float | None  # none: W1 on the raw scale; else on sign(x) log(1 + |x| / log_unit)
    sd: float  # on that scale


@dataclass(frozen=True)
class Categories:
    """What is kept of a categorical column: the counts of its levels, most frequent first."""

    rows: int
    n: int
    unit_share: float
    counts: Mapping[str, int]

    @property
    def is_complete(self) -> bool:
        """Whether every level was kept, so that one not listed is new."""
        return OTHER not in self.counts


Kept = Numbers | Categories


@dataclass(frozen=True)
class Distance:
    """How far a window is from its reference; none where it could not be computed. p-values are not yet corrected."""

    n: int
    null_share: float
    null_share_change: float
    p_value_nulls: float
    psi: float | None = None
    w1: float | None = None  # in reference standard deviations
    p_value: float | None = None
    new_levels: tuple[str, ...] = ()


def keep(column: pd.Series, unit_share: float) -> Kept:
    """The reference of a column. Booleans, text and everything else that is not a number are categories."""
    if is_numeric(column):
        return _keep_numbers(_values(column), unit_share)
    counts = _texts(column).value_counts()
    kept = {str(level): int(n) for level, n in counts.iloc[:MAX_CATEGORIES].items()}
    if len(counts) > MAX_CATEGORIES:
        kept[OTHER] = int(counts.iloc[MAX_CATEGORIES:].sum())
    return Categories(len(column), int(counts.sum()), unit_share, kept)


def measure(reference: Kept, column: pd.Series, unit_share: float) -> Distance:
    """The distance of `column` from its reference. Nulls and values are measured apart."""
    if isinstance(reference, Numbers):
        values = _values(column)
        known = np.sort(values[~np.isnan(values)])
        base = _nulls(reference, len(column), len(known), unit_share)
        return base if min(base.n, reference.n) < MIN_VALUES else _measure_numbers(base, reference, known, unit_share)
    texts = _texts(column)
    base = _nulls(reference, len(column), len(texts), unit_share)
    return base if min(base.n, reference.n) < MIN_VALUES else _measure_texts(base, reference, texts, unit_share)


def is_numeric(column: pd.Series) -> bool:
    """Whether the column is judged as numbers."""
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def adjust(p_values: Array) -> Array:
    """Benjamini and Hochberg: the same p-values, corrected for having looked at all of them."""
    return np.asarray(stats.false_discovery_control(p_values)) if len(p_values) else p_values


# -- what is kept ------------------------------------------------------------------------------------------------------


def _values(column: pd.Series) -> Array:
    """(rows,) float64. Infinities count as missing: no bin holds them honestly."""
    numbers = column if is_numeric(column) else pd.to_numeric(column, errors="coerce")
    values = numbers.to_numpy(dtype=np.float64, na_value=np.nan)
    return np.where(np.isinf(values), np.nan, values)


def _texts(column: pd.Series) -> pd.Series:
    return column.dropna().astype(str)


def _keep_numbers(values: Array, unit_share: float) -> Numbers:
    known = np.sort(values[~np.isnan(values)])
    if not len(known):
        none = np.zeros(0)
        return Numbers(len(values), 0, unit_share, none, none, none, none, none, None, 0.0)
    quantiles, edges, log_unit = _quantiles(known), _edges(known), _log_unit(known)
    grid = np.unique(quantiles)
    with np.errstate(over="ignore", invalid="ignore"):
        sd = float(np.std(_scaled(known, log_unit)))
    return Numbers(
        rows=len(values),
        n=len(known),
        unit_share=unit_share,
        edges=edges,
        shares=_bin_counts(known, edges) / len(known),
        quantiles=quantiles,
        grid=grid,
        cdf=np.searchsorted(known, grid, side="right") / len(known),
        log_unit=log_unit,
        sd=sd if np.isfinite(sd) else 0.0,
    )


def _quantiles(ordered: Array) -> Array:
    return ordered[((np.arange(LEVELS) + 0.5) / LEVELS * len(ordered)).astype(np.int64)]


def _edges(ordered: Array) -> Array:
    """Quantile edges. A value that holds more than one quantile gets an edge just below it too, and so its own bin."""
    at, times = np.unique(ordered[(np.arange(1, BINS) * len(ordered)) // BINS], return_counts=True)
    return np.unique(np.concatenate([at, np.nextafter(at[times > 1], -np.inf)]))


def _bin_counts(ordered: Array, edges: Array) -> Array:
    """Counts of sorted values in (-inf, e0], (e0, e1], ..., (last, inf)."""
    return np.diff(np.searchsorted(ordered, edges, side="right"), prepend=0, append=len(ordered)).astype(np.float64)


def _log_unit(ordered: Array) -> float | None:
    """A skewed column's unit: the tenth percentile of its magnitudes, so that cents and euros give the same distance."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        centred = ordered - ordered.mean()
        skewness = abs(np.mean(centred**3)) / np.mean(centred**2) ** 1.5
    if not np.isfinite(skewness) or skewness <= SKEWED:
        return None
    return float(np.quantile(np.abs(ordered[ordered != 0]), 0.1, method="inverted_cdf"))


def _scaled(values: Array, log_unit: float | None) -> Array:
    return values if log_unit is None else np.sign(values) * np.log1p(np.abs(values) / log_unit)


# -- how far -----------------------------------------------------------------------------------------------------------


def _nulls(reference: Kept, rows: int, n: int, unit_share: float) -> Distance:
    before, now = 1 - reference.n / reference.rows if reference.rows else 0.0, 1 - n / rows if rows else 0.0
    p_value = _p_shares(np.array([before, 1 - before]), reference.rows * reference.unit_share, np.array([now, 1 - now]), rows * unit_share)
    return Distance(n, now, now - before, p_value)


def _measure_numbers(base: Distance, reference: Numbers, ordered: Array, unit_share: float) -> Distance:
    n, m = base.n * unit_share, reference.n * reference.unit_share
    shares = _bin_counts(ordered, reference.edges) / len(ordered)
    gap = np.abs(np.searchsorted(ordered, reference.grid, side="right") / len(ordered) - reference.cdf).max()
    p_ks = float(stats.kstwobign.sf(gap * np.sqrt(n * m / (n + m))))
    # Chi-square sees changes of spread, Kolmogorov and Smirnov shifts of place: the better of the two, paid for by doubling.
    p_value = min(1.0, 2 * min(p_ks, _p_shares(reference.shares, m, shares, n)))
    psi = psi_of_counts(reference.shares * reference.n, shares * base.n)
    return Distance(base.n, base.null_share, base.null_share_change, base.p_value_nulls, psi, _w1(reference, ordered), p_value)


def _measure_texts(base: Distance, reference: Categories, texts: pd.Series, unit_share: float) -> Distance:
    found = texts.value_counts()
    new = found.index.difference(pd.Index(reference.counts))
    levels = [*reference.counts, *(() if OTHER in reference.counts else (OTHER,))]
    counts = found.reindex(pd.Index(levels), fill_value=0).to_numpy(dtype=np.float64)
    counts[levels.index(OTHER)] += found.loc[new].sum()
    before = np.array([reference.counts.get(level, 0) for level in levels]) / reference.n
    shares = counts / base.n
    return Distance(
        base.n,
        base.null_share,
        base.null_share_change,
        base.p_value_nulls,
        psi=psi_of_counts(before * reference.n, shares * base.n),
        p_value=_p_shares(before, reference.n * reference.unit_share, shares, base.n * unit_share),
        new_levels=tuple(map(str, new)) if reference.is_complete else (),
    )


def _w1(reference: Numbers, ordered: Array) -> float | None:
    """Mean distance of the quantiles; none for a constant reference, whose bins say all there is to say."""
    if reference.sd <= 0:
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        apart = np.abs(_scaled(_quantiles(ordered), reference.log_unit) - _scaled(reference.quantiles, reference.log_unit)).mean()
    return float(apart / reference.sd) if np.isfinite(apart) else None


def _p_shares(before: Array, m: float, now: Array, n: float) -> float:
    """p-value of equal shares in two samples of `m` and `n` independent units: chi-square, rare bins merged."""
    pooled = (before * m + now * n) / (m + n) if m + n > 0 else before
    rare = pooled * min(m, n) < MIN_EXPECTED
    before, now, pooled = (np.append(side[~rare], side[rare].sum()) for side in (before, now, pooled))
    filled = pooled > 0
    if filled.sum() < 2:
        return 1.0
    pooled = np.maximum(pooled, MIN_EXPECTED / min(m, n))  # what is still rare after merging would overstate its evidence
    statistic = ((now - before)[filled] ** 2 / pooled[filled]).sum() * m * n / (m + n)
    return float(stats.chi2.sf(statistic, filled.sum() - 1))
