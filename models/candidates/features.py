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
    """Write the features of each item (c,), ascending, for this customer at this moment into `out` (len(NAMES), c)."""
    recently = np.exp2(known.seen_days / -RECENT_DAYS)
    customer = _customer(known, shelf, recently)
    _own(known, items, out[:_OWN_END])
    out[_OWN_END:_CUSTOMER_END] = np.array(customer)[:, None]
    out[_CUSTOMER_END:_ITEM_END] = shelf.columns.take(items, axis=0).T
    np.divide(shelf.price.take(items), customer[_PRICE], out=out[_ITEM_END])
    out[_ITEM_END + 1 :] = _categories(known, shelf, recently).take(shelf.place_of_category.take(items), axis=1)


def _own(known: Aged, items: Integers, out: NDArray[np.float32]) -> None:
    """(len(OWN), c): how often and how lately they had to do with each of the items."""
    out[:] = np.nan
    history = known.history
    if not (len(history.item) and len(items)):
        return
    told = np.array((history.purchases, known.bought_days, known.seen_days, history.touches))
    told[1, history.purchases == 0] = np.nan
    place = items.searchsorted(history.item)
    is_asked = items.take(place, mode="clip") == history.item
    out[:, place[is_asked]] = told[:, is_asked]


def _customer(known: Aged, shelf: Shelf, recently: Floats) -> list[float]:
    """(len(CUSTOMER),): how much and how lately they bought, and how often again. A day that something was last bought on is an order.

    recently: (r,) how much of an act of each row is left by now. Few numbers at a time: lists of them are cheaper than arrays.
    """
    history, seen, found = known.history, known.seen_days, [math.nan] * len(CUSTOMER)
    counts = history.purchases.tolist()
    bought = [then for then, count in zip(history.bought_us.tolist(), counts, strict=True) if count > 0]
    n = len(bought)
    found[0], found[1], found[9], found[10] = 0.0, n, 0.0, 0.0
    if n:
        orders = len({then // DAY_US for then in bought})
        newest, oldest = (max(known.at_us - then, 0) / DAY_US for then in (max(bought), min(bought)))
        gap = (oldest - newest) / (orders - 1) if orders > 1 else math.nan
        found[0], found[2], found[3] = orders, n / orders, sum(count > 1 for count in counts) / n
        found[4], found[5], found[6] = newest, oldest, gap
        found[7] = newest / gap if gap else math.nan  # everything on one instant tells no rhythm
        since_us = known.at_us - RECENT_DAYS * DAY_US
        found[10] = len({then // DAY_US for then in bought if then >= since_us})
    if len(seen):
        found[8], found[9] = float(seen.min()), float(history.touches @ recently)
        logs = shelf.log_price.take(history.item)
        if math.isnan(total := float(logs.sum())):
            logs = logs[~np.isnan(logs)]
            total = float(logs.sum())
        if len(logs):
            found[_PRICE] = math.exp(total / len(logs))
    return found


def _categories(known: Aged, shelf: Shelf, recently: Floats) -> Floats:
    """(len(CATEGORY), n_categories + 1), the last for unknown: the share of what the customer did, how much of late, and when last."""
    history, n = known.history, shelf.n_categories + 1
    if not len(history.item):
        return np.full((len(CATEGORY), n), np.nan)
    place, weight, found = shelf.place_of_category.take(history.item), history.touches + history.purchases, np.empty((len(CATEGORY), n))
    share, late, age = found
    np.divide(np.bincount(place, weights=weight, minlength=n), weight.sum(), out=share)
    late[:] = np.bincount(place, weights=weight * recently, minlength=n)
    age[:] = np.inf
    np.minimum.at(age, place, known.seen_days)
    age[-1] = np.inf
    found[:, age == np.inf] = np.nan
    return found
