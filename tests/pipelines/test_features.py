"""Events -> feature tables -> training frames and online rows: no row sees what was not yet known, and both paths agree."""

import sqlite3
from datetime import timedelta

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from pipelines import feature_store, features, offline_store, tables, windows
from pipelines.errors import InputError, StoreError

START = pd.Timestamp("2025-01-01", tz="UTC")
US = pd.Timedelta(1, "us")
SERVICES = {"intent_v1": "customer_id", "recommender_v1": "item_id"}
N_CUSTOMERS, N_ITEMS, DAYS = 12, 5, 40


def invented(seed=0, visits=90):
    """A small log: visits of some minutes, one event in six known late, ties, two lines an order, a few rows without a session."""
    rng = np.random.default_rng(seed)
    size = rng.integers(1, 9, visits)
    visit = np.repeat(np.arange(visits), size)
    n = len(visit)
    start = rng.integers(0, DAYS * 86_400, visits)[visit] * 1_000_000
    ts = start + pd.Series(rng.choice([0, 20, 300, 1_500], n)).groupby(visit).cumsum().to_numpy() * 1_000_000
    late = np.where(rng.random(n) < 1 / 6, rng.integers(0, 5 * 86_400, n) * 1_000_000, rng.choice([0, 900_000], n))
    kind = rng.choice(["view", "cart_add", "cart_remove", "search", "purchase", "return", "exposure", "page"], n)
    price = rng.integers(100, 5_000, n)
    base = START.value // 1_000
    frame = pd.DataFrame(
        {
            "source": "shop",
            "event_id": [f"e{i}" for i in range(n)],
            "type": kind,
            "name": kind,
            "event_timestamp": pd.to_datetime(base + ts, unit="us", utc=True),
            "created_timestamp": pd.to_datetime(base + ts + late, unit="us", utc=True),
            "customer_id": [f"c{i:02}" for i in rng.integers(0, N_CUSTOMERS, visits)[visit]],
            "item_id": np.where(np.isin(kind, ["search", "page"]), None, [f"i{i}" for i in rng.integers(0, N_ITEMS, n)]),
            "order_id": np.where(kind == "purchase", [f"o{v}" for v in visit], None),
            "session_id": np.where(visit % 10 == 0, None, [f"s{v}" for v in visit]),
            "quantity": 1,
            "price_cents": price,
            "revenue_cents": np.select([kind == "purchase", kind == "return"], [price, -price], 0),
            "is_outlier": False,
        }
    )
    for name in ("anonymous_id", "user_id", "decision_id", "query"):
        frame[name] = None
    return frame


def write(home, table, frame):
    tables.write(home, table, pa.Table.from_pandas(frame.reindex(columns=table.schema.names), table.schema, preserve_index=False))


def prepare(home, events):
    """A home with these events, a small catalogue and profiles; features built and applied."""
    write(home, tables.EVENTS, events)
    listed = {"item_id": [f"i{i}" for i in range(N_ITEMS + 1)], "category": "toys", "price_cents": 50}
    write(home, tables.ITEMS, pd.DataFrame(listed | {"event_timestamp": START, "created_timestamp": START + timedelta(days=2)}))
    who = {"customer_id": [f"c{i:02}" for i in range(N_CUSTOMERS)], "event_timestamp": START + timedelta(days=1)}
    write(home, tables.CUSTOMER_PROFILE, pd.DataFrame(who | {"age_band": "18-29", "gender": None, "region": "north"}))
    write(home, tables.CUSTOMER_CONSENT, pd.DataFrame(who | {"is_personalization_allowed": True}))
    known = {"identifier": [f"user_id:{i}" for i in range(N_CUSTOMERS)], "created_timestamp": START}
    write(home, tables.IDENTITIES, pd.DataFrame(who | known))
    report = features.build(home)
    feature_store.apply(home)
    return report


def enters(events):
    return events[["event_timestamp", "created_timestamp"]].max(axis=1)


