"""Which models are watched, and the rows that each is watched by: those it was trained and tested with, and those it scored last.

In: a home. Out: names, frames, or the reason why there are none. Churn and intent have tables of their own; every other declared task that
has a champion is a part of two tables that they share.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from models import tasks
from pipelines import registry, tables
from pipelines.tables import OWN_ROWS, SHARED_ROWS, Table

MODEL = "model"  # the column of shared tables that says whose row it is


def names(home: Path) -> list[str]:
    """The models that are watched, those with tables of their own first. Raises RegistryError where the champions cannot be read."""
    led = {name for name, entry in registry.champions(home).items() if entry.get("version") is not None}
    return [*OWN_ROWS, *sorted((led & set(tasks.declared())) - set(OWN_ROWS))]


def tables_of(name: str) -> tuple[Table, Table]:
    """Where the rows that a model learned from, and those that it scored, are kept."""
    return OWN_ROWS.get(name, SHARED_ROWS)


def rows(home: Path, name: str, table: Table) -> pd.DataFrame:
    """The model's rows of one of its tables.

    A shared one has the columns of other models too. What none of the rows that a model learned from fills is no feature of it, and left
    out; of the rows scored last, a column that is empty may be one that broke.
    """
    frame = tables.read(home, table)
    if table not in SHARED_ROWS:
        return frame
    mine = frame[frame[MODEL] == name].drop(columns=MODEL).reset_index(drop=True)
    return mine.dropna(axis="columns", how="all") if table is tables.TRAINING_TASKS else mine


def why_not_judged(home: Path, name: str, needed: Sequence[Table]) -> str | None:
    """Why model `name` cannot be watched, with the reason that its training left; none if all tables hold rows of it."""
    lacking = [table.name for table in needed if _count(home, name, table) == 0]
    if not lacking:
        return None
    champion = registry.champions(home).get(name, {})
    reason = f": {champion['why']}" if champion.get("why") and champion.get("version") is None else ""
    whose = f" of {name}" if name not in OWN_ROWS else ""
    return f"{' and '.join(lacking)} hold{'s' if len(lacking) == 1 else ''} no rows{whose}{reason}"


def reference_hash(home: Path, table: Table, reference: pd.DataFrame) -> str:
    """What tells one training from another: a hash of the model's rows. reference: `rows` of the table."""
    if table not in SHARED_ROWS:
        return tables.content_hash(home, table)[:16]
    hashed = pd.util.hash_pandas_object(reference, index=False)
    return hashlib.sha256(hashed.to_numpy().tobytes()).hexdigest()[:16]


def _count(home: Path, name: str, table: Table) -> int:
    if table not in SHARED_ROWS or not tables.exists(home, table):
        return tables.count(home, table)
    return int((tables.read(home, table, [MODEL])[MODEL] == name).sum())
