"""Raw batches -> lines that may become events, staged in DuckDB; and the rows that may not, with a reason.

In: RawBatch. Out: the DuckDB table `staged` and rows for quarantine. An order becomes one line per product; if one of them is
wrong, the whole row is set aside. E-mail addresses end here: from now on they are hashes. Never looks at other events.
"""

from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.events import NOBODY, ORDER_TYPES, UNREADABLE, validate
from pipelines.settings import IngestSettings
from pipelines.sources import RawBatch
from pipelines.sources.projection import register

_CHECKED = ("type", "event_id", "event_timestamp", "created_timestamp", "user_id", "anonymous_id", "item_id", "quantity", "price_cents")
_PRODUCT = '[{"product_id":"VARCHAR","item_id":"VARCHAR","sku":"VARCHAR","quantity":"VARCHAR","price":"VARCHAR","category":"VARCHAR"}]'
_COUNTED_TYPES = ("cart_add", "cart_remove", *ORDER_TYPES)  # mean one piece where they name no quantity


@dataclass
class FileCount:
    """What became of one file's rows so far."""

    path: Path
    accepted: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    unit: str | None = None

    @property
    def quarantined(self) -> int:
        """Rows set aside."""
        return sum(self.reasons.values())


@dataclass(frozen=True)
class Arrival:
    """When rows that carry no time of receipt were received: `told` by the caller, else no later than the file's own last change."""

    told: datetime | None
    written: datetime

    @classmethod
    def of(cls, path: Path, received: datetime | None) -> "Arrival":
        """The arrival of a file's rows."""
        return cls(received, datetime.fromtimestamp(path.stat().st_mtime, UTC))

    @property
    def at(self) -> datetime:
        """The instant at which the file's rows can be said to have been here."""
        return self.told or self.written


def stage(db: duckdb.DuckDBPyConnection, batch: RawBatch, *, count: FileCount, arrival: Arrival, limits: IngestSettings) -> pa.Table:
    """Add the batch's good rows to the table `staged`; returns the others as rows of the quarantine table."""
    register(db, batch.rows)
    has_products = batch.rows["products"].null_count < len(batch.rows)
    lines = db.sql(_lines_sql(batch.number, arrival, has_products=has_products)).to_arrow_table()
    checked = validate(lines.select(_CHECKED).to_pandas(types_mapper=pd.ArrowDtype), limits)
    refused = _by_row(checked.rejected, lines)
    good = lines
    if len(refused):
        good = lines.filter(pc.invert(pc.is_in(lines["row"], value_set=refused["row"].combine_chunks())))
    register(db, good)
    columns = "* EXCLUDE (created_timestamp, arrived), arrived AS created_timestamp"
    is_first = not db.sql("SELECT 1 FROM duckdb_tables() WHERE table_name = 'staged'").fetchall()
    db.execute(f"{'CREATE TABLE staged AS' if is_first else 'INSERT INTO staged'} SELECT {columns} FROM piece").fetchall()
    rejected = pa.concat_tables([batch.rejected, _with_raw(refused, batch.rows)])
    count.accepted += len(batch.rows) - len(refused)
    count.reasons.update(rejected["reason"].to_pylist())
    count.unit = count.unit or batch.unit
    return _quarantined(db, rejected, batch, arrival)


