"""One thread, few commits: everything is answered once, after its commit, or refused."""

import shutil
import sqlite3
import subprocess
import threading
import time
from concurrent.futures import wait
from contextlib import suppress

import pytest

from pipelines.log import LogFull, QueueFull, Writer
from pipelines.log.connection import connect


@pytest.fixture
def writer(log):
    writer = Writer(log, group_events=1_000, queue_events=5_000)
    yield writer
    writer.close()


class Slow:
    """A log whose commits last until they are let go; notes the size of each."""

    def __init__(self):
        self.sizes, self.gate = [], threading.Semaphore(0)

    def append(self, events):
        self.gate.acquire()
        self.sizes.append(len(events))
        return ["appended"] * len(events)


def test_each_submission_gets_its_own_outcomes(world, writer):
    futures = [writer.submit([world.event(n), world.event(n % 10)]) for n in range(50)]
    assert [future.result(30) for future in futures[:2]] == [["appended", "duplicate"], ["appended", "duplicate"]]
    assert futures[-1].result(30) == ["appended", "duplicate"]
    assert writer.submit([]).result(0) == []


def test_what_waits_during_a_commit_goes_into_the_next_one_together(world):
    log = Slow()
    writer = Writer(log, group_events=30, queue_events=1_000)
    futures = [writer.submit([world.event(0)])]
    while writer.waiting:
        time.sleep(0.001)
    futures += [writer.submit([world.event(n)]) for n in range(1, 81)]
    futures += [writer.submit([world.event(n) for n in range(100)])]
    for _ in range(5):
        log.gate.release()
    wait(futures, 30)
    assert log.sizes == [1, 30, 30, 20, 100], "never more than a group, unless one submission is larger"
    writer.close()


def test_a_full_queue_refuses_and_takes_again_when_it_is_shorter(world):
    log = Slow()
    writer = Writer(log, group_events=10, queue_events=20)
    first = writer.submit([world.event(0)])
    while writer.waiting:
        time.sleep(0.001)
    kept = [writer.submit([world.event(n) for n in range(10)]) for _ in range(2)]
    with pytest.raises(QueueFull, match="20 events wait"):
        writer.submit([world.event(1)])
    for _ in range(3):
        log.gate.release()
    wait([first, *kept], 30)
    log.gate.release()
    assert writer.submit([world.event(1)]).result(30) == ["appended"]
    writer.close()


def test_closing_answers_everything_that_waits_and_then_takes_nothing(world, log):
    writer = Writer(log, group_events=7, queue_events=5_000)
    futures = [writer.submit([world.event(n)]) for n in range(200)]
    writer.close()
    assert [future.result(0) for future in futures] == [["appended"]] * 200
    with pytest.raises(QueueFull):
        writer.submit([world.event(1)])
    assert log.counts().appended == 200


def test_a_submission_that_cannot_be_written_fails_alone(world):
    log = Slow()
    log.append_slowly, log.append = log.append, lambda events: [len(event.payload) for event in log.append_slowly(events) and events]
    writer = Writer(log, group_events=100, queue_events=1_000)
    gate = writer.submit([world.event(0)])
    while writer.waiting:
        time.sleep(0.001)
    futures = [writer.submit([world.event(1)]), writer.submit([None]), writer.submit([world.event(2)])]
    for _ in range(9):
        log.gate.release()
    assert gate.result(30) == futures[0].result(30) == futures[2].result(30)
    with pytest.raises(AttributeError):
        futures[1].result(30)
    writer.close()


def test_an_answer_comes_after_its_commit(world):
    """Whoever is answered finds the event through another connection."""
    log, other = world.open(), world.open()
    writer, missing = Writer(log, group_events=10, queue_events=1_000), []
    for n in range(30):
        future = writer.submit([world.event(n)])
        future.add_done_callback(lambda _, n=n: other.counts().appended > n or missing.append(n))
        future.result(30)
    assert not missing
    writer.close()


# -- the disk is full


class Capped:
    """Connections to files that may not grow beyond some pages, until they may again."""

    def __init__(self):
        self.pages, self.open = None, []

    def __call__(self, path):
        db = connect(path)
        self.open.append((path, db))
        self.limit(self.pages)
        return db

    def limit(self, pages):
        self.pages = pages
        for path, db in self.open:
            if path.parent.name == "segments" and pages:
                with suppress(sqlite3.ProgrammingError):  # closed meanwhile
                    db.execute(f"PRAGMA max_page_count = {pages}")


def exercise_a_full_disk(world, log, fill, free):
    """Writes until nothing goes any more, then makes room; acked = present, reading goes on, writing resumes."""
    writer, acked, refused = Writer(log, group_events=100, queue_events=5_000), [], []

    def send(n):
        try:
            if writer.submit([world.event(n, people="user_id:a", payload=b"x" * 400)]).result(60) == ["appended"]:
                acked.append(n)
        except LogFull:
            refused.append(n)

    send(0)
    fill()
    n = 1
    while len(refused) < 20 and n < 20_000:
        send(n)
        n += 1
    assert len(refused) >= 20, "the control: the disk was full"
    assert len(log.read("reader", max_events=10**6)) == len(acked), "reading goes on"
    free()
    send(n)
    assert acked[-1] == n, "and so does writing, by itself"
    writer.close()
    assert [event.payload for event in log.read("all", max_events=10**6)] == [b"x" * 400] * len(acked)
    assert log.counts().appended == len(acked)
    assert log.append([world.event(n, people="user_id:a") for n in acked]) == ["duplicate"] * len(acked)
    assert log.append([world.event(n, people="user_id:a") for n in refused]) == ["appended"] * len(refused)


def test_a_full_disk_refuses_what_it_cannot_keep_and_nothing_else(world):
    capped = Capped()
    log = world.open(connect=capped)
    exercise_a_full_disk(world, log, lambda: capped.limit(60), lambda: capped.limit(1_000_000))


def test_a_vault_without_room_for_a_new_key_is_a_full_disk_too(world, log):
    db = world.vault._db
    db.execute(f"PRAGMA max_page_count = {db.execute('PRAGMA page_count').fetchone()[0]}")
    with pytest.raises(LogFull, match=r"vault.db cannot grow"):
        log.append([world.event(n, people=f"user_id:{n}") for n in range(500)])
    assert log.append([world.event(1)]) == ["appended"], "an event of nobody new needs no key"
    db.execute("PRAGMA max_page_count = 100000")
    assert log.append([world.event(n, people=f"user_id:{n}") for n in range(500)]).count("appended") == 499


def test_a_full_file_system_refuses_what_it_cannot_keep_and_nothing_else(tmp_path, tools):
    small = tmp_path / "small"
    small.mkdir()
    mount = shutil.which("mount")
    if not mount or subprocess.run([mount, "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("no small file system can be mounted here; the capped file above is the same promise")
    try:
        world = tools.World(small)
        log, ballast = world.open(), small / "ballast"

        def fill():
            with ballast.open("wb") as file:
                file.write(b"\0" * 4_000_000)

        exercise_a_full_disk(world, log, fill, ballast.unlink)
        world.close()
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)
