"""The items of a shop in memory: what exists, what kind it is, since when, what is popular with whom, and what goes with what.

In: items, acts and segments as frames and arrays. Out: masks and lists over item positions. `Shelf` is the part that cannot fail: plain
lists, prepared when the catalogue is formed. Never looks at a single customer.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from models.candidates.history import is_in
from models.shop.baskets import Together, together
from models.shop.interest import Acts, Interest
from models.shop.selection import first_of

SHELF_LENGTH = 2_000  # items kept for the answer of last resort, over all categories
NEW_DAYS = 7  # an item is a new arrival for so long
NEW_SHARE = 0.2  # of the items: where more are new, the shop was just listed, and "new" says nothing

Flags = NDArray[np.bool_]
Places = NDArray[np.int64]


@dataclass(frozen=True)
class Criteria:
    """What a request allows. Prices in cents."""

    exclude: Sequence[str] = ()
    categories: Sequence[str] | None = None
    in_stock: bool = False
    price_cents: tuple[float, float] | None = None

    def allows(self, one: "Shelved") -> bool:
        """Whether an item passes; `exclude` is the caller's to look at."""
        low, high = self.price_cents or (0.0, np.inf)
        is_priced = self.price_cents is None or (one.price_cents is not None and low <= one.price_cents <= high)
        return is_priced and not (self.in_stock and one.is_sold_out) and (self.categories is None or one.category in self.categories)


@dataclass(frozen=True)
class Shelved:
    """An item of the shelf."""

    item_id: str
    category: str | None = None
    price_cents: float | None = None
    is_sold_out: bool = False


@dataclass(frozen=True)
class Shelf:
    """The most popular items, first to last: the answer of last resort."""

    items: Sequence[Shelved] = ()

    def take(self, k: int, criteria: Criteria, *, most: int | None = None) -> list[str]:
        """The first `k` that the request allows, at most `most` of a category."""
        barred, count, found = set(criteria.exclude), dict[str, int](), list[str]()
        for one in self.items:
            if len(found) == k:
                break
            if one.item_id in barred or not criteria.allows(one):
                continue
            if one.category is not None and most is not None:
                if count.get(one.category, 0) >= most:
                    continue
                count[one.category] = count.get(one.category, 0) + 1
            found.append(one.item_id)
        return found


@dataclass(frozen=True)
class Offers:
    """Items by position, in one order: arrays (n,). `category`: code, -1 where unknown; `price_cents`: NaN where unknown."""

    index: Mapping[str, int]
    since: NDArray[np.float64]  # seconds since 1970 from which an item can be had
    category: NDArray[np.int64]
    price_cents: NDArray[np.float64]
    is_sold_out: Flags
    codes: Mapping[str, int]  # of the categories

    def allowed(self, criteria: Criteria, at: datetime, places: Places | None = None) -> Flags:
        """Which items a request may get (n,), or which of those in these places (m,): to be had at that moment, and within its criteria."""
        part: slice | Places = slice(None) if places is None else places
        flags: Flags = self.since[part] <= at.timestamp()
        if criteria.categories is not None:
            wanted = np.zeros(len(self.codes) + 1, dtype=bool)  # the last one: unknown
            wanted[[self.codes[name] for name in criteria.categories if name in self.codes]] = True
            flags &= wanted[self.category[part]]
        if criteria.price_cents is not None:
            low, high = criteria.price_cents
            price = self.price_cents[part]
            flags &= (price >= low) & (price <= high)
        if criteria.in_stock:
            flags &= ~self.is_sold_out[part]
        barred = [self.index[item] for item in criteria.exclude if item in self.index]
        if barred and places is None:
            flags[barred] = False
        elif barred and places is not None:
            flags &= ~is_in(places, np.sort(barred))
        return flags

    def take(self, places: Places, index: Mapping[str, int]) -> "Offers":
        """The same for another list of items; `places`: where each is here, -1 for one that is not, and so cannot be had."""
        gone = places < 0
        return Offers(
            index,
            np.where(gone, np.inf, self.since[places]),
            np.where(gone, -1, self.category[places]),
            np.where(gone, np.nan, self.price_cents[places]),
            gone | self.is_sold_out[places],
            self.codes,
        )


NO_OFFERS = Offers({}, np.empty(0), np.empty(0, np.int64), np.empty(0), np.empty(0, bool), {})


