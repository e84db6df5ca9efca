"""Churn or intent labels + point-in-time features -> a tuned, calibrated classifier with its test against rival and optimum."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from models import churn, evaluation, intent
from models.classifier import Classifier, Task
from pipelines import feature_store, labels, tables, tracking
from pipelines.registry import Champion
from pipelines.settings import Settings
from pipelines.training import truth
from pipelines.training.publishing import Fitted, Quality, code_hash, consent_record, settings_fit, signature_rows
from pipelines.training.tuning import fingerprint, tune

TASKS = {task.name: task for task in (churn.TASK, intent.TASK)}
KEYS = ("customer_id", "event_timestamp", "label", "split")
PROTECTED = ("age_band", "gender", "region")  # kept beside the rows for those who watch; the first two are never inputs
SUSPECT_AUC = 0.9  # one column that tells this much by itself is likelier a leak than a finding
SUSPECT_ROWS = 20_000

EVIDENCE = {"churn": tables.TRAINING_CHURN, "intent": tables.TRAINING_INTENT}

_LABELS: dict[str, tuple[tables.Table, Callable[..., pd.DataFrame]]] = {
    "churn": (tables.LABELS_CHURN, labels.churn),
    "intent": (tables.LABELS_INTENT, labels.intent),
}


@dataclass(frozen=True)
class Rows:
    """Labelled rows with their features, in time order, and the names of the columns that the model may see."""

    frame: pd.DataFrame
    inputs: list[str]

    def part(self, split: str) -> tuple[pd.DataFrame, np.ndarray]:
        """Features and labels of one split."""
        rows = self.frame[self.frame["split"] == split]
        return rows[self.inputs], rows["label"].to_numpy(dtype=float)

    def test(self) -> pd.DataFrame:
        """The test rows, all columns."""
        return self.frame[self.frame["split"] == "test"].reset_index(drop=True)


def fit(name: str, home: Path, *, settings: Settings, as_of: datetime, progress: Callable[[int, int], None]) -> tuple[Fitted, tracking.Run]:
    """The tuned winner of task `name`, tested once, and its open run. Raises NotTrainable."""
    task = TASKS[name]
    rows = read_rows(home, task, settings=settings, as_of=as_of)
    digest = fingerprint(rows.frame)
    options = settings.training
    study = f"{name}/{fingerprint(digest, code_hash(Classifier), settings_fit(settings))[:16]}/{options.seed}"
    tags = {"data.sha256": digest, "feature_service": task.feature_service, "cutoffs": _cutoffs(rows.frame), **tracking.commit()}
    run = tracking.open_run(home, name, study=f"{study}/{options.trials}", tags=tags)

    finished = itertools.count(1)

    def on_trial(trial: Any) -> None:
        tracking.log_trial(run, trial)
        progress(next(finished), options.trials)

    train, validation = rows.part("train"), rows.part("validation")
    params = tune(
        Classifier, train, validation, n_trials=options.trials, seed=options.seed, journal=home / "optuna" / "journal.log",
        study_name=study, timeout_s=options.timeout_s, fixed=settings_fit(settings), on_trial=on_trial,
    )  # fmt: skip
    learner = Classifier(**params).fit(*train, validation=validation)
    return _tested(task, learner, rows, home, params=params, digest=digest, settings=settings), run


def read_rows(home: Path, task: Task, *, settings: Settings, as_of: datetime) -> Rows:
    """The task's label rows joined with what was known strictly before each. Raises NotTrainable."""
    table, make = _LABELS[task.name]
    wanted = tables.read(home, table)
    # Never built, built for a later now, or not trainable: the labels say why.
    if wanted.empty or wanted["matured_timestamp"].max() > pd.Timestamp(as_of):
        events, consents = tables.read(home, tables.EVENTS), tables.read(home, tables.CONSENTS)
        wanted = make(events, consents, settings=settings, as_of=as_of)
    wanted = wanted.sort_values(["event_timestamp", "customer_id"], ignore_index=True)[list(KEYS)]
    frame = feature_store.training_frame(home, wanted, service=task.feature_service)
    return Rows(frame, [c for c in frame.columns if c not in KEYS and c not in task.excluded])


def suspects(features_of_train: pd.DataFrame, label: np.ndarray) -> dict[str, float]:
    """Number columns that tell the label almost alone, with their AUC: look for a leak there before believing the model."""
    chosen = np.linspace(0, len(label) - 1, min(len(label), SUSPECT_ROWS)).astype(int)
    found = {}
    for name, column in features_of_train.iloc[chosen].items():
        if not pd.api.types.is_numeric_dtype(column) or column.nunique() < 2:
            continue
        value = evaluation.auc(label[chosen], column.astype(float).fillna(-1.0).to_numpy())
        if max(value, 1 - value) > SUSPECT_AUC:
            found[str(name)] = round(max(value, 1 - value), 4)
    return found


