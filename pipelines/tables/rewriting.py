"""Rows taken out of a table, or changed in it, where they match a condition: what erasure and retention need.

In: a table and an Arrow expression over its columns. Out: the table's next version, in which only the files that held such rows are
new; the old version's files are gone. Never reads more than one file at a time.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from pipelines.tables.declared import Table
from pipelines.tables.publication import locked, together
from pipelines.tables.stored import exists, files

Change = Callable[[pa.Table, pa.ChunkedArray], pa.Table]  # a file's rows and which of them match -> its rows from now on


def remove(home: Path, table: Table, rows: pc.Expression) -> int:
    """Take the rows that match out of the table; returns how many. Atomic: all of them or none."""
    return _rewrite(home, table, rows, lambda whole, matches: whole.filter(pc.invert(matches)))


def update(home: Path, table: Table, rows: pc.Expression, values: Mapping[str, str | int | bool]) -> int:
    """Set columns of the rows that match to these values; returns how many rows. Atomic: all of them or none."""

    def change(whole: pa.Table, matches: pa.ChunkedArray) -> pa.Table:
        for name, value in values.items():
            at = whole.schema.get_field_index(name)
            field = whole.schema.field(at)
            whole = whole.set_column(at, field, pc.if_else(matches, pa.scalar(value, field.type), whole[name]))
        return whole

    return _rewrite(home, table, rows, change)


def matching(home: Path, table: Table, rows: pc.Expression, columns: list[str]) -> pa.Table:
    """These columns of the rows that match, file by file; no rows where the table does not exist."""
    schema = schema_of(home, table)
    found = [_dataset(schema, path).to_table(columns=columns, filter=rows) for path in _files(home, table)]
    return pa.concat_tables(found) if found else schema.empty_table().select(columns)


def schema_of(home: Path, table: Table) -> pa.Schema:
    """The declared columns; of a table without declared ones those of its files together, none where it has no files."""
    if table.schema is not None:
        return table.schema
    # a column that is null throughout one file has no type there
    return pa.unify_schemas([pq.read_schema(path) for path in _files(home, table)] or [pa.schema([])], promote_options="permissive")


def sweep(home: Path) -> int:
    """Remove the folders of versions that no table points to: a killed write leaves them. Returns how many. No step may be writing."""
    base = home / "tables"
    links = [path for path in base.iterdir() if path.is_symlink()] if base.is_dir() else []
    used = {path.resolve() for path in links}
    left = [path for path in base.glob(".*") if path.is_dir() and not path.is_symlink() and path.resolve() not in used]
    for path in left:
        shutil.rmtree(path)
    return len(left)


def _rewrite(home: Path, table: Table, rows: pc.Expression, change: Change) -> int:
    asked = pc.coalesce(rows, pc.scalar(False))
    with locked(home):
        schema = schema_of(home, table)
        counts = {path: _dataset(schema, path).count_rows(filter=asked) for path in _files(home, table)}
        hit, kept = [path for path, count in counts.items() if count], [path for path, count in counts.items() if not count]
        if hit:
            with together(home) as changes:
                changes.replace(table, _changed(schema, hit, asked, change, is_all=not kept), keep=kept)
    return sum(counts.values())


def _changed(schema: pa.Schema, paths: list[Path], asked: pc.Expression, change: Change, *, is_all: bool) -> Iterator[pa.RecordBatch]:
    """What the files hold from now on; where nothing is left of all of them, one empty batch: the table keeps its columns."""
    is_empty = is_all
    for path in paths:
        whole = _dataset(schema, path).to_table()
        matches = ds.dataset(whole).to_table(columns={"matches": asked})["matches"]
        left = change(whole, matches).combine_chunks()
        is_empty &= left.num_rows == 0
        yield from (batch for batch in left.to_batches() if batch.num_rows)
    if is_empty:
        yield pa.RecordBatch.from_pylist([], schema=schema)


def _files(home: Path, table: Table) -> list[Path]:
    return files(home, table) if exists(home, table) else []


def _dataset(schema: pa.Schema, path: Path) -> ds.Dataset:
    return ds.dataset(path, format="parquet", schema=schema)