@dataclass(frozen=True)
class Catalogue:
    """All items. `popular`: to everybody, those in which there was no interest last."""

    item_ids: NDArray[np.object_]
    offers: Offers
    popular: Interest
    shelf: Shelf = field(default_factory=Shelf)
    listed: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))  # when items were listed, ascending, seconds since 1970
    listing: Places = field(default_factory=lambda: np.empty(0, np.int64))  # and which these are
    segments: Mapping[str, Interest] = field(default_factory=dict)
    goes_with: Together | None = None

    def positions(self, item_ids: Iterable[str]) -> Places:
        """Where each item is, -1 where it is not in the catalogue."""
        return np.array([self.offers.index.get(str(item), -1) for item in item_ids], dtype=np.int64)

    def leading(self, interest: Interest, criteria: Criteria, k: int, *, at: datetime, most: int | None) -> Places:
        """The k items of most interest that may be had, at most so many of a category; fewer where there are no more."""
        return first_of(interest.order, self.offers.allowed(criteria, at), k, category=self.offers.category, most=most)

    def arrivals(self, at: datetime) -> Places:
        """What was listed within the last days, newest first; none where that is a large part of everything."""
        now = at.timestamp()
        first, last = (self.listed.searchsorted(then, side="right") for then in (now - NEW_DAYS * 86_400, now))
        few = last - first <= NEW_SHARE * len(self.item_ids)
        return self.listing[first:last][::-1] if few else self.listing[:0]


EMPTY = Catalogue(np.empty(0, object), NO_OFFERS, Interest(np.empty(0, np.int64), np.empty(0, np.float32)))


def catalogue(items: pd.DataFrame, acts: Acts, segments: pd.DataFrame, *, at: datetime, goes_with: bool = True) -> Catalogue:
    """All of the shop at a moment; empty where nothing is told.

    items: item_id, category, price_cents, in_stock, event_timestamp; an item's last row counts. segments: as `Acts.by_segment` takes them.
    goes_with: whether to look for what is bought together.
    """
    items = items.drop_duplicates("item_id", keep="last")
    ids = items["item_id"].tolist()
    ids += sorted(set(acts.item_ids) - set(ids))  # sold, though no catalogue lists it
    index = {item: i for i, item in enumerate(ids)}
    seen = acts.seen(index)
    offers = _offers(items, ids, index, seen)
    popularity = acts.totals(index)
    order = np.argsort(-popularity, kind="stable")
    listed = _seconds(items["event_timestamp"])
    listing = np.argsort(listed, kind="stable")
    return Catalogue(
        np.array(ids, dtype=object),
        offers,
        Interest(order, (popularity / popularity.max(initial=1e-12)).astype(np.float32)),
        _shelf(ids, offers, order[offers.since[order] <= at.timestamp()]),
        listed[listing],
        listing,
        acts.by_segment(index, segments),
        together(acts, index) if goes_with else None,
    )


# -- private -----------------------------------------------------------------------------------------------------------


def _offers(items: pd.DataFrame, ids: Sequence[str], index: Mapping[str, int], seen: Flags) -> Offers:
    count, n = len(items), len(ids)
    codes, names = pd.factorize(items["category"], use_na_sentinel=True)
    category, price, since = np.full(n, -1, dtype=np.int64), np.full(n, np.nan), np.full(n, -np.inf)
    category[:count], price[:count] = codes, items["price_cents"].to_numpy(dtype=float, na_value=np.nan)
    since[:count] = _seconds(items["event_timestamp"])
    since[seen] = -np.inf  # somebody had it: whatever the listing says, it is there
    sold_out = np.zeros(n, dtype=bool)
    sold_out[:count] = items["in_stock"].to_numpy(dtype=object, na_value=True) == False  # noqa: E712  (null: nobody said)
    return Offers(index, since, category, price, sold_out, {str(name): code for code, name in enumerate(names)})


def _seconds(times: pd.Series) -> NDArray[np.float64]:
    """Since 1970, whatever unit a frame keeps them in."""
    return times.to_numpy(dtype="datetime64[us]").astype(np.int64) / 1e6


def _shelf(ids: Sequence[str], offers: Offers, order: Places) -> Shelf:
    """The most popular items overall, and the best of each category, so that a filter finds something."""
    best = pd.Series(order).groupby(offers.category[order]).cumcount().to_numpy() < 50
    kept = order[best | (np.arange(len(order)) < SHELF_LENGTH // 2)][: SHELF_LENGTH * 5]
    names = {code: name for name, code in offers.codes.items()}
    return Shelf(
        [
            Shelved(
                ids[i],
                names.get(int(offers.category[i])),
                None if np.isnan(offers.price_cents[i]) else float(offers.price_cents[i]),
                bool(offers.is_sold_out[i]),
            )
            for i in kept
        ]
    )
