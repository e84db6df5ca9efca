"""Raw rows as their file has them -> rows in our column names, in one SQL projection per batch.

In: Arrow tables with the file's columns, or JSON text. Out: tables of the schema CANONICAL, same rows, same order. Judges
nothing: what cannot be read as a time or a known type is null, and the row as received stays beside it.
"""

import duckdb
import pyarrow as pa

from pipelines.events import SEGMENT_CALLS, SEGMENT_NAMES
from pipelines.sources.mapping import TRAITS, Mapping, Resolved

_TIME, _TEXT = pa.timestamp("us", tz="UTC"), pa.string()
CANONICAL = pa.schema(
    [
        ("row", pa.int64()),  # 1-based line or row of the file
        ("raw", _TEXT),  # the row as received
        ("message_id", _TEXT),
        ("type", _TEXT),  # one of events.TYPES; null where the file's value is not known
        ("name", _TEXT),  # the event's name as received
        ("event_timestamp", _TIME),
        ("received_timestamp", _TIME),
        ("user_id", _TEXT),
        ("anonymous_id", _TEXT),
        ("email", _TEXT),
        ("item_id", _TEXT),
        ("order_id", _TEXT),
        ("session_id", _TEXT),
        ("decision_id", _TEXT),
        ("quantity", _TEXT),
        ("price", _TEXT),  # of one unit, in major units
        ("category", _TEXT),
        ("query", _TEXT),
        *((name, _TEXT) for name in TRAITS),
        ("consent", _TEXT),  # JSON object: purpose -> true or false
        ("products", _TEXT),  # JSON array of the lines of an order
    ]
)
_CHUNK_ROWS = 20_000
_UNITS = {"s": 1_000_000, "ms": 1_000, "us": 1}  # microseconds in one
_HORIZON = 4_102_444_800_000_000  # 2100-01-01 in microseconds: larger numbers are in another unit than the rest of their file

_LOWER_NAMES = {name.lower(): kind for name, kind in SEGMENT_NAMES.items()}
# Joined on, so blanks around them are not theirs.
_KEYS = ("message_id", "user_id", "anonymous_id", "email", "item_id", "order_id", "session_id")
# Our name -> where Segment and the SDKs that speak its language put it, the first that is there.
_PEOPLE = ("traits", "context.traits", "properties")
_SEGMENT: dict[str, tuple[str, ...]] = {
    "call": ("type",),
    "name": ("event", "name"),
    "message_id": ("messageId",),
    "event_timestamp": ("timestamp", "originalTimestamp", "receivedAt"),
    "received_timestamp": ("receivedAt",),
    "user_id": ("userId",),
    "anonymous_id": ("anonymousId", "previousId"),
    "email": tuple(f"{place}.email" for place in _PEOPLE),
    "item_id": ("properties.product_id", "properties.item_id", "properties.sku"),
    "order_id": ("properties.order_id",),
    "session_id": ("context.sessionId", "properties.session_id"),
    "decision_id": ("properties.decision_id",),
    "quantity": ("properties.quantity",),
    "price": ("properties.price",),
    "category": ("properties.category",),
    "query": ("properties.query",),
    **{name: tuple(f"{place}.{name}" for place in _PEOPLE[:2]) for name in TRAITS},
    "consent": ("context.consent.categoryPreferences", "properties.categoryPreferences"),
    "products": ("properties.products",),
}


def register(db: duckdb.DuckDBPyConnection, table: pa.Table) -> None:
    """Make `table` the relation `piece` of the queries that follow; in chunks, because DuckDB reads one chunk per thread."""
    db.register("piece", pa.Table.from_batches(table.to_batches(max_chunksize=_CHUNK_ROWS), schema=table.schema))


