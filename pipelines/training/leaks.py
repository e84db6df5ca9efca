"""Five questions about leaks that any home can be asked: does what a model learns from know what it should not?

In: a home and a task, or labelled rows with their features. Out: findings, each with a sentence. Works on copies that it removes; the
home stays as it is. A test that finds nothing proves nothing: each has a planted leak that it catches among the tests.
"""

import math
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd

from models import evaluation
from models.classifier import Classifier
from models.task import Task
from pipelines import feature_store, features, tables
from pipelines.settings import Settings
from pipelines.training.tasks import label_rows

SUSPECT_AUC = 0.9  # one column that tells this much by itself is likelier a leak than a finding
SUSPECT_LIFT = 3.0  # times what the next best column tells beyond chance
SUSPECT_FLOOR = 0.75  # below it no lift is suspect: where all columns are weak one is always three times another
SUSPECT_ROWS = 20_000
ERRORS = 3.0  # standard errors from one half
PROBED_ROWS = 2_000
ADVERSARY_AUC = 0.98  # beyond this a column says which rows are which
GROWING = re.compile(r"^first_|_total$|_span_|_per_|^days_")  # grow with the log by nature, and so tell early rows from late ones
TOP = 5

Join = Callable[[Path, pd.DataFrame], pd.DataFrame]  # (home, label rows) -> the same rows with features


@dataclass(frozen=True)
class Finding:
    """One question: whether no leak was found, and what was."""

    name: str
    is_clean: bool
    found: str


def audit(home: Path, task: Task, *, settings: Settings, as_of: datetime, join: Join | None = None) -> tuple[Finding, ...]:
    """All five, of the task's rows in this home. join: how features come to label rows, by default the feature store's way.

    Two of them compute every feature anew on a changed copy of the events. Raises NotTrainable where there are no labels.
    """
    rows = label_rows(home, task, settings=settings, as_of=as_of).drop(columns="matured_timestamp")
    joined = join or (lambda where, wanted: feature_store.training_frame(where, wanted, service=task.feature_service))
    frame = joined(home, rows)
    inputs = [c for c in frame.columns if c not in rows.columns and c not in task.excluded]
    train = frame[frame["split"] == "train"]
    return (
        truncation(home, rows, joined, settings=settings),
        future_shuffle(home, rows, joined, settings=settings),
        single_feature(train[inputs], train["label"].to_numpy(dtype=float)),
        permuted_labels(home, rows, joined, inputs, seed=settings.training.seed),
        adversarial(frame, inputs, seed=settings.training.seed),
    )


def truncation(home: Path, rows: pd.DataFrame, join: Join, *, settings: Settings) -> Finding:
    """Features on the whole log equal those on the log cut off after the rows' last instant before the test, to the last bit."""
    return _rebuilt("truncation", home, rows, join, lambda events, cut: events[_knew(events) < cut], settings=settings)


def future_shuffle(home: Path, rows: pd.DataFrame, join: Join, *, settings: Settings) -> Finding:
    """Features stay as they are when the later events are dealt out among the customers and items anew."""

    def dealt(events: pd.DataFrame, cut: pd.Timestamp) -> pd.DataFrame:
        later, rng, changed = np.flatnonzero(_knew(events) >= cut), np.random.default_rng(settings.training.seed), events.copy()
        for name in ("customer_id", "item_id"):
            values = events[name].to_numpy(dtype=object).copy()
            values[later] = values[rng.choice(later, len(later))]  # with replacement: sums over all time move as well
            changed[name] = values
        return changed

    return _rebuilt("future shuffle", home, rows, join, dealt, settings=settings)


def single_feature(train: pd.DataFrame, label: np.ndarray) -> Finding:
    """No column tells the label almost alone."""
    found = suspects(train, label)
    told = ", ".join(f"{name} has an AUC of {value:.3f} by itself" for name, value in found.items())
    return Finding("single feature", not found, told or f"none of {train.shape[1]} columns tells the label almost alone")


def suspects(train: pd.DataFrame, label: np.ndarray) -> dict[str, float]:
    """Number columns that tell the label almost alone, or far better than any other, with their AUC: look for a leak there first."""
    chosen = np.linspace(0, len(label) - 1, min(len(label), SUSPECT_ROWS)).astype(int)
    alone = {}
    for name, column in train.iloc[chosen].items():
        if not pd.api.types.is_numeric_dtype(column) or column.nunique() < 2:
            continue
        value = evaluation.auc(label[chosen], column.astype(float).fillna(-1.0).to_numpy())
        alone[str(name)] = max(value, 1 - value)
    ranked = sorted(alone, key=lambda name: -alone[name])
    found = {name for name in ranked if alone[name] > SUSPECT_AUC}
    if len(ranked) > 1 and alone[ranked[0]] > SUSPECT_FLOOR and alone[ranked[0]] - 0.5 > SUSPECT_LIFT * (alone[ranked[1]] - 0.5):
        found.add(ranked[0])
    return {name: round(alone[name], 4) for name in ranked if name in found}


