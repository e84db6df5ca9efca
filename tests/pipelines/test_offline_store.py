"""Point-in-time joins through Feast's own API against a brute-force reference."""

import shutil
from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import offline_store
from pipelines.errors import InputError, StoreError

T0 = pd.Timestamp("2025-03-01", tz="UTC")
US = pd.Timedelta(1, "us")
HOUR = pd.Timedelta(1, "h")


def write(folder, frame):
    """A source of several files, some of them in a folder below, in no order."""
    shuffled = frame.sample(frac=1, random_state=1)
    for number, name in enumerate(("a.parquet", "deep/b.parquet", "deep/er/c.parquet")):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        part = shuffled.iloc[number::3]
        pq.write_table(pa.Table.from_pandas(part, preserve_index=False), path, coerce_timestamps="us")


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    """Three sources: `spend` with a created time and a ttl, `views` without, `pairs` keyed by customer and item."""
    from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
    from feast.types import Int64, String

    home = tmp_path_factory.mktemp("home")
    rng = np.random.default_rng(11)

    def times(n):
        return T0 + pd.to_timedelta(rng.integers(0, 200, n) * 15, unit="min")

    def ids(n, prefix="c", last=6):
        return [f"{prefix}{i}" for i in rng.integers(0, last, n)]

    spend = pd.DataFrame({"customer_id": ids(240), "event_timestamp": times(240), "cents": rng.integers(0, 10**6, 240)})
    spend["created"] = spend["event_timestamp"] + pd.to_timedelta(rng.choice([0, 0, 1, 30, 600], 240), unit="min")
    spend = spend.drop_duplicates(["customer_id", "event_timestamp", "created"])
    spend["note"] = np.where(rng.random(len(spend)) < 0.2, None, spend["cents"].astype(str))
    views = pd.DataFrame({"customer_id": ids(200), "event_timestamp": times(200), "n_raw": rng.integers(0, 99, 200)})
    views = views.drop_duplicates(["customer_id", "event_timestamp"])
    pairs = pd.DataFrame({"customer_id": ids(300), "item_id": ids(300, "i", 4), "event_timestamp": times(300), "seen": range(300)})
    pairs = pairs.drop_duplicates(["customer_id", "item_id", "event_timestamp"])
    frames = {"spend": spend, "views": views, "pairs": pairs}
    for name, frame in frames.items():
        write(home / "tables" / f".{name}-1", frame)
        (home / "tables" / name).symlink_to(f".{name}-1")

    customer = Entity(name="customer", join_keys=["customer_id"], value_type=ValueType.STRING)
    item = Entity(name="item", join_keys=["item_id"], value_type=ValueType.STRING)

    def view(name, entities, ttl, fields, **source):
        keys = [Field(name=e.join_key, dtype=String) for e in entities]
        from_file = FileSource(name=name, path=f"tables/{name}", timestamp_field="event_timestamp", **source)
        return FeatureView(name=name, entities=entities, ttl=ttl, source=from_file, schema=[*keys, *fields])

    cents, note = Field(name="cents", dtype=Int64), Field(name="note", dtype=String)
    objects = [
        view("spend", [customer], timedelta(hours=6), [cents, note], created_timestamp_column="created"),
        view("views", [customer], timedelta(0), [Field(name="n", dtype=Int64)], field_mapping={"n_raw": "n"}),
        view("pairs", [customer, item], timedelta(0), [Field(name="seen", dtype=Int64)]),
    ]
    friend = objects[1].with_name("friend_views").with_join_key_map({"customer_id": "friend_id"})
    own = objects[1].with_name("own_views")  # one view under two names needs two aliases: Feast cannot sort None
    service = FeatureService(name="all", features=[objects[0], own, objects[2], friend])
    config = RepoConfig(
        project="trial",
        provider="local",
        registry="registry.db",
        online_store={"type": "sqlite", "path": "online.db"},
        offline_store={"type": "pipelines.offline_store.AsofOfflineStore"},
        repo_path=home,
    )
    store = FeatureStore(repo_path=str(home), config=config)
    store.apply([customer, item, *objects, service, on_demand(objects[0], objects[1])])
    return store, frames


