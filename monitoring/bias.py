"""Test rows with their scores -> how the model treats each protected group against all others. Changes nothing.

Every figure carries its interval, and rests on customers: several rows of one customer count as far as they are independent.
A gap is an alarm only where its whole interval lies beyond the tolerated gap: a perfectly fair model shows a gap of 0.12
between small groups, by chance. Groups too small to tell are named. The difference in base rates is shown beside the
others, since groups that differ in it cannot be equal in selection rate and in true-positive rate at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from monitoring import reports, subjects
from monitoring.distributions import adjust
from pipelines import registry
from pipelines.errors import RegistryError
from pipelines.settings import MonitoringSettings, Settings

JUDGED = ("selection_rate", "true_positive_rate", "calibration", "auc")
CONTEXT = "base_rate"  # describes the groups, not the model: shown, never an alarm
DEFAULT_THRESHOLD = 0.5
CONFIDENCE = 0.95

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class GroupMetric:
    """One metric of one group, and its gap to all other rows whose group is known. verdict: ok | alarm | not_enough_data | context.

    calibration: observed rate minus mean predicted. n: the rows that the metric rests on, `n_effective` what they are worth
    as independent ones. None: there was too little to compute it.
    """

    attribute: str
    group: str
    metric: str
    verdict: str = "not_enough_data"
    n: int = 0
    n_effective: float = 0.0
    value: float | None = None
    low: float | None = None
    high: float | None = None
    rest: float | None = None
    gap: float | None = None
    gap_low: float | None = None
    gap_high: float | None = None
    p_value: float | None = None  # of no gap at all
    p_adjusted: float | None = None  # corrected over all groups and metrics of the report
    why: str = ""


@dataclass(frozen=True)
class Group:
    """How many rows of the test a group has."""

    attribute: str
    group: str
    n: int
    positives: int
    mean_probability: float


@dataclass(frozen=True)
class BiasReport:
    """One model. verdict: ok | alarm | not_enough_data. `not_judged`: protected column -> why."""

    verdict: str
    why: str
    rows: int
    threshold: float
    threshold_source: str
    tolerated_gap: float
    not_judged: Mapping[str, str]
    unknown: Mapping[str, int]  # protected column -> rows left out, their group not being known
    groups: tuple[Group, ...]
    metrics: tuple[GroupMetric, ...]


@dataclass(frozen=True)
class BiasRun:
    """All models: name -> report, or name -> why it was not judged."""

    as_of: str
    verdict: str
    subjects: Mapping[str, BiasReport]
    not_judged: Mapping[str, str]


def judge(
    rows: pd.DataFrame,
    protected: Sequence[str],
    *,
    threshold: float,
    settings: MonitoringSettings,
    threshold_source: str = "given",
    unit: str = "customer_id",
) -> BiasReport:
    """Judge `rows` (label 0/1, probability, one column for each of `protected`, one row a decision) at `threshold`."""
    known = rows[rows["label"].notna() & rows["probability"].notna()].reset_index(drop=True)
    not_judged = {attribute: why for attribute in protected if (why := _why_unusable(known, attribute))}
    usable = [attribute for attribute in protected if attribute not in not_judged]
    groups, metrics = [], []
    for attribute in usable:
        found = _judge_attribute(known[known[attribute].notna()], attribute, threshold, settings, unit)
        groups += found[0]
        metrics += found[1]
    metrics = _conclude(metrics, settings)
    verdict = reports.worst(m.verdict for m in metrics if m.metric != CONTEXT)
    return BiasReport(
        verdict=verdict,
        why=_summary(verdict, metrics),
        rows=len(known),
        threshold=threshold,
        threshold_source=threshold_source,
        tolerated_gap=settings.tolerated_gap,
        not_judged=not_judged,
        unknown={attribute: int(known[attribute].isna().sum()) for attribute in usable},
        groups=tuple(groups),
        metrics=tuple(metrics),
    )


def run(home: Path, *, settings: Settings, as_of: datetime) -> BiasRun:
    """Judge every trained model on its test rows, at the champion's threshold; writes reports/bias.json and reports/bias.html."""
    judged, not_judged, frames = {}, {}, {}
    for name in subjects.names(home):
        table, _ = subjects.tables_of(name)
        why = subjects.why_not_judged(home, name, (table,))
        if why:
            not_judged[name] = why
            continue
        training = subjects.rows(home, name, table)
        rows = training[training["split"] == "test"].reset_index(drop=True)
        threshold, source = _threshold(home, name)
        judged[name] = judge(
            rows, settings.monitoring.protected, threshold=threshold, threshold_source=source, settings=settings.monitoring
        )
        frames[name] = rows
    verdict = reports.worst(report.verdict for report in judged.values())
    result = BiasRun(as_of.isoformat(), verdict, judged, not_judged)
    path = home / "reports" / "bias.json"
    reports.write_json(path, asdict(result))
    reports.write_bias(path.with_suffix(".html"), asdict(result), frames, settings=settings.monitoring)
    return result


# -- what is judged ----------------------------------------------------------------------------------------------------


