"""How fast the path is, each figure beside that of a named rival in the same run. In: an empty folder. Out: rows for `rapport bench`."""

import hashlib
import hmac
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd

from pipelines.log import Incoming, Log, Outcome, Writer, open_log
from pipelines.settings import Settings

_PEOPLE = 20_000
_PAYLOAD_BYTES = 345  # of a track call as SDKs send it


@dataclass(frozen=True)
class BenchRow:
    """One figure. `ratio`: value / rival_value; the unit says which way is better."""

    name: str
    value: float
    unit: str
    rival: str
    rival_value: float
    ratio: float


def log_rows(home: Path, *, events: int = 20_000, rounds: int = 3, settings: Settings | None = None) -> list[BenchRow]:
    """Durable, sealed events a second into the log: one by one from 128 senders, and by 100 from 64; then read back and committed.

    home: an empty folder on the disk to measure. The rival writes one event per commit to the same disk, between the rounds.
    """
    limits = settings or Settings(home=home)
    log = open_log(home, settings=limits)
    try:
        log.append(_events("warm", events))  # the people's keys are made, and the index of ids is not empty
        numbers: dict[str, list[float]] = {"single": [], "batch": [], "read": [], "rival": []}
        for turn in range(rounds):
            numbers["rival"].append(_rival(home / f"rival-{turn}.db", _events("rival", min(events, 2_000))))
            numbers["single"].append(_written(log, limits, _events(f"single-{turn}", events), senders=128, at_once=1))
            numbers["batch"].append(_written(log, limits, _events(f"batch-{turn}", events), senders=64, at_once=100))
            numbers["read"].append(_read(log, f"bench-{turn}", events))
    finally:
        log.close()
    rival = median(numbers["rival"])
    names = {
        "log: 128 senders, one event each": "single",
        "log: 64 senders, 100 events each": "batch",
        "log: read and committed by 1,000": "read",
    }
    return [
        BenchRow(name, median(numbers[key]), "events/s", "one commit per event", rival, median(numbers[key]) / rival)
        for name, key in names.items()
    ]


def ingest_rows(home: Path, *, rows: int = 1_000_000, settings: Settings | None = None) -> list[BenchRow]:
    """Rows a second from a Parquet file to clean, published tables: read, checked, deduplicated, pseudonymised, joined to people.

    home: an empty folder. The rival does in pandas what can be done there in few lines: it keeps no ledger, quarantine, consent or
    facts, resolves no identities, and publishes nothing atomically.
    """
    from pipelines.ingest import ingest

    path = home / "visits.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    _visits(rows).to_parquet(path)
    started = time.perf_counter()
    report = ingest(home, [path], mapping="retailrocket", settings=settings or Settings(home=home))
    took = time.perf_counter() - started
    started = time.perf_counter()
    stored = _cleaned_by_pandas(path, home / "rival.parquet")
    rival = rows / (time.perf_counter() - started)
    (home / "rival.parquet").unlink()
    if report.stored != stored:
        raise ValueError(f"bench: {report.stored} rows were stored, and {stored} by the rival; one of them is wrong")
    return [BenchRow("ingest: a mapped file to clean tables", rows / took, "rows/s", "pandas", rival, rows / took / rival)]


def _visits(rows: int) -> pd.DataFrame:
    """What visitors of a shop did in half a year; one row in a thousand comes twice."""
    rng = np.random.default_rng(7)
    frame = pd.DataFrame(
        {
            "timestamp": 1_430_000_000 + np.sort(rng.integers(0, 180 * 86_400, rows)),
            "visitorid": rng.zipf(1.4, rows) % max(rows // 40, 2),
            "event": rng.choice(["view", "addtocart", "transaction"], rows, p=[0.9, 0.07, 0.03]),
            "itemid": rng.integers(0, 20_000, rows),
        }
    )
    again = rng.integers(0, rows, rows // 1_000)
    return pd.concat([frame.iloc[: rows - len(again)], frame.iloc[again]], ignore_index=True)


def _cleaned_by_pandas(path: Path, out: Path) -> int:
    """The straightforward way; returns the events written."""
    frame = pd.read_parquet(path)
    kind = frame["event"].map({"view": "view", "addtocart": "cart_add", "transaction": "purchase"})
    frame = frame[kind.notna() & frame["visitorid"].notna() & frame["itemid"].notna()].assign(type=kind)
    text = frame[["timestamp", "visitorid", "event", "itemid"]].astype(str).agg("|".join, axis=1)
    frame["event_id"] = [hashlib.md5(row.encode()).hexdigest() for row in text]
    frame = frame.drop_duplicates("event_id")
    names = {name: hmac.digest(b"key", str(name).encode(), "sha256").hex()[:32] for name in frame["visitorid"].unique()}
    frame["customer_id"] = frame["visitorid"].map(names)
    frame["event_timestamp"] = pd.to_datetime(frame["timestamp"], unit="s", utc=True)
    frame = frame.sort_values(["customer_id", "event_timestamp"])
    silence = frame.groupby("customer_id")["event_timestamp"].diff() > pd.Timedelta(minutes=30)
    frame["session_id"] = frame["customer_id"] + silence.groupby(frame["customer_id"]).cumsum().astype(str)
    frame = frame.drop(columns=["visitorid", "timestamp", "event"]).sort_values(["event_timestamp", "event_id"])
    frame.to_parquet(out)
    return len(frame)


def _events(name: str, count: int) -> list[Incoming]:
    return [
        Incoming("bench", f"{name}-{n:012d}", (f"user_id:{n % _PEOPLE:032x}", f"anonymous_id:{n % _PEOPLE:032x}"), bytes(_PAYLOAD_BYTES), n)
        for n in range(count)
    ]


def _written(log: Log, limits: Settings, events: Sequence[Incoming], *, senders: int, at_once: int) -> float:
    """Events a second, by senders that send the next piece when the last one is on disk."""
    writer = Writer(log, group_events=limits.collect.group_events, queue_events=limits.collect.queue_events)
    pieces = iter([events[start : start + at_once] for start in range(0, len(events), at_once)])
    lock, idle = threading.Lock(), threading.Semaphore(0)

    def send() -> None:
        with lock:
            piece = next(pieces, None)
        if piece is None:
            idle.release()
            return
        writer.submit(piece).add_done_callback(answered)

    def answered(future: "Future[list[Outcome]]") -> None:
        future.result()
        send()

    def work() -> None:
        for _ in range(senders):
            send()
        for _ in range(senders):
            idle.acquire()

    rate = len(events) / _seconds(work)
    writer.close()
    return rate


def _read(log: Log, group: str, events: int) -> float:
    def work() -> None:
        left = events
        while left > 0 and (some := log.read(group, max_events=min(left, 1_000))):
            log.commit(group, [event.position for event in some])
            left -= len(some)

    return events / _seconds(work)


def _rival(path: Path, events: Sequence[Incoming]) -> float:
    db = sqlite3.connect(path, isolation_level=None)
    for pragma in ("journal_mode = WAL", "synchronous = FULL"):
        db.execute(f"PRAGMA {pragma}").fetchall()
    db.execute("CREATE TABLE events (source TEXT, message_id TEXT, payload BLOB, PRIMARY KEY (source, message_id))")

    def work() -> None:
        for event in events:
            db.execute("INSERT OR IGNORE INTO events VALUES (?, ?, ?)", (event.source, event.message_id, event.payload))

    rate = len(events) / _seconds(work)
    db.close()
    path.unlink()
    return rate


def _seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
