"""Staged lines + what the home already holds -> the clean tables, as relations of one DuckDB connection.

In: the table `staged`, and the home's tables as views `old_*`. Out: relations named after the tables they become. Duplicates go
first, by id alone; then identity over all identifiers ever seen; then consent; and only what is left becomes an event.
Publishes nothing.
"""

from dataclasses import dataclass
from pathlib import Path

import duckdb

from pipelines import consent, identity, tables
from pipelines.settings import Settings
from pipelines.tables import Table

SESSION = "s:"  # what an assigned session id starts with
_KEPT = (tables.EVENTS, tables.IDENTITIES, tables.IDENTITY_LINKS, tables.CONSENTS, tables.ITEMS, tables.CUSTOMER_PROFILE)


@dataclass(frozen=True)
class Basis:
    """The declared legal basis of a source: its text and the purposes that it covers."""

    text: str
    purposes: tuple[str, ...]


def attach(db: duckdb.DuckDBPyConnection, home: Path) -> None:
    """Make the home's current tables the views `old_<name>`; empty ones where nothing was written."""
    for table in _KEPT:
        if tables.exists(home, table) and tables.files(home, table):
            files = f"read_parquet({_literal(tables.glob(home, table))}, hive_partitioning = false)"
            db.execute(f"CREATE VIEW old_{table.name} AS SELECT {_columns(table)} FROM {files}")
        else:
            db.register(f"old_{table.name}", tables.read_arrow(home, table))


def find_fresh(db: duckdb.DuckDBPyConnection, source: str) -> int:
    """Create `fresh`: the staged lines whose event is not stored yet, each event once, as it first arrived. Returns its rows as read.

    Before any ordering: a retry carries a later time of arrival.
    """
    db.execute("CREATE TABLE stored_ids AS SELECT DISTINCT event_id FROM old_events WHERE source = ?", [source]).fetchall()
    db.execute(
        """
        CREATE TABLE repeated AS SELECT message_id FROM staged WHERE line = 0 GROUP BY message_id HAVING count(*) > 1;
        CREATE TABLE later AS SELECT file, row FROM staged SEMI JOIN repeated USING (message_id) WHERE line = 0
            QUALIFY row_number() OVER (PARTITION BY message_id ORDER BY created_timestamp, file, row) > 1;
        CREATE TABLE fresh AS SELECT * FROM staged ANTI JOIN later USING (file, row)
            WHERE message_id NOT IN (SELECT event_id FROM stored_ids) AND message_id || ':0' NOT IN (SELECT event_id FROM stored_ids);
        DROP TABLE staged;
        """
    ).fetchall()
    return _count(db, "fresh WHERE line = 0")


def resolve_identities(db: duckdb.DuckDBPyConnection) -> None:
    """Create `links`, `identities`, and `owned` and `old_owned`: the fresh and the stored lines with their customer as of today.

    Recomputed over all identifiers: a new link may merge people whose events are stored already.
    """
    both = "SELECT anonymous_id, user_id, event_timestamp, created_timestamp FROM {} WHERE anonymous_id IS NOT NULL AND user_id IS NOT NULL"
    logins = " UNION ALL ".join(both.format(name) for name in ("fresh", "old_events", "old_identity_links"))
    seen = "SELECT anonymous_id, user_id, email, event_timestamp, created_timestamp FROM {}"
    db.execute(
        f"""
        CREATE TABLE links AS
        WITH logins AS ({logins}),
        shared AS (SELECT anonymous_id FROM logins GROUP BY anonymous_id HAVING count(DISTINCT user_id) > 1)
        SELECT anonymous_id, user_id, email, min(event_timestamp) AS event_timestamp, min(created_timestamp) AS created_timestamp
        FROM ({seen.format("fresh")} UNION ALL {seen.format("old_identity_links")}) GROUP BY anonymous_id, user_id, email
        UNION
        SELECT anonymous_id, user_id, NULL, event_timestamp, created_timestamp FROM logins SEMI JOIN shared USING (anonymous_id)
        QUALIFY user_id IS DISTINCT FROM
            lag(user_id) OVER (PARTITION BY anonymous_id ORDER BY event_timestamp, created_timestamp, user_id)
        """
    ).fetchall()
    db.register("identities", identity.resolve(db.sql("SELECT * FROM links").df()))
    known = "greatest(created_timestamp, linked_timestamp) AS created_timestamp"  # an argument that is null is passed over
    db.execute(
        f"""
        CREATE TABLE owned AS
            SELECT * EXCLUDE (owner_id, linked_timestamp, created_timestamp), owner_id AS customer_id,
                created_timestamp AS received_timestamp, {known} FROM ({identity.assigned_sql("fresh", "identities")});
        CREATE TABLE old_owned AS
            SELECT * EXCLUDE (owner_id, linked_timestamp, created_timestamp, customer_id), coalesce(owner_id, customer_id) AS customer_id,
                {known} FROM ({identity.assigned_sql("old_events", "identities")});
        CREATE TABLE renamed AS {identity.renamed_sql("old_identities", "identities")};
        """
    ).fetchall()


