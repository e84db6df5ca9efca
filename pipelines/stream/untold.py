"""Whom the stream knows more of than the tables do: no load may put online what the tables say of them.

In: the stream's states of a home, what its linker saw, and the tables. Out: customers and items, by the tables' ids: those with calls
that no ingest has applied, those whose identifiers such calls joined or parted, and those of whom the tables hold events that a refusal,
or a source that began to speak, takes out. The stream keeps their rows true; what it took out stays out. Whom an ingest alone joined or
parted is loaded. Rather too many than one too few: whoever is left out comes by the stream, or with the tables that follow the next
ingest. Nothing where no stream ever ran.
"""

import sqlite3
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from pipelines import consent, tables
from pipelines.engine import literal
from pipelines.errors import StoreError
from pipelines.identity import undrained
from pipelines.identity.filling import drained_of
from pipelines.stream.state import FOLDER, State

# Every identifier of a customer who refused, by the stream's word on who is who, and when. One that nobody owns stands for itself.
_REFUSED = """
    SELECT DISTINCT coalesce(other.who, said.who), said.purpose, said.said_us FROM said
    LEFT JOIN owners mine ON mine.who = said.who LEFT JOIN owners other ON other.customer_id = mine.customer_id
    WHERE said.is_stated AND NOT said.is_allowed"""
_EVENTS = """
    SELECT DISTINCT coalesce(other.who, rows.who), rows.item_id, rows.position FROM rows
    LEFT JOIN owners mine ON mine.who = rows.who LEFT JOIN owners other ON other.customer_id = mine.customer_id
    WHERE rows.file IS NULL"""


class Untold(NamedTuple):
    """By the ids of the tables."""

    customers: frozenset[str]
    items: frozenset[str]


def find(con: Any, home: Path, *, has_basis: bool) -> Untold:
    """Of whom the tables say too little or too much. con: an open DuckDB. has_basis: the settings declare one, which yields to people.

    Raises StoreError where a state cannot be read.
    """
    held = _held(home)
    if not held.owners or not tables.exists(home, tables.IDENTITIES):
        return Untold(frozenset(), frozenset())
    _register(con, "told_owners", held.owners, "who", "customer_id")
    _register(con, "told_refused", held.refused, "who", "purpose", "at_us")
    _register(con, "told_spoken", held.spoken if has_basis else (), "source", "at_us")
    _register(con, "told_events", [(who,) for who in held.senders], "who")
    _register(con, "told_links", [(who,) for who in held.linked], "who")
    con.execute(f"CREATE OR REPLACE TEMP TABLE identities AS SELECT identifier AS who, customer_id FROM ({_rows(home, tables.IDENTITIES)})")
    told = con.execute("""
        WITH either AS (SELECT * FROM identities UNION SELECT * FROM told_owners),
        people AS (SELECT DISTINCT customer_id FROM either SEMI JOIN told_links USING (who)),
        linked AS (SELECT DISTINCT who FROM either SEMI JOIN people USING (customer_id)),
        mine AS (SELECT * FROM told_owners SEMI JOIN linked USING (who)),
        theirs AS (SELECT * FROM identities SEMI JOIN linked USING (who))
        SELECT customer_id FROM identities SEMI JOIN told_events USING (who)
        UNION SELECT customer_id FROM (SELECT * FROM theirs SEMI JOIN mine USING (who) EXCEPT SELECT * FROM mine)
        UNION SELECT customer_id FROM (SELECT * FROM mine SEMI JOIN theirs USING (who) EXCEPT SELECT * FROM theirs)""")
    customers = told.fetchall()  # before anything else is asked: a connection has one answer
    outlived = _outlived(con, home)
    found = [*(who for (who,) in customers), *(who for who, _ in outlived)]
    return Untold(frozenset(filter(None, found)), frozenset(filter(None, [*held.items, *(item for _, item in outlived)])))


def mark(home: Path, untold: Untold) -> None:
    """Have the stream make these anew: something of them was loaded while it heard of it. Raises StoreError."""
    owned = tables.read_arrow(home, tables.IDENTITIES, ["identifier", "customer_id"]).to_pylist()
    names = [row["identifier"] for row in owned if row["customer_id"] in untold.customers]
    for path in _paths(home):
        with closing(State(path)) as state, state.transaction():
            owners = {each.customer_id for states in state.owners(names).values() for each in states}
            state.timetable.mark(sorted(owners | untold.customers))
            for item in sorted(untold.items):
                state.items.mark(f"SELECT {literal(item)} AS item_id")


