"""The worker is killed: whatever moment it is, what is online and in the state at the end is as if nothing had happened."""

import os
import random
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime

import pytest

from pipelines.stream import Stream

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("RAPPORT_KILLS", "4"))
ALLOW, DENY = {"personalization": True}, {"personalization": False}
DAY = 86_400.0

# argv: home, what "now" is, the call after which to die, and which of them: then the log is told after every batch, so that how far a
# life gets does not hang on how fast the machine is.
WORK = """
import os, signal, sys
from datetime import datetime
from pathlib import Path
from pipelines.identity.online import Online
from pipelines.log import open_log
from pipelines.log.store import Log
from pipelines.online.writer import OnlineWriter
from pipelines.settings import Settings
from pipelines.stream import Stream, acknowledgement, worker
from pipelines.stream.acknowledgement import Acknowledgement
from pipelines.stream.item_rows import ItemRows
from pipelines.stream.timetable import Timetable
from pipelines.vault import open_vault

home, at, where, nth = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
worker.BATCH_EVENTS, worker.SLICE_S = 5, 3_600.0
if where:
    acknowledgement.EVERY_S, Acknowledgement.begin = 0.0, Acknowledgement.finish
settings = Settings(home=home, as_of=datetime.fromisoformat(at))
vault = open_vault(home)
log = open_log(home, settings=settings, vault=vault, consumer="stream")
linker = Online(home, vault=vault)
seen = 0

def die_after(owner, name):
    real = getattr(owner, name)
    def call(*args, **options):
        global seen
        answer = real(*args, **options)
        seen += 1
        if seen == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer
    setattr(owner, name, call)

stream = Stream(home, settings=settings, vault=vault, log=log, linker=linker)
if where == "linker":
    die_after(linker, "link")
if where == "state":
    die_after(Timetable, "put")
if where == "moved":
    die_after(Timetable, "move")
if where == "item":
    die_after(ItemRows, "put_due")
if where == "item moved":
    die_after(ItemRows, "move_due")
if where == "online":
    die_after(OnlineWriter, "write")
    die_after(OnlineWriter, "renew")
if where == "log":
    die_after(log, "commit")
if where == "told first":  # the defect that is planted
    real = Stream._write
    def early(self, batch):
        log.commit(self.group, [call.position for call in batch])
        return real(self, batch)
    Stream._write = early
    die_after(log, "commit")
print("ready", flush=True)
while True:
    if not (done := stream.step(wait_s=0.0)).read and not done.expired:
        print("idle", flush=True)
        break
stream.close()
"""


def story(world) -> None:
    """People who come, go, log in, refuse, and are silent for long."""
    rng = random.Random(5)
    at_s = 0.0
    for n in range(90):
        at_s += rng.choice([0.1, 3, 400, 2_000])
        user, device = rng.choice([("u1", None), ("u2", "d2"), (None, "d1"), (None, "d2"), (f"u{n % 9}", None)])
        said = rng.choice([ALLOW] * 9 + [DENY])
        late_s = rng.choice([0, 0, 0, 500])
        world.say(at_s, user=user, device=device, consent=said, made_s=at_s - late_s, product_id=f"i{n % 5}", price=n)
    world.say(at_s + 1, "identify", user="u1", device="d1")


def run(world, where="", nth=0, *, kill_s=None):
    """One life of a worker; what it said."""
    at = world.at.isoformat()
    child = subprocess.Popen(
        [sys.executable, "-c", WORK, str(world.home), at, where, str(nth)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        if kill_s is not None:
            assert child.stdout.readline() == "ready\n"
            time.sleep(kill_s)
            child.kill()
        return child.communicate(timeout=120)[0]
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)


def held(world):
    """All that is online and in the state, without what numbers the log and the minutes give."""
    state = world.stream.activity.state.db
    owners = state.execute("SELECT who, customer_id FROM owners ORDER BY 1, 2").fetchall()
    rows = state.execute("SELECT source, event_id, who, event_us, known_us, revenue_cents, allows FROM rows ORDER BY 1, 2").fetchall()
    return (
        [world.online(view) for view in ("customer_activity", "customer_session", "customer_item", "item_activity")],
        owners,
        rows,
        state.execute("SELECT customer_id, at_us FROM due ORDER BY 1").fetchall(),
        state.execute("SELECT item_id, at_us FROM item_due ORDER BY 1").fetchall(),
    )


@pytest.fixture
def pair(new_world):
    """A world that is worked on in peace, and one whose workers die."""
    calm = new_world()
    torn = new_world(like=calm)
    for world in (calm, torn):
        world.stream.close()
        story(world)
        world.at = datetime(2026, 3, 10, tzinfo=UTC)  # some of the windows have passed by then
    run(calm)
    return calm, torn


def test_kills_at_any_moment_change_nothing(pair) -> None:
    calm, torn = pair
    rng = random.Random(int(os.environ.get("RAPPORT_SEED", "1")))
    for _ in range(KILLS):
        run(torn, kill_s=rng.random() * 0.4)
    assert run(torn).endswith("idle\n")
    assert held(reopened(torn)) == held(reopened(calm))


def test_kills_between_any_two_commits_change_nothing(pair) -> None:
    calm, torn = pair
    for where, nth in (
        ("linker", 2),
        ("state", 1),
        ("item", 1),
        ("online", 4),
        ("log", 3),
        ("linker", 1),
        ("state", 3),
        ("online", 1),
        ("log", 1),
    ):
        assert run(torn, where, nth) == "ready\n", where
    run(torn, "moved", 1)
    run(torn, "item moved", 2)
    assert run(torn).endswith("idle\n")
    assert held(reopened(torn)) == held(reopened(calm))


def test_a_worker_that_tells_the_log_first_loses_events(pair) -> None:
    """The control."""
    calm, torn = pair
    run(torn, "told first", 3)
    assert run(torn).endswith("idle\n")
    assert held(reopened(torn)) != held(reopened(calm))


def reopened(world):
    world.linker.close()
    world.start()
    assert isinstance(world.stream, Stream)
    return world