def on_demand(spend, views):
    """A view computed from two others and from the request."""
    from feast import Field, RequestSource
    from feast.on_demand_feature_view import on_demand_feature_view
    from feast.types import Int64

    request = RequestSource(name="request", schema=[Field(name="asked", dtype=Int64)])

    @on_demand_feature_view(sources=[spend[["cents"]], views, request], schema=[Field(name="total", dtype=Int64)], mode="pandas")
    def derived(inputs):
        import pandas as pd

        return pd.DataFrame({"total": (inputs["cents"] + inputs["n"] + inputs["asked"]).astype("Int64")})

    return derived


def label_rows(frames, n=400):
    """Instants at, just before and just after changes and expiries; unsorted, repeated, some of unknown keys."""
    rng = np.random.default_rng(4)
    base = pd.concat([frames["spend"]["event_timestamp"], frames["spend"]["created"], frames["views"]["event_timestamp"]])
    at = base.sample(n, replace=True, random_state=2).reset_index(drop=True)
    at = at + pd.to_timedelta(rng.choice([0, 0, 1, -1, 6 * 3_600_000_000, 6 * 3_600_000_000 + 1], n), unit="us")
    rows = pd.DataFrame(
        {
            "row": np.arange(n),
            "customer_id": [f"c{i}" for i in rng.integers(0, 7, n)],  # c6 is in no source
            "item_id": [f"i{i}" for i in rng.integers(0, 5, n)],
            "friend_id": [None if i == 0 else f"c{i}" for i in rng.integers(0, 7, n)],
            "event_timestamp": at,
        }
    )
    rows = pd.concat([rows, rows.head(20)])
    return rows.sample(frac=1, random_state=3)


def newest(frame, at, *, ttl=None, created=None, is_known_only=False, is_strict=True, **keys):
    """The definition: of the rows of this key before `at` the newest, of two at one instant the later created; null beyond ttl."""
    found = frame
    for name, value in keys.items():
        found = found[found[name] == value]
    found = found[found["event_timestamp"] < at] if is_strict else found[found["event_timestamp"] <= at]
    if is_known_only and created:
        found = found[found[created] < at]
    if found.empty:
        return {}
    row = found.sort_values(["event_timestamp", *([created] if created else [])]).iloc[-1].to_dict()
    return row if ttl is None or row["event_timestamp"] + ttl >= at else {}


def expected(frames, rows, **options):
    columns = {"cents": [], "note": [], "n": [], "seen": [], "friend_n": []}
    for row in rows.itertuples():
        spend = newest(frames["spend"], row.event_timestamp, customer_id=row.customer_id, ttl=6 * HOUR, created="created", **options)
        columns["cents"].append(spend.get("cents"))
        columns["note"].append(spend.get("note"))
        columns["n"].append(newest(frames["views"], row.event_timestamp, customer_id=row.customer_id, **options).get("n_raw"))
        pair = newest(frames["pairs"], row.event_timestamp, customer_id=row.customer_id, item_id=row.item_id, **options)
        columns["seen"].append(pair.get("seen"))
        columns["friend_n"].append(newest(frames["views"], row.event_timestamp, customer_id=row.friend_id, **options).get("n_raw"))
    return pd.DataFrame(columns)


def comparable(frame):
    return frame.astype(object).where(frame.notna(), None).map(lambda v: int(v) if isinstance(v, float) else v)


REFS = ["spend:cents", "spend:note", "views:n", "pairs:seen"]


