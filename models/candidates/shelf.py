"""A moment -> what everybody's acts say of each item, frozen: a model answers with it until it is trained again."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from models.candidates.history import PURCHASE, Floats, Histories, Integers
from models.candidates.occasion import Occasion

RECENT_DAYS = (7.0, 28.0, 90.0)
NAMES = (
    "item_price",
    "item_offered",
    *(f"item_{what}_{days:.0f}" for days in RECENT_DAYS for what in ("purchases", "touches")),
    "item_trend_7",
    "item_trend_28",
    "item_buyers",
    "item_again",
    "item_age",
    "item_first_age",
)


@dataclass(frozen=True)
class Shelf:
    """columns: (n_items, len(NAMES)), NaN where unknown. category, price: as in the moment."""

    columns: NDArray[np.float32]
    category: Integers
    price: Floats

    @classmethod
    def of(cls, now: Occasion, histories: Histories) -> Self:
        """Its share of the shop's acts of late, how that moves, and how often it is bought again; shares of the average item's, so that
        the size of the shop does not show.
        """
        n, bought, age = now.n_items, now.weight >= PURCHASE, now.age_days
        found: dict[str, Floats] = {"item_price": now.price, "item_offered": now.offered_days}
        for days in RECENT_DAYS:
            for what, chosen in (("purchases", bought), ("touches", ~bought)):
                kept = chosen & (age <= days)
                found[f"item_{what}_{days:.0f}"] = _share(np.bincount(now.item[kept], weights=now.weight[kept], minlength=n).astype(float))
        for short, long in ((7, 28), (28, 90)):
            found[f"item_trend_{short}"] = over(found[f"item_purchases_{short}"], found[f"item_purchases_{long}"])
        rows = histories.rows
        has, again = rows.purchases > 0, rows.purchases > 1
        n_buyers = np.bincount(rows.item[has], minlength=n)
        found["item_buyers"] = _share(n_buyers.astype(np.float64))
        found["item_again"] = over(np.bincount(rows.item[again], minlength=n), n_buyers)
        found["item_age"] = _least(now.item[bought], age[bought], n)
        found["item_first_age"] = -_least(now.item, -age, n)
        return cls(np.stack([found[name] for name in NAMES], axis=1).astype(np.float32), now.category, now.price)

    @cached_property
    def log_price(self) -> Floats:
        """Of each item, NaN where unknown; money below a ten-millionth of a cent is none."""
        return np.where(np.isfinite(self.price), np.log(np.maximum(self.price, 1e-9)), np.nan)

    @cached_property
    def n_categories(self) -> int:
        """Categories that occur, at least 1."""
        return int(self.category.max(initial=0)) + 1

    @cached_property
    def place_of_category(self) -> Integers:
        """Of each item, among `n_categories`; the one after the last where it is unknown."""
        return np.where(self.category < 0, self.n_categories, self.category)

    def save(self, folder: Path) -> None:
        """Write the arrays as `.npy` into the folder, made if absent."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("columns", "category", "price"):
            np.save(folder / f"{name}.npy", getattr(self, name), allow_pickle=False)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """As it was saved. Raises ValueError if the files disagree."""
        columns, category, price = (np.load(folder / f"{name}.npy", allow_pickle=False) for name in ("columns", "category", "price"))
        if not columns.shape[1:] == (len(NAMES),) or not len(columns) == len(category) == len(price):
            raise ValueError(f"{folder}: expected {len(NAMES)} columns and the same items in all arrays; train the model again")
        return cls(columns, category, price)


def over(values: NDArray[Any], divisor: NDArray[Any]) -> Floats:
    """NaN where the divisor is 0 or unknown."""
    return np.asarray(np.divide(values, divisor, out=np.full(len(values), np.nan), where=divisor > 0))


def _least(place: Integers, values: Floats, n: int) -> Floats:
    """The least value of each place, NaN without any."""
    found = np.full(n, np.inf)
    np.minimum.at(found, place, values)
    found[np.isinf(found)] = np.nan
    return found


def _share(values: Floats) -> Floats:
    """Times the average item's; NaN where there is nothing at all."""
    total = values.mean()
    return values / total if total > 0 else np.full(len(values), np.nan)
