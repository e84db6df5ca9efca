"""Clean events -> feature tables; and the feature store over them: apply, materialize, training frames.

In: the tables `events` and, where there is one, `items`. Out: customer_activity, customer_session and item_activity as change
points; Feast's registry and online store; frames of features as they were strictly before given instants.
Reads no clock and never changes a clean event. Consent was applied when the events were ingested.

What the stream writes online as events come (identifiers, consent) is often newer than the tables: a load never overrides a newer
row of those views. Every other view is what its table says, no row more. Feast's own writer knows neither rule (SQLite: the older
overwrites the newer), and is slower, one object a value; so the rows are written directly, in its encoding.
"""

import contextlib
import io
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa

from pipelines import engine, tables, windows
from pipelines.errors import StoreError
from pipelines.online_writer import CONSENT_VIEW, IDENTIFIER_VIEW, OnlineWriter
from pipelines.settings import IngestSettings
from pipelines.tables import Table

if TYPE_CHECKING:
    import ibis
    from feast import FeatureStore

SESSION_GAP_MINUTES = IngestSettings().session_gap_minutes
BUCKET_EVENTS = 200_000  # events worked on at a time: about 1.5 GB at the peak
BATCH_ROWS = 500_000
ONLINE_ROWS = 1_000  # written in one transaction: a tenth of a second in which the stream waits
STREAMED_VIEWS = (IDENTIFIER_VIEW, CONSENT_VIEW)  # have rows that no table knows yet
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class FeatureReport:
    """Rows (change points) written to each feature table."""

    customer_activity: int
    customer_session: int
    item_activity: int


def build(home: Path, *, session_gap_minutes: int = SESSION_GAP_MINUTES) -> FeatureReport:
    """Write the three feature tables from the events stored under `home`; each table is replaced at once or not at all.

    Works through ranges of keys, so memory does not grow with the log. Raises StoreError where no events were ingested.
    """
    from pipelines import sessions

    if not tables.exists(home, tables.EVENTS):
        raise StoreError(f"features: the table events was expected under {home / 'tables'}, found nothing; ingest events first")
    with closing(engine.connect(home)) as con:
        events = _open(con, home, tables.EVENTS)
        told = sessions.identified(events, gap_minutes=session_gap_minutes)
        return FeatureReport(
            customer_activity=_write(home, con, told, tables.CUSTOMER_ACTIVITY, lambda e: windows.changelog(e, windows.CUSTOMER_ACTIVITY)),
            customer_session=_write(
                home, con, told, tables.CUSTOMER_SESSION, lambda e: sessions.changelog(e, gap_minutes=session_gap_minutes)
            ),
            item_activity=_write(
                home, con, _with_catalogue(con, home, events), tables.ITEM_ACTIVITY, lambda e: windows.changelog(e, windows.ITEM_ACTIVITY)
            ),
        )


def store(home: Path) -> "FeatureStore":
    """Feast's store of this home: the profile of feature_repo/feature_store.yaml with every path below `home`."""
    import yaml
    from feast import FeatureStore, RepoConfig

    import feature_repo

    profile = Path(feature_repo.__file__).with_name("feature_store.yaml")
    (home / "feature_store").mkdir(parents=True, exist_ok=True)
    config = RepoConfig(**yaml.safe_load(profile.read_text()), repo_path=home.resolve())
    feast = FeatureStore(repo_path=str(home.resolve()), config=config)
    # A materialisation marks its views while it works and is sometimes killed: what was there before can still be read.
    feast.registry.serve_features_while_materializing = True
    return feast


def apply(home: Path) -> None:
    """Register what feature_repo/definitions.py declares, forget what it no longer does, and create the online tables."""
    feast, declared = store(home), _declared()
    names = {(type(o), o.name) for o in declared}
    listed = (feast.list_feature_services, feast.list_feature_views, feast.list_data_sources, feast.list_entities)
    gone: list[Any] = [o for listing in listed for o in listing() if (type(o), o.name) not in names]
    with _quiet():
        feast.apply(declared, objects_to_delete=gone, partial=False)
    with closing(sqlite3.connect(home / "feature_store" / "online.db")) as db:
        db.execute("PRAGMA journal_mode = WAL")  # readers go on while a materialisation writes


