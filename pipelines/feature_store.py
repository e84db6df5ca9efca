"""The feature store over the feature tables: apply, materialize, training frames.

In: the feature tables of a home, and feature_repo/definitions.py. Out: Feast's registry and online store; frames of features as they
were strictly before given instants. Reads no clock and never changes a table.

What the stream writes online as events come is often newer than the tables: a load never overrides a newer row of those views, nor
takes out a key that the tables do not know yet; it takes out customers whom no identifier names any more. From tables that are older
than the events or the catalogue it takes nothing for them: what the stream took back since, those tables still have; nor of people whose
refusal the stream has heard and no ingest applied. Every other view is what its table says, no row more, and so is a view that could be
streamed and never was. Feast's own writer knows none of this (SQLite:
the older overwrites the newer), and is slower, one object a value; so the rows are written directly, in its encoding.
"""

import contextlib
import io
import sqlite3
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import pandas as pd

from pipelines import engine, provenance, tables, windows
from pipelines.engine import literal
from pipelines.errors import StoreError
from pipelines.online import schema as online_schema
from pipelines.online.feast_format import JoinKey, sorted_names, table_of
from pipelines.online.opening import open_writer
from pipelines.online.redis_server import feast_connection
from pipelines.online.redis_writer import RedisWriter
from pipelines.online.schema import Schema
from pipelines.online.writer import CONSENT_VIEW, CUSTOMER, IDENTIFIER_VIEW, OnlineWriter, encoded_keys
from pipelines.settings import Settings

if TYPE_CHECKING:
    from feast import FeatureStore

    from pipelines.stream.untold import Untold

BATCH_ROWS = 500_000
ONLINE_ROWS = 1_000  # written in one transaction: a tenth of a second in which the stream waits
ALWAYS_STREAMED = (IDENTIFIER_VIEW, CONSENT_VIEW)  # have rows that no table knows yet, of every home
STREAMED_VIEWS = (*ALWAYS_STREAMED, "customer_activity", "customer_session", "customer_item", "customer_category", "item_activity")
_OF_EVENTS = tuple(table.name for table in tables.FEATURE_TABLES)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
COMPUTED_VIEWS = ("customer_scores", "task_scores", "customer_segments")  # stamped with the instant of their making: true from it on

Writer = OnlineWriter | RedisWriter


def store(home: Path, *, settings: Settings | None = None) -> "FeatureStore":
    """Feast's store of this home: feature_repo/feature_store.yaml with every path below `home`; its online store as `settings` say."""
    import yaml
    from feast import FeatureStore, RepoConfig

    import feature_repo

    # Feast has every such warning shown; this one is of how ibis calls DuckDB
    warnings.filterwarnings("ignore", message="fetch_arrow_table", category=DeprecationWarning)
    profile = yaml.safe_load(Path(feature_repo.__file__).with_name("feature_store.yaml").read_text())
    if settings is not None and settings.online.redis_url is not None:
        profile["online_store"] = {"type": "redis", "connection_string": feast_connection(settings.online.redis_url.get_secret_value())}
    (home / "feature_store").mkdir(parents=True, exist_ok=True)
    config = RepoConfig(**profile, repo_path=home.resolve())
    feast = FeatureStore(repo_path=str(home.resolve()), config=config)
    # A materialisation marks its views while it works and is sometimes killed: what was there before can still be read.
    feast.registry.serve_features_while_materializing = True
    return feast


