"""Calls as they come -> whose each identifier is, at once: the same answer as `resolve` over everything, from the touched people alone.

In: who each call names, as pseudonyms, and an SQLite file of what was seen together. Out: the identifiers whose customer is new or another
one. Never decides by rules of its own: what is touched by a call goes through `deterministic.people`. Opens no file: `online` does.
"""

import sqlite3
from collections import defaultdict
from collections.abc import Container, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple, Protocol

import numpy as np

from pipelines.identity import deterministic
from pipelines.identity.deterministic import Edges, surrogate
from pipelines.log.port import Position
from pipelines.vault import IDENTIFIERS, Vault

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_NEVER = np.iinfo(np.int64).max
_NAMES = ", ".join(IDENTIFIERS)
_AT_A_TIME = 500

# `is_stored`: whether the tables have it; the others came since. `position`: in the log, where the same was said last. `desks`: addresses
# and numbers of more user ids than one person has. `words`: what each last allowed or refused, by the tables. `versions`: of the tables
# that it was filled from.
SCHEMA = f"""
CREATE TABLE IF NOT EXISTS sightings (
    id INTEGER PRIMARY KEY, {", ".join(f"{name} TEXT" for name in IDENTIFIERS)},
    time INTEGER NOT NULL, created INTEGER NOT NULL, is_stored INTEGER NOT NULL, position INTEGER);
{"".join(f"CREATE INDEX IF NOT EXISTS by_{name} ON sightings ({name}, time, created) WHERE {name} IS NOT NULL;" for name in IDENTIFIERS)}
CREATE TABLE IF NOT EXISTS edges (one TEXT NOT NULL, other TEXT NOT NULL, state TEXT NOT NULL, time INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS by_one ON edges (one);
CREATE INDEX IF NOT EXISTS by_other ON edges (other);
CREATE TABLE IF NOT EXISTS identities (
    identifier TEXT NOT NULL, time INTEGER NOT NULL, customer_id TEXT NOT NULL, created INTEGER NOT NULL,
    PRIMARY KEY (identifier, time)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS desks (identifier TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS words (
    identifier TEXT NOT NULL, purpose TEXT NOT NULL, is_stated INTEGER NOT NULL, is_allowed INTEGER NOT NULL, made_us INTEGER NOT NULL,
    PRIMARY KEY (identifier, purpose, is_stated)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS versions (name TEXT PRIMARY KEY, version TEXT NOT NULL) WITHOUT ROWID;
"""


class Sighting(Protocol):
    """Identifiers that one call names together."""

    @property
    def subjects(self) -> Sequence[str]:
        """Full pseudonyms, in the order of vault.IDENTIFIERS."""

    @property
    def event_us(self) -> int:
        """When it happened: microseconds since 1970, UTC."""

    @property
    def received_us(self) -> int:
        """When we knew."""

    @property
    def position(self) -> Position:
        """Where it stands in the log."""


class Linked(NamedTuple):
    """An identifier and whose it is since when, as a row of the identities table."""

    identifier: str
    customer_id: str
    event_timestamp: datetime
    created_timestamp: datetime


class Row(NamedTuple):
    """A sighting as it is kept: an identifier of each kind, and when, in microseconds since 1970, UTC."""

    user_id: str | None
    email: str | None
    phone: str | None
    anonymous_id: str | None
    time: int
    created: int

    @property
    def names(self) -> list[str]:
        """Those that it names."""
        return [name for name in self[:4] if name is not None]

    def without(self, some: Container[str]) -> "Row":
        """The same without these."""
        user, email, phone, anonymous = (None if name in some else name for name in self[:4])
        return Row(user, email, phone, anonymous, self.time, self.created)


class _State(NamedTuple):
    """Of an identifier, from one time on."""

    time: int
    customer_id: str
    created: int


