import pandas as pd
import pyarrow.parquet as pq

from pipelines import tables
from pipelines.ingest import reassign
from pipelines.settings import IngestSettings, Settings


def test_outliers_are_flagged_within_their_source_and_kept(shop) -> None:
    small = [(i, f"u{i}", "buy", "i1", 10 + i % 7, "x") for i in range(200)]
    shop.mapped([*small, (300, "u0", "buy", "i1", 9_999_999, "x")])
    shop.mapped([(i, f"u{i}", "buy", "i1", 9_999_999, "x") for i in range(20)], name="jeweller")
    events = shop.events()
    assert len(events) == 221
    assert events[events["is_outlier"]][["source", "price_cents"]].to_numpy().tolist() == [["a", 999_999_900]]


def test_sessions_end_after_a_silence_and_keep_the_ids_they_came_with(shop) -> None:
    gap = IngestSettings().session_gap_minutes
    context = shop.allowed | {"sessionId": "own"}
    shop.run(
        shop.call("m1", 0),
        shop.call("m2", gap),
        shop.call("m3", 2 * gap + 1),
        shop.call("m4", 2 * gap + 2, context=context),
        shop.call("m5", 0, user="u2"),
    )
    ids = shop.events().set_index("event_id")["session_id"]
    assert ids["m1"] == ids["m2"] != ids["m3"]
    assert ids["m4"] == "own"
    assert ids["m5"] != ids["m1"]


def test_traits_are_one_row_per_change_of_what_was_known(shop) -> None:
    def trait(message: str, minutes: float, received: float, **traits: str) -> dict:
        return {"type": "identify", "messageId": message, "userId": "u1", "timestamp": shop.at(minutes), "receivedAt": shop.at(received),
                "traits": traits, "context": shop.allowed}  # fmt: skip

    shop.run(
        trait("t1", 0, 1, region="north"), trait("t2", 5, 6, region="north", gender="f"), trait("t3", 9, 10, region="south"),
        trait("t4", 2, 20, region="west"),  # arrives last, but is older than what is known
    )  # fmt: skip
    rows = shop.table(tables.CUSTOMER_PROFILE)[["event_timestamp", "gender", "region"]].astype(object).to_numpy().tolist()
    assert rows == [
        [pd.Timestamp(shop.at(1)), None, "north"],
        [pd.Timestamp(shop.at(6)), "f", "north"],
        [pd.Timestamp(shop.at(10)), "f", "south"],
    ]


def returned(shop, message: str, minutes: float, **fields: object) -> dict:
    return shop.order(message, minutes, event="Order Refunded", n=1, **fields)


def test_a_return_without_its_purchase_is_flagged(shop) -> None:
    far = 60 * 24 * 200
    report = shop.run(shop.order("m1", 0), returned(shop, "m2", far), returned(shop, "m3", far, user="u2"))
    flags = shop.events().set_index("event_id")["is_unmatched"]
    assert flags.to_dict() == {"m1:0": False, "m1:1": False, "m2:0": False, "m3:0": True}
    assert report.unmatched == 1
    shop.run(shop.order("m4", far - 5, user="u2", receivedAt=shop.at(far + 10)), name="late.jsonl")
    assert not shop.events()["is_unmatched"].any()


def test_a_return_without_its_purchase_is_refused_where_the_settings_say_so_and_comes_in_with_it(shop) -> None:
    far = 60 * 24 * 200
    strict = Settings(home=shop.home, ingest=IngestSettings(unmatched_returns="refuse"))
    report = shop.run(shop.order("m1", 0), returned(shop, "m2", far), returned(shop, "m3", far, user="u2"), "not json", settings=strict)
    assert shop.adds_up(report)
    assert report.reasons == {"not_json": 1, "return_unmatched": 1}
    assert set(shop.events()["event_id"]) == {"m1:0", "m1:1", "m2:0"}
    kept = shop.quarantine().set_index("reason")
    assert kept.loc["return_unmatched", "subject"] == shop.name("user_id", "u2")
    assert b'"m3"' in kept.loc["return_unmatched", "raw"]
    assert shop.replay(settings=strict).reasons == {"not_json": 1, "return_unmatched": 1}
    shop.run(shop.order("m4", far - 5, user="u2", receivedAt=shop.at(far + 10)), name="late.jsonl", settings=strict)
    assert shop.replay(settings=strict).applied == 1
    assert "m3:0" in set(shop.events()["event_id"])
    assert shop.is_balanced()


