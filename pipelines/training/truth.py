"""The simulated shop's truth -> the best that any model could score on the same rows; nothing for real data."""

from contextlib import closing
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd

from pipelines import horizon, tables
from pipelines.settings import Settings
from pipelines.vault import open_vault


def path(home: Path) -> Path:
    """Where the simulator keeps its truth."""
    return home / "raw" / "truth.parquet"


def probability(home: Path, name: str, rows: pd.DataFrame, *, settings: Settings) -> np.ndarray | None:
    """Bayes-optimal probability of each row (customer_id, event_timestamp); None where the truth is not known, or not of this task."""
    if not path(home).exists() or name not in ("churn", "intent"):
        return None
    from pipelines import optimum

    known, events = optimum.Truth.load(path(home)), tables.read(home, tables.EVENTS)
    identities = _identities(home, known.people.index, settings)
    if name == "churn":
        return np.asarray(
            optimum.churn_probability(
                known, events, rows, horizon_days=horizon.of_settings(settings), gap_days=settings.labels.churn_gap_days,
                identities=identities,
            )
        )  # fmt: skip
    return np.asarray(optimum.intent_probability(known, events, rows, identities=identities))


def item_scores(home: Path, customers: np.ndarray, items: np.ndarray, *, at: datetime) -> np.ndarray | None:
    """Expected purchases (n_customers, n_items) in the window after `at`; None where the truth is not known."""
    if not path(home).exists():
        return None
    from pipelines import optimum

    known, events = optimum.Truth.load(path(home)), tables.read(home, tables.EVENTS)
    return np.asarray(optimum.item_scores(known, events, customers, items, at=at, identities=tables.read(home, tables.IDENTITIES)))


def _identities(home: Path, users: pd.Index, settings: Settings) -> pd.DataFrame:
    """The identities with the user ids of the simulated people as the truth has them."""
    with closing(open_vault(home, master=settings.master_key)) as vault:
        names = {vault.pseudonym("user_id", user): f"user_id:{user}" for user in users}
    found = tables.read(home, tables.IDENTITIES)
    return found.assign(identifier=found["identifier"].map(names).fillna(found["identifier"]))
