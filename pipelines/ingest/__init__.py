"""Raw files -> the clean tables: events, quarantine, identities, consents, items, customer_profile, customer_consent.

In: files, a mapping, what the home already holds. Out: tables, and a report whose counts add up: rows read = accepted +
duplicate + quarantined; accepted = stored + consent_dropped. Nothing is published before every file was read to its end, and
`events` is published last: a run that was interrupted is run again. Never drops a row without counting it.

A file without a time of receipt is history: received when it happened, unless the caller says otherwise.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import pyarrow as pa

from pipelines import consent, tables
from pipelines.engine import connect
from pipelines.errors import InputError, StoreError
from pipelines.events import REASONS
from pipelines.ingest import cleaning, staging
from pipelines.ingest.cleaning import Basis
from pipelines.ingest.staging import Arrival, FileCount
from pipelines.settings import Settings
from pipelines.sources import SEGMENT, read
from pipelines.sources.mapping import Mapping, load_mapping

_PIECE_ROWS = 100_000  # of events, written at a time


@dataclass(frozen=True)
class IngestReport:
    """What became of the rows. Rows as read, an order of several products counting once, except `lines` and `withdrawn`."""

    read: int
    accepted: int
    duplicate: int
    quarantined: int
    consent_dropped: int
    stored: int  # of the accepted, the rows that are now events
    lines: int  # event rows that they became
    withdrawn: int  # event rows of earlier runs taken out, because a refusal of before them has arrived
    reasons: dict[str, int]  # code of events.REASONS -> rows quarantined
    first_event: datetime | None  # of the whole events table, UTC
    last_event: datetime | None
    has_consent: bool  # whether any person's data may be used: by their statements, or on a declared basis
    units: dict[str, str]  # file -> the unit its unix times were found to be in
    notes: tuple[str, ...]  # sentences a person should read


def ingest(
    home: Path,
    files: Sequence[str | Path],
    *,
    mapping: str | Path | Mapping | None,
    items_file: str | Path | None = None,
    settings: Settings,
    received: datetime | None = None,
) -> IngestReport:
    """Add the files' events to the home's tables. The same file a second time adds nothing.

    mapping: a Mapping, a TOML file, the name of a shipped one, or None for JSON of the Segment spec. items_file: JSON lines of
    item_id, category, price, available_from. received: when rows that do not say so themselves were received.
    Raises InputError for a file or mapping that cannot be read, or of which not one row is good: nothing is then published but
    the quarantine. Raises StoreError where the disk refuses.
    """
    if not files:
        raise InputError("ingest: expected at least one file of events, found none; name the files")
    plan = load_mapping(mapping) if isinstance(mapping, str | Path) else mapping
    try:
        with connect(home) as db:
            cleaning.attach(db, home)
            _read_items(db, items_file)
            counts = _stage_files(db, home, [Path(file) for file in files], plan, settings, received)
            report = _publish(db, home, counts, plan, settings)
            _note_down(home, report, counts, plan.source.name if plan else SEGMENT)
            return report
    except duckdb.IOException as error:
        raise StoreError(f"ingest: working space under {home} was refused ({error}); free space, then run again") from error


def ledger(home: Path) -> dict[str, int]:
    """Where every row ever received is: accepted = applied + quarantined + consent_dropped + erased + pending; duplicates beside it.

    Rows as read; `accepted` are those received for the first time. Files given again are duplicates, but for what they newly
    stored. Nothing waits or is erased yet: files are read to their end.
    """
    runs = tables.read(home, tables.INGESTS)
    first = ~runs.duplicated(["source", "sha256"])
    quarantined, dropped = (int(runs.loc[first, name].sum()) for name in ("quarantined", "consent_dropped"))
    applied, again = int(runs["stored"].sum()), runs.loc[~first, "read"] - runs.loc[~first, "stored"]
    return {
        "accepted": applied + quarantined + dropped,
        "applied": applied,
        "quarantined": quarantined,
        "consent_dropped": dropped,
        "erased": 0,
        "pending": 0,
        "duplicates": int(runs.loc[first, "duplicate"].sum() + again.sum()),
    }


def _note_down(home: Path, report: IngestReport, counts: list[FileCount], source: str) -> None:
    counted = ("read", "accepted", "duplicate", "quarantined", "consent_dropped", "stored")
    row = {name: [getattr(report, name)] for name in counted}
    digest = hashlib.sha256()
    for count in counts:
        with count.path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    files = ", ".join(count.path.name for count in counts)
    told = {"source": [source], "files": [files], "sha256": [digest.hexdigest()], "last_event": [report.last_event]}
    tables.append(home, tables.INGESTS, pa.table(told | row))


def _stage_files(
    db: duckdb.DuckDBPyConnection, home: Path, files: list[Path], mapping: Mapping | None, settings: Settings, received: datetime | None
) -> list[FileCount]:
    counts = [FileCount(path) for path in files]
    refused: list[pa.Table] = []
    try:
        for batch in read(files, mapping, batch_rows=settings.ingest.batch_rows):
            arrival = Arrival.of(batch.path, received)
            refused.append(staging.stage(db, batch, count=counts[batch.number], arrival=arrival, limits=settings.ingest))
    finally:
        _set_aside(db, home, refused)
    for count in counts:
        _check_some_good(count)
    return counts


def _set_aside(db: duckdb.DuckDBPyConnection, home: Path, refused: list[pa.Table]) -> None:
    """Add the refused rows to the quarantine, each once however often its file is read."""
    if not refused:
        return
    db.register("refused_rows", pa.concat_tables(refused))
    db.register("held", tables.read_arrow(home, tables.QUARANTINE, ["quarantine_id"]))
    rows = db.sql(
        """SELECT * FROM refused_rows ANTI JOIN held USING (quarantine_id)
        QUALIFY row_number() OVER (PARTITION BY quarantine_id) = 1 ORDER BY file, row"""
    ).to_arrow_table()
    if len(rows) or not tables.exists(home, tables.QUARANTINE):
        tables.append(home, tables.QUARANTINE, rows)


def _check_some_good(count: FileCount) -> None:
    if count.accepted:
        return
    worst = ", ".join(f"{rows} {reason} ({REASONS[reason]})" for reason, rows in count.reasons.most_common(3))
    raise InputError(
        f"ingest: expected events in {count.path}, found none among {count.quarantined} rows: {worst}; nothing was published, "
        "the rows are in quarantine; check that the file and its mapping belong together"
    )


def _publish(
    db: duckdb.DuckDBPyConnection, home: Path, counts: list[FileCount], mapping: Mapping | None, settings: Settings
) -> IngestReport:
    source = mapping.source.name if mapping else SEGMENT
    staged = sum(count.accepted for count in counts)
    fresh = cleaning.find_fresh(db, source)
    cleaning.resolve_identities(db)
    has_statements = bool(db.sql("SELECT 1 FROM fresh WHERE consent IS NOT NULL LIMIT 1").fetchall())
    basis = _basis(mapping, settings, has_statements=has_statements)
    dropped, withdrawn = cleaning.carry_consent(db, basis, settings)
    cleaning.form_events(db, source, settings)
    cleaning.describe_customers(db)
    cleaning.list_items(db)
    cleaning.forget_the_rest(db)
    if fresh or not tables.exists(home, tables.EVENTS) or _rows(db, "catalogue"):
        _write(db, home, settings.consent.purpose)
    reasons = sum((count.reasons for count in counts), Counter[str]())
    first, last = db.sql("SELECT min(event_timestamp), max(event_timestamp) FROM all_events").fetchall()[0]
    return IngestReport(
        read=staged + reasons.total(),
        accepted=fresh,
        duplicate=staged - fresh,
        quarantined=reasons.total(),
        consent_dropped=dropped,
        stored=fresh - dropped,
        lines=_rows(db, "kept"),
        withdrawn=withdrawn,
        reasons={reason: reasons[reason] for reason in REASONS if reasons[reason]},
        first_event=first and first.astimezone(UTC),
        last_event=last and last.astimezone(UTC),
        has_consent=basis is not None or has_statements,
        units={count.path.name: count.unit for count in counts if count.unit},
        notes=_notes(fresh, dropped, staged, source, basis, settings, has_statements=has_statements),
    )


def _write(db: duckdb.DuckDBPyConnection, home: Path, purpose: str) -> None:
    """Publish the tables, `events` last: those before it only gain what it will refer to, so the next run mends one cut short."""
    known = consent.known_sql("kept_consents", purpose=purpose)
    order = {
        tables.IDENTITY_LINKS: ("SELECT * FROM kept_links", "anonymous_id, user_id, email, event_timestamp"),
        tables.CUSTOMER_PROFILE: ("SELECT * FROM profile", "customer_id, event_timestamp"),
        tables.CONSENTS: ("SELECT * FROM kept_consents", "customer_id, purpose, event_timestamp"),
        tables.CUSTOMER_CONSENT: (f"SELECT * FROM ({known})", "customer_id, event_timestamp"),
        tables.IDENTITIES: ("SELECT * FROM kept_identities", "identifier, event_timestamp"),
        tables.ITEMS: ("SELECT * FROM all_items", "item_id"),
        tables.EVENTS: ("SELECT * FROM all_events", "event_timestamp, source, event_id"),
    }
    for table, (rows, by) in order.items():
        tables.write(home, table, db.sql(f"{rows} ORDER BY {by}").to_arrow_reader(_PIECE_ROWS))


def _read_items(db: duckdb.DuckDBPyConnection, items_file: str | Path | None) -> None:
    """Create `catalogue`: item_id, category, price_cents, available_from; empty without a file."""
    columns = "{item_id: 'VARCHAR', category: 'VARCHAR', price: 'VARCHAR', available_from: 'TIMESTAMPTZ'}"
    lines = "(SELECT NULL AS item_id, NULL AS category, NULL AS price, CAST(NULL AS TIMESTAMPTZ) AS available_from WHERE false)"
    if items_file is not None:
        if not Path(items_file).is_file():
            raise InputError(f"ingest: expected the items in {items_file}, found no file; check the path")
        path = str(items_file).replace("'", "''")
        lines = f"read_json('{path}', format = 'newline_delimited', columns = {columns})"
    try:
        db.execute(
            f"""CREATE TABLE catalogue AS
            SELECT CAST(item_id AS VARCHAR) AS item_id, CAST(min_by(category, available_from) AS VARCHAR) AS category,
                CAST(round(min_by(TRY_CAST(price AS DECIMAL(18, 4)), available_from) * 100) AS BIGINT) AS price_cents,
                min(available_from) AS available_from
            FROM {lines} WHERE item_id IS NOT NULL GROUP BY item_id"""
        ).fetchall()
    except duckdb.Error as error:
        what = str(error).splitlines()[0]
        asked = "JSON lines of item_id, category, price, available_from"
        raise InputError(f"ingest: expected {asked} in {items_file}, found {what}; mend that line, then run again") from error


def _basis(mapping: Mapping | None, settings: Settings, *, has_statements: bool) -> Basis | None:
    """The mapping's declaration; else that of the settings, for a source whose events say nothing themselves."""
    if mapping is not None and mapping.consent is not None:
        return Basis(mapping.consent.legal_basis, mapping.consent.purposes)
    if settings.consent.legal_basis and not has_statements:
        return Basis(settings.consent.legal_basis, (settings.consent.purpose,))
    return None


def _notes(
    fresh: int, dropped: int, staged: int, source: str, basis: Basis | None, settings: Settings, *, has_statements: bool
) -> tuple[str, ...]:
    notes = []
    purpose = settings.consent.purpose
    if staged and not fresh:
        notes.append("every good row of these files was ingested before; nothing was added")
    if dropped and basis is None and not has_statements:
        notes.append(
            f"the source {source} carries no consent and no legal basis was declared for it, so none of its {dropped} rows may be used; "
            "declare one under [consent] in the mapping, or as RAPPORT_CONSENT__LEGAL_BASIS"
        )
    elif dropped and basis is not None and purpose not in basis.purposes:
        notes.append(f"the legal basis of {source} covers {', '.join(basis.purposes)}, not {purpose}; {dropped} rows were not used")
    return tuple(notes)


def _rows(db: duckdb.DuckDBPyConnection, name: str) -> int:
    return int(db.sql(f"SELECT count(*) FROM {name}").fetchall()[0][0])
