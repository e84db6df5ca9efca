"""What "now" means to the stream: the wall, or the fixed instant of a home that holds history. The twin of serving/clock.py.

In: settings and `clock.json`, which the ingest step writes. Out: microseconds since 1970, UTC. Never guesses: without a `clock.json`
the wall clock is the answer.
"""

import json
import time
from datetime import UTC, datetime, timedelta

from pipelines.settings import Settings

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class Clock:
    """Call it for the time; `refresh()` looks again at what the ingest step decided."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._fixed: int | None = None
        self.refresh()

    def __call__(self) -> int:
        """Microseconds since 1970."""
        return time.time_ns() // 1_000 if self._fixed is None else self._fixed

    def refresh(self) -> None:
        """Read again; a missing or unreadable file means the wall clock."""
        if self._settings.as_of is not None:
            self._fixed = (self._settings.as_of.astimezone(UTC) - _EPOCH) // _MICROSECOND
            return
        try:
            decided = json.loads((self._settings.home / "clock.json").read_text())
            as_of = datetime.fromisoformat(decided["as_of"]).astimezone(UTC) if decided["is_history"] else None
        except (OSError, ValueError, KeyError, TypeError):
            as_of = None
        self._fixed = None if as_of is None else (as_of - _EPOCH) // _MICROSECOND
