"""Labelled rows with the features that were known before each: the parts by role, and the origins that a trial is judged at.

In: a home and a task. Out: frames. Never looks beyond a row's instant; never lets a label window reach into the time it is judged in.
"""

import difflib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd

from models.task import Task
from pipelines import feature_store, tables
from pipelines.errors import InputError
from pipelines.settings import Settings
from pipelines.training.tasks import label_rows

KEYS = ("customer_id", "event_timestamp", "label", "split")
PROTECTED = ("age_band", "gender", "region")  # kept beside the rows for those who watch; the first two are never inputs
METRICS = ("auc", "average_precision")  # of `models.evaluation`, that a task may be judged by: higher is better
CUTOFFS = 24  # rows at no more instants than this were labelled from cut-offs, others from moments all along
MIN_ROWS, MIN_CLASS_ROWS = 100, 20  # of either side of an earlier origin

Part = tuple[pd.DataFrame, np.ndarray]


@dataclass(frozen=True)
class Rows:
    """Labelled rows with their features, in time order, the names of the columns that the model may see, and when labels were known."""

    frame: pd.DataFrame
    inputs: list[str]
    matured: pd.Series

    def part(self, *splits: str) -> Part:
        """Features and labels of one split, or of several together, in time order."""
        return self._chosen(self.frame["split"].isin(splits))

    def test(self) -> pd.DataFrame:
        """The test rows, all columns."""
        return self.frame[self.frame["split"] == "test"].reset_index(drop=True)

    def earlier_origins(self, count: int) -> list[tuple[Part, Part]]:
        """Up to `count` (train, validation) pairs before the validation rows, newest first: what rolling back in time leaves of train.

        The validation side is one cut-off, or a stretch of time as long as the real validation; the train side holds the rows whose
        labels were known before it starts. Pairs that are too small, or lack a class, are left out.
        """
        train, at = self.frame["split"] == "train", self.frame["event_timestamp"]
        instants = np.sort(at[train].unique())[::-1]
        spans = [(t, t) for t in instants] if len(instants) <= CUTOFFS else self._stretches(count)
        found = []
        for first, last in spans:
            sides = [self._chosen(train & (self.matured <= first)), self._chosen(train & (at >= first) & (at <= last))]
            if all(_can_teach(label) for _, label in sides):
                found.append((sides[0], sides[1]))
        return found[:count]

    def _stretches(self, count: int) -> list[tuple[pd.Timestamp, pd.Timestamp]]:
        held = self.frame.loc[self.frame["split"] == "validation", "event_timestamp"]
        newest = self.frame.loc[self.frame["split"] == "train", "event_timestamp"].max()
        length = held.max() - held.min()
        return [(newest - (i + 1) * length, newest - i * length) for i in range(count)]

    def _chosen(self, is_chosen: pd.Series) -> Part:
        rows = self.frame[is_chosen]
        return rows[self.inputs], rows["label"].to_numpy(dtype=float)


def read_rows(home: Path, task: Task, *, settings: Settings, as_of: datetime) -> Rows:
    """The task's label rows joined with what was known strictly before each.

    Raises NotTrainable; InputError where the task names a metric or a column that there is not, or its rule gives no scores: before
    anything is tried.
    """
    wanted = label_rows(home, task, settings=settings, as_of=as_of)
    frame = feature_store.training_frame(home, wanted[list(KEYS)], service=task.feature_service)
    found = Rows(frame, [c for c in frame.columns if c not in KEYS and c not in task.excluded], wanted["matured_timestamp"])
    require_sound(task, found)
    return found


def require_sound(task: Task, rows: Rows) -> None:
    """Raises InputError where the task asks of these rows what they do not have."""
    if task.metric not in METRICS:
        raise InputError(f"training: task {task.name} expects the metric {task.metric!r}; there are {', '.join(METRICS)}")
    for told, names in (("declares a direction of", task.monotone), ("reads the history", task.history.values())):
        for name in names:
            if name not in rows.frame:
                raise InputError(f"training: task {task.name} {told} {_no_column(name, rows, task)}")
    test = rows.test()
    try:
        scores = np.asarray(task.rival(test))
    except KeyError as error:
        raise InputError(f"training: the rule of task {task.name} reads {_no_column(str(error.args[0]), rows, task)}") from error
    if scores.shape != (len(test),) or not np.issubdtype(scores.dtype, np.number) or not np.isfinite(scores.astype(float)).all():
        had = f"{scores.dtype} of shape {scores.shape}, or not all finite"
        raise InputError(
            f"training: the rule of task {task.name} is to give one finite number for each of {len(test):,} rows; it gave {had}"
        )


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


def _no_column(name: str, rows: Rows, task: Task) -> str:
    near = difflib.get_close_matches(name, [str(column) for column in rows.frame.columns], n=3)
    return f"{name}, which {task.feature_service} does not have" + (f"; near it are {', '.join(near)}" if near else "")


def _can_teach(label: np.ndarray) -> bool:
    return len(label) >= MIN_ROWS and min(label.sum(), len(label) - label.sum()) >= MIN_CLASS_ROWS
