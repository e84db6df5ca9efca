"""The log -> the online store, event by event in order: log group "online".

In: logged calls. Out: rows of identifier_customer and customer_consent, as soon as a call is durable. Each concern has a handler
(`identities`, `consents`); what they write for some calls is one transaction, and the log is told after it: a crash in between gives
the calls again, with the same result. Erased people are taken out and never written. Never decides what is served.

A call that cannot be handled holds up no other: it is tried again in later steps, and set aside after `settings.edges.max_tries`.
"""

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipelines.errors import StoreError
from pipelines.log import Logged, Port, Position
from pipelines.online_writer import OnlineWriter
from pipelines.settings import Settings
from pipelines.stream import calls, identities
from pipelines.stream.calls import Call
from pipelines.stream.consents import SCHEMA, Consents
from pipelines.stream.identities import Linked, Linker, Owner
from pipelines.stream.wake import Wake

log = logging.getLogger("rapport.stream")

GROUP = "online"
FAILED = "tries_used_up"  # of events.REASONS
REFRESH_S = 2.0  # between two looks whether an ingest wrote something
BATCH_EVENTS = 500  # of one transaction; fewer when fewer wait


class Tombs(Protocol):
    """Knows the erased people (the vault)."""

    def entombed(self, subjects: Sequence[str]) -> frozenset[str]:
        """Which of the subjects are erased."""


@dataclass(frozen=True)
class Stepped:
    """What one step did. Calls: read, applied, ignored (no event by their time), erased, parked. Values written: links, consents."""

    read: int = 0
    applied: int = 0
    ignored: int = 0
    erased: int = 0
    parked: int = 0
    links: int = 0
    consents: int = 0

    def __add__(self, other: "Stepped") -> "Stepped":
        """Both together."""
        return Stepped(**{name: value + getattr(other, name) for name, value in vars(self).items()})


