"""What became of customers after an instant: the label that a row of that instant would have, once it is known.

In: clean events, rows of customers and instants. Out: 1, 0, or NaN where it is not known yet, or where the task asks nothing of such a
customer at such an instant. The rules are those of `pipelines.labels`, for instants that somebody else chose. A task that chooses its
own instants is asked about the last of them: a row has the outcome of the customer's newest occasion before it. Writes nothing.
"""

from datetime import datetime

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from models import tasks
from models.task import LABELLED, Label, follows
from pipelines import horizon
from pipelines.errors import NotTrainable
from pipelines.settings import Settings
from pipelines.windows import NOT_BEHAVIOUR

Labels = NDArray[np.float64]


def of_rows(task: str, rows: pd.DataFrame, events: pd.DataFrame, *, settings: Settings, as_of: datetime) -> Labels:
    """The label of each row (n,): 1.0, 0.0 or NaN.

    rows: customer_id, event_timestamp; events: those known at `as_of`, `columns(task)` of them. Raises NotTrainable where the horizon of
    churn cannot be chosen.
    """
    if task == "churn":
        return _churn(rows, events, settings=settings, as_of=pd.Timestamp(as_of))
    declared = tasks.declared()[task]
    purchases = events[events["type"] == "purchase"]
    if declared.horizon_hours is not None:
        return _within(rows, purchases, pd.Timedelta(declared.horizon_hours, "h"), as_of=pd.Timestamp(as_of))
    if declared.label is not None:
        return _of_occasions(declared.label, rows, events, as_of=pd.Timestamp(as_of))
    return _in_session(rows, events, silence=pd.Timedelta(settings.ingest.session_gap_minutes, "min"), as_of=pd.Timestamp(as_of))


def columns(task: str) -> list[str] | None:
    """The columns of events that the task's outcomes are found by; None: all, for its own label may look at any."""
    if task != "churn" and tasks.declared()[task].label is not None:
        return None
    return ["type", "event_timestamp", "created_timestamp", "customer_id", "session_id"]


def _churn(rows: pd.DataFrame, events: pd.DataFrame, *, settings: Settings, as_of: pd.Timestamp) -> Labels:
    """1 where no act follows the gap within the horizon; known of customers who were active before."""
    acts = events[events["type"] == settings.labels.churn_event]
    if acts.empty:
        raise NotTrainable(f"the log holds no {settings.labels.churn_event} event, and churn is the absence of that event")
    if settings.labels.churn_horizon_days is None:
        settings = horizon.chosen(acts, events["event_timestamp"].min(), as_of, settings=settings)
    gap, active = (pd.Timedelta(days, "D") for days in (settings.labels.churn_gap_days, settings.labels.churn_active_days))
    opens = rows.assign(event_timestamp=rows["event_timestamp"] + gap)
    stays = _within(opens, acts, pd.Timedelta(horizon.of_settings(settings), "D"), as_of=as_of)
    before = _last(rows, acts)
    return np.where((rows["event_timestamp"] - before < active).to_numpy(), 1.0 - stays, np.nan)


def _within(rows: pd.DataFrame, acts: pd.DataFrame, span: pd.Timedelta, *, as_of: pd.Timestamp) -> Labels:
    """1 where an act follows within the span; known once it has passed."""
    is_known = (rows["event_timestamp"] + span <= as_of).to_numpy()
    return np.where(is_known, follows(rows, acts, within=span).astype(np.float64), np.nan)


