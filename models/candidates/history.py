"""Acts -> what each customer did with each item, a row a pair: how much, and when first and last. Positions, no names, no clock.

A row is what an online store can keep of a pair without keeping its acts, so training and serving know the same of a customer, and one
code path forms everything else from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from models.learner import read_array

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

PURCHASE = 1.0  # the weight of a purchase; weaker acts weigh less
DAY_US = 86_400_000_000


@dataclass(frozen=True)
class History:
    """One customer's rows (r,), by item, each once. Instants in microseconds since 1970.

    touches: total weight of the acts that were no purchases. purchases: how many. seen_us: of the last act. bought_us: of the last
    purchase, 0 where there is none.
    """

    item: Integers
    touches: Floats
    purchases: Floats
    seen_us: Integers
    bought_us: Integers

    @classmethod
    def of(cls, parts: Sequence["History"]) -> Self:
        """What several who turned out to be one person did together."""
        item, place = np.unique(np.concatenate([part.item for part in parts]), return_inverse=True)
        columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _COLUMNS}
        bought, seen = np.zeros(len(item), dtype=np.int64), np.full(len(item), _EARLIEST)
        np.maximum.at(bought, place, columns["bought_us"])
        np.maximum.at(seen, place, columns["seen_us"])
        touches, purchases = (np.bincount(place, weights=columns[name], minlength=len(item)) for name in ("touches", "purchases"))
        return cls(item, touches.astype(float), purchases.astype(float), seen, bought)

    def updated(self, newer: "History") -> "History":
        """With the rows of `newer` in the place of those of the same items."""
        stays = ~is_in(self.item, newer.item)
        order = np.argsort(np.concatenate([self.item[stays], newer.item]), kind="stable")
        return History(*(np.concatenate([getattr(self, name)[stays], getattr(newer, name)])[order] for name in _ALL))

    def at(self, at_us: int) -> "Aged":
        """As it is at this moment."""
        return Aged(self, at_us, ages(at_us, np.array((self.seen_us, self.bought_us))))


@dataclass(frozen=True)
class Aged:
    """One customer's rows at a moment. days: (2, r) since the last act, and since the last purchase."""

    history: History
    at_us: int
    days: Floats

    @property
    def seen_days(self) -> Floats:
        """(r,) since the last act."""
        seen: Floats = self.days[0]
        return seen

    @property
    def bought_days(self) -> Floats:
        """(r,) since the last purchase."""
        bought: Floats = self.days[1]
        return bought

    def weights(self, half_lives_days: Sequence[float]) -> Floats:
        """The weight of each row (m, r), which halves with its age, for each of these half-lives (m,): its purchases are taken to be as
        old as the last, its other acts as the last act.
        """
        seen, bought = np.exp2(self.days[:, None] / -np.array(half_lives_days)[:, None])
        return np.asarray(self.history.touches * seen + self.history.purchases * bought)


@dataclass(frozen=True)
class Histories:
    """The rows of all customers, those of customer c at `indptr[c]:indptr[c + 1]`."""

    indptr: Integers
    rows: History

    @classmethod
    def of(cls, customer: Integers, item: Integers, weight: Floats, at_us: Integers, *, n_customers: int) -> Self:
        """Counted from acts (n_acts,). A weight of `PURCHASE` or more is a purchase."""
        n_items = int(item.max(initial=0)) + 1
        keys, place = np.unique(customer * n_items + item, return_inverse=True)
        place, n, bought = place.ravel(), len(keys), weight >= PURCHASE
        touches = np.zeros(n)
        for kind in np.unique(weight[~bought]):  # a count times a weight, lightest first: what is formed of stored counts, to the bit
            touches += kind * np.bincount(place[weight == kind], minlength=n)
        last, seen = np.zeros(n, dtype=np.int64), np.full(n, _EARLIEST)
        np.maximum.at(last, place[bought], at_us[bought])
        np.maximum.at(seen, place, at_us)
        rows = History(keys % n_items, touches, np.bincount(place[bought], minlength=n).astype(np.float64), seen, last)
        return cls(np.searchsorted(keys, np.arange(n_customers + 1) * n_items), rows)

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def customer(self, row: int) -> History:
        """The rows of one customer; views, no copies."""
        part = slice(self.indptr[row], self.indptr[row + 1])
        return History(*(getattr(self.rows, name)[part] for name in _ALL))

    def keep(self, customers: Integers) -> "Histories":
        """Of these customers alone, in the order given."""
        starts, counts = self.indptr[customers], self.indptr[customers + 1] - self.indptr[customers]
        indptr = np.concatenate([[0], np.cumsum(counts)])
        places = np.repeat(starts - indptr[:-1], counts) + np.arange(indptr[-1])
        return Histories(indptr, History(*(getattr(self.rows, name)[places] for name in _ALL)))

    def bought(self, n_items: int) -> sparse.csr_matrix:
        """1 where a customer ever bought an item, csr (n_customers, n_items): what is not new to them."""
        is_bought = self.rows.purchases > 0
        indptr = np.concatenate([[0], np.cumsum(is_bought)])[self.indptr]
        ones = np.ones(indptr[-1])
        return sparse.csr_matrix((ones, self.rows.item[is_bought], indptr), (len(self), n_items))

    def save(self, folder: Path) -> None:
        """Write the columns as `.npy` into the folder, made if absent."""
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "indptr.npy", self.indptr, allow_pickle=False)
        for name in _ALL:
            np.save(folder / f"{name}.npy", getattr(self.rows, name), allow_pickle=False)

    @classmethod
    def load(cls, folder: Path, *, is_mapped: bool = False) -> Self:
        """As they were saved; mapped, processes share one copy in memory. Raises ValueError if the files disagree."""
        indptr, *columns = (read_array(folder / f"{name}.npy", is_mapped=is_mapped) for name in ("indptr", *_ALL))
        if not len(indptr) or any(len(column) != indptr[-1] for column in columns):
            raise ValueError(f"{folder}: the columns of the histories do not belong together; save the model again")
        return cls(indptr, History(*columns))


NOTHING = History(*(np.empty(0, dtype=kind) for kind in (np.int64, float, float, np.int64, np.int64)))

_ALL = tuple(field.name for field in fields(History))
_COLUMNS = _ALL[1:]
_EARLIEST = np.iinfo(np.int64).min


def ages(at_us: int, then_us: Integers) -> Floats:
    """Days, never below 0: of a log of the past "now" is its last event, and people may act after it."""
    return np.maximum(at_us - then_us, 0) / DAY_US


def is_in(values: NDArray[np.integer], ordered: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Which of the values are among these ascending ones; for a few values far cheaper than `np.isin`."""
    if not len(ordered):
        return np.zeros(len(values), dtype=bool)
    return np.asarray(ordered[np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)] == values)
