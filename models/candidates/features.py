"""One customer's history and some items -> the numbers that the second stage ranks by. All of them from acts before the moment.

What cannot be formed is NaN: so is what was done with an item that the customer never touched. Money enters as prices of items alone.
"""

import math

import numpy as np
from numpy.typing import NDArray

from models.candidates.history import DAY_US, Aged, Floats, Integers
from models.candidates.shelf import NAMES as ITEM
from models.candidates.shelf import Shelf

RECENT_DAYS = 28.0
OWN = ("own_purchases", "own_age", "touch_age", "touches")
CUSTOMER = (
    "customer_orders", "customer_items", "customer_basket", "customer_again", "customer_age", "customer_first_age", "customer_gap",
    "order_gap_left", "customer_touch_age", "customer_touches_28", "customer_orders_28", "customer_price",
)  # fmt: skip
CATEGORY = ("category_share", "category_weight_28", "category_age")
NAMES = (*OWN, *CUSTOMER, *ITEM, "price_ratio", *CATEGORY)

_OWN_END = len(OWN)
_CUSTOMER_END = _OWN_END + len(CUSTOMER)
_ITEM_END = _CUSTOMER_END + len(ITEM)
_PRICE = CUSTOMER.index("customer_price")


def values(known: Aged, shelf: Shelf, items: Integers, out: NDArray[np.float32]) -> None:
    """Write the features of each item (c,), ascending, for this customer at this moment into `out` (c, len(NAMES))."""
    history = known.history
    out[:, :_OWN_END] = np.nan
    if len(history.item):
        place = np.minimum(np.searchsorted(history.item, items), len(history.item) - 1)
        mine = (history.item[place] == items).nonzero()[0]
        out[mine, :_OWN_END] = _own(known, place[mine])
    customer = _customer(known, shelf)
    out[:, _OWN_END:_CUSTOMER_END] = customer
    out[:, _CUSTOMER_END:_ITEM_END] = shelf.columns.take(items, axis=0)
    out[:, _ITEM_END] = shelf.price.take(items) / customer[_PRICE]
    out[:, _ITEM_END + 1 :] = _categories(known, shelf, shelf.category.take(items)).T


def _own(known: Aged, rows: Integers) -> Floats:
    """(n, len(OWN)) of these rows of the history: how often and how lately."""
    history, found = known.history, np.empty((len(rows), len(OWN)))
    purchases = found[:, 0] = history.purchases[rows]
    found[:, 1], found[:, 2], found[:, 3] = known.bought_days[rows], known.seen_days[rows], history.touches[rows]
    found[purchases == 0, 1] = np.nan
    return found


def _customer(known: Aged, shelf: Shelf) -> list[float]:
    """(len(CUSTOMER),): how much and how lately they bought, and how often again. A day that something was last bought on is an order."""
    history, seen, found = known.history, known.seen_days, [np.nan] * len(CUSTOMER)
    bought = np.sort(history.bought_us[history.purchases > 0])
    n = len(bought)
    found[0], found[1], found[9], found[10] = 0.0, n, 0.0, 0.0
    if n:
        days = bought // DAY_US
        changes = days[1:] != days[:-1]
        orders, ends = int(np.count_nonzero(changes)) + 1, np.maximum(known.at_us - bought[[-1, 0]], 0) / DAY_US
        newest, oldest = ends.tolist()
        gap = (oldest - newest) / (orders - 1) if orders > 1 else np.nan
        found[0], found[2], found[3] = orders, n / orders, int(np.count_nonzero(history.purchases > 1)) / n
        found[4], found[5], found[6] = newest, oldest, gap
        found[7] = newest / gap if gap else np.nan  # everything on one instant tells no rhythm
        first = int(np.searchsorted(bought, known.at_us - RECENT_DAYS * DAY_US))
        found[10] = int(np.count_nonzero(changes[first:])) + 1 if first < n else 0.0
    if len(seen):
        found[8], found[9] = float(seen.min()), float(history.touches @ np.exp2(-seen / RECENT_DAYS))
        logs = shelf.log_price.take(history.item)
        if np.isnan(total := float(logs.sum())):
            logs = logs[~np.isnan(logs)]
            total = float(logs.sum())
        if len(logs):
            found[_PRICE] = math.exp(total / len(logs))
    return found


def _categories(known: Aged, shelf: Shelf, wanted: Integers) -> Floats:
    """(len(CATEGORY), c) of these categories (c,), -1 for unknown: the share of what the customer did, how much of late, and when last."""
    history, n = known.history, shelf.n_categories
    found = np.full((len(CATEGORY), n + 1), np.nan)  # the last one: unknown
    category, weight, seen = shelf.category.take(history.item), history.touches + history.purchases, known.seen_days
    recent, total = weight * np.exp2(-seen / RECENT_DAYS), weight.sum()
    if category.min(initial=0) < 0:
        has = category >= 0
        category, weight, recent, seen = category[has], weight[has], recent[has], seen[has]
    if len(category):
        age = np.full(n, np.inf)
        np.minimum.at(age, category, seen)
        touched = (age < np.inf).nonzero()[0]
        found[0, touched] = np.bincount(category, weights=weight, minlength=n)[touched] / total
        found[1, touched] = np.bincount(category, weights=recent, minlength=n)[touched]
        found[2, touched] = age[touched]
    return found.take(wanted, axis=1, mode="wrap")
