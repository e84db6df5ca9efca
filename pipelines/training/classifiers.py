"""Labelled rows of a task -> a tuned, calibrated classifier with its test against baselines and optimum."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from models import evaluation
from models.classifier import Classifier
from models.evaluation import Metric
from models.task import Task
from pipelines import horizon, tracking
from pipelines.registry import Champion
from pipelines.settings import Settings
from pipelines.training import baselines, explanations, slices, timing, truth, valuing
from pipelines.training.fingerprint import fingerprint
from pipelines.training.gate import Sheet, Verdict, examine
from pipelines.training.leaks import suspects
from pipelines.training.publishing import (
    Baseline,
    Fitted,
    Quality,
    code_hash,
    consent_record,
    settings_fit,
    share,
    signature_rows,
)
from pipelines.training.rows import PROTECTED, Rows, read_rows, with_protected
from pipelines.training.study import storage_of
from pipelines.training.tasks import discover
from pipelines.training.timing import Timing
from pipelines.training.tuning import search_name, tune
from pipelines.training.valuing import Valuing

CHURN = "churn"  # the task that may be asked for more than its label

_DAY_S = 86_400.0


def fit(name: str, home: Path, *, settings: Settings, as_of: datetime, progress: Callable[[int, int], None]) -> tuple[Fitted, tracking.Run]:
    """The tuned winner of task `name`, tested once, and its open run. Raises NotTrainable."""
    task = discover()[name]
    rows = read_rows(home, task, settings=settings, as_of=as_of)
    digest, options, fixed = fingerprint(rows.frame), settings.training, _fixed(task, rows, settings)
    searched = fingerprint(digest, code_hash(Classifier), code_hash(task.rival), fixed, options.folds)[:16]
    study = f"{name}/{searched}/{options.seed}"
    tags = {"data.sha256": digest, "feature_service": task.feature_service, "cutoffs": _cutoffs(rows.frame), **tracking.commit()}
    when = _timing(task, rows, home, settings=settings, as_of=as_of)
    kept = when if when is not None and when.is_kept else None
    value = _valuing(task, rows, home, settings=settings, as_of=as_of)
    asked = [f"{name} {days} days" for name, days in ((timing.FOLDER, options.when_days), (valuing.FOLDER, options.value_days)) if days]
    searched_as = "/".join([search_name(study, options.workers), str(options.trials), *(asked if task.name == CHURN else [])])
    run = tracking.open_run(home, name, study=searched_as, tags=tags, server=options.tracking_url)

    finished: list[Any] = []

    def on_trial(trial: Any) -> None:
        tracking.log_trial(run, trial)
        finished.append(trial)
        progress(len(finished), options.trials)

    train, validation = rows.part("train"), rows.part("validation")
    params = tune(
        Classifier, train, validation, earlier=rows.earlier_origins(options.folds - 1), n_trials=options.trials, seed=options.seed,
        storage=storage_of(home, options), workers=options.workers, study_name=study, timeout_s=options.timeout_s,
        fixed=fixed, suggest=task.suggest, on_trial=on_trial,
    )  # fmt: skip
    told = tracking.tell_search(run, finished)
    params["n_seeds"] = options.seeds
    stopped = Classifier(**params).fit(*train, validation=validation)
    learner = stopped.refitted(*rows.part("train", "validation"))
    fitted = _tested(task, learner, stopped, rows, home, params=params, digest=digest, when=when, settings=settings)
    fitted = replace(fitted, manifest={**fitted.manifest, "search": told})
    if kept is not None:
        fitted = _with(fitted, timing.FOLDER, kept.hazard, kept.told(), kept.metrics())
    if value is not None:
        fitted = _with(fitted, valuing.FOLDER, value.learner, value.told(), value.metrics())
    explanations.save(run, learner, rows, trials=finished, seed=options.seed, when=kept)
    return fitted, run


# -- private -----------------------------------------------------------------------------------------------------------


def _fixed(task: Task, rows: Rows, settings: Settings) -> dict[str, Any]:
    """Hyper-parameters that are not searched: costs, and what the task declares of columns that there are."""
    monotone = {name: way for name, way in task.monotone.items() if name in rows.inputs}
    fixed: dict[str, Any] = {**settings_fit(settings), **({"monotone": monotone} if monotone else {})}
    if task.history and set(task.history.values()) <= set(rows.inputs):
        waits_s = (rows.matured - rows.frame["event_timestamp"]).dt.total_seconds()
        fixed |= {"history": dict(task.history), "horizon_days": float(waits_s.median()) / _DAY_S}
    return fixed


def _timing(task: Task, rows: Rows, home: Path, *, settings: Settings, as_of: datetime) -> Timing | None:
    """Of a silence, when it ends: of churn as far ahead as the settings ask, to be kept, else to the horizon, as a baseline."""
    if not task.is_silence:
        return None
    days = settings.training.when_days if task.name == CHURN else None
    return timing.fit(home, rows, days=days, settings=settings, as_of=as_of)


def _valuing(task: Task, rows: Rows, home: Path, *, settings: Settings, as_of: datetime) -> Valuing | None:
    """What customers will be worth, where churn's settings ask."""
    if task.name != CHURN or settings.training.value_days is None:
        return None
    is_test = rows.frame["split"] == "test"
    at, matured = rows.frame.loc[is_test, "event_timestamp"].iloc[0], rows.matured[is_test].iloc[0]
    return valuing.fit(home, at=at, days=(matured - at) / timedelta(days=1), settings=settings, as_of=as_of)


