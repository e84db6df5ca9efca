"""A RabbitMQ queue as a port: one message an event. A queue serves one group, so the names of groups make no difference here.

In: messages of any program whose body is a call. Out: events. The queue is a quorum queue, messages are persistent and confirmed, so
that a confirmed one is on the disks of most members; those that nobody acknowledges go back to the queue when their consumer's
connection ends. One that was delivered very often (a consumer that dies of it) is moved by the broker itself, at least once, to
the queue `name`.dead. A queue that exists is used as it is. https://www.rabbitmq.com/docs/quorum-queues
"""

import asyncio
import contextlib
import hashlib
import logging
import time
import uuid
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage
from aio_pika.exceptions import AMQPError, ChannelInvalidStateError, ChannelNotFoundEntity
from yarl import URL

from pipelines.edges import envelope
from pipelines.edges.background import Background
from pipelines.errors import StoreError
from pipelines.log.port import Incoming, Logged, Outcome, Position
from pipelines.settings import EdgeSettings

DELIVERIES_PER_TRY = 4  # the broker's own limit, above the tries: it also counts consumers that were stopped in time
_ANSWER_S = 15.0  # a broker that is silent for longer counts as gone
_GATHER_S, _GATHER_STEP_S = 0.1, 0.01  # messages come one by one; those that are on their way make one batch
_COUNT = "x-delivery-count"  # set by quorum queues
_TIMES = (b'"timestamp"', b'"originalTimestamp"', b'"sentAt"')

_Result = TypeVar("_Result")

_log = logging.getLogger("rapport.edges")


class RabbitMQ:
    """The queue `name`, RabbitMQ 3.10 or newer; made where it is not there."""

    name = "rabbitmq"

    def __init__(self, edges: EdgeSettings) -> None:
        if edges.rabbitmq_url is None:
            raise ValueError("rabbitmq_url is not set")
        self._edges, self._queue = edges, edges.name
        self._loop = Background("rabbitmq")
        self._session: _Session | None = None
        self._turn = 0

    def append(self, events: Sequence[Incoming]) -> list[Outcome]:
        """As Port.append. A broker does not know what it had before: every outcome is APPENDED."""
        self._asked(self._send(self._queue, [_message(event.payload, event.message_id, envelope.headers(event)) for event in events]))
        return [Outcome.APPENDED] * len(events)

    def read(self, group: str, *, max_events: int, wait_s: float = 0.0) -> list[Logged]:
        """As Port.read. What this reader was given and did not commit comes again after the time of a takeover."""
        return self._asked(self._read(max_events, wait_s), extra_s=wait_s)

    def commit(self, group: str, positions: Sequence[Position]) -> None:
        """As Port.commit. What was given over an earlier connection comes again, for the broker has taken it back."""
        self._asked(self._committed([position for position in positions if isinstance(position, tuple)]))

    def park(self, group: str, event: Logged, reason: str) -> None:
        """As Port.park: into the queue `name`.dead."""
        self._asked(self._send(self._queue + envelope.DEAD, [_message(event.payload, event.message_id, envelope.aside(event, reason))]))
        self.commit(group, [event.position])

    def trim(self, *, before_us: int) -> int:
        """0: a queue forgets what is committed by itself."""
        return 0

    def close(self) -> None:
        """As Port.close."""
        self._drop()
        self._loop.close()

    # -- private

    def _asked(self, work: Coroutine[Any, Any, _Result], *, extra_s: float = 0.0) -> _Result:
        try:
            return self._loop.run(work, timeout_s=_ANSWER_S + extra_s)
        except (AMQPError, ChannelInvalidStateError, OSError) as error:
            self._drop()  # the next call begins with a new connection
            raise StoreError(
                f"rabbitmq: the queue {self._queue!r} was expected to answer, found {type(error).__name__}; is the broker up, and may this "
                "account use the queue?"
            ) from error

    def _drop(self) -> None:
        session, self._session = self._session, None
        if session:
            with contextlib.suppress(Exception):
                self._loop.run(session.connection.close(), timeout_s=5.0)

    async def _opened(self) -> "_Session":
        if self._session and not self._session.is_closed:
            return self._session
        if self._session:
            await self._session.connection.close()
            self._session = None
        self._turn += 1
        self._session = await _session(self._edges, self._turn)
        return self._session

    async def _send(self, queue: str, messages: Sequence[aio_pika.Message]) -> None:
        exchange = (await self._opened()).sending.default_exchange
        await asyncio.gather(*[exchange.publish(message, routing_key=queue, mandatory=True) for message in messages])

    async def _read(self, max_events: int, wait_s: float) -> list[Logged]:
        session = await self._opened()
        return await session.read(max_events, wait_s)

    async def _committed(self, positions: Sequence[tuple[int, int]]) -> None:
        if self._session:
            await self._session.commit([tag for turn, tag in positions if turn == self._session.turn])


