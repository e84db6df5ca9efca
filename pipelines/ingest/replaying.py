"""Rows in quarantine -> read again, after a rule or a mapping was corrected.

In: rows of the quarantine, opened with their people's keys. Out: those that pass are events, once, and leave it; the rest stay with
the reason that they have now. A row whose key is gone, or of whose mapping nothing is known, stays as it is.
"""

import json
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import tables
from pipelines.errors import InputError
from pipelines.ingest import accounts, rereading, waiting
from pipelines.ingest.accounts import FROM_LOG
from pipelines.ingest.permission import Basis
from pipelines.ingest.report import Tally
from pipelines.ingest.runs import Run, basis_by_settings, working
from pipelines.ingest.staging import Origin
from pipelines.settings import Settings
from pipelines.sources import SEGMENT, RawBatch, load_mapping
from pipelines.sources.lines import REJECTED, Lines
from pipelines.sources.mapping import Mapping
from pipelines.sources.records import Form
from pipelines.vault import Vault

# Of the rows of the log: the quarantine has their position as the row; what was set aside at the door has none.
_LOGGED = f"""(
    SELECT origin, row, position, coalesce(received_timestamp, event_timestamp) AS received_timestamp
    FROM replayed
    JOIN (SELECT quarantine_id, row AS position FROM old_quarantine WHERE file = '{FROM_LOG}' AND row > 0) held USING (quarantine_id)
    JOIN (SELECT origin, row, received_timestamp, event_timestamp FROM staged WHERE line = 0) told USING (origin, row))"""


@dataclass(frozen=True)
class ReplayReport:
    """What became of the rows: read = applied + consent_dropped + erased + duplicate + remaining."""

    read: int  # rows of the quarantine that were read again
    applied: int
    consent_dropped: int
    erased: int
    duplicate: int  # their messages had been received in another row
    remaining: int  # they do not pass now either
    lines: int  # event rows that the applied rows became
    reasons: dict[str, int]  # of the remaining
    notes: tuple[str, ...]  # sentences a person should read


def replay(
    home: Path,
    *,
    settings: Settings,
    mapping: str | Path | Mapping | None = None,
    ids: Collection[str] | None = None,
    vault: Vault | None = None,
) -> ReplayReport:
    """Read rows of the quarantine again; a second time adds nothing.

    mapping: for the rows of its source; None: the file that they were read with, else the shipped one of their source's name. ids:
    of the quarantine; None: all. Raises InputError for a mapping that cannot be read or does not fit the rows, StoreError where
    the disk refuses; nothing is then changed.
    """
    given = load_mapping(mapping) if isinstance(mapping, str | Path) else mapping
    with working(home, settings=settings, vault=vault) as (run, change):
        task = _Task(run, given)
        for group in _groups(home, ids):
            task.take(group)
        if not run.origins:
            return ReplayReport(0, 0, 0, 0, 0, 0, 0, {}, tuple(task.notes))
        own = [origin.number for origin in run.origins]
        waiting.stage_again_from_log(run)
        judged, tallies = run.judge(task.basis)
        run.publish(change, is_changed=bool(run.count("fresh")))  # what is kept out still tells who is who
        if settings.consent.wait_hours:
            waiting.note(run, change, _LOGGED)
        return task.report(change, judged.lines, sum((tallies[number] for number in own), Tally()))


@dataclass(frozen=True)
class _Group:
    """Rows that were read in one way from one file."""

    source: str
    file: str
    how: dict[str, Any]
    rows: pa.Table


