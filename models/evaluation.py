"""Labels and scores -> numbers that say how good the scores are, with intervals. Never fits, ranks or draws a model.

Every metric of rows takes an optional weight per row, so that one bootstrap serves them all: a draw of customers is a
weight. A metric that cannot be formed (one class only, nobody with a relevant item) is NaN, never a made-up number.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], float]  # the weight of each row -> the number


class Metric(Protocol):
    """A number formed from labels, scores and the weight of each row."""

    def __call__(self, label: ArrayLike, score: ArrayLike, /, *, weight: ArrayLike | None = None) -> float: ...


@dataclass(frozen=True)
class Interval:
    """A number and the bounds of its confidence interval; `value` is that of the whole sample, not the mean of the draws."""

    value: float
    low: float
    high: float


# -- scores of rows ----------------------------------------------------------------------------------------------------


def auc(label: ArrayLike, score: ArrayLike, *, weight: ArrayLike | None = None) -> float:
    """Probability that a random positive outranks a random negative, a tie counting half; NaN with one class only.

    label: (n,) of 0/1; score: (n,), any scale, infinities allowed, NaN refused.
    """
    y, s, w = _binary(label, score, weight)
    return _concordance(s, w * y, w * (1.0 - y))


def expected_auc(probability: ArrayLike, score: ArrayLike) -> float:
    """The AUC that `score` has on average over labels drawn from `probability`, without drawing any; O(n log n).

    With p of 0 and 1 it equals `auc`. Numerator and denominator are averaged apart, as is usual for large n:
    sum_ij p_i (1 - p_j) [1{s_i > s_j} + 1{s_i = s_j} / 2] / (sum p * sum (1 - p)).
    """
    p, s = _floats("probability", probability), _floats("score", score)
    _check_lengths(p, s)
    _check_unit(p)
    return _concordance(s, p, 1.0 - p)


def average_precision(label: ArrayLike, score: ArrayLike, *, weight: ArrayLike | None = None) -> float:
    """Area under the precision-recall steps, one step for each distinct score; NaN without positives."""
    y, s, w = _binary(label, score, weight)
    order = np.argsort(-s)
    ends = _ends(s[order])
    hits, shown = np.cumsum((w * y)[order])[ends], np.cumsum(w[order])[ends]
    if not hits.size or hits[-1] == 0:
        return float("nan")
    precision = np.divide(hits, shown, out=np.zeros_like(hits), where=shown > 0)
    return float(np.sum(np.diff(hits, prepend=0.0) * precision) / hits[-1])


def log_loss(label: ArrayLike, probability: ArrayLike, *, weight: ArrayLike | None = None) -> float:
    """Mean negative log-likelihood in nats; probabilities are kept 1e-15 away from 0 and 1."""
    y, p, w = _binary(label, probability, weight)
    _check_unit(p)
    p = np.clip(p, 1e-15, 1 - 1e-15)
    return _mean(-np.where(y == 1, np.log(p), np.log1p(-p)), w)


def brier(label: ArrayLike, probability: ArrayLike, *, weight: ArrayLike | None = None) -> float:
    """Mean squared difference between probability and label (Brier 1950)."""
    y, p, w = _binary(label, probability, weight)
    _check_unit(p)
    return _mean((p - y) ** 2, w)


def expected_calibration_error(label: ArrayLike, probability: ArrayLike, *, bins: int = 15) -> float:
    """Mean distance between predicted and observed rate over bins of equal mass, weighted by their rows.

    Equal probabilities share a bin, so the order of rows never matters. Even a perfect model has a positive value by
    chance, of the order of sqrt(bins / n): read it beside the Brier score. Source: Naeini et al., AAAI 2015.
    """
    y, p, _ = _binary(label, probability, None)
    _check_unit(p)
    if not y.size:
        return float("nan")
    edges = np.quantile(p, np.linspace(0, 1, bins + 1)[1:-1])
    bucket = np.searchsorted(edges, p, side="right")
    gap = np.bincount(bucket, weights=p - y, minlength=bins)
    return float(np.abs(gap).sum() / y.size)


# -- lists of items ----------------------------------------------------------------------------------------------------


def ndcg_at_k(items: ArrayLike, relevant: Any, *, k: int) -> float:
    """Mean of `ndcg_by_customer` over the customers with something relevant; NaN if there is none."""
    return _nanmean(ndcg_by_customer(items, relevant, k=k))


def recall_at_k(items: ArrayLike, relevant: Any, *, k: int) -> float:
    """Mean of `recall_by_customer` over the customers with something relevant; NaN if there is none."""
    return _nanmean(recall_by_customer(items, relevant, k=k))


def mrr(items: ArrayLike, relevant: Any, *, k: int) -> float:
    """Mean of `reciprocal_rank_by_customer` over the customers with something relevant; NaN if there is none."""
    return _nanmean(reciprocal_rank_by_customer(items, relevant, k=k))


def ndcg_by_customer(items: ArrayLike, relevant: Any, *, k: int) -> Floats:
    """Binary-gain NDCG of each list, over the best that this customer's relevant items allow; NaN without any.

    items: (m, >= 1) best first, -1 for an empty place; relevant: sparse (m, n_items), entries > 0 are relevant.
    Source: Jarvelin & Kekalainen, TOIS 2002.
    """
    hits, n_relevant = _hits(items, relevant, k)
    discount = 1.0 / np.log2(np.arange(2, k + 2))
    ideal = np.concatenate([[np.nan], np.cumsum(discount)])[np.minimum(n_relevant, k)]
    return np.asarray(hits @ discount[: hits.shape[1]] / ideal)


def recall_by_customer(items: ArrayLike, relevant: Any, *, k: int) -> Floats:
    """Share of each customer's relevant items that are in the first k; NaN without any."""
    hits, n_relevant = _hits(items, relevant, k)
    return np.asarray(hits.sum(axis=1) / np.where(n_relevant > 0, n_relevant, np.nan))


