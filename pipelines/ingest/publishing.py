"""What a run made of its rows -> the home's tables, all of them as one.

In: the relations of `forming`, `permission`, `people`, `messages` and `quarantine`. Out: changes of the tables. A table, and a day of
the events, of which nothing changed keeps its files. Decides nothing.
"""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import duckdb
import pyarrow.parquet as pq

from pipelines import consent, tables
from pipelines.engine import literal
from pipelines.ingest import quarantine
from pipelines.ingest.forming import changed_days_sql, events_sql
from pipelines.ingest.messages import APPLIED, DROPPED, ERASED, halves_sql, message_sql
from pipelines.ingest.people import links_sql
from pipelines.tables import Changes, Table

_PIECE_ROWS = 200_000  # of a table, written at a time
_FULL_ROWS = 1_000_000  # of a file of messages that is left as it is
_SMALL_FILES = 40  # more of them are made one
_PEOPLE = "(SELECT who_no FROM owners SEMI JOIN staying USING (customer))"


def forget_the_rest(db: duckdb.DuckDBPyConnection) -> None:
    """Create `staying`: the customers with events, or whose own statement has to be honoured. Of others nothing is kept."""
    db.execute(
        f"""
        CREATE TABLE staying AS SELECT DISTINCT customer FROM formed
            UNION SELECT customer_id FROM consents WHERE basis = '{consent.STATED}';
        """
    ).fetchall()


def write_tables(db: duckdb.DuckDBPyConnection, home: Path, change: Changes, *, purpose: str, purposes: Sequence[str]) -> None:
    """Write what the run changed of events, identities, consents, traits, profiles and items."""
    _write_events(db, home, change, purposes)
    named = "JOIN customers ON customers.customer = told.customer_id"
    consents = f"""SELECT customers.customer_id, identifier, purpose, is_allowed, basis, source, policy_version, evidence,
            event_timestamp, created_timestamp
        FROM (SELECT * RENAME (identifier AS number, source AS source_no) FROM kept_consents) told {named}
        JOIN staying ON staying.customer = told.customer_id JOIN (SELECT number, identifier FROM names) USING (number)
        LEFT JOIN sources USING (source_no)"""
    known = f"""SELECT customers.customer_id, event_timestamp, is_personalization_allowed
        FROM ({consent.known_sql("consents", purpose=purpose)}) told {named} JOIN staying ON staying.customer = told.customer_id"""
    order: dict[Table, tuple[str, str]] = {
        tables.IDENTITY_LINKS: (
            f"SELECT * EXCLUDE (who_no) FROM ({links_sql()}) SEMI JOIN {_PEOPLE} USING (who_no)",
            "anonymous_id, user_id, email, phone, event_timestamp",
        ),
        tables.IDENTITIES: (
            "SELECT identities.* FROM identities JOIN customers USING (customer_id) SEMI JOIN staying USING (customer)",
            "identifier, event_timestamp",
        ),
        tables.CONSENTS: (consents, "customer_id, purpose, event_timestamp, identifier, basis"),
        tables.SPEAKING_SOURCES: ("SELECT source, since AS event_timestamp FROM speaking JOIN sources USING (source_no)", "source"),
        tables.CUSTOMER_CONSENT: (known, "customer_id, event_timestamp"),
        tables.TRAITS: (
            f"""SELECT identifier, trait, value, source, event_timestamp, created_timestamp FROM words SEMI JOIN {_PEOPLE} USING (who_no)
                JOIN names ON number = who_no JOIN sources USING (source_no)""",
            "identifier, trait, event_timestamp, source, value",
        ),
        tables.CUSTOMER_PROFILE: ("SELECT * FROM profile", "customer_id, event_timestamp"),
        tables.ITEMS: ("SELECT * FROM all_items", "item_id"),
    }
    for table, (rows, by) in order.items():
        change.write(table, db.sql(f"SELECT * FROM ({rows}) ORDER BY {by}").to_arrow_reader(_PIECE_ROWS))


def write_messages(db: duckdb.DuckDBPyConnection, home: Path, change: Changes) -> None:
    """Remember the messages of this run, and what became of older ones whose events it took out or let in."""
    db.execute(
        f"""
        CREATE VIEW ended AS
            SELECT source_no, message, CASE WHEN dropped.row IS NULL THEN '{APPLIED}' ELSE '{DROPPED}' END AS outcome,
                received_timestamp AS created_timestamp
            FROM (FROM fresh WHERE line = 0) fresh LEFT JOIN dropped USING (origin, row)
            UNION ALL SELECT source_no, message, '{ERASED}', received_timestamp FROM buried
            UNION ALL SELECT source_no, message, '{ERASED}', created_timestamp FROM buried_refused;
        CREATE TABLE turned AS
            SELECT ended.source_no, ended.message, ended.outcome FROM ended JOIN seen USING (source_no, message)
                WHERE seen.outcome = '{DROPPED}' AND ended.outcome <> '{DROPPED}'
            UNION SELECT source_no,
                unnest([{message_sql("event_id")}, {message_sql("regexp_replace(event_id, ':[0-9]+$', '')")}]), '{DROPPED}'
                FROM old_lines JOIN refused_lines USING (place);
        """
    ).fetchall()
    fresh = f"""
        SELECT source, {halves_sql("message")}, outcome, created_timestamp
        FROM (FROM ended ANTI JOIN (FROM seen WHERE outcome = '{DROPPED}') known USING (source_no, message))
            JOIN sources USING (source_no)"""
    stored = tables.files(home, tables.MESSAGES) if tables.exists(home, tables.MESSAGES) else []
    again = _touched(db, stored)
    rows = fresh
    if again:
        rows = f"""
            SELECT source, message_high, message_low, coalesce(turned.outcome, old.outcome) AS outcome, created_timestamp
            FROM read_parquet([{", ".join(literal(str(path)) for path in again)}]) old LEFT JOIN (
                SELECT source, {halves_sql("message")}, outcome FROM turned JOIN sources USING (source_no)) turned
                USING (source, message_high, message_low)
            UNION ALL {fresh}"""
    if again or not stored or _any(db, fresh):
        change.replace(tables.MESSAGES, db.sql(rows).to_arrow_reader(_PIECE_ROWS), keep=[path for path in stored if path not in again])


