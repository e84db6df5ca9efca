"""What the machine itself takes from being told of an event to a row of it being read: one SQLite row by another process, no more.

In: a folder. Out: milliseconds, in the run and through the same loop that looks for ours, so that a moment in which the disk, the
processors or that loop stand still is in both. Run as a program it is that process. Knows neither log nor features.
"""

import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

PRAGMAS = ("journal_mode = WAL", "synchronous = NORMAL", "wal_autocheckpoint = 65536")  # as the stream writes


class Bare:
    """`tell` it of an event, `look` until `is_idle`: then `took` has its milliseconds. One is on its way at a time."""

    def __init__(self, path: Path, program: "subprocess.Popen[str]", db: sqlite3.Connection) -> None:
        self.path, self._program, self._db = path, program, db
        self.took: list[float] = []
        self._told, self._at, self._seen = 0, 0.0, 0

    @property
    def is_idle(self) -> bool:
        """Whether the row of what was told last has been read."""
        return self._seen == self._told

    def tell(self) -> None:
        """An event is durable; nothing happens while another is on its way."""
        if self.is_idle and self._program.stdin is not None:
            self._told += 1
            self._at = time.perf_counter()
            self._program.stdin.write(f"{self._told}\n")
            self._program.stdin.flush()

    def look(self) -> None:
        """Read."""
        if not self.is_idle:
            (self._seen,) = self._db.execute("SELECT number FROM told").fetchone()
            if self.is_idle:
                self.took.append((time.perf_counter() - self._at) * 1e3)


@contextmanager
def bare(folder: Path) -> Iterator[Bare]:
    """The process, as long as the block runs."""
    path = folder / "bare.db"
    with closing(_opened(path)) as db:
        db.execute("CREATE TABLE told (number INTEGER NOT NULL)")
        db.execute("INSERT INTO told VALUES (0)")
        with subprocess.Popen([sys.executable, __file__, str(path)], stdin=subprocess.PIPE, text=True) as program:
            try:
                yield Bare(path, program, db)
            finally:
                program.terminate()


def _opened(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, timeout=10.0)
    for pragma in PRAGMAS:
        db.execute(f"PRAGMA {pragma}").fetchall()
    return db


def _write(path: Path) -> None:
    with closing(_opened(path)) as db:
        for line in sys.stdin:
            db.execute("UPDATE told SET number = ?", (int(line),))


if __name__ == "__main__":
    _write(Path(sys.argv[1]))
