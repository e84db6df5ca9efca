"""Which events and which catalogue the feature tables were built from: a note beside them.

In: a home. Out: the note, written when a build has ended; and whether a table is known to be older than the events or the catalogue are
by now. Of a table that the note is not about, such as one of an older home, nothing is known. Never looks into a row.
"""

import hashlib
import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from pipelines import tables
from pipelines.errors import StoreError
from pipelines.private_file import replace_file
from pipelines.tables import Table

SOURCES = (tables.EVENTS, tables.ITEMS)
_NOTE = ".built_from.json"


def note(home: Path, seen: Path, built: Iterable[Table]) -> None:
    """Write down that these tables, as they are in `home` now, were built from the sources as they are in `seen`. Raises StoreError."""
    path, told = home / "tables" / _NOTE, {"sources": _content(seen), "tables": {table.name: _version(home, table.name) for table in built}}
    try:
        replace_file(path, json.dumps(told).encode())
    except OSError as error:
        raise StoreError(f"features: {path} could not be written ({error.strerror}); free space, then run again") from error


def is_outdated(home: Path, name: str) -> bool:
    """Whether the feature table of this name was built before the events or the catalogue became what they are."""
    path = home / "tables" / _NOTE
    if not path.exists():
        return False
    told = json.loads(path.read_text())
    return bool(told["tables"].get(name) == _version(home, name)) and told["sources"] != _content(home)


def _version(home: Path, name: str) -> str:
    return (home / "tables" / name).resolve().name


def _content(home: Path) -> str:
    """By content: the same rows, read in again, are the same."""
    return _hashed(home, *(_version(home, table.name) for table in SOURCES))


@lru_cache(4)
def _hashed(home: Path, *versions: str) -> str:
    """`versions`: what is published under a name does not change."""
    parts = (tables.content_hash(home, table) if tables.exists(home, table) else "none" for table in SOURCES)
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()
