"""The intent tasks: will the session still end in a purchase, or one follow within a day, or a week? Declares; computes only a rival's
score."""

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from models.task import Task


def cart_rule(features: pd.DataFrame) -> NDArray[np.float64]:
    """Cart additions of the session (n,), and among equals its views: views / (1 + views) stays below one addition."""
    cart_adds, views = (features[name].fillna(0).to_numpy(dtype=np.float64) for name in ("session_cart_adds", "session_views"))
    return np.asarray(cart_adds + views / (1.0 + views))


# A decision point lies right after an event; a request comes when it comes. These ages would say which of the two it is.
_EXCLUDED = ("age_band", "gender", "last_event_age_days", "session_last_event_age_days", "silence_to_visit_gap")


def _task(name: str, horizon_hours: float | None) -> Task:
    return Task(
        name=name,
        feature_service="intent_v1",
        metric="auc",
        rival_name="cart rule",
        rival=cart_rule,
        excluded=_EXCLUDED,
        horizon_hours=horizon_hours,
    )


TASK = _task("intent", None)  # until the session ends
TASK_24H = _task("intent_24h", 24.0)
TASK_7D = _task("intent_7d", 168.0)
