"""A link is taken back: both have their own events again online, and what comes next is told apart."""

import pytest

from pipelines import identity, ingest
from pipelines.identity import graph
from pipelines.stream.state import State

DAY = 86_400.0


def merged(world):
    """A visitor who was taken for ann, and bob; the link between the two."""
    for n in range(6):
        world.say(n * 3_000, device="d1", product_id=f"i{n % 2}", price=n)
        world.say(n * 3_000 + 5, user="bob" if n % 2 else "ann", product_id="i1")
    world.say(20_000, "identify", device="d1", user="ann")
    world.say(21_000, device="d1", user="ann", product_id="i3")
    world.step()
    assert world.customer("anonymous_id", "d1") == world.customer("user_id", "ann")
    world.drain()
    world.follow()
    return identity.link_id(*(world.vault.pseudonym(kind, name) for kind, name in (("user_id", "ann"), ("anonymous_id", "d1"))))


def split(world) -> None:
    graph.unmerge(world.home, merged(world), by="eve")
    ingest.reassign(world.home, settings=world.settings)
    world.to(30_000)
    world.follow()


def test_both_have_their_own_events_again_and_go_on_apart(world, tmp_path) -> None:
    split(world)
    assert world.customer("anonymous_id", "d1") != world.customer("user_id", "ann")
    assert world.is_exact(tmp_path / "truth", was_taken_back=True)
    world.say(40_000, device="d1", product_id="i1")
    world.say(40_010, user="ann", product_id="i1", made_s=19_000)
    world.say(40_020, "identify", device="d1", user="ann")  # what was cut stays cut
    world.step()
    assert world.customer("anonymous_id", "d1") != world.customer("user_id", "ann")
    assert world.is_exact(tmp_path / "truth", was_taken_back=True)
    world.restart()
    world.to(40 * DAY)
    assert world.is_exact(tmp_path / "truth", was_taken_back=True)


def test_control_a_state_that_is_not_told_of_it_is_wrong(world, tmp_path, monkeypatch) -> None:
    link = merged(world)
    monkeypatch.setattr(State, "own", lambda *_: set())
    graph.unmerge(world.home, link, by="eve")
    ingest.reassign(world.home, settings=world.settings)
    world.to(30_000)
    world.follow()
    with pytest.raises(AssertionError):
        world.is_exact(tmp_path / "truth", was_taken_back=True)
