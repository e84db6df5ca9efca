"""A stream on a scratch home, at the pace of a clock that is told what time it is.

In: calls and instants. Out: the online store as it stands at each of them. Everything is the real thing: the log, the vault, who is
who, the worker. Never waits for the wall clock.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipelines.errors import StoreError
from pipelines.identity.online import Online
from pipelines.log import Incoming, Log, open_log
from pipelines.settings import Settings
from pipelines.stream import GROUP, Stream
from pipelines.vault import open_vault

OpenStream = Callable[..., Any]
MOST_STEPS = 10_000  # without an end, for what one clock and one log can ask of a worker


class Killed(BaseException):
    """The worker ends here, as a kill would end it: between the online store and the log."""


class Rehearsal:
    """One home, one worker. `close` it at the end. `open_stream`: makes the worker."""

    def __init__(self, settings: Settings, *, now_us: int = 0, open_stream: OpenStream = Stream) -> None:
        self.home: Path = settings.home
        self.settings, self.now_us, self._open_stream = settings, now_us, open_stream
        self.vault = open_vault(self.home, master=settings.master_key)
        self.log = _Log(open_log(self.home, settings=settings, vault=self.vault, consumer="stream"))
        self._start()

    def tell(self, calls: Sequence[Incoming], *, at_us: int) -> None:
        """These calls come in, and it is that time; time never goes back, so they may come late."""
        self.log.append(calls)
        self.advance(at_us)

    def advance(self, to_us: int) -> None:
        """It is that time, unless it was later already; all that came or expired is applied. Raises StoreError where that has no end."""
        self.now_us = max(self.now_us, to_us)
        for _ in range(MOST_STEPS):
            done = self.stream.step()
            if not done.read and not done.expired:
                return
        raise StoreError(
            f"parity: the stream still had something to do after {MOST_STEPS} steps at one instant; its state cannot be judged"
        )

    def kill(self, calls: Sequence[Incoming] = (), *, at_us: int = 0) -> None:
        """The worker dies: after it has written what follows from these calls, and before it has said so. A new one takes over."""
        self.log.is_cut = True
        with suppress(Killed):  # without calls there is nothing to say, and it dies idle
            self.tell(calls, at_us=at_us)
        self.log.is_cut = False
        self.log.release(GROUP)
        self._start()

    def close(self) -> None:
        """Let everything go."""
        self.stream.close()
        self.linker.close()
        self.log.close()
        self.vault.close()

    def _start(self) -> None:
        # the one before is not closed: nobody closes what is killed
        self.linker = Online(self.home, vault=self.vault)
        self.stream = self._open_stream(
            self.home, settings=self.settings, vault=self.vault, log=self.log, linker=self.linker, now_us=lambda: self.now_us
        )


class _Log:
    """The log, which can be cut off before a commit."""

    def __init__(self, log: Log) -> None:
        self._log, self.is_cut = log, False

    def commit(self, group: str, positions: Sequence[Any]) -> None:
        """As the log's."""
        if self.is_cut:
            raise Killed
        self._log.commit(group, positions)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)
