"""Raw rows as their file has them -> rows in our column names, in one SQL projection per batch.

In: Arrow tables with the file's columns, or JSON text. Out: tables of the schema CANONICAL, same rows, same order. Judges
nothing: what cannot be read as a time or a known type is null, and the row as received stays beside it.
"""

import json
from collections.abc import Iterable
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.engine import literal
from pipelines.events import ORDER_TYPES, SEGMENT_CALLS, SEGMENT_NAMES
from pipelines.sources.mapping import DIRECT, TRAITS, Mapping, Resolved

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
        ("phone", _TEXT),
        ("item_id", _TEXT),
        ("order_id", _TEXT),
        ("session_id", _TEXT),
        ("decision_id", _TEXT),
        ("quantity", _TEXT),
        ("price", _TEXT),  # of one unit, in major units
        ("category", _TEXT),
        ("query", _TEXT),
        *((name, _TEXT) for name in TRAITS),
        ("direct", _TEXT),  # JSON object: trait of DIRECT -> text, as given; null where none is
        ("consent", _TEXT),  # JSON object: purpose -> true or false
        ("policy_version", _TEXT),
        ("products", _TEXT),  # JSON array of the lines of an order
    ]
)
_CHUNK_ROWS = 20_000
_UNITS = {"s": 1_000_000, "ms": 1_000, "us": 1}  # microseconds in one
_HORIZON = 4_102_444_800_000_000  # 2100-01-01 in microseconds: larger numbers are in another unit than the rest of their file

_LOWER_NAMES = {name.lower(): kind for name, kind in SEGMENT_NAMES.items()}
# Joined on, so blanks around them are not theirs.
_KEYS = ("message_id", "user_id", "anonymous_id", "email", "phone", "item_id", "order_id", "session_id")
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
    "phone": tuple(f"{place}.phone" for place in _PEOPLE),
    "item_id": ("properties.product_id", "properties.item_id", "properties.sku"),
    "order_id": ("properties.order_id",),
    "session_id": ("context.sessionId", "properties.session_id"),
    "decision_id": ("properties.decision_id",),
    "quantity": ("properties.quantity",),
    "price": ("properties.price",),
    "amount": ("properties.revenue", "properties.total", "properties.value"),  # of a whole order
    "category": ("properties.category",),
    "query": ("properties.query",),
    **{name: tuple(f"{place}.{name}" for place in _PEOPLE[:2]) for name in TRAITS},
    "consent": ("context.consent.categoryPreferences", "properties.categoryPreferences"),
    "policy_version": ("context.consent.policyVersion", "properties.policyVersion"),
    "products": ("properties.products",),
}
_NOT_OURS = ("call", "amount")
# Direct traits -> their spellings, and the spellings of their part of an address that is an object.
_SPELLED = {
    "first_name": ("firstName", "first_name"),
    "last_name": ("lastName", "last_name"),
    "name": ("name",),
    "address": ("address",),
    "street": ("street",),
    "city": ("city",),
    "postcode": ("postcode", "postalCode", "postal_code", "zip"),
    "date_of_birth": ("dateOfBirth", "date_of_birth", "birthday"),
}
_PARTS = ("street", "city", "postcode")
_IS_DIRECT = '"(' + "|".join(spelling for spelled in _SPELLED.values() for spelling in spelled) + ')"'
_STEPS = [f"$.{spelling}" for name in _PARTS for spelling in _SPELLED[name]]


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
    """The rows of `table` (the file's columns, with `__row`) as CANONICAL. `unit`: as `unit_of` found it.

    Without a column `__raw` a row's own text is its JSON: what quarantine keeps, and what the id of a row without one is the hash of.
    """
    register(db, table)
    text = {name: _read_text(column, table, whole=name in mapping.rules.whole_numbers) for name, column in shape.columns.items()}
    expressions = {
        **text,
        "row": "__row",
        "raw": "__raw",
        "message_id": text.get("message_id", "md5(__raw)"),  # same content, same event
        "name": text.get("type", "NULL"),
        "type": "kind",
        "event_timestamp": _time(shape.time, table, mapping, unit),
    }
    if shape.direct:
        expressions["direct"] = _direct({name: _read_text(column, table, whole=False) for name, column in shape.direct.items()})
    if "received_timestamp" in shape.columns:
        expressions["received_timestamp"] = _time(shape.columns["received_timestamp"], table, mapping, unit)
    if "price" in text and mapping.rules.price_unit == "minor":
        expressions["price"] = f"CAST(TRY_CAST({text['price']} AS DECIMAL(18, 4)) / 100 AS VARCHAR)"
    if "quantity" in text:
        # Where the file says how many, an order that does not is incomplete and not one piece: '' is no number, null would be one.
        given = f"CASE WHEN kind IN {ORDER_TYPES} THEN coalesce({text['quantity']}, '') ELSE {text['quantity']} END"
        expressions["quantity"] = f"CASE WHEN {_is_return(text, mapping)} THEN ltrim({given}, '-') ELSE {given} END"
    rows = "piece" if "__raw" in table.column_names else f"(SELECT *, {_row_json(table)} AS __raw FROM piece)"
    return _project(db, expressions, f"(SELECT *, {_mapped_type(text, mapping)} AS kind FROM {rows})", table)


