"""Rows that did not pass -> quarantine, each once, with its reason and its bytes under the key of whom it names.

In: the refused rows of each batch. Out: rows for the quarantine table, and counts. A row of an erased person is not kept, nor one
that was received before. Bytes wait sealed in files of the working space: never in the clear.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines import tables
from pipelines.events import REASONS
from pipelines.ingest import names
from pipelines.ingest.messages import message_sql
from pipelines.ingest.staging import Origin
from pipelines.vault import NOBODY, Vault

SEALED = "refused-*.parquet"  # rows of the quarantine table
_KINDS = {field.name: field.type for field in tables.QUARANTINE.schema or ()}


def prepare(db: duckdb.DuckDBPyConnection) -> None:
    """Create `refused` and `replayed`, empty."""
    db.execute(
        """CREATE TABLE refused (origin INTEGER, source_no INTEGER, row BIGINT, reason VARCHAR, detail VARCHAR, message_id VARCHAR,
            quarantine_id VARCHAR, is_erased BOOLEAN, place BIGINT);
        CREATE TABLE replayed (origin INTEGER, row BIGINT, quarantine_id VARCHAR)"""
    ).fetchall()


def collect(db: duckdb.DuckDBPyConnection, refused: pa.Table, origin: Origin, *, vault: Vault, space: Path) -> None:
    """Add the refused rows of a batch, as staging.REFUSED, to `refused`; and to the working space as the quarantine would keep them."""
    if not len(refused):
        return
    counts = {row["values"]: row["counts"] for row in pc.value_counts(refused["reason"]).to_pylist()}
    origin.refused.update({reason: rows for reason, rows in counts.items() if reason != "return_unmatched"})
    refused = refused.sort_by("row").combine_chunks()
    at = pa.array(np.arange(_places(db), _places(db) + len(refused)))
    db.register("refused_rows", refused.append_column("place", at))
    # A row with an id of its own is the same wherever it stands; alike rows without one are rows of their file.
    at_home = "concat_ws(chr(31), $source, $file, row, raw)"
    anywhere = "CASE WHEN message_id IS NULL THEN " + at_home + " ELSE concat_ws(chr(31), $source, raw) END"
    place = names.keyed_sql(anywhere if origin.has_own_ids else at_home)
    db.execute(
        f"""INSERT INTO refused BY NAME SELECT {origin.number} AS origin, {origin.source_no} AS source_no, row, reason, detail, message_id,
            {place} AS quarantine_id, is_erased, place FROM refused_rows""",
        {"source": origin.source, "file": origin.name},
    ).fetchall()
    db.unregister("refused_rows")
    if not origin.is_replay:
        ids = db.sql(f"SELECT quarantine_id FROM refused WHERE place >= {at[0]} ORDER BY place").to_arrow_table()
        subject = pc.fill_null(refused["subject"], NOBODY)
        every = {"source": origin.source, "file": origin.name, "origin": origin.how, "created_timestamp": origin.at}
        told = {name: pa.repeat(pa.scalar(value, _KINDS[name]), len(refused)) for name, value in every.items()}
        told |= {name: refused[name] for name in ("row", "reason", "detail", "message_id")}
        sealed = vault.seal(subject.to_pylist(), refused["raw"].cast(pa.binary()).to_pylist())
        told |= {"quarantine_id": ids["quarantine_id"], "subject": subject, "raw": pa.array(sealed, pa.binary())}
        rows = pa.table({name: told[name] for name in _KINDS})
        path = space / SEALED.replace("*", f"{len(list(space.glob(SEALED))):05d}")
        pq.write_table(rows, path, compression="none", use_dictionary=["source", "file", "reason", "subject", "origin"])


def set_aside(db: duckdb.DuckDBPyConnection) -> None:
    """Create `set_aside`, the refused rows to keep, and `buried_refused`, the messages of those that name an erased person.

    Both once: not if the row is in quarantine, or if a row of its message id was applied. Rows that share an id and are not alike are
    kept each for itself.
    """
    db.execute(
        f"""
        CREATE VIEW told_refused AS
            SELECT *, {message_sql("message_id")} AS message, {message_sql("quarantine_id")} AS content FROM refused
            WHERE origin NOT IN (SELECT origin FROM replayed);
        CREATE TABLE new_refused AS
            SELECT * FROM told_refused ANTI JOIN old_quarantine USING (quarantine_id) ANTI JOIN (
                SELECT place FROM told_refused SEMI JOIN old_known USING (source_no, message)
                UNION ALL SELECT place FROM told_refused JOIN old_known
                    ON old_known.source_no = told_refused.source_no AND old_known.message = content) known USING (place);
        DELETE FROM new_refused WHERE place IN (
            SELECT place FROM new_refused SEMI JOIN (
                SELECT quarantine_id FROM new_refused GROUP BY ALL HAVING count(*) > 1) repeated USING (quarantine_id)
            QUALIFY row_number() OVER (PARTITION BY quarantine_id ORDER BY origin, row) > 1);
        CREATE VIEW set_aside AS SELECT * FROM new_refused WHERE NOT is_erased;
        CREATE VIEW buried_refused AS
            SELECT origin, new_refused.source_no, content AS message, received AS created_timestamp
            FROM new_refused JOIN origins USING (origin) WHERE is_erased;
        """
    ).fetchall()


def reasons(db: duckdb.DuckDBPyConnection) -> dict[int, Counter[str]]:
    """Origin -> reason -> rows that were set aside."""
    found: dict[int, Counter[str]] = {}
    for origin, reason, rows in db.sql("SELECT origin, reason, count(*) FROM set_aside GROUP BY ALL").fetchall():
        found.setdefault(origin, Counter())[reason] = rows
    return {origin: Counter({name: counts[name] for name in REASONS if counts[name]}) for origin, counts in found.items()}


def rows(db: duckdb.DuckDBPyConnection, space: Path) -> Iterator[pa.Table]:
    """`set_aside` as rows of the quarantine table, in the order in which they were read."""
    place = db.sql("SELECT place FROM set_aside").to_arrow_table()["place"].to_numpy()
    is_kept = np.zeros(_places(db), bool)
    is_kept[place] = True
    first = 0
    for path in sorted(space.glob(SEALED)):
        told = pq.read_table(path)
        yield told.filter(pa.array(is_kept[first : first + len(told)]))
        first += len(told)


def _places(db: duckdb.DuckDBPyConnection) -> int:
    """Refused rows so far; some may have been found good since."""
    return int(db.sql("SELECT coalesce(max(place) + 1, 0) FROM refused").fetchall()[0][0])
