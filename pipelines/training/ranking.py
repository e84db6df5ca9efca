"""Interactions -> the second stage of the recommender, learned from earlier moments and judged on the validation window.

At each earlier cut-off the sources are fitted on what was known then, so that the scores which the ranker learns from are as out of
sample as those it will meet. Lists are asked for there, for everybody at once, and as customers come back after it, knowing what they did
since. A label window never reaches past the moment that is learned for. Never looks at the test window.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from models import evaluation
from models.candidates.history import Histories
from models.candidates.occasion import UNKNOWN, Occasion
from models.candidates.pairs import Pairs, pairs
from models.candidates.retrieval import Retrieval
from models.stages import Stages
from models.two_stage import ALL_ITEMS, MODES, NEW_ITEMS, TwoStage
from pipelines import labels
from pipelines.labels import Ranking
from pipelines.settings import Settings
from pipelines.training import visits

STEPS_A_HORIZON = 2  # they lie half a horizon apart; their label windows overlap
MIN_TEACHERS = 80  # to whom some candidates were worth more than others, over all examples: with fewer the sources' order is not improved
MOST_PEOPLE = 2_000  # of one cut-off, and on visits after it, are learned from, drawn; those who bought before those who only looked
NEGATIVE_SHARE = 0.2  # of the candidates that were not chosen are learned from


@dataclass(frozen=True)
class Moment:
    """A cut-off, what was known then, and by mode what the customers bought after it, and what else they did, by its worth."""

    ranking: Ranking
    occasion: Occasion
    histories: Histories
    relevant: dict[str, sparse.csr_matrix]
    worth: dict[str, sparse.csr_matrix]

    def judged(self, mode: str) -> tuple[np.ndarray, sparse.csr_matrix]:
        """Positions of the customers with something relevant, and their rows of it."""
        people = np.flatnonzero(np.diff(self.relevant[mode].indptr))
        return people, self.relevant[mode][people]


@dataclass
class Moments:
    """Cut-offs of one log, each worked out once. factors: parameters of the matrix factorisation among the sources."""

    frame: pd.DataFrame
    items: pd.DataFrame
    settings: Settings
    half_life_days: float
    factors: dict[str, Any]
    _at: dict[pd.Timestamp, Moment] = field(default_factory=dict)
    _retrieval: dict[pd.Timestamp, Retrieval] = field(default_factory=dict)
    _pairs: dict[tuple[pd.Timestamp, str], Pairs | None] = field(default_factory=dict)
    _visited: dict[tuple[pd.Timestamp, str], Pairs | None] = field(default_factory=dict)

    def at(self, when: datetime) -> Moment:
        """The moment of this cut-off."""
        cut = pd.Timestamp(when)
        if cut not in self._at:
            found = labels.ranking(self.frame, self.items, at=cut, settings=self.settings, half_life_days=self.half_life_days)
            now = occasion(self.frame, self.items, found)
            relevant, worth = ({ALL_ITEMS: every, NEW_ITEMS: _without(every, now.bought())} for every in (found.relevant, found.worth))
            self._at[cut] = Moment(found, now, now.histories(), relevant, worth)
        return self._at[cut]

    def retrieval(self, when: datetime) -> Retrieval:
        """The sources as fitted on what was known at this cut-off."""
        cut = pd.Timestamp(when)
        if cut not in self._retrieval:
            self._retrieval[cut] = Retrieval(factors=self.factors, random_state=self.settings.training.seed).fit(
                self.at(cut).occasion, self.at(cut).histories
            )
        return self._retrieval[cut]

    def second_stage(self, when: datetime, *, modes: Sequence[str] = MODES) -> TwoStage | None:
        """The second stage as it can be known at this cut-off; None where the log before it holds too few examples."""
        examples = {mode: self._examples(pd.Timestamp(when), mode) for mode in modes}
        enough = {mode: given for mode, given in examples.items() if _n_teaching(given) >= MIN_TEACHERS}
        if ALL_ITEMS not in enough:
            return None
        options = self.settings.training
        return TwoStage(random_state=options.seed).fit(self.at(when).occasion, enough, retrieval=self.retrieval(when))

    def _examples(self, cut: pd.Timestamp, mode: str) -> list[Pairs]:
        horizon, first = timedelta(days=self.settings.labels.ranking_horizon_days), self.frame["event_timestamp"].min()
        step = horizon / STEPS_A_HORIZON
        earlier = [cut - n * step for n in range(1, self.settings.training.ranking_cutoffs + STEPS_A_HORIZON)]
        learned = [at for at in earlier if at - horizon >= first]
        found = [self._example(at, mode) for at in learned if at + horizon <= cut]
        found += [self._visit(at, mode, until=at + step) for at in learned[: self.settings.training.ranking_cutoffs]]
        return [example for example in found if example is not None]

    def _example(self, cut: pd.Timestamp, mode: str) -> Pairs | None:
        """The pairs of those who did something after this cut-off, with what it was worth; None where nobody did."""
        if (cut, mode) not in self._pairs:
            moment = self.at(cut)
            people = _teachers(moment.relevant[mode], moment.worth[mode], seed=self.settings.training.seed)
            self._pairs[cut, mode] = self._asked(cut, mode, moment.histories, people, moment.occasion.at_us, moment.worth[mode])
        return self._pairs[cut, mode]

    def _visit(self, cut: pd.Timestamp, mode: str, *, until: pd.Timestamp) -> Pairs | None:
        """As `_example`, of one visit, drawn, of each of those who came back before `until`, as its begin found them."""
        if (cut, mode) not in self._visited:
            options, silence = self.settings.training, timedelta(minutes=self.settings.ingest.session_gap_minutes)
            ranked, rng = self.at(cut).ranking, np.random.default_rng(options.seed)
            came = visits.between(self.frame, ranked, until=until, silence=silence, rng=rng)
            old = came.histories.bought(len(ranked.items))
            relevant, worth = (_without(every, old) if mode == NEW_ITEMS else every for every in (came.relevant, came.worth))
            people = _teachers(relevant, worth, seed=options.seed)
            self._visited[cut, mode] = self._asked(cut, mode, came.histories, people, came.at_us, worth)
        return self._visited[cut, mode]

    def _asked(
        self, cut: pd.Timestamp, mode: str, histories: Histories, people: np.ndarray, at_us: Any, worth: sparse.csr_matrix
    ) -> Pairs | None:
        """The pairs of these rows, thinned, by the sources of this cut-off."""
        if not people.size:
            return None
        parts = pairs(self.retrieval(cut), histories, people, at_us, new_only=mode == NEW_ITEMS, relevant=worth)
        return _joined([part.thinned(NEGATIVE_SHARE, seed=self.settings.training.seed + n) for n, part in enumerate(parts)])


def occasion(frame: pd.DataFrame, items: pd.DataFrame, found: Ranking) -> Occasion:
    """The acts and the items that were known at the cut-off, by the positions of `found`."""
    past = frame[(frame["event_timestamp"] < found.at) & (frame["created_timestamp"] < found.at)]
    offered = items[items["event_timestamp"] <= found.at].drop_duplicates("item_id").set_index("item_id").reindex(found.items)
    return Occasion(
        n_customers=len(found.customers),
        n_items=len(found.items),
        customer=_positions(found.customers, past["customer_id"]),
        item=_positions(found.items, past["item_id"]),
        at_us=_micros(pd.Series([found.at]))[0],
        done_us=_micros(past["event_timestamp"]),
        weight=past["weight"].to_numpy(dtype=float),
        category=pd.factorize(offered["category"], sort=True)[0].astype(np.int64),
        price=offered["price_cents"].to_numpy(dtype=float, na_value=np.nan),
        offered_us=_micros(offered["event_timestamp"]),
    )


def ndcg_of(stages: Stages, moment: Moment, *, k: int) -> float:
    """NDCG@k of what these stages recommend, any item allowed."""
    people, wanted = moment.judged(ALL_ITEMS)
    return evaluation.ndcg_at_k(stages.recommend(people, k, at_us=moment.occasion.at_us)[0], wanted, k=k)


# -- private -----------------------------------------------------------------------------------------------------------


def _teachers(relevant: sparse.csr_matrix, worth: sparse.csr_matrix, *, seed: int) -> np.ndarray:
    """Which rows are learned from, ascending: `MOST_PEOPLE` of those who did something, first those who bought."""
    bought, did = (np.diff(of.indptr) > 0 for of in (relevant, worth))
    drawn = np.random.default_rng(seed).permutation(np.flatnonzero(did))
    return np.sort(drawn[np.argsort(~bought[drawn], kind="stable")][:MOST_PEOPLE])


def _without(every: sparse.csr_matrix, bought: sparse.csr_matrix) -> sparse.csr_matrix:
    """Those entries that were not bought before."""
    new = sparse.csr_matrix(every - every.multiply(bought))
    new.eliminate_zeros()
    return new


def _joined(parts: list[Pairs]) -> Pairs:
    names = parts[0].names
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ("customer", "item", "values", "label")}
    return Pairs(names=names, **arrays)


def _n_teaching(examples: list[Pairs]) -> int:
    """Customers to whom some of their candidates were worth more than others: only they teach an order."""
    pairs_of = (np.unique(np.stack([example.customer, example.label]), axis=1)[0] for example in examples)
    return sum(int((np.unique(customer, return_counts=True)[1] > 1).sum()) for customer in pairs_of)


def _positions(names: np.ndarray, values: pd.Series) -> np.ndarray:
    return pd.Index(names).get_indexer(pd.Index(values)).astype(np.int64)


def _micros(times: pd.Series) -> np.ndarray:
    """Microseconds since 1970, `UNKNOWN` where there is none."""
    whole = times.dt.tz_convert(None).astype("datetime64[us]").to_numpy()
    return np.where(np.isnat(whole), UNKNOWN, whole.astype(np.int64))
