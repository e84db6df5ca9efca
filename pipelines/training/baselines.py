"""What a model must beat: the task's simple rule, logistic regression on the same columns, and for silence models of lifetimes.

In: labelled rows and, for lifetimes, the orders known at each cut-off. Out: a score for each test row, higher = likelier positive.
Never sees a label of the test.
"""

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from models.lifetime import HISTORY, BetaGeometric, Lifetime, ParetoNBD
from models.task import Floats, Task
from pipelines import consent, tables
from pipelines.settings import Settings
from pipelines.training.rows import Rows
from pipelines.training.timing import Timing, orders

LOGISTIC, HAZARD = "logistic regression", "discrete-time hazard"
LIFETIMES: Mapping[str, type[Lifetime]] = {"Pareto/NBD": ParetoNBD, "BG/NBD": BetaGeometric}
STRENGTHS = (0.003, 0.03, 0.3)  # of the inverse penalty, chosen on the validation rows
MAX_CUSTOMERS = 2_000  # that the lifetimes are learned from: four parameters need no more
MAX_TRAIN_ROWS = 50_000  # that the regression is learned from

_DAY_S = 86_400.0


def scores(task: Task, rows: Rows, home: Path, *, settings: Settings, timing: Timing | None = None) -> dict[str, Floats]:
    """Scores of the test rows by baseline, the task's rule first. timing: of a silence, where there is one."""
    test = rows.test()
    found = {task.rival_name: task.rival(test), LOGISTIC: logistic(rows, seed=settings.training.seed)}
    if task.is_silence:
        found |= silence(home, test[["customer_id", "event_timestamp"]], rows.matured[rows.frame["split"] == "test"], settings=settings)
    if timing is not None:
        found |= {HAZARD: timing.silence}
    return found


def logistic(rows: Rows, *, seed: int) -> Floats:
    """Probability of the test rows by ridge logistic regression: medians where null, normal scores of numbers, one column per text."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    (train, label), (validation, later) = rows.part("train"), rows.part("validation")
    chosen = np.linspace(0, len(label) - 1, min(len(label), MAX_TRAIN_ROWS)).astype(int)
    text = [name for name in rows.inputs if not pd.api.types.is_numeric_dtype(train[name])]
    numbers = [name for name in rows.inputs if name not in text and train[name].nunique() > 1]
    if not numbers and not text:  # no column tells rows apart
        return np.full(len(rows.part("test")[1]), label.mean())
    columns = _columns(numbers, text, len(chosen), seed)
    known = columns.fit_transform(_plain(train.iloc[chosen], text))
    tried = [LogisticRegression(C=strength, max_iter=200, tol=1e-3).fit(known, label[chosen]) for strength in STRENGTHS]
    held = columns.transform(_plain(validation, text))
    losses = [log_loss(later, model.predict_proba(held)[:, 1], labels=[0, 1]) for model in tried]
    best = LogisticRegression(C=STRENGTHS[int(np.argmin(losses))], max_iter=200, tol=1e-3)
    best.fit(np.concatenate([known, held]), np.concatenate([label[chosen], later]))  # as the model, which is fitted on both
    return np.asarray(best.predict_proba(columns.transform(_plain(rows.part("test")[0], text)))[:, 1])


def silence(home: Path, asked: pd.DataFrame, matured: pd.Series, *, settings: Settings) -> dict[str, Floats]:
    """1 - P(at least one order until the label is known) of each row, learned at its cut-off; nothing where nobody came back by then.

    By each model of lifetimes. A gap between cut-off and horizon is counted with the horizon: the rank of customers hardly depends on it.
    """
    acts, consents = orders(home, settings=settings), tables.read(home, tables.CONSENTS)
    answers, at = {name: np.empty(len(asked)) for name in LIFETIMES}, asked["event_timestamp"].reset_index(drop=True)
    for cut in at.unique():
        known = histories(acts, cut)
        people = pd.DataFrame({"customer_id": known.index, "event_timestamp": cut})
        known = known[consent.state_at(consents, people, purpose=settings.consent.purpose)]
        if known.empty or not known["repeat_orders"].any():
            return {}
        here = np.flatnonzero(at == cut)
        days = (matured.iloc[here[0]] - cut) / timedelta(days=1)
        theirs = known.reindex(asked["customer_id"].iloc[here]).fillna(0.0)
        for name, kind in LIFETIMES.items():
            model = kind(n_starts=2, max_customers=MAX_CUSTOMERS, random_state=settings.training.seed).fit(known)
            answers[name][here] = 1.0 - model.probability_of_purchase(theirs, float(days))
    return answers


def histories(acts: pd.DataFrame, at: pd.Timestamp) -> pd.DataFrame:
    """Purchase histories as known at `at`, by customer: the columns of models.lifetime.HISTORY; orders of one day are one.

    acts: customer_id, event_timestamp, created_timestamp of the events that count as an order.
    """
    known = acts[(acts["event_timestamp"] < at) & (acts["created_timestamp"] < at)]
    days = known.assign(day=known["event_timestamp"].dt.floor("D")).groupby("customer_id")["day"]
    seen = pd.DataFrame({"first": days.min(), "last": days.max(), "orders": days.nunique()})
    recency = (seen["last"] - seen["first"]).dt.total_seconds() / _DAY_S
    age = (at - seen["first"]).dt.total_seconds() / _DAY_S
    return pd.DataFrame(dict(zip(HISTORY, (seen["orders"] - 1.0, recency, age), strict=True)))


# -- private -----------------------------------------------------------------------------------------------------------


def _columns(numbers: list[str], text: list[str], n_rows: int, seed: int) -> Any:
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, QuantileTransformer, StandardScaler

    spread = QuantileTransformer(n_quantiles=min(200, n_rows), output_distribution="normal", random_state=seed)
    columns = [("numbers", make_pipeline(SimpleImputer(strategy="median", add_indicator=True), spread, StandardScaler()), numbers)]
    if text:
        columns.append(("text", OneHotEncoder(handle_unknown="ignore", min_frequency=10, sparse_output=False), text))
    return ColumnTransformer(columns, sparse_threshold=0)


def _plain(features: pd.DataFrame, text: list[str]) -> pd.DataFrame:
    """Numbers as doubles with NaN for null, and text as text, "" for null."""
    columns: Mapping[str, Any] = {
        str(name): column.astype("object").fillna("").astype(str) if name in text else column.to_numpy(dtype=np.float64, na_value=np.nan)
        for name, column in features.items()
    }
    return pd.DataFrame(columns, index=features.index)
