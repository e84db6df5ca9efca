"""What the service asks of the worker about one person: erase, export, profile. A small table in `requests/requests.db`.

In: questions, from processes that may read nothing but the online store. Out: answers, from the one that may. Who is asked about and
what is answered are sealed; a question's name is gone once it is answered, and an answer once it was fetched, or after an hour.
The worker holds `requests/worker.lock` for as long as it lives, so that nobody waits for one who is not there. Never does the work.
"""

import fcntl
import os
import secrets
import sqlite3
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from pipelines.errors import StoreError
from pipelines.private_file import open_private, transaction
from pipelines.vault import NOBODY, Vault

KEPT_US = 3_600_000_000  # an answer that nobody fetched
_LOOK_S = 0.5

_SCHEMA = """
CREATE TABLE IF NOT EXISTS requests (
    id TEXT PRIMARY KEY, kind TEXT NOT NULL, state TEXT NOT NULL, asked_us INTEGER NOT NULL, answered_us INTEGER,
    sealed BLOB, answer BLOB) WITHOUT ROWID;
"""


class Kind(StrEnum):
    """What may be asked."""

    ERASE = "erase"
    EXPORT = "export"
    PROFILE = "profile"


class State(StrEnum):
    """How far a request has come."""

    ASKED = "asked"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Request:
    """A question that waits. `who`: as the caller named them; `by`: in whose name it is asked."""

    id: str
    kind: Kind
    who: str
    by: str


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a request; `answer` is JSON, None while it waits."""

    kind: Kind
    state: State
    answer: bytes | None


class Requests:
    """The requests of one home. Safe to use from several processes; one thread each."""

    def __init__(self, home: Path, *, vault: Vault) -> None:
        self.path, self._vault = home / "requests" / "requests.db", vault
        self._db = open_private(self.path, _SCHEMA, room="requests")

    def ask(self, kind: Kind, who: str, *, by: str, now_us: int) -> str:
        """Put a question; returns the id under which the answer will be. The same question that still waits is not put twice."""
        for waiting in self.pending():
            if (waiting.kind, waiting.who) == (kind, who):
                return waiting.id
        one = secrets.token_urlsafe(16)
        with self._write() as db:
            db.execute(
                "INSERT INTO requests VALUES (?, ?, ?, ?, NULL, ?, NULL)", (one, kind, State.ASKED, now_us, self._sealed(f"{by}\n{who}"))
            )
        return one

    def pending(self) -> list[Request]:
        """The questions that wait, oldest first."""
        rows = self._db.execute("SELECT id, kind, sealed FROM requests WHERE state = ? ORDER BY asked_us, id", (State.ASKED,)).fetchall()
        opened = self._vault.unseal([NOBODY] * len(rows), [row[2] for row in rows])
        told = [(row, cell.decode().partition("\n")) for row, cell in zip(rows, opened, strict=True) if cell is not None]
        return [Request(row[0], Kind(row[1]), who, by) for row, (by, _, who) in told]

    def answer(self, one: str, body: bytes, *, now_us: int, is_failure: bool = False) -> None:
        """Answer a question; nothing happens where it is answered already."""
        state = State.FAILED if is_failure else State.DONE
        with self._write() as db:
            db.execute(
                "UPDATE requests SET state = ?, answered_us = ?, sealed = NULL, answer = ? WHERE id = ? AND state = ?",
                (state, now_us, self._sealed(body), one, State.ASKED),
            )

    def result(self, one: str, *, kind: Kind | None = None) -> Result | None:
        """How far it has come; an answer is given once, then the request is forgotten. None for one that is not known.

        `kind`: what it has to be, else it counts as not known.
        """
        row = self._db.execute("SELECT kind, state, answer FROM requests WHERE id = ? AND kind = coalesce(?, kind)", (one, kind)).fetchone()
        if row is None or row[1] == State.ASKED:
            return Result(Kind(row[0]), State.ASKED, None) if row else None
        with self._write() as db:
            if not db.execute("DELETE FROM requests WHERE id = ?", (one,)).rowcount:
                return None  # somebody else fetched it just now
        self._empty()
        return Result(Kind(row[0]), State(row[1]), self._vault.unseal([NOBODY], [row[2]])[0])

    def expire(self, *, now_us: int) -> int:
        """Forget the answers that nobody fetched within the hour; returns how many."""
        with self._write() as db:
            gone = db.execute("DELETE FROM requests WHERE answered_us < ?", (now_us - KEPT_US,)).rowcount
        if gone:
            self._empty()
        return gone

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def _sealed(self, cell: str | bytes) -> bytes:
        return self._vault.seal([NOBODY], [cell.encode() if isinstance(cell, str) else cell])[0]

    def _empty(self) -> None:
        """The bytes leave the write-ahead log too; a reader in the way only delays that."""
        with suppress(sqlite3.Error):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def _write(self) -> AbstractContextManager[sqlite3.Connection]:
        return transaction(self._db, self.path, room="requests")


@contextmanager
def working(home: Path) -> Iterator[None]:
    """Be this home's worker for the duration. Raises StoreError where another process is."""
    path = _lock_path(home)
    until = time.monotonic() + _LOOK_S
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:  # not just somebody who looks whether we are here
                    raise StoreError(f"stream: another worker holds {path}; stop it, or set RAPPORT_HOME to another folder") from None
                time.sleep(0.02)
        yield


def is_worked(home: Path) -> bool:
    """Whether a worker of this home lives."""
    with os.fdopen(os.open(_lock_path(home), os.O_RDWR | os.O_CREAT, 0o600), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _lock_path(home: Path) -> Path:
    path = home / "requests" / "worker.lock"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path