@dataclass
class _Held:
    """What the workers hold that the tables may not. senders, items, linked: of calls that no ingest has applied."""

    owners: set[tuple[str, str]] = field(default_factory=set)  # identifier, customer
    refused: set[tuple[str, str, int]] = field(default_factory=set)  # identifier, purpose, microseconds
    spoken: set[tuple[str, int]] = field(default_factory=set)  # source, since
    senders: set[str] = field(default_factory=set)
    items: set[str | None] = field(default_factory=set)
    linked: set[str] = field(default_factory=set)  # identifiers


def _held(home: Path) -> _Held:
    held, paths = _Held(), list(_paths(home))
    if not paths:
        return held
    covered = drained_of(home)
    held.linked = undrained.seen_since(home, covered)
    for path in paths:
        try:
            with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=10.0)) as db:
                held.owners |= set(db.execute("SELECT DISTINCT who, customer_id FROM owners"))
                held.refused |= set(db.execute(_REFUSED))
                held.spoken |= set(db.execute("SELECT source, since_us FROM spoken"))
                for who, item, position in db.execute(_EVENTS):
                    if position is None or position not in covered:
                        held.senders.add(who)
                        held.items.add(item)
        except sqlite3.Error as error:
            raise StoreError(
                f"features: {path} could not be read ({error}); what people refused stands there, so nothing is loaded without it; "
                f"mend its rights, or run `rapport ingest` and delete {path.name}* in {path.parent}"
            ) from error
    return held


def _outlived(con: Any, home: Path) -> list[tuple[str | None, str | None]]:
    """Customers and items of the stored events that words take out of which the tables know nothing."""
    con.execute(f"""CREATE OR REPLACE TEMP TABLE untold_refused AS
        WITH refused AS (SELECT DISTINCT customer_id, purpose, at_us FROM told_refused JOIN identities USING (who)),
        known AS (
            SELECT customer_id, purpose, at_us, arg_max(NOT is_allowed, (event_timestamp, NOT is_allowed)) AS is_refused
            FROM refused JOIN ({_rows(home, tables.CONSENTS)}) USING (customer_id, purpose)
            WHERE basis = '{consent.STATED}' AND epoch_us(event_timestamp) <= at_us GROUP BY customer_id, purpose, at_us)
        SELECT customer_id, min(at_us) AS at_us
        FROM refused ANTI JOIN (SELECT * FROM known WHERE is_refused) USING (customer_id, purpose, at_us) GROUP BY customer_id""")
    con.execute(f"""CREATE OR REPLACE TEMP TABLE untold_spoken AS
        SELECT source, min(at_us) AS at_us, any_value(known_us) AS known_us FROM told_spoken
        LEFT JOIN (SELECT source, epoch_us(event_timestamp) AS known_us FROM ({_rows(home, tables.SPEAKING_SOURCES)})) USING (source)
        WHERE known_us IS NULL OR at_us < known_us GROUP BY source""")
    if not any(con.execute(f"SELECT 1 FROM {name} LIMIT 1").fetchone() for name in ("untold_refused", "untold_spoken")):
        return []
    events = f"SELECT customer_id, source, item_id, epoch_us(event_timestamp) AS ts FROM ({_rows(home, tables.EVENTS)})"
    found: list[tuple[str | None, str | None]] = con.execute(f"""
        SELECT DISTINCT customer_id, item_id FROM ({events}) JOIN untold_refused USING (customer_id) WHERE ts >= at_us
        UNION SELECT DISTINCT customer_id, item_id FROM ({events}) JOIN untold_spoken USING (source)
        WHERE ts >= at_us AND (known_us IS NULL OR ts < known_us)""").fetchall()
    return found


def _paths(home: Path) -> Iterator[Path]:
    yield from sorted((home / FOLDER).glob("state*.db"))


def _rows(home: Path, table: tables.Table) -> str:
    return tables.rows_sql(home, table)


def _register(con: Any, name: str, rows: Collection[Sequence[Any]], *columns: str) -> None:
    kinds = {column: pa.int64() if column.endswith("_us") else pa.string() for column in columns}
    values = zip(*rows, strict=True) if rows else [()] * len(columns)
    con.register(name, pa.table({column: pa.array(some, kinds[column]) for column, some in zip(columns, values, strict=True)}))
