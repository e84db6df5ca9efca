"""How a file of the log is opened, what a transaction on it is, and what its refusals are called.

In: paths. Out: SQLite connections whose commits are on disk when they return, and StoreErrors in place of SQLite's own.
Never retries a commit: whoever asked knows whether asking again makes sense.
"""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from pipelines.errors import StoreError
from pipelines.private_file import empty_log, write_ahead

Connect = Callable[[Path], sqlite3.Connection]

PRAGMAS = ("journal_mode = WAL", "synchronous = FULL", "secure_delete = ON", "cache_size = -32768")
_BUSY_S = 10.0  # several processes write; a commit takes milliseconds, a rush of them a second
_AT_A_TIME = 4_096  # values of one IN
_NO_SPACE = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
_UNREADABLE = (sqlite3.SQLITE_IOERR_READ, sqlite3.SQLITE_IOERR_SHORT_READ)
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class LogFull(StoreError):
    """The disk is full or refuses to write. Nothing of this call was kept; a later one succeeds by itself once there is space."""


def connect(path: Path) -> sqlite3.Connection:
    """A connection to the file, which is made where it is not there; readable by its owner alone."""
    is_new = not path.exists()
    db = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False, cached_statements=256)
    if is_new:
        path.chmod(0o600)
    write_ahead(db, busy_s=_BUSY_S)  # first: the pragma alone does not wait
    for pragma in PRAGMAS:
        db.execute(f"PRAGMA {pragma}").fetchall()
    return db


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Raises SQLite's refusals as LogFull or StoreError."""
    try:
        yield
    except sqlite3.Error as error:
        raise refusal(path, error) from error


@contextmanager
def writing(db: sqlite3.Connection, path: Path, *, is_durable: bool = True) -> Iterator[sqlite3.Connection]:
    """One transaction that sees no other writer and is on disk when the block ends. Raises LogFull, StoreError; then nothing is kept.

    Not durable: it outlives the process; a loss of power only once a later one that is durable has ended.
    """
    with translated(path), nullcontext() if is_durable else _unflushed(db):
        db.execute("BEGIN IMMEDIATE")
        try:
            yield db
            db.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                if db.in_transaction:
                    db.execute("ROLLBACK")
            raise


@contextmanager
def _unflushed(db: sqlite3.Connection) -> Iterator[None]:
    (before,) = db.execute("PRAGMA synchronous").fetchone()
    db.execute("PRAGMA synchronous = NORMAL")
    try:
        yield
    finally:
        db.execute(f"PRAGMA synchronous = {before}")


@contextmanager
def reading(db: sqlite3.Connection, path: Path) -> Iterator[sqlite3.Connection]:
    """Several queries over one state of the file."""
    with translated(path):
        db.execute("BEGIN")
        try:
            yield db
        finally:
            with suppress(sqlite3.Error):
                db.execute("COMMIT")


def truncate(db: sqlite3.Connection, path: Path) -> None:
    """Move the write-ahead log into the file and empty it, so that removed bytes are in neither. Raises StoreError where readers stay."""
    with translated(path):
        is_empty = empty_log(db, patience_s=_BUSY_S)
    if not is_empty:
        raise StoreError(f"log: {path} stayed in use for {_BUSY_S:g} s, so its write-ahead log was not emptied; do it again")


def refusal(path: Path, error: sqlite3.Error) -> StoreError:
    """What to raise in place of an error of SQLite."""
    code = getattr(error, "sqlite_errorcode", 0)
    if code & 0xFF in _NO_SPACE and code not in _UNREADABLE:
        return LogFull(f"log: {path} cannot grow ({error}); free space on its disk, and writes go on by themselves")
    if code & 0xFF in _DAMAGED or code in _UNREADABLE:
        return StoreError(f"log: {path} is damaged ({error}); restore it from a backup, or move it away and let the sources send again")
    return StoreError(f"log: {path} could not be used ({error}); check its rights and who else has it open")


def is_damage(error: sqlite3.Error) -> bool:
    """Whether the file's bytes, not its disk or its users, are to blame; text that is no text has no code of SQLite."""
    return not isinstance(error, sqlite3.ProgrammingError) and getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF in _DAMAGED


def pieced(db: sqlite3.Connection, query: str, values: list) -> list[tuple]:
    """The rows of a query whose IN ({}) names many values."""
    found: list[tuple] = []
    for start in range(0, len(values), _AT_A_TIME):
        some = values[start : start + _AT_A_TIME]
        some += some[-1:] * ((1 << (len(some) - 1).bit_length()) - len(some))  # few lengths, so that few statements are prepared
        found += db.execute(query.format(",".join("?" * len(some))), some).fetchall()
    return found
