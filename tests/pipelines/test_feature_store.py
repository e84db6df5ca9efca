"""Feature tables -> registry, training frames and online rows: both paths give the same value, and older definitions are told apart."""

import shutil
import sqlite3
from contextlib import closing
from datetime import timedelta

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from pipelines import feature_store, tables, windows
from pipelines.errors import InputError, StoreError
from pipelines.online import schema as online_schema
from pipelines.online.feast_format import key_encoder, table_of
from pipelines.online.writer import OnlineWriter, Row

START = pd.Timestamp("2025-01-01", tz="UTC")
US = pd.Timedelta(1, "us")
DAYS = 40
CUSTOMERS, ITEMS = [f"c{i:02}" for i in range(12)], [f"i{i}" for i in range(6)]
KEYS = {"churn_v1": "customer_id", "intent_v1": "customer_id", "recommender_v1": "item_id"}


def steps(rng, table, keys, n):
    """Random change points, as many as `n` a key: whole numbers, some of the instants null."""
    at = START + pd.to_timedelta(rng.integers(0, DAYS * 86_400_000_000, n * len(keys)), unit="us")
    frame = pd.DataFrame({table.key[0]: np.repeat(keys, n), "event_timestamp": at}).drop_duplicates()
    for field in list(table.schema)[2:]:
        values = pd.array(rng.integers(-50, 10**15, len(frame)), dtype="Int64")
        if field.name.endswith("_at"):
            values[rng.random(len(frame)) < 0.3] = pd.NA
        frame[field.name] = values
    return frame


def write(home, table, frame):
    tables.write(home, table, pa.Table.from_pandas(frame.reindex(columns=table.schema.names), table.schema, preserve_index=False))


def fill(home, seed=0):
    """A home whose feature tables hold random steps, applied."""
    rng = np.random.default_rng(seed)
    write(home, tables.CUSTOMER_ACTIVITY, steps(rng, tables.CUSTOMER_ACTIVITY, CUSTOMERS, 30))
    write(home, tables.CUSTOMER_SESSION, steps(rng, tables.CUSTOMER_SESSION, CUSTOMERS[:-1], 30))
    write(home, tables.ITEM_ACTIVITY, steps(rng, tables.ITEM_ACTIVITY, ITEMS, 30))
    who = {"customer_id": CUSTOMERS, "event_timestamp": START + timedelta(days=1)}
    write(home, tables.CUSTOMER_PROFILE, pd.DataFrame(who | {"age_band": "18-29", "gender": None, "region": "north"}))
    names = {"identifier": [f"user_id:{i}" for i in range(len(CUSTOMERS))], "created_timestamp": START}
    write(home, tables.IDENTITIES, pd.DataFrame(who | names))
    feature_store.apply(home)


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    home = tmp_path_factory.mktemp("filled")
    fill(home)
    return home


@pytest.fixture
def home(filled, tmp_path):
    return shutil.copytree(filled, tmp_path / "home", symlinks=True)


@pytest.fixture(scope="module")
def cut(filled):
    """An instant in the middle at which something of a customer changed."""
    return tables.read(filled, tables.CUSTOMER_ACTIVITY)["event_timestamp"].sort_values().iloc[180]


def online_frame(home, service, ids):
    feast = feature_store.store(home)
    key = KEYS[service]
    found = feast.get_online_features(feast.get_feature_service(service), [{key: name} for name in ids]).to_df()
    names = [f.name for p in feast.get_feature_service(service).feature_view_projections for f in p.features]
    return found[names]


def online_value(home, view, feature, **key):
    return feature_store.store(home).get_online_features([f"{view}:{feature}"], [key]).to_dict()[feature][0]


# -- training frames ---------------------------------------------------------------------------------------------------


