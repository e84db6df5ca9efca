"""Files + a mapping -> batches of raw rows in our column names.

In: CSV (also .gz), Parquet, JSON lines and JSON arrays; without a mapping, the JSON of the Segment spec. Out: text as
received, times already UTC. A line that cannot be read comes out as a rejected row with its bytes, never as an exception;
nothing is judged, dropped or written here. XML is not read yet.
"""

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from pipelines.errors import InputError
from pipelines.sources.lines import REJECTED, Lines, read_lines, reject, rejected_rows
from pipelines.sources.mapping import Mapping, Resolved, load_mapping, resolve
from pipelines.sources.projection import CANONICAL, json_table, mapped_rows, register, segment_rows, unit_of

__all__ = ["CANONICAL", "SEGMENT", "Mapping", "RawBatch", "connect", "load_mapping", "read"]

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


def connect(**config: str) -> duckdb.DuckDBPyConnection:
    """A DuckDB of our own in memory: UTC, no network, and nothing of the caller's Python in reach of its SQL."""
    db = duckdb.connect(config={**_OFFLINE, **config})
    db.execute("SET TimeZone = 'UTC'").fetchall()
    return db


def read(paths: Iterable[str | Path], mapping: Mapping | None, *, batch_rows: int) -> Iterator[RawBatch]:
    """The rows of the files, in order, at most `batch_rows` at a time.

    Without a mapping: JSON of the Segment spec. Every file is opened before the first row is given out, so that a wrong path
    costs no work. Raises InputError for a file that is missing, a folder, empty, of another format, or lacks a column.
    """
    files = [Path(path) for path in paths]
    formats = [_format(path, mapping) for path in files]
    with connect() as db:
        for number, (path, kind) in enumerate(zip(files, formats, strict=True)):
            found = False
            for batch in _READERS[kind](db, path, mapping, batch_rows):
                found = True
                yield replace(batch, number=number)
            if not found:
                raise InputError(f"sources: expected rows in {path}, found none; the file is empty; give one that holds events")


# -- what kind of file it is -------------------------------------------------------------------------------------------


def _format(path: Path, mapping: Mapping | None) -> str:
    kind = _named_format(path)
    if path.is_dir():
        raise InputError(f"sources: expected a file, found the folder {path}; name the files in it")
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise InputError(f"sources: {path} could not be opened ({error.strerror}); check the path and its rights") from error
    if not head:
        raise InputError(f"sources: expected rows in {path}, found none; the file is empty; give one that holds events")
    if kind == "xml":
        raise InputError(f"sources: {path} is XML, which is not supported yet; convert it to JSON lines, CSV or Parquet")
    if mapping is None and (kind in ("csv", "parquet") or head == b"PAR1"):
        raise InputError(f"sources: {path} is a table, and only Segment JSON needs no mapping; say what its columns are with --mapping")
    if mapping is not None and mapping.source.format is not None and head != b"PAR1":
        kind = mapping.source.format
    if kind == "parquet" and head != b"PAR1":
        raise InputError(f"sources: expected Parquet in {path}, found a file without its mark; fetch it again, or correct the format")
    if head == b"PAR1":
        return "parquet"
    return "csv" if kind == "csv" else _json_format(path)


def _named_format(path: Path) -> str:
    kinds = {".parquet": "parquet", ".pq": "parquet", ".xml": "xml", ".csv": "csv", ".tsv": "csv", ".txt": "csv", ".data": "csv"}
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    return kinds.get(suffixes[-1].lower() if suffixes else "", "json")


def _json_format(path: Path) -> str:
    """JSON lines, or one array of objects: what the first character that is not blank says."""
    for lines in read_lines(path, batch_rows=1):
        if len(lines.text):
            return "array" if pc.ascii_ltrim_whitespace(lines.text)[0].as_py().startswith("[") else "lines"
    return "lines"


# -- readers: one for each kind of file --------------------------------------------------------------------------------


