"""What brokers hold -> the log. An event is acknowledged to its broker after the log's commit, so that it is in one of the two at any time.

In: messages of any program, one Segment call (or a batch of them) each. Out: events in the log, and what can never become one in its
quarantine, with the reason and the bytes. One bad event stops nobody: content that is no event is set aside at once; one whose
applying raises comes again and is set aside when the tries are used up. A log that refuses (a full disk) and a broker that is away are
waited for. Never loses an acknowledged message, and never puts a value or a name of a person into its own log.
"""

import logging
import random
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import PurePath
from typing import Protocol, TypeVar

from pipelines.errors import StoreError
from pipelines.events import REASONS
from pipelines.log.calls import BATCH, CallError, Calls, RefusedCall, parse
from pipelines.log.port import Aside, Logged, Outcome, Port
from pipelines.log.store import Log
from pipelines.settings import EdgeSettings, Settings
from pipelines.vault import Vault

POLL_S = 1.0  # how soon a stop is heeded
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
TELL_S = 60.0  # between two lines of counts
GAVE_UP = "tries_used_up"  # of events.REASONS
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_Result = TypeVar("_Result")

_log = logging.getLogger("rapport.edges")


class Edge(Port, Protocol):
    """A broker's port. `name`: redis, kafka or rabbitmq; the source of messages that name none."""

    name: str


@dataclass(frozen=True, slots=True)
class Forwarded:
    """What became of what a pump took from a broker: events by outcome, and messages or calls set aside."""

    appended: int
    duplicate: int
    erased: int
    set_aside: int


def open_edges(settings: Settings) -> list[Edge]:
    """An edge for every broker that the settings name; none of them is asked for anything yet."""
    edges, opened = settings.edges, list[Edge]()
    if edges.redis_url:
        from pipelines.edges.redis_streams import RedisStreams

        opened.append(RedisStreams(edges))
    if edges.kafka_servers:
        from pipelines.edges.kafka import Kafka

        opened.append(Kafka(edges))
    if edges.rabbitmq_url:
        from pipelines.edges.rabbitmq import RabbitMQ

        opened.append(RabbitMQ(edges))
    return opened


def forward(
    edge: Edge, log: Log, *, vault: Vault, settings: Settings, stop: threading.Event, rng: random.Random | None = None
) -> Forwarded:
    """Move events from the broker into the log until `stop` is set; what is in hand then is finished. Closes neither.

    `rng`: of the pauses between attempts, which are spread so that not everybody comes back at once.
    """
    return _Pump(edge, log, vault, settings, stop, rng or random.Random()).run()


class _Stopped(Exception):
    """The pump was told to end while the log refused."""


@dataclass(frozen=True, slots=True)
class _Opened:
    """A message and what it holds."""

    message: Logged
    calls: Calls


