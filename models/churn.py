"""The churn task: will an active customer stay silent through the horizon? Declares; computes only its rival's score."""

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from models.task import Task

NEVER_DAYS = 36_500.0  # the silence of a customer who never bought: longer than any real one


def recency_rule(features: pd.DataFrame) -> NDArray[np.float64]:
    """Days since the last purchase (n,): the longer the silence, the likelier the churn; never bought = a century."""
    return features["last_purchase_age_days"].fillna(NEVER_DAYS).to_numpy(dtype=np.float64)


TASK = Task(
    name="churn",
    feature_service="churn_v1",
    metric="auc",
    rival_name="recency rule",
    rival=recency_rule,
    excluded=("age_band", "gender"),
    is_silence=True,
    history={
        "visits": "sessions_total",
        "orders": "orders_total",
        "first_age_days": "first_event_age_days",
        "last_age_days": "last_event_age_days",
    },
)
