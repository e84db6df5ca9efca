"""What the stream says of customers and categories is what the feature tables say, whoever says of which category an item is."""

from datetime import UTC, datetime

import pyarrow as pa
import pytest

from pipelines import feature_store, features, provenance, tables
from pipelines.stream import state
from pipelines.stream.activity import Activity
from pipelines.stream.timetable import Due, Timetable

ALLOW, DENY = {"personalization": True}, {"personalization": False}
DAY = 86_400.0
LONG_AGO = datetime(2026, 2, 1, tzinfo=UTC)


def list_items(world, **categories):
    """The catalogue is this."""
    rows = [{"item_id": item, "category": category, "event_timestamp": LONG_AGO} for item, category in categories.items()]
    tables.write(world.home, tables.ITEMS, pa.Table.from_pylist(rows, schema=tables.ITEMS.schema))
    world.follow()


def views(world):
    """(user, category) -> how often they viewed it."""
    users = {world.customer("user_id", user): user for user in ("ann", "bob", "cid")}
    rows = world.online("customer_category")
    return {(users[customer], category): row["customer_category_views_total"] for (customer, category), (_, row) in rows.items()}


def told(world):
    """bob viewed i1 before anybody said of which category it is."""
    world.say(0, user="bob", product_id="i1")
    world.step()
    world.say(100, user="ann", product_id="i1", category="a")
    world.say(100, user="ann", product_id="i2", category="a")
    world.step()


def test_an_item_is_of_the_category_that_its_earliest_event_says(world, tmp_path) -> None:
    world.say(0, user="bob", product_id="i1")
    world.step()
    assert views(world) == {}
    told(world)
    assert views(world) == {("bob", "a"): 2, ("ann", "a"): 2}
    assert world.is_exact(tmp_path / "truth")
    products = [{"product_id": "i1", "quantity": 1, "price": 1, "category": "b"}, {"product_id": "i3", "quantity": 1, "price": 1}]
    world.say(200, "Order Completed", user="cid", made_s=50, order_id="o1", products=products, category="z")
    world.step()
    assert views(world) == {("bob", "b"): 2, ("ann", "a"): 1, ("ann", "b"): 1, ("cid", "b"): 0}
    assert world.is_exact(tmp_path / "truth", was_taken_back=True)
    world.restart()
    world.to(40 * DAY)
    assert world.row("customer_category", (world.customer("user_id", "bob"), "b"))["customer_category_views_30d"] == 0
    assert world.is_exact(tmp_path / "truth", was_taken_back=True)


def test_a_word_on_an_item_makes_nobody_anew_but_who_had_seen_it(world, tmp_path, monkeypatch) -> None:
    made, real = [], Activity._made
    monkeypatch.setattr(Activity, "_made", lambda self, customer, now_us: (made.append(customer), real(self, customer, now_us))[1])
    world.say(0, user="ann", product_id="i1", category="a")
    world.say(0, user="bob", product_id="i2")
    world.step()
    made.clear()
    for n in range(5):
        world.say(10 + n, user="ann", product_id=f"new{n}", category="a")
        world.say(10 + n, user="ann", product_id=f"new{n}", category="b")  # of the same instant: the first by name holds
    world.step()
    assert made == []
    world.say(20, user="bob", product_id="i2", category="a")
    world.step()
    assert made == [world.customer("user_id", "bob")]
    assert views(world) == {("ann", "a"): 11, ("bob", "a"): 2}
    assert world.is_exact(tmp_path / "truth")


def test_the_catalogues_word_stands_above_that_of_events_and_may_change(world, tmp_path) -> None:
    told(world)
    world.drain()
    world.follow()
    assert views(world) == {("bob", "a"): 1, ("ann", "a"): 2}  # by the table of items from now on
    list_items(world, i1="c", i9="c")
    world.say(300, user="ann", product_id="i9", category="a")
    world.step()
    assert views(world) == {("bob", "c"): 1, ("ann", "c"): 2}
    assert world.is_exact(tmp_path / "truth", was_taken_back=True)
    list_items(world, i2="c")
    assert views(world) == {("ann", "a"): 1, ("ann", "c"): 1}  # of i9 the log alone says something, of i1 nobody
    assert world.is_exact(tmp_path / "truth", was_taken_back=True)


def test_a_word_goes_with_the_event_that_said_it(world, tmp_path) -> None:
    world.say(0, "identify", user="ann")
    world.say(50, user="ann", product_id="i1", category="a", consent=None)
    world.say(100, user="bob", product_id="i1")
    world.step()
    assert views(world) == {("ann", "a"): 1, ("bob", "a"): 1}
    world.say(200, "identify", user="ann", consent=DENY, made_s=20)
    world.step()
    assert views(world) == {}
    assert world.is_exact(tmp_path / "truth", was_taken_back=True)
    world.say(300, user="cid", product_id="i1", category="b")
    world.step()
    assert views(world) == {("bob", "b"): 1, ("cid", "b"): 1}
    state.erase(world.home, identifiers=[world.vault.pseudonym("user_id", "cid")], customers=[world.customer("user_id", "cid")])
    world.step()  # another process did that, of somebody else, and the worker holds bob ready
    assert ("bob", "b") not in views(world)


@pytest.mark.parametrize("fault", ["mark_owners", "due"])
def test_control_a_customer_who_is_not_told_of_it_is_wrong(world, tmp_path, monkeypatch, fault) -> None:
    monkeypatch.setattr(Timetable, fault, lambda *_, **__: [])
    told(world)
    with pytest.raises(AssertionError, match="customer_category"):
        world.is_exact(tmp_path / "truth")


def test_who_is_marked_between_the_look_and_the_note_stays_due(world) -> None:
    held = world.stream.activity.state
    with held.transaction():
        held.timetable.mark(["ann"])
        seen = held.timetable.of(["ann"])["ann"].mark
        held.timetable.mark(["ann"])  # meanwhile
        for note in (held.timetable.put, held.timetable.move):
            note({"ann": Due(10**18, 10**18, seen)})
            assert held.timetable.due(0, limit=9) == ["ann"]
        held.timetable.put({"ann": Due(10**18, 10**18, seen + 1)})
        assert held.timetable.due(0, limit=9) == []


def built_before_the_catalogue_changed(world) -> dict:
    """What is online after it, and after a load of the tables from before."""
    told(world)
    world.drain()
    features.build(world.home)
    list_items(world, i1="c", i2="a")
    assert views(world) == {("bob", "c"): 1, ("ann", "c"): 1, ("ann", "a"): 1}
    load(world)
    return views(world)


def load(world) -> None:
    feature_store.materialize(world.home, as_of=datetime.fromtimestamp(world.now / 1e6 + 1, UTC))


def test_a_load_of_tables_from_before_the_catalogue_changed_restores_nothing(world, tmp_path) -> None:
    assert built_before_the_catalogue_changed(world) == {("bob", "c"): 1, ("ann", "c"): 1, ("ann", "a"): 1}
    features.build(world.home)
    load(world)
    assert views(world) == {("bob", "c"): 1, ("ann", "c"): 1, ("ann", "a"): 1}
    assert world.is_exact(tmp_path / "truth", was_taken_back=True)


def test_control_such_a_load_brings_back_a_category_that_is_gone_and_an_old_count(world, monkeypatch) -> None:
    monkeypatch.setattr(provenance, "is_outdated", lambda *_: False)
    assert built_before_the_catalogue_changed(world) == {("bob", "a"): 1, ("bob", "c"): 1, ("ann", "c"): 1, ("ann", "a"): 2}
