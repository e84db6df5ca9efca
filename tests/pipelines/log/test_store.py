"""The log keeps each event once and gives it to each group until it is done."""

import hashlib
import threading
from dataclasses import replace

import pytest

from pipelines.errors import StoreError
from pipelines.log import Aside, GroupCounts, LogCounts, Outcome, open_log
from pipelines.log.catalogue import Catalogue
from pipelines.log.connection import connect
from pipelines.settings import Settings


def positions(events):
    return [event.position for event in events]


def test_an_event_is_read_as_it_was_given(world, log):
    given = world.event(1, people=("user_id:a", "anonymous_id:b"), payload=b'{"messageId": "m1"}', received_us=77)
    assert log.append([given]) == [Outcome.APPENDED]
    (read,) = log.read("g", max_events=9)
    assert (read.source, read.subjects, read.payload, read.received_us, read.tries) == ("shop", given.subjects, given.payload, 77, 0)


def test_a_payload_is_not_readable_in_any_file(world, log):
    log.append([world.event(1, people="user_id:a", payload=b"the-lady-of-the-lake"), world.event(2, payload=b"the-lady-of-the-lake")])
    log.checkpoint()
    assert world.bytes_with(b"user_id:a"), "the envelope is clear, so the search does find what is there"
    assert not world.bytes_with(b"the-lady")


def test_no_events_are_no_work(log):
    assert log.append([]) == []
    log.commit("g", [])
    assert log.read("g", max_events=1) == []


# -- once


def test_an_id_is_taken_once_per_source_within_a_call_between_calls_and_after_a_restart(world, log):
    assert log.append([world.event(1), world.event(1), world.event(1, source="other")]) == ["appended", "duplicate", "appended"]
    assert log.append([world.event(1)]) == ["duplicate"]
    log.close()
    again = world.open()
    assert again.append([world.event(1), world.event(1, source="other"), world.event(2)]) == ["duplicate", "duplicate", "appended"]
    assert again.counts() == LogCounts(appended=3, duplicate=4, erased=0, parked=0)


def test_source_and_id_do_not_run_into_each_other(world, log):
    one, other = replace(world.event(1), source="a", message_id="bc"), replace(world.event(1), source="ab", message_id="c")
    assert log.append([one, other]) == ["appended", "appended"]


def test_an_id_is_known_after_its_segment_was_closed_and_after_it_was_forgotten(world):
    log = world.open()
    log.append([world.event(n) for n in range(5_000)])
    world.hours_pass(25)
    assert log.append([world.event(n) for n in range(5_000, 5_010)]) == ["appended"] * 10
    assert len(world.segments()) == 2
    assert log.append([world.event(n) for n in range(5_010)]) == ["duplicate"] * 5_010
    while events := log.read("g", max_events=3_000):
        log.commit("g", positions(events))
    assert log.trim(before_us=10**14) == 5_010
    assert len(world.segments()) == 1
    assert log.append([world.event(n) for n in range(5_010)]) == ["duplicate"] * 5_010
    assert log.counts() == LogCounts(appended=5_010, duplicate=10_020, erased=0, parked=0)


def test_ids_of_any_letters_are_ids(world, log):
    odd = [replace(world.event(1), message_id=text) for text in ("\ud800", "", "\0", "x" * 10_000, "é", "e\u0301")]
    assert log.append(odd) == ["appended"] * 6
    assert log.append(odd) == ["duplicate"] * 6