def _with(fitted: Fitted, folder: str, learner: Any, told: Mapping[str, Any], metrics: Mapping[str, float]) -> Fitted:
    """The same with a further learner beside it, what it tells, and how good it is."""
    return replace(
        fitted,
        quality=replace(fitted.quality, others={**fitted.quality.others, **metrics}),
        manifest={**fitted.manifest, folder: told},
        beside={**fitted.beside, folder: learner},
    )


def _tested(
    task: Task, learner: Classifier, stopped: Classifier, rows: Rows, home: Path, *, params: dict[str, Any], digest: str,
    when: Timing | None, settings: Settings,
) -> Fitted:  # fmt: skip
    """`stopped` has not seen the validation rows: of these, what it says is what a model says of people it does not know."""
    test = rows.test()
    metric: Metric = getattr(evaluation, task.metric)
    probability = learner.predict_proba(test[rows.inputs])[:, 1]
    train, label = rows.part("train")
    sample = signature_rows(test[rows.inputs])
    output = pd.DataFrame({"probability": learner.predict_proba(sample)[:, 1]})
    said = np.empty(len(rows.frame))
    for split, those in (("train", learner.predict_proba(train)), ("validation", stopped.predict_proba(rows.part("validation")[0]))):
        said[rows.frame["split"] == split] = those[:, 1]
    said[rows.frame["split"] == "test"] = probability
    evidence = with_protected(home, rows.frame).assign(probability=said)

    one = _json_columns(sample.head(1))
    sheet = Sheet(
        metric=metric,
        label=test["label"].to_numpy(dtype=float),
        probability=probability,
        customers=test["customer_id"],
        groups=evidence.loc[evidence["split"] == "test", list(PROTECTED)].reset_index(drop=True),
        score_one=lambda: learner.predict_values(learner.encode(one)),
    )

    def judge(champion: Champion, is_newer: bool) -> Verdict | None:
        other = Classifier.load(champion.folder)
        if not set(other.feature_names_) <= set(rows.inputs):
            return None
        theirs = other.predict_proba(test[other.feature_names_])[:, 1]
        return Verdict(metric(sheet.label, theirs), examine(sheet, theirs, is_newer=is_newer, settings=settings))

    return Fitted(
        name=task.name,
        learner=learner,
        params=params,
        quality=_quality(task, metric, rows, probability, home, when=when, settings=settings),
        data_sha256=digest,
        manifest={
            "feature_service": task.feature_service,
            "features": rows.inputs,
            "threshold": learner.threshold_,
            "base_rate": float(label.mean()),
            "cutoffs": _cutoffs(rows.frame),
            "rows": {str(split): int(n) for split, n in rows.frame["split"].value_counts().items()},
            "suspect_features": suspects(train, label),
            "slices": slices.of_test(sheet, settings=settings),
            "consent": consent_record(home, rows.frame["customer_id"], settings=settings),
            "fit": "stopped and calibrated on the validation rows, then fitted on these and the train rows, tested once",
            "golden": {"features": _json_columns(sample), "probability": output["probability"].tolist()},
        },
        features=sample,
        output=output,
        judge=judge,
        evidence=evidence,
    )


