"""Labelled rows of a silence -> when it ends: a model of discrete-time hazards, judged on the test rows period by period.

Of churn's two questions the classifier answers whether a customer stays silent through the horizon; this one tells when the next order
comes, as far ahead as `training.when_days` asks. It learns from every period that was watched to its end, also of rows that were not
watched that far. Days count from a row's instant and the gap after it, as for the label. Never sees what came after the test's cut-off.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd

from models import evaluation, hazard
from models.hazard import Hazard, Waits
from pipelines import tables
from pipelines.errors import InputError
from pipelines.settings import Settings
from pipelines.training.publishing import finite
from pipelines.training.rows import Rows

FOLDER = "when"  # of its files in a version, and of what a manifest tells of it
PERIODS = 4  # in the time until a label is known

JUDGED = ["days", "expected", "observed", "auc", "ece", "brier"]


@dataclass(frozen=True)
class Timing:
    """A fitted model and what became of the test rows.

    judged: one row a period that all of them were watched through, columns `JUDGED`: the share of customers expected to have ordered by
    its end and the share that has, and how well who has is told from who has not. came: (n, periods of `judged`), 1 where they have.
    is_kept: it was asked for, and is no mere baseline.
    """

    hazard: Hazard
    survival: np.ndarray  # (n, n_periods) of the test rows
    judged: pd.DataFrame
    came: np.ndarray
    is_kept: bool

    @property
    def silence(self) -> np.ndarray:
        """The probability (n,) that a test row's label asks for: no order until it is known."""
        return np.asarray(self.survival[:, PERIODS - 1])

    def told(self) -> dict[str, object]:
        """As JSON values; what no number could be formed of is null."""
        rows = [{str(name): finite(value) for name, value in row.items()} for row in self.judged.to_dict("records")]
        return {"period_days": self.hazard.period_days, "periods": self.hazard.n_periods, "judged": rows}

    def metrics(self) -> dict[str, float]:
        """What there is of each period that was judged, by name."""
        rows = self.judged.to_dict("records")
        return {f"when_{name}_{row['days']:g}d": float(row[name]) for row in rows for name in JUDGED if name != "days"}


def fit(home: Path, rows: Rows, *, days: float | None, settings: Settings, as_of: datetime) -> Timing | None:
    """Learned from all rows but those of the test, `days` ahead, at least to the horizon; None where the test is of several instants.

    The validation rows stop and calibrate it, then it learns from them too, as the classifier that it stands beside.
    Raises InputError where no more than a few rows were watched, and waited, as far ahead as that.
    """
    is_test, options = rows.frame["split"] == "test", settings.labels
    at = rows.frame.loc[is_test, "event_timestamp"].unique()
    if len(at) != 1:
        return None
    acts = orders(home, settings=settings)
    horizon_days = float((rows.matured[is_test].iloc[0] - at[0]) / timedelta(days=1)) - options.churn_gap_days
    period_days = horizon_days / PERIODS
    n_periods = max(PERIODS, math.ceil((days or 0.0) / period_days - 1e-9))
    seen = acts[acts["created_timestamp"] < at[0]]

    def part(*splits: str) -> tuple[pd.DataFrame, Waits]:
        those = rows.frame[rows.frame["split"].isin(splits)]
        return those[rows.inputs], hazard.waits(those, seen, as_of=at[0], gap_days=options.churn_gap_days)

    if days is not None:
        _require_watched(part("train")[1], days=days, period_days=period_days, n_periods=n_periods, least=options.min_rows)
    model = Hazard(period_days=period_days, n_periods=n_periods, random_state=settings.training.seed)
    model = model.fit(*part("train"), validation=part("validation")).refitted(*part("train", "validation"))
    test = rows.test()
    survival = model.predict_survival(test[rows.inputs])
    later = acts[acts["created_timestamp"] <= pd.Timestamp(as_of)]
    judged, came = _judged(survival, hazard.waits(test, later, as_of=pd.Timestamp(as_of), gap_days=options.churn_gap_days), model)
    return Timing(model, survival, judged, came, is_kept=days is not None)


def orders(home: Path, *, settings: Settings, also: Sequence[str] = ()) -> pd.DataFrame:
    """The events whose absence is churn: type, event_timestamp, created_timestamp, customer_id, and what is asked for besides."""
    acts = tables.read(home, tables.EVENTS, ["type", "event_timestamp", "created_timestamp", "customer_id", *also])
    return acts[(acts["type"] == settings.labels.churn_event) & acts["customer_id"].notna()]


# -- private -----------------------------------------------------------------------------------------------------------


def _require_watched(waited: Waits, *, days: float, period_days: float, n_periods: int, least: int) -> None:
    """Raises InputError where a period has fewer rows than `least`: what trees say of it would be made up."""
    _, period, _ = hazard.person_periods(waited, period_days=period_days, n_periods=n_periods)
    at_risk = np.bincount(period, minlength=n_periods + 1)[1:]
    taught = int((at_risk >= least).sum())  # never more of them in a later period
    if taught < n_periods:
        raise InputError(
            f"training: when_days asks for {days:g} days ahead; {at_risk[-1]:,} rows were watched and waited so far before the test, and "
            f"{least:,} are needed. Ask for {math.floor(taught * period_days)} days or fewer, or give a longer log"
        )


def _judged(survival: np.ndarray, waited: Waits, model: Hazard) -> tuple[pd.DataFrame, np.ndarray]:
    ends = model.period_days * np.arange(1, model.n_periods + 1)
    ends = ends[ends <= waited.followed_days.min() + 1e-9]
    came = (waited.days[:, None] <= ends + 1e-9).astype(np.float64)
    found = []
    for t, label in enumerate(came.T):
        probability = 1.0 - survival[:, t]
        quality = [metric(label, probability) for metric in (evaluation.auc, evaluation.expected_calibration_error, evaluation.brier)]
        found.append((float(ends[t]), float(probability.mean()), float(label.mean()), *quality))
    return pd.DataFrame(found, columns=JUDGED), came
