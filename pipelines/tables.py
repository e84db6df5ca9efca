"""Every stored table in path order: name, key, time columns, schema; and how they are read, written and appended.

A table is a symbolic link `tables/NAME` to a folder of Parquet files, one for each version. A write prepares the next
version beside the current one and moves the link: readers see the old table or the new one, never half of either.
"""

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from pipelines.errors import StoreError

TIME = pa.timestamp("us", tz="UTC")  # DuckDB cannot materialise nanosecond Parquet
TEXT, WHOLE, REAL, FLAG = pa.string(), pa.int64(), pa.float64(), pa.bool_()

CUSTOMER_WINDOWS = ("1h", "24h", "7d", "30d", "90d")
SESSION_WINDOWS = ("7d", "30d", "90d")
ITEM_WINDOWS = ("24h", "7d", "30d")


@dataclass(frozen=True)
class Table:
    """A declared table. `schema` is None where the columns are those of a feature service."""

    name: str
    key: tuple[str, ...]
    event_time: str | None
    created_time: str | None
    schema: pa.Schema | None
    by_day: bool = False  # partitioned by day of `event_time`: for tables that grow


def _schema(**columns: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, kind) for name, kind in columns.items()])


def _whole(*names: str) -> dict[str, pa.DataType]:
    return dict.fromkeys(names, WHOLE)


_TIMES = {"event_timestamp": TIME, "created_timestamp": TIME}

