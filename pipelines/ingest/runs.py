"""One run of the ingest: a working space, rows staged into it, and their way from there into the home's tables.

In: batches of raw rows, from whichever origin. Out: the tables changed, all or none, and what became of the rows. The lock on the
tables is held from before the home is read until it is changed. Never leaves a row in the working space: it is removed at the end.
"""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import pyarrow as pa

from pipelines import quality, tables
from pipelines.engine import connect
from pipelines.errors import StoreError
from pipelines.ingest import forming, messages, names, people, permission, publishing, quarantine, staging
from pipelines.ingest.accounts import tally
from pipelines.ingest.catalogue import read_items
from pipelines.ingest.permission import Basis
from pipelines.ingest.report import Judged, Tally
from pipelines.ingest.staging import Origin
from pipelines.settings import Settings, clock
from pipelines.sources import RawBatch
from pipelines.tables import Changes, Table
from pipelines.vault import Vault, open_vault

_KEPT = (
    tables.EVENTS, tables.MESSAGES, tables.QUARANTINE, tables.WAITING, tables.IDENTITIES, tables.IDENTITY_LINKS, tables.CONSENTS,
    tables.SPEAKING_SOURCES, tables.TRAITS, tables.ITEMS,
)  # fmt: skip

BasisOf = Callable[[str], Basis | None]  # source -> declared basis


@dataclass
class Run:
    """A working space. `origins`: where its rows came from, in the order in which they were announced."""

    home: Path
    settings: Settings
    vault: Vault
    db: duckdb.DuckDBPyConnection
    space: Path  # a folder that is gone at the end
    origins: list[Origin] = field(default_factory=list)
    speaks: dict[str, bool] = field(default_factory=dict)  # source -> whether its people ever said themselves what may be done

    def announce(self, origin: Origin) -> Origin:
        """Rows will come from there."""
        known = {other.source: other.source_no for other in self.origins}
        origin.source_no = known.get(origin.source, len(known))
        self.origins.append(origin)
        return origin

    def take(self, batch: RawBatch, origin: Origin) -> None:
        """Stage a batch, and keep what does not pass beside it."""
        self.keep(staging.stage(self.db, batch, origin, self.settings.ingest), origin)

    def take_again(self, batch: RawBatch, origin: Origin) -> None:
        """Stage rows that were counted and found good before, and that consent kept out; they are not counted as read."""
        staging.stage(self.db, batch, origin, self.settings.ingest)
        origin.read = 0

    def keep(self, refused: pa.Table, origin: Origin) -> None:
        """Keep rows that did not pass, as staging.REFUSED."""
        quarantine.collect(self.db, refused, origin, vault=self.vault, space=self.space)

    def judge(self, basis_of: BasisOf) -> tuple[Judged, dict[int, Tally]]:
        """Everything but the writing; what became of the rows, all together and of each origin."""
        db, settings = self.db, self.settings
        self._tell_origins()
        messages.find_fresh(db)
        people.resolve_identities(db, self.home)
        forming.match_returns(db, settings.ingest)
        messages.release(db)
        quarantine.set_aside(db)
        speaking = permission.find_speaking(db)
        here = {origin.source_no: origin.source for origin in self.origins}
        self.speaks = {source: source_no in speaking for source_no, source in here.items()}
        bases = {source_no: basis_of(source) for source_no, source in here.items()}
        permission.carry_consent(db, bases, settings.consent)
        forming.form_events(db, settings.ingest)
        forming.describe_customers(db, settings.ingest)
        forming.list_items(db)
        publishing.forget_the_rest(db)
        aside = quarantine.reasons(db)
        tallies = tally(db, self.origins, aside)
        judged = Judged(
            sum(tallies.values(), Tally()),
            sum(aside.values(), Counter[str]()),
            self.count("kept"),
            self.count("refused_lines"),
            self.count("near_duplicates SEMI JOIN kept USING (place)"),
            self.count("outliers SEMI JOIN kept USING (place)"),
            self.count("unmatched SEMI JOIN kept USING (place)"),
        )
        return judged, tallies

    def keep_refused(self, change: Changes) -> dict[int, Tally]:
        """Of all that was staged, keep what did not pass alone; returns what became of it, by origin."""
        self.db.execute("DELETE FROM staged_rows").fetchall()
        for origin in self.origins:
            origin.read = origin.refused.total()
        tallies = self.judge(lambda source: None)[1]
        publishing.write_messages(self.db, self.home, change)
        publishing.write_quarantine(self.db, self.home, change, space=self.space)
        return tallies

    def publish(self, change: Changes, *, is_changed: bool) -> None:
        """Write what `judge` found. `is_changed`: whether anything but the quarantine can be another than it was."""
        if is_changed or not tables.exists(self.home, tables.EVENTS):
            consent = self.settings.consent
            with ThreadPoolExecutor(1) as pool:  # most of it is arithmetic outside of Python's lock, as the writing is
                remembered = pool.submit(self.vault.remember, names.facts(self.db))
                publishing.write_tables(self.db, self.home, change, purpose=consent.purpose, purposes=consent.purposes)
                remembered.result()
            if not tables.exists(self.home, tables.ALERTS):
                change.write(tables.ALERTS, _empty(tables.ALERTS))
        publishing.write_messages(self.db, self.home, change)
        publishing.write_quarantine(self.db, self.home, change, space=self.space)

    def count(self, relation: str) -> int:
        """Rows of a relation."""
        return int(self.db.sql(f"SELECT count(*) FROM {relation}").fetchall()[0][0])

    def span(self, relation: str = "formed") -> tuple[datetime | None, datetime | None]:
        """The times of the first and the last stored event, UTC, as they will be; `old_events`: as they are."""
        first, last = self.db.sql(f"SELECT min(event_timestamp), max(event_timestamp) FROM {relation}").fetchall()[0]
        return first and first.astimezone(UTC), last and last.astimezone(UTC)

    def _tell_origins(self) -> None:
        """Create `origins` and `sources`, those of the home among them."""
        rows = [
            {
                "origin": o.number,
                "source_no": o.source_no,
                "source": o.source,
                "file": o.name,
                "how": o.how,
                "received": o.at,
                "is_replay": o.is_replay,
            }
            for o in self.origins
        ]
        schema = pa.schema(
            [("origin", pa.int32()), ("source_no", pa.int32()), ("source", pa.string()), ("file", pa.string()), ("how", pa.string()),
             ("received", tables.TIME), ("is_replay", pa.bool_())]
        )  # fmt: skip
        self.db.register("told_origins", pa.Table.from_pylist(rows, schema=schema))
        everywhere = " UNION ".join(f"SELECT source FROM old_{table.name}" for table in (tables.EVENTS, tables.CONSENTS, tables.TRAITS))
        self.db.execute(
            f"""
            CREATE TABLE origins AS FROM told_origins;
            CREATE TABLE sources AS SELECT DISTINCT source, source_no FROM origins;
            INSERT INTO sources SELECT source, (SELECT count(*) FROM sources) + row_number() OVER (ORDER BY source) - 1 FROM (
                {everywhere}) ANTI JOIN sources USING (source) WHERE source IS NOT NULL;
            """
        ).fetchall()


