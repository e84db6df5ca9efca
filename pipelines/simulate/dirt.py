"""Messages -> the lines that arrive: each message once, some of them late, some of them again, and malformed lines between.

How much of each was planted is known, so that an ingestion can be held to the number.
"""

from dataclasses import dataclass

import numpy as np

from pipelines.simulate import draws
from pipelines.simulate.messages import IDENTIFY, Messages
from pipelines.simulate.shop import Shop

NORMAL, REPEATED = 0, 1
MALFORMED = ("broken_json", "no_message_id", "bad_timestamp", "negative_quantity", "unknown_type", "no_identifier")

_LATE, _REPEATED, _MALFORMED = 0.01, 0.01, 0.005  # shares of the messages
_LATE_HOURS = (1, 71)  # at least, at most more
_HOUR_MS = 3_600_000
_TRANSIT_MS = (1_000, 500)  # below the shortest pause: what was done is known before the next thing is
_RETRY_MS = 600_000


@dataclass(frozen=True)
class Lines:
    """One row per line of the file, in the file's order, that of arrival. Arrays of (n_lines,)."""

    message: np.ndarray  # index into Messages
    flavour: np.ndarray  # NORMAL, REPEATED or 2 + index into MALFORMED
    received_ms: np.ndarray
    is_late: np.ndarray  # first arrivals only


def plant(shop: Shop, messages: Messages) -> Lines:
    """The lines that had arrived by the log's end."""
    key = messages.key
    late = (draws.uniform(key, 3) < _LATE) & (messages.code != IDENTIFY)
    received = messages.time_ms + np.where(late, _delay(key), _between(_TRANSIT_MS, key, 2))
    again = np.flatnonzero(draws.uniform(key, 5) < _REPEATED)
    retried = received[again] + 1_000 + np.rint(draws.exponential(key[again], 6) * _RETRY_MS).astype(np.int64)
    bad = np.flatnonzero(draws.uniform(key, 7) < _MALFORMED)
    kind = 2 + np.floor(draws.uniform(key[bad], 8) * len(MALFORMED)).astype(np.int64)
    message = np.concatenate([np.arange(len(key)), again, bad])
    flavour = np.concatenate([np.full(len(key), NORMAL), np.full(len(again), REPEATED), kind])
    received = np.concatenate([received, retried, received[bad] + 1])
    order = np.lexsort((flavour, key[message], received))
    order = order[received[order] <= shop.end_ms]
    return Lines(message[order], flavour[order], received[order], late[message[order]] & (flavour[order] == NORMAL))


def _delay(key: np.ndarray) -> np.ndarray:
    return _between((_LATE_HOURS[0] * _HOUR_MS, _LATE_HOURS[1] * _HOUR_MS), key, 4)


def _between(bounds: tuple[int, int], key: np.ndarray, counter: int) -> np.ndarray:
    return np.asarray(bounds[0] + np.rint(draws.uniform(key, counter) * bounds[1]).astype(np.int64))
