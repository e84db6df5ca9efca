"""What the log still holds of people: the rows that name them, applied or not, and what was set aside.

In: pseudonyms. Out: rows, opened on request. Reads the log's files as they are; takes no place in any group and commits nothing.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from pipelines.log import connection, parking
from pipelines.log.catalogue import Catalogue
from pipelines.log.connection import pieced, translated
from pipelines.log.intake import sealer
from pipelines.log.segments import Segment, person_key
from pipelines.vault import Vault


@dataclass(frozen=True, slots=True)
class Row:
    """An event as it lies in the log. `reason`, `parked_id`: of one that was set aside; None for one that was not."""

    source: str
    subjects: tuple[str, ...]
    received_us: int
    sealed: bytes
    reason: str | None = None
    parked_id: int | None = None


def about(home: Path, subjects: Sequence[str]) -> list[Row]:
    """The rows that name any of the subjects, oldest first; those set aside last. Raises StoreError."""
    if not subjects or not (home / "log" / "log.db").exists():
        return []
    with closing(Catalogue(home / "log", connection.connect)) as catalogue:
        rows: list[Row] = []
        for place in catalogue.places():
            with closing(catalogue.segment(place.number)) as segment:
                rows += _rows(segment, subjects)
        return rows + _parked(catalogue, lambda: parking.of_people(catalogue.db, subjects))


def nameless(home: Path) -> list[Row]:
    """What was set aside and names nobody. Raises StoreError."""
    if not (home / "log" / "log.db").exists():
        return []
    with closing(Catalogue(home / "log", connection.connect)) as catalogue:
        return _parked(catalogue, lambda: [row[0] for row in catalogue.db.execute("SELECT id FROM parked WHERE subjects = ''").fetchall()])


def opened(rows: Sequence[Row], *, vault: Vault) -> list[bytes | None]:
    """The payloads; None where a key is gone."""
    return vault.unseal([sealer(row.subjects) for row in rows], [row.sealed for row in rows])


def _rows(segment: Segment, subjects: Sequence[str]) -> list[Row]:
    with translated(segment.path):
        keys = sorted({person_key(subject) for subject in subjects})
        positions = sorted(row[0] for row in pieced(segment.db, "SELECT DISTINCT position FROM people WHERE person IN ({})", keys))
        query = "SELECT source, subjects, received_us, sealed FROM events WHERE position IN ({})"
        found = [Row(source, tuple(names.split()), at, sealed) for source, names, at, sealed in pieced(segment.db, query, positions)]
    return [row for row in found if not set(subjects).isdisjoint(row.subjects)]


def _parked(catalogue: Catalogue, ids: Callable[[], list[int]]) -> list[Row]:
    """What was set aside under these ids; nothing where no reader has made the table yet."""
    with translated(catalogue.path):
        if not catalogue.db.execute("SELECT 1 FROM sqlite_master WHERE name = 'parked'").fetchone():
            return []
        found = pieced(catalogue.db, "SELECT source, subjects, received_us, sealed, reason, id FROM parked WHERE id IN ({})", ids())
    return [Row(source, tuple(names.split()), *rest) for source, names, *rest in found]