class Links:
    """Of one file, whose tables are of `SCHEMA`. For one thread; written inside the caller's transactions."""

    def __init__(self, db: sqlite3.Connection, *, vault: Vault | None) -> None:
        """vault: knows the erased people, who are not taken in."""
        self.db, self.vault = db, vault
        self.noted: list[tuple[Row, Position]] | None = None  # what was written of sightings, while somebody wants to know
        self._has_edges = self.db.execute("SELECT 1 FROM edges LIMIT 1").fetchone() is not None
        self._desks = self.db.execute("SELECT 1 FROM desks LIMIT 1").fetchone() is not None

    def customer(self, identifier: str, *, at: datetime | None = None) -> str | None:
        """Whose the identifier was at that time, now where None; None for an identifier that was never seen."""
        states = self._states(identifier)
        then = _NEVER if at is None else (at - _EPOCH) // _MICROSECOND
        return next((state.customer_id for state in reversed(states) if state.time <= then), states[0].customer_id if states else None)

    def identities(self) -> list[Linked]:
        """Everything, sorted by identifier and time."""
        return [_linked(*row) for row in self.db.execute("SELECT identifier, time, customer_id, created FROM identities ORDER BY 1, 2")]

    def of(self, identifiers: Sequence[str]) -> list[Linked]:
        """The rows of these, each one's by time."""
        found: list[Linked] = []
        for start in range(0, len(identifiers), _AT_A_TIME):
            some = identifiers[start : start + _AT_A_TIME]
            marks = ",".join("?" * len(some))
            query = f"SELECT identifier, time, customer_id, created FROM identities WHERE identifier IN ({marks}) ORDER BY 1, 2"
            found += [_linked(*row) for row in self.db.execute(query, some)]
        return found

    def known(self, identifiers: Sequence[str]) -> set[str]:
        """Which of these were ever seen."""
        marks = ",".join("?" * len(identifiers))
        return {name for (name,) in self.db.execute(f"SELECT identifier FROM identities WHERE identifier IN ({marks})", identifiers)}

    def words(self, identifiers: Sequence[str]) -> list[tuple[str, str, bool, bool, int]]:
        """What the tables hold of their words on consent: identifier, purpose, whether stated, whether allowed, when (microseconds)."""
        found: list[tuple[str, str, bool, bool, int]] = []
        for start in range(0, len(identifiers), _AT_A_TIME):
            some = identifiers[start : start + _AT_A_TIME]
            rows = self.db.execute(f"SELECT * FROM words WHERE identifier IN ({','.join('?' * len(some))})", some)
            found += [(name, purpose, bool(stated), bool(allowed), made_us) for name, purpose, stated, allowed, made_us in rows]
        return found

    def take(self, rows: Sequence[tuple[Row, Position]]) -> list[Linked]:
        """Take sightings in, with where each stands in the log; the identifiers whose customer is another one, or that are new.

        Of an anonymous id that several people used all its rows, oldest first: the last is whose it is now. They take the place of
        every earlier row of that identifier. Erased people are not taken in.
        """
        # Inside the transaction: an erasure writes its tombstones before it removes rows, so we see those or it sees ours.
        dead = self.vault.entombed({name for row, _ in rows for name in row.names}) if self.vault is not None else frozenset()
        touched: dict[str, None] = {}
        marks = f"INSERT INTO sightings ({_NAMES}, time, created, is_stored, position) VALUES (?, ?, ?, ?, ?, ?, 0, ?)"
        for row, position in rows:
            if not dead.isdisjoint(row.names):
                continue
            if self._says_nothing(row):  # but that it was said again: where the tables lack it, it outlives a drain of what came before
                again = f"UPDATE sightings SET position = max(position, ?) WHERE NOT is_stored AND {_same(row)}"
                if not self.db.execute(again, (position, *row[:4])).rowcount:
                    continue
            else:
                self.db.execute(marks, (*row, position))
                touched |= dict.fromkeys(row.names)
            if self.noted is not None:
                self.noted.append((row, position))
        return self._resolved(touched) if touched else []

    def _says_nothing(self, row: Row) -> bool:
        """Whether the same was seen before, and nobody else logged in on the device in between."""
        first, known = self.db.execute(f"SELECT min(time), min(created) FROM sightings WHERE {_same(row)}", row[:4]).fetchone()
        if first is None or first > row.time or known > row.created:
            return False
        if row.anonymous_id is None or len(row.names) == 1:
            return True
        before = f"""SELECT {_NAMES}, time, created FROM sightings
            WHERE anonymous_id = ? AND time <= ? AND coalesce(user_id, email, phone) IS NOT NULL ORDER BY time DESC, created DESC LIMIT 2"""
        logins = [Row(*found) for found in self.db.execute(before, [row.anonymous_id, row.time])]
        is_tie = len(logins) == 2 and logins[0].time == logins[1].time
        return bool(logins) and logins[0][:4] == row[:4] and logins[0].created <= row.created and not is_tie

    def _resolved(self, touched: dict[str, None]) -> list[Linked]:
        lone = {name: state for name in touched if (state := self._newcomer(name)) is not None}
        told = [linked for name, state in lone.items() for linked in self._kept(name, [], [state])]
        others = {name: None for name in touched if name not in lone}
        return told + self._joined(others) if others else told

    def _newcomer(self, name: str) -> _State | None:
        """What `people` would say of an identifier of whom nothing is known but one call that names nobody else: most are such at first."""
        rows = list(self._rows_of(name, {}).values())
        if len(rows) > 1 or len(rows[0].names) > 1:
            return None
        if self._is_desk(name) or self._states(name) or (self._has_edges and self._edges_of(name)):
            return None
        return _State(rows[0].time, surrogate(name), rows[0].created)

    def _joined(self, touched: dict[str, None]) -> list[Linked]:
        rows, edges, names = self._reached(touched)
        number = {name: place for place, name in enumerate(names)}
        codes = np.array([[number.get(name, -1) for name in row[:4]] for row in rows], np.int64).T  # type: ignore[arg-type]
        times = np.array([row[4:] for row in rows], np.int64)
        seen = deterministic.arranged(np.array(list(names), dtype=object), codes, times[:, 0], times[:, 1])
        before = {name: self._states(name) for name in names}
        known = {name: [state.created for state in states if state.customer_id == surrogate(name)] for name, states in before.items()}
        anchors = np.array([min(created, default=_NEVER) for created in known.values()], np.int64)
        found = deterministic.people(seen, _numbered(edges, number), anchors)
        ids = {root: surrogate(seen.name[root]) for root in set(found.root.tolist())}
        after = defaultdict(list)
        for place, root, time, created in zip(*(part.tolist() for part in found), strict=True):
            after[seen.name[place]].append(_State(time, ids[root], created))
        self.mark_desks(seen)
        return [linked for name in names for linked in self._kept(name, before[name], sorted(after[name]))]

    def _reached(self, touched: dict[str, None]) -> tuple[list[Row], list[tuple[str, str, str, int]], dict[str, None]]:
        """All that the answer for these identifiers can depend on: rows, edges, and the identifiers in both.

        A desk's address connects nobody, so it is not followed; it is a customer of its own.
        """
        names, waiting = dict(touched), list(touched)
        rows: dict[int, Row] = {}
        edges: dict[tuple[str, str, str, int], None] = {}
        lone: list[Row] = []
        desks = {name for name in waiting if self._is_desk(name)}
        while waiting:
            name = waiting.pop()
            if name in desks:
                lone += self._alone(name)
                continue
            fresh = self._rows_of(name, rows)
            desks |= {other for row in fresh.values() for other in row.names if other not in names and self._is_desk(other)}
            rows |= fresh
            joined = self._edges_of(name) if self._has_edges else []
            edges |= dict.fromkeys(joined)
            others = [other for row in fresh.values() for other in row.names] + [end for edge in joined for end in edge[:2]]
            new = [other for other in dict.fromkeys(others) if other not in names and other not in desks]
            names |= dict.fromkeys(new)
            waiting += new
        plain = [*(row.without(desks) for row in rows.values()), *lone]
        return plain, list(edges), dict.fromkeys(name for row in plain for name in row.names)  # an edge may lead to somebody never seen

    def _rows_of(self, name: str, known: dict[int, Row]) -> dict[int, Row]:
        kinds = ("user_id", "email") if name.startswith("email:") else ("user_id", "phone") if name.startswith("phone:") else None
        found = {}
        for kind in kinds or (name.split(":", 1)[0],):
            for row in self.db.execute(f"SELECT id, {_NAMES}, time, created FROM sightings WHERE {kind} = ?", [name]):
                if row[0] not in known:
                    found[row[0]] = Row(*row[1:])
        return found

    def _edges_of(self, name: str) -> list[tuple[str, str, str, int]]:
        return self.db.execute("SELECT one, other, state, time FROM edges WHERE one = ?1 OR other = ?1", [name]).fetchall()

    def _alone(self, name: str) -> list[Row]:
        rows = self._rows_of(name, {}).values()
        return [Row(name, None, None, None, min(row.time for row in rows), min(row.created for row in rows))]

    def _states(self, name: str) -> list[_State]:
        found = self.db.execute("SELECT time, customer_id, created FROM identities WHERE identifier = ? ORDER BY time", [name])
        return [_State(*row) for row in found]

    def _kept(self, name: str, before: list[_State], after: list[_State]) -> Iterator[Linked]:
        """Write the identifier's new states; tell them where another customer comes of them, or when the link was known."""
        if before == after:
            return
        self.db.execute("DELETE FROM identities WHERE identifier = ?", [name])
        self.db.executemany("INSERT INTO identities VALUES (?, ?, ?, ?)", [(name, *state) for state in after])
        if [state[1:] for state in before] != [state[1:] for state in after] or before[1:] != after[1:]:
            yield from (_linked(name, *state) for state in after)

    def _is_desk(self, name: str) -> bool:
        return self._desks and self.db.execute("SELECT 1 FROM desks WHERE identifier = ?", [name]).fetchone() is not None

    def mark_desks(self, seen: deterministic.Sightings) -> None:
        """Note down the addresses and numbers that too many people give."""
        found = seen.name[deterministic.are_shared(seen)] if len(seen.name) > deterministic.MAX_USERS else []
        if len(found):
            self.db.executemany("INSERT OR IGNORE INTO desks VALUES (?)", [(name,) for name in found])
            self._desks = True


