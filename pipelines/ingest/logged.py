"""Events of the log -> rows staged, each under its position.

In: events as a group reads them, or as they are looked at again. Out: an origin of the run for each source. Never tells the log anything.
"""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TypeVar

import numpy as np
import pyarrow as pa

from pipelines.ingest import rereading
from pipelines.ingest.accounts import FROM_LOG
from pipelines.ingest.runs import Run
from pipelines.ingest.staging import Origin
from pipelines.log import Logged, Parked
from pipelines.sources.lines import Lines, rejected_rows

HOW = json.dumps({"mapping": None, "received": None, "unit": None, "columns": None, "delimiter": None})  # for a replay

_Item = TypeVar("_Item", Logged, Parked)


def by_source(items: Sequence[_Item]) -> list[tuple[str, list[_Item]]]:
    """The items of each source, by its name."""
    return [(source, [item for item in items if item.source == source]) for source in sorted({item.source for item in items})]


def stage(run: Run, source: str, events: Sequence[Logged], *, is_again: bool = False) -> Origin:
    """Stage events of one source; `is_again`: they were counted before."""
    written = datetime.fromtimestamp(max(event.received_us for event in events) / 1e6, UTC)
    origin = run.announce(Origin(len(run.origins), source, FROM_LOG, written, how=HOW))
    texts = [_text(event.payload) for event in events]
    is_text = np.array([text is not None for text in texts], bool)
    row = pa.array([whole(event) for event in events], pa.int64())
    bad = [event.payload.decode("utf-8", "backslashreplace") for event, text in zip(events, texts, strict=True) if text is None]
    rejected = rejected_rows(row.filter(pa.array(~is_text)), "not_text", pa.array([""] * len(bad), pa.string()), pa.array(bad, pa.string()))
    lines = Lines(pa.array([text for text in texts if text is not None], pa.string()), row.filter(pa.array(is_text)), rejected)
    (run.take_again if is_again else run.take)(rereading.calls(run.db, lines, source=source), origin)
    return origin


def _text(payload: bytes) -> str | None:
    try:
        return payload.decode()
    except UnicodeDecodeError:
        return None


def whole(event: Logged) -> int:
    """Its position, as a row's number."""
    if not isinstance(event.position, int):
        raise TypeError(f"ingest: positions of the log are whole numbers, this is a {type(event.position).__name__}")
    return event.position
