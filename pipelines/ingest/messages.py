"""Every message counts once, for ever: which staged rows are new, and which were here before.

In: `staged`, `refused`, and the messages and the quarantine of the home. Out: `fresh`, the lines to be judged, and `set_aside`, the
refused rows to keep. A message is known by its source and 128 bits of the hash of its id, whatever became of it. One that consent
kept out, or that is in quarantine, may be judged again: a statement, a legal basis or a correction may have come since; it is
counted once all the same. Never looks at what a message says.
"""

import duckdb

from pipelines.ingest.names import NUMBERS

APPLIED, DROPPED, ERASED = "applied", "consent_dropped", "erased"

_HALF = 1 << 63  # tables hold signed numbers
_REVENUE = """coalesce(
    CASE type WHEN 'purchase' THEN quantity * price_cents WHEN 'return' THEN -quantity * price_cents ELSE 0 END, 0)"""


def message_sql(message_id: str) -> str:
    """SQL: 128 bits of the hash of a message id."""
    return f"md5_number({message_id})"


def halves_sql(message: str) -> str:
    """SQL: the two columns of the messages table that hold a message."""
    high, low = f"CAST({message} >> 64 AS UBIGINT)", f"CAST({message} & {(1 << 64) - 1} AS UBIGINT)"
    return ", ".join(
        f"CAST(CAST({half} AS HUGEINT) - {_HALF} AS BIGINT) AS message_{name}" for name, half in (("high", high), ("low", low))
    )


def whole_sql() -> str:
    """SQL: the reverse of `halves_sql`."""
    high, low = (f"CAST(CAST(message_{name} AS HUGEINT) + {_HALF} AS UHUGEINT)" for name in ("high", "low"))
    return f"({high} << 64) + {low}"


def find_fresh(db: duckdb.DuckDBPyConnection) -> None:
    """Create `fresh`, `buried` and `seen`, of the rows of `staged` that are good, each message once, as it first arrived.

    fresh: lines to be judged; place: their rowid in `staged`; is_known: the message was received before and is not counted again.
    buried: messages that name an erased person. seen: messages received before, with what became of them; `held`: in quarantine.
    Needs `replayed`: origin, row, quarantine_id of the rows that come from the quarantine. Before any ordering: a retry carries a
    later time of arrival.
    """
    message = "SELECT source_no, message FROM staged WHERE line = 0 AND is_good"
    erased = " OR ".join(f"coalesce({name} IN (SELECT number FROM names WHERE is_erased), false)" for name in NUMBERS)
    has_erased = bool(db.sql("SELECT 1 FROM names WHERE is_erased LIMIT 1").fetchall())
    replayed = "origin IN (SELECT origin FROM replayed)"
    db.execute(
        f"""
        CREATE VIEW old_known AS SELECT source_no, {whole_sql()} AS message, outcome FROM old_messages JOIN sources USING (source);
        CREATE VIEW old_held AS
            SELECT quarantine_id, source_no, {message_sql("message_id")} AS message FROM old_quarantine JOIN sources USING (source)
            WHERE message_id IS NOT NULL;
        CREATE TABLE seen AS
            SELECT source_no, message, outcome FROM old_known SEMI JOIN ({message}) now USING (source_no, message)
            UNION ALL SELECT DISTINCT source_no, message, 'held' FROM old_held SEMI JOIN ({message}) now USING (source_no, message);
        CREATE TABLE later AS
            SELECT origin, row FROM staged SEMI JOIN (FROM ({message}) GROUP BY ALL HAVING count(*) > 1) repeated USING (source_no, message)
            WHERE line = 0 AND is_good
            QUALIFY row_number() OVER (
                PARTITION BY source_no, message ORDER BY coalesce(received_timestamp, event_timestamp), origin, row) > 1;
        CREATE VIEW first_lines AS
            SELECT place, origin, source_no, row, line, message, event_timestamp,
                coalesce(received_timestamp, event_timestamp) AS received_timestamp,
                who_no, user_no, email_no, phone_no, anonymous_no, type, item_id, price_cents, {_REVENUE} AS revenue_cents,
                coalesce(known.is_known, false) OR {replayed} AS is_known, {erased if has_erased else "false"} AS is_erased
            FROM staged ANTI JOIN later USING (origin, row)
            ANTI JOIN (FROM seen WHERE outcome IN ('{APPLIED}', '{ERASED}')) done USING (source_no, message)
            LEFT JOIN (SELECT DISTINCT source_no, message, true AS is_known FROM seen) known USING (source_no, message)
            WHERE is_good;
        CREATE VIEW fresh AS SELECT * EXCLUDE (is_erased) FROM first_lines WHERE NOT is_erased;
        CREATE VIEW buried AS SELECT source_no, origin, message, received_timestamp, is_known FROM first_lines WHERE is_erased AND line = 0;
        """
    ).fetchall()


def release(db: duckdb.DuckDBPyConnection) -> None:
    """Create `leaving`: rows of the quarantine that were read again, with `reason` null for those that leave it."""
    db.execute(
        """CREATE TABLE leaving AS
        SELECT quarantine_id, NULL AS reason, NULL AS detail FROM old_held SEMI JOIN first_lines USING (source_no, message)
        UNION SELECT replayed.quarantine_id, reason, detail FROM replayed LEFT JOIN refused USING (origin, row)"""
    ).fetchall()