@contextmanager
def working(home: Path, *, settings: Settings, vault: Vault | None = None) -> Iterator[tuple[Run, Changes]]:
    """A working space on the home, and the changes of its tables. Raises StoreError where the disk refuses; nothing is then changed."""
    keys = vault or open_vault(home, master=settings.master_key)
    space = home / ".ingest"
    try:
        with tables.together(home) as change:
            shutil.rmtree(space, ignore_errors=True)  # a killed run's
            space.mkdir()
            try:
                with connect(space, memory_limit=_memory()) as db:
                    db.execute(
                        "SET force_mbedtls_unsafe = true; SET temp_file_encryption = true; SET checkpoint_threshold = '1TB'"
                    ).fetchall()
                    run = Run(home, settings, keys, db, space)
                    _attach(db, home)
                    names.prepare(db, run.vault)
                    staging.prepare(db)
                    quarantine.prepare(db)
                    read_items(db)
                    yield run, change
            finally:
                shutil.rmtree(space, ignore_errors=True)
    except duckdb.IOException as error:
        raise StoreError(f"ingest: working space under {home} was refused ({error}); free space, then run again") from error
    finally:
        if vault is None:
            keys.close()


def basis_by_settings(settings: Settings) -> BasisOf:
    """The legal basis that the settings declare, for what sources told before their people said anything themselves."""
    consent = settings.consent
    declared = Basis(consent.legal_basis, (consent.purpose,), yields=True) if consent.legal_basis else None
    return lambda source: declared


def _memory() -> str:
    """Half of what the machine has: beyond it the working space spills, which costs more time than all the rest."""
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') // 2_000_000}MB"


def _attach(db: duckdb.DuckDBPyConnection, home: Path) -> None:
    """Make the home's current tables the views `old_<name>`; empty ones where nothing was written."""
    for table in _KEPT:
        db.execute(f"CREATE VIEW old_{table.name} AS {tables.rows_sql(home, table)}").fetchall()


def watch(home: Path, *, settings: Settings, last_event: datetime | None) -> tuple[str, ...]:
    """Hold the newest hours against their like, after an ingest; a sentence if some are odd. Raises StoreError."""
    if last_event is None:
        return ()
    found = quality.check_hours(home, settings=settings, as_of=clock(settings, last_event, datetime.now(UTC)))
    if found.empty:
        return ()
    told = ", ".join(f"{rows} {kind}" for kind, rows in found["kind"].value_counts().items())
    return (f"{len(found)} hours are unlike the same hours of the weeks before ({told}); they are in the table alerts",)


def _empty(table: Table) -> pa.Table:
    assert table.schema is not None
    return table.schema.empty_table()
