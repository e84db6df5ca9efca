"""A fitted model -> what it goes by, as tables and pictures beside its run in MLflow.

Contributions (TreeSHAP) over all test rows and row by row, partial dependence, calibration, lift and gain, and the search. Rows carry
no customer: a contribution is told of a row, not of a person, so that nobody has to be forgotten here.
"""

import json
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from models import evaluation
from models.candidates.pairs import pairs
from models.classifier import Classifier
from models.two_stage import NEW_ITEMS
from pipelines import tracking
from pipelines.training import pictures
from pipelines.training.listing import UnderTest
from pipelines.training.rows import Rows
from pipelines.training.timing import Timing

if TYPE_CHECKING:
    import optuna

FOLDER = "explanations"
ROWS = 2_000  # that contributions are averaged over
LISTS = 40  # of a recommender, whose candidates are explained
SHOWN_ROWS = 200  # that are kept row by row
GRID = 20  # points of a partial dependence
GRID_ROWS = 300  # that it is averaged over
COLUMNS = 6  # that it is drawn for
BINS = 10
DRAWS = 200  # of customers, behind the interval of a gain
_Z = 1.959963984540054  # of 95 %


def save(
    run: tracking.Run, learner: Classifier, rows: Rows, *, trials: Sequence["optuna.trial.FrozenTrial"], seed: int,
    when: Timing | None = None,
) -> None:  # fmt: skip
    """Write all of it into the run's folder `FOLDER`; nothing where the run is closed, which has it. when: of a silence, its end."""
    with _folder_of(run) as folder:
        if folder is None:
            return
        write(folder, learner, rows, trials=trials, seed=seed)
        if when is not None:
            write_timing(folder, when)


def save_lists(run: tracking.Run, tested: UnderTest, *, trials: Sequence["optuna.trial.FrozenTrial"]) -> None:
    """Of a recommender: its search, and where there is a second stage what that orders the candidates of the test's customers by."""
    with _folder_of(run) as folder:
        if folder is None:
            return
        write_search(folder, trials)
        for mode in [] if tested.stage is None else tested.stage.rankers_:
            if not tested.moment.judged(mode)[0].size:
                continue
            overall, parts, values = order_contributions(tested, mode)
            overall.rename_axis("feature").to_csv(folder / f"contributions_{mode}.csv")
            _keep(pictures.contributions(overall, parts, values), folder / f"contributions_{mode}.png")


def write(folder: Path, learner: Classifier, rows: Rows, *, trials: Sequence["optuna.trial.FrozenTrial"], seed: int) -> None:
    """The tables as CSV and the pictures as PNG."""
    features, label = rows.part("test")
    people = rows.test()["customer_id"]
    some = features.iloc[np.sort(np.random.default_rng(seed).permutation(len(features))[:ROWS])].reset_index(drop=True)
    parts = learner.explain(some)
    overall = pd.DataFrame({"mean_absolute": parts.abs().mean(), "mean": parts.mean()}).sort_values("mean_absolute", ascending=False)
    shown = parts.head(SHOWN_ROWS).assign(base=learner.base_, probability=learner.predict_proba(some.head(SHOWN_ROWS))[:, 1])
    probability = learner.predict_proba(features)[:, 1]
    dependence = partial_dependence(learner, some.head(GRID_ROWS), [str(name) for name in overall.index[:COLUMNS]])
    calibration, gain = calibration_table(label, probability), gain_table(label, probability, people, seed=seed)
    overall.rename_axis("feature").to_csv(folder / "contributions.csv")
    for name, frame in (("contributions_by_row", shown), ("partial_dependence", dependence), ("calibration", calibration), ("gain", gain)):
        frame.to_csv(folder / f"{name}.csv", index=False)
    error, brier = evaluation.expected_calibration_error(label, probability), evaluation.brier(label, probability)
    for name, figure in (
        ("contributions", pictures.contributions(overall, parts, some)),
        ("contributions_by_row", pictures.rows(shown)),
        ("partial_dependence", pictures.dependence(dependence)),
        ("calibration", pictures.calibration(calibration, probability, error=error, brier=brier)),
        ("gain", pictures.gain(gain, float(label.mean()))),
    ):
        _keep(figure, folder / f"{name}.png")
    write_search(folder, trials)


def write_search(folder: Path, trials: Sequence["optuna.trial.FrozenTrial"]) -> None:
    """The history of a search, and what its losses hang on."""
    search, importance = search_table(trials), search_importance(trials)
    search.to_csv(folder / "search.csv", index=False)
    (folder / "search_importance.json").write_text(json.dumps(importance, indent=1) + "\n")
    _keep(pictures.search(search, importance), folder / "search.png")


def write_timing(folder: Path, when: Timing) -> None:
    """How the test rows were expected to order and how they have, by period, and the calibration at the last of them."""
    when.judged.to_csv(folder / "when.csv", index=False)
    last = when.came.shape[1] - 1
    calibration = calibration_table(when.came[:, last], 1.0 - when.survival[:, last])
    calibration.to_csv(folder / "when_calibration.csv", index=False)
    days = when.hazard.period_days * np.arange(when.hazard.n_periods + 1)
    expected = np.append(0.0, 1.0 - when.survival.mean(axis=0))
    _keep(pictures.when(when.judged, days.tolist(), expected.tolist(), calibration), folder / "when.png")


