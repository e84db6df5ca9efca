"""How fast a mapped file becomes clean tables, beside pandas in the same run. In: an empty folder. Out: rows for `rapport bench ingest`."""

import hashlib
import hmac
import time
from pathlib import Path

import numpy as np
import pandas as pd

from pipelines.bench.row import BenchRow, row
from pipelines.settings import Settings


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
    return [row("ingest: a mapped file to clean tables", rows / took, "rows/s", "pandas", rival)]


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
    parts = frame[["timestamp", "visitorid", "event", "itemid"]].astype(str)
    text = parts["timestamp"] + "|" + parts["visitorid"] + "|" + parts["event"] + "|" + parts["itemid"]
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
