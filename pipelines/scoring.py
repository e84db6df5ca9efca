"""Champion models -> probabilities and recommendations for everybody who allows it, as of now. Never trains or decides.

Features come through the same retrieval as in training. A model that is not trainable leaves nulls and empty tables; one
that is damaged stops the run.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from models import hazard
from models.classifier import Classifier
from models.customer_value import CustomerValue
from models.hazard import Hazard
from models.stages import Stages
from models.task import Task
from pipelines import consent, feature_store, labels, registry, tables
from pipelines.errors import RegistryError
from pipelines.registry import Champion
from pipelines.settings import Settings
from pipelines.training import timing, valuing
from pipelines.training.rows import with_protected
from pipelines.training.tasks import discover

INTENT_DAYS = 7  # decision points this young show what the intent model meets now
LIST_LENGTH = 50
CUSTOMERS_AT_A_TIME = 20_000

_EVENT_COLUMNS = ["type", "event_timestamp", "created_timestamp", "customer_id", "session_id"]
_KEYS = ["customer_id", "event_timestamp"]
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class ScoreReport:
    """Rows written, by table, and the version that scored, by model; None where there is no champion."""

    rows: dict[str, int] = field(default_factory=dict)
    versions: dict[str, int | None] = field(default_factory=dict)


def score(home: Path, *, settings: Settings, as_of: datetime) -> ScoreReport:
    """Write customer_scores, scored_churn, scored_intent and recommendations; next_orders and customer_values, where churn's champion
    tells them; and task_scores and scored_tasks, where other tasks have a champion.

    Raises RegistryError on a damaged champion.
    """
    champions: dict[str, Champion | None] = {name: _champion(home, name) for name in ("churn", "intent", "recommender")}
    events, consents = _known_events(home, as_of, _EVENT_COLUMNS), tables.read(home, tables.CONSENTS)
    everybody = pd.DataFrame({"customer_id": np.sort(events["customer_id"].unique()), "event_timestamp": pd.Timestamp(as_of)})
    allowed = _allowed(everybody, consents, settings=settings)
    churn, intent = (probabilities(home, champions[name], allowed) for name in ("churn", "intent"))
    population = labels.churn_population(events, as_of, settings=settings)["customer_id"]
    points = recent_decision_points(events, settings=settings, as_of=as_of)
    points = _allowed(points[points["customer_id"].isin(allowed["customer_id"])], consents, settings=settings)
    rows = {
        "customer_scores": tables.write(home, tables.CUSTOMER_SCORES, _scores(allowed, churn, intent, champions)),
        "scored_churn": tables.write(home, tables.SCORED_CHURN, _watched(home, churn[churn["customer_id"].isin(population)])),
        "scored_intent": tables.write(home, tables.SCORED_INTENT, _watched(home, probabilities(home, champions["intent"], points))),
        "recommendations": tables.write(
            home, tables.RECOMMENDATIONS, _recommendations(champions["recommender"], set(allowed["customer_id"]), as_of)
        ),
    }
    rows |= _told_beside(home, champions["churn"], churn[churn["customer_id"].isin(population)], settings=settings, as_of=as_of)
    others = {name: _champion(home, name) for name in sorted(set(discover()) - set(champions))}
    trained = {name: champion for name, champion in others.items() if champion is not None}
    if trained:
        champions |= trained
        whole = _known_events(home, as_of, None)
        occasions = {name: _occasions(discover()[name], whole, points, as_of) for name in trained}
        asked = {
            name: _allowed(some[some["customer_id"].isin(allowed["customer_id"])], consents, settings=settings)
            for name, some in occasions.items()
        }
        rows["task_scores"] = tables.write(home, tables.TASK_SCORES, _task_scores(home, allowed, trained))
        rows["scored_tasks"] = tables.write(home, tables.SCORED_TASKS, _scored_tasks(home, asked, trained))
    else:
        for table in (tables.TASK_SCORES, tables.SCORED_TASKS):
            tables.drop(home, table)
    return ScoreReport(rows=rows, versions={name: champion.version if champion else None for name, champion in champions.items()})


def probabilities(home: Path, champion: Champion | None, rows: pd.DataFrame) -> pd.DataFrame:
    """`rows` (customer_id, event_timestamp) with the champion's features and `probability`; null without a champion."""
    keys = rows[_KEYS].reset_index(drop=True)
    if champion is None or keys.empty:
        return keys.assign(probability=np.full(len(keys), np.nan))
    frame = feature_store.training_frame(home, keys, service=champion.manifest["feature_service"])
    learner = Classifier.load(champion.folder)
    return frame.assign(probability=learner.predict_proba(frame[learner.feature_names_])[:, 1])


