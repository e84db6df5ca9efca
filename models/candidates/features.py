"""Pairs of customer and item at a moment -> the numbers that the second stage ranks by. All of them from acts before the moment.

Counts are of distinct days or items, money never enters; what cannot be formed is NaN. Shares instead of totals wherever a
total would grow with the shop: the trees meet later moments than they were trained on.
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from models.candidates.occasion import PURCHASE, Floats, Integers, Occasion

Columns = dict[str, NDArray[np.floating]]

RECENT_DAYS = (7.0, 28.0, 90.0)


@dataclass(frozen=True)
class Features:
    """What is counted once for a moment, to be looked up for any pair."""

    now: Occasion
    keys: Integers  # customer * n_items + item of every pair with an act, ascending
    own: Columns  # by pair
    customers: Columns
    items: Columns
    categories: Columns  # by customer * n_categories + category
    category_keys: Integers

    @classmethod
    def of(cls, now: Occasion) -> Self:
        """Count the moment's acts."""
        keys, place = np.unique(now.customer * now.n_items + now.item, return_inverse=True)
        own = _pairs(now, place.ravel(), len(keys))
        categories, category_keys = _categories(now)
        return cls(now, keys, own, _customers(now, keys, own), _items(now, keys, own), categories, category_keys)

    def at(self, customer: Integers, item: Integers) -> Columns:
        """The features of each pair (n,) by name."""
        found = {name: _looked_up(self.keys, column, customer * self.now.n_items + item) for name, column in self.own.items()}
        found |= {name: column[customer] for name, column in self.customers.items()}
        found |= {name: column[item] for name, column in self.items.items()}
        found["price_ratio"] = _over(self.now.price[item], self.customers["customer_price"][customer])
        found["gap_left"] = _over(found["own_age"], found["own_gap"])
        found["order_gap_left"] = _over(found["customer_age"], found["customer_gap"])
        category = self.now.category[item]
        wanted = np.where(category >= 0, customer * self.n_categories + category, -1)
        return found | {name: _looked_up(self.category_keys, column, wanted) for name, column in self.categories.items()}

    @property
    def n_categories(self) -> int:
        """Categories that occur, at least 1."""
        return _n_categories(self.now)


def _pairs(now: Occasion, place: Integers, n: int) -> Columns:
    """By pair: purchases, other acts, and when."""
    bought = now.weight >= PURCHASE
    day = np.floor(now.age_days)
    orders, order = np.unique(place[bought] * 100_000 + day[bought].astype(np.int64), return_inverse=True)
    # an order is as old as its last line
    order_place, order_age = orders // 100_000, _least(order.ravel(), now.age_days[bought], len(orders))
    count = np.bincount(order_place, minlength=n).astype(np.float64)
    last, first = _least(order_place, order_age, n), -_least(order_place, -order_age, n)
    columns = {
        "own_purchases": count,
        "own_age": last,
        "own_first_age": first,
        "own_gap": np.where(count > 1, (first - last) / np.maximum(count - 1, 1), np.nan),
        "touch_age": _least(place, now.age_days, n),
        "touches": np.bincount(place[~bought], weights=now.weight[~bought], minlength=n),
        "touches_7": _within(place, now, ~bought, 7.0, n),
    }
    for days in RECENT_DAYS[1:]:
        columns[f"own_purchases_{days:.0f}"] = np.bincount(order_place[order_age <= days], minlength=n).astype(np.float64)
    return columns


def _customers(now: Occasion, keys: Integers, own: Columns) -> Columns:
    """By customer: how much and how lately they bought, and how often again."""
    bought, n = now.weight >= PURCHASE, now.n_customers
    days = np.unique(now.customer[bought] * 100_000 + np.floor(now.age_days[bought]).astype(np.int64))
    who, age = days // 100_000, (days % 100_000).astype(np.float64)
    orders, last, first = np.bincount(who, minlength=n), _least(who, age, n), -_least(who, -age, n)
    pair_customer = keys // now.n_items
    has = own["own_purchases"] > 0
    distinct = np.bincount(pair_customer[has], minlength=n)
    again = np.bincount(pair_customer[own["own_purchases"] > 1], minlength=n)
    price = np.where(np.isfinite(now.price), np.log(np.maximum(now.price, 1e-9)), np.nan)[now.item]
    priced = np.isfinite(price)
    return {
        "customer_orders": orders.astype(np.float64),
        "customer_items": distinct.astype(np.float64),
        "customer_basket": _over(distinct, orders),
        "customer_again": _over(again, distinct),
        "customer_age": last,
        "customer_first_age": first,
        "customer_gap": np.where(orders > 1, (first - last) / np.maximum(orders - 1, 1), np.nan),
        "customer_touch_age": _least(now.customer, now.age_days, n),
        "customer_touches_28": _within(now.customer, now, ~bought, 28.0, n),
        "customer_orders_28": np.bincount(who[age <= 28], minlength=n).astype(np.float64),
        "customer_price": np.exp(_mean(now.customer[priced], price[priced], n)),
    }


