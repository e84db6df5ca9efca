"""One contract for the SQLite log and for every broker's edge, against real servers: nothing lost, nothing stuck, tries counted."""

import os
import signal
import time

import pytest

from pipelines.log import Incoming

KINDS = ["sqlite", *(pytest.param(kind, marks=pytest.mark.server) for kind in ("redis", "kafka", "rabbitmq"))]
LONG_S = 60.0  # enough for any server; nothing waits that long when it works
SHORT_S = 0.5
READER = """
import sys, time
from pipelines.edges import open_edges
from pipelines.log import open_log
from pipelines.settings import Settings

settings = Settings()
port = open_log(settings.home, settings=settings) if sys.argv[1] == "sqlite" else open_edges(settings)[0]
events = []
while len(events) < 60:
    events += port.read("g", max_events=60 - len(events), wait_s=20.0)
port.commit("g", [event.position for event in events[:20]])
print(" ".join(event.payload.decode() for event in events[:20]), flush=True)
time.sleep(600)
"""


def event(n, person="user_id:a"):
    return Incoming("shop", f"m{n}", (person, "anonymous_id:b"), b"%d" % n, time.time_ns() // 1_000)


@pytest.fixture(params=KINDS)
def place(request, place_of):
    return place_of(request.param)


@pytest.fixture
def opened(place):
    """opened(): one more consumer; all are closed at the end."""
    ports = []

    def open_one(**edges):
        ports.append(place.open(**edges))
        return ports[-1]

    yield open_one
    for port in ports:
        port.close()


def drained(port, group, count, *, commit=True):
    """The events that come until there are so many, or none for long."""
    events = []
    while len(events) < count and (some := port.read(group, max_events=count - len(events), wait_s=LONG_S)):
        events += some
        if commit:
            port.commit(group, [one.position for one in some])
    return events


def numbers(events):
    return [int(one.payload) for one in events]


def test_events_come_as_they_were_appended_and_in_order(opened):
    port = opened()
    given = [event(n) for n in range(300)]
    assert port.append(given) == ["appended"] * 300
    read = drained(port, "g", 300)
    assert numbers(read) == list(range(300))
    assert [(one.source, one.subjects, one.received_us, one.tries) for one in read] == [
        ("shop", one.subjects, one.received_us, 0) for one in given
    ]
    assert port.read("g", max_events=10, wait_s=SHORT_S) == [], "each is given once"


def test_a_group_sees_what_was_appended_before_it_existed(opened, place):
    opened().append([event(n) for n in range(50)])
    reader = opened()
    assert numbers(drained(reader, "g", 50)) == list(range(50))
    if place.kind != "rabbitmq":  # a queue serves one group
        assert numbers(drained(reader, "another", 50)) == list(range(50)), "groups do not take events from each other"


def test_what_is_committed_in_any_order_never_comes_back_and_the_rest_does(opened):
    first = opened()
    first.append([event(n) for n in range(40)])
    events = drained(first, "g", 40, commit=False)
    first.commit("g", [one.position for one in events if int(one.payload) % 3 == 2][::-1])
    first.close()
    second = opened()
    rest = [n for n in range(40) if n % 3 != 2]
    back = drained(second, "g", len(rest))
    assert sorted(numbers(back)) == rest
    assert {one.tries for one in back} == {1}
    assert second.read("g", max_events=10, wait_s=SHORT_S) == []


def test_tries_are_counted_over_consumers_and_a_parked_event_stops_nobody(opened, place):
    opened().append([event(0)])
    for tries in range(5):
        port = opened()
        (bad,) = port.read("g", max_events=10, wait_s=LONG_S)
        assert bad.tries == tries
        if tries < 4:
            port.close()
    port.park("g", bad, "tries_used_up")
    port.append([event(1)])
    assert numbers(drained(port, "g", 1)) == [1]
    port.close()
    assert opened().read("g", max_events=10, wait_s=SHORT_S) == []
    aside = [
        one.payload
        for one in (opened().parked(9) if place.kind == "sqlite" else drained(opened(name=place.settings.edges.name + ".dead"), "g", 1))
    ]
    assert aside == [b"0"]


def test_the_work_of_a_killed_consumer_is_taken_over(opened, place, brokers):
    opened().append([event(n) for n in range(100)])
    with brokers.process(READER, place.environment(), place.kind) as reader:
        committed = [int(n) for n in reader.stdout.readline().split()]
        os.killpg(reader.pid, signal.SIGKILL)
    assert len(committed) == 20
    events = drained(opened(), "g", 80)
    assert sorted(numbers(events) + committed) == list(range(100))
    assert sum(one.tries == 1 for one in events) >= 40, "those that it held were given before"


def test_trimming_forgets_only_what_every_group_has_committed(opened, place):
    port = opened()
    port.append([event(n) for n in range(10)])
    later_us = time.time_ns() // 1_000 + 60_000_000
    assert port.trim(before_us=later_us) == 0, "nobody has read anything"
    events = drained(port, "g", 10, commit=False)
    port.commit("g", [one.position for one in events[:6]])
    assert port.trim(before_us=1) == 0, "nothing is that old"
    expected = {"redis": 6, "kafka": 6}.get(place.kind, 0)  # the log forgets whole segments, a queue by itself
    assert port.trim(before_us=later_us) == expected
    port.close()
    assert sorted(numbers(drained(opened(), "g", 4))) == [6, 7, 8, 9]


@pytest.mark.server
@pytest.mark.parametrize("kind", ["redis", "kafka", "rabbitmq"])
def test_what_was_acknowledged_survives_the_kill_of_the_server(kind, place_of, request):
    server, place = request.getfixturevalue(f"{kind}_server"), place_of(kind)
    port = place.open()
    port.append([event(n) for n in range(200)])
    done = numbers(drained(port, "g", 50))
    if kind == "rabbitmq":
        time.sleep(3.0)  # a queue's place in its directory is written down up to half a second after it was declared
    server.kill()
    server.start()
    port.close()
    port = place.open()
    back = numbers(drained(port, "g", 200 - len(done)))
    port.close()
    assert set(done + back) == set(range(200))
