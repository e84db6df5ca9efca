"""A fitted classifier -> what it goes by, as tables and pictures beside its run in MLflow.

Contributions (TreeSHAP) over all test rows and row by row, partial dependence, calibration, lift and gain, and the search. Rows carry
no customer: a contribution is told of a row, not of a person, so that nobody has to be forgotten here.
"""

import json
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from models.classifier import Classifier
from pipelines import tracking
from pipelines.training.rows import Rows
from pipelines.training.timing import Timing

if TYPE_CHECKING:
    import optuna

FOLDER = "explanations"
ROWS = 2_000  # that contributions are averaged over
SHOWN_ROWS = 200  # that are kept row by row
GRID = 20  # points of a partial dependence
GRID_ROWS = 300  # that it is averaged over
COLUMNS = 6  # that it is drawn for
BINS = 10


def save(
    run: tracking.Run, learner: Classifier, rows: Rows, *, trials: Sequence["optuna.trial.FrozenTrial"], seed: int,
    when: Timing | None = None,
) -> None:  # fmt: skip
    """Write all of it into the run's folder `FOLDER`; nothing where the run is closed, which has it. when: of a silence, its end."""
    if run.client.get_run(run.run_id).info.status == "FINISHED":
        return
    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch), learner, rows, trials=trials, seed=seed)
        if when is not None:
            write_timing(Path(scratch), when)
        run.client.log_artifacts(run.run_id, scratch, FOLDER)


def write(folder: Path, learner: Classifier, rows: Rows, *, trials: Sequence["optuna.trial.FrozenTrial"], seed: int) -> None:
    """The tables as CSV and the pictures as PNG."""
    features, label = rows.part("test")
    some = features.iloc[np.sort(np.random.default_rng(seed).permutation(len(features))[:ROWS])].reset_index(drop=True)
    parts = learner.explain(some)
    overall = pd.DataFrame({"mean_absolute": parts.abs().mean(), "mean": parts.mean()}).sort_values("mean_absolute", ascending=False)
    shown = parts.head(SHOWN_ROWS).assign(base=learner.base_, probability=learner.predict_proba(some.head(SHOWN_ROWS))[:, 1])
    probability = learner.predict_proba(features)[:, 1]
    dependence = partial_dependence(learner, some.head(GRID_ROWS), [str(name) for name in overall.index[:COLUMNS]])
    calibration, gain = calibration_table(label, probability), gain_table(label, probability)
    overall.rename_axis("feature").to_csv(folder / "contributions.csv")
    for name, frame in (("contributions_by_row", shown), ("partial_dependence", dependence), ("calibration", calibration), ("gain", gain)):
        frame.to_csv(folder / f"{name}.csv", index=False)
    search, importance = search_table(trials), search_importance(trials)
    search.to_csv(folder / "search.csv", index=False)
    (folder / "search_importance.json").write_text(json.dumps(importance, indent=1) + "\n")
    _draw(folder, overall, dependence, calibration, gain)
    _draw_search(folder / "search.png", search, importance)


def write_timing(folder: Path, when: Timing) -> None:
    """How the test rows were expected to order and how they have, by period, and the calibration at the last of them."""
    when.judged.to_csv(folder / "when.csv", index=False)
    last = when.came.shape[1] - 1
    calibration = calibration_table(when.came[:, last], 1.0 - when.survival[:, last])
    calibration.to_csv(folder / "when_calibration.csv", index=False)
    days = when.hazard.period_days * np.arange(when.hazard.n_periods + 1)
    figure = _figure((10, 4.5))
    curve, diagonal = figure.subplots(1, 2)
    curve.plot(days, np.append(0.0, 1.0 - when.survival.mean(axis=0)), marker=".", label="expected")
    curve.plot(when.judged["days"], when.judged["observed"], marker="o", linestyle="none", label="observed")
    curve.set(xlabel="days", ylabel="share who have ordered", ylim=(0, 1))
    curve.legend()
    _draw_calibration(diagonal, calibration)
    diagonal.set_title(f"by day {when.judged['days'].iloc[-1]:g}", fontsize=9)
    _keep(figure, folder / "when.png")