@pytest.mark.parametrize("is_known_only", [False, True])
def test_join_of_several_views_equals_the_definition(repo, is_known_only):
    store, frames = repo
    rows = label_rows(frames)
    job = store.get_historical_features(
        rows, store.get_feature_service("all"), full_feature_names=True, filter_by_created_timestamp=is_known_only
    )
    found = job.to_df()
    pd.testing.assert_frame_equal(found[rows.columns], rows.reset_index(drop=True), check_dtype=False)
    names = {"spend__cents": "cents", "spend__note": "note", "own_views__n": "n", "pairs__seen": "seen", "friend_views__n": "friend_n"}
    wanted = comparable(expected(frames, rows, is_known_only=is_known_only))
    pd.testing.assert_frame_equal(comparable(found[list(names)].rename(columns=names)), wanted, check_dtype=False)
    assert wanted.notna().any().all()
    assert wanted.isna().any().all()


def test_view_computed_on_demand_gets_its_inputs_as_they_were(repo):
    store, frames = repo
    rows = label_rows(frames, 120).assign(asked=5)
    found = store.get_historical_features(rows, ["derived:total"]).to_df()
    wanted = expected(frames, rows)
    total = (wanted["cents"].astype("Int64") + wanted["n"].astype("Int64") + 5).tolist()
    assert found["total"].astype("Int64").tolist() == total
    assert any(value is not pd.NA for value in total)


# -- random schedules --------------------------------------------------------------------------------------------------


def schedules(seed, worlds=50):
    """Sources and label rows of many small worlds at once, whose keys are their own: few instants on a coarse grid, so that changes,
    expiries and labels meet."""
    rng = np.random.default_rng(seed)
    sizes = {"spend": 10, "views": 7, "pairs": 7, "rows": 10}
    n = {name: rng.integers(0 if name != "rows" else 1, most, worlds) for name, most in sizes.items()}
    world = {name: np.repeat(np.arange(worlds), n[name]) for name in n}

    def keys(name, prefix):
        return [f"{prefix}{i}-{w}" for i, w in zip(rng.integers(0, 2, len(world[name])), world[name], strict=True)]

    def at(name, most=13):
        return (T0 + pd.to_timedelta(rng.integers(0, most, len(world[name])), unit="h")).astype("datetime64[us, UTC]")

    spend = pd.DataFrame({"customer_id": keys("spend", "c"), "event_timestamp": at("spend"), "cents": range(len(world["spend"]))})
    lag = rng.integers(0, 10, len(spend))
    spend["created"] = (spend["event_timestamp"] + pd.to_timedelta(lag, unit="h")).where(lag < 9)  # some were never noted
    spend["note"] = np.where(rng.random(len(spend)) < 0.2, None, spend["cents"].astype(str))
    known = spend["created"].fillna(spend["event_timestamp"])
    spend = spend[
        ~pd.DataFrame({"c": spend["customer_id"], "e": spend["event_timestamp"], "k": known}).duplicated()
    ]  # else either is right
    views = pd.DataFrame({"customer_id": keys("views", "c"), "event_timestamp": at("views"), "n_raw": range(len(world["views"]))})
    views = views.drop_duplicates(["customer_id", "event_timestamp"])
    pairs = pd.DataFrame({"customer_id": keys("pairs", "c"), "item_id": keys("pairs", "i"), "event_timestamp": at("pairs")})
    pairs = pairs.drop_duplicates().assign(seen=lambda frame: range(len(frame)))
    rows = pd.DataFrame({"customer_id": keys("rows", "c"), "item_id": keys("rows", "i"), "friend_id": keys("rows", "c")})
    rows["friend_id"] = rows["friend_id"].where(rng.random(len(rows)) < 0.8)
    rows["event_timestamp"] = at("rows", 21) + pd.to_timedelta(rng.integers(-1, 2, len(rows)), unit="us")
    return {"spend": spend, "views": views, "pairs": pairs}, rows.assign(row=range(len(rows)))


