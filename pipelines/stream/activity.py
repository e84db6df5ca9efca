"""What customers do, online: calls -> the rows of customer_activity, customer_session, customer_item and customer_category, at once and
exactly; and of item_activity, see `items`.

In: calls, and who is who. Out: a row of each view for each customer for whom a call, a link, a word on consent or the time changed
something: what `features build` over the same events would say of this instant. A call counts if consent lets it be stored, as
ingest/permission.py judges; a later refusal takes out what came after it. All that is decided from is in `state`, so a customer can be
made anew at any time; those that were busy last are held ready. A customer may change by what others do: `categories` marks them then.
Never decides who is who.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from pipelines.settings import Settings
from pipelines.stream import live, seeding, statements
from pipelines.stream.calls import Call
from pipelines.stream.identities import Linked
from pipelines.stream.item_rows import NEVER, ItemDue
from pipelines.stream.items import Items
from pipelines.stream.live import Live
from pipelines.stream.pace import SLICE_S, Pace
from pipelines.stream.permits import Permits
from pipelines.stream.shown import Shown
from pipelines.stream.state import Held, Owned, Said, State, held, owner_at, path_of
from pipelines.stream.timetable import UNKNOWN, Due

SLICE_CUSTOMERS = 50  # looked at together at most when they expire

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class Expired(NamedTuple):
    """What has changed by itself: what is to be written, and when its customers and items change next, to be noted down once that holds."""

    shown: Shown
    customers: dict[str, Due | None]
    items: dict[str, ItemDue]


class Activity:
    """One worker's customers. `share`: (k, n), it writes the k-th of n parts. Changes are made inside `state.transaction()`."""

    def __init__(self, home: Path, *, settings: Settings, share: tuple[int, int], now_us: Callable[[], int]) -> None:
        self.home, self.settings, self.share, self.now_us = home, settings, share, now_us
        self.state = State(path_of(home, share))
        self.purposes = settings.consent.stored_for
        self.items = Items(self.state.items, share=share, most=settings.stream.items)
        self._lives: OrderedDict[str, Live] = OrderedDict()
        self._told: dict[str, list[Owned]] = {}  # whose identifiers are, told by the linker and not yet committed
        self._speaking: dict[str, int] | None = None
        self._anew: set[str] = set()  # of whom all is to be shown, by this batch
        self._expiring = Pace()

    def owe(self, links: Iterable[Linked]) -> None:
        """Remember whose identifiers are until it is committed: the linker tells each change once, with all its states."""
        self._told |= _owned(links)

    def disown(self, identifiers: Iterable[str]) -> None:
        """Do not take these over: they are erased."""
        for name in identifiers:
            self._told.pop(name, None)

    def settle(self) -> None:
        """What was owed is committed."""
        self._told = {}

    def look_again(self) -> None:
        """A transaction was rolled back: what is held ready may not be what is stored."""
        self._let_go()
        self.items.look_again()

    def close(self) -> None:
        """Let the state go."""
        self.state.close()

    # -- what happens

    def unrepeated(self, calls: Sequence[Call]) -> list[Call]:
        """The calls that were not taken in before by another delivery: each message counts once, for links and words too."""
        there, found = self._there(calls), dict[tuple[str, str], object]()
        for call in calls:
            own = next((there[key] for key in _keys(call) if key in there), call.logged.position)
            found.setdefault(_keys(call)[0], own)
        return [call for call in calls if found[_keys(call)[0]] == call.logged.position]

    def apply(self, calls: Sequence[Call]) -> Shown:
        """Take calls in, none of them repeated; returns what is to be written online."""
        touched = dict.fromkeys(sorted(self.state.own(self._told)))
        for customer in touched:
            self._make_anew(customer)
        owners, there = self.state.owners({call.rows[0].who for call in calls}), set(self._there(calls))
        for call in calls:
            states = owners.get(call.rows[0].who)
            if states:  # else erased a moment ago
                touched |= dict.fromkeys(self._take(call, states, there))
        self.state.categories.settle()
        shown, due = self._show(touched)
        self.state.timetable.put(due)
        return shown.plus(self.items.apply(now_us=self.now_us()))

    def expire(self) -> Expired:
        """What has changed by itself, of as many customers and items as there is time for; see `move`."""
        now_us, begun_s = self.now_us(), time.thread_time()
        self.state.categories.settle()
        ready: list[str] = []
        for customer in self.state.timetable.due(now_us, limit=self._expiring.fitting(SLICE_CUSTOMERS, slice_s=SLICE_S / 2)):
            self._live(customer, now_us)
            ready.append(customer)
            if time.thread_time() > begun_s + SLICE_S / 2:
                break
        shown, customers = self._show(ready)
        self._expiring.took(len(ready), time.thread_time() - begun_s)
        of_items, items = self.items.expire(now_us=now_us)
        return Expired(shown.plus(of_items), customers, items)

    def move(self, expired: Expired) -> None:
        """Note down what `expire` found, once that is written and committed."""
        self.state.timetable.move(expired.customers)
        self.state.items.move_due(expired.items)

    def patience_s(self) -> float:
        """How long nothing changes by itself."""
        next_us = self.state.next_due_us()
        return float("inf") if next_us is None else max(0.0, (next_us - self.now_us()) / 1e6)

    def forget(self, identifiers: Sequence[str], customers: Sequence[str]) -> None:
        """Delete what is held of these."""
        self.state.forget(identifiers, customers)
        for customer in customers:
            self._lives.pop(customer, None)

    def take_over(self) -> None:
        """Bring the state to what is owed; what follows is due at once."""
        touched = self.state.own(self._told)
        self.state.timetable.mark(sorted(touched))
        self._let_go_of(touched)

    def drop(self, identifiers: Collection[str]) -> None:
        """Nobody knows these any more; what follows is due at once."""
        if touched := self.state.disown(sorted(identifiers)):
            self.state.timetable.mark(sorted(touched))
            self._let_go_of(touched)

    def divide(self) -> None:
        """Where there were others, or none, beside this worker, all of its part is due at once."""
        share = f"{self.share[0]} of {self.share[1]}"
        if self.state.note("share") not in (None, share):
            self.state.timetable.mark_all()
            self.state.items.mark_all()
        self.state.put_note("share", share)

    @property
    def is_filled(self) -> bool:
        """Whether the tables, or that there were none, were ever followed."""
        return seeding.is_begun(self.state)

    def is_behind(self) -> bool:
        """Whether the tables have changed since they were followed. Cheap."""
        return seeding.is_behind(self.state, self.home) or bool(statements.earlier(self.state))

    def follow_tables(self) -> Iterator[None]:
        """Bring the state to the tables, where these have changed, a slice for each step. What follows is due at once."""
        if not self.is_behind():
            return
        for touched in seeding.bring(self.state, self.home, purposes=self.purposes):
            self._speaking = None
            self._let_go_of(touched)
            yield
        for source, since_us in statements.earlier(self.state).items():
            for customer in self._covered_since(source, since_us, of_log=True):  # of what the tables hold the ingest has decided
                with self.state.transaction():
                    self.state.timetable.mark(self._uncover(source, since_us, [customer]))
                yield
        with self.state.transaction():
            statements.looked_at(self.state)

    def _let_go_of(self, customers: Iterable[str]) -> None:
        for customer in customers:
            self._lives.pop(customer, None)

    def _let_go(self) -> None:
        """What is held ready of customers may not be what is stored; of items the state says which."""
        self._lives.clear()
        self._anew.clear()
        self._speaking = None

    # -- one call

    def _there(self, calls: Sequence[Call]) -> dict[tuple[str, str], int | None]:
        """The rows that the state has of these messages."""
        return self.state.positions(_keys(call)[0] for call in calls)

    def _take(self, call: Call, states: Sequence[Owned], there: set[tuple[str, str]]) -> list[str]:
        """Keep the rows of a call if that may be done; returns the customer for whom something follows. there: the rows that are kept."""
        position = call.logged.position if isinstance(call.logged.position, int) else None
        owned = owner_at(states, call.event_us)
        if not there.isdisjoint(_keys(call)):
            self._make_anew(owned.customer_id)  # taken in before a crash that came ahead of the online store's commit
            self.items.renew(call.rows)
            return [owned.customer_id]
        source = call.rows[0].source
        is_earlier = call.is_speaking and self._hear_source(source, call.event_us)
        ready = self._live(owned.customer_id, self.now_us())
        refused = self._hear(call, ready.permits)
        covered = self._covered(source, call.event_us)
        is_kept = ready.permits.may_store(call.event_us, covered=covered) and not self._awaits_ingest(call)
        if is_kept:
            self._keep(call, owned, ready, covered, position)
            there.update((row.source, row.event_id) for row in call.rows)
        if refused:  # what came after it may have to go
            self._make_anew(owned.customer_id)
            self._live(owned.customer_id, self.now_us())  # somebody else's customers too: for an item everybody's rows count
        uncovered = self._uncover(source, call.event_us, self._covered_since(source, call.event_us)) if is_earlier else []
        return [owned.customer_id, *uncovered] if is_kept or refused else uncovered

    def _hear(self, call: Call, permits: Permits) -> bool:
        """Take in what the call says on the purposes that count; whether it refuses one."""
        who, refused = call.rows[0].who, False
        for purpose, is_allowed in call.said.items():
            if purpose not in self.purposes:
                continue
            said = Said(purpose, call.event_us, is_stated=True, is_allowed=is_allowed)
            permits.hear(said)
            if not is_allowed:  # one that allows is kept with its row
                self.state.hear(who, said)
                refused = True
        return refused

    def _keep(self, call: Call, owned: Owned, ready: Live, covered: str | None, position: int | None) -> None:
        with self.state.categories.hearing(call.rows) as categories:
            self.state.keep(call.rows, position=position, purposes=self.purposes)
        if covered is not None and not ready.permits.is_declared(covered, call.event_us):
            declared = Said(covered, call.event_us, is_stated=False, is_allowed=True)
            self.state.hear(call.rows[0].who, declared)
            ready.permits.hear(declared)
        now_us = self.now_us()
        self.items.keep(call.rows, now_us=now_us)
        for row in call.rows if self._is_mine(owned.customer_id) else ():
            counted = held(row, owned.linked_us, categories.get(row.item_id or ""))
            if ready.fits(counted):
                ready.add(counted, now_us=now_us)
            else:  # late: the order of rows matters
                self._make_anew(owned.customer_id)

    def _covered(self, source: str, event_us: int) -> str | None:
        """The purpose that a declared basis covers for this source; None from when its people speak for themselves."""
        consent = self.settings.consent
        if consent.legal_basis is None or self._speakers().get(source, NEVER) <= event_us:
            return None
        return consent.purpose

    def _hear_source(self, source: str, event_us: int) -> bool:
        """The source speaks; whether it did so earlier than was known."""
        if self._speakers().get(source, NEVER) <= event_us:
            return False
        self.state.speak(source, event_us)
        self._speakers()[source] = event_us
        return True

    def _covered_since(self, source: str, since_us: int, *, of_log: bool = False) -> list[str]:
        """The customers of whom a declared basis may have covered something since then."""
        return [] if self.settings.consent.legal_basis is None else self.state.customers_since(source, since_us, of_log=of_log)

    def _uncover(self, source: str, since_us: int, customers: Iterable[str]) -> list[str]:
        """Take out of these what a declared basis covers no longer and they do not allow themselves; returns of whom that was any."""
        touched = []
        for customer in customers:
            spells = self.state.spells_of(customer)
            rows = self.state.rows_of(customer, spells)
            permits = self._permits(customer, rows, spells)
            later = [row for row in rows if row.key[0] == source and row.row["ts"] >= since_us]
            gone = [row.key for row in later if not permits.may_store(row.row["ts"], covered=None)]
            if gone:
                self.state.drop(gone)
                self._make_anew(customer)
                touched.append(customer)
        return touched

    def _speakers(self) -> dict[str, int]:
        """The sources that speak, and since when."""
        if self._speaking is None:
            self._speaking = self.state.spoken()
        return self._speaking

    def _awaits_ingest(self, call: Call) -> bool:
        """Whether only the ingest can say if it is stored: a return, where those without a purchase are refused."""
        return call.rows[0].type == "return" and self.settings.ingest.unmatched_returns == "refuse"

    # -- customers

    def _live(self, customer: str, now_us: int) -> Live:
        """The customer's state, made anew where it is not held ready."""
        ready = self._lives.get(customer)
        if ready is not None and not ready.is_due(now_us):
            self._lives.move_to_end(customer)
            return ready
        self._lives[customer] = ready = self._made(customer, now_us)
        self._lives.move_to_end(customer)
        while len(self._lives) > self.settings.stream.customers:
            self._lives.popitem(last=False)
        return ready

    def _made(self, customer: str, now_us: int) -> Live:
        spells = self.state.spells_of(customer)
        rows = self.state.rows_of(customer, spells)
        permits = self._permits(customer, rows, spells)
        gone = [row.key for row in rows if permits.must_go(row.row["ts"])] if permits.refused_us is not None else []
        if gone:
            self.state.drop(gone)
            left = set(gone)
            rows = [row for row in rows if row.key not in left]
        if not self._is_mine(customer):
            rows = []  # another worker counts them; here is decided what is kept of them, for the items
        noted = self.state.timetable.of([customer]).get(customer, UNKNOWN)
        made = live.made_of(rows, permits, gap_minutes=self.settings.ingest.session_gap_minutes, now_us=now_us, mark=noted.mark)
        if customer not in self._anew and noted.shown_us:
            for keyed in made.pairs.values():
                keyed.shown_until(noted.shown_us)
        return made

    def _permits(self, customer: str, rows: Iterable[Held], spells: Mapping[str, Sequence[Owned]]) -> Permits:
        permits = Permits(self.purposes, self.state.statements_of(customer, spells))
        for row in rows:
            permits.allow(row.allows, row.row["ts"])
        return permits

    def _make_anew(self, customer: str) -> None:
        self._lives.pop(customer, None)
        self._anew.add(customer)

    def _show(self, customers: Iterable[str]) -> tuple[Shown, dict[str, Due | None]]:
        """What is true of these customers now, and when that changes next."""
        now_us = self.now_us()
        shown = Shown()
        due: dict[str, Due | None] = dict.fromkeys(customers)
        noted = self.state.timetable.of(list(due))
        for customer in filter(self._is_mine, due):
            ready, before = self._live(customer, now_us), noted.get(customer, UNKNOWN)
            if ready.mark != before.mark:  # marked since it was made
                self._make_anew(customer)
                ready = self._live(customer, now_us)
            ready.advance(now_us)
            next_us = ready.next_us()
            if ready.n_rows:
                due[customer] = Due(NEVER if next_us is None else next_us, ready.seen_us, ready.mark)
            else:
                self._lives.pop(customer, None)  # nothing is noted of it any more
            shown.add(customer, ready, is_whole=customer in self._anew or not before.shown_us)
        self._anew.difference_update(due)
        return shown, due

    def _is_mine(self, customer: str) -> bool:
        part, parts = self.share
        return parts == 1 or int.from_bytes(blake2b(customer.encode(), digest_size=8).digest()) % parts == part


def _keys(call: Call) -> tuple[tuple[str, str], tuple[str, str]]:
    """Source and event_id of a message, and of the first line of one that has lines."""
    source = call.rows[0].source
    return (source, call.message_id), (source, f"{call.message_id}:0")


def _owned(links: Iterable[Linked]) -> dict[str, list[Owned]]:
    found: dict[str, list[Owned]] = {}
    for link in links:
        since_us, linked_us = ((at - _EPOCH) // _MICROSECOND for at in (link.event_timestamp, link.created_timestamp))
        found.setdefault(link.identifier, []).append(Owned(since_us, link.customer_id, linked_us))
    return {name: sorted(states) for name, states in found.items()}