def _lines_sql(file: int, arrival: Arrival, *, has_products: bool) -> str:
    told = "NULL" if arrival.told is None else f"TIMESTAMPTZ '{arrival.told.isoformat()}'"
    rows = "(SELECT *, NULL AS product, 0 AS line, false AS is_listed FROM piece)"
    if has_products:
        rows = f"""(
            SELECT * EXCLUDE (listed, products), unnest(listed) AS product, unnest(range(len(listed))) AS line FROM (
                SELECT *, coalesce(len(found) > 0, false) AS is_listed, CASE WHEN len(found) > 0 THEN found ELSE [NULL] END AS listed
                FROM (SELECT *, CASE WHEN type IN {ORDER_TYPES} THEN from_json(TRY_CAST(products AS JSON), '{_PRODUCT}') END AS found
                    FROM piece)))"""
    item, quantity, price, category = ("item_id", "quantity", "price", "category")
    if has_products:
        item = "CASE WHEN is_listed THEN coalesce(product.product_id, product.item_id, product.sku) ELSE item_id END"
        quantity, price, category = (f"CASE WHEN is_listed THEN product.{name} ELSE {name} END" for name in (quantity, price, category))
    # Some shops give a visitor's address as the anonymous id: it is a known person then.
    address = f"CASE WHEN contains(anonymous_id, '@') THEN {_identifier('anonymous_id')} END"
    email = f"CASE WHEN contains(email, '@') THEN {_hashed('email')} END"
    event_id = "CASE WHEN is_listed THEN message_id || ':' || line ELSE message_id END"
    received = f"coalesce(received_timestamp, {told})"
    return f"""
        SELECT {file} AS file, row, CAST(line AS BIGINT) AS line, message_id, {event_id} AS event_id, type, name, event_timestamp,
            -- a row without a receipt can still not have been received after its file was written
            coalesce({received}, CASE WHEN event_timestamp > TIMESTAMPTZ '{arrival.written.isoformat()}'
                THEN TIMESTAMPTZ '{arrival.written.isoformat()}' END) AS created_timestamp,
            coalesce({received}, event_timestamp) AS arrived,
            CASE WHEN contains(anonymous_id, '@') THEN NULL ELSE {_known("anonymous_id")} END AS anonymous_id,
            coalesce({_identifier("user_id")}, {email}, {address}) AS user_id,
            {email} AS email, nullif(trim({item}), '') AS item_id, order_id, session_id, decision_id, query,
            {_whole(quantity)} AS quantity, {_cents(price)} AS price_cents, nullif({category}, '') AS category,
            age_band, gender, region, consent
        FROM {rows}"""


def _known(column: str) -> str:
    return f"CASE WHEN lower({column}) IN {NOBODY} THEN NULL ELSE {column} END"


def _hashed(column: str) -> str:
    """As events.email_identifier."""
    return f"'email:' || sha256(lower(trim({column})))"


def _identifier(column: str) -> str:
    """An identifier; where a shop uses addresses as user ids, the address's hash."""
    return f"CASE WHEN contains({column}, '@') THEN {_hashed(column)} ELSE {_known(column)} END"


def _whole(text: str) -> str:
    number = f"TRY_CAST({text} AS DOUBLE)"
    return f"""CASE WHEN {text} IS NULL THEN CASE WHEN type IN {_COUNTED_TYPES} THEN 1 END
        WHEN abs({number}) < 1e15 AND {number} = floor({number}) THEN CAST({number} AS BIGINT) ELSE {UNREADABLE} END"""


def _cents(text: str) -> str:
    # By decimals, not by floats: 2.555 is 256 cents and not the 255 that its nearest float rounds to.
    return f"""CASE WHEN {text} IS NOT NULL THEN
        coalesce(CAST(round(TRY_CAST({text} AS DECIMAL(18, 4)) * 100) AS BIGINT), {UNREADABLE}) END"""


def _by_row(rejected: pd.DataFrame, lines: pa.Table) -> pa.Table:
    """One row per refused row of the file: row, reason, detail; the first refused line speaks for its order."""
    at = pa.array(rejected["index"].to_numpy(), pa.int64())
    columns = {"row": lines["row"].take(at), **{name: pa.array(rejected[name].to_numpy(), pa.string()) for name in ("reason", "detail")}}
    table = pa.table(columns)
    first = np.unique(table["row"].to_numpy(), return_index=True)[1]
    return table.take(pa.array(first))


def _with_raw(refused: pa.Table, rows: pa.Table) -> pa.Table:
    at = np.searchsorted(rows["row"].to_numpy(), refused["row"].to_numpy())
    return refused.append_column("raw", rows["raw"].take(pa.array(at)))


def _quarantined(db: duckdb.DuckDBPyConnection, rejected: pa.Table, batch: RawBatch, arrival: Arrival) -> pa.Table:
    """As rows of the quarantine table. The id is the hash of where and what: the same row is set aside once."""
    register(db, rejected)
    return db.sql(
        f"""SELECT md5(concat_ws(chr(31), $source, $file, row, raw)) AS quarantine_id, $source AS source, $file AS file, row,
            reason, detail, raw, TIMESTAMPTZ '{arrival.at.isoformat()}' AS created_timestamp FROM piece""",
        params={"source": batch.source, "file": batch.path.name},
    ).to_arrow_table()