EVENTS = Table(
    "events",
    ("source", "event_id"),
    "event_timestamp",
    "created_timestamp",
    _schema(
        source=TEXT,
        event_id=TEXT,  # Segment's messageId: the idempotency key within a source
        type=TEXT,  # a name of events.TYPES
        name=TEXT,  # the event's name as received
        **_TIMES,  # created: when we knew both the event and whose it is
        customer_id=TEXT,
        anonymous_id=TEXT,
        user_id=TEXT,
        item_id=TEXT,
        order_id=TEXT,
        session_id=TEXT,
        decision_id=TEXT,
        query=TEXT,
        quantity=WHOLE,
        price_cents=WHOLE,  # of one unit
        revenue_cents=WHOLE,  # quantity x price of a purchase, negative for a return, else 0
        is_outlier=FLAG,
    ),
    by_day=True,
)
QUARANTINE = Table(
    "quarantine",
    ("quarantine_id",),
    "created_timestamp",
    "created_timestamp",
    _schema(
        quarantine_id=TEXT,
        source=TEXT,
        file=TEXT,
        row=WHOLE,  # 1-based line or row of the file
        reason=TEXT,  # a code of events.REASONS
        detail=TEXT,
        raw=TEXT,  # the row as received
        created_timestamp=TIME,
    ),
    by_day=True,
)
INGESTS = Table(
    "ingests",
    ("files", "last_event"),
    "last_event",
    None,
    _schema(
        source=TEXT,
        files=TEXT,  # names, in the order they were read
        last_event=TIME,  # of the events table, then
        **_whole("read", "accepted", "duplicate", "quarantined", "consent_dropped", "stored"),  # rows as read
    ),
)
IDENTITIES = Table(
    "identities",
    ("identifier",),
    "event_timestamp",
    "created_timestamp",
    _schema(identifier=TEXT, customer_id=TEXT, **_TIMES),  # identifier: "anonymous_id:...", "user_id:...", "email:..."
)
IDENTITY_LINKS = Table(
    "identity_links",
    ("anonymous_id", "user_id", "email", "event_timestamp"),
    "event_timestamp",
    "created_timestamp",
    _schema(anonymous_id=TEXT, user_id=TEXT, email=TEXT, **_TIMES),  # identifiers seen together, any of them null; e-mails as hashes
)
CONSENTS = Table(
    "consents",
    ("customer_id", "purpose", "event_timestamp"),
    "event_timestamp",
    "created_timestamp",
    _schema(customer_id=TEXT, purpose=TEXT, is_allowed=FLAG, basis=TEXT, **_TIMES),
)
ITEMS = Table(
    "items",
    ("item_id",),
    "event_timestamp",
    "created_timestamp",
    _schema(item_id=TEXT, category=TEXT, price_cents=WHOLE, **_TIMES),  # event_timestamp: available from
)
CUSTOMER_PROFILE = Table(
    "customer_profile",
    ("customer_id",),
    "event_timestamp",
    None,
    _schema(customer_id=TEXT, event_timestamp=TIME, age_band=TEXT, gender=TEXT, region=TEXT),
)
CUSTOMER_CONSENT = Table(
    "customer_consent",
    ("customer_id",),
    "event_timestamp",
    None,
    _schema(customer_id=TEXT, event_timestamp=TIME, is_personalization_allowed=FLAG),
)
CUSTOMER_ACTIVITY = Table(
    "customer_activity",
    ("customer_id",),
    "event_timestamp",
    None,
    _schema(
        customer_id=TEXT,
        event_timestamp=TIME,
        **_whole(*(f"{what}_{w}" for what in ("events", "views", "cart_adds", "purchases", "revenue_cents") for w in CUSTOMER_WINDOWS)),
        **_whole(*(f"sessions_{w}" for w in SESSION_WINDOWS)),
        **_whole("distinct_items_30d", "distinct_items_total"),
        **_whole("events_total", "views_total", "cart_adds_total", "purchases_total", "returns_total"),
        **_whole("orders_total", "sessions_total", "revenue_cents_total"),
        **_whole("first_event_at", "last_event_at", "first_purchase_at", "last_purchase_at"),  # microseconds since 1970, UTC
    ),
)
CUSTOMER_SESSION = Table(
    "customer_session",
    ("customer_id",),
    "event_timestamp",
    None,
    _schema(
        customer_id=TEXT,
        event_timestamp=TIME,
        **_whole("session_events", "session_views", "session_cart_adds", "session_searches", "session_purchases"),
        **_whole("session_distinct_items", "session_cart_cents", "session_started_at", "session_last_event_at"),
    ),
)
ITEM_ACTIVITY = Table(
    "item_activity",
    ("item_id",),
    "event_timestamp",
    None,
    _schema(
        item_id=TEXT,
        event_timestamp=TIME,
        **_whole(*(f"item_{what}_{w}" for what in ("views", "cart_adds", "purchases", "revenue_cents") for w in ITEM_WINDOWS)),
        **_whole("item_views_total", "item_cart_adds_total", "item_purchases_total"),
        **_whole("item_price_cents", "item_first_seen_at"),
    ),
)
LABELS_CHURN = Table(
    "labels_churn",
    ("customer_id", "event_timestamp"),
    "event_timestamp",
    None,
    _schema(customer_id=TEXT, event_timestamp=TIME, label=WHOLE, split=TEXT, matured_timestamp=TIME),
)
LABELS_INTENT = Table(
    "labels_intent",
    ("customer_id", "event_timestamp"),
    "event_timestamp",
    None,
    _schema(
        customer_id=TEXT,
        event_timestamp=TIME,
        label=WHOLE,
        split=TEXT,
        matured_timestamp=TIME,
        session_id=TEXT,
        session_events=WHOLE,
    ),
)
INTERACTIONS = Table(
    "interactions",
    ("customer_id", "item_id", "event_timestamp"),
    "event_timestamp",
    "created_timestamp",
    _schema(customer_id=TEXT, item_id=TEXT, type=TEXT, weight=REAL, **_TIMES),
)
# Feature service columns + label, split, probability: the reference of drift and the evidence of bias.
TRAINING_CHURN = Table("training_churn", ("customer_id", "event_timestamp"), "event_timestamp", None, None)
TRAINING_INTENT = Table("training_intent", ("customer_id", "event_timestamp"), "event_timestamp", None, None)
# The same columns without labels, for the population as of now.
SCORED_CHURN = Table("scored_churn", ("customer_id", "event_timestamp"), "event_timestamp", None, None)
SCORED_INTENT = Table("scored_intent", ("customer_id", "event_timestamp"), "event_timestamp", None, None)
CUSTOMER_SCORES = Table(
    "customer_scores",
    ("customer_id",),
    "event_timestamp",
    None,
    _schema(
        customer_id=TEXT,
        event_timestamp=TIME,
        churn_probability=REAL,
        churn_version=TEXT,
        intent_probability=REAL,
        intent_version=TEXT,
    ),
)
RECOMMENDATIONS = Table(
    "recommendations",
    ("customer_id", "rank"),
    "event_timestamp",
    None,
    _schema(customer_id=TEXT, event_timestamp=TIME, rank=WHOLE, item_id=TEXT, score=REAL, version=TEXT),
)

TABLES = (
    EVENTS, QUARANTINE, INGESTS, IDENTITIES, IDENTITY_LINKS, CONSENTS, ITEMS,
    CUSTOMER_PROFILE, CUSTOMER_CONSENT, CUSTOMER_ACTIVITY, CUSTOMER_SESSION, ITEM_ACTIVITY,
    LABELS_CHURN, LABELS_INTENT, INTERACTIONS,
    TRAINING_CHURN, TRAINING_INTENT, SCORED_CHURN, SCORED_INTENT, CUSTOMER_SCORES, RECOMMENDATIONS,
)  # fmt: skip


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
