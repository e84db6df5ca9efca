"""An item -> items like it, and items that are bought together with it: the same answer for everybody. In: a model, the catalogue."""

from datetime import datetime

import numpy as np

from models.shop.catalogue import Catalogue, Criteria, Offers
from models.shop.selection import best_of, capped
from serving.champions import Recommending
from serving.wire import Item, ranked


def is_known(item: str, model: Recommending | None, catalogue: Catalogue) -> bool:
    """Whether there is anything to go by."""
    place = None if model is None else model.items.get(item)
    listed = catalogue.offers.index.get(item)
    has_direction = model is not None and place is not None and bool(model.lengths[place] > 0)
    return has_direction or (listed is not None and catalogue.goes_with is not None and bool(catalogue.goes_with.of(listed)[0].size))


def like(
    item: str, source: tuple[Recommending, Offers] | None, catalogue: Catalogue, criteria: Criteria,
    *, at: datetime, k: int, most: int | None,
) -> list[Item]:  # fmt: skip
    """The best k by the larger of two scores, both at most 1: how alike what people do with both is, and how often they go together.

    source: a model, and the catalogue in its order of items.
    """
    found: dict[str, tuple[float, str]] = {}
    if source is not None and (place := source[0].items.get(item)) is not None and source[0].lengths[place] > 0:
        model, offers = source
        scores = model.likeness(place)
        best = best_of(scores, offers.allowed(criteria, at), k, category=offers.category, most=most)
        found = {model.item_ids[p]: (s, f"similar to {item}") for p, s in zip(best.tolist(), scores[best].tolist(), strict=True)}
    listed = catalogue.offers.index.get(item)
    if catalogue.goes_with is not None and listed is not None:
        places, nearness = catalogue.goes_with.of(listed)
        allowed = catalogue.offers.allowed(criteria, at, places)
        for name, near in zip(catalogue.item_ids[places[allowed]].tolist(), nearness[allowed].tolist(), strict=True):
            if near > found.get(name, (-np.inf, ""))[0]:
                found[name] = (near, f"bought together with {item}")
    ordered = sorted(found, key=lambda name: -found[name][0])
    if most is not None:
        stays = capped(_categories(ordered, catalogue), most)
        ordered = [name for name, is_kept in zip(ordered, stays, strict=True) if is_kept]
    names = ordered[:k]
    return ranked(names, [found[name][0] for name in names], [found[name][1] for name in names])


def _categories(names: list[str], catalogue: Catalogue) -> np.ndarray:
    places = catalogue.positions(names)
    return np.array([-1 if place < 0 else catalogue.offers.category[place] for place in places], dtype=np.int64)
