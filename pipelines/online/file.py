"""The file of the SQLite online store, open for writing: transactions, and what the store was made for.

In: a home. Out: a connection that follows the file when it is replaced. Never creates the file or a view's table, and knows no rows.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pipelines.errors import StoreError
from pipelines.online import schema as online_schema
from pipelines.online.feast_format import table_of
from pipelines.online.schema import Schema
from pipelines.private_file import flush, sweep, transaction

BUSY_S = 30.0  # a batch load holds the file for some tenths of a second at a time
CACHE_KB = 32 * 1024  # a batch of a load stays in it
WAL_PAGES = 1_000  # of the write-ahead log, from which on a commit moves it into the file
STATEMENTS = 512  # kept prepared: of some there is one for each number of keys
LONG_WAL_PAGES = 65_536  # where somebody else is to move it (`stream.upkeep`), and the writer only if that one cannot keep up
_MEND = f"{online_schema.MEND}, or free space on its disk"

Self = TypeVar("Self", bound="OnlineFile")


class OnlineFile:
    """A connection to the online store of one home; one thread."""

    def __init__(self, home: Path, *, schema: str = "", is_durable: bool = True) -> None:
        """`schema`: statements that create what the caller keeps beside Feast's tables, in the same transactions.

        Not durable: a loss of power may take transactions since the last `sync`; for who can write them again.
        """
        self.path = home / "feature_store" / "online.db"
        self._schema, self._is_durable = schema, is_durable
        self._db: sqlite3.Connection | None = None
        self._inode: tuple[int, int] | None = None
        self._made_for: tuple[int, Schema] = (-1, {})  # as of the file's schema version
        self._is_fixed = False  # nobody else can change that until the transaction ends
        self._marked: set[str] = set()  # views that this connection knows to be streamed

    @contextmanager
    def transaction(self: Self) -> Iterator[Self]:
        """Everything written inside is kept and visible at its end, or not at all. Raises StoreError where the store refuses."""
        try:
            with transaction(self._connection(), self.path, room="online store", mend=_MEND):
                yield self
        except BaseException:
            self._marked.clear()
            raise
        finally:
            self._is_fixed = False

    @property
    def db(self) -> sqlite3.Connection:
        """The connection, for what the caller keeps in the same file."""
        return self._connection() if self._db is None else self._db

    @property
    def schema(self) -> Schema:
        """What the store was made for, as it is now."""
        if not self._is_fixed:
            (version,) = self.db.execute("PRAGMA schema_version").fetchone()
            if self._made_for[0] != version:
                self._made_for = (version, online_schema.get(self.db))
            self._is_fixed = self.db.in_transaction
        return self._made_for[1]

    def has(self, view: str) -> bool:
        """Whether the view was applied."""
        return self.db.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", (table_of(view),)).fetchone() is not None

    def sync(self) -> None:
        """What was written outlives a loss of power. Raises StoreError where the disk refuses."""
        if self._db is not None and not self._is_durable:
            flush(self.path, room="online store")

    def sweep(self) -> None:
        """Leave no byte of what was removed; see `private_file.sweep`."""
        sweep(self.db, self.path, room="online store")

    def close(self) -> None:
        """Close the file."""
        if self._db is not None:
            self._db.close()
        self._db = self._inode = None
        self._made_for, self._is_fixed = (-1, {}), False
        self._marked.clear()

    def _connection(self) -> sqlite3.Connection:
        """The connection; a new one when the file is another one than it was opened on."""
        try:
            status = self.path.stat()
        except OSError as error:
            self.close()
            raise StoreError(f"online store: expected {self.path}, found nothing; run `rapport features apply`") from error
        if self._db is None or self._inode != (status.st_dev, status.st_ino):
            self.close()
            self._db, self._inode = self._opened(), (status.st_dev, status.st_ino)
        return self._db

    def _opened(self) -> sqlite3.Connection:
        try:
            # never created here: an empty file would look like a store that knows nobody
            db = sqlite3.connect(
                f"{self.path.resolve().as_uri()}?mode=rw", uri=True, timeout=BUSY_S, isolation_level=None, check_same_thread=False,
                cached_statements=STATEMENTS,
            )  # fmt: skip
            synchronous, pages = ("FULL", WAL_PAGES) if self._is_durable else ("NORMAL", LONG_WAL_PAGES)
            for pragma in (
                "journal_mode = WAL", f"synchronous = {synchronous}", "secure_delete = ON", f"cache_size = -{CACHE_KB}",
                f"wal_autocheckpoint = {pages}",
            ):  # fmt: skip
                db.execute(f"PRAGMA {pragma}").fetchall()
            if self._schema:
                db.executescript(self._schema)
        except sqlite3.Error as error:
            raise StoreError(f"online store: {self.path} could not be opened ({error}); {_MEND}") from error
        return db
