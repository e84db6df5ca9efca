"""UnderTest lists -> how good they are beside every rival's: any item and new items only, by segment of activity, with intervals.

Full ranking over all items known at the cut-off; whole customers are drawn again for the intervals. Never fits the model under test.
"""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from models import evaluation, expectation, exposure
from models.candidates.neighbours import Neighbours
from models.candidates.own_history import OwnHistory
from models.candidates.popularity import Popularity
from models.candidates.retrieval import READS
from models.recommender import Recommender
from models.stages import Stages
from models.two_stage import ALL_ITEMS, NEW_ITEMS, TwoStage
from pipelines.settings import Settings
from pipelines.training import gate
from pipelines.training.gate import Verdict
from pipelines.training.publishing import Baseline, finite, share
from pipelines.training.ranking import Moment

POPULARITY_DAYS = 28
OWN_HALF_LIFE_DAYS = 180.0  # the rule at its best, among 15 days and no decay, on earlier windows of two shops
POPULARITY, OWN_HISTORY, NEIGHBOURS, ALS_ALONE, FIRST_STAGE = (
    f"popularity of the last {POPULARITY_DAYS} days",
    "own history",
    "item neighbours",
    "ALS alone",  # the factors of the first stage, which adds the customer's own history to them
    "first stage",
)
LIGHT_DAYS = 5  # days with any act: one is new, up to this many light, more heavy
SEGMENTS = ("new", "light", "heavy")

Lists = dict[str, np.ndarray]


@dataclass(frozen=True)
class UnderTest:
    """What was fitted on what was known at the test cut-off. stage: the second; None where it is not used."""

    moment: Moment
    first: Recommender
    stage: TwoStage | None

    @property
    def stages(self) -> Stages:
        """Both, with what they know the customers by."""
        return Stages(self.first, self.stage, self.moment.histories)

    def recommend(self, people: np.ndarray, k: int, *, mode: str = ALL_ITEMS) -> np.ndarray:
        """The best items (m, k) of these people at the cut-off."""
        return self.stages.recommend(people, k, at_us=self.moment.occasion.at_us, mode=mode)[0]


@dataclass(frozen=True)
class Sheet:
    """The lists of one mode for the people who bought: ours under the name of no rival, and what they bought."""

    people: np.ndarray
    wanted: sparse.csr_matrix
    ours: np.ndarray
    rivals: Lists

    def ndcg(self, lists: np.ndarray, *, k: int) -> np.ndarray:
        """By customer."""
        return evaluation.ndcg_by_customer(lists, self.wanted, k=k)


def sheet(tested: UnderTest, *, mode: str, k: int) -> Sheet:
    """Everybody's lists in this mode. With new items only the rivals, too, leave out what the customer bought before."""
    moment, now = tested.moment, tested.moment.occasion
    people, wanted = moment.judged(mode)
    bought = now.bought()[people]
    exclude = bought if mode == NEW_ITEMS else None
    near = READS["neighbours"]
    rivals = {
        POPULARITY: _popular(moment, bought if mode == NEW_ITEMS else None, n_people=len(people), k=k),
        NEIGHBOURS: Neighbours().fit(now.matrix(**near)).recommend(now.matrix(**near)[people], k, exclude)[0],
        ALS_ALONE: _factors_alone(tested.first).recommend(people, k, exclude)[0],
        FIRST_STAGE: tested.first.recommend(people, k, exclude)[0],
    }
    if mode == ALL_ITEMS:
        rivals[OWN_HISTORY] = _own_history(moment, people, rivals[POPULARITY], k=k)
    if tested.stage is None:
        del rivals[FIRST_STAGE]
    return Sheet(people, wanted, tested.recommend(people, k, mode=mode), rivals)


def baselines(found: Sheet, *, settings: Settings, suffix: str = "") -> list[Baseline]:
    """Each rival's NDCG@k and our lead over it; both sides see the same draws of customers."""
    options = settings.training
    value, leads = found.ndcg(found.ours, k=options.k), []
    for name, lists in found.rivals.items():
        theirs = found.ndcg(lists, k=options.k)
        gain = evaluation.paired_bootstrap(
            evaluation.mean_difference(value, theirs), found.people, draws=options.bootstrap_draws, seed=options.seed
        )
        leads.append(Baseline(name + suffix, _mean(theirs), gain.value, gain.low, gain.high))
    return leads


