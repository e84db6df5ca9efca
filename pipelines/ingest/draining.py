"""What waits in the home's log -> the clean tables, until nothing waits.

In: the events that the group has not done, and what was set aside. Out: tables; then the log is told. A run that ends between the
two is known by the positions that it noted down with the tables: they are told again, and applied and counted once. An event without
a word of its own that consent kept out is looked at again when its people are heard of: see `waiting`.
Never commits an event whose row is not on disk.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa

from pipelines import tables
from pipelines.events import REASONS
from pipelines.ingest import accounts, staging, waiting
from pipelines.ingest.accounts import FROM_LOG, GROUP
from pipelines.ingest.logged import HOW, by_source, stage, whole
from pipelines.ingest.report import IngestReport, Judged, report
from pipelines.ingest.runs import Run, basis_by_settings, watch, working
from pipelines.ingest.staging import Origin
from pipelines.log import Log, Logged, Parked, open_log
from pipelines.log.ranges import Ranges
from pipelines.settings import Settings
from pipelines.tables import Changes
from pipelines.vault import Vault, open_vault

BATCH_EVENTS = 50_000  # published at a time
_CONSUMER = "ingest"  # one at a time, under the lock of the tables: what a killed run held is taken up at once
_TAKEOVER_S = 12.0


def drain(home: Path, *, settings: Settings, vault: Vault | None = None, log: Log | None = None) -> IngestReport:
    """Apply everything that waits in the log, batch by batch. Raises StoreError where the disk refuses; what was applied stays.

    What comes in meanwhile may be left to the next run: where events never cease, this one ends all the same.
    log, vault: the home's, where they are open already. Rows of the report are events of the log, and bytes that were set aside.
    """
    done, has_consent = Judged(), False
    span: tuple[datetime | None, datetime | None] = (None, None)
    with _opened(home, settings, vault, log) as (store, keys):
        last = store.last()
        try:
            while True:
                with working(home, settings=settings, vault=keys) as (run, change):
                    events, parked = _next(home, store, last)
                    if not events and not parked:
                        break
                    judged, span, has_consent = _apply(run, change, store, events, parked)
                store.commit(GROUP, [event.position for event in events])
                store.drop_parked([item.id for item in parked])
                done += judged
                if not events and len(parked) < BATCH_EVENTS:
                    break
        finally:
            store.release(GROUP)
    notes = watch(home, settings=settings, last_event=span[1] if done.lines else None)
    return report(done, span=span, has_consent=has_consent, notes=notes)


@contextmanager
def _opened(home: Path, settings: Settings, vault: Vault | None, log: Log | None) -> Iterator[tuple[Log, Vault]]:
    keys = vault or open_vault(home, master=settings.master_key)
    store = log or open_log(home, settings=settings, vault=keys, consumer=_CONSUMER)
    try:
        yield store, keys
    finally:
        if log is None:
            store.close()
        if vault is None:
            keys.close()


def _next(home: Path, store: Log, last: int) -> tuple[list[Logged], list[Parked]]:
    """What comes next and was not applied: events first, so what was set aside of them is known by then. None that begin after `last`."""
    ranges, last_parked = _drained(home)
    while read := store.read(GROUP, max_events=BATCH_EVENTS, wait_s=_wait_s(store)):
        events = [event for event in read if event.position not in ranges]
        if len(events) < len(read):  # applied by a run that ended before it could say so
            store.commit(GROUP, [event.position for event in read if event.position in ranges])
        if events and all(isinstance(event.position, int) and event.position > last for event in events):
            break
        if events:
            return events, []
    parked = store.parked(BATCH_EVENTS)
    store.drop_parked([item.id for item in parked if item.id <= last_parked])
    return [], [item for item in parked if item.id > last_parked]


def _wait_s(store: Log) -> float:
    """For what a reader that died held: some of it becomes ours after the time of a takeover."""
    return _TAKEOVER_S if store.pending(GROUP) else 0.0


def _apply(
    run: Run, change: Changes, store: Log, events: Sequence[Logged], parked: Sequence[Parked]
) -> tuple[Judged, tuple[datetime | None, datetime | None], bool]:
    staged = [stage(run, source, some) for source, some in by_source(events)]
    read = staged + [_set_aside(run, source, some) for source, some in by_source(parked)]
    wait_us = run.settings.consent.wait_hours * 3_600_000_000
    if events:
        since_us = min(event.received_us for event in events) - wait_us
        waiting.stage_again(run, store, {name for event in events for name in event.subjects}, since_us=since_us)
    judged, tallies = run.judge(basis_by_settings(run.settings))
    run.publish(change, is_changed=bool(judged.tally.accepted + judged.tally.readmitted))
    span, positions = run.span(), _written([whole(event) for event in events], [item.id for item in parked])
    rows = [
        accounts.note(origin.source, tallies[origin.number], files=FROM_LOG, positions=positions, last_event=span[1]) for origin in read
    ]
    if events:
        since_us = max(event.received_us for event in events) - wait_us  # who was received before does not wait any more
        waiting.note(run, change, _waits(run, staged, events), since_us=since_us)
    change.write(tables.INGESTS, accounts.with_notes(run.home, rows + accounts.moved(run.db, run.origins[0].source)))
    return judged, span, any(run.speaks.values()) or run.settings.consent.legal_basis is not None


def _waits(run: Run, staged: Sequence[Origin], events: Sequence[Logged]) -> str:
    """SQL: where the rows of these events are staged, and when they were received, as `waiting.note` takes them."""
    origin_of = {origin.source: origin.number for origin in staged}
    origins, rows = pa.array([origin_of[event.source] for event in events]), pa.array([whole(event) for event in events])
    received = pa.array([event.received_us for event in events], tables.TIME)
    run.db.register("read_now", pa.table({"origin": origins, "row": rows, "position": rows, "received_timestamp": received}))
    return "read_now"


def _set_aside(run: Run, source: str, items: Sequence[Parked]) -> Origin:
    """What no reader of the log could use joins the quarantine; a copy of an event that is known otherwise counts as a duplicate."""
    written = datetime.fromtimestamp(max(item.received_us for item in items) / 1e6, UTC)
    origin = run.announce(Origin(len(run.origins), source, FROM_LOG, written, how=HOW, read=len(items)))
    erased = run.vault.entombed(sorted({subject for item in items for subject in item.subjects}))
    rows = [
        {
            "row": 0,
            "reason": item.reason if item.reason in REASONS else "not_json",
            "detail": f"received {datetime.fromtimestamp(item.received_us / 1e6, UTC).isoformat()}",
            "raw": (item.payload or b"").decode("utf-8", "backslashreplace"),
            "subject": item.subjects[0] if item.subjects else None,
            "message_id": _message_id(item.payload),
            "is_erased": not erased.isdisjoint(item.subjects),
        }
        for item in items
    ]
    run.keep(pa.Table.from_pylist(rows, schema=staging.REFUSED), origin)
    return origin


def _message_id(payload: bytes | None) -> str | None:
    try:
        call = json.loads(payload or b"")
    except ValueError:
        return None
    found = call.get("messageId") if isinstance(call, dict) else None
    return found if isinstance(found, str) else None


def _written(positions: Iterable[int], parked: Iterable[int]) -> str:
    """Positions as ranges, and the last id of what was set aside: "1-500,502-600 p17"."""
    return f"{Ranges.of(positions)} p{max(parked, default=0)}"


def _drained(home: Path) -> tuple[Ranges, int]:
    """The reverse, of the last runs over the log: the positions that the last one applied, and the last id of what was set aside."""
    told = [text for text in tables.read_arrow(home, tables.INGESTS, ["positions"])["positions"].to_pylist() if text]
    return Ranges.read(told[-1:]), max((int(text.rsplit("p", 1)[1]) for text in told), default=0)
