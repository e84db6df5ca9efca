"""What "now" means in a home: decided when events are ingested, and the same for every later step and for serving."""

import json
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
    """Decide what "now" means from the newest event and remember it for every later step and for serving."""
    now = clock(settings, last_event, wall)
    told = {"as_of": now.isoformat(), "is_history": now != wall}
    replace_file(settings.home / "clock.json", json.dumps(told, indent=1).encode())
    return now
