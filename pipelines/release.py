"""Tables about customers -> aggregates that may be published: noisy, and paid for from one privacy budget.

In: what each customer counts for. Out: counts and sums under pure differential privacy (Dwork et al. 2006), where two data
sets are neighbours when one customer is in one of them only. Every release is written down with its epsilon before anybody sees
it, and refused when the budget does not carry it. The same question as of the same instant gets the same answer and costs nothing
again, even where the data has changed since: a new answer would tell that it has. Never publishes a value without noise, nor a
group that the data named.
"""

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd

from pipelines.errors import InputError, PipelineError
from pipelines.private_file import open_private, transaction
from pipelines.settings import Settings

CONFIDENCE = 0.95
_SCHEMA = """
CREATE TABLE IF NOT EXISTS releases (
    name TEXT, as_of TEXT, epsilon REAL, by TEXT, answer TEXT, PRIMARY KEY (name, as_of, epsilon))"""


class BudgetSpent(PipelineError):
    """The privacy budget does not carry this release."""


@dataclass(frozen=True)
class Release:
    """Published values by group, each within `margin` of the truth with 95 % probability, and what they cost."""

    name: str
    values: dict[str, int]
    margin: int
    epsilon: float
    epsilon_left: float


def counts(
    home: Path, name: str, group_of: pd.Series, *, groups: Sequence[str], epsilon: float, settings: Settings, by: str, as_of: datetime
) -> Release:
    """How many customers each group has. group_of: customer_id -> group, one row per customer; those of other groups are not told.

    groups: named by whoever asks, never taken from the data, which would tell that somebody is in them. Negative counts become 0.
    Raises BudgetSpent, InputError for an epsilon or a series that is not as said, StoreError where the ledger cannot be written.
    """
    _check(group_of, epsilon)
    truth = group_of.value_counts().reindex(list(groups), fill_value=0)
    question = f"counts {name}: {', '.join(groups)}"
    return _release(home, question, truth, scale=1 / epsilon, epsilon=epsilon, settings=settings, by=by, as_of=as_of)


def total(
    home: Path, name: str, value_of: pd.Series, *, bound: int, epsilon: float, settings: Settings, by: str, as_of: datetime
) -> Release:
    """The sum over customers, each counting for `bound` at most. value_of: customer_id -> whole number >= 0, one row per customer.

    Raises as `counts`.
    """
    _check(value_of, epsilon)
    if bound < 1:
        raise InputError(f"release: expected a bound of at least 1 on what one customer counts for, found {bound}")
    truth = pd.Series({"total": int(value_of.clip(0, bound).sum())})
    return _release(home, f"total {name} to {bound}", truth, scale=bound / epsilon, epsilon=epsilon, settings=settings, by=by, as_of=as_of)


def spent(home: Path) -> float:
    """The epsilon of all releases so far; they add up, whatever they were about."""
    if not _path(home).exists():
        return 0.0
    with closing(open_private(_path(home), _SCHEMA, room="release", busy_s=30.0)) as db:
        return float(db.execute("SELECT coalesce(sum(epsilon), 0) FROM releases").fetchone()[0])


def add_noise(values: Sequence[int], *, scale: float) -> list[int]:
    """The values with discrete Laplace noise of this scale (Ghosh, Roughgarden and Sundararajan 2012), by OpenDP."""
    import opendp.prelude as dp

    dp.enable_features("contrib")
    mechanism = dp.m.make_laplace(dp.vector_domain(dp.atom_domain(T=int)), dp.l1_distance(T=int), scale=scale)
    noisy: list[int] = mechanism([int(value) for value in values])
    return noisy


def _release(
    home: Path, name: str, truth: pd.Series, *, scale: float, epsilon: float, settings: Settings, by: str, as_of: datetime
) -> Release:
    key = (name, as_of.isoformat(), epsilon)
    limit = settings.privacy.epsilon_total
    path = _path(home)
    # one at a time: two that ask at once must not both find the same budget left
    with closing(open_private(path, _SCHEMA, room="release", busy_s=30.0)) as file, transaction(file, path, room="release") as db:
        used = float(db.execute("SELECT coalesce(sum(epsilon), 0) FROM releases").fetchone()[0])
        known = db.execute("SELECT answer FROM releases WHERE (name, as_of, epsilon) = (?, ?, ?)", key).fetchone()
        if known is None and used + epsilon > limit * (1 + 1e-9):
            raise BudgetSpent(
                f"release: {name} would cost {epsilon:g} and {max(limit - used, 0):g} of the privacy budget of {limit:g} is left; "
                "ask with a smaller epsilon, or have the budget raised by whoever answers for it"
            )
        values = json.loads(known[0]) if known else _noisy(truth, scale)
        if known is None:
            used += epsilon
            db.execute("INSERT INTO releases VALUES (?, ?, ?, ?, ?)", (*key, by, json.dumps(values)))
    margin = int(np.ceil(scale * np.log(1 / (1 - CONFIDENCE))))
    return Release(name, values, margin, epsilon, max(limit - used, 0.0))


def _noisy(truth: pd.Series, scale: float) -> dict[str, int]:
    noisy = add_noise(truth.tolist(), scale=scale)
    return {str(group): max(value, 0) for group, value in zip(truth.index, noisy, strict=True)}  # no count is negative; costs nothing


def _check(of_customer: pd.Series, epsilon: float) -> None:
    if not 0 < epsilon <= 10:
        raise InputError(f"release: expected an epsilon above 0 and up to 10, found {epsilon:g}; 1 is usual")
    if not of_customer.index.is_unique:
        raise InputError("release: expected one row per customer, found several; a customer must not count twice")


def _path(home: Path) -> Path:
    return home / "privacy" / "budget.db"