def reciprocal_rank_by_customer(items: ArrayLike, relevant: Any, *, k: int) -> Floats:
    """1 / rank of the first relevant item of each list, 0 if it is not among the first k; NaN without relevant items."""
    hits, n_relevant = _hits(items, relevant, k)
    rank = np.where(hits.any(axis=1), 1.0 / (hits.argmax(axis=1) + 1), 0.0)
    return np.where(n_relevant > 0, rank, np.nan)


def coverage(items: ArrayLike, n_items: int) -> float:
    """Share of the catalogue that appears in at least one list; empty places (-1) do not count."""
    shown = np.unique(np.asarray(items))
    return float(np.count_nonzero(shown >= 0) / n_items)


def rank_correlation(left: ArrayLike, right: ArrayLike) -> float:
    """Spearman's, of two columns (n,); NaN where one of them says the same of everybody."""
    from scipy.stats import rankdata

    a, b = rankdata(_floats("left", left)), rankdata(_floats("right", right))
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) and np.ptp(b) else float("nan")


def psi(reference: ArrayLike, values: ArrayLike, *, bins: int = 10) -> float:
    """Population stability index of `values` against quantile bins of `reference`; 0: the same shares, above 0.1 worth a look.

    Both (n,), finite.
    """
    before, now = _floats("reference", reference), _floats("values", values)
    edges = np.unique(np.quantile(before, np.linspace(0, 1, bins + 1)[1:-1]))
    return psi_of_counts(*(np.bincount(np.searchsorted(edges, side, side="right"), minlength=edges.size + 1) for side in (before, now)))


def psi_of_counts(before: ArrayLike, now: ArrayLike) -> float:
    """As `psi`, of the rows in each bin (n_bins,). Half a row is added to each, so that an empty one gives a finite figure."""
    p, q = _floats("before", before) + 0.5, _floats("now", now) + 0.5
    p, q = p / p.sum(), q / q.sum()
    return float(((q - p) * np.log(q / p)).sum())


# -- intervals ---------------------------------------------------------------------------------------------------------


def paired_bootstrap(statistic: Statistic, units: ArrayLike, *, draws: int, seed: int, level: float = 0.95) -> Interval:
    """Percentile interval of a statistic when whole units (customers) are drawn again with replacement.

    statistic: weight (n,) -> number, e.g. `difference(auc, label, ours, theirs)`: both sides see the same draw.
    units: (n,) the customer of each row; rows of one customer stay together. Draws on which the statistic is NaN are
    left out; the bounds are NaN if none is left. Same seed, same interval. Source: Efron & Tibshirani 1993, ch. 13.
    """
    codes = np.unique(np.asarray(units), return_inverse=True)[1].ravel()
    if not codes.size:
        raise ValueError("paired_bootstrap: expected at least one row, found none")
    n_units, rng = int(codes.max()) + 1, np.random.default_rng(seed)
    values = np.empty(draws)
    for draw in range(draws):
        times = np.bincount(rng.integers(0, n_units, n_units), minlength=n_units)
        values[draw] = statistic(times[codes].astype(np.float64))
    values = values[np.isfinite(values)]
    value = statistic(np.ones(codes.size))
    if not values.size:
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def leads(
    metric: Metric, label: ArrayLike, score: ArrayLike, rivals: Mapping[str, ArrayLike], units: ArrayLike, *, draws: int, seed: int
) -> dict[str, Interval]:
    """By rival, the metric of `score` minus the rival's, with `paired_bootstrap`'s interval; all on the same draws."""
    return {
        name: paired_bootstrap(difference(metric, label, score, rival), units, draws=draws, seed=seed) for name, rival in rivals.items()
    }


