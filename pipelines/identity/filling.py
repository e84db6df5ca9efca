"""What an ingest wrote of who is who, and of their consent -> a new file of links, and on top of it what came since. In this process, or in
one of its own.

In: the tables; the file that is to be replaced, which somebody may go on writing to. Out: the new one, and whose links it says otherwise.
Never puts a file in its place: see `online`.

`python -m pipelines.identity.filling WORKER [BEFORE]` makes the one of the home that the environment names.
"""

import os
import sqlite3
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import NamedTuple, Protocol

import duckdb
import pandas as pd

from pipelines import consent, engine, tables
from pipelines.errors import PipelineError, StoreError
from pipelines.identity import deterministic, files
from pipelines.identity.links import SCHEMA, Links, fresh
from pipelines.log.ranges import Ranges
from pipelines.private_file import sync
from pipelines.settings import Settings, silence_telemetry
from pipelines.vault import IDENTIFIERS, Vault, open_vault

TABLES = (tables.IDENTITIES, tables.IDENTITY_LINKS, tables.IDENTITY_EDGES, tables.CONSENTS, tables.INGESTS)
NICENESS = 10  # of the process: events come first

# Whose links are other ones than in the file before, or are no more.
_CHANGED = """
    CREATE TABLE changed AS
    SELECT new.identifier FROM identities new LEFT JOIN before.identities old USING (identifier, time)
    WHERE old.identifier IS NULL OR old.customer_id <> new.customer_id OR old.created <> new.created
    UNION SELECT old.identifier FROM before.identities old LEFT JOIN identities new USING (identifier, time) WHERE new.identifier IS NULL"""


class Filling(Protocol):
    """A file that is being made."""

    def is_done(self) -> bool:
        """Whether it is whole. Raises StoreError where it cannot be made."""

    def end(self) -> None:
        """Leave off."""


class AtOnce:
    """In this process; done when it is there."""

    def __init__(self, home: Path, worker: int, *, before: Path | None, vault: Vault | None) -> None:
        fill(home, files.unfinished(home, worker), before=before, vault=vault)

    def is_done(self) -> bool:
        """It is."""
        return True

    def end(self) -> None:
        """It has ended."""


class Beside:
    """In a process of its own, so that nobody's calls wait. It has its settings from the environment."""

    def __init__(self, home: Path, worker: int, *, before: Path | None, vault: Vault | None) -> None:
        self._path, named = files.unfinished(home, worker), [] if before is None else [str(before.resolve())]
        command = [sys.executable, "-m", "pipelines.identity.filling", str(worker), *named]
        self._process = subprocess.Popen(command, env=os.environ | {"RAPPORT_HOME": str(home.resolve())}, stdin=subprocess.DEVNULL)

    def is_done(self) -> bool:
        """Whether it has ended. Raises StoreError where it failed; it has said why."""
        if (code := self._process.poll()) is None:
            return False
        if code:
            raise StoreError(f"identity: {self._path} was not made, its process ended with {code}; what an ingest linked is not known yet")
        return True

    def end(self) -> None:
        """Stop it."""
        self._process.kill()
        self._process.wait()


def version_of(home: Path) -> dict[str, str]:
    """Of the tables, by name; those that are not there are left out."""
    return {table.name: str(tables.folder(home, table).resolve()) for table in TABLES if tables.exists(home, table)}


def drained_of(home: Path) -> Ranges:
    """What of the log the ingests have applied."""
    return Ranges.read(text for text in tables.read_arrow(home, tables.INGESTS, ["positions"])["positions"].to_pylist() if text)


