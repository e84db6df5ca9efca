"""A shop -> its items, and who views which. The choice is a softmax over the items available at that instant."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipelines.simulate import draws
from pipelines.simulate.people import People
from pipelines.simulate.shop import DAY_MS, Shop

CATEGORIES = ("shoes", "shirts", "jackets", "bags", "watches", "lamps", "kitchen", "garden", "toys", "books")

_SHARE_NEW = 0.25  # of the items come out while the log runs
_OLDEST_DAYS = 400
_PEOPLE_AT_A_TIME = 4_096


@dataclass(frozen=True)
class Catalogue:
    """Arrays of (n_items,), ordered by `available_ms`: what is on offer at an instant is always the first so many."""

    item_id: np.ndarray
    category: np.ndarray  # index into CATEGORIES
    price_cents: np.ndarray
    relative_price: np.ndarray  # log price less the mean of its category
    available_ms: np.ndarray
    quality: np.ndarray
    embedding: np.ndarray  # (n, dimensions)


def draw(shop: Shop) -> Catalogue:
    """All items that the shop ever offers. The items do not depend on the number of customers."""
    number = np.arange(shop.items)
    category = draws.choice(_keys(shop, "category", number), np.full(len(CATEGORIES), 1 / len(CATEGORIES)))
    kinds = _keys(shop, "category mean", np.arange(len(CATEGORIES)))
    level = np.log(3_500) + 0.7 * draws.normal(kinds)
    centre = shop.category_spread * draws.normal(kinds[:, None], 1 + np.arange(shop.dimensions))
    own = shop.item_spread * draws.normal(_keys(shop, "embedding", number)[:, None], np.arange(shop.dimensions))
    cents = np.maximum(99, np.rint(np.exp(level[category] + 0.45 * draws.normal(_keys(shop, "price", number))))).astype(np.int64)
    available = _available_ms(shop, number)
    order = np.lexsort((number, available))
    return Catalogue(
        item_id=np.char.add("i", np.char.zfill(number.astype(str), 5))[order],
        category=category[order],
        price_cents=cents[order],
        relative_price=(np.log(cents) - level[category])[order],
        available_ms=available[order],
        quality=(shop.quality_exponent * draws.exponential(_keys(shop, "quality", number)))[order],
        embedding=(centre[category] + own)[order],
    )


def choose(shop: Shop, items: Catalogue, people: People, person: np.ndarray, at_ms: np.ndarray, draw_: np.ndarray) -> np.ndarray:
    """The item, as an index, that each view falls on; person: (n,) sorted, draw_: (n,) uniform in (0, 1)."""
    offered = np.searchsorted(items.available_ms, at_ms, side="right")
    regime = at_ms >= shop.onset_ms
    chosen = np.empty(len(person), dtype=np.int64)
    for first, part in _in_parts(person, len(people.number)):
        rows = slice(first, min(first + _PEOPLE_AT_A_TIME, len(people.number)))
        for late in (False, True):
            views = part.start + np.flatnonzero(regime[part] == late)
            if len(views):
                total = np.cumsum(_appeal(shop, items, people.taste[rows], people.price_sensitivity[rows], late), axis=1)
                chosen[views] = _pick(total, person[views] - first, offered[views], draw_[views])
    return chosen


def attributes(shop: Shop, embedding: np.ndarray, relative_price: np.ndarray, *, is_late: bool) -> np.ndarray:
    """(items, dimensions + 1): what multiplies (taste, price sensitivity) in the utility; `is_late`: after a concept drift.

    The drift turns tastes by a quarter circle at strength 1; turning the items the other way is the same.
    """
    angle = np.pi / 2 * shop.strength("concept") * is_late
    even, odd = embedding[:, 0::2], embedding[:, 1::2]
    turned = np.empty_like(embedding)
    turned[:, 0::2] = np.cos(angle) * even + np.sin(angle) * odd
    turned[:, 1::2] = np.cos(angle) * odd - np.sin(angle) * even
    return np.column_stack([turned, -relative_price])


def _appeal(shop: Shop, items: Catalogue, taste: np.ndarray, price: np.ndarray, is_late: bool) -> np.ndarray:
    """(people, items): exp of the utility."""
    table = attributes(shop, items.embedding, items.relative_price, is_late=is_late)
    utility = np.column_stack([taste, price]) @ table.T + items.quality
    return np.asarray(np.exp(utility - utility.max(axis=1, keepdims=True)))


def _pick(total: np.ndarray, row: np.ndarray, offered: np.ndarray, draw_: np.ndarray) -> np.ndarray:
    """Inverse CDF within the first `offered` columns of each row: one binary search through all rows laid end to end."""
    scaled = total / total[:, -1:]
    ladder = (scaled + np.arange(len(total))[:, None]).ravel()
    found = np.searchsorted(ladder, row + draw_ * scaled[row, offered - 1], side="left") - row * total.shape[1]
    return np.asarray(np.clip(found, 0, offered - 1))


def _in_parts(person: np.ndarray, people: int) -> Iterator[tuple[int, slice]]:
    """(first person, the views of that part) for parts of the people."""
    for first in range(0, people, _PEOPLE_AT_A_TIME):
        low, high = np.searchsorted(person, [first, first + _PEOPLE_AT_A_TIME])
        if high > low:
            yield first, slice(int(low), int(high))


def _available_ms(shop: Shop, number: np.ndarray) -> np.ndarray:
    """Item 0 is always there, so that no view finds an empty shop."""
    place = draws.uniform(_keys(shop, "available", number))
    is_new = (draws.uniform(_keys(shop, "is new", number)) < _SHARE_NEW) & (number > 0)
    days = np.where(is_new, place * shop.days, -1 - place * _OLDEST_DAYS)
    return shop.start_ms + np.rint(days * DAY_MS / 60_000).astype(np.int64) * 60_000


def _keys(shop: Shop, stream: str, number: np.ndarray) -> np.ndarray:
    return draws.keys(shop.seed, f"item: {stream}", number)
