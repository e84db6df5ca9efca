"""The online store filled from the feature tables, beside Feast's own materialisation on the same store.

In: an empty folder. Out: rows for `rapport bench features`, and a filled home that reads can be measured on.
"""

import shutil
from contextlib import closing, redirect_stdout
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path

import pyarrow as pa
from pydantic import SecretStr

from pipelines import engine, feature_store, tables
from pipelines.bench.measured import measured
from pipelines.bench.row import BenchRow, row
from pipelines.errors import PipelineError
from pipelines.settings import OnlineSettings, Settings
from pipelines.tables import Table

AS_OF = datetime(2026, 1, 1, tzinfo=UTC)
VIEW = "customer_activity"


def load_rows(folder: Path, *, customers: int, redis_url: str | None = None) -> list[BenchRow]:
    """Rows of one view a second and memory, into SQLite, and into the Redis at `redis_url` where there is one; it is emptied."""
    home = folder / "ours"
    fill_tables(home, customers=customers)
    feature_store.apply(home)
    rival = shutil.copytree(home, folder / "feast", symlinks=True)
    n = len(tables.CUSTOMER_ACTIVITY.schema) - 2  # type: ignore[arg-type]
    stores = {"SQLite": Settings(home=home)} | (
        {"Redis": Settings(home=home, online=OnlineSettings(redis_url=SecretStr(redis_url)))} if redis_url else {}
    )
    found = []
    for store, settings in stores.items():
        if store == "Redis":
            _empty(str(redis_url))
            feature_store.apply(home, settings=settings)
        ours = measured(lambda _, given=settings: _load(home, given))  # type: ignore[misc]
        mine = _sample(home, settings)
        if store == "Redis":
            _empty(str(redis_url))
        theirs = measured(lambda _, given=settings: _load_by_feast(rival, given))  # type: ignore[misc]
        if mine != _sample(rival, settings):
            raise PipelineError(f"bench: what Feast's materialisation left in {store} is not what ours did; one of them is wrong")
        name = f"{store}: {customers // 1_000}k customers x {n} features materialised"
        found += [
            row(name, customers / ours.wall_s, "rows/s", "Feast's materialize", customers / theirs.wall_s),
            row(f"{name}: CPU", ours.cpu_s, "s", "Feast's materialize", theirs.cpu_s),
            row(f"{name}: peak memory", ours.peak_mb, "MB", "Feast's materialize", theirs.peak_mb),
        ]
    shutil.rmtree(rival)
    return found


def fill_tables(home: Path, *, customers: int, items: int = 2_000) -> None:
    """Feature tables with one change point of each customer and item: small counts, cents, instants of half a year; some are null."""
    for table, prefix, count in (
        (tables.CUSTOMER_ACTIVITY, "c", customers),
        (tables.CUSTOMER_SESSION, "c", customers),
        (tables.ITEM_ACTIVITY, "i", items),
    ):
        tables.write(home, table, _rows(home, table, prefix, count))
    with engine.connect(home) as con:
        who = f"SELECT 'c' || i AS customer_id, make_timestamptz(1700000000000000 + i) AS event_timestamp FROM range({customers}) t(i)"
        consents = con.sql(f"SELECT *, true AS is_personalization_allowed FROM ({who})").to_arrow_table()
        traits = dict.fromkeys(("age_band", "gender"), "NULL") | {"region": "'north'"}
        flags = dict.fromkeys(("is_age_band_imputed", "is_gender_imputed", "is_region_imputed"), "false")
        picked = ", ".join(f"{what} AS {name}" for name, what in (traits | flags).items())
        profiles = con.sql(f"SELECT *, {picked} FROM ({who})").to_arrow_table()
    tables.write(home, tables.CUSTOMER_CONSENT, consents.cast(tables.CUSTOMER_CONSENT.schema))
    tables.write(home, tables.CUSTOMER_PROFILE, profiles.cast(tables.CUSTOMER_PROFILE.schema))


def fill_for_reads(settings: Settings, *, customers: int = 2_000, items: int = 2_000) -> None:
    """A home whose online store holds some customers and items, in the file or in the Redis that the settings name."""
    fill_tables(settings.home, customers=customers, items=items)
    feature_store.apply(settings.home, settings=settings)
    feature_store.materialize(settings.home, as_of=AS_OF, settings=settings)


def _rows(home: Path, table: Table, prefix: str, count: int) -> pa.Table:
    assert table.schema is not None
    (key,) = table.key
    names = [name for name in table.schema.names if name not in (key, "event_timestamp")]
    values = ", ".join(
        f"CASE WHEN hash(i, {n}) % 9 > 0 THEN CAST({_drawn(name, n)} AS BIGINT) END AS {name}" for n, name in enumerate(names)
    )
    with engine.connect(home) as con:
        query = (
            f"SELECT '{prefix}' || i AS {key}, make_timestamptz(1750000000000000 + i) AS event_timestamp, {values} FROM range({count}) t(i)"
        )
        found: pa.Table = con.sql(query).to_arrow_table().cast(table.schema)
    return found


def _drawn(name: str, n: int) -> str:
    """A value such as the column of this name holds, for row i."""
    if name.endswith("_at"):
        return f"1750000000000000 - hash(i, {n}) % 15000000000000"
    return f"hash(i, {n}) % {500_000 if 'cents' in name else 60}"


def _load(home: Path, settings: Settings) -> int:
    return feature_store.materialize(home, as_of=AS_OF, views=[VIEW], settings=settings)


def _load_by_feast(home: Path, settings: Settings) -> None:
    with redirect_stdout(StringIO()):
        feature_store.store(home, settings=settings).materialize(
            datetime(2020, 1, 1, tzinfo=UTC), AS_OF - timedelta(microseconds=1), [VIEW]
        )


def _sample(home: Path, settings: Settings) -> object:
    """What Feast reads of some customers, after either side."""
    feast = feature_store.store(home, settings=settings)
    refs = [f"{VIEW}:{field.name}" for field in feast.get_feature_view(VIEW).features]
    return feast.get_online_features(refs, [{"customer_id": f"c{n}"} for n in range(0, 1_000, 13)]).to_dict()


def _empty(url: str) -> None:
    import redis

    with closing(redis.Redis.from_url(url)) as client:
        client.flushdb()
