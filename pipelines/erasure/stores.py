"""Every store that holds something of a person, and how it is taken out there.

In: a person, the home, its vault. Out: rows removed, by store. Each removal may be repeated: what is gone is not counted again.
Nobody else's row is touched. Never decides an order: `process` does.
"""

import functools
import operator
import re
import shutil
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import engine, served, tables
from pipelines.erasure import logged, models, rawfiles, traces
from pipelines.erasure.people import Person, condition
from pipelines.errors import StoreError
from pipelines.identity import online
from pipelines.ingest.accounts import ERASURE
from pipelines.ingest.messages import ERASED, halves_sql, message_sql
from pipelines.log import open_log
from pipelines.online import erasure as online_erasure
from pipelines.settings import Settings
from pipelines.tables import Table
from pipelines.vault import NOBODY, Vault, normalised

Counts = dict[str, int]

# Facts, destroyed next; rows, removed exactly; our own sealed note; keys; a trail that is never changed and holds digests.
_UNSEARCHED = ("vault", "tables", "erasures", "keys", "audit")
_TRIES = 3
_SHORT = 4  # a shorter identifier is looked for in quotes only: it may be anybody's number


@dataclass(frozen=True)
class Task:
    """An erasure or export at work. `raws`: the person's identifiers as received; `receipt_id`: empty for an export."""

    home: Path
    settings: Settings
    vault: Vault
    person: Person
    raws: tuple[str, ...]
    receipt_id: str = ""


def held(task: Task) -> Counts:
    """Rows of the person in each table, before anything is removed."""
    return {f"tables/{table.name}": rows_of(task, table, _texts(task.home, table)[:1]).num_rows for table in tables_of(task.home)}


def from_log(task: Task) -> Counts:
    """Take out what the log holds; it takes in no more, since the tombstones are there.

    Of what was set aside, no reader of the log would tell the ledger any more: it is noted down here, once.
    """
    if not (task.home / "log" / "log.db").exists():
        return {}
    nameless = nameless_logged(task)
    aside = [*nameless, *(row for row in logged.about(task.home, task.person.identifiers) if row.reason is not None)]
    _note_erased(task, Counter(row.source for row in aside))
    with closing(open_log(task.home, settings=task.settings, vault=task.vault)) as log:
        dropped = log.drop_parked([row.parked_id for row in nameless if row.parked_id is not None])
        return {"log": log.remove(task.person.identifiers) + dropped}


def from_messages(task: Task) -> Counts:
    """Their messages stay known, as erased: the ledger balances, and no file brings them back. Those in quarantine join them."""
    events = tables.matching(task.home, tables.EVENTS, _condition(task, tables.EVENTS), ["source", "event_id"])
    aside = pa.concat_tables([rows_of(task, tables.QUARANTINE), nameless_rows(task)])
    with engine.connect(task.home) as db:
        db.register("events", events)
        db.register("aside", aside)
        # an order of several products is one message, and its lines are numbered
        told = "SELECT source, unnest([event_id, regexp_replace(event_id, ':[0-9]+$', '')]) AS id FROM events"
        applied = db.sql(f"SELECT DISTINCT source, {halves_sql(message_sql('id'))} FROM ({told})").to_arrow_table()
        known = halves_sql(message_sql("coalesce(message_id, quarantine_id)"))
        set_aside = db.sql(
            f"SELECT source, {known}, '{ERASED}' AS outcome, min(created_timestamp) AS created_timestamp FROM aside GROUP BY ALL"
        ).to_arrow_table()
    changed = tables.update(task.home, tables.MESSAGES, _are(applied), {"outcome": ERASED})
    there = tables.matching(task.home, tables.MESSAGES, _are(set_aside), list(tables.MESSAGES.key))
    fresh = set_aside.join(there, list(tables.MESSAGES.key), join_type="left anti")
    if len(fresh):
        with tables.together(task.home) as change:
            change.append(tables.MESSAGES, fresh)
    return {"tables/messages": changed + len(fresh)}


def from_tables(task: Task) -> Counts:
    """Take their rows out of every table that can name people, and remove what killed writes left."""
    tables.sweep(task.home)
    return {f"tables/{table.name}": tables.remove(task.home, table, _condition(task, table)) for table in tables_of(task.home)}


