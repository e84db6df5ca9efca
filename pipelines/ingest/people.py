"""Names seen together, and those of the home -> whose each line is.

In: `fresh`, `names`, and the home's links, edges, identities and events. Out: `links`, `owners`, `customers`, and `owned` and
`old_owned`: the lines to be judged and those that are stored, with their customer as of today. Recomputed over all names: a new
link may merge people whose events are stored already. Who is one person is decided in `pipelines.identity`.
"""

from pathlib import Path

import duckdb

from pipelines import identity, tables
from pipelines.ingest import names

_SEEN = ("anonymous_no", "user_no", "email_no", "phone_no")


def resolve_identities(db: duckdb.DuckDBPyConnection, home: Path) -> None:
    """Create the relations of the module's first lines. `customers`: customer (a number), customer_id."""
    _meet_home(db, home)
    _link(db)
    found = identity.resolve(
        db.sql(f"SELECT * EXCLUDE (who_no) FROM ({links_sql()})").df(),
        edges=tables.read(home, tables.IDENTITY_EDGES),
        held=tables.read(home, tables.IDENTITIES),
    )
    db.register("identities", found)
    db.execute(
        """
        CREATE TABLE customers AS SELECT row_number() OVER (ORDER BY customer_id) AS customer, customer_id FROM (
            SELECT customer_id FROM identities UNION SELECT customer_id FROM old_lines WHERE customer_id IS NOT NULL);
        CREATE TABLE owners AS
            SELECT number AS who_no, customer, event_timestamp, created_timestamp, count(*) OVER (PARTITION BY number) AS owners
            FROM identities JOIN names USING (identifier) JOIN customers USING (customer_id);
        """
    ).fetchall()
    known = "greatest({}, linked_timestamp) AS created_timestamp"  # an argument that is null is passed over
    db.execute(
        f"""
        CREATE TABLE owned AS
            SELECT * EXCLUDE (linked_timestamp), {known.format("received_timestamp")} FROM ({assigned_sql(db, "fresh")});
        CREATE TABLE old_owned AS
            SELECT assigned.* EXCLUDE (linked_timestamp, created_timestamp, customer),
                coalesce(assigned.customer, customers.customer) AS customer,
                {known.format("created_timestamp")}
            FROM ({assigned_sql(db, "old_narrow")}) assigned LEFT JOIN customers USING (customer_id);
        """
    ).fetchall()


def assigned_sql(db: duckdb.DuckDBPyConnection, rows: str) -> str:
    """SQL: the relation `rows` (who_no, event_timestamp) with customer and linked_timestamp, null where nobody knows the name.

    A name that several people used in turn goes by the time of the row; where there is none, nothing is spent on it.
    """
    is_shared = bool(db.sql("SELECT 1 FROM owners WHERE owners > 1 LIMIT 1").fetchall())
    single = "LEFT JOIN (SELECT who_no, customer, created_timestamp AS linked_timestamp FROM owners WHERE owners = 1) USING (who_no)"
    if not is_shared:
        return f"SELECT * FROM {rows} {single}"
    shared = "(SELECT who_no, customer, created_timestamp AS linked_timestamp, event_timestamp AS since FROM owners WHERE owners > 1)"
    return f"""
        SELECT * FROM {rows} ANTI JOIN {shared} USING (who_no) {single}
        UNION ALL BY NAME SELECT part.*, turn.customer, turn.linked_timestamp
        FROM (SELECT * FROM {rows} SEMI JOIN {shared} USING (who_no)) part
            ASOF LEFT JOIN {shared} turn ON part.who_no = turn.who_no AND part.event_timestamp >= turn.since"""


