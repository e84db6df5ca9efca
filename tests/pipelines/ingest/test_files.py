from datetime import timedelta
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import tables
from pipelines.errors import InputError
from pipelines.settings import ConsentSettings, IngestSettings, Settings
from pipelines.sources import load_mapping


def test_a_small_log_becomes_clean_tables(shop) -> None:
    report = shop.run(
        shop.call("m1", 0, user=None, anonymousId="a1"),
        {"type": "identify", "messageId": "m2", "anonymousId": "a1", "userId": "u1", "timestamp": shop.at(1), "receivedAt": shop.at(1.5),
         "traits": {"email": "Ann@Example.com", "age_band": "25-34", "region": "north"}, "context": shop.allowed},
        shop.call("m3", 2, event="Products Searched", properties={"query": "red, blue"}),
        shop.order("m4", 3),
        shop.order("m5", 90, event="Order Refunded", n=1),
        shop.call("m6", 91, event="Experiment Viewed", properties={"experiment": "x", "decision_id": "d1"}),
        shop.call("m7", 92, event="Consent Updated", properties={}, context=shop.refused),
    )  # fmt: skip
    assert shop.adds_up(report)
    assert (report.read, report.accepted, report.consent_dropped, report.lines) == (7, 7, 1, 7)
    events = shop.events()
    assert list(events["type"]) == ["view", "identify", "search", "purchase", "purchase", "return", "exposure"]
    assert list(events["event_id"]) == ["m1", "m2", "m3", "m4:0", "m4:1", "m5:0", "m6"]
    assert events["customer_id"].nunique() == 1
    assert list(events["revenue_cents"]) == [0, 0, 0, 1001, 2002, -1001, 0]
    assert events["event_timestamp"].is_monotonic_increasing
    assert events["session_id"].nunique() == 2  # an hour and a half of silence
    assert (report.first_event, report.last_event) == (shop.start, shop.start + timedelta(minutes=91))
    assert set(shop.table(tables.IDENTITIES)["identifier"]) == {
        shop.name("anonymous_id", "a1"),
        shop.name("user_id", "u1"),
        shop.name("email", "ann@example.com"),
    }
    assert shop.table(tables.CUSTOMER_PROFILE)[["age_band", "region"]].to_numpy().tolist() == [["25-34", "north"]]
    assert list(shop.table(tables.CUSTOMER_CONSENT)["is_personalization_allowed"]) == [True, False]
    assert list(shop.table(tables.ITEMS)["item_id"]) == ["i0", "i1"]


def test_the_same_file_twice_adds_nothing_and_says_so(shop) -> None:
    path = shop.file(shop.call("m1"), shop.order("m2", 1), shop.call("m3", 2, properties={}), "broken")
    first = shop.ingest(path)
    before = [shop.table(table) for table in (*shop.clean, tables.QUARANTINE)]
    second = shop.ingest(path)
    assert (first.accepted, first.duplicate, first.quarantined) == (2, 0, 2)
    assert (second.read, second.accepted, second.duplicate, second.quarantined, second.stored) == (4, 0, 4, 0, 0)
    assert any("nothing was added" in note for note in second.notes)
    for table, frame in zip((*shop.clean, tables.QUARANTINE), before, strict=True):
        pd.testing.assert_frame_equal(shop.table(table), frame)


def test_a_late_event_counts_from_its_arrival_and_a_historical_one_from_its_time(shop) -> None:
    shop.run(shop.call("m1", receivedAt=shop.at(600)))
    shop.mapped([(5, "u9", "look", "i1", 1, "x")])
    events = shop.events().set_index("source")
    assert events.loc["segment", "created_timestamp"] == pd.Timestamp(shop.at(600))
    assert events.loc["a", "created_timestamp"] == pd.Timestamp(shop.at(5))


def test_history_counts_from_its_delivery_where_the_caller_says_so(shop) -> None:
    line = {key: value for key, value in shop.call("m1").items() if key != "receivedAt"}
    shop.run(line, received=shop.start + timedelta(days=9))
    assert shop.events()["created_timestamp"][0] == pd.Timestamp(shop.start + timedelta(days=9))


def test_history_from_after_the_files_last_change_is_refused(shop) -> None:
    future = {key: value for key, value in shop.call("m1").items() if key != "receivedAt"} | {"timestamp": "2090-01-01T00:00:00Z"}
    report = shop.run(shop.call("m0"), future)
    assert report.reasons == {"time_in_future": 1}
    assert report.last_event == shop.start


def test_one_percent_of_bad_rows_never_stops_a_run(shop) -> None:
    lines = [shop.call(f"m{i}", i / 100) if i % 100 else "{" for i in range(2_000)]
    report = shop.run(*lines)
    assert (report.accepted, report.quarantined) == (1_980, 20)


def test_a_file_of_only_bad_rows_is_refused_and_only_the_quarantine_is_written(shop) -> None:
    with pytest.raises(InputError, match=r"none among 3 rows: 2 not_json .*, 1 item_missing") as caught:
        shop.run("x", "y", shop.call("m1", properties={}))
    assert "\n" not in str(caught.value)
    assert len(shop.table(tables.QUARANTINE)) == 3
    assert not any(tables.exists(shop.home, table) for table in shop.clean)