def _read_csv(db: duckdb.DuckDBPyConnection, path: Path, mapping: Mapping | None, batch_rows: int) -> Iterator[RawBatch]:
    assert mapping is not None
    delimiter = "\t" if ".tsv" in path.suffixes else mapping.source.delimiter
    names: list[str] | None = list(mapping.source.columns) if mapping.source.columns else None
    shape: Resolved | None = None
    unit: str | None = None
    for lines in read_lines(path, encoding=mapping.source.encoding, batch_rows=batch_rows):
        if names is None and len(lines.text):
            names = _header(lines.text[0].as_py(), delimiter, path)
            lines = Lines(lines.text[1:], lines.row[1:], lines.rejected)
        if names is None:
            if len(lines.rejected):
                yield RawBatch(mapping.source.name, path, CANONICAL.empty_table(), lines.rejected)
            continue
        shape = shape or resolve(mapping, names, file=str(path))
        table, rejected = _parse_csv(lines, names, delimiter)
        unit = unit or unit_of(db, table, shape, mapping)
        if len(table) + len(rejected):
            yield RawBatch(mapping.source.name, path, mapped_rows(db, table, shape, mapping, unit), rejected, unit)


def _header(line: str, delimiter: str, path: Path) -> list[str]:
    names = [name.strip() for name in next(csv.reader([line], delimiter=delimiter))]
    if len(set(names)) < len(names):
        raise InputError(f"sources: expected a header with distinct names in {path}, found {', '.join(names)}; rename one of the doubled")
    return names


def _parse_csv(lines: Lines, names: list[str], delimiter: str) -> tuple[pa.Table, pa.Table]:
    """The lines as text columns `names` with raw and row; and the lines that are no such row. A record never spans lines."""
    quotes = pc.count_substring(lines.text, '"').to_numpy(zero_copy_only=False)
    # One stray quote would swallow the lines after it: such a line is refused alone, before the parser sees it.
    is_open = quotes % 2 == 1
    rejected = [lines.rejected, reject(lines, is_open, "unbalanced_quotes")]
    lines = lines.select(~is_open)
    is_row = np.ones(len(lines.text), bool)
    found: dict[int, int] = {}

    def skip(row: pa_csv.InvalidRow) -> str:
        is_row[row.number - 1] = False
        found[row.number - 1] = row.actual_columns
        return "skip"

    buffer = pc.binary_join(pa.ListArray.from_arrays([0, len(lines.text)], lines.text), "\n")[0].as_buffer()
    if len(lines.text) == 0:
        return _text_table(names, [pa.array([], pa.string()) for _ in names], lines), pa.concat_tables(rejected)
    parsed = pa_csv.read_csv(
        pa.BufferReader(buffer),
        read_options=pa_csv.ReadOptions(column_names=names, use_threads=False, block_size=len(buffer) + 1),
        parse_options=pa_csv.ParseOptions(delimiter=delimiter, invalid_row_handler=skip, ignore_empty_lines=False),
        convert_options=pa_csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), check_utf8=False),
    )
    if found:
        bad = lines.select(~is_row)
        detail = [f"{found[at]} columns where {len(names)} were expected" for at in sorted(found)]
        rejected.append(rejected_rows(bad.row, "column_count", pa.array(detail, pa.string()), bad.text))
        lines = lines.select(is_row)
    return _text_table(names, parsed.columns, lines), pa.concat_tables(rejected)


def _text_table(names: list[str], columns: list[pa.Array], lines: Lines) -> pa.Table:
    return pa.table([*columns, lines.text, lines.row], names=[*names, "__raw", "__row"])


