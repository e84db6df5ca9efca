"""Tables on disk: read, written, appended, whole or not at all.

A table is a symbolic link `tables/NAME` to a folder of Parquet files, one for each version. A write prepares the next
version beside the current one and moves the link: readers see the old table or the new one, never half of either.
"""

import hashlib
import os
import shutil
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import StoreError
from pipelines.tables.declared import BYTES, FLAG, REAL, REALS, TEXT, TIME, WHOLE, Table

_DAY_US = 86_400_000_000
_DAY = "day="
_SQL_TYPES = {TIME: "TIMESTAMPTZ", TEXT: "VARCHAR", WHOLE: "BIGINT", REAL: "DOUBLE", REALS: "DOUBLE[]", FLAG: "BOOLEAN", BYTES: "BLOB"}
SPAN_ROWS = 2_000  # of a file of several days, at the least: each file costs a millisecond whenever the table is read
_WRITERS = 2  # threads; encoding and compressing leave Python's lock alone
_READS = 5  # of a table that is replaced meanwhile, before we give up
_AHEAD_BYTES = 256 << 20  # of rows that wait for a writer: bounds what is held in memory, however wide they are


def folder(home: Path, table: Table) -> Path:
    """Where the current version lies; may not exist yet."""
    return home / "tables" / table.name


def exists(home: Path, table: Table) -> bool:
    """Whether the table has been written."""
    return folder(home, table).is_dir()


def files(home: Path, table: Table) -> list[Path]:
    """The Parquet files of the current version, sorted. Resolved: a later write does not change what they hold."""
    return sorted(folder(home, table).resolve().rglob("*.parquet"))


def days(path: Path) -> tuple[str, str] | None:
    """The first and the last day of which a file of a table `by_day` may hold rows, as ISO dates; None for a file without rows."""
    name = path.parent.name
    if not name.startswith(_DAY):
        return None
    first, _, last = name.removeprefix(_DAY).partition("_")
    return first, last or first


def glob(home: Path, table: Table) -> str:
    """The same as one pattern, for engines that take one: DuckDB's `read_parquet`, Feast's `FileSource`."""
    return str(folder(home, table).resolve() / "**" / "*.parquet")


def rows_sql(home: Path, table: Table) -> str:
    """SQL for DuckDB: the rows with the declared columns, those that an older file lacks null; no rows where nothing was written."""
    assert table.schema is not None
    kinds = {f'"{field.name}"': _SQL_TYPES[field.type] for field in table.schema}
    declared = f"SELECT {', '.join(f'CAST(NULL AS {kind}) AS {name}' for name, kind in kinds.items())} WHERE false"
    if not exists(home, table) or not files(home, table):
        return declared
    pattern = glob(home, table).replace("'", "''")
    stored = f"SELECT * FROM read_parquet('{pattern}', hive_partitioning = false, union_by_name = true)"
    return f"SELECT {', '.join(kinds)} FROM ({declared} UNION ALL BY NAME {stored})"


def count(home: Path, table: Table) -> int:
    """Rows, from the files' footers; 0 for a table that does not exist."""
    return sum(pq.ParquetFile(f).metadata.num_rows for f in files(home, table)) if exists(home, table) else 0


def read(home: Path, table: Table, columns: list[str] | None = None) -> pd.DataFrame:
    """The table as a frame, day by day; an empty frame with the declared columns where nothing was written."""
    frame: pd.DataFrame = read_arrow(home, table, columns).to_pandas()
    return frame


def read_arrow(home: Path, table: Table, columns: list[str] | None = None) -> pa.Table:
    """The table as Arrow. Raises StoreError if it was never written and has no declared schema."""
    if not exists(home, table):
        if table.schema is None:
            raise StoreError(f"tables: {table.name} was expected under {home / 'tables'}, found nothing; run the step that writes it")
        empty = table.schema.empty_table()
        return empty.select(columns) if columns else empty
    for _ in range(_READS):
        version = folder(home, table).resolve()
        try:
            return pq.ParquetDataset(files(home, table), partitioning=None, schema=table.schema).read(columns=columns)
        except FileNotFoundError:  # replaced while it was read: the new version is there
            if folder(home, table).resolve() == version:
                raise
    raise StoreError(f"tables: {table.name} under {home / 'tables'} was replaced {_READS} times while it was read; read it again")


