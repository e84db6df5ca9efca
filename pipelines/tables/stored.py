"""Tables on disk: read, written, appended, whole or not at all.

A table is a symbolic link `tables/NAME` to a folder of Parquet files, one for each version. A write prepares the next
version beside the current one and moves the link: readers see the old table or the new one, never half of either.
"""

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from pipelines.errors import StoreError
from pipelines.tables.declared import TEXT, Table


def folder(home: Path, table: Table) -> Path:
    """Where the current version lies; may not exist yet."""
    return home / "tables" / table.name


def exists(home: Path, table: Table) -> bool:
    """Whether the table has been written."""
    return folder(home, table).is_dir()


def files(home: Path, table: Table) -> list[Path]:
    """The Parquet files of the current version, sorted. Resolved: a later write does not change what they hold."""
    return sorted(folder(home, table).resolve().rglob("*.parquet"))


def glob(home: Path, table: Table) -> str:
    """The same as one pattern, for engines that take one: DuckDB's `read_parquet`, Feast's `FileSource`."""
    return str(folder(home, table).resolve() / "**" / "*.parquet")


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
    paths = files(home, table)
    return pq.ParquetDataset(paths, partitioning=None, schema=table.schema).read(columns=columns)


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


def _publish(home: Path, table: Table, data: pa.Table | pd.DataFrame | Iterable[pa.RecordBatch], keep: list[Path]) -> int:
    link = folder(home, table)
    old = link.resolve() if link.exists() else None
    version = link.parent / f".{table.name}-{uuid.uuid4().hex[:12]}"
    try:
        version.mkdir(parents=True)
        for path in keep:
            kept = version / path.relative_to(old or link)
            kept.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, kept)
        rows = 0
        for number, batch in enumerate(_batches(table, data), start=len(keep)):
            _write_files(table, batch, version, number)
            rows += batch.num_rows
        _point(link, version)
    except OSError as error:
        shutil.rmtree(version, ignore_errors=True)
        raise StoreError(
            f"tables: {table.name} could not be written under {link.parent} ({error.strerror or error}); "
            "the previous version is untouched; free space or fix the folder's rights, then run again"
        ) from error
    except BaseException:
        shutil.rmtree(version, ignore_errors=True)
        raise
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
    return rows


def _point(link: Path, version: Path) -> None:
    """Move the link to a version beside it, in one step."""
    swap = version.with_suffix(".link")
    swap.symlink_to(version.name)
    swap.replace(link)


def _batches(table: Table, data: pa.Table | pd.DataFrame | Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """The data in pieces of the declared schema; one empty piece at least, so that an empty table still has its columns."""
    if isinstance(data, pd.DataFrame):
        data = pa.Table.from_pandas(data, preserve_index=False)
    pieces = [data] if isinstance(data, pa.Table) else data
    written = False
    for piece in pieces:
        whole = piece if isinstance(piece, pa.Table) else pa.Table.from_batches([piece])
        yield conform(table, whole)
        written = True
    if not written and table.schema is not None:
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


def _write_files(table: Table, batch: pa.Table, version: Path, number: int) -> None:
    name = f"part-{number:05d}"
    if not table.by_day or batch.num_rows == 0:
        pq.write_table(batch, version / f"{name}.parquet", compression="zstd", coerce_timestamps="us")
        return
    day = pc.strftime(batch[table.event_time], format="%Y-%m-%d")
    ds.write_dataset(
        batch.append_column("day", day),
        version,
        format="parquet",
        partitioning=ds.partitioning(pa.schema([pa.field("day", TEXT)]), flavor="hive"),
        basename_template=name + "-{i}.parquet",
        existing_data_behavior="overwrite_or_ignore",
        max_partitions=10_000,
        max_open_files=500,
        file_options=ds.ParquetFileFormat().make_write_options(compression="zstd", coerce_timestamps="us"),
    )