def partial_dependence(learner: Classifier, rows: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Mean probability when a column is set to a value in all rows: columns feature, value, probability. Source: Friedman 2001."""
    found = []
    for name in columns:
        known = rows[name].dropna()
        values = np.unique(known.quantile(np.linspace(0.02, 0.98, GRID))) if pd.api.types.is_numeric_dtype(known) else known.unique()
        found += [(name, value, float(learner.predict_proba(rows.assign(**{name: value}))[:, 1].mean())) for value in values]
    return pd.DataFrame(found, columns=["feature", "value", "probability"])


def calibration_table(label: np.ndarray, probability: np.ndarray) -> pd.DataFrame:
    """Predicted and observed rate in bins of equal mass: columns rows, predicted, observed."""
    order = np.array_split(np.argsort(probability, kind="stable"), min(BINS, len(label)))
    return pd.DataFrame([(len(b), probability[b].mean(), label[b].mean()) for b in order], columns=["rows", "predicted", "observed"])


def gain_table(label: np.ndarray, probability: np.ndarray) -> pd.DataFrame:
    """What reaching the best-scored share of people finds: columns share, found (of all positives), lift, and gain.

    gain: found minus what as many people drawn by chance hold, as a Qini curve has it; rows of equal score share their positives, so
    the order of rows never matters.
    """
    order = np.argsort(-probability, kind="stable")
    ties = np.unique(-probability[order], return_inverse=True)[1].ravel()
    even = (np.bincount(ties, weights=label[order]) / np.bincount(ties))[ties]
    shares = np.linspace(0.05, 1.0, 20)
    ends = np.maximum(np.rint(shares * len(label)).astype(int), 1)
    found = np.cumsum(even)[ends - 1] / max(label.sum(), 1.0)
    share = ends / len(label)
    return pd.DataFrame({"share": share, "found": found, "lift": found / share, "gain": found - share})


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


def _draw(folder: Path, overall: pd.DataFrame, dependence: pd.DataFrame, calibration: pd.DataFrame, gain: pd.DataFrame) -> None:
    # figures without pyplot: it keeps global state and picks a backend
    first = overall.head(15).iloc[::-1]
    figure = _figure((7, 5))
    axes = figure.add_axes((0.35, 0.12, 0.6, 0.83))
    axes.barh([str(name) for name in first.index], first["mean_absolute"])
    axes.set_xlabel("mean absolute contribution to the logit")
    _keep(figure, folder / "contributions.png")

    figure = _figure((11, 6))
    figure.subplots_adjust(wspace=0.3, hspace=0.35)
    for place, (name, part) in enumerate(dependence.groupby("feature", sort=False), start=1):
        axes = figure.add_subplot(2, 3, place)
        axes.plot(part["value"].astype(str) if part["value"].dtype == object else part["value"], part["probability"], marker=".")
        axes.set_title(str(name), fontsize=8)
    _keep(figure, folder / "partial_dependence.png")

    figure = _figure((5, 5))
    _draw_calibration(figure.add_subplot(), calibration)
    _keep(figure, folder / "calibration.png")

    figure = _figure((10, 4))
    for place, name in enumerate(("lift", "gain"), start=1):
        axes = figure.add_subplot(1, 2, place)
        axes.plot(gain["share"], gain[name], marker=".")
        axes.set(xlabel="share of people reached, best first", ylabel=name)
    _keep(figure, folder / "gain.png")


def _draw_search(path: Path, search: pd.DataFrame, importance: dict[str, float]) -> None:
    figure = _figure((10, 4))
    history, bars = figure.subplots(1, 2)
    history.plot(search["trial"], search["loss"].astype(float), marker=".", linestyle="none", label="trial")
    history.step(search["trial"], search["best_loss"].astype(float), where="post", label="best so far")
    history.set(xlabel="trial", ylabel="loss")
    history.legend()
    bars.barh(list(importance)[::-1], list(importance.values())[::-1])
    bars.set(xlabel="share of the loss's variation", title="" if importance else "too few trials to say")
    figure.subplots_adjust(wspace=0.5)
    _keep(figure, path)


def _draw_calibration(axes: Any, calibration: pd.DataFrame) -> None:
    axes.plot(calibration["predicted"], calibration["observed"], marker="o")
    axes.axline((0, 0), slope=1, linestyle=":", color="grey")
    axes.set(xlabel="predicted probability", ylabel="observed rate")


def _figure(size: tuple[float, float]) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=size)


def _keep(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=80, metadata={"Software": None})
