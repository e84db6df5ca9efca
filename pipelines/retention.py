"""What is older than it may be kept leaves the events, the quarantine and the log.

In: the settings' days by event type, and an instant. Out: rows removed. Files of whole days are unlinked, others written anew without
the old rows. The ids of removed events stay known, so that an old file does not bring them back, and they still count as applied.
"""

from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import tables
from pipelines.log import open_log
from pipelines.settings import Settings

EVERY = "*"  # of settings.privacy.retention_days: every type that is not named, and the quarantine


@dataclass(frozen=True)
class RetentionReport:
    """What was removed: event rows by type, quarantined rows, events of the log."""

    events: dict[str, int]
    quarantined: int
    logged: int


def apply(home: Path, *, settings: Settings, as_of: datetime) -> RetentionReport:
    """Remove what was too old at `as_of`. Holds off other writers of the tables. Raises StoreError where a store refuses."""
    days = settings.privacy.retention_days
    with tables.locked(home):
        events = _expired_events(home, days, as_of)
        quarantined = _expired_rows(home, days.get(EVERY), as_of)
    return RetentionReport(events, quarantined, _trim_log(home, settings, as_of))


def _expired_events(home: Path, days: dict[str, int], as_of: datetime) -> dict[str, int]:
    if not days or not tables.exists(home, tables.EVENTS):
        return {}
    named = pc.field("type").isin(pa.array([name for name in days if name != EVERY], pa.string()))
    old = pc.scalar(False)
    for name, kept_days in days.items():
        is_meant = ~named if name == EVERY else pc.field("type") == name
        old |= is_meant & (pc.field("event_timestamp") < _start(as_of, kept_days))
    types = tables.matching(home, tables.EVENTS, old, ["type"])["type"]
    tables.remove(home, tables.EVENTS, old)
    return {row["values"]: row["counts"] for row in sorted(pc.value_counts(types).to_pylist(), key=lambda row: str(row["values"]))}


def _expired_rows(home: Path, kept_days: int | None, as_of: datetime) -> int:
    if kept_days is None:
        return 0
    return tables.remove(home, tables.QUARANTINE, pc.field("created_timestamp") < _start(as_of, kept_days))


def _trim_log(home: Path, settings: Settings, as_of: datetime) -> int:
    if not (home / "log" / "log.db").exists():
        return 0
    before = as_of - timedelta(days=settings.privacy.log_retention_days)
    with closing(open_log(home, settings=settings)) as log:
        return log.trim(before_us=int(before.timestamp() * 1_000_000))


def _start(as_of: datetime, kept_days: int) -> pa.Scalar:
    return pa.scalar(as_of - timedelta(days=kept_days), pa.timestamp("us", tz="UTC"))
