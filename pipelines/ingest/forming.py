"""Lines that may be stored -> events with session and flags, and what they say of customers and items.

In: `owned` and `old_owned` without `dropped` and `refused_lines`. Out: `formed`, `words`, `profile` and `all_items`. What depends on
the lines beside it (sessions, outliers, near-duplicates, unmatched returns) is made anew over all of them, so that the order of
arrival changes nothing.
"""

from collections.abc import Iterator

import duckdb
import numpy as np
import pyarrow as pa

from pipelines import quality, tables, traits
from pipelines.ingest.names import stored_sql
from pipelines.ingest.people import assigned_sql
from pipelines.settings import IngestSettings
from pipelines.sources.mapping import TRAITS

SESSION = "s:"  # what an assigned session id starts with
_PIECE_ROWS = 1_000_000
_MADE = ("created_timestamp", "session_id", "revenue_cents", "is_outlier", "is_near_duplicate", "is_unmatched")


def match_returns(db: duckdb.DuckDBPyConnection, limits: IngestSettings) -> None:
    """Create `unmatched`: the places of returns of which no purchase is known. If they are to be refused, the new ones are.

    Then they are no longer good, and those in `refused` for their sake stay there.
    """
    db.execute("CREATE TABLE unmatched (place BIGINT)").fetchall()
    if not db.sql("SELECT 1 FROM staged WHERE type = 'return' UNION ALL SELECT 1 FROM old_lines WHERE type = 'return' LIMIT 1").fetchall():
        return
    # Only what a return can be matched by is looked at, and when each source began.
    db.execute(
        """
        CREATE TABLE orders AS
            SELECT place, source_no AS source, customer AS customer_id, order_id, owned.item_id, owned.type, owned.event_timestamp
            FROM owned JOIN (SELECT place, order_id FROM staged WHERE type IN ('purchase', 'return')) USING (place)
            UNION ALL SELECT place, old_lines.source_no, customer, order_id, item_id, type, old_lines.event_timestamp
            FROM (SELECT place, customer FROM old_owned) JOIN old_lines USING (place) WHERE type IN ('purchase', 'return');
        CREATE TABLE returned AS FROM orders WHERE type = 'return';
        CREATE TABLE bought AS
            SELECT * FROM orders SEMI JOIN returned USING (customer_id, item_id) WHERE type = 'purchase'
            UNION SELECT * FROM orders SEMI JOIN returned USING (order_id) WHERE type = 'purchase'
            UNION SELECT * FROM orders SEMI JOIN (
                SELECT source, min(event_timestamp) AS event_timestamp FROM orders WHERE type = 'purchase' GROUP BY source) began
                USING (source, event_timestamp) WHERE type = 'purchase';
        """
    ).fetchall()
    found = quality.unmatched_returns_sql("returned", "bought", tolerance_days=limits.return_tolerance_days)
    db.execute(f"INSERT INTO unmatched SELECT place FROM ({found})").fetchall()
    if limits.unmatched_returns == "refuse":
        db.execute(
            """
            CREATE TABLE unmatched_rows AS SELECT DISTINCT origin, row FROM owned SEMI JOIN unmatched USING (place);
            DELETE FROM refused WHERE reason = 'return_unmatched' AND (origin, row) NOT IN (SELECT (origin, row) FROM unmatched_rows);
            DELETE FROM owned WHERE (origin, row) IN (SELECT (origin, row) FROM unmatched_rows);
            UPDATE staged_rows SET is_good = false WHERE type = 'return' AND (origin, row) IN (SELECT (origin, row) FROM unmatched_rows);
            """
        ).fetchall()


def form_events(db: duckdb.DuckDBPyConnection, limits: IngestSettings) -> None:
    """Create `kept`, the new lines to be stored, and `formed`: of every stored line its customer, times, session and flags.

    place: that in `staged`, or in `old_lines`.
    """
    line = "place, source_no, customer, event_timestamp, created_timestamp, type, item_id, price_cents, revenue_cents"
    db.execute(
        f"""
        CREATE VIEW kept AS SELECT * FROM owned ANTI JOIN dropped USING (origin, row);
        CREATE VIEW lines AS
            SELECT {line} FROM kept
            UNION ALL SELECT {line} FROM (FROM old_owned ANTI JOIN refused_lines USING (place))
                JOIN (SELECT place, type, item_id, price_cents, revenue_cents FROM old_lines) USING (place);
        """
    ).fetchall()
    _find_sessions(db, gap_us=limits.session_gap_minutes * 60_000_000)
    db.execute("CREATE TABLE visits AS SELECT * FROM lines JOIN session_starts USING (place)").fetchall()
    _flag(db, limits)
    db.execute(
        f"""
        CREATE VIEW formed AS
        SELECT place, source_no, customer, event_timestamp, created_timestamp, revenue_cents, customer_id,
            '{SESSION}' || left(md5(customer_id || ' ' || started_us), 16) AS session_id,
            place IN (FROM outliers) AS is_outlier, place IN (FROM near_duplicates) AS is_near_duplicate,
            place IN (FROM unmatched) AS is_unmatched
        FROM visits JOIN customers USING (customer)
        """
    ).fetchall()


