"""Feast's offline store on DuckDB: point-in-time joins by ASOF join, strictly before the label instant.

In: entity rows and feature views over folders of Parquet files. Out: the same rows in the same order with the values known
before each, or a table's latest rows for materialisation. Never drops, repeats or reorders an entity row; never writes a source.

A value counts at T when its event_timestamp < T and, with `filter_by_created_timestamp`, its created timestamp < T as well;
it is null when it is older than the view's ttl. Feast's own stores take `<=`, which lets a label's own event into its features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
from feast.data_source import DataSource
from feast.feature_view import FeatureView
from feast.infra.offline_stores.duckdb import DuckDBOfflineStore, DuckDBOfflineStoreConfig
from feast.infra.offline_stores.file_source import FileSource
from feast.infra.offline_stores.offline_store import RetrievalJob, RetrievalMetadata
from feast.infra.offline_stores.offline_utils import infer_event_timestamp_from_entity_df
from feast.infra.registry.base_registry import BaseRegistry
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.repo_config import RepoConfig
from feast.saved_dataset import SavedDatasetStorage

from pipelines import engine
from pipelines.engine import literal
from pipelines.errors import InputError, StoreError

_TIME = pa.timestamp("us", tz="UTC")


class AsofOfflineStoreConfig(DuckDBOfflineStoreConfig):
    """`offline_store` of feature_store.yaml."""

    type: str = "pipelines.offline_store.AsofOfflineStore"
    threads: int = 2
    memory_limit: str = "2GB"


class AsofOfflineStore(DuckDBOfflineStore):
    """Reads Parquet folders relative to the repository path; writing and logging stay Feast's."""

    supports_filter_by_created_timestamp = True

    @staticmethod
    def get_historical_features(
        config: RepoConfig,
        feature_views: list[FeatureView],
        feature_refs: list[str],
        entity_df: pd.DataFrame | str | None,
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,
        filter_by_created_timestamp: bool = False,
        **unsupported: Any,
    ) -> RetrievalJob:
        """The entity rows with the features of each view as they were strictly before the row's instant.

        Raises InputError where the entity rows are no frame or lack a join key; the sources are read when the job runs.
        """
        if not isinstance(entity_df, pd.DataFrame):
            raise InputError(f"offline store: entity rows were expected as a DataFrame, found {type(entity_df).__name__}; pass a frame")
        time_column = infer_event_timestamp_from_entity_df(dict(zip(entity_df.columns, entity_df.dtypes, strict=True)))
        derived = OnDemandFeatureView.get_requested_odfvs(feature_refs, project, registry)
        refs = [*feature_refs, *_inputs(derived)]
        joins = [_join(view, refs, config, full_feature_names, filter_by_created_timestamp) for view in feature_views]
        _check_keys(entity_df, joins)
        entities = entity_df.copy(deep=False)
        return AsofRetrievalJob(
            lambda: _point_in_time(config, entities, time_column, joins),
            repo_path=str(config.repo_path),
            full_feature_names=full_feature_names,
            on_demand_feature_views=derived,
            metadata=RetrievalMetadata(
                features=feature_refs,
                keys=[c for c in entity_df.columns if c != time_column],
                min_event_timestamp=entity_df[time_column].min(),
                max_event_timestamp=entity_df[time_column].max(),
            ),
        )

    @staticmethod
    def pull_latest_from_table_or_query(
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None,
        start_date: datetime,
        end_date: datetime,
    ) -> RetrievalJob:
        """The newest row of each key within [start_date, end_date]; of two at one instant the later created."""
        columns = [
            *join_key_columns,
            *feature_name_columns,
            timestamp_field,
            *([created_timestamp_column] if created_timestamp_column else []),
        ]
        keys, time = _names(join_key_columns), _name(timestamp_field)
        newest_first = ", ".join(f"{_name(c)} DESC NULLS LAST" for c in (timestamp_field, created_timestamp_column) if c)
        within = f"{time} BETWEEN $start AND $end"
        # First when, then what: the wide columns are read only for the rows that are kept.
        query = f"""
            SELECT {_names(columns)} FROM source
            SEMI JOIN (SELECT {keys}, max({time}) AS {time} FROM source WHERE {within} GROUP BY {keys}) newest USING ({keys}, {time})
            QUALIFY row_number() OVER (PARTITION BY {keys} ORDER BY {newest_first}) = 1
            ORDER BY {keys}
        """
        return _pull(config, data_source, query, start_date, end_date)

    @staticmethod
    def pull_all_from_table_or_query(
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None = None,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
    ) -> RetrievalJob:
        """All rows within [start_date, end_date], open where not given, by key and time."""
        columns = [
            *join_key_columns,
            *feature_name_columns,
            timestamp_field,
            *([created_timestamp_column] if created_timestamp_column else []),
        ]
        time = _name(timestamp_field)
        query = f"""
            SELECT {_names(columns)} FROM source
            WHERE {time} >= coalesce($start, {time}) AND {time} <= coalesce($end, {time})
            ORDER BY {_names([*join_key_columns, timestamp_field])}
        """
        return _pull(config, data_source, query, start_date, end_date)


