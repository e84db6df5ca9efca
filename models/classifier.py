"""Features and 0/1 labels -> a calibrated, explained probability.

LightGBM trees, stopped early on the validation rows; from these also Platt's two numbers and the threshold. Where the label is a
silence the trees may start from what a model of lifetimes foretells. Never resamples or re-weights classes: both would bend the
probabilities that decisions are taken with.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from models import boosters, evaluation
from models.calibration import cheapest_threshold, platt, sigmoid
from models.contributions import Contributions
from models.encoding import check_columns, check_label, check_training, codes_of, encoded, learn_categories
from models.learner import Learner, read_json, write_json
from models.silence import ROLES, Silence
from models.single_row import RAW_SCORE, SingleRow

if TYPE_CHECKING:
    import lightgbm as lgb

Floats = NDArray[np.float64]
Labelled = tuple[pd.DataFrame, ArrayLike]

VALIDATION_SHARE = 0.2  # of the rows, the newest, where `fit` is given no validation rows


@dataclass(frozen=True)
class Prepared:
    """Rows to learn from, and later ones (n,) to stop and calibrate on, encoded and binned once for many fits; the former only as bins."""

    names: list[str]
    categories: dict[str, tuple[str, ...]]
    binned: "lgb.Dataset"
    binned_later: "lgb.Dataset | None"
    later: Floats
    y_later: Floats
    silence: Silence | None


class Classifier(Learner):
    """Gradient-boosted trees for a 0/1 label with calibrated probabilities.

    Rows of `fit` and of its validation are expected in time order, rows of one instant in an order that says nothing of their
    labels: the newest ones decide when to stop, how to calibrate and where to act.
    The same data and `random_state` give the same model, whatever `num_threads`. With `n_seeds` above 1 as many boosters, drawn apart,
    are averaged into one. monotone: column -> 1 where more of it never lowers the probability, -1 where it never raises it.
    history: where label 1 is no order in `horizon_days`, the columns of `models.silence.ROLES`, by role: its logit is learned first, of
    the same rows, and the trees learn what is left. It gives the columns of a history their direction, so `monotone` may not.

    Learned: `feature_names_`; `categories_` (values known of each text column, and none for a column without values);
    `booster_`; `silence_`, None without a history; `calibration_` (slope, intercept) on the logit, the sum of what these two say;
    `base_`, the logit that contributions start from;
    `threshold_`, at and above which acting is cheaper given the two costs; `classes_`.
    """

    def __init__(
        self,
        *,
        learning_rate: float = 0.05,
        num_leaves: int = 15,
        min_data_in_leaf: int = 40,
        feature_fraction: float = 0.8,
        bagging_fraction: float = 0.8,
        lambda_l2: float = 1.0,
        cat_smooth: float = 10.0,
        n_rounds: int = 600,
        early_stopping_rounds: int = 40,
        cost_false_positive: float = 1.0,
        cost_false_negative: float = 4.0,
        monotone: Mapping[str, int] | None = None,
        history: Mapping[str, str] | None = None,
        horizon_days: float = 28.0,
        n_seeds: int = 1,
        random_state: int = 0,
        num_threads: int = 1,
    ) -> None:
        self.learning_rate = learning_rate
        self.num_leaves = num_leaves
        self.min_data_in_leaf = min_data_in_leaf
        self.feature_fraction = feature_fraction
        self.bagging_fraction = bagging_fraction
        self.lambda_l2 = lambda_l2
        self.cat_smooth = cat_smooth
        self.n_rounds = n_rounds
        self.early_stopping_rounds = early_stopping_rounds
        self.cost_false_positive = cost_false_positive
        self.cost_false_negative = cost_false_negative
        self.monotone = monotone
        self.history = history
        self.horizon_days = horizon_days
        self.n_seeds = n_seeds
        self.random_state = random_state
        self.num_threads = num_threads

    @staticmethod
    def suggest(trial: Any) -> dict[str, Any]:
        """One point of the search space of an Optuna trial; the defaults lie inside, so they can be the first trial."""
        return {
            "learning_rate": trial.suggest_float("learning_rate", 0.01, 0.2, log=True),
            "num_leaves": trial.suggest_int("num_leaves", 3, 64, log=True),
            "min_data_in_leaf": trial.suggest_int("min_data_in_leaf", 5, 300, log=True),
            "feature_fraction": trial.suggest_float("feature_fraction", 0.3, 1.0),
            "bagging_fraction": trial.suggest_float("bagging_fraction", 0.5, 1.0),
            "lambda_l2": trial.suggest_float("lambda_l2", 1e-3, 100.0, log=True),
            "cat_smooth": trial.suggest_float("cat_smooth", 1.0, 100.0, log=True),
        }

    def fit(self, features: pd.DataFrame, label: ArrayLike, validation: Labelled | None = None) -> Self:
        """Learn from (n, d) features and (n,) labels of 0/1, both in time order.

        validation: later rows, which stop the training, calibrate and set the threshold. Without it the newest fifth of the rows takes
        that part. Numbers, booleans and text are taken as they are, nulls
        included; constant and empty columns do no harm. Raises ValueError on no rows, one class only, labels other than
        0/1, duplicate columns, or validation columns that differ.
        """
        self._fitted(self.prepare(features, label, validation))
        return self

    def prepare(self, features: pd.DataFrame, label: ArrayLike, validation: Labelled | None = None) -> Prepared:
        """What `fit` takes, ready for many fits of other hyper-parameters. Raises ValueError as `fit` does."""
        y = check_training(features, label)
        names, categories = [str(name) for name in features.columns], learn_categories(features)
        matrix = encoded(features, names, categories)
        if validation is None:
            is_tail = _tail(y)
            later, y_later = matrix[is_tail], y[is_tail]
            matrix, y = matrix[~is_tail], y[~is_tail]
        else:
            check_columns(validation[0], names, "validation")
            y_later = check_label(validation[1], len(validation[0]))
        silence = self._silence(matrix, y, names, categories)
        binned = self._binned(matrix, y, names, categories, silence)
        del matrix  # before the later rows take their place
        if validation is not None:
            later = encoded(validation[0], names, categories)
        binned_later = self._binned(later, y_later, names, categories, silence, like=binned) if len(later) else None
        return Prepared(names, categories, binned, binned_later, later, y_later, silence)

    def search_loss(self, prepared: Prepared) -> float:
        """What `fit` and then `loss` of the same validation rows give, without looking at them twice; this one is fitted as by `fit`."""
        raw = self._fitted(prepared)
        return evaluation.log_loss(prepared.y_later, sigmoid(self.calibration_, raw))

    def refitted(self, features: pd.DataFrame, label: ArrayLike) -> Self:
        """Another with the trees of all these rows, those that this one was stopped on among them: the newest are not left unlearned.

        As many rounds as were found best, the same calibration and threshold, which are those of rows that had not been seen.
        Raises ValueError as `fit` does, and on other columns.
        """
        self._check_fitted("feature_names_")
        check_columns(features, self.feature_names_, "features")
        y, names, categories = check_training(features, label), self.feature_names_, learn_categories(features)
        rounds = max(1, round(self.booster_.num_trees() / self.n_seeds))
        matrix = encoded(features, names, categories)
        silence = self._silence(matrix, y, names, categories)
        booster = self._train(self._binned(matrix, y, names, categories, silence), None, names, categories, rounds=rounds)
        again = type(self)(**self.get_params())
        return again._learned(booster, silence, names, categories, self.calibration_, self.threshold_)

    def predict_proba(self, features: pd.DataFrame) -> Floats:
        """Calibrated probabilities (n, 2) of label 0 and label 1. Raises ValueError if the columns are not those of `fit`."""
        self._check_fitted("feature_names_")
        check_columns(features, self.feature_names_, "features")
        positive = self._probability(self.encode(features), self.num_threads)
        return np.column_stack([1.0 - positive, positive])

    def predict(self, features: pd.DataFrame) -> NDArray[np.int64]:
        """1 where acting is expected to be cheaper than not acting (n,)."""
        return np.asarray(self.predict_proba(features)[:, 1] >= self.threshold_, dtype=np.int64)

    def encode(self, columns: Mapping[str, Any] | pd.DataFrame) -> Floats:
        """Columns of equal length n as the matrix (n, d) that the trees read; further columns are ignored.

        A null, and a text never seen in `fit`, is missing. Raises ValueError on a column that is absent or not a number.
        """
        self._check_fitted("feature_names_")
        return encoded(columns, self.feature_names_, self.categories_)

    def codes(self, name: str, values: Any) -> Floats:
        """One text column (n,) as `encode` writes it: the place of each text among those of `fit`, NaN for others and for null."""
        return codes_of(values, self.categories_[name])

    def predict_values(self, matrix: Floats) -> Floats:
        """Probability of label 1 (n,) for an encoded matrix; the same as `predict_proba`, without pandas, on one thread.

        The same bits, but for the last digits of a single row with a history.
        """
        return self._probability(matrix, 1)

    def explain(self, features: pd.DataFrame) -> pd.DataFrame:
        """What each feature adds to the logit of the probability (n, d): a row's sum plus `base_` is that logit.

        The contributions are the trees' exact Shapley values, and those of a history's columns, times the calibration's slope.
        Source: Lundberg et al., Nature Machine Intelligence 2020.
        """
        self._check_fitted("feature_names_")
        check_columns(features, self.feature_names_, "features")
        return pd.DataFrame(self.explain_values(self.encode(features)), columns=self.feature_names_, index=features.index)

    def explain_values(self, matrix: Floats) -> Floats:
        """The same for an encoded matrix, as an array (n, d)."""
        if len(matrix) == 1:
            return self.explain_row(matrix[0])[None]
        parts = np.asarray(self.booster_.predict(matrix, pred_contrib=True, num_threads=1))[:, :-1]
        if self.silence_ is not None:
            places = self._history_places
            parts[:, places] += self.silence_.contributions(matrix[:, places])
        return np.asarray(parts * self.calibration_[0])

    def explain_row(self, row: Floats) -> Floats:
        """The same for one encoded row (d,): (d,), but for the last digits of a history's columns."""
        parts = self._contributions(row)
        if self.silence_ is not None:
            places = self._history_places
            found = self.silence_.contributions_of([row.item(place) for place in places])
            for place, part in zip(places, found.tolist(), strict=True):
                parts[place] += part
        parts *= self.calibration_[0]
        return parts

    def probability_of(self, parts: Floats) -> Floats:
        """Probability of label 1 (n,) of rows whose contributions (n, d) are known: that of `predict_values` but for the last digits."""
        return sigmoid((1.0, self.base_), parts.sum(axis=1))

    def loss(self, validation: Labelled) -> float:
        """Log-loss of the calibrated probabilities on rows (features, label): what tuning minimises."""
        features, label = validation
        return evaluation.log_loss(check_label(label, len(features)), self.predict_proba(features)[:, 1])

    def save(self, folder: Path) -> None:
        """Write `model.lgb` (LightGBM's text) and `classifier.json` into the folder, made if absent."""
        self._check_fitted("feature_names_")
        folder.mkdir(parents=True, exist_ok=True)
        self.booster_.save_model(folder / "model.lgb")
        description = {
            "kind": "classifier",
            "params": self.get_params(),
            "feature_names": self.feature_names_,
            "categories": {name: list(values) for name, values in self.categories_.items()},
            "calibration": list(self.calibration_),
            "threshold": self.threshold_,
            "silence": None if self.silence_ is None else self.silence_.as_json(),
        }
        write_json(folder / "classifier.json", description)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The learner as it was saved. Raises ValueError if the two files do not belong together."""
        import lightgbm as lgb

        saved = read_json(folder / "classifier.json", "classifier")
        booster = lgb.Booster(model_str=(folder / "model.lgb").read_text())
        names, (slope, intercept) = saved["feature_names"], saved["calibration"]
        if booster.num_feature() != len(names):
            raise ValueError(f"{folder}: model.lgb reads {booster.num_feature()} features, classifier.json names {len(names)}")
        categories = {name: tuple(values) for name, values in saved["categories"].items()}
        silence = Silence.from_json(saved["silence"]) if saved.get("silence") else None
        return cls(**saved["params"])._learned(booster, silence, names, categories, (slope, intercept), saved["threshold"])

    def _fitted(self, prepared: Prepared) -> Floats:
        """Learn; the uncalibrated logit of the later rows."""
        names, categories, silence, y_later = prepared.names, prepared.categories, prepared.silence, prepared.y_later
        if (silence is None) != (not self.history):
            raise ValueError(f"Classifier: expected rows that were prepared for the history {self.history}; prepare them with the same")
        booster = self._train(prepared.binned, prepared.binned_later, names, categories)
        raw = self._raw(booster, silence, names, prepared.later, self.num_threads)
        calibration = platt(raw, y_later)
        threshold = cheapest_threshold(sigmoid(calibration, raw), y_later, self.cost_false_positive, self.cost_false_negative)
        self._learned(booster, silence, names, categories, calibration, threshold)
        return raw

    def _silence(self, matrix: Floats, y: Floats, names: list[str], categories: Mapping[str, tuple[str, ...]]) -> Silence | None:
        """What the histories foretell, learned of the rows that the trees are learned of; None without a history."""
        if not self.history:
            return None
        wrong = [role for role in ROLES if self.history.get(role) not in names or categories.get(self.history[role])]
        if wrong or set(self.history) != set(ROLES):
            raise ValueError(
                f"Classifier: history expects a column of numbers among those of fit for each of {ROLES}; found {self.history}"
            )
        places = self._places(names)
        return Silence.learn(matrix[:, places], y, horizon_days=self.horizon_days, random_state=self.random_state)

    def _places(self, names: list[str]) -> list[int]:
        return [names.index((self.history or {})[role]) for role in ROLES]

    def _binned(
        self, matrix: Floats, y: Floats, names: list[str], categories: Mapping[str, tuple[str, ...]], silence: Silence | None,
        *, like: "lgb.Dataset | None" = None,
    ) -> "lgb.Dataset":  # fmt: skip
        """The matrix as LightGBM's bins, those of `like` where given, and what its trees start from; the matrix itself is not kept."""
        import lightgbm as lgb

        text_columns = [j for j, name in enumerate(names) if categories.get(name)]
        params = {"num_threads": self.num_threads} | _FIXED_PARAMS
        start = None if silence is None else silence.logit(matrix[:, self._places(names)])
        return lgb.Dataset(matrix, y, reference=like, init_score=start, categorical_feature=text_columns, params=params).construct()

    def _train(
        self, data: "lgb.Dataset", later: "lgb.Dataset | None", names: list[str], categories: Mapping[str, tuple[str, ...]],
        *, rounds: int | None = None,
    ) -> "lgb.Booster":  # fmt: skip
        """The trees up to the best round on the later rows, all rounds where there are none to judge by; the mean of all seeds."""
        import lightgbm as lgb

        constraints = _constraints(self.monotone or {}, [*(self.history or {}).values()], names, categories)
        params = {name: getattr(self, name) for name in _TREE_PARAMS} | _FIXED_PARAMS
        if any(constraints):
            params |= {"monotone_constraints": constraints, "monotone_constraints_method": "intermediate"}
        judged = None if later is None else [later]
        texts = []
        for seed in self._seeds():
            stop: list[Callable[..., Any]] = [lgb.early_stopping(self.early_stopping_rounds, verbose=False)] if judged else []
            booster = lgb.train({**params, "seed": seed}, data, num_boost_round=rounds or self.n_rounds, valid_sets=judged, callbacks=stop)
            texts.append(booster.model_to_string(num_iteration=booster.best_iteration or None))
        # from its own text: what is used now is, to the bit, what will be loaded later
        return lgb.Booster(model_str=texts[0] if len(texts) == 1 else boosters.average(texts))

    def _seeds(self) -> list[int]:
        drawn = np.random.SeedSequence(self.random_state).generate_state(max(self.n_seeds - 1, 0)) >> 2  # LightGBM's seeds have 31 bits
        return [self.random_state, *(int(seed) for seed in drawn)]

    def _learned(
        self,
        booster: "lgb.Booster",
        silence: Silence | None,
        names: list[str],
        categories: dict[str, tuple[str, ...]],
        calibration: tuple[float, float],
        threshold: float,
    ) -> Self:
        self.booster_, self.silence_, self.feature_names_, self.categories_ = booster, silence, names, categories
        self.calibration_, self.threshold_, self.classes_ = calibration, threshold, np.array([0, 1])
        self._score, self._contributions = SingleRow(booster, RAW_SCORE), Contributions(booster)
        self._history_places = self._places(names) if silence is not None else []
        start = np.asarray(booster.predict(np.full((1, len(names)), np.nan), pred_contrib=True, num_threads=1))[0, -1]
        start += 0.0 if silence is None else silence.base()
        self.base_ = float(calibration[0] * start + calibration[1])
        return self

    def _probability(self, matrix: Floats, num_threads: int) -> Floats:
        if len(matrix) == 1:
            row = matrix[0]
            raw = float(self._score(row)[0])
            if self.silence_ is not None:
                raw += self.silence_.logit_of([row.item(place) for place in self._history_places])
            return sigmoid(self.calibration_, raw).reshape(1)
        return sigmoid(self.calibration_, self._raw(self.booster_, self.silence_, self.feature_names_, matrix, num_threads))

    def _raw(self, booster: "lgb.Booster", silence: Silence | None, names: list[str], matrix: Floats, num_threads: int) -> Floats:
        """The uncalibrated logit (n,)."""
        if not len(matrix):
            return np.empty(0)
        trees = np.asarray(booster.predict(matrix, raw_score=True, num_threads=num_threads))
        return trees if silence is None else trees + silence.logit(matrix[:, self._places(names)])


