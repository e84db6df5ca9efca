from datetime import timedelta

import numpy as np
import pandas as pd

from models.shop.catalogue import Criteria, Shelf, Shelved
from pipelines import tables
from serving import arrivals, catalogue
from serving.likeness import is_known, like
from serving.wire import ranked


def loaded(home, cast):
    return catalogue.load(home, at=cast.now)


def allowed(found, cast, **criteria):
    flags = found.offers.allowed(Criteria(**criteria), cast.now)
    some = np.random.default_rng(1).integers(0, len(flags), 40)
    assert np.array_equal(found.offers.allowed(Criteria(**criteria), cast.now, some), flags[some])  # asked of a few it is the same
    return {str(name) for name, flag in zip(found.item_ids, flags, strict=True) if flag}


def test_every_criterion_leaves_out_what_does_not_meet_it(shop, cast):
    found = loaded(shop, cast)
    every = allowed(found, cast)
    assert every == set(cast.items[:29])
    assert allowed(found, cast, exclude=["item-03", "unknown"]) == every - {"item-03"}
    assert allowed(found, cast, categories=["hats", "unknown"]) == set(cast.items[1:29:3])
    assert allowed(found, cast, price_cents=(3.0, 7.0)) == set(cast.items[3:8])
    assert allowed(found, cast, in_stock=True) == every - {"item-08"}  # of most nobody told


def test_what_nobody_told_meets_no_criterion_that_asks_for_it(home, cast):
    rows = tables.read(home, tables.ITEMS)
    rows.loc[rows["item_id"] == "item-03", ["price_cents", "category"]] = None
    tables.write(home, tables.ITEMS, rows)
    found = loaded(home, cast)
    assert "item-03" in allowed(found, cast)
    assert "item-03" not in allowed(found, cast, price_cents=(0.0, 1e9)) | allowed(found, cast, categories=["shoes"])


def test_offers_in_another_order_allow_the_same(shop, cast):
    found = loaded(shop, cast)
    names = ["gone", *cast.items[::-1]]
    index = {name: i for i, name in enumerate(names)}
    turned = found.offers.take(found.positions(names), index)
    for criteria in (Criteria(), Criteria(categories=["hats"]), Criteria(exclude=["item-02", "gone"]), Criteria(price_cents=(2.0, 9.0))):
        flags = turned.allowed(criteria, cast.now)
        assert {name for name, flag in zip(names, flags, strict=True) if flag} == {
            str(name) for name, flag in zip(found.item_ids, found.offers.allowed(criteria, cast.now), strict=True) if flag
        }


def test_segments_are_told_of_where_enough_people_are_in_them(home, cast):
    assert set(loaded(home, cast).segments) == {"keen"}
    rows = tables.read(home, tables.CUSTOMER_SEGMENTS)
    later = rows.iloc[:1].assign(event_timestamp=cast.now, segment="other")
    unnamed = rows.assign(customer_id=cast.customers[:10], segment=None)
    tables.write(home, tables.CUSTOMER_SEGMENTS, pd.concat([rows, later, unnamed], ignore_index=True))
    assert set(loaded(home, cast).segments) == {"frequent customers"}  # nine are left in the other


def test_shelf_keeps_to_the_criteria_and_the_cap():
    shelf = Shelf([Shelved("a", "x", 100.0), Shelved("b", "x", 300.0, is_sold_out=True), Shelved("c"), Shelved("d", "x", 200.0)])
    assert shelf.take(9, Criteria()) == ["a", "b", "c", "d"]
    assert shelf.take(9, Criteria(exclude=["a"], in_stock=True)) == ["c", "d"]
    assert shelf.take(9, Criteria(price_cents=(150.0, 400.0))) == ["b", "d"]
    assert shelf.take(2, Criteria(), most=1) == ["a", "c"]
    assert shelf.take(9, Criteria(categories=["x"])) == ["a", "b", "d"]


# -- new arrivals -------------------------------------------------------------------------------------------------------------------


def with_new(home, cast, *, days=2, n=3):
    rows = tables.read(home, tables.ITEMS)
    new = pd.DataFrame({"item_id": [f"new-{i}" for i in range(n)], "category": ["hats", "books", None][:n]})
    new = new.assign(price_cents=5, in_stock=None, event_timestamp=cast.now - timedelta(days=days), created_timestamp=cast.now)
    tables.write(home, tables.ITEMS, pd.concat([rows, new], ignore_index=True))
    return loaded(home, cast)


def listed(names):
    return ranked(names, np.linspace(1, 0.1, len(names)).tolist(), ["r"] * len(names))


def test_a_new_arrival_of_what_leads_the_list_takes_its_last_place(home, cast):
    found = with_new(home, cast)
    items = listed([*cast.items[1:27:3], "item-00"])  # nine hats and a shoe
    joined = arrivals.joined(items, found, Criteria(), at=cast.now, most=None)
    assert [item.item_id for item in joined] == [*(item.item_id for item in items[:-1]), "new-0"]
    assert joined[-1].reason == arrivals.REASON
    assert [item.rank for item in joined] == list(range(1, len(items) + 1))
    assert joined[-1].score <= joined[-2].score
    barred = arrivals.joined(items, found, Criteria(exclude=["new-0", "new-1"]), at=cast.now, most=None)
    assert barred[-1].item_id == "new-2"
    assert arrivals.joined(items, found, Criteria(price_cents=(6.0, 9.0)), at=cast.now, most=None)[-1].reason == "r"
    assert arrivals.joined(items[:9], found, Criteria(), at=cast.now, most=None) == items[:9]  # too short for one


def test_items_are_new_for_a_week_and_only_where_few_are(home, cast):
    assert len(with_new(home, cast, days=8).arrivals(cast.now)) == 0
    fresh = tables.read(home, tables.ITEMS).assign(event_timestamp=cast.now - timedelta(days=1))
    tables.write(home, tables.ITEMS, fresh)
    assert len(loaded(home, cast).arrivals(cast.now)) == 0


# -- what goes with an item ---------------------------------------------------------------------------------------------------------


def test_what_is_bought_together_is_told_apart_from_what_is_alike(answers, cast):
    found, model = answers.catalogue, answers.champions.bundle.recommender
    source = (model, answers.recommendations._offers(model, found))
    items = like("item-01", source, found, Criteria(exclude=["item-01"]), at=cast.now, k=29, most=None)
    factors = model.learner.item_factors_
    lengths = np.linalg.norm(factors, axis=1, keepdims=True)
    directions = np.divide(factors, lengths, where=lengths > 0, out=np.zeros_like(factors))
    cosine = directions @ directions[model.items["item-01"]]
    nearness = dict(zip(found.item_ids[found.goes_with.of(1)[0]], found.goes_with.of(1)[1], strict=True))
    for item in items:
        alike, near = cosine[model.items[item.item_id]], nearness.get(item.item_id, -np.inf)
        assert np.isclose(item.score, max(alike, near), atol=1e-6)
        assert item.reason == ("bought together with item-01" if near > alike else "similar to item-01")
    alone = like("item-01", None, found, Criteria(exclude=["item-01", "item-02"]), at=cast.now, k=3, most=None)
    assert {item.reason for item in alone} == {"bought together with item-01"}
    assert not {"item-01", "item-02"} & {item.item_id for item in alone}
    assert is_known("item-01", None, found)
    assert not is_known("nothing", model, found)
