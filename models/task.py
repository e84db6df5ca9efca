"""The declaration of a supervised task: one file of `models` with a `TASK` in it is a model that is tuned, tracked, gated and scored.

A task says what its label is, which features it reads, how it is judged, what it may search, and the simple rule that it has to beat.
Declares; the one thing computed here is whether an event followed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Label = Callable[[pd.DataFrame], pd.DataFrame]

TICK = pd.Timedelta(1, "us")
LABELLED = ("customer_id", "event_timestamp", "label", "matured_timestamp")


@dataclass(frozen=True)
class Task:
    """A supervised task.

    label: clean events (columns of the events table) -> rows `LABELLED`: the instant that a score is asked for, 0 or 1, and when that
    is known. Rows that are not yet known belong to the frame as well: who calls it drops them. None: the label of that name is
    made where the pipeline's settings say how (churn, intent). rival: feature rows -> (n,) finite scores, higher = likelier positive.
    Raises ValueError on a history where label 1 is no silence: the model of lifetimes foretells nothing else.
    """

    name: str
    feature_service: str
    metric: str  # a function of models.evaluation, higher is better
    rival_name: str
    rival: Callable[[pd.DataFrame], Floats]
    excluded: tuple[str, ...] = ()  # columns that a model never sees, such as protected ones
    label: Label | None = None
    horizon_hours: float | None = None  # of a label that the pipeline makes; none: as its settings say
    is_silence: bool = False  # label 1: no order in the horizon; models of customers' lifetimes are then baselines
    monotone: Mapping[str, int] = field(default_factory=dict)  # column -> 1: more of it never lowers the probability; -1: never raises it
    history: Mapping[str, str] = field(default_factory=dict)  # of a silence: columns by role of models.silence.ROLES, to start from
    suggest: Callable[[Any], dict[str, Any]] | None = None  # search space of an Optuna trial; none: the learner's own

    def __post_init__(self) -> None:
        if self.history and not self.is_silence:
            raise ValueError(f"task {self.name}: a history foretells silence; declare is_silence, or no history")


def follows(rows: pd.DataFrame, events: pd.DataFrame, *, within: pd.Timedelta) -> NDArray[np.int64]:
    """1 where one of `events` of the same customer falls in (event_timestamp, event_timestamp + within] of the row (n,), else 0.

    rows, events: customer_id, event_timestamp; any order.
    """
    asked = rows[["customer_id", "event_timestamp"]].reset_index(drop=True).reset_index(names="place").sort_values("event_timestamp")
    next_at = events[["customer_id", "event_timestamp"]].assign(next_at=events["event_timestamp"]).sort_values("event_timestamp")
    next_at["event_timestamp"] = next_at["event_timestamp"].astype(asked["event_timestamp"].dtype)
    found = pd.merge_asof(asked, next_at, on="event_timestamp", by="customer_id", direction="forward", allow_exact_matches=False)
    is_near = (found["next_at"] - found["event_timestamp"] <= within).to_numpy()
    label = np.zeros(len(rows), dtype=np.int64)
    label[found["place"].to_numpy()] = is_near
    return label