# -- private -----------------------------------------------------------------------------------------------------------

_TREE_PARAMS = (
    "learning_rate", "num_leaves", "min_data_in_leaf", "feature_fraction", "bagging_fraction", "lambda_l2", "cat_smooth", "num_threads",
)  # fmt: skip
_FIXED_PARAMS: dict[str, Any] = {
    "objective": "binary",
    "metric": "binary_logloss",
    "bagging_freq": 1,
    "deterministic": True,
    "force_row_wise": True,  # the automatic choice is made by timing, and so differs between runs
    "feature_pre_filter": False,  # so that rows binned once serve any `min_data_in_leaf`
    "verbosity": -1,
}


def _constraints(monotone: Mapping[str, int], taken: list[str], names: list[str], categories: Mapping[str, tuple[str, ...]]) -> list[int]:
    """The direction of each column. Raises ValueError on a column that is not there, is text or `taken`, or a direction that is none."""
    free = {name for name in names if not categories.get(name) and name not in taken}
    wrong = [name for name, way in monotone.items() if name not in free or way not in (-1, 0, 1)]
    if wrong:
        raise ValueError(
            f"Classifier: monotone expects -1, 0 or 1 for columns of numbers among those of fit, none of a history; not so: {wrong}"
        )
    return [int(monotone.get(name, 0)) for name in names]


def _tail(y: Floats) -> NDArray[np.bool_]:
    """The newest rows; the newest of each class where time order would leave a part without one of the classes."""
    is_tail = np.arange(len(y)) >= len(y) - int(len(y) * VALIDATION_SHARE)
    if all(len(np.unique(part)) == 2 for part in (y[is_tail], y[~is_tail])):
        return is_tail
    for value in (0, 1):
        rows = np.flatnonzero(y == value)
        is_tail[rows] = np.arange(len(rows)) >= len(rows) - int(len(rows) * VALIDATION_SHARE)
    return is_tail
