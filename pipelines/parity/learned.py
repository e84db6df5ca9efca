"""The rows that models learned from, and those they scored last, held against what the feature tables say of those instants now.

In: a home. Out: values compared and values that differ, of every declared task, those that a file of `models` adds included: `churn` and
`intent` have tables of their own, the others a part of two that they share. A customer whose history was changed since is told apart,
as in `auditing`. Changes nothing: a model that learned from other values is to be trained again.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import feature_store, registry, tables, windows
from pipelines.parity import auditing, values
from pipelines.parity.values import Comparison
from pipelines.settings import Settings
from pipelines.tables import Table
from pipelines.training.tasks import discover

_ASKED = ("customer_id", "event_timestamp", *windows.REQUEST)


@dataclass
class Learned:
    """What the look came to. explained: rows that differ for a reason, by reason; parts: of each table, and of each model in a shared one,
    rows looked at, those that differ, by which features, and the version that is champion.
    """

    compared: Comparison = field(default_factory=Comparison)
    explained: Counter[str] = field(default_factory=Counter)
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)


def look(home: Path, *, customers: int, rng: np.random.Generator, settings: Settings) -> Learned:
    """Look at the rows of so many customers of each model, chosen at random. Raises StoreError where a service was never applied."""
    found, champions = Learned(), registry.champions(home)
    for name, task in discover().items():
        for table in tables.OWN_ROWS.get(name, tables.SHARED_ROWS):
            rows = _rows(home, table, name, customers, rng)
            if rows.empty:
                continue
            today = feature_store.training_frame(home, rows[[c for c in _ASKED if c in rows]], service=task.feature_service)
            entry: Mapping[str, Any] = champions.get(name, {})
            part = table.name if table not in tables.SHARED_ROWS else f"{table.name}/{name}"
            found.parts[part] = {**_compare(found, part, rows, today, home, settings), "champion": entry.get("version")}
    return found


# -- private -----------------------------------------------------------------------------------------------------------


def _rows(home: Path, table: Table, model: str, customers: int, rng: np.random.Generator) -> pd.DataFrame:
    """Some customers' rows of a model, without the columns that are other models'."""
    if not tables.exists(home, table):
        return pd.DataFrame()
    mine = pc.scalar(True) if table not in tables.SHARED_ROWS else pc.field("model") == model
    known = np.unique(tables.matching(home, table, mine, ["customer_id"])["customer_id"].to_numpy(zero_copy_only=False).astype(str))
    chosen = pc.field("customer_id").isin(pa.array(rng.permutation(known)[:customers].tolist(), pa.string()))
    rows: pd.DataFrame = tables.matching(home, table, mine & chosen, tables.schema_of(home, table).names).to_pandas()
    return rows if table not in tables.SHARED_ROWS else rows.dropna(axis="columns", how="all")


def _compare(found: Learned, part: str, rows: pd.DataFrame, today: pd.DataFrame, home: Path, settings: Settings) -> dict[str, Any]:
    names = [name for name in today.columns if name in rows.columns and name not in _ASKED]
    differing = np.column_stack([_differs(rows[name], today[name]) for name in names]) if names else np.zeros((len(rows), 0), bool)
    known = auditing.history(home, sorted(set(rows["customer_id"])))
    counted: Counter[str] = Counter()
    for place in np.flatnonzero(differing.any(axis=1)):
        at_us = values.micros(rows["event_timestamp"].iloc[place])
        reason = _reason(rows.iloc[place], today.iloc[place], known.get(rows["customer_id"].iloc[place]), at_us, settings)
        if reason is not None:
            found.explained[reason] += 1
            differing[place] = False
            continue
        for name in np.array(names)[differing[place]]:
            counted[name] += 1
            found.compared.note(f"{part}:{name}", _plain(rows[name].iloc[place]), _plain(today[name].iloc[place]), at_us)
    found.compared.checked += differing.size
    return {"rows": len(rows), "differing_rows": int(differing.any(axis=1).sum()), "by_feature": dict(counted)}


def _reason(row: pd.Series, today: pd.Series, past: auditing.Past | None, at_us: int, settings: Settings) -> str | None:
    if past is None:
        return auditing.GONE
    ages = [-age if (age := _plain(each.get("first_event_age_days"))) is not None else None for each in (row, today)]
    return auditing.reason(past, at_us, *ages, settings=settings)


def _differs(one: pd.Series, other: pd.Series) -> np.ndarray:
    return ~((one == other) | (one.isna() & other.isna())).fillna(False).to_numpy(bool)


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if value is None or value is pd.NA or value != value:
        return None
    return value.item() if isinstance(value, np.generic) else value
