"""The return-risk task: after an order, will this customer return something soon? The whole of a model in one file."""

import pandas as pd

from models.task import TICK, Floats, Task, follows

HORIZON = pd.Timedelta(30, "D")
LATE = pd.Timedelta(1, "D")  # an order that we learn of later than this is no occasion to act


def label(events: pd.DataFrame) -> pd.DataFrame:
    """One row per customer and instant of an order, just after we knew it; 1 where a return follows within `HORIZON`."""
    orders = events[events["type"] == "purchase"]
    orders = orders[orders["created_timestamp"] - orders["event_timestamp"] <= LATE]
    knew = orders[["event_timestamp", "created_timestamp"]].max(axis=1) + TICK
    rows = pd.DataFrame({"customer_id": orders["customer_id"], "event_timestamp": knew}).drop_duplicates(ignore_index=True)
    found = follows(rows, events[events["type"] == "return"], within=HORIZON)
    return rows.assign(label=found, matured_timestamp=rows["event_timestamp"] + HORIZON)


def habit(features: pd.DataFrame) -> Floats:
    """Returns so far per order so far (n,): who returned before will again."""
    returns, orders = (features[name].fillna(0).to_numpy(dtype="float64") for name in ("returns_total", "orders_total"))
    return returns / (orders + 1.0)


TASK = Task(
    name="return_risk",
    feature_service="churn_v1",
    metric="auc",
    rival_name="returns per order",
    rival=habit,
    excluded=("age_band", "gender"),
    label=label,
)
