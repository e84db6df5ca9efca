"""Event files -> the clean tables. A file that was ingested whole before is known by its content and not read again.

In: files and a mapping. Out: tables, and the report. Reads ahead in a thread of its own. Publishes nothing before every file was
read to its end; where one cannot be, or not one row of it is good, nothing but the quarantine.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipelines import tables
from pipelines.errors import InputError
from pipelines.events import REASONS
from pipelines.ingest import accounts, waiting
from pipelines.ingest.catalogue import read_items
from pipelines.ingest.permission import Basis
from pipelines.ingest.report import IngestReport, Judged, Tally, notes, report
from pipelines.ingest.runs import Run, basis_by_settings, watch, working
from pipelines.ingest.staging import Origin
from pipelines.settings import Settings
from pipelines.sources import SEGMENT, RawBatch, load_mapping, read
from pipelines.sources.mapping import Mapping
from pipelines.tables import Changes
from pipelines.vault import Vault

Progress = Callable[[int, int | None], None]  # rows done, and of how many where that is known


def ingest(
    home: Path,
    files: Sequence[str | Path],
    *,
    mapping: str | Path | Mapping | None,
    items_file: str | Path | None = None,
    settings: Settings,
    received: datetime | None = None,
    vault: Vault | None = None,
    progress: Progress | None = None,
) -> IngestReport:
    """Add the files' events to the home's tables. The same file a second time adds nothing.

    mapping: a Mapping, a TOML file, the name of a shipped one, or None for JSON of the Segment spec. items_file: JSON lines of
    item_id, category, price, available_from, in_stock. received: when rows that do not say so themselves were received. vault: another one
    than the home's own. progress: told of rows as they are read.
    Raises InputError for a file or mapping that cannot be read, or of which not one row is good: nothing is then published but
    the quarantine. Raises StoreError where the disk refuses.
    """
    if not files:
        raise InputError("ingest: expected at least one file of events, found none; name the files")
    plan = load_mapping(mapping) if isinstance(mapping, str | Path) else mapping
    task = _Task(home, [Path(file) for file in files], plan, settings, received, _named(mapping), progress)
    failure: InputError | None = None
    with working(home, settings=settings, vault=vault) as (run, change):
        read_items(run.db, items_file)
        try:
            task.stage(run)
        except InputError as error:
            failure = error
            task.give_up(run, change)
        else:
            done = task.finish(run, change, has_items=items_file is not None)
    if failure is not None:
        raise failure
    return replace(done, notes=done.notes + watch(home, settings=settings, last_event=done.last_event if done.lines else None))


class _Task:
    """The files of one call."""

    def __init__(
        self,
        home: Path,
        paths: list[Path],
        mapping: Mapping | None,
        settings: Settings,
        received: datetime | None,
        named: str | None,
        progress: Progress | None,
    ) -> None:
        self.home, self.paths, self.mapping, self.settings, self.progress = home, paths, mapping, settings, progress
        self.source = mapping.source.name if mapping else SEGMENT
        self.told = {"mapping": named, "received": received.isoformat() if received else None}
        self.received = received
        consent = settings.consent
        self.plan = _digest(
            mapping.model_dump_json() if mapping else "", consent.legal_basis or "", " ".join(consent.stored_for), str(received)
        )
        self.sha256 = [accounts.sha256_of(path) if path.is_file() else "" for path in paths]
        self.has_own_ids = mapping is None or mapping.has_own_ids
        self.origins: list[Origin] = []
        self.is_known = False  # every file was ingested whole before

    def stage(self, run: Run) -> None:
        """Read every file to its end. Raises InputError where one cannot be, or holds nothing good."""
        before = [accounts.ingested_before(self.home, sha256=one, source=self.source, plan=self.plan) for one in self.sha256]
        fresh = [path for path, rows in zip(self.paths, before, strict=True) if not rows]
        self.is_known = not fresh
        batches = read(fresh, self.mapping, batch_rows=self.settings.ingest.batch_rows)
        coming = _ahead(batches)
        first = next(coming, None)  # a path that is wrong is found here, before anything is announced
        self.origins = [run.announce(self._origin(number, path)) for number, path in enumerate(self.paths)]
        for origin, rows in zip(self.origins, before, strict=True):
            origin.read = rows
        read_now = [origin for origin, rows in zip(self.origins, before, strict=True) if not rows]
        total, done = _rows_of(fresh), 0
        while first is not None:
            origin = read_now[first.number]
            origin.how = json.dumps(
                self.told
                | {"unit": first.unit, "columns": first.form and first.form.names, "delimiter": first.form and first.form.delimiter}
            )
            run.take(first, origin)
            done += len(first.rows) + len(first.rejected)
            if self.progress:
                self.progress(done, total)
            first = next(coming, None)
        for origin in read_now:
            _check_some_good(origin)

    def finish(self, run: Run, change: Changes, *, has_items: bool) -> IngestReport:
        """Judge and publish what was staged; if there is nothing to judge, only count it."""
        if self.is_known and not has_items:
            return self._count_again(run, change)
        waiting.stage_again_from_log(run)
        judged, tallies = run.judge(self._basis)
        total, basis = judged.tally, self._basis(self.source)
        is_spoken = run.speaks.get(self.source, False)
        run.publish(change, is_changed=bool(total.accepted + total.readmitted) or has_items)
        span = run.span()
        self._note_down(run, change, tallies, span[1])
        return report(
            judged,
            span=span,
            has_consent=basis is not None or is_spoken,
            units={origin.name: origin.unit for origin in self.origins if origin.unit},
            notes=notes(total, source=self.source, basis=basis, is_spoken=is_spoken, consent=self.settings.consent),
        )

    def _count_again(self, run: Run, change: Changes) -> IngestReport:
        tallies = {origin.number: Tally(read=origin.read, duplicate=origin.read) for origin in self.origins}
        total, span = sum(tallies.values(), Tally()), run.span("old_events")
        is_spoken = bool(run.count("(SELECT 1 FROM old_consents LIMIT 1)"))
        rows = self._notes_of(tallies, span[1])
        change.write(tables.INGESTS, accounts.with_notes(self.home, rows))
        told = notes(total, source=self.source, basis=None, is_spoken=is_spoken, consent=self.settings.consent)
        return report(Judged(total), span=span, has_consent=is_spoken, notes=told)

    def give_up(self, run: Run, change: Changes) -> None:
        """Keep the refused rows that were read, and count them."""
        if run.count("refused"):
            tallies = run.keep_refused(change)
            self._note_down(run, change, tallies, None, is_whole=False)

    def _origin(self, number: int, path: Path) -> Origin:
        return Origin.of_file(number, path, self.source, received=self.received, has_own_ids=self.has_own_ids)

    def _basis(self, source: str) -> Basis | None:
        """The mapping's declaration; else that of the settings."""
        if self.mapping is not None and self.mapping.consent is not None and source == self.source:
            return Basis(self.mapping.consent.legal_basis, self.mapping.consent.purposes)
        return basis_by_settings(self.settings)(source)

    def _note_down(
        self, run: Run, change: Changes, tallies: dict[int, Tally], last_event: datetime | None, *, is_whole: bool = True
    ) -> None:
        rows = self._notes_of(tallies, last_event, is_whole=is_whole) + accounts.moved(run.db, self.source)
        change.write(tables.INGESTS, accounts.with_notes(self.home, rows))

    def _notes_of(self, tallies: dict[int, Tally], last_event: datetime | None, *, is_whole: bool = True) -> list[dict[str, Any]]:
        return [
            accounts.note(
                origin.source,
                tallies[origin.number],
                files=origin.name,
                sha256=sha256 if is_whole else None,
                plan=self.plan,
                last_event=last_event,
            )
            for origin, sha256 in zip(self.origins, self.sha256, strict=True)
        ]


def _ahead(batches: Iterator[RawBatch]) -> Iterator[RawBatch]:
    """The same batches, each read while the one before is worked on."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = pool.submit(next, batches, None)
            yield batch


def _check_some_good(origin: Origin) -> None:
    refused = origin.refused.total()
    if origin.read > refused:
        return
    worst = ", ".join(f"{rows} {reason} ({REASONS[reason]})" for reason, rows in origin.refused.most_common(3))
    raise InputError(
        f"ingest: expected events in {origin.name}, found none among {refused} rows: {worst}; nothing was published, "
        "the rows are in quarantine; check that the file and its mapping belong together"
    )


def _rows_of(paths: list[Path]) -> int | None:
    """Rows of the files, where their ends tell."""
    if not all(path.suffix in (".parquet", ".pq") for path in paths):
        return None
    return sum(int(pq.ParquetFile(path).metadata.num_rows) for path in paths)


def _named(mapping: str | Path | Mapping | None) -> str | None:
    """How a replay finds the mapping again: by name, or by its file's place."""
    if not isinstance(mapping, str | Path):
        return None
    return str(Path(mapping).resolve()) if Path(mapping).is_file() else str(mapping)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()