def _quality(
    task: Task, metric: Metric, rows: Rows, probability: np.ndarray, home: Path, *, when: Timing | None, settings: Settings
) -> Quality:
    test, options = rows.test(), settings.training
    label = test["label"].to_numpy(dtype=float)
    rivals = baselines.scores(task, rows, home, settings=settings, timing=when)
    leads = evaluation.leads(metric, label, probability, rivals, test["customer_id"], draws=options.bootstrap_draws, seed=options.seed)
    best = truth.probability(home, task.name, test[["customer_id", "event_timestamp"]], settings=_with_horizon(task, rows, settings))
    rule = leads[task.rival_name]
    return Quality(
        metric=task.metric,
        value=metric(label, probability),
        rival=task.rival_name,
        rival_value=metric(label, rivals[task.rival_name]),
        low=rule.low,
        high=rule.high,
        optimum=None if best is None else metric(label, best),
        others={
            "base_rate": float(label.mean()),
            "mean_probability": float(probability.mean()),
            "ece": evaluation.expected_calibration_error(label, probability),
            "brier": evaluation.brier(label, probability),
            "log_loss": evaluation.log_loss(label, probability),
            "average_precision": evaluation.average_precision(label, probability),
            **({} if best is None else _of_optimum(best, probability)),
        },
        baselines=tuple(Baseline(name, metric(label, rivals[name]), lead.value, lead.low, lead.high) for name, lead in leads.items()),
    )


def _of_optimum(best: np.ndarray, probability: np.ndarray) -> dict[str, float]:
    """Free of the noise of labels: the share of the optimum's AUC above chance, and the excess over its Brier score as a share of that."""
    reached, most = evaluation.expected_auc(best, probability), evaluation.expected_auc(best, best)
    excess, least = float(np.mean((probability - best) ** 2)), float(np.mean(best * (1.0 - best)))
    return {"share_of_optimum": share(reached - 0.5, most - 0.5), "excess_brier": share(excess, least)}


def _with_horizon(task: Task, rows: Rows, settings: Settings) -> Settings:
    """Settings that name the horizon of churn that the labels were made with."""
    if task.name != "churn":
        return settings
    days = horizon.of_rows(rows.frame.assign(matured_timestamp=rows.matured), settings=settings)
    return settings.model_copy(update={"labels": settings.labels.model_copy(update={"churn_horizon_days": days})})


def _cutoffs(frame: pd.DataFrame) -> str:
    """First and last label instant of each split, for people."""
    spans = frame.groupby("split")["event_timestamp"].agg(["min", "max"])
    return "; ".join(f"{split} {row['min']:%Y-%m-%d} to {row['max']:%Y-%m-%d}" for split, row in spans.sort_values("max").iterrows())


def _json_columns(sample: pd.DataFrame) -> dict[str, list[Any]]:
    return {str(name): [None if pd.isna(v) else v.item() if hasattr(v, "item") else v for v in column] for name, column in sample.items()}