def _read_parquet(db: duckdb.DuckDBPyConnection, path: Path, mapping: Mapping | None, batch_rows: int) -> Iterator[RawBatch]:
    assert mapping is not None
    try:
        with pq.ParquetFile(path) as file:
            shape = resolve(mapping, file.schema_arrow.names, file=str(path))
            first, unit = 1, None
            for piece in file.iter_batches(batch_size=batch_rows):
                table = pa.Table.from_batches([piece])
                unit = unit or unit_of(db, table, shape, mapping)
                table = _with_raw(db, table, first)
                first += len(table)
                yield RawBatch(mapping.source.name, path, mapped_rows(db, table, shape, mapping, unit), REJECTED.empty_table(), unit)
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"sources: expected Parquet in {path}, found a damaged file ({str(error).splitlines()[0]}); fetch it again, then run again"
        ) from error


def _with_raw(db: duckdb.DuckDBPyConnection, table: pa.Table, first: int) -> pa.Table:
    """The table with each row as JSON text: what quarantine keeps, and what the id of a row without one is the hash of."""
    register(db, table)
    raw = db.sql("SELECT CAST(to_json(piece) AS VARCHAR) AS raw FROM piece").to_arrow_table()["raw"]
    return table.append_column("__raw", raw).append_column("__row", pa.array(np.arange(first, first + len(table))))


def _read_json_lines(db: duckdb.DuckDBPyConnection, path: Path, mapping: Mapping | None, batch_rows: int) -> Iterator[RawBatch]:
    encoding = mapping.source.encoding if mapping else "utf-8"
    shape: Resolved | None = None
    unit: str | None = None
    for lines in read_lines(path, encoding=encoding, batch_rows=batch_rows):
        batch, shape, unit = _json_batch(db, lines, path, mapping, shape, unit)
        if len(batch.rows) + len(batch.rejected):
            yield batch


def _read_json_array(db: duckdb.DuckDBPyConnection, path: Path, mapping: Mapping | None, batch_rows: int) -> Iterator[RawBatch]:
    shape: Resolved | None = None
    unit: str | None = None
    first = 1
    try:
        with connect() as reader:  # of its own: the array is read while `db` works on its parts
            found = reader.sql("SELECT CAST(json AS VARCHAR) AS json FROM read_json_objects(?, format = 'array')", params=[str(path)])
            for piece in found.to_arrow_reader(batch_rows):
                lines = Lines(piece.column(0), pa.array(np.arange(first, first + len(piece))), REJECTED.empty_table())
                first += len(piece)
                batch, shape, unit = _json_batch(db, lines, path, mapping, shape, unit)
                yield batch
    except (duckdb.Error, OSError, pa.ArrowException) as error:  # an error in the middle of a result comes by way of Arrow
        what = str(error).splitlines()[0]
        raise InputError(f"sources: expected a JSON array of objects in {path}, found something else ({what}); mend the file") from error


def _json_batch(
    db: duckdb.DuckDBPyConnection, lines: Lines, path: Path, mapping: Mapping | None, shape: Resolved | None, unit: str | None
) -> tuple[RawBatch, Resolved | None, str | None]:
    """The batch, and what is known of the file's columns and time unit after it."""
    register(db, pa.table({"line": lines.text}))
    kinds = db.sql("SELECT coalesce(json_type(TRY_CAST(line AS JSON)) = 'OBJECT', false) AS is_object FROM piece")
    is_object = kinds.to_arrow_table()["is_object"].to_numpy()
    rejected = pa.concat_tables([lines.rejected, reject(lines, ~is_object, "not_json")])
    good = lines if is_object.all() else lines.select(is_object)
    table = pa.table({"__raw": good.text, "__row": good.row})
    if mapping is None:
        return RawBatch(SEGMENT, path, segment_rows(db, table), rejected), None, None
    if len(table) == 0:
        return RawBatch(mapping.source.name, path, CANONICAL.empty_table(), rejected), shape, unit
    table = json_table(db, table, mapping)
    shape = resolve(mapping, table.column_names[2:], file=str(path))
    unit = unit or unit_of(db, table, shape, mapping)
    return RawBatch(mapping.source.name, path, mapped_rows(db, table, shape, mapping, unit), rejected, unit), shape, unit


_READERS = {"csv": _read_csv, "parquet": _read_parquet, "lines": _read_json_lines, "array": _read_json_array}
