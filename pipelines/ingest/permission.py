"""What people said about the use of their data, and what their sources declared -> which lines may be stored.

In: `owned` and `old_owned`, the statements among the staged rows, and those of the home. Out: `consents`, `kept_consents`, `dropped`
and `refused_lines`. A source without a declared basis lives on its people's own statements alone: what another source declared is not for
it. A refusal that arrives late takes out the stored events that came after it, but none that carried its own permission.

A basis that the settings declare yields to the people of the source: it covers what happened before the first of them said a word, whenever
that word arrives, so neither the order of events nor the cut of runs matters. What it no longer covers is taken out.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import duckdb

from pipelines import consent
from pipelines.engine import literal
from pipelines.ingest.messages import APPLIED, ERASED
from pipelines.ingest.people import assigned_sql
from pipelines.ingest.staging import own_id_sql
from pipelines.settings import ConsentSettings

_COLUMNS = "customer_id, identifier, purpose, is_allowed, basis, source, policy_version, evidence, event_timestamp, created_timestamp"


@dataclass(frozen=True)
class Basis:
    """The declared legal basis of a source: its text and the purposes that it covers.

    yields: it ends when people of the source begin to say themselves what may be done.
    """

    text: str
    purposes: tuple[str, ...]
    yields: bool = False


def find_speaking(db: duckdb.DuckDBPyConnection) -> frozenset[int]:
    """Create `speaking`, the sources whose people say themselves what may be done, now or ever; returns their numbers.

    source_no, since: the time of the first event with a word; is_earlier: than the home knew.
    """
    db.execute(
        f"""
        CREATE TABLE speaking AS
        WITH known AS (
            SELECT source_no, min(event_timestamp) AS since FROM old_speaking_sources JOIN sources USING (source) GROUP BY source_no),
        told AS (
            SELECT source_no, event_timestamp FROM staged ANTI JOIN later USING (origin, row)
            ANTI JOIN (FROM seen WHERE outcome IN ('{APPLIED}', '{ERASED}')) done USING (source_no, message)
            WHERE is_good AND consent IS NOT NULL
            UNION ALL SELECT source_no, event_timestamp FROM old_consents JOIN sources USING (source)
            WHERE basis = '{consent.STATED}' AND source_no IN (SELECT source_no FROM staged))
        SELECT source_no, least(known.since, min(event_timestamp)) AS since,
            coalesce(min(event_timestamp) < known.since, known.since IS NULL) AS is_earlier
        FROM told FULL JOIN known USING (source_no) GROUP BY source_no, known.since
        """
    ).fetchall()
    return frozenset(source_no for (source_no,) in db.sql("SELECT source_no FROM speaking").fetchall())


def carry_consent(db: duckdb.DuckDBPyConnection, bases: Mapping[int, Basis | None], settings: ConsentSettings) -> None:
    """Create the relations of the module's first lines; customers, identifiers and sources in them are numbers.

    consents: one row per change of an identifier's word. kept_consents: and the last refusal of each run of them, so that no late
    permission from before it outlives it. dropped: origin, row of what may not be stored. refused_lines: place of what may no longer be.
    `bases`: of the sources of this run.
    """
    _hear(db, settings)
    lasting = [source_no for source_no, basis in bases.items() if basis is not None and not basis.yields]
    yielding = [source_no for source_no, basis in bases.items() if basis is not None and basis.yields]
    db.execute(
        f"""
        DELETE FROM speaking WHERE source_no IN ({", ".join(map(str, [-1, *lasting]))});
        CREATE VIEW outspoken AS
            SELECT source_no, since, is_earlier FROM speaking WHERE source_no IN ({", ".join(map(str, [-1, *yielding]))});
        CREATE VIEW covered AS FROM owned LEFT JOIN outspoken USING (source_no) WHERE since IS NULL OR event_timestamp < since;
        DELETE FROM statements USING outspoken WHERE basis <> '{consent.STATED}' AND source = source_no AND event_timestamp >= since;
        """
    ).fetchall()
    for source_no, basis in bases.items():
        if basis is not None:
            _declare(db, source_no, basis)
    db.execute(
        f"""
        CREATE TABLE told_once AS
            SELECT {_COLUMNS} FROM statements SEMI JOIN (
                SELECT identifier, purpose, basis FROM statements GROUP BY ALL HAVING count(*) = 1) once USING (identifier, purpose, basis);
        CREATE VIEW told_often AS FROM statements ANTI JOIN told_once USING (identifier, purpose, basis);
        CREATE TABLE consents AS
            SELECT {_COLUMNS} FROM ({consent.changes_sql("told_often")}) UNION ALL SELECT {_COLUMNS} FROM told_once;
        INSERT INTO consents {_turns_sql()};
        CREATE TABLE kept_consents AS SELECT {_COLUMNS} FROM consents UNION ALL SELECT {_COLUMNS} FROM ({_closing_sql()});
        CREATE VIEW judged AS SELECT place, origin, row, source_no, customer AS customer_id, event_timestamp FROM owned;
        CREATE VIEW old_judged AS SELECT place, source_no, customer AS customer_id, event_timestamp FROM old_owned;
        """
    ).fetchall()
    _judge(db, bases, settings.stored_for)


def _hear(db: duckdb.DuckDBPyConnection, settings: ConsentSettings) -> None:
    """Create `statements`: those among the fresh rows and those of the home, without repetitions.

    Of people who said both yes and no also the repetitions, the stored events' among them: what comes late may lie between two.
    """
    version = f"coalesce(policy_version, {literal(settings.policy_version)}) AS policy_version"
    is_refusing = (
        "len(list_filter(CAST(json_extract(TRY_CAST(consent AS JSON), '$.*') AS VARCHAR[]), lambda said: said IS DISTINCT FROM 'true')) > 0"
    )
    db.execute(
        f"""
        CREATE TABLE said AS
            SELECT customer AS customer_id, owned.who_no AS identifier, owned.source_no AS source, {own_id_sql()} AS message_id, {version},
                consent, owned.event_timestamp, owned.created_timestamp
            FROM owned JOIN staged USING (place) WHERE consent IS NOT NULL AND owned.line = 0;
        CREATE TABLE statements AS {consent.statements_sql("said")};
        CREATE TABLE last_said AS SELECT * FROM said QUALIFY (consent, policy_version) IS DISTINCT FROM
            lead((consent, policy_version)) OVER (
                PARTITION BY identifier ORDER BY event_timestamp, created_timestamp, consent, message_id);
        DELETE FROM last_said WHERE NOT ({is_refusing});
        INSERT INTO statements {consent.statements_sql("last_said")};
        INSERT INTO statements BY NAME
            SELECT customer AS customer_id, who_no AS identifier, purpose, is_allowed, basis, source_no AS source, policy_version, evidence,
                event_timestamp, greatest(created_timestamp, linked_timestamp) AS created_timestamp
            FROM ({assigned_sql(db, "old_said")}) WHERE customer IS NOT NULL;
        CREATE TABLE wavering AS SELECT DISTINCT customer_id FROM (
            SELECT customer_id FROM statements WHERE basis = '{consent.STATED}' GROUP BY customer_id, purpose
            HAVING bool_or(is_allowed) AND NOT bool_and(is_allowed));
        CREATE TABLE said_ever AS
            SELECT row_number() OVER () AS number, * FROM (
                SELECT * FROM said SEMI JOIN wavering USING (customer_id)
                UNION ALL SELECT customer, old_owned.who_no, old_owned.source_no, event_id, NULL, consent, old_owned.event_timestamp,
                    old_owned.created_timestamp
                FROM (SELECT * FROM old_owned SEMI JOIN wavering ON customer = wavering.customer_id) old_owned
                JOIN old_lines USING (place) WHERE consent IS NOT NULL);
        CREATE VIEW said_each AS SELECT * REPLACE (number AS identifier) FROM said_ever;  -- none is the repetition of another
        INSERT INTO statements BY NAME
            SELECT words.* REPLACE (said_ever.identifier AS identifier) FROM ({consent.statements_sql("said_each")}) words
            JOIN said_ever ON said_ever.number = words.identifier;
        """
    ).fetchall()


def _declare(db: duckdb.DuckDBPyConnection, source_no: int, basis: Basis) -> None:
    purposes = ", ".join(literal(purpose) for purpose in basis.purposes)
    db.execute(
        f"""INSERT INTO statements BY NAME
        SELECT customer AS customer_id, who_no AS identifier, unnest([{purposes}]) AS purpose, true AS is_allowed,
            {literal(consent.DECLARED + basis.text)} AS basis, source_no AS source, NULL AS policy_version, NULL AS evidence,
            min(event_timestamp) AS event_timestamp, min(created_timestamp) AS created_timestamp
        FROM covered WHERE source_no = {source_no} GROUP BY customer, who_no, source_no"""
    ).fetchall()


def _turns_sql() -> str:
    """SQL: where a person's word changed though none of their identifiers changed its own; not those that are in `consents`."""
    return f"""
        SELECT {_COLUMNS} FROM (
            SELECT * FROM statements SEMI JOIN wavering USING (customer_id) WHERE basis = '{consent.STATED}'
            QUALIFY row_number() OVER (
                PARTITION BY identifier, purpose, event_timestamp ORDER BY is_allowed, created_timestamp, evidence) = 1) told
        ANTI JOIN consents USING (identifier, purpose, basis, event_timestamp)
        WHERE (customer_id, purpose, identifier, event_timestamp) IN (
            SELECT (customer_id, purpose, identifier, event_timestamp) FROM statements SEMI JOIN wavering USING (customer_id)
            WHERE basis = '{consent.STATED}'
            QUALIFY is_allowed IS DISTINCT FROM lag(is_allowed) OVER (
                PARTITION BY customer_id, purpose ORDER BY event_timestamp, is_allowed, identifier))"""


