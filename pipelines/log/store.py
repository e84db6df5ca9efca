"""The durable event log: SQLite files under `home/log/`, written with FULL synchronisation, read by groups.

`log.db` holds the catalogue, the ids of closed segments, the groups and what was set aside; `segments/*.db` the events, sealed with
the keys of their people. One segment at a time is appended to; it is closed after some hours and unlinked as a whole when every
group has done it and it is older than the retention. Safe to use from several threads and several processes of one machine.
Never answers before a commit is on disk, never gives an event of an erased person, never forgets an id.
"""

import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from pipelines.log import connection, upkeep
from pipelines.log.catalogue import Catalogue
from pipelines.log.connection import Connect
from pipelines.log.intake import Intake
from pipelines.log.port import Aside, Incoming, Logged, Outcome, Position
from pipelines.log.readers import PARKED, Readers
from pipelines.settings import Settings
from pipelines.vault import Vault, open_vault

_POLLS_S = (0.001, 0.02)  # between two looks for new events: at first, and at most


@dataclass(frozen=True, slots=True)
class LogCounts:
    """What became of the events offered since ever. `parked`: set aside afterwards, or at the door."""

    appended: int
    duplicate: int
    erased: int  # of people erased before
    parked: int


@dataclass(frozen=True, slots=True)
class GroupCounts:
    """Where a group stands: events appended = committed + parked + erased + pending, at every moment.

    `committed`: with what was forgotten before the group began. `parked`: by this group. `erased`: taken out by an erasure.
    """

    committed: int
    parked: int
    erased: int
    pending: int


@dataclass(frozen=True, slots=True)
class Parked:
    """Something set aside. `payload`: None where its key is gone or its bytes are damaged. `tries`: how often it had been given."""

    id: int
    source: str
    subjects: tuple[str, ...]
    payload: bytes | None
    reason: str
    tries: int
    received_us: int


class Log:
    """A Port on SQLite. `close` it at the end."""

    def __init__(
        self,
        folder: Path,
        vault: Vault,
        *,
        segment_hours: int,
        takeover_s: float,
        consumer: str = "",
        closes_vault: bool = False,
        connect: Connect = connection.connect,
        clock: Callable[[], int] = lambda: time.time_ns() // 1_000,
        uptime: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """`consumer`: the name of this reader, which no other living one bears; it may take up again at once what it held before
        a restart. `clock`: microseconds since 1970; `uptime`: nanoseconds, the same for all processes of the machine.
        """
        self.folder, self.vault = folder, vault
        self._connect, self._clock = connect, clock
        self._intake = Intake(folder, vault, connect=connect, clock=clock, segment_hours=segment_hours)
        owner = consumer or secrets.token_hex(8)
        self._readers = Readers(folder, vault, connect=connect, owner=owner, takeover_s=takeover_s, uptime=uptime)
        self._closes_vault = closes_vault

    # -- the port

    def append(self, events: Sequence[Incoming]) -> list[Outcome]:
        """As Port.append. Raises LogFull, StoreError; then nothing of this call was kept."""
        return self._intake.append(events) if events else []

    def read(self, group: str, *, max_events: int, wait_s: float = 0.0) -> list[Logged]:
        """As Port.read. Payloads are opened; an event whose key is gone is counted as erased, a damaged one is parked as `damaged`."""
        end, pause = time.monotonic() + wait_s, _POLLS_S[0]
        while True:
            events = self._readers.take(group, max_events)
            left = end - time.monotonic()
            if events or left <= 0:
                return events
            time.sleep(min(pause, left))
            pause = min(2 * pause, _POLLS_S[1])

    def commit(self, group: str, positions: Sequence[Position]) -> None:
        """As Port.commit; in any order, and more than once."""
        if positions:
            self._readers.commit(group, positions)

    def park(self, group: str, event: Logged, reason: str) -> None:
        """As Port.park; see `parked`."""
        self._readers.park(group, event, reason)

    def trim(self, *, before_us: int) -> int:
        """As Port.trim, by whole segments: an event goes with the youngest of its segment."""
        with closing(Catalogue(self.folder, self._connect)) as catalogue:
            return upkeep.trim(catalogue, before_us=before_us, now_us=self._clock())

    def close(self) -> None:
        """As Port.close."""
        self._readers.close()
        self._intake.close()
        if self._closes_vault:
            self.vault.close()

    # -- beyond the port

    def release(self, group: str) -> None:
        """Give back what was read and not committed: the next read, of this reader or another, gets it again, with a try more."""
        self._readers.release(group)

    def subjects(self, positions: Sequence[Position]) -> dict[int, tuple[str, ...]]:
        """Whom the events at these positions name; without those that are gone. Opens nothing."""
        return self._readers.subjects([position for position in positions if isinstance(position, int)])

    def look(self, positions: Sequence[Position]) -> list[Logged]:
        """The events at these positions once more, for no group; without those that are gone."""
        return self._readers.look([position for position in positions if isinstance(position, int)])

    def last(self) -> int:
        """The position of the newest event."""
        return self._readers.last()

    def pending(self, group: str) -> int:
        """Events that the group has not done."""
        return self._readers.group(group)[1]

    def group_counts(self, group: str) -> GroupCounts:
        """Where the group stands."""
        found, pending = self._readers.group(group)
        return GroupCounts(found.committed, found.parked, found.erased, pending)

    def counts(self) -> LogCounts:
        """Totals since ever."""
        counts = self._readers.counts()

        def total(outcome: str) -> int:
            return sum(events for (_, name), events in counts.items() if name == outcome)

        return LogCounts(total(Outcome.APPENDED), total(Outcome.DUPLICATE), total(Outcome.ERASED), total(PARKED))

    def set_aside(self, refused: Sequence[Aside]) -> list[Outcome]:
        """Park bytes at the door that are no event, all in one commit; each once, however often they are brought. One outcome for each."""
        return self._readers.set_aside(refused, received_us=self._clock()) if refused else []

    def count_parked(self) -> int:
        """How many things `parked` would give, all together."""
        return self._readers.count_parked()

    def parked(self, limit: int) -> list[Parked]:
        """What was set aside first."""
        return [
            Parked(row.id, row.source, row.subjects, payload, row.reason, row.tries, row.received_us)
            for row, payload in self._readers.parked(limit)
        ]

    def drop_parked(self, ids: Sequence[int]) -> int:
        """These are kept elsewhere now, or not wanted; returns how many there were."""
        return self._readers.drop_parked(ids)

    def remove(self, subjects: Sequence[str]) -> int:
        """Take out every event and everything set aside that names any of these people; returns how many. Entomb them first."""
        with closing(Catalogue(self.folder, self._connect)) as catalogue:
            return upkeep.remove(catalogue, subjects)

    def checkpoint(self) -> None:
        """Empty the write-ahead logs into their files. Raises StoreError where another reader keeps one in use."""
        with closing(Catalogue(self.folder, self._connect)) as catalogue:
            upkeep.checkpoint(catalogue)


def open_log(
    home: Path, *, settings: Settings, vault: Vault | None = None, consumer: str = "", connect: Connect = connection.connect
) -> Log:
    """The log of the home; made on first use. Opens the home's vault where none is given. Raises LogFull, StoreError."""
    return Log(
        home / "log",
        vault or open_vault(home, master=settings.master_key),
        segment_hours=settings.collect.segment_hours,
        takeover_s=settings.edges.takeover_s,
        consumer=consumer,
        closes_vault=vault is None,
        connect=connect,
    )
