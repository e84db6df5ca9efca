"""How fast models are trained, each figure beside a named rival's. In: an empty folder. Out: rows for `rapport bench training`.

Every side runs in a process of its own, on one thread (see `measured`), and is given the same data: an epoch of matrix factorisation
beside implicit's own, a search with its records beside plain LightGBM fits of the same parameters, and a fit of more and more rows.
"""

import importlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from models import als
from models.classifier import Classifier, Prepared
from pipelines.bench.measured import measured
from pipelines.bench.row import BenchRow, row
from pipelines.errors import PipelineError
from pipelines.training.study import Storage
from pipelines.training.tuning import tune

COLUMNS = 30
FITS = "LightGBM's fits of the same parameters"
EPOCHS = 5  # that are timed, after the first
LIBRARIES = ("lightgbm", "optuna", "scipy.optimize")  # loaded before a search is timed, on every side: that is done once
ROUNDS = 100  # of boosting, at every number of rows


@dataclass(frozen=True)
class TrainingSizes:
    """How much is measured. `trials` are of `trial_rows`; `rows`: the sizes that the time of a fit is compared over."""

    customers: int
    items: int
    interactions: int
    factors: int
    trials: int
    trial_rows: int
    rows: tuple[int, ...]


TRAINING_TINY = TrainingSizes(300, 80, 3_000, 8, 2, 1_000, (500, 1_000))
TRAINING_QUICK = TrainingSizes(20_000, 2_000, 400_000, 64, 8, 100_000, (100_000, 300_000))
TRAINING_USUAL = TrainingSizes(100_000, 10_000, 2_000_000, 64, 50, 100_000, (100_000, 1_000_000))
TRAINING_FULL = TrainingSizes(300_000, 20_000, 10_000_000, 128, 50, 100_000, (100_000, 1_000_000, 5_000_000))


def training_rows(folder: Path, *, sizes: TrainingSizes = TRAINING_USUAL) -> list[BenchRow]:
    """Epochs, searches, fits."""
    folder.mkdir(parents=True, exist_ok=True)
    found = [_epoch(sizes), *_search(folder / "search", sizes), *_fits(sizes)]
    shutil.rmtree(folder / "search")
    return found


# -- an epoch ----------------------------------------------------------------------------------------------------------


def _epoch(sizes: TrainingSizes) -> BenchRow:
    ours, theirs = (measured(side, lambda: _interactions(sizes)).value for side in (_our_epoch(sizes), _their_epoch(sizes)))
    name = f"one epoch of {sizes.interactions:,} interactions of {sizes.customers:,} customers, {sizes.factors} factors"
    return row(name, ours, "CPU s", "implicit's own epoch", theirs)


def _our_epoch(sizes: TrainingSizes) -> Callable[[Any], float]:
    def fit(interactions: Any, epochs: int) -> None:
        objective = als.Objective.balanced(interactions, alpha0=0.3, regularization=0.01, nu=0.5)
        als.factorize(interactions, objective, n_factors=sizes.factors, n_epochs=epochs, seed=0, num_threads=1)

    return lambda given: _per_epoch(fit, given)


def _their_epoch(sizes: TrainingSizes) -> Callable[[Any], float]:
    def fit(interactions: Any, epochs: int) -> None:
        from implicit.cpu.als import AlternatingLeastSquares

        learner = AlternatingLeastSquares(factors=sizes.factors, iterations=epochs, num_threads=1, random_state=0)
        learner.fit(interactions, show_progress=False)

    return lambda given: _per_epoch(fit, given)


def _per_epoch(fit: Callable[[Any, int], None], given: Any) -> float:
    """CPU seconds of an epoch: what more of them take, so that what is done once does not count."""
    took = []
    for epochs in (1, 1, 1 + EPOCHS):  # the first is the warm-up
        before = time.process_time()
        fit(given, epochs)
        took.append(time.process_time() - before)
    return max(took[2] - took[1], 1e-9) / EPOCHS


