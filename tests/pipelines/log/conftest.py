"""A log in a home of its own, with clocks that the tests move."""

import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines.log import Incoming, Log
from pipelines.vault import open_vault

TAKEOVER_S = 5.0
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None


def event(n, *, source="shop", people=(), payload=None, received_us=None):
    people = (people,) if isinstance(people, str) else tuple(people)
    return Incoming(source, f"m{n}", people, payload or b'{"n": %d}' % n, 1_000 + n if received_us is None else received_us)


class World:
    """A home whose log is opened, closed and opened again, on a machine whose clocks stand still until they are moved."""

    event = staticmethod(event)
    takeover_s = TAKEOVER_S

    def __init__(self, home):
        self.home, self.folder = home, home / "log"
        self.vault = open_vault(home)
        self.now_us, self.uptime_ns = 10**15, 10**12
        self.logs = []

    def open(self, **options):
        options = {"segment_hours": 24, "takeover_s": TAKEOVER_S} | options
        log = Log(self.folder, self.vault, clock=lambda: self.now_us, uptime=lambda: self.uptime_ns, **options)
        self.logs.append(log)
        return log

    def hours_pass(self, hours):
        self.now_us += int(hours * 3_600_000_000)

    def seconds_pass(self, seconds):
        self.uptime_ns += int(seconds * 1e9)

    def segments(self):
        return sorted(self.folder.glob("segments/*.db"))

    def bytes_with(self, needle):
        return [path.name for path in self.folder.rglob("*") if path.is_file() and needle in path.read_bytes()]

    def close(self):
        for log in self.logs:
            log.close()
        self.vault.close()


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    yield world
    world.close()


@pytest.fixture
def memory():
    """Makes folders that are fast, where no power is cut."""
    folders = []

    def made():
        folders.append(Path(tempfile.mkdtemp(dir=MEMORY)))
        return folders[-1]

    yield made
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def log(world):
    return world.open()


@pytest.fixture(scope="session")
def tools():
    """For tests that make their own worlds."""
    return SimpleNamespace(World=World, event=event, memory=MEMORY)
