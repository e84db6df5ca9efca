"""Many submitters -> few commits: events that wait while a commit is on its way to the disk go into the next one together.

In: events from any thread. Out: a future for each submission, with one outcome per event, after the commit that holds them. A busy
disk makes larger groups, an idle one makes none wait. Never holds more than its bound, and never answers before the commit.
"""

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future

from pipelines.errors import StoreError
from pipelines.log.port import Incoming, Outcome
from pipelines.log.store import Log

_Submission = tuple[list[Incoming], "Future[list[Outcome]]"]


class QueueFull(Exception):
    """More events wait for a commit than may; whoever sends should come back later."""


class Writer:
    """One thread that appends to a log in groups. `close` it before the log."""

    def __init__(self, log: Log, *, group_events: int, queue_events: int) -> None:
        self._log, self._group_events, self._queue_events = log, group_events, queue_events
        self._waiting: deque[_Submission] = deque()
        self._events = 0
        self._is_closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    def submit(self, events: Sequence[Incoming]) -> "Future[list[Outcome]]":
        """One outcome for each event once all are on disk. The future raises LogFull or StoreError; then none of them was kept.

        Raises QueueFull where too many events wait, or the writer is closed.
        """
        future: Future[list[Outcome]] = Future()
        if not events:
            future.set_result([])
            return future
        with self._changed:
            if self._is_closing or self._events + len(events) > self._queue_events:
                raise QueueFull(
                    f"{self._events} events wait for a commit, and {self._queue_events} may; send these {len(events)} again later"
                )
            self._waiting.append((list(events), future))
            self._events += len(events)
            self._changed.notify()
        return future

    @property
    def waiting(self) -> int:
        """Events that wait for a commit."""
        return self._events

    def close(self) -> None:
        """Write what waits, and end. Everything submitted before has its answer when this returns."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while group := self._next():
            running = [(events, future) for events, future in group if future.set_running_or_notify_cancel()]
            try:
                _answer(running, self._log.append([event for events, _ in running for event in events]))
            except StoreError as error:
                _refuse(running, error)
            except Exception:
                self._singly(running)  # one submission that cannot be written fails alone

    def _next(self) -> list[_Submission]:
        """The submissions of the next group; empty at the end."""
        with self._changed:
            while not self._waiting and not self._is_closing:
                self._changed.wait()
            group: list[_Submission] = []
            events = 0
            while self._waiting and (not group or events + len(self._waiting[0][0]) <= self._group_events):
                group.append(self._waiting.popleft())
                events += len(group[-1][0])
            self._events -= events
            return group

    def _singly(self, group: list[_Submission]) -> None:
        for submission in group:
            try:
                _answer([submission], self._log.append(submission[0]))
            except Exception as error:
                _refuse([submission], error)


def _answer(group: list[_Submission], outcomes: list[Outcome]) -> None:
    at = 0
    for events, future in group:
        future.set_result(outcomes[at : at + len(events)])
        at += len(events)


def _refuse(group: list[_Submission], error: BaseException) -> None:
    for _, future in group:
        future.set_exception(error)
