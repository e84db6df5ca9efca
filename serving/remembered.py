"""The last good answers to customers, for when a better one cannot be had: in memory, bounded in number and in age.

In: whose it is, and what was answered. Out: the same, while it is young enough. It rests on behaviour: whoever asks for it has found, now,
that the customer allows that, and whoever finds that they do not calls `forget`. Safe from several threads.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MOST = 10_000  # customers: with lists of 50 some 10 MB
OLDEST_S = 3_600.0


@dataclass(frozen=True)
class Answered:
    """Items, best first, with their scores; the model version that ranked them; when, by the monotonic clock."""

    item_ids: Sequence[str]
    scores: Sequence[float]
    version: str
    at_s: float


class Remembered:
    """By customer."""

    def __init__(self, *, most: int = MOST, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._clock = most, clock
        self._lock = threading.Lock()
        self._answers: OrderedDict[str, Answered] = OrderedDict()  # the last kept is the last

    def keep(self, customer: str, item_ids: Sequence[str], scores: Sequence[float], version: str) -> None:
        """Remember an answer in place of the customer's last, and let go of what is too old or too much."""
        with self._lock:
            now = self._clock()
            self._answers[customer] = Answered(item_ids, scores, version, now)
            self._answers.move_to_end(customer)
            while len(self._answers) > self._most or now - next(iter(self._answers.values())).at_s > OLDEST_S:
                self._answers.popitem(last=False)

    def of(self, customer: str) -> Answered | None:
        """What was answered to a customer who is known to allow it."""
        found = self._answers.get(customer)
        return found if found is not None and self._clock() - found.at_s <= OLDEST_S else None

    def forget(self, customer: str) -> None:
        """Drop what was answered to this customer."""
        with self._lock:
            self._answers.pop(customer, None)