def _threshold(home: Path, name: str) -> tuple[float, str]:
    try:
        champion = registry.load_champion(home, name)
        return float(champion.manifest["threshold"]), f"champion version {champion.version}"
    except (RegistryError, KeyError):
        return DEFAULT_THRESHOLD, "default, because no champion names one"


def _why_unusable(rows: pd.DataFrame, attribute: str) -> str | None:
    if attribute not in rows:
        return f"{attribute} is not among the data"
    levels = rows[attribute].nunique()
    if levels < 2:
        return f"{attribute} is {'unknown' if levels == 0 else 'the same'} for all {len(rows)} test rows"
    return None


def _judge_attribute(
    rows: pd.DataFrame, attribute: str, threshold: float, settings: MonitoringSettings, unit: str
) -> tuple[list[Group], list[GroupMetric]]:
    """Each group's metrics and their gaps to the rest; verdicts come later, when all gaps are known."""
    codes, levels = pd.factorize(rows[attribute].astype(str), sort=True)
    units = pd.factorize(rows[unit])[0] if unit in rows else np.arange(len(rows))
    label, score = rows["label"].to_numpy(dtype=float), rows["probability"].to_numpy(dtype=float)
    points = _points(label, score >= threshold, np.asarray(levels)[codes])
    groups, metrics = [], []
    for code, level in enumerate(levels):
        inside = codes == code
        group, rest = (_side(label[m], score[m], threshold, units[m]) for m in (inside, ~inside))
        groups.append(Group(attribute, str(level), int(inside.sum()), int(label[inside].sum()), float(score[inside].mean())))
        for metric in (*JUDGED, CONTEXT):
            empty = GroupMetric(attribute, str(level), metric, value=points.get((str(level), metric)))
            metrics.append(_compare(empty, group, rest, settings))
    return groups, metrics


def _points(label: Array, chosen: npt.NDArray[np.bool_], groups: npt.NDArray[np.object_]) -> dict[tuple[str, str], float]:
    """(group, metric) -> point value of the metrics that look at decisions."""
    from fairlearn.metrics import MetricFrame, selection_rate, true_positive_rate

    measures = {"selection_rate": selection_rate, "true_positive_rate": true_positive_rate}
    frame = MetricFrame(metrics=measures, y_true=label.astype(int), y_pred=chosen.astype(int), sensitive_features=groups)
    return {(str(group), str(metric)): float(value) for (group, metric), value in frame.by_group.stack().items()}


# -- one side of a comparison ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Share:
    """A share with what its rows are worth as independent ones."""

    value: float
    n: int
    n_effective: float


@dataclass(frozen=True)
class _Side:
    """A group, or the rest."""

    selection_rate: _Share
    true_positive_rate: _Share
    base_rate: _Share
    mean_probability: float
    auc: float
    auc_variance: float
    n: int
    positives: int


def _side(label: Array, score: Array, threshold: float, units: npt.NDArray[np.int64]) -> _Side:
    positive, chosen = label == 1, (score >= threshold).astype(float)
    auc, variance = _auc(label, score, units)
    return _Side(
        selection_rate=_share(chosen, units),
        true_positive_rate=_share(chosen[positive], units[positive]),
        base_rate=_share(label, units),
        mean_probability=float(score.mean()) if len(score) else np.nan,
        auc=auc,
        auc_variance=variance,
        n=len(label),
        positives=int(positive.sum()),
    )


def _share(hits: Array, units: npt.NDArray[np.int64]) -> _Share:
    """Share of hits. Effective rows: n over the design effect, the variance of sums by customer over that of free rows."""
    n = len(hits)
    if n == 0:
        return _Share(np.nan, 0, 0.0)
    apart = hits - hits.mean()
    free = float((apart**2).sum())
    grouped = float((_sums(apart, units) ** 2).sum())
    return _Share(float(hits.mean()), n, n / max(1.0, grouped / free) if free > 0 else float(len(np.unique(units))))


def _sums(values: Array, units: npt.NDArray[np.int64]) -> Array:
    return np.bincount(units, weights=values).astype(np.float64)


def _auc(label: Array, score: Array, units: npt.NDArray[np.int64]) -> tuple[float, float]:
    """AUC and its variance after DeLong, DeLong and Clarke-Pearson (1988), summed by customer as Obuchowski (1997) does."""
    positive = label == 1
    m, n = int(positive.sum()), int((~positive).sum())
    if m == 0 or n == 0:
        return np.nan, np.nan
    ranks = stats.rankdata(score)
    above = np.empty(len(score))  # of each row: the share of the other class that it is on the right side of
    above[positive] = (ranks[positive] - stats.rankdata(score[positive])) / n
    above[~positive] = 1 - (ranks[~positive] - stats.rankdata(score[~positive])) / m
    auc = float(above[positive].mean())
    influence = (above - auc) / np.where(positive, m, n)
    return auc, float((_sums(influence, units) ** 2).sum())


# -- the comparison ----------------------------------------------------------------------------------------------------


