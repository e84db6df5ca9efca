"""Events -> feature tables -> training frames: no row sees what was not yet known."""

import contextlib
import dataclasses
import shutil
import subprocess
import sys
from datetime import timedelta

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from pipelines import engine, feature_store, features, offline_store, provenance, ranges, tables, windows
from pipelines.errors import StoreError

START = pd.Timestamp("2025-01-01", tz="UTC")
US = pd.Timedelta(1, "us")
SERVICES = pytest.mark.parametrize("service", ["intent_v1", "recommender_v1", "ranker_v1"])
CATEGORIES = {"i0": "toys", "i1": "books", "i2": "toys", "i3": None, "i4": "books", "i5": "toys"}
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
            "received_timestamp": pd.to_datetime(base + ts + late, unit="us", utc=True),
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
    listed = {"item_id": [f"i{i}" for i in range(N_ITEMS + 1)], "category": CATEGORIES.values(), "price_cents": 50}
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


def label_rows(events, until):
    """Instants until `until`, which is one of them: at and just after moments of knowledge, at random; unsorted, some twice."""
    rng = np.random.default_rng(6)
    known = enters(events)
    at = pd.concat([known, known + US, pd.Series(START + pd.to_timedelta(rng.integers(0, DAYS * 86_400, 80), unit="s"))])
    at = pd.concat([at[at <= until].sample(150, random_state=1), pd.Series([until] * 40)], ignore_index=True)
    items = [f"i{i}" for i in rng.integers(0, 7, 190)]
    rows = {"customer_id": [f"c{i:02}" for i in rng.integers(0, N_CUSTOMERS + 1, 190)], "item_id": items, "event_timestamp": at}
    rows |= {"category": [CATEGORIES.get(i) or "music" for i in items], "label": rng.integers(0, 2, 190)}
    return pd.concat([pd.DataFrame(rows), pd.DataFrame(rows).head(10)]).sample(frac=1, random_state=2)


def differing(left, right):
    """Names of the columns in which two frames of the same rows differ, bit for bit."""
    assert list(left.columns) == list(right.columns)
    return [name for name in left.columns if not left[name].reset_index(drop=True).equals(right[name].reset_index(drop=True))]


def leaks(home, other, rows, service):
    """Columns of the training frame that change when the log after the rows' last instant does."""
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


@SERVICES
def test_features_at_an_instant_do_not_depend_on_what_became_known_later(home, truncated, permuted, events, cut, service):
    rows = label_rows(events, cut)
    assert leaks(home, truncated, rows, service) == []
    assert leaks(home, permuted, rows, service) == []


@SERVICES
def test_join_that_includes_the_instant_is_reported_as_a_leak(home, truncated, permuted, events, cut, service, monkeypatch):
    """Control: the same check with `>=` in the join finds the label's own event in its features."""
    strict = offline_store._asof_query
    monkeypatch.setattr(offline_store, "_asof_query", lambda join: strict(join).replace("e._at > f._from", "e._at >= f._from"))
    rows = label_rows(events, cut)
    assert leaks(home, truncated, rows, service)
    assert leaks(home, permuted, rows, service)


@SERVICES
def test_labels_shifted_into_the_future_are_reported_as_a_leak(home, truncated, events, cut, service):
    """Control: labels a moment later than the knowledge that was cut off see it."""
    assert leaks(home, truncated, label_rows(events, cut).assign(event_timestamp=lambda r: r["event_timestamp"] + US), service)


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


def test_what_a_request_told_is_in_the_training_frame_beside_the_features_it_is_set_against(home, events, cut):
    rows = label_rows(events, cut).assign(request_price_cents=lambda r: np.arange(len(r)) * 10.0)
    found = feature_store.training_frame(home, rows, service="ranker_v1")
    without = feature_store.training_frame(home, rows.drop(columns="request_price_cents"), service="ranker_v1")
    assert set(found) - set(without) == {"request_price_cents", "request_price_to_viewed", "request_price_to_bought"}
    assert found["request_price_cents"].tolist() == rows["request_price_cents"].tolist()
    usual = found["average_viewed_cents_30d"]
    pd.testing.assert_series_equal(
        found["request_price_to_viewed"], rows["request_price_cents"] / usual, check_names=False, check_exact=True
    )
    assert usual.notna().sum() > 20


def test_build_gives_the_same_bytes_again_whatever_the_size_of_its_ranges(home, events, tmp_path, monkeypatch):
    wanted = [tables.read(home, t) for t in tables.FEATURE_TABLES]
    prepare(tmp_path, events)
    for table in tables.FEATURE_TABLES:
        assert tables.content_hash(tmp_path, table) == tables.content_hash(home, table)
    monkeypatch.setattr(ranges, "BUCKET_EVENTS", 150)
    monkeypatch.setattr(ranges, "HELD_BYTES", 0)
    report = features.build(tmp_path)
    assert len(tables.files(tmp_path, tables.CUSTOMER_ACTIVITY)) > 1
    for table, other in zip(tables.FEATURE_TABLES, wanted, strict=True):
        found = tables.read(tmp_path, table)
        pd.testing.assert_frame_equal(found, other)
        assert len(found) == getattr(report, table.name) > 0
        assert not found.duplicated([*table.key, "event_timestamp"]).any()