def _same(row: Row) -> str:
    """SQL: whether a sighting names just the same; to be given the four names."""
    return " AND ".join(f"{name} IS ?" if value is None else f"{name} = ?" for name, value in zip(IDENTIFIERS, row, strict=False))


def row_of(sighting: Sighting) -> Row | None:
    """The first identifier of each kind, as an ingest reads them; an address given as user id stands in for one beside another."""
    by_kind = defaultdict(list)
    for name in sighting.subjects:
        by_kind[name.split(":", 1)[0]].append(name)
    emails = by_kind["email"]
    if not by_kind["user_id"] and len(emails) > 1:
        by_kind["user_id"], by_kind["email"] = emails[:1], emails[1:]
    user, email, phone, anonymous = (next(iter(by_kind[kind]), None) for kind in IDENTIFIERS)
    return Row(user, email, phone, anonymous, sighting.event_us, sighting.received_us) if sighting.subjects else None


def fresh(db: sqlite3.Connection, schema: str = "main") -> list[tuple[Row, Position]]:
    """The sightings that came since the tables, oldest first."""
    found = db.execute(f"SELECT {_NAMES}, time, created, position FROM {schema}.sightings WHERE NOT is_stored ORDER BY id").fetchall()
    return [(Row(*row), position) for *row, position in found]


def _numbered(edges: Sequence[tuple[str, str, str, int]], number: dict[str, int]) -> Edges:
    known = [(number[one], number[other], state, time) for one, other, state, time in edges if one in number and other in number]
    ends = {which: np.array([edge[:2] for edge in known if edge[2] == which], np.int64).reshape(-1, 2) for which in ("cut", "link")}
    return Edges(ends["cut"], ends["link"], np.array([edge[3] for edge in known if edge[2] == "link"], np.int64))


def _linked(name: str, time: int, customer: str, created: int) -> Linked:
    return Linked(name, customer, _EPOCH + time * _MICROSECOND, _EPOCH + created * _MICROSECOND)