def write_quarantine(db: duckdb.DuckDBPyConnection, home: Path, change: Changes, *, space: Path) -> None:
    """Add what was set aside; take out what has since been applied, or was a duplicate of it, and note the new reason of the rest."""
    leaving = "SELECT quarantine_id FROM leaving"
    is_leaving, is_new = _any(db, leaving), _any(db, "SELECT 1 FROM set_aside")
    if not is_leaving and not is_new and tables.exists(home, tables.QUARANTINE):
        return
    fresh = quarantine.rows(db, space) if is_new else iter(())
    if not is_leaving:
        change.append(tables.QUARANTINE, fresh)
        return
    stored = db.sql(
        """SELECT * REPLACE (coalesce(judged.reason, stored.reason) AS reason, coalesce(judged.detail, stored.detail) AS detail)
        FROM (SELECT * FROM old_quarantine ANTI JOIN (FROM leaving WHERE reason IS NULL) gone USING (quarantine_id)) stored
        LEFT JOIN leaving judged USING (quarantine_id) ORDER BY created_timestamp, file, row"""
    )
    change.write(tables.QUARANTINE, chain(stored.to_arrow_reader(_PIECE_ROWS), fresh))


def _write_events(db: duckdb.DuckDBPyConnection, home: Path, change: Changes, purposes: Sequence[str]) -> None:
    """The days of which a row is new, gone or another; the files of the others stay."""
    _canonise(db, purposes)
    stored = tables.files(home, tables.EVENTS) if tables.exists(home, tables.EVENTS) else []
    keep: list[Path] = []
    if _any(db, "SELECT 1 FROM old_lines"):
        db.execute(f"CREATE TABLE changed_days AS {changed_days_sql()}").fetchall()
        if not _any(db, "FROM changed_days"):
            return
        keep = _untouched(db, stored)
    rows = events_sql("changed_days" if keep else None)
    reader = db.sql(f"SELECT * FROM ({rows}) ORDER BY event_timestamp, source, event_id").to_arrow_reader(_PIECE_ROWS)
    change.replace(tables.EVENTS, reader, keep=keep)


def _untouched(db: duckdb.DuckDBPyConnection, stored: Sequence[Path]) -> list[Path]:
    """The files of the events that hold no changed day; of the others every day is one from now on, as no row may be written twice."""
    keep = [(path, span) for path in stored if (span := tables.days(path))]
    changed = [(str(day), str(day)) for (day,) in db.sql("SELECT day FROM changed_days").fetchall()]
    while changed:
        hit = [one for one in keep if any(one[1][0] <= last and first <= one[1][1] for first, last in changed)]
        keep = [one for one in keep if one not in hit]
        changed = [span for _, span in hit if span[0] < span[1]]
        if changed:
            every = "unnest(generate_series(CAST(? AS DATE), CAST(? AS DATE), INTERVAL 1 DAY))"
            db.executemany(f"INSERT INTO changed_days SELECT CAST({every} AS DATE)", changed)
    return [path for path, _ in keep]


def _canonise(db: duckdb.DuckDBPyConnection, purposes: Sequence[str]) -> None:
    """Create `permissions`: the statements that came with rows, as they are stored with events: the purposes that we know, alone."""
    said = [
        f"""{literal(f'"{name}":')} || CAST(CAST(json_extract(consent, {literal(f'$."{name}"')}) AS VARCHAR) = 'true' AS VARCHAR)"""
        for name in sorted(set(purposes))
    ]
    db.execute(
        f"""CREATE TABLE permissions AS SELECT consent, '{{' || nullif(concat_ws(',', {", ".join(said)}), '') || '}}' AS stored
        FROM (SELECT DISTINCT consent FROM staged WHERE is_good AND json_valid(consent))"""
    ).fetchall()


def _touched(db: duckdb.DuckDBPyConnection, stored: list[Path]) -> list[Path]:
    """Files of the messages table to write anew: those with an outcome that turned, and many small ones."""
    small = [path for path in stored if pq.ParquetFile(path).metadata.num_rows < _FULL_ROWS]
    again = set(small if len(small) > _SMALL_FILES else ())
    if stored and _any(db, "SELECT 1 FROM turned"):
        named = ", ".join(literal(str(path)) for path in stored)
        found = db.sql(
            f"""SELECT DISTINCT filename FROM read_parquet([{named}], filename = true) SEMI JOIN (
                SELECT source, {halves_sql("message")} FROM turned JOIN sources USING (source_no))
                    USING (source, message_high, message_low)"""
        ).fetchall()
        again |= {Path(name) for (name,) in found}
    return sorted(again)


def _any(db: duckdb.DuckDBPyConnection, query: str) -> bool:
    return bool(db.sql(f"SELECT 1 FROM ({query}) LIMIT 1").fetchall())