@pytest.mark.parametrize(
    ("table", "spec"),
    [(tables.CUSTOMER_ITEM, windows.CUSTOMER_ITEM), (tables.ITEM_ACTIVITY, windows.ITEM_ACTIVITY)],
    ids=["customer_item", "item_activity"],
)
def test_tables_hold_the_rows_of_the_definition(home, table, spec):
    """What arithmetic on arrays makes of the ranges is what the Ibis expression makes of all events at once."""
    with engine.connect(home) as con:
        events, items = (ranges.open_table(con, home, t) for t in (tables.EVENTS, tables.ITEMS))
        told = features.of_items(events, items) if table is tables.ITEM_ACTIVITY else events
        wanted = windows.changelog(told, spec).order_by(*spec.key, "event_timestamp").to_pyarrow()
    assert tables.read_arrow(home, table).combine_chunks().equals(tables.conform(table, wanted).combine_chunks())


def newest(home, table):
    """What every key has at last, long after its windows have emptied."""
    return tables.read(home, table).sort_values("event_timestamp").groupby(list(table.key)).tail(1).set_index(list(table.key))


def test_pairs_of_customer_and_item_or_category_hold_what_happened_to_them(home, events):
    counted = events[~events["type"].isin(windows.NOT_BEHAVIOUR) & events["item_id"].notna()]
    counted = counted.assign(category=counted["item_id"].map(CATEGORIES))
    for table, key in ((tables.CUSTOMER_ITEM, "item_id"), (tables.CUSTOMER_CATEGORY, "category")):
        found, rows = newest(home, table), counted.dropna(subset=key)
        views = rows["type"].eq("view").groupby([rows["customer_id"], rows[key]]).sum()
        assert found[f"{table.name}_views_total"].sort_index().to_dict() == views.sort_index().to_dict()
        assert found[f"{table.name}_views_30d"].eq(0).all()
        bought = rows[rows["type"] == "purchase"].groupby(["customer_id", key])["event_timestamp"].max()
        assert (
            found[f"{table.name}_last_bought_at"].dropna().sort_index() == pd.DatetimeIndex(bought.sort_index()).as_unit("us").asi8
        ).all()
    assert None not in set(newest(home, tables.CUSTOMER_CATEGORY).index.get_level_values("category"))


def test_merging_people_moves_no_item_and_items_know_nothing_before_it_was_received(events, tmp_path, monkeypatch):
    write(tmp_path, tables.EVENTS, events)
    features.build(tmp_path)
    before = tables.read(tmp_path, tables.ITEM_ACTIVITY)
    mine = events["customer_id"] == "c01"  # is found out to be another's, two days after all was over
    merged = events.assign(customer_id=events["customer_id"].where(~mine, "c02"))
    merged["created_timestamp"] = events["created_timestamp"].where(~mine, enters(events).max() + timedelta(days=2))
    write(tmp_path, tables.EVENTS, merged)
    features.build(tmp_path)
    pd.testing.assert_frame_equal(tables.read(tmp_path, tables.ITEM_ACTIVITY), before)
    # Control: counted from when we knew whose they are, they move.
    monkeypatch.setattr(features, "of_items", lambda e, items: e.filter(e["item_id"].notnull()))
    features.build(tmp_path)
    assert not tables.read(tmp_path, tables.ITEM_ACTIVITY).equals(before)


def test_events_written_before_their_receipt_was_noted_count_for_items_when_they_happened(tmp_path):
    """An older file has no such column at all."""
    row = {"event_timestamp": START, "created_timestamp": START + timedelta(days=1), "type": "view", "item_id": "i1", "customer_id": "c1"}
    older = dataclasses.replace(tables.EVENTS, schema=pa.schema([f for f in tables.EVENTS.schema if f.name != "received_timestamp"]))
    write(tmp_path, older, pd.DataFrame([row]))
    features.build(tmp_path)
    assert tables.read(tmp_path, tables.ITEM_ACTIVITY)["event_timestamp"].min() == START
    assert tables.read(tmp_path, tables.CUSTOMER_ITEM)["event_timestamp"].min() == START + timedelta(days=1)


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
    assert (report.customer_activity, report.customer_session, report.customer_item, report.customer_category) == (0, 0, 0, 0)
    rows = pd.DataFrame({"customer_id": ["c01"], "event_timestamp": [START]})
    assert feature_store.training_frame(tmp_path, rows, service="intent_v1")["events_total"].tolist() == [0]


