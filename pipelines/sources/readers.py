"""One file of each kind -> batches of raw rows: CSV, Parquet, JSON lines, a JSON array, XML.

A row that cannot be read comes out as a rejected row with its bytes; only a file that is broken as a whole raises. Decides
nothing about kinds of files: that is `pipelines.sources`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.errors import InputError
from pipelines.sources.envelopes import unpack
from pipelines.sources.lines import REJECTED, Lines, read_lines, reject
from pipelines.sources.mapping import Mapping, Resolved, resolve
from pipelines.sources.projection import CANONICAL, json_names, json_table, mapped_rows, register, segment_rows, unit_of
from pipelines.sources.records import Form, header, parse, read_records

SEGMENT = "segment"  # the source of files that need no mapping
_OFFLINE = {"autoinstall_known_extensions": "false", "autoload_known_extensions": "false"}


@dataclass(frozen=True)
class RawBatch:
    """Some rows of one file. `rows`: CANONICAL; `rejected`: row, reason (a code of events.REASONS), detail, raw."""

    source: str
    path: Path
    rows: pa.Table
    rejected: pa.Table
    unit: str | None = None  # of unix times: "s", "ms" or "us"
    number: int = 0  # the file's place among those that were asked for
    form: Form | None = None  # of the records of a CSV file: with it, one of them can be read again


def connect(**config: str) -> duckdb.DuckDBPyConnection:
    """A DuckDB of our own in memory: UTC, no network, and nothing of the caller's Python in reach of its SQL."""
    db = duckdb.connect(config={**_OFFLINE, **config})
    db.execute("SET TimeZone = 'UTC'").fetchall()
    return db


def read_csv(db: duckdb.DuckDBPyConnection, path: Path, mapping: Mapping | None, batch_rows: int) -> Iterator[RawBatch]:
    """The records of a CSV file, in the mapping's delimiter and encoding; the first line names the columns unless the mapping does."""
    assert mapping is not None
    delimiter = "\t" if ".tsv" in path.suffixes else mapping.source.delimiter
    lines = read_lines(path, encoding=mapping.source.encoding, batch_rows=batch_rows)
    form = Form(mapping.source.columns, delimiter) if mapping.source.columns else None
    for part in lines:
        if form is None and len(part.text):
            form = Form(header(part.text[0].as_py(), delimiter, path), delimiter)
            part = Lines(part.text[1:], part.row[1:], part.rejected)
        if form is not None:
            yield from _csv_batches(db, chain([part], lines), form, path, mapping, batch_rows)
        elif len(part.rejected):
            yield RawBatch(mapping.source.name, path, CANONICAL.empty_table(), part.rejected)


def _csv_batches(
    db: duckdb.DuckDBPyConnection, lines: Iterator[Lines], form: Form, path: Path, mapping: Mapping, batch_rows: int
) -> Iterator[RawBatch]:
    shape = resolve(mapping, list(form.names), file=str(path))
    unit = None
    for records in read_records(lines, form, batch_rows=batch_rows):
        table, rejected = parse(records, form)
        unit = unit or unit_of(db, table, shape, mapping)
        if len(table) + len(rejected):
            yield RawBatch(mapping.source.name, path, mapped_rows(db, table, shape, mapping, unit), rejected, unit, form=form)


def read_parquet(db: duckdb.DuckDBPyConnection, path: Path, mapping: Mapping | None, batch_rows: int) -> Iterator[RawBatch]:
    """The rows of a Parquet file; a row as received is its JSON."""
    assert mapping is not None
    try:
        with pq.ParquetFile(path) as file:
            yield from _tables(db, _numbered(file.iter_batches(batch_size=batch_rows)), path, mapping, is_open=False)
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"sources: expected Parquet in {path}, found a damaged file ({str(error).splitlines()[0]}); fetch it again, then run again"
        ) from error


