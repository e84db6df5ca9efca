"""What the stream knows of everybody's events, on disk: `<home>/stream/state.db`.

In: clean rows, whose each identifier is, statements on consent. Out: a customer's rows in order of enter, so that what was counted of
them can be counted anew whenever who is who changes, and after a crash; and when the windows of which customers expire next.
Rows are unique by (source, event_id). Everything is written inside `transaction`. Never decides what may be kept.
"""

import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.errors import StoreError
from pipelines.online.file import LONG_WAL_PAGES
from pipelines.private_file import flush, open_private, sweep, transaction
from pipelines.stream import categories, item_rows, timetable
from pipelines.stream.categories import Categories
from pipelines.stream.item_rows import ItemRows
from pipelines.stream.rows import CleanRow
from pipelines.stream.timetable import Timetable

FOLDER = "stream"
SHAPE = 2  # of the tables; to be raised with every change of them

_AT_A_TIME = 500
COLUMNS = (
    "source", "event_id", "who", "type", "event_us", "known_us", "received_us", "item_id", "order_id", "session_id", "quantity",
    "price_cents", "revenue_cents", "allows", "category", "file", "position",
)  # fmt: skip
# known_us: when we knew the event, and of a stored one also whose it was. allows: purposes, by commas. category: what the row says of its
# item, null of a stored one, whose word is in the table items. file: the stored one it is from, null for the log's; position: its own in
# the log.
_ROWS = """(
    source TEXT NOT NULL, event_id TEXT NOT NULL, who TEXT NOT NULL, type TEXT NOT NULL, event_us INTEGER NOT NULL,
    known_us INTEGER NOT NULL, received_us INTEGER NOT NULL, item_id TEXT, order_id TEXT, session_id TEXT, quantity INTEGER,
    price_cents INTEGER, revenue_cents INTEGER NOT NULL, allows TEXT NOT NULL, category TEXT,
    file INTEGER, position INTEGER)"""
