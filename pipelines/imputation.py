"""Traits that nobody stated -> a guess, marked as one, where a guess was shown to be better than the most common value.

In: traits of customers, the declared method for each, and numbers known of the same customers. Out: the traits with the gaps
filled and flags that say where; how far off the method was on stated values that it had not seen. A guess never takes the place
of a stated value, is never learned from, and is known from the time of the run on only.

Whoever says nothing may differ from those who speak: the error is that among the latter. Traits that are protected (see
MonitoringSettings) serve to look for gaps between groups, and guessed groups hide them: nothing is imputed unless declared.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pipelines import tables
from pipelines.errors import InputError
from pipelines.settings import Settings
from pipelines.sources.mapping import TRAITS

Method = Literal["median", "mode", "model"]

MIN_KNOWN = 50  # stated values without which nothing can be said of a method
MIN_CLASS = 10  # stated values of a kind that a model can learn
_NUMBER = re.compile(r"\D?(\d+(?:\.\d+)?)")  # "18-24", "<18", "60+"
_FOLDS = 5
_LEARNED_ROWS = 50_000
_OWN_WEIGHT = 0.99  # of the model's word against the shares of the values, so that no value is held impossible


@dataclass(frozen=True)
class TraitReport:
    """How a trait's method did on held-out stated values, and what it does to the gaps.

    `metric`: "log_loss" of a model; "rank_distance" of the median, in places of the order; "error_rate" of the mode. `error` and
    `baseline` are in it, the baseline always that of the most common value. `accuracy` and `baseline_accuracy` likewise.
    """

    trait: str
    method: Method
    n: int  # stated values
    metric: str
    error: float
    baseline: float
    accuracy: float
    baseline_accuracy: float
    is_used: bool
    why: str  # it is not used; empty where it is


@dataclass(frozen=True)
class ImputationReport:
    """The traits of the plan; the customers of whom each is now guessed; the rows added to customer_profile."""

    traits: tuple[TraitReport, ...]
    imputed: dict[str, int]
    rows: int


class Imputer:
    """What `fit` learned. `report`: by trait of the plan, in its order."""

    def __init__(self, report: Mapping[str, TraitReport], guesses: Mapping[str, "_Guess"]) -> None:
        self.report = dict(report)
        self._guesses = dict(guesses)

    def apply(self, frame: pd.DataFrame, *, features: pd.DataFrame) -> pd.DataFrame:
        """A copy of `frame` in which gaps of the traits in use are filled, and is_<trait>_imputed holds where one was.

        frame: the traits of `fit`; a value marked as imputed is a gap. features: the columns of `fit`, in the same rows.
        """
        filled = frame.copy()
        for trait in self.report:
            stated = _stated(frame, trait)
            is_gap = stated.isna().to_numpy()
            guess = self._guesses.get(trait)
            if guess is not None and is_gap.any():
                stated = stated.mask(is_gap, pd.Series(guess(features), index=frame.index))
            filled[trait] = stated
            filled[f"is_{trait}_imputed"] = is_gap & (guess is not None)
        return filled


def fit(frame: pd.DataFrame, *, plan: Mapping[str, Method], features: pd.DataFrame, rng: np.random.Generator) -> Imputer:
    """Learn each trait's method from the stated values, and judge it by five-fold cross-validation.

    frame: a column for each trait of the plan, null where nobody stated it, and is_<trait>_imputed where guesses are in it.
    features: (n, d) numbers in the same rows, nulls allowed; only `model` looks at them. A method is not used where it is not better
    than the most common value (a model: by more than the standard error of the difference; the median: where it is further off), or
    where fewer than MIN_KNOWN values were stated. The mode is not held against itself.
    """
    report, guesses = {}, {}
    for trait, method in plan.items():
        stated = _stated(frame, trait)
        is_known = stated.notna().to_numpy()
        values, known = stated[is_known].astype(str).to_numpy(dtype=object), features[is_known]
        if len(values) > _LEARNED_ROWS:
            drawn = np.sort(rng.choice(len(values), _LEARNED_ROWS, replace=False))
            values, known = values[drawn], known.iloc[drawn]
        report[trait] = _validated(trait, method, values, known, int(is_known.sum()), rng)
        if report[trait].is_used:
            guesses[trait] = _Guess(method, values, known)
    return Imputer(report, guesses)


def run(home: Path, *, settings: Settings, as_of: datetime) -> ImputationReport:
    """Fill what is missing in customer_profile by `settings.ingest.imputation`, as of now, and append what that changes.

    Customers of whom nothing was stated get a row as well. A row stands at `as_of`, with the whole state of its customer; rows before
    it stay as they were, so that nothing is known earlier than it was guessed. Run again, it changes nothing. Guesses of earlier
    runs that no longer stand are taken back from `as_of` on. Raises InputError for a plan that names another trait.
    """
    unknown = sorted(set(settings.ingest.imputation) - set(TRAITS))
    if unknown:
        raise InputError(
            f"imputation: expected traits among {', '.join(TRAITS)}, found {', '.join(unknown)}; mend RAPPORT_INGEST__IMPUTATION"
        )
    now = pd.Timestamp(as_of)
    profile = tables.read(home, tables.CUSTOMER_PROFILE)
    held = _as_of(profile, now)
    numbers = _as_of(tables.read(home, tables.CUSTOMER_ACTIVITY), now)
    features = numbers.drop(columns=["event_timestamp", *(name for name in numbers if str(name).endswith("_at"))])
    held = held.reindex(held.index.union(features.index))
    imputer = fit(
        held, plan=settings.ingest.imputation, features=features.reindex(held.index), rng=np.random.default_rng(settings.training.seed)
    )
    wanted = imputer.apply(_without_guesses(held), features=features.reindex(held.index))
    is_new = _differ(held, wanted)
    rows = wanted[is_new].assign(event_timestamp=now).rename_axis("customer_id").reset_index()
    if len(rows):
        _append(home, profile, rows)
    imputed = {trait: int(wanted[f"is_{trait}_imputed"].sum()) for trait in imputer.report}
    return ImputationReport(tuple(imputer.report.values()), imputed, len(rows))


# -- methods -----------------------------------------------------------------------------------------------------------


class _Guess:
    """A method after its learning: features (n, d) -> (n,) values; `probabilities`: -> (n, k) over `names`."""

    def __init__(self, method: Method, values: NDArray[np.object_], features: pd.DataFrame) -> None:
        self.names, counts = np.unique(values, return_counts=True)
        self.shares = counts / counts.sum()
        self.middle = _ordered_middle(values) if method == "median" else None
        self.model: Any = None
        self.learned = self.names
        if method == "model":
            self.model, self.learned = _learn(values, features)

    def __call__(self, features: pd.DataFrame) -> NDArray[np.object_]:
        if self.middle is not None:
            return np.full(len(features), self.middle, dtype=object)
        return np.asarray(self.names[np.argmax(self.probabilities(features), axis=1)], dtype=object)

    def probabilities(self, features: pd.DataFrame) -> NDArray[np.float64]:
        shares = np.tile(self.shares, (len(features), 1))
        if self.model is None or len(features) == 0:
            return shares
        told = np.zeros_like(shares)
        told[:, np.searchsorted(self.names, self.learned)] = self.model.predict_proba(_numbers(features))
        return _OWN_WEIGHT * told + (1 - _OWN_WEIGHT) * shares


def _learn(values: NDArray[np.object_], features: pd.DataFrame) -> tuple[Any, NDArray[np.object_]]:
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    names, counts = np.unique(values, return_counts=True)
    learned = names[counts >= MIN_CLASS]
    if len(learned) < 2 or features.shape[1] == 0:
        return None, names
    is_learned = np.isin(values, learned)
    model = make_pipeline(
        SimpleImputer(strategy="median", keep_empty_features=True), StandardScaler(), LogisticRegression(C=0.1, max_iter=500)
    )
    return model.fit(_numbers(features[is_learned]), values[is_learned].astype(str)), learned


def _numbers(features: pd.DataFrame) -> NDArray[np.float64]:
    """Counts and amounts have long tails: logarithms, with the sign kept."""
    told = features.to_numpy(dtype=float, na_value=np.nan)
    return np.asarray(np.sign(told) * np.log1p(np.abs(told)))


def _ordered_middle(values: NDArray[np.object_]) -> str:
    """The lower median of values in the order of the numbers that they begin with."""
    return str(values[np.argsort(_places(values), kind="stable")[(len(values) - 1) // 2]])


def _places(values: NDArray[np.object_]) -> NDArray[np.float64]:
    """The numbers that values such as bands of age begin with; NaN where one begins with none."""
    found = (_NUMBER.match(str(value)) for value in values)
    return np.array([float(match.group(1)) if match else np.nan for match in found])


# -- validation --------------------------------------------------------------------------------------------------------


def _validated(
    trait: str, method: Method, values: NDArray[np.object_], features: pd.DataFrame, n: int, rng: np.random.Generator
) -> TraitReport:
    metric = {"median": "rank_distance", "mode": "error_rate", "model": "log_loss"}[method]
    why, nothing = "", float("nan")
    if n < MIN_KNOWN:
        why = f"{n} values were stated; {MIN_KNOWN} are needed"
    elif method == "median" and np.isnan(_places(values)).any():
        why = "its values have no order: they do not begin with a number"
    if why:
        return TraitReport(trait, method, n, metric, nothing, nothing, nothing, nothing, is_used=False, why=why)
    fold = rng.permutation(len(values)) % _FOLDS
    own, base, hits, base_hits = (np.zeros(len(values)) for _ in range(4))
    for held in range(_FOLDS):
        out = fold == held
        guess, mode = _Guess(method, values[~out], features[~out]), _Guess("mode", values[~out], features[~out])
        told, common = guess(features[out]), mode(features[out])
        hits[out], base_hits[out] = told == values[out], common == values[out]
        own[out], base[out] = (
            _losses(guess, told, values[out], features[out], metric),
            _losses(mode, common, values[out], features[out], metric),
        )
    gain = base - own
    margin = gain.std() / np.sqrt(len(gain)) if method == "model" else -1e-12
    is_used = method == "mode" or bool(gain.mean() > margin)
    why = "" if is_used else "it is not better than the most common value"
    return TraitReport(trait, method, n, metric, own.mean(), base.mean(), hits.mean(), base_hits.mean(), is_used=is_used, why=why)


def _losses(
    guess: _Guess, told: NDArray[np.object_], values: NDArray[np.object_], features: pd.DataFrame, metric: str
) -> NDArray[np.float64]:
    if metric == "error_rate":
        return np.asarray(told != values, dtype=float)
    if metric == "rank_distance":
        ours, theirs = _places(told), _places(values)
        order = np.unique(np.concatenate([ours, theirs]))
        return np.abs(np.searchsorted(order, ours).astype(float) - np.searchsorted(order, theirs))
    chances = guess.probabilities(features)
    at = np.searchsorted(guess.names, values)
    is_seen = guess.names[np.minimum(at, len(guess.names) - 1)] == values
    chance = np.where(is_seen, chances[np.arange(len(values)), np.minimum(at, len(guess.names) - 1)], 0.0)
    return np.asarray(-np.log(np.maximum(chance, 1e-4)))


# -- customer_profile --------------------------------------------------------------------------------------------------


def _stated(frame: pd.DataFrame, trait: str) -> pd.Series:
    """The values that somebody stated; null where none is, or where it is a guess."""
    values = frame[trait].astype("object")
    flag = f"is_{trait}_imputed"
    return values.mask(frame[flag].eq(True)) if flag in frame else values


def _without_guesses(held: pd.DataFrame) -> pd.DataFrame:
    values = {trait: _stated(held, trait) for trait in TRAITS}
    return pd.DataFrame(values | {f"is_{trait}_imputed": False for trait in TRAITS}, index=held.index)


def _as_of(table: pd.DataFrame, now: pd.Timestamp) -> pd.DataFrame:
    """The newest row of each customer, by customer."""
    known = table[table["event_timestamp"] <= now].sort_values("event_timestamp", kind="stable")
    newest: pd.DataFrame = known.drop_duplicates("customer_id", keep="last").set_index("customer_id").sort_index()
    return newest


def _differ(held: pd.DataFrame, wanted: pd.DataFrame) -> NDArray[np.bool_]:
    """Which customers' states are not those held; no row at all holds nothing."""
    differ = np.zeros(len(held), dtype=bool)
    for trait in TRAITS:
        before, after = held[trait].astype("object"), wanted[trait].astype("object")
        differ |= ((before != after) & ~(before.isna() & after.isna())).to_numpy(dtype=bool)
        differ |= (held[f"is_{trait}_imputed"].eq(True) != wanted[f"is_{trait}_imputed"]).to_numpy(dtype=bool)
    return differ


def _append(home: Path, profile: pd.DataFrame, rows: pd.DataFrame) -> None:
    """Add the rows, each in place of one of its customer at that very instant."""
    every = pd.concat([profile, rows], ignore_index=True).drop_duplicates(["customer_id", "event_timestamp"], keep="last")
    tables.write(home, tables.CUSTOMER_PROFILE, every.sort_values(["customer_id", "event_timestamp"], kind="stable"))
