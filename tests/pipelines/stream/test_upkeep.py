"""What is done beside the stream holds nothing up and loses nothing."""

import gc
import threading
from contextlib import closing

import pytest

from pipelines.private_file import open_private
from pipelines.stream import upkeep, worker
from pipelines.stream.upkeep import Garbage, checkpoint, checkpoints

ROW = "INSERT INTO told VALUES (randomblob(4000))"


@pytest.fixture
def written(tmp_path):
    """A file whose write-ahead log has grown, as nobody moves it."""
    path = tmp_path / "some.db"
    with closing(open_private(path, "CREATE TABLE told (cell BLOB);", room="test", is_durable=False)) as db:
        db.execute("PRAGMA wal_autocheckpoint = 0")
        for _ in range(upkeep.CHECKPOINT_BYTES // 4_000):
            db.execute(ROW)
        yield path, db


def test_a_long_write_ahead_log_is_moved_while_its_writer_is_in_the_middle_of_a_transaction(written) -> None:
    path, db = written
    there, (rows,) = path.stat().st_size, db.execute("SELECT count(*) FROM told").fetchone()
    db.execute("BEGIN IMMEDIATE")
    db.execute(ROW)
    assert checkpoint(path)
    assert path.stat().st_size > there + upkeep.CHECKPOINT_BYTES / 2
    db.execute("COMMIT")
    assert db.execute("SELECT count(*) FROM told").fetchone() == (rows + 1,)
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_after_it_was_moved_the_log_is_used_from_its_start_again(written) -> None:
    path, db = written
    checkpoint(path)
    size = path.with_name("some.db-wal").stat().st_size
    db.execute(ROW)
    assert path.with_name("some.db-wal").stat().st_size == size


def test_a_short_log_is_left_alone_and_a_missing_file_is_no_failure(tmp_path) -> None:
    path = tmp_path / "some.db"
    assert not checkpoint(path)
    with closing(open_private(path, "CREATE TABLE told (cell BLOB);", room="test")) as db:
        db.execute(ROW)
        assert not checkpoint(path)


def test_the_thread_moves_the_log_and_ends_with_its_block(written, monkeypatch) -> None:
    path, _ = written
    moved = threading.Event()
    monkeypatch.setattr(upkeep, "CHECKPOINT_S", 0.01)
    monkeypatch.setattr(upkeep, "checkpoint", lambda path: moved.set())
    with checkpoints([path]):
        assert moved.wait(10)
    assert "checkpoints" not in [thread.name for thread in threading.enumerate()]


def test_the_collector_leaves_what_is_old_alone_until_it_is_time(monkeypatch) -> None:
    before, looked = gc.get_threshold(), []
    try:
        garbage = Garbage()
        assert gc.get_freeze_count() > 0
        monkeypatch.setattr(upkeep.gc, "collect", lambda: looked.append(1))
        garbage.tidy()
        assert not looked
        monkeypatch.setattr(upkeep, "COLLECT_S", -1.0)
        garbage.tidy()
        assert looked == [1]
        assert gc.get_threshold()[2] > 100_000
        garbage.close()
        assert gc.get_freeze_count() == 0
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def test_the_log_is_told_when_nothing_comes_and_seldom_while_something_does(world, monkeypatch) -> None:
    told = []
    real = world.log.commit
    monkeypatch.setattr(world.log, "commit", lambda group, positions: (told.append(len(positions)), real(group, positions)))
    monkeypatch.setattr(worker, "ACKNOWLEDGE_S", 3_600.0)
    world.stream._acknowledged_s = float("inf")  # a moment ago, whatever the machine does meanwhile
    for n in range(5):
        world.say(n, user="u1")
        assert world.stream.step(wait_s=0.001).read == 1
    world.stream.step(wait_s=0.001)
    assert told == [], "each costs flushes of the disk, for which the next call would wait"
    monkeypatch.setattr(worker, "ACKNOWLEDGE_S", 0.0)
    world.stream._acknowledged_s = 0.0
    world.stream.step(wait_s=0.001)
    assert told == [5]
    assert world.log.pending(worker.GROUP) == 0