def json_names(db: duckdb.DuckDBPyConnection, table: pa.Table, mapping: Mapping) -> list[str]:
    """The keys of the JSON objects `__raw`, and the dotted paths that the mapping may ask for below them."""
    register(db, table)
    keys = sorted(key for (key,) in db.sql("SELECT DISTINCT unnest(json_keys(__raw)) FROM piece").fetchall())
    asked = [mapping.time.column, *mapping.columns.values(), *mapping.traits.values(), *mapping.direct.values()]
    spelled = [name.removesuffix("?") for column in asked for name in ((column,) if isinstance(column, str) else column)]
    return list(dict.fromkeys([*keys, *(name for name in spelled if name.split(".")[0] in keys)]))


def json_table(db: duckdb.DuckDBPyConnection, table: pa.Table, shape: Resolved) -> pa.Table:
    """JSON objects (column `__raw`, with `__row`) with one text column for each column of the shape: a key, else a dotted path."""
    register(db, table)
    names = list(dict.fromkeys([shape.time, *shape.columns.values(), *shape.direct.values()]))
    steps = [step for name in names for step in (f'$."{name}"', "$" + "".join(f'."{part}"' for part in name.split(".")))]
    found = f"json_extract_string(__raw, [{', '.join(literal(step) for step in steps)}])"
    columns = "".join(f", coalesce(found[{2 * at + 1}], found[{2 * at + 2}]) AS {_name(name)}" for at, name in enumerate(names))
    return db.sql(f"SELECT __raw, __row{columns} FROM (SELECT *, {found} AS found FROM piece)").to_arrow_table()


def segment_rows(db: duckdb.DuckDBPyConnection, table: pa.Table) -> pa.Table:
    """The rows of `table` (Segment calls as JSON text `__raw`, with `__row`) as CANONICAL. One look at each text."""
    register(db, table)
    found = {name: [_field(path) for path in options] for name, options in _SEGMENT.items()}
    columns = {name: _first_of([f"trim({place})" for place in places] if name in _KEYS else places) for name, places in found.items()}
    call, event = f"lower({columns['call']})", f"lower({columns['name']})"
    track, other = _lookup(event, _LOWER_NAMES, literal("custom")), _lookup(call, SEGMENT_CALLS, "NULL")
    expressions = {
        **{name: expression for name, expression in columns.items() if name not in _NOT_OURS},
        "row": "__row",
        "type": "kind",
        "name": f"coalesce({columns['name']}, {columns['call']})",
        "event_timestamp": instant_sql(columns["event_timestamp"]),
        "received_timestamp": instant_sql(columns["received_timestamp"]),
        # An order without its lines is one piece at its own amount: it is known what was paid, not for what.
        "price": f"CASE WHEN is_whole THEN coalesce({columns['amount']}, {columns['price']}) ELSE {columns['price']} END",
        "quantity": f"CASE WHEN NOT is_whole THEN {columns['quantity']} END",
    }
    is_whole = f"""coalesce(kind IN {ORDER_TYPES} AND {columns["item_id"]} IS NULL
        AND coalesce({columns["products"]}, '[]') IN ('[]', '{{}}'), false)"""
    kind = f"CASE WHEN {call} = 'track' THEN {track} ELSE {other} END"
    rows = f"(SELECT __raw, __row, json_transform(__raw, {literal(_SHAPE)}) AS found FROM piece)"
    has_traits = " OR ".join(f"{_field(place)} IS NOT NULL" for place in _PEOPLE[:2])
    has_direct = f"CASE WHEN {has_traits} THEN regexp_matches(__raw, {literal(_IS_DIRECT)}) END"
    rows = f"(SELECT *, {is_whole} AS is_whole FROM (SELECT *, {kind} AS kind FROM {rows}))"
    canonical = _project(db, expressions | {"direct": f"CASE WHEN {has_direct} THEN '' END"}, rows, table)
    return canonical.set_column(canonical.column_names.index("direct"), "direct", _segment_direct(db, table, canonical["direct"]))