def unit_of(db: duckdb.DuckDBPyConnection, table: pa.Table, shape: Resolved, mapping: Mapping) -> str | None:
    """The unit of a file's unix times by the magnitude of their median: "s", "ms" or "us". None where that does not apply."""
    if mapping.time.unit != "unix" or len(table) == 0 or pa.types.is_temporal(table.schema.field(shape.time).type):
        return None
    register(db, table)
    found = db.sql(f"SELECT median(TRY_CAST({_name(shape.time)} AS DOUBLE)) FROM piece").fetchall()
    middle = found[0][0] or 0
    return "s" if middle < 1e11 else "ms" if middle < 1e14 else "us"


def mapped_rows(db: duckdb.DuckDBPyConnection, table: pa.Table, shape: Resolved, mapping: Mapping, unit: str | None) -> pa.Table:
    """The rows of `table` (the file's columns, with `__raw` and `__row`) as CANONICAL. `unit`: as `unit_of` found it."""
    register(db, table)
    text = {name: _read_text(column, table, whole=name in mapping.rules.whole_numbers) for name, column in shape.columns.items()}
    expressions = {
        **text,
        "row": "__row",
        "raw": "__raw",
        "message_id": text.get("message_id", "md5(__raw)"),  # same content, same event
        "name": text.get("type", "NULL"),
        "type": _mapped_type(text, mapping),
        "event_timestamp": _time(shape.time, table, mapping, unit),
    }
    if "received_timestamp" in shape.columns:
        expressions["received_timestamp"] = _time(shape.columns["received_timestamp"], table, mapping, unit)
    if "price" in text and mapping.rules.price_unit == "minor":
        expressions["price"] = f"CAST(TRY_CAST({text['price']} AS DECIMAL(18, 4)) / 100 AS VARCHAR)"
    if mapping.rules.returns is not None and "quantity" in text:
        expressions["quantity"] = f"CASE WHEN {_is_return(text, mapping)} THEN ltrim({text['quantity']}, '-') ELSE {text['quantity']} END"
    return _project(db, expressions)


def json_table(db: duckdb.DuckDBPyConnection, table: pa.Table, mapping: Mapping) -> pa.Table:
    """JSON objects (column `__raw`) with one text column for each key or dotted path that the mapping may ask for."""
    register(db, table)
    rows = db.sql("SELECT DISTINCT unnest(json_keys(__raw)) FROM (SELECT __raw FROM piece LIMIT 1000)").fetchall()
    keys = sorted(key for (key,) in rows)
    asked = [mapping.time.column, *mapping.columns.values(), *mapping.traits.values()]
    spelled = [name.removesuffix("?") for column in asked for name in ((column,) if isinstance(column, str) else column)]
    paths = [name for name in spelled if name not in keys and name.split(".")[0] in keys]
    names = list(dict.fromkeys([*keys, *paths]))
    steps = [f'$."{name}"' if name in keys else "$" + "".join(f'."{step}"' for step in name.split(".")) for name in names]
    found = f"json_extract_string(__raw, [{', '.join(_literal(step) for step in steps)}])"
    columns = "".join(f", found[{at}] AS {_name(name)}" for at, name in enumerate(names, start=1))
    return db.sql(f"SELECT __raw, __row{columns} FROM (SELECT *, {found} AS found FROM piece)").to_arrow_table()


def segment_rows(db: duckdb.DuckDBPyConnection, table: pa.Table) -> pa.Table:
    """The rows of `table` (Segment calls as JSON text `__raw`, with `__row`) as CANONICAL. One look at each text."""
    register(db, table)
    paths = list(dict.fromkeys(path for options in _SEGMENT.values() for path in options))
    extract = f"json_extract_string(__raw, [{', '.join(_literal(f'$.{path}') for path in paths)}])"
    places = {name: [f"found[{paths.index(path) + 1}]" for path in options] for name, options in _SEGMENT.items()}
    columns = {name: _first_of([f"trim({place})" for place in found] if name in _KEYS else found) for name, found in places.items()}
    call, event = f"lower({columns['call']})", f"lower({columns['name']})"
    track, other = _lookup(event, _LOWER_NAMES, _literal("custom")), _lookup(call, SEGMENT_CALLS, "NULL")
    expressions = {
        **{name: expression for name, expression in columns.items() if name != "call"},
        "row": "__row",
        "raw": "__raw",
        "type": f"CASE WHEN {call} = 'track' THEN {track} ELSE {other} END",
        "name": f"coalesce({columns['name']}, {columns['call']})",
        "event_timestamp": _instant(columns["event_timestamp"]),
        "received_timestamp": _instant(columns["received_timestamp"]),
    }
    return _project(db, expressions, f"(SELECT __raw, __row, {extract} AS found FROM piece)")