def with_protected(home: Path, frame: pd.DataFrame) -> pd.DataFrame:
    """`frame` with the protected traits stated strictly before each row, where it lacks them; same rows, same order."""
    absent = [name for name in PROTECTED if name not in frame.columns]
    profile = tables.read(home, tables.CUSTOMER_PROFILE).sort_values("event_timestamp")
    for name in absent:  # a guess says nothing about how a group is treated
        profile[name] = profile[name].mask(profile[f"is_{name}_imputed"].fillna(False).astype(bool))
    profile = profile[["customer_id", "event_timestamp", *absent]]
    left = frame[["customer_id", "event_timestamp"]].reset_index(drop=True).reset_index(names="row").sort_values("event_timestamp")
    profile["event_timestamp"] = profile["event_timestamp"].astype(left["event_timestamp"].dtype)
    found = pd.merge_asof(left, profile, on="event_timestamp", by="customer_id", allow_exact_matches=False)
    return frame.reset_index(drop=True).assign(**{name: found.sort_values("row")[name].to_numpy() for name in absent})


# -- private -----------------------------------------------------------------------------------------------------------


def _tested(task: Task, learner: Classifier, rows: Rows, home: Path, *, params: dict[str, Any], digest: str, settings: Settings) -> Fitted:
    test = rows.test()
    metric: evaluation.Metric = getattr(evaluation, task.metric)
    probability = learner.predict_proba(test[rows.inputs])[:, 1]
    train, label = rows.part("train")
    sample = signature_rows(test[rows.inputs])
    output = pd.DataFrame({"probability": learner.predict_proba(sample)[:, 1]})

    def judge(champion: Champion) -> float | None:
        other = Classifier.load(champion.folder)
        if not set(other.feature_names_) <= set(rows.inputs):
            return None
        return metric(test["label"].to_numpy(dtype=float), other.predict_proba(test[other.feature_names_])[:, 1])

    everything = learner.predict_proba(rows.frame[rows.inputs])[:, 1]
    return Fitted(
        name=task.name,
        learner=learner,
        params=params,
        quality=_quality(task, metric, test, probability, home, settings=settings),
        data_sha256=digest,
        manifest={
            "feature_service": task.feature_service,
            "features": rows.inputs,
            "threshold": learner.threshold_,
            "base_rate": float(label.mean()),
            "cutoffs": _cutoffs(rows.frame),
            "rows": {str(split): int(n) for split, n in rows.frame["split"].value_counts().items()},
            "suspect_features": suspects(train, label),
            "consent": consent_record(home, rows.frame["customer_id"], settings=settings),
            "fit": "trained on the train rows, stopped and calibrated on the validation rows, tested once",
            "golden": {"features": _json_columns(sample), "probability": output["probability"].tolist()},
        },
        features=sample,
        output=output,
        judge=judge,
        evidence=with_protected(home, rows.frame).assign(probability=everything),
    )


def _quality(
    task: Task, metric: evaluation.Metric, test: pd.DataFrame, probability: np.ndarray, home: Path, *, settings: Settings
) -> Quality:
    label, rival = test["label"].to_numpy(dtype=float), task.rival(test)
    options = settings.training
    gain = evaluation.paired_bootstrap(
        evaluation.difference(metric, label, probability, rival), test["customer_id"], draws=options.bootstrap_draws, seed=options.seed
    )
    best = truth.probability(home, task.name, test[["customer_id", "event_timestamp"]], settings=settings)
    return Quality(
        metric=task.metric,
        value=metric(label, probability),
        rival=task.rival_name,
        rival_value=metric(label, rival),
        low=gain.low,
        high=gain.high,
        optimum=None if best is None else metric(label, best),
        others={
            "base_rate": float(label.mean()),
            "mean_probability": float(probability.mean()),
            "ece": evaluation.expected_calibration_error(label, probability),
            "brier": evaluation.brier(label, probability),
            "log_loss": evaluation.log_loss(label, probability),
            "average_precision": evaluation.average_precision(label, probability),
        },
    )


def _cutoffs(frame: pd.DataFrame) -> str:
    """First and last label instant of each split, for people."""
    spans = frame.groupby("split")["event_timestamp"].agg(["min", "max"])
    return "; ".join(f"{split} {row['min']:%Y-%m-%d} to {row['max']:%Y-%m-%d}" for split, row in spans.sort_values("max").iterrows())


def _json_columns(sample: pd.DataFrame) -> dict[str, list[Any]]:
    return {str(name): [None if pd.isna(v) else v.item() if hasattr(v, "item") else v for v in column] for name, column in sample.items()}