def permuted_labels(home: Path, rows: pd.DataFrame, join: Join, inputs: list[str], *, seed: int) -> Finding:
    """With labels dealt out anew within each role, before features are joined, a model does no better than chance on the test."""
    rng = np.random.default_rng(seed)
    dealt = rows["label"].to_numpy().copy()
    for places in rows.groupby("split").indices.values():
        dealt[places] = dealt[rng.permutation(places)]
    frame = join(home, rows.assign(label=dealt))
    train, test = (frame[frame["split"] == split] for split in ("train", "test"))
    learner = _quick(len(train), seed).fit(train[inputs], train["label"].to_numpy())
    label = test["label"].to_numpy(dtype=float)
    value = evaluation.auc(label, learner.predict_proba(test[inputs])[:, 1])
    positives, negatives = label.sum(), len(label) - label.sum()
    error = math.sqrt((len(label) + 1) / (12 * positives * negatives))  # of an AUC of chance; source: Hanley & McNeil 1982
    told = f"labels without meaning are told with an AUC of {value:.3f}; chance is 0.5 within {ERRORS * error:.3f}"
    return Finding("permuted labels", abs(value - 0.5) <= ERRORS * error, told)


def adversarial(frame: pd.DataFrame, inputs: list[str], *, seed: int) -> Finding:
    """How well train and test rows are told apart, and by which columns: drift, and beyond `ADVERSARY_AUC` a column that gives it away.

    Columns that grow with the log are set aside. A window longer than the log was at the first cut-off grows as well: read the names.
    """
    inputs = [name for name in inputs if not GROWING.search(name)]
    rows = frame[frame["split"].isin(["train", "test"])].reset_index(drop=True)
    rows = rows.iloc[np.random.default_rng(seed).permutation(len(rows))]  # the learner takes its newest rows aside
    is_test = (rows["split"] == "test").to_numpy(dtype=float)
    held = pd.util.hash_pandas_object(rows["customer_id"], index=False).to_numpy() % 2 == 1  # whole customers: nobody is on both sides
    learner = _quick(int((~held).sum()), seed).fit(rows.loc[~held, inputs], is_test[~held])
    value = evaluation.auc(is_test[held], learner.predict_proba(rows.loc[held, inputs])[:, 1])
    weight = learner.explain(rows.loc[held, inputs].head(PROBED_ROWS)).abs().mean().sort_values(ascending=False)
    told = f"train and test are told apart with an AUC of {value:.3f}, first by {', '.join(weight.index[:TOP])}"
    return Finding("adversarial split", value <= ADVERSARY_AUC, told)


# -- private -----------------------------------------------------------------------------------------------------------


def _rebuilt(
    name: str,
    home: Path,
    rows: pd.DataFrame,
    join: Join,
    change: Callable[[pd.DataFrame, pd.Timestamp], pd.DataFrame],
    *,
    settings: Settings,
) -> Finding:
    """Whether the rows before the test have the same features in a copy of the home with other later events."""
    cut = rows.loc[rows["split"] != "test", "event_timestamp"].max()
    before = rows[rows["event_timestamp"] <= cut]
    before = before.iloc[np.unique(np.linspace(0, len(before) - 1, PROBED_ROWS).astype(int))].reset_index(drop=True)
    events = tables.read(home, tables.EVENTS)
    with tempfile.TemporaryDirectory(dir=home, prefix=".leaks-") as scratch:
        copy = Path(scratch)
        shutil.copytree(home / "tables", copy / "tables", symlinks=True)
        tables.write(copy, tables.EVENTS, change(events, cut))
        features.build(copy, session_gap_minutes=settings.ingest.session_gap_minutes)
        feature_store.apply(copy)
        moved = _differing(join(home, before), join(copy, before))
    later = int((_knew(events) >= cut).sum())
    told = ", ".join(f"{column} in {count} rows" for column, count in moved.items())
    return Finding(name, not moved, told or f"{len(before)} rows keep every feature whatever became of {later} later events")


def _quick(n_rows: int, seed: int) -> Classifier:
    """Few rounds, and leaves small enough that a few hundred rows can tell something."""
    return Classifier(n_rounds=60, min_data_in_leaf=min(40, max(5, n_rows // 30)), random_state=seed)


def _knew(events: pd.DataFrame) -> pd.Series:
    known: pd.Series = events[["event_timestamp", "created_timestamp"]].max(axis=1)
    return known


def _differing(left: pd.DataFrame, right: pd.DataFrame) -> dict[str, int]:
    """Columns of which some values differ, with how many; nulls are equal."""
    found = {}
    for name in left.columns:
        ours, theirs = left[name].reset_index(drop=True), right[name].reset_index(drop=True)
        differs = (ours != theirs) & ~(ours.isna() & theirs.isna())
        if differs.fillna(True).any():
            found[str(name)] = int(differs.fillna(True).sum())
    return found
