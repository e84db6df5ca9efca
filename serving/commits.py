"""Requests on an event loop -> groups for the log's writer, and back: who waits is told once its events are on disk.

In: the events of single requests. Out: their outcomes. One hand-over to the writer's thread a round of the loop and one wake-up a
commit, however many requests wait: that is most of what a single event costs. Never holds more events than it may.
"""

import asyncio
import contextlib
import functools
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import accumulate

from pipelines.errors import StoreError
from pipelines.log import Incoming, Outcome, QueueFull, Writer
from pipelines.settings import CollectSettings


class Commits:
    """Between one event loop and one writer."""

    def __init__(self, writer: Writer, limits: CollectSettings, *, timeout_s: float) -> None:
        self.writer, self._timeout_s = writer, timeout_s
        self._group_events, self._queue_events = limits.group_events, limits.queue_events
        self._arrived: list[_Request] = []  # in this round of the loop
        self._written: deque[tuple[_Group, Future[list[Outcome]]]] = deque()
        self._held = 0  # events that arrived and are not settled
        self._is_waking = False

    async def kept(self, events: Sequence[Incoming]) -> list[Outcome]:
        """What became of the events, once they are on disk. Raises QueueFull, StoreError, and TimeoutError where that is not known."""
        if self._held + len(events) > self._queue_events:
            raise QueueFull
        loop = asyncio.get_running_loop()
        if not self._arrived:
            loop.call_soon(self._hand_over, loop)
        request = _Request(events, loop.create_future())
        self._arrived.append(request)
        self._held += len(events)
        return await request.outcomes

    def _hand_over(self, loop: asyncio.AbstractEventLoop) -> None:
        arrived, self._arrived = self._arrived, []
        while arrived:
            ends = accumulate(len(request.events) for request in arrived)
            n = max(1, sum(end <= self._group_events for end in ends))
            self._submit(arrived[:n], loop)
            arrived = arrived[n:]

    def _submit(self, requests: "list[_Request]", loop: asyncio.AbstractEventLoop) -> None:
        group = _Group(requests, loop.call_later(self._timeout_s, _expire, requests))
        try:
            future = self.writer.submit([event for request in requests for event in request.events])
        except Exception as error:
            self._settle(group, error)
        else:
            future.add_done_callback(functools.partial(self._wake, loop, group))

    def _wake(self, loop: asyncio.AbstractEventLoop, group: "_Group", future: "Future[list[Outcome]]") -> None:
        """On the writer's thread."""
        self._written.append((group, future))
        if not self._is_waking:
            self._is_waking = True
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it everybody who waited
                loop.call_soon_threadsafe(self._settle_written)

    def _settle_written(self) -> None:
        self._is_waking = False  # first: what is written from here on wakes the loop again
        while self._written:
            group, future = self._written.popleft()
            error = future.exception()
            if error is None or isinstance(error, StoreError) or len(group.requests) == 1:
                self._settle(group, error or future.result())
                continue
            group.timer.cancel()
            for request in group.requests:  # one that cannot be written fails alone
                self._submit([request], asyncio.get_running_loop())

    def _settle(self, group: "_Group", found: list[Outcome] | BaseException) -> None:
        group.timer.cancel()
        at = 0
        for request in group.requests:
            n = len(request.events)
            self._held -= n
            if not request.outcomes.done():
                if isinstance(found, BaseException):
                    request.outcomes.set_exception(found)
                else:
                    request.outcomes.set_result(found[at : at + n])
            at += n


@dataclass(frozen=True, slots=True)
class _Request:
    events: Sequence[Incoming]
    outcomes: "asyncio.Future[list[Outcome]]"


@dataclass(frozen=True, slots=True)
class _Group:
    requests: list[_Request]
    timer: asyncio.TimerHandle


def _expire(requests: list[_Request]) -> None:
    for request in requests:
        if not request.outcomes.done():
            request.outcomes.set_exception(TimeoutError())
