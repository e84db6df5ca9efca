"""Events of the log that consent kept out -> looked at again while a word on them may still come, by whichever way it comes.

In: the names of a run (a drain, a file, rows out of the quarantine, links decided on), and the events of earlier ones that carry no word
of their own. Out: which of these are to be judged again, with the rows of the run; and the table `waiting` of the time after it. So neither
the cut of drains matters, nor the channel of the word. An event waits `consent.wait_hours` from its receipt, by the receipts of the log:
then what became of it is final. Keeps positions alone: who they are about is in the log, and leaves it with them.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import tables
from pipelines.engine import literal
from pipelines.ingest.logged import by_source, stage
from pipelines.ingest.messages import DROPPED, halves_sql
from pipelines.ingest.runs import Run
from pipelines.log import Log, open_log
from pipelines.tables import Changes


def stage_again(run: Run, store: Log, names: Collection[str], *, since_us: int) -> None:
    """Stage those received since then that were kept out and name anybody of these, or whom the home knows to be one with them."""
    if positions := _kept_out(run, since_us):
        for source, some in by_source(store.look(_touched(run.home, names, store.subjects(positions)))):
            stage(run, source, some, is_again=True)


def stage_again_from_log(run: Run, names: Collection[str] | None = None) -> None:
    """The same, of all that waits, for a run that does not read the log. `names`: None: those in the rows that were staged."""
    if _kept_out(run, 0) and (run.home / "log" / "log.db").exists():
        if names is None:
            names = {name for (name,) in run.db.sql("SELECT identifier FROM names WHERE raw IS NOT NULL").fetchall()}
        with closing(open_log(run.home, settings=run.settings, vault=run.vault)) as store:
            stage_again(run, store, names, since_us=0)


def note(run: Run, change: Changes, places: str, *, since_us: int = 0) -> None:
    """Write the table anew: who still waits, and the rows of this run that say nothing themselves, those received since then.

    places: a relation of their origin and row in `staged`, position in the log and received_timestamp.
    """
    words = [literal(f'$."{name}"') for name in run.settings.consent.stored_for]
    says_nothing = " OR ".join(f"json_extract(TRY_CAST(consent AS JSON), {word}) IS NULL" for word in words)
    rows = run.db.sql(
        f"""SELECT * FROM (
            SELECT position, source, message_high, message_low, received_timestamp FROM old_waiting
            UNION SELECT position, source, {halves_sql("message")}, now.received_timestamp
            FROM staged JOIN {places} now USING (origin, row) JOIN sources USING (source_no)
            WHERE line = 0 AND is_good AND (consent IS NULL OR {says_nothing}))
        WHERE epoch_us(received_timestamp) >= {since_us} ORDER BY position"""
    ).to_arrow_table()
    if len(rows) or tables.exists(run.home, tables.WAITING):
        change.write(tables.WAITING, rows)


def _kept_out(run: Run, since_us: int) -> list[int]:
    """The positions of those that wait, were received since then, and are no events."""
    found = run.db.sql(
        f"""SELECT position FROM old_waiting JOIN old_messages USING (source, message_high, message_low)
        WHERE outcome = '{DROPPED}' AND epoch_us(received_timestamp) >= {since_us} ORDER BY position"""
    )
    return [position for (position,) in found.fetchall()]


def _touched(home: Path, names: Collection[str], named: Mapping[int, Sequence[str]]) -> list[int]:
    """Of the events `named`, by position, those that are connected with any of these names: by names in common, or a customer."""
    every = set(names).union(*named.values())
    identities = tables.read_arrow(home, tables.IDENTITIES, ["identifier", "customer_id"])
    mine = identities.filter(pc.is_in(identities["identifier"], pa.array(sorted(every), pa.string()))).to_pydict()
    customers: defaultdict[str, list[str]] = defaultdict(list)
    for identifier, customer in zip(mine["identifier"], mine["customer_id"], strict=True):
        customers[identifier].append(customer)
    positions = list(named)
    groups = [*named.values(), *((identifier, *some) for identifier, some in customers.items())]
    holding: defaultdict[str, list[int]] = defaultdict(list)
    for at, some_names in enumerate(groups):
        for name in some_names:
            holding[name].append(at)
    open_names, seen = list(names), set[int]()
    while open_names:
        for at in holding.pop(open_names.pop(), ()):
            if at not in seen:
                seen.add(at)
                open_names += groups[at]
    return [positions[at] for at in sorted(seen) if at < len(positions)]
