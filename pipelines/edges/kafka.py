"""A Kafka topic as a port: one record an event, one consumer group for each group of readers.

In: records of any program whose value is a call. Out: events. Records are written by an idempotent producer that waits for all in-sync
replicas; the durability is that of the topic (`min.insync.replicas=2` on three brokers survives the loss of one). Nothing is committed
by itself: an offset moves when its event was committed here, and what lies beyond the first open event is kept beside it (`progress`),
so that a successor repeats nothing that is done and knows how often the rest was given. Never reads uncommitted transactions.
"""

import asyncio
import contextlib
import logging
import ssl
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRebalanceListener
from aiokafka.admin import AIOKafkaAdminClient, NewTopic, RecordsToDelete
from aiokafka.errors import CommitFailedError, GroupLoadInProgressError, IllegalStateError, KafkaError
from aiokafka.structs import ConsumerRecord, OffsetAndMetadata, TopicPartition

from pipelines.edges import envelope
from pipelines.edges.background import Background
from pipelines.edges.progress import Progress
from pipelines.errors import StoreError
from pipelines.log.port import Incoming, Logged, Outcome, Position
from pipelines.settings import EdgeSettings

STALL_S = 30.0  # without a record for this long, the consumer is asked whether it still is one
_ANSWER_S = 15.0  # a broker that is silent for longer counts as gone
_GOODBYE_S = 3.0
_MIN_SESSION_S = 6.0  # brokers allow no shorter one (group.min.session.timeout.ms)
_LOG_APPEND_TIME = 1  # the record's time is the broker's own

_Result = TypeVar("_Result")

_log = logging.getLogger("rapport.edges")


_Record = tuple[bytes, bytes, dict[str, str]]  # value, key, headers


