"""What is special about RabbitMQ: queues that others declared, the broker's own limit, and messages without a name."""

import asyncio
from types import SimpleNamespace

import aio_pika
import pytest

from pipelines.edges import rabbitmq
from pipelines.edges.rabbitmq import DELIVERIES_PER_TRY, RabbitMQ
from pipelines.errors import StoreError
from pipelines.log import Incoming
from pipelines.settings import EdgeSettings

pytestmark = pytest.mark.server


@pytest.fixture
def place(place_of):
    return place_of("rabbitmq", max_tries=1)


@pytest.fixture
def port(place):
    port = place.open()
    yield port
    port.close()


def published(url, queue, messages, **declared):
    """Publish as any program would."""

    async def publish():
        async with await aio_pika.connect(url) as connection, connection.channel() as channel:
            if declared:
                await channel.declare_queue(queue, **declared)
            for message in messages:
                await channel.default_exchange.publish(message, routing_key=queue)

    asyncio.run(publish())


def drained(port, count):
    events = []
    while len(events) < count and (some := port.read("g", max_events=count, wait_s=60)):
        events += some
    return events


def test_a_bare_message_of_any_program_is_known_by_its_id(place, port, rabbitmq_server):
    port.read("g", max_events=1)
    published(rabbitmq_server.url, place.settings.edges.name, [aio_pika.Message(b"{}", message_id="a7")])
    (event,) = drained(port, 1)
    assert (event.source, event.payload, event.message_id) == ("rabbitmq", b"{}", "rabbitmq:a7")


def test_a_message_without_an_id_is_known_by_its_content_where_that_holds_a_time():
    def known_as(body, timestamp=None):
        return rabbitmq._known_as(SimpleNamespace(message_id=None, timestamp=timestamp, body=body))

    timed, untimed = b'{"type": "track", "timestamp": "2026-01-01T00:00:00Z"}', b'{"type": "track"}'
    assert known_as(timed) == known_as(timed), "the same words about the same moment are the same event"
    assert known_as(untimed, 1) == known_as(untimed, 1) != known_as(untimed, 2)
    assert known_as(untimed) != known_as(untimed), "equal clicks without a time are two clicks"


def test_a_queue_that_exists_is_used_as_it_is(place, port, rabbitmq_server):
    published(
        rabbitmq_server.url, place.settings.edges.name, [aio_pika.Message(b"{}")], durable=True, arguments={"x-queue-type": "classic"}
    )
    (event,) = drained(port, 1)
    assert event.tries == 0
    port.close()
    again = place.open()
    (event,) = drained(again, 1)
    again.close()
    assert event.tries == 1, "a classic queue only says that it was delivered before"


def test_the_broker_itself_moves_a_message_that_its_consumers_die_of_out_of_the_way(place):
    publisher = place.open()
    publisher.append([Incoming("shop", "m1", (), b"killer", 1)])
    for _ in range(DELIVERIES_PER_TRY + 1):
        victim = place.open(batch_events=1)
        (event,) = drained(victim, 1)
        assert event.payload == b"killer"
        victim.close()
    publisher.append([Incoming("shop", "m2", (), b"good", 1)])
    assert [event.payload for event in drained(publisher, 1)] == [b"good"]
    publisher.close()
    dead = place.open(name=place.settings.edges.name + ".dead")
    assert [event.payload for event in drained(dead, 1)] == [b"killer"]
    dead.close()


def test_a_commit_over_an_earlier_connection_is_left_out(port):
    port.append([Incoming("shop", "m1", (), b"1", 1)])
    (event,) = drained(port, 1)
    port._drop()
    port.commit("g", [event.position])
    (again,) = drained(port, 1)
    port.commit("g", [event.position])
    port._drop()
    (still,) = drained(port, 1)
    assert again.payload == still.payload == b"1"
    assert again.position != event.position


def test_a_refusal_says_what_to_look_at_and_no_password():
    port = RabbitMQ(EdgeSettings(rabbitmq_url="amqp://me:hush@127.0.0.1:1/"))
    with pytest.raises(StoreError, match="is the broker up") as caught:
        port.append([Incoming("shop", "m1", (), b"1", 1)])
    port.close()
    assert "hush" not in str(caught.value)
