"""Events of the log that consent kept out -> looked at again while a word on them may still come, so that no cut of drains matters.

In: the events of a drain, and those of earlier ones that carry no word of their own. Out: which of these are to be judged again, with
the people of the drain; and the table `waiting` of the time after it. An event waits `consent.wait_hours` from its receipt, by the
receipts of the log: then what became of it is final. Keeps positions alone: who they are about is in the log, and leaves it with them.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import tables
from pipelines.engine import literal
from pipelines.ingest.messages import DROPPED, halves_sql
from pipelines.ingest.runs import Run
from pipelines.log import Log, Logged
from pipelines.tables import Changes

_HOUR_US = 3_600_000_000


def again(run: Run, store: Log, events: Sequence[Logged]) -> list[Logged]:
    """Those that were kept out and name anybody of these events, or of whom the home knows that they are the same."""
    found = run.db.sql(
        f"""SELECT position FROM old_waiting JOIN old_messages USING (source, message_high, message_low)
        WHERE outcome = '{DROPPED}' AND epoch_us(received_timestamp) >= {_since(run, events)} ORDER BY position"""
    ).fetchall()
    if not found:
        return []
    named = store.subjects([position for (position,) in found])
    touched = _touched(run.home, [event.subjects for event in events], named)
    return store.look(touched)


def note(run: Run, change: Changes, events: Sequence[Logged], origins: Iterable[int]) -> None:
    """Write the table anew: the events of this drain, whose rows are of these origins, that say nothing themselves, and who still waits."""
    places = [literal(f'$."{name}"') for name in run.settings.consent.stored_for]
    says_nothing = " OR ".join(f"json_extract(TRY_CAST(consent AS JSON), {place}) IS NULL" for place in places)
    received = pa.array([event.received_us for event in events], tables.TIME)
    run.db.register("read_now", pa.table({"position": pa.array([event.position for event in events]), "received_timestamp": received}))
    rows = run.db.sql(
        f"""SELECT * FROM (
            SELECT position, source, message_high, message_low, received_timestamp FROM old_waiting
            UNION SELECT position, source, {halves_sql("message")}, now.received_timestamp
            FROM staged JOIN read_now now ON position = staged.row JOIN sources USING (source_no)
            WHERE origin IN ({", ".join(map(str, origins))}) AND line = 0 AND is_good AND (consent IS NULL OR {says_nothing}))
        WHERE epoch_us(received_timestamp) >= {_since(run, events)} ORDER BY position"""
    ).to_arrow_table()
    run.db.unregister("read_now")
    if len(rows) or tables.exists(run.home, tables.WAITING):
        change.write(tables.WAITING, rows)


def _since(run: Run, events: Sequence[Logged]) -> int:
    """Who was received before does not wait any more: microseconds."""
    return max(event.received_us for event in events) - run.settings.consent.wait_hours * _HOUR_US


def _touched(home: Path, people: Iterable[Sequence[str]], named: Mapping[int, Sequence[str]]) -> list[int]:
    """Of the events `named`, by position, those that are connected with any of the people: by names in common, or a customer."""
    reached = {name for names in people for name in names}
    every = reached.union(*named.values())
    identities = tables.read_arrow(home, tables.IDENTITIES, ["identifier", "customer_id"])
    mine = identities.filter(pc.is_in(identities["identifier"], pa.array(sorted(every), pa.string()))).to_pydict()
    customers: defaultdict[str, list[str]] = defaultdict(list)
    for identifier, customer in zip(mine["identifier"], mine["customer_id"], strict=True):
        customers[identifier].append(customer)
    positions = list(named)
    groups = [*named.values(), *((identifier, *some) for identifier, some in customers.items())]
    holding: defaultdict[str, list[int]] = defaultdict(list)
    for at, names in enumerate(groups):
        for name in names:
            holding[name].append(at)
    open_names, seen = list(reached), set[int]()
    while open_names:
        for at in holding.pop(open_names.pop(), ()):
            if at not in seen:
                seen.add(at)
                open_names += groups[at]
    return [positions[at] for at in sorted(seen) if at < len(positions)]
