"""Raw batches -> lines that may become events, staged in DuckDB; and the rows that may not, with a reason.

In: RawBatch. Out: rows of `staged`, and the refused ones. An order becomes one line per product; if one of them is wrong, the whole
row is set aside. Identifiers end here: from now on they are numbers of `names`. Never looks at other events.

Every row is judged in SQL; those that may not pass go to `contract.validate`, whose word counts, and which says why.
"""

from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa

from pipelines.contract import CHECKED, passes_sql, validate
from pipelines.events import EARLIEST, MAX_PRICE_CENTS, MAX_QUANTITY, ORDER_TYPES, UNREADABLE
from pipelines.ingest import names
from pipelines.ingest.messages import message_sql
from pipelines.settings import IngestSettings
from pipelines.sources import RawBatch
from pipelines.sources.projection import register

# Of the view `staged`, beside `place`, the row's own place. Columns that no batch has are in the view alone.
_ALWAYS = {
    "origin": "INTEGER", "source_no": "INTEGER", "row": "BIGINT", "line": "INTEGER", "message": "UHUGEINT", "event_id": "VARCHAR",
    "type": "VARCHAR", "event_timestamp": "TIMESTAMPTZ", "who_no": "INTEGER", "is_good": "BOOLEAN",
}  # fmt: skip
_PLAIN = (
    "name", "order_id", "session_id", "decision_id", "query", "age_band", "gender", "region", "direct", "consent", "policy_version",
)  # fmt: skip
_ASKED = {
    **dict.fromkeys(_PLAIN, "VARCHAR"), "item_id": "VARCHAR", "category": "VARCHAR", "received_timestamp": "TIMESTAMPTZ",
    **dict.fromkeys(("user_no", "email_no", "phone_no", "anonymous_no"), "INTEGER"), "quantity": "BIGINT", "price_cents": "BIGINT",
    "is_listed": "BOOLEAN",
}  # fmt: skip
REFUSED = pa.schema(
    [
        ("row", pa.int64()),
        *((name, pa.string()) for name in ("reason", "detail", "raw", "subject", "message_id")),
        ("is_erased", pa.bool_()),
    ]
)  # a row that did not pass; `subject`: null where it names nobody
_PRODUCT = '[{"product_id":"VARCHAR","item_id":"VARCHAR","sku":"VARCHAR","quantity":"VARCHAR","price":"VARCHAR","category":"VARCHAR"}]'
_ORDER = "CASE WHEN is_listed THEN NULL ELSE order_id END"  # an order's line has to name its item: the order alone is not enough
_COUNTED_TYPES = ("cart_add", "cart_remove", *ORDER_TYPES)  # mean one piece where they name no quantity


@dataclass
class Origin:
    """Where rows came from, and what became of them so far. `number`: its place in the run; rows of it are in one source."""

    number: int
    source: str
    name: str  # of the file
    written: datetime  # the file's last change: no row can have been received after it
    has_own_ids: bool = True  # else a row's id is the hash of its content
    told: datetime | None = None  # when rows that carry no time of receipt were received, by the caller's word
    read: int = 0
    refused: Counter[str] = field(default_factory=Counter)  # reason -> rows that did not pass
    unit: str | None = None  # of unix times: "s", "ms" or "us"
    how: str = "{}"  # JSON: how its rows were read, for a replay
    is_replay: bool = False  # its rows come from the quarantine
    source_no: int = 0

    @classmethod
    def of_file(cls, number: int, path: Path, source: str, *, received: datetime | None, has_own_ids: bool) -> "Origin":
        """The origin of a file's rows."""
        return cls(number, source, path.name, datetime.fromtimestamp(path.stat().st_mtime, UTC), has_own_ids, received)

    @property
    def at(self) -> datetime:
        """The instant at which the rows can be said to have been here."""
        return self.told or self.written


