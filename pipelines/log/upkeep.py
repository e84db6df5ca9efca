"""What a log forgets: old segments as whole files, erased people row by row.

In: the log's folder. Out: how many events are gone. Never forgets what a group has still to read, nor any id.
"""

from collections.abc import Sequence

from pipelines.log import groups, parking
from pipelines.log.catalogue import CLOSED, Catalogue
from pipelines.log.connection import translated, truncate, writing


def trim(catalogue: Catalogue, *, before_us: int, now_us: int) -> int:
    """Unlink the segments whose events all came before, and which every group has done; returns their events."""
    _close_old(catalogue, before_us, now_us)
    while catalogue.copy_ids():
        pass
    catalogue.sweep()
    done, forgotten = _done(catalogue), 0
    for place in catalogue.places():
        if place.state != CLOSED or place.last is None or place.newest_us is None or place.last > done or place.newest_us >= before_us:
            break
        forgotten += catalogue.forget(place)
    return forgotten


def remove(catalogue: Catalogue, subjects: Sequence[str]) -> int:
    """Take out every event and everything set aside that names any of the subjects; returns how many. May be repeated."""
    removed = 0
    for place in catalogue.places():
        segment = catalogue.segment(place.number)
        try:
            removed += segment.remove(subjects)
        finally:
            segment.close()
    with writing(catalogue.db, catalogue.path) as db:
        removed += parking.drop(db, parking.of_people(db, subjects))
    truncate(catalogue.db, catalogue.path)
    return removed


def checkpoint(catalogue: Catalogue) -> None:
    """Empty every write-ahead log into its file."""
    for place in catalogue.places():
        segment = catalogue.segment(place.number)
        try:
            truncate(segment.db, segment.path)
        finally:
            segment.close()
    truncate(catalogue.db, catalogue.path)


def _close_old(catalogue: Catalogue, before_us: int, now_us: int) -> None:
    number = catalogue.newest()
    segment = catalogue.segment(number)
    head = segment.head()
    segment.close()
    if head.first <= head.last <= _done(catalogue) and head.newest_us < before_us:
        catalogue.roll(number, now_us=now_us)


def _done(catalogue: Catalogue) -> int:
    with translated(catalogue.path):
        return groups.lowest(catalogue.db)