class _Pump:
    def __init__(self, edge: Edge, store: Log, vault: Vault, settings: Settings, stop: threading.Event, rng: random.Random) -> None:
        self.edge, self.store, self.vault, self.limits, self.stop, self.rng = edge, store, vault, settings.collect, stop, rng
        self.settings: EdgeSettings = settings.edges
        self.counts: Counter[str] = Counter()
        self.told, self.tells_at = self.counts.copy(), 0.0

    def run(self) -> Forwarded:
        pauses = _pauses(self.rng)
        while not self.stop.is_set():
            try:
                messages = self.edge.read(self.settings.group, max_events=self.settings.batch_events, wait_s=POLL_S)
                if messages:
                    self.edge.commit(self.settings.group, [message.position for message in self._applied(messages)])
            except _Stopped:
                break
            except StoreError as error:
                self._wait(pauses, error)
            else:
                pauses = _pauses(self.rng)
            if time.monotonic() >= self.tells_at:
                self._tell()
        self._tell()
        return Forwarded(*(self.counts[name] for name in (*Outcome, "set_aside")))

    def _applied(self, messages: Sequence[Logged]) -> list[Logged]:
        """The messages whose events are durable in the log now, or set aside there."""
        opened = self._appended([one for message in messages if (one := self._opened(message))])
        refused = [_aside(one.message, call) for one in opened for call in one.calls.refused]
        if refused:
            self._count(self._insisted(partial(self.store.set_aside, refused)), kept="set_aside")
        return [one.message for one in opened]

    def _opened(self, message: Logged) -> _Opened | None:
        """What a message holds; None where a defect of ours stood in the way, which may be gone when it comes again."""
        try:
            calls = self._parsed(message, message.payload, None)
        except CallError as error:
            calls = Calls([], [RefusedCall(message.payload, error.code, self._people(message))])
        except Exception as error:
            return self._failed(message, error)
        return _Opened(message, calls)

    def _parsed(self, message: Logged, body: bytes, call: str | None) -> Calls:
        received = _EPOCH + timedelta(microseconds=message.received_us)
        name, known_as = message.source, message.message_id
        return parse(body, call, source=name, received=received, vault=self.vault, limits=self.limits, message_id=known_as)

    def _people(self, message: Logged) -> tuple[str, ...]:
        """Whom a call that is none names, so that their erasure finds its bytes; as a batch of one it is read as far as it goes."""
        try:
            refused = self._parsed(message, b'{"batch":[%b]}' % message.payload, BATCH).refused
        except CallError:
            refused = []
        return tuple(dict.fromkeys(subject for call in refused for subject in call.subjects))

    def _appended(self, opened: list[_Opened]) -> list[_Opened]:
        """Those whose events are in the log now; the events of one message that raises do not keep the others out."""
        events = [event for one in opened for event in one.calls.events]
        if not events:
            return opened
        try:
            outcomes = self._insisted(partial(self.store.append, events))
        except _Stopped:
            raise
        except Exception as error:
            if len(opened) > 1:  # the halves find whose events they are
                half = len(opened) // 2
                return self._appended(opened[:half]) + self._appended(opened[half:])
            named = tuple(dict.fromkeys(subject for event in events for subject in event.subjects))
            failed = self._failed(opened[0].message, error, named)
            return [failed] if failed else []
        self._count(outcomes, kept=Outcome.APPENDED)
        return opened

    def _failed(self, message: Logged, error: Exception, people: tuple[str, ...] = ()) -> _Opened | None:
        """Leave the message with its broker, or at its last try set it aside."""
        is_last = message.tries + 1 >= self.settings.max_tries
        where = traceback.extract_tb(error.__traceback__)[-1]
        _log.error(
            "%s: applying a message raised %s at %s:%s, try %d of %d; it is %s",
            *(self.edge.name, type(error).__name__, PurePath(where.filename).name, where.lineno),
            *(message.tries + 1, self.settings.max_tries, "set aside" if is_last else "left for later"),
        )
        return _Opened(message, Calls([], [RefusedCall(message.payload, GAVE_UP, people)])) if is_last else None

    def _insisted(self, work: Callable[[], _Result]) -> _Result:
        """What the log answers; asked again for as long as it refuses. What is in hand stays there, so that no try is counted."""
        pauses = _pauses(self.rng)
        while True:
            try:
                return work()
            except StoreError as error:
                self._wait(pauses, error)
                if self.stop.is_set():
                    raise _Stopped from error

    def _count(self, outcomes: Sequence[Outcome], *, kept: str) -> None:
        self.counts.update(kept if outcome is Outcome.APPENDED else outcome.value for outcome in outcomes)

    def _wait(self, pauses: Iterator[float], error: StoreError) -> None:
        pause = next(pauses)
        _log.warning("%s: %s; goes on in %.1f s", self.edge.name, error, pause)
        self.stop.wait(pause)

    def _tell(self) -> None:
        if self.counts != self.told:
            _log.info("%s: %s", self.edge.name, ", ".join(f"{count:,} {name}" for name, count in sorted(self.counts.items())))
            self.told, self.tells_at = self.counts.copy(), time.monotonic() + TELL_S


def _aside(message: Logged, call: RefusedCall) -> Aside:
    reason = call.reason if call.reason in REASONS else "too_long"
    return Aside(message.source, call.raw, reason, call.subjects, message.message_id)


def _pauses(rng: random.Random) -> Iterator[float]:
    """Seconds between attempts: doubling, spread over the upper half, never longer than the longest."""
    pause = FIRST_PAUSE_S
    while True:
        yield pause * rng.uniform(0.5, 1.0)
        pause = min(2 * pause, LONGEST_PAUSE_S)