def write(home: Path, table: Table, data: pa.Table | pd.DataFrame | Iterable[pa.RecordBatch]) -> int:
    """Replace the table by `data`; returns the rows written. Atomic.

    Raises StoreError if the columns are not the declared ones, or the disk refuses; the old version then stays whole.
    """
    return _publish(home, table, data, keep=[])


def append(home: Path, table: Table, data: pa.Table | pd.DataFrame | Iterable[pa.RecordBatch]) -> int:
    """Add `data` to the table; returns the rows added. Atomic: all of them or none. Earlier files are linked, not copied."""
    return _publish(home, table, data, keep=files(home, table) if exists(home, table) else [])


def adopt(home: Path, table: Table, other: Path) -> None:
    """Move the table of the home `other`, on the same disk, into this one, in place of what is here. None there: nothing happens."""
    if not exists(other, table):
        return
    link, version = folder(home, table), folder(other, table).resolve()
    old = link.resolve() if link.exists() else None
    link.parent.mkdir(parents=True, exist_ok=True)
    _point(link, version.rename(link.parent / version.name))
    folder(other, table).unlink()
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def drop(home: Path, table: Table) -> None:
    """Remove the table and its files; nothing happens if it does not exist."""
    link = folder(home, table)
    if link.is_symlink():
        version = link.resolve()
        link.unlink()
        shutil.rmtree(version, ignore_errors=True)


def content_hash(home: Path, table: Table) -> str:
    """SHA-256 over the names and bytes of the table's files; same rows in the same order, same hash."""
    digest = hashlib.sha256(table.name.encode())
    base = folder(home, table).resolve()
    for path in files(home, table):
        digest.update(str(path.relative_to(base)).encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def draft(
    home: Path, table: Table, data: pa.Table | pd.DataFrame | Iterable[pa.RecordBatch], *, keep: Sequence[Path], mark: str = "-"
) -> "Draft":
    """The table's next version, beside the current one and not yet in its place: `data`, and of the current files those to `keep`.

    Either `publish` or `discard` it. `mark`: in its folder's name. Raises StoreError as `write` does; nothing is then left of it.
    """
    link = folder(home, table)
    version = link.parent / f".{table.name}{mark}{uuid.uuid4().hex[:12]}"
    old, kept = link.resolve(), list(keep)
    try:
        version.mkdir(parents=True)
        for path in kept:
            place = version / path.relative_to(old)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, place)
        return Draft(link, version, _write_batches(table, _batches(table, data, is_whole=not kept), version, first=_next_number(kept)))
    except OSError as error:
        shutil.rmtree(version, ignore_errors=True)
        raise StoreError(
            f"tables: {table.name} could not be written under {link.parent} ({error.strerror or error}); "
            "the previous version is untouched; free space or fix the folder's rights, then run again"
        ) from error
    except BaseException:
        shutil.rmtree(version, ignore_errors=True)
        raise


@dataclass(frozen=True)
class Draft:
    """A version of a table that is written, and not yet the current one."""

    link: Path
    version: Path
    rows: int  # written, without those of kept files

    def publish(self) -> None:
        """Put it in the place of the current version, in one step. May be called again: once is enough."""
        old = self.link.resolve() if self.link.exists() else None
        if old == self.version.resolve() or not self.version.is_dir():
            return
        _point(self.link, self.version)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)

    def discard(self) -> None:
        """Remove it."""
        shutil.rmtree(self.version, ignore_errors=True)


def _publish(home: Path, table: Table, data: pa.Table | pd.DataFrame | Iterable[pa.RecordBatch], keep: list[Path]) -> int:
    made = draft(home, table, data, keep=keep)
    made.publish()
    return made.rows


def _next_number(kept: Sequence[Path]) -> int:
    """Of the parts of a table: the first that none of these files has."""
    return 1 + max((int(path.name.split("-")[1].split(".")[0]) for path in kept), default=-1)


