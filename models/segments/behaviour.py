"""Feature values of customers at an instant -> the few columns that segments are formed of, and the words for them.

In: stored totals and derived ages (columns of `customer_activity`, ages in days). Out: behaviour in units that people use. Nothing of
who somebody is goes in: neither age, nor gender, nor region.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

MONTH_DAYS = 30.0  # also the least time that a rate is formed over: one visit on the first day is not thirty a month
NEEDED = ("first_event_age_days", "last_event_age_days", "sessions_total", "views_total", "orders_total", "revenue_cents_total")


@dataclass(frozen=True)
class Phrase:
    """How a column is said. `value`: a format of its median. `none`: said where that is 0; empty: nothing is."""

    high: str
    low: str
    value: str
    scale: float = 1.0
    none: str = ""


PHRASES = {
    "orders_per_month": Phrase("buys often", "buys seldom", "{:.1f} orders a month", none="has never bought"),
    "visits_per_month": Phrase("visits often", "visits seldom", "{:.1f} visits a month"),
    "last_seen_days": Phrase("has been away for long", "was here lately", "last {:.0f} days ago", none="was here today"),
    "mean_order_cents": Phrase("places large orders", "places small orders", "{:,.2f} an order", 0.01),
    "views_per_visit": Phrase("looks around a lot", "looks at few things", "{:.1f} views a visit"),
}


def behaviour(features: pd.DataFrame) -> pd.DataFrame:
    """One row for each of `features`, with the columns of PHRASES; counts that are missing are 0, ages stay unknown.

    Raises ValueError where a column is missing.
    """
    absent = [name for name in NEEDED if name not in features.columns]
    if absent:
        raise ValueError(f"segments: expected the feature columns {list(NEEDED)}; {absent} are missing")
    values = {name: features[name].astype("Float64").to_numpy(dtype=np.float64, na_value=np.nan) for name in NEEDED}
    visits, orders, views, cents = (np.nan_to_num(values[f"{name}_total"]) for name in ("sessions", "orders", "views", "revenue_cents"))
    months = np.maximum(np.nan_to_num(values["first_event_age_days"]), MONTH_DAYS) / MONTH_DAYS
    columns = {
        "orders_per_month": orders / months,
        "visits_per_month": visits / months,
        "last_seen_days": values["last_event_age_days"],
        "mean_order_cents": np.maximum(cents, 0.0) / np.maximum(orders, 1.0),
        "views_per_visit": views / np.maximum(visits, 1.0),
    }
    return pd.DataFrame(columns, index=features.index)
