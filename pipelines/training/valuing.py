"""Orders and what they were worth -> what each customer will be worth: a model kept beside churn, judged on the window of its test.

As far ahead as `training.value_days` asks. It learns from everybody who ever ordered and allows it, as known at the test's cut-off, and
is held against what these people then spent. Amounts are those of orders alone: returns are not taken off. Never sees what came later.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd

from models import evaluation
from models.customer_value import CustomerValue
from models.spend import lifetime_value
from pipelines import consent, tables
from pipelines.settings import Settings
from pipelines.training.baselines import histories
from pipelines.training.publishing import finite, share
from pipelines.training.timing import orders

FOLDER = "value"  # of its files in a version, and of what a manifest tells of it

VALUE = "revenue_cents"  # of an order


@dataclass(frozen=True)
class Valuing:
    """A fitted model and how it did in the days after its cut-off.

    expected_cents, spent_cents: of all together. rank_correlation: Spearman's, of each customer's expected and real spend;
    rival_rank_correlation: the same of what they spent a day so far.
    """

    learner: CustomerValue
    days: float
    customers: int
    expected_cents: float
    spent_cents: float
    rank_correlation: float
    rival_rank_correlation: float

    def told(self) -> dict[str, float | None]:
        """What was judged, as JSON values."""
        judged = {name: finite(value) for name, value in vars(self).items() if name != "learner"}
        return {**judged, "customers": self.customers}

    def metrics(self) -> dict[str, float]:
        """The figures of a run, by name."""
        ratio = share(self.expected_cents, self.spent_cents)
        ranks = {"rank_correlation": self.rank_correlation, "rival_rank_correlation": self.rival_rank_correlation}
        return {f"value_{name}": number for name, number in {"expected_to_spent": ratio, **ranks}.items()}


def fit(home: Path, *, at: pd.Timestamp, days: float, settings: Settings, as_of: datetime) -> Valuing | None:
    """Learned at the cut-off `at`, judged on the `days` after it; None where nobody came back by then, or orders have no value."""
    acts = orders(home, settings=settings, also=[VALUE])
    history, mean_cents = known(home, acts, at, settings=settings)
    if history.empty or not history["repeat_orders"].any() or (mean_cents > 0).sum() < 2:
        return None
    learner = CustomerValue(horizon_days=float(settings.training.value_days or days), random_state=settings.training.seed)
    learner.fit(history, mean_cents)
    expected = lifetime_value(learner.lifetime_, learner.spend_, history, mean_cents, horizon=days, periods=1, discount=0.0)
    later = acts[(acts["event_timestamp"] > at) & (acts["event_timestamp"] <= at + timedelta(days=days))]
    later = later[later["created_timestamp"] <= pd.Timestamp(as_of)]
    spent = later.groupby("customer_id")[VALUE].sum().reindex(history.index).fillna(0.0).to_numpy(dtype=float)
    n_orders, age = history["repeat_orders"].to_numpy() + 1.0, history["age_days"].to_numpy()
    before = n_orders * mean_cents.to_numpy() / np.maximum(age, 1.0)
    return Valuing(
        learner, days, len(history), float(expected.sum()), float(spent.sum()), evaluation.rank_correlation(expected, spent),
        evaluation.rank_correlation(before, spent),
    )  # fmt: skip


def known(home: Path, acts: pd.DataFrame, at: pd.Timestamp, *, settings: Settings) -> tuple[pd.DataFrame, pd.Series]:
    """Histories as of `at`, by customer, of who allows it then, and the mean cents of an order (n,); orders of one day are one."""
    history = histories(acts, at)
    people = pd.DataFrame({"customer_id": history.index, "event_timestamp": at})
    allows = consent.state_at(tables.read(home, tables.CONSENTS), people, purpose=settings.consent.purpose)
    history = history[np.asarray(allows, dtype=bool)]
    seen = acts[(acts["event_timestamp"] < at) & (acts["created_timestamp"] < at)]
    cents = seen.groupby("customer_id")[VALUE].sum().reindex(history.index).astype(float)
    return history, cents / (history["repeat_orders"] + 1.0)