@pytest.mark.slow
def test_customer_with_a_hundred_thousand_events_absurd_prices_and_a_jumping_clock_is_counted_exactly(tmp_path):
    """One customer, one item: nulls, the largest prices and quantities that are let in, and times in 1990 and the year 2100."""
    from pipelines.events import MAX_PRICE_CENTS, MAX_QUANTITY
    from pipelines.tiles import Tiles

    n, rng = 100_000, np.random.default_rng(2)
    base = START.value // 1_000 + np.sort(rng.integers(0, 200 * 86_400, n)) * 1_000_000
    ts = base + rng.choice([0, 0, 0, 0, -35 * 365 * 86_400_000_000, 75 * 365 * 86_400_000_000], n)
    kind = rng.choice(["view", "purchase", "cart_add", "return", "search"], n)
    price = pd.array(rng.choice([0, 5, MAX_PRICE_CENTS], n), dtype="Int64")
    price[rng.random(n) < 0.3] = pd.NA
    sold = np.where(kind == "purchase", MAX_PRICE_CENTS * MAX_QUANTITY, 0)
    item = np.where(kind == "search", None, "i1")
    frame = pd.DataFrame({"source": "shop", "type": kind, "customer_id": "c1", "item_id": item, "order_id": None, "session_id": None})
    frame = frame.assign(price_cents=price, revenue_cents=sold, quantity=MAX_QUANTITY, ts=ts, enter=np.maximum(ts, base))
    for name, us in (("event_timestamp", ts), ("created_timestamp", base), ("received_timestamp", base)):
        frame[name] = pd.to_datetime(us, unit="us", utc=True)
    write(tmp_path, tables.EVENTS, frame)
    features.build(tmp_path)
    assert newest(tmp_path, tables.CUSTOMER_ACTIVITY)["events_total"].tolist() == [n]
    assert tables.read(tmp_path, tables.CUSTOMER_SESSION)["session_cart_cents"].max() > 0
    found = tables.read(tmp_path, tables.ITEM_ACTIVITY)
    state = Tiles(windows.ITEM_ACTIVITY)
    rows = frame[kind != "search"].sort_values("enter")[["type", "ts", "enter", "price_cents", "revenue_cents"]].astype(object)
    for row in rows.where(rows.notna(), None).to_dict("records"):
        state.add(row, row["enter"])
    state.advance(2**62)
    last = newest(tmp_path, tables.ITEM_ACTIVITY).iloc[0]
    assert state.values() == {name: None if pd.isna(last[name]) else int(last[name]) for name in windows.ITEM_ACTIVITY.columns()}
    assert found["item_revenue_cents_30d"].max() > 0


def ingested_in_the_middle(home, events, monkeypatch):
    """Build while an ingest puts another version in the place of events and items, between customers and items."""
    real = ranges.Ranges.drop

    def drop(self):
        real(self)
        write(home, tables.EVENTS, events.head(60))
        tables.drop(home, tables.ITEMS)

    monkeypatch.setattr(ranges.Ranges, "drop", drop)
    monkeypatch.setattr(ranges, "HELD_BYTES", 0)  # a large table is read from its files again
    features.build(home)


def test_ingest_during_a_build_is_in_the_next_one_and_the_tables_are_known_to_be_older(home, events, tmp_path, monkeypatch):
    shutil.copytree(home, tmp_path / "home", symlinks=True)
    ingested_in_the_middle(tmp_path / "home", events, monkeypatch)
    for table in tables.FEATURE_TABLES:
        assert tables.content_hash(tmp_path / "home", table) == tables.content_hash(home, table)
        assert provenance.is_outdated(tmp_path / "home", table.name)
        assert not provenance.is_outdated(home, table.name)
    assert not list((tmp_path / "home" / "tables").glob(".snapshot*"))
    write(tmp_path / "home", tables.CUSTOMER_ITEM, tables.read(home, tables.CUSTOMER_ITEM))
    assert not provenance.is_outdated(tmp_path / "home", "customer_item")  # by whoever: nothing is known of it


def test_control_a_build_that_holds_on_to_nothing_ends_in_the_middle(home, events, tmp_path, monkeypatch):
    shutil.copytree(home, tmp_path / "home", symlinks=True)
    monkeypatch.setattr(tables, "snapshot", lambda home, some: contextlib.nullcontext(home))
    with pytest.raises(StoreError):
        ingested_in_the_middle(tmp_path / "home", events, monkeypatch)


def hidden(home):
    """Versions of tables: those in place, and any that a failed build left."""
    return {path.name for path in (home / "tables").iterdir() if path.name.startswith(".") and path.is_dir()}


@pytest.mark.slow
def test_disk_that_fills_during_a_build_leaves_the_tables_as_they_were(home, tmp_path):
    shutil.copytree(home, tmp_path / "home", symlinks=True)
    held = [tables.content_hash(tmp_path / "home", t) for t in tables.FEATURE_TABLES]
    script = f"""
import resource
from pathlib import Path
from pipelines import features
from pipelines.errors import StoreError
resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, 6_000))
try:
    features.build(Path({str(tmp_path / "home")!r}), session_gap_minutes=11)
except StoreError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert "the previous version is untouched" in done.stdout, done.stderr
    assert [tables.content_hash(tmp_path / "home", t) for t in tables.FEATURE_TABLES] == held
    assert hidden(tmp_path / "home") == hidden(home)
    # Control: with room the same build changes them.
    features.build(tmp_path / "home", session_gap_minutes=11)
    assert [tables.content_hash(tmp_path / "home", t) for t in tables.FEATURE_TABLES] != held