@pytest.fixture(scope="module")
def events():
    return invented()


@pytest.fixture(scope="module")
def home(tmp_path_factory, events):
    home = tmp_path_factory.mktemp("home")
    prepare(home, events)
    return home


@pytest.fixture(scope="module")
def cut(events):
    """An instant in the middle of the log at which something became known."""
    return enters(events).sort_values().iloc[len(events) * 2 // 3]


def label_rows(events, key, until):
    """Instants until `until`, which is one of them: at and just after moments of knowledge, at random; unsorted, some twice."""
    rng = np.random.default_rng(6)
    known = enters(events)
    at = pd.concat([known, known + US, pd.Series(START + pd.to_timedelta(rng.integers(0, DAYS * 86_400, 80), unit="s"))])
    at = pd.concat([at[at <= until].sample(150, random_state=1), pd.Series([until] * 40)], ignore_index=True)
    who = {
        "customer_id": [f"c{i:02}" for i in rng.integers(0, N_CUSTOMERS + 1, 190)],
        "item_id": [f"i{i}" for i in rng.integers(0, 7, 190)],
    }
    rows = pd.DataFrame({key: who[key], "event_timestamp": at, "label": rng.integers(0, 2, 190)})
    return pd.concat([rows, rows.head(10)]).sample(frac=1, random_state=2)


def differing(left, right):
    """Names of the columns in which two frames of the same rows differ, bit for bit."""
    assert list(left.columns) == list(right.columns)
    return [name for name in left.columns if not left[name].reset_index(drop=True).equals(right[name].reset_index(drop=True))]


def leaks(home, other, rows, key):
    """Columns of the training frame that change when the log after the rows' last instant does."""
    service = next(name for name, value in SERVICES.items() if value == key)
    return differing(feature_store.training_frame(home, rows, service=service), feature_store.training_frame(other, rows, service=service))


@pytest.fixture(scope="module")
def truncated(tmp_path_factory, events, cut):
    """The same shop as it was known strictly before the cut."""
    home = tmp_path_factory.mktemp("truncated")
    prepare(home, events[enters(events) < cut])
    return home


@pytest.fixture(scope="module")
def permuted(tmp_path_factory, events, cut):
    """The same shop with another future: whatever became known at or after the cut happened to others, with other things."""
    later = enters(events) >= cut
    changed, rng = events.copy(), np.random.default_rng(8)
    for names in (["customer_id"], ["type", "item_id", "order_id"], ["price_cents", "revenue_cents"], ["session_id"]):
        changed.loc[later, names] = events.loc[later, names].to_numpy()[rng.permutation(int(later.sum()))]
    home = tmp_path_factory.mktemp("permuted")
    prepare(home, changed)
    return home


@pytest.mark.parametrize("key", SERVICES.values())
def test_features_at_an_instant_do_not_depend_on_what_became_known_later(home, truncated, permuted, events, cut, key):
    rows = label_rows(events, key, cut)
    assert leaks(home, truncated, rows, key) == []
    assert leaks(home, permuted, rows, key) == []


@pytest.mark.parametrize("key", SERVICES.values())
def test_join_that_includes_the_instant_is_reported_as_a_leak(home, truncated, permuted, events, cut, key, monkeypatch):
    """Control: the same check with `>=` in the join finds the label's own event in its features."""
    strict = offline_store._asof_query
    monkeypatch.setattr(offline_store, "_asof_query", lambda join: strict(join).replace("e._at > f._from", "e._at >= f._from"))
    rows = label_rows(events, key, cut)
    assert leaks(home, truncated, rows, key)
    assert leaks(home, permuted, rows, key)


@pytest.mark.parametrize("key", SERVICES.values())
def test_labels_shifted_into_the_future_are_reported_as_a_leak(home, truncated, events, cut, key):
    """Control: labels a moment later than the knowledge that was cut off see it."""
    assert leaks(home, truncated, label_rows(events, key, cut).assign(event_timestamp=lambda r: r["event_timestamp"] + US), key)


def test_events_known_late_are_not_seen_at_their_own_time(home, events):
    """Control of the clock: what happened before a label but was learnt after it must be missing there, and present later."""
    counted = events[~events["type"].isin(windows.NOT_BEHAVIOUR)]
    late = counted[counted["created_timestamp"] > counted["event_timestamp"] + timedelta(days=1)].iloc[0]
    at = pd.Series([late["event_timestamp"] + US, late["created_timestamp"], late["created_timestamp"] + US])
    mine = counted[counted["customer_id"] == late["customer_id"]]
    found = feature_store.training_frame(
        home, pd.DataFrame({"customer_id": late["customer_id"], "event_timestamp": at}), service="churn_v1"
    )
    assert found["events_total"].tolist() == [(enters(mine) < instant).sum() for instant in at]
    assert (mine["event_timestamp"] < at[0]).sum() > found["events_total"][0]


def test_training_frame_keeps_rows_order_index_and_labels(home, events, cut):
    rows = label_rows(events, "customer_id", cut).assign(session_events=-1)
    found = feature_store.training_frame(home, rows, service="intent_v1")
    pd.testing.assert_frame_equal(found[["customer_id", "event_timestamp", "label"]], rows[["customer_id", "event_timestamp", "label"]])
    assert found["session_events"].min() == 0  # the feature of that name, not the label table's column
    assert found.columns.is_unique
    stored = [f.name for view in (tables.CUSTOMER_ACTIVITY, tables.CUSTOMER_SESSION) for f in list(view.schema)[2:]]
    assert list(found.columns[3:]) == windows.derived_names(["region", *stored])
    nobody = found[found["customer_id"] == f"c{N_CUSTOMERS}"]
    assert len(nobody)
    assert nobody["events_total"].eq(0).all()
    assert nobody["region"].isna().all()


@pytest.mark.parametrize("offset_us", [0, 1])
def test_online_rows_equal_the_training_frame_at_the_same_instant(home, events, cut, offset_us):
    as_of = cut + offset_us * US
    feature_store.materialize(home, as_of=as_of)
    feast = feature_store.store(home)
    for service, key in SERVICES.items():
        ids = [f"c{i:02}" for i in range(N_CUSTOMERS)] if key == "customer_id" else [f"i{i}" for i in range(N_ITEMS + 1)]
        online = feast.get_online_features(feast.get_feature_service(service), [{key: name} for name in ids]).to_df()
        rows = pd.DataFrame({key: ids, "event_timestamp": as_of})
        offline = feature_store.training_frame(home, rows, service=service).drop(columns=[key, "event_timestamp"])
        numbers = [c for c in online.columns if c not in (key, "region")]
        seen = windows.derive(online.astype(dict.fromkeys(numbers, "float64"))[_stored(feast, service)], as_of)
        assert seen["events_total" if key == "customer_id" else "item_views_total"].sum() > 0
        pd.testing.assert_frame_equal(seen, offline, check_exact=True)


def _stored(feast, service):
    return [f.name for projection in feast.get_feature_service(service).feature_view_projections for f in projection.features]


def test_materialising_a_later_instant_moves_the_online_rows(home, events, cut):
    """Control of the test above: the event that becomes known at the cut is not online as of it, and is one microsecond later."""
    customer = events.loc[(enters(events) == cut) & ~events["type"].isin(windows.NOT_BEHAVIOUR), "customer_id"].iloc[0]
    seen = []
    for as_of in (cut, cut + US):
        feature_store.materialize(home, as_of=as_of, views=["customer_activity"])
        row = feature_store.store(home).get_online_features(["customer_activity:events_total"], [{"customer_id": customer}]).to_dict()
        seen.append(row["events_total"][0])
    assert seen[1] > seen[0]


def test_materialize_counts_its_rows_and_leaves_out_what_was_never_written(home, cut):
    assert feature_store.materialize(home, as_of=cut, views=["customer_scores"]) == 0
    assert feature_store.materialize(home, as_of=cut, views=["customer_profile", "identifier_customer"]) == 2 * N_CUSTOMERS
    owner = feature_store.store(home).get_online_features(["identifier_customer:customer_id"], [{"identifier": "user_id:3"}]).to_dict()
    assert owner["customer_id"] == ["c03"]
    with pytest.raises(StoreError, match="found \\['no_such_view'\\]"):
        feature_store.materialize(home, as_of=cut, views=["no_such_view"])
    with sqlite3.connect(home / "feature_store" / "online.db") as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_killed_materialisation_does_not_stop_the_next_reader(home, cut):
    from feast.feature_view import FeatureViewState

    feature_store.materialize(home, as_of=cut, views=["customer_activity"])
    feast = feature_store.store(home)
    view = feast.get_feature_view("customer_activity")
    view.state = FeatureViewState.MATERIALIZING
    feast.registry.apply_feature_view(view, feast.project, commit=True)
    rows = pd.DataFrame({"customer_id": ["c01"], "event_timestamp": [cut]})
    assert feature_store.training_frame(home, rows, service="churn_v1")["events_total"].notna().all()
    assert feature_store.materialize(home, as_of=cut, views=["customer_activity"]) > 0


def test_build_gives_the_same_bytes_again_whatever_the_size_of_its_ranges(home, events, tmp_path, monkeypatch):
    wanted = [tables.read(home, t) for t in (tables.CUSTOMER_ACTIVITY, tables.CUSTOMER_SESSION, tables.ITEM_ACTIVITY)]
    prepare(tmp_path, events)
    for table in (tables.CUSTOMER_ACTIVITY, tables.CUSTOMER_SESSION, tables.ITEM_ACTIVITY):
        assert tables.content_hash(tmp_path, table) == tables.content_hash(home, table)
    monkeypatch.setattr(features, "BUCKET_EVENTS", 150)
    report = features.build(tmp_path)
    assert len(tables.files(tmp_path, tables.CUSTOMER_ACTIVITY)) > 1
    found = [tables.read(tmp_path, t) for t in (tables.CUSTOMER_ACTIVITY, tables.CUSTOMER_SESSION, tables.ITEM_ACTIVITY)]
    for one, other, rows in zip(found, wanted, (report.customer_activity, report.customer_session, report.item_activity), strict=True):
        pd.testing.assert_frame_equal(one, other)
        assert len(one) == rows


def test_catalogue_tells_the_price_and_age_of_an_item_nobody_looked_at(home):
    at = [START + timedelta(days=2), START + timedelta(days=2) + US]
    rows = pd.DataFrame({"item_id": f"i{N_ITEMS}", "event_timestamp": at})
    found = feature_store.training_frame(home, rows, service="recommender_v1")
    assert np.isnan(found["item_price_cents"][0])  # not known before the catalogue was
    assert (found["item_price_cents"][1], found["item_views_total"][1]) == (50, 0)
    assert found["item_first_seen_age_days"][1] == pytest.approx(2)


def test_log_without_events_gives_empty_tables_and_none_at_all_says_what_to_do(tmp_path):
    with pytest.raises(StoreError, match="ingest events first"):
        features.build(tmp_path)
    report = prepare(tmp_path, invented().head(0))
    assert (report.customer_activity, report.customer_session) == (0, 0)
    rows = pd.DataFrame({"customer_id": ["c01"], "event_timestamp": [START]})
    assert feature_store.training_frame(tmp_path, rows, service="intent_v1")["events_total"].tolist() == [0]


def test_unknown_service_or_missing_key_says_what_to_do(home):
    rows = pd.DataFrame({"customer_id": ["c01"], "event_timestamp": [START]})
    with pytest.raises(StoreError, match="rapport features apply"):
        feature_store.training_frame(home, rows, service="churn_v99")
    with pytest.raises(InputError, match="item_id"):
        feature_store.training_frame(home, rows, service="recommender_v1")
