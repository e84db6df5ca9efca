"""What people said about the use of their data -> the purposes that a customer allows, as of a time.

In: statements (on events, or declared for a whole source). Out: one row per change, and the state at any instant. Fails
closed: no statement, no permission; a statement that is not exactly true is a refusal; of two at one instant the refusal holds.
Never carries a permission backwards in time.

A declared legal basis stands only until the customer's own first statement; from then on the customer's word alone counts.
"""

import numpy as np
import pandas as pd
import pyarrow as pa

from pipelines.engine import literal
from pipelines.sources import connect

Purpose = str | tuple[str, ...]  # of several, any one is enough

STATED = "consent"  # the basis of a row that the customer gave
DECLARED = "declared: "  # what the basis of a source's declaration starts with
_DECLARER = f"CASE WHEN basis <> '{STATED}' THEN source END"
_SAID = "{'source': source, 'policy_version': policy_version, 'evidence': evidence}"


def state_at(consents: pd.DataFrame, rows: pd.DataFrame, *, purpose: Purpose) -> np.ndarray:
    """Whether `purpose` was allowed for each row: (n,) of bool, False where nothing is known; of several, whether any was.

    consents: customer_id, purpose, is_allowed, basis, event_timestamp of the consents table, any order. rows: customer_id,
    event_timestamp (UTC, when); a statement made at that very instant counts. Same order as `rows`.
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


def policies(consents: pd.DataFrame, customers: pd.Series, *, purpose: str) -> dict[str, int]:
    """Under which version of the privacy notice the customers last allowed `purpose`: version, or declared basis -> customers.

    consents: the consents table. What a model's version records of the people it was trained with. "none" counts those without.
    """
    asked = pa.table({"customer_id": _text(customers.drop_duplicates())})
    with connect() as db:
        db.register("asked", asked)
        db.register("told", consents)
        found = db.sql(f"""
            WITH words AS (
                SELECT customer_id, arg_max(
                    {{'allows': is_allowed, 'policy': coalesce(policy_version, basis)}}, (event_timestamp, NOT is_allowed)) AS word
                FROM ({_holding("told", purpose)}) GROUP BY customer_id)
            SELECT CASE WHEN word.allows THEN word.policy ELSE 'none' END AS policy, count(*)
            FROM asked LEFT JOIN words USING (customer_id) GROUP BY policy ORDER BY policy""").fetchall()
    return {str(policy): int(count) for policy, count in found}


def allowed_sql(rows: str, consents: str, *, purpose: Purpose, is_stated: bool = False) -> str:
    """SQL: the relation `rows` (customer_id, event_timestamp) with is_allowed, never null: whether any of the purposes is.

    is_stated: whether the customer's own statements alone count, and no declared basis.
    """
    purposes = _purposes(purpose)
    joins = "".join(
        f"""
        ASOF LEFT JOIN ({_states(consents, name, is_stated)}) state{at}
        ON asked.customer_id = state{at}.customer_id AND asked.event_timestamp >= state{at}.event_timestamp"""
        for at, name in enumerate(purposes)
    )
    allowed = " OR ".join(f"coalesce(state{at}.is_allowed, false)" for at in range(len(purposes)))
    return f"SELECT asked.*, {allowed} AS is_allowed FROM {rows} asked {joins}"


def refused_sql(rows: str, consents: str, *, purpose: Purpose) -> str:
    """SQL: the rows of the relation `rows` at whose time none of the purposes is allowed, because the customer refused one."""
    named = ", ".join(literal(name) for name in _purposes(purpose))
    return f"""
        WITH refusals AS (
            SELECT customer_id, min(event_timestamp) AS refused_at FROM {consents}
            WHERE basis = '{STATED}' AND purpose IN ({named}) AND NOT coalesce(is_allowed, false) GROUP BY customer_id)
        SELECT judged.* EXCLUDE (is_allowed) FROM ({allowed_sql(rows, consents, purpose=purpose)}) judged JOIN refusals USING (customer_id)
        WHERE NOT judged.is_allowed AND judged.event_timestamp >= refusals.refused_at"""


def statements_sql(rows: str) -> str:
    """SQL: events -> rows of the consents table, one per purpose named, where an identifier's word differs from its last.

    rows: customer_id, identifier, source, message_id, policy_version, consent (JSON object: purpose -> allowed),
    event_timestamp, created_timestamp.
    """
    return f"""
        WITH told AS (
            SELECT customer_id, identifier, source, message_id, policy_version, event_timestamp, created_timestamp,
                TRY_CAST(consent AS JSON) AS said
            FROM {rows} WHERE consent IS NOT NULL QUALIFY (consent, policy_version) IS DISTINCT FROM
                lag((consent, policy_version)) OVER (
                    PARTITION BY identifier ORDER BY event_timestamp, created_timestamp, consent, message_id))
        SELECT customer_id, identifier, key AS purpose, CAST(value AS VARCHAR) = 'true' AS is_allowed, '{STATED}' AS basis, source,
            policy_version, message_id AS evidence, event_timestamp, created_timestamp
        FROM told, json_each(CASE WHEN json_type(told.said) = 'OBJECT' THEN told.said END) WHERE key IS NOT NULL"""


def newest_sql(rows: str) -> str:
    """What each identifier said last on each purpose, and what was declared for it last: of two words at one instant the refusal.

    rows: a query of rows of tables.CONSENTS. Columns identifier, purpose, is_stated, is_allowed, made_us (microseconds since 1970, UTC).
    """
    return f"""
        SELECT identifier, purpose, is_stated, bool_and(coalesce(is_allowed, false)) AS is_allowed, epoch_us(made) AS made_us
        FROM (SELECT *, basis = '{STATED}' AS is_stated,
                max(event_timestamp) OVER (PARTITION BY identifier, purpose, basis = '{STATED}') AS made FROM ({rows}))
        WHERE event_timestamp = made GROUP BY ALL"""


def changes_sql(statements: str) -> str:
    """SQL: rows of the consents table, repeated and in any order -> one row per change of an identifier's word.

    By identifier and not by customer, so that people who were taken for one can be told apart again. What was declared goes by its source,
    for which it may cease to hold.
    """
    return f"""
        WITH instants AS (
            SELECT min(customer_id) AS customer_id, identifier, purpose, bool_and(coalesce(is_allowed, false)) AS is_allowed, basis,
                arg_min({_SAID}, (is_allowed, created_timestamp, evidence)) AS said,
                event_timestamp, min(created_timestamp) AS created_timestamp
            FROM {statements} GROUP BY identifier, purpose, basis, {_DECLARER}, event_timestamp)
        SELECT customer_id, identifier, purpose, is_allowed, basis, said.source, said.policy_version, said.evidence,
            event_timestamp, created_timestamp
        FROM instants QUALIFY (is_allowed, said.policy_version) IS DISTINCT FROM lag((is_allowed, said.policy_version)) OVER (
            PARTITION BY identifier, purpose, basis, CASE WHEN basis <> '{STATED}' THEN said.source END ORDER BY event_timestamp)"""


def known_sql(consents: str, *, purpose: str) -> str:
    """SQL: rows of the consents table -> customer_id, event_timestamp, is_personalization_allowed: one row per change of what we knew.

    The time is when we knew it: a statement that arrives late changes nothing before its arrival, nor a newer statement.
    """
    return f"""
        WITH told AS (
            SELECT customer_id, greatest(event_timestamp, created_timestamp) AS known, event_timestamp AS made, is_allowed
            FROM ({_holding(consents, purpose)})),
        states AS (
            SELECT DISTINCT customer_id, known, arg_max(is_allowed, (made, NOT is_allowed)) OVER (
                PARTITION BY customer_id ORDER BY known RANGE UNBOUNDED PRECEDING) AS is_allowed FROM told)
        SELECT customer_id, known AS event_timestamp, is_allowed AS is_personalization_allowed FROM states
        QUALIFY is_allowed IS DISTINCT FROM lag(is_allowed) OVER (PARTITION BY customer_id ORDER BY known)"""


def _states(consents: str, purpose: str, is_stated: bool) -> str:
    only = f"WHERE basis = '{STATED}'" if is_stated else ""
    return f"""SELECT customer_id, event_timestamp, bool_and(is_allowed) AS is_allowed
        FROM ({_holding(consents, purpose)}) {only} GROUP BY customer_id, event_timestamp"""


def _holding(consents: str, purpose: str) -> str:
    """The rows about one purpose that count: no declaration from the customer's own first word on."""
    return f"""
        SELECT * EXCLUDE (own_since) REPLACE (coalesce(is_allowed, false) AS is_allowed) FROM (
            SELECT *, min(event_timestamp) FILTER (WHERE basis = '{STATED}') OVER (PARTITION BY customer_id) AS own_since
            FROM {consents} WHERE purpose = {literal(purpose)})
        WHERE basis = '{STATED}' OR own_since IS NULL OR event_timestamp < own_since"""


def _purposes(purpose: Purpose) -> tuple[str, ...]:
    return (purpose,) if isinstance(purpose, str) else purpose


def _text(column: pd.Series) -> pa.Array:
    return pa.array(column.astype("object").to_numpy(), pa.string(), from_pandas=True)


def _instants(column: pd.Series) -> pa.Array:
    return pa.array(pd.to_datetime(column, utc=True).dt.as_unit("us"), pa.timestamp("us", tz="UTC"))
