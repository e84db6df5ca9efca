import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pipelines import consent, tables
from pipelines import ingest as ingest_module
from pipelines.errors import InputError, StoreError
from pipelines.events import REASONS, email_identifier
from pipelines.ingest import IngestReport, ingest
from pipelines.settings import ConsentSettings, IngestSettings, Settings
from pipelines.sources import Mapping, load_mapping

START = datetime(2024, 3, 1, 10, tzinfo=UTC)
ALLOWED = {"consent": {"categoryPreferences": {"personalization": True, "marketing": False}}}
REFUSED = {"consent": {"categoryPreferences": {"personalization": False}}}
CONTRACT = '[consent]\nlegal_basis = "contract"\npurposes = ["personalization"]'
CLEAN = (tables.EVENTS, tables.IDENTITIES, tables.IDENTITY_LINKS, tables.CONSENTS, tables.ITEMS, tables.CUSTOMER_PROFILE)


def at(minutes: float) -> str:
    return (START + timedelta(minutes=minutes)).isoformat()


def call(message: str, minutes: float = 0, *, event: str = "Product Viewed", user: str | None = "u1", **fields: object) -> dict:
    properties = fields.pop("properties", {"product_id": "i1", "price": 9.99, "category": "books"})
    who = {"userId": user} if user else {}
    return {"type": "track", "event": event, "messageId": message, "timestamp": at(minutes), "receivedAt": at(minutes + 0.1), **who,
            "properties": properties, "context": ALLOWED, **fields}  # fmt: skip


def order(message: str, minutes: float = 0, *, event: str = "Order Completed", n: int = 2, **fields: object) -> dict:
    products = [{"product_id": f"i{i}", "quantity": i + 1, "price": 10.005, "category": "toys"} for i in range(n)]
    return call(message, minutes, event=event, properties={"order_id": f"o-{message}", "products": products}, **fields)


