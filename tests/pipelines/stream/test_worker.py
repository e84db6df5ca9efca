"""A worker writes the online store only once it has counted, and its state is committed while it still holds the store."""

import sqlite3
from contextlib import closing, contextmanager

import pytest

from pipelines.stream.activity import Activity
from pipelines.stream.state import State

MINUTE = 60.0


@pytest.fixture
def world(new_world):
    return new_world()


def may_write(world) -> bool:
    """Whether nobody else is writing the online store just now."""
    with closing(sqlite3.connect(world.home / "feature_store" / "online.db", timeout=0, isolation_level=None)) as db:
        try:
            db.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return False
        db.execute("ROLLBACK")
    return True


def asked_after(monkeypatch, world, owner, name):
    """What `may_write` says at the end of each call of this method."""
    told, real = [], getattr(owner, name)

    def call(*args, **options):
        answer = real(*args, **options)
        told.append(may_write(world))
        return answer

    monkeypatch.setattr(owner, name, call)
    return told


@pytest.mark.parametrize("name", ["link", "apply", "expire"])
def test_others_may_write_the_store_while_a_worker_counts(world, monkeypatch, name) -> None:
    told = asked_after(monkeypatch, world, type(world.linker) if name == "link" else Activity, name)
    world.say(0, user="ann", product_id="i1")
    world.step()
    world.to(31 * MINUTE)  # her session has ended
    assert told
    assert all(told)


def test_the_state_is_committed_while_the_store_is_held(world, monkeypatch) -> None:
    """Or an erasure could take a person out of both in between, and what was counted before would be written after it."""
    told, real = [], State.transaction

    @contextmanager
    def transaction(state):
        with real(state):
            yield state
        told.append(may_write(world))

    world.step()
    monkeypatch.setattr(State, "transaction", transaction)
    world.say(0, user="ann", product_id="i1")
    world.stream.step()
    assert told[0] is False