def describe_customers(db: duckdb.DuckDBPyConnection, limits: IngestSettings) -> None:
    """Create `words`, every word on a trait that may be kept, and `profile`, one row per change of what they come to."""
    told = " UNION ALL ".join(
        f"SELECT place, '{trait}' AS trait, {trait} AS value FROM staged WHERE {trait} IS NOT NULL AND is_good AND line = 0"
        for trait in TRAITS
    )
    db.execute(
        f"""
        CREATE TABLE words AS
            SELECT who_no, trait, value, source_no, event_timestamp, min(received_timestamp) AS created_timestamp FROM (
                SELECT who_no, trait, value, source_no, event_timestamp, received_timestamp FROM ({told}) JOIN kept USING (place)
                UNION ALL SELECT who_no, trait, value, source_no, event_timestamp, created_timestamp FROM old_words)
            GROUP BY ALL;
        CREATE TABLE said_of AS
            SELECT customers.customer_id, trait, value, source, event_timestamp,
                greatest(created_timestamp, linked_timestamp) AS created_timestamp
            FROM ({assigned_sql(db, "words")}) JOIN customers USING (customer) JOIN sources USING (source_no);
        CREATE TABLE profile AS {traits.profile_sql("said_of", sources=limits.trait_sources)};
        """
    ).fetchall()


def list_items(db: duckdb.DuckDBPyConnection) -> None:
    """Create `all_items` from `catalogue`, the stored items and the events: the catalogue's word first, then what was seen first.

    created_timestamp: when the catalogue said so; null of an item that it does not list: what is known of it its events say.
    """
    db.execute(
        """
        CREATE TABLE all_items AS
        WITH seen AS (
            SELECT item_id, min(event_timestamp) AS event_timestamp,
                min_by(price_cents, (event_timestamp, price_cents)) FILTER (WHERE price_cents IS NOT NULL) AS price_cents
            FROM visits WHERE item_id IS NOT NULL GROUP BY item_id),
        sorts AS (
            SELECT kept.item_id, min_by(category, (kept.event_timestamp, category)) AS category
            FROM kept JOIN (SELECT place, category FROM staged WHERE category IS NOT NULL) USING (place) GROUP BY ALL)
        SELECT item_id, coalesce(catalogue.category, old_items.category, sorts.category) AS category,
            coalesce(catalogue.price_cents, old_items.price_cents, seen.price_cents) AS price_cents,
            coalesce(catalogue.in_stock, old_items.in_stock) AS in_stock,
            coalesce(catalogue.available_from, least(old_items.event_timestamp, seen.event_timestamp)) AS event_timestamp,
            coalesce(catalogue.available_from, old_items.created_timestamp) AS created_timestamp
        FROM catalogue FULL JOIN old_items USING (item_id) FULL JOIN seen USING (item_id)
            LEFT JOIN sorts USING (item_id)
        """
    ).fetchall()


def events_sql(days: str | None) -> str:
    """SQL: the rows of the events table, of all days or of those in the relation `days` (day)."""
    schema = tables.EVENTS.schema
    assert schema is not None
    given = {name: f"formed.{name}" for name in _MADE} | {
        "source": "source",
        "customer_id": "customer_id",
        "session_id": f"""CASE WHEN told.session_id IS NULL OR regexp_full_match(told.session_id, '{SESSION}[0-9a-f]{{16}}')
            THEN formed.session_id ELSE told.session_id END""",
    }
    columns = ", ".join(f"{given.get(name, f'told.{name}')} AS {name}" for name in schema.names)
    plain = ", ".join(name for name in schema.names if name not in (*given, "anonymous_id", "user_id", "consent", "event_timestamp"))
    told = f"""
        SELECT place, {plain}, session_id, {stored_sql("visitor")} AS anonymous_id, {stored_sql("person")} AS user_id, event_timestamp,
            permissions.stored AS consent
        FROM staged LEFT JOIN names visitor ON visitor.number = anonymous_no LEFT JOIN names person ON person.number = user_no
            LEFT JOIN permissions USING (consent)
        UNION ALL SELECT place, {plain}, session_id, anonymous_id, user_id, event_timestamp, consent FROM old_lines"""
    chosen = "formed" if days is None else f"(FROM formed SEMI JOIN {days} ON day = CAST(event_timestamp AS DATE)) formed"
    return f"SELECT {columns} FROM {chosen} JOIN ({told}) told USING (place) JOIN sources USING (source_no)"