def _point(link: Path, version: Path) -> None:
    """Move the link to a version beside it, in one step."""
    swap = version.with_suffix(".link")
    swap.symlink_to(version.name)
    swap.replace(link)


def _batches(table: Table, data: pa.Table | pd.DataFrame | Iterable[pa.RecordBatch], *, is_whole: bool) -> Iterator[pa.Table]:
    """The data in pieces of the declared schema. `is_whole`: one empty piece at least, so that an empty table still has its columns."""
    if isinstance(data, pd.DataFrame):
        data = pa.Table.from_pandas(data, preserve_index=False)
    pieces = [data] if isinstance(data, pa.Table) else data
    written = False
    for piece in pieces:
        whole = piece if isinstance(piece, pa.Table) else pa.Table.from_batches([piece])
        yield conform(table, whole)
        written = True
    if not written and is_whole and table.schema is not None:
        yield table.schema.empty_table()


def conform(table: Table, data: pa.Table) -> pa.Table:
    """`data` with the declared columns, in order and type. Raises StoreError naming the first that differs."""
    if table.schema is None:
        return data.replace_schema_metadata(None)
    missing = [name for name in table.schema.names if name not in data.column_names]
    extra = [name for name in data.column_names if name not in table.schema.names]
    if missing or extra:
        raise StoreError(f"tables: {table.name} expects the columns {table.schema.names}; missing {missing}, not declared {extra}")
    try:
        return data.select(table.schema.names).replace_schema_metadata(None).cast(table.schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise StoreError(f"tables: {table.name} was given values that do not fit its declared types: {error}") from error


def _write_batches(table: Table, batches: Iterable[pa.Table], version: Path, *, first: int) -> int:
    """Write each batch while the next one is made. Returns the rows."""
    rows, open_writes, ahead = 0, deque[tuple[Future[None], int]](), 0
    with ThreadPoolExecutor(_WRITERS) as pool:
        for number, batch in enumerate(batches, start=first):
            for path, part in _parts(table, batch, version, f"part-{number:05d}"):
                open_writes.append((pool.submit(_write_file, part, path), part.nbytes))
                ahead += part.nbytes
            while ahead > _AHEAD_BYTES:
                write, size = open_writes.popleft()
                write.result()
                ahead -= size
            rows += batch.num_rows
        for write, _ in open_writes:
            write.result()
    return rows


def _parts(table: Table, batch: pa.Table, version: Path, name: str) -> Iterator[tuple[Path, pa.Table]]:
    """The files of a batch: one, or one for each day of its event time; days with few rows share one with those after them."""
    if not table.by_day or batch.num_rows == 0:
        yield version / f"{name}.parquet", batch
        return
    day = batch[table.event_time].cast(pa.int64()).to_numpy() // _DAY_US
    if (np.diff(day) < 0).any():
        order = np.argsort(day, kind="stable")
        batch, day = batch.take(order), day[order]
    start = 0
    for end in [*np.flatnonzero(np.diff(day)) + 1, len(day)]:
        if end - start < SPAN_ROWS and end < len(day):
            continue
        first, last = (str(np.datetime64(int(of), "D")) for of in (day[start], day[end - 1]))
        within = version / (f"{_DAY}{first}" if first == last else f"{_DAY}{first}_{last}")
        within.mkdir(exist_ok=True)
        yield within / f"{name}.parquet", batch.slice(start, end - start)
        start = end


def _write_file(part: pa.Table, path: Path) -> None:
    # Of texts most are repeated, and Parquet gives up by itself on those that are not. Whole numbers and times differ little from row to
    # row: as differences they are written in two thirds of the CPU time, and read in half, of what plain ones take.
    texts = [field.name for field in part.schema if pa.types.is_string(field.type)]
    whole = [field.name for field in part.schema if pa.types.is_int64(field.type) or pa.types.is_timestamp(field.type)]
    packed = {field.name: "none" if pa.types.is_binary(field.type) else "zstd" for field in part.schema}  # sealed bytes have no pattern
    deltas = dict.fromkeys(whole, "DELTA_BINARY_PACKED")
    pq.write_table(part, path, compression=packed, coerce_timestamps="us", use_dictionary=texts, column_encoding=deltas)
