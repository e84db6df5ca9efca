"""A logged call -> what the online path needs of it: who it names, when it was made, and what it says about consent.

In: events of the log, whose identifiers were made pseudonyms at the door. Out: `Call`s; None for one whose time the ingest would
refuse, for it will be no event. Reads as the ingest does (sources/projection.py), one call at a time. Never keeps a payload.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from pipelines.events import EARLIEST
from pipelines.log import Logged
from pipelines.settings import IngestSettings

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_TIMES = ("timestamp", "originalTimestamp", "receivedAt")
_CONSENT = (("context", "consent", "categoryPreferences"), ("properties", "categoryPreferences"))


@dataclass(frozen=True, slots=True)
class Call:
    """One call. `subjects`: full pseudonyms, the main one first; `said`: purpose -> allowed; times in microseconds, UTC."""

    logged: Logged
    subjects: tuple[str, ...]
    event_us: int
    received_us: int
    said: Mapping[str, bool]

    @property
    def known_us(self) -> int:
        """When it had happened and we knew."""
        return max(self.event_us, self.received_us)


def read(logged: Logged, limits: IngestSettings) -> Call | None:
    """The call. Raises ValueError where the payload is no JSON object."""
    payload = msgspec.json.decode(logged.payload)
    if not isinstance(payload, dict):
        raise ValueError("a call is expected to be a JSON object")
    event_us = _time_us(payload)
    if event_us is None or not _is_believed(event_us, logged.received_us, limits):
        return None
    return Call(logged, logged.subjects, event_us, logged.received_us, _said(payload))


def _time_us(payload: Mapping[str, Any]) -> int | None:
    """The first time that is given, microseconds since 1970; None where it is no time."""
    given = next((value for name in _TIMES if (value := payload.get(name))), None)
    try:
        read = datetime.fromisoformat(given)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return ((read if read.tzinfo else read.replace(tzinfo=UTC)) - _EPOCH) // _MICROSECOND


def _is_believed(event_us: int, received_us: int, limits: IngestSettings) -> bool:
    lead = timedelta(microseconds=event_us - received_us)
    is_recent = -timedelta(days=limits.max_age_days) <= lead <= timedelta(minutes=limits.max_future_minutes)
    return is_recent and event_us >= (EARLIEST - _EPOCH) // _MICROSECOND


def _said(payload: Mapping[str, Any]) -> dict[str, bool]:
    """What the call says: only an exact true allows. Empty where it says nothing, or not as an object."""
    for path in _CONSENT:
        found: Any = payload
        for step in path:
            found = found.get(step) if isinstance(found, dict) else None
        if found:
            return {str(purpose): value is True for purpose, value in found.items()} if isinstance(found, dict) else {}
    return {}
