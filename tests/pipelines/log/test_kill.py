"""The process is killed: what it had answered is kept, and what it had read goes to another reader."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from pipelines.log import Incoming, open_log
from pipelines.settings import Settings

KILLS = int(os.environ.get("RAPPORT_KILLS", "10"))
TAKEOVER_S = 5.0  # longer than a machine stands still: what a living reader holds is not given to the other

# Many clients, one writer; an answer is printed when it is there, so that what is printed was acknowledged.
WRITE = """
import itertools, os, sys, threading
from pathlib import Path
from pipelines.log import Incoming, Writer, open_log
from pipelines.settings import Settings

home, start = Path(sys.argv[1]), int(sys.argv[2])
log = open_log(home, settings=Settings(home=home))
writer = Writer(log, group_events=1000, queue_events=20000)
numbers = itertools.count(start)

def send(_=None):
    n = next(numbers)
    event = Incoming("shop", f"m{n}", (f"user_id:{n % 500}",), b"%d" % n, n)
    again = Incoming("shop", f"m{n // 2}", (f"user_id:{n // 2 % 500}",), b"%d" % (n // 2), n)
    future = writer.submit([event, again])
    future.add_done_callback(lambda future: (os.write(1, b"%d %s\\n" % (n, future.result()[0].encode())), send()))

for _ in range(128):
    send()
threading.Event().wait()
"""

# Answers before it commits. The last commit waits for a line that nobody sends, so that a kill always falls before it.
EARLY = """
import sys
from pathlib import Path
from pipelines.log import Incoming, open_log
from pipelines.settings import Settings

home = Path(sys.argv[1])
log = open_log(home, settings=Settings(home=home))
for start in (0, 100):
    print(*range(start, start + 100), sep="\\n", flush=True)
    if start:
        sys.stdin.readline()
    log.append([Incoming("shop", f"m{n}", (), b"%d" % n, n) for n in range(start, start + 100)])
"""

READ = """
import sys, time
from pathlib import Path
from pipelines.log import Incoming, open_log
from pipelines.settings import EdgeSettings, Settings

home = Path(sys.argv[1])
log = open_log(home, settings=Settings(home=home, edges=EdgeSettings(takeover_s=float(sys.argv[2]))))
while True:
    for event in log.read("g", max_events=20, wait_s=0.2):
        print(event.position, flush=True)
        time.sleep(0.002)
        log.commit("g", [event.position])
"""


class Process:
    """A program that prints into a file, until it is killed."""

    def __init__(self, program, folder, *arguments):
        self.said = folder / f"said-{time.monotonic_ns()}"
        with self.said.open("wb") as file:
            command = [sys.executable, "-c", program, *map(str, arguments)]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file, start_new_session=True, env=environment)

    def has_said(self, lines):
        end = time.monotonic() + 60
        while self.said.read_bytes().count(b"\n") < lines and time.monotonic() < end and self.process.poll() is None:
            time.sleep(0.005)

    def kill(self):
        """What it had printed in whole lines."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=30)
        self.process.stdin.close()
        text = self.said.read_text()
        return text[: text.rfind("\n") + 1].splitlines()


@pytest.mark.slow
def test_kills_of_the_writing_process_lose_nothing_that_was_acknowledged(tmp_path):
    rng, acked, repeated = random.Random(3), set(), 0
    for kill in range(KILLS):
        process = Process(WRITE, tmp_path, tmp_path, 10_000_000 * kill)
        try:
            process.has_said(101)
            time.sleep(rng.uniform(0.02, 0.4))
        finally:
            lines = process.kill()
        for line in lines:
            number, _, outcome = line.partition(" ")
            repeated += int(number) in acked
            assert outcome in ("appended", "duplicate")
            acked.add(int(number))
    log = open_log(tmp_path, settings=Settings(home=tmp_path))
    there = [int(event.payload) for event in log.read("g", max_events=10**7)]
    assert not acked - set(there), "none lost"
    assert len(there) == len(set(there)), "none twice"
    assert not repeated
    assert log.counts().appended == len(there) == log.pending("g")
    assert len(acked) > 100 * KILLS, "the control: much was acknowledged"
    log.close()


def test_an_acknowledgement_before_the_commit_would_be_caught(tmp_path):
    """The control: a program that answers first and then commits loses what it answered to a kill."""
    process = Process(EARLY, tmp_path, tmp_path)
    try:
        process.has_said(200)
    finally:
        acked = {int(line) for line in process.kill()}
    log = open_log(tmp_path, settings=Settings(home=tmp_path))
    there = {int(event.payload) for event in log.read("g", max_events=10**7)}
    log.close()
    assert acked - there == set(range(100, 200))


@pytest.mark.slow
def test_a_killed_reader_s_work_is_taken_over(tmp_path):
    settings = Settings(home=tmp_path)
    log = open_log(tmp_path, settings=settings)
    log.append([Incoming("shop", f"m{n}", (), b"%d" % n, n) for n in range(600)])
    seen, readers = [], [Process(READ, tmp_path, tmp_path, TAKEOVER_S) for _ in range(2)]
    try:
        for _ in range(5):
            time.sleep(0.4)
            seen += readers.pop(0).kill()
            readers.append(Process(READ, tmp_path, tmp_path, TAKEOVER_S))
        waited = time.monotonic()
        while log.pending("g") and time.monotonic() - waited < 120:
            time.sleep(0.1)
    finally:
        for reader in readers:
            seen += reader.kill()
    assert log.pending("g") == 0
    assert log.group_counts("g").committed == 600
    assert {int(position) for position in seen} == set(range(1, 601)), "every event was given"
    assert len(seen) <= 600 + 6 * 20, "and only what was held at a kill was given again"
    log.close()