class AsofRetrievalJob(RetrievalJob):
    """A query that has not run yet."""

    def __init__(
        self,
        run: Callable[[], pa.Table],
        *,
        repo_path: str,
        full_feature_names: bool = False,
        on_demand_feature_views: list[OnDemandFeatureView] | None = None,
        metadata: RetrievalMetadata | None = None,
    ) -> None:
        """run: executes the query; called once for every retrieval of the result."""
        super().__init__()
        self._run = run
        self._repo_path = repo_path
        self._full_feature_names = full_feature_names
        self._on_demand_feature_views = on_demand_feature_views or []
        self._metadata = metadata

    @property
    def full_feature_names(self) -> bool:
        """Whether columns carry their view's name."""
        return self._full_feature_names

    @property
    def on_demand_feature_views(self) -> list[OnDemandFeatureView]:
        """Views that Feast computes on the result."""
        return self._on_demand_feature_views

    @property
    def metadata(self) -> RetrievalMetadata | None:
        """Features, keys and the range of instants asked for."""
        return self._metadata

    def persist(self, storage: SavedDatasetStorage, allow_overwrite: bool = False, timeout: int | None = None) -> None:
        """Write the result where `storage` says."""
        import ibis
        from feast.infra.offline_stores.duckdb import _write_data_source

        _write_data_source(ibis.memtable(self.to_arrow()), storage.to_data_source(), self._repo_path, "overwrite", allow_overwrite)

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:
        return self._run()

    def _to_df_internal(self, timeout: int | None = None) -> pd.DataFrame:
        frame: pd.DataFrame = self._run().to_pandas()
        return frame


@dataclass(frozen=True)
class _Join:
    """One view's side of a point-in-time join, in names of the files (`source_*`) and of the result."""

    files: str
    keys: tuple[tuple[str, str], ...]  # (entity column, source column)
    features: tuple[tuple[str, str], ...]  # (result column, source column)
    time: str
    created: str | None
    ttl: timedelta
    is_known_only: bool  # a value also has to be created before the label instant


def _join(view: FeatureView, refs: list[str], config: RepoConfig, full_names: bool, is_known_only: bool) -> _Join:
    source = view.batch_source
    if source is None:
        raise StoreError(f"offline store: feature view {view.name} has no batch source; give it one in feature_repo/definitions.py")
    projected = view.projection.name_to_use()
    wanted = list(dict.fromkeys(ref.split(":", 1)[1] for ref in refs if ref.split(":", 1)[0] == projected))
    stored = {renamed: original for original, renamed in (source.field_mapping or {}).items()}
    prefix = f"{view.projection.name_alias or view.name}__" if full_names else ""
    renamed_keys = view.projection.join_key_map or {}
    created = source.created_timestamp_column or None
    return _Join(
        files=_files(source, config),
        keys=tuple((renamed_keys.get(k.name, k.name), stored.get(k.name, k.name)) for k in view.entity_columns),
        features=tuple((prefix + name, stored.get(name, name)) for name in wanted),
        time=stored.get(source.timestamp_field, source.timestamp_field),
        created=stored.get(created, created) if created else None,
        ttl=view.ttl or timedelta(0),
        is_known_only=is_known_only,
    )


def _inputs(derived: list[OnDemandFeatureView]) -> list[str]:
    """What views that are computed on demand are computed from: Feast asks for their results alone."""
    projections = [p for view in derived for p in view.source_feature_view_projections.values()]
    return [f"{projection.name_to_use()}:{feature.name}" for projection in projections for feature in projection.features]


def _check_keys(entity_df: pd.DataFrame, joins: list[_Join]) -> None:
    missing = {entity for join in joins for entity, _ in join.keys} - set(entity_df.columns)
    if missing:
        raise InputError(f"offline store: entity rows need the join keys {sorted(missing)}, found {list(entity_df.columns)}; add them")


def _point_in_time(config: RepoConfig, entities: pd.DataFrame, time_column: str, joins: list[_Join]) -> pa.Table:
    """One narrow ASOF join per view, put side by side in the order of the entity rows, which themselves are never touched."""
    result = pa.Table.from_pandas(entities, preserve_index=False).replace_schema_metadata(None)
    keys = sorted({entity for join in joins for entity, _ in join.keys})
    instants = pd.DatetimeIndex(pd.to_datetime(entities[time_column], utc=True)).floor("us")  # down: never past the label instant
    rows = result.select(keys).append_column("_at", pa.Array.from_pandas(instants, type=_TIME))
    rows = rows.append_column("_row", pa.array(range(len(entities)), pa.int64()))
    with _connected(config) as con:
        con.register("entity_rows", rows)
        for join in joins:
            try:
                found = con.sql(_asof_query(join)).to_arrow_table()
            except duckdb.BinderException as error:
                raise _lacks(join.files, error) from error
            for name, _ in join.features:
                result = result.append_column(name, found[name])
    return result