def _project(db: duckdb.DuckDBPyConnection, expressions: dict[str, str], rows: str = "piece") -> pa.Table:
    kinds = {"row": "BIGINT", "event_timestamp": "TIMESTAMPTZ", "received_timestamp": "TIMESTAMPTZ"}
    columns = [f"CAST({expressions.get(name, 'NULL')} AS {kinds.get(name, 'VARCHAR')}) AS {_name(name)}" for name in CANONICAL.names]
    return db.sql(f"SELECT {', '.join(columns)} FROM {rows}").to_arrow_table().cast(CANONICAL)


def _mapped_type(text: dict[str, str], mapping: Mapping) -> str:
    known = _lookup(text["type"], mapping.types, "NULL") if "type" in text else _literal(mapping.source.type or "")
    return f"CASE WHEN {_is_return(text, mapping)} THEN 'return' ELSE {known} END" if mapping.rules.returns else known


def _is_return(text: dict[str, str], mapping: Mapping) -> str:
    rule = mapping.rules.returns
    if rule is None or rule.column not in text:
        return "false"
    return f"coalesce(starts_with({text[rule.column]}, {_literal(rule.prefix)}), false)"


def _read_text(column: str, table: pa.Table, *, whole: bool) -> str:
    text = f"CAST({_name(column)} AS VARCHAR)"
    if whole or pa.types.is_floating(table.schema.field(column).type):
        text = f"regexp_replace({text}, '^(-?[0-9]+)\\.0+$', '\\1')"  # what spreadsheets make of a whole number
    return f"nullif(trim({text}), '')"


def _time(column: str, table: pa.Table, mapping: Mapping, unit: str | None) -> str:
    if pa.types.is_temporal(table.schema.field(column).type):
        return f"CASE WHEN isfinite({_name(column)}) THEN CAST({_name(column)} AS TIMESTAMPTZ) END"
    if mapping.time.unit == "iso":
        return _instant(f"trim(CAST({_name(column)} AS VARCHAR))", mapping.time.formats)
    micros = f"round(TRY_CAST({_name(column)} AS DOUBLE) * {_UNITS[unit or 's']})"
    return f"CASE WHEN {micros} BETWEEN 0 AND {_HORIZON} THEN make_timestamp(CAST({micros} AS BIGINT)) AT TIME ZONE 'UTC' END"


def _instant(text: str, formats: tuple[str, ...] = ()) -> str:
    """An ISO 8601 text as an instant, UTC where it names no zone; null where it is none. A plain TIMESTAMP cast drops the zone."""
    parsed = f"TRY_CAST({text} AS TIMESTAMPTZ)"
    if formats:
        parsed = f"coalesce({parsed}, try_strptime({text}, [{', '.join(_literal(f) for f in formats)}]) AT TIME ZONE 'UTC')"
    return f"CASE WHEN isfinite({parsed}) THEN {parsed} END"


def _lookup(text: str, table: dict[str, str], otherwise: str) -> str:
    whens = " ".join(f"WHEN {_literal(key)} THEN {_literal(value)}" for key, value in table.items())
    return f"CASE {text} {whens} ELSE {otherwise} END" if table else otherwise


def _first_of(expressions: list[str]) -> str:
    filled = [f"nullif({expression}, '')" for expression in expressions]
    return f"coalesce({', '.join(filled)})" if len(filled) > 1 else filled[0]


def _name(column: str) -> str:
    return '"' + column.replace('"', '""') + '"'


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
