"""What was found for customers, for a while: in memory, bounded in number and in age.

In: whose it is, and what was found. Out: the same, while it is young enough. It rests on behaviour: whoever asks for it has found, now,
that the customer allows that, and whoever finds that they do not calls `forget`. Safe from several threads.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Remembered(Generic[T]):
    """The last of each key, of `most` keys at most, until it is older than `oldest_s`; 0 remembers nothing."""

    def __init__(self, *, most: int, oldest_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._oldest_s, self._clock = most, oldest_s, clock
        self._lock = threading.Lock()
        self._found: OrderedDict[Hashable, tuple[T, float]] = OrderedDict()  # the last kept is the last

    def keep(self, key: Hashable, found: T) -> None:
        """Remember it in place of the key's last, and let go of what is too old or too much."""
        with self._lock:
            now = self._clock()
            self._found[key] = found, now
            self._found.move_to_end(key)
            while len(self._found) > self._most or (self._found and now - next(iter(self._found.values()))[1] >= self._oldest_s):
                self._found.popitem(last=False)

    def of(self, key: Hashable) -> T | None:
        """What was last kept under the key, while it is young enough."""
        found, at_s = self._found.get(key) or (None, 0.0)
        return found if found is not None and self._clock() - at_s < self._oldest_s else None

    def forget(self, *keys: Hashable) -> None:
        """Drop what is kept under these keys."""
        with self._lock:
            for key in keys:
                self._found.pop(key, None)

    def clear(self) -> None:
        """Forget everybody."""
        with self._lock:
            self._found.clear()
