"""What is special about Kafka: members that come and go, consumers that look alive, transactions, and listeners that ask who one is."""

import asyncio
import time

import pytest
from aiokafka import AIOKafkaProducer

from pipelines.edges import kafka
from pipelines.errors import StoreError
from pipelines.log import Incoming
from pipelines.settings import EdgeSettings

pytestmark = pytest.mark.server


@pytest.fixture
def place(place_of):
    return place_of("kafka")


@pytest.fixture
def port(place):
    port = place.open()
    yield port
    port.close()


def events(count, start=0):
    return [Incoming("shop", f"m{n}", (f"user_id:{n}",), b"%d" % n, 10**15) for n in range(start, start + count)]


def drained(ports, count):
    """Read and commit with several consumers in turn; returns what each got."""
    got, end = [[] for _ in ports], time.monotonic() + 60
    while sum(map(len, got)) < count and time.monotonic() < end:
        for port, mine in zip(ports, got, strict=True):
            mine += taken(port)
    return got


def taken(port):
    some = port.read("g", max_events=20, wait_s=0.1)
    port.commit("g", [event.position for event in some])
    return some


def has_work(port):
    """Whether a partition is this consumer's, once it has read."""
    return bool(port._readers["g"]._consumer.assignment())


def test_a_bare_record_is_known_by_its_place_and_received_when_the_broker_took_it(place, port, kafka_server):
    name = place.settings.edges.name
    port.append(events(1))  # makes the topic, with the broker's clock

    async def publish():
        async with AIOKafkaProducer(bootstrap_servers=kafka_server.url) as producer:
            await producer.send_and_wait(name, b"{}", partition=0, timestamp_ms=1)

    asyncio.run(publish())
    bare = next(event for event in drained([port], 2)[0] if event.payload == b"{}")
    assert (bare.source, bare.message_id) == ("kafka", f"kafka:{name}:0:{bare.position[1]}")
    assert abs(bare.received_us / 1e6 - time.time()) < 60


def test_a_member_that_joins_shares_the_work_and_nothing_is_lost(place, port):
    port.append(events(200))
    first = drained([port], 100)[0]
    second, end = place.open(), time.monotonic() + 60
    first += taken(second)
    while not (has_work(port) and has_work(second)) and time.monotonic() < end:
        first += [*taken(port), *taken(second)]
    port.append(events(200, start=200))
    shares = drained([port, second], 400 - len(first))
    second.close()
    assert all(shares), "each of them got some"
    assert {int(event.payload) for event in [*first, *shares[0], *shares[1]]} == set(range(400))


def test_records_of_a_transaction_that_was_given_up_are_never_read(place, port, kafka_server):
    port.append(events(1))

    async def give_up():
        async with AIOKafkaProducer(bootstrap_servers=kafka_server.url, transactional_id=place.settings.edges.name) as producer:
            await producer.begin_transaction()
            await producer.send_and_wait(place.settings.edges.name, b"never", partition=0)
            await producer.abort_transaction()

    asyncio.run(give_up())
    port.append(events(5, start=1))
    (got,) = drained([port], 6)
    assert sorted(event.payload for event in got) == [b"%d" % n for n in range(6)]
    assert port.read("g", max_events=9, wait_s=0.5) == []


def test_a_consumer_that_gets_nothing_although_records_wait_is_made_anew(place, port, monkeypatch):
    port.append(events(3))
    assert len(drained([port], 3)[0]) == 3
    stuck = port._readers["g"]._consumer

    async def nothing(**_):
        await asyncio.sleep(0.05)
        return {}

    monkeypatch.setattr(stuck, "getmany", nothing)
    monkeypatch.setattr(kafka, "STALL_S", 0.5)
    port.append(events(2, start=3))
    with pytest.raises(StoreError, match="StalledError"):
        port.read("g", max_events=9, wait_s=60)
    monkeypatch.setattr(kafka, "STALL_S", 60.0)
    assert sorted(event.payload for event in drained([port], 2)[0]) == [b"3", b"4"]
    assert port._readers["g"]._consumer is not stuck


def test_a_consumer_that_has_nothing_to_read_is_left_alone(place, port, monkeypatch):
    port.append(events(1))
    ports = [port, place.open(), place.open()]  # more than there are partitions
    assert sum(len(mine) for mine in drained(ports, 1)) == 1
    end = time.monotonic() + 60
    while not all(one._asked(one._readers["g"]._is_member()) for one in ports) and time.monotonic() < end:
        assert not any(taken(one) for one in ports)
    monkeypatch.setattr(kafka, "STALL_S", 0.2)
    members = [one._readers["g"]._consumer for one in ports]
    for _ in range(4):
        for one in ports:
            assert one.read("g", max_events=9, wait_s=0.2) == []
    assert [one._readers["g"]._consumer for one in ports] == members
    for one in ports[1:]:
        one.close()


def test_brokers_that_ask_for_a_password_are_told_it_and_a_wrong_one_is_refused(place_of, brokers, kafka_server):
    asked = {"kafka_servers": kafka_server.guarded, "kafka_security": "SASL_PLAINTEXT", "kafka_user": brokers.KAFKA_USER}
    place = place_of("kafka")
    right = place.open(**EdgeSettings(**asked, kafka_password=brokers.KAFKA_PASSWORD).model_dump(exclude_defaults=True))
    right.append(events(1))
    assert len(drained([right], 1)[0]) == 1
    right.close()
    wrong = place.open(**EdgeSettings(**asked, kafka_password="guessed").model_dump(exclude_defaults=True))
    with pytest.raises(StoreError) as caught:
        wrong.append(events(1))
    wrong.close()
    assert "guessed" not in str(caught.value)


def test_brokers_that_are_away_are_refusals(place_of):
    port = kafka.Kafka(EdgeSettings(kafka_servers="127.0.0.1:1"))
    for ask in (lambda: port.append(events(1)), lambda: port.read("g", max_events=1)):
        with pytest.raises(StoreError, match="are the brokers up"):
            ask()
    port.close()