def _asof_query(join: _Join) -> str:
    on = " AND ".join([*(f"e.{_name(e)} = f.{_name(s)}" for e, s in join.keys), "e._at > f._from"])
    microseconds = join.ttl // timedelta(microseconds=1)
    alive = f"f._at + to_microseconds({microseconds}) >= e._at" if microseconds else "true"
    picked = "".join(f", CASE WHEN {alive} THEN f.{_name(s)} END AS {_name(n)}" for n, s in join.features)
    return f"""
        WITH known AS (
            SELECT s.* FROM ({_steps(join)}) s
            SEMI JOIN entity_rows asked ON {" AND ".join(f"asked.{_name(e)} = s.{_name(s)}" for e, s in join.keys)}
        )
        SELECT e._row{picked} FROM entity_rows e ASOF LEFT JOIN known f ON {on} ORDER BY e._row
    """


def _steps(join: _Join) -> str:
    """The source as steps: from `_from` on, strictly, the row of event time `_at` is the value."""
    source_keys = _names([s for _, s in join.keys])
    time = _name(join.time)
    source = f"read_parquet({literal(join.files)}, hive_partitioning = false)"
    columns = _names(dict.fromkeys([*(s for _, s in join.keys), *(s for _, s in join.features)]))
    if join.created is None:
        return f"SELECT {columns}, {time} AS _at, {time} AS _from FROM {source}"
    created = f"coalesce({_name(join.created)}, {time})"
    if not join.is_known_only:
        return f"""
            SELECT {columns}, {time} AS _at, {time} AS _from FROM {source}
            QUALIFY row_number() OVER (PARTITION BY {source_keys}, {time} ORDER BY {created} DESC) = 1
        """
    # Two bounds become one: a row is a value from the moment it is both valid and known, unless a newer one was known by then.
    return f"""
        SELECT * FROM (
            SELECT {columns}, {time} AS _at, greatest({time}, {created}) AS _from,
                   {{'at': {time}, 'created': {created}}} AS _age
            FROM {source}
            QUALIFY row_number() OVER (PARTITION BY {source_keys}, _from ORDER BY _age DESC) = 1
        )
        QUALIFY _age = max(_age) OVER (PARTITION BY {source_keys} ORDER BY _from ROWS UNBOUNDED PRECEDING)
    """


def _pull(config: RepoConfig, data_source: DataSource, query: str, start: datetime | None, end: datetime | None) -> RetrievalJob:
    files = _files(data_source, config)

    def run() -> pa.Table:
        with _connected(config) as con:
            con.execute(f"CREATE VIEW source AS SELECT * FROM read_parquet({literal(files)}, hive_partitioning = false)")
            return con.sql(query, params={"start": _utc(start), "end": _utc(end)}).to_arrow_table()

    return AsofRetrievalJob(run, repo_path=str(config.repo_path))


def _lacks(files: str, error: duckdb.Error) -> StoreError:
    """A table that was built before its feature view was declared as it is now."""
    what = str(error).partition("\n")[0]
    return StoreError(f"offline store: {files} has not all that its feature view declares ({what}); run `rapport features build`")


def _connected(config: RepoConfig) -> duckdb.DuckDBPyConnection:
    store = config.offline_store
    return engine.connect(Path(config.repo_path or "."), threads=store.threads, memory_limit=store.memory_limit)


def _files(source: DataSource, config: RepoConfig) -> str:
    """The pattern of a source's Parquet files. A link to a folder is followed now, so a later version changes nothing under a query."""
    if not isinstance(source, FileSource):
        raise StoreError(f"offline store: sources are expected to be files, found {type(source).__name__} ({source.name})")
    path = Path(FileSource.get_uri_for_file_path(config.repo_path, source.path))
    if not path.exists():
        raise StoreError(f"offline store: the source {source.name} was expected at {path}, found nothing; run the step that writes it")
    path = path.resolve()
    return str(path / "**" / "*.parquet") if path.is_dir() else str(path)


def _utc(instant: datetime | None) -> datetime | None:
    if instant is None:
        return None
    return instant.astimezone(UTC) if instant.tzinfo else instant.replace(tzinfo=UTC)


def _name(column: str) -> str:
    return '"' + column.replace('"', '""') + '"'


def _names(columns: Any) -> str:
    return ", ".join(_name(c) for c in columns)