class _Task:
    """The rows of one call."""

    def __init__(self, run: Run, given: Mapping | None) -> None:
        self.run, self.given = run, given
        self.notes: list[str] = []
        self.plans: dict[str, Mapping | None] = {}

    def take(self, group: _Group) -> None:
        """Stage the rows of a group."""
        plan = self._plan(group)
        if plan is None and group.source != SEGMENT and group.how.get("is_mapped", True):
            self.notes.append(f"{len(group.rows)} rows of {group.source} stay: their mapping was not found; name it with --mapping")
            return
        opened = self.run.vault.unseal(group.rows["subject"].to_pylist(), group.rows["raw"].to_pylist())
        known = np.array([raw is not None for raw in opened], bool)
        if not known.all():
            self.notes.append(f"{int((~known).sum())} rows of {group.source} stay: their keys are gone")
        rows = group.rows.filter(pa.array(known))
        if len(rows):
            self._stage(group, plan, rows, [raw.decode("utf-8", "surrogatepass") for raw in opened if raw is not None])

    def basis(self, source: str) -> Basis | None:
        """As the mapping of the rows declares it, else the settings."""
        plan = self.plans.get(source)
        if plan is not None and plan.consent is not None:
            return Basis(plan.consent.legal_basis, plan.consent.purposes)
        return basis_by_settings(self.run.settings)(source)

    def report(self, change: tables.Changes, lines: int, total: Tally) -> ReplayReport:
        """Count what became of the rows, and note down those that turned out to be duplicates."""
        run = self.run
        remaining = Counter(dict(run.db.sql("SELECT reason, count(*) FROM leaving WHERE reason IS NOT NULL GROUP BY reason").fetchall()))
        read = run.count("replayed")
        dropped = run.count(
            "(SELECT * FROM fresh SEMI JOIN replayed USING (origin, row) WHERE line = 0) SEMI JOIN dropped USING (origin, row)"
        )
        erased = run.count("buried")
        duplicate = read - total.readmitted - dropped - erased - remaining.total()
        told = accounts.moved(run.db, run.origins[0].source)
        if told:
            change.write(tables.INGESTS, accounts.with_notes(run.home, told))
        return ReplayReport(
            read, total.readmitted, dropped, erased, duplicate, remaining.total(), lines, dict(remaining.most_common()), tuple(self.notes)
        )

    def _plan(self, group: _Group) -> Mapping | None:
        if group.source not in self.plans:
            self.plans[group.source] = self._found(group)
        return self.plans[group.source]

    def _found(self, group: _Group) -> Mapping | None:
        if self.given is not None and self.given.source.name == group.source:
            return self.given
        for name in (group.how.get("mapping"), group.source):
            if name:
                try:
                    return load_mapping(name)
                except InputError:
                    continue
        return None

    def _stage(self, group: _Group, plan: Mapping | None, rows: pa.Table, texts: list[str]) -> None:
        run, how = self.run, group.how
        origin = run.announce(
            Origin(
                len(run.origins),
                group.source,
                group.file,
                rows["created_timestamp"][-1].as_py(),
                has_own_ids=plan is None or plan.has_own_ids,
                told=datetime.fromisoformat(how["received"]) if how.get("received") else None,
                how=json.dumps(how),
                is_replay=True,
            )
        )
        row = pa.array(np.arange(1, len(rows) + 1))
        run.db.register("returned", pa.table({"row": row, "quarantine_id": rows["quarantine_id"]}))
        run.db.execute(f"INSERT INTO replayed SELECT {origin.number}, row, quarantine_id FROM returned").fetchall()
        run.db.unregister("returned")
        lines = Lines(pa.array(texts, pa.string()), row, REJECTED.empty_table())
        run.take(self._batch(lines, plan, group), origin)

    def _batch(self, lines: Lines, plan: Mapping | None, group: _Group) -> RawBatch:
        if plan is None:
            return rereading.calls(self.run.db, lines, source=group.source, name=group.file)
        columns, delimiter = group.how.get("columns"), group.how.get("delimiter")
        form = Form(tuple(columns), delimiter) if columns and delimiter else None
        return rereading.rows(self.run.db, lines, plan, form=form, unit=group.how.get("unit"), name=group.file)


def _groups(home: Path, ids: Collection[str] | None) -> list[_Group]:
    held = tables.read_arrow(home, tables.QUARANTINE)
    if ids is not None:
        held = held.filter(pc.is_in(held["quarantine_id"], value_set=pa.array(list(ids), pa.string())))
        if len(held) < len(set(ids)):
            raise InputError("quarantine: expected ids of rows set aside, found some that are none; see `rapport quarantine list`")
    keys = held.group_by(["source", "file", "origin", "created_timestamp"], use_threads=False).aggregate([])
    groups = []
    for key in keys.to_pylist():
        same = (pc.field("source") == key["source"]) & (pc.field("file") == key["file"]) & (pc.field("origin") == key["origin"])
        rows = held.filter(same & (pc.field("created_timestamp") == pa.scalar(key["created_timestamp"], tables.TIME)))
        groups.append(_Group(key["source"], key["file"], json.loads(key["origin"]), rows))
    return groups
