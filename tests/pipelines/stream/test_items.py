"""What the stream says of items is what the feature tables say: of everybody's events, and of the catalogue."""

from contextlib import closing
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pytest

from pipelines import tables
from pipelines.online.writer import OnlineWriter
from pipelines.stream import Stream, items
from pipelines.stream.item_rows import ItemDue, ItemRows
from pipelines.stream.items import Items
from pipelines.stream.shown import Shown

START = datetime(2026, 3, 1, 12, tzinfo=UTC)
ALLOW, DENY = {"personalization": True}, {"personalization": False}
DAY = 86_400.0


def views_of(world, item):
    return world.row("item_activity", item).get("item_views_total")


def busy(world):
    for n in range(24):
        world.say(n * 5_000, user=f"u{n % 5}", product_id=f"i{n % 3}", price=n, made_s=n * 5_000 - (9_000 if n % 7 == 0 else 0))
        world.step()


def test_everybodys_events_count_and_leave_their_windows(world, tmp_path) -> None:
    busy(world)
    assert views_of(world, "i0") == 8
    assert world.is_exact(tmp_path / "truth")
    for days in (2, 9, 40, 120):
        world.to(days * DAY)
        assert world.is_exact(tmp_path / "truth"), days
    assert world.row("item_activity", "i0")["item_views_30d"] == 0


def test_control_windows_that_nobody_lets_expire_are_wrong(world, tmp_path, monkeypatch) -> None:
    busy(world)
    monkeypatch.setattr(Items, "expire", lambda *_, **__: (Shown(), {}))
    monkeypatch.setattr(ItemRows, "next_due_us", lambda _: None)
    world.to(40 * DAY)
    with pytest.raises(AssertionError, match="item_activity"):
        world.is_exact(tmp_path / "truth")


def test_an_event_counts_from_its_receipt_whoever_it_is_of(world, tmp_path) -> None:
    world.say(0, device="d1", product_id="i1")
    world.step()
    before = world.online("item_activity")
    world.say(50_000, "identify", device="d1", user="ann")
    world.step()
    assert world.online("item_activity") == before
    assert world.is_exact(tmp_path / "truth")


def test_what_a_later_refusal_takes_out_does_not_count_for_its_item(world, tmp_path) -> None:
    for n in range(4):
        world.say(n * 100, user="ann", product_id="i1", consent=None if n else ALLOW)
    world.say(500, user="bob", product_id="i1")
    world.step()
    assert views_of(world, "i1") == 5
    world.say(600, "identify", user="ann", consent=DENY, made_s=150)
    world.step()
    assert views_of(world, "i1") == 3
    assert world.is_exact(tmp_path / "truth", was_taken_back=True)


def test_an_item_of_which_everything_went_is_not_there(world) -> None:
    world.say(0, "identify", user="ann")
    world.say(100, user="ann", product_id="i1", consent=None)
    world.step()
    assert set(world.online("item_activity")) == {"i1"}
    world.say(200, "identify", user="ann", consent=DENY, made_s=50)
    world.step()
    assert world.online("item_activity") == {}


def test_an_erased_persons_events_are_taken_back_from_a_running_worker(world) -> None:
    from pipelines.stream import state

    for user in ("ann", "bob"):
        world.say(0, user=user, product_id="i1")
    world.step()
    ann = world.customer("user_id", "ann")
    state.erase(world.home, identifiers=[world.vault.pseudonym("user_id", "ann")], customers=[ann])
    world.step()
    assert views_of(world, "i1") == 1


def test_an_erasure_between_the_look_and_the_note_is_not_forgotten(world) -> None:
    held = world.stream.activity.state
    with held.transaction():
        held.items.mark("SELECT 'i1' AS item_id")
    (seen,) = held.items.due(0, limit=9).values()
    with held.transaction():
        held.items.mark("SELECT 'i1' AS item_id")  # meanwhile
        held.items.move_due({"i1": ItemDue(10**18, seen)})
    assert held.items.due(0, limit=9) == {"i1": seen + 1}


def listed(world, price):
    at = [START + timedelta(days=1), START + timedelta(days=30)]
    rows = [
        {"item_id": item, "category": "a", "price_cents": cents, "event_timestamp": when, "created_timestamp": when}
        for item, cents, when in zip(["i1", "i9"], price, at, strict=True)
    ]
    tables.write(world.home, tables.ITEMS, pa.Table.from_pylist(rows, schema=tables.ITEMS.schema))


def test_the_catalogues_lines_count_from_when_they_were_known(world, tmp_path) -> None:
    world.say(0, user="ann", product_id="i1", price=5)
    world.drain()
    listed(world, [700, 900])
    world.step()
    assert world.row("item_activity", "i1")["item_price_cents"] == 500
    assert set(world.online("item_activity")) == {"i1"}
    world.to(2 * DAY)
    assert world.row("item_activity", "i1")["item_price_cents"] == 700
    assert world.is_exact(tmp_path / "truth")
    world.to(31 * DAY)
    assert world.row("item_activity", "i9")["item_price_cents"] == 900
    listed(world, [800, 900])  # another price was meant
    world.follow()
    assert world.row("item_activity", "i1")["item_price_cents"] == 800
    assert world.is_exact(tmp_path / "truth", was_taken_back=True)


def test_several_workers_write_each_their_items_and_count_everybodys_events(new_world, tmp_path) -> None:
    world = new_world()
    world.stream.close()
    for n in range(30):
        world.say(n, user=f"u{n}", product_id=f"i{n % 6}", price=n)
    found = []
    for k in range(2):
        world.log.release("online")
        world.stream = world.made((k, 2))
        world.step()
        found.append({name for name, live in world.stream.activity.items._lives.items() if live.keyed.keys()})
        if k == 0:
            world.stream.close()
    assert found[0] | found[1] == {f"i{n}" for n in range(6)}
    assert found[0].isdisjoint(found[1])
    assert {views_of(world, f"i{n}") for n in range(6)} == {5}


def test_items_that_are_not_held_ready_are_made_anew_with_the_same_result(world, tmp_path) -> None:
    world.stream.activity.items.most = 1
    busy(world)
    assert len(world.stream.activity.items._lives) == 1
    assert world.is_exact(tmp_path / "truth")


def test_control_an_event_that_is_counted_twice_shows(world, tmp_path, monkeypatch) -> None:
    keep = items._Live.add

    def twice(live, row, enter_us, **known):
        keep(live, row, enter_us, **known)
        keep(live, row, enter_us, **known)

    monkeypatch.setattr(items._Live, "add", twice)
    busy(world)
    with pytest.raises(AssertionError, match="item_activity"):
        world.is_exact(tmp_path / "truth")


def test_the_row_is_marked_as_streamed_so_that_a_load_of_older_tables_leaves_it(world) -> None:
    busy(world)
    assert isinstance(world.stream, Stream)
    with closing(OnlineWriter(world.home)) as online:
        assert online.is_streamed("item_activity")