def test_near_duplicates_are_flagged_whichever_of_them_came_first(shop) -> None:
    calls = [shop.call(f"m{n}", seconds / 60) for n, seconds in enumerate([0, 0.6, 1.2, 9])] + [shop.call("other", 0, user="u2")]
    report = shop.run(*calls)
    flags = shop.events().set_index("event_id")["is_near_duplicate"].to_dict()
    assert flags == {"m0": False, "m1": True, "m2": True, "m3": False, "other": False}
    assert report.near_duplicates == 2


def test_sessions_are_the_same_however_few_lines_are_looked_at_at_a_time(shop, new_shop, monkeypatch) -> None:
    from pipelines.ingest import forming

    lines = [shop.call(f"m{n}", n * 17 % 200, user=f"u{n % 3}") for n in range(40)]
    other = new_shop(like=shop)
    shop.run(*lines)
    monkeypatch.setattr(forming, "_PIECE_ROWS", 1)
    other.run(*lines)
    pd.testing.assert_frame_equal(shop.events(), other.events())
    assert 3 < shop.events()["session_id"].nunique() < 40


def test_the_words_of_a_trusted_source_win_and_the_others_are_kept(shop) -> None:
    trusting = Settings(home=shop.home, ingest=IngestSettings(trait_sources=("a",)))
    shop.mapped([(0, "u1", "look", "i1", 1, "north")], settings=trusting)
    said = shop.call("m1", 9, type="identify", traits={"region": "south"})
    shop.run(said, settings=trusting)
    assert shop.table(tables.CUSTOMER_PROFILE)["region"].tolist() == ["north"]
    assert sorted(shop.table(tables.TRAITS)["value"]) == ["north", "south"]


def test_an_event_says_when_it_was_received_or_nothing_whatever_is_learned_of_its_person(shop) -> None:
    def received() -> dict[str, pd.Timestamp | None]:
        return {row.event_id: None if pd.isna(row.received_timestamp) else row.received_timestamp for row in shop.events().itertuples()}

    visitor = shop.call("m1", 0, user=None, anonymousId="d1", receivedAt=shop.at(3))
    shop.run(shop.call("m0", -9), visitor)
    shop.mapped([(0, "u9", "look", "i1", 1, "x")])  # a file that notes no receipt
    nobody_noted = next(iter(set(shop.events()["event_id"]) - {"m0", "m1"}))
    first = {"m0": pd.Timestamp(shop.at(-8.9)), nobody_noted: None}
    assert received() == first | {"m1": pd.Timestamp(shop.at(3))}
    login = shop.call("m2", 60, type="identify", anonymousId="d1", receivedAt=shop.at(61))
    shop.run(login, name="later.jsonl")
    events = shop.events().set_index("event_id")
    assert events.loc["m1", "created_timestamp"] == pd.Timestamp(shop.at(61))  # the control: whose it is was learned then
    assert received() == first | {"m1": pd.Timestamp(shop.at(3)), "m2": pd.Timestamp(shop.at(61))}
    shop.send(shop.call("m3", 70, receivedAt=shop.at(72)))
    shop.drain()
    reassign(shop.home, settings=shop.settings)
    assert received()["m3"] == pd.Timestamp(shop.at(72))
    assert received()["m1"] == pd.Timestamp(shop.at(3))


def test_a_home_from_before_receipts_were_kept_is_ingested_onto(shop) -> None:
    shop.run(shop.call("m1", 0), shop.call("m2", 24 * 60), name="old.jsonl")
    for path in tables.files(shop.home, tables.EVENTS):
        pq.write_table(pq.read_table(path, partitioning=None).drop_columns(["received_timestamp"]), path)
    before = shop.events()
    assert before["received_timestamp"].isna().all()
    shop.run(shop.call("m3", 24 * 60 + 1), name="new.jsonl")
    after = shop.events().set_index("event_id")
    assert after["received_timestamp"].notna().to_dict() == {"m1": False, "m2": False, "m3": True}
    assert after.loc["m2", "created_timestamp"] == before.set_index("event_id").loc["m2", "created_timestamp"]
