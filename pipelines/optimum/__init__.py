"""Truth + what had been observed -> the best scores any model of the log could give: churn, intent, items.

The bounds to hold a model against: the posterior given the observables, not the hidden state itself. Reads no label,
and of the events only those that had happened, and that we knew of, before the row's instant.

What is exact: where every visit of a customer is in the log, churn and intent are the generator's own probabilities, by
closed forms and quadrature; a taste is the mode of its posterior. What is not: events lost to consent, outage or bias, or
not yet received, are as unseen here as they are to a model, and count as not having happened; two visits that would
have overlapped are taken at their recorded times; a drift is known from its onset, not before.
"""

from datetime import datetime

import numpy as np
import pandas as pd

from pipelines.optimum import returning, taste
from pipelines.optimum.histories import histories
from pipelines.simulate.truth import Truth

__all__ = ["Truth", "churn_probability", "intent_probability", "item_scores"]


def churn_probability(
    truth: Truth, events: pd.DataFrame, rows: pd.DataFrame, *, horizon_days: int, gap_days: int, identities: pd.DataFrame
) -> np.ndarray:
    """(n_rows,): P(no purchase in (t + gap, t + gap + horizon]), given what was known before t = event_timestamp.

    events: columns of tables.EVENTS; rows: customer_id, event_timestamp; identities: of tables.IDENTITIES. A customer of
    whom nothing was known is taken for a newcomer who arrives at t.
    """
    scores = np.full(len(rows), np.nan)
    for part, known in histories(truth, events, rows, identities):
        scores[part] = returning.no_purchase(truth.shop, known, horizon_days=horizon_days, gap_days=gap_days)
    return scores


def intent_probability(truth: Truth, events: pd.DataFrame, rows: pd.DataFrame, *, identities: pd.DataFrame) -> np.ndarray:
    """(n_rows,): P(a purchase still comes in the session under way), given what was known before event_timestamp.

    Arguments as for `churn_probability`. Where no session is under way: the chance that one starts at once.
    """
    scores = np.full(len(rows), np.nan)
    for part, known in histories(truth, events, rows, identities):
        scores[part] = returning.purchase_now(truth.shop, known)
    return scores


def item_scores(
    truth: Truth, events: pd.DataFrame, customers: np.ndarray, items: np.ndarray, *, at: datetime, identities: pd.DataFrame
) -> np.ndarray:
    """(n_customers, n_items): the share of each item in the customer's coming views, and therefore in the purchases.

    Given the views known before `at`; 0 for what is not on offer then. Rows sum to 1 over the whole catalogue: a
    customer's expected purchases are these times a factor of the customer's own. `identities` is there for symmetry:
    tastes shift with age band and gender alone, which no model may use, and the optimum neither.
    """
    return taste.shares(truth, events, np.asarray(customers), np.asarray(items), at=at)
