"""Interactions -> a tuned recommender in two stages, with its test against simple rules, simpler models and the optimum.

The first stage is tuned on what was known at the validation cut-off; the second learns from earlier moments and is used where it is
ahead on the validation window. Both are tested once on the newest window, then fitted once more on everything known now: people are
served from today's history, and the figures are those of the tested fit.
"""

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from models import als, candidates, evaluation, forest, inner_product, lists, ranker, recommender, stages, two_stage
from models.candidates.factors import Factors
from models.ladder import SEGMENT
from models.recommender import Recommender
from models.stages import SECOND_STAGE, Stages
from models.two_stage import ALL_ITEMS, NEW_ITEMS
from pipelines import labels, tables, tracking
from pipelines.labels import Ranking
from pipelines.registry import Champion
from pipelines.settings import Settings
from pipelines.training import explanations, listing, rungs, truth, visits
from pipelines.training.fingerprint import fingerprint
from pipelines.training.gate import Verdict
from pipelines.training.listing import UnderTest
from pipelines.training.publishing import Fitted, Quality, code_hash, consent_record
from pipelines.training.ranking import Moment, Moments, ndcg_of
from pipelines.training.rows import PROTECTED, with_protected
from pipelines.training.rungs import Earlier, Known
from pipelines.training.study import storage_of
from pipelines.training.tasks import LABELLED_FROM
from pipelines.training.tuning import search_name, tune

NAME = "recommender"
FEATURE_SERVICE = "recommender_v1"
HALF_LIFE_DAYS = 90.0  # near the best on two public shops and a simulated one, among 15 to 240 days and no decay
CODE = "code"  # the parameter that names the source both stages were made with
EXAMPLES = 5

_TICK = pd.Timedelta(1, "us")


@dataclass(frozen=True)
class Choice:
    """Whether the second stage is used, the sentence that says why, and the stages so chosen, as they were on the validation window."""

    is_used: bool
    why: str
    stages: Stages


def fit(home: Path, *, settings: Settings, as_of: datetime, progress: Callable[[int, int], None]) -> tuple[Fitted, tracking.Run]:
    """The tuned winner, tested once, and its open run. Raises NotTrainable."""
    frame, items = read_interactions(home, settings=settings, as_of=as_of)
    newest, middle = labels.ranking_cutoffs(as_of, settings=settings)
    now = pd.Timestamp(as_of) + _TICK
    validation, test, serving = (ranking(frame, items, at=at, settings=settings) for at in (middle.at, newest.at, now))
    digest = fingerprint(items, *((part.customers, part.items, part.history, part.relevant) for part in (validation, test, serving)))
    options = settings.training
    study = f"{NAME}/{fingerprint(digest, code_hash(Recommender))[:16]}/{options.seed}"
    cutoffs = f"validation {middle.at:%Y-%m-%d}; test {newest.at:%Y-%m-%d}"
    tags = {"data.sha256": digest, "feature_service": FEATURE_SERVICE, "cutoffs": cutoffs, **tracking.commit()}
    searched_as = f"{search_name(study, options.workers)}/{options.trials}"
    run = tracking.open_run(home, NAME, study=searched_as, tags=tags, server=options.tracking_url)

    finished: list[Any] = []

    def on_trial(trial: Any) -> None:
        tracking.log_trial(run, trial)
        finished.append(trial)
        progress(len(finished), options.trials)

    params = tune(
        Recommender, validation.history, validation.relevant, n_trials=options.trials, seed=options.seed,
        storage=storage_of(home, options), workers=options.workers, study_name=study, timeout_s=options.timeout_s,
        on_trial=on_trial,
    )  # fmt: skip
    moments = _moments(frame, items, params, settings=settings)
    choice = _validated(moments, middle.at, params, settings=settings)
    tested, served = (_both_stages(moments, at, params, is_used=choice.is_used) for at in (newest.at, now))
    params = {**params, SECOND_STAGE: choice.is_used, CODE: code_of_stages()}
    known = rungs.known_at(home, frame, items, at=newest.at, as_of=as_of, settings=settings)
    ladder = _ladder(tested, known, Earlier(moments.at(middle.at).ranking, choice.stages), settings=settings)
    quality, segments = _quality(tested, home, settings=settings)
    quality = replace(quality, others={**quality.others, **rungs.metrics(ladder, k=options.k)})
    explanations.save_lists(run, tested, trials=finished)
    agreed = consent_record(home, pd.Series(serving.customers), settings=settings)
    how = "fitted again on everything known at as_of; the metrics are those of the fit on what was known at the test cut-off"
    describe = {
        "cutoffs": cutoffs, "rows": _sizes(validation, test, serving), "consent": agreed, "segments": segments,
        "ladder": ladder,
        "fit": f"{how}; {choice.why}",
    }  # fmt: skip

    def judge(champion: Champion, is_newer: bool) -> Verdict | None:
        other = _refitted(champion, moments, tested, params, settings=settings)
        return None if other is None else listing.examine(tested, other, _traits(home, tested.moment), is_newer=is_newer, settings=settings)

    return _fitted(served, quality, params=params, digest=digest, describe=describe, judge=judge, settings=settings), run


