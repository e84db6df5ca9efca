"""The items that a shop lists -> the relation `catalogue` of a run. Reads one file of JSON lines; writes nothing."""

from pathlib import Path

import duckdb

from pipelines.engine import literal
from pipelines.errors import InputError

_COLUMNS = "{item_id: 'VARCHAR', category: 'VARCHAR', price: 'VARCHAR', available_from: 'TIMESTAMPTZ', in_stock: 'BOOLEAN'}"
_NOTHING = """(SELECT NULL AS item_id, NULL AS category, NULL AS price, CAST(NULL AS TIMESTAMPTZ) AS available_from,
    CAST(NULL AS BOOLEAN) AS in_stock WHERE false)"""

_SINCE = "coalesce(available_from, TIMESTAMPTZ 'infinity')"  # min_by passes over a null, and with it what the line says


def read_items(db: duckdb.DuckDBPyConnection, items_file: str | Path | None = None) -> None:
    """Create `catalogue`: item_id, category, price_cents, in_stock, available_from; empty without a file. Raises InputError.

    in_stock: null where no line of the item tells; of several lines one that has it is enough. category, price: of the line that was
    available first; one that does not say when comes last.
    """
    lines, asked = _NOTHING, "JSON lines of item_id, category, price, available_from, in_stock (optional)"
    if items_file is not None:
        if not Path(items_file).is_file():
            raise InputError(f"ingest: expected the items in {items_file}, found no file; check the path")
        lines = f"read_json({literal(str(items_file))}, format = 'newline_delimited', columns = {_COLUMNS})"
    try:
        db.execute(f"CREATE OR REPLACE TEMP TABLE catalogue_lines AS FROM {lines}").fetchall()
        read, nameless, unpriced = _counts(db)
        db.execute(
            f"""CREATE OR REPLACE TABLE catalogue AS
            SELECT CAST(item_id AS VARCHAR) AS item_id, CAST(min_by(category, {_SINCE}) AS VARCHAR) AS category,
                CAST(round(min_by(TRY_CAST(price AS DECIMAL(16, 4)), {_SINCE}) * 100) AS BIGINT) AS price_cents,
                bool_or(in_stock) AS in_stock,
                min(available_from) AS available_from
            FROM catalogue_lines WHERE item_id IS NOT NULL GROUP BY item_id"""
        ).fetchall()
        db.execute("DROP TABLE catalogue_lines").fetchall()
    except duckdb.Error as error:
        what = str(error).splitlines()[0]
        raise InputError(f"ingest: expected {asked} in {items_file}, found {what}; mend that line, then run again") from error
    if items_file is not None and (nameless or unpriced or not read):
        found = f"{nameless} of {read} lines without item_id, {unpriced} with a price that is no number" if read else "no line"
        raise InputError(f"ingest: expected {asked} in {items_file}, found {found}; mend the file, then run again")


def _counts(db: duckdb.DuckDBPyConnection) -> tuple[int, int, int]:
    """Lines, those that name no item, and those whose price is no number."""
    unpriced = "price IS NOT NULL AND TRY_CAST(price AS DECIMAL(16, 4)) IS NULL"
    query = f"SELECT count(*), count(*) FILTER (item_id IS NULL), count(*) FILTER ({unpriced}) FROM catalogue_lines"
    ((read, nameless, not_numbers),) = db.execute(query).fetchall()
    return read, nameless, not_numbers