def prepare(db: duckdb.DuckDBPyConnection) -> None:
    """Create `staged`, empty: one row per line. `row` is that of the file; who_no is the main one of the four names.

    And `kinds`: what was said of lines that look alike to `contract.validate`; reason is null where they pass.
    """
    db.execute(
        f"""CREATE TABLE staged_rows ({", ".join(f"{name} {kind}" for name, kind in _ALWAYS.items())});
        CREATE TABLE kinds (kind UBIGINT, reason VARCHAR, detail VARCHAR);
        CREATE VIEW bad_kinds AS FROM kinds WHERE reason IS NOT NULL"""
    ).fetchall()
    _show(db)


def stage(db: duckdb.DuckDBPyConnection, batch: RawBatch, origin: Origin, limits: IngestSettings) -> pa.Table:
    """Add the batch's rows to `staged`; returns those that do not pass, as REFUSED.

    Among them, with the reason `return_unmatched`, are the returns of a run that has to refuse those of which no purchase is known.
    """
    register(db, batch.rows)
    first = int(db.sql("SELECT count(*) FROM staged_rows").fetchall()[0][0])
    slots = tuple(slot for slot in names.SLOTS if _has(batch, slot))
    if slots:
        names.learn(db, "piece", slots)
    columns = _columns(batch, origin, slots)
    _widen(db, columns)
    db.execute(f"INSERT INTO staged_rows BY NAME {_staged_sql(batch, origin, slots, columns, limits)}").fetchall()
    origin.read += len(batch.rows) + len(batch.rejected)
    origin.unit = origin.unit or batch.unit
    refused = _refuse(db, first, origin, limits)
    return pa.concat_tables([_unread(batch.rejected), _with_raw(refused, batch.rows)])


def plain_type(kind: pa.DataType) -> pd.ArrowDtype | None:
    """Arrow's own types in pandas, but for times: Arrow's difference of two nulls looks at what lies below them, and may overflow."""
    return None if pa.types.is_timestamp(kind) else pd.ArrowDtype(kind)


def own_id_sql() -> str:
    """SQL: the message id of a row of `staged`, which its lines share."""
    return "CASE WHEN is_listed THEN left(event_id, len(event_id) - len(':' || staged.line)) ELSE event_id END"


def whole_sql(text: str) -> str:
    """SQL: a text as a quantity of its row's `type`; 1 where a counted act says nothing, `UNREADABLE` where it is no whole number."""
    number = f"TRY_CAST({text} AS DOUBLE)"
    return f"""CASE WHEN {text} IS NULL THEN CASE WHEN type IN {_COUNTED_TYPES} THEN 1 END WHEN {text} = '' THEN NULL
        WHEN abs({number}) < 1e15 AND {number} = floor({number}) THEN CAST({number} AS BIGINT) ELSE {UNREADABLE} END"""


def cents_sql(text: str) -> str:
    """SQL: a text as cents; null where there is none, `UNREADABLE` where it is no price.

    By decimals, not by floats: 2.555 is 256 cents and not the 255 that its nearest float rounds to. Sixteen digits still fit times 100.
    """
    return f"""CASE WHEN {text} IS NOT NULL THEN
        coalesce(CAST(round(TRY_CAST({text} AS DECIMAL(16, 4)) * 100) AS BIGINT), {UNREADABLE}) END"""


def _has(batch: RawBatch, column: str) -> bool:
    return bool(batch.rows[column].null_count < len(batch.rows))


def _columns(batch: RawBatch, origin: Origin, slots: tuple[str, ...]) -> set[str]:
    """The columns of `staged` that this batch has something for."""
    found = {name for name in (*_PLAIN, "item_id", "category", "received_timestamp") if _has(batch, name)}
    found |= {"user_no"} if slots else set()
    found |= {name for slot, name in (("email", "email_no"), ("phone", "phone_no"), ("anonymous_id", "anonymous_no")) if slot in slots}
    if origin.told is not None:
        found.add("received_timestamp")
    if _has(batch, "products"):
        found |= {"is_listed", "item_id", "category", "price_cents"}
    if _has(batch, "price"):
        found.add("price_cents")
    return found | {"quantity"}  # some types mean one piece