def _interactions(sizes: TrainingSizes) -> Any:
    """Who did something with what: few customers and items with much, most with little."""
    rng = np.random.default_rng(0)
    customers = (rng.pareto(1.5, sizes.interactions) * sizes.customers / 5).astype(np.int64) % sizes.customers
    items = (rng.pareto(1.2, sizes.interactions) * sizes.items / 20).astype(np.int64) % sizes.items
    weights = rng.uniform(0.2, 3.0, sizes.interactions).astype(np.float32)
    return sparse.csr_matrix((weights, (customers, items)), (sizes.customers, sizes.items))


# -- a search ----------------------------------------------------------------------------------------------------------


def _search(folder: Path, sizes: TrainingSizes) -> list[BenchRow]:
    def prepare() -> Any:
        for library in LIBRARIES:
            importlib.import_module(library)
        return _parts(sizes.trial_rows)

    ours = measured(lambda given: _tracked(given, sizes.trials), lambda: (*prepare(), _open_run(folder)))
    tried, trees = ours.value
    plain, once = (measured(lambda given, way=way: way(given, tried), prepare) for way in (_plain_fits, _plain_fits_of_bins))  # type: ignore[misc]
    if not plain.value == once.value == trees:
        raise PipelineError(f"bench: both sides were to grow the same trees; ours {trees}, LightGBM's {plain.value} and {once.value}")
    one, two = (measured(lambda given, n=n: _shared(given, sizes.trials, n), prepare).wall_s for n in (1, 2))  # type: ignore[misc]
    name = f"{sizes.trials} trials on {sizes.trial_rows:,} x {COLUMNS}"
    return [
        row(f"{name}, tuned and recorded", ours.cpu_s, "CPU s", FITS, plain.cpu_s),
        row(f"{name}, tuned and recorded: wall", ours.wall_s, "s", FITS, plain.wall_s),
        row(f"{name}, tuned and recorded, beside fits of rows binned once", ours.cpu_s, "CPU s", FITS, once.cpu_s),
        row(f"{name}, two workers: wall", two, "s", "one worker", one),
    ]


def _open_run(folder: Path) -> Any:
    from pipelines import tracking

    return tracking.open_run(folder, "bench", study="bench", tags={}), folder / "journal.log"


class _Counted(Classifier):
    """Says how many trees it kept."""

    trees = 0

    def search_loss(self, prepared: Prepared) -> float:
        loss = super().search_loss(prepared)
        _Counted.trees += self.booster_.num_trees()
        return loss


def _tracked(given: Any, trials: int) -> tuple[list[dict[str, Any]], int]:
    """A search with its journal and its record of each trial; the parameters of all, and the trees of all."""
    from pipelines import tracking

    train, validation, (run, journal) = given
    seen = []

    def on_trial(trial: Any) -> None:
        tracking.log_trial(run, trial)
        seen.append(trial.user_attrs["params"])

    tune(_Counted, train, validation, n_trials=trials, seed=0, storage=Storage(journal), study_name="bench", on_trial=on_trial)
    return seen, _Counted.trees


def _plain_fits(given: Any, tried: list[dict[str, Any]]) -> int:
    """Each of the parameters fitted, stopped early and judged, as one writes it without a search; the trees of all."""
    return sum(_judged(_boosted(given, params), given[1]) for params in tried)


def _plain_fits_of_bins(given: Any, tried: list[dict[str, Any]]) -> int:
    """The same of rows that are binned once for all of them."""
    bins = _bins(given, {"num_threads": 1, "verbosity": -1, "feature_pre_filter": False})
    return sum(_judged(_boosted(given, params, bins=bins), given[1]) for params in tried)


def _judged(booster: Any, validation: Any) -> int:
    later, y_later = validation
    chance = np.clip(booster.predict(later, num_threads=1), 1e-12, 1 - 1e-12)
    float(-np.mean(y_later * np.log(chance) + (1 - y_later) * np.log(1 - chance)))
    return int(booster.best_iteration)


