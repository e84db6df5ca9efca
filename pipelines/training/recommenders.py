"""Interactions -> a tuned recommender with its test against what is popular, one's own history and the optimum.

Tuned on what was known at the validation cut-off, tested on what was known at the test cut-off, then fitted once more on
everything known now: people are served from today's history, and the figures are those of the tested fit.
"""

import itertools
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from models import evaluation
from models.recommender import Recommender
from pipelines import labels, tables, tracking
from pipelines.labels import Ranking
from pipelines.registry import Champion
from pipelines.settings import Settings
from pipelines.training import truth
from pipelines.training.publishing import Fitted, Quality, code_hash, consent_record
from pipelines.training.tuning import fingerprint, tune

NAME = "recommender"
FEATURE_SERVICE = "recommender_v1"
HALF_LIFE_DAYS = 90.0  # near the best on two public shops and a simulated one, among 15 to 240 days and no decay
POPULARITY_DAYS = 28
OWN_FIRST = 1e9  # lifts an own purchase, however faded, above whatever is popular
EXAMPLES = 5

_TICK = pd.Timedelta(1, "us")


def fit(home: Path, *, settings: Settings, as_of: datetime, progress: Callable[[int, int], None]) -> tuple[Fitted, tracking.Run]:
    """The tuned winner, tested once, and its open run. Raises NotTrainable."""
    frame, items = read_interactions(home, settings=settings, as_of=as_of), tables.read(home, tables.ITEMS)
    newest, middle = labels.ranking_cutoffs(as_of, settings=settings)
    validation, test = (ranking(frame, items, at=cutoff.at, settings=settings) for cutoff in (middle, newest))
    serving = ranking(frame, items, at=pd.Timestamp(as_of) + _TICK, settings=settings)
    digest = fingerprint(*((part.customers, part.items, part.history, part.relevant) for part in (validation, test, serving)))
    options = settings.training
    study = f"{NAME}/{fingerprint(digest, code_hash(Recommender))[:16]}/{options.seed}"
    cutoffs = f"validation {middle.at:%Y-%m-%d}; test {newest.at:%Y-%m-%d}"
    tags = {"data.sha256": digest, "feature_service": FEATURE_SERVICE, "cutoffs": cutoffs, **tracking.commit()}
    run = tracking.open_run(home, NAME, study=f"{study}/{options.trials}", tags=tags)

    finished = itertools.count(1)

    def on_trial(trial: Any) -> None:
        tracking.log_trial(run, trial)
        progress(next(finished), options.trials)

    params = tune(
        Recommender, validation.history, validation.relevant, n_trials=options.trials, seed=options.seed,
        journal=home / "optuna" / "journal.log", study_name=study, timeout_s=options.timeout_s, on_trial=on_trial,
    )  # fmt: skip
    tested = Recommender(**params).fit(test.history)
    served = Recommender(**params).fit(serving.history)
    quality = _quality(tested, test, frame, home, settings=settings)
    agreed = consent_record(home, pd.Series(serving.customers), settings=settings)
    describe = {"cutoffs": cutoffs, "rows": _sizes(validation, test, serving), "consent": agreed}
    return _fitted(served, serving, test, quality, params=params, digest=digest, describe=describe, settings=settings), run


def read_interactions(home: Path, *, settings: Settings, as_of: datetime) -> pd.DataFrame:
    """The interactions table as it was built; where it is empty, the labels say why. Raises NotTrainable."""
    frame = tables.read(home, tables.INTERACTIONS)
    if not frame.empty:
        return frame
    events, consents = tables.read(home, tables.EVENTS), tables.read(home, tables.CONSENTS)
    return labels.interactions(events, consents, settings=settings, as_of=as_of)


def ranking(frame: pd.DataFrame, items: pd.DataFrame, *, at: datetime, settings: Settings) -> Ranking:
    """What the recommender is fitted on at `at`: interactions that fade with age."""
    return labels.ranking(frame, items, at=at, settings=settings, half_life_days=HALF_LIFE_DAYS)


# -- private -----------------------------------------------------------------------------------------------------------


def _quality(tested: Recommender, test: Ranking, frame: pd.DataFrame, home: Path, *, settings: Settings) -> Quality:
    options = settings.training
    people, wanted = _judged(test)
    popular = _popular(frame, test, k=options.k)
    ours, _ = tested.recommend(people, options.k)
    theirs = np.tile(popular, (len(people), 1))
    own = _own_history(frame, test, people, popular, k=options.k)
    value, rival = (evaluation.ndcg_by_customer(lists, wanted, k=options.k) for lists in (ours, theirs))
    gain = evaluation.paired_bootstrap(evaluation.mean_difference(value, rival), people, draws=options.bootstrap_draws, seed=options.seed)
    best = _best_lists(home, test, people, k=options.k)
    return Quality(
        metric=f"ndcg@{options.k}",
        value=float(np.nanmean(value)),
        rival=f"popularity of the last {POPULARITY_DAYS} days",
        rival_value=float(np.nanmean(rival)),
        low=gain.low,
        high=gain.high,
        optimum=None if best is None else evaluation.ndcg_at_k(best, wanted, k=options.k),
        others={
            f"own_history_ndcg@{options.k}": evaluation.ndcg_at_k(own, wanted, k=options.k),
            f"recall@{options.k}": evaluation.recall_at_k(ours, wanted, k=options.k),
            f"rival_recall@{options.k}": evaluation.recall_at_k(theirs, wanted, k=options.k),
            f"mrr@{options.k}": evaluation.mrr(ours, wanted, k=options.k),
            f"coverage@{options.k}": evaluation.coverage(ours, len(test.items)),
            "judged_customers": float(len(people)),
        },
    )


