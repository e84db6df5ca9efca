"""Files for their owner's eyes: opened by many at once, and replaced whole or not at all."""

import sqlite3
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import pytest

from pipelines import private_file
from pipelines.errors import StoreError
from pipelines.private_file import empty_log, open_private, replace_file, sweep, write_ahead

SCHEMA = "CREATE TABLE IF NOT EXISTS kept (id TEXT PRIMARY KEY) WITHOUT ROWID;"


class Refusing:
    """A connection whose file is being made by another process: SQLite then refuses the change of mode without waiting."""

    def __init__(self, refusals: int, code: int = sqlite3.SQLITE_BUSY) -> None:
        self.refusals, self.code = refusals, code

    def execute(self, statement: str) -> "Refusing":
        if self.refusals:
            self.refusals -= 1
            error = sqlite3.OperationalError("database is locked")
            error.sqlite_errorcode = self.code
            raise error
        return self

    def fetchall(self) -> list[tuple[str]]:
        return [("wal",)]


def test_mode_of_a_file_that_another_process_makes_is_set_when_it_lets_go():
    write_ahead(Refusing(3), busy_s=10.0)
    with pytest.raises(sqlite3.OperationalError):
        write_ahead(Refusing(3), busy_s=0.0)
    with pytest.raises(sqlite3.OperationalError):
        write_ahead(Refusing(1, sqlite3.SQLITE_CORRUPT), busy_s=10.0)


def test_many_open_a_new_file_at_once(tmp_path):
    def opened(path, gate):
        gate.wait()
        open_private(path, SCHEMA, room="here").close()

    with ThreadPoolExecutor(8) as pool:
        for n in range(20):
            gate = threading.Barrier(8)
            for done in [pool.submit(opened, tmp_path / f"{n}.db", gate) for _ in range(8)]:
                done.result()


def test_file_is_the_owners_alone(tmp_path):
    with closing(open_private(tmp_path / "a.db", SCHEMA, room="here")):
        assert stat.S_IMODE((tmp_path / "a.db").stat().st_mode) == 0o600
    with pytest.raises(StoreError, match=r"here: .* could not be opened"):
        open_private(tmp_path / "a.db" / "b.db", SCHEMA, room="here")


def test_replaced_file_is_whole_and_a_failure_leaves_the_old_one_alone(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "kept.json"
    replace_file(path, b"old")
    replace_file(path, b"new", rights=0o600)
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(private_file.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_file(path, b"newer")
    assert path.read_bytes() == b"new"
    assert [file.name for file in path.parent.iterdir()] == ["kept.json"]


CHECKPOINT_LOCK = 121  # byte of the file `-shm`, as the format of SQLite's write-ahead log has it
MOVING = f"""
import fcntl, sys
with open(sys.argv[1], "r+b") as shared:
    fcntl.lockf(shared, fcntl.LOCK_EX, 1, {CHECKPOINT_LOCK})
    print("moving", flush=True)
    sys.stdin.read()
"""


@contextmanager
def moved_by_another(path):
    """Another process is moving the write-ahead log of this file for the duration, or until the answer is called."""
    with subprocess.Popen([sys.executable, "-c", MOVING, f"{path}-shm"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "moving\n"
        try:
            yield child.stdin.close
        finally:
            child.kill()


def test_sweep_waits_for_another_who_moves_the_log(tmp_path, monkeypatch):
    path = tmp_path / "a.db"
    with closing(open_private(path, SCHEMA, room="here")) as db:
        db.execute("INSERT INTO kept VALUES ('secret')")
        with moved_by_another(path) as let_go:
            assert not empty_log(db, patience_s=0.0), "control: SQLite itself does not wait for this"
            monkeypatch.setattr(private_file.time, "sleep", lambda _: let_go())
            db.execute("DELETE FROM kept")
            sweep(db, path, room="here")
        assert path.with_name("a.db-wal").stat().st_size == 0
        assert b"secret" not in path.read_bytes()
        with moved_by_another(path):
            monkeypatch.setattr(private_file, "empty_log", lambda db: empty_log(db, patience_s=0.0))
            with pytest.raises(StoreError, match=r"here: .*a\.db stayed in use, .* do it again"):
                sweep(db, path, room="here")