def instant_sql(text: str, formats: tuple[str, ...] = ()) -> str:
    """An ISO 8601 text as an instant, UTC where it names no zone; null where it is none. A plain TIMESTAMP cast drops the zone."""
    parsed = f"TRY_CAST({text} AS TIMESTAMPTZ)"
    if formats:
        parsed = f"coalesce({parsed}, try_strptime({text}, [{', '.join(literal(f) for f in formats)}]) AT TIME ZONE 'UTC')"
    return f"CASE WHEN isfinite({parsed}) THEN {parsed} END"


def _segment_direct(db: duckdb.DuckDBPyConnection, table: pa.Table, marked: pa.ChunkedArray) -> pa.ChunkedArray:
    """The direct traits of the calls that are `marked`. Few may carry some, and these need a closer look than the others."""
    may_have = pc.is_valid(marked).combine_chunks()
    if marked.null_count == len(marked):
        return marked
    table = table.filter(may_have)
    register(db, table)
    places = _PEOPLE[:2]
    text = {name: [_field(f"{place}.{spelling}") for place in places for spelling in spelled] for name, spelled in _SPELLED.items()}
    for name in _PARTS:
        text[name] += [f"parts[{_STEPS.index(f'$.{spelling}') + 1}]" for spelling in _SPELLED[name]]
    traits = {name: _first_of([f"trim({place})" for place in options]) for name, options in text.items()}
    traits["address"] = "CASE WHEN parts IS NULL THEN nullif(trim(address), '') END"
    rows = f"""(SELECT *, CASE WHEN starts_with(ltrim(address), '{{') THEN json_extract_string(address, {_STEPS}) END AS parts
        FROM (SELECT __row, found, {_first_of(text["address"])} AS address
            FROM (SELECT __row, json_transform(__raw, {literal(_DIRECT_SHAPE)}) AS found FROM piece)))"""
    found = _ordered(db.sql(f"SELECT __row, {_direct(traits)} AS direct FROM {rows}").to_arrow_table(), "__row", table["__row"])
    return pc.replace_with_mask(marked, may_have, found["direct"].combine_chunks().cast(_TEXT))


def _shape(paths: Iterable[str]) -> str:
    """What `json_transform` makes of a call: a structure of texts. Whatever is not of this structure is null, never a failure."""
    shape: dict[str, Any] = {}
    for path in paths:
        *outer, name = path.split(".")
        inner = shape
        for step in outer:
            inner = inner.setdefault(step, {})
        inner[name] = "VARCHAR"
    return json.dumps(shape)


def _field(path: str) -> str:
    return "found." + ".".join(_name(step) for step in path.split("."))


_SHAPE = _shape(path for options in _SEGMENT.values() for path in options)
_DIRECT_SHAPE = _shape(f"{place}.{spelling}" for place in _PEOPLE[:2] for spelled in _SPELLED.values() for spelling in spelled)