def difference(metric: Metric, label: ArrayLike, score: ArrayLike, rival_score: ArrayLike) -> Statistic:
    """The metric of `score` minus that of `rival_score` on the same rows, for `paired_bootstrap`."""
    return lambda weight: metric(label, score, weight=weight) - metric(label, rival_score, weight=weight)


def mean_difference(values: ArrayLike, rival_values: ArrayLike) -> Statistic:
    """Mean of `values` minus `rival_values`, for `paired_bootstrap`; rows that are NaN in either do not count.

    For ranking: the NDCG by customer of two recommenders, one row a customer.
    """
    gap = np.asarray(values, dtype=np.float64) - np.asarray(rival_values, dtype=np.float64)
    counts = np.isfinite(gap)
    return lambda weight: _mean(gap[counts], weight[counts])


# -- private -----------------------------------------------------------------------------------------------------------


def _concordance(score: Floats, positive: Floats, negative: Floats) -> float:
    """Share of (positive, negative) mass in the right order, ties half; `positive`, `negative`: mass of each row."""
    order = np.argsort(score)  # ties need no order: their masses are summed
    ends = _ends(score[order])
    below_or_tied = np.cumsum(negative[order])[ends]
    total = positive.sum() * negative.sum()
    if total <= 0:
        return float("nan")
    tied = np.diff(below_or_tied, prepend=0.0)
    mass = np.diff(np.cumsum(positive[order])[ends], prepend=0.0)
    return float(np.sum(mass * (below_or_tied - tied / 2)) / total)


def _ends(ordered: Floats) -> NDArray[np.intp]:
    """The last position of each run of equal values."""
    return np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True)) if ordered.size else np.empty(0, dtype=np.intp)


def _hits(items: ArrayLike, relevant: Any, k: int) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which places (m, <= k) hold a relevant item, a repeated item counting once, and how many are relevant (m,)."""
    listed = np.asarray(items)[:, :k].astype(np.int64)
    relevant = relevant.tocsr()
    m, n_items = relevant.shape
    if listed.shape[0] != m or (listed.size and listed.max() >= n_items):
        raise ValueError(f"ranking metric: expected lists for {m} customers of items below {n_items}, found shape {listed.shape}")
    rows = np.repeat(np.arange(m, dtype=np.int64), np.diff(relevant.indptr))
    wanted = rows * n_items + relevant.indices
    wanted = np.unique(wanted[relevant.data > 0])
    asked = (np.arange(m, dtype=np.int64)[:, None] * n_items + listed).ravel()
    found = np.flatnonzero(np.isin(asked, wanted) & (listed.ravel() >= 0))
    first = np.unique(asked[found], return_index=True)[1]
    hits = np.zeros(listed.size, dtype=bool)
    hits[found[first]] = True
    return hits.reshape(listed.shape), np.bincount(wanted // n_items, minlength=m)


def _binary(label: ArrayLike, score: ArrayLike, weight: ArrayLike | None) -> tuple[Floats, Floats, Floats]:
    y, s = _floats("label", label), _floats("score", score)
    w = np.ones_like(y) if weight is None else _floats("weight", weight)
    _check_lengths(y, s, w)
    if not np.all((y == 0) | (y == 1)):
        raise ValueError("metric: labels must be 0 or 1; found others")
    return y, s, w


def _floats(name: str, values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or np.isnan(array).any():
        raise ValueError(f"metric: {name} must be one number for each row, never NaN; found shape {array.shape}")
    return array


def _check_lengths(*arrays: Floats) -> None:
    if len({array.size for array in arrays}) > 1:
        raise ValueError(f"metric: expected as many labels as scores and weights, found {[array.size for array in arrays]}")


def _check_unit(probability: Floats) -> None:
    if probability.size and (probability.min() < 0 or probability.max() > 1):
        raise ValueError(f"metric: probabilities must lie in [0, 1]; found {probability.min():g} to {probability.max():g}")


def _mean(values: Floats, weight: Floats) -> float:
    total = weight.sum()
    return float(values @ weight / total) if total > 0 else float("nan")


def _nanmean(values: Floats) -> float:
    counted = values[~np.isnan(values)]
    return float(counted.mean()) if counted.size else float("nan")
