"""Events at the door -> rows on disk, each once, none of an erased person.

In: events of the port. Out: one outcome for each, after the commit. Keys of new people are on disk before the rows that they seal.
Never answers before the commit, and keeps nothing of a call that failed.
"""

import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipelines.errors import StoreError
from pipelines.log import bell
from pipelines.log.catalogue import Catalogue
from pipelines.log.connection import Connect, refusal, writing
from pipelines.log.port import Incoming, Outcome
from pipelines.log.segments import Segment, checksum_of, digest_of
from pipelines.vault import NOBODY, Vault

SEGMENT_EVENTS = 2_000_000  # a segment is closed at this size too: its index of ids then still fits into memory
_HOUR_US = 3_600_000_000

Row = tuple[str, str, int, int, bytes]  # source, subjects, received_us, checksum, sealed


class Intake:
    """The appending side of a log. Safe to use from several threads and processes."""

    def __init__(self, folder: Path, vault: Vault, *, connect: Connect, clock: Callable[[], int], segment_hours: int) -> None:
        self._folder, self._vault, self._clock = folder, vault, clock
        self._segment_us = segment_hours * _HOUR_US
        self._lock = threading.Lock()
        self._catalogue = Catalogue(folder, connect)
        self._number = 0
        self._segment: Segment | None = None

    def close(self) -> None:
        """Close the files; waits for the append that is going on."""
        with self._lock:
            if self._segment:
                self._segment.close()
            self._catalogue.close()

    def append(self, events: Sequence[Incoming]) -> list[Outcome]:
        """As Port.append. Raises LogFull, StoreError; then none of these events was kept."""
        digests = [digest_of(event.source, event.message_id) for event in events]
        named = sorted({subject for event in events for subject in event.subjects})
        rows = self._rows(events, self._vault.entombed(named))
        outcomes = self._kept(events, digests, rows, named)
        bell.ring(self._folder)
        return outcomes

    def _kept(self, events: Sequence[Incoming], digests: list[bytes], rows: list[Row | None], named: Sequence[str]) -> list[Outcome]:
        with self._lock:
            self._catalogue.copy_ids()
            while True:
                segment = self._newest()
                with writing(segment.db, segment.path):
                    if not segment.head().is_closed:
                        # asked only now: an erasure that comes later finds these rows, one that came before is seen
                        return self._add(segment, events, digests, rows, self._vault.entombed(named))
                self._catalogue.roll(self._number, now_us=self._clock())

    def _rows(self, events: Sequence[Incoming], erased: frozenset[str]) -> list[Row | None]:
        """The events sealed; None for one of an erased person, who gets no new key."""
        kept = [event for event in events if erased.isdisjoint(event.subjects)]
        with vault_errors(self._vault):
            sealed = iter(self._vault.seal([sealer(event.subjects) for event in kept], [event.payload for event in kept]))
        return [_row(event, next(sealed)) if erased.isdisjoint(event.subjects) else None for event in events]

    def _newest(self) -> Segment:
        number = self._catalogue.newest()
        if number == self._number and self._is_due():
            self._catalogue.roll(number, now_us=self._clock())
            number = self._catalogue.newest()
        if number != self._number or self._segment is None:
            if self._segment:
                self._segment.close()
            self._segment = None
            self._segment, self._number = self._catalogue.segment(number), number
        return self._segment

    def _is_due(self) -> bool:
        if self._segment is None:
            return False
        head = self._segment.head()
        size = head.last - head.first + 1
        return size > 0 and (size >= SEGMENT_EVENTS or abs(self._clock() - head.started_us) >= self._segment_us)

    def _add(
        self, segment: Segment, events: Sequence[Incoming], digests: list[bytes], rows: list[Row | None], erased: frozenset[str]
    ) -> list[Outcome]:
        taken = segment.known(digests) | self._catalogue.known(digests)
        outcomes, fresh, kept = [], [], []
        for event, digest, row in zip(events, digests, rows, strict=True):
            if digest in taken:
                outcomes.append(Outcome.DUPLICATE)
                continue
            taken.add(digest)
            fresh.append(digest)
            if row is None or not erased.isdisjoint(event.subjects):
                outcomes.append(Outcome.ERASED)
            else:
                outcomes.append(Outcome.APPENDED)
                kept.append(row)
        counts = Counter((event.source, outcome.value) for event, outcome in zip(events, outcomes, strict=True))
        segment.add(fresh, kept, [(*place, number) for place, number in counts.items()], now_us=self._clock())
        return outcomes


def sealer(subjects: Sequence[str]) -> str:
    """Whose key seals the bytes that name these subjects."""
    return subjects[0] if subjects else NOBODY


@contextmanager
def vault_errors(vault: Vault) -> Iterator[None]:
    """A full disk is LogFull, whichever of the two files it stops."""
    try:
        yield
    except StoreError as error:
        if isinstance(error.__cause__, sqlite3.Error):
            raise refusal(vault.path, error.__cause__) from error
        raise


def _row(event: Incoming, sealed: bytes) -> Row:
    subjects = " ".join(event.subjects)
    return event.source, subjects, event.received_us, checksum_of(event.source, subjects, event.received_us, sealed), sealed
