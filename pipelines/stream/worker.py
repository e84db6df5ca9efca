"""The log -> the online store, event by event in order: log group "online".

In: logged calls, and the time. Out: rows of identifier_customer, customer_consent, customer_activity, customer_session, customer_item,
customer_category, item_activity, as soon as a call is durable or a window has passed. Each concern has a handler (`identities`,
`consents`, `activity`); what they write for some calls is one transaction, that of the stream's own state is committed before it, and
the log is told after it: a crash in between gives the calls again, with the same result. Erased people are taken out and never
written. Never decides what is served.

Of several workers each reads the whole log, follows who is who by itself, and writes the customers and the items of its share; the first
alone writes who is who and consent.

What an ingest says of who is who, and the tables at the first start, is taken over a few people at a time, between calls; whom a call
names comes before that call. Between two looks for calls there is no more to do than fits a slice, of whatever kind; where calls wait
already, more of them share a transaction.

A call that cannot be handled holds up no other: it is tried again in later steps, and set aside after `settings.edges.max_tries`.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

from pipelines.errors import StoreError
from pipelines.log import Logged, Port, Position
from pipelines.online.opening import open_stream_writer
from pipelines.online.writer import OnlineWriter, is_former
from pipelines.settings import Settings
from pipelines.stream import calls, identities
from pipelines.stream.acknowledgement import Acknowledgement
from pipelines.stream.activity import Activity
from pipelines.stream.backlog import Backlog
from pipelines.stream.calls import Call
from pipelines.stream.clock import Clock
from pipelines.stream.consents import SCHEMA, Consents
from pipelines.stream.identities import Linked, Linker, Owner
from pipelines.stream.pace import SLICE_S, Pace
from pipelines.stream.wake import Wake

log = logging.getLogger("rapport.stream")

GROUP = "online"
FAILED = "tries_used_up"  # of events.REASONS
REFRESH_S = 2.0  # between two looks whether an ingest wrote something
READING_S = 0.1  # the same, while that is being read
BATCH_EVENTS = 64  # of one transaction at most, however many wait: more at once are hardly cheaper
PACE_S = 0.008  # between the beginnings of two steps, where calls come one after the other: those that come meanwhile share a transaction
SLICE_IDENTIFIERS = 100
_KNOWN = "known"  # name of the note: nobody is left whom these tables do not know


class Tombs(Protocol):
    """Knows the erased people (the vault)."""

    def entombed(self, subjects: Sequence[str]) -> frozenset[str]:
        """Which of the subjects are erased."""


@dataclass(frozen=True)
class Stepped:
    """What one step did. Calls: read, applied, ignored (the ingest refuses them), erased, parked. Written: links, consents, features.

    `expired`: customers and items of whom something had changed by itself.
    """

    read: int = 0
    applied: int = 0
    ignored: int = 0
    erased: int = 0
    parked: int = 0
    links: int = 0
    consents: int = 0
    features: int = 0
    expired: int = 0

    def __add__(self, other: "Stepped") -> "Stepped":
        """Both together."""
        return Stepped(**{name: value + getattr(other, name) for name, value in vars(self).items()})


class Stream:
    """One worker's state. `step` from one thread. now_us: microseconds since 1970; None: the wall, or the instant of a home of history.

    `share`: (k, n), the k-th of n workers.
    """

    def __init__(
        self, home: Path, *, settings: Settings, vault: Tombs, log: Port, linker: Linker, now_us: Callable[[], int] | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> None:  # fmt: skip
        self.settings, self.vault, self.log, self.linker, self.share = settings, vault, log, linker, share
        self.group = f"{GROUP}-{share[0]}" if share[0] else GROUP
        self.online = open_stream_writer(home, settings, schema=SCHEMA, is_durable=False)  # flushed before the log is told
        self.consents = Consents(linker, settings=settings.consent)
        self._clock = Clock(settings) if now_us is None else None
        self.activity = Activity(home, settings=settings, share=share, now_us=now_us or self._clock or Clock(settings))
        self.wake = Wake(home / "log")
        self.writing = threading.Lock()  # held while it writes
        self._waiting: list[Logged] = []  # read, and not yet applied
        self.acknowledgement = Acknowledgement(self._acknowledge)
        self._tries: dict[Position, int] = {}  # of calls that failed
        self._owed: dict[str, Owner] = {}  # links that are not committed yet
        self.backlog = Backlog()  # of an ingest, or of the start
        self._is_reconciled, self._refreshed_s = False, 0.0
        self._following: Iterator[None] | None = None  # goes on while what an ingest wrote is taken over
        self._has_begun = self.activity.is_filled  # calls may come, and who calls is shown with all that they did before
        self._begun_s = self._begun_cpu_s = 0.0  # when it last read, by the wall and by this thread's time
        self._abreast_s = time.monotonic()  # when it last had read all there was
        self._is_more = True  # there may be calls of which nobody will be woken
        self._is_wary = False  # one that was given before may have ended a process: see `_read`
        self._pace = Pace()

    def step(self, *, wait_s: float = 0.0) -> Stepped:
        """Apply what came since, and what changed by itself since; waits at most `wait_s` for the first call.

        The log is told now and then, beside it; at once where nothing came and nobody waits. Raises StoreError where log or store refuse:
        step again.
        """
        look_s = READING_S if self.linker.is_reading else REFRESH_S
        if self._following is None and (not self._is_reconciled or time.monotonic() - self._refreshed_s > look_s):
            with self.writing:
                self._reconcile()
        if not self._has_begun:
            with self.writing:
                self._begin()
        if not self._is_reconciled and not wait_s:
            with self.writing:
                self._take_over(end_s=float("inf"))
        patience_s = self.activity.patience_s()
        self._waiting = self._waiting or self._next(min(wait_s, patience_s) if self._is_reconciled else 0.0)
        if not self._waiting and not wait_s:
            self.acknowledgement.finish()
        with self.writing:
            done = Stepped()
            if self._waiting:
                done = self._apply_waiting()
                self._pace.took(done.read, time.thread_time() - self._begun_cpu_s)
            if not self._is_reconciled:
                self._take_over(end_s=time.monotonic() + SLICE_S)
            return done if patience_s > 0 else done + self._expire()

    def close(self) -> None:
        """Let the store go; what was read and not applied goes to the next worker."""
        with suppress(StoreError):  # then they are given again, with the same result
            self.acknowledgement.finish()
        self.acknowledgement.close()
        self.wake.close()
        self._following = None  # it may have files open
        self.activity.close()
        self.online.close()

    def _apply_waiting(self) -> Stepped:
        lost = [call for call in self._waiting if max(call.tries, self._tries.get(call.position, 0)) >= self.settings.edges.max_tries]
        for call in lost:
            self._park(call, FAILED)
        batch = [call for call in self._waiting if call not in lost]
        done = self._apply(batch) if batch else Stepped()
        return done + Stepped(read=len(lost), parked=len(lost))

    def _expire(self) -> Stepped:
        """Some of what has changed by itself: a slice, so that fresh calls never wait long. Noted down after it is written."""
        try:
            with self._both() as online:
                expired = self.activity.expire()
                features = expired.shown.write(online())
            with self.activity.state.transaction():
                self.activity.move(expired)
        except BaseException:
            self.activity.look_again()
            raise
        return Stepped(features=features, expired=len(expired.customers) + len(expired.items))

    def _next(self, wait_s: float) -> list[Logged]:
        """The next calls, as soon as there are some or the time is over. The bell may be late, for calls that were read before it rang."""
        end_s = time.monotonic() + wait_s
        found = self._read() if self._is_more or not wait_s else []
        while not found and (left_s := end_s - time.monotonic()) > 0:
            self._wait(left_s)
            time.sleep(max(0.0, self._begun_s + PACE_S - time.monotonic()))
            found = self._read()
        return found

    def _read(self) -> list[Logged]:
        """As many as fit. Those that were given before without a commit come one at a time: one of them may be what ended a process."""
        self._begun_s, self._begun_cpu_s = time.monotonic(), time.thread_time()
        if not self._is_more:
            self._abreast_s = self._begun_s
        most = 1 if self._is_wary else self._pace.fitting(BATCH_EVENTS, slice_s=SLICE_S, behind_s=self._begun_s - self._abreast_s)
        found = self.log.read(self.group, max_events=most)
        self._is_more, self._is_wary = len(found) == most, any(call.tries for call in found)
        return found

    def _wait(self, wait_s: float) -> None:
        """Until something was appended, or for so long. Has the log told what was applied, where it is time."""
        due_s = self.acknowledgement.due_s()
        if due_s < wait_s:
            if self.wake.wait(due_s):
                return
            self.acknowledgement.begin()
            wait_s -= due_s
        self.wake.wait(wait_s)

    def _apply(self, batch: Sequence[Logged]) -> Stepped:
        """All at once; one by one where that fails, so that one call's failure is not its neighbours'."""
        try:
            return self._commit(batch, self._write(batch))
        except StoreError:
            self._look_again()
            raise
        except Exception as error:
            self._look_again()
            if len(batch) == 1:
                return self._failed(batch[0], error)
            log.warning("%d calls failed together with %s and are tried one by one", len(batch), type(error).__name__)
        steps = [self._apply([call]) for call in batch]
        return sum(steps, Stepped())

    def _look_again(self) -> None:
        self.consents.look_again()
        self.activity.look_again()

    @contextmanager
    def _both(self) -> Iterator[Callable[[], OnlineWriter]]:
        """Transactions of the state and, from when it is asked for on, of the store, which others write too.

        That of the state is committed first, and while both are open. An erasure deletes after its tombstones, and of the state first: so
        who reads these inside sees them, or the erasure sees what is written.
        """
        with ExitStack() as later, self.activity.state.transaction():
            yield cache(lambda: later.enter_context(self.online.transaction()))

    def _write(self, batch: Sequence[Logged]) -> Stepped:
        with self._both() as online:
            dead = self.vault.entombed(list(dict.fromkeys(name for call in batch for name in call.subjects)))
            living = [call for call in batch if dead.isdisjoint(call.subjects)]
            if dead:
                self._forget(online(), dead)
            heard = [call for logged in living if (call := calls.read(logged, self.settings.ingest)) is not None]
            links, consents, features = self._handle(online, self.activity.unrepeated(heard))
        counted = {"read": len(batch), "applied": len(heard), "ignored": len(living) - len(heard), "erased": len(batch) - len(living)}
        return Stepped(**counted, links=links, consents=consents, features=features)

    def _forget(self, online: OnlineWriter, dead: frozenset[str]) -> None:
        """Take the erased out, whatever else they were known by included."""
        customers = sorted(set(identities.owners(online, sorted(dead)).values()))
        names = sorted(dead | self.vault.entombed([name for some in online.identifiers_of(customers).values() for name in some]))
        identities.forget(online, names)
        self.consents.forget(online, names)
        left = online.identifiers_of(customers)
        self.activity.forget(names, sorted(identities.unnamed(left)))

    def _handle(self, online: Callable[[], OnlineWriter], heard: Sequence[Call]) -> tuple[int, int, int]:
        """Who is who, what they did, and then all that is written online."""
        if not heard:
            return 0, 0, 0
        told = self.linker.link(heard)
        self.backlog.drop(link.identifier for link in told)
        # an ingest may have said something of these that is still to be taken over, and would not be said again
        behind = self.backlog.of((name for call in heard for name in call.subjects), {link.customer_id for link in told})
        self._owe([*behind, *told])
        shown = self.activity.apply(heard)
        consents = self._tell(online(), heard) if self.share[0] == 0 else 0
        return len(self._owed), consents, shown.write(online())

    def _tell(self, online: OnlineWriter, heard: Sequence[Call]) -> int:
        """Who is who, then what they said; returns the rows on consent."""
        touched = identities.follow(online, self._owed)
        changed = self.consents.hear(online, heard)
        touched |= set(identities.owners(online, sorted(changed)).values())
        return self.consents.decide(online, sorted(touched), known_us=max(call.known_us for call in heard))

    def _owe(self, links: Iterable[Linked]) -> None:
        """Remember what is to be written until it is committed: the linker tells each change once. The erased are left out."""
        told = list(links)
        if not told and not self._owed:
            return
        self._owed |= identities.newest(told)
        self.activity.owe(told)
        dead = self.vault.entombed(list(self._owed))
        for name in dead:
            del self._owed[name]
        self.activity.disown(dead)

    def _reconcile(self) -> None:
        """Bring the store to what the linker knows: after a start (who ended before us may have died between the two), and an ingest."""
        is_fresh = self.linker.refresh()
        self._refreshed_s = time.monotonic()
        if self._clock is not None:
            self._clock.refresh()
        if self._is_reconciled and not is_fresh:
            if not self.linker.is_reading and self.activity.is_behind():  # whose identifiers are comes before what they did
                self._is_reconciled, self._following = False, self._follow()
            return
        is_known = self._is_reconciled and not self._owed  # what the linker told before is written
        links = self.linker.changes() if is_known else self.linker.identities()
        self._is_reconciled = False
        self._owed = {}
        self.activity.settle()
        self.backlog, self._following = Backlog(links), self._follow()

    def _begin(self) -> None:
        """The first start: what people did comes before their calls, whose they are a few at a time between these, as after an ingest."""
        for _ in self.activity.follow_tables():
            pass
        self._has_begun = True

    def _take_over(self, *, end_s: float) -> None:
        """Take over what the linker knows of some people, and then the tables, until the time has come or all is taken over."""
        try:
            while self._owed or self.backlog:
                self._take_over_some()
                if self.backlog and time.monotonic() > end_s:
                    return
            for _ in self._following or ():
                if time.monotonic() > end_s:
                    return
        except BaseException:
            self._look_again()
            self._following = self._follow() if self._owed or self.backlog else None
            raise
        self._is_reconciled, self._following = True, None

    def _take_over_some(self) -> None:
        with self._both() as online:
            self._owe(self.backlog.some(SLICE_IDENTIFIERS))
            if self.share[0] == 0:
                changed = identities.changed(online(), self._owed)
                touched = identities.follow(online(), changed)
                known_us = max((owner.known_us for owner in changed.values()), default=0)
                self.consents.decide(online(), sorted(touched), known_us=known_us)
            self.activity.take_over()
        self._owed = {}
        self.activity.settle()

    def _let_others_go(self) -> Iterator[None]:
        """Take out whom the linker does not know, some at a time: an ingest kept nothing of them. May be begun anew at any time."""
        if self.activity.state.note(_KNOWN) == self.linker.version:
            return
        for held in (self.online, self.activity.state):
            names: list[str] = []
            while names := held.identifiers_after(names[-1] if names else None, SLICE_IDENTIFIERS):
                known = self.linker.known(names)
                gone = {name for name in names if name not in known and not is_former(name)} | self.vault.entombed(names)
                if gone:
                    with self._both() as online:
                        if self.share[0] == 0:
                            identities.forget(online(), sorted(gone))
                        self.activity.drop(gone)
                yield

    def _follow(self) -> Iterator[None]:
        """What follows once everybody is taken over, a slice for each step. May be begun anew at any time."""
        yield from self._let_others_go()
        with self.activity.state.transaction():
            self.activity.divide()
        yield from self.activity.follow_tables()
        self.online.sync()
        with self.activity.state.transaction():  # only now: a worker that ends before begins again
            self.activity.state.put_note(_KNOWN, self.linker.version)

    def _commit(self, batch: Sequence[Logged], done: Stepped) -> Stepped:
        self.acknowledgement.add([call.position for call in batch])
        self._owed = {}
        self.activity.settle()
        self._drop(batch)
        # one that was given before may have ended a process: its neighbours must not be given as often as it is
        if any(call.tries for call in batch):
            self.acknowledgement.finish()
        elif not self.acknowledgement.due_s():
            self.acknowledgement.begin()
        return done

    def _acknowledge(self, positions: Sequence[Position]) -> None:
        """Tell the log that these were applied, once that outlives a loss of power."""
        self.activity.state.sync()
        self.online.sync()
        self.log.commit(self.group, positions)

    def _failed(self, call: Logged, error: Exception) -> Stepped:
        tries = self._tries[call.position] = max(call.tries, self._tries.get(call.position, 0)) + 1
        log.error("a call failed with %s, try %d", type(error).__name__, tries)
        if tries < self.settings.edges.max_tries:
            return Stepped()
        self._park(call, "not_json" if isinstance(error, ValueError) else FAILED)
        return Stepped(read=1, parked=1)

    def _park(self, call: Logged, reason: str) -> None:
        self.log.park(self.group, call, reason)
        self._drop([call])

    def _drop(self, batch: Sequence[Logged]) -> None:
        gone = {call.position for call in batch}
        self._waiting = [call for call in self._waiting if call.position not in gone]
        for position in gone:
            self._tries.pop(position, None)
