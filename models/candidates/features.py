"""One customer's history and some items -> the numbers that the second stage ranks by. All of them from acts before the moment.

What cannot be formed is NaN: so is what was done with an item that the customer never touched. Money enters as prices of items alone.
"""

import numpy as np
from numpy.typing import NDArray

from models.candidates.history import DAY_US, Floats, History, Integers, ages
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


def values(history: History, shelf: Shelf, items: Integers, at_us: int, out: NDArray[np.float32]) -> None:
    """Write the features of each item (c,) for this customer at this moment into `out` (c, len(NAMES))."""
    is_bought = history.purchases > 0
    last, seen = ages(at_us, history.bought_us), ages(at_us, history.seen_us)
    customer = _customer(history, shelf, is_bought, last, seen)
    out[:, :_OWN_END] = np.nan
    if len(history.item):
        place = np.minimum(np.searchsorted(history.item, items), len(history.item) - 1)
        known = np.flatnonzero(history.item[place] == items)
        out[known, :_OWN_END] = _own(history, is_bought, last, seen)[place[known]]
    out[:, _OWN_END:_CUSTOMER_END] = customer
    out[:, _CUSTOMER_END:_ITEM_END] = shelf.columns[items]
    out[:, _ITEM_END] = shelf.price[items] / customer[_PRICE]
    out[:, _ITEM_END + 1 :] = _categories(history, shelf, seen)[shelf.category[items]]


def _own(history: History, is_bought: NDArray[np.bool_], last: Floats, seen: Floats) -> Floats:
    """(r, len(OWN)): how often and how lately, by row of the history."""
    return np.stack([history.purchases, np.where(is_bought, last, np.nan), seen, history.touches], axis=1)


def _customer(history: History, shelf: Shelf, is_bought: NDArray[np.bool_], last: Floats, seen: Floats) -> Floats:
    """(len(CUSTOMER),): how much and how lately they bought, and how often again. A day that something was last bought on is an order."""
    found = np.full(len(CUSTOMER), np.nan)
    n = np.count_nonzero(is_bought)
    found[0], found[1], found[9], found[10] = 0.0, n, 0.0, 0.0
    if n:
        day, age = history.bought_us[is_bought] // DAY_US, last[is_bought]
        orders, newest, oldest = len(np.unique(day)), age.min(), age.max()
        gap = (oldest - newest) / (orders - 1) if orders > 1 else np.nan
        found[0], found[2], found[3] = orders, n / orders, np.count_nonzero(history.purchases > 1) / n
        found[4], found[5], found[6] = newest, oldest, gap
        found[7] = newest / gap if gap else np.nan  # everything on one instant tells no rhythm
        found[10] = len(np.unique(day[age <= RECENT_DAYS]))
    if len(seen):
        found[8], found[9] = seen.min(), history.touches @ np.exp2(-seen / RECENT_DAYS)
        price = shelf.price[history.item]
        price = price[np.isfinite(price)]
        if len(price):
            found[_PRICE] = np.exp(np.log(np.maximum(price, 1e-9)).mean())
    return found


def _categories(history: History, shelf: Shelf, seen: Floats) -> Floats:
    """(n_categories + 1, len(CATEGORY)): the share of what the customer did, how much of late, and when last; the last row: unknown."""
    n = shelf.n_categories
    found = np.full((n + 1, len(CATEGORY)), np.nan)
    category = shelf.category[history.item]
    known = np.flatnonzero(category >= 0)
    if not len(known):
        return found
    category, weight = category[known], history.touches + history.purchases
    touched = np.bincount(category, minlength=n) > 0
    share = np.bincount(category, weights=weight[known], minlength=n) / weight.sum()
    recent = np.bincount(category, weights=(weight * np.exp2(-seen / RECENT_DAYS))[known], minlength=n)
    age = np.full(n, np.inf)
    np.minimum.at(age, category, seen[known])
    found[:n][touched] = np.stack([share, recent, age], axis=1)[touched]
    return found