def fill(home: Path, path: Path, *, before: Path | None = None, vault: Vault | None = None) -> None:
    """Write the empty file `path`. What came into `before` since is linked on top, save what an ingest has drained from the log.

    An ingest has stored of that what may be stored, and of the rest no byte is in the new file. Raises StoreError where the tables or
    `before` cannot be read, or `path` cannot be written or was thrown away.
    """
    try:
        # not made anew where it was thrown away; and its owner throws away what is not whole, so it keeps no journal
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True, isolation_level=None)) as db:
            for pragma in ("journal_mode = OFF", "synchronous = OFF", "temp_store = MEMORY"):
                db.execute(f"PRAGMA {pragma}").fetchall()
            db.executescript(SCHEMA)
            if before is not None:
                db.execute("ATTACH ? AS before", [f"{before.resolve().as_uri()}?mode=ro"])
            found = _read(home)
            db.execute("BEGIN")
            _seed(db, found)
            if before is not None:
                came = [(row, position) for row, position in fresh(db, "before") if position is not None and position not in found.drained]
                Links(db, vault=vault).take(came)
                db.execute(_CHANGED)
            db.executemany("INSERT INTO versions VALUES (?, ?)", found.version.items())
            db.execute("COMMIT")
        sync(path)
    except (sqlite3.Error, OSError) as error:
        raise StoreError(f"identity: {path} could not be made ({error}); free space on its disk or mend its rights") from error


class _Tables(NamedTuple):
    """As they were at one moment."""

    version: Mapping[str, str]
    links: pd.DataFrame
    edges: pd.DataFrame
    identities: pd.DataFrame
    words: list[tuple[str, str, bool, bool, int]]
    drained: Ranges


def _read(home: Path) -> _Tables:
    """An ingest may go on, and hold their lock for long: what was replaced while it was read is read again."""
    while True:
        version = version_of(home)
        try:
            links, edges, held = (tables.read(home, table) for table in (tables.IDENTITY_LINKS, tables.IDENTITY_EDGES, tables.IDENTITIES))
            found = _Tables(version, links, edges, held, _words(home), drained_of(home))
        except (OSError, PipelineError, duckdb.Error):
            if version_of(home) == version:
                raise
            continue
        if version_of(home) == version:
            return found


def _words(home: Path) -> list[tuple[str, str, bool, bool, int]]:
    with closing(engine.connect(home, threads=1, memory_limit="512MB")) as db:
        return db.execute(consent.newest_sql(tables.rows_sql(home, tables.CONSENTS))).fetchall()


def _seed(db: sqlite3.Connection, found: _Tables) -> None:
    if len(found.links):
        seen = deterministic.sightings(found.links)
        ends = [[None if place < 0 else seen.name[place] for place in role.tolist()] for role in seen.roles]
        marks = f"INSERT INTO sightings ({', '.join(IDENTIFIERS)}, time, created, is_stored) VALUES (?, ?, ?, ?, ?, ?, 1)"
        db.executemany(marks, zip(*ends, seen.time.tolist(), seen.created.tolist(), strict=True))
        Links(db, vault=None).mark_desks(seen)
    edges = found.edges[found.edges["state"].isin(["link", "cut"])]
    known = deterministic.micros(edges["created_timestamp"]).tolist()
    db.executemany("INSERT INTO edges VALUES (?, ?, ?, ?)", zip(edges["left"], edges["right"], edges["state"], known, strict=True))
    held = found.identities
    time, created = (deterministic.micros(held[column]).tolist() for column in ("event_timestamp", "created_timestamp"))
    db.executemany("INSERT INTO identities VALUES (?, ?, ?, ?)", zip(held["identifier"], time, held["customer_id"], created, strict=True))
    db.executemany("INSERT INTO words VALUES (?, ?, ?, ?, ?)", found.words)


def main() -> None:
    """Make the file. Exit 1 with one sentence where that cannot be done; 0 where nobody wants it any more."""
    silence_telemetry()
    os.nice(NICENESS)
    settings, worker = Settings(), int(sys.argv[1])
    before = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    try:
        with closing(open_vault(settings.home, master=settings.master_key)) as vault:
            fill(settings.home, files.unfinished(settings.home, worker), before=before, vault=vault)
    except PipelineError as error:
        if files.unfinished(settings.home, worker).exists():  # else it was thrown away, and its owner begins anew
            raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
