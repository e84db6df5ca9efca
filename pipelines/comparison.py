"""A challenger against the champion, on the requests that both scored. In: what `rapport models shadow` logged. Out: figures, no verdict.

Rows are of customers in the audit's sample (`serving.audit_share`), each as often as it was asked for; intervals are of whole customers.
Which of the two foretells better is told once outcomes are known. Never changes who answers.
"""

import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from models import bands, evaluation
from models.classifier import Classifier
from models.evaluation import Interval
from pipelines import outcomes, registry, tables
from pipelines.errors import InputError, NotTrainable
from pipelines.served import Served, Tombs
from pipelines.settings import Settings

Floats = NDArray[np.float64]

MIN_POSITIVES = 20  # outcomes of either kind that a comparison of foresight needs
TIMED_CALLS = 200


@dataclass(frozen=True)
class Foresight:
    """Both against what came to pass. Differences: the challenger's minus the champion's; AUC better above 0, Brier better below."""

    requests: int
    positives: int
    auc: dict[str, float]
    auc_difference: Interval
    brier: dict[str, float]
    brier_difference: Interval


@dataclass(frozen=True)
class Comparison:
    """Two versions of one model on the same requests. By role: champion, challenger."""

    model: str
    versions: dict[str, str]
    requests: int
    customers: int
    since: str
    until: str
    mean: dict[str, float]
    mean_difference: Interval
    rank_correlation: float | None  # Spearman's; None where one of them says the same of everybody
    psi: float  # of the challenger's scores against the champion's deciles
    same_band: float  # share of requests
    moved: dict[str, int]  # "low to high": requests
    row_ms: dict[str, float]  # median time for one row, measured here and now
    foresight: Foresight | None
    why_not: str | None  # where nothing can be said of foresight
    left_out: int  # requests that another champion or challenger scored


def compare(home: Path, model: str, *, settings: Settings, vault: Tombs, version: int | None = None) -> Comparison:
    """The newest challenger, or `version`, against the champion that it was beside last. Raises InputError where nothing was logged."""
    rows, left_out = _pair(_logged(home, model, vault=vault), model, version)
    versions = {role: str(rows[f"{role}_version"].iloc[0]) for role in ("champion", "challenger")}
    learners = {role: _load(home, model, number) for role, number in versions.items()}
    ours, theirs = (rows[role].to_numpy(dtype=np.float64) for role in ("challenger", "champion"))
    mine, yours = (bands.bands(p, learners[role].threshold_) for p, role in ((ours, "challenger"), (theirs, "champion")))
    moved = Counter(f"{bands.NAMES[a]} to {bands.NAMES[b]}" for a, b in zip(yours, mine, strict=True) if a != b)
    alike = evaluation.rank_correlation(theirs, ours)
    foresight, why_not = _foresight(home, model, rows, settings=settings)
    return Comparison(
        model=model,
        versions=versions,
        requests=len(rows),
        customers=int(rows["customer_id"].nunique()),
        since=rows["event_timestamp"].min().isoformat(),
        until=rows["event_timestamp"].max().isoformat(),
        mean={"champion": float(theirs.mean()), "challenger": float(ours.mean())},
        mean_difference=_interval(evaluation.mean_difference(ours, theirs), rows, settings),
        rank_correlation=None if np.isnan(alike) else alike,
        psi=evaluation.psi(theirs, ours),
        same_band=float((mine == yours).mean()),
        moved=dict(moved.most_common()),
        row_ms={role: _row_ms(learner) for role, learner in learners.items()},
        foresight=foresight,
        why_not=why_not,
        left_out=left_out,
    )


def _logged(home: Path, model: str, *, vault: Tombs) -> pd.DataFrame:
    """What challengers foretold: customer_id, event_timestamp, champion, challenger and their versions; oldest first."""
    with closing(Served(home, vault=vault)) as served:
        found = [
            (row.customer_id, row.served_us, row.values["champion_probability"], row.values["probability"], row.values["champion"],
             row.version.rpartition(" ")[2])
            for row in served.challenged(model)
        ]  # fmt: skip
    columns = ["customer_id", "event_timestamp", "champion", "challenger", "champion_version", "challenger_version"]
    rows = pd.DataFrame(found, columns=columns)
    rows["event_timestamp"] = pd.to_datetime(rows["event_timestamp"], unit="us", utc=True)
    return rows.sort_values("event_timestamp", kind="stable", ignore_index=True)


def _pair(rows: pd.DataFrame, model: str, version: int | None) -> tuple[pd.DataFrame, int]:
    """The rows of the two that met last, and how many are of others."""
    asked = rows if version is None else rows[rows["challenger_version"] == str(version)]
    if asked.empty:
        whose = f"version {version}" if version is not None else "a challenger"
        raise InputError(
            f"compare: no request for {model} was scored by {whose} yet; name one by `rapport models shadow {model} VERSION`, let the "
            "service answer for a while, and see that RAPPORT_SERVING__AUDIT_SHARE lets customers into the sample"
        )
    newest = asked.iloc[-1]
    is_theirs = (rows["challenger_version"] == newest["challenger_version"]) & (rows["champion_version"] == newest["champion_version"])
    return rows[is_theirs].reset_index(drop=True), int((~is_theirs).sum())


def _foresight(home: Path, model: str, rows: pd.DataFrame, *, settings: Settings) -> tuple[Foresight | None, str | None]:
    """How well each foretold, on the rows whose outcome is known; or why that cannot be said."""
    events = tables.read(home, tables.EVENTS, outcomes.columns(model))
    if events.empty:
        return None, "no event is in the tables"
    as_of = events["created_timestamp"].max()
    try:
        label = outcomes.of_rows(model, rows, events, settings=settings, as_of=as_of)
    except NotTrainable as reason:
        return None, str(reason)
    known = np.isfinite(label)
    positives = int(label[known].sum())
    if min(positives, int(known.sum()) - positives) < MIN_POSITIVES:
        return None, (
            f"of {len(rows):,} requests the outcome of {int(known.sum()):,} is known as of {as_of:%Y-%m-%d %H:%M}, {positives:,} of them "
            f"positive; {MIN_POSITIVES} of either kind are needed"
        )
    y, of_known = label[known], rows[known]
    score = {role: of_known[role].to_numpy(dtype=np.float64) for role in ("champion", "challenger")}

    def difference(metric: evaluation.Metric) -> Interval:
        return _interval(evaluation.difference(metric, y, score["challenger"], score["champion"]), of_known, settings)

    return Foresight(
        requests=int(known.sum()),
        positives=positives,
        auc={role: evaluation.auc(y, p) for role, p in score.items()},
        auc_difference=difference(evaluation.auc),
        brier={role: evaluation.brier(y, p) for role, p in score.items()},
        brier_difference=difference(evaluation.brier),
    ), None


def _interval(statistic: evaluation.Statistic, rows: pd.DataFrame, settings: Settings) -> Interval:
    options = settings.training
    return evaluation.paired_bootstrap(statistic, rows["customer_id"], draws=options.bootstrap_draws, seed=options.seed)


def _load(home: Path, model: str, version: str) -> Classifier:
    return Classifier.load(registry.load_version(home, model, int(version)).folder)


def _row_ms(learner: Classifier) -> float:
    """The time for a row of which nothing is known; that of any other differs little."""
    row, took = learner.encode({name: [None] for name in learner.feature_names_}), []
    for _ in range(TIMED_CALLS):
        start = time.perf_counter()
        learner.predict_values(row)
        took.append(time.perf_counter() - start)
    return round(1_000 * float(np.median(took)), 4)
