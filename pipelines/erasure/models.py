"""What models hold of a person: which versions learned from them, and the rows that are theirs alone.

In: a person. Out: versions to train again; versions without the person's factors and history, signed anew, in the registry and in
MLflow's copies. What a model learned from everybody together stays until it is trained again.
"""

import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.compute as pc

from models.stages import Stages
from pipelines import registry, tables
from pipelines.erasure.people import Person, condition
from pipelines.errors import RegistryError
from pipelines.registry import MANIFEST
from pipelines.tables import Table

WHY = "a customer was erased"
_NAMES = "customer_ids.npy"
_LABELLED: dict[str, tuple[Table, ...]] = {
    "churn": (tables.LABELS_CHURN, tables.TRAINING_CHURN),
    "intent": (tables.LABELS_INTENT, tables.TRAINING_INTENT),
    "recommender": (tables.INTERACTIONS,),
    "segments": (tables.CUSTOMER_ACTIVITY,),
}


def trained_with(home: Path, person: Person) -> dict[str, list[int]]:
    """Versions that may have learned from the person: those made after their first labelled row, and those with a row of theirs."""
    found = {name: _versions_since(home, name, _first_row(home, person, name)) for name in _names(home)}
    for folder in _folders(home / "models"):
        if folder.name.isdecimal() and _rows_of(folder, person).size:
            found[folder.parent.name] = sorted({*found.get(folder.parent.name, []), int(folder.name)})
    return {name: versions for name, versions in found.items() if versions}


def remove_rows(home: Path, person: Person) -> int:
    """Take the person's own rows out of every version; returns the rows. No other run may be working on the models.

    A version that is damaged, or of other code than this, serves nobody: with a row of the person it goes as a whole.
    """
    removed = 0
    for leftover in (home / "models").glob("*/.staging-*"):
        shutil.rmtree(leftover)
    for name in _names(home):
        for version in _stored_versions(home, name):
            removed += _amended(home, name, version, person)
    return removed + sum(_copy_cleaned(home, folder, person) for folder in _folders(home / "mlflow"))


def _amended(home: Path, name: str, version: int, person: Person) -> int:
    folder = home / "models" / name / str(version)
    aside = folder.with_name(f".amended-{version}")
    if not aside.exists() and not _rows_of(folder, person).size:
        return 0
    gone: list[int] = []

    def change(staged: Path, manifest: dict[str, Any]) -> Mapping[str, Any] | None:
        gone.append(_rows_of(staged, person).size)
        return _without(staged, manifest, person) if gone[0] else None

    try:
        registry.amend(home, name, version, why=WHY, change=change)
    except RegistryError:
        gone.append(_rows_of(folder, person).size)
        shutil.rmtree(folder, ignore_errors=True)
    return sum(gone)


def _without(folder: Path, manifest: Mapping[str, Any], person: Person) -> dict[str, Any]:
    """Remove the person's rows from the files of a recommender; the values of its manifest that change.

    Raises RegistryError where this code cannot load them.
    """
    names = np.load(folder / _NAMES, allow_pickle=False)
    kept = np.flatnonzero(~np.isin(names, person.customers))
    try:
        stages = Stages.load(folder).keep(kept)
    except ValueError as error:  # of other code than this
        raise RegistryError(f"erasure: {folder} can be loaded no more: {error}") from error
    stages.save(folder)
    np.save(folder / _NAMES, names[kept], allow_pickle=False)
    golden = manifest.get("golden", {})
    chosen = np.arange(min(len(golden.get("customers", [])), len(kept)))
    items, scores = stages.recommend(chosen, int(golden.get("k", 1)), at_us=int(golden.get("at_us", 0)))
    told = {"customers": chosen.tolist(), "items": items.tolist(), "scores": scores.astype(float).tolist()}
    rows = {"serving_customers": len(kept), "serving_interactions": int(stages.first.history_.nnz)}
    return {"golden": {**golden, **told}, "rows": {**manifest.get("rows", {}), **rows}}


def _copy_cleaned(home: Path, folder: Path, person: Person) -> int:
    """MLflow's copy of a version: the version's files as they are now, beside what MLflow added; gone where neither can be read."""
    rows = _rows_of(folder, person).size
    if not rows:
        return 0
    manifest = json.loads((folder / MANIFEST).read_bytes()) if (folder / MANIFEST).exists() else {}
    staged = folder.with_name(f".staging-{uuid.uuid4().hex[:12]}")
    try:
        shutil.copytree(folder, staged)
        try:
            stored = registry.load_version(home, str(manifest.get("name", "")), manifest.get("version", 0))
            shutil.copytree(stored.folder, staged, dirs_exist_ok=True)
        except RegistryError:  # the registry has it no more, so there is nothing to be the same as
            _without(staged, manifest, person)
        shutil.rmtree(folder)
        staged.rename(folder)
    except RegistryError:  # nor can it be cleaned
        shutil.rmtree(folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return int(rows)


def _names(home: Path) -> list[str]:
    base = home / "models"
    return sorted(path.name for path in base.iterdir() if path.is_dir() and path.name.isidentifier()) if base.is_dir() else []


def _stored_versions(home: Path, name: str) -> list[int]:
    """Those in their place, and those that an amendment which was killed has put aside."""
    aside = (path.name.removeprefix(".amended-") for path in (home / "models" / name).glob(".amended-*"))
    return sorted({*registry.versions(home, name), *(int(number) for number in aside if number.isdecimal())})


def _folders(base: Path) -> list[Path]:
    return sorted(path.parent for path in base.rglob(_NAMES)) if base.is_dir() else []


def _rows_of(folder: Path, person: Person) -> np.ndarray:
    """Positions of the person's rows."""
    path = folder / _NAMES
    if not path.exists():
        return np.empty(0, dtype=np.int64)
    return np.flatnonzero(np.isin(np.load(path, allow_pickle=False), person.customers))


def _first_row(home: Path, person: Person, name: str) -> pd.Timestamp | None:
    """When the person first was an example for this model, as far as the tables still tell."""
    theirs = condition(person, ["customer_id"])
    learned_from = [table for table in _LABELLED.get(name, (tables.EVENTS,)) if tables.exists(home, table)]
    found = [tables.matching(home, table, theirs, ["event_timestamp"]) for table in learned_from]
    times = [pc.min(rows["event_timestamp"]).as_py() for rows in found if rows.num_rows]
    return pd.Timestamp(min(times)) if times else None


def _versions_since(home: Path, name: str, first: pd.Timestamp | None) -> list[int]:
    if first is None:
        return []
    return [version for version in registry.versions(home, name) if _made_at(home, name, version) >= first]


def _made_at(home: Path, name: str, version: int) -> pd.Timestamp:
    """The version's as_of; the end of time for one that does not say, which may have seen anybody."""
    try:
        told = registry.load_version(home, name, version).manifest.get("as_of")
    except RegistryError:
        told = None
    return pd.Timestamp(told) if told else pd.Timestamp.max.tz_localize("UTC")
