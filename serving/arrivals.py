"""A list of recommendations -> the same with room for what is new, which nobody can have chosen yet. Never adds what is barred."""

from dataclasses import replace
from datetime import datetime

import numpy as np

from serving.catalogue import Catalogue, Criteria
from serving.selection import capped
from serving.wire import Item, ranked

EACH = 10  # one place in so many is for a new arrival
LOOKED_AT = 500  # of the newest
REASON = "new this week"


def joined(items: list[Item], catalogue: Catalogue, criteria: Criteria, *, at: datetime, most: int | None) -> list[Item]:
    """The list with new arrivals in its last places; of the categories that lead the list where there are such, then the newest."""
    room = len(items) // EACH
    if not room:
        return items
    fresh = catalogue.arrivals(at)[:LOOKED_AT]
    if not len(fresh):
        return items
    kept, offers = items[: len(items) - room], catalogue.offers
    listed = offers.category[catalogue.positions(item.item_id for item in kept)]
    liked = np.bincount(listed[listed >= 0], minlength=len(offers.codes) + 1)  # the last one: of no known category
    others = replace(criteria, exclude=[*criteria.exclude, *(item.item_id for item in kept)])
    fresh = fresh[offers.allowed(others, at, fresh)]
    fresh = fresh[np.argsort(-liked[offers.category[fresh]], kind="stable")]
    stays = capped(np.concatenate([listed, offers.category[fresh]]), most)[len(listed) :]
    names = [str(catalogue.item_ids[place]) for place in fresh[stays][:room]]
    told = [*kept, *[item for item in items[len(kept) :] if item.item_id not in names][: room - len(names)]]
    return ranked(
        [item.item_id for item in told] + names,
        [item.score for item in told] + [told[-1].score] * len(names),
        [item.reason for item in told] + [REASON] * len(names),
    )
