"""The log's way into the tables: everything once, whatever ends when."""

from contextlib import closing
from types import SimpleNamespace

import pytest

from pipelines import tables
from pipelines.errors import StoreError
from pipelines.identity.online import Online
from pipelines.ingest import draining
from pipelines.log import Aside, Log, open_log
from pipelines.log.ranges import Ranges


def test_what_was_sent_becomes_events_and_a_second_drain_finds_nothing(shop) -> None:
    shop.send(shop.call("m1"), shop.order("m2", 1), shop.call("m3", 2, context=shop.refused))
    shop.send(shop.call("w1", 3), source="web")
    assert shop.ledger() | {"pending": 4, "accepted": 4} == shop.ledger()
    report = shop.drain()
    assert shop.adds_up(report)
    assert (report.read, report.accepted, report.consent_dropped, report.lines) == (4, 4, 1, 4)
    assert sorted(shop.events()["source"].unique()) == ["segment", "web"]
    again = shop.drain()
    assert (again.read, again.lines) == (0, 0)
    assert shop.ledger()["pending"] == 0
    assert shop.is_balanced()


def test_a_message_is_one_whether_it_comes_by_file_or_by_the_log(shop) -> None:
    shop.run(shop.call("m1"), shop.call("m2", 1, context=shop.refused))
    assert shop.send(shop.call("m1"), shop.call("m2", 1, context=shop.refused), shop.call("m3", 2)) == ["appended"] * 3
    report = shop.drain()
    assert (report.accepted, report.duplicate) == (1, 2)
    assert shop.run(shop.call("m3", 2), name="late.jsonl").duplicate == 1
    assert list(shop.events()["event_id"]) == ["m1", "m3"]
    assert shop.is_balanced()


def test_a_drain_that_ends_between_the_tables_and_the_log_counts_and_applies_nothing_twice(shop, monkeypatch) -> None:
    shop.run(shop.call("m1"))
    shop.send(shop.call("m1"), shop.call("m2", 1), shop.call("m3", 2, user=None, anonymousId="a", properties={}))
    commit = draining.Log.commit
    monkeypatch.setattr(draining.Log, "commit", lambda *_: (_ for _ in ()).throw(StoreError("killed")))
    with pytest.raises(StoreError, match="killed"):
        shop.drain()
    monkeypatch.setattr(draining.Log, "commit", commit)
    events = shop.events()
    assert set(events["event_id"]) == {"m1", "m2"}
    shop.send(shop.call("m4", 3))
    report = shop.drain()
    assert (report.read, report.accepted, report.lines) == (1, 1, 1)
    assert len(shop.events()) == 3
    assert shop.is_balanced()
    assert shop.ledger() | {"accepted": 4, "applied": 3, "quarantined": 1, "duplicates": 1} == shop.ledger()


def test_control_without_the_noted_positions_the_ledger_would_show_it(shop, monkeypatch) -> None:
    shop.send(shop.call("m1"))
    commit = draining.Log.commit
    monkeypatch.setattr(draining.Log, "commit", lambda *_: (_ for _ in ()).throw(StoreError("killed")))
    with pytest.raises(StoreError, match="killed"):
        shop.drain()
    monkeypatch.setattr(draining.Log, "commit", commit)
    monkeypatch.setattr(draining, "_drained", lambda home: (Ranges(), 0))
    assert shop.drain().duplicate == 1
    assert shop.ledger()["balance"] == -1


def test_small_batches_drain_to_the_end(shop, monkeypatch) -> None:
    monkeypatch.setattr(draining, "BATCH_EVENTS", 3)
    shop.send(*(shop.call(f"m{i}", i) for i in range(10)))
    report = shop.drain()
    assert (report.read, report.accepted, len(shop.events())) == (10, 10, 10)
    assert shop.is_balanced()