def test_training_frame_keeps_rows_order_index_and_labels(filled, cut):
    rng = np.random.default_rng(3)
    at = cut + pd.to_timedelta(rng.integers(-(10**12), 10**12, 60), unit="us")
    rows = pd.DataFrame({"customer_id": rng.choice([*CUSTOMERS, "nobody"], 60), "event_timestamp": at, "label": range(60)})
    rows = pd.concat([rows, rows.head(5)]).sample(frac=1, random_state=2).assign(session_events=-1)
    found = feature_store.training_frame(filled, rows, service="intent_v1")
    pd.testing.assert_frame_equal(found[["customer_id", "event_timestamp", "label"]], rows[["customer_id", "event_timestamp", "label"]])
    assert (found["session_events"] != -1).all()  # the feature of that name, not the label table's column
    assert found.columns.is_unique
    feast = feature_store.store(filled)
    stored = [f.name for p in feast.get_feature_service("intent_v1").feature_view_projections for f in p.features]
    assert list(found.columns[3:]) == windows.derived_names(stored)
    nobody = found[found["customer_id"] == "nobody"]
    assert len(nobody)
    assert nobody["events_total"].eq(0).all()
    assert nobody["region"].isna().all()


def test_unknown_service_or_missing_key_says_what_to_do(filled):
    rows = pd.DataFrame({"customer_id": ["c01"], "event_timestamp": [START]})
    with pytest.raises(StoreError, match="rapport features apply"):
        feature_store.training_frame(filled, rows, service="churn_v99")
    with pytest.raises(InputError, match="item_id"):
        feature_store.training_frame(filled, rows, service="recommender_v1")


# -- materialize -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset_us", [0, 1])
def test_online_rows_equal_the_training_frame_at_the_same_instant(home, cut, offset_us):
    as_of = cut + offset_us * US
    feature_store.materialize(home, as_of=as_of)
    for service, key in KEYS.items():
        ids = [*(CUSTOMERS if key == "customer_id" else ITEMS), "nobody"]
        online = online_frame(home, service, ids)
        rows = pd.DataFrame({key: ids, "event_timestamp": as_of})
        offline = feature_store.training_frame(home, rows, service=service).drop(columns=[key, "event_timestamp"])
        numbers = [c for c in online.columns if c != "region"]
        seen = windows.derive(online.astype(dict.fromkeys(numbers, "float64")), as_of)
        assert seen.iloc[:-1, -1].notna().any()
        pd.testing.assert_frame_equal(seen, offline, check_exact=True)


def test_materialising_a_later_instant_moves_the_online_rows(home, cut):
    """Control of the test above: the change at the cut is not online as of it, and is one microsecond later; and back again."""
    rows = tables.read(home, tables.CUSTOMER_ACTIVITY)
    customer = rows.loc[rows["event_timestamp"] == cut, "customer_id"].iloc[0]
    seen = []
    for as_of in (cut, cut + US, cut):
        feature_store.materialize(home, as_of=as_of, views=["customer_activity"])
        seen.append(online_value(home, "customer_activity", "events_total", customer_id=customer))
    assert seen[0] == seen[2] != seen[1]


def test_materialize_counts_its_rows_and_leaves_out_what_was_never_written(home, cut):
    assert feature_store.materialize(home, as_of=cut, views=["customer_scores"]) == 0
    assert feature_store.materialize(home, as_of=cut, views=["customer_profile", "identifier_customer"]) == 2 * len(CUSTOMERS)
    assert online_value(home, "identifier_customer", "customer_id", identifier="user_id:3") == "c03"
    with pytest.raises(StoreError, match="found \\['no_such_view'\\]"):
        feature_store.materialize(home, as_of=cut, views=["no_such_view"])
    with closing(sqlite3.connect(home / "feature_store" / "online.db")) as db:
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


# -- beside the stream -------------------------------------------------------------------------------------------------


