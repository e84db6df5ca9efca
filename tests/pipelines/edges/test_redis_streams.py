"""What is special about Redis: groups that vanish, entries that others delete, and programs that publish in their own way."""

import time

import pytest
import redis

from pipelines.edges.redis_streams import RedisStreams
from pipelines.errors import StoreError
from pipelines.log import Incoming
from pipelines.settings import EdgeSettings

pytestmark = pytest.mark.server


@pytest.fixture
def place(place_of):
    return place_of("redis", takeover_s=0.2)


@pytest.fixture
def port(place):
    port = place.open()
    yield port
    port.close()


@pytest.fixture
def client(redis_server):
    with redis.Redis.from_url(redis_server.url) as client:
        yield client


def events(count):
    return [Incoming("shop", f"m{n}", (), b"%d" % n, 10**15) for n in range(count)]


def test_any_program_may_publish_a_body_or_the_fields_of_a_call(client, place, port):
    name = place.settings.edges.name
    bare = client.xadd(name, {"body": b'{"type": "track"}'}).decode()
    client.xadd(name, {"type": "track", "userId": "u1", "event": "Product Viewed"})
    first, second = port.read("g", max_events=9)
    assert (first.source, first.payload, first.message_id) == ("redis", b'{"type": "track"}', f"redis:{name}:{bare}")
    assert abs(first.received_us / 1e6 - time.time()) < 60, "when the server took it"
    assert second.payload == b'{"type": "track", "userId": "u1", "event": "Product Viewed"}'


def test_a_group_that_vanished_with_its_server_s_data_is_made_again(client, place, port):
    port.append(events(2))
    assert len(port.read("g", max_events=9)) == 2
    client.delete(place.settings.edges.name)
    assert port.read("g", max_events=9) == []
    port.append(events(3))
    assert len(port.read("g", max_events=9, wait_s=5)) == 3


def test_entries_that_somebody_deleted_before_their_commit_are_told_and_hold_nothing_up(client, place, port, caplog):
    port.append(events(3))
    held = port.read("g", max_events=9)
    client.xdel(place.settings.edges.name, held[1].position)
    time.sleep(0.3)
    assert [event.payload for event in port.read("g", max_events=9, wait_s=2)] == [b"0", b"2"]
    assert "1 entries were deleted" in caplog.text


def test_all_that_a_reader_holds_goes_to_the_next_one_at_once_when_it_closes(place):
    first = place.open(takeover_s=60.0)
    first.append(events(350))
    assert len(first.read("g", max_events=350)) == 350
    first.close()
    second = place.open(takeover_s=60.0)
    assert len(second.read("g", max_events=350)) == 350
    second.close()


def test_a_reader_that_holds_nothing_leaves_no_trace(client, place):
    first = place.open()
    first.append(events(1))
    first.commit("g", [event.position for event in first.read("g", max_events=9)])
    first.close()
    assert client.xinfo_consumers(place.settings.edges.name, "g") == []


def test_a_living_reader_keeps_what_it_was_given_for_the_time_of_a_takeover(place):
    slow, other = place.open(takeover_s=5.0), place.open(takeover_s=5.0)
    slow.append(events(4))
    assert len(slow.read("g", max_events=9)) == 4
    assert other.read("g", max_events=9, wait_s=0.5) == []
    for port in (slow, other):
        port.close()


def test_a_server_that_keeps_nothing_on_disk_is_warned_of(brokers, tmp_path, caplog, redis_server, client):
    client.config_set("appendonly", "no")
    try:
        port = brokers.place("redis", tmp_path, redis_server.url).open()
        port.append(events(1))
        port.close()
    finally:
        client.config_set("appendonly", "yes")
    assert "appendonly yes" in caplog.text


def test_a_refusal_says_what_to_look_at_and_no_password():
    port = RedisStreams(EdgeSettings(redis_url="redis://me:hush@127.0.0.1:1/0"))
    with pytest.raises(StoreError, match="is the server up") as caught:
        port.append(events(1))
    port.close()
    assert "hush" not in str(caught.value)
