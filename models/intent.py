"""The intent task: will the session still end in a purchase? Declares; computes only its rival's score."""

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from models.classifier import Task


def cart_rule(features: pd.DataFrame) -> NDArray[np.float64]:
    """Cart additions of the session (n,), and among equals its views: views / (1 + views) stays below one addition."""
    cart_adds, views = (features[name].fillna(0).to_numpy(dtype=np.float64) for name in ("session_cart_adds", "session_views"))
    return np.asarray(cart_adds + views / (1.0 + views))


TASK = Task(
    name="intent",
    label_table="labels_intent",
    feature_service="intent_v1",
    metric="auc",
    rival_name="cart rule",
    rival=cart_rule,
    # A decision point lies right after an event; a request comes when it comes. These ages would say which of the two it is.
    excluded=("age_band", "gender", "last_event_age_days", "session_last_event_age_days"),
)
