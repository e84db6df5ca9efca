"""What the workers of a home saw together that no ingest has drained from the log yet: where they know more of who is who than the tables.

In: the files of `identity.online`, opened to be read. Out: identifiers.
"""

import sqlite3
from contextlib import closing
from pathlib import Path

from pipelines.errors import StoreError
from pipelines.identity import files
from pipelines.identity.links import fresh
from pipelines.log.port import Position
from pipelines.log.ranges import Ranges


def seen_since(home: Path, drained: Ranges) -> set[str]:
    """Identifiers in calls that no ingest has drained from the log, where they said something new, as all workers of the home saw them.

    Raises StoreError where a file cannot be read.
    """
    while True:
        paths = files.newest(home)
        try:
            rows = [row for path in paths.values() for row in _came(path)]
        except StoreError:
            if files.newest(home) == paths:
                raise
            continue
        if files.newest(home) == paths:  # else another one took its place meanwhile, and holds what came since
            return {name for names, position in rows if position is None or position not in drained for name in names}


def _came(path: Path) -> list[tuple[list[str], Position]]:
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=10.0)) as db:
            return [(row.names, position) for row, position in fresh(db)]
    except sqlite3.Error as error:
        raise StoreError(
            f"identity: {path} could not be read ({error}); it tells who was seen together since the last ingest; mend its rights, or "
            f"run `rapport ingest` and delete {path.name}* in {path.parent}"
        ) from error
