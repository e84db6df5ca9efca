"""How long after an event is durable its features are read while an ingest runs, and while the stream takes over what it wrote.

In: an empty folder. Out: rows for `rapport bench features`. The people are there before, as in a shop that is open for a while; the ingest
is another process, as an operator starts it. The rival is the machine in the same loop: see `bare`.
"""

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pipelines import feature_store
from pipelines.bench.bare import bare
from pipelines.bench.freshness import BARE, EVERY, at_share, event_of, known, running, watch
from pipelines.bench.row import BenchRow, row
from pipelines.errors import PipelineError
from pipelines.log import Writer, open_log
from pipelines.online.writer import OnlineWriter
from pipelines.settings import Settings
from pipelines.stream import seeding
from pipelines.stream.state import State, path_of
from pipelines.vault import Vault, open_vault

_INGEST = """
import sys; from contextlib import closing; from pathlib import Path
from pipelines.ingest import drain; from pipelines.settings import Settings; from pipelines.vault import open_vault
settings = Settings(home=Path(sys.argv[1]))
with closing(open_vault(settings.home)) as vault:
    drain(settings.home, settings=settings, vault=vault)
"""
_AT_A_TIME = 1_000
QUIET_S = 3.0  # before the ingest, and after it was followed
LONGEST_S = 120.0


def following_rows(home: Path, *, people: int, per_s: int = 500) -> list[BenchRow]:
    """Milliseconds from the log's answer to the value in the store, p50, p99 and longest, and seconds until it is followed. people: known
    before, and shown. Raises PipelineError where the ingest fails, or is not followed.
    """
    feature_store.apply(home)
    watched = [f"watched-{n}" for n in range(int(per_s * LONGEST_S) // EVERY)]
    settings = Settings(home=home)
    with closing(open_vault(home)) as vault, closing(open_log(home, settings=settings, vault=vault)) as log:
        writer = Writer(log, group_events=settings.collect.group_events, queue_events=settings.collect.queue_events)
        with closing(writer):
            _fill(writer, vault, [*watched, *(f"person-{n}" for n in range(people))])
            _ingest(home).wait()
            with running(home), closing(OnlineWriter(home)) as online:
                writer.submit([event_of(vault, f"first-{name}", name) for name in watched]).result()
                customers = dict(zip(watched, known(online, _names(vault, watched), number=2), strict=True))
                _wait_for_quiet(home)
                gc.freeze()  # or a collection among Feast's modules would be measured
                try:
                    with bare(home) as machine, _beside(home) as ingest:
                        took = watch(writer, online, vault, customers, machine, per_s=per_s, number=3, is_over=ingest.is_over.is_set)
                finally:
                    gc.unfreeze()
    name = f"acked event to readable feature at {per_s} events/s while an ingest of {people:,} people is followed"
    shares = (("p50", 50), ("p99", 99), ("longest", 100))
    rows = [row(f"{name}: {told}", at_share(took, share), "ms", BARE, at_share(machine.took, share)) for told, share in shares]
    return [*rows, row(f"an ingest beside {per_s} events/s until it is followed", ingest.followed_s, "s", "the ingest", ingest.ingested_s)]


def _names(vault: Vault, users: list[str]) -> list[str]:
    return [vault.pseudonym("user_id", user) for user in users]


def _fill(writer: Writer, vault: Vault, names: list[str]) -> None:
    for start in range(0, len(names), _AT_A_TIME):
        writer.submit([event_of(vault, f"before-{name}", name) for name in names[start : start + _AT_A_TIME]]).result()


def _wait_for_quiet(home: Path) -> None:
    """Until everybody is shown: what the start of the worker leaves to be done is not the ingest's."""
    until = time.monotonic() + LONGEST_S
    with closing(State(path_of(home))) as state:
        while (next_us := state.next_due_us()) is not None and next_us < time.time() * 1e6:
            if time.monotonic() > until:
                raise PipelineError(f"bench: the stream did not show everybody within {LONGEST_S:g} s; {home / 'stream.log'} says why")
            time.sleep(0.1)


def _ingest(home: Path) -> "subprocess.Popen[bytes]":
    with (home / "ingest.log").open("wb") as out:
        return subprocess.Popen([sys.executable, "-c", _INGEST, str(home.resolve())], stdout=out, stderr=out)


@dataclass
class _Ingest:
    """One that runs beside. Seconds from its beginning until it ended, and until the stream has followed it."""

    code: int = -1
    ingested_s: float = 0.0
    followed_s: float = 0.0
    is_over: threading.Event = field(default_factory=threading.Event)

    def run(self, home: Path, stop: threading.Event) -> None:
        """Some seconds after its start; until some seconds after it was followed, or `stop`."""
        stop.wait(QUIET_S)
        begun_s = time.monotonic()
        self.code = _ingest(home).wait()
        self.ingested_s = time.monotonic() - begun_s
        while not self.code and not stop.wait(0.1) and not _is_followed(home):
            pass
        self.followed_s = time.monotonic() - begun_s
        stop.wait(QUIET_S)
        self.is_over.set()


@contextmanager
def _beside(home: Path) -> Iterator[_Ingest]:
    """Raises PipelineError where it fails, or was not followed when the block ends."""
    ingest, stop = _Ingest(), threading.Event()
    thread = threading.Thread(target=ingest.run, args=(home, stop))
    thread.start()
    try:
        yield ingest
    finally:
        stop.set()
        thread.join()
    if ingest.code:
        raise PipelineError(f"bench: the ingest ended with {ingest.code}; {home / 'ingest.log'} says why")
    if not _is_followed(home):
        raise PipelineError(f"bench: the ingest was not followed within {LONGEST_S:g} s; {home / 'stream.log'} says why")


def _is_followed(home: Path) -> bool:
    with closing(State(path_of(home))) as state:
        return state.note("version") == seeding.version_of(home)