def read_interactions(home: Path, *, settings: Settings, as_of: datetime) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The interactions as they were built and the items, of one moment: an ingest may go on meanwhile.

    Where there are no interactions, the labels say why. Raises NotTrainable.
    """
    with tables.snapshot(home, (tables.INTERACTIONS, tables.ITEMS, *LABELLED_FROM)) as seen:
        frame, items = tables.read(seen, tables.INTERACTIONS), tables.read(seen, tables.ITEMS)
        if frame.empty:
            events, consents = (tables.read(seen, table) for table in LABELLED_FROM)
            frame = labels.interactions(events, consents, settings=settings, as_of=as_of)
    return frame, items


def ranking(frame: pd.DataFrame, items: pd.DataFrame, *, at: datetime, settings: Settings) -> Ranking:
    """What the recommender is fitted on at `at`: interactions that fade with age."""
    return labels.ranking(frame, items, at=at, settings=settings, half_life_days=HALF_LIFE_DAYS)


def code_of_stages() -> str:
    """Names the source of both stages and of what they learn from: other code, other version."""
    modules = (als, candidates, forest, inner_product, lists, ranker, recommender, stages, two_stage, Moments, visits)
    files = [path for module in modules for path in _sources(Path(inspect.getfile(module)))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


# -- private -----------------------------------------------------------------------------------------------------------


def _sources(file: Path) -> list[Path]:
    """The file itself, or all of the folder that it opens."""
    return sorted(file.parent.glob("*.py")) if file.name == "__init__.py" else [file]


def _moments(frame: pd.DataFrame, items: pd.DataFrame, params: dict[str, Any], *, settings: Settings) -> Moments:
    known = Factors().get_params()
    factors = {name: value for name, value in params.items() if name in known and name != "random_state"}
    return Moments(frame, items, settings, HALF_LIFE_DAYS, factors)


def _validated(moments: Moments, at: datetime, params: dict[str, Any], *, settings: Settings) -> Choice:
    """The second stage is used where, learned from what was known then, it was not behind the first on the validation window."""
    stage = moments.second_stage(at, modes=(ALL_ITEMS,))
    moment, k = moments.at(at), settings.training.k
    alone = Stages(Recommender(**params).fit(moment.ranking.history), None, moment.histories)
    if stage is None:
        return Choice(False, "no second stage: too few customers bought something after earlier cut-offs", alone)
    both = replace(alone, second=stage)
    one, two = (ndcg_of(stages, moment, k=k) for stages in (alone, both))
    compared = f"ndcg@{k} {two:.4f} with a second stage and {one:.4f} without on the validation window"
    return Choice(True, compared, both) if two >= one else Choice(False, f"{compared}: it is not used", alone)


def _both_stages(moments: Moments, at: datetime, params: dict[str, Any], *, is_used: bool) -> UnderTest:
    """Fitted on what was known at this cut-off."""
    moment = moments.at(at)
    return UnderTest(moment, Recommender(**params).fit(moment.ranking.history), moments.second_stage(at) if is_used else None)


def _quality(tested: UnderTest, home: Path, *, settings: Settings) -> tuple[Quality, list[dict[str, Any]]]:
    """The figures of the test window, looked at once, and those by segment of activity."""
    k, moment = settings.training.k, tested.moment
    found = {mode: listing.sheet(tested, mode=mode, k=k) for mode in (ALL_ITEMS, NEW_ITEMS) if moment.judged(mode)[0].size}
    every = found[ALL_ITEMS]
    rivals = listing.baselines(every, settings=settings)
    others = listing.figures(every, moment, k=k)
    popular = every.rivals[listing.POPULARITY]
    others |= {
        f"own_history_ndcg@{k}": next(one.value for one in rivals if one.name == listing.OWN_HISTORY),
        f"rival_recall@{k}": evaluation.recall_at_k(popular, every.wanted, k=k),
    }
    if NEW_ITEMS in found:
        rivals += listing.baselines(found[NEW_ITEMS], settings=settings, suffix=", new items only")
        others |= {f"new_items_{name}": value for name, value in listing.figures(found[NEW_ITEMS], moment, k=k).items()}
    scores = truth.item_scores(home, moment.ranking.customers[every.people], moment.ranking.items, at=moment.ranking.at)
    best = None if scores is None else listing.best_lists(scores, k=k)
    if scores is not None:
        others["share_of_optimum"] = listing.share_of_optimum(every, scores, k=k)
    quality = Quality(
        metric=f"ndcg@{k}",
        value=others.pop(f"ndcg@{k}"),
        rival=rivals[0].name,
        rival_value=rivals[0].value,
        low=rivals[0].low,
        high=rivals[0].high,
        optimum=None if best is None else evaluation.ndcg_at_k(best, every.wanted, k=k),
        others=others,
        baselines=tuple(rivals),
    )
    return quality, listing.by_segment(every, moment, settings=settings)


def _ladder(tested: UnderTest, known: Known, earlier: Earlier, *, settings: Settings) -> list[dict[str, Any]]:
    """How good the list of each rung was on the test window."""
    k, (people, wanted) = settings.training.k, tested.moment.judged(ALL_ITEMS)
    found = rungs.lists(tested, tested.recommend(people, k), known, earlier, k=k, half_life_days=HALF_LIFE_DAYS)
    return rungs.qualities(found, wanted, people, why={SEGMENT: known.why}, settings=settings)


def _refitted(champion: Champion, moments: Moments, tested: UnderTest, params: dict[str, Any], *, settings: Settings) -> UnderTest | None:
    """The champion's parameters fitted on the same history as ours: its own fit has seen the test window. None where they are of no use."""
    theirs = dict(champion.manifest.get("params", {}))
    if theirs == params:
        return tested
    is_used, _ = theirs.pop(SECOND_STAGE, False), theirs.pop(CODE, None)
    try:
        same = _moments(moments.frame, moments.items, theirs, settings=settings)
        return _both_stages(same, tested.moment.ranking.at, theirs, is_used=is_used)
    except (KeyError, TypeError, ValueError):
        return None


