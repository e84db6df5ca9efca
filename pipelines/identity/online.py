"""Who is who as calls come: the links of one worker, in a file of the home that is followed by another one after each ingest.

In: sightings, and what ingests write. Out: the identifiers whose customer is new or another one, and what the tables hold of their words
on consent, which is to be of the same moment. The file is in `identity/` of the home; it can be deleted, and is made again from the tables
of the last ingest.

A new file is made beside the old one (`filling`), which goes on taking calls; in a moment between two calls what came meanwhile is linked
on top of it, and it takes the old one's place. A worker that ends at any point leaves the old one or the new one. An erasure throws away
what is being made, for it may have been read before; then it is made again.
"""

import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, closing
from datetime import datetime
from pathlib import Path

from pipelines.errors import StoreError
from pipelines.identity import files
from pipelines.identity.filling import AtOnce, Filling, drained_of, version_of
from pipelines.identity.links import SCHEMA, Linked, Links, Sighting, row_of
from pipelines.online.file import LONG_WAL_PAGES
from pipelines.private_file import open_private, sweep, sync, transaction
from pipelines.vault import IDENTIFIERS, Vault

PATIENCE_S = (2.0, 120.0)  # after a file that could not be made, before the next try: at first, and at most


class Online:
    """The links of one home, as they arrive. For one thread and one process; `close` it at the end.

    A loss of power may take the newest links with it; the next `refresh` after an ingest has them again.
    """

    def __init__(self, home: Path, *, vault: Vault | None = None, worker: int = 0, fill: Callable[..., Filling] = AtOnce) -> None:
        """Opened, it holds what the tables say.

        `worker`: each of several that follow one log keeps files of its own. `fill`: how those are made that take its place later.
        """
        self.home, self.vault, self._worker, self._fill = home, vault, worker, fill
        self._filling: Filling | None = None
        self._told: dict[str, None] = {}  # of whom something was told since that was begun
        self._changed: list[str] = []
        self._patience_s, self._again_s = PATIENCE_S[0], float("-inf")
        with files.alone(home):
            files.tidy(home, worker)
            self._open(files.newest(home).get(worker) or files.first(home, worker))
        while self._is_behind():
            self._begin(AtOnce)
            while self._filling and not self._switch():  # but for somebody who is at the files
                time.sleep(0.01)

    def close(self) -> None:
        """Let the file go."""
        self._leave_off()
        self._db.close()

    @property
    def is_reading(self) -> bool:
        """Whether what an ingest wrote is being read; `refresh` will take it over."""
        return self._filling is not None

    def link(self, sightings: Iterable[Sighting]) -> list[Linked]:
        """Take the sightings in; the identifiers whose customer is another one, or that are new: see `Links.take`.

        Raises StoreError where the disk refuses; nothing of the sightings is kept then.
        """
        with self._write():
            told = self._links.take([(row, sighting.position) for sighting in sightings if (row := row_of(sighting)) is not None])
        if self.is_reading:
            self._told |= dict.fromkeys(linked.identifier for linked in told)
        return told

    def customer(self, identifier: str, *, at: datetime | None = None) -> str | None:
        """Whose the identifier was at that time, now where None; None for an identifier that was never seen."""
        return self._links.customer(identifier, at=at)

    def identities(self) -> list[Linked]:
        """Everything, sorted by identifier and time."""
        return self._links.identities()

    def changes(self) -> list[Linked]:
        """All rows of the identifiers of which the last `refresh` made it say something else, each one's by time."""
        return self._links.of(self._changed)

    def known(self, identifiers: Sequence[str]) -> set[str]:
        """Which of these were ever seen."""
        return self._links.known(identifiers)

    def words(self, identifiers: Sequence[str]) -> list[tuple[str, str, bool, bool, int]]:
        """What the tables hold of their words on consent: see `Links.words`."""
        return self._links.words(identifiers)

    def refresh(self) -> bool:
        """Take over what an ingest has written since, once it is read: whether that was now. Cheap where there was nothing.

        What came in meanwhile is linked again on top of it, save what an ingest has drained from the log: it has stored of that what
        may be stored, and of the rest no byte stays here. Raises StoreError where that cannot be; what was held is held.
        """
        if self._filling is None and (not self._is_behind() or time.monotonic() < self._again_s):
            return False
        try:
            if self._filling is None:
                self._begin(self._fill)
            is_switched = self._switch()
        except StoreError:
            self._leave_off()
            self._again_s, self._patience_s = time.monotonic() + self._patience_s, min(2 * self._patience_s, PATIENCE_S[1])
            raise
        if is_switched:
            self._patience_s = PATIENCE_S[0]
        return is_switched

    # -- one file after the other

    def _open(self, path: Path) -> None:
        # not durable: this file is made again from the tables, whose log is
        db = open_private(path, SCHEMA, room="identity", is_durable=False)
        db.execute(f"PRAGMA wal_autocheckpoint = {LONG_WAL_PAGES}")
        if "position" not in [column[1] for column in db.execute("PRAGMA table_info(sightings)")]:  # an older home's file
            db.execute("ALTER TABLE sightings ADD COLUMN position INTEGER")
        self._db, self.path, self._links = db, path, Links(db, vault=self.vault)
        self._version = dict(db.execute("SELECT name, version FROM versions ORDER BY name").fetchall())
        self.version = json.dumps(self._version)  # of the tables that it holds; the same after a restart

    def _is_behind(self) -> bool:
        return version_of(self.home) != self._version

    def _begin(self, fill: Callable[..., Filling]) -> None:
        self._told, self._links.noted = {}, []
        files.unfinished(self.home, self._worker).touch(mode=0o600)
        self._filling = fill(self.home, self._worker, before=self.path, vault=self.vault)

    def _leave_off(self) -> None:
        if self._filling is not None:
            self._filling.end()
        files.unfinished(self.home, self._worker).unlink(missing_ok=True)
        self._filling, self._links.noted = None, None

    def _switch(self) -> bool:
        """Put the file that was made in its place; whether there is one, of the newest tables, and nobody else is at the files."""
        if self._filling is None or not self._filling.is_done():
            return False
        with files.alone(self.home, waits=False) as is_alone:
            if not is_alone:
                return False
            made, old = files.unfinished(self.home, self._worker), self._db
            changed = self._finished(made) if made.exists() else None  # or somebody was erased meanwhile, whom it may know
            if changed is not None:
                sync(made)
                self._open(made.rename(files.following(self.home, self._worker)))
                self._changed = list(self._told | changed)
                files.tidy(self.home, self._worker)
                old.close()
            self._leave_off()
            return changed is not None

    def _finished(self, made: Path) -> dict[str, None] | None:
        """Link what came since it was begun on top; of whom it says something else. None where the tables are others by now."""
        try:
            with closing(sqlite3.connect(f"{made.resolve().as_uri()}?mode=rw", uri=True, isolation_level=None)) as db:
                for pragma in ("journal_mode = OFF", "synchronous = OFF", "secure_delete = ON"):  # what is not whole is thrown away
                    db.execute(f"PRAGMA {pragma}").fetchall()
                if dict(db.execute("SELECT name, version FROM versions")) != version_of(self.home):
                    return None
                drained = drained_of(self.home)
                came = [(row, position) for row, position in self._links.noted or () if position is not None and position not in drained]
                with transaction(db, made, room="identity"):
                    told = Links(db, vault=self.vault).take(came)
                    changed = [name for (name,) in db.execute("SELECT identifier FROM changed")]
                    db.execute("DROP TABLE changed")
        except sqlite3.Error as error:
            raise StoreError(f"identity: {made} could not be finished ({error}); free space on its disk or mend its rights") from error
        return dict.fromkeys([*changed, *(linked.identifier for linked in told)])

    def _write(self) -> AbstractContextManager[sqlite3.Connection]:
        return transaction(self._db, self.path, room="identity")


