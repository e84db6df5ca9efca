"""The feature store over the feature tables: apply, materialize, training frames.

In: the feature tables of a home, and feature_repo/definitions.py. Out: Feast's registry and online store; frames of features as they
were strictly before given instants. Reads no clock and never changes a table.

What the stream writes online as events come (identifiers, consent) is often newer than the tables: a load never overrides a newer
row of those views. Every other view is what its table says, no row more. Feast's own writer knows neither rule (SQLite: the older
overwrites the newer), and is slower, one object a value; so the rows are written directly, in its encoding.
"""

import contextlib
import io
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from pipelines import engine, tables, windows
from pipelines.engine import literal
from pipelines.errors import StoreError
from pipelines.online_writer import CONSENT_VIEW, IDENTIFIER_VIEW, OnlineWriter

if TYPE_CHECKING:
    from feast import FeatureStore

BATCH_ROWS = 500_000
ONLINE_ROWS = 1_000  # written in one transaction: a tenth of a second in which the stream waits
STREAMED_VIEWS = (IDENTIFIER_VIEW, CONSENT_VIEW)  # have rows that no table knows yet
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


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
    files = literal(str((home / source.path).resolve() / "**" / "*.parquet"))
    con.execute(
        f"""CREATE OR REPLACE TEMP TABLE newest AS
        WITH source AS (SELECT * FROM read_parquet({files}, hive_partitioning = false)),
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
        f"read_parquet({literal(tables.glob(home, table))}, hive_partitioning = false)"
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Feast reports progress on stdout, which belongs to the command line."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