def materialize(home: Path, *, as_of: datetime, start: datetime | None = None, views: Sequence[str] | None = None) -> int:
    """Bring the online store to the state strictly before `as_of`; returns the rows that the views then hold online.

    `start`: only what changed since then; none: everything. `views`: by name; none: all. A view whose table was never written
    is left out. What the stream wrote since stays: see above. Raises StoreError where a name is unknown or nothing was applied.
    """
    feast = store(home)
    known: dict[str, Any] = {view.name: view for view in feast.list_feature_views()}
    unknown = set(views or ()) - set(known)
    if unknown or not known:
        raise StoreError(f"features: expected views among {sorted(known)}, found {sorted(unknown)}; run `rapport features apply` first")
    wanted = [name for name in (views or known) if (home / known[name].batch_source.path).exists()]
    if not wanted:
        return 0
    begin, end = start or EPOCH, as_of.astimezone(UTC)
    with closing(engine.connect(home)) as con, closing(OnlineWriter(home)) as online:
        for name in wanted:
            _load(con, online, home, known[name], begin, end, is_whole=start is None)
            feast.registry.apply_materialization(known[name], feast.project, begin, end)
        if start is None and IDENTIFIER_VIEW in wanted:
            _forget_orphans(online)
    return _online_rows(home, [f"{feast.project}_{name}" for name in wanted])


def training_frame(home: Path, labels: pd.DataFrame, *, service: str) -> pd.DataFrame:
    """`labels` with the features of a service as they were strictly before each row's `event_timestamp`, ages and ratios derived.

    labels: the join keys, `event_timestamp` (UTC), any others. Same rows, same order, same index; a column that is also a
    feature is replaced by it. Raises StoreError where the service is unknown or a table is missing, InputError without the keys.
    """
    from feast.errors import FeatureServiceNotFoundException

    feast = store(home)
    try:
        wanted = feast.get_feature_service(service)
    except FeatureServiceNotFoundException as error:
        raise StoreError(f"features: the service {service} is not registered under {home}; run `rapport features apply`") from error
    keys = [c for c in _join_keys(feast, wanted) if c in labels.columns]
    rows = labels[[*keys, "event_timestamp"]].reset_index(drop=True)
    found = feast.get_historical_features(rows, wanted).to_df().drop(columns=rows.columns)
    derived = windows.derive(found, rows["event_timestamp"]).set_axis(labels.index)
    return pd.concat([labels.drop(columns=derived.columns, errors="ignore"), derived], axis=1)


def _declared() -> list[Any]:
    from feast import Entity, FeatureService, FeatureView, FileSource

    from feature_repo import definitions

    return [o for o in vars(definitions).values() if isinstance(o, Entity | FileSource | FeatureView | FeatureService)]


def _join_keys(feast: "FeatureStore", service: Any) -> list[str]:
    views = [feast.get_feature_view(projection.name) for projection in service.feature_view_projections]
    return list(dict.fromkeys(column.name for view in views for column in view.entity_columns))


def _online_rows(home: Path, names: list[str]) -> int:
    with closing(sqlite3.connect(home / "feature_store" / "online.db")) as db:
        counts = [db.execute(f'SELECT count(DISTINCT entity_key) FROM "{name}"').fetchone()[0] for name in names]
    return sum(counts)


def _load(con: Any, online: OnlineWriter, home: Path, view: Any, begin: datetime, end: datetime, *, is_whole: bool) -> None:
    """Write the newest row of each key within [begin, end) of the view's table."""
    join_key = view.entity_columns[0].name
    is_streamed = view.name in STREAMED_VIEWS
    _newest(con, home, view, join_key, begin, end)
    for batch in con.sql(f"SELECT * FROM newest ORDER BY {join_key}").to_arrow_reader(ONLINE_ROWS):
        with online.transaction():
            online.load(view.name, batch, join_key=join_key, is_guarded=is_streamed)
    if is_whole and not is_streamed:
        kept = (key for batch in con.sql(f"SELECT {join_key} FROM newest").to_arrow_reader(BATCH_ROWS) for key in batch[0].to_pylist())
        with online.transaction():
            online.clear(view.name, kept, join_key=join_key)


def _newest(con: Any, home: Path, view: Any, join_key: str, begin: datetime, end: datetime) -> None:
    """Create `newest`: join key, features, event_us, created_us. First when, then what: wide columns are read only for rows kept."""
    source = view.batch_source
    time, created = source.timestamp_field, source.created_timestamp_column
    names = ", ".join(f'"{field.name}"' for field in view.features)
    by = f"{time} DESC" + (f", {created} DESC NULLS LAST" if created else "")
    event_us, created_us = f"epoch_us({time})", f"epoch_us({created})" if created else "NULL"
    if view.name == IDENTIFIER_VIEW:  # a late event may move the first sight back: online it counts when we knew
        event_us = created_us = _known_us(con, home)
    pattern = str((home / source.path).resolve() / "**" / "*.parquet").replace("'", "''")
    con.execute(
        f"""CREATE OR REPLACE TEMP TABLE newest AS
        WITH source AS (SELECT * FROM read_parquet('{pattern}', hive_partitioning = false)),
        latest AS (SELECT {join_key}, max({time}) AS {time} FROM source WHERE {time} >= $begin AND {time} < $end GROUP BY {join_key})
        SELECT {join_key}, {names}, CAST({event_us} AS BIGINT) AS event_us, CAST({created_us} AS BIGINT) AS created_us
        FROM source SEMI JOIN latest USING ({join_key}, {time})
        QUALIFY row_number() OVER (PARTITION BY {join_key} ORDER BY {by}) = 1""",
        {"begin": begin, "end": end},
    )