def forget(home: Path, identifiers: Sequence[str], customers: Sequence[str] = ()) -> int:
    """Remove what every worker of the home saw of these, the bytes too; returns the rows. Whoever is left stays as they are.

    For an erasure, when the tables hold nothing of the person any more: what is being made of them meanwhile is thrown away, for it may
    have been read before. Raises StoreError where a file is in use or the disk refuses: do it again.
    """
    removed = 0
    with files.alone(home):
        for worker, path in files.newest(home).items():
            files.tidy(home, worker)
            with closing(open_private(path, SCHEMA, room="identity", is_durable=False)) as db:
                with transaction(db, path, room="identity"):
                    for name in identifiers:
                        for kind in IDENTIFIERS:
                            db.execute(f"UPDATE sightings SET {kind} = NULL WHERE {kind} = ?", [name])
                        removed += db.execute("DELETE FROM identities WHERE identifier = ?", [name]).rowcount
                        removed += db.execute("DELETE FROM edges WHERE one = ?1 OR other = ?1", [name]).rowcount
                        for table in ("desks", "words"):
                            db.execute(f"DELETE FROM {table} WHERE identifier = ?", [name])
                    for customer in customers:
                        removed += db.execute("DELETE FROM identities WHERE customer_id = ?", [customer]).rowcount
                    removed += db.execute(f"DELETE FROM sightings WHERE coalesce({', '.join(IDENTIFIERS)}) IS NULL").rowcount
                sweep(db, path, room="identity")
    return removed
