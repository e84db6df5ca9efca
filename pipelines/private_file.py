"""A SQLite file that is for its owner's eyes only: made, opened, written whole or not at all, and set to keep what it acknowledges.

In: a path and the statements that create its tables. Out: a connection in autocommit mode. Beside it the two ways in which any file here is
made to outlive a loss of power. Never deletes or migrates anything.
"""

import os
import sqlite3
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipelines.errors import StoreError

PATIENCE_S = 10.0  # with others who are moving a write-ahead log: a large one takes seconds


def open_private(path: Path, schema: str, *, room: str, is_durable: bool = True, busy_s: float = 10.0) -> sqlite3.Connection:
    """A connection to the file, for any thread. `room`: who says so in an error. Not durable: a loss of power may take the newest commits.

    What is deleted is overwritten in the file; see `PRAGMA secure_delete`. Raises StoreError where the file cannot be used.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # SQLite's files beside it take its rights. Only where it is not there: closing a handle of a file gives up every lock that this
        # process holds on it, its other connections' too, and another process would then unlink the log that they write to.
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        db = sqlite3.connect(path, timeout=busy_s, isolation_level=None, check_same_thread=False)
        write_ahead(db, busy_s=busy_s)
        for pragma in (f"synchronous = {'FULL' if is_durable else 'NORMAL'}", "secure_delete = ON"):
            db.execute(f"PRAGMA {pragma}").fetchall()
        db.executescript(schema)
    except (sqlite3.Error, OSError) as error:
        raise StoreError(f"{room}: {path} could not be opened ({error}); check its rights and the space on its disk") from error
    return db


def write_ahead(db: sqlite3.Connection, *, busy_s: float) -> None:
    """Put the file into WAL mode. Of several who open a new file at once SQLite refuses some without waiting, whatever its timeout."""
    until = time.monotonic() + busy_s
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL").fetchall()
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
        time.sleep(0.01)


@contextmanager
def transaction(
    db: sqlite3.Connection, path: Path, *, room: str, mend: str = "free space or mend its rights, then go on"
) -> Iterator[sqlite3.Connection]:
    """One that sees no other writer: what is written inside is kept at the end of the block, or none of it. Raises StoreError."""
    try:
        db.execute("BEGIN IMMEDIATE")
        yield db
        db.execute("COMMIT")
    except BaseException as error:
        with suppress(sqlite3.Error):
            if db.in_transaction:
                db.execute("ROLLBACK")
        if isinstance(error, sqlite3.Error):
            raise StoreError(f"{room}: {path} could not be written ({error}); {mend}") from error
        raise


def flush(path: Path, *, room: str) -> None:
    """What was committed to the SQLite file `path`, in WAL mode, outlives a loss of power from now on. Raises StoreError."""
    try:
        sync(path.with_name(f"{path.name}-wal"))  # SQLite holds no lock on this one
    except OSError as error:
        raise StoreError(f"{room}: {path} could not be written ({error}); free space or mend its rights") from error


def sweep(db: sqlite3.Connection, path: Path, *, room: str) -> None:
    """Leave no byte of what was deleted, in the file or in its write-ahead log. Rewrites the file, for which writers wait.

    `secure_delete` alone does: pages that were split keep copies of what moved. Raises StoreError where others keep it in use, or the disk
    is full.
    """
    try:
        db.execute("VACUUM").fetchall()
        is_empty = empty_log(db)
    except sqlite3.Error as error:
        raise StoreError(f"{room}: {path} was not swept of what was deleted ({error}); free space on its disk, and do it again") from error
    if not is_empty:
        raise StoreError(f"{room}: {path} stayed in use, so deleted bytes are still in its write-ahead log; do it again")


def empty_log(db: sqlite3.Connection, *, patience_s: float = PATIENCE_S) -> bool:
    """Move the write-ahead log into the file and empty it; whether nobody kept it in use for so long. Raises sqlite3.Error.

    SQLite waits for readers by itself, but not for others who are moving the log just then.
    """
    until = time.monotonic() + patience_s
    while True:
        ((is_busy, _, _),) = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        if not is_busy or time.monotonic() > until:
            return not is_busy
        time.sleep(0.01)


def sync(path: Path) -> None:
    """What was written to the file, or the names in the folder, outlive a loss of power from now on. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_file(path: Path, content: bytes, *, rights: int = 0o666) -> None:
    """Readers see the old file or the new one, never half of either, also after a power cut. Its folder is made if absent.

    rights: of the file, as far as the process's mask lets them. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, rights), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError:
        fresh.unlink(missing_ok=True)  # where the disk is full, half a file only takes what is lacking
        raise
