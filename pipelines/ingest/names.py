"""What people are called in the rows as read -> a number for the run and a pseudonym for ever; and the facts to keep of them.

In: rows with raw identifiers; the identifiers that the home knows already. Out: the DuckDB table `names`, and facts for the vault.
Each text is hashed once in a batch, however many rows carry it: from here on rows hold numbers. Never decides who is who.
"""

from pathlib import Path

import duckdb

from pipelines import tables
from pipelines.events import NOBODY
from pipelines.pseudonyms import INNER
from pipelines.vault import Fact, Vault, pseudonym_sql, tombstone_sql

SLOTS = ("user_id", "email", "phone", "anonymous_id")  # the columns of raw rows that name somebody
NUMBERS = ("user_no", "email_no", "phone_no", "anonymous_no")  # the columns that hold the numbers of their names


def prepare(db: duckdb.DuckDBPyConnection, vault: Vault) -> None:
    """Create `names`: number, identifier (a pseudonym), kind, raw (null if only the home knows it), is_erased."""
    vault.bind(db)
    db.execute(
        """
        CREATE TABLE names (number INTEGER, identifier VARCHAR, kind VARCHAR, raw VARCHAR, is_erased BOOLEAN);
        CREATE TABLE tombs (mark VARCHAR);
        CREATE TEMP TABLE named (slot VARCHAR, raw VARCHAR, kind VARCHAR, number INTEGER);
        """
    ).fetchall()
    marks = vault.tombstones()
    if marks:
        db.execute("INSERT INTO tombs SELECT unnest(?)", [marks]).fetchall()


def learn(db: duckdb.DuckDBPyConnection, rows: str, slots: tuple[str, ...]) -> None:
    """Make `named` the names in these columns of the relation `rows`: slot, raw, kind, number. New ones join `names`.

    A value that programs send where they know nobody is no name. An address is one wherever it stands.
    """
    told = " UNION ALL ".join(f"SELECT DISTINCT '{slot}' AS slot, {slot} AS raw FROM {rows} WHERE {slot} IS NOT NULL" for slot in slots)
    kind = f"""CASE WHEN slot <> 'phone' AND contains(raw, '@') THEN 'email'
        WHEN slot = 'email' OR lower(trim(raw)) IN {NOBODY} OR (slot = 'phone' AND NOT regexp_matches(raw, '[0-9]')) THEN NULL
        ELSE slot END"""
    hashed = " ".join(f"WHEN '{kind}' THEN {pseudonym_sql(kind, 'raw')}" for kind in SLOTS)
    db.execute(
        f"""
        CREATE OR REPLACE TEMP TABLE told AS
            SELECT slot, raw, kind, kind || ':' || CASE kind {hashed} END AS identifier FROM (SELECT *, {kind} AS kind FROM ({told}));
        {_add_sql("SELECT identifier, min(kind) AS kind, min(raw) AS raw FROM told WHERE identifier IS NOT NULL GROUP BY identifier")}
        CREATE OR REPLACE TEMP TABLE named AS SELECT slot, told.raw, told.kind, number FROM told JOIN names USING (identifier);
        DROP TABLE told;
        """
    ).fetchall()


def meet(db: duckdb.DuckDBPyConnection, identifiers: str) -> None:
    """Add the pseudonyms of the relation `identifiers` (identifier) that are not among `names` yet."""
    known = (
        f"SELECT DISTINCT identifier, split_part(identifier, ':', 1) AS kind, NULL AS raw FROM ({identifiers}) WHERE identifier IS NOT NULL"
    )
    db.execute(_add_sql(known)).fetchall()


def keyed_sql(text: str) -> str:
    """SQL: a hash of a text that nobody without the vault's key can make: for ids that are told, of content that is not."""
    return f"md5(getvariable('{INNER}') || encode({text}))"


def identifier_sql(user_id: str) -> str:
    """SQL: the pseudonym that a stored user_id stands for: addresses and numbers say their kind themselves."""
    return f"CASE WHEN {user_id} LIKE 'email:%' OR {user_id} LIKE 'phone:%' THEN {user_id} ELSE 'user_id:' || {user_id} END"


def stored_sql(name: str) -> str:
    """SQL: the reverse, of a row of `names`: the hash alone of user ids and anonymous ids, the whole pseudonym of the others."""
    return f"CASE WHEN {name}.kind IN ('email', 'phone') THEN {name}.identifier ELSE split_part({name}.identifier, ':', 2) END"


def facts(db: duckdb.DuckDBPyConnection) -> list[Fact]:
    """What to keep of the people who let their rows be stored: each raw identifier and direct trait with the newest time it was told.

    Needs `kept`, the lines to be stored.
    """
    named = " UNION ALL ".join(
        f"SELECT {column} AS number, source_no, max(event_timestamp) AS event_timestamp FROM kept WHERE {column} IS NOT NULL GROUP BY ALL"
        for column in NUMBERS
    )
    value = "json_extract_string(direct, '$.' || key)"
    told = db.sql(
        f"""SELECT identifier, kind, raw, source, max(epoch_us(event_timestamp))
        FROM ({named}) JOIN names USING (number) JOIN sources USING (source_no) WHERE raw IS NOT NULL GROUP BY ALL
        UNION ALL
        SELECT identifier, trait, value, source, max(epoch_us(event_timestamp)) FROM (
            SELECT who_no, source_no, event_timestamp, unnest(json_keys(direct)) AS trait,
                unnest(list_transform(json_keys(direct), lambda key: {value})) AS value
            FROM (
                SELECT who_no, source_no, direct, max(event_timestamp) AS event_timestamp
                FROM kept JOIN (SELECT place, direct FROM staged WHERE direct IS NOT NULL) USING (place) GROUP BY ALL))
        JOIN names ON number = who_no JOIN sources USING (source_no) WHERE value IS NOT NULL GROUP BY ALL
        ORDER BY ALL"""
    )
    return [Fact(*row) for row in told.fetchall()]


def home_names(home: Path) -> str:
    """SQL: every pseudonym in the tables `old_*` of the home."""
    parts = [
        "SELECT identifier FROM old_identities",
        "SELECT identifier FROM old_consents",
        "SELECT identifier FROM old_traits",
        "SELECT 'anonymous_id:' || anonymous_id FROM old_identity_links",
        f"SELECT {identifier_sql('user_id')} FROM old_identity_links",
        "SELECT email FROM old_identity_links",
        "SELECT phone FROM old_identity_links",
    ]
    if tables.exists(home, tables.EVENTS):
        parts += [
            f"SELECT {identifier_sql('user_id')} FROM (SELECT DISTINCT user_id FROM old_events)",
            "SELECT 'anonymous_id:' || anonymous_id FROM (SELECT DISTINCT anonymous_id FROM old_events)",
        ]
    return " UNION ALL ".join(parts)


def _add_sql(names: str) -> str:
    """SQL: number the names of the relation (identifier, kind, raw) that are new."""
    return f"""
        INSERT INTO names
            SELECT (SELECT count(*) FROM names) + row_number() OVER (ORDER BY identifier), identifier, kind, raw,
                {tombstone_sql("identifier")} IN (FROM tombs)
            FROM ({names}) ANTI JOIN names USING (identifier);"""
