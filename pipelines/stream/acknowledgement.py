"""What the stream applied -> the log, told beside the stream: the flushes that come before it hold up no call.

In: positions whose results are committed. Out: the log knows them, once they outlive a loss of power. What could not be told stays, is
said where it is next begun, and is told again. Never tells what is not flushed.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from pipelines.log import Position

EVERY_S = 3.0  # between two times, where calls may come: each costs several flushes of a disk that calls need too


class Acknowledgement:
    """Of one worker; called from its thread. `tell`: makes what was applied durable and tells the log, from any thread."""

    def __init__(self, tell: Callable[[Sequence[Position]], None]) -> None:
        self._tell = tell
        self._applied: list[Position] = []  # and the log does not know
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="acknowledgement")
        self._running: tuple[Future[None], int] | None = None  # and of how many of them
        self._begun_s = 0.0

    def add(self, positions: Sequence[Position]) -> None:
        """These were applied."""
        self._applied += positions

    def due_s(self) -> float:
        """How long until it should begin; infinite where there is nothing to tell."""
        return max(0.0, self._begun_s + EVERY_S - time.monotonic()) if self._applied else float("inf")

    def begin(self) -> None:
        """Tell what there is beside the caller, unless that goes on already. Raises the StoreError of the time before."""
        if self._running is not None and not self._running[0].done():
            return
        self._end()
        self._begun_s = time.monotonic()
        if self._applied:
            self._running = self._thread.submit(self._tell, list(self._applied)), len(self._applied)

    def finish(self) -> None:
        """Tell all there is, and wait for it. Raises StoreError."""
        self._end()
        self._begun_s = time.monotonic()
        if self._applied:
            self._tell(self._applied)
            self._applied = []

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    def _end(self) -> None:
        if self._running is not None:
            (future, told), self._running = self._running, None
            future.result()
            del self._applied[:told]