def test_two_processes_at_the_same_door_keep_each_event_once(world):
    doors = [world.open(), world.open(), world.open()]
    outcomes = [[], [], []]

    def send(at):
        for start in range(0, 600, 20):
            outcomes[at] += doors[at].append([world.event(n) for n in range(start, start + 20)])

    threads = [threading.Thread(target=send, args=(at,)) for at in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [sum(seen[n] == "appended" for seen in outcomes) for n in range(600)] == [1] * 600
    assert doors[0].counts() == LogCounts(appended=600, duplicate=1_200, erased=0, parked=0)


def test_a_home_opened_by_many_at_once_is_one_log(tmp_path):
    settings, logs = Settings(home=tmp_path), []
    threads = [threading.Thread(target=lambda: logs.append(open_log(tmp_path, settings=settings))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(logs) == 8
    for log in logs:
        log.close()
    assert len(list((tmp_path / "log" / "segments").glob("*.db"))) == 1


# -- groups


def test_events_come_oldest_first_and_once_to_each_group(world, log):
    log.append([world.event(n) for n in range(10)])
    assert positions(log.read("g", max_events=4)) == [1, 2, 3, 4]
    assert positions(log.read("g", max_events=100)) == [5, 6, 7, 8, 9, 10]
    assert log.read("g", max_events=100) == []
    assert positions(log.read("other", max_events=100)) == list(range(1, 11))


def test_what_was_not_committed_comes_again_after_a_restart_with_its_tries(world, log):
    log.append([world.event(n) for n in range(6)])
    log.read("g", max_events=4)
    log.commit("g", [3, 1])
    log.close()
    again = world.open()
    assert [(event.position, event.tries) for event in again.read("g", max_events=9)] == [(2, 1), (4, 1), (5, 0), (6, 0)]
    again.release("g")
    assert [(event.position, event.tries) for event in again.read("g", max_events=9)] == [(2, 2), (4, 2), (5, 1), (6, 1)]


def test_commits_in_any_order_and_repeated_count_once(world, log):
    log.append([world.event(n) for n in range(5)])
    log.read("g", max_events=5)
    for done in ([5], [2, 4], [4, 5], [1], [1, 2, 3, 4, 5]):
        log.commit("g", done)
    assert log.group_counts("g") == GroupCounts(committed=5, parked=0, erased=0, pending=0)


def test_a_position_of_another_log_is_refused(world, log):
    log.append([world.event(1)])
    log.read("g", max_events=1)
    with pytest.raises(TypeError, match="another log"):
        log.commit("g", ["1-0"])
    with pytest.raises(ValueError, match="was never given"):
        log.commit("g", [2])


def test_only_one_reader_of_a_group_reads_at_a_time(world):
    first, second = world.open(), world.open()
    first.append([world.event(n) for n in range(10)])
    assert len(first.read("g", max_events=5)) == 5
    assert second.read("g", max_events=5) == []
    world.seconds_pass(world.takeover_s - 0.1)
    assert second.read("g", max_events=5) == []
    assert len(first.read("g", max_events=2)) == 2


def test_a_silent_reader_s_events_go_to_another_one(world):
    first, second = world.open(), world.open()
    first.append([world.event(n) for n in range(10)])
    first.read("g", max_events=5)
    first.commit("g", [1, 2])
    world.seconds_pass(world.takeover_s)
    assert [(event.position, event.tries) for event in second.read("g", max_events=4)] == [(3, 1), (4, 1), (5, 1), (6, 0)]
    assert first.read("g", max_events=5) == [], "it was thought dead, and has to wait its turn"
    first.commit("g", [3])  # its work counts all the same
    assert first.group_counts("g").committed == 3


def test_a_reader_that_keeps_asking_keeps_its_turn(world):
    first, second = world.open(), world.open()
    first.append([world.event(1)])
    first.read("g", max_events=5)
    for _ in range(20):
        world.seconds_pass(world.takeover_s / 2)
        assert first.read("g", max_events=5) == []
        assert second.read("g", max_events=5) == []


def test_a_reader_that_was_never_replaced_goes_on_where_it_was(world, log):
    log.append([world.event(n) for n in range(4)])
    log.read("g", max_events=2)
    world.seconds_pass(100 * world.takeover_s)
    assert positions(log.read("g", max_events=9)) == [3, 4]


def test_closing_gives_back_at_once(world):
    first, second = world.open(), world.open()
    first.append([world.event(1)])
    first.read("g", max_events=5)
    first.close()
    assert [event.tries for event in second.read("g", max_events=5)] == [1]


def test_a_reader_with_a_name_takes_up_at_once_what_it_held_before_it_died(world):
    dead = world.open(consumer="worker-1")
    dead.append([world.event(1)])
    dead.read("g", max_events=5)
    assert len(world.open(consumer="worker-1").read("g", max_events=5)) == 1


@pytest.mark.parametrize("jump_h", [-24 * 365, -1, 1, 24, 24 * 365 * 70])
def test_a_clock_that_jumps_neither_ends_a_turn_nor_loses_nor_repeats_an_event(world, jump_h):
    first, second = world.open(), world.open()
    first.append([world.event(n) for n in range(10)])
    first.read("g", max_events=3)
    world.hours_pass(jump_h)
    assert second.read("g", max_events=5) == []
    assert first.append([world.event(n) for n in range(5, 15)]) == ["duplicate"] * 5 + ["appended"] * 5
    world.hours_pass(-jump_h)
    first.append([world.event(n) for n in range(10, 20)])
    assert positions(first.read("g", max_events=99)) == list(range(4, 21))
    first.commit("g", range(1, 21))
    assert first.group_counts("g") == GroupCounts(committed=20, parked=0, erased=0, pending=0)


def test_a_clock_that_was_far_ahead_does_not_keep_its_events_for_ever(world, log):
    world.hours_pass(24 * 365 * 70)
    log.append([world.event(n, received_us=world.now_us) for n in range(10)])
    world.hours_pass(-24 * 365 * 70)
    log.append([world.event(99, received_us=world.now_us)])
    log.commit("g", positions(log.read("g", max_events=99)))
    world.hours_pass(50)
    assert log.trim(before_us=world.now_us) == 11


def test_a_machine_that_was_started_anew_leaves_nobody_waiting(world):
    first, second = world.open(), world.open()
    first.append([world.event(1)])
    first.read("g", max_events=5)
    world.uptime_ns = 1
    assert len(second.read("g", max_events=5)) == 1


def test_a_read_waits_for_an_event(world, log):
    threading.Timer(0.05, lambda: log.append([world.event(1)])).start()
    assert len(log.read("g", max_events=5, wait_s=10)) == 1


# -- set aside


def test_a_parked_event_stops_nobody_and_is_kept_with_its_reason(world, log):
    log.append([world.event(1, people="user_id:a"), world.event(2)])
    first, _ = log.read("g", max_events=2)
    log.park("g", first, "item_missing")
    log.park("g", first, "item_missing")
    (kept,) = log.parked(10)
    assert (kept.payload, kept.reason, kept.subjects, kept.source) == (first.payload, "item_missing", ("user_id:a",), "shop")
    assert log.group_counts("g") == GroupCounts(committed=0, parked=1, erased=0, pending=1)
    assert log.counts().parked == 1
    assert log.drop_parked([kept.id, kept.id + 1]) == 1
    assert log.parked(10) == []
    assert log.counts().parked == 1, "what was parked, since ever"


def test_bytes_at_the_door_are_kept_sealed(world, log):
    refused = [Aside("shop", b"\xff no event", "not_text"), Aside("shop", b"half an event", "not_json", ("user_id:a",))]
    assert log.set_aside(refused) == ["appended", "appended"]
    assert [(kept.payload, kept.reason, kept.tries) for kept in log.parked(10)] == [
        (b"\xff no event", "not_text", 0),
        (b"half an event", "not_json", 0),
    ]
    log.checkpoint()
    assert not world.bytes_with(b"an event")
    assert log.counts() == LogCounts(appended=0, duplicate=0, erased=0, parked=2)
    assert log.count_parked() == 2


def test_bytes_brought_again_after_a_kill_are_kept_once_even_if_they_were_taken_away_meanwhile(world, log):
    refused = [Aside("shop", b"half", "not_json"), Aside("shop", b"half", "not_json"), Aside("shop", b"half", "not_json", message_id="7-1")]
    assert log.set_aside(refused) == ["appended", "duplicate", "appended"], "what comes from another place is another message"
    log.drop_parked([kept.id for kept in log.parked(9)])
    log.close()
    again = world.open()
    assert again.set_aside(refused) == ["duplicate"] * 3
    assert again.set_aside([Aside("app", b"half", "not_json")]) == ["appended"]
    assert again.counts() == LogCounts(appended=0, duplicate=4, erased=0, parked=3)
    assert [kept.source for kept in again.parked(9)] == ["app"]


def test_many_bad_calls_are_one_commit(world, log, monkeypatch):
    commits = []
    db = log._readers.catalogue.db
    db.set_trace_callback(lambda statement: commits.append(statement) if statement.startswith("COMMIT") else None)
    log.set_aside([Aside("shop", b"%d" % n, "not_json") for n in range(2_500)])
    db.set_trace_callback(None)
    assert len(commits) == 1
    assert log.count_parked() == 2_500


def test_bytes_that_were_brought_cannot_be_guessed_at_from_the_file(world, log):
    log.set_aside([Aside("shop", b"ada@example.com", "not_json")])
    log.checkpoint()
    plain = hashlib.blake2b(b"shop\0\0ada@example.com", digest_size=16).digest()
    assert not world.bytes_with(plain)
    assert world.bytes_with(log._readers._digest(Aside("shop", b"ada@example.com", "not_json"))), "the control: it is known by that"


# -- looked at once more


def test_done_events_can_be_looked_at_by_their_positions_until_they_are_gone(world, log):
    log.append([world.event(n, people=f"user_id:{'ab'[n % 2]}") for n in range(4)])
    world.hours_pass(25)
    log.append([world.event(n, people="user_id:c") for n in range(4, 6)])
    given = log.read("g", max_events=9)
    log.commit("g", positions(given))
    assert log.look([2, 5, 1]) == [given[0], given[1], given[4]]
    assert log.subjects([6, 1, 99]) == {1: ("user_id:a",), 6: ("user_id:c",)}
    assert log.read("g", max_events=9) == [], "it is given to no group by that"
    log.remove(["user_id:a"])
    assert positions(log.look([1, 2, 3])) == [2]
    assert log.subjects([1, 2, 3]) == {2: ("user_id:b",)}
    world.vault.destroy(["user_id:b"])
    assert log.look([2]) == []
    log.trim(before_us=world.now_us)
    assert log.subjects([2, 5]) == {}, "their segments are forgotten"


# -- segments and retention


def test_a_segment_is_closed_after_its_hours_and_reading_goes_across(world, log):
    for day in range(4):
        log.append([world.event(10 * day + n) for n in range(10)])
        world.hours_pass(25)
    assert len(world.segments()) == 4
    assert positions(log.read("g", max_events=15)) == list(range(1, 16))
    assert positions(log.read("g", max_events=99)) == list(range(16, 41))


def test_only_what_is_old_and_done_by_every_group_is_forgotten(world, log):
    for day in range(3):
        log.append([world.event(10 * day + n, received_us=world.now_us) for n in range(10)])
        world.hours_pass(25)
    start = world.now_us - int(75 * 3.6e9)
    assert log.trim(before_us=world.now_us) == 0, "nobody has read any of it"
    log.read("g", max_events=99)
    log.commit("g", range(1, 31))
    log.read("slow", max_events=15)
    log.commit("slow", range(1, 16))
    assert log.trim(before_us=start) == 0, "all of it is younger"
    assert log.trim(before_us=world.now_us) == 10, "the slow group still needs the second segment"
    assert positions(log.read("slow", max_events=99)) == list(range(16, 31))
    log.commit("slow", range(16, 31))
    assert log.trim(before_us=world.now_us) == 20
    assert len(world.segments()) == 1
    assert log.append([world.event(5), world.event(99)]) == ["duplicate", "appended"]
    assert positions(log.read("late", max_events=99)) == [31]
    assert log.group_counts("late") == GroupCounts(committed=30, parked=0, erased=0, pending=1)


def test_files_of_a_forgotten_segment_that_a_crash_left_are_unlinked(world, log):
    left = world.folder / "segments" / "00000000.db"
    left.write_bytes(b"left over")
    log.trim(before_us=0)
    assert not left.exists()


def test_a_segment_that_a_crash_closed_half_way_is_closed_by_the_next_append(world, log):
    log.append([world.event(1)])
    catalogue = Catalogue(world.folder, connect)
    segment = catalogue.segment(1)
    segment.seal_off()  # the power went before the catalogue knew
    segment.close()
    catalogue.close()
    assert log.append([world.event(1), world.event(2)]) == ["duplicate", "appended"]
    assert positions(log.read("g", max_events=9)) == [1, 2]


def test_a_missing_segment_is_named(world, log):
    log.append([world.event(1)])
    log.close()
    for path in world.segments():
        path.unlink()
    with pytest.raises(StoreError, match=r"00000001.db is missing; put it back"):
        world.open().read("g", max_events=1)


# -- the books


def test_the_books_balance_at_every_moment_of_a_busy_hour(world):
    door, reader, desk = world.open(), world.open(), world.open()
    is_over, is_seen, seen = threading.Event(), threading.Event(), 0

    def append():
        for start in range(0, 1_600, 20):
            if start == 800:
                assert is_seen.wait(60)
            door.append([world.event(n // 2) for n in range(start, start + 20)])
        is_over.set()

    def read():
        while not is_over.is_set() or reader.pending("g"):
            for event in reader.read("g", max_events=7, wait_s=0.01):
                if event.position % 50 == 0:
                    reader.park("g", event, "item_missing")
                else:
                    reader.commit("g", [event.position])

    threads = [threading.Thread(target=work) for work in (append, read)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        before = desk.counts().appended
        counts = desk.group_counts("g")
        after = desk.counts().appended
        assert before <= counts.committed + counts.parked + counts.erased + counts.pending <= after
        seen += 1
        if seen > 20:
            is_seen.set()
    assert is_seen.is_set(), "the control: it was looked at while events came"
    assert desk.group_counts("g") == GroupCounts(committed=784, parked=16, erased=0, pending=0)
    assert desk.counts() == LogCounts(appended=800, duplicate=800, erased=0, parked=16)
