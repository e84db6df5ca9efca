"""Damage is found and named: an event comes as it was written, or is set aside, or the file is refused."""

import random
import shutil

import pytest

from pipelines.errors import StoreError
from pipelines.log.connection import connect
from pipelines.log.segments import Segment

EVENTS = 60


def written(world):
    log = world.open()
    log.append([world.event(n, people=f"user_id:{n % 7}", payload=b"%d " % n * 60) for n in range(EVENTS)])
    log.checkpoint()
    log.close()
    return world.segments()[0]


def change(path, at, value):
    data = bytearray(path.read_bytes())
    data[at] = value
    path.write_bytes(data)


def test_a_damaged_event_is_set_aside_and_stops_nobody(world):
    path = written(world)
    sealed = world.open()._readers.take("peek", 99)  # the bytes of one of them, by their neighbours
    assert len(sealed) == EVENTS
    data = path.read_bytes()
    change(path, data.index(b"user_id:3") + 60, data[data.index(b"user_id:3") + 60] ^ 1)
    log = world.open()
    events = log.read("g", max_events=99)
    assert len(events) == EVENTS - 1
    (kept,) = log.parked(9)
    assert (kept.reason, kept.payload) == ("damaged", None)
    assert log.counts().parked == 1
    log.commit("g", [event.position for event in events])
    assert log.pending("g") == 0


def test_no_flipped_byte_is_ever_read_as_an_event_or_hides_one(world, memory, tools):
    path, rng = written(world), random.Random(5)
    size, refused, aside = path.stat().st_size, 0, 0
    for trial in range(120):
        at = rng.randrange(size)
        copy = memory()
        shutil.copytree(world.home, copy, dirs_exist_ok=True)
        damaged = tools.World(copy)
        target = damaged.segments()[0]
        change(target, at, target.read_bytes()[at] ^ (1 << rng.randrange(8)))
        try:
            log = damaged.open()
            events = log.read("g", max_events=99)
            parked = log.parked(99)
            assert all(event.payload == b"%d " % (event.position - 1) * 60 for event in events), (trial, at)
            assert len(events) + len(parked) == EVENTS, (trial, at)
            assert log.group_counts("g").erased == 0
            aside += bool(parked)
        except StoreError:
            refused += 1
        damaged.close()
        shutil.rmtree(copy)
    assert aside > 5, "the control: flips do reach events"
    assert refused < 60, "one bad byte seldom costs the whole file"


def test_the_law_does_catch_a_log_without_checksums(world, monkeypatch):
    monkeypatch.setattr("pipelines.log.segments.numbered_checksum", lambda checksum, position: 7)
    path = written(world)
    data = path.read_bytes()
    change(path, data.index(b"user_id:3"), ord("v"))
    log = world.open()
    assert len(log.read("g", max_events=99)) == EVENTS - 1
    assert log.group_counts("g").erased == 1, "without checksums, damage would pass for an erasure"


def test_a_file_cut_short_is_refused(world):
    path = written(world)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(StoreError, match="is damaged"):
        world.open().read("g", max_events=9)


def test_people_that_share_a_short_key_are_told_apart(world, monkeypatch):
    monkeypatch.setattr("pipelines.log.segments.person_key", lambda subject: 1)
    log = world.open()
    log.append([world.event(1, people="user_id:a"), world.event(2, people="user_id:b")])
    assert log.remove(["user_id:a"]) == 1
    assert [event.subjects for event in log.read("g", max_events=9)] == [("user_id:b",)]


def test_a_position_without_its_row_is_damage_not_silence(world):
    path = written(world)
    segment = Segment(path, connect)
    segment.db.execute("DELETE FROM events WHERE position = 7")
    segment.close()
    log = world.open()
    assert 7 not in [event.position for event in log.read("g", max_events=99)]
    assert log.counts().parked == 1
