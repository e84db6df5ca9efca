"""Features and how long each row waited -> when the next order comes: its probability in each period, and that of none by then.

A discrete-time hazard model: every row becomes one row a period that it was still waiting in, a classifier learns whether the wait ended
there, and the periods' hazards multiply to the survival curve. Rows that are still waiting teach what is known of them and nothing
more, so a cut-off may be learned from before its horizon has passed. Never looks at a period that was not watched to its end.
Source: Singer & Willett, Journal of Educational Statistics 1993; Tutz & Schmid, Modeling Discrete Time-to-Event Data, 2016.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from models.classifier import Classifier
from models.learner import Learner, read_json, write_json

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

PERIOD = "hazard_period"  # the column beside the features that says which period it is, from 1
CLASSIFIER = "periods"  # the folder of its files


@dataclass(frozen=True)
class Waits:
    """How long each row waited, both (n,) in days above or at 0. days: to the event, infinite where none was seen; followed_days: how
    long we looked, also where the event came before: only so may periods be left out without leaning to either side."""

    days: Floats
    followed_days: Floats

    def __len__(self) -> int:
        """Rows."""
        return len(self.days)


def waits(rows: pd.DataFrame, events: pd.DataFrame, *, as_of: pd.Timestamp, gap_days: float = 0.0) -> Waits:
    """The wait of each row from its instant, and a gap in which nothing counts, to the customer's next event, as of `as_of`.

    rows: customer_id, event_timestamp, any order; events: those that end a wait, the same columns; later than `as_of` they are not seen.
    A wait of at most h days is what `models.task.follows` calls an event within h.
    """
    opens = (rows["event_timestamp"] + pd.Timedelta(gap_days, "D")).reset_index(drop=True)
    asked = pd.DataFrame({"customer_id": rows["customer_id"].to_numpy(), "event_timestamp": opens})
    asked = asked.reset_index(names="place").sort_values("event_timestamp", kind="stable")
    seen = events.loc[events["event_timestamp"] <= as_of, ["customer_id", "event_timestamp"]].sort_values("event_timestamp")
    seen = seen.assign(next_at=seen["event_timestamp"], event_timestamp=seen["event_timestamp"].astype(asked["event_timestamp"].dtype))
    found = pd.merge_asof(asked, seen, on="event_timestamp", by="customer_id", direction="forward", allow_exact_matches=False)
    days = np.full(len(rows), np.inf)
    days[found["place"]] = _days(found["next_at"] - found["event_timestamp"]).fillna(np.inf)
    return Waits(days, np.maximum(_days(as_of - opens).to_numpy(dtype=np.float64), 0.0))


def person_periods(waited: Waits, *, period_days: float, n_periods: int) -> tuple[Integers, Integers, Integers]:
    """One entry a row and period that it was waiting in and that was watched to its end: row, period from 1, 1 where the event came.

    Period t is ((t - 1) * period_days, t * period_days]. A period that was not watched to its end is left out whether or not the event
    came in it: to keep only those with the event would make people quicker than they are.
    """
    watched = np.minimum(np.floor(waited.followed_days / period_days + 1e-9), n_periods).astype(np.int64)
    ends = np.maximum(np.ceil(waited.days / period_days - 1e-9), 1.0)  # the period of the event
    count = np.minimum(watched, ends).astype(np.int64)
    row = np.repeat(np.arange(len(waited)), count)
    period = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count) + 1
    return row, period, (period == ends[row]).astype(np.int64)


def expected_days(survival: Floats, *, period_days: float) -> Floats:
    """The mean wait (n,) in days of survival curves (n, k), one that lasts beyond the last period counted as its end.

    What is within a period is averaged by an even hazard: its mean survival is the logarithmic mean of those at its two ends.
    """
    begins = np.column_stack([np.ones(len(survival)), survival[:, :-1]])
    with np.errstate(divide="ignore", invalid="ignore"):
        within = (begins - survival) / -np.log1p((survival - begins) / begins)  # of a quotient near 1 the logarithm is lost
    return np.asarray(period_days * np.where(begins > survival, within, begins).sum(axis=1))


def median_days(survival: Floats, *, period_days: float) -> Floats:
    """The day (n,) by which the event is as likely as not to have come, for survival curves (n, k); NaN beyond the last period."""
    rows, reached = np.arange(len(survival)), survival <= 0.5
    period = reached.argmax(axis=1)  # the first
    begins = np.where(period > 0, survival[rows, period - 1], 1.0)
    with np.errstate(divide="ignore"):
        within = np.log1p(2.0 * begins - 1.0) / -np.log1p((survival[rows, period] - begins) / begins)
    return np.where(reached.any(axis=1), period_days * (period + within), np.nan)


class Hazard(Learner):
    """The hazard of the next event in each of `n_periods` periods of `period_days`.

    Rows are expected in time order, as for `models.classifier.Classifier`, whose parameters the others are: it is what learns the
    periods. Learned: `classifier_`.
    """

    classifier_: Classifier

    def __init__(
        self,
        *,
        n_periods: int = 4,
        period_days: float = 7.0,
        learning_rate: float = 0.05,
        num_leaves: int = 7,
        min_data_in_leaf: int = 40,
        n_rounds: int = 600,
        early_stopping_rounds: int = 40,
        random_state: int = 0,
        num_threads: int = 1,
    ) -> None:
        self.n_periods = n_periods
        self.period_days = period_days
        self.learning_rate = learning_rate
        self.num_leaves = num_leaves
        self.min_data_in_leaf = min_data_in_leaf
        self.n_rounds = n_rounds
        self.early_stopping_rounds = early_stopping_rounds
        self.random_state = random_state
        self.num_threads = num_threads

    @staticmethod
    def suggest(trial: Any) -> dict[str, Any]:
        """One point of the search space of an Optuna trial; the defaults lie inside, so they can be the first trial."""
        return {
            "learning_rate": trial.suggest_float("learning_rate", 0.01, 0.2, log=True),
            "num_leaves": trial.suggest_int("num_leaves", 3, 31, log=True),
            "min_data_in_leaf": trial.suggest_int("min_data_in_leaf", 5, 300, log=True),
        }

    def fit(self, features: pd.DataFrame, waited: Waits, validation: tuple[pd.DataFrame, Waits] | None = None) -> Self:
        """Learn from rows and how long they waited; `validation`: newer rows that stop and calibrate, else the newest of these.

        Raises ValueError on parameters out of range, as many waits as there are no rows, or where no period can teach: none watched
        to its end, or the event in none or all of them.
        """
        if self.n_periods < 1 or not self.period_days > 0:
            raise ValueError(f"Hazard: expected 1 period or more of more than 0 days, found {self.n_periods} of {self.period_days}")
        classifier = Classifier(
            learning_rate=self.learning_rate, num_leaves=self.num_leaves, min_data_in_leaf=self.min_data_in_leaf, n_rounds=self.n_rounds,
            early_stopping_rounds=self.early_stopping_rounds, random_state=self.random_state, num_threads=self.num_threads,
        )  # fmt: skip
        expanded, label = self._expanded(features, waited)
        if not label.size or label.min() == label.max():
            raise ValueError(
                f"Hazard: expected periods with and without the event to learn from, found {label.sum()} with it among {label.size} that "
                f"were watched to their end, of {len(waited)} rows; take earlier rows or shorter periods"
            )
        later = None if validation is None else self._expanded(*validation)
        self.classifier_ = classifier.fit(expanded, label, later if later is not None and len(later[1]) else None)
        return self

    def refitted(self, features: pd.DataFrame, waited: Waits) -> Self:
        """Another with the trees of all these rows, those that this one was stopped on among them; the rest as `Classifier.refitted`."""
        self._check_fitted("classifier_")
        again = type(self)(**self.get_params())
        again.classifier_ = self.classifier_.refitted(*self._expanded(features, waited))
        return again

    def predict_hazard(self, features: pd.DataFrame) -> Floats:
        """The probability (n, n_periods) that the event comes in each period, if it did not come before."""
        self._check_fitted("classifier_")
        n, k = len(features), self.n_periods
        repeated = _at_periods(features, np.repeat(np.arange(n), k), np.tile(np.arange(1, k + 1), n))
        return self.classifier_.predict_proba(repeated)[:, 1].reshape(n, k)

    def predict_survival(self, features: pd.DataFrame) -> Floats:
        """The probability (n, n_periods) that the event has not come by the end of each period; never rises along a row."""
        return np.asarray(np.cumprod(1.0 - self.predict_hazard(features), axis=1))

    def predict_proba(self, features: pd.DataFrame) -> Floats:
        """The probability (n, n_periods + 1) that the next event comes in each period, and last that it comes in none; rows sum to 1."""
        survival = self.predict_survival(features)
        return np.column_stack([-np.diff(survival, axis=1, prepend=1.0), survival[:, -1]])

    def silence(self, features: pd.DataFrame, days: float) -> Floats:
        """The probability (n,) of no event within so many days, as a churn label of that horizon asks.

        Within a period the hazard is even. Raises ValueError beyond the last one.
        """
        if not 0 <= days <= self.n_periods * self.period_days + 1e-9:
            raise ValueError(f"Hazard: it was trained for {self.n_periods} periods of {self.period_days:g} days, asked for {days:g} days")
        share = np.clip(days / self.period_days - np.arange(self.n_periods), 0.0, 1.0)
        return np.asarray(np.prod((1.0 - self.predict_hazard(features)) ** share, axis=1))

    def loss(self, validation: tuple[pd.DataFrame, Waits]) -> float:
        """Minus the log-likelihood of what was seen of each row, in nats a row."""
        self._check_fitted("classifier_")
        expanded, label = self._expanded(*validation)
        p = np.clip(self.classifier_.predict_proba(expanded)[:, 1], 1e-15, 1 - 1e-15)
        return float(-np.sum(np.where(label == 1, np.log(p), np.log1p(-p))) / max(len(validation[1]), 1))

    def save(self, folder: Path) -> None:
        """Write `hazard.json` and the classifier's files in a folder beside it, made if absent."""
        self._check_fitted("classifier_")
        self.classifier_.save(folder / CLASSIFIER)
        write_json(folder / "hazard.json", {"kind": "hazard", "params": self.get_params()})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The learner as it was saved. Raises ValueError if the files do not belong together."""
        hazard = cls(**read_json(folder / "hazard.json", "hazard")["params"])
        hazard.classifier_ = Classifier.load(folder / CLASSIFIER)
        if PERIOD not in hazard.classifier_.feature_names_:
            raise ValueError(f"{folder}: the classifier in {CLASSIFIER} knows no periods; save the model again")
        return hazard

    def _expanded(self, features: pd.DataFrame, waited: Waits) -> tuple[pd.DataFrame, Integers]:
        if len(features) != len(waited) or PERIOD in features.columns:
            raise ValueError(
                f"Hazard: expected one wait for each of {len(features)} rows and no column {PERIOD}; found {len(waited)} waits of "
                f"columns {list(features.columns)[:5]}, ..."
            )
        if not ((waited.days >= 0) & (waited.followed_days >= 0)).all():
            raise ValueError("Hazard: waits must be days of 0 or more, infinite where no event was seen, and never NaN; found others")
        row, period, label = person_periods(waited, period_days=self.period_days, n_periods=self.n_periods)
        return _at_periods(features, row, period), label


def _at_periods(features: pd.DataFrame, row: Integers, period: Integers) -> pd.DataFrame:
    expanded = features.iloc[row].reset_index(drop=True)
    return expanded.assign(**{PERIOD: period})


def _days(spans: pd.Series) -> pd.Series:
    days: pd.Series = spans.dt.total_seconds() / 86_400
    return days