def test_a_bad_second_file_leaves_the_home_as_it_was(shop) -> None:
    shop.run(shop.call("m1"))
    before = {table.name: tables.content_hash(shop.home, table) for table in shop.clean}
    good = shop.file(shop.call("m2", 1), name="good.jsonl")
    for bad in (shop.file("x", name="bad.jsonl"), shop.folder / "none.jsonl", shop.folder):
        with pytest.raises(InputError):
            shop.ingest(good, bad)
    assert {table.name: tables.content_hash(shop.home, table) for table in shop.clean} == before


def test_no_files_are_refused(shop) -> None:
    with pytest.raises(InputError, match="at least one file"):
        shop.ingest()


def test_what_the_simulated_shop_planted_is_what_is_counted(shop) -> None:
    from pipelines import simulate

    planted = simulate.simulate(shop.folder / "raw", customers=80, days=40, seed=3)
    report = shop.ingest(shop.folder / "raw" / "events.jsonl", items_file=shop.folder / "raw" / "items.jsonl")
    assert shop.adds_up(report)
    assert (report.read, report.accepted, report.duplicate) == (planted.lines, planted.events, planted.duplicates)
    names = {
        "broken_json": "not_json", "no_message_id": "event_id_missing", "bad_timestamp": "time_unreadable",
        "negative_quantity": "quantity_invalid", "unknown_type": "type_unknown", "no_identifier": "identifier_missing",
    }  # fmt: skip
    assert report.reasons == {names[kind]: rows for kind, rows in planted.malformed_by_kind.items() if rows}
    assert shop.events().groupby("customer_id")["user_id"].nunique().max() == 1


def real(shared_data: Path, name: str) -> Path:
    path = shared_data / name
    if not path.is_file():
        pytest.skip(f"{name} is not at {shared_data}")
    return path


def test_retailrocket_is_ingested_whole(shop, shared_data: Path) -> None:
    report = shop.ingest(real(shared_data, "retailrocket_subset/events.parquet"), mapping="retailrocket")
    assert shop.adds_up(report)
    assert (report.read, report.accepted, report.quarantined, report.units) == (97_381, 97_381, 0, {"events.parquet": "s"})
    events = shop.events()
    assert events["customer_id"].nunique() == 2_174
    assert set(events["type"]) == {"view", "cart_add", "purchase"}


def test_online_retail_counts_are_those_published(shop, shared_data: Path) -> None:
    whole = pq.read_table(real(shared_data, "online_retail/online_retail.parquet"))
    part = whole.slice(0, 120_000)  # the first of its thirteen months
    pq.write_table(part, shop.folder / "part.parquet")
    report = shop.ingest(shop.folder / "part.parquet", mapping="online_retail")
    frame = part.to_pandas()
    known = frame.dropna(subset="CustomerID")
    assert shop.adds_up(report)
    assert report.reasons == {"identifier_missing": len(frame) - len(known)}
    assert report.duplicate == known.duplicated().sum() > 0
    events, cancelled = shop.events(), known.drop_duplicates()["InvoiceNo"].str.startswith("C")
    assert (events["type"] == "return").sum() == cancelled.sum() > 0
    assert (events["quantity"] > 0).all()
    revenue = (known.drop_duplicates()["Quantity"] * known.drop_duplicates()["UnitPrice"].mul(100).round()).sum()
    assert events["revenue_cents"].sum() == revenue
    assert set(shop.table(tables.CUSTOMER_PROFILE)["region"]) <= set(frame["Country"])


def test_taobao_is_ingested_whole(shop, shared_data: Path) -> None:
    report = shop.ingest(real(shared_data, "taobao_userbehavior_2h/UserBehavior.csv.gz"), mapping=load_mapping("taobao"))
    assert shop.adds_up(report)
    assert (report.read, report.quarantined) == (110_300, 0)
    assert isinstance(tables.read_arrow(shop.home, tables.EVENTS), pa.Table)


def test_a_file_that_is_known_is_not_read_again_unless_it_is_read_by_another_plan(shop, monkeypatch) -> None:
    from pipelines.ingest import files

    path = shop.file(shop.call("m1"), shop.call("m2", 1, context={}))
    shop.ingest(path)
    copy = shop.folder / "copy.jsonl"
    copy.write_bytes(path.read_bytes())
    read = []
    real = files.read
    monkeypatch.setattr(files, "read", lambda paths, *args, **options: read.append(list(paths)) or real(paths, *args, **options))
    assert shop.ingest(copy).duplicate == 2
    assert read[-1] == []
    declared = Settings(home=shop.home, consent=ConsentSettings(legal_basis="contract"))
    assert shop.ingest(path, settings=declared).duplicate == 2
    assert read[-1] == [path]
    assert shop.is_balanced()


def test_progress_is_told_as_rows_are_read(shop, shared_data) -> None:
    told = []
    few = Settings(home=shop.home, ingest=IngestSettings(batch_rows=50_000))
    path = real(shared_data, "retailrocket_subset/events.parquet")
    shop.ingest(path, mapping="retailrocket", settings=few, progress=lambda done, total: told.append((done, total)))
    assert told == [(50_000, 97_381), (97_381, 97_381)]
