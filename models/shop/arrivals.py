"""A list of items -> the same with room for what is new, which nobody can have chosen yet. Never adds what is barred."""

from datetime import datetime

import numpy as np
from numpy.typing import NDArray

from models.shop.catalogue import Catalogue, Criteria
from models.shop.selection import capped

EACH = 10  # one place in so many is for a new arrival
LOOKED_AT = 500  # of the newest

Places = NDArray[np.int64]


def joined(listed: Places, catalogue: Catalogue, criteria: Criteria, *, at: datetime, most: int | None) -> tuple[Places, Places]:
    """Which places of a list (k,) of items, -1 for one that the catalogue does not know, stay, and the new arrivals that follow them.

    New arrivals come last; of the categories that lead the list where there are such, then the newest.
    """
    room, k = len(listed) // EACH, len(listed)
    fresh = catalogue.arrivals(at)[:LOOKED_AT] if room else catalogue.listing[:0]
    if not len(fresh):
        return np.arange(k), fresh
    leads, offers = listed[: k - room], catalogue.offers
    kind = np.where(leads < 0, -1, offers.category[leads])
    liked = np.bincount(kind[kind >= 0], minlength=len(offers.codes) + 1)  # the last one: of no known category
    fresh = fresh[offers.allowed(criteria, at, fresh) & ~np.isin(fresh, leads)]
    fresh = fresh[np.argsort(-liked[offers.category[fresh]], kind="stable")]
    fresh = fresh[capped(np.concatenate([kind, offers.category[fresh]]), most)[len(kind) :]][:room]
    others = k - room + np.flatnonzero(~np.isin(listed[k - room :], fresh))[: room - len(fresh)]
    return np.concatenate([np.arange(k - room), others]), fresh
