"""The way to the store: a failing one is left alone, a hanging one holds few, and nobody waits for a probe."""

import threading
from collections import Counter
from types import SimpleNamespace

import pytest

from serving.breaker import Breaker
from serving.fallbacks import BUSY, DEADLINE, STORE, Deadline, Unavailable
from serving.online_store import StoreFailure
from serving.redis_source import SILENCE_S
from serving.store_guard import BLAME_S, PLACES, Guard

PATIENCE_S = 60.0


class Store:
    """Profiles of a store that can be broken. `probes`: how often it was asked whether it is well."""

    def __init__(self):
        self.is_broken, self.probes = False, 0

    def check(self, deadline):
        self.probes += 1
        if self.is_broken:
            raise StoreFailure("gone")


def fails(_):
    raise StoreFailure("gone")


@pytest.fixture
def clock():
    return [0.0]


@pytest.fixture
def world(clock):
    """A guard whose probes wait in `later` until they are run; who asks holds up the event loop, or is `beside` it."""
    store, later = Store(), []
    breaker, beside = Breaker(limit=3, pause_s=1.0, clock=lambda: clock[0]), [False]
    guard = Guard(profiles=store, breaker=breaker, aside=later.append, clock=lambda: clock[0], is_on_loop=lambda: not beside[0])
    return SimpleNamespace(store=store, later=later, guard=guard, beside=beside)


def open_breaker(guard):
    for _ in range(3):
        with pytest.raises(Unavailable, match=STORE):
            guard.ask(fails)


def test_store_that_keeps_failing_is_left_alone_and_no_request_waits_for_the_probe(world, clock):
    open_breaker(world.guard)
    asked = []
    for clock[0] in (0.5, 1.0, 1.0, 1.5):
        with pytest.raises(Unavailable, match=STORE):
            world.guard.ask(asked.append)
    assert asked == []
    assert len(world.later) == 1
    world.later.pop()()
    assert world.guard.ask(lambda store: "back") == "back"
    assert world.store.probes == 1


def test_probe_that_fails_waits_for_the_next_pause(world, clock):
    open_breaker(world.guard)
    world.store.is_broken = True
    for clock[0] in (1.0, 2.0, 3.0):
        with pytest.raises(Unavailable):
            world.guard.ask(lambda store: "asked")
        world.later.pop()()
        assert world.guard.breaker.is_open
    assert world.store.probes == 3


def test_hanging_store_holds_only_so_many_and_the_rest_go_on_at_once():
    guard, inside, release = Guard(profiles=Store()), threading.Semaphore(0), threading.Event()

    def hangs(_):
        inside.release()
        assert release.wait(PATIENCE_S)

    held = [threading.Thread(target=guard.ask, args=(hangs,)) for _ in range(PLACES)]
    for thread in held:
        thread.start()
    assert all(inside.acquire(timeout=PATIENCE_S) for _ in held)
    for _ in range(3):
        with pytest.raises(Unavailable, match=BUSY):
            guard.ask(lambda store: "too many")
    release.set()
    for thread in held:
        thread.join()
    assert guard.ask(lambda store: "free again") == "free again"


def test_place_is_given_back_however_the_question_ends(world):
    def breaks(_):
        raise ZeroDivisionError

    for _ in range(2 * PLACES):
        with pytest.raises(ZeroDivisionError):
            world.guard.ask(breaks)
    assert world.guard.ask(lambda store: "free") == "free"


def test_request_that_came_late_is_not_the_stores_fault(world):
    for _ in range(10):
        with pytest.raises(Unavailable, match=DEADLINE):
            world.guard.ask(lambda store: Deadline(0.0).check())
    assert not world.guard.breaker.is_open


def test_store_that_lets_the_deadline_pass_is_at_fault(world, clock):
    world.beside[0] = True

    def dawdles(_):
        clock[0] += 2 * BLAME_S
        raise Unavailable(DEADLINE)

    for _ in range(3):
        with pytest.raises(Unavailable, match=DEADLINE):
            world.guard.ask(dawdles)
    assert world.guard.breaker.is_open


def test_slow_store_is_to_be_asked_beside_the_loop_for_a_while(world, clock):
    def takes(seconds, **options):
        def question(_):
            clock[0] += seconds

        world.guard.ask(question, **options)

    takes(0.1)
    assert not world.guard.is_slow  # once is chance
    takes(10.0, is_batch=True)
    assert not world.guard.is_slow  # batches take long
    takes(0.1)
    assert world.guard.is_slow
    clock[0] += 1.5
    assert not world.guard.is_slow
    takes(0.001)
    assert not world.guard.is_slow


def test_store_that_freezes_stops_the_event_loop_once_and_not_for_each_who_stands_in_line(world, clock):
    """A frozen store, 200 requests a second and two questions to each: who was behind the first one waited for it alone."""
    stops, refused = [], Counter()

    def hangs(_):
        stops.append(clock[0])
        clock[0] += SILENCE_S
        raise StoreFailure("silent")

    for request in range(200):
        clock[0] = max(clock[0], request / 200)
        for _ in range(2):
            with pytest.raises(Unavailable) as caught:
                world.guard.ask(hangs)
            refused[caught.value.cause] += 1
        assert clock[0] - request / 200 <= SILENCE_S
    assert len(stops) == 1
    assert refused == {STORE: 1, BUSY: 399}


def test_frozen_store_is_found_out_beside_the_loop_and_opens_the_breaker(world, clock):
    world.beside[0] = True
    with pytest.raises(Unavailable):
        world.guard.ask(fails)
    assert not world.guard.is_slow  # it failed at once: nobody waited for it

    def hangs(_):
        clock[0] += SILENCE_S
        raise StoreFailure("silent")

    for _ in range(2):
        assert world.guard.has_room
        with pytest.raises(Unavailable, match=STORE):
            world.guard.ask(hangs)
    assert world.guard.is_slow
    assert world.guard.breaker.is_open
    assert not world.guard.has_room


def test_nobody_is_asked_to_wait_where_all_places_are_taken(world):
    seen = []
    for _ in range(PLACES - 1):
        world.guard._places.pop()
    assert world.guard.has_room
    world.guard.ask(lambda _: seen.append(world.guard.has_room))
    assert seen == [False]
    assert world.guard.has_room


def test_without_a_store_nothing_is_asked():
    with pytest.raises(Unavailable, match=STORE):
        Guard().ask(lambda profiles: profiles)