def _judged(test: Ranking) -> tuple[np.ndarray, sparse.csr_matrix]:
    """Positions of the customers with something relevant, and their rows of it."""
    people = np.flatnonzero(np.diff(test.relevant.indptr))
    return people, test.relevant[people]


def _popular(frame: pd.DataFrame, test: Ranking, *, k: int) -> np.ndarray:
    """The items most bought just before the cut-off, by position, ties by position."""
    recent = _purchases_before(frame, test)
    recent = recent[recent["event_timestamp"] >= test.at - pd.Timedelta(POPULARITY_DAYS, "D")]
    counts = np.bincount(_positions(test.items, recent["item_id"]), minlength=len(test.items))
    return np.argsort(-counts, kind="stable")[:k]


def _own_history(frame: pd.DataFrame, test: Ranking, people: np.ndarray, popular: np.ndarray, *, k: int) -> np.ndarray:
    """What each customer bought before, fading with age, then what is popular: the rule to beat where people buy again."""
    past = _purchases_before(frame, test)
    age_days = (test.at - past["event_timestamp"]).dt.total_seconds().to_numpy() / 86_400
    rows, columns = _positions(test.customers, past["customer_id"]), _positions(test.items, past["item_id"])
    bought = sparse.csr_matrix((np.exp2(-age_days / HALF_LIFE_DAYS), (rows, columns)), shape=test.history.shape)[people]
    places = np.arange(len(popular), 0, -1) / (1 + len(popular))  # below 1, best first
    filler = sparse.csr_matrix(
        (np.tile(places, len(people)), np.tile(popular, len(people)), np.arange(len(people) + 1) * len(popular)), bought.shape
    )
    return _top_of_rows((bought * OWN_FIRST + filler).tocsr(), k=k)


def _top_of_rows(matrix: sparse.csr_matrix, *, k: int) -> np.ndarray:
    """Columns of the k largest stored values of each row, best first; -1 where a row stores fewer."""
    counts = np.diff(matrix.indptr)
    rows = np.repeat(np.arange(len(counts)), counts)
    order = np.lexsort((matrix.indices, -matrix.data, rows))
    rank = np.arange(len(rows)) - np.repeat(matrix.indptr[:-1], counts)
    kept = rank < k
    lists = np.full((len(counts), k), -1, dtype=np.int64)
    lists[rows[kept], rank[kept]] = matrix.indices[order][kept]
    return lists


def _best_lists(home: Path, test: Ranking, people: np.ndarray, *, k: int) -> np.ndarray | None:
    scores = truth.item_scores(home, test.customers[people], test.items, at=test.at)
    return None if scores is None else np.argsort(-scores, axis=1, kind="stable")[:, :k]


def _purchases_before(frame: pd.DataFrame, test: Ranking) -> pd.DataFrame:
    known = (frame["event_timestamp"] < test.at) & (frame["created_timestamp"] < test.at)
    return frame[known & (frame["type"] == "purchase")]


def _positions(names: np.ndarray, values: pd.Series) -> np.ndarray:
    return pd.Index(names).get_indexer(pd.Index(values))


def _sizes(validation: Ranking, test: Ranking, serving: Ranking) -> dict[str, int]:
    return {
        **{f"{role}_customers": len(part.customers) for role, part in (("validation", validation), ("test", test), ("serving", serving))},
        "serving_items": len(serving.items),
        "serving_interactions": int(serving.history.nnz),
    }


def _fitted(
    served: Recommender, serving: Ranking, test: Ranking, quality: Quality, *, params: dict[str, Any], digest: str,
    describe: dict[str, Any], settings: Settings,
) -> Fitted:  # fmt: skip
    people, wanted = _judged(test)
    k = settings.training.k
    chosen = np.arange(min(EXAMPLES, len(serving.customers)))
    items, scores = served.recommend(chosen, k)
    first = pd.DataFrame({"item_id": serving.items[items[:, 0]].astype(str), "score": scores[:, 0].astype(float)})

    def judge(champion: Champion) -> float | None:
        try:  # its own fit has seen the test window: its parameters are judged on the same history as ours
            other = Recommender(**champion.manifest["params"]).fit(test.history)
        except (KeyError, TypeError, ValueError):
            return None
        return evaluation.ndcg_at_k(other.recommend(people, k)[0], wanted, k=k)

    return Fitted(
        name=NAME,
        learner=served,
        params=params,
        quality=quality,
        data_sha256=digest,
        manifest={
            "feature_service": FEATURE_SERVICE,
            "half_life_days": HALF_LIFE_DAYS,
            "fit": "fitted again on everything known at as_of; the metrics are those of the fit on what was known at the test cut-off",
            "golden": {"customers": chosen.tolist(), "k": k, "items": items.tolist(), "scores": scores.astype(float).tolist()},
            **describe,
        },
        features=pd.DataFrame({"customer_id": serving.customers[chosen].astype(str)}),
        output=first,
        judge=judge,
        arrays={"customer_ids": serving.customers, "item_ids": serving.items},
    )