class _Session:
    """One connection. Positions are its turn and the delivery's tag, which begins anew with each connection."""

    def __init__(
        self, edges: EdgeSettings, turn: int, connection: AbstractConnection, sending: AbstractChannel, reading: AbstractChannel
    ) -> None:
        self.turn, self.connection, self.sending = turn, connection, sending
        self._edges, self._reading = edges, reading
        self._arrived: asyncio.Queue[AbstractIncomingMessage] = asyncio.Queue()
        self._open: set[int] = set()  # tags that the broker waits for
        self._due: dict[int, float] = {}  # of those that were given: when they go back to the queue
        self._is_consuming = False

    @property
    def is_closed(self) -> bool:
        """Whether any of it was closed, by whomever."""
        return self.connection.is_closed or self.sending.is_closed or self._reading.is_closed

    async def read(self, max_events: int, wait_s: float) -> list[Logged]:
        """As Port.read."""
        await self._consume()
        messages, until = list[AbstractIncomingMessage](), time.monotonic() + wait_s
        while not messages:
            await self._return_late()
            left = until - time.monotonic()
            if self._arrived.empty() and left > 0 and not self.is_closed:
                with contextlib.suppress(TimeoutError):
                    messages.append(await asyncio.wait_for(self._arrived.get(), min(left, self._edges.takeover_s / 5)))
            await self._gather(max_events - len(messages))
            while len(messages) < max_events and not self._arrived.empty():
                messages.append(self._arrived.get_nowait())
            if left <= 0 or self.is_closed:
                break
        due = time.monotonic() + self._edges.takeover_s
        self._due |= {message.delivery_tag or 0: due for message in messages}
        return [self._logged(message) for message in messages]

    async def commit(self, tags: Sequence[int]) -> None:
        """Acknowledge them, with one frame for as many as possible."""
        done = set(tags) & self._open
        if not done:
            return
        self._open -= done
        for tag in done:
            self._due.pop(tag, None)
        first_open = min(self._open, default=max(done) + 1)
        before = [tag for tag in done if tag < first_open]
        channel = await self._reading.get_underlay_channel()
        if before:
            await channel.basic_ack(max(before), multiple=True)
        for tag in sorted(done.difference(before)):
            await channel.basic_ack(tag)

    # -- private

    async def _consume(self) -> None:
        if not self._is_consuming:
            self._is_consuming = True
            queue = await self._reading.get_queue(self._edges.name, ensure=False)
            await queue.consume(self._take, no_ack=False)

    async def _take(self, message: AbstractIncomingMessage) -> None:
        self._open.add(message.delivery_tag or 0)
        self._arrived.put_nowait(message)

    async def _gather(self, count: int) -> None:
        """Let those arrive that are on their way: until there are so many, or none more come, or it takes too long."""
        until, before = time.monotonic() + _GATHER_S, 0
        while before < self._arrived.qsize() < count and time.monotonic() < until:
            before = self._arrived.qsize()
            await asyncio.sleep(_GATHER_STEP_S)

    async def _return_late(self) -> None:
        now = time.monotonic()
        late = [tag for tag, due in self._due.items() if due <= now]
        channel = await self._reading.get_underlay_channel()
        for tag in late:
            self._open.discard(tag)
            del self._due[tag]
            await channel.basic_nack(tag, requeue=True)

    def _logged(self, message: AbstractIncomingMessage) -> Logged:
        given = {str(name): str(value) for name, value in message.headers.items()}
        tries: Any = message.headers.get(_COUNT, int(bool(message.redelivered)))
        return envelope.logged(
            (self.turn, message.delivery_tag or 0),
            message.body,
            given,
            edge=RabbitMQ.name,
            known_as=_known_as(message),
            received_us=time.time_ns() // 1_000,
            tries=tries if isinstance(tries, int) else 0,
        )


def _known_as(message: AbstractIncomingMessage) -> str:
    """The name of a message whose body has none: the publisher's id, else its content where that holds a time.

    What has neither gets a name of its own each time: equal clicks are two clicks, although one of them may then count twice
    when its consumer dies between the log's commit and the acknowledgement.
    """
    if message.message_id:
        return f"rabbitmq:{message.message_id}"
    if message.timestamp or any(word in message.body for word in _TIMES):
        return f"rabbitmq:{hashlib.blake2b(message.body + str(message.timestamp).encode(), digest_size=16).hexdigest()}"
    return f"rabbitmq:{uuid.uuid4().hex}"


async def _session(edges: EdgeSettings, turn: int) -> _Session:
    heartbeat_s = max(1, round(edges.takeover_s / 2))  # the broker gives a silent connection's messages to others after two
    url = URL(edges.rabbitmq_url.get_secret_value() if edges.rabbitmq_url else "").update_query(heartbeat=heartbeat_s)
    connection = await aio_pika.connect(url, timeout=_ANSWER_S / 2)
    try:
        await _make(connection, edges)
        sending, reading = await connection.channel(publisher_confirms=True), await connection.channel()
        await reading.set_qos(prefetch_count=2 * edges.batch_events)  # the next batch travels while one is applied
    except BaseException:
        await connection.close()
        raise
    return _Session(edges, turn, connection, sending, reading)


async def _make(connection: AbstractConnection, edges: EdgeSettings) -> None:
    dead = edges.name + envelope.DEAD
    quorum: dict[str, Any] = {"x-queue-type": "quorum"}
    limits = quorum | {
        "x-delivery-limit": edges.max_tries * DELIVERIES_PER_TRY,
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": dead,
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",  # the strategy demands it; there is no limit that a queue could overflow
    }
    for name, arguments in ((dead, quorum), (edges.name, limits)):  # its dead letters need a place first
        async with connection.channel() as channel:
            with contextlib.suppress(ChannelNotFoundEntity):
                await channel.declare_queue(name, passive=True)
                continue
        async with connection.channel() as channel:
            await channel.declare_queue(name, durable=True, arguments=arguments)


def _message(body: bytes, message_id: str, headers: dict[str, str]) -> aio_pika.Message:
    return aio_pika.Message(
        body,
        headers=dict(headers),
        message_id=message_id,
        content_type="application/json",
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
    )