def _widen(db: duckdb.DuckDBPyConnection, columns: set[str]) -> None:
    there = _there(db)
    for name in sorted(columns - there):
        db.execute(f"ALTER TABLE staged_rows ADD COLUMN {name} {_ASKED[name]}").fetchall()
    if columns - there:
        _show(db)


def _show(db: duckdb.DuckDBPyConnection) -> None:
    there = _there(db)
    rest = "".join(f", CAST(NULL AS {kind}) AS {name}" for name, kind in _ASKED.items() if name not in there)
    db.execute(f"CREATE OR REPLACE VIEW staged AS SELECT rowid AS place, *{rest} FROM staged_rows").fetchall()


def _staged_sql(batch: RawBatch, origin: Origin, slots: tuple[str, ...], columns: set[str], limits: IngestSettings) -> str:
    """SQL: the rows of `piece` as those of `staged`, with the columns that are asked for."""
    joins = "".join(f" LEFT JOIN named n_{slot} ON n_{slot}.slot = '{slot}' AND n_{slot}.raw = rows.{slot}" for slot in slots)
    number = {slot: f"n_{slot}.number" for slot in slots}
    # Some shops give a visitor's address as the anonymous id: it is a known person then.
    address = ["CASE WHEN n_anonymous_id.kind = 'email' THEN n_anonymous_id.number END"] if "anonymous_id" in slots else []
    user = [*(number[slot] for slot in ("user_id", "email", "phone") if slot in slots), *address]
    told = "CAST(NULL AS TIMESTAMPTZ)" if origin.told is None else f"TIMESTAMPTZ '{origin.told.isoformat()}'"
    rows, item, quantity, price, category = _lines_sql(is_ordered=_has(batch, "products"))
    given = {
        "origin": str(origin.number),
        "source_no": str(origin.source_no),
        "row": "row",
        "line": "CAST(line AS INTEGER)",
        # The hash of a row would tell whether a guess at its raw names is right, for the rest of it can be read: it is keyed.
        "own_id": "message_id" if origin.has_own_ids else names.keyed_sql("message_id"),
        "is_listed": "is_listed",
        "type": "type",
        "event_timestamp": "event_timestamp",
        "received_timestamp": f"coalesce(received_timestamp, {told})",
        "user_no": f"coalesce({', '.join(user)})" if user else "NULL",
        "email_no": number.get("email", "NULL"),
        "phone_no": number.get("phone", "NULL"),
        "anonymous_no": "CASE WHEN n_anonymous_id.kind <> 'email' THEN n_anonymous_id.number END" if address else "NULL",
        "item_id": f"nullif(trim({item}), '')",
        "quantity": whole_sql(quantity),
        "price_cents": cents_sql(price),
        "category": f"nullif({category}, '')",
        **{name: name for name in _PLAIN},
    }
    asked = {name: given.get(name, name) if name in columns else f"CAST(NULL AS {kind})" for name, kind in _ASKED.items()}
    inner = ", ".join(
        f"{expression} AS {name}" for name, expression in {**{n: e for n, e in given.items() if n not in asked}, **asked}.items()
    )
    judged = {"event_id": "own_id", "created_timestamp": _judged_sql(origin), "user_id": "user_no", "anonymous_id": "anonymous_no"}
    passes = passes_sql(limits, judged | {"order_id": _ORDER})
    plain = ", ".join(sorted((columns | set(_ALWAYS)) - {"message", "event_id", "who_no", "is_good"}))
    return f"""
        SELECT {plain}, {message_sql("own_id")} AS message, coalesce(user_no, anonymous_no) AS who_no,
            {"CASE WHEN is_listed THEN own_id || ':' || line ELSE own_id END" if "is_listed" in columns else "own_id"} AS event_id,
            {passes} AS is_good
        FROM (SELECT {inner} FROM {rows} rows{joins})"""