def _in_session(rows: pd.DataFrame, events: pd.DataFrame, *, silence: pd.Timedelta, as_of: pd.Timestamp) -> Labels:
    """1 where a purchase follows in the session that the instant lies in; known once that is over. None was made in it before."""
    acts = events[~events["type"].isin(NOT_BEHAVIOUR) & events["session_id"].notna()]
    sessions = acts.groupby(["customer_id", "session_id"], sort=False)["event_timestamp"].max().rename("ended").reset_index()
    bought = acts[acts["type"] == "purchase"].groupby(["customer_id", "session_id"], sort=False)["event_timestamp"]
    sessions = sessions.merge(bought.agg(first="min").reset_index(), on=["customer_id", "session_id"], how="left")
    asked = rows[["customer_id", "event_timestamp"]].reset_index(drop=True).reset_index(names="place").sort_values("event_timestamp")
    moments = acts[["customer_id", "session_id", "event_timestamp"]].sort_values("event_timestamp")
    moments["event_timestamp"] = moments["event_timestamp"].astype(asked["event_timestamp"].dtype)
    found = pd.merge_asof(asked, moments, on="event_timestamp", by="customer_id", direction="backward", tolerance=silence)
    found = found.merge(sessions, on=["customer_id", "session_id"], how="left").set_index("place").sort_index()
    is_asked = found["session_id"].notna() & (found["ended"] + silence <= as_of)
    is_open = found["first"].isna() | (found["first"] > found["event_timestamp"])
    return np.where((is_asked & is_open).to_numpy(), found["first"].notna().to_numpy(dtype=np.float64), np.nan)


def _of_occasions(label: Label, rows: pd.DataFrame, events: pd.DataFrame, *, as_of: pd.Timestamp) -> Labels:
    """The label of each row's occasion, once it is known. NaN where there was none, and where the row came too late to foretell anything:
    after its window had closed, or after we knew that it had come to pass.
    """
    labelled = label(events[events["customer_id"].notna()])[list(LABELLED)].sort_values("event_timestamp", kind="stable")
    asked = rows[["customer_id", "event_timestamp"]].reset_index(drop=True).reset_index(names="place").sort_values("event_timestamp")
    labelled["event_timestamp"] = labelled["event_timestamp"].astype(asked["event_timestamp"].dtype)
    found = pd.merge_asof(asked, labelled, on="event_timestamp", by="customer_id", direction="backward").sort_values("place")
    is_known = (found["matured_timestamp"] <= as_of) & (found["event_timestamp"] <= found["matured_timestamp"])
    outcome = np.where(is_known, found["label"], np.nan).astype(np.float64)
    positive = np.flatnonzero(outcome == 1)
    outcome[positive[_had_come_to_pass(label, rows.iloc[positive], events)]] = np.nan
    return outcome


def _had_come_to_pass(label: Label, rows: pd.DataFrame, events: pd.DataFrame) -> NDArray[np.bool_]:
    """Whether what was known at each row (n,) already made its occasion a positive one: each is labelled as a customer of its own, who
    did no more than that.
    """
    asked = rows[["customer_id", "event_timestamp"]].rename(columns={"event_timestamp": "asked"})
    asked = asked.assign(row=[str(n) for n in range(len(rows))])
    then = events.merge(asked, on="customer_id")
    then = then[then[["event_timestamp", "created_timestamp"]].max(axis=1) <= then["asked"]]
    told = label(then.assign(customer_id=then["row"]).drop(columns=["asked", "row"]))
    told = told.merge(asked[["row", "asked"]], left_on="customer_id", right_on="row")
    told = told[told["event_timestamp"] <= told["asked"]].sort_values("event_timestamp", kind="stable")
    newest = told.drop_duplicates("row", keep="last").set_index("row")["label"]
    return (newest.reindex(asked["row"]) == 1).to_numpy()


def _last(rows: pd.DataFrame, acts: pd.DataFrame) -> pd.Series:
    """When each row's customer last acted, up to its instant; NaT where they never did."""
    asked = rows[["customer_id", "event_timestamp"]].reset_index(drop=True).reset_index(names="place").sort_values("event_timestamp")
    then = acts[["customer_id", "event_timestamp"]].assign(acted=acts["event_timestamp"]).sort_values("event_timestamp")
    then["event_timestamp"] = then["event_timestamp"].astype(asked["event_timestamp"].dtype)
    found = pd.merge_asof(asked, then, on="event_timestamp", by="customer_id", direction="backward")
    last: pd.Series = found.set_index("place").sort_index()["acted"]
    return last.set_axis(rows.index)