def _items(now: Occasion, keys: Integers, own: Columns) -> Columns:
    """By item: its share of the shop's acts of late, how that moves, and how often it is bought again."""
    n, bought = now.n_items, now.weight >= PURCHASE
    pair_item, buyers = keys % n, own["own_purchases"] > 0
    columns: Columns = {"item_price": now.price, "item_offered": now.offered_days}
    for days in RECENT_DAYS:
        columns[f"item_purchases_{days:.0f}"] = _share(_within(now.item, now, bought, days, n))
        columns[f"item_touches_{days:.0f}"] = _share(_within(now.item, now, ~bought, days, n))
    for short, long in ((7, 28), (28, 90)):
        columns[f"item_trend_{short}"] = _over(columns[f"item_purchases_{short}"], columns[f"item_purchases_{long}"])
    n_buyers = np.bincount(pair_item[buyers], minlength=n)
    columns["item_buyers"] = _share(n_buyers.astype(np.float64))
    columns["item_again"] = _over(np.bincount(pair_item[own["own_purchases"] > 1], minlength=n), n_buyers)
    columns["item_age"] = _least(now.item[bought], now.age_days[bought], n)
    columns["item_first_age"] = -_least(now.item, -now.age_days, n)
    return columns


def _categories(now: Occasion) -> tuple[Columns, Integers]:
    """By customer and category: the share of what the customer did, and when last."""
    category = now.category[now.item]
    known = category >= 0
    keys, place = np.unique(now.customer[known] * _n_categories(now) + category[known], return_inverse=True)
    place = place.ravel()
    weight, age = now.weight[known], now.age_days[known]
    total = np.bincount(now.customer, weights=now.weight, minlength=now.n_customers)[keys // _n_categories(now)]
    recent = age <= 28
    return {
        "category_share": np.bincount(place, weights=weight, minlength=len(keys)) / total,
        "category_weight_28": np.bincount(place[recent], weights=weight[recent], minlength=len(keys)),
        "category_age": _least(place, age, len(keys)),
    }, keys


def _n_categories(now: Occasion) -> int:
    return int(now.category.max(initial=0)) + 1


def _looked_up(keys: Integers, column: NDArray[np.floating], wanted: Integers) -> NDArray[np.floating]:
    """The column's value of each wanted key, NaN where there is none."""
    if not len(keys):
        return np.full(len(wanted), np.nan)
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, column[place], np.nan)


def _least(place: Integers, values: Floats, n: int) -> Floats:
    """The least value of each place, NaN without any."""
    found = np.full(n, np.inf)
    np.minimum.at(found, place, values)
    found[np.isinf(found)] = np.nan
    return found


def _within(place: Integers, now: Occasion, chosen: NDArray[np.bool_], days: float, n: int) -> Floats:
    """Total weight of the chosen acts of the last days, by place."""
    kept = chosen & (now.age_days <= days)
    return np.bincount(place[kept], weights=now.weight[kept], minlength=n).astype(np.float64)


def _mean(place: Integers, values: Floats, n: int) -> Floats:
    return _over(np.bincount(place, weights=values, minlength=n), np.bincount(place, minlength=n))


def _over(values: NDArray[Any], divisor: NDArray[Any]) -> Floats:
    """NaN where the divisor is 0 or unknown."""
    return np.asarray(np.divide(values, divisor, out=np.full(len(values), np.nan), where=divisor > 0))


def _share(values: Floats) -> Floats:
    """Times the average item's, so that the size of the shop does not show; NaN where there is nothing at all."""
    total = values.mean()
    return values / total if total > 0 else np.full(len(values), np.nan)