def _lines_sql(*, is_ordered: bool) -> tuple[str, str, str, str, str]:
    """SQL: `piece` with one row per line of an order; and where a line's item, quantity, price and category are."""
    if not is_ordered:
        return "(SELECT *, 0 AS line, false AS is_listed FROM piece)", "item_id", "quantity", "price", "category"
    rows = f"""(
        SELECT * EXCLUDE (listed, products), unnest(listed) AS product, unnest(range(len(listed))) AS line FROM (
            SELECT *, coalesce(len(found) > 0, false) AS is_listed, CASE WHEN len(found) > 0 THEN found ELSE [NULL] END AS listed
            FROM (SELECT *, CASE WHEN type IN {ORDER_TYPES} THEN from_json(TRY_CAST(products AS JSON), '{_PRODUCT}') END AS found
                FROM piece)))"""
    item = "CASE WHEN is_listed THEN coalesce(product.product_id, product.item_id, product.sku) ELSE item_id END"
    quantity, price, category = (f"CASE WHEN is_listed THEN product.{name} ELSE {name} END" for name in ("quantity", "price", "category"))
    return rows, item, quantity, price, category


def _judged_sql(origin: Origin) -> str:
    """SQL: the receipt that a row's time is held against. One without a receipt was still not received after its file was written."""
    written = f"TIMESTAMPTZ '{origin.written.isoformat()}'"
    return f"coalesce(received_timestamp, CASE WHEN event_timestamp > {written} THEN {written} END)"


# -- rows that do not pass ---------------------------------------------------------------------------------------------


def _refuse(db: duckdb.DuckDBPyConnection, first: int, origin: Origin, limits: IngestSettings) -> pa.Table:
    """Judge the lines from place `first` on that are not sure to pass; returns the rows that do not, without their bytes.

    `is_good` then holds for the lines of the others, and for no line of an order of which one is wrong.
    """
    erased = "false"
    if db.sql("SELECT 1 FROM names WHERE is_erased LIMIT 1").fetchall():
        erased = " OR ".join(f"coalesce({column} IN (SELECT number FROM names WHERE is_erased), false)" for column in names.NUMBERS)
    db.execute(
        f"""CREATE OR REPLACE TEMP TABLE suspects AS
        SELECT *, hash({", ".join(CHECKED)}) AS kind FROM (
            SELECT place, row AS file_row, line AS part, who_no, {own_id_sql()} AS own_id, {erased} AS is_erased,
                {_signature_sql(origin, limits)}
            FROM staged WHERE place >= {first} AND NOT is_good)"""
    ).fetchall()
    _learn_kinds(db, limits)
    _mark(db, first)
    candidates = ""
    if limits.unmatched_returns == "refuse":
        candidates = f"""UNION ALL SELECT row, 'return_unmatched', '', who_no, {own_id_sql()}, {erased}
            FROM staged WHERE place >= {first} AND is_good AND type = 'return' AND line = 0"""
    once = "QUALIFY row_number() OVER (PARTITION BY file_row ORDER BY part) = 1" if "is_listed" in _there(db) else ""
    return db.sql(
        f"""SELECT file_row AS row, reason, detail, identifier AS subject, own_id AS message_id, told.is_erased FROM (
            SELECT file_row, reason, detail, who_no, own_id, is_erased FROM suspects JOIN bad_kinds USING (kind) {once} {candidates}) told
        LEFT JOIN names ON number = who_no ORDER BY row"""
    ).to_arrow_table()


