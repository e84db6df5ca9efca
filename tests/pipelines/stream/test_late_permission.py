"""A permission that comes after what it permits: nothing of that is kept before an ingest has judged it, and all of it afterwards.

The stream keeps no byte of a call that nobody permitted, so it cannot judge again; the log has the call until it is drained, and the
ingest judges by all that is known then. From that moment on what is online is what the tables say.
"""

from contextlib import closing

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pipelines.stream import seeding

ALLOW, DENY = {"personalization": True}, {"personalization": False}
QUICK = {"deadline": None, "derandomize": True, "phases": [Phase.generate], "suppress_health_check": list(HealthCheck)}

WHO = st.sampled_from([("u1", None), ("u2", None), (None, "d1"), ("u1", "d1"), ("u3", "d2"), (None, "d2")])
CALL = st.tuples(
    WHO, st.sampled_from(["silent", "silent", "grant", "view", "refuse"]), st.sampled_from([0.2, 40, 1_801, 90_000]),
    st.sampled_from([0, 0, 3, 5_000]), st.sampled_from(["", "step", "ingest"]),
)  # fmt: skip


def play(world, calls) -> None:
    at_s = 0.0
    for number, ((user, device), what, gap_s, late_s, do) in enumerate(calls):
        at_s += gap_s
        consent = {"grant": ALLOW, "view": ALLOW, "refuse": DENY}.get(what)
        name = "identify" if what in ("grant", "refuse") else "Product Viewed"
        world.say(at_s, name, user=user, device=device, consent=consent, made_s=at_s - late_s, product_id=f"i{number % 3}", price=number)
        if do:
            world.step()
        if do == "ingest":
            world.drain()
            world.follow()
    world.step()


def never_more(world, folder) -> None:
    """Of nobody is more online than an ingest of this moment would store."""
    truth = world.truth(folder)["item_activity"]
    for item, (_, row) in world.online("item_activity").items():
        assert row["item_views_total"] <= truth[item][1]["item_views_total"]


@settings(max_examples=2, **QUICK)
@given(st.lists(CALL, min_size=6, max_size=16))
def test_after_an_ingest_online_is_what_the_batch_says_whatever_was_permitted_when(new_world, tmp_path_factory, calls) -> None:
    with closing(new_world()) as world:
        play(world, calls)
        never_more(world, tmp_path_factory.mktemp("more") / "home")
        world.drain()
        world.follow()
        world.step()
        assert world.is_exact(tmp_path_factory.mktemp("truth") / "home", was_taken_back=True)


def silent_then_permitted(world) -> None:
    for n in range(3):
        world.say(n * 100, user="ann", consent=None, product_id="i1")
    world.say(500, user="bob", product_id="i1")
    world.step()
    world.say(600, "identify", user="ann", made_s=50)
    world.step()
    assert world.row("item_activity", "i1")["item_views_total"] == 1
    world.drain()


def test_what_was_permitted_late_counts_once_an_ingest_stored_it(world, tmp_path) -> None:
    silent_then_permitted(world)
    world.follow()
    assert world.row("item_activity", "i1")["item_views_total"] == 3
    assert world.is_exact(tmp_path / "truth", was_taken_back=True)


def test_control_a_stream_that_does_not_look_at_the_tables_lacks_it(world, tmp_path, monkeypatch) -> None:
    silent_then_permitted(world)
    monkeypatch.setattr(seeding, "bring", lambda *_, **__: iter(()))
    world.follow()
    with pytest.raises(AssertionError):
        world.is_exact(tmp_path / "truth", was_taken_back=True)
