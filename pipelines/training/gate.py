"""May a new version take the place of the champion? Both on the same test rows, four questions, each answered in a sentence.

In: the test rows with the new version's probabilities and the champion's. Out: checks. Never promotes, never looks at a row twice in
order to choose.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from models import evaluation
from models.evaluation import Interval, Metric
from pipelines.settings import Settings

TIMED_ROWS = 101
GROUP_DRAWS = 200


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


def examine(sheet: Sheet, champion: np.ndarray, *, is_newer: bool, settings: Settings) -> tuple[Check, ...]:
    """The checks of a new version against the champion's probabilities of the same rows. is_newer: it was made of newer data."""
    return (
        quality(sheet, champion, is_newer=is_newer, settings=settings),
        groups(sheet, champion, settings=settings),
        calibration(sheet, champion, settings=settings),
        latency(sheet, settings=settings),
    )


def quality(sheet: Sheet, champion: np.ndarray, *, is_newer: bool, settings: Settings) -> Check:
    """Better, by the whole of a paired bootstrap's interval; of newer data it is enough not to be worse.

    Not worse: the interval does not lie below 0, and no more than `gate.tolerated_loss` is lost.
    """
    options, limit = settings.training, settings.gate.tolerated_loss
    gain = evaluation.paired_bootstrap(
        evaluation.difference(sheet.metric, sheet.label, sheet.probability, champion),
        sheet.customers,
        draws=options.bootstrap_draws,
        seed=options.seed,
    )
    found = f"{gain.value:+.4f} ({gain.low:+.4f} to {gain.high:+.4f}) against the champion"
    if not is_newer:
        return Check("better", gain.low > 0, f"{found}, of data no newer than its own: an interval above 0 is needed", gain)
    return Check(
        "not worse", gain.high >= 0 and gain.value >= -limit, f"{found}, of newer data: up to {limit:g} may be lost by chance", gain
    )


def groups(sheet: Sheet, champion: np.ndarray, *, settings: Settings) -> Check:
    """No protected group of some size loses more than `gate.group_loss`, beyond what the draw of its customers explains."""
    limit, judged, worst = settings.gate.group_loss, 0, []
    for name, rows in _groups(sheet, settings):
        judged += 1
        label, ours, theirs = sheet.label[rows], sheet.probability[rows], champion[rows]
        gain = evaluation.paired_bootstrap(
            evaluation.difference(sheet.metric, label, ours, theirs),
            np.asarray(sheet.customers)[rows],
            draws=GROUP_DRAWS,
            seed=settings.training.seed,
        )
        if gain.value < -limit and gain.high < 0:
            worst.append(f"{name} {gain.value:+.4f} ({gain.low:+.4f} to {gain.high:+.4f})")
    found = "; ".join(worst) or f"none of {judged} groups loses"
    return Check("no group worse", not worst, f"{found}; {limit:g} may be lost")


def calibration(sheet: Sheet, champion: np.ndarray, *, settings: Settings) -> Check:
    """The calibration error is within `gate.max_ece`, or no larger than the champion's."""
    limit = settings.gate.max_ece
    ours, theirs = (evaluation.expected_calibration_error(sheet.label, p) for p in (sheet.probability, champion))
    return Check(
        "calibrated", ours <= limit or ours <= theirs, f"calibration error {ours:.4f}, the champion's {theirs:.4f}, limit {limit:g}"
    )


def latency(sheet: Sheet, *, settings: Settings) -> Check:
    """The median time of one row is within `gate.max_row_ms`."""
    limit, times = settings.gate.max_row_ms, []
    for _ in range(TIMED_ROWS):
        start = time.perf_counter()
        sheet.score_one()
        times.append(time.perf_counter() - start)
    found = 1_000 * float(np.median(times))
    return Check("fast", found <= limit, f"{found:.2f} ms a row, limit {limit:g} ms")


def _groups(sheet: Sheet, settings: Settings) -> Iterator[tuple[str, np.ndarray]]:
    """Groups that are large enough to be judged, by name, with the positions of their rows."""
    options = settings.monitoring
    for column in sheet.groups.columns:
        for value, rows in sheet.groups.groupby(column, observed=True).indices.items():
            positives = sheet.label[rows].sum()
            if len(rows) >= options.min_group and min(positives, len(rows) - positives) >= options.min_group_positives:
                yield f"{column} {value}", np.asarray(rows)
