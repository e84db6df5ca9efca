"""How long after an event is durable its features are read while an ingest runs, and while the stream takes over what it wrote.

In: an empty folder. Out: rows for `rapport bench features`. The people are there before, as in a shop that is open for a while; the ingest
is another process, as an operator starts it. The rival is the machine in the same loop: see `bare`.
"""

import gc
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
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


def following_rows(home: Path, *, people: int, per_s: int = 500, seconds: float = 15.0) -> list[BenchRow]:
    """Milliseconds from the log's answer to the value in the store, p50, p99 and longest. people: known before.

    Raises PipelineError where the ingest was not taken over by the end of it.
    """
    feature_store.apply(home)
    watched = [f"watched-{n}" for n in range(int(per_s * seconds) // EVERY)]
    settings = Settings(home=home)
    with closing(open_vault(home)) as vault, closing(open_log(home, settings=settings, vault=vault)) as log:
        writer = Writer(log, group_events=settings.collect.group_events, queue_events=settings.collect.queue_events)
        with closing(writer):
            _fill(writer, vault, [*watched, *(f"person-{n}" for n in range(people))])
            _ingest(home).wait()
            with running(home), closing(OnlineWriter(home)) as online:
                writer.submit([event_of(vault, f"first-{name}", name) for name in watched]).result()
                customers = known(online, [vault.pseudonym("user_id", name) for name in watched], number=2)
                gc.freeze()  # or a collection among Feast's modules would be measured
                try:
                    with bare(home) as machine, _beside(home, after_s=seconds / 5):
                        took = watch(writer, online, vault, dict(zip(watched, customers, strict=True)), machine, per_s=per_s, number=3)
                        _check(home)
                finally:
                    gc.unfreeze()
    name = f"acked event to readable feature at {per_s} events/s while an ingest of {people:,} people is followed"
    shares = (("p50", 50), ("p99", 99), ("longest", 100))
    return [row(f"{name}: {told}", at_share(took, share), "ms", BARE, at_share(machine.took, share)) for told, share in shares]


def _fill(writer: Writer, vault: Vault, names: list[str]) -> None:
    for start in range(0, len(names), _AT_A_TIME):
        writer.submit([event_of(vault, f"before-{name}", name) for name in names[start : start + _AT_A_TIME]]).result()


def _ingest(home: Path) -> "subprocess.Popen[bytes]":
    with (home / "ingest.log").open("wb") as out:
        return subprocess.Popen([sys.executable, "-c", _INGEST, str(home.resolve())], stdout=out, stderr=out)


@contextmanager
def _beside(home: Path, *, after_s: float) -> Iterator[None]:
    """An ingest that begins so long after the block. Raises PipelineError where it fails."""
    programs: list[subprocess.Popen[bytes]] = []
    timer = threading.Timer(after_s, lambda: programs.append(_ingest(home)))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        codes = [program.wait() for program in programs]
    if codes != [0]:
        raise PipelineError(f"bench: the ingest ended with {codes}; {home / 'ingest.log'} says why")


def _check(home: Path) -> None:
    with closing(State(path_of(home))) as state:
        is_followed = state.note("version") == seeding.version_of(home)
    if not is_followed:
        raise PipelineError("bench: the ingest was not taken over while events were watched; give it more seconds")