def _traits(home: Path, moment: Moment) -> pd.DataFrame:
    """The protected traits of those who are judged, as stated before the cut-off; one row each, in their order."""
    people = moment.ranking.customers[moment.judged(ALL_ITEMS)[0]]
    frame = pd.DataFrame({"customer_id": people, "event_timestamp": pd.Timestamp(moment.ranking.at)})
    return with_protected(home, frame)[list(PROTECTED)]


def _sizes(validation: Ranking, test: Ranking, serving: Ranking) -> dict[str, int]:
    return {
        **{f"{role}_customers": len(part.customers) for role, part in (("validation", validation), ("test", test), ("serving", serving))},
        "serving_items": len(serving.items),
        "serving_interactions": int(serving.history.nnz),
    }


def _fitted(
    served: UnderTest, quality: Quality, *, params: dict[str, Any], digest: str, describe: dict[str, Any],
    judge: Callable[[Champion, bool], Verdict | None], settings: Settings,
) -> Fitted:  # fmt: skip
    known, k = served.moment.ranking, settings.training.k
    chosen = np.arange(min(EXAMPLES, len(known.customers)))
    at_us = served.moment.occasion.at_us
    items, scores = served.stages.recommend(chosen, k, at_us=at_us)
    golden = {"customers": chosen.tolist(), "k": k, "at_us": int(at_us), "items": items.tolist(), "scores": scores.astype(float).tolist()}
    first = pd.DataFrame({"item_id": known.items[items[:, 0]].astype(str), "score": scores[:, 0].astype(float)})
    return Fitted(
        name=NAME,
        learner=served.stages,
        params=params,
        quality=quality,
        data_sha256=digest,
        manifest={
            "feature_service": FEATURE_SERVICE,
            "half_life_days": HALF_LIFE_DAYS,
            "golden": golden,
            **describe,
        },
        features=pd.DataFrame({"customer_id": known.customers[chosen].astype(str)}),
        output=first,
        judge=judge,
        arrays={"customer_ids": known.customers, "item_ids": known.items},
    )