def _boosted(given: Any, params: dict[str, Any], *, rounds: int | None = None, bins: Any = None) -> Any:
    """The same trees by LightGBM's own interface, without what the learner does beside them. rounds: no stopping before."""
    import lightgbm as lgb

    default = Classifier()
    options = {key: params[key] for key in _TREE} | {"seed": params["random_state"], "num_threads": 1}
    options |= {"objective": "binary", "bagging_freq": 1, "deterministic": True, "force_row_wise": True, "verbosity": -1}
    data, judged = bins or _bins(given, options)
    if bins:
        options["feature_pre_filter"] = False
    stop = lgb.early_stopping(rounds or default.early_stopping_rounds, verbose=False)
    return lgb.train(options, data, num_boost_round=rounds or default.n_rounds, valid_sets=[judged], callbacks=[stop])


def _bins(given: Any, options: dict[str, Any]) -> Any:
    """Both parts, binned when they are first used."""
    import lightgbm as lgb

    (features, label), (later, y_later) = given
    data = lgb.Dataset(features, label, params=options)
    return data, lgb.Dataset(later, y_later, reference=data, params=options)


def _shared(given: Any, trials: int, workers: int) -> int:
    tune(Classifier, *given, n_trials=trials, seed=0, workers=workers)
    return trials


_TREE = ("learning_rate", "num_leaves", "min_data_in_leaf", "feature_fraction", "bagging_fraction", "lambda_l2")


def _parts(rows: int) -> tuple[Any, Any]:
    """Training rows, and half as many to stop and judge by."""
    features, label = _labelled(rows + rows // 2)
    return (features.iloc[:rows], label[:rows]), (features.iloc[rows:], label[rows:])


def _labelled(rows: int) -> tuple[pd.DataFrame, np.ndarray]:
    """Amounts, ages and counts, some unknown; a label that a few of them and a pair of them decide."""
    rng = np.random.default_rng(0)
    values = rng.lognormal(0.0, 1.0, (rows, COLUMNS))
    values[:, ::3] = np.floor(values[:, ::3] * 3)
    values[rng.random(rows) < 0.1, 5] = np.nan
    logit = np.log(values[:, 1]) - 0.7 * np.log1p(values[:, 2]) + np.log(values[:, 4]) * np.log(values[:, 7]) - 1.0
    frame = pd.DataFrame(values, columns=[f"feature_{n}" for n in range(COLUMNS)])
    return frame, (rng.random(rows) < 1 / (1 + np.exp(-logit))).astype(float)


# -- more and more rows ------------------------------------------------------------------------------------------------


def _fits(sizes: TrainingSizes) -> list[BenchRow]:
    ours = {rows: measured(_fitted, lambda rows=rows: _parts(rows)) for rows in sizes.rows}  # type: ignore[misc]
    plain = {rows: measured(_fitted_plainly, lambda rows=rows: _parts(rows)) for rows in sizes.rows}  # type: ignore[misc]
    found = []
    for rows in sizes.rows:
        name = f"a classifier of {rows:,} x {COLUMNS}, {ROUNDS} rounds"
        found += [
            row(name, ours[rows].cpu_s, "CPU s", "LightGBM alone", plain[rows].cpu_s),
            row(f"{name}: peak memory", ours[rows].peak_mb, "MB", "LightGBM alone", plain[rows].peak_mb),
        ]
    for less, more in pairwise(sizes.rows):
        grown = ours[more].cpu_s / ours[less].cpu_s
        found.append(row(f"time of a classifier, {less:,} to {more:,} rows", grown, "times", "in step with the rows", more / less))
    return found


def _fitted(given: Any) -> int:
    (features, label), validation = given
    Classifier(n_rounds=ROUNDS, early_stopping_rounds=ROUNDS).fit(features, label, validation=validation)
    return ROUNDS


def _fitted_plainly(given: Any) -> int:
    return int(_boosted(given, Classifier().get_params(), rounds=ROUNDS).num_trees())