def _compare(found: GroupMetric, inside: _Side, rest: _Side, settings: MonitoringSettings) -> GroupMetric:
    """`found` filled in. Its value stays as given: the point metrics of decisions are fairlearn's."""
    share: _Share = inside.base_rate if found.metric in ("calibration", "auc") else getattr(inside, found.metric)
    found = replace(found, n=share.n, n_effective=share.n_effective, why=_lacking(found.metric, inside, rest, settings))
    if found.why:
        return replace(found, value=None)
    value, low, high, other, gap_low, gap_high, p = (
        _auc_gap(inside, rest) if found.metric == "auc" else _share_gap(found.metric, inside, rest)
    )
    value = value if found.value is None else found.value
    return replace(
        found, verdict="ok", value=value, low=low, high=high, rest=other, gap=value - other, gap_low=gap_low, gap_high=gap_high, p_value=p
    )


def _lacking(metric: str, inside: _Side, rest: _Side, settings: MonitoringSettings) -> str:
    for side, name in ((inside, "the group"), (rest, "the rest")):
        if side.n < settings.min_group:
            return f"{name} has {side.n} rows, {settings.min_group} are needed"
        if metric in ("true_positive_rate", "auc") and side.positives < settings.min_group_positives:
            return f"{name} has {side.positives} positives, {settings.min_group_positives} are needed"
        if metric == "auc" and side.n - side.positives < settings.min_group_positives:
            return f"{name} has {side.n - side.positives} negatives, {settings.min_group_positives} are needed"
    return ""


Compared = tuple[float, float, float, float, float, float, float]  # value, low, high, rest, gap low, gap high, p-value


def _share_gap(metric: str, inside: _Side, rest: _Side) -> Compared:
    """Wilson's interval of the share, Newcombe's of the difference. Calibration: the base rate less what was predicted."""
    from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

    name = "base_rate" if metric == "calibration" else metric
    a, b = getattr(inside, name), getattr(rest, name)
    shift_a, shift_b = (inside.mean_probability, rest.mean_probability) if metric == "calibration" else (0.0, 0.0)
    counts = a.value * a.n_effective, a.n_effective, b.value * b.n_effective, b.n_effective
    low, high = proportion_confint(*counts[:2], alpha=1 - CONFIDENCE, method="wilson")
    gap_low, gap_high = confint_proportions_2indep(*counts, compare="diff", method="newcomb", alpha=1 - CONFIDENCE)
    shift, gap = shift_a - shift_b, a.value - b.value
    se = np.sqrt(a.value * (1 - a.value) / a.n_effective + b.value * (1 - b.value) / b.n_effective)
    return (
        a.value - shift_a, float(low) - shift_a, float(high) - shift_a, b.value - shift_b,
        float(gap_low) - shift, float(gap_high) - shift, _p_value(gap - shift, se),
    )  # fmt: skip


def _auc_gap(inside: _Side, rest: _Side) -> Compared:
    z = stats.norm.ppf(0.5 + CONFIDENCE / 2)
    half, se = z * np.sqrt(inside.auc_variance), np.sqrt(inside.auc_variance + rest.auc_variance)
    gap = inside.auc - rest.auc
    low, high = max(0.0, inside.auc - half), min(1.0, inside.auc + half)
    return inside.auc, float(low), float(high), rest.auc, float(gap - z * se), float(gap + z * se), _p_value(gap, se)


def _p_value(gap: float, se: float) -> float:
    if se == 0:
        return 1.0 if gap == 0 else 0.0
    return float(2 * stats.norm.sf(abs(gap) / se))


def _conclude(metrics: Sequence[GroupMetric], settings: MonitoringSettings) -> list[GroupMetric]:
    """Correct the p-values over all groups and metrics together, and say which gaps are alarms."""
    judged = [i for i, m in enumerate(metrics) if m.p_value is not None and m.metric != CONTEXT]
    adjusted = dict(zip(judged, adjust(np.array([metrics[i].p_value for i in judged], dtype=float)).tolist(), strict=True))
    return [_conclude_one(m, adjusted.get(i), settings.tolerated_gap) for i, m in enumerate(metrics)]


def _conclude_one(found: GroupMetric, p_adjusted: float | None, tolerated: float) -> GroupMetric:
    if found.metric == CONTEXT:
        return replace(found, verdict="context")
    if found.gap_low is None or found.gap_high is None or p_adjusted is None:
        return found
    is_beyond = (found.gap_low > tolerated or found.gap_high < -tolerated) and p_adjusted <= 1 - CONFIDENCE
    why = f"the gap lies between {found.gap_low:+.3f} and {found.gap_high:+.3f}, beyond {tolerated:g}" if is_beyond else ""
    return replace(found, verdict="alarm" if is_beyond else "ok", p_adjusted=p_adjusted, why=why)


def _summary(verdict: str, metrics: Sequence[GroupMetric]) -> str:
    judged = [m for m in metrics if m.metric != CONTEXT]
    counts = {v: sum(m.verdict == v for m in judged) for v in ("alarm", "not_enough_data")}
    if not judged:
        return "no protected column could be judged"
    if verdict == "not_enough_data":
        return f"none of {len(judged)} comparisons rests on enough rows"
    return f"{counts['alarm']} of {len(judged)} comparisons lie beyond the tolerated gap, {counts['not_enough_data']} rest on too few rows"
