"""How long after an event is durable its features are read: a running stream worker, events at a steady rate, and some that are watched.

In: an empty folder. Out: rows for `rapport bench features`. One rival writes a row to the same kind of store with Feast, which knows
neither the windows nor the newer row: its time is that of the write alone. The other is the machine: a bare row of SQLite by another
process, told and looked for in the same run and loop, so a figure that only the machine spoils is not taken for ours.
"""

import gc
import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pandas as pd

from pipelines import feature_store
from pipelines.bench.bare import Bare, bare
from pipelines.bench.row import BenchRow, row
from pipelines.errors import PipelineError, StoreError
from pipelines.log import Incoming, Writer, open_log
from pipelines.online.writer import IDENTIFIER_VIEW, OnlineWriter
from pipelines.settings import Settings
from pipelines.vault import Vault, open_vault

VIEW, FEATURE = "customer_activity", "events_total"
BARE = "a bare row by another process"
EVERY = 20  # of the events, one is watched
_PEOPLE = 2_000
_WAIT_S = 30.0


def freshness_rows(home: Path, *, per_s: int = 500, seconds: float = 8.0) -> list[BenchRow]:
    """Milliseconds from the log's answer to the value in the store, p50 and p99, at so many events a second."""
    feature_store.apply(home)
    watched = [f"watched-{n}" for n in range(int(per_s * seconds) // EVERY)]
    settings = Settings(home=home)
    with closing(open_vault(home)) as vault, closing(open_log(home, settings=settings, vault=vault)) as log, running(home):
        writer = Writer(log, group_events=settings.collect.group_events, queue_events=settings.collect.queue_events)
        with closing(writer), closing(OnlineWriter(home)) as online:
            writer.submit([event_of(vault, f"first-{name}", name) for name in watched]).result()
            customers = known(online, [vault.pseudonym("user_id", name) for name in watched])
            gc.freeze()  # or a collection among Feast's modules would be measured
            try:
                with bare(home) as machine:
                    took = watch(writer, online, vault, dict(zip(watched, customers, strict=True)), machine, per_s=per_s)
            finally:
                gc.unfreeze()
    name, feast = f"acked event to readable feature at {per_s} events/s", _by_feast(home)
    return [
        line
        for share in (50, 99)
        for line in (
            row(f"{name}: p{share}", at_share(took, share), "ms", "Feast's write of one row", at_share(feast, share)),
            row(
                f"{name}, and the machine: p{share}",
                at_share(took, share),
                "ms",
                "a bare row by another process",
                at_share(machine.took, share),
            ),
        )
    ]


def at_share(took: Sequence[float], share: int) -> float:
    """The smallest that this share of them, in percent, does not exceed."""
    return sorted(took)[min(len(took) - 1, len(took) * share // 100)]


@contextmanager
def running(home: Path) -> Iterator[None]:
    """The worker, as the service starts it."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAPPORT_")}
    with (home / "stream.log").open("wb") as out:
        command = [sys.executable, "-m", "pipelines.stream"]
        worker = subprocess.Popen(command, env=variables | {"RAPPORT_HOME": str(home.resolve())}, stdout=out, stderr=out)
    try:
        yield
        if worker.poll() is not None:
            raise PipelineError(f"bench: the stream ended by itself with {worker.returncode}; {home / 'stream.log'} says why")
    finally:
        worker.terminate()
        try:
            worker.wait(15.0)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def event_of(vault: Vault, message: str, user: str) -> Incoming:
    """A view of a product by this user, who allows it to be used, at this moment."""
    now = datetime.now(UTC)
    call = {
        "type": "track",
        "event": "Product Viewed",
        "messageId": message,
        "userId": user,
        "timestamp": now.isoformat(),
        "receivedAt": now.isoformat(),
        "properties": {"product_id": "i1", "price": 19.9},
        "context": {"consent": {"categoryPreferences": {"analytics": True, "personalization": True, "marketing": False}}},
    }
    return Incoming("bench", message, (vault.pseudonym("user_id", user),), json.dumps(call).encode(), int(now.timestamp() * 1e6))


def known(online: OnlineWriter, identifiers: Sequence[str], *, number: int = 1) -> list[str]:
    """Whose the identifiers are, once the worker has seen all of them and shows that `number` of their events."""
    until = time.monotonic() + _WAIT_S
    while time.monotonic() < until:
        owners = online.read(IDENTIFIER_VIEW, "customer_id", identifiers, join_key="identifier")
        customers = [str(owners[name][0]) for name in identifiers if name in owners]
        if len(customers) == len(identifiers):
            shown = online.read(VIEW, FEATURE, customers)
            if len(shown) == len(customers) and all(text == str(number) for text, _ in shown.values()):
                return customers
        time.sleep(0.1)
    raise StoreError(f"bench: the stream did not show {len(identifiers)} people within {_WAIT_S:g} s; its log says why")


def watch(
    writer: Writer, online: OnlineWriter, vault: Vault, watched: dict[str, str], machine: Bare, *, per_s: int, number: int = 2,
    is_over: Callable[[], bool] = lambda: False,
) -> list[float]:  # fmt: skip
    """Milliseconds of each watched event, which is its customer's `number`-th. Sends at the rate, and between two sends looks for those
    that wait. watched: customer of each user; those whose turn has not come when `is_over` are left out.
    """
    others = [f"other-{n}" for n in range(_PEOPLE)]
    durable: deque[tuple[str, float]] = deque()  # customer, and when their event was: told by the writer's thread, so nothing waits here
    waiting: dict[str, float] = {}
    took: list[float] = []
    started = time.perf_counter()
    left, sent, sent_watched = list(watched.items()), 0, 0
    while left or len(took) < sent_watched or not machine.is_idle:
        due = int((time.perf_counter() - started) * per_s)
        if is_over():
            left.clear()
        while left and sent < due:
            is_watched = sent % EVERY == 0
            sent_watched += is_watched
            user, customer = left.pop() if is_watched else (others[sent * 7919 % _PEOPLE], "")
            future = writer.submit([event_of(vault, f"m-{sent}", user)])
            sent += 1
            if is_watched:
                future.add_done_callback(partial(_note, durable, customer))
        while durable:
            customer, at = durable.popleft()
            waiting[customer] = at
            machine.tell()
        machine.look()
        shown = online.read(VIEW, FEATURE, list(waiting)) if waiting else {}
        now = time.perf_counter()
        for customer, (text, _) in shown.items():
            if text == str(number):
                took.append((now - waiting.pop(customer)) * 1e3)
        if now - started > len(watched) * EVERY / per_s + _WAIT_S:
            raise StoreError(
                f"bench: {sent_watched - len(took)} events were not readable within {_WAIT_S:g} s; the stream does not keep up"
            )
        time.sleep(0.0005)
    return took


def _note(durable: deque[tuple[str, float]], customer: str, _: object) -> None:
    durable.append((customer, time.perf_counter()))


def _by_feast(home: Path, n: int = 40) -> list[float]:
    feast, took = feature_store.store(home), []
    columns = {field.name: [1] for field in feast.get_feature_view(VIEW).features}
    for i in range(n):
        frame = pd.DataFrame({"customer_id": [f"rival-{i}"], "event_timestamp": [datetime.now(UTC)], **columns})
        started = time.perf_counter()
        feast.write_to_online_store(VIEW, frame)
        took.append((time.perf_counter() - started) * 1e3)
    return took
