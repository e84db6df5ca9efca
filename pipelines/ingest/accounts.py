"""Where every row ever received is, counted twice: at the door, and where rows are kept.

In: what each run noted down of its rows, the log's own counts, the messages, the quarantine. Out: tallies of a run, rows of the
table of ingests, and the ledger. The two counts share nothing: a row that gets lost between them shows as a balance that is not 0.
"""

import hashlib
from collections import Counter
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import tables
from pipelines.ingest.messages import APPLIED, DROPPED, ERASED
from pipelines.ingest.report import Tally
from pipelines.ingest.staging import Origin
from pipelines.log import open_log
from pipelines.settings import Settings

GROUP = "ingest"  # of the log's readers
FROM_LOG, FROM_QUARANTINE, ERASURE = "log", "quarantine", "erasure"  # what `files` says of rows that came from no file


def tally(db: duckdb.DuckDBPyConnection, origins: list[Origin], aside: dict[int, Counter[str]]) -> dict[int, Tally]:
    """Origin -> what became of its rows. `aside`: as `quarantine.reasons`."""

    def rows(query: str) -> dict[int, int]:
        return dict(db.sql(f"SELECT origin, count(*) FROM ({query}) GROUP BY origin").fetchall())

    fresh = "SELECT * FROM fresh WHERE line = 0"
    new = rows(f"SELECT * FROM ({fresh}) WHERE NOT is_known")
    dropped = rows(f"SELECT * FROM ({fresh}) SEMI JOIN dropped USING (origin, row) WHERE NOT is_known")
    let_in = rows(f"SELECT * FROM ({fresh}) ANTI JOIN dropped USING (origin, row) WHERE is_known")
    buried = rows("SELECT origin FROM buried WHERE NOT is_known UNION ALL SELECT origin FROM buried_refused")
    found = {}
    for origin in origins:
        at, set_aside = origin.number, aside.get(origin.number, Counter()).total()
        accepted = new.get(at, 0) + buried.get(at, 0)
        found[at] = Tally(
            read=origin.read,
            accepted=accepted,
            duplicate=origin.read - accepted - set_aside,
            quarantined=set_aside,
            consent_dropped=dropped.get(at, 0),
            erased=buried.get(at, 0),
            stored=new.get(at, 0) - dropped.get(at, 0),
            readmitted=let_in.get(at, 0),
        )
    return found


def note(
    source: str,
    counts: Tally,
    *,
    files: str,
    sha256: str | None = None,
    plan: str | None = None,
    positions: str | None = None,
    last_event: datetime | None = None,
) -> dict[str, Any]:
    """A row of the table of ingests."""
    told = {"source": source, "files": files, "sha256": sha256, "plan": plan, "positions": positions, "last_event": last_event}
    counted = ("read", "accepted", "duplicate", "quarantined", "consent_dropped", "erased", "stored")
    return told | {name: getattr(counts, name) for name in counted}


def moved(db: duckdb.DuckDBPyConnection, source: str) -> list[dict[str, Any]]:
    """What else to note down of a run: rows that leave the quarantine though no message of theirs is decided now.

    Each was counted when it was set aside, and is now known to be another row's duplicate.
    """
    left = "SELECT 1 FROM leaving WHERE reason IS NULL"
    decided = """SELECT source_no, message FROM fresh WHERE line = 0 AND is_known
        UNION ALL SELECT source_no, message FROM buried WHERE is_known"""
    gained = f"SELECT 1 FROM ({decided}) ANTI JOIN (FROM seen WHERE outcome = '{DROPPED}') dropped USING (source_no, message)"
    surplus = db.sql(f"SELECT (SELECT count(*) FROM ({left})) - (SELECT count(*) FROM ({gained}))").fetchall()[0][0]
    return [note(source, Tally(duplicate=surplus, quarantined=-surplus), files=FROM_QUARANTINE)] if surplus else []


def with_notes(home: Path, rows: list[dict[str, Any]]) -> pa.Table:
    """The table of ingests with these rows at its end."""
    return pa.concat_tables([tables.read_arrow(home, tables.INGESTS), pa.Table.from_pylist(rows, schema=tables.INGESTS.schema)])


