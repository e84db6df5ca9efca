"""A list of recommendations -> the same with room for what is new."""

from datetime import datetime

from models.shop import arrivals
from models.shop.catalogue import Catalogue, Criteria
from serving.wire import Item, ranked

REASON = "new this week"


def joined(items: list[Item], catalogue: Catalogue, criteria: Criteria, *, at: datetime, most: int | None) -> list[Item]:
    """The list with new arrivals in its last places; of the categories that lead the list where there are such, then the newest."""
    if len(items) < arrivals.EACH or not len(catalogue.arrivals(at)):
        return items
    stays, fresh = arrivals.joined(catalogue.positions(item.item_id for item in items), catalogue, criteria, at=at, most=most)
    told, n = [items[place] for place in stays.tolist()], len(fresh)
    return ranked(
        [item.item_id for item in told] + catalogue.item_ids[fresh].tolist(),
        [item.score for item in told] + [told[-1].score] * n,
        [item.reason for item in told] + [REASON] * n,
    )