def recent_decision_points(events: pd.DataFrame, *, settings: Settings, as_of: datetime) -> pd.DataFrame:
    """Decision points of the last days, those of sessions still open included: customer_id, event_timestamp."""
    since, now = pd.Timestamp(as_of) - timedelta(days=INTENT_DAYS), pd.Timestamp(as_of)
    sessions = events.loc[events["event_timestamp"] > since, "session_id"].dropna().unique()
    points = labels.decision_points(events[events["session_id"].isin(sessions)], settings=settings)
    return points.loc[(points["event_timestamp"] > since) & (points["event_timestamp"] <= now), _KEYS].reset_index(drop=True)


# -- private -----------------------------------------------------------------------------------------------------------


def _champion(home: Path, name: str) -> Champion | None:
    """The verified champion; None where the data could not train one. Raises RegistryError if it is damaged."""
    if registry.champions(home).get(name, {}).get("version") is None:
        return None
    return registry.load_champion(home, name)


def _known_events(home: Path, as_of: datetime, columns: list[str] | None) -> pd.DataFrame:
    events, now = tables.read(home, tables.EVENTS, columns), pd.Timestamp(as_of)
    return events[(events["event_timestamp"] <= now) & (events["created_timestamp"] <= now) & events["customer_id"].notna()]


def _allowed(rows: pd.DataFrame, consents: pd.DataFrame, *, settings: Settings) -> pd.DataFrame:
    if rows.empty:
        return rows
    return rows[np.asarray(consent.state_at(consents, rows[_KEYS], purpose=settings.consent.purpose), dtype=bool)].reset_index(drop=True)


def _scores(allowed: pd.DataFrame, churn: pd.DataFrame, intent: pd.DataFrame, champions: dict[str, Champion | None]) -> pd.DataFrame:
    version = {name: None if champion is None else str(champion.version) for name, champion in champions.items()}
    return pd.DataFrame(
        {
            "customer_id": allowed["customer_id"],
            "event_timestamp": allowed["event_timestamp"],
            "churn_probability": churn["probability"].to_numpy(dtype=float),
            "churn_version": pd.Series([version["churn"]] * len(allowed), dtype="object"),
            "intent_probability": intent["probability"].to_numpy(dtype=float),
            "intent_version": pd.Series([version["intent"]] * len(allowed), dtype="object"),
        }
    )


def _told_beside(home: Path, champion: Champion | None, active: pd.DataFrame, *, settings: Settings, as_of: datetime) -> dict[str, int]:
    """Write next_orders and customer_values, where churn's champion tells them; the rows of each. active: as for `_next_orders`."""
    told = {}
    if champion is not None and timing.FOLDER in champion.manifest:
        told[tables.NEXT_ORDERS] = _next_orders(champion, active)
    if champion is not None and valuing.FOLDER in champion.manifest:
        told[tables.CUSTOMER_VALUES] = _values(home, champion, settings=settings, as_of=as_of)
    for table in (tables.NEXT_ORDERS, tables.CUSTOMER_VALUES):
        if table not in told:
            tables.drop(home, table)
    return {table.name: tables.write(home, table, frame) for table, frame in told.items()}


def _next_orders(champion: Champion, rows: pd.DataFrame) -> pd.DataFrame:
    """When each customer's next order is to be expected. rows: the champion's features of who may churn."""
    learner = Hazard.load(champion.folder / timing.FOLDER)
    names = [name for name in learner.classifier_.feature_names_ if name != hazard.PERIOD]
    starts = range(0, len(rows), CUSTOMERS_AT_A_TIME)  # a row becomes one a period
    parts = [learner.predict_survival(rows.iloc[start : start + CUSTOMERS_AT_A_TIME][names]) for start in starts]
    silence = np.concatenate([np.empty((0, learner.n_periods)), *parts])
    return pd.DataFrame(
        {
            **{name: rows[name].to_numpy() for name in _KEYS},
            "period_days": float(learner.period_days),
            "silence": list(silence),
            "expected_days": hazard.expected_days(silence, period_days=learner.period_days),
            "median_days": hazard.median_days(silence, period_days=learner.period_days),
            "version": str(champion.version),
        }
    )