def stream(home, view, key, values, at):
    with closing(OnlineWriter(home)) as online, online.transaction():
        online.write(view, [Row(key, values, event_us=at.value // 1_000)])


def test_load_keeps_what_was_streamed_since_and_keys_that_no_table_knows(home, cut):
    feature_store.materialize(home, as_of=cut)
    later, known, new = cut + timedelta(hours=1), CUSTOMERS[0], "c-new"
    with closing(OnlineWriter(home)) as online, online.transaction():
        at = later.value // 1_000
        online.write("identifier_customer", [Row("user_id:new", {"customer_id": new}, event_us=at)], join_key="identifier")
        online.write("customer_activity", [Row(c, {"events_total": 7}, event_us=at) for c in (known, new)])
    feature_store.materialize(home, as_of=cut)
    for customer in (known, new):
        assert online_value(home, "customer_activity", "events_total", customer_id=customer) == 7
    feature_store.materialize(home, as_of=START + timedelta(days=DAYS + 1))  # the tables know newer ones by now
    assert online_value(home, "customer_activity", "events_total", customer_id=known) != 7
    assert online_value(home, "customer_activity", "events_total", customer_id=new) == 7


def test_customer_whom_no_identifier_names_is_taken_out_of_what_was_streamed(home, cut):
    feature_store.materialize(home, as_of=cut)
    stream(home, "customer_activity", "c-merged-away", {"events_total": 7}, cut)
    assert online_value(home, "customer_activity", "events_total", customer_id="c-merged-away") == 7
    feature_store.materialize(home, as_of=cut)
    assert online_value(home, "customer_activity", "events_total", customer_id="c-merged-away") is None
    assert online_value(home, "customer_activity", "events_total", customer_id=CUSTOMERS[0]) is not None


def test_view_in_which_nothing_was_streamed_is_what_its_table_says(home, cut):
    """The control of the guard: no row is newer than the tables, so none is kept against them."""
    feature_store.materialize(home, as_of=cut + timedelta(days=5))
    stream(home, "customer_session", CUSTOMERS[0], {"session_events": 1}, cut)  # another view
    write(home, tables.CUSTOMER_ACTIVITY, tables.read(home, tables.CUSTOMER_ACTIVITY).query("customer_id != 'c03'"))
    feature_store.materialize(home, as_of=cut)
    assert online_value(home, "customer_activity", "events_total", customer_id="c03") is None
    rows = pd.DataFrame({"customer_id": ["c04"], "event_timestamp": [cut]})
    offline = feature_store.training_frame(home, rows, service="churn_v1")["events_total"].iloc[0]
    assert online_value(home, "customer_activity", "events_total", customer_id="c04") == offline


# -- two join keys -----------------------------------------------------------------------------------------------------


@pytest.fixture
def pairs(monkeypatch):
    """definitions.py with two views of two join keys more; customers come first in Feast's order in the one, last in the other."""
    from feast import Entity, FeatureView, Field, FileSource, ValueType
    from feast.types import Int64, String

    from feature_repo import definitions

    keys = {"customer_id": definitions.customer}
    for number, (name, second) in enumerate({"pair_z": "thing_id", "pair_a": "a_kind"}.items()):
        keys[second] = Entity(name=f"entity_{second}", join_keys=[second], value_type=ValueType.STRING)
        source = FileSource(name=name, path=f"tables/{name}", timestamp_field="event_timestamp")
        fields = [Field(name="customer_id", dtype=String), Field(name=second, dtype=String), Field(name=f"n{number}", dtype=Int64)]
        view = FeatureView(name=name, entities=[definitions.customer, keys[second]], schema=fields, source=source, ttl=timedelta(0))
        for made in (keys[second], source, view):
            monkeypatch.setattr(definitions, f"made_{made.name}_{type(made).__name__}", made, raising=False)
    return {"pair_z": ("thing_id", "n0"), "pair_a": ("a_kind", "n1")}


def write_pairs(home, name, second, value, rows):
    frame = pd.DataFrame(rows, columns=["customer_id", second, "event_timestamp", value])
    schema = pa.schema({"customer_id": pa.string(), second: pa.string(), "event_timestamp": tables.TIME, value: pa.int64()})
    declared = tables.Table(name, ("customer_id", second), "event_timestamp", None, schema)
    tables.write(home, declared, pa.Table.from_pandas(frame, schema, preserve_index=False))


def test_views_with_two_join_keys_are_loaded_streamed_cleared_and_erased(home, pairs):
    feature_store.apply(home)
    when = [START + timedelta(days=n) for n in range(3)]
    for name, (second, value) in pairs.items():
        rows = [(c, s, when[n], 10 * n + i) for n in range(2) for i, (c, s) in enumerate([("c00", "x"), ("c00", "y"), ("c01", "x")])]
        write_pairs(home, name, second, value, rows)
        assert feature_store.materialize(home, as_of=when[2], views=[name]) == 3
        assert online_value(home, name, value, customer_id="c00", **{second: "y"}) == 11
        assert online_value(home, name, value, customer_id="c01", **{second: "y"}) is None
        write_pairs(home, name, second, value, rows[:2])
        assert feature_store.materialize(home, as_of=when[2], views=[name]) == 2
    with closing(OnlineWriter(home)) as online:
        join_key = ("customer_id", "thing_id")
        with online.transaction():
            online.write("pair_z", [Row(("c00", "x"), {"n0": 5}, event_us=when[2].value // 1_000)], join_key=join_key)
            with pytest.raises(StoreError, match="expected customer_id"):
                online.write("pair_z", [Row("c00", {"n0": 5}, event_us=0)])
        assert online.read("pair_z", "n0", [("c00", "x"), ("c00", "z")], join_key=join_key) == {("c00", "x"): ("5", when[2].value // 1_000)}
        with online.transaction():
            online.write("pair_z", [Row(("c0", "x"), {"n0": 6}, event_us=1)], join_key=join_key)
            assert online.remove_customers(["c00"]) == 4
        assert online.read("pair_z", "n0", [("c00", "x"), ("c0", "x")], join_key=join_key).keys() == {("c0", "x")}
        assert online.count("pair_a") == 0


# -- older definitions -------------------------------------------------------------------------------------------------


@pytest.fixture
def older(filled, tmp_path):
    """older(change): a home that was applied and materialised by other definitions; `change` is given a patch and the definitions."""
    from feature_repo import definitions

    def make(change):
        home = tmp_path / "older"
        fill(home)
        with pytest.MonkeyPatch.context() as patch:
            change(patch, definitions)
            feature_store.apply(home)
            feature_store.materialize(home, as_of=START + timedelta(days=20))
        return home

    return make


def view_with(view, *, without=(), more=()):
    from feast import FeatureView, Field

    keys = [Field(name=c.name, dtype=c.dtype) for c in view.entity_columns]
    fields = [f for f in view.features if f.name not in without] + list(more)
    entities = [e for e in feature_store._declared() if getattr(e, "join_key", None) in {k.name for k in keys}]
    return FeatureView(name=view.name, entities=entities, schema=[*keys, *fields], source=view.batch_source, ttl=view.ttl)


def without_a_column(patch, definitions):
    patch.setattr(definitions, "customer_session", view_with(definitions.customer_session, without=["session_views"]))


def with_another_type(patch, definitions):
    from feast import Field
    from feast.types import String

    field = Field(name="session_views", dtype=String)
    patch.setattr(definitions, "customer_session", view_with(definitions.customer_session, without=["session_views"], more=[field]))


def refusals(home):
    """What those that use the store say; nothing where they do not mind."""
    told = []
    try:
        feature_store.materialize(home, as_of=START + timedelta(days=20))
    except StoreError as error:
        told.append(str(error))
    with closing(OnlineWriter(home)) as online:
        try:
            with online.transaction():
                online.write("customer_session", [Row("c01", {"session_views": 3}, event_us=1)])
        except (StoreError, InputError) as error:
            told.append(str(error))
    return told


def test_store_of_older_definitions_is_refused_until_it_is_applied_and_then_shows_new_columns_as_null(older):
    home = older(without_a_column)
    said = refusals(home)
    assert len(said) == 2
    assert all("rapport features apply" in text and "session_views" in text for text in said)
    before = online_value(home, "customer_session", "session_events", customer_id="c01")
    feature_store.apply(home)
    assert online_value(home, "customer_session", "session_events", customer_id="c01") == before is not None
    assert online_value(home, "customer_session", "session_views", customer_id="c01") is None
    assert refusals(home) == []
    assert online_value(home, "customer_session", "session_views", customer_id="c02") is not None


def test_values_of_another_type_are_taken_out_by_apply(older):
    home = older(lambda patch, definitions: None)
    with pytest.MonkeyPatch.context() as patch:
        from feature_repo import definitions

        with_another_type(patch, definitions)
        assert any("Int64" in text or "String" in text for text in refusals(home))
        feature_store.apply(home)
        assert online_value(home, "customer_session", "session_views", customer_id="c01") is None
        assert online_value(home, "customer_session", "session_events", customer_id="c01") is not None


def test_table_of_a_view_that_is_declared_no_more_is_dropped(home, pairs, monkeypatch):
    from feature_repo import definitions

    feature_store.apply(home)
    for name in [n for n in vars(definitions) if n.startswith("made_pair_z")]:
        monkeypatch.delattr(definitions, name)
    feature_store.apply(home)
    with closing(OnlineWriter(home)) as online:
        assert (online.has("pair_z"), online.has("pair_a")) == (False, True)
        assert "pair_z" not in online.schema
    assert "pair_z" not in [view.name for view in feature_store.store(home).list_feature_views()]


def test_view_whose_join_key_changed_is_emptied(home, pairs, monkeypatch):
    feature_store.apply(home)
    with closing(sqlite3.connect(home / "feature_store" / "online.db")) as db, db:
        views = online_schema.get(db)
        online_schema.put(db, views | {"pair_a": online_schema.ViewSchema("a_kind", {"n1": "Int64"})})
        db.execute(
            f'INSERT INTO "{table_of("pair_a")}" (entity_key, feature_name, value) VALUES (?, ?, ?)',
            (key_encoder("a_kind")("x"), "n1", b"\x20\x01"),
        )
    feature_store.apply(home)
    with closing(OnlineWriter(home)) as online:
        assert online.count("pair_a") == 0
        assert online.schema["pair_a"].join_key == ("customer_id", "a_kind")


def test_store_that_never_noted_its_definitions_is_refused_and_mended(home, cut):
    """As a store is that an older version of the program applied."""
    with closing(sqlite3.connect(home / "feature_store" / "online.db")) as db, db:
        db.execute(f"DROP TABLE {online_schema.TABLE}")
    with pytest.raises(StoreError, match="rapport features apply"):
        feature_store.materialize(home, as_of=cut)
    feature_store.apply(home)
    assert feature_store.materialize(home, as_of=cut) > 0


def test_table_that_was_built_before_a_column_was_declared_is_refused_in_words(home, cut, monkeypatch):
    from feast import Field
    from feast.types import Int64

    from feature_repo import definitions

    field = Field(name="session_sighs", dtype=Int64)
    monkeypatch.setattr(definitions, "customer_session", view_with(definitions.customer_session, more=[field]))
    feature_store.apply(home)
    with pytest.raises(StoreError, match=r"session_sighs.*rapport features build"):
        feature_store.materialize(home, as_of=cut, views=["customer_session"])
    rows = pd.DataFrame({"customer_id": ["c01"], "event_timestamp": [cut]})
    with pytest.raises(StoreError, match=r"session_sighs.*rapport features build"):
        feature_store.store(home).get_historical_features(rows, ["customer_session:session_sighs"]).to_df()


def test_features_of_a_type_that_the_store_does_not_keep_are_refused(home, monkeypatch):
    from feast import Field
    from feast.types import Array, Float32

    from feature_repo import definitions

    odd = view_with(definitions.customer_session, more=[Field(name="vector", dtype=Array(Float32))])
    monkeypatch.setattr(definitions, "customer_session", odd)
    with pytest.raises(InputError, match="vector"):
        feature_store.apply(home)