@pytest.mark.parametrize("is_known_only", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_join_equals_the_definition_on_random_schedules(own_repo, seed, is_known_only):
    store, home = own_repo
    frames, rows = schedules(seed)
    for name, frame in frames.items():
        shutil.rmtree(home / "tables" / f".{name}-1")
        write(home / "tables" / f".{name}-1", frame)
    job = store.get_historical_features(
        rows, store.get_feature_service("all"), full_feature_names=True, filter_by_created_timestamp=is_known_only
    )
    found = job.to_df()
    assert found["row"].tolist() == rows["row"].tolist()
    names = {"spend__cents": "cents", "spend__note": "note", "own_views__n": "n", "pairs__seen": "seen", "friend_views__n": "friend_n"}
    frames["spend"]["created"] = frames["spend"]["created"].fillna(frames["spend"]["event_timestamp"])
    wanted = comparable(expected(frames, rows, is_known_only=is_known_only))
    assert wanted.notna().any().all()
    pd.testing.assert_frame_equal(comparable(found[list(names)].rename(columns=names)), wanted, check_dtype=False)


@pytest.fixture(scope="module")
def own_repo(repo, tmp_path_factory):
    """The same declarations over a folder of its own, which may be overwritten."""
    from feast import FeatureStore

    store, _ = repo
    home = tmp_path_factory.mktemp("own")
    shutil.copytree(store.config.repo_path, home, dirs_exist_ok=True, symlinks=True)
    return FeatureStore(repo_path=str(home), config=store.config.model_copy(update={"repo_path": home})), home


def test_rows_without_key_or_time_get_nulls_and_no_row_is_lost(repo):
    store, _ = repo
    rows = pd.DataFrame({"customer_id": ["c0", None, "c1"], "event_timestamp": pd.to_datetime([T0 + 40 * HOUR, T0 + 40 * HOUR, None])})
    found = store.get_historical_features(rows, ["views:n"]).to_df()
    assert found["n"].notna().tolist() == [True, False, False]


def test_reference_that_sees_the_instant_itself_is_told_apart(repo):
    """Control: the rows do hold labels at the very instant of a change, so a join by `>=` would not pass the test above."""
    store, frames = repo
    rows = label_rows(frames)
    found = store.get_historical_features(rows, REFS).to_df()
    wanted = expected(frames, rows, is_strict=False)
    assert not comparable(found[["cents", "n", "seen"]]).equals(comparable(wanted[["cents", "n", "seen"]]))


def test_ttl_edge_is_inclusive(repo):
    store, frames = repo
    row = frames["spend"].sort_values(["event_timestamp", "created"]).groupby("customer_id").tail(1).iloc[0]
    at = row["event_timestamp"] + 6 * HOUR
    rows = pd.DataFrame({"customer_id": row["customer_id"], "event_timestamp": [at, at + US, row["event_timestamp"]]})
    found = store.get_historical_features(rows, ["spend:cents"]).to_df()["cents"]
    assert found.iloc[0] == row["cents"]
    assert np.isnan(found.iloc[1])
    assert found.iloc[2] != row["cents"]  # known at the label's own instant: not before it


def test_value_created_after_the_label_is_not_used_when_asked_so(repo):
    store, frames = repo
    late = frames["spend"][frames["spend"]["created"] > frames["spend"]["event_timestamp"] + HOUR].iloc[0]
    rows = pd.DataFrame({"customer_id": [late["customer_id"]], "event_timestamp": [late["event_timestamp"] + US]})
    eager = store.get_historical_features(rows, ["spend:cents"]).to_df()["cents"].iloc[0]
    careful = store.get_historical_features(rows, ["spend:cents"], filter_by_created_timestamp=True).to_df()["cents"].iloc[0]
    assert eager == newest(frames["spend"], rows["event_timestamp"].iloc[0], customer_id=late["customer_id"], created="created")["cents"]
    assert careful != eager


def test_naive_and_foreign_zones_name_the_same_instant(repo):
    store, frames = repo
    rows = label_rows(frames)[["customer_id", "event_timestamp"]]
    wanted = store.get_historical_features(rows, ["views:n"]).to_df()["n"]
    naive = rows.assign(event_timestamp=rows["event_timestamp"].dt.tz_localize(None))
    foreign = rows.assign(event_timestamp=rows["event_timestamp"].dt.tz_convert("America/New_York"))
    for other in (naive, foreign):
        pd.testing.assert_series_equal(store.get_historical_features(other, ["views:n"]).to_df()["n"], wanted)


def test_nanoseconds_beyond_a_change_do_not_reach_it(repo):
    """Below a microsecond the label instant is cut down, never up: what happened within it stays unseen."""
    store, frames = repo
    row = frames["views"].sort_values("event_timestamp").iloc[0]
    at = row["event_timestamp"].as_unit("ns") + pd.Timedelta(900, "ns")
    rows = pd.DataFrame({"customer_id": [row["customer_id"]], "event_timestamp": [at]})
    assert store.get_historical_features(rows, ["views:n"]).to_df()["n"].isna().all()


def test_no_label_rows_give_no_rows_with_all_columns(repo):
    store, frames = repo
    found = store.get_historical_features(label_rows(frames).head(0), REFS).to_df()
    assert found.empty
    assert {"cents", "note", "n", "seen"} <= set(found.columns)


def test_latest_rows_are_the_newest_of_each_key_within_the_range(repo):
    store, frames = repo
    start, end = T0 + 3 * HOUR, frames["spend"]["event_timestamp"].sort_values().iloc[150]
    source = store.get_feature_view("spend").batch_source
    args = {"config": store.config, "data_source": source, "join_key_columns": ["customer_id"], "feature_name_columns": ["cents"]}
    args |= {"timestamp_field": "event_timestamp", "created_timestamp_column": "created"}
    job = offline_store.AsofOfflineStore.pull_latest_from_table_or_query(**args, start_date=start, end_date=end)
    found = job.to_arrow()
    assert found.schema.field("event_timestamp").type == pa.timestamp("us", tz="UTC")
    within = frames["spend"].query("@start <= event_timestamp <= @end").sort_values(["event_timestamp", "created"])
    wanted = within.groupby("customer_id").tail(1).sort_values("customer_id")
    assert found["cents"].to_pylist() == wanted["cents"].tolist()
    everything = offline_store.AsofOfflineStore.pull_all_from_table_or_query(**args, start_date=start, end_date=end).to_df()
    assert len(everything) == len(within)
    assert len(offline_store.AsofOfflineStore.pull_all_from_table_or_query(**args).to_df()) == len(frames["spend"])


def test_retrieval_can_be_saved_and_read_again(repo, tmp_path):
    from feast.infra.offline_stores.file_source import SavedDatasetFileStorage

    store, frames = repo
    rows = label_rows(frames).head(30)
    job = store.get_historical_features(rows, ["views:n"])
    job.persist(SavedDatasetFileStorage(path=str(tmp_path / "kept.parquet")))
    assert pq.read_table(tmp_path / "kept.parquet").num_rows == 30
    assert job.metadata.features == ["views:n"]


def test_missing_key_or_source_says_what_to_do(repo, tmp_path):
    store, frames = repo
    rows = label_rows(frames)
    with pytest.raises(InputError, match=r"need the join keys \['item_id'\]"):
        store.get_historical_features(rows.drop(columns="item_id"), ["pairs:seen"])
    with pytest.raises(InputError, match="expected as a DataFrame"):
        store.get_historical_features("SELECT 1", ["pairs:seen"])
    source = store.get_feature_view("views").batch_source
    elsewhere = store.config.model_copy(update={"repo_path": tmp_path})
    with pytest.raises(StoreError, match="found nothing"):
        offline_store.AsofOfflineStore.pull_all_from_table_or_query(elsewhere, source, ["customer_id"], ["n_raw"], "event_timestamp")


def test_naive_range_is_taken_as_utc(repo):
    store, frames = repo
    source = store.get_feature_view("views").batch_source
    pull = offline_store.AsofOfflineStore.pull_all_from_table_or_query
    aware = pull(store.config, source, ["customer_id"], ["n_raw"], "event_timestamp", end_date=datetime(2025, 3, 2, tzinfo=UTC)).to_df()
    naive = pull(store.config, source, ["customer_id"], ["n_raw"], "event_timestamp", end_date=datetime(2025, 3, 2)).to_df()
    assert 0 < len(aware) < len(frames["views"])
    pd.testing.assert_frame_equal(aware, naive)