def carry_consent(db: duckdb.DuckDBPyConnection, basis: Basis | None, settings: Settings) -> tuple[int, int]:
    """Create `consents`, `kept` and `refused`: what may be stored. Returns the rows as read that may not, and the stored lines refused.

    A source without a declared basis lives on its people's own statements alone: what another source declared is not for it.
    A refusal that arrives late takes out the stored events that came after it.
    """
    declared = _declared_sql(basis) if basis else ""
    db.execute(
        f"""
        CREATE TABLE statements AS {consent.statements_sql("owned")}
        UNION ALL SELECT {_renamed("old_consents")}, purpose, is_allowed, basis, event_timestamp,
                greatest(created_timestamp, linked_timestamp)
            FROM old_consents LEFT JOIN renamed USING (customer_id) {declared}
        """
    ).fetchall()
    purpose = settings.consent.purpose
    fresh = consent.allowed_sql("owned", "consents", purpose=purpose, is_stated=basis is None)
    db.execute(
        f"""
        CREATE TABLE consents AS {consent.changes_sql("statements")};
        CREATE TABLE dropped AS SELECT DISTINCT file, row FROM ({fresh}) WHERE NOT is_allowed;
        CREATE VIEW kept AS SELECT * FROM owned ANTI JOIN dropped USING (file, row);
        CREATE TABLE refused AS SELECT source, event_id FROM ({consent.refused_sql("old_owned", "consents", purpose=purpose)});
        """
    ).fetchall()
    return _count(db, "dropped"), _count(db, "refused")


def form_events(db: duckdb.DuckDBPyConnection, source: str, settings: Settings) -> None:
    """Create `all_events`: the events table, new and stored lines together, with revenue, session and outlier flag."""
    revenue = "CASE type WHEN 'purchase' THEN quantity * price_cents WHEN 'return' THEN -quantity * price_cents ELSE 0 END"
    columns = [name for name in tables.EVENTS.schema.names if name not in ("source", "revenue_cents", "is_outlier")]  # type: ignore[union-attr]
    plain = ", ".join(columns)
    db.execute(
        f"""
        CREATE VIEW lines AS
            SELECT {_literal(source)} AS source, {plain}, coalesce({revenue}, 0) AS revenue_cents FROM kept
            UNION ALL SELECT source, {plain}, revenue_cents FROM old_owned ANTI JOIN refused USING (source, event_id);
        CREATE TABLE all_events AS
        WITH ordered AS ({_with_session_start_sql(settings.ingest.session_gap_minutes)}),
        spread AS ({_spread_sql()})
        SELECT ordered.* EXCLUDE (session_id, session_start), {_session_sql()} AS session_id,
            coalesce(abs(ln(1 + abs(revenue_cents)) - spread.middle) > {settings.ingest.outlier_z} * spread.scale, false)
                AND revenue_cents <> 0 AS is_outlier
        FROM ordered LEFT JOIN spread USING (source)
        """
    ).fetchall()


def describe_customers(db: duckdb.DuckDBPyConnection) -> None:
    """Create `profile`: one row per change of what we knew of a customer's traits. The newest word on a trait holds."""
    traits = ("age_band", "gender", "region")
    # The value itself breaks a tie, so that two words at one instant give the same answer in every run.
    so_far = "(PARTITION BY customer_id ORDER BY known RANGE UNBOUNDED PRECEDING)"
    newest = ", ".join(f"arg_max({t}, (made, {t})) FILTER (WHERE {t} IS NOT NULL) OVER {so_far} AS {t}" for t in traits)
    told, columns = f"({', '.join(traits)})", ", ".join(traits)
    db.execute(
        f"""
        CREATE TABLE profile AS
        WITH words AS (
            SELECT customer_id, greatest(event_timestamp, created_timestamp) AS known, event_timestamp AS made, {columns}
                FROM kept WHERE coalesce({columns}) IS NOT NULL
            UNION ALL SELECT {_renamed("old_customer_profile")}, greatest(event_timestamp, linked_timestamp), event_timestamp, {columns}
                FROM old_customer_profile LEFT JOIN renamed USING (customer_id)),
        changed AS (
            SELECT * FROM words QUALIFY {told} IS DISTINCT FROM
                lag({told}) OVER (PARTITION BY customer_id ORDER BY known, made, {columns})),
        states AS (SELECT DISTINCT customer_id, known AS event_timestamp, {newest} FROM changed)
        SELECT * FROM states QUALIFY {told} IS DISTINCT FROM lag({told}) OVER (PARTITION BY customer_id ORDER BY event_timestamp)
        """
    ).fetchall()


