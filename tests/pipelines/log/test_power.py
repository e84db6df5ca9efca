"""The power fails: what was answered is kept. The log's own code runs on a disk that loses what was not synchronised.

The disk is a layer of SQLite (an APSW VFS) that notes down each write until its file is synchronised. At a cut, each write that is
still noted down is kept, torn at a sector or undone at random, as a real disk may; then the log is opened again.
"""

import random
import shutil
import sqlite3
import tempfile
from contextlib import nullcontext, suppress
from itertools import count
from pathlib import Path

import apsw
import pytest

from pipelines.errors import StoreError
from pipelines.log.connection import PRAGMAS

SECTOR = 512
NAMES = count()
CUTS_PER_HOME = 10


class Disk(apsw.VFS):
    """Files whose unsynchronised writes can be taken back. `left`: operations until the power fails; None: it does not."""

    def __init__(self):
        self.name = f"losing-{next(NAMES)}"
        super().__init__(self.name, "")
        self.written, self.syncs, self.left, self.is_off = {}, 0, None, False

    def xOpen(self, name, flags):  # noqa: N802
        return File(self, name, flags)

    def xDelete(self, filename, syncdir):  # noqa: N802
        self.work()
        self.written.pop(filename, None)
        super().xDelete(filename, syncdir)

    def work(self):
        if self.left is not None:
            self.left -= 1
            self.is_off |= self.left <= 0
        if self.is_off:
            raise apsw.IOError("the power is off")

    def cut(self, rng):
        """What the disk holds when the power is back."""
        for path, writes in self.written.items():
            with Path(path).open("r+b") as file:
                for at, old, _, size in reversed(writes):
                    file.seek(at)
                    file.write(old)
                    file.truncate(size)
                for at, _, new, _ in writes:
                    fate = rng.random()
                    if new is not None and fate < 0.4:
                        file.seek(at)
                        file.write(new if fate < 0.3 else new[: SECTOR * rng.randrange(1 + len(new) // SECTOR)])
        self.written, self.left, self.is_off = {}, None, False


class File(apsw.VFSFile):
    def __init__(self, disk, name, flags):
        self.disk, self.path = disk, name.filename() if isinstance(name, apsw.URIFilename) else name
        super().__init__("", name, flags)

    def note(self, at, new, length):
        size = self.xFileSize()
        old = super().xRead(min(length, max(size - at, 0)), at) if at < size and length else b""
        self.disk.written.setdefault(self.path, []).append((at, old, new, size))

    def xWrite(self, data, offset):  # noqa: N802
        self.disk.work()
        self.note(offset, bytes(data), len(data))
        super().xWrite(data, offset)

    def xTruncate(self, newsize):  # noqa: N802
        self.disk.work()
        self.note(newsize, None, max(self.xFileSize() - newsize, 0))
        super().xTruncate(newsize)

    def xSync(self, flags):  # noqa: N802
        self.disk.work()
        self.disk.syncs += 1
        self.disk.written.pop(self.path, None)


class Rows(list):
    """What sqlite3's cursor answers, of a query that apsw ran."""

    rowcount = 0

    def fetchall(self):
        return list(self)

    def fetchone(self):
        return self[0] if self else None


class Connection:
    """An apsw connection with the calls of sqlite3 that the log uses."""

    def __init__(self, disk, path, pragmas):
        self.db = apsw.Connection(str(path), vfs=disk.name)
        for pragma in pragmas:
            self.execute(f"PRAGMA {pragma}")

    @property
    def in_transaction(self):
        return self.db.in_transaction

    def execute(self, query, values=()):
        return self.run(self.db.execute, query, values)

    def executemany(self, query, values):
        return self.run(self.db.executemany, query, values)

    def run(self, call, query, values):
        try:
            rows = Rows(call(query, values))
        except apsw.Error as error:
            raise sqlite3.OperationalError(str(error)) from error
        rows.rowcount = self.db.changes()
        return rows

    def close(self):
        with suppress(apsw.Error):
            self.db.close()


class Home:
    """A log on a losing disk. `acked`: what must be there; `lost`: what was not; `balances`: whether the books must agree too."""

    def __init__(self, tools, rng, pragmas, *, balances=True):
        self.folder = Path(tempfile.mkdtemp(dir=tools.memory))
        self.world, self.disk, self.rng, self.pragmas = tools.World(self.folder), Disk(), rng, pragmas
        self.numbers, self.offered, self.acked, self.answered, self.lost = count(), set(), set(), 0, 0
        self.balances, self.connections = balances, []

    def connect(self, path):
        self.connections.append(Connection(self.disk, path, self.pragmas))
        return self.connections[-1]

    def open(self):
        return self.world.open(connect=self.connect)

    def one_cut(self):
        """The power fails at a random operation: one time in five while the log is opened, else while it works."""
        if self.rng.random() < 0.2:
            self.disk.left = self.rng.randrange(1, 60)
            with suppress(StoreError):
                self.open()
        else:
            self.work()
        self.disk.is_off = True
        for connection in self.connections:
            connection.close()
        self.connections, self.world.logs = [], []
        for path in self.folder.rglob("*-shm"):
            path.unlink()
        self.disk.cut(self.rng)

    def work(self):
        with nullcontext() if self.balances else suppress(StoreError):
            log = self.open()
            self.look(log)
        with suppress(StoreError):
            self.disk.left = self.rng.randrange(1, 400)
            while True:
                numbers = [next(self.numbers) for _ in range(self.rng.randrange(1, 7))]
                self.offered.update(numbers)
                log.append([self.world.event(n) for n in numbers])
                self.acked.update(numbers)
                self.answered += len(numbers)
                if self.rng.random() < 0.05:
                    self.world.hours_pass(25)
                if self.rng.random() < 0.2:
                    log.commit("g", [event.position for event in log.read("g", max_events=20)])

    def look(self, log):
        events = log.read(f"look-{next(self.numbers)}", max_events=10**6)
        numbers = [int(event.payload[6:-1]) for event in events]
        self.lost += len(self.acked.difference(numbers))
        self.acked = set(numbers)
        assert self.acked <= self.offered
        if self.balances:
            counts, ledger = log.counts(), log.group_counts("g")
            assert len(numbers) == len(self.acked) == counts.appended, "each is there once, and counted"
            assert sum((ledger.committed, ledger.parked, ledger.erased, ledger.pending)) == counts.appended
            assert not log.parked(1), "none is damaged"
            assert log.append([self.world.event(n) for n in numbers]) == ["duplicate"] * len(numbers), "its id is known"

    def close(self):
        with nullcontext() if self.balances else suppress(StoreError):
            self.look(self.open())
        self.world.close()
        shutil.rmtree(self.folder)


def losses(tools, *, cuts, pragmas, **options):
    """Events acknowledged, and those of them that were gone after a cut."""
    rng, answered, lost = random.Random(1), 0, 0
    for _ in range(cuts // CUTS_PER_HOME):
        home = Home(tools, rng, pragmas, **options)
        for _ in range(CUTS_PER_HOME):
            home.one_cut()
        home.close()
        answered, lost = answered + home.answered, lost + home.lost
    return answered, lost


@pytest.mark.slow
def test_a_thousand_power_cuts_lose_nothing_that_was_acknowledged(tools):
    answered, lost = losses(tools, cuts=1_000, pragmas=PRAGMAS)
    assert lost == 0
    assert answered > 5_000, "the control: much was acknowledged"


def test_without_full_synchronisation_power_cuts_do_lose_what_was_acknowledged(tools):
    """The control. Nor do the books of several files balance then: that is not looked at."""
    answered, lost = losses(tools, cuts=50, pragmas=[pragma.replace("FULL", "NORMAL") for pragma in PRAGMAS], balances=False)
    assert lost > 0.05 * answered


def test_every_commit_is_synchronised_before_it_is_answered(tools):
    synced = {}
    for level in ("FULL", "NORMAL"):
        home = Home(tools, random.Random(1), ("journal_mode = WAL", f"synchronous = {level}"))
        log = home.open()
        before = home.disk.syncs
        for n in range(100):
            log.append([home.world.event(n)])
        synced[level] = home.disk.syncs - before
        home.world.close()
    assert synced["FULL"] >= 100
    assert synced["NORMAL"] < 10, "the control"