def _meet_home(db: duckdb.DuckDBPyConnection, home: Path) -> None:
    """Create `old_lines`: the stored events with their place, below zero, and the numbers of their names.

    And `old_narrow`, `old_said`, `old_words`, `old_links`.
    """
    names.meet(db, names.home_names(home))
    user, visitor = names.identifier_sql("user_id"), "'anonymous_id:' || anonymous_id"
    number = "(SELECT number AS {0}, identifier AS {0}_name FROM names) {0} ON {0}_name = {1}"
    db.execute(
        f"""
        CREATE TABLE old_rows AS
            SELECT old_events.*, user_no, anonymous_no, source_no FROM old_events JOIN sources USING (source)
            LEFT JOIN {number.format("user_no", user)} LEFT JOIN {number.format("anonymous_no", visitor)};
        CREATE VIEW old_lines AS SELECT -1 - rowid AS place, * FROM old_rows;
        CREATE VIEW old_narrow AS
            SELECT place, source_no, coalesce(user_no, anonymous_no) AS who_no, user_no, anonymous_no, customer_id,
                event_timestamp, created_timestamp
            FROM old_lines;
        CREATE VIEW old_said AS
            SELECT who_no, source_no, purpose, is_allowed, basis, policy_version, evidence, event_timestamp, created_timestamp
            FROM old_consents JOIN (SELECT number AS who_no, identifier FROM names) USING (identifier) LEFT JOIN sources USING (source);
        CREATE VIEW old_words AS
            SELECT who_no, source_no, trait, value, event_timestamp, created_timestamp
            FROM old_traits JOIN (SELECT number AS who_no, identifier FROM names) USING (identifier) JOIN sources USING (source);
        CREATE TABLE old_links AS
            SELECT anonymous_no, coalesce(user_no, email_no, phone_no) AS user_no, email_no, phone_no, event_timestamp, created_timestamp
            FROM old_identity_links
            LEFT JOIN {number.format("user_no", user)} LEFT JOIN {number.format("anonymous_no", visitor)}
            LEFT JOIN {number.format("email_no", "email")} LEFT JOIN {number.format("phone_no", "phone")};
        """
    ).fetchall()


def _link(db: duckdb.DuckDBPyConnection) -> None:
    """Create `links`: the names seen together and since when; of a device that several people used, every change of login."""
    both = "SELECT anonymous_no, user_no, event_timestamp, {} FROM {} WHERE anonymous_no IS NOT NULL AND user_no IS NOT NULL"
    created = "created_timestamp"
    logins = " UNION ALL ".join(
        both.format(*place)
        for place in (("received_timestamp AS created_timestamp", "fresh"), (created, "old_narrow"), (created, "old_links"))
    )
    seen = ", ".join(_SEEN)
    db.execute(
        f"""
        CREATE TABLE links AS
        WITH logins AS ({logins}),
        shared AS (SELECT anonymous_no FROM logins GROUP BY anonymous_no HAVING count(DISTINCT user_no) > 1),
        together AS (
            SELECT {seen}, min(event_timestamp) AS event_timestamp, min(received_timestamp) AS created_timestamp FROM fresh GROUP BY ALL
            UNION ALL SELECT * FROM old_links)
        SELECT {seen}, min(event_timestamp) AS event_timestamp, min(created_timestamp) AS created_timestamp FROM together
        WHERE email_no IS NOT NULL OR phone_no IS NOT NULL GROUP BY {seen}
        UNION
        SELECT anonymous_no, user_no, NULL, NULL, min(event_timestamp), min(created_timestamp) FROM together GROUP BY anonymous_no, user_no
        UNION
        SELECT anonymous_no, user_no, NULL, NULL, event_timestamp, created_timestamp
        FROM logins SEMI JOIN shared USING (anonymous_no) JOIN names ON number = user_no
        QUALIFY user_no IS DISTINCT FROM
            lag(user_no) OVER (PARTITION BY anonymous_no ORDER BY event_timestamp, created_timestamp, identifier)
        """
    ).fetchall()


def links_sql() -> str:
    """SQL: `links` with pseudonyms, as `identity.resolve` takes them and as they are stored; and who_no, the main one's number."""
    columns = {"anonymous_no": "anonymous_id", "user_no": "user_id", "email_no": "email", "phone_no": "phone"}
    joins = " ".join(f"LEFT JOIN names {name} ON {name}.number = links.{column}" for column, name in columns.items())
    text = {column: names.stored_sql(name) for column, name in columns.items()}
    # An address that is the only name stands in its own column alone.
    text["user_no"] = f"CASE WHEN links.user_no = links.email_no OR links.user_no = links.phone_no THEN NULL ELSE {text['user_no']} END"
    told = ", ".join(f"{text[column]} AS {name}" for column, name in columns.items())
    return f"SELECT {told}, event_timestamp, created_timestamp, coalesce(links.user_no, links.anonymous_no) AS who_no FROM links {joins}"
