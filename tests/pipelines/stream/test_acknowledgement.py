"""The log is told beside the stream, after the flushes, and of nothing that is not applied."""

import threading
from contextlib import closing

import pytest

from pipelines.errors import StoreError
from pipelines.stream import acknowledgement, worker
from pipelines.stream.acknowledgement import Acknowledgement


@pytest.fixture
def told(world, monkeypatch):
    """How many calls the log was told of at a time; what came before each, in order, is in `told.order`."""

    class Told(list):
        def __init__(self):
            super().__init__()
            self.order = []

    told = Told()
    real = world.log.commit
    for owner, name in ((world.stream.activity.state, "sync"), (world.stream.online, "sync")):
        sync = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda sync=sync, owner=owner: (told.order.append(type(owner).__name__), sync())[1])

    def commit(group, positions):
        told.order.append("log")
        told.append(len(positions))
        real(group, positions)

    monkeypatch.setattr(world.log, "commit", commit)
    return told


def test_the_log_is_told_seldom_while_calls_come_and_at_once_where_nobody_waits_for_any(world, told, monkeypatch) -> None:
    monkeypatch.setattr(acknowledgement, "EVERY_S", 3_600.0)
    world.stream.acknowledgement._begun_s = float("inf")  # a moment ago, whatever the machine does meanwhile
    for n in range(5):
        world.say(n, user="u1")
        assert world.stream.step(wait_s=5.0).read == 1
    world.stream.step(wait_s=0.001)
    assert told == [], "each costs flushes of the disk that calls need too"
    world.stream.step()
    assert told == [5]
    assert world.log.pending(worker.GROUP) == 0


def test_what_was_applied_is_flushed_before_the_log_is_told(world, told) -> None:
    world.step()  # which flushes what it took over
    told.order.clear()
    world.say(0, user="u1")
    world.step()
    assert told.order == ["State", "OnlineWriter", "log"]


def test_calls_are_applied_while_the_log_is_told(world, monkeypatch) -> None:
    is_told, entered = threading.Event(), threading.Event()
    real = world.stream.activity.state.sync
    monkeypatch.setattr(world.stream.activity.state, "sync", lambda: (entered.set(), is_told.wait(30), real())[2])
    try:
        world.say(0, user="u1", product_id="i1")
        assert world.stream.step(wait_s=5.0).applied == 1
        assert entered.wait(10)
        world.say(1, user="u2", product_id="i1")
        assert world.stream.step(wait_s=5.0).applied == 1
        assert world.log.pending(worker.GROUP) == 2
    finally:
        is_told.set()
    world.step()
    assert world.log.pending(worker.GROUP) == 0


def test_what_could_not_be_told_is_said_once_and_told_again(monkeypatch) -> None:
    monkeypatch.setattr(acknowledgement, "EVERY_S", 0.0)
    heard, refusals = [], [StoreError("the disk is full")]

    def tell(positions):
        if refusals:
            raise refusals.pop()
        heard.append(list(positions))

    with closing(Acknowledgement(tell)) as told:
        assert told.due_s() == float("inf")
        told.add([1, 2])
        assert told.due_s() == 0.0
        told.begin()
        with pytest.raises(StoreError, match="full"):
            told.finish()
        told.add([3])
        told.finish()
    assert heard == [[1, 2, 3]]


def test_what_comes_while_the_log_is_told_is_told_the_next_time() -> None:
    heard, entered, go_on = [], threading.Event(), threading.Event()

    def tell(positions):
        heard.append(list(positions))
        entered.set()
        go_on.wait(30)

    with closing(Acknowledgement(tell)) as told:
        told.add([1])
        told.begin()
        assert entered.wait(10)
        told.add([2])
        told.begin()  # one at a time
        assert heard == [[1]]
        go_on.set()
        told.finish()
    assert heard == [[1], [2]]
