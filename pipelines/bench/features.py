"""How fast features are built, joined and loaded, each figure beside a named rival's. In: an empty folder. Out: rows for `rapport bench`.

Every side runs in a process of its own (see `measured`). Sizes are in the names. Where redis-server is installed it is measured as well.
"""

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipelines.bench.building import build_rows
from pipelines.bench.following import following_rows
from pipelines.bench.freshness import freshness_rows
from pipelines.bench.joins import join_rows
from pipelines.bench.loading import load_rows
from pipelines.bench.row import BenchRow


@dataclass(frozen=True)
class Sizes:
    """How much is measured. `stock_*`: what Feast's own offline store is given; `built`: events; `rival_events`: what pandas is given."""

    labels: int
    rows: int
    stock_labels: int
    stock_rows: int
    built: tuple[int, ...]
    rival_events: int
    customers: int
    per_s: int = 500  # events, while it is watched when they are seen
    seconds: float = 8.0
    people: int = 10_000  # of whom an ingest is followed


TINY = Sizes(2_000, 10_000, 1_000, 5_000, (2_000,), 2_000, 200, per_s=100, seconds=1.0, people=200)
QUICK = Sizes(100_000, 500_000, 100_000, 500_000, (200_000,), 100_000, 10_000, people=2_000)
USUAL = Sizes(1_000_000, 5_000_000, 100_000, 1_000_000, (1_000_000,), 500_000, 100_000)
FULL = Sizes(1_000_000, 5_000_000, 1_000_000, 5_000_000, (1_000_000, 5_000_000, 10_000_000), 500_000, 100_000, people=50_000)


def feature_rows(folder: Path, *, sizes: Sizes = USUAL, redis_url: str | None = None) -> list[BenchRow]:
    """Training sets, building, loading, freshness. `redis_url`: of a server that may be emptied."""
    joined = join_rows(folder / "join", labels=sizes.labels, rows=sizes.rows, stock_labels=sizes.stock_labels, stock_rows=sizes.stock_rows)
    shutil.rmtree(folder / "join")
    built = build_rows(folder / "build", sizes=sizes.built, rival_events=sizes.rival_events)
    shutil.rmtree(folder / "build")
    loaded = load_rows(folder / "load", customers=sizes.customers, redis_url=redis_url)
    shutil.rmtree(folder / "load")
    fresh = freshness_rows(folder / "fresh", per_s=sizes.per_s, seconds=sizes.seconds)
    shutil.rmtree(folder / "fresh")
    followed = following_rows(folder / "followed", people=sizes.people, per_s=sizes.per_s)
    return joined + built + loaded + fresh + followed


@contextlib.contextmanager
def redis_beside(folder: Path) -> Iterator[str | None]:
    """The address of a Redis of our own on this machine, ended afterwards; None where there is no redis-server."""
    program = shutil.which("redis-server")
    if program is None:
        yield None
        return
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no", "--dir", str(folder)]
    server = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        server.kill()
        server.wait()


def _wait_for(port: int, *, timeout_s: float = 10.0) -> None:
    until = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
