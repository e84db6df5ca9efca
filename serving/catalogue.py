"""The items of the shop in memory: what exists, what kind it is, since when, and what is popular.

In: the tables `items` and `interactions`. Out: masks and lists over item positions. `Shelf` is the part that cannot fail:
plain lists, prepared when the catalogue is loaded. Never looks at a customer.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pipelines import tables

SHELF_LENGTH = 2_000  # items kept for the answer of last resort, over all categories

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Shelf:
    """The most popular items, first to last, each with its category: the answer of last resort."""

    items: Sequence[tuple[str, str | None]] = ()

    def take(self, k: int, *, exclude: Iterable[str], categories: Iterable[str] | None) -> list[str]:
        """The first `k` that the request allows."""
        barred, wanted = set(exclude), None if categories is None else set(categories)
        allowed = (item for item, category in self.items if item not in barred and (wanted is None or category in wanted))
        return [item for item, _ in zip(allowed, range(k), strict=False)]


@dataclass(frozen=True)
class Catalogue:
    """Items by position. `popularity`: (n,) weight of recent interest, 0 where there was none; `order`: most popular first."""

    item_ids: NDArray[np.object_]
    index: Mapping[str, int]
    members: Mapping[str, Flags]  # by category: (n,)
    since: NDArray[np.floating]  # seconds since 1970 from which an item can be had
    popularity: NDArray[np.float64]
    order: NDArray[np.int64]
    shelf: Shelf = field(default_factory=Shelf)

    def allowed(self, *, exclude: Sequence[str], categories: Sequence[str] | None, at: datetime) -> Flags:
        """Which items a request may get (n,): to be had at that moment, of the categories, not excluded."""
        flags: Flags = self.since <= at.timestamp()
        if categories is not None:
            wanted = np.zeros_like(flags)
            for category in categories:
                if category in self.members:
                    wanted |= self.members[category]
            flags &= wanted
        flags[[self.index[item] for item in exclude if item in self.index]] = False
        return flags

    def positions(self, item_ids: NDArray[np.str_]) -> NDArray[np.int64]:
        """Where each item is, -1 where it is not in the catalogue."""
        return np.array([self.index.get(str(item), -1) for item in item_ids], dtype=np.int64)


EMPTY = Catalogue(np.empty(0, object), {}, {}, np.empty(0), np.empty(0), np.empty(0, np.int64))


def load(home: Path, *, at: datetime) -> Catalogue:
    """The catalogue as the tables hold it now; empty where nothing was ingested."""
    items = tables.read(home, tables.ITEMS, ["item_id", "category", "event_timestamp"]).drop_duplicates("item_id", keep="last")
    interest = _interest(home)
    ids = items["item_id"].tolist()
    ids += sorted(set(interest.index) - set(ids))  # sold, though no catalogue lists it
    count = len(items)
    category = np.concatenate([items["category"].to_numpy(dtype=object), np.full(len(ids) - count, None, dtype=object)])
    since = np.full(len(ids), -np.inf)
    since[:count] = items["event_timestamp"].astype("int64").to_numpy() / 1e6
    since[np.isin(np.array(ids, dtype=object), interest.index)] = -np.inf  # somebody had it: whatever the listing says, it is there
    popularity = interest.reindex(ids).fillna(0.0).to_numpy(dtype=np.float64)
    order = np.argsort(-popularity, kind="stable")
    return Catalogue(
        np.array(ids, dtype=object),
        {item: i for i, item in enumerate(ids)},
        {name: category == name for name in pd.unique(category) if isinstance(name, str)},
        since,
        popularity,
        order,
        _shelf(ids, category, order[since[order] <= at.timestamp()]),
    )


def stamp(home: Path) -> tuple[str, ...]:
    """Changes whenever `load` would read other rows."""
    return tuple(str(tables.folder(home, table).resolve()) for table in (tables.ITEMS, tables.INTERACTIONS))


def _interest(home: Path) -> "pd.Series":
    """Weight of all interactions by item; purchases and views of the log where there is no such table yet."""
    if tables.count(home, tables.INTERACTIONS):
        rows = tables.read_arrow(home, tables.INTERACTIONS, ["item_id", "weight"])
        totals: pd.DataFrame = rows.group_by("item_id").aggregate([("weight", "sum")]).to_pandas()
        return totals.dropna().set_index("item_id")["weight_sum"].astype(float)
    if tables.count(home, tables.EVENTS):
        rows = tables.read_arrow(home, tables.EVENTS, ["item_id"])
        seen: pd.DataFrame = rows.group_by("item_id").aggregate([([], "count_all")]).to_pandas()
        return seen.dropna().set_index("item_id")["count_all"].astype(float)
    return pd.Series(dtype=float)


def _shelf(ids: Sequence[str], category: NDArray[np.object_], order: NDArray[np.int64]) -> Shelf:
    """The most popular items overall, and the best of each category, so that a filter finds something."""
    best = pd.Series(order).groupby(category[order], dropna=False).cumcount().to_numpy() < 50
    kept = order[best | (np.arange(len(order)) < SHELF_LENGTH // 2)][: SHELF_LENGTH * 5]
    return Shelf([(ids[i], category[i]) for i in kept])
