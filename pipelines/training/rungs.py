"""A tested recommender and what was known at the test cut-off -> the lists of every rung of the ladder, and how good each is.

The lists are those that the service would have answered a plain request with, new arrivals among them, for the people whom the personal
list is judged on. `folded_in` is answered by the model of a whole horizon before, from what people did since too; newcomers, whom that
model never met, are told apart as well. `stale` is a customer's list as it was an hour before the last thing they did: the oldest answer
that is given again, to somebody who is there. Next to nobody does anything in the very hour before a cut-off: a list of then is as new.
Never reads what was not known at the cut-off, but to judge by; never finds a segment in data of somebody who does not allow that now.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from models import evaluation
from models.candidates.history import DAY_US, Histories
from models.ladder import ANSWERED_S, FOLDED_IN, KEPT, PERSONAL, POPULAR, SEGMENT, STALE, STATIC
from models.shop import arrivals
from models.shop.catalogue import Catalogue, Criteria, catalogue
from models.shop.interest import FEWEST, Acts, Interest, groups_of
from models.stages import Stages
from models.two_stage import ALL_ITEMS
from pipelines.errors import InputError, StoreError
from pipelines.labels import Ranking
from pipelines.settings import Settings
from pipelines.training import segments
from pipelines.training.listing import Lists, UnderTest
from pipelines.training.publishing import finite
from pipelines.training.ranking import Moment

NEWCOMERS = "folded_in_newcomers"
ABOVE = {FOLDED_IN: PERSONAL, NEWCOMERS: PERSONAL, STALE: PERSONAL, SEGMENT: STALE, POPULAR: SEGMENT, STATIC: POPULAR}
PURCHASE = "purchase"

_ANSWERED_US = int(ANSWERED_S * 1e6)
_EVERYTHING = Criteria()


@dataclass(frozen=True)
class Earlier:
    """Both stages as they were fitted at an earlier cut-off."""

    ranking: Ranking
    stages: Stages


@dataclass(frozen=True)
class Known:
    """What was known at a cut-off: everybody's acts (rows of tables.INTERACTIONS), and the catalogue with what was popular then.

    groups: by customer the segment they were in; `why` says why there are none.
    """

    acts: pd.DataFrame
    catalogue: Catalogue
    groups: "pd.Series[str]"
    why: str

    @classmethod
    def of(cls, frame: pd.DataFrame, items: pd.DataFrame, found: pd.DataFrame, *, at: pd.Timestamp, why: str = "") -> "Known":
        """frame: tables.INTERACTIONS; items: tables.ITEMS; found: the segments at `at`, none where `why` says why."""
        past = frame[(frame["event_timestamp"] < at) & (frame["created_timestamp"] < at)]
        shop = catalogue(items[items["event_timestamp"] <= at], _acts(past), found, at=at, goes_with=False)
        none = "" if shop.segments else f"no segment or state of life cycle held {FEWEST} customers who had done something with an item"
        return cls(past, shop, groups_of(found), why or none)


def known_at(home: Path, frame: pd.DataFrame, items: pd.DataFrame, *, at: datetime, as_of: datetime, settings: Settings) -> Known:
    """As `Known.of`, with the segments as they would have been found at `at`; frame as it was built at `as_of`."""
    found, why = pd.DataFrame(columns=["customer_id", "event_timestamp", "segment", "lifecycle"]), ""
    try:
        found = segments.found_at(home, settings=settings, at=at, as_of=as_of)
    except (StoreError, InputError) as reason:
        why = str(reason)
    return Known.of(frame, items, found, at=pd.Timestamp(at), why=why)


def lists(tested: UnderTest, personal: np.ndarray, known: Known, earlier: Earlier, *, k: int, half_life_days: float) -> Lists:
    """By rung the items (m, k) that those who are judged would have been answered with, by the positions of the cut-off, best first.

    -1 in an empty place, and in all of them where the rung has no answer for somebody. personal: (m, k), the model's own lists.
    """
    moment = tested.moment
    people, names = moment.judged(ALL_ITEMS)[0], moment.ranking.items
    customers = moment.ranking.customers[people]
    place, back = pd.Index(names).get_indexer(pd.Index(known.catalogue.item_ids)), known.catalogue.positions(names)

    def shown(found: np.ndarray) -> np.ndarray:
        """With the new arrivals of the catalogue."""
        return _each(found, lambda row: _joined(back[row[row >= 0]], known.catalogue, place, moment), k)

    def listed(interest: Interest) -> np.ndarray:
        best = known.catalogue.leading(interest, _EVERYTHING, k, at=moment.ranking.at, most=None)
        return _joined(best, known.catalogue, place, moment)

    log = _Log.of(known.acts, customers)
    folded = log.folded(earlier, moment, k=k, half_life_days=half_life_days)
    is_newcomer = ~np.isin(customers, earlier.ranking.customers)
    group, interests = known.groups.reindex(customers).to_numpy(dtype=object), known.catalogue.segments
    by_group = {name: listed(interest) for name, interest in interests.items()}
    shelf = known.catalogue.positions(known.catalogue.shelf.take(k, _EVERYTHING))
    return {
        PERSONAL: shown(personal),
        FOLDED_IN: (new := shown(folded)),
        NEWCOMERS: np.where(is_newcomer[:, None], new, -1),
        STALE: log.stale(tested, since_us=1e6 * known.catalogue.offers.since[back], k=k, half_life_days=half_life_days),
        SEGMENT: _filled([by_group.get(name) for name in group], k),
        POPULAR: _filled([listed(known.catalogue.popular)] * len(people), k),
        STATIC: _filled([place[shelf]] * len(people), k),
    }


def qualities(
    found: Lists, wanted: sparse.csr_matrix, people: np.ndarray, *, why: Mapping[str, str], settings: Settings
) -> list[dict[str, Any]]:
    """A row for each rung as JSON values: how many customers it answers, their NDCG@k and recall@k, and how far the rung above is ahead.

    The lead is over the customers whom both answer, `compared` of them, with its interval. wanted: csr (m, n_items). why: by rung, what is
    said where it answers nobody.
    """
    options = settings.training
    ndcg = {name: _where(evaluation.ndcg_by_customer(rows, wanted, k=options.k), rows) for name, rows in found.items()}
    told, above = [], dict(ABOVE)
    for name, rows in found.items():
        is_answered = np.isfinite(ndcg[name])
        row: dict[str, Any] = {"rung": name, "customers": int(is_answered.sum())}
        if row["customers"]:
            recall = evaluation.recall_by_customer(rows, wanted, k=options.k)
            row |= {"ndcg": finite(ndcg[name][is_answered].mean()), "recall": finite(recall[is_answered].mean())}
        else:
            row["why"] = why.get(name) or "it had an answer for nobody who is judged"
            # the next one down stands under whatever stands above this
            above = {low: above.get(name, high) if high == name else high for low, high in above.items()}
        if name in above and row["customers"]:
            row |= _lead(ndcg[above[name]], ndcg[name], people, above[name], settings=settings)
        told.append(row)
    return told


def metrics(told: list[dict[str, Any]], *, k: int) -> dict[str, float]:
    """The rows of `qualities` as numbers by name."""
    return {f"rung_{row['rung']}_{name}@{k}": row[name] for row in told for name in ("ndcg", "recall") if row.get(name) is not None}


# -- private -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Log:
    """The acts (n,) of some people: whose by position, names of items, instants at which they were done and known, all in microseconds."""

    n_customers: int
    customer: np.ndarray
    item: pd.Index
    done_us: np.ndarray
    knew_us: np.ndarray
    weight: np.ndarray

    @classmethod
    def of(cls, acts: pd.DataFrame, customers: np.ndarray) -> "_Log":
        customer = pd.Index(customers).get_indexer(pd.Index(acts["customer_id"])).astype(np.int64)
        mine = acts[customer >= 0]
        done, created = (mine[name].to_numpy(dtype="datetime64[us]").astype(np.int64) for name in ("event_timestamp", "created_timestamp"))
        weight = mine["weight"].to_numpy(dtype=float)
        return cls(len(customers), customer[customer >= 0], pd.Index(mine["item_id"]), done, np.maximum(done, created), weight)

    def folded(self, earlier: Earlier, moment: Moment, *, k: int, half_life_days: float) -> np.ndarray:
        """The lists (m, k) of the earlier stages at the cut-off, of those who did something since with an item they know."""
        until = np.full(self.n_customers, moment.occasion.at_us)
        stages, item = self._known_to(earlier.stages, earlier.ranking.items, until, half_life_days=half_life_days)
        is_new = (item >= 0) & (self.knew_us >= earlier.ranking.at.value // 1_000)
        place = pd.Index(moment.ranking.items).get_indexer(pd.Index(earlier.ranking.items))
        found = np.full((self.n_customers, k), -1, dtype=np.int64)
        came = np.unique(self.customer[is_new])
        found[came] = stages.recommend(came, k, at_us=moment.occasion.at_us)[0]
        return np.where(found >= 0, place[found], -1)

    def stale(self, tested: UnderTest, *, since_us: np.ndarray, k: int, half_life_days: float) -> np.ndarray:
        """The lists (m, k) of an hour before each one's last act; none of those of whom nothing was known then.

        since_us: (n_items,) from when an item could be had: the stages are of the cut-off, and know some that came after that hour.
        """
        last = np.full(self.n_customers, np.iinfo(np.int64).min)
        np.maximum.at(last, self.customer, self.knew_us)
        until = last - _ANSWERED_US
        stages, _ = self._known_to(tested.stages, tested.moment.ranking.items, until, half_life_days=half_life_days)
        found = np.full((self.n_customers, k), -1, dtype=np.int64)
        assert stages.histories is not None
        for row in np.flatnonzero(np.diff(stages.histories.indptr)).tolist():  # each at an instant of their own
            kept = stages.recommend([row], max(k, KEPT), at_us=int(until[row]))[0][0]
            kept = kept[(kept >= 0) & (since_us[kept] <= until[row])][:k]
            found[row, : len(kept)] = kept
        return found

    def _known_to(self, stages: Stages, names: np.ndarray, until_us: np.ndarray, *, half_life_days: float) -> tuple[Stages, np.ndarray]:
        """The stages as they answer these people, by what was known of each before an instant (m,); and the items of the acts (n,), -1
        where the stages do not know one.
        """
        item = pd.Index(names).get_indexer(self.item).astype(np.int64)
        kept = (item >= 0) & (self.knew_us < until_us[self.customer])
        whose, what, done, weight = self.customer[kept], item[kept], self.done_us[kept], self.weight[kept]
        faded = weight * np.exp2(-(until_us[whose] - done) / DAY_US / half_life_days)
        matrix = sparse.csr_matrix((faded, (whose, what)), (self.n_customers, len(names)))
        histories = Histories.of(whose, what, weight, done, n_customers=self.n_customers)
        return Stages(stages.first.folded(matrix), stages.second, histories), item


def _acts(past: pd.DataFrame) -> Acts:
    customer, customers = pd.factorize(past["customer_id"])
    item, items = pd.factorize(past["item_id"])
    at_us = past["event_timestamp"].to_numpy(dtype="datetime64[us]").astype(np.int64)
    is_purchase = (past["type"] == PURCHASE).to_numpy()
    weight = past["weight"].to_numpy(dtype=float)
    return Acts(list(customers), list(items), customer.astype(np.int64), item.astype(np.int64), weight, at_us, is_purchase)


def _joined(listed: np.ndarray, shop: Catalogue, place: np.ndarray, moment: Moment) -> np.ndarray:
    """A list of places in the catalogue with its new arrivals, by the positions of the cut-off."""
    stays, fresh = arrivals.joined(listed, shop, _EVERYTHING, at=moment.ranking.at, most=None)
    return np.asarray(place[np.concatenate([listed[stays], fresh])])


def _each(rows: np.ndarray, change: Callable[[np.ndarray], np.ndarray], k: int) -> np.ndarray:
    return _filled([change(row) if row[0] >= 0 else None for row in rows], k)


def _filled(rows: list[np.ndarray | None], k: int) -> np.ndarray:
    """Lists of any length (m, k), -1 in the places that are left."""
    found = np.full((len(rows), k), -1, dtype=np.int64)
    for place, row in enumerate(rows):
        if row is not None:
            found[place, : len(row)] = row
    return found


def _where(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """NaN where the rung had no answer."""
    return np.where(rows[:, 0] >= 0, values, np.nan)


def _lead(above: np.ndarray, below: np.ndarray, people: np.ndarray, name: str, *, settings: Settings) -> Mapping[str, Any]:
    both = np.flatnonzero(np.isfinite(above) & np.isfinite(below))
    if not both.size:
        return {}
    options = settings.training
    gain = evaluation.paired_bootstrap(
        evaluation.mean_difference(above[both], below[both]), people[both], draws=options.bootstrap_draws, seed=options.seed
    )
    return {"above": name, "compared": int(both.size), "lead": finite(gain.value), "low": finite(gain.low), "high": finite(gain.high)}
