"""The supervised tasks that `models` declares, and the labelled rows of one: what `rapport train NAME` trains."""

from datetime import datetime
from functools import cache
from pathlib import Path

import pandas as pd

from models import tasks
from models.task import Task
from pipelines import labels, tables
from pipelines.errors import InputError
from pipelines.settings import Settings

LABELLED_FROM = (tables.EVENTS, tables.CONSENTS)  # what labels are made of, where none are stored

_MADE = {"churn": (tables.LABELS_CHURN, labels.churn), "intent": (tables.LABELS_INTENT, labels.intent)}


@cache
def discover() -> dict[str, Task]:
    """Tasks by name. Raises InputError where two have one name, or a name is no identifier."""
    try:
        return tasks.declared()
    except ValueError as error:
        raise InputError(f"training: {error}") from error


def label_rows(home: Path, task: Task, *, settings: Settings, as_of: datetime) -> pd.DataFrame:
    """The task's label rows as of `as_of`, in time order: customer_id, event_timestamp, label, split, matured_timestamp.

    Stored ones where they are those of `as_of`, else made anew of the events and consents of one moment: an ingest may go on meanwhile.
    Raises NotTrainable.
    """
    rows = _stored(home, task, as_of)
    if rows.empty:  # never built, built for a later now, or not trainable: the labels say why
        with tables.snapshot(home, LABELLED_FROM) as seen:
            events, consents = (tables.read(seen, table) for table in LABELLED_FROM)
        if task.label is not None:
            rows = labels.declared(task, events, consents, settings=settings, as_of=as_of)
        elif task.horizon_hours is not None:
            rows = labels.intent(events, consents, settings=settings, as_of=as_of, horizon_hours=task.horizon_hours)
        else:
            rows = _MADE[task.name][1](events, consents, settings=settings, as_of=as_of)
    columns = ["customer_id", "event_timestamp", "label", "split", "matured_timestamp"]
    return rows.sort_values(["event_timestamp", "customer_id"], ignore_index=True)[columns]


def _stored(home: Path, task: Task, as_of: datetime) -> pd.DataFrame:
    if task.name not in _MADE:
        return pd.DataFrame()
    rows = tables.read(home, _MADE[task.name][0])
    return rows if rows.empty or rows["matured_timestamp"].max() <= pd.Timestamp(as_of) else rows.iloc[:0]