def order_contributions(tested: UnderTest, mode: str) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """What each column adds to a candidate's score beyond the mean of that customer's: only differences within a list order it.

    By column (mean_absolute, mean), by candidate, and the candidates' values. Of some customers who then bought something.
    """
    if tested.stage is None:
        raise ValueError("explanations: expected a recommender with a second stage, found none")
    moment, ranker = tested.moment, tested.stage.rankers_[mode]
    people = moment.judged(mode)[0][:LISTS]
    given = pairs(tested.stage.retrieval_, moment.histories, people, moment.occasion.at_us, new_only=mode == NEW_ITEMS)
    values, customer = (np.concatenate(arrays) for arrays in zip(*((part.values, part.customer) for part in given), strict=True))
    told = np.asarray(ranker.booster_.predict(values, pred_contrib=True, num_threads=1))
    parts = pd.DataFrame(told[:, :-1], columns=ranker.feature_names_)
    parts -= parts.groupby(customer).transform("mean")
    overall = pd.DataFrame({"mean_absolute": parts.abs().mean(), "mean": parts.mean()}).sort_values("mean_absolute", ascending=False)
    shown = np.unique(np.linspace(0, len(parts) - 1, ROWS).astype(int))
    return overall, parts.iloc[shown], pd.DataFrame(values[shown], columns=ranker.feature_names_)


def partial_dependence(learner: Classifier, rows: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Mean probability when a column is set to a value in all rows: columns feature, value, probability. Source: Friedman 2001.

    Of numbers quantiles, of text the most frequent values.
    """
    found = []
    for name in columns:
        known = rows[name].dropna()
        is_number = pd.api.types.is_numeric_dtype(known)
        values = np.unique(known.quantile(np.linspace(0.02, 0.98, GRID))) if is_number else known.value_counts().index[:GRID]
        found += [(name, value, float(learner.predict_proba(rows.assign(**{name: value}))[:, 1].mean())) for value in values]
    return pd.DataFrame(found, columns=["feature", "value", "probability"])


def calibration_table(label: np.ndarray, probability: np.ndarray) -> pd.DataFrame:
    """Predicted and observed rate in bins of equal mass: columns rows, predicted, observed, and low and high of the observed.

    Source of the interval (95 %): Wilson 1927.
    """
    order = np.array_split(np.argsort(probability, kind="stable"), min(BINS, len(label)))
    found = pd.DataFrame([(len(b), probability[b].mean(), label[b].mean()) for b in order], columns=["rows", "predicted", "observed"])
    n, rate = found["rows"], found["observed"]
    middle, wide = (rate + _Z**2 / (2 * n)) / (1 + _Z**2 / n), _Z / (1 + _Z**2 / n) * np.sqrt(rate * (1 - rate) / n + (_Z / (2 * n)) ** 2)
    return found.assign(low=np.minimum(middle - wide, rate), high=np.maximum(middle + wide, rate))


def gain_table(label: np.ndarray, probability: np.ndarray, customers: ArrayLike | None = None, *, seed: int = 0) -> pd.DataFrame:
    """What reaching the best-scored share of rows finds: columns share, found (of all positives), lift, gain, and its low and high.

    gain: found minus what as many rows drawn by chance hold, as a Qini curve has it; rows of equal score share their positives, so
    the order of rows never matters. low, high: the middle 95 % of it in draws of whole customers (n,), by default of rows.
    """
    share = np.maximum(np.rint(np.linspace(0.05, 1.0, 20) * len(label)), 1) / len(label)
    order = np.argsort(-probability, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(probability[order])), len(order) - 1)  # of rows of equal score
    y, whose = label[order], pd.factorize(np.arange(len(label)) if customers is None else np.asarray(customers)[order], sort=True)[0]

    def found(weight: np.ndarray) -> np.ndarray:
        reached, held = (np.append(0.0, np.cumsum(part)[ends]) for part in (weight, weight * y))
        return np.asarray(np.interp(share, reached / max(reached[-1], 1.0), held / max(held[-1], 1.0)))

    rng, n = np.random.default_rng(seed), int(whose.max()) + 1
    drawn = [found(np.bincount(rng.integers(0, n, n), minlength=n)[whose].astype(float)) - share for _ in range(DRAWS)]
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    all_rows = found(np.ones(len(y)))
    return pd.DataFrame({"share": share, "found": all_rows, "lift": all_rows / share, "gain": all_rows - share, "low": low, "high": high})


def search_table(trials: Sequence["optuna.trial.FrozenTrial"]) -> pd.DataFrame:
    """One row a trial: number, what became of it, loss, best so far, parameters."""
    rows = [{"trial": trial.number, "state": tracking.state(trial), "loss": trial.value, **trial.params} for trial in trials]
    frame = pd.DataFrame(rows, columns=None if rows else ["trial", "state", "loss"])
    frame.insert(3, "best_loss", frame["loss"].astype(float).cummin().ffill())
    return frame


def search_importance(trials: Sequence["optuna.trial.FrozenTrial"]) -> dict[str, float]:
    """How much of the loss's variation each parameter explains; empty where too few trials differ to say."""
    import optuna

    sound = [trial for trial in trials if trial.value is not None]
    if len(sound) < 4 or len({trial.value for trial in sound}) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=optuna.exceptions.ExperimentalWarning)
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        study.add_trials(sound)
        found = optuna.importance.get_param_importances(study)
    return {name: float(value) for name, value in found.items() if np.isfinite(value)}


# -- private -----------------------------------------------------------------------------------------------------------


@contextmanager
def _folder_of(run: tracking.Run) -> Iterator[Path | None]:
    """A folder whose files go beside the run; None where the run is closed."""
    if run.client.get_run(run.run_id).info.status == "FINISHED":
        yield None
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)
        run.client.log_artifacts(run.run_id, scratch, FOLDER)


def _keep(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=100, metadata={"Software": None})
