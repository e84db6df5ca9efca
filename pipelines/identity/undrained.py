"""What the workers of a home saw together that no ingest has drained from the log yet: where they know more of who is who than the tables.

In: the files of `identity.online`, opened to be read. Out: identifiers.
"""

import sqlite3
from contextlib import closing
from pathlib import Path

from pipelines.errors import StoreError
from pipelines.log.ranges import Ranges
from pipelines.vault import IDENTIFIERS


def seen_since(home: Path, drained: Ranges) -> set[str]:
    """Identifiers in calls that no ingest has drained from the log, where they said something new, as all workers of the home saw them.

    Raises StoreError where a file cannot be read.
    """
    found: set[str] = set()
    for path in sorted((home / "identity").glob("online*.db")):
        try:
            with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=10.0)) as db:
                rows = db.execute(f"SELECT {', '.join(IDENTIFIERS)}, position FROM sightings WHERE NOT is_stored").fetchall()
        except sqlite3.Error as error:
            raise StoreError(
                f"identity: {path} could not be read ({error}); it tells who was seen together since the last ingest; mend its rights, or "
                f"run `rapport ingest` and delete {path.name}* in {path.parent}"
            ) from error
        found.update(name for *names, position in rows if position is None or position not in drained for name in names if name is not None)
    return found
