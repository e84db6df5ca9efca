"""What a worker has to do now and then that would hold up fresh calls: done beside them, or seldom.

In: the SQLite files that the worker writes. Out: their write-ahead logs moved into them by a thread of its own; and a collector of
garbage that looks at what is new only. Never decides what outlives a loss of power: `sync` of these files does.
"""

import gc
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Lock

from pipelines.log import connection
from pipelines.online.file import LONG_WAL_PAGES

CHECKPOINT_S = 0.5  # between two looks at the files
CHECKPOINT_BYTES = 2 << 20  # of a write-ahead log, from which on it is moved
RESET_PAGES = 49_152  # of one, from which on its writer is stopped for the moment that the rest takes, or it would never be used anew: two
# flushes of the disk, which calls wait for, so it is seldom
NICENESS = 10  # of the thread that does this: events come first
COLLECT_S = 600.0  # between two looks at everything that was made since, in a moment when nobody waits
COLLECT_BUSY_S = 6 * 3_600.0  # the same, where there is no such moment
_THRESHOLDS = (1_000, 10, 1_000_000)  # of Python's collector: young objects in a millisecond or two, the old ones never by itself


@contextmanager
def checkpoints(paths: Callable[[], Sequence[Path]], writing: Lock) -> Iterator[None]:
    """Move what is committed to these files out of their write-ahead logs while the block runs; who writes them goes on meanwhile.

    `paths`: asked each time, for one file may be followed by another. `writing`: what the writer holds while it writes.
    """
    stop = threading.Event()
    thread = threading.Thread(target=_run, args=(paths, writing, stop), name="checkpoints", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def connect(path: Path) -> sqlite3.Connection:
    """As the log opens its files; what this connection commits is moved by the thread: a commit that did it would wait for two flushes."""
    db = connection.connect(path)
    db.execute(f"PRAGMA wal_autocheckpoint = {LONG_WAL_PAGES}").fetchall()
    return db


class Garbage:
    """Python's own collector stops a worker that holds thousands of customers ready for tenths of a second, several times a minute."""

    def __init__(self) -> None:
        """What is there now is not looked at again."""
        self._collected_s = 0.0
        gc.set_threshold(*_THRESHOLDS)
        self._collect()

    def tidy(self, *, is_quiet: bool) -> None:
        """Look at what a step made, after each; at what has gathered, seldom. `is_quiet`: no call came for a while. What a worker lets go
        needs no collector, as a rule.
        """
        gc.collect(1)  # by itself it begins when more were made than let go: of customers held ready, far too late
        if time.monotonic() - self._collected_s > (COLLECT_S if is_quiet else COLLECT_BUSY_S):
            self._collect()

    def close(self) -> None:
        """Let Python tidy up at its end as ever."""
        gc.unfreeze()

    def _collect(self) -> None:
        gc.collect()
        gc.freeze()
        self._collected_s = time.monotonic()


def yield_to_others() -> None:
    """Have this thread take only what processor time the others leave, where the system knows that of a thread."""
    if sys.platform.startswith("linux"):
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, max(NICENESS, os.getpriority(os.PRIO_PROCESS, thread)))


def _run(paths: Callable[[], Sequence[Path]], writing: Lock, stop: threading.Event) -> None:
    yield_to_others()
    while not stop.wait(CHECKPOINT_S):
        for path in paths():
            checkpoint(path, writing)


def checkpoint(path: Path, writing: Lock) -> bool:
    """Move the file's write-ahead log into it, as far as nobody reads it; whether it was worth the while.

    Holds up no writer while the log is short. A long one is moved to its end, so that it is used from its start again: what came while
    most of it was moved is little.
    """
    try:
        if path.with_name(f"{path.name}-wal").stat().st_size < CHECKPOINT_BYTES:
            return False
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True, isolation_level=None)) as db:
            db.execute("PRAGMA synchronous = NORMAL")
            ((_, pages, _),) = db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
            if pages >= RESET_PAGES:
                db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
                with writing:
                    db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
    except (OSError, sqlite3.Error):  # replaced meanwhile, or a full disk, which the worker's next commit tells of
        return False
    return True