def changed_days_sql() -> str:
    """SQL: the days (day) of the events table of which a row is new, gone or another than it was."""
    differs = " OR ".join(f"formed.{name} IS DISTINCT FROM old_lines.{name}" for name in ("customer_id", *_MADE) if name != "session_id")
    return f"""
        SELECT DISTINCT CAST(event_timestamp AS DATE) AS day FROM (
            SELECT event_timestamp FROM kept
            UNION ALL SELECT event_timestamp FROM old_owned SEMI JOIN refused_lines USING (place)
            UNION ALL SELECT formed.event_timestamp FROM formed JOIN old_lines USING (place) WHERE {differs}
                OR (starts_with(old_lines.session_id, '{SESSION}') AND old_lines.session_id IS DISTINCT FROM formed.session_id))"""


def _find_sessions(db: duckdb.DuckDBPyConnection, *, gap_us: int) -> None:
    """Create `session_starts`: place, started_us. A silence of more than `gap_us` ends a session."""
    db.execute("CREATE TABLE session_starts (place BIGINT, started_us BIGINT)").fetchall()
    customer, last, start = -1, 0, 0
    for piece in _ordered(db, "SELECT customer, epoch_us(event_timestamp) AS at_us, place FROM lines ORDER BY customer, at_us"):
        who, at = piece["customer"].to_numpy(), piece["at_us"].to_numpy()
        begins = np.diff(at, prepend=last) > gap_us
        begins |= np.diff(who, prepend=customer) != 0
        number = np.cumsum(begins)
        started = np.concatenate([[start], at[begins]])[number]
        customer, last, start = int(who[-1]), int(at[-1]), int(started[-1])
        db.register("started", pa.table({"place": piece["place"], "started_us": started}))
        db.execute("INSERT INTO session_starts FROM started").fetchall()
        db.unregister("started")


def _flag(db: duckdb.DuckDBPyConnection, limits: IngestSettings) -> None:
    """Create `outliers` and `near_duplicates`: places. Looked at are the lines that can be either: most cannot."""
    odd = quality.outliers_sql("sold", z=limits.outlier_z, iqr=limits.outlier_iqr)
    near = quality.near_duplicates_sql("alike", within_s=limits.near_duplicate_s)
    trace = "hash(customer, type, item_id)"
    db.register("close_traces", pa.table({"trace": _close(db, trace, within_us=round(limits.near_duplicate_s * 1_000_000))}))
    db.execute(
        f"""
        CREATE VIEW sold AS SELECT place, source_no AS source, type, revenue_cents FROM visits WHERE revenue_cents <> 0;
        CREATE TABLE outliers AS SELECT place FROM ({odd}) WHERE is_outlier;
        CREATE TABLE alike AS
            SELECT place, source, customer AS customer_id, type, item_id, event_timestamp, event_id
            FROM visits JOIN sources USING (source_no)
            JOIN (SELECT place, event_id FROM staged UNION ALL SELECT place, event_id FROM old_lines) USING (place)
            WHERE {trace} IN (SELECT trace FROM close_traces);
        CREATE TABLE near_duplicates AS SELECT place FROM ({near}) WHERE is_near_duplicate;
        """
    ).fetchall()


def _close(db: duckdb.DuckDBPyConnection, trace: str, *, within_us: int) -> np.ndarray:
    """The values of `trace` that two visits share within so short a time."""
    found = [np.empty(0, np.uint64)]
    before, last = np.uint64(0), 0
    for piece in _ordered(db, f"SELECT {trace} AS trace, epoch_us(event_timestamp) AS at_us FROM visits ORDER BY trace, at_us"):
        traces, at = piece["trace"].to_numpy(), piece["at_us"].to_numpy()
        is_close = (np.concatenate([[before], traces[:-1]]) == traces) & (np.diff(at, prepend=last) <= within_us)
        found.append(np.unique(traces[is_close]))
        before, last = traces[-1], int(at[-1])
    return np.unique(np.concatenate(found))


def _ordered(db: duckdb.DuckDBPyConnection, query: str) -> Iterator[pa.Table]:
    """The rows of a query with an order, in large pieces, none of them empty. The connection is free meanwhile."""
    with db.cursor() as reader:
        for batch in reader.sql(query).to_arrow_reader(_PIECE_ROWS):
            if len(batch):
                yield pa.Table.from_batches([batch])