def test_a_drain_ends_where_events_never_cease_and_the_next_one_takes_what_came_meanwhile(shop, monkeypatch) -> None:
    real, runs = draining._apply, []

    def apply(run, change, store, events, parked):
        runs.append(len(events))
        assert len(runs) < 5, "it would never end"
        shop.send(shop.call(f"meanwhile-{len(shop.events())}-{len(runs)}", 5))
        return real(run, change, store, events, parked)

    shop.send(shop.call("m1"), shop.call("m2"))
    monkeypatch.setattr(draining, "_apply", apply)
    for waiting in (2, 1, 1):
        runs.clear()
        assert shop.drain().accepted == waiting
        assert runs == [waiting]
    assert len(shop.events()) == 4
    monkeypatch.setattr(Log, "last", lambda _: 10**9)
    runs.clear()
    with pytest.raises(AssertionError, match="never end"):
        shop.drain()


def test_what_was_set_aside_at_the_door_and_by_another_reader_is_counted_once(shop) -> None:
    shop.send(shop.call("m1"), shop.call("m2", 1))
    with shop.vault() as vault:
        log = open_log(shop.home, settings=shop.settings, vault=vault)
        log.set_aside([Aside("web", b"\xff no event", "not_text")])
        for event in log.read("online", max_events=1):
            log.park("online", event, "tries_used_up")
        log.close()
    report = shop.drain()
    assert (report.accepted, report.quarantined, report.duplicate) == (2, 1, 1)
    assert shop.table(tables.QUARANTINE)[["source", "file", "reason"]].to_numpy().tolist() == [["web", "log", "not_text"]]
    assert shop.is_balanced()
    assert shop.drain().read == 0


def test_an_event_of_an_erased_person_that_still_waits_is_counted_and_not_stored(shop) -> None:
    shop.send(shop.call("m1", user="gone"), shop.call("m2", 1))
    with shop.vault() as vault:
        vault.entomb([vault.pseudonym("user_id", "gone")], erased_us=1, receipt="r")
    report = shop.drain()
    assert report.stored == 1
    assert list(shop.events()["event_id"]) == ["m2"]
    assert shop.ledger() | {"accepted": 2, "applied": 1, "erased": 1} == shop.ledger()
    assert shop.is_balanced()


def test_of_people_of_whom_a_drain_stored_nothing_no_byte_stays_among_the_links_online(shop) -> None:
    def linked(online: Online, log: Log) -> None:
        """As the stream does it: every call, whatever becomes of it."""
        for event in log.read("online", max_events=100):
            at = {"event_us": event.received_us, "received_us": event.received_us, "position": event.position}
            online.link([SimpleNamespace(subjects=event.subjects, **at)])

    def held() -> bytes:
        return b"".join(path.read_bytes() for path in (shop.home / "identity").iterdir())

    silent = shop.call("m1", user="quiet", anonymousId="d1", context={})
    shop.send(silent, shop.call("m2", 1, user="open", anonymousId="d2"))
    quiet, known = shop.name("user_id", "quiet"), shop.name("user_id", "open")
    with shop.vault() as vault, closing(Online(shop.home)) as online:
        log = open_log(shop.home, settings=shop.settings, vault=vault)
        linked(online, log)
        assert quiet.encode() in held(), "the control"
        shop.drain()
        shop.send(shop.call("m3", 2, user="late", anonymousId="d3", context={}))  # behind what was drained
        linked(online, log)
        assert online.refresh() is True
        assert [online.customer(name) is not None for name in (quiet, known, shop.name("user_id", "late"))] == [False, True, True]
        for name in (quiet, shop.name("anonymous_id", "d1")):
            assert name.encode() not in held()
        shop.send(shop.call("m4", -1, user="quiet", receivedAt=shop.at(5)))  # a word that lets in what waited
        linked(online, log)
        shop.drain()
        online.refresh()
        assert online.customer(quiet) == online.customer(shop.name("anonymous_id", "d1")) is not None
        log.close()
