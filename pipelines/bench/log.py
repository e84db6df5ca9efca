"""How fast the durable log takes events, beside one commit per event. In: an empty folder. Out: rows for `rapport bench ingest`."""

import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from statistics import median

from pipelines.bench.row import BenchRow, row
from pipelines.log import Incoming, Log, Outcome, Writer, open_log
from pipelines.settings import Settings

_PEOPLE = 20_000
_PAYLOAD_BYTES = 345  # of a track call as SDKs send it


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
    return [row(name, median(numbers[key]), "events/s", "one commit per event", rival) for name, key in names.items()]


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