def list_items(db: duckdb.DuckDBPyConnection) -> None:
    """Create `all_items` from `catalogue`, the stored items and the events: the catalogue's word first, then what was seen first."""
    db.execute(
        """
        CREATE TABLE all_items AS
        WITH seen AS (
            SELECT item_id, min(event_timestamp) AS event_timestamp,
                min_by(price_cents, (event_timestamp, event_id)) FILTER (WHERE price_cents IS NOT NULL) AS price_cents
            FROM all_events WHERE item_id IS NOT NULL GROUP BY item_id),
        met AS (
            SELECT item_id, min_by(category, (event_timestamp, event_id)) FILTER (WHERE category IS NOT NULL) AS category,
                min(received_timestamp) AS created_timestamp
            FROM kept WHERE item_id IS NOT NULL GROUP BY item_id)
        SELECT item_id, coalesce(catalogue.category, old_items.category, met.category) AS category,
            coalesce(catalogue.price_cents, old_items.price_cents, seen.price_cents) AS price_cents,
            coalesce(catalogue.available_from, least(old_items.event_timestamp, seen.event_timestamp)) AS event_timestamp,
            coalesce(catalogue.available_from, least(old_items.created_timestamp, met.created_timestamp)) AS created_timestamp
        FROM catalogue FULL JOIN old_items USING (item_id) FULL JOIN seen USING (item_id) LEFT JOIN met USING (item_id)
        """
    ).fetchall()


def forget_the_rest(db: duckdb.DuckDBPyConnection) -> None:
    """Create `kept_consents`, `kept_identities` and `kept_links`: of people with events, or whose own statement has to be honoured."""
    db.execute(
        f"""
        CREATE TABLE people AS SELECT customer_id FROM all_events
            UNION SELECT customer_id FROM consents WHERE basis = '{consent.STATED}';
        CREATE TABLE kept_consents AS SELECT * FROM consents SEMI JOIN people USING (customer_id);
        CREATE TABLE kept_identities AS SELECT * FROM identities SEMI JOIN people USING (customer_id);
        CREATE TABLE kept_links AS
            WITH named AS (SELECT *, CASE WHEN user_id LIKE 'email:%' THEN user_id WHEN user_id IS NOT NULL THEN 'user_id:' || user_id
                ELSE 'anonymous_id:' || anonymous_id END AS identifier FROM links)
            SELECT * EXCLUDE (identifier) FROM named SEMI JOIN kept_identities USING (identifier);
        """
    ).fetchall()


def _declared_sql(basis: Basis) -> str:
    purposes = ", ".join(_literal(purpose) for purpose in basis.purposes)
    return f"""UNION ALL SELECT customer_id, unnest([{purposes}]), true, {_literal(consent.DECLARED + basis.text)},
            min(event_timestamp), min(created_timestamp)
        FROM owned GROUP BY customer_id"""


def _renamed(table: str) -> str:
    """The customer_id that a row of a stored table has now. What was known of a merged customer is known of the other since the merge."""
    return f"coalesce(renamed.owner_id, {table}.customer_id) AS customer_id"


def _with_session_start_sql(gap_minutes: int) -> str:
    """The lines with the time at which their stretch of activity began: a longer silence of the customer begins a new one."""
    order = "PARTITION BY customer_id ORDER BY event_timestamp, source, event_id"
    return f"""
        SELECT * EXCLUDE (starts),
            max(CASE WHEN starts THEN event_timestamp END) OVER ({order} ROWS UNBOUNDED PRECEDING) AS session_start
        FROM (
            SELECT *, coalesce(event_timestamp - lag(event_timestamp) OVER ({order}) > INTERVAL {gap_minutes} MINUTE, true) AS starts
            FROM lines)"""


def _session_sql() -> str:
    """The session id as received; else the hash of whose session it is and when it began."""
    assigned = f"'{SESSION}' || left(md5(customer_id || ' ' || epoch_us(session_start)), 16)"
    return f"CASE WHEN session_id IS NULL OR regexp_full_match(session_id, '{SESSION}[0-9a-f]{{16}}') THEN {assigned} ELSE session_id END"


def _spread_sql() -> str:
    """Per source, the middle of log revenue and one robust standard deviation of it.

    0.6745: the median absolute deviation of a standard normal; 1.2533: its mean absolute deviation's inverse, for a source
    whose revenues are mostly equal (Iglewicz and Hoaglin 1993).
    """
    return """
        SELECT source, middle, CASE WHEN mad(size) > 0 THEN mad(size) / 0.6745 ELSE 1.2533 * avg(abs(size - middle)) END AS scale FROM (
            SELECT source, ln(1 + abs(revenue_cents)) AS size, median(ln(1 + abs(revenue_cents))) OVER (PARTITION BY source) AS middle
            FROM lines WHERE revenue_cents <> 0)
        GROUP BY source, middle"""


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _columns(table: Table) -> str:
    assert table.schema is not None
    return ", ".join(f'"{name}"' for name in table.schema.names)


def _count(db: duckdb.DuckDBPyConnection, what: str) -> int:
    return int(db.sql(f"SELECT count(*) FROM {what}").fetchall()[0][0])
