"""The trail holds every act once, in order; whatever is done to it afterwards is told."""

import json
import multiprocessing
import os
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import audit
from pipelines.errors import StoreError

AT = datetime(2026, 1, 1, tzinfo=UTC)


def trail(home):
    return home / "audit" / "audit.jsonl"


def written(home, lines=4):
    for number in range(lines):
        audit.record(home, "export", by=f"person {number}", about=audit.digest(home, f"c{number % 2}"), details={"n": number}, at=AT)
    return trail(home).read_bytes().splitlines(keepends=True)


def test_acts_are_read_back_in_order_and_by_the_customer_they_are_about(tmp_path):
    audit.record(tmp_path, "promote", by="ops", details={"model": "churn", "version": 3}, at=AT)
    audit.record(tmp_path, "erase", by="officer", about=audit.digest(tmp_path, "c1"), at=AT)
    audit.record(tmp_path, "export", by="officer", about=audit.digest(tmp_path, "c2"), at=AT)
    first, *_ = entries = audit.entries(tmp_path)
    assert [(entry.number, entry.action) for entry in entries] == [(1, "promote"), (2, "erase"), (3, "export")]
    assert (first.at, first.by, first.about, first.details) == (AT, "ops", "", {"model": "churn", "version": 3})
    assert [entry.action for entry in audit.entries(tmp_path, audit.digest(tmp_path, "c1"))] == ["erase"]
    assert audit.verify(tmp_path) == audit.AuditReport(3, ())


def test_trail_does_not_hold_the_customer_it_is_about(tmp_path):
    audit.record(tmp_path, "erase", by="officer", about=audit.digest(tmp_path, "c0123456789abcdef"))
    assert b"c0123456789abcdef" not in trail(tmp_path).read_bytes()
    assert audit.digest(tmp_path / "another home", "c0123456789abcdef") != audit.digest(tmp_path, "c0123456789abcdef")


def test_home_without_acts_is_sound(tmp_path):
    assert audit.verify(tmp_path).is_sound
    assert audit.entries(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@given(data=st.data())
@settings(max_examples=60)
def test_any_changed_byte_is_told(tmp_path_factory, data):
    home = tmp_path_factory.mktemp("home")
    whole = b"".join(written(home, lines=3))
    assert audit.verify(home).is_sound  # control
    at = data.draw(st.integers(0, len(whole) - 1))
    changed = bytearray(whole)
    changed[at] ^= data.draw(st.integers(1, 255))
    trail(home).write_bytes(changed)
    assert not audit.verify(home).is_sound or json_lines(changed) == json_lines(whole)


def json_lines(content):
    try:
        return [json.loads(line) for line in bytes(content).split(b"\n")[:-1]]
    except ValueError:
        return None


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("first removed", lambda lines: lines[1:]),
        ("middle removed", lambda lines: lines[:1] + lines[2:]),
        ("last removed", lambda lines: lines[:-1]),
        ("all removed", lambda lines: []),
        ("moved", lambda lines: [lines[1], lines[0], *lines[2:]]),
        ("repeated", lambda lines: [*lines, lines[-1]]),
        ("foreign line", lambda lines: [*lines, b'{"number": 5}\n']),
        ("rewritten", lambda lines: [lines[0].replace(b"person 0", b"person 9"), *lines[1:]]),
    ],
)
def test_line_removed_moved_added_or_rewritten_is_told_and_stays_told(tmp_path, what, change):
    lines = written(tmp_path)
    trail(tmp_path).write_bytes(b"".join(change(lines)))
    assert not audit.verify(tmp_path).is_sound, what
    audit.record(tmp_path, "export", by="later")
    assert not audit.verify(tmp_path).is_sound, what
    assert audit.entries(tmp_path)[-1].by == "later"


def test_end_rolled_back_with_the_line_is_told_by_its_signature(tmp_path):
    lines = written(tmp_path)
    end = json.loads((tmp_path / "audit" / "end.json").read_bytes())
    third = json.loads(lines[2])["signature"]
    forged = {**end, "lines": 3, "bytes": sum(map(len, lines[:3])), "last": third}
    trail(tmp_path).write_bytes(b"".join(lines[:3]))
    (tmp_path / "audit" / "end.json").write_text(json.dumps(forged))
    assert not audit.verify(tmp_path).is_sound


def test_trail_of_another_home_is_not_this_ones(tmp_path):
    written(tmp_path / "there")
    written(tmp_path / "here")
    trail(tmp_path / "here").write_bytes(trail(tmp_path / "there").read_bytes())
    assert not audit.verify(tmp_path / "here").is_sound


@pytest.mark.parametrize("left", [0, 1, 200])
def test_writer_killed_within_a_line_loses_that_line_alone(tmp_path, left):
    lines = written(tmp_path)
    trail(tmp_path).write_bytes(b"".join(lines) + lines[-1][:left])
    assert audit.verify(tmp_path) == audit.AuditReport(4, ())
    audit.record(tmp_path, "export", by="later")
    assert audit.verify(tmp_path) == audit.AuditReport(5, ())


def test_writer_killed_after_its_line_has_written_it(tmp_path):
    written(tmp_path, lines=2)
    end = (tmp_path / "audit" / "end.json").read_bytes()
    audit.record(tmp_path, "erase", by="killed")
    (tmp_path / "audit" / "end.json").write_bytes(end)  # it never came to say so
    assert audit.verify(tmp_path) == audit.AuditReport(3, ())
    audit.record(tmp_path, "export", by="later")
    assert [entry.by for entry in audit.entries(tmp_path)][2:] == ["killed", "later"]
    assert audit.verify(tmp_path) == audit.AuditReport(4, ())


def _record_many(home, who, count):
    for _ in range(count):
        audit.record(home, "export", by=who)


def test_writers_at_the_same_time_each_get_their_lines(tmp_path):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_record_many, args=(tmp_path, f"writer {n}", 15)) for n in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(timeout=60)
    assert audit.verify(tmp_path) == audit.AuditReport(45, ())
    assert {entry.by for entry in audit.entries(tmp_path)} == {"writer 0", "writer 1", "writer 2"}


def test_trail_that_cannot_be_written_says_so(tmp_path, monkeypatch):
    written(tmp_path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match="No space left"):
            audit.record(tmp_path, "export", by="nobody")
    audit.record(tmp_path, "export", by="later")
    assert audit.verify(tmp_path).is_sound


def test_reading_without_the_signing_key_is_refused_and_makes_no_new_key(tmp_path):
    written(tmp_path)
    (tmp_path / "keys" / "signing.key").unlink()
    with pytest.raises(StoreError, match="signing key"):
        audit.verify(tmp_path)
    assert not (tmp_path / "keys" / "signing.key").exists()