def _learn_kinds(db: duckdb.DuckDBPyConnection, limits: IngestSettings) -> None:
    """Have the suspects judged that are unlike all before, and remember what was said of them."""
    looks = ", ".join(f"any_value({name}) AS {name}" for name in CHECKED)
    kinds = db.sql(f"SELECT kind, {looks} FROM suspects ANTI JOIN kinds USING (kind) GROUP BY kind").to_arrow_table()
    if not len(kinds):
        return
    rejected = validate(kinds.drop_columns(["kind"]).to_pandas(types_mapper=plain_type), limits).rejected.set_index("index")
    said = rejected.reindex(range(len(kinds))).astype("object")
    told = {name: pa.array(said[name].to_numpy(), pa.string(), from_pandas=True) for name in ("reason", "detail")}
    db.register("new_kinds", pa.table({"kind": kinds["kind"], **told}))
    db.execute("INSERT INTO kinds FROM new_kinds").fetchall()
    db.unregister("new_kinds")


def _mark(db: duckdb.DuckDBPyConnection, first: int) -> None:
    """Set `is_good` as `contract.validate` judged the suspects."""
    passed = "SELECT place FROM suspects ANTI JOIN bad_kinds USING (kind)"
    if db.sql(f"{passed} LIMIT 1").fetchall():
        db.execute(f"UPDATE staged_rows SET is_good = true WHERE rowid IN ({passed})").fetchall()
    if "is_listed" in _there(db):  # the other lines of their orders
        failed = "SELECT file_row FROM suspects SEMI JOIN bad_kinds USING (kind)"
        db.execute(f"UPDATE staged_rows SET is_good = false WHERE is_good AND rowid >= {first} AND row IN ({failed})").fetchall()


def _signature_sql(origin: Origin, limits: IngestSettings) -> str:
    """SQL: what `contract.validate` looks at in a row, and nothing that makes no difference to it: few rows are then many alike.

    Of what is judged by being there that it is there; of numbers and times in order a number and a time that are.
    """
    lead = f"epoch_us(event_timestamp) - epoch_us({_judged_sql(origin)})"
    is_timely = f"""coalesce(event_timestamp >= TIMESTAMPTZ '{EARLIEST.isoformat()}' AND coalesce({lead} BETWEEN
        {-limits.max_age_days * 86_400_000_000} AND {limits.max_future_minutes * 60_000_000}, true), false)"""
    at = f"TIMESTAMPTZ '{EARLIEST.isoformat()}'"
    there = {name: f"CASE WHEN {given} IS NOT NULL THEN 'x' END" for name, given in _GIVEN.items()}
    signature = there | {
        "type": "type",
        "event_timestamp": f"CASE WHEN {is_timely} THEN {at} ELSE event_timestamp END",
        "created_timestamp": f"CASE WHEN {is_timely} THEN {at} ELSE {_judged_sql(origin)} END",
        "quantity": f"CASE WHEN quantity BETWEEN 1 AND {MAX_QUANTITY} THEN 1 ELSE quantity END",
        "price_cents": f"CASE WHEN price_cents BETWEEN 0 AND {MAX_PRICE_CENTS} THEN 0 ELSE price_cents END",
    }
    return ", ".join(f"{signature[name]} AS {name}" for name in CHECKED)


_GIVEN = {
    "event_id": "event_id", "item_id": "item_id", "order_id": _ORDER, "consent": "consent", "user_id": "user_no",
    "anonymous_id": "anonymous_no",
}  # fmt: skip


def _there(db: duckdb.DuckDBPyConnection) -> set[str]:
    return {name for (name,) in db.sql("SELECT column_name FROM duckdb_columns() WHERE table_name = 'staged_rows'").fetchall()}


def _with_raw(refused: pa.Table, rows: pa.Table) -> pa.Table:
    at = np.searchsorted(rows["row"].to_numpy(), refused["row"].to_numpy())
    return refused.append_column("raw", rows["raw"].take(pa.array(at))).select(REFUSED.names).cast(REFUSED)


def _unread(rejected: pa.Table) -> pa.Table:
    """Lines that no reader could make a row of: they name nobody that we know of."""
    blank, nobody = pa.nulls(len(rejected), pa.string()), pa.array(np.zeros(len(rejected), bool))
    return pa.table([*(rejected[name] for name in ("row", "reason", "detail", "raw")), blank, blank, nobody], schema=REFUSED)