INDICES = {
    "rows_by_id": "UNIQUE INDEX rows_by_id ON rows (source, event_id)",
    "rows_by_who": "INDEX rows_by_who ON rows (who)",
    "rows_by_file": "INDEX rows_by_file ON rows (file) WHERE file IS NOT NULL",
    "rows_of_log": "INDEX rows_of_log ON rows (position) WHERE file IS NULL",
    "rows_by_item": "INDEX rows_by_item ON rows (item_id) WHERE item_id IS NOT NULL",
    **categories.INDICES,
}
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS rows {_ROWS};
{"".join(f"CREATE {index.replace('INDEX', 'INDEX IF NOT EXISTS', 1)};" for index in INDICES.values())}
CREATE TABLE IF NOT EXISTS owners (
    who TEXT NOT NULL, since_us INTEGER NOT NULL, customer_id TEXT NOT NULL, linked_us INTEGER NOT NULL,
    PRIMARY KEY (who, since_us)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS owners_by_customer ON owners (customer_id);
CREATE TABLE IF NOT EXISTS said (
    who TEXT NOT NULL, purpose TEXT NOT NULL, said_us INTEGER NOT NULL, is_stated INTEGER NOT NULL, is_allowed INTEGER NOT NULL,
    is_stored INTEGER NOT NULL, PRIMARY KEY (who, purpose, said_us, is_stated)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS spoken (source TEXT PRIMARY KEY, since_us INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS files (number INTEGER PRIMARY KEY, stamp TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS notes (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
{timetable.SCHEMA}{item_rows.SCHEMA}{categories.SCHEMA}
"""
TABLES = ("rows", "owners", "said", "spoken", "due", "files", "notes", *item_rows.TABLES, *categories.TABLES)
_FEATURES = """type, event_us, item_id, order_id, session_id, quantity, price_cents, revenue_cents, allows, source, event_id, known_us,
    (SELECT category FROM categories WHERE categories.item_id = rows.item_id)"""
_SAID = """INSERT INTO said VALUES (?, ?, ?, ?, ?, ?)
    ON CONFLICT (who, purpose, said_us, is_stated) DO UPDATE SET is_allowed = min(is_allowed, excluded.is_allowed)"""


class Owned(NamedTuple):
    """Whose an identifier is from a time on, and when we knew. Microseconds, UTC."""

    since_us: int
    customer_id: str
    linked_us: int


class Said(NamedTuple):
    """A statement. `is_stated`: by the person, not declared for a source."""

    purpose: str
    said_us: int
    is_stated: bool
    is_allowed: bool


class Held(NamedTuple):
    """A row of a customer. `row`: as Tiles and Visit take it; `enter_us`: from when on it counts."""

    enter_us: int
    row: dict[str, Any]
    allows: tuple[str, ...]
    key: tuple[str, str]  # source, event_id
    known_us: int  # when we knew it and whose it is


def path_of(home: Path, share: tuple[int, int] = (0, 1)) -> Path:
    """The file of one worker."""
    return home / FOLDER / (f"state-{share[0]}.db" if share[0] else "state.db")


def erase(home: Path, *, identifiers: Sequence[str], customers: Sequence[str], spells: Sequence[tuple[str, int, int]] = ()) -> int:
    """Delete what every worker holds of a person, the bytes too; returns the rows. Raises StoreError where a file is in use.

    spells: devices that were theirs for a time, since when and until when (microseconds).
    """
    removed = 0
    for path in sorted((home / FOLDER).glob("state*.db")):
        with closing(State(path)) as state:
            removed += state.erase(identifiers, customers, spells)
    return removed


class State:
    """One file; one thread. `close` it at the end."""

    def __init__(self, path: Path) -> None:
        """Raises StoreError for a file whose tables are another version's."""
        self.path = path
        shape = "" if path.exists() else f"PRAGMA user_version = {SHAPE};"
        self.db = open_private(path, shape, room="stream", is_durable=False)  # see `sync`
        if (found := self.db.execute("PRAGMA user_version").fetchone()[0]) != SHAPE:
            self.db.close()
            raise StoreError(
                f"stream: {path} is of shape {found}, expected {SHAPE}: another version of this program wrote it; run `rapport ingest`, "
                f"then delete {path.name}* in {path.parent}, and it is made anew from the tables"
            )
        try:
            self.db.executescript(f"{_SCHEMA}PRAGMA wal_autocheckpoint = {LONG_WAL_PAGES};")
        except sqlite3.Error as error:
            self.db.close()
            raise StoreError(f"stream: {path} could not be opened ({error}); check its rights and the space on its disk") from error
        self.timetable, self.items = Timetable(self.db), ItemRows(self.db)
        self.categories = Categories(self.db, self.timetable)

    @contextmanager
    def transaction(self) -> Iterator["State"]:
        """All that is written inside is there at its end, or nothing: it outlives the process. Raises StoreError where the disk refuses."""
        with transaction(self.db, self.path, room="stream"):
            yield self

    def sync(self) -> None:
        """What was written outlives a loss of power too: before the log is told, and not before it can be seen."""
        flush(self.path, room="stream")

    def close(self) -> None:
        """Let the file go."""
        self.db.close()

    # -- rows

    def positions(self, messages: Iterable[tuple[str, str]]) -> dict[tuple[str, str], int | None]:
        """By source and event_id the rows of these messages (source, message id): where in the log each came from, None from elsewhere."""
        names: dict[str, list[str]] = {}
        for source, message_id in messages:
            names.setdefault(source, []).extend((message_id, f"{message_id}:0"))
        found: dict[tuple[str, str], int | None] = {}
        for source, every in names.items():
            for some in _pieces(every):
                statement = f"SELECT event_id, position FROM rows WHERE source = ? AND event_id IN ({','.join('?' * len(some))})"
                found |= {(source, event_id): position for event_id, position in self.db.execute(statement, (source, *some))}
        return found

    def keep(self, rows: Iterable[CleanRow], *, position: int | None, purposes: Collection[str]) -> None:
        """Add rows that came by the log; of what they allow those purposes that count, as of a stored one."""
        self.db.executemany(
            f"INSERT OR IGNORE INTO rows ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))})",
            [
                (row.source, row.event_id, row.who, row.type, row.event_us, row.received_us, row.received_us, row.item_id, row.order_id,
                 row.session_id, row.quantity, row.price_cents, row.revenue_cents,
                 ",".join(purpose for purpose in row.allows if purpose in purposes), row.category, None, position)
                for row in rows
            ],
        )  # fmt: skip

    def drop(self, keys: Sequence[tuple[str, str]]) -> None:
        """Take out rows by source and event_id."""
        self.db.executemany("DELETE FROM rows WHERE source = ? AND event_id = ?", keys)

    def spells_of(self, customer: str) -> dict[str, list[Owned]]:
        """The identifiers that are or were theirs, each with whose it was by time."""
        found: dict[str, list[Owned]] = {}
        theirs = "SELECT * FROM owners WHERE who IN (SELECT who FROM owners WHERE customer_id = ?) ORDER BY who, since_us"
        for who, *state in self.db.execute(theirs, (customer,)):
            found.setdefault(who, []).append(Owned(*state))
        return found

    def rows_of(self, customer: str, spells: Mapping[str, Sequence[Owned]] | None = None) -> list[Held]:
        """A customer's rows in order of enter, then time: what their identifiers did while they were theirs. `spells`: where known."""
        found: list[Held] = []
        for who, states in (self.spells_of(customer) if spells is None else spells).items():
            for values in self.db.execute(f"SELECT {_FEATURES} FROM rows WHERE who = ?", (who,)):
                owned = owner_at(states, values[1])
                if owned.customer_id == customer:
                    found.append(_held(values, owned.linked_us))
        found.sort(key=_order)
        return found

    # -- who is who

    def owners(self, names: Collection[str]) -> dict[str, list[Owned]]:
        """Whose identifiers are, by time; those of nobody are left out."""
        found: dict[str, list[Owned]] = {}
        for some in _pieces(list(names)):
            marks = ",".join("?" * len(some))
            for who, *state in self.db.execute(f"SELECT * FROM owners WHERE who IN ({marks}) ORDER BY who, since_us", some):
                found.setdefault(who, []).append(Owned(*state))
        return found

    def own(self, links: Mapping[str, Sequence[Owned]]) -> set[str]:
        """Take over whose these identifiers are; returns the customers for whom something follows."""
        before = self.owners(links.keys())
        changed = {who: states for who, states in links.items() if before.get(who) != list(states)}
        if not changed:
            return set()
        self.db.executemany("DELETE FROM owners WHERE who = ?", [(who,) for who in changed])
        self.db.executemany(
            "INSERT INTO owners VALUES (?, ?, ?, ?)", [(who, *state) for who, states in changed.items() for state in states]
        )
        return {state.customer_id for who, states in changed.items() for state in (*states, *before.get(who, ()))}

    def identifiers_after(self, before: str | None, limit: int) -> list[str]:
        """The next identifiers of which it is noted whose they are, in order."""
        found = self.db.execute("SELECT DISTINCT who FROM owners WHERE who > ? ORDER BY who LIMIT ?", (before or "", limit))
        return [who for (who,) in found]

    def disown(self, identifiers: Sequence[str]) -> set[str]:
        """Nobody knows these any more: what came by the log for them goes. Returns the customers whose they were."""
        customers = {state.customer_id for states in self.owners(identifiers).values() for state in states}
        for statement in ("DELETE FROM owners WHERE who = ?", "DELETE FROM rows WHERE who = ? AND file IS NULL"):
            self.db.executemany(statement, [(name,) for name in identifiers])
        return customers

    # -- consent

    def statements_of(self, customer: str, spells: Mapping[str, Sequence[Owned]] | None = None) -> list[Said]:
        """What a customer said beside their rows, and what was declared for them. `spells`: where they are known."""
        found = []
        for who, states in (self.spells_of(customer) if spells is None else spells).items():
            for purpose, said_us, is_stated, is_allowed in self.db.execute(
                "SELECT purpose, said_us, is_stated, is_allowed FROM said WHERE who = ?", (who,)
            ):
                if owner_at(states, said_us).customer_id == customer:
                    found.append(Said(purpose, said_us, bool(is_stated), bool(is_allowed)))
        return found

    def hear(self, who: str, said: Said, *, is_stored: bool = False) -> None:
        """Keep a statement. Of who never allowed a thing the first and the last refusal are enough: what lies between is refused too."""
        self.db.execute(_SAID, (who, said.purpose, said.said_us, said.is_stated, said.is_allowed, is_stored))
        if said.is_stated and not said.is_allowed and not is_stored:
            own = "who = ?1 AND purpose = ?2 AND is_stated AND NOT is_stored"
            self.db.execute(
                f"""DELETE FROM said WHERE {own} AND said_us IN (
                    SELECT said_us FROM (
                        SELECT said_us, is_allowed, lag(is_allowed) OVER by_time AS before, lead(is_allowed) OVER by_time AS after
                        FROM said WHERE {own} WINDOW by_time AS (ORDER BY said_us))
                    WHERE NOT is_allowed AND NOT before AND NOT after)
                AND NOT EXISTS (SELECT 1 FROM rows WHERE who = ?1 AND allows <> '')""",
                (who, said.purpose),
            )

    def speak(self, source: str, since_us: int) -> None:
        """People of this source said themselves what may be done, at this time."""
        insert = "INSERT INTO spoken VALUES (?, ?) ON CONFLICT (source) DO UPDATE SET since_us = min(since_us, excluded.since_us)"
        self.db.execute(insert, (source, since_us))

    def spoken(self) -> dict[str, int]:
        """The sources whose people do, or ever did, and since when."""
        return dict(self.db.execute("SELECT source, since_us FROM spoken").fetchall())

    def customers_since(self, source: str, since_us: int, *, of_log: bool) -> list[str]:
        """Who has rows of this source from this time on; `of_log`: of those that are in no table."""
        index, only = ("INDEXED BY rows_of_log", "AND file IS NULL") if of_log else ("", "")
        query = f"SELECT DISTINCT who FROM rows {index} WHERE source = ? AND event_us >= ? {only}"
        names = self.db.execute(query, (source, since_us))
        return sorted({state.customer_id for states in self.owners([who for (who,) in names]).values() for state in states})

    # -- what expires

    def next_due_us(self) -> int | None:
        """When a customer or an item next changes by itself, or is to be made anew."""
        found = [self.timetable.next_us(), self.items.next_due_us()]
        return min((at_us for at_us in found if at_us is not None), default=None)

    # -- notes, and the end

    def note(self, name: str) -> str | None:
        """What was noted down under a name."""
        found = self.db.execute("SELECT value FROM notes WHERE name = ?", (name,)).fetchone()
        return None if found is None else str(found[0])

    def put_note(self, name: str, value: str) -> None:
        """Note something down."""
        self.db.execute("INSERT OR REPLACE INTO notes VALUES (?, ?)", (name, value))

    def forget(self, identifiers: Sequence[str], customers: Sequence[str]) -> int:
        """Delete what is held under these; returns the rows."""
        removed = 0
        for table in ("rows", "owners", "said"):
            removed += self.db.executemany(f"DELETE FROM {table} WHERE who = ?", [(name,) for name in identifiers]).rowcount
        for table in ("owners", "due"):
            removed += self.db.executemany(f"DELETE FROM {table} WHERE customer_id = ?", [(customer,) for customer in customers]).rowcount
        return removed

    def erase(self, identifiers: Sequence[str], customers: Sequence[str], spells: Sequence[tuple[str, int, int]] = ()) -> int:
        """The same, and their bytes are gone from the file and from the log beside it."""
        with self.transaction():
            removed = self.forget(identifiers, customers)
            for table, time_us in (("rows", "event_us"), ("said", "said_us")):
                removed += self.db.executemany(f"DELETE FROM {table} WHERE who = ? AND {time_us} >= ? AND {time_us} < ?", spells).rowcount
        sweep(self.db, self.path, room="stream")
        return removed


def owner_at(states: Sequence[Owned], event_us: int) -> Owned:
    """Whose an identifier was at a time; before it was ever seen, whose it was first."""
    return next((state for state in reversed(states) if state.since_us <= event_us), states[0])


def _held(values: Sequence[Any], linked_us: int) -> Held:
    kind, event_us, item, order, session, quantity, price, revenue, allows, source, event_id, known_us, category = values
    row = {"type": kind, "ts": event_us, "item_id": item, "order_id": order, "session_id": session, "quantity": quantity,
           "price_cents": price, "revenue_cents": revenue, "category": category}  # fmt: skip
    known = max(known_us, linked_us)
    return Held(max(event_us, known), row, tuple(allows.split(",")) if allows else (), (source, event_id), known)


def held(row: CleanRow, linked_us: int, category: str | None) -> Held:
    """The same of a row that was just read; `category`: of its item."""
    return _held(
        (row.type, row.event_us, row.item_id, row.order_id, row.session_id, row.quantity, row.price_cents, row.revenue_cents,
         ",".join(row.allows), row.source, row.event_id, row.received_us, category),
        linked_us,
    )  # fmt: skip


def _order(held: Held) -> tuple[int, int]:
    return held.enter_us, held.row["ts"]


def _pieces(values: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(values), _AT_A_TIME):
        yield values[start : start + _AT_A_TIME]
