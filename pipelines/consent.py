"""What people said about the use of their data -> the purposes that a customer allows, as of a time.

In: statements (on events, or declared for a whole source). Out: one row per change, and the state at any instant. Fails
closed: no statement, no permission; a statement that is not exactly true is a refusal; of two at one instant the refusal holds.
Never carries a permission backwards in time.

A declared legal basis stands only until the customer's own first statement; from then on the customer's word alone counts.
"""

import numpy as np
import pandas as pd
import pyarrow as pa

from pipelines.sources import connect

STATED = "consent"  # the basis of a row that the customer gave
DECLARED = "declared: "  # what the basis of a source's declaration starts with


def state_at(consents: pd.DataFrame, rows: pd.DataFrame, *, purpose: str) -> np.ndarray:
    """Whether `purpose` was allowed for each row: (n,) of bool, False where nothing is known.

    consents: the columns of the consents table, any order. rows: customer_id, event_timestamp (UTC, when); a statement made at
    that very instant counts. Same order as `rows`.
    """
    asked = pa.table({"customer_id": _text(rows["customer_id"]), "event_timestamp": _instants(rows["event_timestamp"])})
    told = pa.table(
        {
            **{name: _text(consents[name]) for name in ("customer_id", "purpose", "basis")},
            "is_allowed": pa.array(consents["is_allowed"].to_numpy(), pa.bool_()),
            "event_timestamp": _instants(consents["event_timestamp"]),
        }
    )
    with connect() as db:
        db.register("asked", asked.append_column("place", pa.array(np.arange(len(rows)))))
        db.register("told", told)
        found = db.sql(f"SELECT is_allowed FROM ({allowed_sql('asked', 'told', purpose=purpose)}) ORDER BY place").to_arrow_table()
    return np.asarray(found["is_allowed"], dtype=bool)


def allowed_sql(rows: str, consents: str, *, purpose: str, is_stated: bool = False) -> str:
    """SQL: the relation `rows` (customer_id, event_timestamp) with is_allowed, never null.

    is_stated: whether the customer's own statements alone count, and no declared basis.
    """
    return f"""
        SELECT asked.*, coalesce(state.is_allowed, false) AS is_allowed FROM {rows} asked ASOF LEFT JOIN
            ({_states(consents, purpose, is_stated)}) state
        ON asked.customer_id = state.customer_id AND asked.event_timestamp >= state.event_timestamp"""


def refused_sql(rows: str, consents: str, *, purpose: str) -> str:
    """SQL: the rows of the relation `rows` at whose time the customer's own latest statement is a refusal."""
    return f"""
        SELECT asked.* FROM {rows} asked ASOF JOIN ({_states(consents, purpose, is_stated=True)}) state
        ON asked.customer_id = state.customer_id AND asked.event_timestamp >= state.event_timestamp WHERE NOT state.is_allowed"""


def statements_sql(rows: str) -> str:
    """SQL: events (customer_id, event_timestamp, created_timestamp, consent: JSON object) -> rows of the consents table.

    One row per purpose named, where the customer's object differs from that of the event before.
    """
    return f"""
        WITH told AS (
            SELECT customer_id, event_timestamp, created_timestamp, TRY_CAST(consent AS JSON) AS said
            FROM {rows} WHERE consent IS NOT NULL QUALIFY consent IS DISTINCT FROM
                lag(consent) OVER (PARTITION BY customer_id ORDER BY event_timestamp, created_timestamp, consent))
        SELECT customer_id, key AS purpose, CAST(value AS VARCHAR) = 'true' AS is_allowed, '{STATED}' AS basis,
            event_timestamp, created_timestamp
        FROM told, json_each(CASE WHEN json_type(told.said) = 'OBJECT' THEN told.said END) WHERE key IS NOT NULL"""


def changes_sql(statements: str) -> str:
    """SQL: rows of the consents table, repeated and in any order -> one row per change, and no declaration after a statement."""
    return f"""
        WITH own AS (SELECT customer_id, purpose, min(event_timestamp) AS since FROM {statements} WHERE basis = '{STATED}' GROUP BY ALL),
        holding AS (
            SELECT told.* FROM {statements} told LEFT JOIN own USING (customer_id, purpose)
            WHERE told.basis = '{STATED}' OR own.since IS NULL OR told.event_timestamp < own.since),
        instants AS (
            SELECT customer_id, purpose, bool_and(is_allowed) AS is_allowed, min(basis) AS basis, event_timestamp,
                min(created_timestamp) AS created_timestamp
            FROM holding GROUP BY customer_id, purpose, event_timestamp)
        SELECT * FROM instants QUALIFY (is_allowed, basis) IS DISTINCT FROM
            lag((is_allowed, basis)) OVER (PARTITION BY customer_id, purpose ORDER BY event_timestamp)"""


def known_sql(consents: str, *, purpose: str) -> str:
    """SQL: rows of the consents table -> customer_id, event_timestamp, is_personalization_allowed: one row per change of what we knew.

    The time is when we knew it: a statement that arrives late changes nothing before its arrival, nor a newer statement.
    """
    return f"""
        WITH told AS (
            SELECT customer_id, greatest(event_timestamp, created_timestamp) AS known, event_timestamp AS made, is_allowed
            FROM {consents} WHERE purpose = {_literal(purpose)}),
        states AS (
            SELECT DISTINCT customer_id, known, arg_max(is_allowed, made) OVER (
                PARTITION BY customer_id ORDER BY known RANGE UNBOUNDED PRECEDING) AS is_allowed FROM told)
        SELECT customer_id, known AS event_timestamp, is_allowed AS is_personalization_allowed FROM states
        QUALIFY is_allowed IS DISTINCT FROM lag(is_allowed) OVER (PARTITION BY customer_id ORDER BY known)"""


def _states(consents: str, purpose: str, is_stated: bool) -> str:
    only = f" AND basis = '{STATED}'" if is_stated else ""
    return f"""SELECT customer_id, event_timestamp, bool_and(coalesce(is_allowed, false)) AS is_allowed
        FROM {consents} WHERE purpose = {_literal(purpose)}{only} GROUP BY customer_id, event_timestamp"""


def _text(column: pd.Series) -> pa.Array:
    return pa.array(column.astype("object").to_numpy(), pa.string(), from_pandas=True)


def _instants(column: pd.Series) -> pa.Array:
    return pa.array(pd.to_datetime(column, utc=True).dt.as_unit("us"), pa.timestamp("us", tz="UTC"))


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
