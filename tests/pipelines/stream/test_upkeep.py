"""What is done beside the stream holds nothing up and loses nothing."""

import gc
import os
import sys
import threading
from contextlib import closing

import pytest

from pipelines.online.file import LONG_WAL_PAGES
from pipelines.private_file import open_private
from pipelines.stream import upkeep
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
    assert checkpoint(path, threading.Lock())
    assert path.stat().st_size > there + upkeep.CHECKPOINT_BYTES / 2
    db.execute("COMMIT")
    assert db.execute("SELECT count(*) FROM told").fetchone() == (rows + 1,)
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_after_it_was_moved_the_log_is_used_from_its_start_again(written) -> None:
    path, db = written
    checkpoint(path, threading.Lock())
    size = path.with_name("some.db-wal").stat().st_size
    db.execute(ROW)
    assert path.with_name("some.db-wal").stat().st_size == size


def test_a_long_log_is_moved_to_its_end_while_its_writer_holds_still(written, monkeypatch) -> None:
    path, db = written
    monkeypatch.setattr(upkeep, "RESET_PAGES", 1)
    writing, ended = threading.Lock(), threading.Event()
    with writing:  # in the middle of a transaction
        thread = threading.Thread(target=lambda: (checkpoint(path, writing), ended.set()))
        thread.start()
        db.execute(ROW)  # after the first look, or before it: there is a rest
        assert not ended.wait(0.05), "it waits for the writer"
    thread.join()
    assert db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()[0] == 0
    size = path.with_name("some.db-wal").stat().st_size
    db.execute(ROW)
    assert path.with_name("some.db-wal").stat().st_size == size, "it is used from its start again"


def test_a_short_log_is_left_alone_and_a_missing_file_is_no_failure(tmp_path) -> None:
    path = tmp_path / "some.db"
    assert not checkpoint(path, threading.Lock())
    with closing(open_private(path, "CREATE TABLE told (cell BLOB);", room="test")) as db:
        db.execute(ROW)
        assert not checkpoint(path, threading.Lock())


def test_the_thread_moves_the_log_and_ends_with_its_block(written, monkeypatch) -> None:
    path, _ = written
    moved = threading.Event()
    monkeypatch.setattr(upkeep, "CHECKPOINT_S", 0.01)
    monkeypatch.setattr(upkeep, "checkpoint", lambda path, writing: moved.set())
    with checkpoints(lambda: [path], threading.Lock()):
        assert moved.wait(10)
    assert "checkpoints" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux knows a priority of a thread")
def test_the_thread_takes_what_processor_time_the_others_leave(tmp_path, monkeypatch) -> None:
    there, own, told = os.getpriority(os.PRIO_PROCESS, 0), threading.Event(), []

    def look(path, writing):
        told.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        own.set()

    monkeypatch.setattr(upkeep, "CHECKPOINT_S", 0.01)
    monkeypatch.setattr(upkeep, "checkpoint", look)
    with checkpoints(lambda: [tmp_path / "some.db"], threading.Lock()):
        assert own.wait(10)
    assert (told[0], os.getpriority(os.PRIO_PROCESS, 0)) == (max(there, upkeep.NICENESS), there)


def test_the_collector_leaves_what_is_old_alone_until_it_is_time(monkeypatch) -> None:
    before, looked = gc.get_threshold(), []
    try:
        garbage = Garbage()
        assert gc.get_freeze_count() > 0
        monkeypatch.setattr(upkeep.gc, "collect", lambda generation=2: looked.append(1) if generation == 2 else None)
        garbage.tidy(is_quiet=True)
        assert not looked
        monkeypatch.setattr(upkeep, "COLLECT_S", -1.0)
        garbage.tidy(is_quiet=False)
        assert not looked, "while calls come it waits for a better moment"
        garbage.tidy(is_quiet=True)
        assert looked == [1]
        monkeypatch.setattr(upkeep, "COLLECT_BUSY_S", -1.0)
        garbage.tidy(is_quiet=False)
        assert looked == [1, 1], "but not for ever"
        assert gc.get_threshold()[2] > 100_000
        garbage.close()
        assert gc.get_freeze_count() == 0
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def test_what_is_new_does_not_gather_where_as_much_is_let_go() -> None:
    """As where each customer who is held ready takes the place of another: Python's own collector does not begin."""
    before, held = gc.get_threshold(), [[] for _ in range(20_000)]
    try:
        garbage = Garbage()
        for place in range(len(held)):
            held[place] = []
        assert len(gc.get_objects(generation=0)) > 10_000, "the control"
        garbage.tidy(is_quiet=False)
        assert len(gc.get_objects(generation=0)) + len(gc.get_objects(generation=1)) < 1_000
        garbage.close()
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def test_a_commit_to_the_log_never_moves_its_write_ahead_log_itself(tmp_path) -> None:
    path = tmp_path / "log.db"
    with closing(upkeep.connect(path)) as db:
        assert db.execute("PRAGMA wal_autocheckpoint").fetchone() == (LONG_WAL_PAGES,)
        assert db.execute("PRAGMA synchronous").fetchone() == (2,), "as the log opens its files"