def ingested_before(home: Path, *, sha256: str, source: str, plan: str) -> int:
    """Rows of the file, if it was ingested whole before by the same plan; else 0. A file of which no row was good is read again."""
    runs = tables.read_arrow(home, tables.INGESTS)
    same = runs.filter((pc.field("sha256") == sha256) & (pc.field("source") == source) & (pc.field("plan") == plan))
    return max(same["read"].to_pylist(), default=0)


def sha256_of(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def keep_refusal(home: Path, other: Path) -> None:
    """Add the quarantine of the home `other`, whose ingest was refused, to that of this one, each row once, and count it."""
    rows, held = tables.read_arrow(other, tables.QUARANTINE), tables.read_arrow(home, tables.QUARANTINE, ["quarantine_id"])
    fresh = rows.filter(pc.invert(pc.is_in(rows["quarantine_id"], value_set=held["quarantine_id"].combine_chunks())))
    if not len(fresh):
        return
    told = note(fresh["source"][0].as_py(), Tally(read=len(fresh), quarantined=len(fresh)), files=fresh["file"][0].as_py())
    with tables.together(home) as change:
        change.append(tables.QUARANTINE, fresh)
        change.write(tables.INGESTS, with_notes(home, [told]))


def count_erased(home: Path, rows: dict[str, int]) -> None:
    """Note down rows that an erasure took out of the quarantine: source -> rows. Their messages were never among the known ones."""
    told = [note(source, Tally(erased=n), files=ERASURE) for source, n in rows.items() if n]
    if told:
        with tables.together(home) as change:
            change.write(tables.INGESTS, with_notes(home, told))


def ledger(home: Path, *, settings: Settings | None = None) -> dict[str, int]:
    """Where every row ever received is: accepted = applied + quarantined + consent_dropped + erased + pending; duplicates beside it.

    Rows as read; `accepted` are those received for the first time, counted at the door: by the runs over files, and by the log. The
    rest is counted where it is: messages, quarantine, log. `balance`: accepted less the rest; anything but 0 is a loss or a defect.
    """
    tables.recover(home)
    runs = tables.read_arrow(home, tables.INGESTS)
    is_log = pc.equal(runs["files"], FROM_LOG)
    by_file = runs.filter(pc.invert(is_log))
    door, duplicates = _sum(by_file, "accepted") + _sum(by_file, "quarantined"), _sum(runs, "duplicate")
    kept = _kept(home)
    kept["erased"] += _sum(runs.filter(pc.equal(runs["files"], ERASURE)), "erased")
    if (home / "log" / "log.db").exists():
        with closing(open_log(home, settings=settings or Settings(home=home))) as log:
            counts, mine, aside = log.counts(), log.group_counts(GROUP), log.count_parked()
        # What our group found damaged was appended and set aside; what another group set aside comes to us as an event as well, and
        # its copy is counted as a duplicate.
        door += counts.appended + counts.erased + counts.parked - mine.parked - _sum(runs.filter(is_log), "duplicate")
        duplicates += counts.duplicate
        kept["erased"] += counts.erased + mine.erased
        kept["pending"] += mine.pending + aside
    return {"accepted": door} | kept | {"duplicates": duplicates, "balance": door - sum(kept.values())}


def _kept(home: Path) -> dict[str, int]:
    outcomes = {row["outcome"]: row["outcome_count"] for row in _counted(home)}
    return {
        "applied": outcomes.get(APPLIED, 0),
        "quarantined": tables.count(home, tables.QUARANTINE),
        "consent_dropped": outcomes.get(DROPPED, 0),
        "erased": outcomes.get(ERASED, 0),
        "pending": 0,
    }


def _counted(home: Path) -> list[dict[str, Any]]:
    read = tables.read_arrow(home, tables.MESSAGES, ["outcome"])
    rows: list[dict[str, Any]] = read.group_by("outcome").aggregate([("outcome", "count")]).to_pylist()
    return rows


def _sum(table: pa.Table, name: str) -> int:
    return int(pc.sum(table[name]).as_py() or 0)
