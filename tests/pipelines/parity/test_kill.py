"""A worker that is killed with SIGKILL in the middle of its work, again and again: in the end online equals offline."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import closing

import pytest

from pipelines import feature_store, features, ingest, tables
from pipelines.log import open_log
from pipelines.parity import values
from pipelines.stream import GROUP

pytestmark = pytest.mark.slow

KILLS = 4
WORKER = """
import sys
from contextlib import closing
from pathlib import Path
from pipelines.identity.online import Online
from pipelines.log import open_log
from pipelines.settings import Settings
from pipelines.stream import Stream
from pipelines.vault import open_vault

home, clock = Path(sys.argv[1]), Path(sys.argv[2])
settings = Settings(home=home)
vault = open_vault(home)
log = open_log(home, settings=settings, vault=vault, consumer="stream")
linker = Online(home, vault=vault)
stream = Stream(home, settings=settings, vault=vault, log=log, linker=linker, now_us=lambda: int(clock.read_text()))
print("at work", flush=True)
while True:
    stream.step(wait_s=0.01)
"""


def start(home, clock):
    worker = subprocess.Popen([sys.executable, "-c", WORKER, str(home), str(clock)], stdout=subprocess.PIPE, text=True)
    assert worker.stdout.readline() == "at work\n"
    return worker


def tell(clock, at_us):
    fresh = clock.with_suffix(".new")
    fresh.write_text(str(at_us))
    fresh.replace(clock)


def wait_until_done(log):
    until = time.monotonic() + 120
    while log.pending(GROUP) and time.monotonic() < until:
        time.sleep(0.05)
    assert not log.pending(GROUP)


def test_worker_killed_at_any_moment_ends_where_the_tables_end(town, busy_of, tmp_path):
    calls, clock, rng = busy_of(town), tmp_path / "clock", random.Random(3)
    feature_store.apply(town.home)
    cuts = sorted(rng.sample(range(1, len(calls)), KILLS))
    tell(clock, calls[0].received_us)
    with closing(open_log(town.home, settings=town.settings)) as log:
        for first, last in zip([0, *cuts], [*cuts, len(calls)], strict=True):
            worker = start(town.home, clock)
            for call in calls[first:last]:
                log.append([call])
                tell(clock, call.received_us)
            if last < len(calls):
                time.sleep(rng.uniform(0, 0.1))  # at work on some of them
                os.kill(worker.pid, signal.SIGKILL)
            else:
                wait_until_done(log)
                end_us = calls[-1].received_us + 3 * 86_400_000_000
                tell(clock, end_us)
                expected = told(town, end_us)
                until = time.monotonic() + 60
                while (online := served(town, expected)) != expected and time.monotonic() < until:
                    time.sleep(0.2)
                worker.kill()
            worker.communicate()
    assert online == expected
    assert any(row["events_7d"] for row in expected["customer_activity"].values())


def told(town, at_us):
    """What the tables say of everybody then, by view and key."""
    ingest.drain(town.home, settings=town.settings)
    features.build(town.home)
    feast = feature_store.store(town.home)
    found = {}
    for table in (tables.CUSTOMER_ACTIVITY, tables.CUSTOMER_SESSION):
        view, keys = values.view_of(feast, table.name), [(name,) for name in sorted(set(tables.read(town.home, table)["customer_id"]))]
        found[table.name] = dict(zip(keys, values.offline(feast, view, [(key, at_us) for key in keys]), strict=True))
    return found


def served(town, expected):
    feast = feature_store.store(town.home)
    return {
        name: dict(zip(rows, values.online(feast, values.view_of(feast, name), list(rows)), strict=True)) for name, rows in expected.items()
    }
