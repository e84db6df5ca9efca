"""The ledger: counted at the door and where rows are kept; it balances, and it can be wrong."""

import pyarrow.compute as pc
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pipelines import tables
from pipelines.ingest import count_erased


def test_the_ledger_balances_over_several_runs_and_a_repeated_file_is_all_duplicates(shop) -> None:
    shop.run(shop.call("m1"), shop.call("m2", context=shop.refused, user="u2"), "not json", shop.order("m3"), shop.call("m1"))
    shop.run(shop.call("m1"), shop.call("m4"), "not json either")
    counted = {"accepted": 6, "applied": 3, "quarantined": 2, "consent_dropped": 1, "erased": 0, "pending": 0}
    assert shop.ledger() == counted | {"duplicates": 2, "balance": 0}
    shop.run(shop.call("m1"), shop.call("m4"), "not json either")
    assert shop.ledger() == counted | {"duplicates": 5, "balance": 0}
    assert shop.ledger()["quarantined"] == tables.count(shop.home, tables.QUARANTINE)


@pytest.mark.parametrize("table", [tables.MESSAGES, tables.QUARANTINE])
def test_a_row_that_gets_lost_shows(shop, table) -> None:
    shop.run(shop.call("m1"), shop.call("m2", 1), "not json", "nor this")
    assert shop.is_balanced()
    kept = tables.read_arrow(shop.home, table)
    tables.write(shop.home, table, kept.slice(1))
    assert shop.ledger()["balance"] == 1


def test_a_row_that_is_there_twice_shows(shop) -> None:
    shop.run(shop.call("m1"), shop.call("m2", 1))
    tables.append(shop.home, tables.MESSAGES, tables.read_arrow(shop.home, tables.MESSAGES).slice(0, 1))
    assert shop.ledger()["balance"] == -1


def test_rows_that_an_erasure_took_out_of_the_quarantine_are_counted_when_it_says_so(shop) -> None:
    shop.run(shop.call("m1"), shop.call("m2", properties={}))
    tables.remove(shop.home, tables.QUARANTINE, pc.field("subject") == shop.name("user_id", "u1"))
    assert shop.ledger()["balance"] == 1
    count_erased(shop.home, {"segment": 1})
    assert shop.ledger() | {"erased": 1, "balance": 0} == shop.ledger()


def test_a_home_in_which_nothing_was_received_has_an_empty_ledger(shop) -> None:
    assert set(shop.ledger().values()) == {0}


KINDS = ("good", "repeat", "broken", "nobody", "refused", "silent", "order", "bad order", "future", "noise")
LINES = st.lists(st.sampled_from(KINDS), min_size=1, max_size=25)


@settings(
    max_examples=4,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(LINES, LINES)
def test_nothing_vanishes(new_shop, first: list[str], second: list[str]) -> None:
    shop = new_shop()
    make = {
        "good": lambda i: shop.call(f"g{i}", i),
        "repeat": lambda i: shop.call("again", 0),
        "broken": lambda i: "{" * (i + 1),
        "nobody": lambda i: shop.call(f"n{i}", user=None),
        "refused": lambda i: shop.call(f"r{i}", i, user="no", context=shop.refused),
        "silent": lambda i: shop.call(f"s{i}", i, user=f"quiet{i}", context={}),
        "order": lambda i: shop.order(f"o{i}", i, n=i % 4),
        "bad order": lambda i: shop.order(f"b{i}", i) | {"timestamp": "?"},
        "future": lambda i: shop.call(f"f{i}", 9_999, receivedAt=shop.at(0)),
        "noise": lambda i: "\x00\x7f,;",
    }
    for name, kinds in (("one", first), ("two", second)):
        path = shop.file("", *(make[kind](i) for i, kind in enumerate(kinds)), shop.call(f"end-{name}", 99), name=f"{name}.jsonl")
        before = tables.count(shop.home, tables.EVENTS)
        report = shop.ingest(path)
        assert shop.adds_up(report)
        assert report.read == len(kinds) + 1
        assert tables.count(shop.home, tables.EVENTS) == before + report.lines - report.withdrawn
        assert not shop.events().duplicated(["source", "event_id"]).any()
        assert shop.is_balanced()
    assert shop.table(tables.QUARANTINE)["quarantine_id"].is_unique