def _known_us(con: Any, home: Path) -> str:
    """SQL: when we knew whose an identifier is; of people whom a decision split or joined, no earlier than that decision."""
    known = "epoch_us(greatest(event_timestamp, created_timestamp))"
    if not tables.count(home, tables.IDENTITY_EDGES):
        return known
    edges, identities = (
        f"read_parquet('{tables.glob(home, table)}', hive_partitioning = false)".replace("''", "'")
        for table in (tables.IDENTITY_EDGES, tables.IDENTITIES)
    )
    con.execute(f"""CREATE OR REPLACE TEMP TABLE decided AS
        SELECT customer_id, epoch_us(max(edges.created_timestamp)) AS decided_us
        FROM (SELECT unnest(["left", "right"]) AS identifier, created_timestamp FROM {edges} WHERE state IN ('cut', 'link')) edges
        JOIN {identities} identities USING (identifier) GROUP BY customer_id""")
    return f"greatest({known}, (SELECT decided_us FROM decided WHERE decided.customer_id = source.customer_id))"


def _forget_orphans(online: OnlineWriter) -> None:
    """Take out the consent of customers whom nobody's identifier names any more: they were merged into another."""
    with online.transaction():
        online.clear_orphans()


def _with_catalogue(con: Any, home: Path, events: "ibis.Table") -> "ibis.Table":
    """What is told of items: the events, and the catalogue's lines as events of their own (availability and price)."""
    import ibis

    wanted = ["item_id", "type", "event_timestamp", "created_timestamp", "price_cents", "revenue_cents"]
    told = events.select(wanted)
    if not tables.exists(home, tables.ITEMS):
        return told
    lines = _open(con, home, tables.ITEMS).mutate(type=ibis.literal("catalogue"), revenue_cents=ibis.literal(0, "int64"))
    return ibis.union(told, lines.select(wanted))


def _open(con: Any, home: Path, table: Table) -> "ibis.Table":
    pattern = tables.glob(home, table).replace("'", "''")
    return _view(con, table.name, f"SELECT * FROM read_parquet('{pattern}', hive_partitioning = false)")


def _view(con: Any, name: str, query: str) -> "ibis.Table":
    import ibis

    con.execute(f"CREATE OR REPLACE TEMP VIEW {name} AS {query}")
    return ibis.duckdb.from_connection(con).table(name)


def _query(expression: "ibis.Table") -> str:
    import ibis

    return str(ibis.to_sql(expression, dialect="duckdb"))


def _write(home: Path, con: Any, events: "ibis.Table", table: Table, expression: "Callable[[ibis.Table], ibis.Table]") -> int:
    """Write what `expression` makes of the events, range by range of the key, each by key and time: same events, same bytes."""
    key = table.key[0]
    _view(con, "whole", _query(events))
    part = _view(con, "part", f"SELECT * FROM whole WHERE {key} BETWEEN getvariable('first') AND getvariable('last')")
    query = _query(expression(part).order_by(key, "event_timestamp"))  # compiled once: that takes longer than running a small range

    def batches() -> Iterator[pa.RecordBatch]:
        for first, last in _ranges(con, key):
            con.execute("SET VARIABLE first = ?", [first])
            con.execute("SET VARIABLE last = ?", [last])
            yield from con.sql(query).to_arrow_reader(BATCH_ROWS)

    return tables.write(home, table, batches())


def _ranges(con: Any, key: str) -> list[tuple[str, str]]:
    """First and last key of each range of `whole`: about BUCKET_EVENTS events each, more where one key has more."""
    counted = con.sql(f"SELECT {key}, count(*) AS n FROM whole WHERE {key} IS NOT NULL GROUP BY {key} ORDER BY {key}").to_arrow_table()
    bucket = np.cumsum(counted["n"].to_numpy()) // BUCKET_EVENTS
    first = np.flatnonzero(np.diff(bucket, prepend=-1))
    last = np.flatnonzero(np.diff(bucket, append=np.inf))
    return list(zip(counted[key].take(first).to_pylist(), counted[key].take(last).to_pylist(), strict=True))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Feast reports progress on stdout, which belongs to the command line."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
