"""What a log of events is: five calls, and the types that they exchange. The SQLite log and every broker's edge keep to it.

Delivery is at least once and events are applied once: whoever applies them knows them by (source, message id). An event that was
read is held by its reader, and nobody is given it again, until the reader commits it, closes, or dies; a reader that calls nothing
for `settings.edges.takeover_s` counts as dead once another one asks. Then whoever reads next gets it, with one try more. Commits
come in any order, may be repeated, and count even from a reader that was thought dead. Declares; does nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

Position = int | str | tuple[int, int]  # where an event stands: of the log, of a stream entry, of a partition and its offset


class Outcome(StrEnum):
    """What became of an event that was offered. All three are an answer of success to whoever sent it."""

    APPENDED = "appended"
    DUPLICATE = "duplicate"  # its (source, message id) was here before
    ERASED = "erased"  # it is about an erased person and was not kept


@dataclass(frozen=True, slots=True)
class Incoming:
    """An event at the door. `payload`: one Segment call as JSON, with `messageId` and `receivedAt`."""

    source: str
    message_id: str
    subjects: tuple[str, ...]  # pseudonyms of everybody it names; the first one's key seals it; () for nobody
    payload: bytes
    received_us: int  # microseconds since 1970, UTC


@dataclass(frozen=True, slots=True)
class Logged:
    """An event as it is read. `tries`: how often this group was given it before, without a commit."""

    position: Position
    source: str
    subjects: tuple[str, ...]
    payload: bytes
    received_us: int
    tries: int
    message_id: str = ""  # the name under which it is known where its payload carries none; empty: the payload does


@dataclass(frozen=True, slots=True)
class Aside:
    """Bytes at the door that are no event. `reason`: of events.REASONS; `subjects`: as of an event."""

    source: str
    raw: bytes
    reason: str
    subjects: tuple[str, ...] = ()
    message_id: str = ""  # under which whoever brings them would bring them again; empty: the bytes say it


class Port(Protocol):
    """A log of events, seen by one consumer. Raises StoreError where the disk or the broker refuses."""

    def append(self, events: Sequence[Incoming]) -> list[Outcome]:
        """Keep the events; they are durable when this returns. One outcome for each, in order."""

    def read(self, group: str, *, max_events: int, wait_s: float = 0.0) -> list[Logged]:
        """The next events that nobody of the group holds or has committed, oldest first; none if nothing came within `wait_s`."""

    def commit(self, group: str, positions: Sequence[Position]) -> None:
        """These events need not be given to the group again."""

    def park(self, group: str, event: Logged, reason: str) -> None:
        """Set an event aside, with a code of events.REASONS, and commit it: it stops nobody and is not lost."""

    def trim(self, *, before_us: int) -> int:
        """Forget events received before, which every group has committed; returns how many. Their ids stay known.

        Some may stay longer, where the log forgets by larger parts. A log that no group has begun to read forgets nothing; a group
        that begins later holds nothing back.
        """

    def close(self) -> None:
        """Give everything back; what was read and not committed goes to the next reader."""
