"""What "now" means in a home: decided when events are ingested, and the same for every later step and for serving."""

import json
import logging
from datetime import datetime

from pipelines.errors import StoreError
from pipelines.private_file import replace_file
from pipelines.settings import Settings, clock


def read_clock(settings: Settings) -> datetime:
    """What "now" means in this home, UTC. Raises StoreError where nothing was ingested and no `as_of` is set."""
    if settings.as_of is not None:
        return clock(settings, None, settings.as_of)
    path = settings.home / "clock.json"
    if not path.exists():
        raise StoreError(f"clock: expected {path}, found nothing; ingest events first, or set RAPPORT_AS_OF")
    return datetime.fromisoformat(json.loads(path.read_text())["as_of"])


def write_clock(settings: Settings, last_event: datetime | None, wall: datetime) -> datetime:
    """Decide what "now" means from the newest event and remember it for every later step and for serving.

    Where live events come into a home of history "now" leaps, and a warning says so.
    """
    now, stood = clock(settings, last_event, wall), _history_end(settings)
    told = {"as_of": now.isoformat(), "is_history": now != wall}
    replace_file(settings.home / "clock.json", json.dumps(told, indent=1).encode())
    if stood is not None and now == wall:
        logging.getLogger("rapport.clock").warning(
            "clock: this home stood at %s, the end of its history; with events of today its now is the wall clock, %d days later, and "
            "whoever has not been seen since counts as gone as long",
            f"{stood:%Y-%m-%d %H:%M} UTC", (wall - stood).days,
        )  # fmt: skip
    return now


def _history_end(settings: Settings) -> datetime | None:
    """Where this home stands because its events are history; None where it goes with the wall, or nothing was ingested."""
    path = settings.home / "clock.json"
    told = json.loads(path.read_text()) if path.exists() else {}
    return datetime.fromisoformat(told["as_of"]) if told.get("is_history") else None
