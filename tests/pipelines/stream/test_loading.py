"""A load of the feature tables beside the stream changes nothing of whom the stream knows more of, and brings back nothing it took out."""

from contextlib import closing
from datetime import UTC, datetime

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pipelines import feature_store, features, tables
from pipelines.stream import untold

ALLOW, DENY = {"personalization": True}, {"personalization": False}
QUICK = {"deadline": None, "derandomize": True, "phases": [Phase.generate], "suppress_health_check": list(HealthCheck)}
VIEWS = ("customer_activity", "customer_session", "customer_item", "item_activity")

CALL = st.tuples(
    st.sampled_from([("u1", None), ("u2", None), (None, "d1"), ("u1", "d1"), (None, "d2"), ("u3", "d2")]),
    st.sampled_from(["silent", "silent", "silent", "view", "grant", "refuse"]), st.sampled_from([0.2, 40, 1_801, 90_000]),
    st.sampled_from([0, 0, 3, 5_000]), st.sampled_from(["", "", "", "step", "step", "ingest"]),
)  # fmt: skip


def load(world):
    feature_store.materialize(world.home, as_of=datetime.fromtimestamp(world.now / 1e6, UTC), settings=world.settings)


def ingest(world):
    world.drain()
    features.build(world.home)
    world.follow()


def shown(world):
    return {view: {key: values for key, (_, values) in world.online(view).items()} for view in VIEWS}


@settings(max_examples=2, **QUICK)
@given(st.lists(CALL, min_size=8, max_size=14))
def test_a_load_changes_nothing_that_the_stream_shows_whatever_was_said_since_the_ingest(new_world, calls) -> None:
    with closing(new_world()) as world:
        world.say(0, "identify", user="u1")
        world.say(1, user="u1", product_id="i0")
        ingest(world)
        at_s = 10.0
        for number, ((user, device), what, gap_s, late_s, do) in enumerate(calls):
            at_s += gap_s
            consent = {"view": ALLOW, "grant": ALLOW, "refuse": DENY}.get(what)
            name = "identify" if what in ("grant", "refuse") else "Product Viewed"
            what = {"product_id": f"i{number % 3}", "price": number}
            world.say(at_s, name, user=user, device=device, consent=consent, made_s=at_s - late_s, **what)
            if do:
                world.step()
            if do == "ingest":
                ingest(world)
        world.step()
        before = shown(world)
        load(world)
        assert shown(world) == before


def refused_too_late(world):
    """A refusal of before the views that the tables hold; returns what the stream shows of that."""
    world.say(0, "identify", user="ann")
    world.say(20, user="ann", consent=None, product_id="i1", price=10)
    world.say(100, user="ann", consent=None, product_id="i2", price=10)
    world.say(150, user="bob", product_id="i1", price=10)
    world.step()
    ingest(world)
    load(world)
    world.say(200, "identify", user="ann", consent=DENY, made_s=10)
    world.step()
    ann = world.customer("user_id", "ann")
    assert ann is not None
    assert not any(ann in str(key) for rows in shown(world).values() for key in rows)
    assert "i2" not in shown(world)["item_activity"]
    return shown(world)


def of_one_window(world):
    """A view that the tables hold and one that they do not leave their window together; returns what the stream shows then."""
    world.say(0, user="ann", product_id="i1", price=10)
    world.step()
    ingest(world)
    world.say(50, user="ann", product_id="i1", price=10)
    world.to(4_000)
    return shown(world)


@pytest.mark.parametrize("told", [refused_too_late, of_one_window])
def test_a_load_leaves_to_the_stream_whom_it_knows_more_of(world, told, monkeypatch) -> None:
    before, find = told(world), untold.find
    load(world)
    assert shown(world) == before
    found = [untold.Untold(frozenset(), frozenset())]
    monkeypatch.setattr(untold, "find", lambda *args, **given: found.pop() if found else find(*args, **given))
    load(world)
    assert shown(world) != before, "control: what was heard only while rows were loaded was loaded"
    world.step()
    assert shown(world) == before, "and the stream was told to make it anew"
    ingest(world)
    load(world)
    assert shown(world) == before
    assert untold._held(world.home).senders == set()


def test_a_load_has_whom_the_tables_alone_know(world) -> None:
    of_one_window(world)
    world.say(4_100, user="bob", product_id="i9", price=10)  # no stream looks at it before an ingest does
    world.now += 1_000_000
    world.drain()
    features.build(world.home)
    load(world)
    (bob,) = shown(world)["customer_activity"].keys() - {world.customer("user_id", "ann")}
    assert bob == world.customer("user_id", "bob")
    assert (bob, "i9") in shown(world)["customer_item"]


def test_a_load_has_whom_an_ingest_alone_joined(world, monkeypatch) -> None:
    world.say(0, user="ann", product_id="i1", price=10)
    world.say(5, device="d1", product_id="i2", price=10)
    world.step()
    ingest(world)
    load(world)
    apart = shown(world)
    world.say(10, "identify", user="ann", device="d1")  # no stream looks at it before an ingest does
    world.now += 1_000_000
    world.drain()
    features.build(world.home)
    with monkeypatch.context() as control:
        control.setattr(untold.undrained, "seen_since", lambda home, drained: set(tables.read(home, tables.IDENTITIES)["identifier"]))
        load(world)
        ann = world.customer("user_id", "ann")
        assert shown(world)["customer_item"].keys() < apart["customer_item"].keys(), "control: left to a stream that knows less"
    load(world)
    joined = shown(world)
    assert joined["customer_activity"].keys() == {ann}
    assert joined["customer_item"].keys() == {(ann, "i1"), (ann, "i2")}
    world.follow()
    assert shown(world) == joined, "the stream says the same"
