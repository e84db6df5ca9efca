"""Erased people leave no byte and do not come back."""

import threading

import pytest

from pipelines.log import Aside, GroupCounts, LogCounts, Outcome

ANNA, BERT = "user_id:" + "a" * 32, "user_id:" + "b" * 32


def entomb(world, who=ANNA):
    world.vault.entomb([who], erased_us=1, receipt="r1")


def sealed_of(world, log):
    """What lies in the files for Anna: ciphertext, which no search for a name would find."""
    needles = []
    seal = world.vault.seal

    def noted(subjects, cells):
        sealed = seal(subjects, cells)
        needles.extend(cell for subject, cell in zip(subjects, sealed, strict=True) if subject == ANNA)
        return sealed

    world.vault.seal = noted
    return needles


def test_no_byte_of_an_erased_person_stays_in_any_file(world):
    log = world.open()
    needles = sealed_of(world, log)
    for day in range(3):
        log.append([world.event(100 * day + n, people=(ANNA, BERT)[n % 2], payload=b"x" * (50 + 60 * n)) for n in range(100)])
        world.hours_pass(25)
    log.set_aside([Aside("shop", b"half an event", "not_json", (ANNA,))])
    log.park("g", log.read("g", max_events=1)[0], "item_missing")
    log.checkpoint()
    needles += [b"a" * 32]
    assert all(world.bytes_with(needle[:24]) for needle in needles), "the control: all of it was there"
    assert log.remove([ANNA]) == 152
    world.vault.destroy([ANNA])
    assert not [needle for needle in needles if world.bytes_with(needle[:24])]
    assert log.remove([ANNA]) == 0
    assert [event.subjects for event in log.read("g", max_events=999)] == [(BERT,)] * 150


def test_without_secure_deletion_the_bytes_do_stay(world, monkeypatch):
    monkeypatch.setattr("pipelines.log.connection.PRAGMAS", ("journal_mode = WAL", "secure_delete = OFF"))
    log = world.open()
    needles = sealed_of(world, log)
    log.append([world.event(n, people=(ANNA, BERT)[n % 2], payload=b"x" * 500) for n in range(100)])
    log.remove([ANNA])
    assert [needle for needle in needles if world.bytes_with(needle[:24])]


def test_an_event_that_names_an_erased_person_anywhere_is_not_kept(world, log):
    entomb(world)
    events = [world.event(1, people=ANNA), world.event(2, people=(BERT, ANNA)), world.event(3, people=BERT)]
    assert log.append(events) == ["erased", "erased", "appended"]
    assert log.append(events) == ["duplicate", "duplicate", "duplicate"]
    log.set_aside([Aside("shop", b"of Anna", "not_json", (ANNA,))])
    assert log.counts() == LogCounts(appended=1, duplicate=3, erased=3, parked=0)
    assert world.vault.unseal([ANNA], [b"0" * 40]) == [None]
    assert not world.bytes_with(ANNA.encode())


def test_what_was_taken_out_or_cannot_be_opened_is_passed_over_and_counted(world, log):
    log.append([world.event(n, people=(ANNA, BERT)[n % 2]) for n in range(10)])
    log.read("early", max_events=1)
    log.commit("early", [1])
    world.vault.destroy([BERT])
    log.remove([ANNA])
    assert log.read("early", max_events=99) == log.read("g", max_events=99) == []
    assert log.group_counts("early") == GroupCounts(committed=1, parked=0, erased=9, pending=0)
    assert log.group_counts("g") == GroupCounts(committed=0, parked=0, erased=10, pending=0)


def test_an_event_in_a_reader_s_hands_when_its_person_is_erased_cannot_be_parked(world, log):
    log.append([world.event(1, people=ANNA)])
    (held,) = log.read("g", max_events=1)
    entomb(world)
    log.remove([ANNA])
    log.park("g", held, "item_missing")
    assert log.parked(9) == []
    assert log.group_counts("g") == GroupCounts(committed=0, parked=0, erased=1, pending=0)


def test_an_erasure_between_the_sealing_of_an_event_and_its_commit_still_stops_it(world, log, monkeypatch):
    seal = world.vault.seal

    def sealed_just_before(subjects, cells):
        cells = seal(subjects, cells)
        entomb(world)
        return cells

    monkeypatch.setattr(world.vault, "seal", sealed_just_before)
    assert log.append([world.event(1, people=ANNA)]) == [Outcome.ERASED]


def test_a_log_that_looks_at_the_tombstones_only_once_would_let_it_in(world, log, monkeypatch):
    monkeypatch.setattr(world.vault, "entombed", lambda subjects: frozenset())
    entomb(world)
    assert log.append([world.event(1, people=ANNA)]) == [Outcome.APPENDED]


def test_a_person_erased_under_a_stream_of_events_leaves_none(world):
    door, desk = world.open(), world.open()
    outcomes, is_over, is_warm = [], threading.Event(), threading.Event()

    def stream():
        n = 0
        while not is_over.is_set():
            outcomes.extend(door.append([world.event(n + i, people=(ANNA, BERT)[i % 2]) for i in range(10)]))
            n += 10
            if n >= 300:
                is_warm.set()

    thread = threading.Thread(target=stream)
    thread.start()
    assert is_warm.wait(60)
    entomb(world)
    removed = desk.remove([ANNA])
    at_removal = len(outcomes)
    while len(outcomes) < at_removal + 300:
        pass
    is_over.set()
    thread.join()
    assert removed == sum(outcome == "appended" for outcome in outcomes[0::2])
    assert {event.subjects for event in desk.read("g", max_events=10**6)} == {(BERT,)}
    counts = desk.group_counts("g")
    assert counts.erased == removed
    assert desk.counts().appended == counts.erased + counts.pending
    desk.checkpoint()
    assert not world.bytes_with(ANNA.encode())


@pytest.mark.parametrize("people", [(), ("user_id:" + "c" * 32,)])
def test_others_are_left_alone(world, log, people):
    log.append([world.event(n, people=people) for n in range(20)])
    assert log.remove([ANNA]) == 0
    assert len(log.read("g", max_events=99)) == 20
