"""The log as its groups read it: what comes next, what is done, what was set aside.

In: names of groups. Out: opened events. An event whose key is gone, or that an erasure took out, is passed over and counted as
erased; one whose bytes are damaged is set aside as `damaged`. Never skips an event otherwise, and never appends.
"""

import hashlib
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import StoreError
from pipelines.log import groups, parking
from pipelines.log.catalogue import Catalogue
from pipelines.log.connection import Connect, LogFull, reading, translated, writing
from pipelines.log.intake import sealer, vault_errors
from pipelines.log.port import Aside, Logged, Outcome, Position
from pipelines.log.segments import Row, Segment, add_counts
from pipelines.vault import Vault

PARKED = "parked"  # beside the outcomes, in the counts
DAMAGED = "damaged"  # of events.REASONS
_KEPT = Outcome.APPENDED
_RENEWALS = 3  # in the time of a takeover, by a reader that finds nothing to read


@dataclass
class _Hold:
    """What this reader holds of a group: its turn, the last position it was given, and when it last said that it lives."""

    turn: int
    after: int
    renewed_ns: int
    is_noted: bool = True  # on disk; a full disk does not stop reading


class Readers:
    """The reading side of a log, for one consumer. Safe to use from several threads."""

    def __init__(self, folder: Path, vault: Vault, *, connect: Connect, owner: str, takeover_s: float, uptime: Callable[[], int]) -> None:
        self._vault, self._owner, self._uptime = vault, owner, uptime
        self._takeover_ns = int(takeover_s * 1e9)
        self._lock = threading.Lock()
        self._holds: dict[str, _Hold] = {}
        self._open: dict[int, Segment] = {}
        self.catalogue = Catalogue(folder, connect)
        with self._writing() as db:
            for statement in f"{groups.SCHEMA};{parking.SCHEMA}".split(";"):
                db.execute(statement)

    def close(self) -> None:
        """Give back every group, and close the files."""
        for name in list(self._holds):
            with suppress(StoreError):  # a full disk: the turn ends by silence
                self.release(name)
        with self._lock:
            for segment in self._open.values():
                segment.close()
            self.catalogue.close()

    # -- what comes next

    def take(self, name: str, limit: int) -> list[Logged]:
        """The next events for this reader; none if there are none, or if another one of the group reads."""
        with self._lock:
            while (hold := self._held(name)) and (rows := self._fetch(hold.after, limit)):
                events = self._give(name, hold, rows)
                if events:
                    return events
            return []

    def commit(self, name: str, positions: Sequence[Position]) -> None:
        """These are done. Raises ValueError for a position that the group was never given.

        A loss of power may take this, until anything durable follows, such as what trims the log: then they are given again.
        """
        whole = [_whole(position) for position in positions]
        with self._lock, self._writing(is_durable=False) as db:
            if max(whole) > groups.furthest(db, name):
                raise ValueError(f"log: position {max(whole)} was never given to the group {name!r}; it comes from another log")
            self._settle(name, whole, "committed")
            if name in self._holds:
                groups.renew(db, name, self._holds[name].turn, now_ns=self._uptime())

    def release(self, name: str) -> None:
        """Give back what this reader holds of the group: the next read, of anyone, starts at the first event that is not done."""
        with self._lock:
            hold = self._holds.pop(name, None)
            if hold:
                with self._writing() as db:
                    if groups.renew(db, name, hold.turn, now_ns=self._uptime()):
                        groups.lease(db, name, None, now_ns=0)

    def group(self, name: str) -> tuple[groups.Group, int]:
        """The group, begun or not, and how many events it has not done."""
        with self._lock, reading(self.catalogue.db, self.catalogue.path) as db:  # one state: watermark and done go together
            places = self.catalogue.places()
            found = groups.find(db, name) or groups.unbegun(places[0].first - 1)
            return found, self._segment(places[-1].number).head().last - found.watermark - len(groups.done(db, name))

    def last(self) -> int:
        """The newest position; that before the first where nothing came yet."""
        with self._lock, reading(self.catalogue.db, self.catalogue.path):
            return self._segment(self.catalogue.places()[-1].number).head().last

    def subjects(self, positions: Sequence[int]) -> dict[int, tuple[str, ...]]:
        """Whom the events at these positions name, whatever any group has done with them; without those that are gone."""
        with self._lock:
            return {position: names for segment, some in self._parted(positions) for position, names in segment.subjects(some).items()}

    def look(self, positions: Sequence[int]) -> list[Logged]:
        """The events at these positions, opened, whatever any group has done with them; without those that are gone."""
        with self._lock:
            rows = [row for segment, some in self._parted(positions) for row in segment.at(some) if not row.is_damaged]
            there = [(row, row.sealed) for row in rows if row.sealed is not None]
            opened = self._vault.unseal([sealer(row.subjects) for row, _ in there], [sealed for _, sealed in there])
        return [
            Logged(row.position, row.source, row.subjects, payload, row.received_us, 0)
            for (row, _), payload in zip(there, opened, strict=True)
            if payload is not None
        ]

    def counts(self) -> Counter[tuple[str, str]]:
        """(source, outcome or PARKED) -> events, since ever."""
        with self._lock:
            return self.catalogue.counts()

    # -- what was set aside

    def park(self, name: str, event: Logged, reason: str) -> None:
        """Set an event of the group aside; one that was done already is not."""
        with vault_errors(self._vault):
            (sealed,) = self._vault.seal([sealer(event.subjects)], [event.payload])
        with self._lock, self._writing() as db:
            if self._vault.entombed(event.subjects):
                self._settle(name, [_whole(event.position)], "erased")
            elif self._settle(name, [_whole(event.position)], "parked"):
                self._put([(event.source, event.subjects, event.received_us, reason, event.tries, sealed)])
                if name in self._holds:
                    groups.renew(db, name, self._holds[name].turn, now_ns=self._uptime())

    def set_aside(self, refused: Sequence[Aside], *, received_us: int) -> list[Outcome]:
        """Keep bytes at the door that are no event: appended, duplicate where they were brought before, or erased."""
        digests = [self._digest(one) for one in refused]
        with vault_errors(self._vault):
            sealed = self._vault.seal([sealer(one.subjects) for one in refused], [one.raw for one in refused])
        with self._lock, self._writing() as db:
            taken, erased = parking.known(db, digests), self._vault.entombed({name for one in refused for name in one.subjects})
            outcomes = [_outcome(one, digest, taken, erased) for one, digest in zip(refused, digests, strict=True)]
            kept = zip(refused, sealed, outcomes, strict=True)
            self._put([(one.source, one.subjects, received_us, one.reason, 0, cell) for one, cell, outcome in kept if outcome is _KEPT])
            others = Counter((one.source, outcome.value) for one, outcome in zip(refused, outcomes, strict=True) if outcome is not _KEPT)
            add_counts(db, [(*place, number) for place, number in others.items()])
            parking.learn(db, digests)
        return outcomes

    def count_parked(self) -> int:
        """How many things are set aside."""
        with self._lock, translated(self.catalogue.path):
            return parking.count(self.catalogue.db)

    def parked(self, limit: int) -> list[tuple[parking.Sealed, bytes | None]]:
        """What was set aside first, and its bytes; None where they cannot be opened any more."""
        with self._lock, translated(self.catalogue.path):
            rows = parking.oldest(self.catalogue.db, limit)
        opened = self._vault.unseal([sealer(row.subjects) for row in rows], [row.sealed for row in rows])
        return list(zip(rows, opened, strict=True))

    def drop_parked(self, ids: Sequence[int]) -> int:
        """Take these out of what was set aside."""
        with self._lock, self._writing() as db:
            return parking.drop(db, ids)

    # -- private

    def _held(self, name: str) -> _Hold | None:
        now = self._uptime()
        with translated(self.catalogue.path):
            group = groups.find(self.catalogue.db, name)
        hold = self._holds.pop(name, None)
        if hold and hold.turn != (group.turn if group else 0):
            hold = None  # another reader had its turn meanwhile
        if hold and hold.is_noted:
            self._renew(name, hold, now)
        elif group is None or group.is_free(self._owner, now_ns=now, takeover_ns=self._takeover_ns):
            hold = self._lease(name, hold, now)
        else:
            return None
        if hold:
            hold.after = max(hold.after, group.watermark if group else 0)
            self._holds[name] = hold
        return hold

    def _renew(self, name: str, hold: _Hold, now_ns: int) -> None:
        if now_ns - hold.renewed_ns > self._takeover_ns / _RENEWALS:
            with suppress(LogFull), self._writing() as db:
                groups.renew(db, name, hold.turn, now_ns=now_ns)
                hold.renewed_ns = now_ns

    def _lease(self, name: str, unnoted: _Hold | None, now_ns: int) -> _Hold | None:
        """Begin a turn; None where another reader was quicker. `unnoted`: the turn that a full disk did not let this one note."""
        start, turn = self.catalogue.places()[0].first - 1, 0
        with suppress(LogFull):
            with self._writing() as db:
                groups.begin(db, name, watermark=start)
                group = groups.find(db, name)
                if group is None or not group.is_free(self._owner, now_ns=now_ns, takeover_ns=self._takeover_ns):
                    return None
                turn = groups.lease(db, name, self._owner, now_ns=now_ns)
            return _Hold(turn, max(group.watermark, unnoted.after if unnoted else 0), now_ns)
        if unnoted:
            return unnoted
        group = groups.find(self.catalogue.db, name)
        return _Hold(group.turn if group else 0, group.watermark if group else start, now_ns, is_noted=False)

    def _fetch(self, after: int, limit: int) -> list[Row]:
        rows: list[Row] = []
        places = self.catalogue.places(after=after)
        for number in [number for number in self._open if number < places[0].number]:
            self._open.pop(number).close()
        for place in places:
            rows += self._segment(place.number).read(after + len(rows), limit - len(rows))
            if len(rows) == limit:
                break
        return rows

    def _give(self, name: str, hold: _Hold, rows: list[Row]) -> list[Logged]:
        """The events of the rows that are not done, noted down as given; none where another reader took over meanwhile."""
        with translated(self.catalogue.path):
            done = groups.done(self.catalogue.db, name)
            given = groups.given(self.catalogue.db, name, since=rows[0].position)
        hold.after = rows[-1].position
        rows = [row for row in rows if row.position not in done]
        whole = [(row, row.sealed) for row in rows if row.sealed is not None and not row.is_damaged]
        opened = self._vault.unseal([sealer(row.subjects) for row, _ in whole], [sealed for _, sealed in whole])
        events = [
            Logged(row.position, row.source, row.subjects, payload, row.received_us, _covering(given, row.position))
            for (row, _), payload in zip(whole, opened, strict=True)
            if payload is not None
        ]
        damaged = [row for row in rows if row.is_damaged]
        kept = [_whole(event.position) for event in events]
        passed = {row.position for row in rows}.difference(kept, (row.position for row in damaged))
        # a loss of power may take this, and the events are given again: only the death of a process has to be told by the tries
        with suppress(LogFull), self._writing(is_durable=not kept) as db:
            now = self._uptime()
            if hold.is_noted and not groups.renew(db, name, hold.turn, now_ns=now):
                del self._holds[name]
                return []
            hold.renewed_ns = now
            if kept:
                groups.give(db, name, kept[0], kept[-1])
            if passed:
                self._settle(name, passed, "erased")
            if damaged:
                fresh = self._settle(name, {row.position for row in damaged}, "parked")
                self._put([(row.source, row.subjects, row.received_us, DAMAGED, 0, row.sealed) for row in damaged if row.position in fresh])
        return events

    def _settle(self, name: str, positions: Collection[int], counter: str) -> set[int]:
        groups.begin(self.catalogue.db, name, watermark=self.catalogue.places()[0].first - 1)
        return groups.settle(self.catalogue.db, name, positions, counter)

    def _put(self, rows: list[tuple]) -> None:
        parking.put(self.catalogue.db, rows)
        add_counts(self.catalogue.db, [(source, PARKED, n) for source, n in Counter(row[0] for row in rows).items()])

    def _digest(self, one: Aside) -> bytes:
        """By which bytes are known for ever; keyed, since bytes can be guessed at."""
        plain = hashlib.blake2b(f"{one.source}\0{one.message_id}\0".encode(errors="surrogatepass") + one.raw, digest_size=16)
        return bytes.fromhex(self._vault.pseudonym("set_aside", plain.hexdigest()).partition(":")[2])

    def _parted(self, positions: Sequence[int]) -> Iterator[tuple[Segment, list[int]]]:
        for place in self.catalogue.places():
            some = [at for at in positions if place.first <= at and (place.last is None or at <= place.last)]
            if some:
                yield self._segment(place.number), some

    def _segment(self, number: int) -> Segment:
        if number not in self._open:
            self._open[number] = self.catalogue.segment(number)
        return self._open[number]

    @contextmanager
    def _writing(self, *, is_durable: bool = True) -> Iterator[sqlite3.Connection]:
        with writing(self.catalogue.db, self.catalogue.path, is_durable=is_durable) as db:
            yield db


def _outcome(one: Aside, digest: bytes, taken: set[bytes], erased: frozenset[str]) -> Outcome:
    """What becomes of it; `taken` then has its digest."""
    if digest in taken:
        return Outcome.DUPLICATE
    taken.add(digest)
    return _KEPT if erased.isdisjoint(one.subjects) else Outcome.ERASED


def _covering(given: list[tuple[int, int]], position: int) -> int:
    return sum(first <= position <= last for first, last in given)


def _whole(position: Position) -> int:
    if not isinstance(position, int):
        raise TypeError(f"log: positions are whole numbers, this is a {type(position).__name__}; it comes from another log")
    return position