def _project(db: duckdb.DuckDBPyConnection, expressions: dict[str, str], rows: str, table: pa.Table) -> pa.Table:
    """CANONICAL by the expressions over `rows`, in the order of `table`, whose text is not sent through the query and back."""
    kinds = {"row": "BIGINT", "event_timestamp": "TIMESTAMPTZ", "received_timestamp": "TIMESTAMPTZ"}
    names = [name for name in CANONICAL.names if name != "raw" or "__raw" not in table.column_names]
    columns = [f"CAST({expressions.get(name, 'NULL')} AS {kinds.get(name, 'VARCHAR')}) AS {_name(name)}" for name in names]
    found = _ordered(db.sql(f"SELECT {', '.join(columns)} FROM {rows}").to_arrow_table(), "row", table["__row"])
    if "raw" not in names:
        found = found.add_column(CANONICAL.get_field_index("raw"), "raw", table["__raw"])
    return found.cast(CANONICAL)


def _ordered(found: pa.Table, key: str, order: pa.ChunkedArray) -> pa.Table:
    """A connection may be set to give rows in any order."""
    return found if found[key].equals(order) else found.take(pc.index_in(order, value_set=found[key].combine_chunks()))


def _direct(given: dict[str, str]) -> str:
    """The direct traits that are not null as one JSON object; null where all are."""
    parts = [f"""'"{name}":' || to_json({given[name]})""" for name in DIRECT if name in given]
    return f"""'{{' || nullif(concat_ws(',', {", ".join(parts)}), '') || '}}'"""


def _row_json(table: pa.Table) -> str:
    fields = ", ".join(f"{literal(name)}: {_name(name)}" for name in table.column_names if name != "__row")
    return f"CAST(to_json({{{fields}}}) AS VARCHAR)"


def _mapped_type(text: dict[str, str], mapping: Mapping) -> str:
    known = _lookup(text["type"], mapping.types, "NULL") if "type" in text else literal(mapping.source.type or "")
    return f"CASE WHEN {_is_return(text, mapping)} THEN 'return' ELSE {known} END" if mapping.rules.returns else known


def _is_return(text: dict[str, str], mapping: Mapping) -> str:
    rule = mapping.rules.returns
    if rule is None or rule.column not in text:
        return "false"
    return f"coalesce(starts_with({text[rule.column]}, {literal(rule.prefix)}), false)"


def _read_text(column: str, table: pa.Table, *, whole: bool) -> str:
    given, kind = _name(column), table.schema.field(column).type
    text = f"CAST({given} AS VARCHAR)"
    if pa.types.is_integer(kind):
        return text
    is_number = pa.types.is_floating(kind)
    if whole or is_number:
        bare = f"regexp_replace({text}, '^(-?[0-9]+)\\.0+$', '\\1')"  # what spreadsheets make of a whole number
        # the same for less: a fraction has no such end, and a whole number of ordinary size is written without a point
        quick = f"WHEN {given} <> 0 AND abs({given}) < 1e15 THEN CAST(CAST({given} AS BIGINT) AS VARCHAR)"
        text = f"CASE WHEN {given} <> floor({given}) THEN {text} {quick} ELSE {bare} END" if is_number else bare
    return f"nullif(trim({text}), '')"


def _time(column: str, table: pa.Table, mapping: Mapping, unit: str | None) -> str:
    if pa.types.is_temporal(table.schema.field(column).type):
        return f"CASE WHEN isfinite({_name(column)}) THEN CAST({_name(column)} AS TIMESTAMPTZ) END"
    if mapping.time.unit == "iso":
        return instant_sql(f"trim(CAST({_name(column)} AS VARCHAR))", mapping.time.formats)
    micros = f"round(TRY_CAST({_name(column)} AS DOUBLE) * {_UNITS[unit or 's']})"
    return f"CASE WHEN {micros} BETWEEN 0 AND {_HORIZON} THEN make_timestamp(CAST({micros} AS BIGINT)) AT TIME ZONE 'UTC' END"


def _lookup(text: str, table: dict[str, str], otherwise: str) -> str:
    whens = " ".join(f"WHEN {literal(key)} THEN {literal(value)}" for key, value in table.items())
    return f"CASE {text} {whens} ELSE {otherwise} END" if table else otherwise


def _first_of(expressions: list[str]) -> str:
    filled = [f"nullif({expression}, '')" for expression in expressions]
    return f"coalesce({', '.join(filled)})" if len(filled) > 1 else filled[0]


def _name(column: str) -> str:
    return '"' + column.replace('"', '""') + '"'