def _closing_sql() -> str:
    """SQL: of each run of refusals of one identifier for one purpose, the last one, unless it is the first."""
    same = " AND ".join(f"told.{name} = began.{name}" for name in ("identifier", "purpose", "basis"))
    return f"""
        SELECT told.*, began.event_timestamp AS began_at
        FROM (SELECT * FROM statements WHERE basis = '{consent.STATED}' AND NOT is_allowed) told
        ASOF JOIN consents began ON {same} AND told.event_timestamp >= began.event_timestamp
        WHERE NOT began.is_allowed AND told.event_timestamp > began.event_timestamp
        QUALIFY row_number() OVER (
            PARTITION BY told.identifier, told.purpose, began.event_timestamp
            ORDER BY told.event_timestamp DESC, told.created_timestamp, told.evidence) = 1"""


def _judge(db: duckdb.DuckDBPyConnection, bases: Mapping[int, Basis | None], purposes: tuple[str, ...]) -> None:
    """Create `dropped` and `refused_lines`. Where nobody ever said a word, declarations alone decide."""
    verdicts = ["SELECT origin, row FROM judged WHERE false"]
    is_spoken = bool(db.sql(f"SELECT 1 FROM consents WHERE basis = '{consent.STATED}' LIMIT 1").fetchall())
    for part, basis in _parts(db, bases):
        if is_spoken:
            allowed = consent.allowed_sql(part, "consents", purpose=purposes, is_stated=basis is None)
            verdicts.append(f"SELECT origin, row FROM ({allowed}) WHERE NOT is_allowed")
        elif basis is None or not set(purposes) & set(basis.purposes):
            verdicts.append(f"SELECT origin, row FROM {part}")
    refused = ["SELECT place FROM old_judged WHERE false"]
    if is_spoken:
        refused.append(f"SELECT place FROM ({consent.refused_sql('old_judged', 'consents', purpose=purposes)})")
    if db.sql("SELECT 1 FROM outspoken WHERE is_earlier").fetchall():
        uncovered = "(SELECT old_judged.* FROM old_judged JOIN outspoken USING (source_no) WHERE is_earlier AND event_timestamp >= since)"
        allowed = consent.allowed_sql(uncovered, "consents", purpose=purposes, is_stated=True)
        refused.append(f"SELECT place FROM ({allowed}) WHERE NOT is_allowed")
    db.execute(
        f"""
        CREATE TABLE dropped AS SELECT DISTINCT origin, row FROM ({" UNION ALL ".join(verdicts)});
        CREATE TABLE refused_lines AS {" UNION ".join(refused)};
        """
    ).fetchall()


def _parts(db: duckdb.DuckDBPyConnection, bases: Mapping[int, Basis | None]) -> Iterator[tuple[str, Basis | None]]:
    """The new lines of each source, those together that the same basis covers."""
    outspoken = {source_no for (source_no,) in db.sql("SELECT source_no FROM outspoken").fetchall()}
    for source_no, basis in bases.items():
        rows = f"FROM judged WHERE source_no = {source_no}"
        if source_no in outspoken:
            before = f"event_timestamp < (SELECT since FROM outspoken WHERE source_no = {source_no})"
            yield f"(SELECT * {rows} AND {before})", basis
            yield f"(SELECT * {rows} AND NOT {before})", None
        else:
            yield f"(SELECT * {rows})", basis
