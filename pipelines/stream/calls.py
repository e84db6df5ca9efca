"""A logged call -> what the online path needs of it: who it names, the rows that come of it, and what it says about consent.

In: events of the log, whose identifiers were made pseudonyms at the door. Out: `Call`s; None for one that the ingest would refuse, for
it will be no event. Reads as the ingest does (see `rows`), one call at a time. Never keeps a payload.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from pipelines.log import Logged, Position
from pipelines.settings import IngestSettings
from pipelines.stream import rows
from pipelines.stream.rows import CleanRow


@dataclass(frozen=True, slots=True)
class Call:
    """One call. `subjects`: full pseudonyms, the main one first; `said`: purpose -> allowed; times in microseconds, UTC."""

    logged: Logged
    subjects: tuple[str, ...]
    event_us: int
    received_us: int
    said: Mapping[str, bool]
    rows: tuple[CleanRow, ...]  # of one message; one at least
    message_id: str
    is_speaking: bool  # whether it comes with a statement, whatever it says

    @property
    def position(self) -> Position:
        """Where it stands in the log."""
        return self.logged.position

    @property
    def known_us(self) -> int:
        """When it had happened and we knew."""
        return max(self.event_us, self.received_us)


def read(logged: Logged, limits: IngestSettings) -> Call | None:
    """The call. Raises ValueError where the payload is no JSON object."""
    payload = msgspec.json.decode(logged.payload)
    if not isinstance(payload, dict):
        raise ValueError("a call is expected to be a JSON object")
    stated = rows.given_statement(payload)
    said = rows.statement(stated)
    message_id = rows.message_id(payload) or logged.message_id
    who = logged.subjects[0] if logged.subjects else None
    found = rows.read(payload, source=logged.source, who=who, logged_us=logged.received_us, limits=limits, message_id=message_id, said=said)
    if not found:
        return None
    first = found[0]
    return Call(logged, logged.subjects, first.event_us, first.received_us, said, found, message_id, stated is not None)