class Kafka:
    """The topic `name`; made with the brokers' defaults, and their clock, where it is not there."""

    name = "kafka"

    def __init__(self, edges: EdgeSettings) -> None:
        if edges.kafka_servers is None:
            raise ValueError("kafka_servers is not set")
        self._edges, self._topic = edges, edges.name
        self._loop = Background("kafka")
        self._producer: AIOKafkaProducer | None = None
        self._readers: dict[str, _Reader] = {}

    def append(self, events: Sequence[Incoming]) -> list[Outcome]:
        """As Port.append. A broker does not know what it had before: every outcome is APPENDED."""
        records = [(event.payload, _key(event), envelope.headers(event)) for event in events]
        self._sent(self._topic, records)
        return [Outcome.APPENDED] * len(events)

    def read(self, group: str, *, max_events: int, wait_s: float = 0.0) -> list[Logged]:
        """As Port.read. What this reader was given and did not commit comes again after the time of a takeover."""
        try:
            # the first read waits for its place in the group, which a member that died keeps for the time of its session
            return self._asked(self._reader(group).read(max_events, wait_s), extra_s=wait_s + _session_s(self._edges))
        except StoreError:
            self._drop(group)  # the next call begins with a new client
            raise

    def commit(self, group: str, positions: Sequence[Position]) -> None:
        """As Port.commit. What another reader was given meanwhile stays with that one."""
        if positions and group in self._readers:
            self._asked(self._readers[group].commit([position for position in positions if isinstance(position, tuple)]))

    def park(self, group: str, event: Logged, reason: str) -> None:
        """As Port.park: into the topic `name`.dead."""
        self._sent(self._topic + envelope.DEAD, [(event.payload, _key(event), envelope.aside(event, reason))])
        self.commit(group, [event.position])

    def trim(self, *, before_us: int) -> int:
        """As Port.trim; when a record was received is told by its time. What no group has committed is kept."""
        return self._asked(self._trimmed(before_us // 1_000))

    def close(self) -> None:
        """As Port.close. Brokers that are away are left as they are: the group hands the work over by itself."""
        for group in list(self._readers):
            self._drop(group)
        self._drop_producer()
        self._loop.close()

    # -- private

    def _asked(self, work: Coroutine[Any, Any, _Result], *, extra_s: float = 0.0) -> _Result:
        try:
            return self._loop.run(work, timeout_s=_ANSWER_S + extra_s)
        except (KafkaError, OSError) as error:
            raise StoreError(
                f"kafka: the topic {self._topic!r} was expected to answer, found {type(error).__name__}; are the brokers up, and may this "
                "account use the topic?"
            ) from error

    def _sent(self, topic: str, records: Sequence[_Record]) -> None:
        try:
            self._asked(self._send(topic, records))
        except StoreError:
            self._drop_producer()
            raise

    def _drop_producer(self) -> None:
        producer, self._producer = self._producer, None
        if producer:
            self._asked(_stopped(producer))

    def _reader(self, group: str) -> "_Reader":
        if group not in self._readers:
            self._readers[group] = _Reader(self._edges, group)
        return self._readers[group]

    def _drop(self, group: str) -> None:
        reader = self._readers.pop(group, None)
        if reader:
            self._asked(reader.close())

    async def _send(self, topic: str, records: Sequence[_Record]) -> None:
        if self._producer is None:
            await _make(self._edges, self._topic, self._topic + envelope.DEAD)
            producer = AIOKafkaProducer(
                **_address(self._edges), acks="all", enable_idempotence=True, request_timeout_ms=int(_ANSWER_S * 700)
            )
            await producer.start()
            self._producer = producer
        sent = [await self._producer.send(topic, body, key=key, headers=_bytes(headers)) for body, key, headers in records]
        await asyncio.gather(*sent)

    async def _trimmed(self, before_ms: int) -> int:
        async with _admin(self._edges) as admin, AIOKafkaConsumer(self._topic, **_address(self._edges)) as consumer:
            partitions = [TopicPartition(self._topic, number) for number in consumer.partitions_for_topic(self._topic) or ()]
            every = [await admin.list_consumer_group_offsets(group) for group, *_ in await admin.list_consumer_groups()]
            groups = [offsets for offsets in every if not offsets.keys().isdisjoint(partitions)]
            if not groups:
                return 0
            first, last = await consumer.beginning_offsets(partitions), await consumer.end_offsets(partitions)
            young = await consumer.offsets_for_times(dict.fromkeys(partitions, before_ms))
            nothing = OffsetAndMetadata(0, "")
            floors = {
                one: min([found.offset if (found := young[one]) else last[one], *(group.get(one, nothing).offset for group in groups)])
                for one in partitions
            }
            old = {one: floor for one, floor in floors.items() if floor > first[one]}
            await admin.delete_records({one: RecordsToDelete(floor) for one, floor in old.items()})
            return sum(floor - first[one] for one, floor in old.items())


class _Reader(ConsumerRebalanceListener):
    """One member of a group, in the thread of the loop. Whatever fails in it ends it: its owner makes a new one."""

    def __init__(self, edges: EdgeSettings, group: str) -> None:
        self._edges, self._group, self._topic = edges, group, edges.name
        self._member = f"rapport-{uuid.uuid4().hex[:12]}"
        self._admin: AIOKafkaAdminClient | None = None
        self._consumer: AIOKafkaConsumer | None = None
        self._progress: dict[int, Progress] = {}
        self._held: dict[tuple[int, int], tuple[ConsumerRecord, float]] = {}  # what was given, and when it is given again
        self._heard_at = time.monotonic()

    async def close(self) -> None:
        """Leave the group, as far as the brokers let it."""
        for client in (self._consumer, self._admin):
            if client:
                await _stopped(client)

    async def read(self, max_events: int, wait_s: float) -> list[Logged]:
        """As Port.read."""
        consumer = self._consumer or await self._started()
        until = time.monotonic() + wait_s
        while True:
            records = self._due(max_events)
            fetched = {}
            if len(records) < max_events:
                wait_s = 0.0 if records else max(0.0, min(until - time.monotonic(), self._edges.takeover_s / 5))
                fetched = await consumer.getmany(timeout_ms=int(wait_s * 1_000), max_records=max_events - len(records))
            for partition, some in fetched.items():
                open_ones = (await self._progress_of(partition.partition)).see([record.offset for record in some])
                records += [record for record in some if record.offset in open_ones]
            if records:
                self._heard_at = time.monotonic()
                return await self._given(records)
            await self._check()
            if not fetched and time.monotonic() >= until:
                return []

    async def commit(self, positions: Sequence[tuple[int, int]]) -> None:
        """As Port.commit. Positions of partitions that went to another member are that one's to commit."""
        for partition, offset in positions:
            self._held.pop((partition, offset), None)
            if partition in self._progress:
                self._progress[partition].commit(offset)
        await self._saved({partition for partition, _ in positions})

    def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        """Forget what is no longer this member's; called before the next one may have it."""
        self._forget({partition.partition for partition in revoked})

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        """What is known of them is asked for with the first record."""
        self._forget({partition.partition for partition in assigned})

    # -- private

    async def _started(self) -> AIOKafkaConsumer:
        await _make(self._edges, self._topic)
        self._admin = AIOKafkaAdminClient(**_address(self._edges))
        await self._admin.start()
        session_s = _session_s(self._edges)
        self._consumer = AIOKafkaConsumer(
            **_address(self._edges),
            group_id=self._group,
            client_id=self._member,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            session_timeout_ms=int(session_s * 1_000),
            heartbeat_interval_ms=int(session_s * 250),
        )
        self._consumer.subscribe([self._topic], listener=self)
        await self._consumer.start()
        return self._consumer

    async def _progress_of(self, partition: int) -> Progress:
        if partition not in self._progress and self._admin:
            where = TopicPartition(self._topic, partition)
            found = (await self._admin.list_consumer_group_offsets(self._group, partitions=[where])).get(where)
            if found is None:
                raise GroupLoadInProgressError  # the coordinator is not ready, which must not look like a group that never read
            self._progress[partition] = Progress(max(0, found.offset), found.metadata or "")
        return self._progress[partition]

    def _due(self, count: int) -> list[ConsumerRecord]:
        """What was given before and not committed within the time of a takeover."""
        now = time.monotonic()
        return [record for record, due in self._held.values() if due <= now][:count]

    async def _given(self, records: list[ConsumerRecord]) -> list[Logged]:
        """The records as events, once it is on record that they were given; none where the partition went elsewhere meanwhile."""
        due = time.monotonic() + self._edges.takeover_s
        events = []
        for record in records:
            events.append(_logged(record, self._progress[record.partition].give(record.offset), edge=Kafka.name))
            self._held[record.partition, record.offset] = (record, due)
        return events if await self._saved({record.partition for record in records}) else []

    async def _saved(self, partitions: set[int]) -> bool:
        progress = {partition: self._progress[partition] for partition in partitions if partition in self._progress}
        offsets = {TopicPartition(self._topic, one): OffsetAndMetadata(here.offset, here.text) for one, here in progress.items()}
        try:
            if offsets and self._consumer:
                await self._consumer.commit(offsets)
        except (CommitFailedError, IllegalStateError):
            _log.info("kafka: the group was rebalanced; what was in hand goes to the partitions' next readers")
            self._forget(partitions)
            return False
        return True

    def _forget(self, partitions: set[int]) -> None:
        for partition in partitions:
            self._progress.pop(partition, None)
        for place in [place for place in self._held if place[0] in partitions]:
            del self._held[place]

    async def _check(self) -> None:
        """After a long silence: raise where records wait that do not arrive, or where the group does not know this member."""
        if self._consumer is None or self._admin is None or time.monotonic() - self._heard_at < STALL_S:
            return
        assigned = self._consumer.assignment()
        ends = await self._consumer.end_offsets(assigned) if assigned else {}
        late = [one for one, end in ends.items() if end > await self._consumer.position(one)]
        if late or not (assigned or await self._is_member()):
            raise StalledError(f"{len(late)} of {len(assigned)} partitions hold records that do not arrive")
        self._heard_at = time.monotonic()

    async def _is_member(self) -> bool:
        """Whether the group has this member, which has no partition where there are more members than partitions."""
        answers = await self._admin.describe_consumer_groups([self._group]) if self._admin else []
        return any(member[1] == self._member for answer in answers for group in answer.groups for member in group[5])


class StalledError(KafkaError):
    """A consumer that looks alive and gets nothing."""


def _logged(record: ConsumerRecord, tries: int, *, edge: str) -> Logged:
    is_the_brokers_time = record.timestamp_type == _LOG_APPEND_TIME
    return envelope.logged(
        (record.partition, record.offset),
        record.value or b"",
        {name: value.decode(errors="replace") for name, value in record.headers},
        edge=edge,
        known_as=f"kafka:{record.topic}:{record.partition}:{record.offset}",
        received_us=record.timestamp * 1_000 + 999 if is_the_brokers_time else time.time_ns() // 1_000,
        tries=tries,
    )


def _key(event: Incoming | Logged) -> bytes:
    """What decides on the partition: the events of one person stay in order."""
    return (event.subjects[0] if event.subjects else event.message_id).encode()


def _bytes(headers: dict[str, str]) -> list[tuple[str, bytes]]:
    return [(name, value.encode()) for name, value in headers.items()]


def _session_s(edges: EdgeSettings) -> float:
    return max(_MIN_SESSION_S, edges.takeover_s)


def _address(edges: EdgeSettings) -> dict[str, Any]:
    password = edges.kafka_password.get_secret_value() if edges.kafka_password else None
    return {
        "bootstrap_servers": edges.kafka_servers,
        "retry_backoff_ms": 300,
        "security_protocol": edges.kafka_security,
        "ssl_context": ssl.create_default_context() if edges.kafka_security.endswith("SSL") else None,
        "sasl_mechanism": edges.kafka_mechanism,
        "sasl_plain_username": edges.kafka_user,
        "sasl_plain_password": password,
    }


@contextlib.asynccontextmanager
async def _admin(edges: EdgeSettings) -> AsyncIterator[AIOKafkaAdminClient]:
    admin = AIOKafkaAdminClient(**_address(edges))
    await admin.start()
    try:
        yield admin
    finally:
        await _stopped(admin)


async def _stopped(client: AIOKafkaConsumer | AIOKafkaProducer | AIOKafkaAdminClient) -> None:
    """End a client; one that cannot say goodbye within a moment is left to the brokers to miss."""
    with contextlib.suppress(KafkaError, OSError, asyncio.CancelledError):  # its own tasks, cancelled, come out here
        await asyncio.wait_for(client.close() if isinstance(client, AIOKafkaAdminClient) else client.stop(), _GOODBYE_S)


async def _make(edges: EdgeSettings, *topics: str) -> None:
    """Make the topics that are not there. Where this account may not, somebody else has to; their absence shows at the next call."""
    wanted = [
        NewTopic(topic, -1, -1, replica_assignments={}, topic_configs={"message.timestamp.type": "LogAppendTime"}) for topic in topics
    ]
    async with _admin(edges) as admin:
        await admin.create_topics(wanted)
