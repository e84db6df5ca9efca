"""May a new version take the place of the champion? Both on the same test, several questions, each answered in a sentence.

In: what the new version and the champion gave for the same test. Out: checks. A classifier is asked by its rows (`examine`), lists and
segments by the same questions and some of their own. Never promotes, never looks at a row twice in order to choose.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from models import evaluation
from models.evaluation import Interval, Metric, Statistic
from pipelines.settings import Settings

TIMED_CALLS = 101
GROUP_DRAWS = 200


Gain = Callable[[np.ndarray], Statistic]  # of the metric over the champion: positions of rows (m,) -> a function of their weights (m,)


@dataclass(frozen=True)
class Sheet:
    """The test rows as the gate reads them. groups: protected columns; score_one: scores one row, to be timed."""

    metric: Metric
    label: np.ndarray
    probability: np.ndarray
    customers: pd.Series
    groups: pd.DataFrame
    score_one: Callable[[], object]


@dataclass(frozen=True)
class Check:
    """One question of the gate, whether it was answered well, and what was found."""

    name: str
    holds: bool
    found: str
    gain: Interval | None = None  # of the metric over the champion, where that was asked


@dataclass(frozen=True)
class Verdict:
    """What came of the gate. value: the metric of the champion on the same test."""

    value: float
    checks: tuple[Check, ...]


def examine(sheet: Sheet, champion: np.ndarray, *, is_newer: bool, settings: Settings) -> tuple[Check, ...]:
    """The checks of a classifier against the champion's probabilities of the same rows. is_newer: it was made of newer data."""
    options = settings.monitoring

    def gain(rows: np.ndarray) -> Statistic:
        return evaluation.difference(sheet.metric, sheet.label[rows], sheet.probability[rows], champion[rows])

    def can_be_judged(rows: np.ndarray) -> bool:
        positives = sheet.label[rows].sum()
        return len(rows) >= options.min_group and min(positives, len(rows) - positives) >= options.min_group_positives

    return (
        quality(gain, sheet.customers, is_newer=is_newer, settings=settings),
        groups(gain, sheet.customers, sheet.groups, can_be_judged, settings=settings),
        calibration(sheet, champion, settings=settings),
        latency(sheet.score_one, "row", settings.gate.max_row_ms),
    )


def quality(gain: Gain, customers: ArrayLike, *, is_newer: bool, settings: Settings) -> Check:
    """Better, by the whole of a paired bootstrap's interval; of newer data it is enough not to be worse.

    Not worse: the interval does not lie below 0, and no more than `gate.tolerated_loss` is lost. customers: (n,) whose each row is.
    """
    options, limit, units = settings.training, settings.gate.tolerated_loss, np.asarray(customers)
    found = evaluation.paired_bootstrap(gain(np.arange(len(units))), units, draws=options.bootstrap_draws, seed=options.seed)
    said = f"{found.value:+.4f} ({found.low:+.4f} to {found.high:+.4f}) against the champion"
    if not is_newer:
        return Check("better", found.low > 0, f"{said}, of data no newer than its own: an interval above 0 is needed", found)
    return Check(
        "not worse", found.high >= 0 and found.value >= -limit, f"{said}, of newer data: up to {limit:g} may be lost by chance", found
    )


def groups(
    gain: Gain, customers: ArrayLike, columns: pd.DataFrame, can_be_judged: Callable[[np.ndarray], bool], *, settings: Settings
) -> Check:
    """No protected group that is large enough loses more than `gate.group_loss`, beyond what the draw of its customers explains.

    columns: the protected traits (n rows) that form the groups; null belongs to none.
    """
    limit, units, judged, worst = settings.gate.group_loss, np.asarray(customers), 0, []
    for name, rows in each_group(columns):
        if not can_be_judged(rows):
            continue
        judged += 1
        found = evaluation.paired_bootstrap(gain(rows), units[rows], draws=GROUP_DRAWS, seed=settings.training.seed)
        if found.value < -limit and found.high < 0:
            worst.append(f"{name} {found.value:+.4f} ({found.low:+.4f} to {found.high:+.4f})")
    said = "; ".join(worst) or f"none of {judged} groups loses"
    return Check("no group worse", not worst, f"{said}; {limit:g} may be lost")


def calibration(sheet: Sheet, champion: np.ndarray, *, settings: Settings) -> Check:
    """The calibration error is within `gate.max_ece`, or no larger than the champion's."""
    limit = settings.gate.max_ece
    ours, theirs = (evaluation.expected_calibration_error(sheet.label, p) for p in (sheet.probability, champion))
    return Check(
        "calibrated", ours <= limit or ours <= theirs, f"calibration error {ours:.4f}, the champion's {theirs:.4f}, limit {limit:g}"
    )


def coverage(ours: float, theirs: float, *, settings: Settings) -> Check:
    """The lists show no less of the catalogue, but for `gate.coverage_loss` of what the champion's show."""
    limit = settings.gate.coverage_loss
    said = f"{ours:.1%} of the catalogue in the lists, the champion's {theirs:.1%}; {limit:.0%} of that may be lost"
    return Check("as varied", ours >= (1 - limit) * theirs, said)


def stability(ours: float, theirs: float, *, settings: Settings) -> Check:
    """The least stable segment is found again in `gate.min_stability` (Jaccard) of other draws, or no less than the champion's."""
    limit = settings.gate.min_stability
    said = f"the least stable segment has a Jaccard of {ours:.2f}, the champion's {theirs:.2f}, limit {limit:g}"
    return Check("stable", ours >= limit or ours >= theirs, said)


def kept(share: float, *, settings: Settings) -> Check:
    """At least `gate.min_kept` of the customers stay in a segment of the same name: a name goes on meaning what it meant."""
    limit = settings.gate.min_kept
    return Check("the same names", share >= limit, f"{share:.1%} of customers stay in a segment of the same name, {limit:.0%} are needed")


def latency(call: Callable[[], object], what: str, limit_ms: float) -> Check:
    """The median time of one call is within the limit."""
    times = []
    for _ in range(TIMED_CALLS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    found = 1_000 * float(np.median(times))
    return Check("fast", found <= limit_ms, f"{found:.2f} ms a {what}, limit {limit_ms:g} ms")


def each_group(columns: pd.DataFrame) -> Iterator[tuple[str, np.ndarray]]:
    """Each group's name with the positions of its rows: the values of each column; null belongs to none."""
    for column in columns.columns:
        for value, rows in columns.groupby(column, observed=True).indices.items():
            yield f"{column} {value}", np.asarray(rows)