class Shop:
    """A home and a folder for files, with the calls that the tests repeat."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "home"
        self.settings = Settings(home=self.home)

    def file(self, *calls: dict | str, name: str = "events.jsonl") -> Path:
        path = self.folder / name
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in calls))
        return path

    def ingest(self, *files: Path, mapping: str | Path | Mapping | None = None, **options: object) -> IngestReport:
        return ingest(self.home, list(files), mapping=mapping, settings=options.pop("settings", self.settings), **options)  # type: ignore[arg-type]

    def run(self, *calls: dict | str, **options: object) -> IngestReport:
        return self.ingest(self.file(*calls), **options)  # type: ignore[arg-type]

    def table(self, table: tables.Table) -> pd.DataFrame:
        return tables.read(self.home, table)

    def events(self) -> pd.DataFrame:
        return self.table(tables.EVENTS)

    def mapped(
        self, rows: list[tuple], *, basis: str = '[consent]\nlegal_basis = "contract"\npurposes = ["personalization"]', name: str = "a"
    ):
        """Ingest rows of minute, user, kind, item, price, country by a mapping with this basis."""
        plan = self.folder / f"{name}.toml"
        plan.write_text(
            f'[source]\nname = "{name}"\n[time]\ncolumn = "at"\nunit = "iso"\n[columns]\nuser_id = "who"\ntype = "what"\nitem_id = "item"\n'
            f'price = "price"\n[types]\nlook = "view"\nbuy = "purchase"\n[traits]\nregion = "country"\n{basis}\n'
        )
        path = self.folder / f"{name}.csv"
        path.write_text("at,who,what,item,price,country\n" + "".join(f"{at(row[0])},{','.join(map(str, row[1:]))}\n" for row in rows))
        return self.ingest(path, mapping=plan)


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


def conserved(report: IngestReport) -> bool:
    return (
        report.read == report.accepted + report.duplicate + report.quarantined
        and report.accepted == report.stored + report.consent_dropped
        and report.quarantined == sum(report.reasons.values())
    )


# -- events ------------------------------------------------------------------------------------------------------------


def test_a_small_log_becomes_clean_tables(shop: Shop) -> None:
    report = shop.run(
        call("m1", 0, user=None, anonymousId="a1"),
        {"type": "identify", "messageId": "m2", "anonymousId": "a1", "userId": "u1", "timestamp": at(1), "receivedAt": at(1.5),
         "traits": {"email": "Ann@Example.com", "age_band": "25-34", "region": "north"}, "context": ALLOWED},
        call("m3", 2, event="Products Searched", properties={"query": "red, blue"}),
        order("m4", 3),
        order("m5", 90, event="Order Refunded", n=1),
        call("m6", 91, event="Experiment Viewed", properties={"experiment": "x", "decision_id": "d1"}),
        call("m7", 92, event="Consent Updated", properties={}, context=REFUSED),
    )  # fmt: skip
    assert conserved(report)
    assert (report.read, report.accepted, report.consent_dropped, report.lines) == (7, 7, 1, 7)
    events = shop.events()
    assert list(events["type"]) == ["view", "identify", "search", "purchase", "purchase", "return", "exposure"]
    assert list(events["event_id"]) == ["m1", "m2", "m3", "m4:0", "m4:1", "m5:0", "m6"]
    assert events["customer_id"].nunique() == 1
    assert list(events["revenue_cents"]) == [0, 0, 0, 1001, 2002, -1001, 0]
    assert events["event_timestamp"].is_monotonic_increasing
    assert events["session_id"].nunique() == 2  # an hour and a half of silence
    assert (report.first_event, report.last_event) == (START, START + timedelta(minutes=91))
    assert set(shop.table(tables.IDENTITIES)["identifier"]) == {"anonymous_id:a1", "user_id:u1", email_identifier("ann@example.com")}
    assert shop.table(tables.CUSTOMER_PROFILE)[["age_band", "region"]].to_numpy().tolist() == [["25-34", "north"]]
    assert list(shop.table(tables.CUSTOMER_CONSENT)["is_personalization_allowed"]) == [True, False]
    assert list(shop.table(tables.ITEMS)["item_id"]) == ["i0", "i1"]


def test_the_same_file_twice_adds_nothing_and_says_so(shop: Shop) -> None:
    path = shop.file(call("m1"), order("m2", 1), call("m3", 2, properties={}), "broken")
    first = shop.ingest(path)
    before = [shop.table(table) for table in (*CLEAN, tables.QUARANTINE)]
    second = shop.ingest(path)
    assert (first.accepted, first.duplicate, first.quarantined) == (2, 0, 2)
    assert (second.accepted, second.duplicate, second.quarantined, second.stored) == (0, 2, 2, 0)
    assert any("nothing was added" in note for note in second.notes)
    for table, frame in zip((*CLEAN, tables.QUARANTINE), before, strict=True):
        pd.testing.assert_frame_equal(shop.table(table), frame)


def test_the_ledger_balances_over_several_runs_and_a_repeated_file_is_all_duplicates(shop: Shop) -> None:
    shop.run(call("m1"), call("m2", context=REFUSED, user="u2"), "not json", order("m3"), call("m1"))
    shop.run(call("m1"), call("m4"), "not json either")
    expected = {"accepted": 6, "applied": 3, "quarantined": 2, "consent_dropped": 1, "erased": 0, "pending": 0, "duplicates": 2}
    assert ingest_module.ledger(shop.home) == expected
    shop.run(call("m1"), call("m4"), "not json either")
    assert ingest_module.ledger(shop.home) == expected | {"duplicates": 5}
    assert expected["quarantined"] == tables.count(shop.home, tables.QUARANTINE)


def test_a_retry_is_a_duplicate_and_the_first_arrival_stays(shop: Shop) -> None:
    report = shop.run(call("m1", receivedAt=at(5)), call("m1", receivedAt=at(2)), call("m1", receivedAt=at(9)))
    assert (report.accepted, report.duplicate) == (1, 2)
    assert shop.events()["created_timestamp"][0] == pd.Timestamp(at(2))


def test_the_same_id_from_two_sources_is_two_events(shop: Shop) -> None:
    shop.mapped([(0, "u1", "look", "i1", 1, "x")], name="a")
    shop.mapped([(0, "u1", "look", "i1", 1, "x")], name="b")
    events = shop.events()
    assert list(events["source"]) == ["a", "b"]
    assert events["event_id"].nunique() == events["customer_id"].nunique() == 1


def test_an_order_with_one_wrong_line_is_set_aside_whole(shop: Shop) -> None:
    bad = order("m1")
    bad["properties"]["products"][1].pop("product_id")
    report = shop.run(bad, order("m2", 1))
    assert report.reasons == {"item_missing": 1}
    assert list(shop.events()["event_id"]) == ["m2:0", "m2:1"]


def test_every_kind_of_bad_row_is_kept_with_its_reason_and_its_bytes(shop: Shop) -> None:
    def without(name: str) -> dict:
        return {key: value for key, value in call("x").items() if key != name}

    view = {"product_id": "i1"}
    bad = {
        "not_json": '{"type":"track",',
        "type_unknown": call("x") | {"type": "telemetry"},
        "event_id_missing": without("messageId"),
        "time_unreadable": call("x") | {"timestamp": "yesterday at noon"},
        "time_in_future": call("x") | {"timestamp": at(500)},
        "time_too_old": call("x") | {"timestamp": "1999-01-01"},
        "identifier_missing": call("x", user=None),
        "item_missing": call("x", properties={}),
        "quantity_invalid": call("x", properties=view | {"quantity": -2}),
        "price_invalid": call("x", properties=view | {"price": "9,99"}),
    }
    report = shop.run(call("m1"), *bad.values())
    assert conserved(report)
    assert report.reasons == dict.fromkeys(bad, 1)
    kept = shop.table(tables.QUARANTINE).set_index("reason")
    for reason, line in bad.items():
        assert kept.loc[reason, "raw"] == (line if isinstance(line, str) else json.dumps(line))
    assert list(kept["row"]) == list(range(2, 12))
    assert set(bad) <= set(REASONS)


def test_words_for_nobody_do_not_make_a_person(shop: Shop) -> None:
    words = ["null", "undefined", "Anonymous", " ", "[object Object]"]
    assert shop.run(call("m"), *(call(f"m{i}", user=word) for i, word in enumerate(words))).reasons == {"identifier_missing": len(words)}


def test_one_percent_of_bad_rows_never_stops_a_run(shop: Shop) -> None:
    lines = [call(f"m{i}", i / 100) if i % 100 else "{" for i in range(2_000)]
    report = shop.run(*lines)
    assert (report.accepted, report.quarantined) == (1_980, 20)


def test_a_late_event_counts_from_its_arrival_and_a_historical_one_from_its_time(shop: Shop) -> None:
    shop.run(call("m1", receivedAt=at(600)))
    shop.mapped([(5, "u9", "look", "i1", 1, "x")])
    events = shop.events().set_index("source")
    assert events.loc["segment", "created_timestamp"] == pd.Timestamp(at(600))
    assert events.loc["a", "created_timestamp"] == pd.Timestamp(at(5))


def test_history_counts_from_its_delivery_where_the_caller_says_so(shop: Shop) -> None:
    line = {key: value for key, value in call("m1").items() if key != "receivedAt"}
    shop.run(line, received=START + timedelta(days=9))
    assert shop.events()["created_timestamp"][0] == pd.Timestamp(START + timedelta(days=9))


def test_history_from_after_the_files_last_change_is_refused(shop: Shop) -> None:
    future = {key: value for key, value in call("m1").items() if key != "receivedAt"} | {"timestamp": "2090-01-01T00:00:00Z"}
    report = shop.run(call("m0"), future)
    assert report.reasons == {"time_in_future": 1}
    assert report.last_event == START


def test_a_login_makes_earlier_visits_known_only_from_then_on(shop: Shop) -> None:
    shop.run(
        call("m1", 0, user="u1"),
        call("m2", 5, user=None, anonymousId="phone"),
        call("m3", 60, user="u1", anonymousId="phone"),
    )
    created = shop.events().set_index("event_id")["created_timestamp"]
    assert created["m2"] == pd.Timestamp(at(60.1))
    assert created["m1"] == pd.Timestamp(at(0.1))


def test_outliers_are_flagged_within_their_source_and_kept(shop: Shop) -> None:
    small = [(i, f"u{i}", "buy", "i1", 10 + i % 7, "x") for i in range(200)]
    shop.mapped([*small, (300, "u0", "buy", "i1", 9_999_999, "x")])
    shop.mapped([(i, f"u{i}", "buy", "i1", 9_999_999, "x") for i in range(20)], name="jeweller")
    events = shop.events()
    assert len(events) == 221
    assert events[events["is_outlier"]][["source", "price_cents"]].to_numpy().tolist() == [["a", 999_999_900]]


def test_sessions_end_after_a_silence_and_keep_the_ids_they_came_with(shop: Shop) -> None:
    gap = IngestSettings().session_gap_minutes
    context = ALLOWED | {"sessionId": "own"}
    shop.run(call("m1", 0), call("m2", gap), call("m3", 2 * gap + 1), call("m4", 2 * gap + 2, context=context), call("m5", 0, user="u2"))
    ids = shop.events().set_index("event_id")["session_id"]
    assert ids["m1"] == ids["m2"] != ids["m3"]
    assert ids["m4"] == "own"
    assert ids["m5"] != ids["m1"]


def test_items_come_from_the_catalogue_first_and_from_events_else(shop: Shop) -> None:
    items = shop.folder / "items.jsonl"
    items.write_text('{"item_id":"i1","category":"tools","price":5.5,"available_from":"2024-01-01T00:00:00Z"}\n')
    shop.run(call("m1", 3), call("m2", 1, properties={"product_id": "i9", "price": 2, "category": "toys"}), items_file=items)
    rows = shop.table(tables.ITEMS)[["item_id", "category", "price_cents", "event_timestamp"]].to_numpy().tolist()
    assert rows == [["i1", "tools", 550, pd.Timestamp("2024-01-01", tz="UTC")], ["i9", "toys", 200, pd.Timestamp(at(1))]]
    shop.run(call("m3", 5))
    assert shop.table(tables.ITEMS)[["item_id", "category", "price_cents", "event_timestamp"]].to_numpy().tolist() == rows


def test_traits_are_one_row_per_change_of_what_was_known(shop: Shop) -> None:
    def trait(message: str, minutes: float, received: float, **traits: str) -> dict:
        return {"type": "identify", "messageId": message, "userId": "u1", "timestamp": at(minutes), "receivedAt": at(received),
                "traits": traits, "context": ALLOWED}  # fmt: skip

    shop.run(
        trait("t1", 0, 1, region="north"), trait("t2", 5, 6, region="north", gender="f"), trait("t3", 9, 10, region="south"),
        trait("t4", 2, 20, region="west"),  # arrives last, but is older than what is known
    )  # fmt: skip
    rows = shop.table(tables.CUSTOMER_PROFILE)[["event_timestamp", "gender", "region"]].astype(object).to_numpy().tolist()
    assert rows == [[pd.Timestamp(at(1)), None, "north"], [pd.Timestamp(at(6)), "f", "north"], [pd.Timestamp(at(10)), "f", "south"]]


# -- identity over several runs ----------------------------------------------------------------------------------------


def test_a_later_file_that_merges_people_renames_them_everywhere(shop: Shop) -> None:
    shop.run(call("m1", 0, user="u1"), call("m2", 1, user="u2"))
    assert shop.events()["customer_id"].nunique() == 2
    shop.run(*(call(f"n{i}", 10 + i, user=f"u{i}", properties={"product_id": "i", "email": "same@x.org"}) for i in (1, 2)))
    for table in (tables.EVENTS, tables.IDENTITIES, tables.CONSENTS, tables.CUSTOMER_CONSENT):
        assert shop.table(table)["customer_id"].nunique() == 1, table.name


WHO = st.tuples(
    st.sampled_from([None, "u1", "u2", "u3"]), st.sampled_from([None, "a1", "a2"]), st.booleans(), st.sampled_from([None, "x@y.z", "v@y.z"])
)


@settings(max_examples=4, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(WHO, max_size=6), st.lists(WHO, max_size=6))
def test_two_halves_in_order_give_the_tables_of_the_whole(tmp_path_factory: pytest.TempPathFactory, first: list, second: list) -> None:
    def line(place: int, who: tuple) -> dict:
        user, visitor, is_order, email = who
        fields = {"anonymousId": visitor} if visitor else {}
        fields |= {"traits": {"email": email, "region": f"r{place % 3}"}} if email else {}
        return (order if is_order else call)(f"m{place}", place * 20, user=user, **fields)

    halves = [("u1", None, False, None), *first], [("u2", "a1", True, None), *second]
    lines = [line(place, who) for place, who in enumerate(halves[0] + halves[1])]
    whole, parts = (Shop(tmp_path_factory.mktemp(name)) for name in ("whole", "parts"))
    whole.run(*lines)
    parts.run(*lines[: len(halves[0])])
    parts.run(*lines[len(halves[0]) :])
    for table in (*CLEAN, tables.CUSTOMER_CONSENT):
        pd.testing.assert_frame_equal(whole.table(table), parts.table(table), obj=table.name)


# -- consent -----------------------------------------------------------------------------------------------------------


def test_a_source_with_neither_consent_nor_basis_is_not_used_and_the_report_says_why(shop: Shop) -> None:
    report = shop.run(call("m1", context={}), call("m2", 1, context={}))
    assert conserved(report)
    assert (report.accepted, report.consent_dropped, report.has_consent, report.last_event) == (2, 2, False, None)
    assert len(report.notes) == 1
    assert "no legal basis" in report.notes[0]
    for table in CLEAN:
        assert shop.table(table).empty, table.name


def test_a_declared_basis_makes_a_source_usable_and_is_written_down(shop: Shop) -> None:
    settings_ = Settings(home=shop.home, consent=ConsentSettings(legal_basis="contract"))
    report = shop.run(call("m1", context={}), settings=settings_)
    assert (report.consent_dropped, report.has_consent) == (0, True)
    assert list(shop.table(tables.CONSENTS)["basis"]) == ["declared: contract"]


def test_a_basis_for_another_purpose_is_none(shop: Shop) -> None:
    report = shop.mapped([(0, "u1", "look", "i1", 1, "x")], basis='[consent]\nlegal_basis = "contract"\npurposes = ["billing"]')
    assert report.consent_dropped == 1
    assert "covers billing, not personalization" in report.notes[0]


def test_what_one_source_declares_is_not_for_another(shop: Shop) -> None:
    shop.mapped([(0, "u1", "look", "i1", 1, "x")])
    assert shop.run(call("m1", 5, user="u1", context={})).consent_dropped == 1


def test_events_are_kept_while_allowed_and_the_refusal_itself_is_kept(shop: Shop) -> None:
    report = shop.run(
        call("m0", 0, context={}), call("m1", 1), call("m2", 2, context=REFUSED),
        call("m3", 3, context={}), call("m4", 4), order("m5", 5, n=3),
        call("m6", 6, user="stranger", context=REFUSED), call("m7", 7, user="silent", context={}),
    )  # fmt: skip
    assert conserved(report)
    assert list(shop.events()["event_id"]) == ["m1", "m4", "m5:0", "m5:1", "m5:2"]
    consents = shop.table(tables.CONSENTS)
    personal = consents[consents["purpose"] == "personalization"].groupby("customer_id")["is_allowed"].apply(list)
    assert sorted(personal, key=len) == [[False], [True, False, True]]
    # Who refused has to be recognised; who said nothing is not kept at all.
    assert set(shop.table(tables.IDENTITIES)["identifier"]) == {"user_id:u1", "user_id:stranger"}


def test_a_refusal_beats_a_declared_basis_and_a_late_one_takes_events_out(shop: Shop) -> None:
    shop.mapped([(0, "u1", "look", "i1", 1, "x"), (10, "u1", "look", "i1", 1, "x"), (20, "u2", "look", "i1", 1, "x")])
    report = shop.run(call("m1", 5, context=REFUSED, receivedAt=at(60)), call("m2", 6, user="u2"))
    assert report.withdrawn == 1
    assert sorted(shop.events()["event_timestamp"]) == [pd.Timestamp(at(minute)) for minute in (0, 6, 20)]
    assert shop.mapped([(30, "u1", "look", "i1", 1, "x"), (31, "u2", "look", "i1", 1, "x")]).consent_dropped == 1


def test_the_stored_events_are_exactly_those_that_the_consents_allow(shop: Shop) -> None:
    contexts = [{}, ALLOWED, REFUSED]
    shop.run(*(call(f"m{i}", i, user=f"u{i % 5}", context=contexts[i * i % 7 % 3]) for i in range(60)))
    events, consents = shop.events(), shop.table(tables.CONSENTS)
    assert 0 < len(events) < 60
    assert consent.state_at(consents, events, purpose="personalization").all()
    dropped = shop.table(tables.IDENTITIES)["customer_id"].nunique()
    assert dropped == 5


def test_no_address_is_in_any_table_but_the_quarantine(shop: Shop) -> None:
    shop.run(
        call("m1", traits={"email": "canary@x.org"}),
        call("m2", 1, user="canary@x.org"),
        call("m3", 2, user=None, anonymousId="canary@x.org"),
        call("m4", 3, user=None, properties={"product_id": "i", "email": "Canary@X.org "}),
        call("m5", 4, properties={}, traits={"email": "canary@x.org"}),
    )
    assert shop.events()["customer_id"].nunique() == 1
    for table in tables.TABLES:
        if tables.exists(shop.home, table):
            text = shop.table(table).to_json().lower()
            assert ("canary" in text) == (table is tables.QUARANTINE), table.name


# -- the whole ---------------------------------------------------------------------------------------------------------

KINDS = ("good", "repeat", "broken", "nobody", "refused", "silent", "order", "bad order", "future", "noise")
LINES = st.lists(st.sampled_from(KINDS), min_size=1, max_size=25)


@settings(max_examples=4, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(LINES, LINES)
def test_nothing_vanishes(tmp_path_factory: pytest.TempPathFactory, first: list[str], second: list[str]) -> None:
    shop = Shop(tmp_path_factory.mktemp("law"))
    make = {
        "good": lambda i: call(f"g{i}", i),
        "repeat": lambda i: call("again", 0),
        "broken": lambda i: "{" * (i + 1),
        "nobody": lambda i: call(f"n{i}", user=None),
        "refused": lambda i: call(f"r{i}", i, user="no", context=REFUSED),
        "silent": lambda i: call(f"s{i}", i, user=f"quiet{i}", context={}),
        "order": lambda i: order(f"o{i}", i, n=i % 4),
        "bad order": lambda i: order(f"b{i}", i) | {"timestamp": "?"},
        "future": lambda i: call(f"f{i}", 9_999, receivedAt=at(0)),
        "noise": lambda i: "\x00\x7f,;",
    }
    for name, kinds in (("one", first), ("two", second)):
        path = shop.file("", *(make[kind](i) for i, kind in enumerate(kinds)), call(f"end-{name}", 99), name=f"{name}.jsonl")
        before = tables.count(shop.home, tables.EVENTS)
        report = shop.ingest(path)
        assert conserved(report)
        assert report.read == len(kinds) + 1
        assert tables.count(shop.home, tables.EVENTS) == before + report.lines - report.withdrawn
        assert not shop.events().duplicated(["source", "event_id"]).any()
    held = shop.table(tables.QUARANTINE)
    assert held["quarantine_id"].is_unique


def test_a_file_of_only_bad_rows_is_refused_and_only_the_quarantine_is_written(shop: Shop) -> None:
    with pytest.raises(InputError, match=r"none among 3 rows: 2 not_json .*, 1 item_missing") as caught:
        shop.run("x", "y", call("m1", properties={}))
    assert "\n" not in str(caught.value)
    assert len(shop.table(tables.QUARANTINE)) == 3
    assert not any(tables.exists(shop.home, table) for table in CLEAN)


def test_a_bad_second_file_leaves_the_home_as_it_was(shop: Shop) -> None:
    shop.run(call("m1"))
    before = {table.name: tables.content_hash(shop.home, table) for table in CLEAN}
    good = shop.file(call("m2", 1), name="good.jsonl")
    for bad in (shop.file("x", name="bad.jsonl"), shop.folder / "none.jsonl", shop.folder):
        with pytest.raises(InputError):
            shop.ingest(good, bad)
    assert {table.name: tables.content_hash(shop.home, table) for table in CLEAN} == before


def test_a_refusing_disk_is_a_store_error_and_the_next_run_mends_it(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shop.file(call("m1"), order("m2", 1))
    real = pq.write_table
    calls = {"n": 0}

    def full(*args: object, **options: object) -> None:
        calls["n"] += 1
        if calls["n"] == 5:
            raise OSError(28, "No space left on device")
        real(*args, **options)

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(StoreError, match="No space left"):
        shop.ingest(path)
    assert shop.events().empty
    monkeypatch.setattr(pq, "write_table", real)
    assert shop.ingest(path).stored == 2
    other = Shop(shop.folder / "other")
    other.folder.mkdir()
    other.ingest(path)
    for table in CLEAN:
        pd.testing.assert_frame_equal(shop.table(table), other.table(table), obj=table.name)


@pytest.mark.parametrize("items", ["none.jsonl", "broken.jsonl"])
def test_a_catalogue_that_cannot_be_read_is_refused(shop: Shop, items: str) -> None:
    (shop.folder / "broken.jsonl").write_text("{\n")
    with pytest.raises(InputError, match=items):
        shop.run(call("m1"), items_file=shop.folder / items)


def test_no_files_are_refused(shop: Shop) -> None:
    with pytest.raises(InputError, match="at least one file"):
        shop.ingest()


def test_what_the_simulated_shop_planted_is_what_is_counted(shop: Shop) -> None:
    from pipelines import simulate

    planted = simulate.simulate(shop.folder / "raw", customers=80, days=40, seed=3)
    report = shop.ingest(shop.folder / "raw" / "events.jsonl", items_file=shop.folder / "raw" / "items.jsonl")
    assert conserved(report)
    assert (report.read, report.accepted, report.duplicate) == (planted.lines, planted.events, planted.duplicates)
    names = {
        "broken_json": "not_json", "no_message_id": "event_id_missing", "bad_timestamp": "time_unreadable",
        "negative_quantity": "quantity_invalid", "unknown_type": "type_unknown", "no_identifier": "identifier_missing",
    }  # fmt: skip
    assert report.reasons == {names[kind]: rows for kind, rows in planted.malformed_by_kind.items() if rows}
    assert shop.events().groupby("customer_id")["user_id"].nunique().max() == 1


# -- the real files ----------------------------------------------------------------------------------------------------


def real(shared_data: Path, name: str) -> Path:
    path = shared_data / name
    if not path.is_file():
        pytest.skip(f"{name} is not at {shared_data}")
    return path


def test_retailrocket_is_ingested_whole(shop: Shop, shared_data: Path) -> None:
    report = shop.ingest(real(shared_data, "retailrocket_subset/events.parquet"), mapping="retailrocket")
    assert conserved(report)
    assert (report.read, report.accepted, report.quarantined, report.units) == (97_381, 97_381, 0, {"events.parquet": "s"})
    events = shop.events()
    assert events["customer_id"].nunique() == 2_174
    assert set(events["type"]) == {"view", "cart_add", "purchase"}


def test_online_retail_counts_are_those_published(shop: Shop, shared_data: Path) -> None:
    whole = pq.read_table(real(shared_data, "online_retail/online_retail.parquet"))
    part = whole.slice(0, 120_000)  # the first of its thirteen months
    pq.write_table(part, shop.folder / "part.parquet")
    report = shop.ingest(shop.folder / "part.parquet", mapping="online_retail")
    frame = part.to_pandas()
    known = frame.dropna(subset="CustomerID")
    assert conserved(report)
    assert report.reasons == {"identifier_missing": len(frame) - len(known)}
    assert report.duplicate == known.duplicated().sum() > 0
    events, cancelled = shop.events(), known.drop_duplicates()["InvoiceNo"].str.startswith("C")
    assert (events["type"] == "return").sum() == cancelled.sum() > 0
    assert (events["quantity"] > 0).all()
    revenue = (known.drop_duplicates()["Quantity"] * known.drop_duplicates()["UnitPrice"].mul(100).round()).sum()
    assert events["revenue_cents"].sum() == revenue
    assert set(shop.table(tables.CUSTOMER_PROFILE)["region"]) <= set(frame["Country"])


def test_taobao_is_ingested_whole(shop: Shop, shared_data: Path) -> None:
    report = shop.ingest(real(shared_data, "taobao_userbehavior_2h/UserBehavior.csv.gz"), mapping=load_mapping("taobao"))
    assert conserved(report)
    assert (report.read, report.quarantined) == (110_300, 0)
    assert isinstance(tables.read_arrow(shop.home, tables.EVENTS), pa.Table)