def _numbered(pieces: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    first = 1
    for piece in pieces:
        yield pa.Table.from_batches([piece]).append_column("__row", pa.array(np.arange(first, first + len(piece))))
        first += len(piece)


def read_xml(db: duckdb.DuckDBPyConnection, path: Path, mapping: Mapping | None, batch_rows: int) -> Iterator[RawBatch]:
    """The row elements of an XML file."""
    from pipelines.sources.elements import read_elements  # lxml is needed by this kind of file alone

    assert mapping is not None
    if mapping.source.row is None:
        raise InputError(f"sources: {path} is XML; name the element that is one row under [source] row in its mapping")
    yield from _tables(db, read_elements(path, mapping.source.row, batch_rows=batch_rows), path, mapping, is_open=True)


def _tables(
    db: duckdb.DuckDBPyConnection, tables: Iterator[pa.Table], path: Path, mapping: Mapping, *, is_open: bool
) -> Iterator[RawBatch]:
    shape: Resolved | None = None
    unit: str | None = None
    for table in tables:
        names = [name for name in table.column_names if not name.startswith("__")]
        shape = shape or resolve(mapping, names, file=str(path), is_open=is_open)
        for name in {shape.time, *shape.columns.values(), *shape.direct.values()} - set(names):
            table = table.append_column(name, pa.nulls(len(table), pa.string()))
        unit = unit or unit_of(db, table, shape, mapping)
        yield RawBatch(mapping.source.name, path, mapped_rows(db, table, shape, mapping, unit), REJECTED.empty_table(), unit)


def read_json_lines(db: duckdb.DuckDBPyConnection, path: Path, mapping: Mapping | None, batch_rows: int) -> Iterator[RawBatch]:
    """The JSON objects of a file with one on each line."""
    encoding = mapping.source.encoding if mapping else "utf-8"
    yield from _json_batches(db, read_lines(path, encoding=encoding, batch_rows=batch_rows), path, mapping, batch_rows)


def read_json_array(db: duckdb.DuckDBPyConnection, path: Path, mapping: Mapping | None, batch_rows: int) -> Iterator[RawBatch]:
    """The JSON objects of a file that is one array of them."""
    try:
        with connect() as reader:  # of its own: the array is read while `db` works on its parts
            yield from _json_batches(db, _elements(reader, path, batch_rows), path, mapping, batch_rows)
    except (duckdb.Error, OSError, pa.ArrowException) as error:  # an error in the middle of a result comes by way of Arrow
        what = str(error).splitlines()[0]
        raise InputError(f"sources: expected a JSON array of objects in {path}, found something else ({what}); mend the file") from error


def _elements(reader: duckdb.DuckDBPyConnection, path: Path, batch_rows: int) -> Iterator[Lines]:
    first = 1
    found = reader.sql("SELECT CAST(json AS VARCHAR) AS json FROM read_json_objects(?, format = 'array')", params=[str(path)])
    for piece in found.to_arrow_reader(batch_rows):
        yield Lines(piece.column(0), pa.array(np.arange(first, first + len(piece))), REJECTED.empty_table())
        first += len(piece)


def _json_batches(
    db: duckdb.DuckDBPyConnection, parts: Iterator[Lines], path: Path, mapping: Mapping | None, batch_rows: int
) -> Iterator[RawBatch]:
    objects = (_objects(db, part) for part in parts)
    batches = _segment_batches(db, objects, path, batch_rows) if mapping is None else _mapped_batches(db, objects, path, mapping)
    yield from (batch for batch in batches if len(batch.rows) + len(batch.rejected))


def _objects(db: duckdb.DuckDBPyConnection, lines: Lines) -> Lines:
    """The lines that are one JSON object each; the others as rejected rows."""
    register(db, pa.table({"line": lines.text}))
    found = db.sql("SELECT json_valid(line) AND starts_with(ltrim(line, chr(9) || ' '), '{') AS is_object FROM piece")
    is_object = found.to_arrow_table()["is_object"].to_numpy()
    if is_object.all():
        return lines
    good = lines.select(is_object)
    return Lines(good.text, good.row, pa.concat_tables([lines.rejected, reject(lines, ~is_object, "not_json")]))


def _segment_batches(db: duckdb.DuckDBPyConnection, parts: Iterator[Lines], path: Path, batch_rows: int) -> Iterator[RawBatch]:
    extra = 0  # rows that envelopes have added to the file so far
    for lines in parts:
        moved = lines.rejected.set_column(0, "row", pc.add(lines.rejected["row"], extra))
        lines = Lines(lines.text, pc.add(lines.row, extra), moved)
        rows = segment_rows(db, _raw_table(lines))
        is_no_call = rows["type"].is_null().to_numpy()
        unpacked = unpack(db, lines, is_no_call) if is_no_call.any() else None
        if unpacked is None:
            yield RawBatch(SEGMENT, path, rows, lines.rejected)
            continue
        extra += unpacked.extra
        refused = unpacked.lines.rejected
        for start in range(0, max(len(unpacked.lines.row), 1), batch_rows):
            piece = _raw_table(unpacked.lines).slice(start, batch_rows)
            yield RawBatch(SEGMENT, path, segment_rows(db, piece), refused)
            refused = REJECTED.empty_table()


def _mapped_batches(db: duckdb.DuckDBPyConnection, parts: Iterator[Lines], path: Path, mapping: Mapping) -> Iterator[RawBatch]:
    shape: Resolved | None = None
    unit: str | None = None
    for lines in parts:
        table = _raw_table(lines)
        if len(table) == 0:
            yield RawBatch(mapping.source.name, path, CANONICAL.empty_table(), lines.rejected)
            continue
        shape = shape or resolve(mapping, json_names(db, table, mapping), file=str(path), is_open=True)
        table = json_table(db, table, shape)
        unit = unit or unit_of(db, table, shape, mapping)
        yield RawBatch(mapping.source.name, path, mapped_rows(db, table, shape, mapping, unit), lines.rejected, unit)


def _raw_table(lines: Lines) -> pa.Table:
    return pa.table({"__raw": lines.text, "__row": lines.row})
