"""What "now" means to the service. In: settings and `clock.json`, which the ingest step writes. Out: an instant, UTC.

A historical log is served as of its last event, a live one as of the wall clock, and `as_of` in the settings wins over both.
Never guesses: without a `clock.json` the wall clock is the answer.
"""

import json
from collections.abc import Callable
from datetime import UTC, datetime

from pipelines.settings import Settings


def _wall() -> datetime:
    return datetime.now(UTC)


class Clock:
    """`now()` is cheap; `refresh()` looks again at what the ingest step decided."""

    def __init__(self, settings: Settings, wall: Callable[[], datetime] = _wall) -> None:
        self._settings, self._wall = settings, wall
        self._fixed: datetime | None = None
        self.refresh()

    def now(self) -> datetime:
        """The instant that answers are given for."""
        return self._fixed or self._wall()

    @property
    def stands_at(self) -> datetime | None:
        """The instant at which it stands still; None where it goes with the wall."""
        return self._fixed

    def refresh(self) -> None:
        """Read again; a missing or unreadable file means the wall clock."""
        if self._settings.as_of is not None:
            self._fixed = self._settings.as_of.astimezone(UTC)
            return
        try:
            decided = json.loads((self._settings.home / "clock.json").read_text())
            self._fixed = datetime.fromisoformat(decided["as_of"]).astimezone(UTC) if decided["is_history"] else None
        except (OSError, ValueError, KeyError, TypeError):
            self._fixed = None
