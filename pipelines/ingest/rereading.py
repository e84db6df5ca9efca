"""Rows that are in memory -> a batch as their file would give them: payloads of the log, and rows out of the quarantine.

In: lines of text. Out: RawBatch. A line is one row and stays one, whatever it holds; it is never written anywhere.
"""

from pathlib import Path

import duckdb
import pyarrow as pa

from pipelines.sources import SEGMENT, RawBatch
from pipelines.sources.lines import Lines, reject
from pipelines.sources.mapping import Mapping, resolve
from pipelines.sources.projection import json_names, json_table, mapped_rows, register, segment_rows, unit_of
from pipelines.sources.records import Form, parse


def calls(db: duckdb.DuckDBPyConnection, lines: Lines, *, source: str = SEGMENT, name: str = "log") -> RawBatch:
    """Segment calls, one on each line."""
    lines, rejected = _objects(db, lines)
    return RawBatch(source, Path(name), segment_rows(db, _raw(lines)), rejected)


def rows(db: duckdb.DuckDBPyConnection, lines: Lines, mapping: Mapping, *, form: Form | None, unit: str | None, name: str) -> RawBatch:
    """Rows of a mapped file: records of CSV in that form, else JSON objects. `unit`: of its unix times. Raises InputError."""
    if form is not None:
        table, rejected = parse(lines, form)
        shape = resolve(mapping, list(form.names), file=name)
    else:
        lines, rejected = _objects(db, lines)
        shape = resolve(mapping, json_names(db, _raw(lines), mapping), file=name, is_open=True)
        table = json_table(db, _raw(lines), shape)
    unit = unit or unit_of(db, table, shape, mapping)
    return RawBatch(mapping.source.name, Path(name), mapped_rows(db, table, shape, mapping, unit), rejected, unit, form=form)


def _objects(db: duckdb.DuckDBPyConnection, lines: Lines) -> tuple[Lines, pa.Table]:
    """The lines that are one JSON object each; the others as rejected rows."""
    register(db, pa.table({"line": lines.text}))
    found = db.sql("SELECT json_valid(line) AND starts_with(ltrim(line, chr(9) || ' '), '{') AS is_object FROM piece")
    is_object = found.to_arrow_table()["is_object"].to_numpy()
    rejected = pa.concat_tables([lines.rejected, reject(lines, ~is_object, "not_json")])
    return (lines if is_object.all() else lines.select(is_object)), rejected


def _raw(lines: Lines) -> pa.Table:
    return pa.table({"__raw": lines.text, "__row": lines.row})
