"""How long customers take to come back -> the horizon after which their silence counts as churn.

In: the events that count. Out: whole days, the setting's where it names them. Reads nothing after `as_of`, and never takes a gap that is
still open for a short one.
"""

from datetime import datetime

import numpy as np
import pandas as pd

from pipelines.errors import NotTrainable
from pipelines.settings import Settings

LONGEST_DAYS = 365

_DAY_S = 86_400.0


def returning(acts: pd.DataFrame, *, longest: pd.Timedelta, as_of: datetime) -> pd.DataFrame:
    """How long customers take to come back: columns gap_days (ascending) and share, of those who come back within `longest`.

    acts: customer_id, event_timestamp of the events that count; those of one UTC day are one visit. A gap that is still open at `as_of`
    is censored, not short (Kaplan & Meier 1958), and only gaps that began `longest` before `as_of` count: of later ones the long ones
    cannot have been seen. Empty where nobody came back.
    """
    at = acts["event_timestamp"].dt.floor("D")
    visits = pd.DataFrame({"customer_id": acts["customer_id"], "at": at}).drop_duplicates().sort_values(["customer_id", "at"])
    following = visits.groupby("customer_id", sort=False)["at"].shift(-1)
    end = pd.Timestamp(as_of)
    gaps = pd.DataFrame({"days": (following.fillna(end) - visits["at"]).dt.total_seconds() / _DAY_S, "is_closed": following.notna()})
    gaps = gaps[visits["at"] <= end - longest]
    # beyond `longest` a gap is open for our purpose, whether or not somebody came in the end
    gaps["is_closed"] &= gaps["days"] <= longest.total_seconds() / _DAY_S
    counts = gaps.groupby("days")["is_closed"].agg(["sum", "size"])
    at_risk = counts["size"][::-1].cumsum()[::-1]
    survival = (1.0 - counts["sum"] / at_risk).cumprod()
    closed = survival[counts["sum"] > 0]
    if closed.empty:
        return pd.DataFrame({"gap_days": [], "share": []})
    return pd.DataFrame({"gap_days": closed.index.to_numpy(), "share": ((1 - closed) / (1 - closed.iloc[-1])).to_numpy()})


def of_rows(rows: pd.DataFrame, *, settings: Settings) -> int:
    """The horizon of churn labels as they were made: the setting, or what was chosen. rows: columns of tables.LABELS_CHURN."""
    if settings.labels.churn_horizon_days is not None:
        return settings.labels.churn_horizon_days
    window = (rows["matured_timestamp"] - rows["event_timestamp"]).iloc[0]
    return int(window / pd.Timedelta(1, "D")) - settings.labels.churn_gap_days


def of_settings(settings: Settings) -> int:
    """The horizon that the settings name. Raises ValueError where they leave it to the data: `chosen` makes settings that name it."""
    days = settings.labels.churn_horizon_days
    if days is None:
        raise ValueError("horizon: expected settings that name the horizon of churn, found none; choose it first")
    return days


def chosen(acts: pd.DataFrame, start: datetime, as_of: datetime, *, settings: Settings) -> Settings:
    """Settings with the horizon that `churn_return_share` of the returning customers keep. Raises NotTrainable where nobody returns."""
    options, days = settings.labels, pd.Timedelta(1, "D")
    # room for one horizon in each role and one of history
    longest = min(((pd.Timestamp(as_of) - pd.Timestamp(start)) / days - 3 * options.churn_gap_days) // 4, LONGEST_DAYS)
    found = returning(acts, longest=longest * days, as_of=as_of)
    if longest < 1 or found.empty:
        raise NotTrainable(
            f"no customer is known to have come back within {max(longest, 0):.0f} days, a fourth of the log, so the data name no horizon; "
            "set labels.churn_horizon_days, or give a longer log"
        )
    gap = found.loc[found["share"] >= options.churn_return_share, "gap_days"].iloc[0]
    horizon = int(min(np.ceil(gap), longest))
    return settings.model_copy(update={"labels": options.model_copy(update={"churn_horizon_days": horizon})})