def best_lists(scores: np.ndarray, *, k: int) -> np.ndarray:
    """The k items (m, k) of the highest scores (m, n_items), best first."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def filled(lists: np.ndarray, popular: np.ndarray) -> np.ndarray:
    """Lists (m, k) with the next popular items (m, k), best first, in their empty places (-1)."""
    full = lists.copy()
    for item in popular.T:  # place by place: the next popular item, where there is room and it is not listed yet
        rows = np.flatnonzero((full == -1).any(axis=1) & (full != item[:, None]).all(axis=1))
        full[rows, (full[rows] == -1).argmax(axis=1)] = item[rows]
    return full


def share_of_optimum(found: Sheet, shares: np.ndarray, *, k: int) -> float:
    """How far our lists are on the way from popularity to the optimum, by the NDCG@k of each that is expected: free of the noise of labels.

    shares: (m, n_items), of each item in the coming purchases of those who are judged, given what the log shows. How many items somebody
    buys is taken as it was, which ones they are by these. With the hidden tastes in their place the share moves by less than 0.01. NaN
    where nobody's shares are known.
    """
    told = np.flatnonzero(shares.sum(axis=1) > 0)
    n_bought = np.diff(found.wanted.indptr)[told]
    chance = expectation.chances(shares[told], n_bought)
    lists = (found.ours, best_lists(shares, k=k), found.rivals[POPULARITY])
    ours, best, popular = (_mean(expectation.ndcg_by_customer(each[told], chance, n_bought, k=k)) for each in lists)
    return share(ours - popular, best - popular)


def figures(found: Sheet, moment: Moment, *, k: int) -> dict[str, float]:
    """Recall, NDCG, reciprocal rank, and how the lists spread over the catalogue; the rivals' NDCG by their names."""
    n_items, bought = moment.occasion.n_items, moment.occasion.bought()
    return {
        f"ndcg@{k}": _mean(found.ndcg(found.ours, k=k)),
        f"recall@{k}": evaluation.recall_at_k(found.ours, found.wanted, k=k),
        f"mrr@{k}": evaluation.mrr(found.ours, found.wanted, k=k),
        f"coverage@{k}": evaluation.coverage(found.ours, n_items),
        f"gini@{k}": exposure.gini(found.ours, n_items),
        f"novelty_bits@{k}": exposure.novelty(found.ours, bought),
        "judged_customers": float(len(found.people)),
    }


def by_segment(found: Sheet, moment: Moment, *, settings: Settings) -> list[dict[str, Any]]:
    """NDCG@k of customers who were there on one day, on a few, on many, before the cut-off, with the lead over popularity."""
    options, now = settings.training, moment.occasion
    days = np.unique(np.stack([now.customer, np.floor(now.age_days).astype(np.int64)]), axis=1)[0]
    n_days = np.bincount(days, minlength=now.n_customers)[found.people]
    segment = np.select([n_days <= 1, n_days <= LIGHT_DAYS], SEGMENTS[:2], SEGMENTS[2])
    value, theirs = (found.ndcg(lists, k=options.k) for lists in (found.ours, found.rivals[POPULARITY]))
    rows = []
    for name in SEGMENTS:
        chosen = np.flatnonzero(segment == name)
        if not chosen.size:
            continue
        gain = evaluation.paired_bootstrap(
            evaluation.mean_difference(value[chosen], theirs[chosen]), chosen, draws=options.bootstrap_draws, seed=options.seed
        )
        told = {"ndcg": _mean(value[chosen]), "popularity_ndcg": _mean(theirs[chosen]), "lead_low": gain.low, "lead_high": gain.high}
        rows.append({"segment": name, "customers": int(chosen.size), **{key: finite(number) for key, number in told.items()}})
    return rows


def examine(tested: UnderTest, champion: UnderTest, traits: pd.DataFrame, *, is_newer: bool, settings: Settings) -> Verdict:
    """The gate's checks of our lists against those of the champion's parameters for the same people, any item allowed.

    champion: fitted on the same history. traits: protected traits of those who are judged, one row each. is_newer: ours are of newer data.
    """
    k, moment = settings.training.k, tested.moment
    people, wanted = moment.judged(ALL_ITEMS)
    lists = [one.recommend(people, k) for one in (tested, champion)]
    ours, theirs = (evaluation.ndcg_by_customer(each, wanted, k=k) for each in lists)

    def gain(rows: np.ndarray) -> evaluation.Statistic:
        return evaluation.mean_difference(ours[rows], theirs[rows])

    checks = (
        gate.quality(gain, people, is_newer=is_newer, settings=settings),
        gate.coverage(*(evaluation.coverage(each, moment.occasion.n_items) for each in lists), settings=settings),
        gate.groups(gain, people, traits, lambda rows: len(rows) >= settings.monitoring.min_group, settings=settings),
        gate.latency(lambda: tested.recommend(people[:1], k), "list", settings.gate.max_list_ms),
    )
    return Verdict(_mean(theirs), checks)


# -- private -----------------------------------------------------------------------------------------------------------


def _factors_alone(first: Recommender) -> Recommender:
    """The same factors, without what the customer's own history adds."""
    alone = copy.copy(first)
    alone.repeat_weight = 0.0
    return alone


def _popular(moment: Moment, bought: sparse.csr_matrix | None, *, n_people: int, k: int) -> np.ndarray:
    """The items most bought just before the cut-off, ties by position; for each customer those not bought before, where asked."""
    now = moment.occasion
    recent = now.matrix(half_life_days=np.inf, within_days=POPULARITY_DAYS, purchases_only=True)
    known = recent if recent.nnz else now.matrix(half_life_days=np.inf)
    source = Popularity().fit(known)
    if bought is None:
        return np.tile(source.recommend(sparse.csr_matrix((1, now.n_items)), k)[0], (n_people, 1))
    return source.recommend(sparse.csr_matrix(bought.shape), k, bought)[0]


def _own_history(moment: Moment, people: np.ndarray, popular: np.ndarray, *, k: int) -> np.ndarray:
    """What each customer bought before, fading with age, then what is popular: the rule to beat where people buy again."""
    now = moment.occasion
    own = now.matrix(half_life_days=OWN_HALF_LIFE_DAYS, purchases_only=True)
    lists = np.full((len(people), k), -1, dtype=np.int64)
    if own.nnz:
        items, scores = OwnHistory().fit(own).recommend(own[people], k)
        lists = np.where(scores > 0, items, -1)
    return filled(lists, popular)


def _mean(values: np.ndarray) -> float:
    counted = values[~np.isnan(values)]
    return float(counted.mean()) if counted.size else float("nan")