def from_quarantine(task: Task) -> Counts:
    """Rows that no identifier could be read from, and that hold one all the same."""
    ids = nameless_rows(task)["quarantine_id"].combine_chunks()
    return {"quarantine without a name": tables.remove(task.home, tables.QUARANTINE, pc.field("quarantine_id").isin(ids))}


def from_raw_files(task: Task) -> Counts:
    """Lines of the files that a simulated shop or a person put under the home, and what a killed ingest left."""
    shutil.rmtree(task.home / "flow" / "incoming", ignore_errors=True)
    for leftover in (task.home / ".spill").glob("*"):  # a query that is running has its files open and keeps them
        leftover.unlink(missing_ok=True)
    base = task.home / "raw"
    return {f"raw/{path.name}": rawfiles.remove(path, task.raws) for path in sorted(base.glob("*")) if path.is_file()}


def from_online_store(task: Task) -> Counts:
    """What is served at this moment, and who is who as it is known there."""
    person = task.person
    counts = from_stream(task)  # first: what is due there would be written online again
    counts |= {
        "online store": online_erasure.erase(task.home, identifiers=person.identifiers, customers=person.customers, settings=task.settings)
    }
    return counts | {"identity graph": online.forget(task.home, person.identifiers, person.customers)}


def from_stream(task: Task) -> Counts:
    """What the stream keeps of their events, to count anew from."""
    from pipelines.stream import state

    person = task.person
    return {"stream": state.erase(task.home, identifiers=person.identifiers, customers=person.customers, spells=person.spells)}


def from_requests(task: Task) -> Counts:
    """Answers about the person that wait to be fetched."""
    path = task.home / "requests" / "requests.db"
    if not path.exists():
        return {}
    with closing(sqlite3.connect(path, timeout=10.0)) as db:
        rows = db.execute("SELECT id, answer FROM requests WHERE answer IS NOT NULL").fetchall()
    opened = task.vault.unseal([NOBODY] * len(rows), [row[1] for row in rows])
    pattern = naming([*task.raws, *task.person.names, *task.person.hashes])
    theirs = [row[0] for row, answer in zip(rows, opened, strict=True) if answer is not None and pattern.search(answer)]
    return {"requests": _deleted(path, "requests", "id", theirs)} if theirs else {}


def from_served(task: Task) -> Counts:
    """What models were fed of them: see `pipelines.served`."""
    path = served.file_of(task.home)
    if not path.exists():
        return {}
    removed = _deleted(path, "served", "customer_id", task.person.customers)
    traces.rewrite_database(path)
    return {"served values": removed}


def from_models(task: Task) -> Counts:
    """Factor rows and histories of recommenders."""
    return {"models": models.remove_rows(task.home, task.person)}


def from_elsewhere(task: Task) -> Counts:
    """Search every other file for what names them, and clean what is found. Raises StoreError naming a file that cannot be cleaned."""
    names = (*task.person.hashes, *task.person.customers)
    needles = tuple(name.encode(kind) for name in names for kind in ("utf-8", "utf-32-le"))  # arrays of text are in UTF-32
    told = [*names, *(raw for raw in task.raws if len(raw) >= 2 * _SHORT)]
    pattern, forms, cleaned = naming(told), [form for name in told for form in rawfiles.forms(name)], 0
    for _ in range(_TRIES):
        found = traces.holding(task.home, needles, outside=_UNSEARCHED)
        found += traces.naming(task.home, pattern, forms, outside=_UNSEARCHED)
        if not found:
            return {"other files": cleaned}
        from_online_store(task)  # a stream that had read an event before the tombstones may have written since
        stubborn = [path for path in dict.fromkeys(found) if path.exists() and not traces.clean(path, pattern)]
        if stubborn:
            some = ", ".join(str(path.relative_to(task.home)) for path in stubborn[:3])
            raise StoreError(f"erasure: {some} hold the person and are of no kind that is known; remove them, then run the erasure again")
        cleaned += len(set(found))
    raise StoreError("erasure: files of the home are written about the person meanwhile; stop who writes them, then run it again")