class Stream:
    """One worker's state. `step` from one thread."""

    def __init__(self, home: Path, *, settings: Settings, vault: Tombs, log: Port, linker: Linker) -> None:
        self.settings, self.vault, self.log, self.linker = settings, vault, log, linker
        self.online = OnlineWriter(home, schema=SCHEMA)
        self.consents = Consents(home, settings=settings.consent)
        self.wake = Wake(home / "log" / "segments")
        self._waiting: list[Logged] = []  # read, and not yet applied
        self._tries: dict[Position, int] = {}  # of calls that failed
        self._owed: dict[str, Owner] = {}  # links that are not committed yet
        self._is_reconciled, self._refreshed_s = False, 0.0
        self._at_a_time = 1  # until it is known that no call kills the process: see `_next`

    def step(self, *, wait_s: float = 0.0) -> Stepped:
        """Apply what came since; waits at most `wait_s` for the first call. Raises StoreError where log or store refuse: step again."""
        if not self._is_reconciled or time.monotonic() - self._refreshed_s > REFRESH_S:
            self._reconcile()
        self._waiting = self._waiting or self._next(wait_s)
        if not self._waiting:
            return Stepped()
        lost = [call for call in self._waiting if max(call.tries, self._tries.get(call.position, 0)) >= self.settings.edges.max_tries]
        for call in lost:
            self._park(call, FAILED)
        batch = [call for call in self._waiting if call not in lost]
        done = self._apply(batch) if batch else Stepped()
        return done + Stepped(read=len(lost), parked=len(lost))

    def close(self) -> None:
        """Let the store go; what was read and not applied goes to the next worker."""
        self.wake.close()
        self.online.close()

    def _next(self, wait_s: float) -> list[Logged]:
        """The next calls. Those that were given before without a commit come one at a time: one of them may be what ended a process."""
        found = self.log.read(GROUP, max_events=self._at_a_time)
        if not found and self.wake.wait(wait_s):
            found = self.log.read(GROUP, max_events=self._at_a_time)
        self._at_a_time = 1 if any(call.tries for call in found) else BATCH_EVENTS
        return found

    def _apply(self, batch: Sequence[Logged]) -> Stepped:
        """All at once; one by one where that fails, so that one call's failure is not its neighbours'."""
        try:
            return self._commit(batch, self._write(batch))
        except StoreError:
            self.consents.look_again()
            raise
        except Exception as error:
            self.consents.look_again()
            if len(batch) == 1:
                return self._failed(batch[0], error)
            log.warning("%d calls failed together with %s and are tried one by one", len(batch), type(error).__name__)
        steps = [self._apply([call]) for call in batch]
        return sum(steps, Stepped())

    def _write(self, batch: Sequence[Logged]) -> Stepped:
        with self.online.transaction() as online:
            # inside the transaction: an erasure deletes rows after its tombstones, so either we see these or it sees our rows
            dead = self.vault.entombed(list(dict.fromkeys(name for call in batch for name in call.subjects)))
            living = [call for call in batch if dead.isdisjoint(call.subjects)]
            if dead:
                self._forget(online, dead)
            heard = [call for logged in living if (call := calls.read(logged, self.settings.ingest)) is not None]
            links, consents = self._handle(online, [call for call in heard if call.subjects])
        counted = {"read": len(batch), "applied": len(heard), "ignored": len(living) - len(heard), "erased": len(batch) - len(living)}
        return Stepped(**counted, links=links, consents=consents)

    def _forget(self, online: OnlineWriter, dead: frozenset[str]) -> None:
        """Take the erased out, whatever else they were known by included."""
        customers = sorted(set(identities.owners(online, sorted(dead)).values()))
        names = sorted(dead | self.vault.entombed([name for some in online.identifiers_of(customers).values() for name in some]))
        identities.forget(online, names)
        self.consents.forget(online, names)

    def _handle(self, online: OnlineWriter, heard: Sequence[Call]) -> tuple[int, int]:
        """Who is who, then what they said."""
        if not heard:
            return 0, 0
        self._owe(self.linker.link(heard))
        touched = identities.follow(online, self._owed)
        changed = self.consents.hear(online, heard)
        touched |= set(identities.owners(online, sorted(changed)).values())
        return len(self._owed), self.consents.decide(online, sorted(touched), known_us=max(call.known_us for call in heard))

    def _owe(self, links: Iterable[Linked]) -> None:
        """Remember what is to be written until it is committed: the linker tells each change once. The erased are left out."""
        self._owed |= identities.newest(links)
        for name in self.vault.entombed(list(self._owed)):
            del self._owed[name]

    def _reconcile(self) -> None:
        """Bring the store to what the linker knows: after a start (who ended before us may have died between the two), and an ingest."""
        is_fresh = self.linker.refresh()
        self._refreshed_s = time.monotonic()
        if self._is_reconciled and not is_fresh:
            return
        self._is_reconciled = False
        self._owed = {}
        with self.online.transaction() as online:
            self._owe(self.linker.identities())
            unknown = identities.differences(online, self._owed)
            if is_fresh:  # the ingest kept nothing of them
                identities.forget(online, unknown)
            touched = identities.follow(online, self._owed)
            known_us = max((owner.known_us for owner in self._owed.values()), default=0)
            self.consents.decide(online, sorted(touched), known_us=known_us)
        self._owed, self._is_reconciled = {}, True

    def _commit(self, batch: Sequence[Logged], done: Stepped) -> Stepped:
        self.log.commit(GROUP, [call.position for call in batch])
        self._owed = {}
        self._drop(batch)
        return done

    def _failed(self, call: Logged, error: Exception) -> Stepped:
        tries = self._tries[call.position] = max(call.tries, self._tries.get(call.position, 0)) + 1
        log.error("a call failed with %s, try %d", type(error).__name__, tries)
        if tries < self.settings.edges.max_tries:
            return Stepped()
        self._park(call, "not_json" if isinstance(error, ValueError) else FAILED)
        return Stepped(read=1, parked=1)

    def _park(self, call: Logged, reason: str) -> None:
        self.log.park(GROUP, call, reason)
        self._drop([call])

    def _drop(self, batch: Sequence[Logged]) -> None:
        gone = {call.position for call in batch}
        self._waiting = [call for call in self._waiting if call.position not in gone]
        for position in gone:
            self._tries.pop(position, None)
