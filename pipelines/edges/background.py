"""An event loop in a thread of its own, for clients that know only asyncio behind a port that does not. Never outlives `close`."""

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError
from typing import Any, TypeVar

_Result = TypeVar("_Result")


class Background:
    """Runs coroutines one after the other for its caller, while the tasks that they started go on between the calls."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, _Result], *, timeout_s: float) -> _Result:
        """What the coroutine returns or raises. Raises TimeoutError, and cancels it, when it takes longer; ConnectionAbortedError
        where a client gave it up, as they do when a connection ends under them.
        """
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout_s)
        except TimeoutError:
            future.cancel()
            raise
        except CancelledError:
            raise ConnectionAbortedError("the client gave up") from None

    def close(self) -> None:
        """Cancel what still runs, and end the thread. A second time does nothing."""
        if self._loop.is_closed():
            return
        with contextlib.suppress(TimeoutError):
            self.run(_cancel_all(), timeout_s=5.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5.0)
        if not self._loop.is_running():
            self._loop.close()


async def _cancel_all() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