def _values(home: Path, champion: Champion, *, settings: Settings, as_of: datetime) -> pd.DataFrame:
    """What each customer who ever ordered will be worth."""
    learner, now = CustomerValue.load(champion.folder / valuing.FOLDER), pd.Timestamp(as_of)
    history, mean_cents = valuing.known(home, timing.orders(home, settings=settings, also=[valuing.VALUE]), now, settings=settings)
    told = learner.predict(history, mean_cents) if len(history) else pd.DataFrame(columns=["expected_orders", "order_value", "value"])
    return pd.DataFrame(
        {
            "customer_id": history.index,
            "event_timestamp": now,
            "horizon_days": float(learner.horizon_days),
            "expected_orders": told["expected_orders"].to_numpy(dtype=float),
            "order_value_cents": told["order_value"].to_numpy(dtype=float),
            "value_cents": told["value"].to_numpy(dtype=float),
            "version": str(champion.version),
        }
    )


def _task_scores(home: Path, allowed: pd.DataFrame, champions: dict[str, Champion]) -> pd.DataFrame:
    """One row per customer and task, everybody scored as of now."""
    parts = [
        probabilities(home, champion, allowed)[[*_KEYS, "probability"]].assign(model=name, version=str(champion.version))
        for name, champion in champions.items()
    ]
    return pd.concat(parts, ignore_index=True)


def _occasions(task: Task, events: pd.DataFrame, points: pd.DataFrame, as_of: datetime) -> pd.DataFrame:
    """The instants at which the task's label would be asked now: those too young to have been in training, or of the last days.

    events: all columns; points: customer_id and event_timestamp of the last days' decision points, at which the tasks of intent ask.
    """
    if task.label is None:
        return points
    now = pd.Timestamp(as_of)
    found = task.label(events)
    is_young = (found["matured_timestamp"] > now) | (found["event_timestamp"] > now - timedelta(days=INTENT_DAYS))
    return found.loc[is_young & (found["event_timestamp"] <= now), _KEYS].reset_index(drop=True)


def _scored_tasks(home: Path, asked: dict[str, pd.DataFrame], champions: dict[str, Champion]) -> pa.Table:
    """The rows of all tasks as those who watch read them; the features that one of them does not read are null."""
    frames = (_watched(home, probabilities(home, champions[name], some)).assign(model=name) for name, some in asked.items())
    return pa.concat_tables([pa.Table.from_pandas(frame, preserve_index=False) for frame in frames], promote_options="permissive")


def _watched(home: Path, scored: pd.DataFrame) -> pd.DataFrame:
    """The scored rows as those who watch read them; none where nothing was scored."""
    if scored["probability"].isna().all():
        return scored.iloc[:0]
    frame = with_protected(home, scored.reset_index(drop=True))
    return frame[[*(name for name in frame.columns if name != "probability"), "probability"]]


def _recommendations(champion: Champion | None, allowed: set[str], as_of: datetime) -> Iterator[pa.RecordBatch]:
    """The best items of each customer whom the model knows and who allows it, best first, some customers at a time."""
    if champion is None:
        return
    try:
        stages, at_us = Stages.load(champion.folder), (as_of - _EPOCH) // timedelta(microseconds=1)
    except ValueError as error:  # of older code
        raise RegistryError(f"scoring: the champion of recommender can be loaded no more: {error}") from error
    names, items = (np.load(champion.folder / f"{label}.npy", allow_pickle=False).astype(object) for label in ("customer_ids", "item_ids"))
    chosen = np.flatnonzero(pd.Index(names).isin(list(allowed)))
    length = min(LIST_LENGTH, len(items))
    for start in range(0, len(chosen), CUSTOMERS_AT_A_TIME):
        part = chosen[start : start + CUSTOMERS_AT_A_TIME]
        best, scores = (values.ravel() for values in stages.recommend(part, length, at_us=at_us))
        frame = pd.DataFrame(
            {
                "customer_id": np.repeat(names[part], length),
                "event_timestamp": pd.Timestamp(as_of),
                "rank": np.tile(np.arange(1, length + 1), len(part)),
                "item_id": items[best],
                "score": scores.astype(float),
                "version": str(champion.version),
            }
        )
        yield pa.RecordBatch.from_pandas(frame[best >= 0], preserve_index=False)
