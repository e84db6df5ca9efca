"""What was refused is read again after a correction, and applied exactly once."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import tables
from pipelines.errors import InputError
from pipelines.settings import IngestSettings, Settings

WIDER = 'look = "view"\nbuy = "purchase"\nwish = "wishlist"'


def test_rows_whose_mapping_was_corrected_are_applied_once_and_the_rest_stays_with_its_reason(shop) -> None:
    rows = [(0, "u1", "look", "i1", 1, "x"), (1, "u1", "wish", "i2", 2, "x"), (2, "u1", "wish", "", 2, "x"), (3, "", "look", "i3", 1, "x")]
    first = shop.mapped(rows)
    assert first.reasons == {"type_unknown": 2, "identifier_missing": 1}
    fixed = shop.mapping(types=WIDER)
    report = shop.replay(mapping=fixed)
    assert (report.read, report.applied, report.remaining, report.lines) == (3, 1, 2, 1)
    assert report.reasons == {"identifier_missing": 1, "item_missing": 1}
    assert list(shop.events()["type"]) == ["view", "wishlist"]
    assert sorted(shop.quarantine()["reason"]) == ["identifier_missing", "item_missing"]
    assert shop.is_balanced()
    again = shop.replay(mapping=fixed)
    assert (again.read, again.applied, again.lines) == (2, 0, 0)
    assert len(shop.events()) == 2
    # the corrected mapping over the whole file finds nothing new either
    assert shop.ingest(shop.csv(rows), mapping=fixed).accepted == 0
    assert len(shop.events()) == 2
    assert shop.is_balanced()


def test_a_corrected_file_that_is_ingested_takes_its_rows_out_of_the_quarantine(shop) -> None:
    rows = [(0, "u1", "look", "i1", 1, "x"), (1, "u1", "wish", "i2", 2, "x")]
    shop.mapped(rows)
    report = shop.ingest(shop.csv(rows), mapping=shop.mapping(types=WIDER))
    assert (report.accepted, report.duplicate, report.readmitted, report.lines) == (0, 2, 1, 1)
    assert shop.quarantine().empty
    assert shop.replay().read == 0
    assert shop.is_balanced()


def test_the_file_that_rows_were_mapped_with_is_used_again_and_a_shipped_mapping_by_the_sources_name(shop) -> None:
    shop.mapped([(0, "u1", "look", "i1", 1, "x"), (1, "u1", "wish", "i2", 2, "x")])
    shop.mapping(types=WIDER)
    assert shop.replay().applied == 1
    path = shop.folder / "visits.parquet"
    pq.write_table(pa.table({"timestamp": [1.5e9, None], "visitorid": [1, 2], "event": ["view", "view"], "itemid": [3, 4]}), path)
    shop.ingest(path, mapping="retailrocket")
    report = shop.replay()
    assert (report.read, report.remaining, report.reasons) == (1, 1, {"time_unreadable": 1})


def test_rows_of_a_mapping_that_is_gone_stay_and_the_report_says_so(shop) -> None:
    shop.mapped([(0, "u1", "look", "i1", 1, "x"), (1, "u1", "wish", "i2", 2, "x")])
    shop.mapping().unlink()
    report = shop.replay()
    assert report.read == 0
    assert "1 rows of a stay: their mapping was not found" in report.notes[0]
    assert len(shop.quarantine()) == 1


def test_a_corrected_rule_lets_segment_calls_and_parquet_rows_in_with_their_first_ids(shop) -> None:
    late = shop.call("m2") | {"timestamp": shop.at(500)}
    shop.run(shop.call("m1"), late, "not json")
    path = shop.folder / "part.parquet"
    pq.write_table(pa.table({"timestamp": [1.5e9, 1.5e9], "visitorid": [1, 2], "event": ["view", "view"], "itemid": [3, None]}), path)
    shop.ingest(path, mapping="retailrocket")
    tolerant = Settings(home=shop.home, ingest=IngestSettings(max_future_minutes=1_000))
    report = shop.replay(settings=tolerant)
    assert (report.read, report.applied, report.reasons) == (3, 1, {"not_json": 1, "item_missing": 1})
    assert set(shop.events().query("source == 'segment'")["event_id"]) == {"m1", "m2"}
    shop.run(shop.call("m1"), late, name="again.jsonl", settings=tolerant)
    assert len(shop.events()) == 3
    assert shop.is_balanced()


def test_some_rows_can_be_named_and_an_unknown_one_is_refused(shop) -> None:
    shop.run(shop.call("m1"), "x", "y")
    one = shop.quarantine()["quarantine_id"][0]
    assert shop.replay(ids=[one]).read == 1
    with pytest.raises(InputError, match="found some that are none"):
        shop.replay(ids=["?"])


def test_a_row_that_was_received_in_another_form_meanwhile_leaves_as_a_duplicate(shop) -> None:
    broken = shop.call("m1") | {"timestamp": shop.at(500)}
    shop.run(broken, shop.call("m0"))
    shop.run(shop.call("m1", 1), name="mended.jsonl")
    assert shop.quarantine().empty  # a good row of its id takes it out
    twins = [shop.call("m2") | {"timestamp": shop.at(500 + i)} for i in range(2)]
    shop.run(*twins, shop.call("m3"), name="twins.jsonl")
    assert len(shop.quarantine()) == 2
    tolerant = Settings(home=shop.home, ingest=IngestSettings(max_future_minutes=1_000))
    report = shop.replay(settings=tolerant)
    assert (report.applied, report.duplicate) == (1, 1)
    assert sorted(shop.events()["event_id"]) == ["m0", "m1", "m2", "m3"]
    assert shop.is_balanced()


def test_a_replayed_row_of_an_erased_person_is_not_stored(shop) -> None:
    shop.run(shop.call("m1"), shop.call("m2", user="gone") | {"timestamp": shop.at(500)})
    with shop.vault() as vault:
        vault.entomb([vault.pseudonym("user_id", "gone")], erased_us=1, receipt="r")
    tolerant = Settings(home=shop.home, ingest=IngestSettings(max_future_minutes=1_000))
    report = shop.replay(settings=tolerant)
    assert (report.read, report.applied, report.erased) == (1, 0, 1)
    assert list(shop.events()["event_id"]) == ["m1"]
    assert shop.is_balanced()


def test_a_row_that_consent_keeps_out_leaves_the_quarantine_for_that(shop) -> None:
    shop.run(shop.call("m1"), shop.call("m2", user="no", context=shop.refused) | {"timestamp": shop.at(500)})
    tolerant = Settings(home=shop.home, ingest=IngestSettings(max_future_minutes=1_000))
    report = shop.replay(settings=tolerant)
    assert (report.applied, report.consent_dropped, report.remaining) == (0, 1, 0)
    assert shop.is_balanced()
    assert shop.ledger()["consent_dropped"] == 1


def test_bytes_of_the_quarantine_are_sealed_with_the_key_of_whom_they_name(shop) -> None:
    shop.run(shop.call("m1"), shop.call("m2", properties={}), "nobody is in this")
    rows = shop.table(tables.QUARANTINE).set_index("reason")
    assert rows.loc["item_missing", "subject"] == shop.name("user_id", "u1")
    assert rows.loc["not_json", "subject"] == "nobody"
    with shop.vault() as vault:
        vault.destroy([shop.name("user_id", "u1")])
    opened = shop.quarantine().set_index("reason")["raw"]
    assert opened["item_missing"] is None
    assert opened["not_json"] == b"nobody is in this"
    report = shop.replay()
    assert report.read == 1
    assert "their keys are gone" in report.notes[0]


def test_an_origin_tells_how_a_row_was_read(shop) -> None:
    shop.mapped([(0, "u1", "look", "i1", 1, "x"), (1, "u1", "wish", "i2", 2, "x")])
    origin = json.loads(shop.table(tables.QUARANTINE)["origin"][0])
    assert origin["columns"] == ["at", "who", "what", "item", "price", "country"]
    assert origin["mapping"].endswith("a.toml")