def apply(home: Path, *, settings: Settings | None = None) -> None:
    """Register what feature_repo/definitions.py declares, forget what it no longer does, and make the online store ready for it.

    A store of older definitions is kept: new features are null in it until they are materialised; what is declared no more, or with
    another type or join key, is taken out. A file of SQLite is there with Redis too: the stream keeps there what it knows of people.
    """
    feast, declared = store(home), _declared()
    names = {(type(o), o.name) for o in declared}
    before = online_schema.of(feast.list_feature_views())
    listed = (feast.list_feature_services, feast.list_feature_views, feast.list_data_sources, feast.list_entities)
    gone: list[Any] = [o for listing in listed for o in listing() if (type(o), o.name) not in names]
    with _quiet():
        feast.apply(declared, objects_to_delete=gone, partial=False)
    wanted = declared_schema()
    with closing(sqlite3.connect(home / "feature_store" / "online.db", isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")  # readers go on while a materialisation writes
        db.execute("BEGIN IMMEDIATE")
        _migrate(db, online_schema.get(db) or before, wanted)
        online_schema.put(db, wanted)
        for view in wanted:  # Feast's own, of what the tables' keys begin with: every new value would be written to it too
            db.execute(f'DROP INDEX IF EXISTS "{table_of(view)}_ek"')
            online_schema.cluster(db, view)
        db.execute("COMMIT")
    if settings is not None and settings.online.redis_url is not None:
        with closing(RedisWriter(settings.online.redis_url.get_secret_value())) as online:
            online.migrate(wanted)


def declared_schema() -> Schema:
    """The feature views of feature_repo/definitions.py as plain data."""
    from feast import FeatureView

    return online_schema.of(o for o in _declared() if isinstance(o, FeatureView))


def materialize(
    home: Path, *, as_of: datetime, start: datetime | None = None, views: Sequence[str] | None = None, settings: Settings | None = None
) -> int:
    """Bring the online store to the state strictly before `as_of`, what was computed as of it included; returns the views' rows online.

    `start`: only what changed since then; none: everything. `views`: by name; none: all. A view whose table was never written
    is left out. What the stream wrote since stays, and of outdated tables nothing is loaded beside it: see above. Raises StoreError where
    a name is unknown, nothing was applied, or what was applied is not what is declared by now.
    """
    from pipelines.stream import untold  # half a second, for which whoever only trains need not wait

    feast = store(home)
    known: dict[str, Any] = {view.name: view for view in feast.list_feature_views()}
    unknown = set(views or ()) - set(known)
    if unknown or not known:
        raise StoreError(f"features: expected views among {sorted(known)}, found {sorted(unknown)}; run `rapport features apply` first")
    online_schema.check_same(online_schema.of(known.values()), declared_schema(), f"the registry under {home}")
    wanted = [name for name in (views or known) if (home / known[name].batch_source.path).exists()]
    if not wanted:
        return 0
    begin, end = start or EPOCH, as_of.astimezone(UTC)
    has_basis = settings is not None and settings.consent.legal_basis is not None
    with closing(engine.connect(home)) as con, closing(open_writer(home, settings)) as online:
        online_schema.check_same(online.schema, declared_schema(), f"the online store of {home}")
        withheld = untold.find(con, home, has_basis=has_basis)
        for name in wanted:
            is_streamed = name in ALWAYS_STREAMED or (name in STREAMED_VIEWS and online.is_streamed(name))
            if is_streamed and provenance.is_outdated(home, name):
                continue
            try:
                until = end + timedelta(microseconds=1) if name in COMPUTED_VIEWS else end
                _load(con, online, home, known[name], begin, until, withheld, is_whole=start is None, is_streamed=is_streamed)
            except duckdb.BinderException as error:
                what = str(error).partition("\n")[0]
                raise StoreError(f"features: the table of {name} lacks what is declared ({what}); run `rapport features build`") from error
            feast.registry.apply_materialization(known[name], feast.project, begin, end)
        if start is None and IDENTIFIER_VIEW in wanted:
            _forget_orphans(online)
        heard = untold.find(con, home, has_basis=has_basis)
        if heard != withheld:  # a refusal came while rows were being loaded
            untold.mark(home, heard)
        return sum(online.count(name) for name in wanted)


def training_frame(home: Path, labels: pd.DataFrame, *, service: str) -> pd.DataFrame:
    """`labels` with the features of a service as they were strictly before each row's `event_timestamp`, ages and ratios derived.

    labels: the join keys, `event_timestamp` (UTC), any others. Same rows, same order, same index; a column that is also a
    feature is replaced by it; a column of windows.REQUEST is what a request told then, and is used like a feature.
    Raises StoreError where the service is unknown or a table is missing, InputError without the keys.
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
    asked = labels[[name for name in windows.REQUEST if name in labels.columns]].reset_index(drop=True)
    derived = windows.derive(found, rows["event_timestamp"], request=asked).set_axis(labels.index)
    return pd.concat([labels.drop(columns=derived.columns, errors="ignore"), derived], axis=1)


def _declared() -> list[Any]:
    from feast import Entity, FeatureService, FeatureView, FileSource

    from feature_repo import definitions

    return [o for o in vars(definitions).values() if isinstance(o, Entity | FileSource | FeatureView | FeatureService)]


def _join_keys(feast: "FeatureStore", service: Any) -> list[str]:
    views = [feast.get_feature_view(projection.name) for projection in service.feature_view_projections]
    return list(dict.fromkeys(column.name for view in views for column in view.entity_columns))


def _migrate(db: sqlite3.Connection, before: Schema, wanted: Schema) -> None:
    """Take out of the tables what is no longer declared, or not as it was. Feast has made new tables, and dropped those of views gone."""
    for view, made in before.items():
        declared = wanted.get(view)
        if declared is None:
            db.execute(f'DROP TABLE IF EXISTS "{table_of(view)}"')
        elif declared.join_key != made.join_key:
            db.execute(f'DELETE FROM "{table_of(view)}"')
        else:
            other = [name for name, kind in made.features.items() if declared.features.get(name) != kind]
            db.executemany(f'DELETE FROM "{table_of(view)}" WHERE feature_name = ?', [(name,) for name in other])


def _load(
    con: Any, online: Writer, home: Path, view: Any, begin: datetime, end: datetime, withheld: "Untold", *,
    is_whole: bool, is_streamed: bool,
) -> None:  # fmt: skip
    """Write the newest row of each key within [begin, end) of the view's table, but for what is `withheld` of what people do."""
    join_key = online_schema.of([view])[view.name].join_key
    _newest(con, home, view, join_key, begin, end)
    if view.name in _OF_EVENTS:
        name, whose = (CUSTOMER, withheld.customers) if CUSTOMER in sorted_names(join_key) else ("item_id", withheld.items)
        if whose:
            con.execute(f"DELETE FROM newest WHERE {name} IN (SELECT unnest($whose))", {"whose": sorted(whose)})
    keys = ", ".join(sorted_names(join_key))
    for batch in con.sql(f"SELECT * FROM newest ORDER BY {keys}").to_arrow_reader(ONLINE_ROWS):
        with online.transaction():
            online.load(view.name, batch, join_key=join_key, is_guarded=is_streamed)
    if is_whole and not is_streamed:
        kept = (key for batch in con.sql(f"SELECT {keys} FROM newest").to_arrow_reader(BATCH_ROWS) for key in encoded_keys(batch, join_key))
        with online.transaction():
            online.clear(view.name, kept)


def _newest(con: Any, home: Path, view: Any, join_key: JoinKey, begin: datetime, end: datetime) -> None:
    """Create `newest`: join keys, features, event_us, created_us. First when, then what: wide columns are read only for rows kept."""
    source = view.batch_source
    time, created = source.timestamp_field, source.created_timestamp_column
    names = ", ".join(f'"{field.name}"' for field in view.features)
    by = f"{time} DESC" + (f", {created} DESC NULLS LAST" if created else "")
    event_us, created_us = f"epoch_us({time})", f"epoch_us({created})" if created else "NULL"
    if view.name == IDENTIFIER_VIEW:  # a late event may move the first sight back: online it counts when we knew
        event_us = created_us = _known_us(con, home)
    keys = ", ".join(sorted_names(join_key))
    files = literal(str((home / source.path).resolve() / "**" / "*.parquet"))
    con.execute(
        f"""CREATE OR REPLACE TEMP TABLE newest AS
        WITH source AS (SELECT * FROM read_parquet({files}, hive_partitioning = false)),
        latest AS (SELECT {keys}, max({time}) AS {time} FROM source WHERE {time} >= $begin AND {time} < $end GROUP BY {keys})
        SELECT {keys}, {names}, CAST({event_us} AS BIGINT) AS event_us, CAST({created_us} AS BIGINT) AS created_us
        FROM source SEMI JOIN latest USING ({keys}, {time})
        QUALIFY row_number() OVER (PARTITION BY {keys} ORDER BY {by}) = 1""",
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


def _forget_orphans(online: Writer) -> None:
    """Take out what was streamed of customers whom nobody's identifier names any more: they were merged into another."""
    made = online.schema
    personal = [view for view in STREAMED_VIEWS if view in made and CUSTOMER in sorted_names(made[view].join_key)]
    with online.transaction():
        online.clear_orphans([view for view in personal if view in ALWAYS_STREAMED or online.is_streamed(view)])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Feast reports progress on stdout, which belongs to the command line."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