def tables_of(home: Path) -> Iterator[Table]:
    """Every table on disk that has a column which names people, declared or not."""
    declared = {table.name: table for table in tables.TABLES}
    base = home / "tables"
    for link in sorted(base.iterdir()) if base.is_dir() else []:
        table = declared.get(link.name, Table(link.name, (), None, None, None))
        if link.is_symlink() and tables.files(home, table) and condition(Person("", (), ()), _texts(home, table)) is not None:
            yield table


def rows_of(task: Task, table: Table, columns: list[str] | None = None) -> pa.Table:
    """The person's rows of a table; all its columns, or these."""
    return tables.matching(task.home, table, _condition(task, table), columns or tables.schema_of(task.home, table).names)


def nameless_rows(task: Task) -> pa.Table:
    """The rows of the quarantine that were read as nobody's, and that hold an identifier of theirs all the same."""
    rows = tables.matching(task.home, tables.QUARANTINE, pc.field("subject") == NOBODY, tables.QUARANTINE.schema.names)  # type: ignore[union-attr]
    opened, pattern = task.vault.unseal([NOBODY] * rows.num_rows, rows["raw"].to_pylist()), naming(task.raws)
    return rows.filter(pa.array([raw is not None and pattern.search(raw) is not None for raw in opened], pa.bool_()))


def nameless_logged(task: Task) -> list[logged.Row]:
    """What was set aside at the door as nobody's, and that holds an identifier of theirs all the same."""
    rows, pattern = logged.nameless(task.home), naming(task.raws)
    opened = logged.opened(rows, vault=task.vault)
    return [row for row, payload in zip(rows, opened, strict=True) if payload is not None and pattern.search(payload)]


def naming(values: Sequence[str]) -> re.Pattern[bytes]:
    """Finds one of the values as a whole word, however its case; a short one only in quotes. No values: finds nothing."""
    forms = {form for value in values for form in rawfiles.forms(value)} | {
        normalised("email", value).encode() for value in values if "@" in value
    }
    whole = [re.escape(form) for form in sorted(forms) if len(form) >= _SHORT]
    quoted = [b'"' + re.escape(form) + b'"' for form in sorted(forms) if 0 < len(form) < _SHORT]
    words = [rb"(?<![0-9A-Za-z])" + form + rb"(?![0-9A-Za-z])" for form in whole]
    return re.compile(b"|".join([*words, *quoted]) or rb"(?!)", re.IGNORECASE)


def _note_erased(task: Task, rows: Mapping[str, int]) -> None:
    """Tell the ledger that these rows, source -> rows, are erased; once for a receipt."""
    told = pc.field("sha256") == task.receipt_id
    if not rows or tables.matching(task.home, tables.INGESTS, told, ["sha256"]).num_rows:
        return
    counts = {field.name: 0 for field in tables.INGESTS.schema or () if field.type == tables.WHOLE}
    notes = [{**counts, "source": source, "files": ERASURE, "sha256": task.receipt_id, "erased": n} for source, n in sorted(rows.items())]
    with tables.together(task.home) as change:
        change.append(tables.INGESTS, pa.Table.from_pylist(notes, schema=tables.INGESTS.schema))


def _are(messages: pa.Table) -> pc.Expression:
    """Rows of the messages table that are among these. Both halves of a hash are never those of two others."""
    return functools.reduce(operator.and_, (pc.field(name).isin(messages[name].combine_chunks()) for name in tables.MESSAGES.key))


def _texts(home: Path, table: Table) -> list[str]:
    """The columns of text: one that is null throughout names nobody."""
    return [field.name for field in tables.schema_of(home, table) if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)]


def _condition(task: Task, table: Table) -> pc.Expression:
    found = condition(task.person, _texts(task.home, table), time=table.event_time)
    return pc.scalar(False) if found is None else found


def _deleted(path: Path, table: str, column: str, values: Sequence[str]) -> int:
    with closing(sqlite3.connect(path, timeout=10.0)) as db, db:
        db.execute("PRAGMA secure_delete = ON").fetchall()
        return sum(db.execute(f"DELETE FROM {table} WHERE {column} = ?", (value,)).rowcount for value in values)
